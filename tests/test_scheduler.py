"""What the scheduler knows: where a generation begins, which step is running, how many there are; and who may have it."""

import copy
import pickle
from types import SimpleNamespace

import conftest
import diffusers
import pytest
import torch
from conftest import equal
from diffusers import FlowMatchEulerDiscreteScheduler
from machines import Loop, Oracle, fresh, kept, scheduler, set_timesteps, sigmas_of, twin

WAYS = {
    "threshold": dict(rel_l1_thresh=0.15, coefficients=[1.0, 0.0]),
    "list": dict(computed_steps=[0, 1, 4, 7]),
}
BUDGET = dict(computed_steps=4)
NOT_DRIVEN = (
    "TeaCache: no step of its scheduler is seen before this call (was it replaced, copied, or wrapped before? then apply "
    "TeaCache again)"
)
NOT_DRIVEN += ": all steps are computed"


@pytest.fixture(params=WAYS)
def way(request):
    return WAYS[request.param]


@pytest.fixture
def loop(machine):
    return Loop(machine)


def plain(loop, **kwargs):
    """What is drawn without TeaCache, with the same weights."""
    other = Loop(loop.machine, copy.deepcopy(loop.scheduler), loop.machine.script.remove_teacache(twin(loop.model)))
    return other.draw(**kwargs)


@pytest.mark.parametrize("way", [WAYS["threshold"], BUDGET], ids=str)
def test_num_steps_is_not_needed(loop, way, monkeypatch, told):
    """It is read from the scheduler, each time, and so are the sigmas for which steps are chosen."""
    monkeypatch.setattr(loop.machine.script, "CORRECT", False)
    loop.apply(**way)
    for steps in (12, 5, 30, 3, 1):
        found, schedule = loop.draw(steps), loop.schedule
        assert kept(loop.model) == []
        oracle = Oracle(loop.machine, loop.model, steps, **way, sigmas=sigmas_of(loop.scheduler))
        assert equal(loop.draw(steps, model=oracle, before=lambda i, at=oracle.at: at(i, "", 0)), found)
        assert schedule == oracle.schedule and len(schedule) == steps
        assert sum(schedule) == min(way.get("computed_steps", sum(schedule)), steps)
    assert told == []


@pytest.mark.parametrize("start", [1, 4, 7])
def test_a_start_in_the_middle_after_a_stopped_image(loop, way, start):
    """Image to image with the same prompt, also at exactly the timestep that was to come. A list keeps its numbers."""
    loop.apply(**way)
    for stop in (start - 1, start):
        loop.stopped(stop)
        found = loop.draw(start=start, seeds=(1,))
        assert equal((found, loop.schedule), fresh(loop, way, start=start, seeds=(1,)))
        assert len(loop.schedule) == 8 - start and loop.schedule[0] and loop.schedule[-1]
    if way == WAYS["list"]:
        assert loop.schedule == [step == start or step in way["computed_steps"] for step in range(start, 8)]


COUNTS = {"UniPC, merged timesteps": 60, "UniPC": 9, "DPM": 9, "Heun": 6, "Euler, a large shift": 40}


@pytest.mark.parametrize("name, steps", COUNTS.items())
def test_other_schedulers(machine, name, steps, told):
    """A step is a step of the scheduler, also where timesteps repeat: the last one is computed, and so many."""
    loop = Loop(machine, scheduler(name))
    loop.scheduler.set_timesteps(steps)
    times, stock, cls = loop.scheduler.timesteps.tolist(), loop.draw(steps), type(loop.scheduler)
    assert (len(set(times)) < len(times)) == (name in ("UniPC, merged timesteps", "Heun"))
    for way in ({"computed_steps": 5}, {"rel_l1_thresh": 0.5, "coefficients": [1.0, 0.0]}):
        loop.apply(**way)
        for _ in range(2):
            (latents,) = loop.draw(steps)
            assert latents.isfinite().all() and len(loop.schedule) == len(times)
            assert loop.schedule[0] and loop.schedule[-1] and False in loop.schedule
            assert sum(loop.schedule) == 5 or "computed_steps" not in way
            assert isinstance(loop.scheduler, cls) and type(loop.scheduler).__name__ == cls.__name__
    loop.apply(rel_l1_thresh=0)
    assert equal(loop.draw(steps), stock) and told == []
    assert machine.script.is_corrected(loop.scheduler) == ("Euler" in name)
    machine.script.remove_teacache(loop)
    assert type(loop.scheduler) is cls


