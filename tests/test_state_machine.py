"""The state machine that both scripts share: schedule, outputs and what is kept, on either model."""

import warnings

import pytest
import torch
from conftest import equal, tensors_in
from hypothesis import given, settings
from hypothesis import strategies as st
from machines import IDENTITY, Oracle

STEPS = 8
WAYS = {"threshold": None, "computed steps": dict(computed_steps=4), "tolerance": dict(tolerance=2.0)}


@pytest.fixture(params=WAYS)
def way(request, machine):
    """Settings under which some steps are skipped and some between the first and the last are computed."""
    return WAYS[request.param] or {"rel_l1_thresh": machine.path(machine.model(), machine.job()) / 3}


class Interrupted(Exception):
    pass


def stop(at):
    def before(step, branch, count):
        if count == at:
            raise Interrupted

    return before


def interrupt(machine, model, job, at, inside):
    """A generation that stops at this call of the model: before it, or, if it runs any module, inside of it."""
    hook = None

    def before(step, branch, count):
        nonlocal hook
        if count == at and not inside:
            raise Interrupted
        if count == at:
            hook = machine.last(model).register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(Interrupted))

    try:
        machine.denoise(model, job, before=before)
    except Interrupted:
        pass
    if hook:
        hook.remove()


# --- one generation -----------------------------------------------------------------------


@pytest.mark.parametrize("guided", [True, False], ids=["guided", "unguided"])
def test_thresholds(machine, guided):
    """Schedule and outputs are the oracle's; blocks run in computed steps alone; more threshold, fewer steps."""
    model, job = machine.model(), machine.job(guided=guided)
    path, calls, counts = machine.path(model, job), machine.block_calls(model), []
    for share in (1e-9, 0.1, 0.2, 0.35, 0.6, 9):
        way = {"rel_l1_thresh": share * path}
        expected = machine.oracle(model, job, **way)
        calls.clear()
        found = machine.denoise(machine.apply(model, **way), job)
        assert model.teacache.schedule == expected[2] and equal(found, expected[:2])
        counts.append(sum(expected[2]))
        assert len(calls) == counts[-1] * (machine.passes if guided else 1)
    assert counts[0] == STEPS and counts[-1] == 2 and len(set(counts)) >= 4
    assert counts == sorted(counts, reverse=True)


@pytest.mark.parametrize("coefficients", [[2.0, 0.0, 0.05], [4.0, -1.0, 0.3], [-0.2], [0.0], [-1.0, 0.1]], ids=str)
def test_polynomials(machine, coefficients):
    """The last one falls below zero at 0.1, and some changes are larger: these are computed."""
    model, job = machine.model(), machine.job()
    way = {"rel_l1_thresh": 0.3, "coefficients": coefficients}
    expected = machine.oracle(model, job, **way)
    assert equal(machine.denoise(machine.apply(model, **way), job), expected[:2])
    assert model.teacache.schedule == expected[2]


@pytest.mark.parametrize("budget", [2, 3, 5, 8])
def test_computed_steps(machine, budget):
    """Exactly so many, in two generations one after the other, whatever they are of."""
    model = machine.apply(machine.model(), computed_steps=budget)
    calls = machine.block_calls(model)
    for job, passes in ((machine.job(), machine.passes), (machine.job(1, guided=False), 1)):
        expected = machine.oracle(model, job, computed_steps=budget)
        calls.clear()
        assert equal(machine.denoise(model, job), expected[:2])
        assert model.teacache.schedule == expected[2] and sum(expected[2]) == budget
        assert len(calls) == budget * passes


