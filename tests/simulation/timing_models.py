"""Timings for tests: round numbers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from medtvt_rl.simulation.timings import Timings

PLAIN = Timings(
    cores=2,
    beside=1.0,
    decode_s=((1.0, 0.01), (128.0, 0.01)),
    context_s=0.0,
    prefill_group_s=0.0,
    prefill_completion_s=0.0,
    prefill_token_s=0.0,
    recompute_token_s=0.0,
    start_s=20.0,
    reward_s=0.001,
    reference_group_s=0.0,
    reference_token_s=0.0,
    learner_step_s=1.0,
    learner_token_s=0.0,
    score_s=0.0,
    export_s=0.0,
    load_s=0.0,
    weight_bytes=0.0,
    driver_call_s=0.0,
    answer_s=0.0,
    prompt_tokens=10.0,
    lengths=((50,) * 8,),
)


def timings(**changes: Any) -> Timings:
    return replace(PLAIN, **changes)
