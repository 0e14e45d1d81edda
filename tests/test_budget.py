"""The rules of a budget and of a tolerance, the polynomial and the extrapolation, on numbers alone."""

import itertools
import math

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from hypothesis import given
from hypothesis import strategies as st


def running(machine, times, schedule, **settings):
    """The state of a generation, filled by hand."""
    cache = machine.script.TeaCacheState()
    cache.timesteps, cache.schedule, cache.num_steps = times, schedule, settings.get("num_steps")
    cache.settings = machine.script.Settings(**dict.fromkeys(machine.script.Settings._fields) | settings)
    return cache


def empty_branch(machine, step):
    return machine.script.Branch(conditioning=(), mark=None, layout=(), step=step)


def choose(machine, times, budget, forced=()):
    """The schedule of a generation with these timesteps."""
    cache = running(machine, [], [], computed_steps=budget, num_steps=len(times))
    for step, time in enumerate(times):
        cache.timesteps.append(time)
        cache.schedule.append(None)
        cache.schedule[-1] = machine.script.by_budget(cache) or step in forced
    return cache.schedule


def scheduler_times(steps, shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps))
    return [1 - t.item() / 1000 for t in scheduler.timesteps]


def test_exactly_as_many_as_wanted(machine):
    """Whatever the timesteps are, senseless ones too."""

    @given(
        st.one_of(
            st.lists(st.floats(0.0, 1.0), min_size=1, max_size=60, unique=True).map(sorted),
            st.lists(st.floats(allow_nan=True, allow_infinity=True), min_size=1, max_size=20),
        ),
        st.integers(2, 60),
    )
    def check(times, budget):
        budget = min(budget, len(times))
        schedule = choose(machine, times, budget)
        assert sum(schedule) == budget and schedule[0] and (budget == 1 or schedule[-1])

    check()


CHOSEN = {  # (shift, computed steps): of 30 steps
    (2.0, 20): "0 2 4 6 8 10 12 14 16 18 20 21 22 23 24 25 26 27 28 29",
    (2.0, 15): "0 3 6 9 11 13 15 17 19 21 23 25 27 28 29",
    (2.0, 10): "0 5 9 13 16 19 22 25 27 29",
    (6.0, 15): "0 4 8 11 14 17 19 21 23 24 25 26 27 28 29",
    (6.0, 10): "0 6 11 16 20 23 25 27 28 29",
    (1.0, 15): "0 2 4 6 8 10 12 14 16 18 20 22 24 26 29",
    (0.33, 10): "0 2 4 6 8 11 14 18 23 29",
}


@pytest.mark.parametrize("shift, budget", CHOSEN)
def test_the_choice_itself(machine, shift, budget):
    """Pinned: published figures were measured with these."""
    schedule = choose(machine, scheduler_times(30, shift), budget)
    assert " ".join(str(i) for i, computed in enumerate(schedule) if computed) == CHOSEN[shift, budget]


def sum_of_errors(times, computed):
    """What the choice is for: the length of each skipped step times the square of its distance from the last computed."""
    steps, start = len(times), times[0]
    position = [0.75 * steps * (t - start) / (1 - start or 1) + 0.25 * i for i, t in enumerate(times)] + [steps]
    total, last = 0.0, computed[0]
    for step in range(last + 1, steps):
        last = step if step in computed else last
        total += (position[step + 1] - position[step]) * (position[step] - position[last]) ** 2
    return total


def test_no_other_choice_is_better(machine):
    """Of as many steps from here on, the last one among them; some may have been skipped since the last computed one."""
    times = st.lists(st.floats(0.0, 0.99), min_size=3, max_size=10, unique=True).map(sorted)

    @given(times, st.integers(0, 7), st.integers(1, 3), st.integers(1, 8))
    def check(times, last, ahead, count):
        last = min(last, len(times) - 2)
        step = min(last + ahead, len(times) - 1)
        count = min(count, len(times) - step)
        chosen = machine.script.spread(times, last, step, count)
        assert chosen == sorted(set(chosen)) and len(chosen) == count
        assert chosen[0] >= step and chosen[-1] == len(times) - 1
        others = itertools.combinations(range(step, len(times) - 1), count - 1)
        best = min(sum_of_errors(times, (last, *other, len(times) - 1)) for other in others)
        assert sum_of_errors(times, (last, *chosen)) <= best + 0.05, "they are rounded"

    check()


