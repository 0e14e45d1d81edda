"""The choice of steps, the polynomial and the extrapolation, on numbers alone."""

import itertools
import math

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from hypothesis import given
from hypothesis import strategies as st
from machines import set_timesteps, sigmas_of

CHOSEN = {  # (shift, computed steps): of 30 steps
    (2.0, 20): "0 2 4 6 8 10 12 14 16 18 20 21 22 23 24 25 26 27 28 29",
    (2.0, 15): "0 3 6 9 11 13 15 17 19 21 23 25 27 28 29",
    (2.0, 10): "0 5 9 13 16 19 22 25 27 29",
    (6.0, 15): "0 4 8 11 14 17 19 21 23 24 25 26 27 28 29",
    (6.0, 10): "0 6 11 16 20 23 25 27 28 29",
    (1.0, 15): "0 2 4 6 8 10 12 14 16 18 20 22 24 27 29",
    (0.33, 10): "0 2 4 6 9 12 16 20 25 29",
}


def scheduler_sigmas(steps, shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    set_timesteps(scheduler, steps)
    return sigmas_of(scheduler)


@pytest.mark.parametrize("shift, budget", CHOSEN)
def test_the_choice_itself(machine, shift, budget):
    """Pinned: published figures were measured with these."""
    chosen = machine.script.choose_steps(scheduler_sigmas(30, shift), budget)
    assert " ".join(map(str, chosen)) == CHOSEN[shift, budget]


def sum_of_errors(sigmas, computed):
    """The length of each skipped step times the square of its distance from the last computed; before the end, twice."""
    steps, start = len(sigmas), sigmas[0] or 1
    position = [0.75 * steps * (1 - s / start) + 0.25 * i for i, s in enumerate(sigmas)] + [steps]
    total, last = 0.0, 0
    for step in range(steps):
        last = step if step in computed else last
        times = 2 if last == computed[-2] else 1  # the last computed step cannot make up for these
        total += times * (position[step + 1] - position[step]) * (position[step] - position[last]) ** 2
    return total


falling = st.lists(st.floats(0.01, 1.0), min_size=3, max_size=9).map(lambda sigmas: sorted(sigmas, reverse=True))


def test_no_other_choice_is_better(machine):
    """Of as many steps, the first and the last among them; sigmas may repeat."""

    @given(falling, st.integers(2, 9))
    def check(sigmas, count):
        count, end = min(count, len(sigmas)), len(sigmas) - 1
        chosen = machine.script.choose_steps(sigmas, count)
        assert chosen == sorted(set(chosen)) and len(chosen) == count and (chosen[0], chosen[-1]) == (0, end)
        others = itertools.combinations(range(1, end), count - 2)
        best = min(sum_of_errors(sigmas, (0, *other, end)) for other in others)
        assert sum_of_errors(sigmas, chosen) <= best + 0.01 * len(sigmas), "they are rounded"

    check()


def test_exactly_as_many_as_wanted(machine):
    """Whatever the sigmas are: also all zero, one alone, rising, or fewer than wanted."""

    @given(st.lists(st.one_of(st.just(0.0), st.floats(0.01, 1.0)), min_size=1, max_size=60), st.integers(1, 80))
    def check(sigmas, count):
        chosen = machine.script.choose_steps(sigmas, count)
        assert chosen == sorted(set(chosen)) and chosen[0] == 0 and chosen[-1] == len(sigmas) - 1
        assert len(chosen) == min(max(count, 2), len(sigmas))

    check()


@pytest.mark.parametrize("shift", [0.33, 1.0, 6.0])
@pytest.mark.parametrize("count", [5, 9, 14])
def test_the_choice_depends_on_the_way_alone(machine, shift, count):
    """Not on rounding, where several choices are equally good, nor on where the way begins, as in image to image."""
    sigmas = np.array(scheduler_sigmas(30, shift))
    chosen = machine.script.choose_steps(sigmas, count)
    noise = 1e-7 * np.random.default_rng(0).standard_normal(30)
    assert machine.script.choose_steps(sigmas + noise, count) == chosen
    assert machine.script.choose_steps(0.4 * sigmas, count) == chosen


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps, budget", [(20, 16), (20, 7), (50, 25), (50, 12)])
def test_spread_over_the_way(machine, shift, steps, budget):
    """No stretch of it, by number of steps or by sigma, is long compared with an even one."""
    sigmas = scheduler_sigmas(steps, shift)
    chosen = machine.script.choose_steps(sigmas, budget)
    pairs = list(zip(chosen, chosen[1:]))
    assert max(b - a for a, b in pairs) <= 2 * math.ceil(steps / budget)
    largest_step = max(a - b for a, b in zip(sigmas, sigmas[1:]))
    assert max(sigmas[a] - sigmas[b] for a, b in pairs) <= 2 / len(pairs) + largest_step


def test_the_extrapolation_itself(machine):
    """A line through the last two outputs, followed as far as the slope before has lasted: each sample by itself; or held."""
    extrapolate, one = machine.script.extrapolate, torch.ones(1, 1)
    alone = extrapolate([(1.0, one)], 0.5)
    assert alone.item() == 1 and alone is not one, "the caller may write into it"
    assert extrapolate([(1.0, one), (0.8, 3 * one)], 0.7).item() == 3
    outputs = torch.tensor([[0.0, 1.0], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0]]), torch.tensor([[0.0, 3.0]]).expand(4, 2)
    last = torch.tensor([[0.0, 4.0], [0.0, 6.0], [9.0, 3.0], [0.0, 2.0]])  # slopes: 1/2, 3/2, at a right angle, back
    given = [(1.0, outputs[0]), (0.8, outputs[1]), (0.6, last)]
    expected = torch.tensor([[0.0, 4.25], [0.0, 7.5], [9.0, 3.0], [0.0, 2.0]])
    torch.testing.assert_close(extrapolate(given, 0.5), expected)
    far = [extrapolate([(1.0, outputs[0]), (0.9, outputs[1]), (0.8, last)], sigma) for sigma in (0.6, 0.1)]
    assert torch.equal(*far), "at most two gaps"
    given[0] = (1.0, outputs[1])
    assert torch.equal(extrapolate(given, 0.5), last), "no slope before: held"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_extrapolation_of_small_and_large_numbers(machine, dtype):
    """Products of them are beyond float16."""
    for size in (1e-4, 1e3):
        given = [(s, torch.full((2, 3, 4), size * (2 - s), dtype=dtype)) for s in (1.0, 0.75, 0.5)]
        found = machine.script.extrapolate(given, 0.25)
        assert found.dtype == dtype
        torch.testing.assert_close(found, torch.full((2, 3, 4), 1.75 * size, dtype=dtype), rtol=0.02, atol=0)


V1 = [393.76566581, -603.50993606, 209.10239044, -23.00726601, 0.86377344]
V2 = [225.7042019806413, -608.8453716535591, 304.1869942338369, 124.21267720116742, -1.4089066892956552]


@pytest.mark.parametrize(
    "coefficients, limit",
    [(V1, 0.27904501), (V2, 1.20747951), ([-1.0, 0.3], 0.3), ([1.0, 0.0], None), ([0.0], None), ([2.0, 0.05], None)],
    ids=str,
)
def test_a_polynomial_is_infinite_where_it_falls_below_zero(machine, coefficients, limit):
    """The published ones until they rise again, far away; small changes may be below zero."""
    rescale = machine.script.rescale
    for change in (0.0, 0.005, 0.1, 0.25, *([limit - 1e-6] if limit else [0.35, 0.5, 1.5, 9.0])):
        assert rescale(change, coefficients) == pytest.approx(np.polyval(coefficients, change))
    if limit:
        assert rescale(limit + 1e-6, coefficients) == rescale(1.0 * limit + 0.1, coefficients) == math.inf
    assert not rescale(math.nan, coefficients) < math.inf and rescale(0.005, V2) < 0
