"""Which steps are computed, what they give, and what a clip leaves behind: against an oracle that is told all."""

import pytest
import torch
from conftest import equal, tensors_in
from diffusers import FlowMatchEulerDiscreteScheduler
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from memo_models import (
    STOCK_FORWARD,
    Clip,
    Interrupted,
    Oracle,
    denoise,
    memo,
    memory,
    oracle_run,
    path_length,
    set_memory,
    stock,
    tiny_unet,
)

from TeaCache4Memo.teacache_memo import DAMPING, Branch, apply_teacache, remove_teacache, teacache_forward

STEPS = 8


@pytest.fixture
def model():
    return tiny_unet()


@pytest.fixture(scope="module")
def some():
    """A threshold at which some steps are skipped and some between first and last are computed."""
    return path_length(tiny_unet(), Clip()) / 4


@pytest.fixture(autouse=True)
def stock_class():
    """Whatever a test does to memo's class, the next one finds it as it was."""
    before = dict(vars(memo.UNet3DConditionModel))
    yield
    for name in set(vars(memo.UNet3DConditionModel)) - set(before):
        delattr(memo.UNet3DConditionModel, name)
    memo.UNet3DConditionModel.forward = STOCK_FORWARD


def check(model, clip, thresh, coefficients=(1.0, 0.0), num_steps=STEPS, **kwargs):
    """One clip with TeaCache as it stands, against a fresh oracle beginning with the same memory. Its schedule."""
    before = memory(model)
    predict = getattr(model, "predict", "hold")
    expected = oracle_run(model, clip, thresh, num_steps, coefficients, predict, **kwargs)
    expected_memory = memory(model)
    set_memory(model, before)
    found = denoise(model, clip, **kwargs)
    assert equal(found, expected[:2])
    assert equal(memory(model), expected_memory)
    assert model.teacache.schedule == expected[2]
    return expected[2]


# --- one clip -------------------------------------------------------------------------


@pytest.mark.parametrize("guided", [True, False])
def test_schedule_and_outputs(model, guided):
    counts, clip = [], Clip(guided=guided)
    length = path_length(model, clip)
    for share in (0, 0.1, 0.2, 0.35, 0.6, 9):
        apply_teacache(model, STEPS, share * length)
        schedule = check(model, clip, share * length)
        assert schedule[0] and schedule[-1] and len(schedule) == STEPS
        counts.append(sum(schedule))
    assert counts == sorted(counts, reverse=True) and counts[0] == STEPS and counts[-1] == 2
    assert len(set(counts)) >= 4, "more threshold, fewer steps"


@pytest.mark.parametrize("coefficients", [(2.0, 0.0), (1.0, 0.0, 0.1), (0.0,), (-5.0, 0.5)])
def test_polynomial(model, some, coefficients):
    apply_teacache(model, STEPS, some, coefficients)
    check(model, Clip(), some, coefficients)


def test_forecast(model):
    """The output is extrapolated from the last two computed ones; a skipped step runs conv_in only."""
    length = path_length(model, Clip())
    for share in (0, 0.1, 0.2, 0.35, 9):
        apply_teacache(model, STEPS, share * length, predict="forecast")
        schedule = check(model, Clip(), share * length)
    calls = []
    for name, module in model.named_modules():
        if not list(module.children()):
            module.register_forward_hook(lambda *_, name=name: calls.append(name))
    denoise(model, Clip(), before_step=lambda i: calls.append(i))
    assert schedule == [True] + [False] * 6 + [True]
    assert calls[calls.index(1) : calls.index(7)] == [x for i in range(1, 7) for x in (i, "conv_in")]


@pytest.mark.parametrize("predict", ["hold", "forecast"])
def test_the_cache_lives_where_it_is_told(model, predict):
    """All of it; what lies on "meta" cannot come back, and the first comparison says so."""
    seen = []

    def watch(step):
        branches = model.teacache.branches if "teacache" in vars(model) else []
        seen.extend(t.device.type for b in branches for t in tensors_in([b.signal, b.computed]))

    apply_teacache(model, STEPS, 9.0, predict=predict, cache_device="meta")
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        denoise(model, Clip(), before_step=watch)
    assert set(seen) == {"meta"}
    apply_teacache(model, STEPS, 9.0, predict=predict)
    del seen[:]
    denoise(model, Clip(), before_step=watch)
    assert set(seen) == {"cpu"}


