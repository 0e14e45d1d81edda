"""Several images on one network, and calls that are easily taken for another's: each is as drawn alone, or computed."""

import pytest
import torch
from conftest import equal
from diffusers import FlowMatchEulerDiscreteScheduler
from machines import Loop, set_timesteps, twin

BUDGET = dict(computed_steps=[0, 4, 7])


@pytest.fixture
def loop(machine):
    return Loop(machine)


def near(loop):
    """Two seeds that are 1 % apart."""
    return [loop.latents(0), loop.latents(0) + 0.01 * loop.latents(1)]


@torch.no_grad()
def together(loop, images, calls_first, with_scheduler=True):
    """Images in turns, the index set for each: call and step, or all calls and then all steps."""
    set_timesteps(loop.scheduler, 8)

    def step(i, t, velocity, latents):
        if not with_scheduler:
            return latents + (loop.scheduler.sigmas[i + 1] - loop.scheduler.sigmas[i]) * velocity
        loop.scheduler._step_index = i
        return loop.scheduler.step(velocity, t, latents, return_dict=False)[0]

    for i, t in enumerate(loop.scheduler.timesteps):
        if calls_first:
            velocities = [loop.call(latents, t) for latents in images]
            images = [step(i, t, velocity, latents) for velocity, latents in zip(velocities, images)]
        else:
            images = [step(i, t, loop.call(latents, t), latents) for latents in images]
    return images


@pytest.mark.parametrize("calls_first", [False, True])
@pytest.mark.parametrize("with_scheduler", [True, False])
def test_images_in_turns(loop, calls_first, with_scheduler):
    """Also of nearly the same noise, and of copies of the latents, which are compared by value."""
    call = loop.call
    for images in (near(loop), [loop.latents(0), loop.latents(1)]):
        other = Loop(loop.machine, model=loop.machine.script.remove_teacache(twin(loop.model)))
        stock = together(other, list(images), calls_first, with_scheduler)
        if with_scheduler:
            loop.apply(**BUDGET)
        else:
            loop.machine.script.apply_teacache(loop.model, 8, **BUDGET)
        for copied in (call, lambda latents, *args: call(latents.clone(), *args)):
            loop.call = copied
            assert equal(together(loop, list(images), calls_first, with_scheduler), stock)


@torch.no_grad()
def test_another_view_of_the_same_noise(loop):
    """Timesteps set once; an image that was stopped in its first step leaves nothing to the next one."""
    loop.apply(**BUDGET)
    set_timesteps(loop.scheduler, 8)
    noise, found = torch.cat([loop.latents(0), loop.latents(1)]), []
    for is_stopped in (False, True):
        loop.scheduler._step_index = None
        if is_stopped:
            loop.call(noise[:1], loop.scheduler.timesteps[0])
        latents = noise[1:]
        for t in loop.scheduler.timesteps:
            latents = loop.scheduler.step(loop.call(latents, t), t, latents, return_dict=False)[0]
        found.append((latents, loop.schedule))
    assert equal(*found)


@torch.no_grad()
def test_the_third_call_fails(loop):
    """Of the same prompt as the first, as in skip-layer guidance. Which of the two is repeated is not known: all calls of the
    next step are computed.
    """
    loop.apply(**BUDGET)
    set_timesteps(loop.scheduler, 8)
    jobs, latents = (loop.job, loop.machine.job(1, guided=False), loop.job), loop.latents(0)
    calls, ran = loop.machine.block_calls(loop.model), []
    for i, t in enumerate(loop.scheduler.timesteps):
        for k, job in enumerate(jobs):
            if (i, k) == (4, 2):
                hook = loop.machine.last(loop.model).register_forward_pre_hook(lambda *_: 1 / 0)
                with pytest.raises(ZeroDivisionError):
                    loop.call(latents, t, job)
                hook.remove()
            velocity = loop.call(latents, t, job)
        latents = loop.scheduler.step(velocity, t, latents, return_dict=False)[0]
        ran.append(len(calls))
        calls.clear()
    assert loop.schedule == [i in (0, 4, 5, 7) for i in range(8)] and ran == [3, 0, 0, 0, 4, 3, 0, 3]


@torch.no_grad()
def test_after_a_stop_in_the_first_step(loop):
    """As a new network would draw it, also where the loop copies the latents, which are then compared by value."""
    loop.apply(**BUDGET)
    found = []
    for is_stopped in (False, True):
        if is_stopped:
            loop.stopped(1)
        set_timesteps(loop.scheduler, 8)
        latents = loop.latents(0)
        for t in loop.scheduler.timesteps:
            latents = loop.scheduler.step(loop.call(latents.clone(), t), t, latents.clone(), return_dict=False)[0]
        found.append((latents, loop.schedule))
    assert equal(*found) and found[0][1] == [i in (0, 4, 7) for i in range(8)]


class Noisy(FlowMatchEulerDiscreteScheduler):
    def step(self, model_output, timestep, sample, noise=None, **kwargs):
        return (super().step(model_output, timestep, sample, **kwargs)[0] + 0.1 * noise,)


@torch.no_grad()
def test_noise_that_is_given_to_the_scheduler(machine, told):
    loop = Loop(machine, Noisy(shift=2.0))
    loop.apply(**BUDGET)
    set_timesteps(loop.scheduler, 8)
    latents = loop.latents(0)
    for i, t in enumerate(loop.scheduler.timesteps):
        latents = loop.scheduler.step(loop.call(latents, t), t, latents, noise=loop.latents(i), return_dict=False)[0]
    assert all(loop.schedule) and told == ["TeaCache: Noisy adds noise in its steps: all steps are computed"]
