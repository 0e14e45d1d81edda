"""What the pipeline knows: where a generation begins, how many steps it has, when a step ends; and several calls a step."""

import copy
import inspect
import pickle
import threading
import warnings
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from conftest import equal, tensors_in
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler, UniPCMultistepScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

WAYS = {
    "threshold": dict(rel_l1_thresh=0.15, coefficients=[1.0, 0.0]),
    "computed steps": dict(computed_steps=4),
    "tolerance": dict(tolerance=0.5),
}


class Stopped(Exception):
    pass


def set_timesteps(scheduler, steps):
    """As Lumina2Pipeline does, where the scheduler can."""
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps))
    else:
        scheduler.set_timesteps(steps)


class Loop:
    """A pipeline of a network and a scheduler: it draws without guidance, one or more latents at a time."""

    def __init__(self, machine, scheduler=None, model=None):
        self.machine, self.job = machine, machine.job(guided=False)
        self.scheduler = scheduler or FlowMatchEulerDiscreteScheduler(shift=2.0)
        self.model = model or machine.model()
        setattr(self, machine.script.NETWORK, self.model)

    def latents(self, seed):
        shape = (1, 4, 4, 4) if self.machine.name == "lumina2" else self.job.shape
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

    def call(self, latents, t, job=None):
        job = job or self.job
        if self.machine.name == "lumina2":
            return -self.model(latents, (1 - t / 1000).expand(1), *job["cond"], return_dict=False)[0]
        return self.model(latents, timestep=t, return_dict=False, **job.inputs)[0]

    @torch.no_grad()
    def draw(self, steps=8, start=0, seeds=(0,), stop=None, job=None, euler=False):
        """The last latents. start: the first step; several seeds: that many calls of each step; stop: before this step."""
        set_timesteps(self.scheduler, steps)
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(start)
        latents = [self.latents(seed) for seed in seeds]
        sigmas = self.scheduler.sigmas
        for i, t in enumerate(self.scheduler.timesteps[start:]):
            if i == stop:
                raise Stopped
            velocities = [self.call(x, t, job) for x in latents]
            if euler:  # without the scheduler
                latents = [x + (sigmas[i + 1] - sigmas[i]) * v for x, v in zip(latents, velocities)]
            else:
                joint = self.scheduler.step(torch.cat(velocities), t, torch.cat(latents), return_dict=False)[0]
                latents = list(joint.split(1))
        return latents

    @property
    def schedule(self):
        return self.model.teacache.schedule

    def apply(self, **way):
        return self.machine.script.apply_teacache(self, **way)


@pytest.fixture(params=WAYS)
def way(request):
    return WAYS[request.param]


@pytest.fixture
def loop(machine):
    return Loop(machine)


@pytest.fixture
def uncorrected(machine, monkeypatch):
    """As a network alone is, whose scheduler nobody knows."""
    monkeypatch.setattr(machine.script, "CORRECT", False)


def fresh(loop, way, *args, **kwargs):
    """What a new network and a new scheduler give: the latents, and the schedule."""
    other = Loop(loop.machine, type(loop.scheduler).from_config(loop.scheduler.config))
    other.apply(**way)
    return other.draw(*args, **kwargs), other.schedule


def stopped(loop, at, **kwargs):
    with pytest.raises(Stopped):
        loop.draw(stop=at, **kwargs)


def test_num_steps_is_not_needed(loop, way, uncorrected):
    """It is read from the scheduler, each time; the same as a network alone that is told."""
    loop.apply(**way)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "TeaCache")
        for steps in (12, 5, 30, 8):
            found = loop.draw(steps)
            alone = Loop(loop.machine)
            loop.machine.script.apply_teacache(alone.model, steps, **way)
            assert equal(found, alone.draw(steps)) and loop.schedule == alone.schedule
            assert len(loop.schedule) == steps and loop.schedule[0] and loop.schedule[-1]
            assert tensors_in(loop.model.teacache) == []


