"""What only MEMO has: the memory of past frames, steps that must be computed for it, clips, several optional inputs."""

import pytest
import torch
from conftest import equal
from diffusers import FlowMatchEulerDiscreteScheduler
from machines import Memo, Oracle, kept
from memo_models import (
    ONE_LEVEL,
    ONE_LEVEL_REFERENCE,
    Clip,
    denoise,
    memory,
    set_memory,
    tiny_pipeline,
    tiny_reference,
    tiny_unet,
)
from test_memo_cli import call

from TeaCache4Memo.teacache_memo import apply_teacache

STEPS, MACHINE = 8, Memo()
WAYS = [{"rel_l1_thresh": 9.0}, {"computed_steps": 2}]


@pytest.fixture
def model():
    return tiny_unet()


@pytest.fixture(scope="module")
def some():
    """A threshold at which some steps are skipped and some between first and last are computed."""
    return MACHINE.path(tiny_unet(), Clip()) / 4


def as_oracle(model, clip, **kwargs):
    """One clip with TeaCache as it stands, against a fresh oracle beginning with the same memory. Its schedule."""
    before = memory(model)
    settings = {name: getattr(model, name) for name in ("rel_l1_thresh", "computed_steps")}
    *expected, schedule = MACHINE.oracle(model, clip, model.num_steps, run=kwargs, **settings)
    expected_memory = memory(model)
    set_memory(model, before)
    assert equal(denoise(model, clip, model.num_steps, **kwargs), tuple(expected))
    assert equal(memory(model), expected_memory)
    assert model.teacache.schedule == schedule and kept(model) == []
    return schedule


# --- memory of past frames and clips ------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{"rel_l1_thresh": None}, {"rel_l1_thresh": 9.0}, {"computed_steps": 3}], ids=str)
def test_memory_is_what_stock_leaves(model, some, settings):
    """First clip and three later ones: KV and Z of every processor, after each, bit for bit."""
    clips, left = [Clip(seed=i) for i in range(4)], []
    for i, clip in enumerate(clips):
        denoise(MACHINE.stock(model), clip, first=i == 0)
        left.append(memory(model))
    assert not equal(left[0], left[1]) and all(m[key] is not None for m in left[0] for key in ("KV", "Z"))
    settings = {name: some if value is None else value for name, value in settings.items()}
    apply_teacache(model, STEPS, **settings)
    for i, clip in enumerate(clips):
        before = memory(model)
        denoise(model, clip, first=i == 0)
        assert sum(model.teacache.schedule) < STEPS
        assert equal(memory(model), left[i]), f"clip {i}"
        set_memory(model, before)
        as_oracle(model, clip, first=i == 0)  # a later clip's outputs, too


def writing(forward, at):
    """Calls that also write memory at these steps."""

    def call(*args, update_past_memory, **kwargs):
        steps.append(1)
        return forward(*args, update_past_memory=update_past_memory or len(steps) - 1 in at, **kwargs)

    steps = []
    return call


@pytest.mark.parametrize("settings", [WAYS[0], {"computed_steps": [0, 2, STEPS - 1]}], ids=["threshold", "list"])
def test_a_call_that_writes_memory_is_computed(model, settings):
    """In the middle of a later clip, too. These steps come on top of the chosen ones."""
    clip, extra = Clip(), (3, 5)
    apply_teacache(model, STEPS, **settings)
    denoise(MACHINE.stock(model), clip)
    before = memory(model)
    oracle = Oracle(MACHINE, model, STEPS, **settings)
    expected = MACHINE.denoise(writing(oracle, extra), clip, first=False, before=oracle.at)
    expected_memory = memory(model)
    set_memory(model, before)
    assert equal(denoise(writing(model, extra), clip, first=False), expected)
    assert equal(memory(model), expected_memory) and model.teacache.schedule == oracle.schedule
    chosen = settings.get("computed_steps", (0, STEPS - 1))
    assert [i for i, computed in enumerate(oracle.schedule) if computed] == sorted({*extra, *chosen})


@pytest.mark.parametrize("settings", WAYS, ids=str)
def test_second_call_of_a_skipped_step_may_write_memory(model, settings):
    """Of two voices on the same latents, in turns: that call is computed, and its step is printed as computed."""
    clips, calls = (Clip(guided=False, seed=1), Clip(guided=False, seed=2)), []
    apply_teacache(model, STEPS, **settings)
    model.mid_block.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        for t in (1000.0, 900.0, 800.0):
            for clip in clips:
                before, writes = memory(model), t == 1000.0 or (t == 900.0 and clip is clips[1])
                model(clips[0].noise, timestep=t, **clip.inputs, update_past_memory=writes, is_new_audio=False)
                assert equal(before, memory(model)) is not writes
    assert model.teacache.schedule == [True, True, False] and len(calls) == 3


