"""What `medtvt-rl bench` measures and `medtvt-rl simulate` computes with: timings.json.

Owns: the record, its file, the formulas of each role's time. Does not own: how it is measured (pipelines/bench.py), or
what follows from it (engine.py, roles.py). All times are those of a role that has its cores to itself.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any


class TimingsError(ValueError):
    """A file of timings that cannot be used; the message names it and the mend."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """Seconds of each role's work.

    Attributes:
        cores: logical CPUs that could be used of the machine that was measured.
        beside: speed of a thread while others keep the machine's remaining cores busy, over its speed alone.
        decode_s: (completions that run together, seconds of one token of all), by rising number.
        context_s: of one token, for every token that it attends to.
        prefill_group_s, prefill_completion_s, prefill_token_s: what begins a group, each of its completions, and each
            token of its prompt.
        recompute_token_s: of each token of what runs when new weights come.
        start_s: from the start of a generator to its first answer.
        reward_s: of a group. reference_group_s, reference_token_s: of a group, and of each token of it.
        learner_step_s, learner_token_s: of a step, and of each token of its prompts and completions and each update.
        score_s: the learner's log-probs of a probe.
        export_s, load_s, weight_bytes: of a published version.
        driver_call_s: CPU of the driver for a call of an actor and its answer. answer_s: what the way to an actor and
            back takes besides, with nobody working.
        prompt_tokens: of a prompt, on average.
        lengths: completion tokens of measured groups, one row a group.
        equal_share: of groups whose rewards were all equal.
        learner_ranks: with which learner_token_s was measured.
    """

    cores: int
    beside: float
    decode_s: tuple[tuple[float, float], ...]
    context_s: float
    prefill_group_s: float
    prefill_completion_s: float
    prefill_token_s: float
    recompute_token_s: float
    start_s: float
    reward_s: float
    reference_group_s: float
    reference_token_s: float
    learner_step_s: float
    learner_token_s: float
    score_s: float
    export_s: float
    load_s: float
    weight_bytes: float
    driver_call_s: float
    answer_s: float
    prompt_tokens: float
    lengths: tuple[tuple[int, ...], ...]
    equal_share: float = 0.0
    learner_ranks: int = 1
    made_by: str = ""

    def decode_step_s(self, running: int, context: float) -> float:
        """One token of each of `running` completions that attend to `context` tokens in all."""
        numbers = [number for number, _ in self.decode_s]
        place = min(max(1, bisect_right(numbers, running)), len(numbers) - 1) if len(numbers) > 1 else 0
        (low, low_s), (high, high_s) = self.decode_s[place - 1], self.decode_s[place]
        share = (running - low) / (high - low) if high > low else 0.0
        return max(low_s + share * (high_s - low_s), 1e-9) + self.context_s * context

    def prefill_s(self, completions: int, prompt_tokens: float) -> float:
        """Until a group's first token."""
        tokens = self.prefill_token_s * prompt_tokens
        return self.prefill_group_s + self.prefill_completion_s * completions + tokens

    def reference_s(self, tokens: float) -> float:
        """A group of so many tokens of prompts and completions."""
        return self.reference_group_s + self.reference_token_s * tokens

    def learner_s(self, tokens: float, updates: int, ranks: int) -> float:
        """A step of so many tokens, spread over ranks, without what they tell each other."""
        return self.learner_step_s + self.learner_token_s * tokens * updates * self.learner_ranks / ranks

    @property
    def mean_length(self) -> float:
        """Tokens of a completion, on average."""
        count = sum(len(group) for group in self.lengths)
        return sum(map(sum, self.lengths)) / max(count, 1)

    def write(self, path: Path) -> None:
        """As JSON."""
        rows = json.dumps(asdict(self), indent=1)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(rows + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Timings:
        """Raises TimingsError where there is no such file, or it is none of timings."""
        mend = "measure with `medtvt-rl bench -c CONFIG`, or name a file with --timings"
        if not path.is_file():
            raise TimingsError(f"timings: there is no {path}; {mend}")
        try:
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise TimingsError(f"timings: {path} is no JSON ({error}); {mend}") from error
        names = {field.name for field in fields(cls)}
        wanted = names - {"equal_share", "learner_ranks", "made_by"}
        if not isinstance(found, dict) or not wanted <= found.keys() <= names:
            missing = sorted(wanted - found.keys()) if isinstance(found, dict) else []
            raise TimingsError(f"timings: {path} is no file of timings (missing: {', '.join(missing)}); {mend}")
        found["decode_s"] = tuple((float(number), float(seconds)) for number, seconds in found["decode_s"])
        found["lengths"] = tuple(tuple(int(length) for length in group) for group in found["lengths"])
        timings = cls(**found)
        numbers = [getattr(timings, name) for name in names - {"decode_s", "lengths", "made_by"}]
        are_times = all(isinstance(number, int | float) and number >= 0 for number in numbers)
        if not timings.decode_s or not timings.lengths or not are_times:
            raise TimingsError(f"timings: {path} holds a value that is no time, or none at all; {mend}")
        return timings
