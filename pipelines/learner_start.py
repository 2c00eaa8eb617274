"""The learners of a GRPO run: started, brought to the weights of a checkpoint, and under supervision.

Owns: which checkpoints are of this run, what its journal says of earlier steps. Does not own: the gang and its restarts
(actors/), or the form of checkpoints (checkpoints.py).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from actors.learner_gang import LearnerGang, make_worker
from actors.learner_supervisor import LearnerSupervisor, StepNote
from actors.placement import Placement
from actors.spares import Spares
from actors.supervision import Incidents
from actors.timeline import Timeline
from medtvt_rl.config import Config
from pipelines import checkpoints
from pipelines.journal import read_steps


class CheckpointShelf:
    """The checkpoints that this run wrote or went on from; others in the folder may be of a run before it.

    Args:
        report: told in one line of each that is damaged.
    """

    def __init__(self, config: Config, report: Callable[[str], None], first: int = 0) -> None:
        self._config, self._report = config, report
        self._versions = {first} if first else set[int]()

    def add(self, version: int) -> None:
        """One was completed."""
        self._versions.add(version)

    def newest(self, version: int) -> tuple[Path, int] | None:
        """See Shelf."""
        for known in sorted((each for each in self._versions if each <= version), reverse=True):
            folder = self._config.checkpoint_folder(known)
            try:
                return checkpoints.read(folder).learner, known
            except FileNotFoundError:
                continue  # it made room for newer ones
            except (OSError, ValueError, KeyError) as error:
                self._report(f"checkpoint {folder} is damaged and passed over: {error}")
        return None


def earlier_steps(config: Config, first: int) -> dict[int, StepNote]:
    """What the journal says of the steps before `first`."""
    if first == 0:
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
    timeline: Timeline,
    incidents: Incidents,
    found: checkpoints.Checkpoint | None,
) -> tuple[LearnerSupervisor, CheckpointShelf]:
    """The learners with the weights of `folder`, or of a checkpoint, and the shelf that new checkpoints go on."""
    settings = config.learner
    spares = Spares(
        "learner",
        settings.spares,
        lambda rank: make_worker(config, placement, rank, spare=True),
        settings.start_timeout_s,
        "learner.start_timeout_s",
    )
    first = 0 if found is None else found.version
    shelf = CheckpointShelf(config, incidents.report, first)

    async def start() -> LearnerGang:
        return await LearnerGang.start(config, placement, folder, timeline, spares)

    gang = await start()
    if found is not None:
        await gang.load_checkpoint(found.learner)
    steps = earlier_steps(config, first)
    return LearnerSupervisor(config, start, gang, shelf, steps, incidents, spares), shelf
