"""The correction of skipped steps: by hand, exact where it can be, and begun anew where it would be wrong."""

import pytest
import torch
from conftest import equal
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler
from hypothesis import given
from hypothesis import strategies as st
from machines import Loop, set_timesteps

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


def test_the_formula(machine):
    """Velocities on a parabola, or on a line where two are known or are too close, are interpolated exactly."""
    sigmas, numbers = st.sampled_from([0.55, 0.58, 0.6, 0.65, 0.7]), st.lists(st.floats(-3, 3), min_size=5, max_size=5)

    @given(numbers, st.lists(sigmas, max_size=5, unique=True), numbers, st.integers(1, 4), st.booleans())
    def check(terms, skipped, junk, computed, close):
        def true(s):
            return sum(term * s**power for power, term in enumerate(terms[: 2 if close else min(computed, 2) + 1]))

        def correction(s, next_s, velocity, is_computed):
            velocity = torch.full((1, 2), velocity, dtype=torch.float64)
            return torch.as_tensor(corrector.correction(velocity, s, next_s, is_computed, 1))

        corrector, missing, way = machine.script.Corrector(), 0.0, [*sorted(skipped, reverse=True), 0.5]
        for s in (2.0, 1.7, 1.4, 0.8)[-computed:]:
            if close:
                correction(s + 0.1, s, 7.0, True)
            assert correction(s, s - 0.1, true(s), True).abs().max() == 0
        for s, next_s, used in zip(way, way[1:], junk):
            assert correction(s, next_s, used, False) == 0
            missing += (next_s - s) * (true(s) - used)
        moved = correction(0.5, 0.4, true(0.5), True)
        assert (moved - 0.5 / (2 * 0.5 - 0.4) * missing).abs().max() < 1e-9
        assert correction(0.4, 0.3, 9.0, True).abs().max() == 0, "once"

    check()


@pytest.mark.parametrize("way", [HOLD, BUDGET], ids=str)
def test_it_changes_what_is_drawn_and_nothing_without_skips(loop, monkeypatch, way):
    corrected, plain = both(loop, monkeypatch, way)
    assert not equal(corrected, plain)
    corrected, plain = both(loop, monkeypatch, {"rel_l1_thresh": 0.0})
    assert equal(corrected, plain)


OTHERS = {
    "Heun": FlowMatchHeunDiscreteScheduler,
    "stochastic": lambda: FlowMatchEulerDiscreteScheduler(stochastic_sampling=True),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_schedulers_are_not_corrected(machine, monkeypatch, name):
    try:
        loop = Loop(machine, OTHERS[name]())
    except TypeError:
        pytest.skip("not with this diffusers")
    loop.apply(**BUDGET)
    torch.manual_seed(0)
    found = loop.draw()
    assert not machine.script.is_corrected(loop.scheduler)
    monkeypatch.setattr(machine.script, "CORRECT", False)
    torch.manual_seed(0)
    assert equal(loop.draw(), found)


def test_it_goes_on_whatever_happens_to_the_latents(loop, monkeypatch):
    """Inpainting replaces them at every step: what is added at the end does not depend on them."""
    velocities, network = [loop.latents(seed) for seed in range(10, 18)], loop.call
    loop.call = lambda latents, t, job=None, model=None: (network(latents, t), velocities[len(loop.schedule) - 1])[1]

    def replace(i, t, velocity, latents):
        latents.mul_(0.5)  # in place; Loop goes on with these

    moved = [[a - b for a, b in zip(*both(loop, monkeypatch, HOLD, after=after))] for after in (None, replace)]
    assert moved[0][0].abs().max() > 0.01 and torch.allclose(moved[1][0], 0.5 * moved[0][0], atol=1e-5)


def test_a_batch_is_corrected_image_by_image(machine):
    """What is drawn beside it does not change an image, and a velocity of zero makes no NaN."""
    generator = torch.Generator().manual_seed(0)
    velocities = torch.randn(4, 4, 2, 4, 4, generator=generator)  # (steps, batch, ...)
    velocities[:, 1] *= 100
    velocities[:, 2] = 0
    results = []
    for batch in (slice(None), *(slice(i, i + 1) for i in range(4))):
        corrector = machine.script.Corrector()
        for velocity, sigma, computed in zip(velocities[:, batch], (1.0, 0.7, 0.5, 0.2), (True, True, False, True)):
            moved = corrector.correction(velocity, sigma, sigma - 0.2, computed, 1)
        results.append(moved)
    assert torch.allclose(results[0], torch.cat(results[1:]), rtol=1e-4, atol=1e-6)
    assert results[3].abs().max() == 0 < results[4].abs().max()


def test_it_is_finite_whatever_the_sigmas_are(machine):
    """They may repeat, and rise; the velocity of a step may be zero."""
    steps = st.tuples(st.sampled_from([0.9, 0.7, 0.5, 0.5, 0.2, 0.0]), st.booleans(), st.sampled_from([0.0, 1.0, -3.0]))

    @given(st.lists(steps, min_size=2, max_size=8), st.booleans(), st.booleans())
    def check(walk, is_sorted, is_rising):
        corrector = machine.script.Corrector()
        walk = sorted(walk, key=lambda step: -step[0]) if is_sorted else walk
        for sigma, computed, value in [(1.0, True, 1.0), *walk]:
            next_sigma = 2 * sigma if is_rising else sigma - 0.1
            moved = corrector.correction(torch.tensor([[value, value / 2]]), sigma, next_sigma, computed, 1)
            assert torch.as_tensor(moved).isfinite().all()

    check()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sums_in_float32(loop, dtype):
    """The latents stay in their type, as the scheduler gives them."""
    network, seen = loop.call, set()

    def look(*_):
        corrector = loop.model.teacache.corrector
        seen.update(velocity.dtype for *_, velocity in corrector.computed + corrector.skipped)

    loop.call = lambda latents, t, job=None, model=None: network(latents.float(), t).to(dtype)
    loop.latents = lambda seed: Loop(loop.machine).latents(seed).to(dtype)
    loop.apply(**BUDGET)
    (found,) = loop.draw(after=look)
    assert found.dtype == dtype and found.isfinite().all() and seen == {torch.float32}


def test_what_the_scheduler_returns(loop):
    """A tuple, or diffusers' class."""
    loop.apply(**BUDGET)
    expected = loop.draw()
    set_timesteps(loop.scheduler, 8)
    latents = loop.latents(0)
    for t in loop.scheduler.timesteps:
        with torch.no_grad():
            velocity = loop.call(latents, t)
        output = loop.scheduler.step(velocity, t, sample=latents)
        assert type(output).__name__ == "FlowMatchEulerDiscreteSchedulerOutput"
        latents = output.prev_sample
    assert torch.equal(latents, expected[0])


def test_guidance_that_ends(machine):
    """The velocity jumps where the number of calls changes: a gap that crosses it is not corrected."""
    corrector, one = machine.script.Corrector(), torch.ones(1, 4)
    steps = [(1.0, True, 2), (0.9, False, 2), (0.8, False, 1), (0.7, True, 1), (0.6, False, 1), (0.5, True, 1)]
    moved = [corrector.correction((i + 1) ** 2 * one, s, s - 0.1, *more) for i, (s, *more) in enumerate(steps)]
    assert [torch.as_tensor(x).abs().max() > 0 for x in moved] == [False] * 5 + [True]


@pytest.mark.parametrize("way", [HOLD, BUDGET], ids=str)
def test_nothing_is_held_after_the_last_step(loop, way):
    loop.apply(**way)
    loop.draw()
    corrector = loop.model.teacache.corrector
    assert corrector.computed == corrector.skipped == []
