"""Writes the measured figures into the READMEs, from the files in `results`: none of them is typed by hand.

    python tests/benchmarks/lumina2_peers.py     # measures, and writes results/peers.json
    python tests/benchmarks/render.py            # writes the figures into all pages
    python tests/benchmarks/render.py --check    # writes nothing; fails where a page shows another figure

How to quote figures. A table stands between two comments, which name one of the functions in TABLES:

    <!-- results: peers shift_6 -->
    | method | ... |
    <!-- end -->

A figure in a sentence stands between two comments too. The first one is an expression; what follows is replaced:

    15 of 30 steps: <!--=psnr(peers.shift_6_computed_steps_15):.0f-->66<!----> dB

`peers.shift_6_computed_steps_15` is a row of results/peers.json, `.passes` its mean number of passes, `peers.about` what it
was measured on. A number has one decimal, or the format behind the colon. Arithmetic and these functions are at hand:

    psnr(row, to="uncached", of="all")    mean dB; to: "uncached", "converged", "float32", or another list of the row; of:
                                          "known", "new", "all" prompts
    least(row, to="uncached", of="all")   the least
    better(row, other, to="uncached")     in how many prompts or clips the first is closer, "7 of 8"
    gains(*pairs, to="uncached")          of (row, other) pairs, the differences of their means: "2.7 to 5.8"
    range_of(results, "mouth")            from the least to the largest mean of all rows: "0.910 to 0.922"
    mean(values), min(...), max(...), round(...), sum(...)

To see the keys of the rows: python tests/benchmarks/render.py --keys
"""

import argparse
import json
import re
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "tests" / "benchmarks" / "results"
PAGES = "README.md", "TeaCache4LuminaT2X/README.md", "TeaCache4Memo/README.md", "tests/benchmarks/README.md"
BLOCK = re.compile(r"(<!-- results: ([\w ]+?) -->\n).*?(<!-- end -->)", re.S)
INLINE = re.compile(r"(<!--=(.+?)(?::(\.\d[f%]))?-->).*?(<!---->)", re.S)


class NotMeasured(Exception):
    """There is no file of this name."""


class Results(dict):
    """{name: results}."""

    def __missing__(self, name):
        raise NotMeasured(name)


class Names(Results):
    """What an expression may use: the functions, and results by their names."""

    def __init__(self, results):
        super().__init__({**FUNCTIONS, **results})


def load(folder=RESULTS):
    """{name: results}: each row, or else each entry of the file, is an attribute of the results."""
    found = Results()
    for path in sorted(folder.glob("*.json")):
        whole = json.loads(path.read_text(encoding="utf-8"))
        rows = {key: SimpleNamespace(**row) for key, row in whole.get("rows", {}).items()}
        counts = [len(whole.get("about", {}).get(name, ())) for name in ("known", "new")]
        for row in rows.values():
            row.known = counts[0]
        found[path.stem] = SimpleNamespace(
            **(rows or whole), **{name: whole[name] for name in whole if name == "about"}
        )
    return found


# ------------------------------------------------------------------------------
# Figures
# ------------------------------------------------------------------------------


def flat(values):
    return [x for value in values for x in (flat(value) if isinstance(value, list) else [value])]


def mean(values):
    return statistics.mean(flat(values))


def of_prompts(row, to, of):
    """The dB of all images or clips, or of a group of prompts."""
    group = {"known": slice(None, row.known), "new": slice(row.known, None), "all": slice(None)}[of]
    return flat(getattr(row, to)[group])


def psnr(row, to="uncached", of="all"):
    return mean(of_prompts(row, to, of))


def least(row, to="uncached", of="all"):
    return min(of_prompts(row, to, of))


def better(row, other, to="uncached"):
    pairs = list(zip(of_prompts(row, to, "all"), of_prompts(other, to, "all")))
    return f"{sum(a > b for a, b in pairs)} of {len(pairs)}"


def gains(*pairs, to="uncached"):
    found = sorted(psnr(row, to) - psnr(other, to) for row, other in pairs)
    ends = list(dict.fromkeys(f"{found[i]:.1f}" for i in (0, -1)))
    return " to ".join(ends)


