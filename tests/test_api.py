"""How both scripts are switched on and off in other people's code."""

import inspect
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import LUMINA2, ROOT, equal
from machines import kept

THRESH = dict(rel_l1_thresh=0.1)


def test_apply_touches_one_instance_and_remove_leaves_nothing(machine):
    model, other, job = machine.model(), machine.model(1), machine.job()
    before, forward = set(vars(model)), machine.cls.forward
    stock = machine.denoise(model, job)
    assert machine.apply(model, **THRESH) is model
    assert machine.cls.forward is forward and "forward" not in vars(other)
    with pytest.raises(ZeroDivisionError):
        machine.denoise(model, job, before=lambda step, branch, count: 1 / (5 - step))
    assert kept(model), "an interrupted generation holds its cache..."
    assert machine.script.remove_teacache(model) is model
    assert set(vars(model)) == before, "...and remove_teacache lets it go"
    assert equal(machine.denoise(model, job), stock)
    before = set(vars(other))
    assert set(vars(machine.script.remove_teacache(other))) == before, "also what was never applied"


@pytest.fixture
def patched_class(machine, monkeypatch):
    """The original way of TeaCache, with all the attributes that existing code sets."""
    monkeypatch.setattr(machine.cls, "forward", machine.script.teacache_forward)
    settings = dict(enable_teacache=True, num_steps=8, rel_l1_thresh=0.1, coefficients=[1.0, 0.0])
    old = dict(cnt=0, accumulated_rel_l1_distance=0, previous_modulated_input=None, previous_residual=None)
    for name, value in (settings | old).items():
        monkeypatch.setattr(machine.cls, name, value, raising=False)
    return machine.cls


def test_the_way_of_class_attributes(machine, patched_class, monkeypatch):
    """As the instance way, image after image; the old attributes are not touched; two models do not mix."""
    model, other, jobs = machine.model(), machine.model(1), (machine.job(), machine.job(1))
    for each in (0, 1, 0):
        expected = machine.oracle((model, other)[each], jobs[each], **THRESH)
        assert equal(machine.denoise((model, other)[each], jobs[each]), expected[:2])
        assert (model, other)[each].teacache.schedule == expected[2] and False in expected[2]
    assert patched_class.cnt == 0 and patched_class.previous_residual is None
    assert patched_class.previous_modulated_input is None and patched_class.accumulated_rel_l1_distance == 0
    monkeypatch.setattr(patched_class, "enable_teacache", False)
    assert equal(machine.denoise(model, jobs[0]), machine.denoise(machine.stock(model), jobs[0]))


def test_removed_from_one_instance_of_a_patched_class(machine, patched_class):
    """Its class keeps the forward and the settings: it is switched off, until it is applied again."""
    model, other, job = machine.model(), machine.model(1), machine.job()
    stock = machine.denoise(machine.stock(model), job)
    for _ in range(2):
        machine.script.remove_teacache(model)
        assert equal(machine.denoise(model, job), stock)
    machine.denoise(other, job)
    assert False in other.teacache.schedule
    machine.apply(model, computed_steps=3)
    machine.denoise(model, job)
    assert sum(model.teacache.schedule) == 3


def test_class_attributes_and_constants(machine, patched_class, monkeypatch):
    """A class that sets one limit goes before the constants; a budget goes before a threshold, an instance before both."""
    model, job = machine.model(), machine.job()

    def schedule():
        machine.denoise(model, job)
        return model.teacache.schedule

    monkeypatch.setattr(machine.script, "COMPUTED_STEPS", 3)
    assert schedule() == machine.oracle(model, job, **THRESH)[2] != machine.oracle(model, job, computed_steps=3)[2]
    monkeypatch.setattr(patched_class, "computed_steps", 5, raising=False)
    assert sum(schedule()) == 5
    machine.apply(model)
    assert sum(schedule()) == 3, "nothing given: the constants, whatever the class has"
    monkeypatch.setattr(machine.script, "COMPUTED_STEPS", [0, 1, 3, 7])
    assert schedule() == [i in (0, 1, 3, 7) for i in range(8)], "edited after apply_teacache, too"
    monkeypatch.setattr(machine.script, "COMPUTED_STEPS", 3)
    machine.script.remove_teacache(model)
    del model.enable_teacache  # which switches this one off, where its class is on
    assert sum(schedule()) == 5
    for name in ("rel_l1_thresh", "computed_steps"):
        monkeypatch.setattr(patched_class, name, None)
    assert sum(schedule()) == 3, "nothing set: the constants"
    constants = {"NUM_INFERENCE_STEPS": 8, "COEFFICIENTS": [1e9], "COMPUTED_STEPS": None, "REL_L1_THRESH": 3e9}
    for name, value in constants.items():
        monkeypatch.setattr(machine.script, name, value)
    monkeypatch.delattr(patched_class, "num_steps")
    monkeypatch.delattr(patched_class, "coefficients")
    assert schedule() == [i in (0, 3, 6, 7) for i in range(8)]
    monkeypatch.delattr(patched_class, "enable_teacache")
    assert schedule() == [True] * 8, "off"


