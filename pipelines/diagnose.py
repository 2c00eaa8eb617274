"""One patient through a trained model: ECG, film and blood values in, reasoning, diagnoses and gates out.

Owns: reading the files of a patient, one greedy answer on the CPU through `transformers`, and its form on a terminal.
Does not own: the readers (medtvt_rl/data), the model, the answer's format (rewards/answer.py). Needs no Ray and no
rollout engine.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
from numpy.typing import NDArray

from medtvt_rl.data.config import Crop, FilmConfig
from medtvt_rl.data.labs import PERCENTILES_FILE
from medtvt_rl.data.simulate.texts import QUESTIONS
from medtvt_rl.model.config import UNTRAINED_STAND_INS
from medtvt_rl.types import MODALITIES, Study
from pipelines.command import EXIT_USAGE, fail, positive

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from medtvt_rl.data.labs import PercentileTable
    from medtvt_rl.model.medtvt import MedTVTForCausalLM

DEFAULT_QUESTION = QUESTIONS["diagnosis"][0]
MODALITY_NAMES = {"ecg": "ECG", "cxr": "film", "lab": "labs"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """The answer for one patient.

    Attributes:
        reasoning: what the model says it sees; the whole text where the answer breaks the format.
        diagnoses: as the model names them; empty where the answer breaks the format.
        gates: modality -> contribution gate of the perception layer (arXiv 2506.18512, section 3), in 0..1.
        missing: modalities that were not given; their gates are those of the model's stand-ins.
        well_formed: whether the answer keeps the format.
        cut_at: tokens after which the answer was cut, before the model had ended it; None where it ended it.
        remarks: what else a reader must know.
    """

    reasoning: str
    diagnoses: tuple[str, ...]
    gates: dict[str, float]
    missing: tuple[str, ...]
    well_formed: bool
    cut_at: int | None = None
    remarks: tuple[str, ...] = ()


def diagnose(
    model_folder: str | Path,
    *,
    ecg: Path | None = None,
    cxr: Path | None = None,
    labs: Path | None = None,
    question: str = DEFAULT_QUESTION,
    crop: Crop | None = None,
    max_new_tokens: int | None = None,
    percentiles: Path | None = None,
) -> Diagnosis:
    """Answers for one patient, greedily, on the CPU.

    Args:
        model_folder: RUN/model of a run: weights, tokenizer and labs_percentiles.json.
        ecg: WFDB record (12 leads, 10 s) or DICOM waveform.
        cxr: JPEG, PNG or DICOM.
        labs: json or CSV, item id or name -> value in the laboratory's units.
        question: what is asked.
        crop: how a film becomes a square; None: as data.film.crop of the training had it, which the folder says.
        max_new_tokens: the answer is cut there; None: where the training cut answers.
        percentiles: a table of laboratory values in place of the folder's own; percentiles.json of a study store.

    Raises:
        ValueError: no modality is given, a file cannot be used, or the folder is not that of a tri-modal model.
    """
    if ecg is None and cxr is None and labs is None:
        raise ValueError("ecg, cxr, labs: none is given, expected at least one file")
    if not question.strip():
        raise ValueError("question: it is empty; leave it out for the default question")
    from medtvt_rl.data.patient import read_patient

    folder = Path(model_folder)
    model, tokenizer = load_model(folder)
    table = _lab_table(percentiles or folder / PERCENTILES_FILE, needed=labs is not None)
    square = FilmConfig(size=model.config.cxr["image_size"], crop=crop or model.config.film_crop)
    study = read_patient(ecg=ecg, cxr=cxr, labs=labs, film=square, table=table)
    if labs is not None and not study.lab_measured.any():
        raise ValueError(f"{labs}: no value of an item that the training patients had; check the file, or leave it out")
    limit = max_new_tokens or model.config.max_answer_tokens
    text, gates, cut_at = _answer(model, tokenizer, study, table.mean_percentiles(), question, limit)
    untrained = model.config.untrained_stand_ins and not all(study.present)
    remarks = (UNTRAINED_STAND_INS,) if untrained else ()
    return _read_answer(text, dict(zip(MODALITIES, gates)), study, cut_at, remarks)


def load_model(folder: Path) -> tuple[MedTVTForCausalLM, PreTrainedTokenizerBase]:
    """The model and its tokenizer, float32, on the CPU. Raises ValueError if the folder is not a tri-modal model's."""
    from medtvt_rl.data.tokenizer import load_tokenizer
    from medtvt_rl.model.medtvt import MedTVTForCausalLM
    from medtvt_rl.model.policy import load_policy

    model = load_policy(folder)
    if not isinstance(model, MedTVTForCausalLM):
        raise ValueError(f"model folder: {folder} holds a plain language model, expected a tri-modal one (RUN/model)")
    if not (folder / "tokenizer_config.json").is_file():
        raise ValueError(f"model folder: {folder} has no tokenizer; copy the whole folder that training wrote")
    return model, load_tokenizer(folder, "model folder")


def _lab_table(path: Path, needed: bool) -> PercentileTable:
    """What turns blood values into percentiles; an empty table where there are none to turn.

    Raises:
        ValueError: it is needed, and not there.
    """
    from medtvt_rl.data.labs import NUM_LABS, PercentileTable

    if not needed:
        return PercentileTable((np.empty(0),) * NUM_LABS)
    if not path.is_file():
        raise ValueError(
            f"{path}: it is not there, and turns laboratory values into percentiles of the training patients; give "
            "--percentiles STORE/percentiles.json of a study store, import the checkpoint with --labs-csv, or leave "
            "the labs out"
        )
    return PercentileTable.load(path)


