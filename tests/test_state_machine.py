"""The state machine that both scripts share, on a network alone: schedule, outputs and what is kept."""

import warnings

import pytest
import torch
from conftest import equal, tensors_in
from hypothesis import given, settings
from hypothesis import strategies as st
from machines import IDENTITY

STEPS = 8
WAYS = {"threshold": None, "computed steps": dict(computed_steps=4)}
HOLD = [dict(rel_l1_thresh=1e9), dict(computed_steps=2)]  # compute the first and the last step


@pytest.fixture(params=WAYS)
def way(request, machine):
    """Settings under which some steps are skipped and some between the first and the last are computed."""
    return WAYS[request.param] or {"rel_l1_thresh": machine.path(machine.model(), machine.job()) / 3}


class Interrupted(Exception):
    pass


def interrupt(machine, model, job, at, inside, steps=STEPS, **run):
    """A generation that stops at this call of the model: before it, or, if it runs any module, inside of it."""
    hooks = []

    def stop(*_):
        raise Interrupted

    def before(step, branch, count):
        if count == at and not inside:
            stop()
        if count == at:
            hooks.append(machine.last(model).register_forward_pre_hook(stop))

    try:
        return machine.denoise(model, job, steps, before=before, **run)
    except Interrupted:
        return None
    finally:
        for hook in hooks:
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


@pytest.mark.parametrize("budget", [2, 3, 5, 8, [0, 1, 5, 7]], ids=str)
def test_computed_steps(machine, budget):
    """Exactly these, in two generations one after the other, whatever they are of."""
    model = machine.apply(machine.model(), computed_steps=budget)
    calls = machine.block_calls(model)
    for job, passes in ((machine.job(), machine.passes), (machine.job(1, guided=False), 1)):
        expected = machine.oracle(model, job, computed_steps=budget)
        calls.clear()
        assert equal(machine.denoise(model, job), expected[:2])
        assert model.teacache.schedule == expected[2]
        assert len(calls) == passes * (budget if isinstance(budget, int) else len(budget))


@pytest.mark.parametrize("off", ["threshold 0", "below zero", "disabled", "gradients"])
def test_off_is_stock_bit_for_bit_and_keeps_nothing(machine, off):
    """Also at threshold 0 with a polynomial below zero, whose sum lies below it."""
    model, job = machine.model(), machine.job()
    stock = machine.denoise(machine.stock(model), job)
    thresh = 9.0 if off in ("disabled", "gradients") else 0
    machine.apply(model, rel_l1_thresh=thresh, coefficients=[-1.0] if off == "below zero" else IDENTITY)
    model.enable_teacache = off != "disabled"

    def call(*args, **kwargs):
        with torch.set_grad_enabled(off == "gradients"):
            output = model(*args, **kwargs)
        assert tensors_in(model.teacache) == []
        return tuple(x.detach() for x in output)

    assert equal(machine.denoise(call, job), stock)
    assert all(model.teacache.schedule)


def test_nothing_is_held_when_the_last_step_begins(machine, way):
    """Nor after it; before it, at most what was seen and two outputs for each branch."""
    model, job, held, begins = machine.model(), machine.job(), [], []
    machine.apply(model, **way)
    given_tensors = {id(t) for t in machine.tensors(job)}

    def look(*_):
        held.append(len([t for t in tensors_in(model.teacache) if t.ndim and id(t) not in given_tensors]))

    machine.block(model).register_forward_pre_hook(look)
    last = STEPS * machine.passes - machine.passes
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


def test_a_large_change_is_computed(machine):
    """The polynomial is negative there, as the published ones: the more changed, the more would be skipped."""
    model, job = machine.model(), machine.job(guided=False)
    machine.script.apply_teacache(model, 10, 1e9, [-1.0, 0.25])
    with torch.no_grad():
        for step in range(10):  # each step changes all, as with a stochastic scheduler
            machine.call(model, job, step / 10, value=(-3.0) ** step)
    assert model.teacache.schedule == [True] * 10


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


@pytest.mark.parametrize("way", HOLD, ids=str)
def test_a_step_called_twice(machine, way):
    """As by tiles: the k-th call uses what the k-th call left, and one that is new is computed."""
    model, job, outputs, run = machine.model(), machine.job(), [], []
    machine.apply(model, **way)
    calls = machine.block_calls(model)
    with torch.no_grad():
        for time, value in ((0.0, 1.0), (0.0, 2.0), (0.2, 1.0), (0.2, 2.0), (0.4, 1.0), (0.5, 1.0), (0.5, 2.0)):
            outputs.append(machine.call(model, job, time, value))
            run.append(len(calls))
            calls.clear()
    assert model.teacache.schedule == [True, False, False, False] and run == [1, 1, 0, 0, 0, 0, 1]
    if "computed_steps" in way:  # one output each: the extrapolation is that output
        first, second, *later = outputs
        assert not equal(first, second) and equal(later[:4], [first, second, first, first])


