"""teacache_forward of Lumina2 against the stock forward, and the modes of the pipeline."""

import pytest
import torch
from conftest import equal, on_device
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from lumina_models import CHANNELS, conditioning, denoise, tiny_model
from machines import IDENTITY, Lumina2, Oracle, kept, randn

from TeaCache4LuminaT2X.teacache_lumina2 import apply_teacache

PROMPT, NEGATIVE = conditioning([7], seed=1), conditioning([3], seed=2)
COMPUTED = {  # ways in which every step is computed
    "threshold": dict(rel_l1_thresh=1e-9, coefficients=[1e9, 1.0]),
    "threshold 0": dict(rel_l1_thresh=0),
    "computed steps": dict(computed_steps=9),
}


def once(model, lengths=(5,), dtype=torch.float32, t=0.25, **kwargs):
    """One call on its own."""
    embeds, mask = conditioning(lengths, seed=3, dtype=dtype)
    latents = randn((len(lengths), CHANNELS, 4, 6), 4).to(dtype)
    return model(latents, on_device(torch.full((len(lengths),), t)), embeds, mask, **kwargs)


@pytest.mark.gpu
@pytest.mark.parametrize("return_dict", [True, False])
@pytest.mark.parametrize("lengths", [(5,), (5, 2, 9), (4, 4)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("way", COMPUTED)
def test_a_computed_step_is_stock_bit_for_bit(return_dict, lengths, dtype, way):
    model = tiny_model(num_refiner_layers=2).to(dtype)
    with torch.no_grad():
        stock = once(model, lengths, dtype, return_dict=return_dict)
        apply_teacache(model, 9, **COMPUTED[way])
        for t in (0.1, 0.2, 0.25):  # the last call is a middle step
            ours = once(model, lengths, dtype, return_dict=return_dict, t=t)
    assert model.teacache.schedule == [True] * 3
    assert type(ours) is type(stock) is (Transformer2DModelOutput if return_dict else tuple)
    assert ours[0].dtype == dtype and torch.equal(ours[0], stock[0])


@pytest.mark.parametrize("way", [dict(rel_l1_thresh=1e9), dict(computed_steps=2)], ids=str)
@pytest.mark.parametrize("return_dict", [True, False])
def test_a_skipped_step_returns_what_a_computed_one_does(model, way, return_dict):
    apply_teacache(model, 9, coefficients=IDENTITY, **way)
    with torch.no_grad():
        outputs = [once(model, (5, 2), t=t, return_dict=return_dict) for t in (0.1, 0.2)]
    assert model.teacache.schedule == [True, False] and type(outputs[0]) is type(outputs[1])
    assert type(outputs[1]) is (Transformer2DModelOutput if return_dict else tuple)
    assert outputs[0][0].shape == outputs[1][0].shape


def test_a_mask_only_where_there_is_padding(model):
    """As stock does: without a mask the fast attention kernels can be used."""
    masks = []
    model.layers[1].register_forward_pre_hook(lambda _, args: masks.append(args[1]))
    apply_teacache(model, 9, rel_l1_thresh=0.1)
    with torch.no_grad():
        once(model, (4, 4), t=0.1)
        once(model, (4, 2), t=0.2)
    assert masks[0] is None and masks[1].sum(dim=1).tolist() == [10, 8]


@pytest.mark.parametrize("way", ["threshold", "threshold 0"])
@pytest.mark.parametrize("scale", [0.0, 0.4, 1.0])
def test_lora_scale(model, scale, way):
    """Like stock, and it outlasts neither the call nor one that fails."""
    peft = pytest.importorskip("peft")
    targets = ["to_q", "to_v", "linear_1"]
    model.add_adapter(peft.LoraConfig(r=2, lora_alpha=4, target_modules=targets, init_lora_weights=False))
    kwargs = {"attention_kwargs": {"scale": scale}}
    with torch.no_grad():
        stock, unscaled = once(model, **kwargs)[0], once(model)[0]
        apply_teacache(model, 9, **COMPUTED[way])
        assert torch.equal(once(model, **kwargs)[0], stock) and torch.equal(once(model)[0], unscaled)
        assert torch.equal(stock, unscaled) == (scale == 1.0) and kwargs == {"attention_kwargs": {"scale": scale}}
        hook = model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            once(model, **kwargs)
        hook.remove()
        assert torch.equal(once(model)[0], unscaled)


def test_lora_scale_that_changes(model):
    """As a prompt does: in both directions, also to a scale of one, and of the adapters themselves."""
    peft = pytest.importorskip("peft")
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False), "style")
    apply_teacache(model, 11, computed_steps=2)
    scales = iter([1.0, 1.0, 0.4, 0.4, 1.0, None, None, None, None, None])
    changes = {6: lambda: model.set_adapters("style", 0.5), 8: lambda: model.disable_lora()}
    with torch.no_grad():
        for i, scale in enumerate(scales):
            changes.get(i, lambda: None)()
            once(model, t=0.09 * i, attention_kwargs={"scale": scale} if scale else None)
    assert repr(model.teacache).endswith("X.X.X.X.X.")


