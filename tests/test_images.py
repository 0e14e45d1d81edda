"""Several images on one network, and calls that are easily taken for another's: each is as drawn alone, or computed."""

import abc

import pytest
import torch
from conftest import equal
from diffusers import FlowMatchEulerDiscreteScheduler
from machines import SCHEDULERS, Loop, kept, scheduler, set_timesteps, twin

BUDGET = dict(computed_steps=[0, 4, 7])


@pytest.fixture
def loop(machine):
    return Loop(machine)


ORDERS = {  # whose turn it is: an image's turns are a call, its step, and so on; the index is set for each
    "call and step": [0, 0, 1, 1] * 8,
    "all calls, then all steps": [0, 1, 0, 1] * 8,
    "all calls, then the steps, the last image first": [0, 1, 1, 0] * 8,
    "a step ahead of each other": [k for step in range(10) for k in (2, 2, 1, 1, 0, 0) if 0 <= step - k < 8],
}
ALONE = "call and step", "all calls, then all steps"  # without a scheduler, too


@torch.no_grad()
def together(loop, images, order, with_scheduler=True):
    set_timesteps(loop.scheduler, 8)
    images, steps, velocities = list(images), [0] * len(images), {}
    for k in order:
        i, t, latents = steps[k], loop.scheduler.timesteps[steps[k]], images[k]
        if k not in velocities:
            velocities[k] = loop.call(latents, t)
        elif with_scheduler:
            loop.scheduler._step_index = i
            images[k] = loop.scheduler.step(velocities.pop(k), t, latents, return_dict=False)[0]
            steps[k] += 1
        else:
            images[k] = latents + (loop.scheduler.sigmas[i + 1] - loop.scheduler.sigmas[i]) * velocities.pop(k)
            steps[k] += 1
    return images


@pytest.mark.parametrize("order, with_scheduler", [*[(order, True) for order in ORDERS], *[(o, False) for o in ALONE]])
def test_images_in_turns(loop, order, with_scheduler):
    """Also of nearly the same noise, views of one tensor, and copies of the latents, which are compared by value."""
    noises, call = [loop.latents(seed) for seed in range(max(ORDERS[order]) + 1)], loop.call
    near = [noises[0] + 0.01 * noise for noise in noises]
    kinds = [torch.cat(near).split(1)] if "the last image first" in order else [near, noises]
    other, order = Loop(loop.machine, model=loop.machine.script.remove_teacache(twin(loop.model))), ORDERS[order]
    for images in kinds:
        stock = together(other, images, order, with_scheduler)
        if with_scheduler:
            loop.apply(**BUDGET)
        else:
            loop.machine.script.apply_teacache(loop.model, 8, **BUDGET)
        for copied in (call, lambda latents, *args: call(latents.clone(), *args)):
            loop.call = copied
            assert equal(together(loop, images, order, with_scheduler), stock)


@pytest.mark.parametrize("are_copied", [False, True], ids=["views of one noise", "copies"])
@torch.no_grad()
def test_after_a_stop_in_the_first_step(loop, are_copied):
    """As a new network would draw it: timesteps set once and another view of the noise, or set again and the same noise,
    where the loop copies the latents, which are then compared by value.
    """
    loop.apply(**BUDGET)
    set_timesteps(loop.scheduler, 8)
    noise, found = torch.cat([loop.latents(0), loop.latents(1)]), []
    given = torch.clone if are_copied else lambda latents: latents
    for is_stopped in (False, True):
        if is_stopped and are_copied:
            loop.stopped(1, seeds=(1,))
            set_timesteps(loop.scheduler, 8)
        elif is_stopped:
            loop.scheduler._step_index = None
            loop.call(noise[:1], loop.scheduler.timesteps[0])
        latents = noise[1:]
        for t in loop.scheduler.timesteps:
            latents = loop.scheduler.step(loop.call(given(latents), t), t, given(latents), return_dict=False)[0]
        found.append((latents, loop.schedule))
    assert equal(*found) and found[0][1] == [i in (0, 4, 7) for i in range(8)]


