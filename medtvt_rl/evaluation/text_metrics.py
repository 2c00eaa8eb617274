"""How near the greedy answers are to the reference answers as texts, as the published evaluation measures it.

Owns: the metrics, and what is said where a library or its files are missing. Does not own: the libraries (nltk,
rouge-score, sacrebleu, bert-score: the extra `text-metrics`), intervals (bootstrap.py).
Compared are whole texts, tags and diagnoses included, of all answers, those that break the format too. Nothing is
downloaded.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np

from medtvt_rl.evaluation.bootstrap import Floats, Measure, mean_measure

EXTRA = "pip install 'medtvt-rl[text-metrics]'"
DEBIAN_WORDNET = Path("/usr/share/wordnet")
BERTSCORE_BATCH = 16
Pairs = Sequence[tuple[str, str]]
"""(answer, reference) of each study."""
Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class BertScoreModel:
    """Which model BERTScore compares with: a name in the Hugging Face cache or a folder, and which of its layers."""

    name: str = "roberta-large"
    layer: int = 17


@dataclass(frozen=True, slots=True, kw_only=True)
class TextComparison:
    """What could be computed, and why the rest could not.

    Attributes:
        measures: name -> measure over the studies.
        notes: name -> what is missing and how to get it.
    """

    measures: dict[str, Measure]
    notes: dict[str, str]


class MissingFiles(Exception):
    """A metric cannot be computed here; the message says what is missing and how to get it."""


def compare_texts(pairs: Pairs, model: BertScoreModel, on_progress: Progress = lambda done: None) -> TextComparison:
    """Compares every answer with its reference.

    bleu, rouge_l_recall, meteor and bertscore_recall are means over studies, as published; bleu_corpus is the usual
    BLEU, of all texts together.

    Args:
        on_progress: told how many pairs BERTScore, which takes long, has compared: 0 first.

    Raises:
        ValueError: a study without a reference.
    """
    without = sum(not reference.strip() for _, reference in pairs)
    if without:
        raise ValueError(f"text metrics: {without} of {len(pairs)} studies have no reference answer; add it to data.qa")
    metrics: dict[str, Callable[[], Measure]] = {
        "bleu": lambda: _sentence_bleu(pairs),
        "rouge_l_recall": lambda: _rouge_l_recall(pairs),
        "meteor": lambda: _meteor(pairs),
        "bertscore_recall": lambda: _bertscore_recall(pairs, model, on_progress),
        "bleu_corpus": lambda: _corpus_bleu(pairs),
    }
    measures, notes = {}, {}
    for name, compute in metrics.items():
        try:
            measures[name] = compute()
        except ImportError as error:
            notes[name] = f"{error.name or error} is not installed: {EXTRA}"
        except MissingFiles as error:
            notes[name] = str(error)
    return TextComparison(measures=measures, notes=notes)


def _sentence_bleu(pairs: Pairs) -> Measure:
    """Unsmoothed BLEU-4 of each text alone (Papineni et al. 2002); 0 where no four words in a row agree."""
    from nltk.tokenize import wordpunct_tokenize
    from nltk.translate.bleu_score import sentence_bleu

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of texts that share no n-gram
        return mean_measure([sentence_bleu([wordpunct_tokenize(r)], wordpunct_tokenize(a)) for a, r in pairs])


def _rouge_l_recall(pairs: Pairs) -> Measure:
    """Longest common subsequence of stems over the length of the reference (Lin 2004)."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    return mean_measure([scorer.score(reference, answer)["rougeL"].recall for answer, reference in pairs])


def _meteor(pairs: Pairs) -> Measure:
    """Alignment of words, stems and WordNet's synonyms (Banerjee and Lavie 2005)."""
    from nltk.tokenize import wordpunct_tokenize
    from nltk.translate.meteor_score import meteor_score

    wordnet = _wordnet()
    tokens = ((wordpunct_tokenize(reference), wordpunct_tokenize(answer)) for answer, reference in pairs)
    return mean_measure([meteor_score([reference], answer, wordnet=wordnet) for reference, answer in tokens])


