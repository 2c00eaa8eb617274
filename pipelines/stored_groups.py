"""Finished groups that wait for their step, in a file: so that a run that goes on has every rollout that was paid for.

Owns: the format, arrays and JSON. A prompt is kept by its id alone: the sampler has it. Does not own: which groups wait
(group_ledger.py), or where the file lies (checkpoints.py).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save_file

from medtvt_rl.privacy import hashed
from medtvt_rl.rewards.scorer import GroupRewards
from medtvt_rl.types import Completion, GroupHeader, Prompt, ReferenceHeader, RolloutGroup
from pipelines.grpo_roles import FinishedGroup

logger = logging.getLogger(__name__)

Arrays = dict[str, NDArray[Any]]


def write_groups(path: Path, groups: Sequence[FinishedGroup], fetch: Callable[[Any], Any]) -> None:
    """Writes groups with their completions, rewards and reference log-probs.

    Args:
        fetch: from a handle of the loop to what is behind it. A group that cannot be fetched is left out: it is made
            again with the same id.
    """
    arrays: Arrays = {}
    headers = []
    for group in groups:
        try:
            payload = fetch(group.payload)
            reference = None if group.reference is None else fetch(group.reference)
        except Exception as error:  # its node may be gone, which Ray tells in many ways
            logger.warning("group %d is not kept: %s", group.header.group_id, error)
            continue
        headers.append(_header(group, payload))
        own = _arrays(group, payload, reference)
        arrays |= {f"{group.header.group_id}/{name}": np.ascontiguousarray(values) for name, values in own.items()}
    save_file(arrays, path, metadata={"groups": json.dumps(headers)})


def read_groups(path: Path, prompts: Mapping[int, Prompt], put: Callable[[Any], Any]) -> list[FinishedGroup]:
    """The groups of a file.

    Args:
        prompts: of each group id.
        put: from what is behind a handle to the handle.

    Raises:
        ValueError: a group's prompt is another one now.
    """
    with safe_open(path, framework="np") as file:
        headers = json.loads(file.metadata()["groups"])
        return [_group(header, prompts[header["group_id"]], file.get_tensor, put) for header in headers]


def _header(group: FinishedGroup, payload: RolloutGroup) -> dict[str, Any]:
    header, reference = group.header, group.reference_header
    return {
        "group_id": header.group_id,
        "prompt_id": header.prompt_id,
        "lengths": list(header.lengths),
        "oldest_version": header.oldest_version,
        "newest_version": header.newest_version,
        "generate_s": header.generate_s,
        "num_cut": header.num_cut,
        "finish_reasons": [completion.finish_reason for completion in payload.completions],
        "components": list(group.rewards.components),
        "failures": list(group.rewards.reasons),
        "reward_s": group.rewards.seconds,
        "reference_s": None if reference is None else reference.seconds,
    }


def _arrays(group: FinishedGroup, payload: RolloutGroup, reference: Sequence[NDArray[Any]] | None) -> Arrays:
    completions, rewards = payload.completions, group.rewards
    arrays: Arrays = {
        "tokens": np.concatenate([c.token_ids for c in completions]),
        "behaviour_logprobs": np.concatenate([c.behaviour_logprobs for c in completions]),
        "policy_versions": np.concatenate([c.policy_versions for c in completions]),
        "total": rewards.total,
        "failed": rewards.failed,
    }
    arrays |= {f"reward/{name}": values for name, values in rewards.components.items()}
    if reference is not None and group.reference_header is not None:
        arrays |= {"reference_logprobs": np.concatenate(reference), "kl": group.reference_header.kl}
    return arrays


def _group(
    header: dict[str, Any], prompt: Prompt, array: Callable[[str], NDArray[Any]], put: Callable[[Any], Any]
) -> FinishedGroup:
    group_id = header["group_id"]
    if prompt.prompt_id != header["prompt_id"]:
        raise ValueError(
            f"group {group_id}: its prompt was {hashed(header['prompt_id'])}, and is {hashed(prompt.prompt_id)} now; "
            "resume with the data that the run began with"
        )

    def of(name: str) -> NDArray[Any]:
        return array(f"{group_id}/{name}")

    ends = np.cumsum(header["lengths"])[:-1]
    tokens, logprobs, versions = (
        np.split(of(name), ends) for name in ("tokens", "behaviour_logprobs", "policy_versions")
    )
    completions = tuple(
        Completion(
            completion_id=f"{group_id}/{index}",
            token_ids=tokens[index],
            behaviour_logprobs=logprobs[index],
            policy_versions=versions[index],
            finish_reason=reason,
        )
        for index, reason in enumerate(header["finish_reasons"])
    )
    has_reference = header["reference_s"] is not None
    return FinishedGroup(
        header=GroupHeader(
            lengths=tuple(header["lengths"]),
            **{
                name: header[name]
                for name in ("group_id", "prompt_id", "num_cut", "oldest_version", "newest_version", "generate_s")
            },
        ),
        payload=put(RolloutGroup(group_id=group_id, prompt=prompt, completions=completions)),
        rewards=GroupRewards(
            components={name: of(f"reward/{name}") for name in header["components"]},
            total=of("total"),
            failed=of("failed"),
            reasons=tuple(header["failures"]),
            seconds=header["reward_s"],
        ),
        reference=put(tuple(np.split(of("reference_logprobs"), ends))) if has_reference else None,
        reference_header=ReferenceHeader(kl=of("kl"), seconds=header["reference_s"]) if has_reference else None,
    )
