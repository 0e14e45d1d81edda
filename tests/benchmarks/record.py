"""The file that a benchmark writes: what it ran on, and its rows, each written as soon as it is measured.

A run that was stopped goes on where it stopped, as long as machine, versions and settings are the same.
"""

import datetime
import importlib.metadata
import json
import os
import platform
import re
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


class Record:
    """Rows by key, such as "shift6_computed_steps_15", in a JSON file beside `about`."""

    def __init__(self, path, packages=(), **settings):
        self.path = path
        self.about = {"machine": machine(), "versions": versions("torch", "diffusers", *packages), **settings}
        self.rows = {}
        if path.exists():
            old = json.loads(path.read_text(encoding="utf-8"))
            if {**old["about"], "date": None} != {**self.about, "date": None}:
                raise SystemExit(f"{path} is of another run: remove it, or give another --output")
            self.rows = old["rows"]

    def add(self, key, **row):
        """Replaces a row of this key."""
        self.rows[key] = row
        self.write()

    def write(self):
        self.about["date"] = datetime.date.today().isoformat()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        draft = self.path.with_suffix(".draft")
        lines = [f'    "{key}": {json.dumps(row)}' for key, row in self.rows.items()]
        about = json.dumps(self.about, indent=2).replace("\n", "\n  ")
        rows = ",\n".join(lines)  # a row a line
        draft.write_text(f'{{\n  "about": {about},\n  "rows": {{\n{rows}\n  }}\n}}\n', encoding="utf-8")
        draft.replace(self.path)


def slug(*words):
    """A key: "magcache_0_24" for "MagCache", 0.24."""
    return re.sub(r"\W+", "_", " ".join(map(str, words))).strip("_").lower()


def machine():
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    names = []
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    threads = torch.get_num_threads()
    return f"{(names or [platform.machine()])[0]}, {os.cpu_count()} cores, {threads} thread{'s' * (threads > 1)}"


def versions(*packages):
    return {name: importlib.metadata.version(name) for name in packages}