@pytest.mark.parametrize("at", range(STEPS))
def test_forecast_after_an_interruption(model, at):
    """Also where the next clip begins at the very timestep at which the last one stopped."""
    for share in (0.35, 9):
        thresh = share * path_length(model, Clip())
        apply_teacache(model, STEPS, thresh, predict="forecast")
        interrupt(model, Clip(), at, inside=False)
        check(model, Clip(), thresh)


def test_a_step_called_twice(model):
    """As a scheduler of second order does: the later output of the two counts, and there is no line within a step."""
    apply_teacache(model, STEPS, 9.0, predict="forecast")
    clip, outputs = Clip(guided=False), []
    with torch.no_grad():
        for i, t in enumerate((1000.0, 1000.0, 800.0)):
            noise = clip.noise * (1 + i)
            outputs.append(model(noise, timestep=t, **clip.inputs, update_past_memory=i == 0).sample)
    assert model.teacache.schedule == [True, False] and not equal(outputs[0], outputs[1])
    assert equal(outputs[2], outputs[1])


@pytest.mark.parametrize("predict", ["hold", "forecast"])
@pytest.mark.parametrize("speedup", [1, 1.5, 2, 3, 10])
def test_speedup_keeps_to_the_number_of_steps(model, speedup, predict):
    """On every clip, at memo's own timesteps; first and last and those that write memory are among them."""
    apply_teacache(model, 20, predict=predict, speedup=speedup)
    for clip in (Clip(), Clip(guided=False)):
        denoise(model, clip, steps=20)
        schedule = model.teacache.schedule
        assert (sum(schedule), len(schedule)) == (round(20 / speedup), 20) and schedule[0] and schedule[-1]
        gaps = [len(gap) + 1 for gap in "".join("x" if c else "." for c in schedule).split("x")[1:-1]]
        assert max(gaps) <= 2 * speedup + 1 and max(gaps) - min(gaps) <= max(1, speedup / 2), gaps
        assert tensors_in(model.teacache) == []


def test_speedup_counts_the_steps_that_write_memory(model):
    apply_teacache(model, 12, speedup=2.0)

    def call(sample, timestep, update_past_memory, **inputs):
        writes = timestep in timesteps[[0, 1, 4]]
        return model(sample, timestep=timestep, update_past_memory=writes, **inputs)

    timesteps = torch.arange(1000.0, 400.0, -50.0)
    denoise(call, Clip(), steps=12, timesteps=lambda i, t: timesteps[i])
    assert sum(model.teacache.schedule) == 6 and all(model.teacache.schedule[i] for i in (0, 1, 4))


def test_forecast_of_a_straight_line(model):
    """Outputs that change evenly are met up to the damping; two are held, and none at the end."""
    branch = Branch([], ())
    for time in (-1000.0, -800.0):
        branch.remember(time, torch.tensor([time]), "forecast")
    assert branch.predict(-600.0, "cpu").item() == pytest.approx(-800 + 200 / (1 + DAMPING))
    assert branch.predict(-400.0, "cpu").item() == pytest.approx(-800 + 400 / (1 + 2 * DAMPING))
    branch.remember(-700.0, torch.tensor([-700.0]), "forecast")
    assert len(branch.computed) == 2 and branch.predict(-650.0, "cpu").item() == pytest.approx(
        -700 + 50 / (1 + DAMPING / 2)
    )
    branch.remember(-600.0, torch.tensor([-600.0]), "hold")
    assert len(branch.computed) == 1 and branch.predict(-100.0, "cpu").item() == -600


def test_nan_computes(model):
    apply_teacache(model, STEPS, 0.4)
    model.coefficients = [float("nan")]
    denoise(model, Clip())
    assert model.teacache.schedule == [True] * STEPS


