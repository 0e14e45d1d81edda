"""teacache_forward against memo's own forward: bit for bit where nothing is skipped, as the oracle's where it is."""

import pytest
import torch
from conftest import equal, on_device
from machines import Memo, kept, randn
from memo_models import ONE_LEVEL, ONE_LEVEL_REFERENCE, Clip, denoise, memory, set_memory, tiny_reference, tiny_unet

from TeaCache4Memo.teacache_memo import apply_teacache, remove_teacache

STEPS, MACHINE = 8, Memo()


@pytest.fixture
def model():
    return tiny_unet()


def sample_of(clip, seed=5):
    batch = 1 + clip.guided
    return randn((batch, *clip.shape[1:]), seed).to(clip.dtype)


def ways_off(model):
    """All the ways in which nothing may be skipped, and the steps that never are: the first and the last."""
    yield "threshold 0", lambda: apply_teacache(model, num_steps=8, rel_l1_thresh=0)
    yield "enable_teacache = False", lambda: setattr(apply_teacache(model, 8, 9.0), "enable_teacache", False)
    yield "the last step", lambda: apply_teacache(model, num_steps=1, rel_l1_thresh=9.0)
    yield "the first step", lambda: apply_teacache(model, num_steps=8, rel_l1_thresh=9.0)
    yield "the first step of a budget", lambda: apply_teacache(model, num_steps=8, computed_steps=2)


def same_as_stock(model, clip, timestep=500, **more):
    """Output and memory for calls of a first and a later clip, each way off. Returns the outputs."""
    sample, inputs, outputs = sample_of(clip), on_device({**clip.inputs, **more}), []
    for first, writes in ((True, False), (False, True), (False, False)):
        news = {"is_new_audio": first, "update_past_memory": writes}
        before = memory(model)
        with torch.no_grad():
            expected = MACHINE.stock(model)(sample, timestep=timestep, **inputs, **news)
        expected_memory = memory(model)
        for way, switch in ways_off(model):
            set_memory(model, before)
            switch()
            with torch.no_grad():
                found = model(sample, timestep=timestep, **inputs, **news)
            assert type(found) is type(expected), way
            assert torch.equal(found[0], expected[0]) and found[0].dtype == clip.dtype, way
            assert equal(memory(model), expected_memory), way
            remove_teacache(model)
        outputs.append(expected[0])
    return outputs


@pytest.mark.gpu
@pytest.mark.parametrize("return_dict", [True, False])
@pytest.mark.parametrize("guided", [True, False])
def test_parity(model, guided, return_dict):
    clip = Clip(guided=guided)
    assert (clip.inputs["uc_mask"] is not None) == guided
    same_as_stock(model, clip, return_dict=return_dict)


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
    same_as_stock(model, Clip(), timestep=timestep)


@pytest.mark.gpu
def test_parity_additional_inputs():
    """mask_cond_fea, class labels and residuals as a ControlNet gives them, on sides that cannot be halved evenly."""
    generator = torch.Generator().manual_seed(1)
    shapes = [(2, 32, 2, 5, 7), (2, 32, 2, 5, 7), (2, 32, 2, 3, 4), (2, 32, 2, 3, 4)]
    down = tuple(torch.randn(shape, generator=generator) for shape in shapes)
    model, clip = tiny_unet(num_class_embeds=5, use_inflated_groupnorm=False), Clip(size=(5, 7))
    labels = {"class_labels": torch.tensor([1, 4])}
    extra = {"mask_cond_fea": torch.randn(shapes[0], generator=generator), "down_block_additional_residuals": down}
    extra["mid_block_additional_residual"] = torch.randn(shapes[-1], generator=generator)
    plain, given = (same_as_stock(model, clip, **labels, **more) for more in ({}, extra))
    assert not any(map(torch.equal, plain, given))


def test_parity_attention_mask():
    """memo hands it to the attention among places and among audio tokens, at every level: one level, 4 of each."""
    model = tiny_unet(**ONE_LEVEL)
    clip = Clip(size=(2, 2), reference=tiny_reference(**ONE_LEVEL_REFERENCE))
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]])  # (batch * frames, tokens)
    assert not any(map(torch.equal, same_as_stock(model, clip, attention_mask=mask), same_as_stock(model, clip)))


@pytest.mark.gpu
def test_parity_centered_input_in_bfloat16(model):
    model.register_to_config(center_input_sample=True)
    same_as_stock(model.to(torch.bfloat16), Clip(dtype=torch.bfloat16))


def test_gradients_are_stock(model):
    """With gradients enabled nothing is cached, and gradients are the stock forward's."""
    clip = Clip()
    before, gradients = memory(model), []
    apply_teacache(model, 8, 9.0)
    denoise(model, clip, steps=3)  # stops in the middle of a generation, with a cache
    assert kept(model)
    for forward in (MACHINE.stock(model), model):
        set_memory(model, before)
        model.zero_grad()
        forward(sample_of(clip), timestep=500, **clip.inputs).sample.square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert gradients[0] and equal(*gradients)
    assert model.teacache.schedule == [True] and kept(model) == []


# --- steps that are skipped -----------------------------------------------------------------------


MORE = [{}, {"guided": False}, {"mask_cond_fea": 3 * torch.ones(2, 32, 2, 4, 4)}, {"dtype": torch.bfloat16}]


@pytest.mark.parametrize("more", MORE, ids=["plain", "no guidance", "mask_cond_fea", "bfloat16"])
def test_steps_are_those_of_the_oracle(model, more):
    """Every output is the oracle's, bit for bit, at several thresholds: computed ones are the stock forward's."""
    model.register_to_config(center_input_sample=bool(more))
    clip, counts = Clip(**more), []
    model.to(clip.dtype)
    length = MACHINE.path(model, clip)
    for share in (0.1, 0.35, 9):
        expected, latents, schedule = MACHINE.oracle(model, clip, rel_l1_thresh=share * length)
        expected_memory = memory(model)
        apply_teacache(model, STEPS, share * length)
        assert equal(denoise(model, clip), (expected, latents))
        assert equal(memory(model), expected_memory) and model.teacache.schedule == schedule
        counts.append(sum(schedule))
        remove_teacache(model)
    assert counts[0] > counts[1] > counts[2] == 2