@pytest.mark.parametrize("start", [0, 4])
def test_steps_to_come_are_not_guessed(loop, start):
    """Computed steps are chosen for the timesteps that the scheduler has, whatever they are."""
    sigmas = np.array([1.0, 0.97, 0.96, 0.95, 0.94, 0.93, 0.6, 0.5, 0.45, 0.3, 0.1, 0.05])
    stock = loop.scheduler.set_timesteps
    loop.scheduler.set_timesteps = lambda **_: stock(sigmas=sigmas)
    loop.apply(computed_steps=5)
    loop.draw(12, start=start)
    times = [1 - t.item() / 1000 for t in loop.scheduler.timesteps[start:]]
    chosen = [0, *loop.machine.script.spread(times, 0, 1, 4)]
    assert [step for step, computed in enumerate(loop.schedule) if computed] == chosen
    guessed = loop.machine.script.shifted_timesteps(times[:2], len(times))
    assert chosen != [0, *loop.machine.script.spread(guessed, 0, 1, 4)]


@pytest.mark.parametrize("steps", [12, 5, 4, 3, 1])
def test_exactly_as_many_steps(loop, steps):
    """5 of 12, where a network alone that believes in 30 computed 3; and all, where there are no more."""
    loop.apply(computed_steps=5)
    loop.draw(steps)
    assert sum(loop.schedule) == min(5, steps) and len(loop.schedule) == steps


@pytest.mark.parametrize("stop", [1, 2, 4, 7])
@pytest.mark.parametrize("offset", [0, 1])
def test_a_start_in_the_middle_after_a_stopped_image(loop, way, stop, offset):
    """Image to image with the same prompt, also at exactly the timestep that was to come."""
    loop.apply(**way)
    stopped(loop, stop)
    start = min(stop + offset, 7)
    found = loop.draw(start=start, seeds=(1,))
    assert equal((found, loop.schedule), fresh(loop, way, start=start, seeds=(1,)))
    assert len(loop.schedule) == 8 - start


def test_a_stop_in_the_first_step(loop, way):
    """The same prompt and timestep, another noise."""
    loop.apply(**way)
    stopped(loop, 1)
    assert equal((loop.draw(seeds=(1,)), loop.schedule), fresh(loop, way, seeds=(1,)))


SCHEDULERS = {
    "UniPC, merged timesteps": (
        lambda: UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=20.0),
        60,
    ),
    "UniPC": (lambda: UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True), 9),
    "Heun, two calls a step": (lambda: FlowMatchHeunDiscreteScheduler(shift=3.0), 6),
    "Euler, a large shift": (lambda: FlowMatchEulerDiscreteScheduler(shift=100.0), 40),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("budget", [2, 5])
def test_other_schedulers(machine, name, budget):
    """A step is a step of the scheduler, also where timesteps repeat: the last one is computed, and so many."""
    make, steps = SCHEDULERS[name]
    try:
        loop = Loop(machine, make())
        loop.scheduler.set_timesteps(steps)
    except (TypeError, ValueError, AttributeError):
        pytest.skip(f"not with diffusers {diffusers.__version__}")
    times = loop.scheduler.timesteps.tolist()
    assert (len(set(times)) < len(times)) == (name in ("UniPC, merged timesteps", "Heun, two calls a step"))
    for way in ({"computed_steps": budget}, {"rel_l1_thresh": 0.5, "coefficients": [1.0, 0.0]}, {"tolerance": 1.0}):
        loop.apply(**way)
        for _ in range(2):
            (latents,) = loop.draw(steps)
            assert latents.isfinite().all() and len(loop.schedule) == len(times)
            assert loop.schedule[0] and loop.schedule[-1] and False in loop.schedule
            assert sum(loop.schedule) == budget or "computed_steps" not in way
    loop.apply(rel_l1_thresh=0)
    off = loop.draw(steps)
    machine.script.remove_teacache(loop)
    assert equal(loop.draw(steps), off)


def test_the_scheduler_is_as_before(loop, way):
    """Pipelines look at signatures; nothing stays; applied twice it is wrapped once."""
    scheduler, before = loop.scheduler, set(vars(loop.scheduler))
    stock = {name: inspect.signature(getattr(scheduler, name)) for name in ("step", "set_timesteps")}
    for _ in range(2):
        loop.apply(**way)
        assert {name: inspect.signature(getattr(scheduler, name)) for name in stock} == stock
        assert scheduler.step.args[1].__func__ is type(scheduler).step
    for what in (loop, loop.model):
        loop.apply(**way)
        loop.machine.script.remove_teacache(what)
        assert set(vars(scheduler)) == before
        assert not {"forward", "teacache", "teacache_clock", "enable_teacache"} & set(vars(loop.model))


