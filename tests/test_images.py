"""Several images on one network, and calls that are easily taken for another's: each is as drawn alone, or computed."""

import abc

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
def test_images_that_are_a_step_ahead_of_each_other(loop):
    """Three that are near to each other, the last one first."""

    def draw():
        images = [loop.latents(0) + 0.01 * loop.latents(k) for k in range(3)]
        set_timesteps(loop.scheduler, 8)
        for step in range(10):
            for k in (2, 1, 0):
                if 0 <= (i := step - k) < 8:
                    loop.scheduler._step_index, t = i, loop.scheduler.timesteps[i]
                    images[k] = loop.scheduler.step(loop.call(images[k], t), t, images[k], return_dict=False)[0]
        return images

    stock = draw()
    loop.apply(**BUDGET)
    assert equal(draw(), stock)


@torch.no_grad()
def test_views_of_one_tensor_that_are_stepped_one_by_one(loop):
    """All calls first, then the steps, the last image first: its calls are not those of the first image."""

    def draw():
        images = list(torch.cat(near(loop)).split(1))
        set_timesteps(loop.scheduler, 8)
        for i, t in enumerate(loop.scheduler.timesteps):
            velocities = [loop.call(latents, t) for latents in images]
            for k in (1, 0):
                loop.scheduler._step_index = i
                images[k] = loop.scheduler.step(velocities[k], t, images[k], return_dict=False)[0]
        return images

    stock = draw()
    loop.apply(**BUDGET)
    assert equal(draw(), stock)


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


@pytest.mark.parametrize("is_given", [True, False])
@torch.no_grad()
def test_noise_of_a_scheduler_of_ones_own(machine, told, is_given):
    loop = Loop(machine, Noisy(shift=2.0))
    loop.scheduler.generator = torch.Generator()
    loop.apply(**BUDGET)
    set_timesteps(loop.scheduler, 8)
    latents = loop.latents(0)
    for i, t in enumerate(loop.scheduler.timesteps):
        noise = {"noise": loop.latents(i)} if is_given else {}
        latents = loop.scheduler.step(loop.call(latents, t), t, latents, **noise, return_dict=False)[0]
    what = "is given a tensor" if is_given else "adds noise"
    assert all(loop.schedule) and told == [f"TeaCache: Noisy {what} in its steps: all steps are computed"]
    machine.script.remove_teacache(loop)
    assert type(loop.scheduler) is Noisy


def test_noise_that_others_draw(loop, told):
    """Another thread, say, while the stock scheduler steps: it is not the scheduler's."""
    loop.apply(**BUDGET)
    begin = loop.scheduler._init_step_index
    loop.scheduler._init_step_index = lambda t: (torch.randn(1), begin(t))
    loop.draw()
    assert loop.schedule == [i in (0, 4, 7) for i in range(8)] and told == []
