"""The state machine that both scripts share, on a network alone: schedule, outputs and what is kept."""

import contextlib

import pytest
import torch
from conftest import equal
from machines import IDENTITY, Loop, kept
from tracing import RandomLoop

STEPS = 8
WAYS = {"threshold": None, "computed steps": dict(computed_steps=4)}
HOLD = [dict(rel_l1_thresh=1e9), dict(computed_steps=2)]  # compute the first and the last step


@pytest.fixture(params=WAYS)
def way(request, machine):
    """Settings under which some steps are skipped and some between the first and the last are computed."""
    return WAYS[request.param] or {"rel_l1_thresh": machine.path(machine.model(), machine.job()) / 3}


class Interrupted(Exception):
    pass


def interrupt(machine, model, job, at, where):
    """An image that stops at this call of the network, or where this module next runs."""
    hooks = []

    def stop(*_):
        raise Interrupted

    def before(step, branch, count):
        if count == at:
            hooks.append(where.register_forward_pre_hook(stop))

    with contextlib.suppress(Interrupted):
        machine.denoise(model, job, before=before)
    for hook in hooks:
        hook.remove()


# --- one generation -----------------------------------------------------------------------


@pytest.mark.parametrize("guided", [True, False], ids=["guided", "unguided"])
def test_thresholds(machine, guided):
    """Schedule and outputs are the oracle's; blocks run in computed steps alone; more threshold, fewer steps."""
    model, job = machine.model(), machine.job(guided=guided)
    path, calls, counts = machine.path(model, job), machine.block_calls(model), []
    for share in (1e-9, 0.2, 0.6, 9):
        way = {"rel_l1_thresh": share * path}
        expected = machine.oracle(model, job, **way)
        calls.clear()
        found = machine.denoise(machine.apply(model, **way), job)
        assert model.teacache.schedule == expected[2] and equal(found, expected[:2])
        counts.append(sum(expected[2]))
        assert len(calls) == counts[-1] * (machine.passes if guided else 1)
    assert counts[0] == STEPS and counts[-1] == 2 and counts == sorted(set(counts), reverse=True)


@pytest.mark.parametrize("budget", [2, 5, 8, [0, 1, 5, 7]], ids=str)
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


@pytest.mark.gpu
@pytest.mark.parametrize("off", ["threshold 0", "below zero", "disabled", "gradients"])
def test_off_is_stock_bit_for_bit_and_keeps_nothing(machine, off, told):
    """Also at threshold 0 with a polynomial below zero, whose sum lies below it."""
    model, job = machine.model(), machine.job()
    stock = machine.denoise(machine.stock(model), job)
    thresh = 9.0 if off in ("disabled", "gradients") else 0
    machine.apply(model, rel_l1_thresh=thresh, coefficients=[-1.0] if off == "below zero" else IDENTITY)
    model.enable_teacache = off != "disabled"

    def call(*args, **kwargs):
        with torch.set_grad_enabled(off == "gradients"):
            output = model(*args, **kwargs)
        assert not any(t.shape == output[0].shape and torch.equal(t, output[0]) for t in kept(model))
        return tuple(x.detach() for x in output)

    for _ in range(2):
        assert equal(machine.denoise(call, job), stock)
        assert model.teacache.schedule == [True] * STEPS and kept(model) == []
    says = ["TeaCache: gradients are on (use torch.no_grad()): all steps are computed"] * 2 * (off == "gradients")
    assert told == says, "once an image"
    model.train()
    machine.denoise(call, job)
    assert told == says, "in training, nobody expects skips"


def test_nothing_is_held_when_the_last_step_begins(machine, way):
    """Nor after it; before it, at most latents, what was seen and three outputs for each call."""
    model, job, held, begins = machine.model(), machine.job(), [], []
    machine.apply(model, **way)
    given_tensors = {id(t) for t in machine.tensors(job)}

    def look(*_):
        held.append(len([t for t in kept(model) if t.ndim and id(t) not in given_tensors]))

    machine.block(model).register_forward_pre_hook(look)
    last = STEPS * machine.passes - machine.passes
    machine.denoise(model, job, before=lambda step, branch, count: begins.append(len(held)) if count == last else None)
    assert 0 < max(held[: begins[0]]) <= 5 * machine.passes
    assert max(held[begins[0] :]) <= 1, "the latents of the running call"
    assert kept(model) == [] and len(model.teacache.schedule) == STEPS


def test_sixty_calls_at_one_timestep(machine):
    """Of other latents each, as a stream or a model of one step: each is an image, and nothing piles up."""
    loop, held = Loop(machine), []
    machine.script.apply_teacache(loop.model, 8, computed_steps=3)
    with torch.no_grad():
        for seed in range(60):
            loop.call(loop.latents(seed), torch.tensor(900.0))
            held.append(len(kept(loop.model)))
    assert held[-1] == held[5] and loop.schedule == [True]


