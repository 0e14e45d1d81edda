"""`speedup` and the timestep indicator: how many steps are computed, which, and what a skipped one runs."""

import math

import pytest
import torch
from conftest import BUNDLED, ROOT
from diffusers import FlowMatchEulerDiscreteScheduler
from hypothesis import given
from hypothesis import strategies as st
from lumina_models import conditioning, denoise, tiny_model

from TeaCache4LuminaT2X import teacache_lumina2
from TeaCache4LuminaT2X.teacache_lumina2 import INDICATORS, Branch, apply_teacache, count, due

PROMPT, NEGATIVE = conditioning([5], seed=1), conditioning([3], seed=2)


def choose(times, speedup, end=1.0):
    """The schedule of a generation with these times."""
    schedule, wanted = [], count(len(times), speedup)
    for step in range(len(times)):
        schedule.append(due(times[: step + 1], schedule, len(times), wanted, end))
    return schedule


def scheduler_times(steps, shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / steps, steps).tolist())
    return [1 - t.item() / 1000 for t in scheduler.timesteps]


# --- the choice of steps ----------------------------------------------------------


@given(
    st.lists(st.floats(0.0, 1.0), min_size=1, max_size=60, unique=True).map(sorted),
    st.floats(1, 30),
    st.booleans(),
)
def test_exactly_as_many_as_wanted(times, speedup, falling):
    """Whatever the scheduler, and also where time is counted to 0, as for MEMO."""
    n = len(times)
    speedup = min(speedup, max(n / 2, 1))
    times, end = ([t - 1 for t in times], 0.0) if falling else (times, 1.0)
    schedule = choose(times, speedup, end)
    assert sum(schedule) == max(round(n / speedup), min(n, 2))
    assert schedule[0] and schedule[-1]


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True), min_size=2, max_size=20), st.integers(1, 20))
def test_exactly_as_many_with_times_that_make_no_sense(times, wanted):
    schedule = []
    for step in range(len(times)):
        schedule.append(due(times[: step + 1], schedule, len(times), min(max(wanted, 2), len(times)), 1.0))
    assert sum(schedule) == min(max(wanted, 2), len(times)) and schedule[0] and schedule[-1]


@pytest.mark.parametrize("shift", [1.0, 2.0, 3.0, 6.0])
@pytest.mark.parametrize("steps", [20, 30, 50])
@pytest.mark.parametrize("speedup", [1.25, 1.5, 2.0, 3.0, 4.0])
def test_spread_over_the_way(shift, steps, speedup):
    """No stretch of it, by number of steps or by time, is long compared with an even one."""
    times = scheduler_times(steps, shift)
    computed = [i for i, c in enumerate(choose(times, speedup)) if c]
    pairs = list(zip(computed, computed[1:]))
    largest_step = max(b - a for a, b in zip(times, times[1:]))
    assert max(b - a for a, b in pairs) <= 2 * math.ceil(speedup)
    assert max(times[b] - times[a] for a, b in pairs) <= 2 * times[-1] / len(pairs) + largest_step


def test_an_even_scheduler_is_cut_evenly():
    """And one that takes large steps at the end is followed more closely there."""
    gaps = {}
    for shift in (1.0, 6.0):
        computed = [i for i, c in enumerate(choose(scheduler_times(31, shift), 3.1)) if c]
        gaps[shift] = [b - a for a, b in zip(computed, computed[1:])]
    assert set(gaps[1.0]) <= {3, 4}
    assert gaps[6.0][0] >= 5 and gaps[6.0][-1] <= 2


CHOSEN = {  # (shift, speedup): of 30 steps
    (2.0, 1.5): "0 2 4 6 8 10 12 14 16 17 18 19 20 22 23 24 25 26 28 29",
    (2.0, 2.0): "0 3 6 8 10 12 14 16 18 20 22 24 26 28 29",
    (2.0, 3.0): "0 4 8 12 16 19 22 25 27 29",
    (6.0, 2.0): "0 4 7 10 13 16 19 21 23 24 25 26 27 28 29",
    (6.0, 3.0): "0 5 10 15 19 22 25 27 28 29",
}


@pytest.mark.parametrize("shift, speedup", CHOSEN)
def test_the_choice_itself(shift, speedup):
    """Pinned: the figures in the README were measured with these; the first three stand in it."""
    chosen = " ".join(str(i) for i, c in enumerate(choose(scheduler_times(30, shift), speedup)) if c)
    assert chosen == CHOSEN[shift, speedup]
    readme = (ROOT / "TeaCache4LuminaT2X" / "README.md").read_text(encoding="utf-8")
    assert shift != 2.0 or f"| {chosen} |" in readme


