"""The audit of the lock: findings fail it, accepted ones do not, and a look-up that did not happen is said."""

from __future__ import annotations

import stat
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SPEC = spec_from_file_location("audit", ROOT / "requirements" / "audit.py")
assert SPEC is not None and SPEC.loader is not None
audit: Any = module_from_spec(SPEC)
SPEC.loader.exec_module(audit)

FINDING = {"id": "PYSEC-1", "fix_versions": ["2.0"], "aliases": ["CVE-1"]}
BAD = {"name": "a", "version": "1.0", "vulns": [FINDING]}
GOOD = {"name": "b", "version": "1.0", "vulns": []}
SKIPPED = {"name": "c", "skip_reason": "not found"}


def test_a_finding_fails_and_names_what_mends_it() -> None:
    passed, lines = audit.verdict({"dependencies": [BAD, GOOD, SKIPPED]}, "x.txt", set())
    assert not passed
    assert lines[0] == "audit: a 1.0: PYSEC-1, mended in 2.0"
    assert lines[1] == "audit: x.txt: 2 of 3 looked up, 1 findings; not in the database: c"


def test_an_accepted_finding_passes_by_either_name() -> None:
    for name in ("PYSEC-1", "CVE-1"):
        assert audit.verdict({"dependencies": [BAD]}, "x.txt", {name})[0]


def test_nothing_looked_up_is_not_called_clean() -> None:
    for report in (None, {"dependencies": [SKIPPED]}):
        passed, lines = audit.verdict(report, "x.txt", set())
        assert passed and lines == [
            "audit: x.txt: NOT CHECKED, the database of vulnerabilities cannot be reached from here"
        ]


def test_the_tool_is_asked_about_the_lock(tmp_path: Path) -> None:
    tool = tmp_path / "pip-audit"
    tool.write_text(
        f"#!{sys.executable}\nimport json, sys\n"
        "path = sys.argv[sys.argv.index('-o') + 1]\n"
        "open(path, 'w').write(json.dumps({'dependencies': [{'name': sys.argv[2]}]}))\nsys.exit(1)\n"
    )
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    assert audit.ask(tool, Path("x.txt")) == {"dependencies": [{"name": "x.txt"}]}
    assert audit.ask(tmp_path / "none", Path("x.txt")) is None


def test_every_locked_file_has_a_hash() -> None:
    for lock in sorted((ROOT / "requirements").glob("*-*.txt")):
        text = lock.read_text().replace("\\\n", " ")
        lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
        assert lines and all("--hash=sha256:" in line for line in lines), lock.name


def test_pip_refuses_a_file_with_another_hash(tmp_path: Path) -> None:
    wheel = tmp_path / "tiny-1.0-py3-none-any.whl"
    wheel.write_bytes(b"not what was locked")
    (tmp_path / "lock.txt").write_text(f"tiny==1.0 --hash=sha256:{'0' * 64}\n")
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-index", "--require-hashes", "--no-deps"]
    run = subprocess.run(
        [*command, "--find-links", str(tmp_path), "-r", str(tmp_path / "lock.txt")],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode != 0 and "HASH" in run.stderr.upper()
