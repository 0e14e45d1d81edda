"""The method on numbers alone: the choice of steps, the polynomial, the extrapolation and the correction.

Of one script: `test_shared.py` holds that the other has the same text.
"""

import math

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from hypothesis import given
from hypothesis import strategies as st
from machines import chosen, forecast, set_timesteps, sigmas_of

from TeaCache4Memo import teacache_memo as script

CHOSEN = {  # (shift, computed steps, how much is decided): of 30 steps
    (2.0, 15, 1.0): "0 3 6 9 12 14 16 18 20 22 24 26 27 28 29",
    (6.0, 15, 1.0): "0 6 10 13 16 18 20 22 23 24 25 26 27 28 29",
    (6.0, 8, 1.0): "0 12 18 22 25 27 28 29",
    (6.0, 8, 0.3): "0 11 17 21 24 26 28 29",
    (6.0, 8, 0.0): "0 7 12 17 21 24 27 29",
    (1.0, 10, 0.0): "0 1 3 5 7 10 13 17 23 29",
    (0.33, 10, 1.0): "0 1 3 5 7 10 13 17 23 29",
}


def scheduler_sigmas(steps, shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    set_timesteps(scheduler, steps)
    return sigmas_of(scheduler)


@pytest.mark.parametrize("shift, budget, decided", CHOSEN)
def test_the_choice_itself(shift, budget, decided):
    """Pinned: published figures were measured with these. It depends on the way alone: not on rounding, where several
    choices are equally good, nor on where the way begins, as in image to image.
    """
    sigmas = np.array(scheduler_sigmas(30, shift))
    noise = 1e-7 * np.random.default_rng(0).standard_normal(30)
    for same in (sigmas, sigmas + noise, 0.4 * sigmas):
        assert " ".join(map(str, script.choose_steps(same, budget, decided))) == CHOSEN[shift, budget, decided]


@given(st.lists(st.floats(0.01, 1.0), min_size=1, max_size=10), st.integers(2, 10))
def test_no_other_choice_is_better(sigmas, count):
    """Of as many steps, the first and the last among them; sigmas may repeat."""
    sigmas = sorted(sigmas, reverse=True)
    assert tuple(script.choose_steps(sigmas, count)) == chosen(tuple(sigmas), count)


@given(st.lists(st.one_of(st.just(0.0), st.floats(0.01, 1.0)), min_size=1, max_size=60), st.integers(1, 80))
def test_exactly_as_many_as_wanted(sigmas, count):
    """Whatever the sigmas are: also all zero, one alone, rising, or fewer than wanted."""
    steps = script.choose_steps(sigmas, count)
    assert steps == sorted(set(steps)) and steps[0] == 0 and steps[-1] == len(sigmas) - 1
    assert len(steps) == min(max(count, 2), len(sigmas))


def test_the_extrapolation_itself():
    """By hand: slopes of which 1/2 and 3/2 are left, one at a right angle, and one that turns."""
    first, second = torch.tensor([[0.0, 1.0]]).expand(4, 2), torch.tensor([[0.0, 3.0]]).expand(4, 2)
    last = torch.tensor([[0.0, 4.0], [0.0, 6.0], [9.0, 3.0], [0.0, 2.0]])
    expected = torch.tensor([[0.0, 4.25], [0.0, 7.5], [9.0, 3.0], [0.0, 2.0]])
    torch.testing.assert_close(script.extrapolate([(1.0, first), (0.8, second), (0.6, last)], 0.5), expected)
    assert torch.equal(script.extrapolate([(1.0, second), (0.8, second), (0.6, last)], 0.5), last), "no slope: held"


@given(
    st.lists(st.floats(0.05, 1), min_size=2, max_size=4, unique_by=lambda s: round(s, 2)),
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    st.sampled_from([1e-4, 1.0, 1e3]),
    st.integers(0, 99),
)
def test_the_extrapolation_written_twice(sigmas, dtype, size, seed):
    """Each sample by itself, at most two gaps far, in any type: products of small numbers are beyond float16."""
    *made, sigma = sorted(sigmas, reverse=True)
    values = size * torch.randn(len(made), 2, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    given = [(s, value.to(dtype)) for s, value in zip(made, values.cumsum(0))]
    found = script.extrapolate(given, sigma)
    assert found.dtype == dtype and found is not given[-1][1], "the caller may write into it"
    torch.testing.assert_close(found, forecast(given, sigma), rtol=0.02, atol=0.02 * size)


V1 = [393.76566581, -603.50993606, 209.10239044, -23.00726601, 0.86377344]
V2 = [225.7042019806413, -608.8453716535591, 304.1869942338369, 124.21267720116742, -1.4089066892956552]
LIMITS = [(V1, 0.27904501), (V2, 1.20747951), ([-1.0, 0.3], 0.3), ([1.0, 0.0], None), ([2.0, 0.05], None)]


@pytest.mark.parametrize("coefficients, limit", LIMITS, ids=str)
def test_a_polynomial_is_infinite_where_it_falls_below_zero(coefficients, limit):
    """The published ones until they rise again, far away; small changes may be below zero."""
    for change in (0.0, 0.005, 0.1, 0.25, *([limit - 1e-6] if limit else [0.35, 0.5, 1.5, 9.0])):
        assert script.rescale(change, coefficients) == pytest.approx(np.polyval(coefficients, change))
    if limit:
        assert script.rescale(limit + 1e-6, coefficients) == script.rescale(limit + 0.1, coefficients) == math.inf
    assert not script.rescale(math.nan, coefficients) < math.inf and script.rescale(0.005, V2) < 0


numbers = st.lists(st.floats(-3, 3), min_size=5, max_size=5)
sigmas_of_a_gap = st.lists(st.sampled_from([0.55, 0.58, 0.6, 0.65, 0.7]), max_size=5, unique=True)


@given(numbers, sigmas_of_a_gap, numbers, st.integers(1, 4), st.booleans())
def test_the_correction_itself(terms, skipped, junk, computed, close):
    """Velocities on a parabola, or on a line where two are known or are too close, are interpolated exactly."""

    def true(s):
        return sum(term * s**power for power, term in enumerate(terms[: 2 if close else min(computed, 2) + 1]))

    def correction(s, next_s, velocity, is_computed):
        velocity = torch.full((1, 2), velocity, dtype=torch.float64)
        return torch.as_tensor(corrector.correction(velocity, s, next_s, is_computed, 1))

    corrector, missing, way = script.Corrector(), 0.0, [*sorted(skipped, reverse=True), 0.5]
    for s in (2.0, 1.7, 1.4, 0.8)[-computed:]:
        if close:
            correction(s + 0.1, s, 7.0, True)
        assert correction(s, s - 0.1, true(s), True).abs().max() == 0
    for s, next_s, used in zip(way, way[1:], junk):
        assert correction(s, next_s, used, False) == 0
        missing += (next_s - s) * (true(s) - used)
    moved = correction(0.5, 0.4, true(0.5), True)
    assert (moved - 0.5 / (2 * 0.5 - 0.4) * missing).abs().max() < 1e-9
    assert correction(0.4, 0.3, 9.0, True).abs().max() == 0, "once"


def test_how_much_is_decided():
    """Of the call that knows most, in the sample that knows least; noise alone, an image as large as noise, and more."""
    noise = [(-1.0) ** torch.arange(64.0).view(1, 4, 4, 4)]
    image = torch.ones(1, 4, 4, 4)
    for size, decided in ((0.0, 0.0), (0.5, 0.25), (1.0, 1.0), (3.0, 1.0)):
        outputs = [noise[0] - size * image, noise[0]]
        assert script.measure_decided(outputs) == pytest.approx(decided)
        assert script.measure_decided([torch.cat([outputs[0], noise[0]])]) == 0


def test_the_correction_of_a_batch_that_changes():
    """Other calls, of more samples: what was skipped before is not corrected, what comes is. Each sample by itself."""
    corrector = script.Corrector()

    def correction(sigma, values, is_computed, calls, is_same):
        velocity = torch.tensor(values).view(-1, 1, 1)
        moved = corrector.correction(velocity, sigma, sigma - 0.1, is_computed, calls, torch.tensor(is_same))
        return torch.as_tensor(moved).flatten().tolist()

    assert not any(correction(1.0, [1.0, 1.0], True, "two", [False, False]))
    assert not any(correction(0.9, [1.0, 1.0], False, "two", [True, True]))
    moved = correction(0.8, [2.0, 2.0], True, "two", [True, False])
    assert moved[0] != 0 and moved[1] == 0
    assert not any(correction(0.7, [1.0] * 3, True, "three", [False] * 3))
    assert not any(correction(0.6, [1.0] * 3, False, "three", [True] * 3))
    assert all(correction(0.5, [2.0] * 3, True, "three", [True] * 3))
