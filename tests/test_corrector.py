"""The correction of skipped steps, through the pipeline; its formula is in test_budget.py."""

import functools
import itertools

import numpy as np
import pytest
import torch
from conftest import equal
from machines import Loop, kept, randn, set_timesteps

HOLD = {"rel_l1_thresh": 9.0, "coefficients": [1.0, 0.0]}  # computes the first and the last step
BUDGET = {"computed_steps": 3}


@pytest.fixture
def loop(machine):
    return Loop(machine)


def both(loop, monkeypatch, way, **options):
    """The latents with the correction, and without."""
    loop.apply(**way)
    corrected = loop.draw(**options)
    with monkeypatch.context() as patch:
        patch.setattr(loop.machine.script, "CORRECT", False)
        return corrected, loop.draw(**options)


def give(loop, scales=(1.0,)):
    """The network's last layer gives random values, other ones in each step, for samples of these scales in turn."""
    count = itertools.count()

    def values(module, inputs, output):
        return scales[next(count) % len(scales)] * randn(output.shape, len(loop.schedule))

    return loop.machine.last(loop.model).register_forward_hook(values)


def drawn_of(loop, scales=(1.0,), sigmas=None, dtype=torch.float32):
    """The last of some latents, zeros at the beginning, a call for each, with what `give` gives."""
    set_timesteps(loop.scheduler, 8)
    if sigmas is not None:
        loop.scheduler.set_timesteps(sigmas=sigmas)
    hook, latents = give(loop, scales), torch.zeros(len(scales), *loop.latents(0).shape[1:], dtype=dtype)
    with torch.no_grad():
        for t in loop.scheduler.timesteps:
            velocity = torch.cat([loop.call(sample.float(), t) for sample in latents.split(1)]).to(dtype)
            latents = loop.scheduler.step(velocity, t, latents, return_dict=False)[0]
    hook.remove()
    assert kept(loop.model) == []
    return latents


@pytest.mark.parametrize("way", [HOLD, BUDGET], ids=str)
def test_it_changes_what_is_drawn_and_nothing_without_skips(loop, monkeypatch, way):
    assert not equal(*both(loop, monkeypatch, way))
    assert equal(*both(loop, monkeypatch, {"rel_l1_thresh": 0.0}))


def test_a_blend_keeps_it(loop, monkeypatch):
    """Inpainting mixes latents in: what is added at the end does not depend on them."""

    def blend(i, t, velocity, latents):
        latents.mul_(0.9)  # in place; Loop goes on with these

    moved = []
    for after in (None, blend):
        hook = give(loop, (10.0,))
        moved.append([a - b for a, b in zip(*both(loop, monkeypatch, HOLD, after=after))][0])
        hook.remove()
    assert moved[0].abs().max() > 0.01 and torch.allclose(moved[1], 0.9 * moved[0], atol=1e-5)


def test_a_batch_is_corrected_image_by_image(loop):
    """What is drawn beside it does not change an image; a velocity of zero makes no NaN."""
    loop.apply(computed_steps=[0, 2, 7])
    scales = 1.0, 100.0, 0.0
    together = drawn_of(loop, scales)
    assert loop.schedule == [step in (0, 2, 7) for step in range(8)]
    alone = [drawn_of(loop, (scale,)) for scale in scales]
    assert torch.allclose(together, torch.cat(alone), rtol=1e-4, atol=1e-6) and together.isfinite().all()


def test_sigmas_that_repeat(loop):
    loop.apply(**BUDGET)
    found = drawn_of(loop, sigmas=np.array([1.0, 0.8, 0.8, 0.8, 0.5, 0.5, 0.2, 0.2]))
    assert found.isfinite().all() and sum(loop.schedule) == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sums_in_float32(loop, dtype):
    """The latents stay in their type, as the scheduler gives them: no error grows."""
    loop.apply(**BUDGET)
    found = drawn_of(loop, dtype=dtype)
    assert found.dtype == dtype
    assert torch.allclose(found.float(), drawn_of(loop), atol=8 * torch.finfo(dtype).eps)


def test_what_the_scheduler_returns(loop):
    """A tuple, or diffusers' class."""
    loop.apply(**BUDGET)
    expected, step, returned = loop.draw(), loop.scheduler.step, set()

    def with_a_class(*args, return_dict):
        output = step(*args)
        returned.add(type(output).__name__)
        return (output.prev_sample,)

    loop.scheduler.step = with_a_class
    assert equal(loop.draw(), expected) and returned == {"FlowMatchEulerDiscreteSchedulerOutput"}


WAYS = {
    "another scale": lambda i, one, two, weak: two() + (4 if 3 <= i < 7 else 1) * (one - two()),
    "another scale, in place": lambda i, one, two, weak: two().add_((4 if 3 <= i < 7 else 1) * (one - two())),
    "a first velocity of zero": lambda i, one, two, weak: (i > 0) * (two() + 4 * (one - two())),
    "another network in some steps": lambda i, one, two, weak: 3 * one - 2 * weak() if i < 4 else one,
    "another network, then not": lambda i, one, two, weak: 3 * one - 2 * weak() if i % 2 else one,
    "renormalised": lambda i, one, two, weak: (two() + 4 * (one - two())) * (one.norm(dim=-1, keepdim=True) / 3),
}


def guided(loop, made):
    """The last latents of ten steps, whose velocities are made in this one of WAYS."""
    other, weak = loop.machine.job(1, guided=False), loop.machine.model(1)
    set_timesteps(loop.scheduler, 10)
    latents = loop.latents(0)
    for i, t in enumerate(loop.scheduler.timesteps):
        one, two = loop.call(latents, t), functools.cache(functools.partial(loop.call, latents, t, other))
        velocity = WAYS[made](i, one, two, functools.partial(loop.call, latents, t, model=weak))
        latents = loop.scheduler.step(velocity, t, latents, return_dict=False)[0]
    return latents


@pytest.mark.parametrize("way", [{"rel_l1_thresh": 0.15, "coefficients": [1.0, 0.0]}, {"computed_steps": [0, 3, 8, 9]}])
@pytest.mark.parametrize("made", WAYS)
@torch.no_grad()
def test_a_velocity_that_is_made_in_another_way(loop, monkeypatch, made, way):
    """From some step on: what was skipped before it is not corrected by it, and the image is not farther than without."""
    stock, errors = guided(loop, made), []
    for is_corrected in (True, False):
        monkeypatch.setattr(loop.machine.script, "CORRECT", is_corrected)
        loop.apply(**way)
        errors.append((guided(loop, made) - stock).norm().item())
    assert errors[0] <= 1.1 * errors[1] and False in loop.schedule
    if made == "renormalised":
        assert errors[0] < 0.9 * errors[1]


@torch.no_grad()
def test_a_velocity_that_is_written_into_an_output(loop):
    """It is as good as one of its own: the change of scale is seen."""
    loop.apply(computed_steps=[0, 3, 8, 9])
    assert equal(guided(loop, "another scale, in place"), guided(loop, "another scale"))