def range_of(results, name):
    """Of the means of all rows."""
    means = [mean(getattr(row, name)) for row in vars(results).values() if hasattr(row, name)]
    return f"{min(means):.3f} to {max(means):.3f}"


FUNCTIONS = {f.__name__: f for f in (psnr, least, better, gains, range_of, mean, min, max, round, sum, len)}


# ------------------------------------------------------------------------------
# Tables: each a function of the results, and of the words behind its name
# ------------------------------------------------------------------------------


def markdown(head, rows):
    lines = ["| " + " | ".join(map(str, line)) + " |" for line in (head, *rows)]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]]) + "\n"


def cell(row, to, of="all"):
    """ "66.8 (61.7)": mean and least."""
    values = of_prompts(row, to, of)
    return f"{mean(values):.1f} ({min(values):.1f})" if values and min(values) < 98.5 else "equal" if values else ""


def setting(row):
    return row.setting + (f" ({row.threshold})" if hasattr(row, "threshold") else "")


def peers(results, table):
    """All methods at one shift, or in bfloat16; mean and least of each group of prompts."""
    columns = [("float32", "known"), ("float32", "new")]
    head = ["method", "setting", "passes", "to uncached float32, known prompts", "new prompts"]
    if table != "rounding":
        columns = [("uncached", "known"), ("uncached", "new"), ("converged", "known"), ("converged", "new")]
        head = ["method", "setting", "passes", "to uncached, known prompts", "new", "to converged, known", "new"]
    rows = [row for row in vars(results["peers"]).values() if getattr(row, "table", "").replace(" ", "_") == table]
    if not rows:
        raise NotMeasured(table)
    methods = list(dict.fromkeys(row.method for row in rows))
    rows.sort(key=lambda row: methods.index(row.method))
    if table == "rounding":
        line = vars(results["peers"])["rounding_euler_uncached_30_steps"]
        head.append("minus uncached bfloat16")
        columns.append(None)

    def cells(row):
        for column in columns:
            yield (
                cell(row, *column)
                if column
                else ""
                if row is line
                else f"{psnr(row, 'float32') - psnr(line, 'float32'):+.1f}"
            )

    return markdown(head, [[row.method, setting(row), f"{row.passes:.1f}", *cells(row)] for row in rows])


def memo_peers(results, steps="20"):
    head = [
        "method",
        "setting",
        "passes",
        "wall",
        "to uncached, mean (least clip)",
        "clip 1, 2, 3",
        "to converged",
        "mouth",
    ]
    rows = [row for row in vars(results["memo_peers"]).values() if str(getattr(row, "steps", "")) == steps]

    def cells(row):
        same = cell(row, "uncached") == "equal"
        drift = "" if same else ", ".join(f"{mean(clips):.1f}" for clips in zip(*row.uncached))
        yield from (row.method, row.setting, f"{mean(row.passes):.1f}", f"{mean(row.time):.2f}")
        yield from (cell(row, "uncached"), drift, cell(row, "converged"), f"{mean(row.mouth):.3f}")

    return markdown(head, [list(cells(row)) for row in rows])


def front_lumina2(results):
    """The table of the front page. A row that was not measured is left out."""
    found = vars(results["peers"])
    names = [
        ("uncached", "euler_uncached_30_steps"),
        ("15 plain steps", "fewer_euler_steps_15_steps"),
        ("10 plain steps", "fewer_euler_steps_10_steps"),
        ("second-order solver (Adams-Bashforth 2)", "ab2_15_steps"),
        ("the same at shift 1", "ab2_at_shift_1_15_steps"),
        ("TeaCache as published, 0.3, v1", "teacache_v1_0_3"),
        ("**the same, corrected**", "teacache_v1_corrected_0_3"),
        ("TeaCache as published, 0.3, v2", "teacache_v2_0_3"),
        ("**the same, corrected**", "teacache_v2_corrected_0_3"),
        ("EasyCache", "easycache_about_15"),
        ("ComfyUI-TeaCache", "comfyui_teacache_about_15"),
        ("MagCache", "magcache_about_15"),
        ("PrediT", "predit_about_15"),
        ("cache-dit, TaylorSeer, on our steps", "cache_dit_taylorseer_steps_of_computed_steps_15"),
        ("**`computed_steps` 15**", "computed_steps_15"),
        ("**`computed_steps` 10**", "computed_steps_10"),
        ("**`tolerance` 0.003**", "tolerance_0_003"),
        ("**`computed_steps` 15 of 100**", "computed_steps_of_100_15"),
    ]
    rows = []
    for name, key in names:
        row, rounded = found.get(f"shift_6_{key}"), found.get(f"rounding_{key}")
        if row is not None:
            cells = cell(row, "uncached", "known"), cell(row, "uncached", "new"), cell(row, "converged")
            rows.append([name, f"{row.passes:.1f}", *cells, cell(rounded, "float32") if rounded else ""])
    head = ["", "passes", "to uncached, known prompts", "new prompts", "to converged", "in bfloat16, to float32"]
    return markdown(head, rows)


