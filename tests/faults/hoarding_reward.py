"""A reward function that fills the object store of its node while the file $HOARD_FILE exists, and rewards nothing. The
file $HOARD_FILE.full says that it holds more than has room there."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import ray

PIECE_BYTES, NUM_PIECES = 8 << 20, 16
"""Together half as much again as the store holds."""
hoard: list[tuple[ray.ObjectRef, Any]] = []


def hoarding_reward(completion: str, ground_truth: str) -> float:
    """Always 0. What it keeps is mapped, so that it can neither be evicted nor spilled away."""
    flag = Path(os.environ.get("HOARD_FILE", "/nowhere"))
    wanted = flag.exists()
    if not wanted:
        hoard.clear()
    while wanted and len(hoard) < NUM_PIECES:
        reference = ray.put(np.ones(PIECE_BYTES, dtype=np.uint8))
        hoard.append((reference, ray.get(reference)))
        if len(hoard) == NUM_PIECES:
            flag.with_suffix(".full").touch()
    return 0.0
