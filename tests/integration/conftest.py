"""One small run of the whole system that the tests of this folder share."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_run import SMALL, medtvt_rl


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    done = medtvt_rl(folder, "run", *SMALL)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    (folder / "first_output.txt").write_text(done.stdout)
    return folder
