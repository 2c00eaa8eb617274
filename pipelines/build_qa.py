"""Builds the instruction set (MedTVT-QA) from structured labels, by templates or by a language model.

    medtvt-rl build-qa -c my.yaml --ecg-table FILE --cxr-table FILE --icd-table FILE [key=value ...]
    medtvt-rl build-qa -c my.yaml ... --endpoint https://host/v1 --model NAME

The first line says where answers come from and what is sent; without --endpoint nothing leaves this machine. Tables,
checks and costs: docs/build-qa.md.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args
from urllib.parse import urlsplit

from medtvt_rl.config import Config
from medtvt_rl.config_checks import ConfigError
from medtvt_rl.data.errors import DataError
from medtvt_rl.data.medtvt_qa import QA_KINDS, QAKind
from medtvt_rl.data.qa.answering import AnswerFile, Answering, Tally, item_key, reason_of
from medtvt_rl.data.qa.build import (
    REJECTED,
    Answers,
    answer_by_templates,
    answers_file,
    make_items,
    qa_folder,
    rejected_line,
    write_qa,
)
from medtvt_rl.data.qa.endpoint import Endpoint, EndpointSettings, check_url
from medtvt_rl.data.qa.icd import Icd10, IcdRules
from medtvt_rl.data.qa.labels import Labelled, LabelSources, read_labels
from medtvt_rl.data.qa.templates import Item, chat_messages
from pipelines.command import EXIT_USAGE, fail, in_session, load, positive
from pipelines.reporter import Reporter

KEY_VARIABLE = "MEDTVT_ENDPOINT_KEY"
_CHARACTERS_PER_TOKEN = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `build-qa`."""
    parser.add_argument(
        "-c", "--config", required=True, help="YAML file; its data section says what is read and written"
    )
    tables = parser.add_argument_group("tables (.csv or .csv.gz)")
    tables.add_argument("--ecg-table", type=Path, metavar="FILE", help="machine_measurements of MIMIC-IV-ECG")
    tables.add_argument("--cxr-table", type=Path, metavar="FILE", help="chexpert or negbio labels of MIMIC-CXR-JPG")
    tables.add_argument("--icd-table", type=Path, metavar="FILE", help="diagnoses_icd of MIMIC-IV")
    tables.add_argument("--lab-ranges", type=Path, metavar="FILE", help="reference ranges: item, low, high, unit")
    tables.add_argument(
        "--icd10",
        choices=get_args(Icd10),
        default="paper",
        help="codes of a disease: the paper's exact list (default), or their families with all subcodes",
    )
    tables.add_argument("--icd9", choices=("leave-out", "map"), default="leave-out", help="what to do with ICD-9 codes")
    parser.add_argument("--kinds", default=",".join(QA_KINDS), help="kinds of questions, default %(default)s")
    parser.add_argument("--limit", type=positive, metavar="N", help="only the first N studies of each split")
    parser.add_argument("--seed", type=int, default=0, help="of the choice between wordings")
    parser.add_argument("--dry-run", action="store_true", help="count items and tokens; send and write nothing")
    model = parser.add_argument_group("a language model, instead of templates")
    model.add_argument(
        "--endpoint", metavar="URL", help="an OpenAI-compatible server, such as http://localhost:8000/v1"
    )
    model.add_argument("--model", metavar="NAME", help="the model there")
    model.add_argument("--key-variable", default=KEY_VARIABLE, metavar="NAME", help="environment variable of the key")
    model.add_argument("--request", default="{}", metavar="JSON", help='more of the request, as {"temperature": 0.7}')
    model.add_argument("--max-tokens", type=positive, default=1024, metavar="N", help="longest answer")
    model.add_argument("--attempts", type=positive, default=3, metavar="N", help="answers per item until one is right")
    model.add_argument("--concurrency", type=positive, default=8, metavar="N", help="calls under way at once")
    model.add_argument("--tries", type=positive, default=6, metavar="N", help="calls per answer where the server fails")
    model.add_argument("--call-timeout-s", type=float, default=120.0, metavar="S", help="deadline of one call")
    model.add_argument("--price-in", type=float, default=0.0, metavar="P", help="per million tokens of prompts")
    model.add_argument("--price-out", type=float, default=0.0, metavar="P", help="per million tokens of answers")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that override the file")