@pytest.mark.parametrize("off", ["threshold 0", "below zero", "disabled", "gradients"])
def test_off_is_stock_bit_for_bit_and_keeps_nothing(machine, off):
    """Also at threshold 0 with a polynomial below zero, whose sum lies below it."""
    model, job = machine.model(), machine.job()
    stock, held = machine.denoise(machine.stock(model), job), []
    thresh = 9.0 if off in ("disabled", "gradients") else 0
    machine.apply(model, rel_l1_thresh=thresh, coefficients=[-1.0] if off == "below zero" else IDENTITY)
    model.enable_teacache = off != "disabled"

    def call(*args, **kwargs):
        with torch.set_grad_enabled(off == "gradients"):
            output = model(*args, **kwargs)
        held.extend([*model.teacache.branches, model.teacache.previous_modulated_input])
        return tuple(x.detach() for x in output)

    assert equal(machine.denoise(call, job), stock)
    assert all(kept is None or kept.is_empty for kept in held) and tensors_in(model.teacache) == []
    assert model.teacache.schedule == ([True] * STEPS if thresh == 0 else [])


def test_nothing_is_held_when_the_last_step_begins(machine, way):
    """Nor after it; before it, at most what was seen and two outputs for each branch."""
    model, job, held = machine.model(), machine.job(), []
    machine.apply(model, **way)
    given_tensors = {id(t) for t in machine.tensors(job)}

    def look(*_):
        held.append(len([t for t in tensors_in(model.teacache) if t.ndim and id(t) not in given_tensors]))

    machine.block(model).register_forward_pre_hook(look)
    last = STEPS * machine.passes - machine.passes
    begins = []
    machine.denoise(model, job, before=lambda step, branch, count: begins.append(len(held)) if count == last else None)
    assert 0 < max(held[: begins[0]]) <= 3 * machine.passes
    assert held[begins[0] :] == [0] * machine.passes
    assert tensors_in(model.teacache) == [] and len(model.teacache.schedule) == STEPS


def test_a_change_that_is_no_number_computes(machine):
    model, job = machine.model(), machine.job()
    machine.apply(model, 5, rel_l1_thresh=1e9)
    with torch.no_grad():
        for step, value in enumerate([0.5, float("nan"), 0.5, 0.5, 0.5]):
            machine.call(model, job, step / 5, value)
    assert model.teacache.schedule == [True, True, True, False, True]
    model.num_steps, model.coefficients = STEPS, [float("nan")]  # apply_teacache refuses these
    machine.denoise(model, job)
    assert model.teacache.schedule == [True] * STEPS


def test_the_caller_may_write_into_the_output(machine, way):
    """What is remembered is not what was returned."""
    model, job, outputs = machine.model(), machine.job(), []
    expected = machine.oracle(model, job, **way)[0]
    machine.apply(model, **way)

    def call(*args, **kwargs):
        (output,) = model(*args, **kwargs)
        outputs.append(output.clone())
        return (output.zero_() + outputs[-1],)

    machine.denoise(call, job)
    assert equal(outputs, expected)


@pytest.mark.parametrize("settings", [dict(rel_l1_thresh=1e9), dict(computed_steps=2)], ids=str)
def test_a_step_called_twice(machine, settings):
    """As by tiles or a scheduler of second order: the second call has a branch of its own, which ends without calls."""
    model, job, outputs = machine.model(), machine.job(), []
    machine.apply(model, **settings)
    calls, run = machine.block_calls(model), []
    with torch.no_grad():
        for time, value in ((0.0, 1.0), (0.0, 2.0), (0.2, 1.0), (0.2, 2.0), (0.4, 1.0), (0.5, 1.0), (0.5, 2.0)):
            outputs.append(machine.call(model, job, time, value))
            run.append(len(calls))
            calls.clear()
    assert model.teacache.schedule == [True, False, False, False] and run == [1, 1, 0, 0, 0, 0, 1]
    if "computed_steps" in settings:  # one output each: the forecast is that output
        first, second, *later = outputs
        assert not equal(first, second) and equal(later[:4], [first, second, first, first])


