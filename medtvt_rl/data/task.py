"""The tri-modal task as the layout sees it: prompts, and the multimodal item behind each.

Owns: the text of a prompt, what a study becomes as model input, ablations by item id. Does not own: the layout that
moves prompts and items, which knows neither; batching and tensors (model/).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from medtvt_rl.config import Config
from medtvt_rl.data.config import Normalisation
from medtvt_rl.data.errors import DataError
from medtvt_rl.data.labels import answer_text
from medtvt_rl.data.labs import NUM_LABS, PERCENTILES_FILE
from medtvt_rl.data.medtvt_qa import QAKind, parse_diagnoses
from medtvt_rl.data.study_build import STUDIES, store_folder
from medtvt_rl.data.study_store import StudyStore
from medtvt_rl.data.tokenizer import MODALITY_TOKENS
from medtvt_rl.storage import digest_of
from medtvt_rl.types import MODALITIES, Prompt, Study

ABLATION = "|without="
_NORMALISED = ((np.arange(256, dtype=np.float32) / 255 - 0.5) / 0.25).astype(np.float32)
_IMAGENET_MEAN, _IMAGENET_DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_IMAGENET = np.stack(
    [(np.arange(256) / 255 - mean) / deviation for mean, deviation in zip(_IMAGENET_MEAN, _IMAGENET_DEVIATION)]
).astype(np.float32)


def study_item(
    study: Study,
    lab_means: StudyStore | NDArray[np.float32],
    num_channels: int = 1,
    normalise: Normalisation = "centred",
) -> dict[str, NDArray[Any]]:
    """One study as model input, unbatched.

    Args:
        lab_means: [50] float32 mean percentiles that stand where a value was not measured, or the store that has them.
        num_channels: the film is repeated over so many channels.
        normalise: as model.cxr.normalise; "imagenet" needs three channels.

    Returns:
        "ecg" [12, 1000] float32 mV; "cxr" [C, S, S] float32, normalised; "lab" [100] float32, 50
        percentiles then 50 flags; "present" [3] bool in the order of MODALITIES. A missing modality holds zeros.
        Where the film is missing its side is the store's, or 1 if only means are given.
    """
    if isinstance(lab_means, StudyStore):
        means, side = lab_means.lab_mean_percentiles, lab_means.film_size
    else:
        means, side = lab_means, 1
    present = np.array(study.present)
    if study.cxr is None:
        film = np.zeros((num_channels, side, side), dtype=np.float32)
    elif normalise == "imagenet":
        film = _IMAGENET[:, study.cxr]
    else:
        film = np.repeat(_NORMALISED[study.cxr][None], num_channels, axis=0)
    labs = np.zeros(2 * NUM_LABS, dtype=np.float32)
    if present[2]:
        labs[:NUM_LABS] = np.where(study.lab_measured, study.lab_percentiles, means)
        labs[NUM_LABS:] = study.lab_measured
    ecg = np.zeros((12, 1000), dtype=np.float32) if study.ecg is None else study.ecg
    return {"ecg": ecg, "cxr": film, "lab": labs, "present": present}


def withhold(item: dict[str, NDArray[Any]], modalities: tuple[str, ...]) -> dict[str, NDArray[Any]]:
    """A copy of an item in which these modalities count as missing. Raises ValueError for an unknown modality."""
    result = {**item, "present": item["present"].copy()}
    for modality in modalities:
        if modality not in MODALITIES:
            raise ValueError(f"modality {modality!r} is unknown, expected one of {MODALITIES}")
        result[modality] = np.zeros_like(item[modality])
        result["present"][MODALITIES.index(modality)] = False
    return result


class StudyItems:
    """The item source of the task. An item id is STUDY_ID, or STUDY_ID|without=ecg+cxr for an ablation."""

    def __init__(self, config: Config) -> None:
        self._store = StudyStore.open(store_folder(config.data))
        self._film = config.model.cxr

    def fingerprint(self) -> str:
        """Checksum of the content that the items are made of, wherever and whenever it was stored."""
        return str(digest_of(self._store.path / STUDIES)[1])

    def get(self, item_id: str) -> dict[str, NDArray[Any]]:
        """The item of `study_item`. Raises DataError for an unknown study, ValueError for an unknown modality."""
        study_id, ablated, withheld = item_id.partition(ABLATION)
        item = study_item(self._store.study(study_id), self._store, self._film.num_channels, self._film.normalise)
        return withhold(item, tuple(withheld.split("+"))) if ablated else item

    def publish(self, folder: Path) -> None:
        """Writes what `diagnose` needs beside a trained model, to read the raw blood values of a patient."""
        self._store.percentile_table.smoothed().save(folder / PERCENTILES_FILE)


def without(item_id: str, *modalities: str) -> str:
    """The id of the item with these modalities withheld."""
    return f"{item_id}{ABLATION}{'+'.join(modalities)}" if modalities else item_id


def prompt_token_ids(tokenizer: PreTrainedTokenizerBase, question: str, tokens_per_modality: int) -> NDArray[np.int32]:
    """[P] int32: the chat template around placeholders and question. Placeholders are expanded here, and only here."""
    placeholders = "".join(token * tokens_per_modality for token in MODALITY_TOKENS.values())
    messages = [{"role": "user", "content": placeholders + question}]
    text = cast(str, tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    ids = np.array(tokenizer.encode(text, add_special_tokens=False), dtype=np.int32)
    expected = tokens_per_modality * len(MODALITY_TOKENS)
    found = int(np.isin(ids, tokenizer.convert_tokens_to_ids(list(MODALITY_TOKENS.values()))).sum())
    if found != expected:
        raise DataError(
            f"a question of {len(question)} characters has {found} placeholders in its prompt, expected {expected}; "
            "take <ecg>, <cxr> and <lab> out of the questions in data.qa"
        )
    return ids


def qa_prompts(config: Config, tokenizer: PreTrainedTokenizerBase, split: str, kind: QAKind) -> list[Prompt]:
    """One prompt per question of a kind; its ground truth is the whole answer, or "A; B" for a diagnosis.

    A prompt's id is its study id; further questions about the same study get "#1", "#2" behind it. A question about the
    diagnosis carries evidence: {"study_id": str, "findings": {finding: bool}, or None where they are unknown}.
    """
    store = StudyStore.open(store_folder(config.data))
    tokens_per_modality = config.model.perception.tokens_per_modality
    by_question: dict[str, NDArray[np.int32]] = {}
    seen: dict[str, int] = {}
    prompts = []
    for example in store.qa(split, kind):
        if example.question not in by_question:
            by_question[example.question] = prompt_token_ids(tokenizer, example.question, tokens_per_modality)
        number = seen.get(example.study_id, 0)
        seen[example.study_id] = number + 1
        truth, evidence = example.answer, None
        if kind == "diagnosis":
            truth = answer_text(parse_diagnoses(example.answer))
            evidence = {"study_id": example.study_id, "findings": store.findings(example.study_id)}
        prompts.append(
            Prompt(
                prompt_id=f"{example.study_id}#{number}" if number else example.study_id,
                token_ids=by_question[example.question],
                item_id=example.study_id,
                ground_truth=truth,
                evidence=evidence,
            )
        )
    return prompts


def diagnosis_prompts(config: Config, tokenizer: PreTrainedTokenizerBase, split: str) -> list[Prompt]:
    """The prompts that GRPO and evaluation answer. Raises DataError if the split has no diagnosis question."""
    prompts = qa_prompts(config, tokenizer, split, "diagnosis")
    if not prompts:
        raise DataError(
            f"split {split!r} has no usable diagnosis question; see problems.csv in {store_folder(config.data)}"
        )
    return prompts
