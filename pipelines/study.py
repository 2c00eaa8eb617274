"""Says which study a hashed id of a run's logs stands for: `medtvt-rl study runs/NAME study-3f9a0c12b7de`.

Owns: the search over the study store and the journal. Does not own: the hash (medtvt_rl/privacy.py). Whoever can read
the salt and the data may ask; the answer is an id.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from medtvt_rl.config import Config
from medtvt_rl.data.study_build import store_folder
from medtvt_rl.data.study_store import StudyStore
from medtvt_rl.privacy import PREFIX, hash_with, read_salt, salt_path
from pipelines.command import EXIT_FAILED, EXIT_USAGE, fail
from pipelines.json_lines import read_rows
from pipelines.replay import ReplayError, load_run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `study`."""
    parser.add_argument("run", type=Path, help="folder of the run, e.g. runs/quickstart")
    parser.add_argument("hashed", help=f"as a log, an error or the report has it, e.g. {PREFIX}3f9a0c12b7de")


def command(args: argparse.Namespace) -> int:
    """`medtvt-rl study`; returns the exit code."""
    try:
        config = load_run(args.run)
        salt = read_salt(salt_path(config.privacy, config.folder))
        found = next((name for name in known_ids(config) if hash_with(salt, name) == args.hashed), None)
    except (ValueError, ReplayError) as error:
        return fail(str(error), EXIT_USAGE)
    if found is None:
        return fail(f"{args.hashed} is no study, patient or prompt of {args.run}; is it from another run?", EXIT_FAILED)
    print(found)
    return 0


def known_ids(config: Config) -> Iterator[str]:
    """Ids of the studies and patients of the store, and of the prompts in the journal."""
    if config.task.items is not None:
        store = StudyStore.open(store_folder(config.data))
        for split in store.splits:
            for study_id in store.study_ids(split):
                yield from (study_id, store.patient_id(study_id))
    for name in ("groups", "discarded"):
        yield from (str(row.get("prompt_id")) for row in read_rows(config.folder / "journal" / f"{name}.jsonl"))


if __name__ == "__main__":
    from pipelines.cli import main

    sys.exit(main(["study", *sys.argv[1:]]))