def test_a_scheduler_wrapped_by_others(loop, way):
    """Before and after: their wrapper stays."""
    calls, stock = [], loop.scheduler.step

    def counted(*args, **kwargs):
        calls.append(1)
        return stock(*args, **kwargs)

    loop.scheduler.step = counted
    loop.apply(**way)
    found = loop.draw()
    assert len(calls) == 8 and equal(found, fresh(loop, way)[0])
    loop.machine.script.remove_teacache(loop)
    assert loop.scheduler.step is counted
    del loop.scheduler.step
    loop.apply(**way)
    stock = loop.scheduler.step
    loop.scheduler.step = counted
    assert equal(loop.draw(), found) and len(calls) == 16
    loop.machine.script.remove_teacache(loop)
    assert loop.scheduler.step is counted
    loop.draw()


def test_two_pipelines_of_one_scheduler(machine, way):
    one = Loop(machine)
    two = Loop(machine, one.scheduler, machine.model(1))
    one.apply(**way), two.apply(computed_steps=3)
    expected = fresh(one, way)[0]
    for _ in range(2):
        assert equal(one.draw(), expected)
        two.draw()
        assert sum(two.schedule) == 3
    machine.script.remove_teacache(one)
    two.draw(5)
    assert sum(two.schedule) == 3 and len(two.schedule) == 5


def test_a_scheduler_that_is_put_in_later_is_not_followed(loop, way, uncorrected):
    """Then all is as on a network alone, also after an image that was stopped under the first scheduler."""
    loop.apply(num_steps=8, **way)
    expected = fresh(loop, way)
    for stop in (None, 3):
        if stop:
            loop.scheduler = FlowMatchEulerDiscreteScheduler(shift=2.0)
            loop.apply(num_steps=8, **way)
            stopped(loop, stop)
        loop.scheduler = FlowMatchEulerDiscreteScheduler(shift=2.0)
        for _ in range(2):
            assert equal((loop.draw(), loop.schedule), expected)


def test_a_loop_that_steps_by_itself(loop, way):
    """set_timesteps is called, step never: as on a network alone."""
    loop.apply(num_steps=8, **way)
    loop.scheduler = FlowMatchEulerDiscreteScheduler(shift=6.0)
    loop.apply(num_steps=8, **way)
    for seed in (0, 1):
        found = loop.draw(euler=True, seeds=(seed,))
        other = Loop(loop.machine, FlowMatchEulerDiscreteScheduler(shift=6.0))
        loop.machine.script.apply_teacache(other.model, 8, **way)
        assert equal(found, other.draw(euler=True, seeds=(seed,))) and loop.schedule == other.schedule
        assert len(loop.schedule) == 8 and False in loop.schedule


def test_a_copied_and_a_pickled_pipeline(loop, way):
    """Each with a clock of its own."""
    loop.apply(**way)
    expected = fresh(loop, way)
    stopped(loop, 3)
    pickled = pickle.loads(pickle.dumps((loop.model, loop.scheduler)))
    copied = copy.deepcopy((loop.model, loop.scheduler))
    for model, scheduler in (pickled, copied):
        other = Loop(loop.machine, scheduler, model)
        assert scheduler.step.args[0] is model.teacache_clock is not loop.model.teacache_clock
        assert equal((other.draw(), other.schedule), expected)
        stopped(other, 5)
        assert equal((loop.draw(), loop.schedule), expected)
        stopped(loop, 2)


# --- several calls of one step -------------------------------------------------------------


