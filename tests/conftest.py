"""What all tests share: the device, which memo is run, fixtures."""

import importlib.util
import logging
import os
import socket
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tests run in parallel instead

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).resolve().parent.parent
BUNDLED = ROOT / "assets" / "lumina2-emoji"
MEMO_DOUBLE = ROOT / "tests" / "memo_double"
DEVICE = "cpu"  # or "cuda", see --device
LUMINA2 = importlib.util.find_spec("diffusers.pipelines.lumina2") is not None
if not LUMINA2:  # diffusers before 0.33, as memo pins it: only the tests of MEMO and of what both scripts share
    collect_ignore = [f"test_{name}.py" for name in "forward pipeline cli compare attention readmes".split()]

settings.register_profile("here", deadline=None, suppress_health_check=list(HealthCheck))
settings.register_profile("ci", settings.get_profile("here"), derandomize=True)
settings.load_profile("ci" if "CI" in os.environ else "here")


def pytest_addoption(parser):
    parser.addoption("--memo", metavar="PATH", help="run the MEMO tests on this clone of memoavatar/memo")
    parser.addoption("--device", default="cpu", help="cuda: run those tests that are marked `gpu`, on a GPU")


def pytest_configure(config):
    """The device: a GPU is hidden unless it is asked for. And memo: the real one where it is given or installed, else
    the double; both are imported as `memo`.
    """
    global DEVICE
    config.addinivalue_line("markers", "gpu: bit for bit, or without synchronisation, also on a GPU: --device cuda")
    DEVICE = config.getoption("--device")
    if DEVICE == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif not torch.cuda.is_available():
        raise pytest.UsageError(f"--device {DEVICE}: torch sees no GPU")
    path = config.getoption("--memo")
    if path and not Path(path, "memo", "models", "unet_3d.py").is_file():
        raise pytest.UsageError(f"no clone of memoavatar/memo in {path}")
    installed = importlib.util.find_spec("memo") is not None
    if path or not installed:
        sys.path.insert(0, str(Path(path or MEMO_DOUBLE).resolve()))


def pytest_collection_modifyitems(config, items):
    if DEVICE != "cpu":
        config.hook.pytest_deselected(items=[item for item in items if not item.get_closest_marker("gpu")])
        items[:] = [item for item in items if item.get_closest_marker("gpu")]


def pytest_terminal_summary(terminalreporter):
    """One line about the tests that need the real memo."""
    skipped = [r for r in terminalreporter.stats.get("skipped", []) if "the real memo is not here" in str(r.longrepr)]
    if skipped:
        command = "python -m pytest tests/test_memo_*.py --memo PATH_TO_MEMO"
        terminalreporter.write_line(f"{len(skipped)} tests of the real memo were skipped, to run them: {command}")


def on_device(thing):
    """A network, a tensor, or what holds tensors: on the device of the tests."""
    if isinstance(thing, dict):
        return {key: on_device(value) for key, value in thing.items()}
    if isinstance(thing, (list, tuple)):
        return type(thing)(map(on_device, thing))
    return thing.to(DEVICE) if hasattr(thing, "to") else thing


def tensors_in(thing, seen=None):
    """Every tensor reachable from an object's attributes, lists, tuples and dicts."""
    seen = set() if seen is None else seen
    if id(thing) in seen:
        return []
    seen.add(id(thing))
    if torch.is_tensor(thing):
        return [thing]
    if isinstance(thing, dict):
        thing = list(thing.values())
    if isinstance(thing, (list, tuple)):
        return [t for item in thing for t in tensors_in(item, seen)]
    return tensors_in(vars(thing), seen) if hasattr(thing, "__dict__") else []


def two_processes(*command, **env):
    """A script under accelerate launch, with two processes on the CPU; finished, or killed after five minutes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", 2]
    command = [str(word) for word in (*launcher, "--main_process_port", port, *command)]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", **env}
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)


def equal(a, b):
    """Bit for bit, through lists, tuples and dicts."""
    if torch.is_tensor(a):
        return a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def levels(image, other):
    """The largest difference of two images, of 255. Weights loaded anew, or another process, may round otherwise: 1."""
    return np.abs(np.asarray(image, int) - np.asarray(other, int)).max()


@pytest.fixture(autouse=True)
def cpu_only(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


@pytest.fixture
def told():
    """The lines that TeaCache has said by diffusers' logger, as it is without being configured."""
    from diffusers.utils import logging as diffusers_logging

    diffusers_logging.set_verbosity_warning()  # a command line that ran before may have turned it down
    lines, handler, logger = [], logging.Handler(), logging.getLogger("diffusers")
    handler.emit = lambda record: "teacache" in record.name and lines.append(record.getMessage())
    logger.addHandler(handler)
    yield lines
    logger.removeHandler(handler)


@pytest.fixture(params=["lumina2", "memo"])
def machine(request):
    """Each of the two scripts with its model, by one interface."""
    from machines import Lumina2, Memo

    if request.param == "lumina2" and not LUMINA2:
        pytest.skip("this diffusers has no Lumina2")
    return Lumina2() if request.param == "lumina2" else Memo()


@pytest.fixture
def model():
    """A tiny random Lumina2."""
    from lumina_models import tiny_model

    return tiny_model()


@pytest.fixture(scope="session")
def pipeline():
    """The bundled pipeline, float32 on the CPU."""
    from diffusers import Lumina2Pipeline

    pipeline = Lumina2Pipeline.from_pretrained(BUNDLED)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
