"""teacache_forward against the stock forward, and against the oracle in every mode of the pipeline."""

import inspect
import subprocess
import sys

import pytest
import torch
from conftest import BUNDLED, equal, tensors_in
from diffusers import Lumina2Transformer2DModel
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from lumina_models import (
    CHANNELS,
    STOCK_FORWARD,
    Interrupted,
    Oracle,
    block_calls,
    conditioning,
    denoise,
    oracle_run,
    tiny_model,
)

from TeaCache4LuminaT2X.teacache_lumina2 import (
    COEFFICIENTS,
    COEFFICIENTS_V2,
    apply_teacache,
    remove_teacache,
    teacache_forward,
)

IDENTITY = [1.0, 0.0]
PROMPT, NEGATIVE = conditioning([7], seed=1), conditioning([3], seed=2)


def once(model, lengths=(5,), size=(4, 6), dtype=torch.float32, t=0.25, **kwargs):
    """One call on its own."""
    embeds, mask = conditioning(lengths, seed=3, dtype=dtype)
    latents = torch.randn(len(lengths), CHANNELS, *size, generator=torch.Generator().manual_seed(4)).to(dtype)
    return model(latents, torch.full((len(lengths),), t), embeds, mask, **kwargs)


# --- parity with the stock forward ------------------------------------------------


def test_signature_is_the_stock_one():
    assert list(inspect.signature(teacache_forward).parameters) == list(inspect.signature(STOCK_FORWARD).parameters)


