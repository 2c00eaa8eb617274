"""Whether the model that training starts from is where the configuration says, and whole as far as a look can tell.

Owns: this judgement. Does not own: loading the model (model/build.py), what an encoder's file must hold
(model/encoder_init.py), or writing a model (model/llm_source.py). No weight is read but for its name and shape.
"""

from __future__ import annotations

import json
from pathlib import Path

from medtvt_rl.config import Config
from medtvt_rl.data.check.report import Report
from medtvt_rl.dotted import resolve
from medtvt_rl.types import MODALITIES
from medtvt_rl.unreadable import why_unreadable

MODEL = "model"
INDEX = "model.safetensors.index.json"
LEARNING = ("pretrain", "sft", "grpo")
KINDS = ("llama", "medtvt")


def check_start_model(report: Report, config: Config) -> None:
    """Stops where a stage that learns would find no model at `model.init`, or none that can be written there."""
    init, learning = config.model.init, [stage for stage in LEARNING if stage in config.run.stages]
    given = [name for name in MODALITIES if getattr(config.model, name).init is not None]
    if not learning or (init is None and not given):
        return
    report.open(MODEL, "paths").looked_at = len(given) + (init is not None)
    for modality in given:
        fault = _encoder_fault(config, modality)
        if fault:
            report.stop(MODEL, fault, field=f"model.{modality}.init")
    if init is None:
        return
    fault = _fault(Path(init)) if config.model.init_from is None else _source_fault(config.model.init_from, Path(init))
    if fault:
        report.stop(MODEL, f"model.init: {init} {fault}; {learning[0]} would stop", field="model.init")


def _encoder_fault(config: Config, modality: str) -> str:
    """What training would say of the file of this encoder; "" where it fits."""
    from medtvt_rl.model.encoder_init import read_encoder

    try:
        if kind_of(Path(config.model.init or "")) == "medtvt":
            return f"model.{modality}.init: model.init={config.model.init!r} brings its encoders along; leave it out"
        read_encoder(config.model, modality)
    except ValueError as error:
        return str(error)
    return ""


def kind_of(folder: Path) -> object:
    """The kind of model in a folder; None where it has none, or no configuration that can be read."""
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError):
        return None


def _fault(folder: Path) -> str:
    wanted = "a Hugging Face folder has config.json, model.safetensors and the tokenizer (Meta's own files are none)"
    if not folder.is_dir():
        return "is no folder; put the model there, or name another"
    kind = kind_of(folder)
    if kind is None:
        return f"has no readable config.json: {wanted}"
    if kind not in KINDS:
        return f"is a {kind!r} model, expected a Llama or a MedTVT folder"
    fault = _weights_fault(folder)
    if fault:
        return fault
    if not (folder / "tokenizer_config.json").is_file():
        return f"holds no tokenizer: {wanted}"
    return ""


def _weights_fault(folder: Path) -> str:
    """Opens the headers of the weights, which know how long their files must be."""
    from safetensors import SafetensorError, safe_open

    files = sorted(folder.glob("*.safetensors"))
    if not files:
        return "holds no *.safetensors: save the model again with safe_serialization (Meta's own files are none)"
    try:
        index = folder / INDEX
        named = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values() if index.is_file() else ()
        absent = sorted({name for name in named if not (folder / name).is_file()})
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        return f"holds a damaged {INDEX} {why_unreadable(index, error)}"
    if absent:
        return f"lacks {', '.join(absent)}, which {INDEX} names: copy the whole folder"
    for path in files:
        try:
            with safe_open(path, framework="np"):
                pass
        except (SafetensorError, OSError) as error:
            return f"holds a damaged {path.name} {why_unreadable(path, error)}"
    return ""


def _source_fault(init_from: str, folder: Path) -> str:
    from medtvt_rl.model.llm_source import is_ready

    try:
        source = resolve(init_from, "model.init_from")
        if not is_ready(source, folder):
            source.check()
    except (ValueError, AttributeError) as error:
        return f"cannot be written ({error})"
    return ""
