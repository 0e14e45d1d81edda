"""What both scripts share is the same text, and each stands alone: read from the shipped files."""

import ast
import re
import sys

import pytest
from conftest import ROOT

FOLDERS = "TeaCache4LuminaT2X", "TeaCache4Memo"
SCRIPTS = "TeaCache4LuminaT2X/teacache_lumina2.py", "TeaCache4Memo/teacache_memo.py"
OWN = "REL_L1_THRESH COMPUTED_STEPS NUM_INFERENCE_STEPS SEED MODEL NETWORK PACKAGE COEFFICIENTS".split()
OWN += "teacache_forward build_parser one_line_errors load_pipeline generate main".split()
SHARED = "relative_l1 rescale choose_steps extrapolate Corrector Guidance interpolate TeaCacheState Step".split()
SHARED += "Call is_same begin_call follow begin_image count_steps count_only new_generation watched finish_step".split()
SHARED += "is_corrected stand_in apply_teacache remove_teacache cached find_network find_forward is_stock".split()
SHARED += "check_plan check_settings CORRECT logger".split()


def read(path):
    return (ROOT / path).read_text(encoding="utf-8")


def files(folder):
    """The modules of a folder, the script first."""
    return sorted((ROOT / folder).glob("*.py"), key=lambda path: not path.name.startswith("teacache_"))


def texts(source):
    """{name: whole lines, comments and decorators and all} of functions, classes and constants."""
    found, lines = {}, source.splitlines()
    for node in ast.parse(source).body:
        targets = getattr(node, "targets", [getattr(node, "target", node)])
        for name in [name for target in targets if (name := getattr(target, "name", getattr(target, "id", None)))]:
            first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
            found[name] = "\n".join(lines[first - 1 : node.end_lineno])
    return found


def test_the_same_text():
    """Of every name that both define, but for those that are each script's own."""
    one, other = (texts(read(script)) for script in SCRIPTS)
    both = one.keys() & other.keys()
    assert {name for name in both if one[name] != other[name]} <= set(OWN)
    assert set(SHARED) <= both - set(OWN)
    assert all(one[name] != other[name] for name in OWN), "nothing is exempt without need"


def test_neither_script_speaks_of_the_other_model():
    assert not re.findall(r"\bmemo\b|\w*diffusion_net\w*", read(SCRIPTS[0]), re.I)
    assert not re.findall(r"lumina|\btransformer\b", read(SCRIPTS[1]), re.I)


def imports(source):
    """Every module that is imported anywhere in the source, and every name called `import...`."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            found |= {"." * node.level + (node.module or "")}
            found |= {"." * node.level + alias.name for alias in node.names if node.level}
        if isinstance(node, ast.Call):
            found |= {getattr(node.func, "attr", "")} & {"import_module", "run_path"}  # a module has eval()
            found |= {getattr(node.func, "id", "")} & {"import_module", "__import__", "exec", "eval", "run_path"}
    return found


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_script_needs_no_other_file_and_a_tool_its_script_alone(folder):
    (script, *tools), others = files(folder), {path.stem for f in FOLDERS for path in files(f)} | set(FOLDERS)
    found = {path.stem: imports(path.read_text(encoding="utf-8")) for path in (script, *tools)}
    for name, modules in found.items():
        assert not {"importlib", "import_module", "__import__", "exec", "eval", "run_path", "runpy"} & modules, name
        near = {m.lstrip(".").split(".")[0] for m in modules} & others
        allowed = {script.stem} if name != script.stem and not name.startswith("attention") else set()
        allowed |= {"attention_lumina2"} if name == "batch_lumina2" else set()
        assert near <= allowed, name
    assert len(tools) == (3 if folder == FOLDERS[0] else 2)


def test_lumina2s_script_imports_only_numpy_torch_and_diffusers():
    found = {name.split(".")[0] for name in imports(read(SCRIPTS[0]))}
    assert found - set(sys.stdlib_module_names) == {"numpy", "torch", "diffusers"}