def test_the_forecast_itself():
    """A line through (0, 1) and (2, 3), followed to 3 and to 6: 1 / (1 + 0.5 g) of the way."""
    branch = Branch((), ())
    for time, value in ((0.0, 1.0), (2.0, 3.0)):
        branch.remember(time, torch.tensor([value]), "forecast")
    assert branch.predict(3.0, "cpu").item() == pytest.approx(3 + 2 * 0.5 / 1.25)
    assert branch.predict(6.0, "cpu").item() == pytest.approx(3 + 2 * 2 / 2)


def test_an_extra_computation_is_made_up_for():
    """Where something else forces a step, the rest still ends on the wanted number."""
    times, schedule = scheduler_times(30, 2.0), []
    for step in range(30):
        schedule.append(due(times[: step + 1], schedule, 30, 15, 1.0) or step in (1, 2, 3))
    assert sum(schedule) == 15


# --- on a model -------------------------------------------------------------------


@pytest.mark.parametrize("predict", ["hold", "forecast"])
@pytest.mark.parametrize("speedup", [1, 1.5, 2, 2.5, 4])
@pytest.mark.parametrize("cond, uncond", [(PROMPT, None), (PROMPT, NEGATIVE), (conditioning([7, 2], 1), None)])
def test_model_keeps_to_it(predict, speedup, cond, uncond):
    model = apply_teacache(tiny_model(num_layers=1), 12, predict=predict, speedup=speedup)
    for seed in (0, 1):
        denoise(model, cond, uncond, steps=12, seed=seed)
        assert sum(model.teacache.schedule) == round(12 / speedup)


@pytest.mark.skipif(not BUNDLED.joinpath("model_index.json").is_file(), reason="the bundled model is not there")
@pytest.mark.parametrize("speedup, computed", [(1.5, 20), (2, 15), (3, 10), (4, 8), (15, 2)])
def test_pipeline_keeps_to_it(pipeline, speedup, computed):
    apply_teacache(pipeline.transformer, 30, speedup=speedup)
    pipeline("red apple", num_inference_steps=30, output_type="latent", cfg_trunc_ratio=0.7)
    assert sum(pipeline.transformer.teacache.schedule) == computed and len(pipeline.transformer.teacache.schedule) == 30


def names_run(model, steps, **settings):
    """The modules that ran, call by call; those that only hold others left out."""
    calls, running = [], []
    for name, module in model.named_modules():
        if name and not isinstance(module, torch.nn.ModuleList):
            module.register_forward_hook(lambda *_, name=name: running.append(name))
    apply_teacache(model, steps, **settings)

    def mark(step, name, at):
        calls.append([])
        running.clear()

    forward = model.forward

    def call(*args, **kwargs):
        output = forward(*args, **kwargs)
        calls[-1].extend(running)
        return output

    denoise(call, PROMPT, NEGATIVE, steps=steps, before_call=mark)
    return calls


EARLY = {
    "speedup": dict(speedup=4.0),
    "timestep": dict(indicator="timestep", rel_l1_thresh=1e9, coefficients=[1.0, 0.0]),
}


@pytest.mark.parametrize("way", EARLY)
@pytest.mark.parametrize("predict", ["hold", "forecast"])
@pytest.mark.parametrize("depth", [1, 3])
def test_a_skipped_step_is_free_of_the_depth(way, predict, depth):
    """No block, no refiner, nothing of the caption; with the forecast not even an embedding."""
    model = tiny_model(num_layers=depth, num_refiner_layers=depth)
    calls = names_run(model, 20, predict=predict, **EARLY[way])
    schedule = model.teacache.schedule
    assert schedule.count(False) >= 15
    for step, computed in enumerate(schedule):
        for ran in calls[2 * step : 2 * step + 2]:
            parts = {name.split(".")[0] for name in ran} - {"time_caption_embed"}
            if computed:
                assert {"layers", "noise_refiner", "context_refiner", "x_embedder", "norm_out"} <= parts
            else:
                assert parts == ({"x_embedder", "norm_out"} if predict == "hold" else set())
                assert not [name for name in ran if "caption_embedder" in name]
                needed = predict == "hold" or way == "timestep"
                assert ("time_caption_embed.timestep_embedder" in ran) == needed


@pytest.mark.parametrize("predict", ["hold", "forecast"])
def test_a_skipped_step_of_modulated_runs_up_to_the_first_norm(predict):
    calls = names_run(tiny_model(), 8, predict=predict, rel_l1_thresh=1e9, coefficients=[1.0, 0.0])
    for ran in calls[2:14]:
        assert {n for n in ran if n.startswith("layers")} == {n for n in ran if n.startswith("layers.0.norm1")} != set()
        assert "noise_refiner.0" in ran and ("norm_out" in ran) == (predict == "hold")