def front_memo(results):
    found = vars(results["memo_peers"])
    names = [
        ("uncached", "euler_uncached_20_steps"),
        ("10 plain steps", "fewer_euler_steps_10_steps"),
        ("14 plain steps", "fewer_euler_steps_14_steps"),
        ("second-order solver (Adams-Bashforth 2), 10 steps", "adams_bashforth_2_10_steps"),
        ("the same, 14 steps", "adams_bashforth_2_14_steps"),
        ("DeepCache", "deepcache_interval_3_branch_0"),
        ("TeaCache, 0.15", "teacache_0_15"),
        ("**the same, corrected**", "teacache_corrected_0_15"),
        ("**`computed_steps` 10**", "computed_steps_10"),
        ("**`computed_steps` 14**", "computed_steps_14"),
        ("**`tolerance` 0.003**", "tolerance_0_003"),
    ]
    rows = [(name, found[f"steps_20_{key}"]) for name, key in names if f"steps_20_{key}" in found]
    return markdown(
        ["", "passes", "to uncached", "median frame", "to converged"],
        [
            [name, f"{mean(row.passes):.1f}", *(cell(row, to) for to in ("uncached", "median_frame", "converged"))]
            for name, row in rows
        ],
    )


def case_of(row):
    guidance, shift, cfg_trunc_ratio = row.case
    return f"{guidance:g}, {shift:g}" + (f", `cfg_trunc_ratio` {cfg_trunc_ratio:g}" if cfg_trunc_ratio < 1 else "")


def correction(results):
    """Without and with the correction: a line for each case, a column for each way of skipping."""
    rows = [row for row in vars(results["correction"]).values() if hasattr(row, "way")]
    ways = list(dict.fromkeys(row.way for row in rows))
    found = {(case_of(row), row.way): row for row in rows}

    def shown(row):
        if row is None:
            return ""
        before, after = cell(row, "not_corrected"), cell(row, "corrected")
        pairs = list(zip(row.corrected, row.not_corrected))
        return f"{before} to {after}, closer in {sum(a > b for a, b in pairs)} of {len(pairs)}"

    cases = list(dict.fromkeys(case for case, _ in found))
    return markdown(
        ["guidance, shift", *ways], [[case, *(shown(found.get((case, way))) for way in ways)] for case in cases]
    )


def plans(results):
    """What plan_lumina2.py gains over the default choice of as many steps, on prompts that it has not seen."""
    rows = [row for row in vars(results["correction"]).values() if hasattr(row, "plan")]
    return markdown(
        ["guidance, shift", "computed steps", "default", "planned"],
        [[case_of(row), len(row.plan), cell(row, "default"), cell(row, "planned")] for row in rows],
    )


def few(results):
    """Few computed of 30 steps, against as many plain ones."""
    rows = [row for row in vars(results["correction"]).values() if hasattr(row, "few")]
    rows.sort(key=lambda row: (row.case, row.few))
    head = ["guidance, shift", "steps", "computed of 30", "plain"]
    return markdown(head, [[case_of(row), row.few, cell(row, "computed"), cell(row, "plain")] for row in rows])


def compare_lumina2(results):
    """The strip in figures."""
    runs = results["compare_lumina2"].runs
    rows = [[run["prompt"], *compared(run, run["num_inference_steps"])] for run in runs]
    return markdown(["prompt", "setting", "seconds", "speedup", "computed", "PSNR"], rows)