@pytest.mark.parametrize("return_dict", [True, False])
@pytest.mark.parametrize("off", ["threshold 0", "disabled"])
@pytest.mark.parametrize("lengths", [(5,), (5, 2, 9), (4, 4)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_off_is_stock_bit_for_bit(return_dict, off, lengths, dtype):
    model = tiny_model().to(dtype)
    with torch.no_grad():
        stock = once(model, lengths, dtype=dtype, return_dict=return_dict)
        apply_teacache(model, num_steps=4, rel_l1_thresh=0.0 if off == "threshold 0" else 9.0)
        model.enable_teacache = off == "threshold 0"
        for t in (0.1, 0.2, 0.25):  # the last call is a middle step
            ours = once(model, lengths, dtype=dtype, return_dict=return_dict, t=t)
    assert type(ours) is type(stock) is (Transformer2DModelOutput if return_dict else tuple)
    assert ours[0].dtype == dtype and torch.equal(ours[0], stock[0])


def test_a_mask_only_where_there_is_padding(model):
    """As stock does: without a mask the fast attention kernels can be used."""
    masks = []
    model.layers[0].register_forward_pre_hook(lambda _, args: masks.append(args[1]))
    apply_teacache(model)
    with torch.no_grad():
        once(model, (4, 4), t=0.1)
        once(model, (4, 2), t=0.2)
    assert masks[0] is None and masks[1].sum(dim=1).tolist() == [10, 8]


@pytest.mark.parametrize("coefficients", [COEFFICIENTS_V2, [-1.0]], ids=["v2", "negative"])
def test_threshold_0_never_skips_and_keeps_nothing(model, coefficients):
    """Also with a polynomial below zero, whose sum lies below the threshold 0."""
    stock, _ = denoise(model, PROMPT, NEGATIVE)
    apply_teacache(model, num_steps=8, rel_l1_thresh=0, coefficients=coefficients)

    def nothing_kept(step, name, count):
        branches = model.teacache.branches if count else []
        assert all(b.signal is None and not b.computed for b in branches)

    assert equal(denoise(model, PROMPT, NEGATIVE, before_call=nothing_kept)[0], stock)
    assert model.teacache.schedule == [True] * 8


def lora_model():
    peft = pytest.importorskip("peft")
    model = tiny_model()
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_v", "linear_1"], init_lora_weights=False)
    model.add_adapter(config)
    return model


@pytest.mark.parametrize("scale", [0.0, 0.4, 1.0])
def test_lora_scale(scale):
    model = lora_model()
    kwargs = {"attention_kwargs": {"scale": scale}}
    with torch.no_grad():
        stock, unscaled = once(model, **kwargs)[0], once(model)[0]
        apply_teacache(model, num_steps=4, rel_l1_thresh=0)
        assert torch.equal(once(model, **kwargs)[0], stock)
        assert torch.equal(once(model)[0], unscaled), "the scale must not outlast the call"
    assert torch.equal(stock, unscaled) == (scale == 1.0)
    assert kwargs == {"attention_kwargs": {"scale": scale}}


def test_lora_scale_does_not_outlast_a_failed_call():
    model = lora_model()
    with torch.no_grad():
        stock = once(model)[0]
        apply_teacache(model, num_steps=4, rel_l1_thresh=0)
        handle = model.layers[1].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(Interrupted))
        with pytest.raises(Interrupted):
            once(model, attention_kwargs={"scale": 0.3})
        handle.remove()
        assert torch.equal(once(model)[0], stock)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_with_gradients_nothing_is_cached_or_skipped(checkpointing):
    def gradients(model, t):
        model.zero_grad()
        once(model, (5, 3), t=t)[0].square().sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    model = tiny_model().train()
    if checkpointing:
        model.enable_gradient_checkpointing()
    stock = gradients(model, 0.3)
    apply_teacache(model, num_steps=10, rel_l1_thresh=100.0, coefficients=IDENTITY)
    calls = block_calls(model)
    for t in (0.1, 0.2, 0.3):
        ours = gradients(model, t)
    assert len(stock) == len(ours) > 20 and equal(ours, stock)
    assert calls.count("first") >= 3
    assert "teacache" not in vars(model)


# --- the schedule -----------------------------------------------------------------


FORMULAS = {
    "v1": (None, [0.1, 0.4, 0.7, 1.5, 4.0]),
    "v2": (COEFFICIENTS_V2, [0.3, 3.0, 8.0, 20.0]),
    "identity": (IDENTITY, [0.03, 0.06, 0.1, 0.2, 2.0]),
}


@pytest.mark.parametrize("name, thresh", [(name, t) for name, (_, ts) in FORMULAS.items() for t in ts])
def test_guided_run_follows_the_formula(model, name, thresh):
    coefficients = FORMULAS[name][0]
    outputs, latents, schedule = oracle_run(model, thresh, coefficients or COEFFICIENTS, 12, PROMPT, NEGATIVE, steps=12)
    calls = block_calls(model)
    apply_teacache(model, num_steps=12, rel_l1_thresh=thresh, coefficients=coefficients)
    ours, ours_latents = denoise(model, PROMPT, NEGATIVE, steps=12)
    assert model.teacache.schedule == schedule
    assert schedule[0] and schedule[-1]
    assert equal(ours, outputs) and torch.equal(ours_latents, latents)
    assert calls.count("first") == calls.count("last") == 2 * sum(schedule), "both branches, together"


@pytest.mark.parametrize("name, different", [("v1", 3), ("v2", 3), ("identity", 4)])
def test_the_formula_skips_here(model, name, different):
    """The runs above would prove nothing if they all computed, or all skipped."""
    coefficients, thresholds = FORMULAS[name]
    runs = [oracle_run(model, t, coefficients or COEFFICIENTS, 12, PROMPT, NEGATIVE, steps=12) for t in thresholds]
    computed = [sum(schedule) for _, _, schedule in runs]
    assert computed == sorted(computed, reverse=True) and len(set(computed)) >= different, computed


def test_skipped_step_runs_no_block(model):
    apply_teacache(model, num_steps=5, rel_l1_thresh=1e9, coefficients=IDENTITY)
    calls = block_calls(model)
    denoise(model, PROMPT, NEGATIVE, steps=5)
    assert model.teacache.schedule == [True, False, False, False, True]
    assert calls == ["first", "last"] * 4


# --- what existing scripts get wrong ----------------------------------------------


def replaced(seed):
    return conditioning([7], seed)[0], PROMPT[1]


MODES = {
    "no guidance": dict(uncond=None),
    "equal lengths": dict(uncond=conditioning([7], seed=5)),
    "padded to equal shapes": dict(cond=conditioning([7], 1, padded=16), uncond=conditioning([2], 2, padded=16)),
    "truncated guidance": dict(trunc=0.4),
    "guided for one step": dict(trunc=1 / 8),
    "never guided": dict(trunc=0.0),
    "cast anew": dict(cast=True),
    "mask and all cast anew": dict(cast="all"),
    "batch of unequal prompts": dict(cond=conditioning([7, 2, 5], 1), uncond=conditioning([1, 1, 1], 2)),
    "images per prompt": dict(
        cond=tuple(t.repeat_interleave(2, 0) for t in conditioning([6, 3], 1)),
        uncond=tuple(t.repeat_interleave(2, 0) for t in conditioning([2, 2], 2)),
    ),
    "negative equals prompt": dict(uncond=PROMPT),
    # callback_on_step_end may replace the embeddings; the mask stays, the very same tensor
    "prompt replaced midway": dict(switch={3: replaced(8), 6: replaced(9)}),
    "prompt replaced, no guidance": dict(uncond=None, switch={3: replaced(8)}),
    "prompt replaced after guidance": dict(trunc=0.4, switch={5: replaced(8)}),
    "prompt replaced at the last step": dict(switch={7: replaced(8)}),
    "prompt replaced, cast anew": dict(switch={3: replaced(8)}, cast=True),
}


WAYS = {
    "hold": dict(predict="hold"),
    "forecast": dict(predict="forecast"),
    "timestep, hold": dict(indicator="timestep", predict="hold"),
    "timestep, forecast": dict(indicator="timestep", predict="forecast"),
    "speedup, hold": dict(speedup=2.0, predict="hold"),
    "speedup, forecast": dict(speedup=2.0, predict="forecast"),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("way, thresh", [*((way, 0.15) for way in WAYS), ("hold", 0.06), ("forecast", 0.06)])
def test_modes(model, mode, way, thresh):
    kwargs = {"cond": PROMPT, "uncond": NEGATIVE} | MODES[mode]
    if mode == "negative equals prompt":  # the pipeline would pass two tensors of equal content
        kwargs["uncond"] = tuple(t.clone() for t in PROMPT)

    def branch(step, name):  # to the oracle, a new prompt is a new branch
        if mode == "negative equals prompt":
            return "one"
        return f"{name}{sum(step >= s for s in kwargs.get('switch', {}))}" if name == "cond" else name

    oracle = Oracle(model, thresh, IDENTITY, 8, **WAYS[way])
    expected, _ = denoise(oracle, before_call=lambda s, n, c: oracle.at(s, branch(s, n)), **kwargs)

    apply_teacache(model, 8, None if "speedup" in WAYS[way] else thresh, IDENTITY, **WAYS[way])
    outputs, _ = denoise(model, **kwargs)
    assert model.teacache.schedule == oracle.schedule and len(oracle.schedule) == 8
    assert False in oracle.schedule and oracle.schedule[0] and oracle.schedule[-1]
    assert equal(outputs, expected)
    assert tensors_in(model.teacache) == []


SECOND = {
    "the same": dict(),
    "another prompt": dict(cond=conditioning([7], 11)),
    "another length": dict(cond=conditioning([4], 12), uncond=conditioning([9], 13)),
    "another size": dict(size=(6, 4)),
    "the same area, turned": dict(size=(2, 8)),
    "another batch": dict(cond=conditioning([7, 3], 14), uncond=conditioning([2, 2], 15)),
    "no guidance": dict(uncond=None),
    "another noise": dict(seed=77),
    "fewer steps": dict(steps=5),
    "starts at less noise": dict(cond=conditioning([7], 16), sigmas=[0.8, 0.6, 0.4, 0.2], steps=4),
    "bfloat16": dict(cond=conditioning([7], 1, torch.bfloat16), uncond=conditioning([3], 2, torch.bfloat16)),
}


@pytest.mark.parametrize("second", SECOND)
def test_second_image_is_as_fresh(second):
    kwargs = {"cond": PROMPT, "uncond": NEGATIVE, "steps": 8} | SECOND[second]
    model = tiny_model()
    dtype = kwargs["cond"][0].dtype

    def run(first):
        model.to(torch.float32)
        apply_teacache(model, num_steps=8, rel_l1_thresh=0.1, coefficients=IDENTITY)
        if first:
            denoise(model, PROMPT, NEGATIVE, seed=5)
            assert tensors_in(model.teacache) == []
        model.to(dtype)
        model.num_steps = kwargs["steps"]
        return *denoise(model, **kwargs), model.teacache.schedule

    fresh, again = run(first=False), run(first=True)
    assert False in fresh[2]
    assert equal(again[0], fresh[0]) and torch.equal(again[1], fresh[1]) and again[2] == fresh[2]
    assert tensors_in(model.teacache) == []


@pytest.mark.parametrize("second", SECOND)
@pytest.mark.parametrize("inside", [False, True], ids=["between calls", "inside a block"])
def test_interrupted_at_any_call(second, inside):
    kwargs = {"cond": PROMPT, "uncond": NEGATIVE, "steps": 8} | SECOND[second]
    dtype = kwargs["cond"][0].dtype
    model = tiny_model()
    arm = []

    def trip(*_):
        if arm:
            raise Interrupted

    model.layers[1].register_forward_pre_hook(trip)

    def run(interrupt_at):
        model.to(torch.float32)
        arm.clear()
        apply_teacache(model, num_steps=8, rel_l1_thresh=0.1, coefficients=IDENTITY)

        def before_call(step, name, count):
            if count == interrupt_at:
                arm.append(True)
                if not inside:
                    raise Interrupted

        if interrupt_at is not None:
            try:
                denoise(model, PROMPT, NEGATIVE, seed=5, before_call=before_call)
            except Interrupted:
                pass
        arm.clear()
        model.to(dtype)
        model.num_steps = kwargs["steps"]
        return *denoise(model, **kwargs), model.teacache.schedule

    fresh = run(None)
    for at in range(16):
        again = run(at)
        assert again[2] == fresh[2], f"interrupted at call {at}"
        assert equal(again[0], fresh[0]) and torch.equal(again[1], fresh[1]), f"interrupted at call {at}"
        assert tensors_in(model.teacache) == []


def test_a_branch_that_returns_is_computed(model):
    """Guided only now and then: no residual older than the prompt's own is ever added."""
    apply_teacache(model, num_steps=9, rel_l1_thresh=1e9, coefficients=IDENTITY)
    calls = block_calls(model)
    latents = torch.randn(1, CHANNELS, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for step in range(9):
            for name, (embeds, mask) in {"cond": PROMPT, "uncond": NEGATIVE}.items():
                if name == "cond" or step in (0, 1, 4, 5):
                    calls.clear()
                    model(latents, torch.tensor([step / 9]), embeds, mask)
                    computed = bool(calls)
                    expected = step in (0, 8) or (name == "uncond" and step == 4)
                    assert computed == expected, (step, name)


@pytest.mark.parametrize("switch", [{}, {s: replaced(s) for s in range(1, 6)}], ids=["one prompt", "new at each step"])
@pytest.mark.parametrize("uncond", [NEGATIVE, None], ids=["guided", "unguided"])
def test_memory_is_three_tensors_a_branch_and_released(model, uncond, switch):
    apply_teacache(model, num_steps=6, rel_l1_thresh=0.3, coefficients=IDENTITY)
    embeds, held = {id(t) for c in (PROMPT, NEGATIVE, *switch.values()) for t in c}, []

    def count(step, name, calls):
        tensors = tensors_in(vars(model).get("teacache"))
        held.append(sum(id(t) not in embeds for t in tensors))

    denoise(model, PROMPT, uncond, steps=6, before_call=count, switch=switch)
    branches = (2 if uncond else 1) + (1 if switch else 0)  # a replaced prompt is forgotten a step later
    assert 2 <= max(held) <= 3 * branches, "what the indicator saw, and two outputs"
    assert tensors_in(model.teacache) == []
    assert model.teacache.schedule[-1] and len(model.teacache.schedule) == 6


def test_the_last_step_begins_by_letting_go(model):
    apply_teacache(model, num_steps=6, rel_l1_thresh=0.3, coefficients=IDENTITY)
    seen = []
    model.layers[0].register_forward_pre_hook(lambda *_: seen.append(len(tensors_in(model.teacache))))
    denoise(model, PROMPT, NEGATIVE, steps=6)
    assert seen[0] > 0 and seen[-2:] == [0, 0]


@pytest.mark.parametrize("how", ["disabled", "gradients"])
def test_switched_off_midway_nothing_old_is_used(model, how):
    """Steps that TeaCache did not see make its cache too old: the next step that it sees is computed."""
    apply_teacache(model, num_steps=20, rel_l1_thresh=1e9, coefficients=IDENTITY)
    embeds, mask = PROMPT
    calls, latents = block_calls(model), torch.randn(1, CHANNELS, 4, 4)
    for step in range(8):
        calls.clear()
        model.enable_teacache = not (how == "disabled" and step in (3, 4))
        with torch.set_grad_enabled(how == "gradients" and step in (3, 4)):
            model(latents, torch.tensor([step / 20]), embeds, mask)
        assert bool(calls) == (step in (0, 3, 4, 5)), step


def test_nan_and_zero_inputs_compute(model):
    """A change that is no number never skips."""
    apply_teacache(model, num_steps=4, rel_l1_thresh=1e9, coefficients=IDENTITY)
    embeds, mask = PROMPT
    with torch.no_grad():
        for i, value in enumerate([0.0, float("nan"), 0.0, 0.0]):
            model(torch.full((1, CHANNELS, 4, 4), value), torch.tensor([i / 4]), embeds, mask)
    assert model.teacache.schedule == [True] * 4


# --- applying and removing --------------------------------------------------------


@pytest.fixture
def patched_class(monkeypatch):
    """The original TeaCache way, all the attributes that existing code sets."""
    cls = Lumina2Transformer2DModel
    monkeypatch.setattr(cls, "forward", teacache_forward)
    settings = dict(enable_teacache=True, cnt=0, num_steps=8, rel_l1_thresh=0.1, coefficients=IDENTITY)
    old = dict(previous_modulated_input=None, previous_residual=None, accumulated_rel_l1_distance=0, cache={})
    for name, value in (settings | old | {"uncond_seq_len": None}).items():
        monkeypatch.setattr(cls, name, value, raising=False)
    return cls


def test_class_way_equals_instance_way(patched_class, monkeypatch):
    model = tiny_model()
    ours = denoise(model, PROMPT, NEGATIVE)
    schedule = model.teacache.schedule
    assert False in schedule and tensors_in(model.teacache) == []
    assert patched_class.cnt == 0 and patched_class.previous_residual is None and patched_class.cache == {}
    again = denoise(model, PROMPT, NEGATIVE)
    expected = oracle_run(model, 0.1, IDENTITY, 8, PROMPT, NEGATIVE)
    assert equal(ours[0], expected[0]) and equal(again[0], expected[0]) and schedule == expected[2]
    monkeypatch.setattr(patched_class, "enable_teacache", False)
    stock = oracle_run(model, 0, IDENTITY, 8, PROMPT, NEGATIVE)
    assert equal(denoise(model, PROMPT, NEGATIVE)[0], stock[0])


def test_class_way_with_a_setting_on_the_instance(patched_class):
    model = tiny_model()
    before = set(vars(model))
    model.enable_teacache = True
    denoise(model, PROMPT, NEGATIVE)
    assert set(vars(remove_teacache(model))) == before


def test_class_way_keeps_two_models_apart(patched_class):
    a, b = tiny_model(0), tiny_model(1)
    expected = [oracle_run(m, 0.1, IDENTITY, 8, PROMPT, NEGATIVE)[0] for m in (a, b)]
    outputs = {}

    def run_b_inside_a(step, name, count):
        if count == 5:
            outputs["b"] = denoise(b, PROMPT, NEGATIVE)[0]

    outputs["a"] = denoise(a, PROMPT, NEGATIVE, before_call=run_b_inside_a)[0]
    assert equal(outputs["a"], expected[0]) and equal(outputs["b"], expected[1])


def test_apply_touches_one_instance_and_remove_leaves_nothing(model):
    other = tiny_model(1)
    before = set(vars(model))
    stock = denoise(model, PROMPT, NEGATIVE)[0]
    assert apply_teacache(model, num_steps=8, rel_l1_thresh=0.1, coefficients=IDENTITY) is model
    assert Lumina2Transformer2DModel.forward is STOCK_FORWARD and "forward" not in vars(other)

    def stop(step, name, count):
        if count == 6:
            raise Interrupted

    with pytest.raises(Interrupted):
        denoise(model, PROMPT, NEGATIVE, before_call=stop)
    assert tensors_in(model.teacache), "an interrupted generation holds its cache..."
    assert remove_teacache(model) is model
    assert set(vars(model)) == before, "...and remove_teacache lets it go"
    assert equal(denoise(model, PROMPT, NEGATIVE)[0], stock)
    assert set(vars(remove_teacache(other))) == set(vars(tiny_model(1))), "removing twice, or what was never applied"


@pytest.mark.parametrize(
    "bad",
    [
        dict(num_steps=0),
        dict(num_steps=-3),
        dict(num_steps=2.5),
        dict(num_steps=float("inf")),
        dict(num_steps=None),
        dict(rel_l1_thresh=-0.1),
        dict(rel_l1_thresh=float("nan")),
        dict(rel_l1_thresh=float("inf")),
        dict(coefficients=[]),
        dict(coefficients=[1.0, float("nan")]),
    ],
    ids=str,
)
def test_bad_settings(model, bad):
    before = set(vars(model))
    with pytest.raises(ValueError, match="pipeline.transformer"):
        apply_teacache(object(), num_steps=8)
    with pytest.raises(ValueError) as error:
        apply_teacache(model, **bad)
    assert "\n" not in str(error.value) and set(vars(model)) == before


@pytest.mark.parametrize("hook_first", [True, False])
def test_inside_offloading_hooks(model, hook_first):
    """accelerate replaces `forward` on the instance; both orders work, and removing either leaves the other."""
    hooks = pytest.importorskip("accelerate.hooks")

    class Count(hooks.ModelHook):
        calls = 0

        def pre_forward(self, module, *args, **kwargs):
            self.calls += 1
            return args, kwargs

    stock = denoise(model, PROMPT, NEGATIVE)[0]
    expected = oracle_run(model, 0.1, IDENTITY, 8, PROMPT, NEGATIVE)[0]
    hook = Count()
    steps = [lambda: hooks.add_hook_to_module(model, hook)]
    steps.insert(1 if hook_first else 0, lambda: apply_teacache(model, 8, 0.1, IDENTITY))
    for step in steps:
        step()
    assert equal(denoise(model, PROMPT, NEGATIVE)[0], expected) and hook.calls == 16
    remove_teacache(model)
    assert equal(denoise(model, PROMPT, NEGATIVE)[0], stock) and hook.calls == 32
    hooks.remove_hook_from_module(model)
    assert equal(denoise(model, PROMPT, NEGATIVE)[0], stock) and hook.calls == 32


@pytest.mark.parametrize("applied", [False, True])
def test_a_forward_that_something_else_replaced_is_left_alone(model, applied):
    if applied:
        apply_teacache(model)
    theirs = model.forward = lambda *args, **kwargs: "theirs"
    with pytest.raises(ValueError, match="undo that first"):
        apply_teacache(model)
    if applied:  # theirs may call ours: taking the settings away would leave it running with the defaults
        with pytest.raises(ValueError, match="undo that first"):
            remove_teacache(model)
    else:
        remove_teacache(model)
    assert model.forward is theirs


def test_import_does_nothing(tmp_path):
    code = """
import sys, torch, diffusers
def world():
    m = diffusers.Lumina2Transformer2DModel
    return (m.forward, dict(vars(m)), list(sys.path), torch.is_grad_enabled(), torch.get_num_threads(),
            torch.get_default_dtype(), torch.initial_seed(), torch.get_rng_state().sum().item(),
            torch.backends.cuda.matmul.allow_tf32, torch.are_deterministic_algorithms_enabled())
before = world()
from TeaCache4LuminaT2X.teacache_lumina2 import teacache_forward
assert world() == before and "flash_attn" not in sys.modules
print("clean")
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert run.stdout == "clean\n", run.stderr


# --- through the real pipeline ------------------------------------------------------


@pytest.mark.skipif(not BUNDLED.joinpath("model_index.json").is_file(), reason="the bundled model is not there")
@pytest.mark.parametrize(
    "kwargs",
    [
        dict(prompt="red apple"),
        dict(prompt="red apple", guidance_scale=1.0),
        dict(prompt="red apple", negative_prompt="green apple"),
        dict(prompt="red apple", cfg_trunc_ratio=0.5),
        dict(prompt=["red apple", "smiling face with sunglasses"], num_images_per_prompt=2),
        dict(prompt="fox", height=96, width=160),
    ],
    ids=str,
)
def test_pipeline_modes(pipeline, kwargs):
    model, steps = pipeline.transformer, 8

    def draw(seed=0):
        generator = torch.Generator().manual_seed(seed)
        return pipeline(**kwargs, num_inference_steps=steps, generator=generator, output_type="pt").images

    try:
        stock = draw()
        apply_teacache(model, num_steps=steps, rel_l1_thresh=0)
        assert torch.equal(draw(), stock)
        apply_teacache(model, num_steps=steps, rel_l1_thresh=0.3, coefficients=IDENTITY)
        first, schedule = draw(), model.teacache.schedule
        assert len(schedule) == steps and schedule[0] and schedule[-1] and False in schedule
        assert not torch.equal(first, stock)
        assert tensors_in(model.teacache) == []
        draw(seed=1)
        assert torch.equal(draw(), first), "after another image, the same again"
    finally:
        remove_teacache(model)
