"""Strange loops become slow, never wrong: random ones, and each that was once wrong."""

import diffusers
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from tracing import PLACES, RandomLoop

FLOW = dict(prediction_type="flow_prediction", use_flow_sigmas=True)
SCHEDULERS = {
    "Euler": lambda: FlowMatchEulerDiscreteScheduler(shift=2.0),
    "stochastic": lambda: FlowMatchEulerDiscreteScheduler(shift=2.0, stochastic_sampling=True),
    "LCM": lambda: diffusers.FlowMatchLCMScheduler(shift=2.0),
    "Heun": lambda: diffusers.FlowMatchHeunDiscreteScheduler(shift=2.0),
    "UniPC": lambda: diffusers.UniPCMultistepScheduler(**FLOW),
    "DPM": lambda: diffusers.DPMSolverMultistepScheduler(**FLOW),
}
WAYS = [dict(computed_steps=k) for k in (2, 3, [0, 1, 2, 5], [0, 2, 3, 5])]
WAYS += [dict(rel_l1_thresh=thresh, coefficients=[1.0, 0.0]) for thresh in (0.3, 9.0)]

happens = st.one_of(
    *[st.tuples(st.just("run"))] * 3,
    st.tuples(st.sampled_from(["again", "turn", "guide", "other"])),
    st.tuples(st.just("fail"), st.integers(0, 2)),
    st.tuples(st.just("begin"), st.sampled_from(["set", "begin index", "only the index"])),
    st.tuples(st.just("replace"), st.sampled_from(["roll", "mirror", "noise", "blend"]), st.booleans()),
    st.tuples(st.just("jump"), st.sampled_from([-2, -1, 1])),
    st.tuples(st.just("reorder"), st.booleans()),
    st.tuples(st.just("prompt"), st.integers(0, 1)),
    st.tuples(st.just("set"), st.just("places"), st.sampled_from(list(PLACES))),
    st.tuples(st.just("set"), st.just("scale"), st.sampled_from([0.5, 1.0])),
)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_random_loops(machine, name):

    @settings(max_examples=50)
    @given(st.sampled_from(WAYS), st.integers(1, 2), st.lists(happens, max_size=20))
    @torch.no_grad()
    def check(way, samples, events):
        if name == "Heun" and "computed_steps" in way:  # has 11 timesteps
            way = dict(computed_steps=4)
        loop = RandomLoop(machine, SCHEDULERS[name](), way, samples)
        for event in events:
            loop.happen(*event)
        while loop.image.index < len(loop.scheduler.timesteps):
            loop.run()

    check()
