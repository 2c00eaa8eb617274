"""The study tower: freezing, missing modalities in training, refused shapes."""

from __future__ import annotations

import pytest
import torch
from small_model import collate, random_item, small_config, small_model
from transformers import PreTrainedTokenizerFast

from medtvt_rl.model.tower import StudyTower, set_encoders_trainable


@pytest.fixture
def tower(tokenizer: PreTrainedTokenizerFast) -> StudyTower:
    return small_model(small_config(), tokenizer).study_tower


def statistics(tower: StudyTower) -> torch.Tensor:
    return torch.cat([b.flatten().float() for name, b in tower.named_buffers() if "running" in name]).clone()


def test_frozen_encoders_stay_as_they_are_whatever_train_is_called(tower: StudyTower) -> None:
    set_encoders_trainable(tower, False)
    tower.train()
    assert tower.perception.training and not tower.ecg_encoder.training
    before = statistics(tower)
    tokens, _ = tower(**collate([random_item(0), random_item(1)]))
    tokens.sum().backward()
    assert torch.equal(before, statistics(tower))
    assert all(p.grad is None for encoder in tower.encoders for p in encoder.parameters())
    assert tower.perception.gate.weight.grad is not None

    set_encoders_trainable(tower, True)
    assert tower.ecg_encoder.training
    tower(**collate([random_item(0), random_item(1)]))
    assert not torch.equal(before, statistics(tower))


def test_a_learning_encoder_never_sees_a_missing_modality(tower: StudyTower) -> None:
    set_encoders_trainable(tower, True)
    items = [random_item(0), random_item(1, (False, True, True)), random_item(2)]
    reference = small_tower_copy(tower)
    reference.train()
    reference.ecg_encoder(collate([items[0], items[2]])["ecg"])
    tower.train()
    tower(**collate(items))
    for mine, theirs in zip(tower.ecg_encoder.buffers(), reference.ecg_encoder.buffers()):
        torch.testing.assert_close(mine, theirs)


def small_tower_copy(tower: StudyTower) -> StudyTower:
    import copy

    return copy.deepcopy(tower)


def test_absent_present_means_that_all_are(tower: StudyTower) -> None:
    items = collate([random_item(0)])
    with_flags, _ = tower(**items)
    without, _ = tower(items["ecg"], items["cxr"], items["lab"])
    assert torch.equal(with_flags, without)


def test_wrong_shapes_are_refused(tower: StudyTower) -> None:
    items = collate([random_item(0)])
    with pytest.raises(ValueError, match=r"cxr: shape \(1, 1, 8, 8\)"):
        tower(**(items | {"cxr": torch.zeros(1, 1, 8, 8)}))
    with pytest.raises(ValueError, match="present"):
        tower(**(items | {"present": torch.ones(1, 2)}))
