"""What the actor does in its process: decode without special tokens, then score."""

import numpy as np
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from actors.reward_scorer import RewardScorer
from medtvt_rl.config import Config
from medtvt_rl.rewards.config import RewardConfig
from medtvt_rl.types import Completion, Prompt, RolloutGroup

WORDS = ["<pad>", "<eos>", "x", "Sepsis", "Gout", ";"]
TAGS = ["<think>", "</think>", "<answer>", "</answer>"]


def make_tokenizer(folder: str) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
    fast.add_tokens([AddedToken(tag, special=False) for tag in TAGS])
    fast.save_pretrained(folder)
    return fast


def completion(index: int, ids: list[int]) -> Completion:
    return Completion(
        completion_id=f"0/{index}",
        token_ids=np.array(ids, np.int32),
        behaviour_logprobs=np.zeros(len(ids), np.float32),
        policy_versions=np.zeros(len(ids), np.int32),
        finish_reason="stop",
    )


def test_decodes_and_scores_a_group(tmp_path, monkeypatch):
    # Within pytest's own process the output stays where pytest looks for it.
    monkeypatch.setattr("actors.reward_scorer.redirect_output", lambda path: path)
    tokenizer = make_tokenizer(str(tmp_path))
    texts = ["<think>x</think><answer>Sepsis</answer>", "<think>x</think><answer>Sepsis;Gout</answer>", "Sepsis"]
    ids = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id, tokenizer.pad_token_id] for text in texts]
    group = RolloutGroup(
        group_id=0,
        prompt=Prompt(
            prompt_id="s",
            token_ids=np.array([2], np.int32),
            item_id=None,
            ground_truth="Sepsis",
            evidence={"study_id": "s", "findings": {"effusion": False}},
        ),
        completions=tuple(completion(i, row) for i, row in enumerate([*ids, []])),
    )
    rewards = {
        "jaccard": RewardConfig(function="medtvt_rl.rewards.jaccard:jaccard_reward"),
        "evidence": RewardConfig(function="medtvt_rl.rewards.evidence:evidence_reward"),
    }
    scorer = RewardScorer.__ray_metadata__.modified_class(Config(rewards=rewards), str(tmp_path))
    found = scorer.score(group)
    assert found.components["jaccard"].tolist() == [1.0, 0.5, 0.0, 0.0]
    assert found.components["evidence"].tolist() == [1.0, 1.0, 0.0, 0.0]
    assert not found.failed.any()
