"""A small run on data that can be told by a mark: no port but loopback's is open, and the mark stays in the data."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from leaky import MARK
from small_run import PROJECT, SMALL

from medtvt_rl.data.config import CohortConfig
from medtvt_rl.data.simulate.cohort import write_cohort

RUN_TIMEOUT_S = 480
VALUE = "91374.682"
ID = re.compile(r"(?<!\w)([14]0{3}\d{4})(?!\d)")
# Data, what is made of it, and the salt: docs/security.md says so. All else is for eyes that may not see patients.
DATA = ("journal", "stages", "checkpoints", "model", "ray_train", "salt")
WITHOUT = ("cohort.", "rewards.flaky", "grpo.steps", "evaluation.")


@dataclass
class Run:
    """A finished run: its folder, Ray's own, what it printed, and who listened where while it went."""

    folder: Path
    ray_folder: Path
    output: str
    listening: set[tuple[str, str]]
    auth_modes: set[str | None]
    tokens: set[str]
    overrides: list[str]
    environment: dict[str, str]


def marked_cohort(root: Path) -> Path:
    """A cohort whose ids, questions and one value hold the mark, and with a row that cannot be used."""
    write_cohort(CohortConfig(num_train=96, num_validation=16, num_test=16, film_size=96, missing_share=0.0), root)
    for path in sorted(root.rglob("*")):
        if path.suffix in (".csv", ".json", ".hea"):
            text = ID.sub(rf"{MARK}\1", path.read_text())
            path.write_text(text.replace('list the diagnoses."', f'list the diagnoses of {MARK}."'))
        if path.is_file() and ID.search(path.name):
            path.rename(path.with_name(MARK + path.name))
    table = root / "train.csv"
    header, first, second, *rest = table.read_text().splitlines()
    cells, bad = first.split(","), second.split(",")
    cells[4:6], bad[4] = [VALUE, "0.5"], f"{MARK} mmol"
    table.write_text("\n".join([header, ",".join(cells), ",".join(bad), *rest]) + "\n")
    return root


def listeners(process: psutil.Process) -> Iterator[tuple[str, str, dict[str, str]]]:
    """(name, address, environment) of everything that listens below a process."""
    for each in [process, *process.children(recursive=True)]:
        try:
            connections, environment = each.net_connections(kind="inet"), each.environ()
            for connection in connections:
                if connection.status == psutil.CONN_LISTEN:
                    yield each.name(), connection.laddr.ip, environment
        except (psutil.Error, OSError):
            continue


@pytest.fixture(scope="module")
def closed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    folder = tmp_path_factory.mktemp("closed")
    root = marked_cohort(folder / "data")
    session = Path(tempfile.mkdtemp(prefix="rd"))
    overrides = [text for text in SMALL if not text.startswith(WITHOUT)] + [
        "cohort=null",
        "privacy.show_samples=false",
        "run.stages=[cohort,pretrain,sft,grpo]",
        "grpo.steps=2",
        "grpo.held_out.every_steps=0",
        "rewards.leaky.function=tests.integration.leaky:reward",
        "task.items=tests.integration.leaky:Items",
        f"data.root={root}",
        f"run.root={folder / 'runs'}",
    ]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"OMP_NUM_THREADS": "1", "RAY_TMPDIR": str(session), "PYTHONPATH": str(PROJECT)}
    run = Run(folder / "runs" / "small", session, "", set(), set(), set(), overrides, environment)
    command = [sys.executable, "-m", "pipelines.run", "-c", "configs/quickstart.yaml", *overrides]
    with (folder / "output.txt").open("w+") as output:
        process = subprocess.Popen(command, cwd=PROJECT, env=environment, stdout=output, stderr=output)
        deadline = threading.Timer(RUN_TIMEOUT_S, process.kill)
        deadline.start()
        try:
            while process.poll() is None:
                for name, address, seen in listeners(psutil.Process(process.pid)):
                    run.listening.add((name, address))
                    if name in ("gcs_server", "raylet"):  # Ray's workers write their titles over their environment
                        run.auth_modes.add(seen.get("RAY_AUTH_MODE"))
                        run.tokens.add(seen.get("RAY_AUTH_TOKEN", ""))
                try:
                    process.wait(timeout=0.5)
                except subprocess.TimeoutExpired:
                    continue
        finally:
            deadline.cancel()
            process.kill()
        output.seek(0)
        run.output = output.read()
    assert process.returncode == 0, run.output[-4000:]
    yield run
    shutil.rmtree(session, ignore_errors=True)


