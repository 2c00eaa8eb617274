"""Nodes are cut off and lost; two machines with a wire between them, made of network namespaces."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fault_table import FINE, FaultTable, Row
from harness import FaultyRun
from long_run import conclude, go_on, settings
from strikes import RECOVERED_WITHIN_S, Strikes, count_repeated
from two_nodes import TwoMachines, why_not

pytestmark = [
    pytest.mark.faults,
    pytest.mark.cluster,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(bool(why_not()), reason=why_not()),
]
AT_HOME = [f"placement.{role}.labels={{place: head}}" for role in ("reference", "reward")]
ENDS_WITHIN_S = 120.0


@pytest.fixture
def machines() -> Iterator[TwoMachines]:
    with TwoMachines(Path(tempfile.mkdtemp(prefix="ray2_"))) as machines:
        yield machines


def how(machines: TwoMachines) -> dict[str, Any]:
    """How a run is started on them."""
    return {
        "prefix": machines.prefix,
        "environment": {"RAY_AUTH_MODE": "disabled"},
        "roots": machines.raylets,
        "timeout_s": 2400,
    }


def test_a_generator_s_node_is_cut_off_and_killed(
    root: Path, tmp_path: Path, table: FaultTable, machines: TwoMachines
) -> None:
    """A short cut costs nothing; after a long one, or a death, the generator comes back on the next node that joins."""
    machines.add("near", on="first")
    machines.add("far", on="second")
    labels = ["placement.learner.labels={place: head}", "placement.rollout.labels={place: 'in(near, far)'}"]
    more = [*AT_HOME, *labels, f"cluster.address={machines.address}", "rollout.num_generators=2", "rollout.spares=0"]
    more += ["supervision.silence_s=20"]  # after a cut of 5 s TCP may ask again 12 s later only
    arguments = settings(root, *more)
    with FaultyRun(tmp_path / "far", arguments, **how(machines)) as run:
        run.wait_for(lambda: len(run.rows("steps")) >= 3)
        strikes = Strikes(run, table)
        strikes.measured("partition of 5 s", "any", lambda: cut_for(machines, 5), None)
        assert not run.rows("events"), "nothing was replaced"

        def cut_off() -> None:
            steps = len(run.rows("steps"))
            cut_for(machines, 90)
            assert len(run.rows("steps")) > steps + 1, "the run went on with the other generator"
            run.wait_for(lambda: machines.has_ended("far"), within_s=ENDS_WITHIN_S)
            machines.forget("far")
            machines.add("far", on="second")

        strikes.measured("partition of 90 s, another node joins", "any", cut_off, "rollout")

        def kill() -> None:
            machines.kill("far")
            machines.add("far", on="second")

        strikes.measured("node of a generator killed, another joins", "any", kill, "rollout")
        conclude(run, arguments, **how(machines))
    assert all(row.is_fine for row in strikes.rows), table.text()


def test_the_learner_s_node_is_killed(root: Path, tmp_path: Path, table: FaultTable, machines: TwoMachines) -> None:
    """The learner comes back on the next node; where none joins in time the run ends, to go on later."""
    machines.add("far", on="second")
    labels = ["placement.learner.labels={place: far}", "placement.rollout.labels={place: head}"]
    more = [*AT_HOME, *labels, f"cluster.address={machines.address}", "supervision.vacancy_timeout_s=30"]
    arguments = settings(root, *more, "learner.start_timeout_s=90")
    with FaultyRun(tmp_path / "learner", arguments, **how(machines)) as run:
        run.wait_for(lambda: len(run.rows("steps")) >= 6)
        strikes = Strikes(run, table)

        def kill() -> None:
            machines.kill("far")
            machines.add("far", on="second")

        strikes.measured("node of the learner killed, another joins", "any", kill, "learner")
        machines.kill("far")
        began = time.monotonic()
        report = run.finish_badly()
        ended_s = time.monotonic() - began
    assert "supervision.vacancy_timeout_s" in report["reason"] and report["checkpoint"]
    assert run.leftovers() == []
    machines.add("far", on="second")
    last = go_on(tmp_path / "learner", arguments, **how(machines))
    row = Row(
        fault="node of the learner killed, none joins: the run ends with a report",
        phase="any",
        seconds=ended_s,
        lost=len(last.rows("discarded")),
        repeated=count_repeated(last),
        verdict=FINE if ended_s < RECOVERED_WITHIN_S else "late",
    )
    assert table.add(row).is_fine and all(row.is_fine for row in strikes.rows), table.text()


def cut_for(machines: TwoMachines, seconds: float) -> None:
    """Cuts the wire, and mends it."""
    machines.cut()
    time.sleep(seconds)
    machines.mend()
