"""What one rank trained on in one step, in a file that nobody has to trust: arrays and JSON, no pickle.

Owns: the format of journal/steps/STEP_RANK.npz. Does not own: when a step is recorded (actors/learner_worker.py), or
repeated (pipelines/replay.py). Texts and answers are not kept, only what the learner reads.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from medtvt_rl.algorithm.losses import Denominators
from medtvt_rl.types import Completion, FinishReason, Prompt, TrainingSequence

FINISH_REASONS: tuple[FinishReason, ...] = get_args(FinishReason)
FORMAT = 1
STEPS_FOLDER, NONFINITE_FOLDER = "steps", "nonfinite"


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """The arguments of one `GrpoLearner.train_step` call.

    Attributes:
        version: completed steps of the learner before it.
    """

    version: int
    learning_rate: float
    denominators: Denominators
    sequences: tuple[TrainingSequence, ...]


def step_file(folder: Path, step: int, rank: int) -> Path:
    """Where the record of a step lies within a folder."""
    return folder / f"{step:06d}_{rank}.npz"


def write_step(path: Path, record: StepRecord) -> None:
    """Writes a record that appears whole or not at all, and survives a power cut."""
    sequences = record.sequences
    prompts = list({id(s.prompt): s.prompt for s in sequences}.values())
    place = {id(prompt): index for index, prompt in enumerate(prompts)}
    completions = [s.completion for s in sequences]
    references = [s.reference_logprobs for s in sequences if s.reference_logprobs is not None]
    if references and len(references) != len(sequences):
        raise ValueError(f"step record: {len(references)} of {len(sequences)} sequences have reference log-probs")
    header = {
        "format": FORMAT,
        "version": record.version,
        "learning_rate": record.learning_rate,
        "denominators": asdict(record.denominators),
        "prompt_ids": [prompt.prompt_id for prompt in prompts],
        "item_ids": [prompt.item_id for prompt in prompts],
        "completion_ids": [completion.completion_id for completion in completions],
        "with_reference": bool(references),
    }
    arrays: dict[str, NDArray[Any]] = {
        "header": np.frombuffer(json.dumps(header).encode(), dtype=np.uint8),
        "prompt_lengths": np.array([len(prompt.token_ids) for prompt in prompts], dtype=np.int64),
        "prompt_tokens": _joined([prompt.token_ids for prompt in prompts], np.int32),
        "prompt_index": np.array([place[id(s.prompt)] for s in sequences], dtype=np.int64),
        "group_ids": np.array([s.group_id for s in sequences], dtype=np.int64),
        "advantages": np.array([s.advantage for s in sequences], dtype=np.float64),
        "lengths": np.array([len(c.token_ids) for c in completions], dtype=np.int64),
        "finish": np.array([FINISH_REASONS.index(c.finish_reason) for c in completions], dtype=np.int8),
        "tokens": _joined([c.token_ids for c in completions], np.int32),
        "behaviour_logprobs": _joined([c.behaviour_logprobs for c in completions], np.float32),
        "policy_versions": _joined([c.policy_versions for c in completions], np.int32),
        "reference_logprobs": _joined(references, np.float32),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_step(path: Path) -> StepRecord:
    """The record of a file. Raises ValueError if it is missing, damaged, or of another format."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        header = json.loads(arrays["header"].tobytes())
        if header["format"] != FORMAT:
            raise ValueError(f"format {header['format']}, this version reads {FORMAT}")
        return _record(header, arrays)
    except FileNotFoundError as error:
        raise ValueError(f"step record: there is no {path}; was the run made with grpo.record_steps=true?") from error
    except Exception as error:  # a damaged archive fails in many ways
        raise ValueError(f"step record {path}: {error}; replay from a step whose records are whole") from error


def _record(header: dict[str, Any], arrays: dict[str, NDArray[Any]]) -> StepRecord:
    prompts = [
        Prompt(prompt_id=prompt_id, token_ids=tokens, item_id=item_id, ground_truth="")
        for prompt_id, item_id, tokens in zip(
            header["prompt_ids"], header["item_ids"], _split(arrays["prompt_tokens"], arrays["prompt_lengths"])
        )
    ]
    lengths = arrays["lengths"]
    per_token = [_split(arrays[name], lengths) for name in ("tokens", "behaviour_logprobs", "policy_versions")]
    references: Sequence[Any] = [None] * len(lengths)
    if header["with_reference"]:
        references = _split(arrays["reference_logprobs"], lengths)
    sequences = [
        TrainingSequence(
            group_id=int(arrays["group_ids"][i]),
            prompt=prompts[arrays["prompt_index"][i]],
            completion=Completion(
                completion_id=header["completion_ids"][i],
                token_ids=per_token[0][i],
                behaviour_logprobs=per_token[1][i],
                policy_versions=per_token[2][i],
                finish_reason=FINISH_REASONS[arrays["finish"][i]],
            ),
            advantage=float(arrays["advantages"][i]),
            reference_logprobs=references[i],
        )
        for i in range(len(lengths))
    ]
    return StepRecord(
        version=header["version"],
        learning_rate=header["learning_rate"],
        denominators=Denominators(**header["denominators"]),
        sequences=tuple(sequences),
    )


def _joined(parts: Sequence[NDArray[Any]], dtype: Any) -> NDArray[Any]:
    return np.concatenate([np.zeros(0, dtype=dtype), *parts]).astype(dtype)


def _split(flat: NDArray[Any], lengths: NDArray[np.int64]) -> list[NDArray[Any]]:
    if int(lengths.sum()) != len(flat):
        raise ValueError(f"{len(flat)} values for lengths that add up to {int(lengths.sum())}")
    return np.split(flat, np.cumsum(lengths)[:-1]) if len(lengths) else []