@pytest.mark.parametrize("failing, ran_then", [(2, 4), (1, 3)])
@torch.no_grad()
def test_a_call_fails_of_three(loop, failing, ran_then):
    """The third has the prompt of the first, as in skip-layer guidance. Whether the first or the third is called after a
    failure, of the third, or of the second, which is left out, is not known: all calls of the next step are computed.
    """
    loop.apply(**BUDGET)
    set_timesteps(loop.scheduler, 8)
    jobs, latents = (loop.job, loop.machine.job(1, guided=False), loop.job), loop.latents(0)
    calls, ran = loop.machine.block_calls(loop.model), []
    for i, t in enumerate(loop.scheduler.timesteps):
        for k, job in enumerate(jobs):
            if (i, k) == (4, failing):
                hook = loop.machine.last(loop.model).register_forward_pre_hook(lambda *_: 1 / 0)
                with pytest.raises(ZeroDivisionError):
                    loop.call(latents, t, job)
                hook.remove()
                if k == 1:
                    continue
            velocity = loop.call(latents, t, job)
        latents = loop.scheduler.step(velocity, t, latents, return_dict=False)[0]
        ran.append(len(calls))
        calls.clear()
    assert loop.schedule == [i in (0, 4, 5, 7) for i in range(8)] and ran == [3, 0, 0, 0, ran_then, 3, 0, 3]


@torch.no_grad()
def test_a_call_fails_and_the_loop_goes_on(loop):
    """With the velocity of the step before: the next step is computed."""
    loop.apply(**BUDGET)
    set_timesteps(loop.scheduler, 8)
    latents = loop.latents(0)
    for i, t in enumerate(loop.scheduler.timesteps):
        if i == 4:
            hook = loop.machine.last(loop.model).register_forward_pre_hook(lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                loop.call(latents, t)
            hook.remove()
        else:
            velocity = loop.call(latents, t)
        latents = loop.scheduler.step(velocity, t, latents, return_dict=False)[0]
    assert loop.schedule == [i in (0, 4, 5, 7) for i in range(8)]


@torch.no_grad()
def test_switched_off_between_two_calls(loop):
    loop.apply(**BUDGET)
    set_timesteps(loop.scheduler, 8)
    calls, latents = loop.machine.block_calls(loop.model), loop.latents(0)
    for t in loop.scheduler.timesteps[:2]:
        for job in (loop.job, loop.machine.job(1, guided=False)):
            velocity = loop.call(latents, t, job)
            loop.model.enable_teacache = len(loop.schedule) == 1
        latents = loop.scheduler.step(velocity, t, latents, return_dict=False)[0]
    assert len(calls) == 3 and loop.schedule == [True, True]


class Noisy(FlowMatchEulerDiscreteScheduler, metaclass=abc.ABCMeta):
    """Its noise is given to its step, or is from a generator of its own."""

    generator = None

    def step(self, model_output, timestep, sample, noise=None, **kwargs):
        if noise is None:
            noise = torch.randn(sample.shape, generator=self.generator)
        return (super().step(model_output, timestep, sample, **kwargs)[0] + 0.1 * noise,)


@pytest.mark.parametrize("name", ["given", "of its own", "stochastic", "LCM"])
@torch.no_grad()
def test_a_scheduler_that_adds_noise(machine, told, name):
    """A velocity of the old noise is not one of the new: all is computed, which is said for each image."""
    loop = Loop(machine, scheduler(name) if name in SCHEDULERS else Noisy(shift=2.0))
    cls, loop.scheduler.generator = type(loop.scheduler), torch.Generator()
    loop.apply(**BUDGET)
    for _ in range(2):
        set_timesteps(loop.scheduler, 8)
        latents = loop.latents(0)
        for i, t in enumerate(loop.scheduler.timesteps):
            noise = {"noise": loop.latents(i)} if name == "given" else {}
            latents = loop.scheduler.step(loop.call(latents, t), t, latents, **noise, return_dict=False)[0]
        assert loop.schedule == [True] * 8 and kept(loop.model) == []
    what = "is given a tensor" if name == "given" else "adds noise"
    assert told == [f"TeaCache: {cls.__name__} {what} in its steps: all steps are computed"] * 2
    machine.script.remove_teacache(loop)
    assert type(loop.scheduler) is cls


def test_noise_that_others_draw(loop, told):
    """Another thread, say, while the stock scheduler steps: it is not the scheduler's."""
    loop.apply(**BUDGET)
    begin = loop.scheduler._init_step_index
    loop.scheduler._init_step_index = lambda t: (torch.randn(1), begin(t))
    loop.draw()
    assert loop.schedule == [i in (0, 4, 7) for i in range(8)] and told == []
