"""The study store: studies read a second, and what a build from full-size films spends its time on.

    OMP_NUM_THREADS=1 python tests/benchmarks/bench_study_store.py [--studies 800] [--stored 4000] [--folder DIR]

Seconds are of processor time, so that other work on the machine counts little. Reading takes every byte of a study out
of the memory-mapped file, in one process, from the page cache. The build reads JPEG films of 3056 x 2544 pixels, as in
MIMIC-CXR-JPG, on all cores; a few distinct ones stand for all.
"""

from __future__ import annotations

import argparse
import os
import resource
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from medtvt_rl.data.config import CohortConfig, DataConfig, FilmConfig
from medtvt_rl.data.parallel import usable_cores
from medtvt_rl.data.simulate.cohort import write_cohort
from medtvt_rl.data.simulate.layout_published import CXR_FOLDER, ECG_FOLDER, QUESTIONS, TABLES
from medtvt_rl.data.study_build import build_store
from medtvt_rl.data.study_files import StoredStudy, StudyFile, write_studies

FILM = FilmConfig(size=224)
WIDTH, HEIGHT, NUM_DISTINCT = 2544, 3056, 8


def write_stored(path: Path, number: int) -> None:
    """A studies file of random content."""
    rng = np.random.default_rng(0)

    def studies() -> Sequence[StoredStudy]:
        return [
            StoredStudy(
                study_id=str(index),
                patient_id=str(index),
                split="train",
                ecg=rng.standard_normal((12, 1000)).astype(np.float16).tobytes(),
                film=rng.integers(0, 256, (FILM.size, FILM.size), dtype=np.uint8).tobytes(),
                percentiles=rng.random(50).astype(np.float32),
                findings=None,
            )
            for index in range(number)
        ]

    write_studies(path, studies(), FILM.size)


def reads_per_second(file: StudyFile, order: Sequence[str]) -> float:
    """Whole studies, the film copied out of the map."""
    started = time.process_time()
    for study_id in order:
        study = file.study(study_id)
        np.array(study.cxr)
    return len(order) / (time.process_time() - started)


def bench_reading(folder: Path, number: int) -> None:
    path = folder / "studies.arrow"
    write_stored(path, number)
    file = StudyFile(path, FILM.size)
    ids = list(file.ids("train"))
    shuffled = [ids[index] for index in np.random.default_rng(1).permutation(len(ids))]
    reads_per_second(file, ids)
    for name, order in (("sequential", ids), ("random order", shuffled)):
        rate = max(reads_per_second(file, order) for _ in range(3))
        print(f"reading, {name:<12} {rate:8.0f} studies a second and core ({number} studies of {FILM.size}^2 films)")


def write_films(root: Path) -> list[Path]:
    """Puts full-size films in the place of the simulated ones; returns the distinct ones."""
    films = sorted((root / CXR_FOLDER).rglob("*.jpg"))
    rng, distinct = np.random.default_rng(2), []
    for number in range(NUM_DISTINCT):
        with Image.open(films[number]) as small:
            large = np.asarray(small.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC), dtype=np.float32)
        grain = rng.normal(0, 3.5, large.shape)
        distinct.append(root / f"film_{number}.jpg")
        Image.fromarray(np.clip(large + grain, 0, 255).astype(np.uint8)).save(distinct[-1], quality=90)
    for number, film in enumerate(films):
        film.unlink()
        os.link(distinct[number % NUM_DISTINCT], film)
    return distinct


def decode(paths: Sequence[Path]) -> None:
    """What the film reader does before it resizes."""
    for path in paths:
        with Image.open(path) as image:
            image.draft("L", (2 * FILM.size, 2 * FILM.size))
            image.load()


def processor_seconds(work: Callable[[], object]) -> tuple[float, float]:
    """(processor time of this process and of its ended children, wall time)."""

    def used() -> float:
        usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        return sum(usage.ru_utime + usage.ru_stime for usage in usages)

    before, started = used(), time.perf_counter()
    work()
    return used() - before, time.perf_counter() - started


def bench_build(folder: Path, number: int) -> None:
    root = folder / "data"
    cohort = CohortConfig(num_train=number, num_validation=1, num_test=1, film_size=64, missing_share=0)
    cohort.layout = "published"
    write_cohort(cohort, root)
    distinct = write_films(root)
    per_film = min(processor_seconds(lambda: decode(distinct))[0] for _ in range(3)) / len(distinct)
    files = {f"{kind}_{split}": f"QA/{name}" for (kind, split), name in QUESTIONS.items()}
    config = DataConfig(
        root=str(root),
        labs_csv={"train": TABLES["train"], "validation": None, "test": TABLES["test"]},
        id_column="hadm_id",
        only_rows={"label": "1"},
        ecg_folder=ECG_FOLDER,
        cxr_folder=CXR_FOLDER,
        labs_means="QA/labs_means.json",
        qa_files=files,
        findings_csv=None,
        film=FILM,
    )
    used, wall = processor_seconds(lambda: build_store(config))
    films = number + 1
    megabytes = sum(path.stat().st_size for path in distinct) / len(distinct) / 1e6
    print(f"building, {films} studies with films of {WIDTH} x {HEIGHT} ({megabytes:.1f} MB each)")
    print(f"  JPEG decoding {1000 * per_film:.0f} ms a film, {per_film * films / used:.0%} of the processor time")
    print(f"  all of it {1000 * used / films:.0f} ms a study, {used:.1f} s of processor time in {wall:.1f} s")
    print(f"  cores: {usable_cores()} usable, {used / wall:.2f} used on average")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=800, help="of the build")
    parser.add_argument("--stored", type=int, default=4000, help="of the file that is read")
    parser.add_argument("--folder", type=Path, help="where a temporary folder may be made")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        bench_reading(Path(folder), args.stored)
        bench_build(Path(folder), args.studies)


if __name__ == "__main__":
    main()
