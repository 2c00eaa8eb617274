"""Whether the model that training starts from is where the configuration says.

Owns: this judgement. Does not own: loading the model (model/build.py), or writing one (model/llm_source.py).
"""

from __future__ import annotations

import json
from pathlib import Path

from medtvt_rl.config import Config
from medtvt_rl.data.check.report import Report
from medtvt_rl.dotted import resolve

MODEL = "model"
LEARNING = ("pretrain", "sft", "grpo")
KINDS = ("llama", "medtvt")


def check_start_model(report: Report, config: Config) -> None:
    """Stops where a stage that learns would find no model at `model.init`, or none that can be written there."""
    init, learning = config.model.init, [stage for stage in LEARNING if stage in config.run.stages]
    encoders = {f"model.{name}.init": getattr(config.model, name).init for name in ("ecg", "cxr", "lab")}
    given = {key: path for key, path in encoders.items() if path is not None}
    if not learning or (init is None and not given):
        return
    report.open(MODEL, "paths").looked_at = len(given) + (init is not None)
    for key, path in given.items():
        if not Path(path).exists():
            report.stop(MODEL, f"{key}: there is no {path}; put the weights there, or leave it out", field=key)
    if init is None:
        return
    fault = _fault(Path(init)) if config.model.init_from is None else _source_fault(config.model.init_from, Path(init))
    if fault:
        report.stop(MODEL, f"model.init: {init} {fault}; {learning[0]} would stop", field="model.init")


def _fault(folder: Path) -> str:
    wanted = "a Hugging Face folder has config.json, model.safetensors and the tokenizer (Meta's own files are none)"
    if not folder.is_dir():
        return "is no folder; put the model there, or name another"
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError):
        return f"has no readable config.json: {wanted}"
    if kind not in KINDS:
        return f"is a {kind!r} model, expected a Llama or a MedTVT folder"
    if not any(any(folder.glob(names)) for names in ("*.safetensors", "pytorch_model*.bin")):
        return f"holds no weights: {wanted}"
    if not (folder / "tokenizer_config.json").is_file():
        return f"holds no tokenizer: {wanted}"
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