# --- strange loops become slow, never wrong: see test_loops.py, too ---------------------------


@pytest.mark.parametrize("when", ["before any image", "after an image", 1, 2, 4, 7])
def test_a_scheduler_that_is_put_in_later(loop, when, told):
    """It is not followed, also where the same noise is given again: all steps are computed, with a line for each image,
    until TeaCache is applied again.
    """
    way = dict(computed_steps=[0, 1, 5, 7])
    loop.apply(**way)
    if when == "after an image":
        loop.draw()
    if isinstance(when, int):
        loop.stopped(when)
    loop.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    stock = plain(loop)
    for _ in range(3):
        assert equal(loop.draw(), stock) and kept(loop.model) == []
        assert loop.schedule[-8:] == [True] * 8
    assert told == [NOT_DRIVEN] * 3 and len(loop.schedule) == 8
    loop.apply(**way)
    assert equal((loop.draw(), loop.schedule), fresh(loop, way)) and False in loop.schedule


GRADIENTS = "TeaCache: gradients are on (use torch.no_grad()): all steps are computed"


@pytest.mark.parametrize("says", [NOT_DRIVEN, GRADIENTS], ids=["steps by itself", "with gradients"])
def test_a_loop_that_is_computed_throughout(loop, way, says, told):
    """It calls set_timesteps, but never step; or its gradients are on, as in a worker thread. Said for each image."""
    draw = Loop.draw if says == NOT_DRIVEN else Loop.draw.__wrapped__  # without torch.no_grad
    stock = plain(loop, euler=says == NOT_DRIVEN)
    loop.apply(**way)
    for _ in range(2):
        assert equal(draw(loop, euler=says == NOT_DRIVEN), stock) and loop.schedule == [True] * 8
    assert told == [says] * 2
    assert equal((loop.draw(), loop.schedule), fresh(loop, way))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_timestep_of_another_type(loop, dtype, told):
    """As in diffusers' training scripts: the latents stay in float32, a copy of them is rounded for each of two calls."""
    loop.apply(**BUDGET)
    call, other = loop.call, loop.machine.job(1, guided=False)
    loop.call = lambda latents, t, *_: sum(call(latents.to(dtype).float(), t.to(dtype), job) for job in (None, other))
    loop.draw(30)
    assert len(loop.schedule) == 30 and sum(loop.schedule) == 4 and told == []


def test_a_call_before_the_timesteps_are_set(loop, told):
    """As in evaluation during training: computed, and said."""
    loop.apply(**WAYS["list"])
    with torch.no_grad():
        for t in (900.0, 300.0):
            loop.call(loop.latents(0), torch.tensor(t))
    assert loop.schedule == [True] * 2 and told == [NOT_DRIVEN]
    assert equal((loop.draw(), loop.schedule), fresh(loop, WAYS["list"]))


def test_applied_in_the_middle_of_an_image(loop, way):
    """New, and again: the rest of the image is a generation, its first step is computed; the next image is as fresh."""
    for _ in range(2):
        (latents,) = loop.draw(after=lambda i, *_: loop.apply(**way) if i == 3 else None)
        assert latents.isfinite().all() and len(loop.schedule) == 4 and loop.schedule[0] and loop.schedule[-1]
        assert equal((loop.draw(), loop.schedule), fresh(loop, way))


def test_off_and_on_again_midway(loop, way):
    """One entry a step, so that the printed line counts all steps; a list keeps its numbers."""
    loop.apply(**way)
    loop.draw(before=lambda i: setattr(loop.model, "enable_teacache", i not in (1, 2)))
    assert len(loop.schedule) == 8 and loop.schedule[:4] == [True] * 4
    if "computed_steps" in way:
        assert False in loop.schedule
    loop.model.enable_teacache = False
    assert equal(loop.draw(), plain(loop)) and loop.schedule == [True] * 8 and kept(loop.model) == []