def files_with(word: str, folder: Path, spared: tuple[str, ...] = ()) -> list[str]:
    """Files below a folder in whose name or content a word stands, whatever its case."""
    found = []
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if relative.parts[0] in spared or not path.is_file() or path.is_symlink():
            continue
        if word in relative.as_posix().lower() or word.encode() in path.read_bytes().lower():
            found.append(str(relative))
    return found


@pytest.mark.cluster
def test_every_port_of_a_local_run_is_on_loopback(closed: Run) -> None:
    assert {name for name, _ in closed.listening} >= {"gcs_server", "raylet"}, closed.listening
    assert any(name.startswith("ray::") for name, _ in closed.listening)
    open_ones = {(name, ip) for name, ip in closed.listening if ip.removeprefix("::ffff:") not in ("127.0.0.1", "::1")}
    assert open_ones == set()


@pytest.mark.cluster
def test_a_local_ray_asks_for_a_token_that_is_written_nowhere(closed: Run) -> None:
    assert closed.auth_modes == {"token"}
    (token,) = closed.tokens - {""}
    assert len(token) == 64
    assert files_with(token, closed.folder) == [] and files_with(token, closed.ray_folder) == []


@pytest.mark.cluster
@pytest.mark.parametrize("word", [MARK, VALUE])
def test_what_is_in_the_data_stays_there(closed: Run, word: str) -> None:
    assert word not in closed.output.lower()
    assert files_with(word, closed.folder, DATA) == []
    assert files_with(word, closed.ray_folder) == []


@pytest.mark.cluster
def test_faults_are_still_told_of(closed: Run) -> None:
    assert "unusable: " in closed.output and "problems.csv" in closed.output
    assert re.search(r"could not be scored, e\.g\. \d+/\d: leaky: ValueError \(the whole reason is in", closed.output)
    assert re.search(r"group \d+ discarded: ActorError: .*task\.items .*: KeyError in leaky\.py:\d+", closed.output)
    groups = (closed.folder / "journal" / "groups.jsonl").read_text()
    assert MARK in groups, "the journal is data: it holds what the terminal does not say"
    samples = [json.loads(line) for line in (closed.folder / "journal" / "samples.jsonl").read_text().splitlines()]
    assert samples and all(set(one) == {"reward", "components"} for row in samples for one in row["completions"])


@pytest.mark.cluster
def test_a_run_that_fails_says_nothing_of_patients_either(closed: Run) -> None:
    shutil.rmtree(closed.folder / "stages" / "grpo")
    changes = ["resume=never", "task.prompts=tests.integration.leaky:prompts"]
    again = subprocess.run(
        [sys.executable, "-m", "pipelines.grpo", "-c", "configs/quickstart.yaml", *closed.overrides, *changes],
        cwd=PROJECT,
        env=closed.environment,
        capture_output=True,
        text=True,
        timeout=RUN_TIMEOUT_S,
        check=False,
    )
    assert again.returncode == 1
    assert "task.prompts tests.integration.leaky:prompts: RuntimeError in leaky.py:" in again.stderr
    assert MARK not in again.stdout + again.stderr
    assert "UserCodeError" in (closed.folder / "logs" / "error.log").read_text()
    assert files_with(MARK, closed.folder, DATA) == []
