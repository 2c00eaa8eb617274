"""The actor that scores finished groups: sets up its process, decodes, and hands over to `Scorer`.

Owns: one tokenizer and one scorer. Does not own: the reward functions, or which groups it gets.
"""

from __future__ import annotations

import ray
from transformers import AutoTokenizer

from actors.process import Whereabouts, whereabouts
from medtvt_rl.config import Config
from medtvt_rl.logs import redirect_output
from medtvt_rl.privacy import open_for
from medtvt_rl.rewards.scorer import GroupRewards, Scorer
from medtvt_rl.types import RolloutGroup


@ray.remote(concurrency_groups={"health": 1})  # type: ignore[call-overload]
class RewardScorer:
    """Scores one group at a time.

    Args:
        config: of the run; `config.rewards` names the functions.
        tokenizer_folder: a Hugging Face folder with the tokenizer of the policy.
        index: of this scorer among its kind.
    """

    def __init__(self, config: Config, tokenizer_folder: str, index: int = 0) -> None:
        redirect_output(config.folder / "logs" / f"reward_{index}.log")
        open_for(config.privacy, config.folder)
        self._tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder, trust_remote_code=False)
        self._scorer = Scorer(config.rewards)

    def ready(self) -> Whereabouts:
        """Where it runs, when the tokenizer and the reward functions are loaded: a call waits for the constructor."""
        return whereabouts()

    @ray.method(concurrency_group="health")
    def health(self) -> None:
        """Answers also while a group is scored."""

    def score(self, group: RolloutGroup) -> GroupRewards:
        """Rewards of the group's completions, in their order."""
        texts = [str(self._tokenizer.decode(c.token_ids, skip_special_tokens=True)) for c in group.completions]
        return self._scorer.score(texts, group.prompt.ground_truth, group.prompt.evidence)
