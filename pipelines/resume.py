"""Whether and where an interrupted GRPO stage goes on, and whether a checkpoint is of the same training.

Owns: which settings may differ, what else must be the same (model, tokenizer, data), the words for the reader. Does not
own: which checkpoints are whole (checkpoints.py), taking their state over (grpo.py), or the supervised stages
(stage_resume.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from actors.failure import cause_of
from medtvt_rl.config import Config
from pipelines.checkpoints import Checkpoint, CheckpointStore, packages
from pipelines.stages import differences, resolved_settings, selected

# Another value of one of these would train something else with the state of this run.
BINDING = (
    "run.seed",
    "task",
    "data",
    "cohort",
    "model",
    "rewards",
    "rollout.sampling",
    "grpo.group_size",
    "grpo.groups_per_step",
    "learner.dtype",
)
# Places and speeds; content is compared instead.
PLACES = (
    *(("data", "root"), ("data", "store"), ("data", "num_workers"), ("model", "init")),
    *(
        (stage, name)
        for stage in ("pretrain", "sft")
        for name in ("num_workers", "num_threads", "zero_stage", "timeout_s")
    ),
)
WORDS = {
    "model": "the model or tokenizer that the run started from",
    "prompts": "the prompts that the data and the tokenizer give",
    "items": "the data behind the prompts",
    "examples": "the examples that the data and the tokenizer give",
}

AND_AUTO = {"auto": "", "never": "with resume=auto "}
"""By `resume`: what the command that was given needs besides to go on."""


class Kept(Protocol):
    """What a checkpoint says of the run that wrote it."""

    @property
    def place(self) -> str: ...
    @property
    def settings(self) -> dict[str, Any]: ...
    @property
    def packages(self) -> dict[str, str]: ...
    @property
    def identity(self) -> dict[str, str]: ...


class ResumeError(RuntimeError):
    """A checkpoint that this run must not go on from; the message names what differs, and the mend."""


def find_resume(
    config: Config, store: CheckpointStore, identity: Mapping[str, str], report: Callable[[str], None]
) -> Checkpoint | None:
    """The checkpoint to go on from, with a line for the reader; None where the stage starts anew.

    Raises:
        ResumeError: what its state depends on has changed, or there are checkpoints, none of which can be read, or
            whether there are any cannot be said.
    """
    if config.resume == "never":
        return None
    try:
        is_finished = store.is_finished
        found = None if is_finished else store.newest(report)
    except Exception as error:  # the client of a store raises what it likes
        raise ResumeError(
            f"the checkpoints in {config.checkpoint_root} cannot be read ({cause_of(error)}); nothing was started, try "
            "again when they can"
        ) from error
    if is_finished:
        report(f"starts anew: the checkpoints in {config.checkpoint_root} are of a finished stage")
        return None
    if found is None:
        check_none_lost(len(store.damaged), config.checkpoint_root)
    else:
        changed = check_same(found, config, identity)
        report(f"goes on from step {found.version} ({found.place}){', with ' if changed else ''}{'; '.join(changed)}")
    return found


def check_none_lost(num_damaged: int, place: str) -> None:
    """Raises ResumeError where all checkpoints were passed over: to start anew would remove them, and the store may
    only be out of reach."""
    if num_damaged:
        raise ResumeError(
            f"no checkpoint in {place} can be read, {num_damaged} lie there, see above; "
            "bring them back, or start anew with resume=never, which removes them"
        )


def check_same(checkpoint: Checkpoint, config: Config, identity: Mapping[str, str]) -> list[str]:
    """What differs from the run that wrote it, where that is allowed.

    Raises:
        ResumeError: something differs that its state depends on.
    """
    check_binding(checkpoint, config, identity, BINDING)
    if checkpoint.version > config.grpo.steps:
        raise ResumeError(
            f"checkpoint {checkpoint.place} has {checkpoint.version} steps, and grpo.steps is {config.grpo.steps}; "
            f"set at least {checkpoint.version}, or start anew with resume=never"
        )
    return differences(checkpoint.settings, resolved_settings(config)) + other_packages(checkpoint)


def check_binding(kept: Kept, config: Config, identity: Mapping[str, str], keys: Sequence[str]) -> None:
    """Raises ResumeError where content, or a setting below one of the keys, is another than that of a checkpoint."""
    mend = "take that back, choose another run.name, or start anew with resume=never"
    binding = differences(_binding(kept.settings, keys), _binding(resolved_settings(config), keys))
    if binding:
        raise ResumeError(f"checkpoint {kept.place} is of a run with other settings ({'; '.join(binding[:5])}); {mend}")
    other = [WORDS[key] for key, value in identity.items() if kept.identity.get(key, value) != value]
    if other:
        raise ResumeError(f"checkpoint {kept.place}: {' and '.join(other)} changed since then; {mend}")


def other_packages(kept: Kept) -> list[str]:
    """The libraries of which another version wrote a checkpoint."""
    libraries = {name: value for name, value in packages().items() if name in kept.packages}
    return differences({name: kept.packages[name] for name in libraries}, libraries)


def _binding(settings: dict[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    found = selected(settings, keys)
    for key, name in PLACES:
        if key in found:
            found[key].pop(name, None)
    return found
