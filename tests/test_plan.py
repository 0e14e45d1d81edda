"""plan_lumina2.py: what it records, what it plans, what it prints."""

import itertools
import random

import numpy as np
import pytest
import torch
from conftest import BUNDLED, equal
from hypothesis import given, settings
from hypothesis import strategies as st

from TeaCache4LuminaT2X import plan_lumina2, teacache_lumina2
from TeaCache4LuminaT2X.plan_lumina2 import (
    Step,
    best_plan,
    build_parser,
    choose_jobs,
    gap_costs,
    main,
    recording,
    report,
)

FAST = ["--model", str(BUNDLED), "--num-inference-steps", "6"]
PROMPTS = ["red apple", "fox", "cat", "pizza", "cactus", "heart", "violin", "rocket"]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\ufeff" + "\n\n".join(PROMPTS) + "\n", encoding="utf-8")
    return str(path)


def trajectory(sigmas, calls, seed, values=40):
    """Steps with random velocities; without guidance, both velocities are one."""
    generator = torch.Generator().manual_seed(seed)
    guided, conditional = torch.randn(2, len(sigmas), values, generator=generator, dtype=torch.float64)
    return [Step(s, v if n == 2 else w, w, n) for s, v, w, n in zip(sigmas, guided, conditional, calls)]


def cost_by_definition(steps, i, j, k):
    """Of the gap from j to k, skipped with the formula at the top of the script; one trajectory."""
    sigmas = [step.sigma for step in steps] + [0.0]
    error = 0.0
    for m in range(j + 1, k):
        v = [step.conditional if steps[m].calls == 1 else step.guided for step in steps]
        used = v[j]
        if i is not None:
            g = (sigmas[j] - sigmas[m]) / (sigmas[i] - sigmas[j])
            used = v[j] + g / (1 + teacache_lumina2.DAMPING * g) * (v[j] - v[i])
        error = error + (sigmas[m + 1] - sigmas[m]) * (used - steps[m].guided)
    return (
        torch.as_tensor(error).norm()
        / torch.stack([step.guided for step in steps] + [step.conditional for step in steps])
        .square()
        .sum(1)
        .mean()
        .sqrt()
    )


def total(costs, plan):
    return sum(costs[i, j, k] for i, j, k in zip([None, *plan], plan, plan[1:]))


@settings(max_examples=60)
@given(st.integers(2, 8), st.data())
def test_costs_and_plan(steps, data):
    """The costs are those of the definition, and no other schedule has a smaller sum of them."""
    draw = data.draw
    sigmas = sorted(draw(st.lists(st.integers(1, 100), min_size=steps, max_size=steps, unique=True)), reverse=True)
    guided = draw(st.integers(0, steps))  # steps with guidance
    calls = [2] * guided + [1] * (steps - guided)
    trajectories = [trajectory([s / 100 for s in sigmas], calls, seed) for seed in range(2)]
    costs = gap_costs(trajectories)
    assert len(costs) == steps - 1 + sum(j * (steps - 1 - j) for j in range(1, steps))
    for (i, j, k), cost in costs.items():
        assert cost == pytest.approx(
            np.mean([cost_by_definition(t, i, j, k) for t in trajectories]), rel=1e-5, abs=1e-6
        )

    budget = draw(st.integers(2, steps))
    plan = best_plan(costs, steps, budget)
    assert plan[0] == 0 and plan[-1] == steps - 1 and len(plan) == budget and plan == sorted(set(plan))
    others = itertools.combinations(range(1, steps - 1), budget - 2)
    assert total(costs, plan) == pytest.approx(min(total(costs, [0, *some, steps - 1]) for some in others))


@settings(max_examples=60)
@given(st.integers(2, 9), st.data())
def test_the_plan_is_the_best_of_all(steps, data):
    """For any costs, against all schedules there are."""
    budget, number = data.draw(st.integers(2, steps)), random.Random(data.draw(st.integers(0, 10**6)))
    gaps = [(i, j, k) for k in range(steps) for j in range(k) for i in (range(j) if j else [None])]
    costs = {gap: number.random() for gap in gaps}
    others = [[0, *some, steps - 1] for some in itertools.combinations(range(1, steps - 1), budget - 2)]
    assert best_plan(costs, steps, budget) == min(others, key=lambda plan: total(costs, plan))