def test_samples_at_times_of_their_own(model):
    """Computed where a sample falls behind; one time for all of them, written out, is as good as expanded."""
    apply_teacache(model, 7, computed_steps=2)
    noise, (embeds, mask) = randn((2, CHANNELS, 4, 4), 0), conditioning([5, 5])
    with torch.no_grad():
        for first, second in ((0, 0), (1, 1), (2, 1), (3, 2), (4, 4), (5, 5)):
            model(noise, torch.tensor([first, second]) / 8, embeds, mask)
    assert repr(model.teacache).endswith("X.X.X.")


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_the_stock_ones(model, checkpointing):
    """Nothing is kept; with checkpointing neither is what is between, so that a block runs again for its gradients."""
    calls = []

    def gradients(t):
        model.zero_grad()
        calls.clear()
        once(model, (5, 3), t=t)[0].square().sum().backward()
        assert len(calls) == 1 + checkpointing
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    model.train()
    model.layers[1].register_forward_pre_hook(lambda *_: calls.append(1))
    if checkpointing:
        model.enable_gradient_checkpointing()
    stock = gradients(0.3)
    apply_teacache(model, 10, rel_l1_thresh=100.0, coefficients=IDENTITY)
    ours = [gradients(t) for t in (0.1, 0.2, 0.3)][-1]
    assert len(stock) > 20 and equal(ours, stock)
    assert model.teacache.schedule == [True] * 3 and kept(model) == []


# --- the modes of the pipeline -----------------------------------------------------------


def replaced(seed):
    """By callback_on_step_end: other embeddings, the very same mask."""
    return conditioning([7], seed)[0], PROMPT[1]


MODES = {
    "no guidance": dict(uncond=None),
    "equal lengths": dict(uncond=conditioning([7], seed=5)),
    "padded to equal shapes": dict(cond=conditioning([7], 1, padded=16), uncond=conditioning([2], 2, padded=16)),
    "truncated guidance": dict(trunc=0.4),
    "never guided": dict(trunc=0.0),
    "cast anew": dict(cast=True),
    "mask and all cast anew": dict(cast="all"),
    "batch of unequal prompts": dict(cond=conditioning([7, 2, 5], 1), uncond=conditioning([1, 1, 1], 2)),
    "prompt replaced midway": dict(switch={3: replaced(8), 6: replaced(9)}),
    "prompt replaced, no guidance": dict(uncond=None, switch={3: replaced(8)}),
    "prompt replaced after guidance": dict(trunc=0.4, switch={5: replaced(8)}),
    "prompt replaced at the last step": dict(switch={7: replaced(8)}),
    "prompt replaced, cast anew": dict(switch={3: replaced(8)}, cast=True),
    "negative equals prompt": dict(uncond=tuple(t.clone() for t in PROMPT)),
}
WAYS = {"threshold": dict(rel_l1_thresh=0.15), "computed steps": dict(computed_steps=4)}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("way", WAYS)
def test_modes(way, mode):
    model, kwargs = tiny_model(num_layers=1), {"cond": PROMPT, "uncond": NEGATIVE} | MODES[mode]
    oracle = Oracle(Lumina2(), model, 8, **WAYS[way])
    expected = denoise(oracle, before=oracle.at, **kwargs)
    apply_teacache(model, 8, coefficients=IDENTITY, **WAYS[way])
    found = denoise(model, **kwargs)
    assert model.teacache.schedule == oracle.schedule and False in oracle.schedule
    assert equal(found, expected) and kept(model) == []
