"""The correction of skipped steps: by hand, exact where it can be, and begun anew where it would be wrong."""

import pytest
import torch
from conftest import equal
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler
from hypothesis import given
from hypothesis import strategies as st
from machines import Loop

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


def test_by_hand(machine):
    """Computed at sigmas 1 and 0.8, skipped at 0.6 and 0.5, computed at 0.3, then again at 0.2."""
    corrector = machine.script.Corrector()

    def step(sigma, next_sigma, velocity, is_computed):
        return corrector.correction(torch.tensor([[velocity, 0.0]]), sigma, next_sigma, is_computed, 1)

    assert step(1.0, 0.8, 1.0, True) == 0 and step(0.8, 0.6, 2.0, True) == 0
    assert step(0.6, 0.5, 5.0, False) == 0 and step(0.5, 0.3, 6.0, False) == 0
    interpolated = 2 + 4 * 0.2 / 0.5, 2 + 4 * 0.3 / 0.5  # the line from 2 at 0.8 to 6 at 0.3
    moved = -0.1 * (interpolated[0] - 5) - 0.2 * (interpolated[1] - 6)
    forecast = 2 + 1 * 2.5 / (1 + 0.25 * 2.5)  # the damped line from 1 at 1.0 and 2 at 0.8, 2.5 gaps ahead
    error = abs(forecast - 6) / 6
    assert step(0.3, 0.2, 6.0, True)[0, 0].item() == pytest.approx(moved / (1 + 4 * error), rel=1e-5)
    assert step(0.2, 0.0, 7.0, True) == 0 and corrector.skipped == []


@pytest.mark.parametrize("way", [HOLD, BUDGET, {"computed_steps": [0, 2, 5, 7]}], ids=str)
def test_exact_for_a_velocity_that_changes_evenly(loop, monkeypatch, way):
    """v = a + b sigma: with full trust, skipped steps are made up for completely, however they were skipped."""
    monkeypatch.setattr(loop.machine.script, "CAUTION", 0.0)
    a, b = (loop.latents(seed) for seed in (5, 6))
    network, last = loop.call, None

    def call(latents, t, job=None, model=None):
        """A computed step has the true velocity, a skipped one that of the last computed step."""
        nonlocal last
        network(latents, t, job)
        if loop.schedule[-1]:
            last = a + b * loop.scheduler.sigmas[loop.scheduler.step_index or 0]
        return last

    loop.call = call
    loop.apply(**way)
    (found,) = loop.draw()
    assert False in loop.schedule
    sigmas = loop.scheduler.sigmas
    expected = loop.latents(0) + sum((sigmas[i + 1] - sigmas[i]) * (a + b * sigmas[i]) for i in range(8))
    assert torch.allclose(found, expected, atol=1e-5)


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
    steps = st.tuples(st.sampled_from([0.9, 0.7, 0.5, 0.5, 0.2]), st.booleans(), st.sampled_from([0.0, 1.0, -3.0]))

    @given(st.lists(steps, min_size=2, max_size=8), st.booleans())
    def check(walk, is_sorted):
        corrector = machine.script.Corrector()
        walk = sorted(walk, key=lambda step: -step[0]) if is_sorted else walk
        for sigma, computed, value in [(1.0, True, 1.0), *walk]:
            moved = corrector.correction(torch.tensor([[value, value / 2]]), sigma, sigma - 0.1, computed, 1)
            assert torch.as_tensor(moved).isfinite().all()

    check()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sums_in_float32(loop, dtype):
    """The latents stay in their type, as the scheduler gives them."""
    corrector, generator = loop.machine.script.Corrector(), torch.Generator().manual_seed(0)
    for sigma, computed in ((1.0, True), (0.9, False), (0.8, False), (0.7, True)):
        velocity = torch.randn(1, 64, generator=generator).to(dtype)
        moved = corrector.correction(velocity, sigma, sigma - 0.1, computed, 1)
        assert all(v.dtype == torch.float32 for *_, v in corrector.computed + corrector.skipped)
    assert moved.dtype == torch.float32 and moved.abs().sum() > 0
    network = loop.call
    loop.call = lambda latents, t, job=None, model=None: network(latents.float(), t).to(dtype)
    loop.latents = lambda seed: Loop(loop.machine).latents(seed).to(dtype)
    loop.apply(**BUDGET)
    (found,) = loop.draw()
    assert found.dtype == dtype and found.isfinite().all()


def test_what_the_scheduler_returns(loop):
    """A tuple, or diffusers' class."""
    loop.apply(**BUDGET)
    expected = loop.draw()
    loop.scheduler.set_timesteps(sigmas=[1 - i / 8 for i in range(8)])
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