@pytest.mark.parametrize("shift", [0.33, 1.0, 6.0])
@pytest.mark.parametrize("count", [5, 9, 14])
def test_the_choice_depends_on_the_way_alone(machine, shift, count):
    """Not on rounding, where several choices are equally good, nor on where the way begins, as in image to image."""
    times = np.array(scheduler_times(30, shift))
    chosen = machine.script.spread(times, 0, 1, count)
    noise = 1e-7 * np.random.default_rng(0).standard_normal(30)
    assert machine.script.spread(times + noise, 0, 1, count) == chosen
    assert machine.script.spread(0.6 + 0.4 * times, 0, 1, count) == chosen


@pytest.mark.parametrize(
    "at, before, after, expected",
    [(5, (10, 30), (10, 20), 10), (10, (10, 20), (10, 30), 10), (25, (2, 30), (8, 30), 6), (20, (3, 30), (4, 30), 4)]
    + [(5, (10.0, 30), (10.0, 30), 10)],
)
def test_settings_that_change_midway(machine, at, before, after, expected):
    """(computed steps, all steps): as many as still can be, and none that is past."""
    times = scheduler_times(after[1], 6.0)
    cache = running(machine, [], [], computed_steps=before[0])
    for step, time in enumerate(times):
        budget, cache.num_steps = before if step < at else after
        cache.settings = cache.settings._replace(computed_steps=budget)
        cache.timesteps.append(time)
        cache.schedule.append(None)
        cache.schedule[-1] = cache.is_last_step or machine.script.by_budget(cache)
    assert sum(cache.schedule) == expected


@pytest.mark.parametrize("shift", [0.33, 1.0, 2.0, 6.0])
@pytest.mark.parametrize("first", [0, 4])
def test_timesteps_to_come(machine, shift, first):
    """A network alone works out those of a flow-matching scheduler from the first two, also if steps were left out."""
    times = scheduler_times(20 + first, shift)[first:]
    for known in (2, 3, 10, 20):
        assert machine.script.shifted_timesteps(times[:known], 20) == pytest.approx(times, abs=1e-4)


@pytest.mark.parametrize("times", [[0, 0], [1, 1], [0.3, 0.1], [0, 1], [math.nan, 0.1], [0, math.inf]], ids=str)
def test_timesteps_to_come_after_senseless_ones(machine, times):
    assert len(machine.script.shifted_timesteps(times, 5)) == 5
    assert machine.script.shifted_timesteps(times, 1) == times or any(map(math.isnan, times)), "none are to come"


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps, budget", [(20, 16), (20, 7), (50, 25), (50, 12)])
def test_spread_over_the_way(machine, shift, steps, budget):
    """No stretch of it, by number of steps or by time, is long compared with an even one."""
    times = scheduler_times(steps, shift)
    computed = [i for i, c in enumerate(choose(machine, times, budget)) if c]
    pairs = list(zip(computed, computed[1:]))
    assert max(b - a for a, b in pairs) <= 2 * math.ceil(steps / budget)
    largest_step = max(b - a for a, b in zip(times, times[1:]))
    assert max(times[b] - times[a] for a, b in pairs) <= 2 * times[-1] / len(pairs) + largest_step


def test_a_forced_computation_is_made_up_for(machine):
    schedule = choose(machine, scheduler_times(30, 2.0), 15, forced=(1, 2, 3))
    assert sum(schedule) == 15 and all(schedule[:4])


def test_the_forecast_itself(machine):
    """A line through (0, 1) and (2, 3), followed to 3 and to 6: g / (1 + g / 4) of the way; two outputs are held."""
    branch = empty_branch(machine, 0)
    branch.remember(0.0, torch.tensor([1.0]))
    assert branch.forecast(1.0).item() == 1 and branch.forecast(1.0) is not branch.outputs[0][1]
    branch.remember(2.0, torch.tensor([9.0]))
    branch.remember(2.0, torch.tensor([3.0]))  # the same timestep again: the later output counts
    assert branch.forecast(3.0).item() == pytest.approx(3 + 2 * 0.5 / 1.125)
    assert branch.forecast(6.0).item() == pytest.approx(3 + 2 * 2 / 1.5)
    branch.remember(3.0, torch.tensor([4.0]))
    assert branch.error.item() == pytest.approx((4 - (3 + 2 * 0.5 / 1.125)) / 4)
    branch.remember(3.0, torch.tensor([4.0]))
    assert branch.error is None, "one output before it is no line, and it is not its own forecast"
    assert [t for t, _ in branch.outputs] == [2.0, 3.0]


