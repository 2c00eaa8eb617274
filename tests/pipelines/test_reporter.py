"""Progress lines, metrics.jsonl, TensorBoard files, and where third parties' words go."""

import io
import json
import logging
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from medtvt_rl.evaluation.summary import curves
from medtvt_rl.logs import QUIET_ENVIRONMENT, last_lines, quiet_environment, quiet_third_parties
from pipelines.reporter import Reporter, read_metrics


class Clock:
    """Seconds that the test sets."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def plain_run(folder: Path, seconds_a_step: float, steps: int) -> list[str]:
    stream, clock = io.StringIO(), Clock()
    with Reporter(folder, stream=stream, clock=clock) as reporter:
        reporter.start("sft", steps, "step")
        for step in range(1, steps + 1):
            clock.now += seconds_a_step
            reporter.update(step, loss=1.0 / step)
        reporter.finish("sft")
    return stream.getvalue().splitlines()


def test_plain_lines_are_bounded_by_time_and_by_tenths(tmp_path: Path) -> None:
    assert len(plain_run(tmp_path / "fast", 0.001, 1000)) == 2  # a second of work: its start and its end
    assert len(plain_run(tmp_path / "tenths", 0.02, 1000)) == 2 + 9
    slow = plain_run(tmp_path / "slow", 10.0, 6)
    assert len(slow) == 2 + 5  # every step takes longer than the interval
    assert slow[0] == "sft: 6 steps"
    assert slow[1] == "sft: 1/6 steps, loss 1 (10 s, 50 s left)"
    assert slow[-1] == "sft: done in 60.0 s, 6 steps, loss 0.1667"


def test_a_stage_of_unknown_length(tmp_path: Path) -> None:
    stream, clock = io.StringIO(), Clock()
    with Reporter(tmp_path, stream=stream, clock=clock) as reporter:
        reporter.start("build", None, "study")
        clock.now += 6
        reporter.update(7)
        reporter.finish("build", seconds=2.5)
    assert stream.getvalue().splitlines() == [
        "build: started",
        "build: 7 studies (6 s)",
        "build: done in 2.5 s, 7 studies",
    ]


def test_starting_the_next_ends_the_one_before(tmp_path: Path) -> None:
    stream, clock = io.StringIO(), Clock()
    with Reporter(tmp_path, stream=stream, clock=clock) as reporter:
        reporter.start("cohort", 4, "study")
        clock.now += 2
        reporter.update(4)
        reporter.start("store", 0, "studies")
        clock.now += 1
        reporter.update(3, total=9)
        reporter.finish("cohort", seconds=3.5)
        with pytest.raises(ValueError, match="nothing is under way"):
            reporter.update(1)
    assert stream.getvalue().splitlines() == [
        "cohort: 4 studies",
        "cohort: 4 studies in 2.0 s",
        "store: started",
        "store: 3/9 studies (1 s, 2 s left)",
        "store: 3/9 studies in 1.0 s",
        "cohort: done in 3.5 s",
    ]


def test_markup_in_a_line_is_text(tmp_path: Path) -> None:
    stream = io.StringIO()
    with Reporter(tmp_path, stream=stream) as reporter:
        reporter.line("[red]not markup[/red] " + "x" * 200)
    assert stream.getvalue() == "[red]not markup[/red] " + "x" * 200 + "\n"


def test_a_terminal_gets_bars_and_the_closing_line(tmp_path: Path) -> None:
    stream = Terminal()
    with Reporter(tmp_path, stream=stream) as reporter:
        reporter.start("sft", 3)
        reporter.update(2, loss=0.25)
        reporter.line("a line above the bars")
        reporter.finish("sft")
    text = stream.getvalue()
    assert "━" in text and "a line above the bars" in text and "sft: done in" in text


def test_scalars_reach_both_files_and_a_resume_appends(tmp_path: Path) -> None:
    for step in (1, 2):
        with Reporter(tmp_path, stream=io.StringIO()) as reporter:
            reporter.scalars("grpo", step, {"reward": 0.5 * step, "kl": float("nan")})
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [(row["stage"], row["step"], row["reward"], row["kl"]) for row in rows] == [
        ("grpo", 1, 0.5, None),
        ("grpo", 2, 1.0, None),
    ]
    # Files of one second are read in the order of their names, which is not always that of their writing.
    events = EventAccumulator(str(tmp_path / "tensorboard"), purge_orphaned_data=False)
    events.Reload()
    assert sorted((event.step, event.value) for event in events.Scalars("grpo/reward")) == [(1, 0.5), (2, 1.0)]


def test_an_infinite_value_comes_back_as_such(tmp_path: Path) -> None:
    with Reporter(tmp_path, stream=io.StringIO()) as reporter:
        reporter.scalars("grpo", 1, {"sync_gap_max": float("inf"), "low": float("-inf"), "kl": float("nan")})
        reporter.scalars("grpo", 2, {"sync_gap_max": 1.0})
        reporter.forget("grpo", 2)
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert "Infinity" not in line and "NaN" not in line, "no JSON"
    (row,) = read_metrics(tmp_path / "metrics.jsonl")
    assert (row["sync_gap_max"], row["low"], row["kl"]) == (float("inf"), float("-inf"), None)
    assert curves([row])["grpo"]["sync_gap_max"] == [(1.0, None)]


def test_a_row_cut_short_by_a_crash_costs_only_itself(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"stage": "sft", "step": 1, "time": 0.0, "loss": 2.0}) + '\n{"stage": "sft", "st')
    with Reporter(tmp_path, stream=io.StringIO()) as reporter:
        reporter.scalars("sft", 2, {"loss": 1.0})
    assert [row["step"] for row in read_metrics(path)] == [1, 2]
    assert read_metrics(tmp_path / "absent.jsonl") == []


def test_the_user_s_environment_wins() -> None:
    environ = {"VLLM_LOGGING_LEVEL": "DEBUG"}
    quiet_environment(environ)
    assert environ == {**QUIET_ENVIRONMENT, "VLLM_LOGGING_LEVEL": "DEBUG"}


def test_library_records_go_to_the_file_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    root, ray_logger = logging.getLogger(), logging.getLogger("ray")
    before, level, on_ray = list(root.handlers), root.level, list(ray_logger.handlers)
    logging.captureWarnings(False)  # an earlier run in this process may have left it on
    try:
        quiet_third_parties(tmp_path)
        ray_logger.addHandler(logging.StreamHandler())  # as importing Ray does
        path = quiet_third_parties(tmp_path)
        ray_logger.warning("a word of Ray's")
        warnings.warn("a word of Python's", stacklevel=1)
        assert path.read_text().count("a word of Ray's") == 1
        assert path.read_text().count("UserWarning: a word of Python's") == 1
        assert capfd.readouterr().err == ""
    finally:
        logging.captureWarnings(False)
        root.handlers[:], ray_logger.handlers[:] = before, on_ray
        root.setLevel(level)


def test_redirected_output_holds_words_of_python_and_of_c(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "actor.log"
    code = (
        "import os, sys\n"
        "from medtvt_rl.logs import redirect_output\n"
        "print('before')\n"
        f"redirect_output({str(log)!r})\n"
        "print('of python'); os.write(2, b'of c\\n'); os.system('echo of a child'); raise SystemError('at the end')\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (run.stdout, run.stderr) == ("before\n", "")
    lines = last_lines(log, 50)
    assert lines[:3] == ["of python", "of c", "of a child"] and lines[-1] == "SystemError: at the end"
    assert last_lines(log, 1) == lines[-1:]
    assert last_lines(tmp_path / "absent.log") == []