@pytest.mark.parametrize(
    "coefficients, factors, line",
    [(IDENTITY, [1, 0, 0, 1, 1, 1], "X.XX.X"), ([-1.0, 0.25], [1, -3, 9, -27, 81, 1], "XXXXXX")],
    ids=["0 / 0", "the polynomial is negative"],
)
def test_changes_that_are_computed(machine, coefficients, factors, line):
    """Those that are no number or infinite, and those for which the polynomial was not fitted."""
    loop = RandomLoop(machine, Loop(machine).scheduler, dict(rel_l1_thresh=1e9, coefficients=coefficients))
    with torch.no_grad():
        for factor in factors:
            loop.traced.factor = factor
            loop.run()
    assert repr(loop.traced.network.teacache).endswith(line)


@pytest.mark.parametrize("way", HOLD, ids=str)
def test_calls_that_come_and_go(machine, way):
    """Once more on the same latents, as skip-layer guidance does: the k-th call uses what the k-th left, or is new."""
    loop, ran, count = Loop(machine), [], [1, 1, 2, 2, 1, 2, 1, 1]
    machine.script.apply_teacache(loop.model, 8, coefficients=IDENTITY, **way)
    calls = machine.block_calls(loop.model)
    with torch.no_grad():
        for step, times in enumerate(count):
            latents = loop.latents(0)
            for k in range(times):
                calls.clear()
                loop.call(latents, torch.tensor(1000.0 - 100 * step))
                ran += [(step, k)] * bool(calls)
    assert ran == [(0, 0), (2, 1), (5, 1), (7, 0)]
    assert loop.schedule == [step in (0, 2, 5, 7) for step in range(8)], "a step with a computed call"


def test_settings_that_change_midway_hold_from_the_next_generation_on(machine):
    """Also those in a list of the caller's own; threshold 0 goes before a budget."""
    model, job, steps = machine.model(), machine.job(), [0, 2, 7]
    machine.apply(model, computed_steps=steps)

    def computed(before=None):
        machine.denoise(model, job, before=before)
        return [i for i, is_computed in enumerate(model.teacache.schedule) if is_computed]

    assert computed(lambda step, *_: step and steps.__setitem__(1, 4)) == [0, 2, 7]
    assert computed(lambda step, *_: step and setattr(model, "computed_steps", [0, 4, 5, 7])) == [0, 4, 7]
    assert computed(lambda step, *_: step and setattr(model, "rel_l1_thresh", 0)) == [0, 4, 5, 7]
    assert computed() == [*range(8)]


def test_num_steps_that_is_not_the_pipelines(machine, told):
    """Said for each image, once the next one begins."""
    model = machine.apply(machine.model(), rel_l1_thresh=0.1)
    for seed in range(2):
        machine.denoise(model, machine.job(noise=seed))
    assert told == []
    for steps in (6, 10):
        machine.apply(model, rel_l1_thresh=0.1)
        told.clear()
        for _ in range(3):
            machine.denoise(model, machine.job(), steps)
        says = f"the last generation ran {steps} of 8 steps (or was stopped)"
        assert told[0] == f"TeaCache: {says}: set num_steps to num_inference_steps" and len(told) >= 2


# --- one after another ---------------------------------------------------------------------


@pytest.mark.parametrize("inside", [False, True], ids=["before a call", "inside a block"])
def test_after_an_interruption_as_fresh(machine, way, inside):
    """At some calls: another image, and the same prompt with other noise."""
    model, jobs, stopped = machine.model(), [machine.job(1, noise=1), machine.job()], machine.job(noise=2)
    machine.apply(model, **way)
    expected = [machine.oracle(model, job, **way) for job in jobs]
    for at in sorted({0, 1, machine.passes, 5, STEPS * machine.passes - 1}):
        for job, (*found, schedule) in zip(jobs, expected):
            interrupt(machine, model, stopped, at, machine.last(model) if inside else model)
            assert equal(machine.denoise(model, job), tuple(found)) and model.teacache.schedule == schedule, at


def test_an_image_that_begins_where_one_was_stopped(machine):
    """In its first step, on the same prompt and timestep, or later at the next timestep: other latents, another image."""
    loop = Loop(machine)
    machine.script.apply_teacache(loop.model, 8, computed_steps=2)
    calls = machine.block_calls(loop.model)
    with torch.no_grad():
        for stopped in (1, 2, 3):
            for step in range(stopped):
                loop.call(loop.latents(0), torch.tensor(1000.0 - 100 * step))
            for t in (1000.0 - 100 * (stopped - 1), 1000.0 - 100 * stopped):
                calls.clear()
                loop.call(loop.latents(int(t)), torch.tensor(t))
                assert calls and loop.schedule == [True]