@pytest.mark.parametrize("alone", [True, False], ids=["network", "pipeline"])
@pytest.mark.parametrize("seeds", [(0, 1), (0, 1, 2)], ids=str)
def test_tiles(loop, alone, seeds, monkeypatch):
    """Two calls of one step with the same conditioning: each has its own cache, so each is as if it were drawn alone."""
    for way in ({"rel_l1_thresh": 9.0, "coefficients": [1.0, 0.0]}, {"computed_steps": 3}):
        if alone:
            monkeypatch.setattr(loop.machine.script, "CORRECT", False)
            loop.machine.script.apply_teacache(loop.model, 8, **way)
        else:
            loop.apply(**way)
        for _ in range(2):
            found = loop.draw(seeds=seeds)
            assert sum(loop.schedule) == way.get("computed_steps", 2) and tensors_in(loop.model.teacache) == []
            for each, seed in zip(found, seeds):
                assert equal([each], fresh(loop, way, seeds=(seed,))[0])


def test_a_call_that_comes_and_goes(loop):
    """Skip-layer guidance for some steps: a third call with the same conditioning is computed when it appears."""
    loop.machine.script.apply_teacache(loop.model, 8, computed_steps=2)
    computed, calls = [], []
    loop.machine.block(loop.model).register_forward_pre_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        for step in range(8):
            for k in range(2 if step in (2, 3, 5) else 1):
                calls.clear()
                loop.call(loop.latents(k), torch.tensor(1000.0 - 100 * step))
                computed.append((step, k, bool(calls)))
    assert [(s, k) for s, k, c in computed if c] == [(0, 0), (2, 1), (5, 1), (7, 0)]


def test_two_images_of_two_prompts_in_lockstep(machine):
    """Two loops over one network that take turns in each step."""
    way, jobs = (
        {"rel_l1_thresh": 9.0, "coefficients": [1.0, 0.0]},
        (machine.job(guided=False), machine.job(1, 1, False)),
    )
    loop = Loop(machine)
    machine.script.apply_teacache(loop.model, 8, **way)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=2.0)
    set_timesteps(scheduler, 8)
    latents = [loop.latents(seed) for seed in (0, 1)]
    with torch.no_grad():
        for i, t in enumerate(scheduler.timesteps):
            delta = scheduler.sigmas[i + 1] - scheduler.sigmas[i]
            latents = [x + delta * loop.call(x, t, job) for x, job in zip(latents, jobs)]
    assert loop.schedule == [True] + 6 * [False] + [True]
    for seed, job in enumerate(jobs):
        other = Loop(machine)
        machine.script.apply_teacache(other.model, 8, **way)
        assert equal(other.draw(seeds=(seed,), job=job, euler=True), [latents[seed]])


def test_any_mix(machine):
    """Of images, stopped images and starts in the middle, on one pipeline: each is as fresh."""
    loop = Loop(machine)
    images = st.fixed_dictionaries(
        {
            "steps": st.integers(2, 9),
            "start": st.integers(0, 3),
            "seeds": st.sampled_from([(0,), (1,), (0, 1)]),
            "stop": st.one_of(st.none(), st.integers(0, 8)),
            "way": st.sampled_from(list(WAYS.values())),
        }
    )

    @settings(max_examples=20)
    @given(st.lists(images, min_size=1, max_size=4), st.booleans())
    def check(mix, again):
        loop.apply(computed_steps=2)
        for image in mix:
            way, start = image["way"], min(image["start"], image["steps"] - 1)
            if again:
                loop.apply(**way)
            else:
                for name in ("rel_l1_thresh", "computed_steps", "tolerance", "coefficients"):
                    setattr(loop.model, name, way.get(name))
            options = {"start": start, "seeds": image["seeds"]}
            try:
                found = loop.draw(image["steps"], stop=image["stop"], **options)
            except Stopped:
                continue
            assert equal((found, loop.schedule), fresh(loop, way, image["steps"], **options))
            assert tensors_in(loop.model.teacache) == []

    check()


# --- threads, the polynomial, what is printed ----------------------------------------------


def test_threads_that_share_a_network(loop):
    """Warned of in the middle of a generation. One after the other they are no matter, also after a stop."""

    def in_thread(function, *args, **kwargs):
        caught = []

        def run():
            with warnings.catch_warnings(record=True) as seen, torch.no_grad():
                warnings.simplefilter("always")
                function(*args, **kwargs)
                caught.extend(str(w.message) for w in seen)

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        return [message for message in caught if "threads" in message]

    loop.apply(computed_steps=4)
    loop.draw()
    assert in_thread(loop.draw) == []
    stopped(loop, 4)
    assert in_thread(loop.draw) == []
    loop.scheduler.set_timesteps(8)
    latents, (first, second, *_) = loop.latents(0), loop.scheduler.timesteps
    with torch.no_grad():
        loop.scheduler.step(loop.call(latents, first), first, latents)
    assert len(in_thread(loop.call, latents, second)) == 1