@pytest.mark.parametrize(
    "settings, says",
    [
        *[(dict(num_steps=n), "whole number of at least 1") for n in (0, -3, 2.5, math.inf, math.nan)],
        *[(dict(rel_l1_thresh=t), "must be a number of at least 0") for t in (-0.1, math.nan, math.inf)],
        *[(dict(num_steps=8, computed_steps=k), "whole number from 2 to 8") for k in (-1, 0, 1, 9, 2.5, math.nan)],
        (dict(num_steps=1, computed_steps=2), "from 1 to 1"),
        *[(dict(computed_steps=k), "rising") for k in ([], [1, 5], [0, 5, 3], [0, 2.5, 4], [0, 0])],
        (dict(num_steps=8, computed_steps=[0, 4, 8]), "a list for 9 steps, not for 8"),
        (dict(computed_steps=[0, 4, 8]), "a list for 9 steps, not for"),  # the constant
        (dict(rel_l1_thresh=0.0, computed_steps=4), "not both"),
        *[(dict(coefficients=[c, 0.0]), "coefficients must be finite") for c in (math.nan, -math.inf)],
    ],
    ids=str,
)
def test_settings_that_cannot_work(machine, settings, says):
    model = machine.model()
    before = set(vars(model))
    with pytest.raises(ValueError, match=says) as error:
        machine.script.apply_teacache(model, **settings)
    assert "\n" not in str(error.value) and set(vars(model)) == before, "one line, and the model is as it was"


@pytest.mark.parametrize("constant, value", [("COMPUTED_STEPS", 9), ("REL_L1_THRESH", -1)])
def test_constants_that_cannot_work(machine, monkeypatch, constant, value):
    """Refused where they hold; a setting that is given goes before them."""
    monkeypatch.setattr(machine.script, constant, value)
    with pytest.raises(ValueError, match=f"{constant.lower()}.* must be"):
        machine.script.apply_teacache(machine.model(), 8)
    machine.script.apply_teacache(machine.model(), 8, computed_steps=4)


def test_defaults_and_what_is_positional(machine):
    """Nothing is copied from the constants; one computed step of one is possible; computed_steps goes by name."""
    script = machine.script
    names = ["model", "num_steps", "rel_l1_thresh", "coefficients"]
    kinds = {p.name: p.kind for p in inspect.signature(script.apply_teacache).parameters.values()}
    assert [n for n, kind in kinds.items() if kind is inspect.Parameter.POSITIONAL_OR_KEYWORD] == names

    def values(*args, **kwargs):
        model = script.apply_teacache(machine.model(), *args, **kwargs)
        settings = ("num_steps", "rel_l1_thresh", "coefficients", "computed_steps")
        return [vars(model)[name] for name in ("enable_teacache", *settings)]

    assert values() == [True, None, None, None, None]
    assert values(9, 0.2, [1.0]) == [True, 9, 0.2, [1.0], None]
    assert values(1, computed_steps=1) == [True, 1, None, None, 1]


OTHER_TYPES = [(steps, {"computed_steps": 4}) for steps in (np.int64(4), 4.0, torch.tensor(4))]
OTHER_TYPES += [(steps, {"computed_steps": [0, 7]}) for steps in (range(0, 8, 7), np.array([0, 7]), [0.0, np.int64(7)])]
LINE = {"rel_l1_thresh": 0.3, "coefficients": [2.0, 0.01]}
OTHER_TYPES += [(coefficients, LINE) for coefficients in (np.array([2.0, 0.01]), (2, 0.01))]


