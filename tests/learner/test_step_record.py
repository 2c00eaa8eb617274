"""Records of learner steps: what goes in comes out, bit for bit, and damage is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from stored_examples import watch_syncs

from medtvt_rl.algorithm.losses import Denominators
from medtvt_rl.learner.step_record import StepRecord, read_step, step_file, write_step
from medtvt_rl.types import Completion, Prompt, TrainingSequence


def a_record(with_reference: bool = True) -> StepRecord:
    rng = np.random.default_rng(0)
    prompts = [
        Prompt(prompt_id=f"p{i}", token_ids=np.arange(3 + i, dtype=np.int32), item_id=item, ground_truth="secret")
        for i, item in enumerate(["study 7", None])
    ]
    sequences = []
    for index, length in enumerate([4, 0, 1, 9]):
        completion = Completion(
            completion_id=f"{index // 2}/{index % 2}",
            token_ids=rng.integers(0, 99, length).astype(np.int32),
            behaviour_logprobs=rng.normal(size=length).astype(np.float32),
            policy_versions=rng.integers(0, 3, length).astype(np.int32),
            finish_reason="length" if index == 3 else "stop",
        )
        sequences.append(
            TrainingSequence(
                group_id=index // 2,
                prompt=prompts[index // 2],
                completion=completion,
                advantage=float(rng.normal()),
                reference_logprobs=rng.normal(size=length).astype(np.float32) if with_reference else None,
            )
        )
    return StepRecord(
        version=11,
        learning_rate=1 / 3,
        denominators=Denominators(num_sequences=8, num_tokens=40, max_new_tokens=16),
        sequences=tuple(sequences),
    )


@pytest.mark.parametrize("with_reference", [True, False])
def test_a_record_comes_back_bit_for_bit(tmp_path: Path, with_reference: bool) -> None:
    record, path = a_record(with_reference), step_file(tmp_path / "steps", 11, 1)
    write_step(path, record)
    found = read_step(path)
    assert (found.version, found.learning_rate, found.denominators) == (11, 1 / 3, record.denominators)
    for before, after in zip(record.sequences, found.sequences, strict=True):
        assert (before.group_id, before.advantage) == (after.group_id, after.advantage)
        assert before.prompt.item_id == after.prompt.item_id
        assert before.completion.finish_reason == after.completion.finish_reason
        for name in ("token_ids", "behaviour_logprobs", "policy_versions"):
            old, new = getattr(before.completion, name), getattr(after.completion, name)
            assert old.dtype == new.dtype
            assert old.tobytes() == new.tobytes()
        assert before.prompt.token_ids.tobytes() == after.prompt.token_ids.tobytes()
        if with_reference:
            assert before.reference_logprobs is not None and after.reference_logprobs is not None
            assert before.reference_logprobs.tobytes() == after.reference_logprobs.tobytes()
        else:
            assert after.reference_logprobs is None
    assert [s.prompt is found.sequences[0].prompt for s in found.sequences] == [True, True, False, False]
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert b"secret" not in path.read_bytes()


def test_missing_and_damaged_records_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"000003_0\.npz.*grpo\.record_steps"):
        read_step(step_file(tmp_path, 3, 0))
    path = step_file(tmp_path, 11, 0)
    write_step(path, a_record())
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"000011_0\.npz"):
        read_step(path)


def test_a_record_survives_a_power_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced, path = watch_syncs(monkeypatch), step_file(tmp_path, 11, 0)
    write_step(path, a_record())
    assert synced[f".{path.name}.tmp"] == path.stat().st_size
