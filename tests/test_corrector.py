"""The correction of skipped steps: by hand, exact where it can be, and dropped where it would be wrong."""

import pytest
import torch
from conftest import equal
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler
from test_clock import Loop

HOLD = {"rel_l1_thresh": 9.0, "coefficients": [1.0, 0.0]}  # computes the first and the last step
BUDGET = {"computed_steps": 3}


@pytest.fixture
def loop(machine):
    return Loop(machine)


def both(loop, monkeypatch, way, **options):
    """The latents with the correction, and without."""
    loop.apply(**way)
    corrected = loop.draw(**options)
    monkeypatch.setattr(loop.machine.script, "CORRECT", False)
    plain = loop.draw(**options)
    monkeypatch.setattr(loop.machine.script, "CORRECT", True)
    return corrected, plain


def test_by_hand(machine):
    """Computed at sigmas 1 and 0.8, skipped at 0.6 and 0.5, computed at 0.3, then again at 0.2."""
    corrector = machine.script.Corrector()

    def step(sigma, next_sigma, velocity, is_computed):
        return corrector.correct(torch.zeros(1, 2), torch.tensor([[velocity, 0.0]]), sigma, next_sigma, is_computed, 1)

    assert step(1.0, 0.8, 1.0, True)[0, 0] == 0 and step(0.8, 0.6, 2.0, True)[0, 0] == 0
    assert step(0.6, 0.5, 5.0, False)[0, 0] == 0 and step(0.5, 0.3, 6.0, False)[0, 0] == 0
    interpolated = 2 + 4 * 0.2 / 0.5, 2 + 4 * 0.3 / 0.5  # the line from 2 at 0.8 to 6 at 0.3
    moved = -0.1 * (interpolated[0] - 5) - 0.2 * (interpolated[1] - 6)
    forecast = 2 + 1 * 2.5 / (1 + 0.25 * 2.5)  # the damped line from 1 at 1.0 and 2 at 0.8, 2.5 gaps ahead
    error = abs(forecast - 6) / 6
    assert step(0.3, 0.2, 6.0, True)[0, 0].item() == pytest.approx(moved / (1 + 4 * error), rel=1e-5)
    assert step(0.2, 0.0, 7.0, True)[0, 0] == 0 and corrector.skipped == []


@pytest.mark.parametrize("way", [HOLD, BUDGET, {"computed_steps": [0, 2, 5, 7]}, {"tolerance": 1.0}], ids=str)
def test_exact_for_a_velocity_that_changes_evenly(loop, monkeypatch, way):
    """v = a + b sigma: with full trust, skipped steps are made up for completely, however they were skipped."""
    monkeypatch.setattr(loop.machine.script, "CAUTION", 0.0)
    a, b = (loop.latents(seed) for seed in (5, 6))
    network, last = loop.call, None

    def call(latents, t, job=None):
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
    torch.manual_seed(0)
    loop.apply(**BUDGET)
    found = loop.draw()
    monkeypatch.setattr(machine.script, "CORRECT", False)
    torch.manual_seed(0)
    assert equal(loop.draw(), found)


@pytest.mark.parametrize("how", ["replaced", "written into", "copied", "left"])
def test_latents_that_a_callback_replaces(machine, how):
    """The gap is dropped; equal values are no replacement."""
    corrector, latents = machine.script.Corrector(), torch.ones(1, 2)
    velocities = [torch.tensor([[v, 1.0]]) for v in (1.0, 1.0, 3.0)]
    latents = corrector.correct(latents, velocities[0], 1.0, 0.7, True, 1)
    latents = corrector.correct(latents, velocities[1], 0.7, 0.4, False, 1)
    if how == "replaced":
        latents = torch.zeros(1, 2)
    if how == "written into":
        latents.mul_(2.0)
    if how == "copied":
        latents = latents.clone()
    assert corrector.continues(latents, 1) == (how in ("copied", "left"))
    assert not corrector.continues(latents, 2), "guidance has ended"


def test_replaced_latents_are_not_corrected_in_a_loop(loop, monkeypatch):
    """From the replacement on, all is as it would be without a correction of what was before."""
    loop.apply(computed_steps=[0, 7])
    corrected = loop.draw()
    call, calls = loop.call, []

    def written(latents, t, job=None):
        calls.append(1)
        if len(calls) == 8:  # before the last step, which is computed
            latents.mul_(1.0)
        return call(latents, t, job)

    loop.call = written
    dropped = loop.draw()
    monkeypatch.setattr(loop.machine.script, "CORRECT", False)
    loop.call = call
    assert equal(dropped, loop.draw()) and not equal(dropped, corrected)


def test_a_batch_is_corrected_image_by_image(machine):
    """What is drawn beside it does not change an image."""
    generator = torch.Generator().manual_seed(0)
    velocities = torch.randn(4, 3, 2, 4, 4, generator=generator)  # (steps, batch, ...)
    velocities[:, 1] *= 100
    results = []
    for batch in (slice(None), slice(0, 1), slice(1, 2), slice(2, 3)):
        corrector, latents = machine.script.Corrector(), torch.zeros_like(velocities[0, batch])
        for velocity, sigma, computed in zip(velocities[:, batch], (1.0, 0.7, 0.5, 0.2), (True, True, False, True)):
            latents = corrector.correct(latents, velocity, sigma, sigma - 0.2, computed, 1)
        results.append(latents)
    assert torch.allclose(results[0], torch.cat(results[1:]), rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sums_in_float32(machine, dtype):
    corrector, latents = machine.script.Corrector(), torch.zeros(1, 64, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    for sigma, computed in ((1.0, True), (0.9, False), (0.8, False), (0.7, True)):
        velocity = torch.randn(1, 64, generator=generator).to(dtype)
        latents = corrector.correct(latents, velocity, sigma, sigma - 0.1, computed, 1)
        assert latents.dtype == dtype
        assert all(v.dtype == torch.float32 for *_, v in corrector.computed + corrector.skipped)
    assert latents.abs().sum() > 0


def test_what_the_scheduler_returns(loop):
    """A tuple, or diffusers' class."""
    loop.apply(**BUDGET)
    (latents,) = loop.draw()
    loop.scheduler.set_timesteps(4)
    for t in loop.scheduler.timesteps:
        with torch.no_grad():
            velocity = loop.call(latents, t)
        output = loop.scheduler.step(velocity, t, sample=latents)
        assert type(output).__name__ == "FlowMatchEulerDiscreteSchedulerOutput"
        latents = output.prev_sample
        assert torch.equal(output[0], latents)


def test_guidance_that_ends(machine, monkeypatch):
    """The velocity jumps where the number of calls changes: a gap that crosses it is not corrected."""
    loop, jobs = Loop(machine), (machine.job(guided=False), machine.job(1, guided=False))
    plan, ends = [0, 3, 7], 5
    loop.apply(computed_steps=plan)
    one_call, count = loop.call, []

    def call(latents, t, job=None):
        count.append(1)
        velocity = one_call(latents, t, jobs[0])
        return velocity if len(count) > ends else 4 * velocity - 3 * one_call(latents, t, jobs[1])

    loop.call = call
    gaps = []
    correction = machine.script.Corrector.correction

    def watched(self, sigma, velocity):
        gaps.append((len(count) - 1, len(self.skipped)))
        return correction(self, sigma, velocity)

    monkeypatch.setattr(machine.script.Corrector, "correction", watched)
    loop.draw()
    assert gaps == [(0, 0), (3, 2), (7, 2)], "two of the three skipped steps are on this side"
    assert loop.model.teacache_clock.corrector.computed == [], "nothing is held after the last step"
