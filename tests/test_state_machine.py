"""Any mix of generations on one model: each is what a fresh process would give, bit for bit, and nothing stays."""

import torch
from conftest import equal, tensors_in
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lumina_models import Interrupted, conditioning, denoise, oracle_run, tiny_model

from TeaCache4LuminaT2X.teacache_lumina2 import apply_teacache

MODEL = tiny_model(num_layers=2)


def pooled(pool, lengths, seed):
    return pool.setdefault((lengths, seed), conditioning(lengths, seed))


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
        "switch": st.one_of(st.none(), st.integers(1, 6)),
        "thresh": st.sampled_from([0.0, 0.03, 0.1, 0.3, 2.0]),
        "predict": st.sampled_from(["hold", "forecast"]),
        "indicator": st.sampled_from(["modulated", "timestep"]),
        "speedup": st.one_of(st.none(), st.floats(1, 3)),
        "interrupt": st.one_of(st.none(), st.integers(0, 13)),
    }
)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(generations, min_size=1, max_size=4),
    st.sampled_from([[1.0, 0.0], [4.0, -1.0, 0.3], [-0.2], [2.0, 0.0, 0.05]]),
)
def test_any_mix_of_generations(mix, coefficients):
    apply_teacache(MODEL, num_steps=1, rel_l1_thresh=0, coefficients=coefficients)
    pool = {}  # generations share their conditioning's tensors where it is the same
    for g in mix:
        cond = pooled(pool, tuple(g["lengths"]), g["prompt"])
        uncond = g["negative"] and pooled(pool, (g["negative"],) * len(g["lengths"]), 9)
        kwargs = {key: g[key] for key in ("seed", "size", "steps", "trunc", "cast")}
        if g["switch"]:  # by callback_on_step_end: other embeddings, the very same mask
            kwargs["switch"] = {g["switch"]: (pooled(pool, tuple(g["lengths"]), 7)[0], cond[1])}
        way = {key: g[key] for key in ("predict", "indicator", "speedup")}
        if g["speedup"]:
            way["speedup"] = min(g["speedup"], max(g["steps"] / 2, 1))
        run = (MODEL, g["thresh"], coefficients, g["steps"], cond, uncond or None)
        expected, latents, schedule = oracle_run(*run, way=way, **kwargs)

        def stop(step, name, count, at=g["interrupt"]):
            if count == at:
                raise Interrupted

        for name, value in {"num_steps": g["steps"], "rel_l1_thresh": g["thresh"], **way}.items():
            setattr(MODEL, name, value)
        try:
            outputs, result = denoise(MODEL, cond, uncond or None, before_call=stop, **kwargs)
        except Interrupted:
            continue
        assert MODEL.teacache.schedule == schedule
        assert equal(outputs, expected) and torch.equal(result, latents)
        assert tensors_in(MODEL.teacache) == []
