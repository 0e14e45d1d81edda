"""teacache_forward against memo's own forward: bit for bit where nothing is skipped; what a skipped step runs."""

import inspect

import pytest
import torch
from conftest import equal
from memo_models import (
    LATENTS,
    STOCK_FORWARD,
    Clip,
    denoise,
    memo,
    memory,
    set_memory,
    stock,
    tiny_reference,
    tiny_unet,
)

from TeaCache4Memo import teacache_memo
from TeaCache4Memo.teacache_memo import apply_teacache, remove_teacache, teacache_forward


@pytest.fixture
def model():
    return tiny_unet()


def ways_off(model):
    """All the ways in which nothing may be skipped."""
    yield "threshold 0", lambda: apply_teacache(model, num_steps=8, rel_l1_thresh=0)
    yield "enable_teacache = False", lambda: setattr(apply_teacache(model, 8, 9.0), "enable_teacache", False)
    yield "all steps last", lambda: apply_teacache(model, num_steps=1, rel_l1_thresh=9.0)


def same_as_stock(model, sample, clip, timestep=500, **more):
    """Output and memory for two calls, first and later clip, each way off."""
    inputs = {**clip.inputs, **more}
    for way, switch in ways_off(model):
        for first, writes in ((True, False), (False, True), (False, False)):
            news = {"is_new_audio": first, "update_past_memory": writes}
            before = memory(model)
            with torch.no_grad():
                expected = stock(model)(sample, timestep=timestep, **inputs, **news)
            expected_memory = memory(model)
            set_memory(model, before)
            switch()
            with torch.no_grad():
                found = model(sample, timestep=timestep, **inputs, **news)
            assert type(found) is type(expected), way
            key = 0 if isinstance(found, tuple) else "sample"
            assert torch.equal(found[key], expected[key]), way
            assert equal(memory(model), expected_memory), way
            remove_teacache(model)


def sample_of(clip, seed=5):
    batch = 1 + clip.guided
    return torch.randn(batch, *clip.shape[1:], generator=torch.Generator().manual_seed(seed)).to(clip.dtype)


def test_signature_is_the_stock_one():
    ours, theirs = inspect.signature(teacache_forward).parameters, inspect.signature(STOCK_FORWARD).parameters
    assert [(p.name, p.default, p.kind) for p in ours.values()] == [
        (p.name, p.default, p.kind) for p in theirs.values()
    ]
    assert len(theirs) == 16  # self and 15


@pytest.mark.parametrize("return_dict", [True, False])
@pytest.mark.parametrize("guided", [True, False])
def test_parity(model, guided, return_dict):
    clip = Clip(guided=guided)
    assert (clip.inputs["uc_mask"] is not None) == guided
    same_as_stock(model, sample_of(clip), clip, return_dict=return_dict)


def test_parity_uc_mask_is_heard(model):
    """Guided inputs without the mask: another output, and again the stock one."""
    clip = Clip()
    with torch.no_grad():
        given = model(sample_of(clip), timestep=500, **clip.inputs).sample
        without = model(sample_of(clip), timestep=500, **{**clip.inputs, "uc_mask": None}).sample
    assert not torch.equal(given, without)
    same_as_stock(model, sample_of(clip), clip, uc_mask=None)


TIMESTEPS = {
    "int": 500,
    "float": 499.7,
    "0-d": torch.tensor(499.7),
    "0-d int": torch.tensor(500),
    "1-d of one": torch.tensor([499.7]),
    "1-d": torch.tensor([700.2, 300.1]),
    "list of int": [500, 300],
    "list of float": [499.7, 300.9],  # stock cuts the fraction off
    "list of 0-d": [torch.tensor(499.7), torch.tensor(300.0)],
    "list of 1-d": [torch.tensor([499.7, 20.0]), torch.tensor([300.0, 10.5])],
}


@pytest.mark.parametrize("timestep", TIMESTEPS.values(), ids=TIMESTEPS)
def test_parity_timestep(model, timestep):
    clip = Clip()
    same_as_stock(model, sample_of(clip), clip, timestep=timestep)


@pytest.mark.parametrize("size", [(4, 4), (5, 6), (6, 5), (7, 7)])
def test_parity_size(model, size):
    clip = Clip(size=size)
    same_as_stock(model, sample_of(clip), clip)


@pytest.mark.parametrize("size", [(8, 8), (6, 10), (7, 12)])
def test_parity_size_with_two_upsamplings(size):
    """A side of 6 can be halved once, not twice."""
    widths = {"block_out_channels": (32, 32, 32)}
    names = "CrossAttnDownBlock", "CrossAttnDownBlock", "DownBlock"
    blocks = {
        f"{n}D": {
            "down_block_types": tuple(f"{name}{n}D" for name in names),
            "up_block_types": tuple(f"{name.replace('Down', 'Up')}{n}D" for name in reversed(names)),
        }
        for n in (2, 3)
    }
    model = tiny_unet(**widths, **blocks["3D"])
    clip = Clip(size=size, reference=tiny_reference(**widths, **blocks["2D"]))
    same_as_stock(model, sample_of(clip), clip)


def test_parity_mask_cond_fea(model):
    clip = Clip()
    generator = torch.Generator().manual_seed(1)
    same_as_stock(model, sample_of(clip), clip, mask_cond_fea=torch.randn(2, 32, 2, 4, 4, generator=generator))


