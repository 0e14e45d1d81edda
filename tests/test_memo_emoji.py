"""The bundled talking emoji: what lies in its folder, and that it talks (with the real memo)."""

import json
import sys

import pytest
import torch
from conftest import ROOT
from memo_models import real
from safetensors.torch import load_file

from TeaCache4Memo import teacache_memo

FOLDER = ROOT / "assets" / "memo-emoji"


def test_the_folder_is_complete():
    """Each part has its weights, and the class that memo or diffusers loads it with."""
    classes = {"diffusion_net": "UNet3DConditionModel", "reference_net": "UNet2DConditionModel", "vae": "AutoencoderKL"}
    classes |= {"image_proj": "ImageProjModel", "audio_proj": "AudioProjModel"}
    for name, its_class in classes.items():
        assert list((FOLDER / name).glob("*.safetensors"))
        assert json.loads((FOLDER / name / "config.json").read_text())["_class_name"] == its_class
    assert set(classes) - {"audio_proj"} < set(json.loads((FOLDER / "model_index.json").read_text()))
    assert sum(path.stat().st_size for path in FOLDER.rglob("*")) < 40e6


def test_the_example_is_what_memos_functions_would_give(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    example, config = load_file(FOLDER / "example.safetensors"), teacache_memo.choose_config()
    inputs = teacache_memo.prepare(*teacache_memo.find_inputs(config), config, tmp_path)
    for name in ("pixel_values", "face_emb", "audio_emb", "audio_emotion"):
        assert torch.equal(getattr(inputs, name), example[name]), name
    assert inputs.sound.read_bytes() == (FOLDER / "example.wav").read_bytes() and inputs.num_frames == 32
    assert inputs.audio_emb.shape == (32, 5, 2, 32) and inputs.num_emotion_classes == 9


@pytest.fixture(scope="module")
def emoji():
    """evaluate.py, the loaded pipeline, its config and the held-out voices."""
    sys.path.insert(0, str(FOLDER))
    import evaluate
    from omegaconf import OmegaConf

    config = OmegaConf.load(FOLDER / "config.yaml")
    config.inference_steps = 10
    table = load_file(FOLDER / "voices.safetensors")
    voices = [{name: rows[i] for name, rows in table.items()} for i in range(2)]
    yield evaluate, teacache_memo.load_pipeline(str(FOLDER), device="cpu", dtype="fp32"), config, voices
    sys.path.remove(str(FOLDER))


@real
def test_it_talks(emoji):
    """The mouth follows its own voice, also with half of the steps, and not the other one."""
    evaluate, parts, config, voices = emoji
    for settings in ({}, {"computed_steps": 5}):
        videos = [evaluate.speak(*parts, config, voice, i, **settings)[0] for i, voice in enumerate(voices)]
        mouths = [evaluate.mouth_opening(video) for video in videos]
        own = [evaluate.correlation(mouth, v["opening"]) for mouth, v in zip(mouths, voices)]
        assert min(own) > 0.7, own
        openings = load_file(FOLDER / "voices.safetensors")["opening"]
        for i, mouth in enumerate(mouths):
            others = [evaluate.correlation(mouth, o) for j, o in enumerate(openings) if j != i]
            assert abs(sum(others) / len(others)) < 0.2, others


@real
def test_figures_of_the_benchmark_in_short(emoji):
    """Two voices of two clips, 20 steps: passes of a clip, PSNR to the uncached video, mouth; see tests/benchmarks."""
    evaluate, parts, config, voices = emoji
    config = config.copy()
    config.inference_steps = 20
    passes, fidelity, mouths = {}, {}, []
    ways = {"threshold": {"rel_l1_thresh": 0.15}, "number": {"computed_steps": 14}}
    for i, voice in enumerate(voices):
        stock = evaluate.speak(*parts, config, voice, i, rel_l1_thresh=0.0, clips=2)[0]
        for name, limit in ways.items():
            video, _, schedule = evaluate.speak(*parts, config, voice, i, clips=2, **limit)
            passes.setdefault(name, []).append(sum(schedule) / 2)
            fidelity.setdefault(name, []).append(-10 * ((video - stock) / 2).square().mean().log10().item())
            mouths.append(evaluate.correlation(evaluate.mouth_opening(video), voice["opening"][:32]))
    assert all(9 <= count <= 12 for count in passes["threshold"]), passes
    assert passes["number"] == [14, 14], passes
    assert min(fidelity["number"]) > 45, fidelity
    assert min(mouths) > 0.8, mouths