def test_one_step():
    assert best_plan(gap_costs([trajectory([1.0], [2], 0)]), 1, 1) == [0]


def test_steps_are_put_where_the_velocity_turns():
    """It is a straight line, a bend, and a straight line: extrapolation is exact on lines, but for the damping."""
    direction, bend = torch.randn(2, 40, dtype=torch.float64)
    sigmas = [1 - n / 20 for n in range(20)]
    turns = [direction + bend * max(0, n - 10) for n in range(20)]
    plan = best_plan(gap_costs([[Step(s, v, v, 2) for s, v in zip(sigmas, turns)]]), 20, 6)
    assert sum(9 <= step <= 14 for step in plan) >= 3, plan


@pytest.mark.parametrize(
    "guidance, trunc, calls", [(4.0, 1.0, [2] * 6), (4.0, 0.5, [2] * 3 + [1] * 3), (1.0, 1.0, [1] * 6)]
)
def test_recording(pipeline, guidance, trunc, calls):
    """The velocities and sigmas that move the latents, of the plain picture; the pipeline is left as it was."""
    noise = torch.randn(1, 16, 16, 16, generator=torch.Generator().manual_seed(0))

    def run():
        options = {"guidance_scale": guidance, "cfg_trunc_ratio": trunc, "num_inference_steps": 6}
        return pipeline("fox", latents=noise.clone(), output_type="latent", **options).images

    plain = run()
    teacache_lumina2.apply_teacache(pipeline, computed_steps=3)
    with recording(pipeline) as steps:
        assert torch.equal(run(), plain)
    assert [step.calls for step in steps] == calls and torch.equal(run(), plain)
    assert not pipeline.transformer._forward_hooks and "step" not in vars(pipeline.scheduler)
    sigmas = [step.sigma for step in steps] + [0.0]
    moves = sum((after - step.sigma) * step.guided for step, after in zip(steps, sigmas[1:]))
    assert torch.allclose(noise.double().flatten() + moves, plain.double().flatten(), atol=1e-4)
    assert [torch.equal(step.guided, step.conditional) for step in steps] == [n == 1 for n in calls]


def test_recording_with_teacache_within_and_around(pipeline):
    """A scheduler that was wrapped by somebody else keeps its wrapper."""
    stock, seen = pipeline.scheduler.step, []
    wrapper = pipeline.scheduler.step = lambda *args, **kwargs: seen.append(1) or stock(*args, **kwargs)
    try:
        with recording(pipeline) as steps:
            teacache_lumina2.apply_teacache(pipeline, rel_l1_thresh=0.0)
            pipeline("fox", num_inference_steps=3, output_type="latent")
        assert len(steps) == 3 and len(seen) == 3 and pipeline.scheduler.step is wrapper
        assert "teacache" not in vars(pipeline.transformer)
    finally:
        del pipeline.scheduler.step


def pasted(line):
    names = {}
    exec(line, names)
    return names["COMPUTED_STEPS"]


def test_command(file, capsys, monkeypatch):
    """Four prompts plan, four others prove; the table is of the pictures that were drawn, and so is the line."""
    drawn, draw = [], plan_lumina2.draw

    def watched(pipeline, args, job, computed_steps=None):
        image = draw(pipeline, args, job, computed_steps)
        drawn.append((job, computed_steps, pipeline.transformer.teacache.schedule, image))
        return image

    monkeypatch.setattr(plan_lumina2, "draw", watched)
    main([file, *FAST, "--computed-steps", "4"])
    default, planned, line = capsys.readouterr().out.splitlines()
    assert len(drawn) == 4 + 3 * 4
    planning, proving = drawn[:4], [drawn[n : n + 3] for n in range(4, 16, 3)]
    assert sorted(prompt for (prompt, _), *_ in planning + [row[0] for row in proving]) == sorted(PROMPTS)
    assert [seed for (_, seed), *_ in planning + [row[0] for row in proving]] == list(range(1024, 1032))
    assert all(schedule == [True] * 6 for _, _, schedule, _ in planning + [row[0] for row in proving])
    plan = proving[0][2][1]
    for original, usual, other in proving:
        assert original[0] == usual[0] == other[0], "of one prompt and seed"
        assert (usual[1], other[1]) == (4, plan) and sum(usual[2]) == 4
        assert [step for step, computed in enumerate(other[2]) if computed] == plan

    figures = [np.mean([plan_lumina2.psnr(row[n][3], row[0][3]) for row in proving]) for n in (1, 2)]
    marks = ["".join(".X"[computed] for computed in proving[0][n][2]) for n in (1, 2)]
    for row, name, mark, figure in zip((default, planned), ("default", "planned"), marks, figures):
        assert row.split()[:3] == [name, mark, f"{figure:.1f}"]
    if figures[1] > figures[0]:
        assert pasted(line) == plan and line.endswith(f"6 steps: {figures[1]:.1f} dB, default {figures[0]:.1f}")
    else:
        assert "nothing to paste" in line


