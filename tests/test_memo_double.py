"""The double keeps memo's interface: names, signatures, structures, order of calls, memory. Needs the real memo."""

import ast
import importlib
import importlib.util
import inspect
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import MEMO_DOUBLE
from memo_models import REFERENCE, UNET, Clip, package, real, tiny_pipeline
from test_memo_cli import call

pytestmark = real

MODULES = sorted(p.relative_to(MEMO_DOUBLE / "memo").as_posix() for p in (MEMO_DOUBLE / "memo").rglob("[a-z]*.py"))
SIMPLER = {  # inside the blocks the double has parts of its own
    "models/resnet.py": {"each_frame", "ResnetBlock3D.__init__"},
    "models/unet_3d_blocks.py": {"flat", "Transformer3DModel", "AudioModule", "Layer", "__init__", "down", "up"},
    "models/motion_module.py": {"MemoryLinearAttnTemporalModule.__init__"},
    "models/unet_2d_condition.py": {"__init__"},
}


def signatures(path):
    """{"Class.method" or "function": its parameters with their defaults as text}, without importing the file."""
    found = {}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        for function in node.body if isinstance(node, ast.ClassDef) else [node]:
            if isinstance(function, ast.FunctionDef):
                for arg in ast.walk(function.args):  # types are not compared
                    vars(arg).pop("annotation", None) or setattr(arg, "annotation", None)
                key = f"{node.name}.{function.name}" if node is not function else function.name
                found[key] = ast.unparse(function.args)
    return found


@pytest.mark.parametrize("module", MODULES)
def test_signatures(module):
    """Each function of the double's is memo's, with its parameters, their order and their defaults."""
    ours, theirs = (signatures(folder / module) for folder in (MEMO_DOUBLE / "memo", Path(package.__file__).parent))
    assert set(ours) & set(theirs), "nothing was compared"
    for name, signature in ours.items():
        if not {name, *name.split(".")} & SIMPLER.get(module, set()):
            assert signature == theirs.get(name), name