def command(args: argparse.Namespace) -> int:
    """`medtvt-rl build-qa`; returns the exit code."""
    try:
        config = load(args.config, args.overrides)
        kinds = _kinds(args.kinds)
        settings = _endpoint(args)
        folder = qa_folder(config.data)
        _check_tables(args, kinds)
    except (ConfigError, ValueError) as error:
        return fail(str(error), EXIT_USAGE)
    print(_announcement(args, settings), flush=True)
    return in_session(config, lambda reporter: _run(args, config, kinds, settings, folder, reporter), with_ray=False)


def _kinds(text: str) -> tuple[QAKind, ...]:
    asked = [name.strip() for name in text.split(",")]
    unknown = [name for name in asked if name not in QA_KINDS]
    if unknown:
        raise ConfigError(f"--kinds: {unknown[0]!r} is unknown; choose of {','.join(QA_KINDS)}")
    return tuple(kind for kind in QA_KINDS if kind in asked)


def _endpoint(args: argparse.Namespace) -> EndpointSettings | None:
    """How to reach the model; None without --endpoint. Raises ConfigError for what does not fit together."""
    if args.endpoint is None:
        if args.model is not None:
            raise ConfigError("--model: needs --endpoint, too; without one, answers come from templates")
        return None
    if args.model is None:
        raise ConfigError("--endpoint: needs --model, too; name the model that the server offers")
    check_url(args.endpoint)
    for name in ("call_timeout_s", "price_in", "price_out"):
        if not getattr(args, name) >= 0 or (name == "call_timeout_s" and args.call_timeout_s == 0):
            raise ConfigError(
                f"--{name.replace('_', '-')}: {getattr(args, name)} is out of range; write a positive number"
            )
    try:
        request = json.loads(args.request)
    except json.JSONDecodeError as error:
        raise ConfigError(f"--request: not valid json ({error})") from error
    if not isinstance(request, dict) or {"model", "messages", "stream", "n"} & set(request):
        raise ConfigError("--request: expected a json object without model, messages, stream and n")
    return EndpointSettings(
        url=args.endpoint,
        model=args.model,
        key=os.environ.get(args.key_variable, ""),
        max_tokens=args.max_tokens,
        request=request,
        call_timeout_s=args.call_timeout_s,
        tries=args.tries,
    )


def _check_tables(args: argparse.Namespace, kinds: Sequence[QAKind]) -> None:
    needed = {"ecg": ("ecg_table",), "cxr": ("cxr_table",), "lab": ()}
    needed["diagnosis"] = ("ecg_table", "cxr_table", "icd_table")
    for kind in kinds:
        for name in needed[kind]:
            path, option = getattr(args, name), f"--{name.replace('_', '-')}"
            if path is None:
                raise ConfigError(
                    f"{option}: needed for questions of kind {kind}; name the file, or leave it out of --kinds"
                )
            if not path.is_file():
                raise ConfigError(f"{option}: there is no file {path}")


def _announcement(args: argparse.Namespace, settings: EndpointSettings | None) -> str:
    if settings is None:
        return "build-qa: answers come from templates on this machine; nothing is sent anywhere"
    if args.dry_run:
        return f"build-qa: dry run; nothing is sent to {settings.url}"
    parts = urlsplit(settings.url)
    here = parts.hostname in ("localhost", "127.0.0.1", "::1")
    plain = " NOT ENCRYPTED" if parts.scheme == "http" and not here else ""
    return (
        f"build-qa: sends the labels of patients (ECG statements, CXR labels, laboratory values, diagnoses; no ids, "
        f"no paths){plain} to {settings.url}, model {settings.model}"
    )


def _run(
    args: argparse.Namespace,
    config: Config,
    kinds: Sequence[QAKind],
    settings: EndpointSettings | None,
    folder: Path,
    reporter: Reporter,
) -> None:
    reporter.start("labels", unit="study")
    sources = LabelSources(
        ecg=args.ecg_table,
        cxr=args.cxr_table,
        icd=args.icd_table,
        lab_ranges=args.lab_ranges,
        icd_rules=IcdRules(icd10=args.icd10, icd9=args.icd9 == "map"),
    )
    labelled = read_labels(config.data, sources, kinds, args.limit)
    items = make_items(labelled.studies, kinds, args.seed)
    reporter.update(len(labelled.studies))
    reporter.finish("labels")
    _tell_labels(labelled, kinds, reporter)
    if not items:
        raise DataError("no study has labels for any of the questions; see the counts above and the ids of the tables")
    if args.dry_run:
        characters = sum(len(message["content"]) for item in items for message in chat_messages(item))
        thousands = characters / _CHARACTERS_PER_TOKEN / 1e3
        cost = (thousands * args.price_in + len(items) * args.max_tokens / 1e3 * args.price_out) / 1e3
        reporter.line(f"a model would be asked {len(items)} questions, about {thousands:.0f}k tokens of prompts")
        if cost:
            reporter.line(f"one answer each of the greatest length would cost at most about {cost:.2f}")
        return
    if settings is None:
        reporter.start("answers", len(items), "item")
        answers = answer_by_templates(items, lambda done, total: reporter.update(done))
        source = {"answers": "templates"}
        reporter.finish("answers")
    else:
        answers, source = _ask(args, items, settings, folder, reporter)
    source |= {"seed": args.seed, "icd10": args.icd10, "icd9": args.icd9}
    manifest = write_qa(config.data, labelled, kinds, items, answers, source)
    _tell_result(manifest, folder, reporter)
    if not answers.accepted:
        raise DataError(f"no answer was accepted; the reasons are in {folder / REJECTED}")