def _answer(
    model: MedTVTForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    study: Study,
    mean_percentiles: NDArray[np.float32],
    question: str,
    max_new_tokens: int,
) -> tuple[str, list[float], int | None]:
    """The greedy completion as text, the three gates, and its tokens where it was cut."""
    import torch

    from medtvt_rl.data.task import prompt_token_ids, study_item
    from medtvt_rl.data.tokenizer import stop_token_ids

    prompt = prompt_token_ids(tokenizer, question, model.config.tokens_per_modality)
    ids = torch.from_numpy(prompt.astype(np.int64))[None]
    room = model.config.max_position_embeddings - ids.shape[1]
    if room < 1:
        raise ValueError(
            f"question: the prompt has {ids.shape[1]} tokens, and the model reads "
            f"{model.config.max_position_embeddings}; ask a shorter question"
        )
    channels, side = model.config.cxr["num_channels"], model.config.cxr["image_size"]
    item = study_item(study, mean_percentiles, channels, model.config.cxr.get("normalise", "centred"))
    if study.cxr is None:
        item["cxr"] = np.zeros((channels, side, side), dtype=np.float32)
    tensors = {name: torch.from_numpy(np.asarray(value))[None] for name, value in item.items()}
    stops = stop_token_ids(tokenizer, model.generation_config)
    generator: Any = model  # the stub of `generate` knows no study
    with torch.inference_mode():
        _, gates = model.perceive(**tensors)
        output = generator.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            **tensors,
            do_sample=False,
            max_new_tokens=min(max_new_tokens, room),
            eos_token_id=stops,
            pad_token_id=tokenizer.pad_token_id,
        )
    answer = output[0, ids.shape[1] :].tolist()
    cut_at = None if answer[-1] in stops else len(answer)
    text = tokenizer.decode(answer, skip_special_tokens=True)
    return str(text), [float(gate) for gate in gates[0]], cut_at


def _read_answer(
    text: str, gates: dict[str, float], study: Study, cut_at: int | None = None, remarks: tuple[str, ...] = ()
) -> Diagnosis:
    from medtvt_rl.rewards.answer import parse_answer

    parsed = parse_answer(text)
    return Diagnosis(
        reasoning=parsed.reasoning if parsed else text.strip(),
        diagnoses=parsed.names if parsed else (),
        gates=gates,
        missing=tuple(name for name, there in zip(MODALITIES, study.present) if not there),
        well_formed=parsed is not None,
        cut_at=cut_at,
        remarks=remarks,
    )


def render(diagnosis: Diagnosis) -> str:
    """The answer as lines for a terminal."""
    lines = ["reasoning", f"  {diagnosis.reasoning or '(none)'}", "diagnoses"]
    if not diagnosis.well_formed:
        lines[0] = "answer as generated"
        why = "breaks the format, so that no diagnosis can be read from it"
        if diagnosis.cut_at is not None:
            why = f"was cut after {diagnosis.cut_at} tokens, before it was whole: see --max-new-tokens"
        lines.append(f"  (the answer {why})")
    else:
        lines += [f"  {name}" for name in diagnosis.diagnoses] or ["  (none)"]
    lines.append("contribution of each modality (gate, 0 to 1)")
    for name, gate in diagnosis.gates.items():
        words = "  not given" if name in diagnosis.missing else ""
        lines.append(f"  {MODALITY_NAMES[name]:<5}{gate:.3f}  {'#' * round(20 * gate):<20}{words}".rstrip())
    lines += diagnosis.remarks
    lines.append("A research system, not a medical device: do not act on this for a patient.")
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `medtvt-rl diagnose`."""
    parser.add_argument("--model", type=Path, required=True, help="folder of a trained model, RUN/model")
    parser.add_argument("--ecg", type=Path, help="12-lead ECG: WFDB record or DICOM waveform")
    parser.add_argument("--cxr", type=Path, help="chest film: JPEG, PNG or DICOM")
    parser.add_argument("--labs", type=Path, help="blood values: json or CSV of item id or name and value")
    parser.add_argument("--percentiles", type=Path, help="percentiles.json of a study store, if the model has none")
    parser.add_argument("--question", default=DEFAULT_QUESTION, help="what to ask (default: %(default)s)")
    parser.add_argument("--crop", choices=get_args(Crop), help="in place of data.film.crop of the training")
    parser.add_argument("--max-new-tokens", type=positive, help="cut the answer there, not where the training did")
    parser.add_argument("--json", action="store_true", help="print json")


def command(args: argparse.Namespace) -> int:
    """Carries out `medtvt-rl diagnose`; returns the exit code: 0, or 2 where the input cannot be used."""
    from medtvt_rl.logs import quiet_environment

    quiet_environment()
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of libraries that read the files; what matters is raised
            diagnosis = diagnose(
                args.model,
                ecg=args.ecg,
                cxr=args.cxr,
                labs=args.labs,
                question=args.question,
                crop=args.crop,
                max_new_tokens=args.max_new_tokens,
                percentiles=args.percentiles,
            )
    except (ValueError, OSError) as error:
        return fail(f"diagnose: {' '.join(str(error).split())}", EXIT_USAGE)
    content: dict[str, Any] = asdict(diagnosis)
    print(json.dumps(content, indent=1) if args.json else render(diagnosis))
    return 0


if __name__ == "__main__":
    from pipelines.cli import main

    sys.exit(main(["diagnose", *sys.argv[1:]]))
