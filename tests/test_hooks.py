"""Others on the model: hooks of accelerate and diffusers, wrappers, compiling, saving, copying, reloading."""

import copy
import functools
import importlib
import importlib.util
import sys

import pytest
import torch
from conftest import equal
from machines import Loop, fresh

WAY = {"rel_l1_thresh": 0.1}
WAYS = {"threshold": WAY, "computed steps": {"computed_steps": 3}}


class Counter:
    """A wrapper around a forward that somebody else wrote."""

    calls = 0

    def wrap(self, forward):
        def wrapper(*args, **kwargs):
            self.calls += 1
            return forward(*args, **kwargs)

        return wrapper


def counting(hooks, counter, name="pre_forward"):
    """A hook of accelerate or diffusers that counts its calls."""

    def pre_forward(self, module, *args, **kwargs):
        counter.calls += 1
        return args, kwargs

    def new_forward(self, module, *args, **kwargs):
        counter.calls += 1
        return self.fn_ref.original_forward(*args, **kwargs)

    methods = {"pre_forward": pre_forward, "new_forward": new_forward}
    return type("Hook", (hooks.ModelHook,), {name: methods[name]})()


def accelerate_hook(model, counter):
    hooks = pytest.importorskip("accelerate.hooks")
    hooks.add_hook_to_module(model, counting(hooks, counter))
    return lambda: hooks.remove_hook_from_module(model)


def diffusers_hook(model, counter, name="pre_forward"):
    hooks = pytest.importorskip("diffusers.hooks")
    registry = hooks.HookRegistry.check_if_exists_or_initialize(model)
    registry.register_hook(counting(hooks, counter, name), "counter")
    return lambda: registry.remove_hook("counter", recurse=False)


def diffusers_hook_with_its_own_forward(model, counter):
    return diffusers_hook(model, counter, "new_forward")


def accelerate_around_diffusers(model, counter):
    inner = diffusers_hook(model, counter)
    outer = accelerate_hook(model, Counter())
    return lambda: (outer(), inner())


def diffusers_around_accelerate(model, counter):
    inner = accelerate_hook(model, counter)
    outer = diffusers_hook(model, Counter())
    return lambda: (outer(), inner())


HOOKS = accelerate_hook, diffusers_hook, diffusers_hook_with_its_own_forward
HOOKS += accelerate_around_diffusers, diffusers_around_accelerate


@pytest.mark.parametrize("hook_first", [True, False])
@pytest.mark.parametrize("add_hook", HOOKS)
def test_hooks_before_and_after(machine, add_hook, hook_first):
    """Both work in either order; removing either leaves the other."""
    model, job, counter = machine.model(), machine.job(), Counter()
    calls = 8 * machine.passes
    stock, (*cached, schedule) = machine.denoise(model, job), machine.oracle(model, job, **WAY)
    before = set(vars(model))

    def expect(output, hooked):
        counter.calls = 0
        assert equal(machine.denoise(model, job), tuple(output)) and counter.calls == calls * hooked

    steps = [lambda: machine.apply(model, **WAY), lambda: setattr(counter, "remove", add_hook(model, counter))]
    for step in reversed(steps) if hook_first else steps:
        step()
    expect(cached, hooked=True)
    assert model.teacache.schedule == schedule and False in schedule
    machine.script.remove_teacache(model)
    expect(stock, hooked=True)
    machine.apply(model, **WAY)
    counter.remove()
    expect(cached, hooked=False)
    machine.script.remove_teacache(model)
    expect(stock, hooked=False)
    assert set(vars(model)) - before <= {"forward", "_diffusers_hook"}, "what the hooks leave"


OFFLOADS = {
    "block": {"offload_type": "block_level", "num_blocks_per_group": 1},
    "leaf": {"offload_type": "leaf_level"},
    "block, to disk": {"offload_type": "block_level", "num_blocks_per_group": 1, "offload_to_disk_path": "disk"},
    "leaf, to disk": {"offload_type": "leaf_level", "offload_to_disk_path": "disk"},
}


