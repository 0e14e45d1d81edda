"""Writes the measured tables into the READMEs, from the files in `results`: none of their figures is typed by hand.

    python tests/benchmarks/lumina2_peers.py     # measures, and writes results/peers.json
    python tests/benchmarks/render.py            # writes the tables into all pages
    python tests/benchmarks/render.py --check    # writes nothing; fails where a page shows other figures

A table stands between two comments, which name one of the functions in TABLES:

    <!-- results: peers_lumina2 rounding -->
    | method | ... |
    <!-- end -->

Figures in sentences are typed, so --check looks up those with a unit, such as 46.2 dB, in the tables of their page.
"""

import argparse
import itertools
import json
import math
import re
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "tests" / "benchmarks" / "results"
PAGES = "README.md", "TeaCache4LuminaT2X/README.md", "TeaCache4Memo/README.md", "tests/benchmarks/README.md"
EXPLAINED = {"0.33": 5 * 12 * 768 * 4 * 30 * 60 / 1e9}  # in no table: GB that a minute of voice takes
UNITS = r"\s?(?:dB|x|s|ms|minutes?|hours?|[KMG]i?B|%)(?!\w)| times| seconds"
CODE = r"^```.*?^```|<!--.*?-->|^\|[^\n]*$|`[^`\n]*`|\]\([^)]*\)"  # and tables, comments, addresses
BLOCK = re.compile(r"(<!-- results: ([\w ]+?) -->\n).*?(<!-- end -->)", re.S)


COMPUTED = "computed steps"
OTHER_GROUPS = "open", "empty"  # of prompts, beside the known and the new ones: see prompts.py


class NotMeasured(Exception):
    """There is no file of this name."""


class Results(dict):
    """{name: results}."""

    def __missing__(self, name):
        raise NotMeasured(name)


def load(folder=RESULTS):
    """{name: results}: `rows` by key, or whatever else the file has, and `about`."""
    found = Results()
    for path in sorted(folder.glob("*.json")):
        whole = json.loads(path.read_text(encoding="utf-8"))
        whole["rows"] = {key: SimpleNamespace(**row) for key, row in whole.get("rows", {}).items()}
        known = len(whole.get("about", {}).get("known", ()))
        for row in whole["rows"].values():
            if not hasattr(row, "known"):  # dB of that group
                row.known = known  # as many of its prompts come first
        found[path.stem] = SimpleNamespace(**whole)
    for name, group in itertools.product([*found], OTHER_GROUPS):  # measured in files of their own, beside
        if f"{name}_{group}" in found:
            for key, other in found[f"{name}_{group}"].rows.items():
                setattr(found[name].rows.get(key, other), group, other)
    return found


# ------------------------------------------------------------------------------
# Figures
# ------------------------------------------------------------------------------


def flat(values):
    return [x for value in values for x in (flat(value) if isinstance(value, list) else [value])]


def mean(values):
    return statistics.mean(flat(values))


def of_prompts(row, to, of="both"):
    """The dB of all images or clips, or of a group of prompts; none, if it was not drawn."""
    if of in OTHER_GROUPS:
        other = getattr(row, of, None)
        return flat(getattr(other, to)) if other else []
    group = {"known": slice(None, row.known), "new": slice(row.known, None), "both": slice(None)}[of]
    return flat(getattr(row, to)[group])


def passes(row):
    """ "15.0", or with the passes of the other groups of prompts, where they are others: "15.2, 16.9, 12.0"."""
    every = [f"{r.passes:.1f}" for r in (row, *(getattr(row, of, None) for of in OTHER_GROUPS)) if r]
    return ", ".join(every if len(set(every)) > 1 else every[:1])


def rmse_mean(values):
    """dB of the mean RMSE: hard prompts count more than in the mean of dB."""
    return -20 * math.log10(mean([10 ** (-dB / 20) for dB in values]))


