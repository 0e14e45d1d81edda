"""The functions of the double are memo's, by name and signature. Needs the real memo.

What they do is seen by the tests of MEMO themselves, which run with either; only memo's functions for faces and voices
are the double's in both cases.
"""

import ast
from pathlib import Path

import pytest
from conftest import MEMO_DOUBLE
from memo_models import package, real

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


@real
@pytest.mark.parametrize("module", MODULES)
def test_signatures(module):
    """Each function of the double's is memo's, with its parameters, their order and their defaults."""
    ours, theirs = (signatures(folder / module) for folder in (MEMO_DOUBLE / "memo", Path(package.__file__).parent))
    assert set(ours) & set(theirs), "nothing was compared"
    for name, signature in ours.items():
        if not {name, *name.split(".")} & SIMPLER.get(module, set()):
            assert signature == theirs.get(name), name