@pytest.mark.parametrize("given, settings", OTHER_TYPES, ids=str)
def test_numbers_of_other_types(machine, given, settings):
    """As they come from arrays, command lines and JSON."""
    model, job = machine.model(), machine.job(guided=False)
    expected = machine.oracle(model, job, **settings)
    machine.apply(model, np.int64(8), **settings | {[*settings][-1]: given})
    assert equal(machine.denoise(model, job), expected[:2]) and model.teacache.schedule == expected[2]


# --- the forward -----------------------------------------------------------------------------


def test_its_parameters_are_the_stock_ones(machine):
    forwards = machine.script.teacache_forward, machine.models.STOCK_FORWARD
    ours, theirs = ([(p.name, p.default, p.kind) for p in inspect.signature(f).parameters.values()] for f in forwards)
    assert ours == theirs and len(ours) > 5


@pytest.mark.parametrize("way", [dict(rel_l1_thresh=1e9), dict(computed_steps=2)], ids=str)
def test_what_a_skipped_step_runs(machine, way):
    """By a threshold all but the blocks, and the norm that decides, in the first call; by a number of steps nothing.

    A computed step: what stock runs, and nothing else.
    """
    model, job, calls, hooks = machine.model(), machine.job(), [], []
    for name, module in [*model.named_modules()][1:]:  # the first is the model itself
        hooks.append(module.register_forward_pre_hook(lambda *_, name=name: calls[-1].append(name)))

    def run(forward):
        calls.clear()
        machine.denoise(forward, job, before=lambda *_: calls.append([]))
        return list(calls)

    stock = run(machine.stock(model))[0]
    machine.apply(model, **way)
    found = run(model)
    for hook in hooks:  # older diffusers have one SiLU for all models
        hook.remove()
    assert model.teacache.schedule == [True] + [False] * 6 + [True]
    blocks = {name for name in stock if name.startswith(("layers.", "down_blocks", "mid_block", "up_blocks"))}
    norm = {name for name in stock if name.startswith("layers.0.norm1")}
    assert {"layers.0.attn", "mid_block"} & blocks
    for i, names in enumerate(found):
        step, is_first = i // machine.passes, i % machine.passes == 0
        if "computed_steps" in way and 0 < step < 7:
            assert names == []
        else:
            assert [name for name in names if name not in blocks] == [name for name in stock if name not in blocks]
            assert blocks & set(names) == (blocks if step in (0, 7) else norm if is_first else set())


def test_import_does_nothing(tmp_path):
    """Neither to the libraries nor to torch's settings, and nothing is printed or written."""
    scripts = ["TeaCache4LuminaT2X.teacache_lumina2"] * LUMINA2 + ["TeaCache4Memo.teacache_memo"]
    code = f"""
import sys, torch, diffusers, types
stand_ins = {{name: types.ModuleType(name) for name in ("xformers", "xformers.ops")}}
sys.modules.update(stand_ins)
import memo.models.unet_3d as unet, memo.pipelines.video_pipeline, memo.models.audio_proj, memo.models.image_proj
for name in stand_ins: del sys.modules[name]
classes = [unet.UNet3DConditionModel, getattr(diffusers, "Lumina2Transformer2DModel", object)]
def world():
    return ([dict(vars(c)) for c in classes], list(sys.path), torch.is_grad_enabled(), torch.get_num_threads(),
            torch.get_default_dtype(), torch.initial_seed(), torch.get_rng_state().sum().item(),
            torch.backends.cuda.matmul.allow_tf32, torch.are_deterministic_algorithms_enabled())
before, loaded = world(), set(sys.modules)
import {", ".join(scripts)}
after = world()
assert not [(a, b) for a, b in zip(before, after) if a != b]
assert not {{"flash_attn", "xformers", "peft"}} & (set(sys.modules) - loaded)
print("clean")
"""
    path = [str(ROOT), *[p for p in sys.path if os.path.isdir(os.path.join(p, "memo"))]]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=env)
    assert run.stdout == "clean\n", run.stderr
    assert list(tmp_path.iterdir()) == []