def worst(values, share=4):
    """The mean of the worst quarter."""
    return mean(sorted(values)[: max(1, len(values) // share)])


def paired(row, other, to):
    """By how much a row is closer than another on the same prompts, those of all groups: mean, and its standard error."""
    pairs = [pair for of in ("both", *OTHER_GROUPS) for pair in zip(of_prompts(row, to, of), of_prompts(other, to, of))]
    differences = [a - b for a, b in pairs]
    return mean(differences), statistics.stdev(differences) / math.sqrt(len(differences))


def ours_against(row, rows, to="float32"):
    """The row of `computed_steps` with the most passes, but at most half a pass more than this one; or None."""
    found = [r for r in rows if r.method == "computed_steps" and r.passes <= row.passes + 0.5]
    return max(found, key=lambda r: r.passes, default=None)


# ------------------------------------------------------------------------------
# Tables: each a function of the results, and of the words behind its name
# ------------------------------------------------------------------------------


def markdown(head, rows):
    lines = ["| " + " | ".join(map(str, line)) + " |" for line in (head, *rows)]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]]) + "\n"


def cell(row, to, of="both"):
    """ "66.8 (61.7)": mean and minimum."""
    values = of_prompts(row, to, of)
    return f"{mean(values):.1f} ({min(values):.1f})" if values and min(values) < 98.5 else "equal" if values else ""


def named(row):
    return row.method.replace("plain steps", "fewer steps, no cache")


def setting(row):
    return row.setting + (f" ({row.threshold})" if hasattr(row, "threshold") else "")


def difference(row, rows, to="float32"):
    """ "15: +3.1 ± 0.4": computed_steps 15 is closer by so much. Within the standard error it is a tie."""
    mine, is_reference = ours_against(row, rows), min(of_prompts(row, to)) >= 98.5
    if mine is None or is_ours(row) or is_reference:
        return ""
    gain, error = (round(value, 1) for value in paired(mine, row, to))  # as shown
    shown = f"{gain:+.1f} ± {error:.1f}"
    return f"{mine.setting}: " + (f"tie ({shown})" if abs(gain) <= error else shown)


def is_ours(row):
    return row.method.startswith("computed_steps")


GROUPS = {  # what their columns are called
    "known": "training captions",
    "new": "new prompts",
    "both": "both",
    "open": "open prompts",
    "empty": "no prompt",
}
AGAINST = "`computed_steps` is closer by (dB, at as many steps, ± standard error)"
READING = {"L2P": " (our reading of its abstract)"}
FLOAT32 = "uncached", "computed_steps", "plain", "Adams", "UniPC", "DPM"  # methods that are shown in float32, too


def peers_lumina2(results, table):
    """All methods in bfloat16 (rounding), ours and solvers in float32 (shift6): mean and minimum of each group of prompts."""
    rows = results[{"shift6": "peers", "rounding": "peers_rounding"}[table]].rows.values()
    shown = rows if table == "rounding" else [r for r in rows if r.method.startswith(FLOAT32)]
    shown = [
        [named(r), setting(r), passes(r), *(cell(r, "float32", of) for of in GROUPS), difference(r, rows)]
        for r in shown
    ]
    return markdown(["method", "setting", COMPUTED, *GROUPS.values(), AGAINST], shown)


def peers_memo(results):
    head = "method", "setting", COMPUTED, "wall", "PSNR, mean (minimum)", "clip 1, 2, 3", "median frame", "mouth"

    def cells(row):
        drift = ", ".join(f"{mean(clips):.1f}" for clips in zip(*row.uncached))
        yield from (named(row), row.setting, f"{mean(row.passes):.1f}", f"{mean(row.time):.2f}")
        yield from (cell(row, "uncached"), "" if row.method == "uncached" else drift, cell(row, "median_frame"))
        yield f"{mean(row.mouth):.3f}"

    rows = [row for key, row in results["memo_peers"].rows.items() if key != "parts"]
    return markdown(head, [list(cells(row)) for row in rows])


def best_rival(rows, about=10):
    """The row of somebody else's with the highest mean, of those with at most about so many steps."""
    others = [r for r in rows if not is_ours(r) and "our correction" not in r.method and "corrected" not in r.method]
    return max((r for r in others if r.passes <= about + 0.5), key=lambda r: mean(r.float32))