@pytest.fixture(scope="module")
def double():
    """The double under another name, beside the real memo."""
    folder = MEMO_DOUBLE / "memo"
    spec = importlib.util.spec_from_file_location(
        "memo_double", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:  # as import_memo does, where xformers is not installed
        patch.setitem(sys.modules, "xformers", sys.modules.get("xformers", ModuleType("xformers")))
        patch.setitem(sys.modules, "xformers.ops", sys.modules.get("xformers.ops", ModuleType("xformers.ops")))
        sys.modules["memo_double"] = module
        spec.loader.exec_module(module)
        yield lambda name: importlib.import_module(f"memo_double.{name}")
        for name in [name for name in sys.modules if name.split(".")[0] == "memo_double"]:
            del sys.modules[name]


@pytest.fixture(scope="module")
def unets(double):
    """The same tiny model, real and double."""
    models = []
    for load in (lambda name: importlib.import_module(f"memo.{name}"), double):
        model = load("models.unet_3d").UNet3DConditionModel(**UNET).eval()
        model.register_to_config(center_input_sample=False)
        attention, processor = load("models.motion_module"), load("models.attention_processor")
        memories = [m for m in model.modules() if isinstance(m, attention.MemoryLinearAttention)]
        assert memories and not any(isinstance(m.processor, processor.MemoryLinearAttnProcessor) for m in memories)
        for module in memories:
            module.set_processor(processor.MemoryLinearAttnProcessor())
        models.append((model, memories))
    return models


def shape_of(thing):
    """Structure with shapes in place of tensors."""
    if torch.is_tensor(thing):
        return tuple(thing.shape)
    if isinstance(thing, dict):
        return {key: shape_of(value) for key, value in thing.items()}
    if isinstance(thing, (list, tuple)):
        return type(thing).__name__, [shape_of(value) for value in thing]
    return thing


def record(model, clip, **kwargs):
    """What each block, and each layer that stands alone, is given and gives, in order."""
    calls, names = [], {model.mid_block: "mid"}
    for kind in ("down_blocks", "up_blocks"):
        names |= {block: f"{kind}[{i}]" for i, block in enumerate(getattr(model, kind))}
    for name in ("conv_in", "conv_norm_out", "conv_act", "conv_out", "time_proj", "time_embedding"):
        names[getattr(model, name)] = name

    def hook(module, args, given, output):
        calls.append((names[module], shape_of(args), shape_of(given), shape_of(output)))

    hooks = [module.register_forward_hook(hook, with_kwargs=True) for module in names]
    with torch.no_grad():
        sample = torch.zeros(1 + clip.guided, *clip.shape[1:])
        output = model(sample, timestep=500, **clip.inputs, **kwargs)
    for handle in hooks:
        handle.remove()
    return calls, type(output).__name__, shape_of(output)


@pytest.mark.parametrize("size", [(4, 4), (5, 6)])
@pytest.mark.parametrize("guided", [True, False])
def test_calls_of_the_blocks(unets, size, guided):
    """The same blocks in the same order, the same arguments by name, the same shapes in and out."""
    clip = Clip(size=size, guided=guided)
    (real, _), (double, _) = unets
    for return_dict in (True, False):
        assert record(double, clip, return_dict=return_dict) == record(real, clip, return_dict=return_dict)


def test_memory(unets):
    """When it is begun anew, when it grows and when it stays; its keys, its place and its size for each place."""
    clips, states = [Clip(seed=0), Clip(seed=1)], []
    for model, memories in unets:
        told, before = [], None
        for clip, first, writes in [(0, 1, 1), (0, 1, 0), (1, 0, 0), (1, 0, 1), (1, 1, 0)]:
            with torch.no_grad():
                sample = torch.zeros(2, *clips[clip].shape[1:])
                news = {"is_new_audio": bool(first), "update_past_memory": bool(writes)}
                model(sample, timestep=1, **clips[clip].inputs, **news)
            now = [dict(m.processor.memory) for m in memories]
            same = before and all(torch.equal(a[key], b[key]) for a, b in zip(before, now) for key in ("KV", "Z"))
            assert {key for m in now for key in m} == {"KV", "Z"}
            told.append((same, {shape_of(m["KV"])[1:] for m in now}, {shape_of(m["Z"])[1:] for m in now}))
            before = now
        for m in memories:
            m.processor.reset_memory_state()
        assert all(m.processor.memory == {"KV": None, "Z": None} for m in memories)
        states.append(told)
    assert states[0] == states[1]
    assert [same for same, _, _ in states[0]] == [None, True, True, False, False]


def test_reference_features_have_one_structure(double):
    found = []
    for module in (importlib.import_module("memo.models.unet_2d_condition"), double("models.unet_2d_condition")):
        model = module.UNet2DConditionModel(**REFERENCE).eval()
        model.register_to_config(center_input_sample=False)
        with torch.no_grad():
            face, pictures = torch.randn(2, 4, 16), torch.randn(6, 4, 5, 6)
            found.append(shape_of(model(pictures, torch.tensor(0), encoder_hidden_states=face, return_dict=False)))
    assert found[0] == found[1]


def test_the_pipelines_call_the_network_alike(double):
    """Names, shapes, types and flags of every call in a clip, with the same parts: first clip and a later one."""
    parts = tiny_pipeline()[0].components
    told = []
    for module in (importlib.import_module("memo.pipelines.video_pipeline"), double("pipelines.video_pipeline")):
        pipeline, calls = module.VideoPipeline(**parts), []
        pipeline.set_progress_bar_config(disable=True)
        unet_call = type(pipeline.diffusion_net).forward

        def forward(self, *args, calls=calls, unet_call=unet_call, **kwargs):
            given = inspect.signature(unet_call).bind(self, *args, **kwargs).arguments
            calls.append({k: (shape_of(v), getattr(v, "dtype", None)) for k, v in given.items() if k != "self"})
            calls[-1]["uc_mask"] = given["uc_mask"].tolist()
            return unet_call(self, *args, **kwargs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(pipeline.diffusion_net), "forward", forward)
            for first in (True, False):
                pipeline(**call(is_new_audio=first))
        told.append(calls)
    assert len(told[0]) == 6 and told[0] == told[1]
    assert [call["update_past_memory"][0] for call in told[0]] == [True, False, False] * 2
