"""The learners of a GRPO run: started, brought to the weights of a checkpoint, and under supervision.

Owns: which checkpoints are of this run, what its journal says of earlier steps. Does not own: the gang and its restarts
(actors/), or the form of checkpoints (checkpoints.py).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from actors.failure import cause_of
from actors.learner_gang import LearnerGang, make_worker
from actors.learner_supervisor import LearnerSupervisor, OutOfReachError, StepNote
from actors.placement import Placement
from actors.spares import Spares
from actors.supervision import Incidents
from actors.timeline import Timeline
from medtvt_rl.config import Config
from pipelines.checkpoints import Checkpoint, CheckpointStore
from pipelines.journal import STEPS_FILE, read_steps


class CheckpointShelf:
    """The checkpoints that this run wrote or went on from; those of a run before it are gone when it starts anew.

    Args:
        report: told in one line of each that is damaged.
    """

    def __init__(self, store: CheckpointStore, report: Callable[[str], None]) -> None:
        self._store, self._report = store, report

    def newest(self, version: int) -> tuple[str, int] | None:
        """See Shelf."""
        try:
            found = self._store.newest(self._report, version)
        except Exception as error:  # the client of a store raises what it likes
            raise OutOfReachError(cause_of(error)) from error
        return None if found is None else (found.learner, found.version)


def earlier_steps(config: Config, first: int) -> dict[int, StepNote]:
    """What the journal says of the steps before `first`; nothing where the run folder was lost, but for the
    checkpoints."""
    if first == 0 or not (config.folder / "journal" / STEPS_FILE).is_file():
        return {}
    lines = read_steps(config.folder / "journal")
    return {
        line["step"]: StepNote(changed=not line["skipped"], checksum=line["checksum"])
        for line in lines
        if line["step"] < first
    }


async def start_learner(
    config: Config,
    placement: Placement,
    folder: Path,
    incidents: Incidents,
    timeline: Timeline,
    store: CheckpointStore,
    found: Checkpoint | None,
) -> LearnerSupervisor:
    """The learners with the weights of `folder`, or of a checkpoint; their restarts begin at those of `store`."""
    settings = config.learner
    spares = Spares(
        "learner",
        settings.spares,
        lambda rank: make_worker(config, placement, rank, spare=True),
        settings.start_timeout_s,
        "learner.start_timeout_s",
    )
    shelf = CheckpointShelf(store, incidents.report)

    async def start() -> LearnerGang:
        return await LearnerGang.start(config, placement, folder, timeline, spares)

    gang = await start()
    if found is not None:
        await gang.load_checkpoint(found.learner)
    version = 0 if found is None else found.version
    steps = earlier_steps(config, version)
    return LearnerSupervisor(config, start, gang, shelf, steps, incidents, spares, placement, version)