def test_parity_attention_mask():
    """memo hands it to the attention among places and among audio tokens, at every level: one level, 4 of each."""
    one = {"block_out_channels": (32,)}
    model = tiny_unet(down_block_types=("CrossAttnDownBlock3D",), up_block_types=("CrossAttnUpBlock3D",), **one)
    blocks = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
    clip = Clip(size=(2, 2), reference=tiny_reference(**blocks, **one))
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]])  # (batch * frames, tokens)
    same_as_stock(model, sample_of(clip), clip, attention_mask=mask)
    with torch.no_grad():
        masked = model(sample_of(clip), timestep=1, **clip.inputs, attention_mask=mask).sample
        assert not torch.equal(masked, model(sample_of(clip), timestep=1, **clip.inputs).sample)


@pytest.mark.parametrize("kind", ["labels", "timestep"])
def test_parity_class_labels(kind):
    config = {"num_class_embeds": 5} if kind == "labels" else {"class_embed_type": "timestep"}
    model, clip = tiny_unet(**config), Clip()
    same_as_stock(model, sample_of(clip), clip, class_labels=torch.tensor([1, 4]))
    apply_teacache(model, 8, 0)
    with torch.no_grad(), pytest.raises(ValueError, match="class_labels"):
        model(sample_of(clip), timestep=500, **clip.inputs)


def test_parity_additional_residuals(model):
    """As a ControlNet gives them: down ones, the mid one, and both."""
    clip, generator = Clip(), torch.Generator().manual_seed(1)
    shapes = [(2, 32, 2, 4, 4), (2, 32, 2, 4, 4), (2, 32, 2, 2, 2), (2, 32, 2, 2, 2)]
    down = tuple(torch.randn(shape, generator=generator) for shape in shapes)
    mid = torch.randn(shapes[-1], generator=generator)
    same_as_stock(model, sample_of(clip), clip, down_block_additional_residuals=down)
    same_as_stock(model, sample_of(clip), clip, mid_block_additional_residual=mid)
    both = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
    same_as_stock(model, sample_of(clip), clip, **both)


def test_parity_plain_groupnorm():
    model, clip = tiny_unet(use_inflated_groupnorm=False), Clip()
    same_as_stock(model, sample_of(clip), clip)


def test_parity_centered_input(model):
    model.register_to_config(center_input_sample=True)
    clip = Clip()
    same_as_stock(model, sample_of(clip), clip)


def test_parity_bfloat16(model):
    clip = Clip(dtype=torch.bfloat16)
    same_as_stock(model.to(torch.bfloat16), sample_of(clip), clip)


def test_gradients_are_stock(model):
    """With gradients enabled nothing is cached, and gradients are the stock forward's."""
    clip = Clip()
    before, gradients = memory(model), []
    apply_teacache(model, 8, 9.0)
    for forward in (stock(model), model):
        set_memory(model, before)
        model.zero_grad()
        forward(sample_of(clip), timestep=500, **clip.inputs).sample.square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert gradients[0] and equal(*gradients)
    assert "teacache" not in vars(model)


def test_no_guidance_in_the_pipeline_is_a_clear_line(model):
    """memo's pipeline then passes a 0-d emotion, on which the stock forward fails."""
    clip = Clip(guided=False)
    inputs = {**clip.inputs, "audio_emotion": torch.tensor(3)}
    with torch.no_grad(), pytest.raises(IndexError):
        stock(model)(sample_of(clip), timestep=500, **inputs)
    apply_teacache(model, 8, 0.15)
    with torch.no_grad(), pytest.raises(ValueError, match="guidance_scale > 1"):
        model(sample_of(clip), timestep=500, **inputs)


def test_a_skipped_step_runs_four_layers(model):
    """conv_in, conv_norm_out, conv_act and conv_out; no block, no time embedding."""
    calls, clip = [], Clip()
    for name, module in model.named_modules():
        if not list(module.children()):
            module.register_forward_hook(lambda *_, name=name: calls.append(name))
    apply_teacache(model, num_steps=8, rel_l1_thresh=9.0)
    counts = []
    denoise(model, clip, before_step=lambda i: (counts.append(list(calls)), calls.clear()))
    skipped = ["conv_in", "conv_norm_out", "conv_act", "conv_out"]
    steps = [*counts[1:], calls]
    assert model.teacache.schedule == [True] + [False] * 6 + [True]
    assert steps[1:-1] == [skipped] * 6
    assert len(steps[0]) == len(steps[-1]) > 40 and set(skipped) < set(steps[0])


def test_import_needs_no_memo():
    source = inspect.getsource(teacache_memo)
    assert "\nfrom memo" not in source and "\nimport memo" not in source


def test_output_class_is_memos(model):
    clip = Clip()
    apply_teacache(model, 8, 0.15)
    with torch.no_grad():
        output = model(sample_of(clip), timestep=500, **clip.inputs)
        assert type(output).__module__ == type(model).__module__ and type(output).__name__ == "UNet3DConditionOutput"
    assert output.sample.shape == (2, LATENTS, 2, 4, 4) and isinstance(model, memo.UNet3DConditionModel)
