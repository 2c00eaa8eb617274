"""A small tokenizer and small models for the tests of the model."""

from __future__ import annotations

import pytest
from small_model import small_config, small_tokenizer
from transformers import PreTrainedTokenizerFast

from medtvt_rl.model.config import ModelConfig


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return small_tokenizer()


@pytest.fixture
def model_config() -> ModelConfig:
    return small_config()
