"""What every test process needs before anything heavy is imported, the order of tests, what several files share."""

from __future__ import annotations

import os
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from filelock import FileLock
from hypothesis import HealthCheck, settings

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

# How long an example takes says something of the machine, not of the code; all else is as Hypothesis chose.
settings.register_profile("patient", settings(), deadline=None)
# The fuzzers of tests/fuzz: a few cases that are the same each time, or with MEDTVT_RL_FUZZ=fuzz many fresh ones. What
# takes longer than the deadline hangs, for whoever waits for it.
hostile = settings(
    deadline=timedelta(seconds=20),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture],
)
settings.register_profile("fuzz-quick", hostile, max_examples=20, derandomize=True)
settings.register_profile("fuzz", hostile, max_examples=400, print_blob=True)
settings.load_profile("patient")

for shared in ("integration", "faults"):
    sys.path.insert(0, str(Path(__file__).parent / shared))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first, so that two processes end at about the same time, and while one makes the run that several
    share, the other does what does not need it. A file stays together, and in its order."""
    files = defaultdict[Path, list[pytest.Item]](list)
    for item in items:
        files[item.path].append(item)
    turns = {path: _turn(path, inside) for path, inside in files.items()}
    items.sort(key=lambda item: turns[item.path])


def _turn(path: Path, items: list[pytest.Item]) -> tuple[bool, bool, bool]:
    shares_run = any("root" in getattr(item, "fixturenames", ()) for item in items)
    kinds = (not any(item.get_closest_marker(kind) for item in items) for kind in ("cluster", "engine"))
    return path.name != "test_exactness.py", all(kinds), shares_run


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A folder of runs with one small run of the whole system, `small`, made once for all test processes."""
    from small_run import SMALL, medtvt_rl

    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "runs"
    with FileLock(f"{folder}.lock", timeout=1000):
        if not (folder / "first_output.txt").is_file():
            done = medtvt_rl(folder, "run", *SMALL)
            assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
            (folder / "first_output.txt").write_text(done.stdout)
    return folder


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder on sys.path that holds the files of docs/reuse.md."""
    folder = tmp_path_factory.mktemp("user")
    docs = (Path(__file__).parent.parent / "docs" / "reuse.md").read_text()
    for name, code in re.findall(r"```python\n# (\w+\.py)\n(.*?)```", docs, re.DOTALL):
        (folder / name).write_text(code)
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))