@pytest.mark.parametrize("how", ["disabled", "gradients"])
def test_switched_off_midway_nothing_old_is_used(machine, how):
    """Steps that TeaCache did not see make its cache too old: the next that it sees is computed."""
    model, job = machine.model(), machine.job()
    machine.apply(model, 20, rel_l1_thresh=1e9)
    calls = machine.block_calls(model)
    for step in range(8):
        calls.clear()
        away = step in (3, 4)
        model.enable_teacache = not (how == "disabled" and away)
        with torch.set_grad_enabled(how == "gradients" and away):
            machine.call(model, job, step / 20)
        assert bool(calls) == (step in (0, 3, 4, 5)), step


def test_rule_changed_midway(machine):
    """Residuals and outputs are never taken for each other: another rule begins with a computed step."""
    model, job = machine.model(), machine.job()
    machine.apply(model, rel_l1_thresh=1e9)
    change = {3: 2, 5: None}
    machine.denoise(
        model, job, before=lambda step, *_: setattr(model, "computed_steps", change.get(step, model.computed_steps))
    )
    assert model.teacache.schedule == [True, False, False, True, False, True, False, True]


def test_num_steps_that_is_not_the_pipelines(machine):
    model = machine.apply(machine.model(), rel_l1_thresh=0.1)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "TeaCache")
        for seed in range(2):
            machine.denoise(model, machine.job(noise=seed))
    machine.denoise(model, machine.job(), 6)
    with pytest.warns(UserWarning, match="ran 6 of 8 steps"):
        machine.denoise(model, machine.job(noise=1), 8)
    with pytest.warns(UserWarning, match="more steps than num_steps, 8"):  # seen at the ninth
        machine.denoise(model, machine.job(), 10)


def test_two_models_do_not_mix(machine, way):
    one, other, jobs = machine.model(0), machine.model(1), (machine.job(0), machine.job(1))
    expected = [machine.oracle(m, job, **way)[0] for m, job in zip((one, other), jobs)]
    machine.apply(one, **way), machine.apply(other, **way)
    inner = []

    def run_the_other(step, branch, count):
        if count == 3 * machine.passes:
            inner.append(machine.denoise(other, jobs[1])[0])

    assert equal([machine.denoise(one, jobs[0], before=run_the_other)[0], *inner], expected)


# --- one after another ---------------------------------------------------------------------

SECOND = {
    "the same": dict(),
    "another conditioning": dict(seed=1),
    "another length": dict(length=4),
    "another size": dict(size=(6, 4)),
    "the same area, turned": dict(size=(2, 8)),
    "without guidance": dict(guided=False),
    "another noise": dict(noise=1),
    "bfloat16": dict(dtype=torch.bfloat16),
    "fewer steps": dict(),
    "starts at less noise": dict(),
}


@pytest.mark.parametrize("second", SECOND)
def test_a_second_generation_is_as_fresh(machine, way, second):
    model, job = machine.model(), machine.job(**SECOND[second])
    steps, start = 5 if second == "fewer steps" else 8, 0.7 if second == "starts at less noise" else 1.0
    dtype = SECOND[second].get("dtype", torch.float32)
    machine.apply(model, **way)
    machine.denoise(model, machine.job())
    model.to(dtype)
    model.num_steps = steps
    found = machine.denoise(model, job, steps, start=start)
    schedule = model.teacache.schedule

    fresh = machine.apply(machine.model().to(dtype), steps, **way)
    assert equal(machine.denoise(fresh, job, steps, start=start), found)
    assert fresh.teacache.schedule == schedule and (False in schedule or steps == 5)
    if dtype == torch.float32:
        expected = machine.oracle(machine.model(), job, steps, run={"start": start}, **way)
        assert schedule == expected[2] and equal(found, expected[:2])


def as_fresh_after_stopping_at(machine, way, inside, calls):
    model, jobs = machine.model(), [machine.job(), machine.job(1, noise=1)]
    machine.apply(model, **way)
    expected = [machine.oracle(model, job, **way) for job in jobs]
    for at in calls:
        for job, (*found, schedule) in zip(jobs, expected):
            interrupt(machine, model, jobs[0], at, inside)
            assert equal(machine.denoise(model, job), tuple(found)) and model.teacache.schedule == schedule, at


