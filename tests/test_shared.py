"""What both scripts share is the same text, each stands alone, and all stay short: read from the shipped files."""

import ast
import sys

import pytest
from conftest import ROOT

FOLDERS = "TeaCache4LuminaT2X", "TeaCache4Memo"
SCRIPTS = "TeaCache4LuminaT2X/teacache_lumina2.py", "TeaCache4Memo/teacache_memo.py"
PAIRS = {  # the two files, and what both must have, word for word
    "scripts": (
        *SCRIPTS,
        "Branch TeaCacheState relative_l1 is_due apply_teacache remove_teacache check_settings DEFAULTS DAMPING CURVATURE",
    ),
}


def read(path):
    return (ROOT / path).read_text(encoding="utf-8")


def files(folder):
    """The modules of a folder, the script first."""
    return sorted((ROOT / folder).glob("*.py"), key=lambda path: not path.name.startswith("teacache_"))


def texts(source):
    """{name: whole lines, comments and decorators and all} of functions, classes and constants."""
    found, lines = {}, source.splitlines()
    for node in ast.parse(source).body:
        name = getattr(node, "name", None) or getattr(getattr(node, "targets", [None])[0], "id", None)
        if name:
            first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
            found[name] = "\n".join(lines[first - 1 : node.end_lineno])
    return found


def differences(one, other, names):
    one, other = texts(one), texts(other)
    return {name for name in names if one.get(name, 1) != other.get(name, 2)}


@pytest.mark.parametrize("pair", PAIRS)
def test_the_same_text(pair):
    one, other, names = PAIRS[pair]
    assert differences(read(one), read(other), names.split()) == set()


@pytest.mark.parametrize("pair", PAIRS)
def test_this_test_sees_a_difference(pair):
    """Each shared piece is changed once, by no more than a comment; then it is missing."""
    one, other, names = PAIRS[pair]
    one, other = read(one), read(other)
    for name in names.split():
        text = texts(other)[name]
        assert other.count(text) == 1, name
        assert differences(one, other.replace(text, text + "  # changed"), names.split()) == {name}
        assert differences(one, other.replace(text, "pass"), names.split()) == {name}


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
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            found |= {name} & {"import_module", "__import__", "exec", "eval", "run_path"}
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
    assert len(tools) == (4 if folder == FOLDERS[0] else 2)


def test_lumina2s_script_imports_only_numpy_torch_and_diffusers():
    found = {name.split(".")[0] for name in imports(read(SCRIPTS[0]))}
    assert found - set(sys.stdlib_module_names) == {"numpy", "torch", "diffusers"}


def test_lines():
    lengths = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for f in FOLDERS for path in files(f)}
    assert lengths.pop("teacache_lumina2.py") <= 400 and lengths.pop("teacache_memo.py") <= 450, lengths
    assert max(lengths.values()) <= 200 and sum(lengths.values()) <= 1700 - 400 - 450
