"""Checkpoints of a supervised stage: one after each epoch, which appears complete or not at all.

    checkpoint/epoch_000002/rank_00000.safetensors   weights, optimizer and random state, named tensors of each rank
                            rest.safetensors         buffers, and encoders that were warmed up and then frozen
                            manifest.json            checksums, progress, settings, packages, what it is of
               best_000001/                          the policy of the best epoch so far, a model folder

Owns: these folders, which of them are kept, and what of the policy no optimizer holds. Does not own: the files of the
ranks (training_state.py), training (supervised.py), or whether a stage may go on from one (pipelines/stage_resume.py).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from medtvt_rl.learner.engine import TrainingEngine
from medtvt_rl.learner.supervised import Progress
from medtvt_rl.learner.training_state import rank_file
from medtvt_rl.manifest import is_damage, read_manifest, write_manifest
from medtvt_rl.model.seal import SEAL, check_model_folder
from medtvt_rl.storage import Storage, digest_of, sync

FORMAT = 1
PREFIX, BEST, REST = "epoch_", "best_", "rest.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochCheckpoint:
    """A whole checkpoint.

    Attributes:
        place: its folder.
        encoder_auc: what the warm-up of the encoders came to.
        settings, packages, identity: of the run that wrote it, see pipelines/resume.py.
    """

    place: str
    progress: Progress
    encoder_auc: dict[str, float]
    settings: dict[str, Any]
    packages: dict[str, str]
    identity: dict[str, str]

    def restore_rest(self, policy: nn.Module) -> None:
        """Gives a policy that no engine holds yet what an engine's state does not have."""
        tensors = {**dict(policy.named_buffers()), **dict(policy.named_parameters())}
        with torch.no_grad(), safe_open(Path(self.place) / REST, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                tensors[name].copy_(file.get_tensor(name))


class EpochCheckpoints:
    """The checkpoints of a stage.

    Args:
        folder: theirs alone.
        output: where the best policy comes to lie at the end of the stage.
    """

    def __init__(self, folder: Path, output: Path) -> None:
        self.folder, self.output = folder, output
        self._storage = Storage(str(folder))

    @property
    def epochs(self) -> list[int]:
        """After which epochs there are some, the newest first; they may be damaged."""
        numbers = [name.removeprefix(PREFIX) for name in self._storage.names() if name.startswith(PREFIX)]
        return sorted((int(number) for number in numbers if number.isdigit()), reverse=True)

    def newest(self, report: Callable[[str], None]) -> EpochCheckpoint | None:
        """The newest whole one, None if there is none; each damaged one is reported, and passed over."""
        for epochs in self.epochs:
            try:
                return self._read(_name(epochs))
            except Exception as error:
                if not is_damage(error, self._storage):
                    raise
                place = self._storage.at(_name(epochs))
                report(f"checkpoint {place} is damaged and passed over: {' '.join(str(error).split())}")
        return None

    def _read(self, name: str) -> EpochCheckpoint:
        """Raises OSError or ValueError if a file is missing, or not the one that was written."""
        manifest = read_manifest(self._storage, name, FORMAT)
        progress = Progress(**manifest["progress"])
        if manifest["best"] is not None:
            # The end of a stage moves the best policy; what was cut short right behind it is whole.
            places = [place for place in (self.best(progress.best_epoch), self.output) if (place / SEAL).is_file()]
            if not places or digest_of(places[0] / SEAL) != manifest["best"]:
                raise ValueError(f"the policy of its best epoch, {self.best(progress.best_epoch)}, is missing")
            check_model_folder(places[0], sealed=True)
        return EpochCheckpoint(
            place=self._storage.at(name),
            progress=progress,
            **{key: manifest[key] for key in ("encoder_auc", "settings", "packages", "identity")},
        )

    def best(self, epoch: int) -> Path:
        """Where the policy of an epoch (0-based) lies, if it was the best when it ended."""
        return self.folder / f"{BEST}{epoch:06d}"

    def begin(self, epochs: int) -> Path:
        """The empty folder in which to write the one after so many epochs; what was left there is removed."""
        folder = self.unfinished(epochs)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder

    def give_up(self, epochs: int) -> None:
        """Removes what was written since `begin`."""
        shutil.rmtree(self.unfinished(epochs), ignore_errors=True)

    def complete(self, progress: Progress, num_ranks: int, content: dict[str, Any]) -> None:
        """Lets the one that was begun appear, and removes those before it. Raises OSError if a file is missing."""
        folder, name, best = self.unfinished(progress.epochs), _name(progress.epochs), self.best(progress.best_epoch)
        paths = [*(rank_file(folder, rank) for rank in range(num_ranks)), folder / REST]
        files = {path.name: digest_of(path) for path in paths}
        seal = digest_of(best / SEAL) if progress.best_epoch >= 0 else None
        write_manifest(
            self._storage, folder.name, FORMAT, files, {**content, "progress": asdict(progress), "best": seal}
        )
        self._storage.remove(name)
        self._storage.rename(folder.name, name)
        for other in self._storage.names():
            if other not in (name, best.name):
                self._storage.remove(other)

    def clear(self) -> None:
        """Removes all of them."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def unfinished(self, epochs: int) -> Path:
        """The folder of `begin`."""
        return self.folder / f".{_name(epochs)}.writing"


class EpochKeeper:
    """Writes the checkpoints of a stage; each rank has one.

    Args:
        warmed: the encoders are not those of the start folder.
        content: what else the manifest says, see EpochCheckpoint.
        report: told in one line what went wrong.
    """

    def __init__(
        self,
        checkpoints: EpochCheckpoints,
        engine: TrainingEngine,
        warmed: bool,
        content: dict[str, Any],
        report: Callable[[str], None],
    ) -> None:
        self._checkpoints, self._engine, self._warmed = checkpoints, engine, warmed
        self._content, self._report = content, report

    def keep(self, progress: Progress) -> None:
        """Writes one (all ranks). One that cannot be written is told, and costs nothing else: the one before stays."""
        for phase in (self._begin, self._write, self._complete):
            if not self._succeeds(phase, progress):
                if self._engine.rank == 0:
                    self._checkpoints.give_up(progress.epochs)
                return

    def _begin(self, progress: Progress) -> None:
        if self._engine.rank == 0:
            self._checkpoints.begin(progress.epochs)

    def _write(self, progress: Progress) -> None:
        rest, folder = self._rest(), self._checkpoints.unfinished(progress.epochs)
        self._engine.state(copy=False).write(rank_file(folder, self._engine.rank))
        if self._engine.rank == 0:
            save_file(rest, folder / REST)
            sync(folder / REST)

    def _complete(self, progress: Progress) -> None:
        if self._engine.rank == 0:
            self._checkpoints.complete(progress, self._engine.world_size, self._content)

    def _succeeds(self, phase: Callable[[Progress], None], progress: Progress) -> bool:
        """Whether it did on every rank (all ranks)."""
        failed = torch.zeros(1)
        try:
            phase(progress)
        except (OSError, SafetensorError) as error:
            failed += 1
            reason = " ".join(str(error).split()) or type(error).__name__
            self._report(f"the checkpoint after epoch {progress.epochs} could not be written ({reason})")
        return not bool(self._engine.all_reduce(failed, "max").item())

    def _rest(self) -> dict[str, Tensor]:
        """What the engine's state does not have and a stage may change, on rank 0 (all ranks): buffers, as of a
        BatchNorm, and encoders that were warmed up and do not train."""
        policy = cast(Any, self._engine.policy)
        found: dict[str, Tensor] = dict(policy.named_buffers())
        if self._warmed:
            tower = policy.study_tower.named_parameters(prefix="study_tower")
            found |= {name: parameter for name, parameter in tower if not parameter.requires_grad}
        with self._engine.gathered([value for value in found.values() if isinstance(value, nn.Parameter)]):
            first = self._engine.rank == 0
            return {name: value.detach().cpu().clone() for name, value in found.items()} if first else {}


def _name(epochs: int) -> str:
    """Of the checkpoint after so many epochs."""
    return f"{PREFIX}{epochs:06d}"