# --- steps and calls --------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{"rel_l1_thresh": None}, {"computed_steps": 4}], ids=str)
def test_timesteps_in_a_list(model, some, settings):
    """One for each frame; the step is known by them all, also where the first frame's stands still."""
    settings = {name: some if value is None else value for name, value in settings.items()}
    for timesteps in (lambda i, t: [t, t - 0.5], lambda i, t: [torch.tensor(0.0), t], lambda i, t: [0.0, float(t)]):
        apply_teacache(model, STEPS, **settings)
        assert 2 < sum(as_oracle(model, Clip(), timesteps=timesteps)) < STEPS


DIFFER = {
    "encoder_hidden_states": [torch.ones(1, 4, 16), -torch.ones(1, 4, 16)],
    "audio_embedding": [torch.ones(1, 2, 4, 16), torch.zeros(1, 2, 4, 16)],
    "audio_emotion": [torch.tensor([3]), torch.tensor([5])],
    "class_labels": [torch.tensor([1]), torch.tensor([4])],
    "mask_cond_fea": [None, torch.ones(1, 32, 2, 4, 4)],
    "attention_mask": [None, torch.tensor([[1, 1, 1, 0], [1, 0, 1, 1]])],
    "uc_mask": [torch.tensor([True, False]), torch.tensor([True, True])],
}


@pytest.mark.parametrize("settings", WAYS, ids=str)
@pytest.mark.parametrize("name", DIFFER)
def test_two_calls_a_step_that_differ_in_one_input(name, settings):
    """Guidance over an emotion, say: each of the two has its own cache in a skipped step."""
    config, clip, found = {"num_class_embeds": 5 if name == "class_labels" else None}, Clip(guided=False), []
    if name == "attention_mask":  # memo wants as many places as tokens at every level
        config, clip = ONE_LEVEL, Clip(guided=False, size=(2, 2), reference=tiny_reference(**ONE_LEVEL_REFERENCE))
    model, inputs = tiny_unet(**config), [{**clip.inputs, name: value} for value in DIFFER[name]]
    for way in ({"rel_l1_thresh": 0}, settings):
        apply_teacache(model, STEPS, **way)
        with torch.no_grad():
            for t in (1000.0, 900.0):
                found.append([model(clip.noise, timestep=t, **given).sample for given in inputs])
    assert model.teacache.schedule == [True, False]
    stock_first, _, first, skipped = found
    assert equal(first, stock_first) and not equal(*first)
    for each, computed in zip(skipped, first):
        assert torch.allclose(each, computed, atol=1e-5), "the latents have not changed, so neither has this"


# --- how many steps a threshold means -------------------------------------------------------------


def test_a_threshold_is_a_length_of_path(model):
    """memo's own schedule of 20 steps, on x = (1 - sigma) x0 + sigma noise, both of unit variance: in the README."""
    torch.nn.init.zeros_(model.conv_in.bias)
    scheduler, generator = FlowMatchEulerDiscreteScheduler(), torch.Generator().manual_seed(0)
    scheduler.set_timesteps(20)
    clip = Clip(guided=False, frames=8, size=(16, 16))
    x0, noise = (torch.randn(clip.shape, generator=generator) for _ in range(2))
    for thresh, expected in zip((0.09, 0.15, 0.25), (17, 11, 7)):
        apply_teacache(model, 20, thresh)
        with torch.no_grad():
            for i, (sigma, t) in enumerate(zip(scheduler.sigmas, scheduler.timesteps)):
                model((1 - sigma) * x0 + sigma * noise, timestep=t, **clip.inputs, update_past_memory=i == 0)
        assert abs(sum(model.teacache.schedule) - expected) <= 1, thresh


# --- what a skipped step of the pipeline waits for ---------------------------------------------------


def test_values_read_in_a_skipped_step(monkeypatch):
    """memo's pipeline makes emotion, mask and doubled latents anew at each step: they are compared, two reads in all.

    Each waits for the GPU; the scheduler's step reads none.
    """
    pipeline, reads = tiny_pipeline()[0], {"network": [], "scheduler": []}
    apply_teacache(pipeline, computed_steps=[0, 1, 7])
    profiles = []

    def begin(*_):
        profiles.append(torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]))
        profiles[-1].__enter__()

    def end(where):
        profiles[-1].__exit__(None, None, None)
        names = [event.name for event in profiles[-1].events()]
        reads[where].append(sum(map(names.count, ("aten::_local_scalar_dense", "aten::equal"))))

    pipeline.diffusion_net.register_forward_pre_hook(begin)
    pipeline.diffusion_net.register_forward_hook(lambda *_: end("network"))
    step = pipeline.scheduler.step

    def profiled(*args, **kwargs):
        begin()
        result = step(*args, **kwargs)
        end("scheduler")
        return result

    monkeypatch.setattr(pipeline.scheduler, "step", profiled)
    pipeline(**call(num_inference_steps=8))
    assert pipeline.diffusion_net.teacache.schedule == [step in (0, 1, 7) for step in range(8)]
    assert max(reads["network"][2:7]) <= 2 and max(reads["scheduler"][2:7]) == 0, reads
    assert reads["network"][0] > 0, "the profiler sees them"