def test_a_tolerance(machine):
    """By hand: the sum over the skipped steps of their length, the curvature and their distance squared; the limit."""

    def decides(expected, times, schedule, curvature):
        for tolerance in (0.999 * expected, 1.001 * expected):
            cache = running(machine, times, [*schedule, None], tolerance=tolerance)
            cache.curvature = curvature
            assert machine.script.by_tolerance(cache) is (tolerance < expected)
            assert cache.curvature == curvature and cache.schedule == [*schedule, None], "it only looks"

    decides(0.05 * 60 * 0.05**2, [0.0, 0.1, 0.15], [True, True], 60.0)
    decides(0.05 * 72 * 0.05**2 + 0.14 * 72 * 0.19**2, [0.0, 0.1, 0.15, 0.29], [True, True, False], 72.0)
    for times, schedule in [([0.0, 0.1, 0.15, 0.31], [True, True, False]), ([0.0, 0.1, 0.15], [True, False])]:
        cache = running(machine, times, [*schedule, None], tolerance=1e9)
        assert machine.script.by_tolerance(cache) is True, "too far, or one computed step, which is no line"


def test_the_curvature(machine):
    """By hand: after a computed step, the largest error of the branches over the square of the gap; its memory."""
    cache, branches = running(machine, [0.0, 0.1], [True, True]), [empty_branch(machine, 1) for _ in range(2)]
    cache.branches = branches

    def measured(*errors):
        for branch, error in zip(branches, errors):
            branch.step, branch.error = cache.step, None if error is None else torch.tensor(error)
        cache.measure_curvature()
        return cache.curvature

    assert measured(None, None) == machine.script.CURVATURE == 60, "no error yet: the constant"
    assert measured(0.3, 0.9) == pytest.approx(0.9 / 0.1**2)
    assert measured(0.0, None) == pytest.approx(0.8 * 90), "a luckily small error"
    cache.timesteps, cache.schedule = [0.0, 0.1, 0.15], [True, True, False]
    assert measured(0.9, 0.9) == pytest.approx(0.8 * 90), "only after a computed step"
    cache.timesteps, cache.schedule = [0.0, 0.1, 0.15, 0.3], [True, True, False, True]
    assert measured(4.0, 1.0) == pytest.approx(4 / 0.2**2)


def test_the_curvature_of_a_branch_that_has_ended(machine):
    """Guidance that stops: the error that its branch had is of another gap."""
    cache, ended = running(machine, [0.0, 0.1, 0.2], [True] * 3), empty_branch(machine, 1)
    cache.branches, ended.error = [ended, empty_branch(machine, 2)], torch.tensor(9.0)
    cache.rule = machine.script.by_tolerance
    cache.begin_step(0.3, 8, cache.settings._replace(tolerance=0.1))
    assert cache.curvature == machine.script.CURVATURE


V1 = [393.76566581, -603.50993606, 209.10239044, -23.00726601, 0.86377344]
V2 = [225.7042019806413, -608.8453716535591, 304.1869942338369, 124.21267720116742, -1.4089066892956552]


@pytest.mark.parametrize(
    "coefficients, limit",
    [(V1, 0.279), (V2, 1.207), ([-1.0, 0.3], 0.3), ([1.0, -1.0, 0.21], 0.3), ([1.0, 0.0], None), ([1.0, -1.0], None)]
    + [([4.0, -1.0, 0.3], None), ([-0.2], None), ([0.0], None), ([2.0, 0.05], None)],
    ids=str,
)
def test_a_polynomial_holds_up_to_where_it_falls_below_zero(machine, coefficients, limit):
    """Where it begins below zero and rises, or stays above or below it, it has no limit."""
    for change in (0.0, 0.01, 0.1, 0.25, *([0.995 * limit] if limit else [0.35, 0.5, 1.5, 9.0])):
        assert machine.script.rescale(change, coefficients) == pytest.approx(np.polyval(coefficients, change))
    for change in [1.005 * limit, 1.5 * limit, 9.0, math.inf] if limit else []:
        assert machine.script.rescale(change, coefficients) == math.inf
    assert math.isnan(machine.script.rescale(math.nan, coefficients))
