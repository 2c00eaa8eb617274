"""How much memory an import takes: of the checkpoint's size, whatever else the process holds already."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from bench_import import PARAMS, VIT, write_checkpoint

ROOT = Path(__file__).parents[2]
SMALL = {**PARAMS, "dim": 512, "n_layers": 2, "n_heads": 8, "vocab_size": 8000}
GATE = 1.5
# The peak of a process that was just started: its own, unlike that of getrusage, which remembers the parent's.
IMPORT = """
import sys
from pathlib import Path
import torch
import medtvt_rl.model.reference_folder
from pipelines import cli

def kib(field):
    return int(next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith(field)).split()[1])

before = kib("VmRSS")
code = cli.main(sys.argv[1:])
print("grown by", 1024 * (kib("VmHWM") - before))
sys.exit(code)
"""


def test_an_import_takes_no_more_than_one_and_a_half_times_the_file(tmp_path: Path) -> None:
    file = tmp_path / "sft.pth"
    write_checkpoint(file, torch.bfloat16, SMALL)
    size = file.stat().st_size
    assert 180e6 < size < 260e6
    (tmp_path / "params.json").write_text(json.dumps(SMALL))
    (tmp_path / "vit.json").write_text(json.dumps(VIT))
    arguments = ["import-reference", "--checkpoint", str(file), "--out", str(tmp_path / "out")]
    arguments += ["--params", str(tmp_path / "params.json"), "--vit-config", str(tmp_path / "vit.json")]
    arguments += ["--special-tokens", str(tmp_path / "tokens.json")]
    (tmp_path / "tokens.json").write_text(json.dumps({"<ecg>": 7000, "<cxr>": 7001, "<lab>": 7002}))
    command = [sys.executable, "-c", IMPORT, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    grown = int(done.stdout.rpartition("grown by ")[2])
    # The pages of the mapped file count, too: less than nearly the size would mean that nothing was measured.
    assert 0.5 * size < grown < GATE * size, f"{grown / size:.2f} of the file's size"
