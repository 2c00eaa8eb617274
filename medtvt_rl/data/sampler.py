"""The order in which prompts are drawn, and its place across a resume.

Owns: epochs, their shuffles, the position. Does not own: how many groups may be in flight (rollout/buffer.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medtvt_rl.types import Prompt


class PromptSampler:
    """Draws every prompt once per epoch, in an order that (seed, epoch) alone decides."""

    def __init__(self, prompts: Sequence[Prompt], seed: int) -> None:
        """Raises ValueError without prompts."""
        if not prompts:
            raise ValueError("prompts: 0 given, expected at least 1; check that the split has usable questions")
        self._prompts = prompts
        self._seed = seed
        self._epoch = 0
        self._position = 0
        self._order = self._shuffled(0)

    def next(self) -> tuple[int, int, Prompt]:
        """(epoch, index of the prompt in `prompts`, the prompt)."""
        if self._position == len(self._prompts):
            self._epoch, self._position = self._epoch + 1, 0
            self._order = self._shuffled(self._epoch)
        index = int(self._order[self._position])
        self._position += 1
        return self._epoch, index, self._prompts[index]

    def prompt(self, index: int) -> Prompt:
        """The prompt of an index that `next` gave."""
        return self._prompts[index]

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs in order to go on with the very next prompt."""
        return {
            "seed": self._seed,
            "num_prompts": len(self._prompts),
            "epoch": self._epoch,
            "position": self._position,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state` was taken. Raises ValueError if seed or number of prompts differ, naming which."""
        own = self.state_dict()
        for key in ("seed", "num_prompts"):
            if state[key] != own[key]:
                raise ValueError(
                    f"sampler state: {key} is {state[key]} in the checkpoint and {own[key]} now; "
                    "resume with the data and run.seed that the run began with"
                )
        if not 0 <= state["position"] <= len(self._prompts) or state["epoch"] < 0:
            raise ValueError(
                f"sampler state: epoch {state['epoch']}, position {state['position']} cannot be; it is damaged"
            )
        self._epoch, self._position = int(state["epoch"]), int(state["position"])
        self._order = self._shuffled(self._epoch)

    def _shuffled(self, epoch: int) -> NDArray[np.int64]:
        return np.random.default_rng([self._seed, epoch]).permutation(len(self._prompts))
