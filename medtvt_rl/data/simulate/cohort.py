"""Writes a simulated cohort in the published formats: WFDB records, JPEG films, laboratory CSV, question-answer json.

Owns: who is in which split, and the atomic appearance of the files. Does not own: how a modality looks (ecg.py, cxr.py,
labs.py), or names and columns of files (layout_plain.py, layout_published.py). The folder is written beside its place
and renamed, so that a cohort is either whole or absent; one configuration always gives the same files.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from medtvt_rl.data.config import CohortConfig
from medtvt_rl.data.errors import DataError
from medtvt_rl.data.labels import FINDINGS
from medtvt_rl.data.labs import PercentileTable, read_json
from medtvt_rl.data.parallel import Progress, ordered_map
from medtvt_rl.data.simulate.diseases import draw_diseases
from medtvt_rl.data.simulate.findings import lab_findings
from medtvt_rl.data.simulate.labs import draw_labs
from medtvt_rl.data.simulate.layout_plain import PlainLayout
from medtvt_rl.data.simulate.layout_published import PublishedLayout
from medtvt_rl.data.simulate.plan import Findings, Layout, Plan
from medtvt_rl.data.simulate.render import RenderTask, render_study
from medtvt_rl.types import MODALITIES

FORMAT_VERSION = 3
MARKER = "cohort.json"
SPLITS = ("train", "validation", "test")
_FIRST_STUDY_ID = 40_000_001
_FIRST_PATIENT_ID = 10_000_001


def write_cohort(config: CohortConfig, root: Path, progress: Progress | None = None) -> Path:
    """Writes the cohort to `root` and returns it; a cohort of the same configuration that lies there is kept.

    Args:
        progress: called with (studies rendered, studies in all).

    Raises:
        DataError: `root` holds something else, or a number in the configuration is out of range.
    """
    _check(config)
    marker = {"format_version": FORMAT_VERSION, **dataclasses.asdict(config)}
    if _is_written(root, marker):
        return root
    partial = root.parent / f".{root.name}.partial-{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        _write_files(config, partial, progress)
        (partial / MARKER).write_text(json.dumps(marker, indent=1))
        try:
            partial.rename(root)
        except OSError:
            if not _is_written(root, marker):
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return root


def _check(config: CohortConfig) -> None:
    for split in SPLITS:
        value = getattr(config, f"num_{split}")
        if value < 1:
            raise DataError(f"cohort.num_{split} is {value}, expected at least 1 study")
    if not 0 <= config.missing_share <= 1:
        raise DataError(f"cohort.missing_share is {config.missing_share}, expected a share in 0..1")
    if config.film_size < 32:
        raise DataError(f"cohort.film_size is {config.film_size}, expected at least 32 pixels")


def _is_written(root: Path, marker: dict[str, Any]) -> bool:
    """Whether this very cohort lies at `root`. Raises DataError if anything else does."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    if not root.is_dir() or not (root / MARKER).is_file():
        raise DataError(f"{root}: holds something that is no simulated cohort; choose another data.root")
    found = {"layout": "plain", **read_json(root / MARKER)}
    differing = [
        f"{key} {found.get(key)!r} instead of {marker.get(key)!r}"
        for key in {**marker, **found}
        if found.get(key) != marker.get(key)
    ]
    if differing:
        raise DataError(f"{root}: holds another cohort ({', '.join(differing)}); remove it or choose another data.root")
    return True


def _write_files(config: CohortConfig, root: Path, progress: Progress | None) -> None:
    layout: Layout = PublishedLayout() if config.layout == "published" else PlainLayout()
    plans = _draw_plans(config)
    tasks = [_render_task(config, layout, root, plan, index) for plan in plans for index in range(len(plan.ids))]
    for folder in {path.parent for task in tasks for path in (task.ecg_path, task.film_path) if path is not None}:
        folder.mkdir(parents=True, exist_ok=True)
    rendered = iter(list(ordered_map(render_study, tasks, progress=progress)))
    findings = [[_study_findings(plan, index, next(rendered)) for index in range(len(plan.ids))] for plan in plans]
    layout.write(root, plans, findings, PercentileTable.fit(plans[0].labs))


def _draw_plans(config: CohortConfig) -> list[Plan]:
    plans, num_before = [], 0
    for number, split in enumerate(SPLITS):
        count = getattr(config, f"num_{split}")
        rng = np.random.default_rng([config.seed, number])
        diseases = draw_diseases(rng, count)
        labs = draw_labs(rng, diseases)
        missing = [
            str(rng.choice(MODALITIES)) if lacks else None
            for lacks in (rng.random(count) < config.missing_share).tolist()
        ]
        labs[[which == "lab" for which in missing]] = np.nan
        numbers = range(num_before, num_before + count)
        ids = [(str(_FIRST_STUDY_ID + i), str(_FIRST_PATIENT_ID + i)) for i in numbers]
        seed = (config.seed, number, 0, 1)
        plans.append(Plan(split=split, ids=ids, diseases=diseases, labs=labs, missing=missing, seed=seed))
        num_before += count
    return plans


def _render_task(config: CohortConfig, layout: Layout, root: Path, plan: Plan, index: int) -> RenderTask:
    paths = layout.paths(plan, index)
    return RenderTask(
        seed=(config.seed, SPLITS.index(plan.split), index),
        diseases=plan.names(index),
        ecg_path=root / paths["ecg"] if paths["ecg"] else None,
        film_path=root / paths["cxr"] if paths["cxr"] else None,
        film_size=config.film_size,
    )


def _study_findings(plan: Plan, index: int, rendered: dict[str, bool]) -> Findings:
    every = {**rendered, **lab_findings(plan.labs[index])}
    by_modality = {modality: {key: every[key] for key in keys} for modality, keys in FINDINGS.items()}
    return {modality: None if plan.missing[index] == modality else found for modality, found in by_modality.items()}