def _tell_labels(labelled: Labelled, kinds: Sequence[QAKind], reporter: Reporter) -> None:
    """One line for each table, and for what cannot be asked."""
    for table, counts in labelled.counts.items():
        if counts:
            reporter.line(f"{table} labels: " + ", ".join(f"{count} {name}" for name, count in sorted(counts.items())))
    for kind in kinds:
        reasons: dict[str, int] = {}
        for study in labelled.studies:
            if kind in study.gaps:
                reasons[study.gaps[kind]] = reasons.get(study.gaps[kind], 0) + 1
        if reasons:
            reporter.line(f"not asked ({kind}): " + ", ".join(f"{n} {why}" for why, n in sorted(reasons.items())))
    if labelled.problems:
        reporter.line(f"rows set aside: {len(labelled.problems)}, of which the study store lists each with its reason")


def _ask(
    args: argparse.Namespace, items: Sequence[Item], settings: EndpointSettings, folder: Path, reporter: Reporter
) -> tuple[Answers, dict[str, Any]]:
    """The model's answers, and what the manifest says of them."""
    tally = Tally(total=len(items), price_in=args.price_in, price_out=args.price_out)

    def show(tally: Tally) -> None:
        reporter.update(tally.done, total=tally.total, **_shown(tally))

    async def ask(file: AnswerFile) -> tuple[dict[int, str], int]:
        async with Endpoint(settings, args.concurrency) as endpoint:
            answering = Answering(endpoint, settings, file, tally, args.attempts, args.concurrency, show)
            return await answering.run(items), endpoint.calls_failed

    with AnswerFile(answers_file(folder)) as file:
        reporter.start("answers", len(items), "item")
        accepted, calls_failed = asyncio.run(ask(file))
        reporter.finish("answers")
        rejected = [
            rejected_line(item, number, line["answer"], reason)
            for item in items
            for number, line in enumerate(file.of(item_key(item, settings)), start=1)
            if (reason := reason_of(item, line)) is not None
        ]
    reporter.line(
        f"answers: {tally.accepted} accepted, {tally.rejected} rejected, {tally.left_out} items left out; "
        f"{tally.reused} taken from {file.path.name}; {calls_failed} calls failed and were tried again; "
        f"{tally.tokens_in} tokens in, {tally.tokens_out} out" + (f", cost {tally.cost:.4g}" if tally.cost else "")
    )
    source = {
        "answers": "endpoint",
        "endpoint": settings.url,
        "model": settings.model,
        "request": {"max_tokens": settings.max_tokens, **settings.request},
        "tokens": {"in": tally.tokens_in, "out": tally.tokens_out},
    }
    return Answers(accepted=accepted, rejected=rejected), source | ({"cost": tally.cost} if tally.cost else {})


def _shown(tally: Tally) -> dict[str, float]:
    shown = {"rejected": tally.rejected, "k tokens in": tally.tokens_in / 1e3, "k tokens out": tally.tokens_out / 1e3}
    return {**shown, **({"cost": tally.cost, "cost at end": tally.cost_at_end} if tally.cost else {})}


def _tell_result(manifest: Mapping[str, Any], folder: Path, reporter: Reporter) -> None:
    for split, counts in manifest["splits"].items():
        entries = ", ".join(f"{count} {kind}" for kind, count in counts["entries"].items())
        reporter.line(f"{split}: {counts['studies']} studies, entries: {entries}")
    if manifest["rejected_answers"]:
        reporter.line(f"rejected: {manifest['rejected_answers']} answers, with reasons in {folder / REJECTED}")
    reporter.line(f"written: {folder}")


if __name__ == "__main__":
    from pipelines.cli import main

    sys.exit(main(["build-qa", *sys.argv[1:]]))