@pytest.mark.parametrize("offload", OFFLOADS)
def test_group_offload(machine, offload, tmp_path):
    """diffusers' own: weights that are not there give NaN, and those that lie elsewhere another rounding."""
    hooks = pytest.importorskip("diffusers.hooks")
    options = OFFLOADS[offload] | {"onload_device": torch.device("cpu"), "offload_device": torch.device("cpu")}
    if "offload_to_disk_path" in options:
        options["offload_to_disk_path"] = str(tmp_path)
        try:
            hooks.apply_group_offloading(torch.nn.Linear(1, 1), **options | {"offload_type": "leaf_level"})
        except TypeError:
            pytest.skip("this diffusers does not offload to disk")
    for is_first in (True, False):
        model, job = machine.model(), machine.job()
        stock = machine.denoise(model, job), [True] * 8
        expected = {way: machine.oracle(model, job, **dict(WAYS[way])) for way in WAYS}
        steps = [lambda m=model: machine.apply(m, **WAY), lambda m=model: hooks.apply_group_offloading(m, **options)]
        for step in reversed(steps) if is_first else steps:
            step()
        for way, (*output, schedule) in expected.items():
            machine.apply(model, **WAYS[way])
            if machine.name == "lumina2" and "block" in offload and way == "threshold":
                with pytest.raises(ValueError, match="use computed_steps, or leaf_level offloading") as error:
                    machine.denoise(model, job)
                assert "\n" not in str(error.value)
                continue
            assert is_close(machine.denoise(model, job), output) and model.teacache.schedule == schedule
        machine.script.remove_teacache(model)
        calls = machine.block_calls(model)
        assert is_close(machine.denoise(model, job), stock[0]) and len(calls) == 8 * machine.passes, "as stock"


def is_close(found, expected):
    return all(torch.allclose(a, b, atol=1e-4) for a, b in zip([*found[0], found[1]], [*expected[0], expected[1]]))


def block_of(machine, model):
    return model.layers[0] if machine.name == "lumina2" else model.mid_block


@pytest.mark.parametrize("way", ["threshold", "computed steps"])
def test_blocks_are_never_touched(machine, way):
    """Hooks on the first block see the computed calls alone, with all their arguments; nothing of ours stays on it."""
    model, job, calls = machine.model(), machine.job(), []
    block = block_of(machine, model)
    before = dict(vars(block))
    hook = block.register_forward_pre_hook(lambda *args: calls.append(sum(map(len, args[1:]))), with_kwargs=True)
    machine.denoise(machine.stock(model), job)
    (arguments,) = set(calls)
    calls.clear()
    machine.apply(model, **WAYS[way])
    machine.denoise(model, job)
    assert calls == [arguments] * sum(model.teacache.schedule) * machine.passes and False in model.teacache.schedule
    hook.remove()
    assert vars(block) == before


def test_a_wrapper_put_on_later(machine):
    """It holds our forward: that one is switched off, and on again."""
    model, job, counter = machine.model(), machine.job(), Counter()
    stock, (*cached, _) = machine.denoise(model, job), machine.oracle(model, job, **WAY)
    machine.apply(model, **WAY)
    model.forward = counter.wrap(model.forward)
    assert equal(machine.denoise(model, job), tuple(cached)) and counter.calls == 8 * machine.passes
    for _ in range(2):
        machine.script.remove_teacache(model)
        assert equal(machine.denoise(model, job), stock)
        machine.apply(model, **WAY)
        assert equal(machine.denoise(model, job), tuple(cached))
    assert counter.calls == 8 * machine.passes * 5
    machine.script.remove_teacache(model)
    del model.forward
    assert equal(machine.denoise(machine.apply(model, **WAY), job), tuple(cached)), "without the wrapper, as new"


def test_a_stock_forward_that_hooks_left_behind_is_none_of_others(machine):
    """On the instance, bound: as accelerate leaves it."""
    model, job = machine.model(), machine.job()
    *cached, _ = machine.oracle(model, job, **WAY)
    model.forward = type(model).forward.__get__(model)
    assert equal(machine.denoise(machine.apply(model, **WAY), job), tuple(cached))


def own_forward(cls):
    """With the very name and signature of the stock one."""
    return functools.wraps(cls.forward)(lambda self, *args, **kwargs: None)


OWN = {
    "around it": lambda cls, model, patch: patch.setattr(model, "forward", Counter().wrap(model.forward)),
    "bound": lambda cls, model, patch: patch.setattr(model, "forward", own_forward(cls).__get__(model)),
    "a subclass": lambda cls, model, patch: patch.setattr(
        model, "__class__", type(cls.__name__, (cls,), {"forward": own_forward(cls)})
    ),
    "a patched class": lambda cls, model, patch: patch.setattr(cls, "forward", own_forward(cls)),
}


@pytest.mark.parametrize("how", OWN)
def test_a_forward_of_others_is_refused(machine, how, monkeypatch):
    """Such as another cache, or a network of one's own: it is not replaced."""
    model = machine.model()
    OWN[how](machine.cls, model, monkeypatch)
    before, cls, forward = dict(vars(model)), type(model), type(model).forward
    with pytest.raises(ValueError, match=f"the forward of this .* is not {machine.script.PACKAGE}'s") as error:
        machine.apply(model, **WAY)
    assert "\n" not in str(error.value) and "apply TeaCache before" in str(error.value)
    assert vars(model) == before and type(model) is cls and cls.forward is forward


