"""The two folders share nothing at run time: what files of both have must be the same text."""

import ast

import pytest
from conftest import ROOT

ATTRIBUTES = {"SETTINGS", "DAMPING"}  # module constants that are part of the shared code of the scripts
PAIRS = {  # file of one model, of the other, what both must have, what differs by design
    "script": (
        "TeaCache4LuminaT2X/teacache_lumina2.py",
        "TeaCache4Memo/teacache_memo.py",
        {"Branch", "TeaCacheState", "warn_of_steps", "relative_l1", "rescale", "count", "due", "SETTINGS", "DAMPING"}
        | {"check_settings", "apply_teacache", "remove_teacache", "forward_slot", "fail", "beside", "explain"},
        {"teacache_forward", "generate", "main", "run"},
    ),
    "options": (
        "TeaCache4LuminaT2X/options_lumina2.py",
        "TeaCache4Memo/options_memo.py",
        {"tell", "note", "is_out_of_memory"},
        {"parse", "check", "why"},
    ),
    "batch": (
        "TeaCache4LuminaT2X/batch_lumina2.py",
        "TeaCache4Memo/batch_memo.py",
        {"read_lines", "name", "finished", "work", "watched"},
        {"read", "draw", "SETTINGS"},
    ),
}


def read(path):
    return (ROOT / path).read_text(encoding="utf-8")


def texts(source):
    """{name: source text, comments and decorators and all} of functions, classes and the shared constants."""
    found, lines = {}, source.splitlines()
    for node in ast.parse(source).body:
        name = getattr(node, "name", None)
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) in ATTRIBUTES:
            name = node.targets[0].id
        if name:
            first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
            found[name] = "\n".join(lines[first - 1 : node.end_lineno])
    return found


def differences(one, other, differ):
    """Names that both sources define, each with another text."""
    one, other = texts(one), texts(other)
    return {name for name in one.keys() & other.keys() if one[name] != other[name]} - differ


@pytest.mark.parametrize("pair", PAIRS)
def test_what_both_have_is_the_same_text(pair):
    one, other, must_share, differ = PAIRS[pair]
    one, other = read(one), read(other)
    assert differences(one, other, differ) == set()
    assert must_share <= texts(one).keys() & texts(other).keys()


@pytest.mark.parametrize("pair", PAIRS)
def test_this_test_sees_a_difference(pair):
    """Each shared piece is changed once, by no more than a comment."""
    one, other, must_share, differ = PAIRS[pair]
    one, other = read(one), read(other)
    for name in must_share:
        text = texts(other)[name]
        assert other.count(text) == 1, name
        assert differences(one, other.replace(text, text + "  # changed"), differ) == {name}


def test_scripts_do_not_import_each_other():
    for folder, other in (("TeaCache4LuminaT2X", "memo"), ("TeaCache4Memo", "lumina")):
        for path in (ROOT / folder).glob("*.py"):
            imports = [line for line in read(path).splitlines() if line.strip().startswith(("import ", "from "))]
            own = {"memo": ("TeaCache4Memo", "teacache_memo"), "lumina": ("TeaCache4LuminaT2X", "teacache_lumina2")}
            assert not [line for line in imports if any(name in line for name in own[other])], path