SCHEDULE = [True, False, True, False, False, True]


@pytest.mark.parametrize("default, planned", [([50.0, 40.0], [50.2, 40.0]), ([40.0], [41.0])])
def test_a_plan_that_wins_can_be_pasted(default, planned, pipeline, monkeypatch):
    """As the constant of the script it gives the schedule that was printed."""
    *rows, line = report(default, planned, SCHEDULE, [0, 3, 5], "shift 6, 6 steps")
    expected = f"# shift 6, 6 steps: {np.mean(planned):.1f} dB, default {np.mean(default):.1f}"
    assert line == f"COMPUTED_STEPS = [0, 3, 5]  {expected}"
    monkeypatch.setattr(teacache_lumina2, "COMPUTED_STEPS", pasted(line))
    teacache_lumina2.apply_teacache(pipeline)
    pipeline("fox", num_inference_steps=6, output_type="latent")
    schedule = "".join(".X"[computed] for computed in pipeline.transformer.teacache.schedule)
    teacache_lumina2.remove_teacache(pipeline)
    assert [row.split()[1] for row in rows] == ["X.X..X", schedule] and schedule == "X..X.X"


@pytest.mark.parametrize("default, planned", [([50.0, 40.0], [49.8, 40.1]), ([40.0], [40.0]), ([float("inf")],) * 2])
def test_a_plan_that_does_not_win_is_not_printed(default, planned):
    lines = report(default, planned, SCHEDULE, [0, 3, 5], "")
    assert not any("COMPUTED_STEPS" in line or "[" in line for line in lines)


def test_prompts_are_eight_different_ones_and_the_seed_chooses(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join([*"abcdefghijklmnop", *"abcd"]))

    def jobs(*seed):
        return choose_jobs(build_parser().parse_args([str(path), *FAST, "--computed-steps", "3", *seed]))

    assert equal(jobs(), jobs()) and len({prompt for prompt, _ in jobs()}) == 8
    assert [prompt for prompt, _ in jobs()] != [prompt for prompt, _ in jobs("--seed", "3")]


@pytest.mark.parametrize(
    "text, flags, says",
    [
        (None, [], "No such file"),
        (b" \n\n", [], "0 different prompts"),
        ("\n".join(PROMPTS[:7] * 2).encode(), [], "7 different prompts"),
        ("café\n".encode("latin-1") * 9, [], "utf-8"),
        ("\n".join(PROMPTS).encode(), ["--computed-steps", "7"], "computed_steps must be"),
        ("\n".join(PROMPTS).encode(), ["--computed-steps", "1"], "computed_steps must be"),
        ("\n".join(PROMPTS).encode(), ["--rel-l1-thresh", "0.3"], "rel_l1_thresh"),
        ("\u2028".join(PROMPTS).encode(), [], "1 different prompts"),
        ("\n".join(PROMPTS).encode(), None, "give --computed-steps"),
    ],
)
def test_bad_input(text, flags, says, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(teacache_lumina2, "load_pipeline", lambda args: pytest.fail("loading began"))
    if text is not None:
        (tmp_path / "prompts.txt").write_bytes(text)
    flags = [] if flags is None else ["--computed-steps", "4", *flags]
    with pytest.raises(SystemExit) as exit:
        main([str(tmp_path / "prompts.txt"), *FAST, *flags])
    error = capsys.readouterr().err
    assert exit.value.code == 2 and says in error and error.count("\n") == 1