WRAPPED = {
    "compiled": lambda model: torch.compile(model),
    "in a container": lambda model: torch.nn.Sequential(model),
    "another network": lambda model: torch.nn.Linear(1, 1),
    "no network": lambda model: object(),
    "nothing": lambda model: None,
    "a class": lambda model: type(model),
}


@pytest.mark.parametrize("wrap", WRAPPED)
def test_what_is_no_such_network_is_refused(machine, wrap):
    model = machine.model()
    wrapped = WRAPPED[wrap](model)
    before = dict(vars(model))
    for function in (machine.script.apply_teacache, machine.script.remove_teacache):
        with pytest.raises(ValueError, match=f"for a pipeline or its {machine.script.NETWORK}") as error:
            function(wrapped)
        assert "\n" not in str(error.value) and vars(model) == before


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy])
def test_copied(machine, how):
    """The copy runs its own modules, and is removed from by itself."""
    model, job = machine.model(), machine.job()
    machine.apply(model, **WAY)
    other, weights = how(model), machine.model(1)
    other._modules = weights._modules
    stock, (*cached, _) = machine.denoise(weights, job), machine.oracle(weights, job, **WAY)
    calls = machine.block_calls(model)
    for remove, expected in ((None, cached), (model, cached), (other, stock)):
        if remove:
            machine.script.remove_teacache(remove)
        assert torch.allclose(machine.denoise(other, job)[1], expected[1], atol=1e-4) and not calls


def test_a_copy_put_into_the_same_pipeline(machine, told):
    """Its scheduler still speaks to the first network: nothing is skipped, and it is said, until TeaCache is applied."""
    loop = Loop(machine)
    loop.apply(computed_steps=3)
    loop.draw()
    loop.model = copy.deepcopy(loop.model)
    setattr(loop, machine.script.NETWORK, loop.model)
    loop.draw()
    assert loop.schedule == [True] * 8 and len(told) == 1 and "apply TeaCache again" in told[0]
    loop.apply(computed_steps=3)
    loop.draw()
    assert sum(loop.schedule) == 3


def test_removed_by_a_reloaded_module(machine):
    """The classes of network and scheduler are others now: they are corrected, and set back, all the same."""
    loop, script, way = Loop(machine), machine.script, dict(computed_steps=3)
    kept, expected = dict(vars(script)), fresh(loop, way)
    stock, classes = loop.draw(), (type(loop.model), type(loop.scheduler))
    try:
        for _ in range(2):
            loop.apply(**way)
            assert equal((loop.draw(), loop.schedule), expected)
            assert importlib.reload(script).remove_teacache is not kept["remove_teacache"]
            loop.apply(**way)
            assert equal((loop.draw(), loop.schedule), expected)
            importlib.reload(script).remove_teacache(loop)
            assert (type(loop.model), type(loop.scheduler)) == classes and equal(loop.draw(), stock)
            assert "forward" not in vars(loop.model) and "teacache" not in vars(loop.scheduler)
    finally:
        vars(script).update(kept)


def test_removed_by_a_module_of_another_name(machine):
    """As a command it is `__main__`, for a tool that imports it another module."""
    model, job = machine.model(), machine.job()
    stock = machine.denoise(model, job)
    spec = importlib.util.spec_from_file_location("another_name", machine.script.__file__)
    sys.modules["another_name"] = other = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(other)
        for one, two in ((machine.script, other), (other, machine.script)):
            one.apply_teacache(model, 8, **WAY)
            two.remove_teacache(model)
            assert equal(machine.denoise(model, job), stock) and "forward" not in vars(model)
            one.apply_teacache(model, 8, **WAY)
            two.apply_teacache(model, 8, computed_steps=3)
            machine.denoise(model, job)
            assert sum(model.teacache.schedule) == 3
            one.remove_teacache(model)
    finally:
        del sys.modules["another_name"]


def test_a_compiled_first_block(machine):
    """As in the recipe: the blocks, in place. With a threshold its modulated input is still found."""
    model, job = machine.model(), machine.job()
    block = block_of(machine, model)
    *expected, schedule = machine.oracle(model, job, **WAY)
    block.compile(backend="eager")
    for way in (WAY, dict(computed_steps=3)):
        machine.apply(model, **way)
        found = machine.denoise(model, job)
        if way is WAY:
            assert torch.allclose(found[1], expected[1], atol=1e-4) and model.teacache.schedule == schedule
    assert sum(model.teacache.schedule) == 3 and False in schedule