FORBIDDEN = "item _local_scalar_dense is_nonzero equal linear matmul mm addmm bmm convolution conv2d conv3d".split()


@pytest.mark.gpu
@pytest.mark.parametrize("computed", [[0, 1, 7], [0, 7]], ids=str)
def test_a_skipped_step_waits_for_nothing(loop, computed):
    """Call, guidance and the scheduler's step read no value of a tensor, which would wait for the GPU; no layer runs."""
    prompts = [loop.machine.job(seed, guided=False) for seed in (0, 1)]
    loop.apply(computed_steps=computed)
    set_timesteps(loop.scheduler, 8)
    latents, ran = loop.latents(0), []
    for step, t in enumerate(loop.scheduler.timesteps):
        is_skipped = 1 < step < 7
        if conftest.DEVICE == "cuda":
            torch.cuda.set_sync_debug_mode("error" if is_skipped else "default")
        with torch.no_grad(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            one, two = [loop.call(latents, t, prompt) for prompt in prompts]
            latents = loop.scheduler.step(two + 4 * (one - two), t, latents, return_dict=False)[0]
        ran.append([event.name.removeprefix("aten::") for event in profile.events()])
        assert not (is_skipped and set(FORBIDDEN) & set(ran[-1])), ran[-1]
    assert set(FORBIDDEN) & set(ran[0]), "the profiler sees them"
    assert loop.schedule == [step in computed for step in range(8)] and max(map(len, ran[2:7])) < 300


# --- one scheduler, several owners ----------------------------------------------------------


@pytest.mark.parametrize("how", ["pipeline", "network", "network replaced", "scheduler replaced"])
def test_removal_leaves_nothing(loop, how):
    """On scheduler and network: the stock class, no attribute, no tensor; after stopped images, and twice applied."""
    scheduler, model = loop.scheduler, loop.model
    before = set(vars(scheduler)), set(vars(model))
    for _ in range(2):
        loop.apply(**BUDGET)
        loop.draw()
        loop.stopped(3)
    if how == "network replaced":
        loop.model = loop.machine.model(1)
        setattr(loop, loop.machine.script.NETWORK, loop.model)
    if how == "scheduler replaced":
        loop.scheduler = FlowMatchEulerDiscreteScheduler()
        loop.draw()
        assert kept(model) == [], "what was stopped is let go by the next image"
    loop.machine.script.remove_teacache(model if how == "network" else loop)
    assert type(scheduler) is FlowMatchEulerDiscreteScheduler
    assert set(vars(scheduler)) - before[0] <= {"num_inference_steps", "_shift"}
    assert how == "network replaced" or set(vars(model)) == before[1]


def test_a_scheduler_of_ones_own_keeps_its_step(machine, monkeypatch):
    """Also one with the stock's name; it is followed, and not corrected."""

    class FlowMatchEulerDiscreteScheduler(diffusers.FlowMatchEulerDiscreteScheduler):
        def step(self, *args, **kwargs):
            return (0.9 * super().step(*args, **kwargs)[0],)

    def draw(**way):
        loop = Loop(machine, FlowMatchEulerDiscreteScheduler(shift=2.0))
        if way:
            loop.apply(**way)
        return loop.draw(), loop

    stock, (off, loop), (skipping, skipper) = draw()[0], draw(rel_l1_thresh=0), draw(**BUDGET)
    assert equal(off, stock) and not machine.script.is_corrected(loop.scheduler)
    assert skipper.schedule.count(True) == 4
    monkeypatch.setattr(machine.script, "CORRECT", False)
    assert equal(draw(**BUDGET)[0], skipping)
    machine.script.remove_teacache(loop)
    assert type(loop.scheduler) is FlowMatchEulerDiscreteScheduler and equal(loop.draw(), stock)


COPIES = {
    "copied": copy.copy,
    "deep-copied": copy.deepcopy,
    "pickled": lambda scheduler: pickle.loads(pickle.dumps(scheduler)),
    "from its configuration": lambda scheduler: type(scheduler).from_config(scheduler.config),
}


@pytest.mark.parametrize("how", COPIES)
def test_a_copied_scheduler_in_a_second_pipeline(loop, how):
    """It is a stock one, before and after the removal, and follows nobody until TeaCache is applied to its pipeline."""
    loop.apply(**BUDGET)
    expected = fresh(loop, BUDGET)
    loop.stopped(3)
    other = Loop(loop.machine, COPIES[how](loop.scheduler), loop.machine.script.remove_teacache(twin(loop.model)))
    stock = plain(other)
    assert "teacache" not in vars(other.scheduler) and equal(other.draw(), stock)
    assert equal((loop.draw(), loop.schedule), expected), "the first one goes on"
    loop.machine.script.remove_teacache(loop)
    again = Loop(loop.machine, COPIES[how](loop.scheduler), other.model)
    assert type(again.scheduler) is FlowMatchEulerDiscreteScheduler and equal(again.draw(), stock)
    other.apply(**BUDGET)
    assert equal((other.draw(), other.schedule), expected)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["copy", "pickle"])
