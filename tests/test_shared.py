"""The two scripts share nothing at run time: what both have must be the same text."""

import ast

from conftest import ROOT

DIFFER = {"teacache_forward", "parse", "load_pipeline", "generate", "main"}  # each model's own
ATTRIBUTES = {"SETTINGS", "DAMPING"}  # module constants that are part of the shared code
MUST_SHARE = {
    "Branch",
    "TeaCacheState",
    "relative_l1",
    "rescale",
    "count",
    "due",
    "SETTINGS",
    "DAMPING",
    "check_settings",
    "apply_teacache",
    "remove_teacache",
    "forward_slot",
    "fail",
    "explain",
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


def differences(one, other):
    """Names that both sources define, each with another text."""
    one, other = texts(one), texts(other)
    return {name for name in one.keys() & other.keys() if one[name] != other[name]} - DIFFER


SCRIPTS = read("TeaCache4LuminaT2X/teacache_lumina2.py"), read("TeaCache4Memo/teacache_memo.py")


def test_what_both_scripts_have_is_the_same_text():
    assert differences(*SCRIPTS) == set()
    assert MUST_SHARE <= texts(SCRIPTS[0]).keys() & texts(SCRIPTS[1]).keys()


def test_this_test_sees_a_difference():
    """Each shared piece is changed once, by no more than a comment."""
    for name in MUST_SHARE:
        text = texts(SCRIPTS[1])[name]
        assert SCRIPTS[1].count(text) == 1, name
        assert differences(SCRIPTS[0], SCRIPTS[1].replace(text, text + "  # changed")) == {name}


def test_scripts_do_not_import_each_other():
    for folder, other in (("TeaCache4LuminaT2X", "memo"), ("TeaCache4Memo", "lumina")):
        for path in (ROOT / folder).glob("*.py"):
            imports = [line for line in read(path).splitlines() if line.strip().startswith(("import ", "from "))]
            own = {"memo": ("TeaCache4Memo", "teacache_memo"), "lumina": ("TeaCache4LuminaT2X", "teacache_lumina2")}
            assert not [line for line in imports if any(name in line for name in own[other])], path
