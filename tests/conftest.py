"""What every test process needs before anything heavy is imported: one thread each, and no look at a model hub; and the
Python files of docs/reuse.md, as a user would have them.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

# How long an example takes says something of the machine, not of the code; all else is as Hypothesis chose.
settings.register_profile("patient", settings(), deadline=None)
settings.load_profile("patient")


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
