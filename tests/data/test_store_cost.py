"""What the study store costs against the files that it stands for; ratios of processor time within one process."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from medtvt_rl.config import Config
from medtvt_rl.data.study_read import ReadTask, read_study_files
from medtvt_rl.data.study_rows import read_rows
from medtvt_rl.data.study_store import StudyStore

GATE = 5.0


def processor_s(work: Callable[[], object], repeats: int = 3) -> float:
    """The least of a few times."""
    seconds = []
    for _ in range(repeats):
        started = time.process_time()
        work()
        seconds.append(time.process_time() - started)
    return min(seconds)


def test_a_study_comes_out_of_the_store_much_faster_than_out_of_its_files(config: Config, store: StudyStore) -> None:
    """Even where films are thumbnails of 64 pixels; decoding one of MIMIC's takes a hundred times as long."""
    data = config.data
    rows = [row for row in read_rows(data, "train").rows if row.study_id in set(store.study_ids("train"))]
    tasks = [ReadTask(ecg_root=data.ecg_root, cxr_root=data.cxr_root, row=row, film=data.film) for row in rows]
    ids = [row.study_id for row in rows]
    assert len(ids) >= 15
    from_files = processor_s(lambda: [read_study_files(task) for task in tasks])
    from_store = processor_s(lambda: [np.array(store.study(study_id).cxr) for study_id in ids])
    assert from_files > GATE * from_store, f"{from_files / from_store:.1f} times"