@pytest.mark.parametrize("how", ["copied", "another scheduler"])
def test_a_scheduler_that_is_not_used_is_told(loop, how):
    """Without num_steps, where a network goes on under another scheduler."""
    loop.apply(computed_steps=4)
    if how == "copied":
        other = Loop(loop.machine, model=copy.deepcopy(loop.model))
    else:
        other, loop.scheduler = loop, FlowMatchEulerDiscreteScheduler(shift=2.0)
    with pytest.warns(UserWarning, match="is not used; .* steps are assumed: apply it to the pipeline again"):
        other.draw()
    other.apply(computed_steps=4)
    other.draw()
    assert sum(other.schedule) == 4 and len(other.schedule) == 8


def test_a_pipeline_without_a_scheduler(machine):
    model = machine.model()
    before = set(vars(model))
    with pytest.raises(ValueError, match="has no scheduler"):
        machine.script.apply_teacache(SimpleNamespace(**{machine.script.NETWORK: model}, scheduler=None))
    assert set(vars(model)) == before


def test_a_large_change_is_computed(machine, monkeypatch):
    """The published polynomial is negative there: the more changed, the more was skipped."""
    v1 = [393.76566581, -603.50993606, 209.10239044, -23.00726601, 0.86377344]
    v2 = [225.7042019806413, -608.8453716535591, 304.1869942338369, 124.21267720116742, -1.4089066892956552]
    rescale = machine.script.rescale
    for coefficients, end in ((v1, 0.27904501), (v2, 1.20747951)):
        inside = np.linspace(0, end - 1e-6, 50)
        assert [rescale(x, coefficients) for x in inside] == [np.polyval(coefficients, x) for x in inside]
        assert all(rescale(x, coefficients) == np.inf for x in (end + 1e-6, 0.5 + end, 1.2 + end, 9.0))
    assert rescale(0.005, v2) < 0, "small changes are inside"
    for coefficients in ([1.0, 0.0], [0.0], [-0.2], [2.0, 0.0, 0.05], [4.0, -1.0, 0.3]):
        assert rescale(7.0, coefficients) == np.polyval(coefficients, 7.0), "never falls below zero: no end"
    assert rescale(2.0, [-1.0, 1.0]) == np.inf and np.isnan(rescale(np.nan, v1))

    model, job = machine.model(), machine.job(guided=False)
    machine.script.apply_teacache(model, 10, 1e9, v1)
    with torch.no_grad():
        for step in range(10):  # each step changes all, as with a stochastic scheduler
            machine.call(model, job, step / 10, value=(-3.0) ** step)
    assert model.teacache.schedule == [True] * 10


def test_print(loop):
    loop.apply(computed_steps=4)
    assert repr(loop.model.teacache) == "0 of 0 steps computed: "
    loop.draw()
    marks = "".join("X" if computed else "." for computed in loop.schedule)
    assert repr(loop.model.teacache) == f"4 of 8 steps computed: {marks}" and marks.count("X") == 4
    stopped(loop, 3)
    assert repr(loop.model.teacache) == "1 of 3 steps computed: X.."


def test_num_steps_none_holds_the_constant(machine, monkeypatch):
    """For a pipeline's network, where its scheduler is not followed."""
    loop = Loop(machine)
    loop.apply(computed_steps=4)
    loop.scheduler = FlowMatchEulerDiscreteScheduler(shift=2.0)
    monkeypatch.setattr(machine.script, "NUM_INFERENCE_STEPS", 6)
    loop.draw(6)
    assert sum(loop.schedule) == 4 and len(loop.schedule) == 6


def test_something_like_a_pipeline(machine):
    """Any object with a network and a scheduler."""
    model = machine.model()
    pipeline = SimpleNamespace(**{machine.script.NETWORK: model}, scheduler=FlowMatchEulerDiscreteScheduler())
    assert machine.script.apply_teacache(pipeline) is pipeline is machine.script.remove_teacache(pipeline)