def _wordnet() -> Any:
    """WordNet 3.0: nltk's own copy, else that of Debian's package."""
    import nltk.data
    from nltk.corpus import wordnet
    from nltk.corpus.reader.wordnet import WordNetCorpusReader

    try:
        wordnet.ensure_loaded()
        return wordnet
    except LookupError:
        pass
    if not (DEBIAN_WORDNET / "data.noun").is_file():
        raise MissingFiles("WordNet is not installed: python -m nltk.downloader wordnet, or apt install wordnet-base")

    class DebianWordNet(WordNetCorpusReader):
        """Debian leaves out the names of the lexicographers' files, and WordNet's version; METEOR asks for neither."""

        def open(self, file: str) -> Any:
            if file == "lexnames":
                return StringIO("".join(f"{number}\tfile{number}\t0\n" for number in range(45)))
            return super().open(file)

        def map_wn(self, version: str = "wordnet") -> None:
            return None

    nltk.data.path.append(str(DEBIAN_WORDNET))  # nltk reads below these paths only
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of other languages' words
        return DebianWordNet(str(DEBIAN_WORDNET), None)


def _bertscore_recall(pairs: Pairs, model: BertScoreModel, on_progress: Progress) -> Measure:
    """Mean over the reference's tokens of the largest cosine with one of the answer's (https://arxiv.org/abs/1904.09675);
    not rescaled. An empty answer scores 0."""
    from bert_score import BERTScorer

    scorer = BERTScorer(model_type=_local_folder(model), num_layers=model.layer, batch_size=BERTSCORE_BATCH)
    values = np.zeros(len(pairs))
    on_progress(0)
    for start in range(0, len(pairs), BERTSCORE_BATCH):
        some = [i for i in range(start, min(start + BERTSCORE_BATCH, len(pairs))) if pairs[i][0].strip()]
        if some:
            _, recall, _ = scorer.score([pairs[i][0] for i in some], [pairs[i][1] for i in some])
            values[some] = recall.cpu().numpy()
        on_progress(min(start + BERTSCORE_BATCH, len(pairs)))
    return mean_measure(values)


def _local_folder(model: BertScoreModel) -> str:
    """The folder of the model's files."""
    from transformers import AutoConfig
    from transformers.utils import cached_file

    try:
        config = cached_file(model.name, "config.json", local_files_only=True)
        num_layers = AutoConfig.from_pretrained(
            model.name, local_files_only=True, trust_remote_code=False
        ).num_hidden_layers
    except (OSError, ValueError) as error:
        raise MissingFiles(
            f"the files of {model.name} are not here: hf download {model.name}, "
            "or name a folder in evaluation.bertscore_model"
        ) from error
    if model.layer > num_layers:
        raise MissingFiles(
            f"evaluation.bertscore_layer is {model.layer}, and {model.name} has {num_layers} layers; set one of them"
        )
    return os.path.dirname(str(config))


def _corpus_bleu(pairs: Pairs) -> Measure:
    """BLEU of all texts together as sacrebleu computes it (https://arxiv.org/abs/1804.08771), 0 to 1."""
    from sacrebleu.metrics import BLEU

    bleu = BLEU(effective_order=True)
    scores = [bleu.sentence_score(answer, [reference]) for answer, reference in pairs]
    rows = np.array([[*s.counts, *s.totals, s.sys_len, s.ref_len] for s in scores], dtype=np.float64)

    def of_sums(sums: Floats) -> float:
        counts = [int(number) for number in sums]
        return float(BLEU.compute_bleu(counts[:4], counts[4:8], counts[8], counts[9], smooth_method="exp").score) / 100

    return Measure(rows=rows, statistic=lambda sums: np.apply_along_axis(of_sums, -1, sums))
