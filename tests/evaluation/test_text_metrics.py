"""Texts by hand where the library is there; what is said where a library or its files are not."""

import sys
from pathlib import Path

import numpy as np
import pytest

from medtvt_rl.evaluation import text_metrics
from medtvt_rl.evaluation.text_metrics import BertScoreModel, compare_texts

NOWHERE = BertScoreModel(name="no/such-model")
LIBRARIES = ("nltk", "rouge_score", "sacrebleu", "bert_score")
REFERENCE = "the lungs are clear and the heart is large"
PAIRS = [(REFERENCE, REFERENCE), ("the lungs are clear", REFERENCE), ("no", REFERENCE), ("", REFERENCE)]


def value(measures, name: str) -> float:
    return float(measures[name].statistic(measures[name].rows.sum(axis=0)))


def per_study(measures, name: str) -> list[float]:
    return measures[name].rows[:, 0].tolist()


@pytest.fixture
def needs_libraries():
    for name in LIBRARIES:
        pytest.importorskip(name)


@pytest.fixture
def no_wordnet(monkeypatch, tmp_path):
    """WordNet's files are nowhere."""
    monkeypatch.setattr(text_metrics, "DEBIAN_WORDNET", tmp_path)
    if "nltk" in sys.modules or __import__("importlib").util.find_spec("nltk"):
        import nltk.data

        monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])


def test_without_the_libraries_every_metric_has_a_note(monkeypatch):
    for name in LIBRARIES:
        monkeypatch.setitem(sys.modules, name, None)
    found = compare_texts(PAIRS, NOWHERE)
    assert found.measures == {}
    assert set(found.notes) == {"bleu", "rouge_l_recall", "meteor", "bertscore_recall", "bleu_corpus"}
    assert "nltk" in found.notes["bleu"] and "rouge_score" in found.notes["rouge_l_recall"]
    assert all("pip install 'medtvt-rl[text-metrics]'" in note for note in found.notes.values())


def test_without_their_files_meteor_and_bertscore_have_a_note(needs_libraries, no_wordnet):
    found = compare_texts(PAIRS, NOWHERE)
    assert set(found.measures) == {"bleu", "rouge_l_recall", "bleu_corpus"}
    assert "WordNet is not installed" in found.notes["meteor"]
    assert "the files of no/such-model are not here" in found.notes["bertscore_recall"]


def test_a_study_without_a_reference_is_an_error():
    with pytest.raises(ValueError, match="1 of 2 studies have no reference answer"):
        compare_texts([("a", "b"), ("a", " ")], NOWHERE)


def test_bleu_and_rouge_by_hand(needs_libraries, no_wordnet):
    measures = compare_texts(PAIRS, NOWHERE).measures
    # "the lungs are clear": all its n-grams are the reference's; 4 words for 9, so that it is too short
    assert per_study(measures, "bleu") == pytest.approx([1.0, np.exp(1 - 9 / 4), 0.0, 0.0], abs=1e-9)
    assert per_study(measures, "rouge_l_recall") == pytest.approx([1.0, 4 / 9, 0.0, 0.0])
    assert value(measures, "rouge_l_recall") == pytest.approx((1 + 4 / 9) / 4)


def test_corpus_bleu_is_that_of_the_library_also_for_resamples(needs_libraries, no_wordnet):
    from sacrebleu import corpus_bleu

    pairs = [*PAIRS, ("the heart is large and round", "the heart is large"), ("clear lungs, big heart", REFERENCE)]
    measure = compare_texts(pairs, NOWHERE).measures["bleu_corpus"]
    weights = np.random.default_rng(0).multinomial(6, np.full(6, 1 / 6), size=4)
    for weight, found in zip(weights, measure.statistic(weights @ measure.rows)):
        answers, references = zip(*(pair for pair, times in zip(pairs, weight) for _ in range(times)))
        assert found == pytest.approx(corpus_bleu(list(answers), [list(references)]).score / 100)


def test_meteor_by_hand(needs_libraries, monkeypatch):
    class NoSynonyms:
        """A WordNet that knows no word: what is left are words and their stems."""

        def synsets(self, word: str) -> list[object]:
            return []

    monkeypatch.setattr(text_metrics, "_wordnet", NoSynonyms)
    found = compare_texts([("the lung is clear", "the lungs are clear"), ("", "a")], NOWHERE).measures["meteor"]
    # the, lung by its stem, clear: 3 of 4 words on both sides, in two chunks
    assert found.rows[:, 0].tolist() == pytest.approx([0.75 * (1 - 0.5 * (2 / 3) ** 3), 0.0])


@pytest.fixture
def small_bert(tmp_path: Path) -> Path:
    """A folder with a small RoBERTa of random weights, and its tokenizer."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, RobertaConfig, RobertaModel

    words = ["<s>", "</s>", "<pad>", "<unk>", *dict.fromkeys(REFERENCE.split())]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    special = {"bos_token": "<s>", "eos_token": "</s>", "cls_token": "<s>", "sep_token": "</s>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", model_max_length=64, **special
    ).save_pretrained(tmp_path / "bert")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    RobertaModel(
        RobertaConfig(vocab_size=len(words), max_position_embeddings=70, pad_token_id=2, **sizes)
    ).save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


def test_bertscore_is_the_mean_over_the_reference_s_tokens(needs_libraries, no_wordnet, small_bert):
    import torch
    from transformers import AutoModel, AutoTokenizer

    told: list[int] = []
    found = compare_texts(PAIRS, BertScoreModel(name=str(small_bert), layer=2), told.append)
    recall = per_study(found.measures, "bertscore_recall")
    tokenizer, model = AutoTokenizer.from_pretrained(small_bert), AutoModel.from_pretrained(small_bert).eval()

    def hidden(text: str) -> torch.Tensor:
        with torch.no_grad():
            states = model(**tokenizer(text, return_tensors="pt"), output_hidden_states=True).hidden_states[2][0]
        return torch.nn.functional.normalize(states, dim=-1)

    expected = (hidden(REFERENCE) @ hidden("the lungs are clear").T).max(dim=1).values[1:-1].mean().item()
    assert recall == pytest.approx([1.0, expected, recall[2], 0.0], abs=1e-5)
    assert 0 < recall[2] < 1 and told == [0, 4]


def test_a_layer_that_the_model_does_not_have_is_a_note(needs_libraries, no_wordnet, small_bert):
    found = compare_texts(PAIRS, BertScoreModel(name=str(small_bert), layer=17))
    assert "bertscore_layer is 17" in found.notes["bertscore_recall"] and "3 layers" in found.notes["bertscore_recall"]