@pytest.mark.parametrize("inside", [False, True], ids=["before a call", "inside a block"])
def test_after_an_interruption_as_fresh(machine, way, inside):
    """At every call but those of the first step, which are below."""
    as_fresh_after_stopping_at(machine, way, inside, range(machine.passes + (not inside), STEPS * machine.passes))


def test_after_an_interruption_in_the_first_step_as_fresh(machine, way):
    """A call that did not come to its end tells that there was one."""
    as_fresh_after_stopping_at(machine, way, True, range(machine.passes))


def test_another_size_after_the_first_step(machine, way):
    """The same conditioning at the same timestep, for other latents: not the branch that was left behind.

    A network alone takes these calls for more of that step; what a threshold saw there was not theirs.
    """
    model, other = machine.apply(machine.model(), **way), machine.job(size=(2, 4))
    interrupt(machine, model, machine.job(), machine.passes, inside=False)
    found = machine.denoise(model, other)
    oracle = Oracle(machine, model, STEPS, **way)

    def before(step, branch, count):
        oracle.at(step, branch, count)
        if count == machine.passes:
            oracle.last = None, None

    assert equal(found, machine.denoise(oracle, other, before=before)) and model.teacache.schedule == oracle.schedule


def test_after_a_generation_of_one_step_as_fresh(machine):
    model = machine.apply(machine.model(), 1, rel_l1_thresh=9.0)
    machine.denoise(model, machine.job(), 1)
    model.num_steps = 5
    machine.denoise(model, machine.job(1), 5)
    assert model.teacache.schedule == [True, False, False, False, True]


generations = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 1),
        "noise": st.integers(0, 1),
        "guided": st.booleans(),
        "size": st.sampled_from([(2, 2), (2, 4)]),
        "length": st.integers(1, 3),
        "steps": st.integers(2, 7),
        "cast": st.sampled_from([False, True, "all"]),
        "way": st.one_of(
            st.fixed_dictionaries({"rel_l1_thresh": st.sampled_from([0.0, 0.03, 0.1, 0.3, 2.0])}),
            st.fixed_dictionaries({"computed_steps": st.integers(2, 7)}),
            st.fixed_dictionaries({"tolerance": st.sampled_from([0.0, 0.05, 0.3, 1.0, 9.0])}),
        ),
        "interrupt": st.one_of(st.none(), st.integers(3, 13)),
    }
)


def test_any_mix_of_generations(machine):
    """Each is what a fresh process would give, bit for bit, and nothing stays."""
    model = machine.model()

    @settings(max_examples=15)
    @given(st.lists(generations, min_size=1, max_size=3), st.sampled_from([[1.0, 0.0], [4.0, -1.0, 0.3], [-1.0, 0.2]]))
    def check(mix, coefficients):
        machine.script.remove_teacache(model)
        machine.apply(model, rel_l1_thresh=0)
        jobs = {}  # the very same tensors where the conditioning is the same
        for g in mix:
            key = tuple((name, g[name]) for name in ("seed", "noise", "guided", "size", "length"))
            job = jobs.setdefault(key, machine.job(**dict(key)))
            way, run = dict(g["way"], coefficients=coefficients), {"cast": g["cast"]}
            if "computed_steps" in way:
                way["computed_steps"] = min(way["computed_steps"], g["steps"])
            expected = machine.oracle(model, job, g["steps"], **way)
            limits = dict.fromkeys(("rel_l1_thresh", "computed_steps", "tolerance"))
            vars(model).update(limits | way, num_steps=g["steps"])
            try:
                found = machine.denoise(model, job, g["steps"], before=stop(g["interrupt"]), **run)
            except Interrupted:
                continue
            assert model.teacache.schedule == expected[2]
            assert equal(found, expected[:2]) and tensors_in(model.teacache) == []

    check()