def test_mask_cond_fea_is_part_of_the_indicator(model, some):
    clip = Clip(mask_cond_fea=20 * torch.ones(2, 32, 2, 4, 4))
    apply_teacache(model, STEPS, some)
    schedule = check(model, clip, some)
    assert sum(schedule) < sum(oracle_run(model, Clip(), some)[2]), "a large constant makes changes small"


def test_timesteps_in_a_list(model, some):
    """One for each frame; the step is known by them all, also where the first frame's stands still."""
    clip = Clip()
    for timesteps in (lambda i, t: [t, t - 0.5], lambda i, t: [torch.tensor(0.0), t], lambda i, t: [0.0, float(t)]):
        apply_teacache(model, STEPS, some)
        assert 2 < sum(check(model, clip, some, timesteps=timesteps)) < STEPS


def test_new_tensors_at_each_step(model, some):
    """A caller that casts or copies its conditioning anew goes on with the same clip."""
    apply_teacache(model, STEPS, some)
    assert sum(check(model, Clip(), some, cast=True)) < STEPS


def test_two_calls_a_step(model):
    """A loop that calls without and with the portrait in turn: one decision a step, each its own residual."""
    first, second = Clip(guided=False, seed=1), Clip(guided=False, seed=2)
    alone = [denoise(stock(model), clip)[0] for clip in (first, second)]
    apply_teacache(model, STEPS, 9.0)
    memories, found = [memory(model)] * 2, [[], []]
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(STEPS)
    calls = []
    model.mid_block.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        for i, t in enumerate(scheduler.timesteps):
            for k, clip in enumerate((first, second)):
                set_memory(model, memories[k])
                news = {"is_new_audio": True, "update_past_memory": i == 0}
                found[k].append(model(clip.noise, timestep=t, **clip.inputs, **news).sample)
                memories[k] = memory(model)
    assert model.teacache.schedule == [True] + [False] * (STEPS - 2) + [True] and len(calls) == 4
    assert equal(found[0][0], alone[0][0]) and equal(found[1][0], alone[1][0])
    assert not equal(found[0][1], found[1][1])
    assert tensors_in(model.teacache) == []


DIFFER = {
    "audio_emotion": [torch.tensor([3]), torch.tensor([5])],
    "class_labels": [torch.tensor([1]), torch.tensor([4])],
    "mask_cond_fea": [torch.zeros(1, 32, 2, 4, 4), torch.ones(1, 32, 2, 4, 4)],
    "uc_mask": [torch.tensor([True, False]), torch.tensor([True, True])],
}


@pytest.mark.parametrize("name", DIFFER)
def test_two_calls_a_step_that_differ_in_one_input(name):
    """Guidance over an emotion, say: each of the two adds its own residual in a skipped step."""
    model, clip, found = tiny_unet(num_class_embeds=5 if name == "class_labels" else None), Clip(guided=False), {}
    inputs = [{**clip.inputs, name: value} for value in DIFFER[name]]
    for thresh in (0, 9.0):
        apply_teacache(model, STEPS, thresh)
        with torch.no_grad():
            for t in (1000.0, 900.0):
                found[thresh, t] = [model(clip.noise, timestep=t, **given).sample for given in inputs]
    assert model.teacache.schedule == [True, False]
    assert equal(found[9.0, 1000.0], found[0, 1000.0]) and not equal(*found[0, 1000.0])
    for skipped, computed in zip(found[9.0, 900.0], found[0, 1000.0]):
        assert torch.allclose(skipped, computed, atol=1e-5), "the latents have not changed, so neither has this"


# --- memory of past frames ----------------------------------------------------------------