def test_a_copied_pipeline(loop, way, how):
    """Each goes its own way, also where it was copied in the middle of an image."""
    loop.apply(**way)
    expected = fresh(loop, way)
    loop.stopped(3)
    model, scheduler = how((loop.model, loop.scheduler))
    assert model.teacache_scheduler is scheduler is not loop.scheduler
    other = Loop(loop.machine, scheduler, model)
    for _ in range(2):
        found = other.draw()  # weights that lie elsewhere may round otherwise
        assert torch.allclose(found[0], expected[0][0], atol=1e-4) and other.schedule == expected[1]
        other.stopped(5)
        assert equal((loop.draw(), loop.schedule), expected)
        loop.stopped(2)


def test_a_scheduler_wrapped_by_others(loop, way):
    """Corrected all the same; the wrapper stays, and the step that it holds works after the removal, too."""
    calls, stock, expected = [], plain(loop), fresh(loop, way)[0]
    loop.apply(**way)
    loop.draw()
    inner = loop.scheduler.step
    loop.scheduler.step = counted = lambda *args, **kwargs: (calls.append(1), inner(*args, **kwargs))[1]
    assert equal(loop.draw(), expected) and len(calls) == 8 and loop.machine.script.is_corrected(loop.scheduler)
    loop.machine.script.remove_teacache(loop)
    assert loop.scheduler.step is counted and equal(loop.draw(), stock) and len(calls) == 16


def test_two_networks_of_one_scheduler(machine):
    """In turns; after the removal of one the other goes on."""
    one = Loop(machine)
    two = Loop(machine, one.scheduler, machine.model(1))
    expected = [fresh(each, dict(computed_steps=count), 4) for each, count in ((one, 3), (two, 2))]
    for _ in range(3):
        for each, count in ((one, 3), (two, 2)):
            each.apply(computed_steps=count)
            each.draw(1)
    assert equal([(each.draw(4), each.schedule) for each in (one, two)], expected)
    machine.script.remove_teacache(one)
    assert equal((two.draw(4), two.schedule), expected[1])
    machine.script.remove_teacache(two)
    assert type(one.scheduler) is FlowMatchEulerDiscreteScheduler and "teacache" not in vars(one.scheduler)


def test_something_like_a_pipeline(machine):
    """Any object with a network and a scheduler that counts its steps."""
    model = machine.model()
    before = set(vars(model))
    for it in (None, SimpleNamespace(timesteps=torch.ones(3))):
        with pytest.raises(ValueError, match=f"does not count steps: give the {machine.script.NETWORK} alone"):
            machine.script.apply_teacache(SimpleNamespace(**{machine.script.NETWORK: model}, scheduler=it))
        assert set(vars(model)) == before
    pipeline = SimpleNamespace(**{machine.script.NETWORK: model}, scheduler=FlowMatchEulerDiscreteScheduler())
    assert machine.script.apply_teacache(pipeline) is pipeline is machine.script.remove_teacache(pipeline)
