"""`medtvt-rl import-reference`: a checkpoint of the published implementation becomes a model folder of this project.

Owns: arguments, progress and what is said at the end. Does not own: the conversion (medtvt_rl/model).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from medtvt_rl.model.config import UNTRAINED_STAND_INS
from pipelines.command import EXIT_INTERRUPTED, EXIT_USAGE, fail

if TYPE_CHECKING:
    from medtvt_rl.model.reference_folder import Imported


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `medtvt-rl import-reference`."""
    parser.add_argument("--checkpoint", type=Path, required=True, help="published SFT or RL file, saved by torch")
    parser.add_argument("--params", type=Path, required=True, help="Meta's params.json of the language model")
    parser.add_argument("--vit-config", type=Path, required=True, help="config.json of the Vision Transformer")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; it must not exist, or be empty")
    parser.add_argument(
        "--special-tokens",
        type=Path,
        help="json of token -> id, with <ecg>, <cxr>, <lab> (default: the published ids, <ecg> is 128006)",
    )
    parser.add_argument("--tokenizer", type=Path, help="Hugging Face folder of the tokenizer that the folder gets")
    parser.add_argument(
        "--labs-csv", type=Path, help="table of the training patients, by which diagnose reads laboratory values"
    )
    parser.add_argument(
        "--chat-template",
        choices=("published", "keep"),
        default="published",
        help="published: a prompt is the question as it is, answers end in <|end_of_text|>; keep: the tokenizer's own",
    )
    parser.add_argument(
        "--answer-tokens",
        action="store_true",
        help="read <think>, </think>, <answer>, </answer> as single tokens; the published model read them as text",
    )
    parser.add_argument(
        "--adapter", action="store_true", help="keep the low-rank pairs as a peft adapter, OUT/adapter, unmerged"
    )


def command(args: argparse.Namespace) -> int:
    """Carries out `medtvt-rl import-reference`; returns the exit code: 0, 2 for input of no use, 130 on Ctrl-C."""
    try:
        import torch

        from medtvt_rl.data.special_tokens import PUBLISHED_TOKENS, read_special_tokens
        from medtvt_rl.model.reference_folder import import_reference

        torch.set_num_threads(1)  # the work waits for the disk; more threads would only spin
        tokens = PUBLISHED_TOKENS if args.special_tokens is None else read_special_tokens(args.special_tokens)
        with _progress() as on_bytes:
            imported = import_reference(
                args.checkpoint,
                args.params,
                args.vit_config,
                args.out,
                special_tokens=tokens,
                tokenizer=args.tokenizer,
                keep_template=args.chat_template == "keep",
                answer_tokens=args.answer_tokens,
                keep_adapter=args.adapter,
                labs_csv=args.labs_csv,
                progress=on_bytes,
            )
    except (ValueError, OSError) as error:
        return fail(f"import-reference: {' '.join(str(error).split())}", EXIT_USAGE)
    except KeyboardInterrupt:
        return fail(f"import-reference: interrupted; {args.out} was not written", EXIT_INTERRUPTED)
    print(describe(args, imported))
    return 0


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """A bar of bytes written, where there is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("import"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("import", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def describe(args: argparse.Namespace, imported: Imported) -> str:
    """What was written, and what the folder still lacks."""
    pairs = "kept in adapter/" if args.adapter else "merged"
    lines = [
        f"{args.out}: {imported.num_entries} entries, {imported.num_bytes / 1e9:.2f} GB of weights in "
        f"{imported.dtype}, low-rank pairs of rank {imported.rank} {pairs}"
    ]
    if args.adapter:
        lines.append(
            f"to train the adapter on: model.lora.rank={imported.rank} model.lora.alpha={imported.rank}; "
            "rank 0 merges it"
        )
    if imported.tokens_left_out is None:
        lines.append("no tokenizer: the stages and diagnose need one; give --tokenizer DIR to have it in the folder")
    elif imported.tokens_left_out:
        lines.append(f"tokenizer: {len(imported.tokens_left_out)} reserved tokens made room and are left out")
    if args.labs_csv is None:
        lines.append("no percentiles: diagnose --labs needs --percentiles, or import again with --labs-csv")
    lines.append(UNTRAINED_STAND_INS)
    lines.append(f"start a run from it with model.init={args.out} data.film.size={imported.film_size}")
    return "\n".join(lines)


if __name__ == "__main__":
    from pipelines.cli import main

    sys.exit(main(["import-reference", *sys.argv[1:]]))