@pytest.mark.parametrize("times", [1, 9])
def test_memory_is_what_stock_leaves(model, some, times):
    """First clip and three later ones: KV and Z of every processor, after each, bit for bit."""
    clips = [Clip(seed=i) for i in range(4)]
    left = []
    for i, clip in enumerate(clips):
        denoise(stock(model), clip, first=i == 0)
        left.append(memory(model))
    assert not equal(left[0], left[1]) and all(m["KV"] is not None for m in left[0])
    apply_teacache(model, STEPS, times * some)
    for i, clip in enumerate(clips):
        denoise(model, clip, first=i == 0)
        assert sum(model.teacache.schedule) < STEPS
        assert equal(memory(model), left[i]), f"clip {i}"


def test_a_call_that_writes_memory_is_computed(model):
    """update_past_memory in the middle of a clip, in one call a step and in the second of two."""
    clip, extra = Clip(), (3, 5)
    apply_teacache(model, STEPS, 9.0)

    def writing(forward, at):
        def call(*args, update_past_memory, **kwargs):
            steps.append(1)
            return forward(*args, update_past_memory=update_past_memory or len(steps) - 1 in at, **kwargs)

        steps = []
        return call

    denoise(stock(model), clip)
    before = memory(model)
    expected = denoise(writing(Oracle(model, 9.0, STEPS), extra), clip, first=False)
    expected_memory = memory(model)
    set_memory(model, before)
    assert equal(denoise(writing(model, extra), clip, first=False), expected)
    assert equal(memory(model), expected_memory)
    assert [i for i, computed in enumerate(model.teacache.schedule) if computed] == [0, 3, 5, STEPS - 1]


def test_second_call_of_a_skipped_step_may_write_memory(model):
    first, second = Clip(guided=False, seed=1), Clip(guided=False, seed=2)
    apply_teacache(model, STEPS, 9.0)
    calls = []
    model.mid_block.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        for t in (1000.0, 900.0):
            for clip in (first, second):
                writes = t == 1000.0 or clip is second
                model(clip.noise, timestep=t, **clip.inputs, update_past_memory=writes)
    assert model.teacache.schedule == [True, False] and len(calls) == 3


# --- one clip after another ------------------------------------------------------------------


SECOND = {
    "the same": {},
    "another voice": {"seed": 1},
    "another size": {"size": (6, 4)},
    "another number of frames": {"frames": 3},
    "without guidance": {"guided": False},
    "other past frames": {"past": 1, "seed": 3},
    "mask_cond_fea": {"mask_cond_fea": torch.ones(2, 32, 2, 4, 4)},
}


@pytest.mark.parametrize("second", SECOND.values(), ids=SECOND)
def test_a_second_clip_is_as_fresh(model, second, some):
    apply_teacache(model, STEPS, some)
    check(model, Clip(), some)
    check(model, Clip(**second), some)


@pytest.mark.parametrize("second", SECOND.values(), ids=SECOND)
@pytest.mark.parametrize("inside", [False, True], ids=["between calls", "inside a block"])
def test_after_an_interruption_as_fresh(model, second, inside, some):
    """At each of the steps, before the call or in the middle of it."""
    clips = Clip(), Clip(**second)
    apply_teacache(model, STEPS, some)
    for step in range(STEPS):
        interrupt(model, clips[0], step, inside)
        check(model, clips[1], some)


def interrupt(model, clip, at, inside, first=True):
    """Run a clip until step `at`, where it stops: before the call, or in the mid block if that runs."""

    def before_step(i):
        here.append(i)
        if i == at and not inside:
            raise Interrupted

    def in_block(*_):
        if here[-1] == at:
            raise Interrupted

    here = []
    hook = model.mid_block.register_forward_pre_hook(in_block) if inside else None
    try:
        denoise(model, clip, before_step=before_step, first=first)
    except Interrupted:
        pass
    finally:
        if hook:
            hook.remove()


def test_another_number_of_steps(model, some):
    """By apply_teacache, and by the attribute alone, fewer and more."""
    clip = Clip()
    apply_teacache(model, STEPS, some)
    check(model, clip, some)
    for steps in (5, 12, 1, 2):
        apply_teacache(model, steps, some)
        check(model, clip, some, num_steps=steps, steps=steps)
        model.num_steps = steps + 3
        check(model, clip, some, num_steps=steps + 3, steps=steps + 3)