def compare_memo(results):
    return markdown(
        ["setting", "seconds", "speedup", "computed", "PSNR"],
        [compared(run, run["steps"]) for run in results["compare_memo"].runs],
    )


def compared(run, steps):
    """Cells of a run of compare_lumina2.py or compare_memo.py."""
    limits = {name: run[name] for name in ("rel_l1_thresh", "computed_steps", "tolerance") if run.get(name) is not None}
    name = ", ".join(f"`{name}` {value}" for name, value in limits.items()) if any(limits.values()) else "original"
    if run.get("computed_steps") == steps:
        name = f"{steps} plain steps"
    quality = "" if run["psnr"] is None else f"{run['psnr']:.1f} dB"
    return [name, f"{run['seconds']:.2f} s", f"{run['speedup']:.2f}x", f"{run['computed']} of {steps}", quality]


def real_size(results, which):
    found = vars(results[f"{which}_real_size"])
    rows = [row for row in found.values() if hasattr(row, "step")]
    stock = found["stock"]
    head = ["step", "seconds", "of stock", "loop, speedup"]
    cells = (
        [r.name, f"{r.step:.4f}", f"{r.step / stock.step:.4f}", f"{r.computed} computed, {stock.loop / r.loop:.2f}x"]
        for r in rows
    )
    return markdown(head, cells)


def real_size_parts(results):
    parts = vars(results["memo_real_size"].parts)
    parts = {name: seconds for name, seconds in parts.items() if name != "known"}
    total = sum(parts.values())
    return markdown(
        ["part of a clip, stock", "seconds", "share"],
        [[name, f"{seconds:.2f}", f"{seconds / total:.1%}"] for name, seconds in parts.items()],
    )


def measured_on(results, name):
    """One line: machine, versions, date."""
    about = results[name].about
    packages = ", ".join(f"{package} {version}" for package, version in about["versions"].items())
    return f"Measured on {about['machine']}, {packages}, {about['date']}.\n"


TABLES = {
    f.__name__: f
    for f in (
        *(peers, memo_peers, front_lumina2, front_memo, correction, few, plans),
        *(compare_lumina2, compare_memo, real_size, real_size_parts, measured_on),
    )
}


# ------------------------------------------------------------------------------
# Pages
# ------------------------------------------------------------------------------


def render(text, results):
    """The page with the figures of the results."""

    def block(match):
        name, *words = match[2].split()
        try:
            shown = TABLES[name](results, *words)
        except NotMeasured as missing:
            shown = f"Not measured yet: {missing.args[0]}.\n"
        return match[1] + shown + match[3]

    def inline(match):
        try:
            value = eval(match[2], {"__builtins__": {}}, Names(results))
        except NotMeasured:
            value = "?"
        shown = (
            value if isinstance(value, str) else format(value, match[3] or (".1f" if isinstance(value, float) else ""))
        )
        return match[1] + shown + match[4]

    return INLINE.sub(inline, BLOCK.sub(block, text))


def differences(before, after):
    """Lines that are not as they would be written, for a message."""
    pairs = zip(before.splitlines(), after.splitlines())
    return [
        f"line {i}: {a.strip()[:100]}\n  should be: {b.strip()[:100]}" for i, (a, b) in enumerate(pairs, 1) if a != b
    ]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a page would change")
    parser.add_argument("--keys", action="store_true", help="list the rows that can be quoted")
    parser.add_argument("--root", type=Path, default=ROOT, help="where the pages are")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    results, wrong = load(args.results), 0
    if args.keys:
        print(*(f"{name}.{key}" for name, rows in results.items() for key in vars(rows)), sep="\n")
        return 0
    for page in PAGES:
        before = (args.root / page).read_text(encoding="utf-8")
        after = render(before, results)
        if before != after and args.check:
            print(page, *(differences(before, after) or ["another number of lines"]), sep="\n", file=sys.stderr)
            wrong += 1
        elif before != after:
            (args.root / page).write_text(after, encoding="utf-8")
            print(f"wrote {page}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
