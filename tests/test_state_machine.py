"""Any mix of generations on one model: each is what a fresh process would give, bit for bit, and nothing stays."""

import torch
from conftest import Interrupted, conditioning, denoise, equal, oracle_run, tensors_in, tiny_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from TeaCache4LuminaT2X.teacache_lumina2 import apply_teacache

MODEL = tiny_model(num_layers=2)

generations = st.fixed_dictionaries(
    {
        "lengths": st.lists(st.integers(1, 6), min_size=1, max_size=3),
        "negative": st.one_of(st.none(), st.integers(1, 6)),
        "prompt": st.integers(0, 2),
        "seed": st.integers(0, 3),
        "size": st.sampled_from([(2, 2), (2, 4), (4, 2)]),
        "steps": st.integers(1, 7),
        "trunc": st.sampled_from([0.0, 0.3, 0.5, 0.9, 1.0]),
        "cast": st.booleans(),
        "interrupt": st.one_of(st.none(), st.integers(0, 13)),
    }
)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(generations, min_size=1, max_size=4),
    st.sampled_from([0.0, 0.03, 0.1, 0.3, 2.0]),
    st.sampled_from([[1.0, 0.0], [4.0, -1.0, 0.3], [-0.2], [2.0, 0.0, 0.05]]),
)
def test_any_mix_of_generations(mix, thresh, coefficients):
    apply_teacache(MODEL, num_steps=1, rel_l1_thresh=thresh, coefficients=coefficients)
    for g in mix:
        cond = conditioning(g["lengths"], seed=g["prompt"])
        uncond = g["negative"] and conditioning([g["negative"]] * len(g["lengths"]), seed=9)
        kwargs = {key: g[key] for key in ("seed", "size", "steps", "trunc", "cast")}
        expected, latents, schedule = oracle_run(
            MODEL, thresh, coefficients, g["steps"], cond, uncond or None, **kwargs
        )

        def stop(step, name, count, at=g["interrupt"]):
            if count == at:
                raise Interrupted

        MODEL.num_steps = g["steps"]
        try:
            outputs, result = denoise(MODEL, cond, uncond or None, before_call=stop, **kwargs)
        except Interrupted:
            continue
        assert MODEL.teacache.schedule == schedule
        assert equal(outputs, expected) and torch.equal(result, latents)
        assert tensors_in(MODEL.teacache) == []
