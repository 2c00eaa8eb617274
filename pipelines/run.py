"""All stages of a run, one after the other; a finished stage is not run again."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from medtvt_rl.config import Config, to_yaml
from medtvt_rl.evaluation.report import print_table, write_report
from medtvt_rl.privacy import hashed
from pipelines.json_lines import read_rows
from pipelines.reporter import METRICS_FILE, Reporter, read_metrics
from pipelines.stages import resolved_settings, run_stage, write_summary

OF_STUDIES, OF_TOWER = {"cohort", "data", "encoders", "pretrain"}, {"ecg", "cxr", "lab", "perception"}
"""Sections of the configuration, and of `model`, that a task without items has no use for."""


def run(config: Config, reporter: Reporter) -> dict[str, Any]:
    """Runs `run.stages`, then writes the report and prints the table."""
    for name in config.run.stages:
        run_stage(name, config, reporter)
    return conclude(config, reporter)


def conclude(config: Config, reporter: Reporter) -> dict[str, Any]:
    """Writes summary and report from what the finished stages left, and prints the table."""
    summary = write_summary(config)
    report(config, summary)
    print_table(summary)
    reporter.line(f"report: {config.folder / 'report.html'}")
    return summary


def report(config: Config, summary: dict[str, Any]) -> None:
    """Writes report.html from the summary, the metrics and the samples in the run folder."""
    write_report(
        config.folder / "report.html",
        summary=summary,
        metrics=read_metrics(config.folder / METRICS_FILE),
        samples=_samples(config.folder / "journal" / "samples.jsonl") if config.privacy.show_samples else [],
        config_yaml=shown_settings(config),
    )


def shown_settings(config: Config) -> str:
    """The resolved configuration as YAML, without the settings of studies where the task has no items."""
    if config.task.items is not None:
        return to_yaml(config)
    settings = resolved_settings(config)
    shown = {name: value for name, value in settings.items() if name not in OF_STUDIES}
    shown["model"] = {name: value for name, value in settings["model"].items() if name not in OF_TOWER}
    return OmegaConf.to_yaml(OmegaConf.create(shown))


def _samples(path: Path) -> list[dict[str, Any]]:
    """The journal's samples, those that hold texts, under hashed ids."""
    rows = [row for row in read_rows(path) if "ground_truth" in row]
    return [{**row, "prompt_id": hashed(str(row.get("prompt_id")))} for row in rows]


if __name__ == "__main__":
    from pipelines.cli import main

    sys.exit(main(["run", *sys.argv[1:]]))