@pytest.mark.parametrize("how", ["disabled", "gradients"])
@pytest.mark.parametrize("way", HOLD, ids=str)
def test_switched_off_midway_nothing_old_is_used(machine, how, way):
    """Steps that TeaCache did not see make its cache too old: the next that it sees is computed."""
    model, job = machine.model(), machine.job()
    machine.apply(model, 20, **way)
    calls = machine.block_calls(model)
    for step in range(8):
        calls.clear()
        away = step in (3, 4)
        model.enable_teacache = not (how == "disabled" and away)
        with torch.set_grad_enabled(how == "gradients" and away):
            machine.call(model, job, step / 20)
        assert bool(calls) == (step in (0, 3, 4, 5)), step


def test_settings_that_change_midway_hold_from_the_next_generation_on(machine):
    model, job = machine.model(), machine.job()
    machine.apply(model, computed_steps=[0, 2, 7])
    machine.denoise(model, job, before=lambda step, *_: step and setattr(model, "computed_steps", [0, 4, 5, 7]))
    assert [i for i, computed in enumerate(model.teacache.schedule) if computed] == [0, 2, 7]
    machine.denoise(model, job)
    assert [i for i, computed in enumerate(model.teacache.schedule) if computed] == [0, 4, 5, 7]


def test_num_steps_that_is_not_the_pipelines(machine):
    model = machine.apply(machine.model(), rel_l1_thresh=0.1)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "TeaCache")
        for seed in range(2):
            machine.denoise(model, machine.job(noise=seed))
        for steps in (6, 10):  # told when the next one begins
            machine.denoise(machine.apply(model, rel_l1_thresh=0.1), machine.job(), steps)
            with pytest.raises(UserWarning, match=f"ran {steps} of 8 steps .* set num_steps to num_inference_steps"):
                machine.denoise(model, machine.job(noise=1))


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


@pytest.mark.parametrize("inside", [False, True], ids=["before a call", "inside a block"])
def test_after_an_interruption_as_fresh(machine, way, inside):
    """At every call; in the first step inside, since a network alone is not told that it was not called again."""
    model, jobs = machine.model(), [machine.job(), machine.job(1, noise=1)]
    machine.apply(model, **way)
    expected = [machine.oracle(model, job, **way) for job in jobs]
    for at in range(0 if inside else machine.passes + 1, STEPS * machine.passes):
        for job, (*found, schedule) in zip(jobs, expected):
            interrupt(machine, model, jobs[0], at, inside)
            assert equal(machine.denoise(model, job), tuple(found)) and model.teacache.schedule == schedule, at


def test_after_a_generation_of_one_step_as_fresh(machine):
    model = machine.apply(machine.model(), 1, rel_l1_thresh=9.0)
    for _ in range(2):
        machine.denoise(model, machine.job(), 1)
    model.num_steps = 5
    machine.denoise(model, machine.job(1), 5)
    assert model.teacache.schedule == [True, False, False, False, True]


generations = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 1),
        "noise": st.integers(0, 1),
        "guided": st.booleans(),
        "size": st.sampled_from([(2, 4), (4, 2), (4, 4)]),
        "dtype": st.sampled_from([torch.float32, torch.bfloat16]),
        "start": st.just(1.0),  # after a stopped one, a start at less noise goes unnoticed on a network alone
        "length": st.integers(1, 3),
        "steps": st.integers(2, 7),
        "cast": st.sampled_from([False, True, "all"]),
        "way": st.one_of(
            st.fixed_dictionaries({"rel_l1_thresh": st.sampled_from([0.0, 0.03, 0.1, 0.3, 2.0])}),
            st.fixed_dictionaries({"computed_steps": st.integers(2, 7)}),
        ),
        "interrupt": st.one_of(st.none(), st.integers(3, 13)),
        "inside": st.booleans(),
    }
)


def test_any_mix_of_generations(machine):
    """Each is what a fresh process would give, bit for bit, and nothing stays."""
    model = machine.model()

    @settings(max_examples=30)
    @given(st.lists(generations, min_size=1, max_size=3), st.sampled_from([[1.0, 0.0], [4.0, -1.0, 0.3], [-1.0, 0.2]]))
    def check(mix, coefficients):
        machine.script.remove_teacache(model)
        machine.apply(model, rel_l1_thresh=0)
        jobs = {}  # the very same tensors where the conditioning is the same
        for g in mix:
            key = tuple((name, g[name]) for name in ("seed", "noise", "guided", "size", "length", "dtype"))
            job = jobs.setdefault(key, machine.job(**dict(key)))
            way = dict(g["way"], coefficients=coefficients)
            if "computed_steps" in way:
                way["computed_steps"] = min(way["computed_steps"], g["steps"])
            model.to(g["dtype"])
            expected = machine.oracle(model, job, g["steps"], run={"start": g["start"]}, **way)
            vars(model).update({"rel_l1_thresh": None, "computed_steps": None} | way, num_steps=g["steps"])
            found = interrupt(
                machine, model, job, g["interrupt"], g["inside"], g["steps"], cast=g["cast"], start=g["start"]
            )
            if found:
                assert model.teacache.schedule == expected[2]
                assert equal(found, expected[:2]) and tensors_in(model.teacache) == []

    check()