def test_released_when_a_clip_is_done(model):
    """At the last step already nothing is held; before it, no more than features, a residual and the conditioning."""
    clip, held = Clip(), []
    apply_teacache(model, STEPS, 9.0)
    model.conv_out.register_forward_hook(lambda *_: held.append(len(tensors_in(model.teacache))))
    for first in (True, False):
        held.clear()
        denoise(model, clip, first=first)
        assert held == [6] + [7] * (STEPS - 2) + [0]  # 5 of conditioning; in the first step no residual yet
        assert tensors_in(model.teacache) == []


def test_switched_off_in_the_middle(model):
    """Off for a step and on again: nothing old is used."""
    clip = Clip()
    apply_teacache(model, STEPS, 9.0)
    expected = denoise(stock(model), clip)[0]

    def switch(i):
        model.enable_teacache = i != 3

    found = denoise(model, clip, before_step=switch)[0]
    assert model.teacache.schedule == [True, False, False, False], "begun anew after the step without"
    assert equal(found[0], expected[0]) and not equal(found[2], expected[2])


# --- the two ways to use it ---------------------------------------------------------------------


def test_the_seven_class_attributes(model, some):
    """The founding README's way, to the letter."""
    model_class = memo.UNet3DConditionModel
    model_class.forward = teacache_forward
    model.__class__.enable_teacache = True
    model.__class__.cnt = 0
    model.__class__.num_steps = STEPS
    model.__class__.rel_l1_thresh = some
    model.__class__.accumulated_rel_l1_distance = 0
    model.__class__.previous_modulated_input = None
    model.__class__.previous_residual = None
    assert 2 < sum(check(model, Clip(), some)) < STEPS
    model.__class__.rel_l1_thresh = 9.0
    assert sum(check(model, Clip(), 9.0)) == 2
    other = tiny_unet(seed=1)
    check(other, Clip(), 9.0)
    model.__class__.enable_teacache = False
    assert equal(denoise(model, Clip()), denoise(stock(model), Clip())) and "teacache" not in vars(model)
    assert model_class.cnt == 0 and model_class.previous_residual is None, "state is on the instance"


def test_one_model_and_not_another(model, some):
    other = tiny_unet(seed=1)
    apply_teacache(model, num_steps=STEPS, rel_l1_thresh=9.0)
    check(model, Clip(), 9.0)
    assert equal(denoise(other, Clip()), denoise(stock(other), Clip())) and "teacache" not in vars(other)
    apply_teacache(other, STEPS, some)
    both = []  # two models in turn, step by step
    for m in (model, other):
        both.append(oracle_run(m, Clip(), m.rel_l1_thresh)[:2])
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(STEPS)
    clip = Clip()
    latents = {model: clip.noise, other: clip.noise}
    with torch.no_grad():
        for i, t in enumerate(scheduler.timesteps):
            for m in (model, other):
                news = {"is_new_audio": True, "update_past_memory": i == 0}
                without, guided = m(torch.cat([latents[m]] * 2), timestep=t, **clip.inputs, **news).sample.chunk(2)
                velocity = without + 3.5 * (guided - without)
                latents[m] = scheduler.step(velocity, t, latents[m], return_dict=False)[0]
                scheduler._step_index -= m is model
    assert equal(latents[model], both[0][1]) and equal(latents[other], both[1][1])


def test_remove_leaves_nothing(model, some):
    before = dict(vars(model))
    apply_teacache(model, STEPS, some)
    denoise(model, Clip())
    assert remove_teacache(model) is model
    assert vars(model).keys() == before.keys()
    assert equal(denoise(model, Clip()), denoise(stock(model), Clip()))


@pytest.mark.parametrize(
    "wrong, match",
    [
        ({"num_steps": 0}, "number of steps"),
        ({"num_steps": 2.5}, "number of steps"),
        ({"rel_l1_thresh": -1}, "rel_l1_thresh"),
        ({"rel_l1_thresh": float("nan")}, "rel_l1_thresh"),
        ({"coefficients": []}, "coefficients"),
        ({"predict": "guess"}, "hold or forecast"),
    ],
)
def test_senseless_settings(model, wrong, match):
    with pytest.raises(ValueError, match=match):
        apply_teacache(model, **{"num_steps": STEPS, "rel_l1_thresh": 0.15, **wrong})
    assert "forward" not in vars(model)