def front_lumina2(results):
    """Nine rows for the front page, all in bfloat16 against the uncached image in float32."""
    found = results["peers_rounding"].rows
    rival = best_rival(found.values())
    rows = [
        ("uncached", found["uncached_30"]),
        ("15 steps, no cache", found["plain_steps_15"]),
        ("TeaCache's rule, v1, 0.3, corrected: the default", found["teacache_s_rule_v1_corrected_0_3"]),
        ("TeaCache's rule, v2, about 15", found["teacache_s_rule_v2_about_15"]),
        ("**`computed_steps` 15**", found["computed_steps_15"]),
        ("**`computed_steps` 10**", found["computed_steps_10"]),
        ("**`computed_steps` 8**", found["computed_steps_8"]),
        ("cache-dit, TaylorSeer, our steps, about 10", found["cache_dit_taylorseer_our_steps_10"]),
        (f"best published at about 10: {rival.method}{READING.get(rival.method[:3], '')}", rival),
    ]
    groups = {of: name for of, name in GROUPS.items() if of != "both"}
    shown = [[n, passes(r), *(cell(r, "float32", of) for of in groups), difference(r, found.values())] for n, r in rows]
    return markdown(["", COMPUTED, *groups.values(), AGAINST], shown)


def few(values, below=40):
    return f"{sum(dB < below for dB in values)} of {len(values)}"


def front_memo(results):
    """Six rows for the front page."""
    found = results["memo_peers"].rows
    rows = [
        ("uncached", "uncached_20"),
        ("14 steps, no cache", "plain_steps_14"),
        ("DeepCache, with a shallow part in each step", "deepcache_interval_3_branch_0"),
        ("TeaCache's rule, 0.15, corrected: the default", "teacache_s_rule_corrected_0_15"),
        ("**`computed_steps` 14**", "computed_steps_14"),
        ("**`computed_steps` 10**", "computed_steps_10"),
    ]
    shown = [
        [
            name,
            f"{mean(row.passes):.1f}",
            f"{mean(row.time):.2f}",
            cell(row, "uncached"),
            few(of_prompts(row, "uncached")),
        ]
        for name, row in ((name, found[key]) for name, key in rows)
    ]
    return markdown(["", COMPUTED, "wall time, of uncached", "PSNR, mean (minimum)", "clips below 40 dB"], shown)


def correction(results):
    """Without and with the correction: a line for each case and way of skipping."""
    statistics_of = {
        "mean": mean,
        "mean, each cut at 46 dB": lambda values: mean([min(dB, 46.0) for dB in values]),
        "dB of the mean RMSE": rmse_mean,
        "worst quarter": worst,
    }

    def cells(row):
        yield from (f"{row.guidance:g}, {row.shift:g}", row.way, f"{row.passes_corrected:.1f}")
        for of in statistics_of.values():
            yield f"{of(row.not_corrected):.1f} to {of(row.corrected):.1f}"
        for group in OTHER_GROUPS:
            other = getattr(row, group, None)
            cut = statistics_of["mean, each cut at 46 dB"]
            yield f"{cut(other.not_corrected):.1f} to {cut(other.corrected):.1f}" if other else ""
        yield f"{sum(a > b for a, b in zip(row.corrected, row.not_corrected))} of {len(row.corrected)}"

    others = [f"{GROUPS[group]}, cut" for group in OTHER_GROUPS]
    head = ["guidance, shift", "setting", COMPUTED, *statistics_of, *others, "closer in"]
    return markdown(head, [list(cells(row)) for row in results["correction"].rows.values()])


def steps(results):
    """Each choice of steps: over all cells, the mean of each group, each image cut at 46 dB."""
    rows = results["steps"].rows.values()
    groups = [group for group in GROUPS if any(hasattr(row, group) for row in rows)]
    before, shown = None, []
    for choice in dict.fromkeys(row.choice for row in rows):
        of = {g: flat([getattr(r, g) for r in rows if r.choice == choice and hasattr(r, g)]) for g in groups}
        means = [mean([min(dB, 46.0) for dB in of[g]]) for g in groups]
        before = before or means
        every = flat([*of.values()])
        below = sum(dB < 30 for dB in every) / len(every)
        gain = min(a - b for a, b in zip(means, before))
        shown.append([choice, *(f"{m:.2f}" for m in means), f"{gain:+.2f}", f"{below:.1%}"])
    head = ["choice", *(GROUPS[g] for g in groups), "minimum gain", "images below 30 dB"]
    return markdown(head, shown)


