"""Importing a checkpoint of the published size: time over that of reading its file, peak memory over its size.

    python tests/benchmarks/bench_import.py [--folder DIR] [--dtype bfloat16] [--repeats 2] [--adapter]

Writes a checkpoint of random weights in the published layout (Llama-3.2-1B, ViT-B/16, xresnet1d-101, rank 16; 1.8e9
weights in all, 3.7 GB in bfloat16), then reads it and imports it, each in a process of its own, and deletes it all.
"Reading" is `torch.load(file, weights_only=True)`, the whole file into memory; the plain bytes are timed beside it.
Every process begins with the file out of the page cache. Peak memory is the process's largest resident set, which
counts the pages of the file that are mapped into it, too.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from medtvt_rl.model.published_layout import published_layout
from medtvt_rl.model.published_sizes import PublishedSizes

PARAMS: dict[str, Any] = {
    "dim": 2048,
    "n_layers": 16,
    "n_heads": 32,
    "n_kv_heads": 8,
    "vocab_size": 128256,
    "ffn_dim_multiplier": 1.5,
    "multiple_of": 256,
    "norm_eps": 1e-05,
    "rope_theta": 500000.0,
}
VIT = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "image_size": 224,
    "patch_size": 16,
}
RANK = 16
BYTES = """
import sys
buffer = bytearray(16 << 20)
with open(sys.argv[1], "rb", buffering=0) as file:
    while file.readinto(buffer):
        pass
"""
READ = "import sys, torch; torch.load(sys.argv[1], weights_only=True)"


def write_checkpoint(path: Path, dtype: torch.dtype, params: Mapping[str, Any] = PARAMS) -> None:
    """Random entries; the tensors that the published model keeps under two names are stored once, as there."""
    noise = torch.randn(1 << 20)
    state: dict[str, torch.Tensor] = {}
    for name, entry in published_layout(PublishedSizes.of(params, VIT), params["vocab_size"], RANK).items():
        if entry.kind == "copy":
            state[name] = state[name.replace("convpath.0.", "convs.")]
        elif name.endswith("num_batches_tracked"):
            state[name] = torch.zeros(entry.shape, dtype=torch.int64)
        else:
            count = torch.Size(entry.shape).numel()
            state[name] = noise.to(dtype).repeat(-(-count // len(noise)))[:count].clone().reshape(entry.shape)
    torch.save({"model": state}, path)


def out_of_cache(path: Path) -> None:
    """Asks the kernel to forget the file's pages, once they are on disk."""
    file = os.open(path, os.O_RDONLY)
    os.fsync(file)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(file)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Of a process; `cpu_s` is steadier than `wall_s` where others work on the machine, too."""

    wall_s: float
    cpu_s: float
    peak_bytes: int


def measure(*command: str) -> Cost:
    """Runs a process to its end."""
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, *command], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{command[:3]} failed")
    wall_s = time.perf_counter() - started
    return Cost(wall_s=wall_s, cpu_s=usage.ru_utime + usage.ru_stime, peak_bytes=usage.ru_maxrss * 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, help="where there is room for twice the file (default: a temporary one)")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--adapter", action="store_true", help="keep the low-rank pairs as an adapter")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        file = folder / "checkpoint.pth"
        # In a process of its own: one that is started from a large process counts the other's memory as its peak.
        writer = get_context("spawn").Process(target=write_checkpoint, args=(file, getattr(torch, args.dtype)))
        writer.start()
        writer.join()
        size = file.stat().st_size
        (folder / "params.json").write_text(json.dumps(PARAMS))
        (folder / "vit.json").write_text(json.dumps(VIT))
        print(f"file: {size / 1e9:.2f} GB, {args.dtype}; {torch.get_num_threads()} threads", flush=True)
        for repeat in range(args.repeats):
            found: dict[str, Cost] = {}
            out = folder / f"out{repeat}"
            commands = {
                "bytes": ("-c", BYTES, str(file)),
                "torch alone": ("-c", "import torch"),
                "torch.load": ("-c", READ, str(file)),
                "import": (
                    *("-m", "pipelines.cli", "import-reference", "--checkpoint", str(file), "--out", str(out)),
                    *("--params", str(folder / "params.json"), "--vit-config", str(folder / "vit.json")),
                    *(["--adapter"] if args.adapter else []),
                ),
            }
            for what, command in commands.items():
                out_of_cache(file)
                found[what] = measure(*command)
            subprocess.run(["rm", "-r", str(out)], check=True)
            for what, cost in found.items():
                print(f"  {what:<12}{cost.wall_s:7.2f} s, {cost.cpu_s:6.2f} s of CPU, {cost.peak_bytes / 1e9:.2f} GB")
            importing, reading = found["import"], found["torch.load"]
            print(
                f"import over torch.load: {importing.wall_s / reading.wall_s:.2f} (CPU "
                f"{importing.cpu_s / reading.cpu_s:.2f}); peak memory over size: {importing.peak_bytes / size:.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