def test_the_pipeline_instead_of_the_model():
    with pytest.raises(ValueError, match="pipeline.diffusion_net"):
        apply_teacache(object())


# --- how many steps a threshold means -------------------------------------------------------------


def straight_path(model, sigmas, timesteps, thresh):
    """Steps computed on x = (1 - sigma) x0 + sigma noise, both of unit variance."""
    generator = torch.Generator().manual_seed(0)
    clip = Clip(guided=False, frames=8, size=(16, 16))
    x0, noise = (torch.randn(clip.shape, generator=generator) for _ in range(2))
    apply_teacache(model, len(sigmas), thresh)
    with torch.no_grad():
        for i, (sigma, t) in enumerate(zip(sigmas, timesteps)):
            x = (1 - sigma) * x0 + sigma * noise
            model(x, timestep=t, **clip.inputs, is_new_audio=True, update_past_memory=i == 0)
    return sum(model.teacache.schedule)


@pytest.mark.parametrize("steps, computed", [(20, (17, 11, 7)), (50, (17, 12, 8))])
def test_a_threshold_is_a_length_of_path(model, steps, computed):
    """memo's own schedule: about as many steps are computed of 50 as of 20. In the README."""
    torch.nn.init.zeros_(model.conv_in.bias)
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(steps)
    for thresh, expected in zip((0.09, 0.15, 0.25), computed):
        found = straight_path(model, scheduler.sigmas[:-1], scheduler.timesteps, thresh)
        assert abs(found - expected) <= 1, thresh


def test_a_threshold_is_a_length_of_path_with_equal_steps(model):
    """sigmas 1, 19/20, ... 1/20: memo's schedule ends at 1/1000 and so takes slightly longer steps."""
    torch.nn.init.zeros_(model.conv_in.bias)
    sigmas = torch.linspace(1, 1 / 20, 20)
    for thresh, expected in zip((0.09, 0.15, 0.25), (15, 10, 7)):
        assert abs(straight_path(model, sigmas, 1000 * sigmas, thresh) - expected) <= 1, thresh


# --- anything after anything -------------------------------------------------------------------------


CLIPS = [
    Clip(seed=0),
    Clip(seed=1),
    Clip(seed=2, size=(5, 6)),
    Clip(seed=3, frames=3),
    Clip(seed=4, guided=False),
]
EVENT = st.fixed_dictionaries(
    {
        "clip": st.integers(0, len(CLIPS) - 1),
        "times": st.sampled_from([0, 0.5, 1, 2, 40]),
        "steps": st.sampled_from([3, 5]),
        "later": st.booleans(),
        "cast": st.booleans(),
        "interrupt": st.none() | st.tuples(st.integers(0, 4), st.booleans()),
        "apply": st.booleans(),
        "predict": st.sampled_from(["hold", "forecast"]),
    }
)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(events=st.lists(EVENT, min_size=2, max_size=5))
def test_any_sequence_of_clips(events, some):
    model, last = tiny_unet(), None
    apply_teacache(model, 3, some)
    for event in events:
        clip, thresh, steps = CLIPS[event["clip"]], event["times"] * some, event["steps"]
        first = not (event["later"] and last is clip)  # the memory has the size of its clip
        if event["apply"]:
            apply_teacache(model, steps, thresh, predict=event["predict"])
        else:
            model.num_steps, model.rel_l1_thresh, model.predict = steps, thresh, event["predict"]
        if event["interrupt"]:
            at, inside = event["interrupt"]
            interrupt(model, clip, at, inside, first=first)
            last = clip if at else None
        else:
            check(model, clip, thresh, num_steps=steps, steps=steps, first=first, cast=event["cast"])
            last = clip
