"""Looks up every locked distribution in the database of known vulnerabilities, with pip-audit.

    python requirements/audit.py LOCK...

Ends with 1 where one is known to be vulnerable, unless requirements/accepted_findings names the finding with its
reason; with 0, and a line that says so, where nothing could be looked up: without a network, or behind an index that
has no such database. pip-audit is no part of the lock: it is taken from PATH, or fetched once into an environment of
its own.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
OWN_ENVIRONMENT = ROOT / ".venv" / "audit"
ACCEPTED = ROOT / "requirements" / "accepted_findings"
PIP_AUDIT = "pip-audit==2.10.1"
TIMEOUT_S = 300


def find_tool() -> Path | None:
    """pip-audit; None where there is none and it cannot be fetched."""
    own = OWN_ENVIRONMENT / "bin" / "pip-audit"
    found = shutil.which("pip-audit", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if found or own.is_file():
        return Path(found) if found else own
    venv.create(OWN_ENVIRONMENT, with_pip=True)
    command = [OWN_ENVIRONMENT / "bin" / "python", "-m", "pip", "install", "--quiet", PIP_AUDIT]
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=TIMEOUT_S)
    except (subprocess.SubprocessError, OSError):
        shutil.rmtree(OWN_ENVIRONMENT, ignore_errors=True)
        return None
    return own


def ask(tool: Path, lock: Path) -> dict[str, Any] | None:
    """pip-audit's report on a lock; None where it gave none."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        command = [tool, "-r", lock, "--no-deps", "--disable-pip", "--progress-spinner=off", "-f", "json", "-o", report]
        try:
            subprocess.run(command, check=False, capture_output=True, timeout=TIMEOUT_S)
            found: dict[str, Any] = json.loads(report.read_text())
        except (subprocess.SubprocessError, OSError, ValueError):
            return None
        return found


def accepted() -> set[str]:
    """Ids of the findings that were looked at: the first word of each line that is no comment."""
    lines = ACCEPTED.read_text().splitlines() if ACCEPTED.is_file() else []
    return {line.split()[0] for line in lines if line.strip() and not line.startswith("#")}


def verdict(report: dict[str, Any] | None, name: str, known: set[str]) -> tuple[bool, list[str]]:
    """Whether a lock may be used as it is, and what to say of it.

    Args:
        report: of pip-audit; None where it gave none.
        name: of the lock.
        known: ids of findings that are accepted.
    """
    every = [] if report is None else report["dependencies"]
    looked_up = [one for one in every if "skip_reason" not in one]
    if not looked_up:
        return True, [f"audit: {name}: NOT CHECKED, the database of vulnerabilities cannot be reached from here"]
    lines = []
    for one in looked_up:
        for finding in one["vulns"]:
            if not known & {finding["id"], *finding.get("aliases", [])}:
                mended = ", ".join(finding["fix_versions"]) or "no version"
                lines.append(f"audit: {one['name']} {one['version']}: {finding['id']}, mended in {mended}")
    skipped = sorted(one["name"] for one in every if "skip_reason" in one)
    not_found = f"; not in the database: {', '.join(skipped)}" if skipped else ""
    summary = f"audit: {name}: {len(looked_up)} of {len(every)} looked up, {len(lines)} findings{not_found}"
    return not lines, [*lines, summary]


def main(locks: list[str]) -> int:
    tool = find_tool()
    if tool is None:
        print("audit: NOT CHECKED, pip-audit is not installed and cannot be fetched here")
        return 0
    passed = True
    for lock in map(Path, locks):
        fine, lines = verdict(ask(tool, lock), lock.name, accepted())
        print("\n".join(lines))
        passed &= fine
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