@pytest.mark.parametrize("steps, first", [(5, 1), (10, 2), (30, 6), (33, 7)])
def test_the_first_fifth_is_computed_with_timestep(steps, first):
    model = apply_teacache(tiny_model(), steps, 1e9, [1.0, 0.0], indicator="timestep")
    denoise(model, PROMPT, NEGATIVE, steps=steps)
    assert model.teacache.schedule == [True] * first + [False] * (steps - first - 1) + [True]


def test_timestep_sees_neither_prompt_nor_noise():
    schedules = set()
    for seed in range(4):
        model = apply_teacache(tiny_model(), 30, 0.05, [1.0, 0.0], indicator="timestep")
        denoise(model, conditioning([3 + seed], seed), NEGATIVE if seed % 2 else None, steps=30, seed=seed)
        schedules.add(tuple(model.teacache.schedule))
    (schedule,) = schedules
    assert 8 <= sum(schedule) <= 25


def test_defaults_of_the_indicators():
    model = apply_teacache(tiny_model(), 30, indicator="timestep")
    assert (model.rel_l1_thresh, model.coefficients) == (0.38, list(INDICATORS["timestep"][1]))
    assert model.coefficients[0] == -874.643948
    assert apply_teacache(tiny_model(), 30).rel_l1_thresh == 0.3


@pytest.mark.parametrize(
    "steps, settings, says",
    [
        (30, dict(speedup=0.5), "between 1 and 15"),
        (30, dict(speedup=15.1), "between 1 and 15"),
        (30, dict(speedup=float("nan")), "between 1 and 15"),
        (1, dict(speedup=2), "between 1 and 1 "),
        (30, dict(speedup=2.0, rel_l1_thresh=0.1), "not both"),
        (30, dict(indicator="latents"), "modulated or timestep"),
        (30, dict(domain=(1, 0)), "the lower first"),
    ],
    ids=str,
)
def test_impossible_wishes(steps, settings, says):
    model = tiny_model()
    with pytest.raises(ValueError, match=says):
        apply_teacache(model, steps, **settings)
    assert "forward" not in vars(model), "the model is as it was"


@pytest.mark.parametrize("indicator", ["modulated", "timestep"])
@pytest.mark.parametrize("domain, computed", [((0.0, 1e-9), 2), ((0.4, 0.5), 6), (None, 2)])
def test_the_forward_keeps_to_the_domain(indicator, domain, computed):
    """Changes of some 0.01 to 0.1, held at the end of the domain: nearly nothing, or 0.4 at each step."""
    model = apply_teacache(tiny_model(), 10, 0.7, [1.0, 0.0], indicator=indicator, domain=domain)
    denoise(model, PROMPT, None, steps=10)
    first = [True, True] if indicator == "timestep" else [True]
    every_other = [*first, *([False, True] * 5)][:9] + [True]
    assert model.teacache.schedule == (every_other if computed > 2 else [*first, *[False] * (9 - len(first)), True])


def test_a_prompt_replaced_midway_is_computed_for_all_and_made_up_for():
    replaced = conditioning([5], 8)[0], PROMPT[1]
    for predict in ("hold", "forecast"):
        model, calls = apply_teacache(tiny_model(), 12, speedup=3.0, predict=predict), []
        model.layers[0].register_forward_hook(lambda *_, calls=calls: calls.append(1))
        denoise(model, PROMPT, NEGATIVE, steps=12, switch={6: replaced})
        assert model.teacache.schedule[6] and sum(model.teacache.schedule) == 4 and len(calls) == 2 * 4


def test_the_constant_is_the_default(monkeypatch):
    monkeypatch.setattr(teacache_lumina2, "SPEEDUP", 2.0)
    assert apply_teacache(tiny_model(), 8).speedup == 2.0
    assert apply_teacache(tiny_model(), 8, 0.3).speedup is None
    assert apply_teacache(tiny_model(), 8, speedup=4.0).speedup == 4.0


def test_beyond_the_domain_the_nearer_end():
    from TeaCache4LuminaT2X.teacache_lumina2 import rescale

    square = [1.0, 0.0, 0.0]
    assert [rescale(square, x, (1.0, 3.0)) for x in (0.0, 1.0, 2.0, 3.0, 9.0)] == [1, 1, 4, 9, 9]
    assert rescale(square, 9.0) == 81