def thresholds(results):
    """What a threshold means: computed steps and PSNR, by coefficients."""
    rows = results["thresholds"].rows.values()
    names = sorted({(row.coefficients, row.threshold) for row in rows})
    shown = {}
    for row in rows:
        cells = shown.setdefault((row.steps, row.shift), {})
        cells[row.coefficients, row.threshold] = f"{row.passes:.1f}: {mean(row.float32):.0f}"
    lines = [[f"{steps}, {shift:g}", *(cells[name] for name in names)] for (steps, shift), cells in shown.items()]
    return markdown(["steps, shift", *(f"{name}, {threshold}" for name, threshold in names)], lines)


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
    limits = {name: run[name] for name in ("rel_l1_thresh", "computed_steps") if run.get(name) is not None}
    name = ", ".join(f"`{name}` {value}" for name, value in limits.items()) if any(limits.values()) else "original"
    if run.get("computed_steps") == steps:
        name = f"{steps} steps, no cache"
    quality = "" if run["psnr"] is None else f"{run['psnr']:.1f} dB"
    return [name, f"{run['seconds']:.2f} s", f"{run['speedup']:.2f}x", f"{run['computed']} of {steps}", quality]


def real_size(results, which):
    found = results[f"{which}_real_size"].rows
    rows = [row for row in found.values() if hasattr(row, "step")]
    stock = found["stock"]
    head = ["step", "seconds", "of stock", "loop, speedup"]
    cells = (
        [r.name, f"{r.step:.4f}", f"{r.step / stock.step:.4f}", f"{r.computed} computed, {stock.loop / r.loop:.2f}x"]
        for r in rows
    )
    return markdown(head, cells)


def real_size_parts(results):
    parts = vars(results["memo_real_size"].rows["parts"])
    parts = {name: seconds for name, seconds in parts.items() if name != "known"}
    total = sum(parts.values())
    return markdown(
        ["part of a clip, stock", "seconds", "share"],
        [[name, f"{seconds:.2f}", f"{seconds / total:.1%}"] for name, seconds in parts.items()],
    )


def measured_on(results, *names):
    """Machine, versions, date, files: a line for all that were measured on the same."""
    files = {}
    for name in names:
        about = results[name].about
        packages = ", ".join(f"{package} {version}" for package, version in about["versions"].items())
        files.setdefault(f"{about['machine']}, {packages}, {about['date']}", []).append(f"{name}.json")
    return "\n\n".join(f"Measured on {where} ({', '.join(found)})." for where, found in files.items()) + "\n"


TABLES = {
    f.__name__: f
    for f in (
        *(peers_lumina2, peers_memo, front_lumina2, front_memo, correction, steps, thresholds),
        *(compare_lumina2, compare_memo, real_size, real_size_parts, measured_on),
    )
}


# ------------------------------------------------------------------------------
# Pages
# ------------------------------------------------------------------------------


def render(text, results):
    """The page with the tables of the results."""

    def block(match):
        name, *words = match[2].split()
        try:
            shown = TABLES[name](results, *words)
        except NotMeasured as missing:
            shown = f"Not measured yet: {missing.args[0]}.\n"
        return match[1] + shown + match[3]

    return BLOCK.sub(block, text)


def differences(before, after):
    """Lines that are not as they would be written, for a message."""
    pairs = itertools.zip_longest(before.splitlines(), after.splitlines(), fillvalue="")
    return [f"line {i}: {a[:100]}\n  should be: {b[:100]}" for i, (a, b) in enumerate(pairs, 1) if a != b]


def not_in_a_table(text):
    """Lines for a message: figures in the sentences of a page that are in none of its tables."""
    tables = re.findall(r"\d+\.\d+", "\n".join(re.findall(r"^\|.*$", text, re.M)))
    known = {*tables, *(figure for figure, value in EXPLAINED.items() if f"{value:.2f}" == figure)}
    figures = re.findall(rf"(?<![\w.])(\d+\.\d+)(?={UNITS})", re.sub(CODE, " ", text, flags=re.S | re.M))
    return [f"{figure} is in no table of this page" for figure in figures if figure not in known]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a page would change")
    parser.add_argument("--root", type=Path, default=ROOT, help="where the pages are")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    results, wrong = load(args.results), 0
    for page in PAGES:
        before = (args.root / page).read_text(encoding="utf-8")
        after = render(before, results)
        if args.check:
            for line in differences(before, after) + not_in_a_table(after):
                print(f"{page}: {line}", file=sys.stderr)
                wrong += 1
        elif before != after:
            (args.root / page).write_text(after, encoding="utf-8")
            print(f"wrote {page}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
