"""The rule of a budget of computed steps, and the extrapolation, on numbers alone."""

import math

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from hypothesis import given
from hypothesis import strategies as st


def choose(machine, times, budget, forced=()):
    """The schedule of a generation with these timesteps."""
    schedule = []
    for step in range(len(times)):
        schedule.append(machine.script.is_due(times[: step + 1], schedule, len(times), budget) or step in forced)
    return schedule


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
    (2.0, 20): "0 2 4 6 8 10 12 14 16 17 18 19 20 22 23 24 25 26 28 29",
    (2.0, 15): "0 3 6 8 10 12 14 16 18 20 22 24 26 28 29",
    (2.0, 10): "0 4 8 12 16 19 22 25 27 29",
    (6.0, 15): "0 4 7 10 13 16 19 21 23 24 25 26 27 28 29",
    (6.0, 10): "0 5 10 15 19 22 25 27 28 29",
}


@pytest.mark.parametrize("shift, budget", CHOSEN)
def test_the_choice_itself(machine, shift, budget):
    """Pinned: published figures were measured with these."""
    schedule = choose(machine, scheduler_times(30, shift), budget)
    assert " ".join(str(i) for i, computed in enumerate(schedule) if computed) == CHOSEN[shift, budget]


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
    branch = machine.script.Branch((), ())
    branch.remember(0.0, torch.tensor([1.0]))
    assert branch.forecast(1.0).item() == 1 and branch.forecast(1.0) is not branch.history[0][1]
    branch.remember(2.0, torch.tensor([9.0]))
    branch.remember(2.0, torch.tensor([3.0]))  # the step again: the later output counts
    assert branch.forecast(3.0).item() == pytest.approx(3 + 2 * 0.5 / 1.125)
    assert branch.forecast(6.0).item() == pytest.approx(3 + 2 * 2 / 1.5)
    branch.remember(3.0, torch.tensor([4.0]))
    assert branch.error.item() == pytest.approx((4 - (3 + 2 * 0.5 / 1.125)) / 4)
    branch.remember(3.0, torch.tensor([4.0]))
    assert branch.error.item() > 0.02, "the step again is not its own forecast"
    assert [t for t, _ in branch.history] == [2.0, 3.0]


def test_expected_error(machine):
    """By hand: the largest branch error over the square of the gap, the square of the distance, memory and limit."""
    state = machine.script.TeaCacheState()
    state.branches = [machine.script.Branch((), ()) for _ in range(2)]
    state.timesteps, state.schedule, state.timestep = [0.0, 0.1, 0.15], [True, True], 0.15
    assert state.expected_error() == pytest.approx(0.05 * 60 * 0.05**2), "no error yet: the constant"
    for branch, error in zip(state.branches, (0.3, 0.9)):
        branch.error = torch.tensor(error)
    assert state.expected_error() == pytest.approx(0.05 * (0.9 / 0.1**2) * 0.05**2)
    for branch in state.branches:
        branch.error = torch.tensor(0.0)
    assert state.expected_error() == pytest.approx(0.05 * (0.8 * 90) * 0.05**2), "a luckily small error"
    state.timesteps, state.schedule, state.timestep = [0.0, 0.1, 0.15, 0.29], [True, True, False], 0.29
    assert state.expected_error() == pytest.approx(0.14 * (0.8 * 90) * 0.19**2)
    state.timestep = state.timesteps[-1] = 0.31
    assert state.expected_error() == math.inf, "too far"
    state.schedule = [True, False, False]
    assert state.expected_error() == math.inf, "one computed step is no line"
