"""The whole fault suite runs where it is asked for: `pytest -m faults tests/faults`, which is `make test-faults`."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from fault_table import FaultTable

TABLE = pytest.StashKey[FaultTable]()
HEAD = """# What each fault cost

Written by `make test-faults` on {cpus} CPU cores, with the model and the settings of `tests/faults/long_run.py`.
[faults.md](faults.md) says what the columns mean.
"""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fault-table", type=Path, help="where the table of results is written")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--fault-table", default=None)
    config.stash[TABLE] = FaultTable(path, HEAD.format(cpus=os.cpu_count()))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without `-m faults` the quick selection alone is run."""
    if "faults" in (config.option.markexpr or ""):
        return
    left_out = [item for item in items if item.get_closest_marker("faults")]
    items[:] = [item for item in items if not item.get_closest_marker("faults")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    table = config.stash.get(TABLE, None)
    if table is not None and table.rows:
        terminalreporter.section("faults")
        terminalreporter.write_line(table.text())


@pytest.fixture(scope="session")
def table(request: pytest.FixtureRequest) -> FaultTable:
    """The results of the whole suite."""
    return request.config.stash[TABLE]
