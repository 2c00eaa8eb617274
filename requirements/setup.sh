#!/usr/bin/env bash
# Creates .venv with the pinned dependencies and this project in it; returns at once when nothing changed since the last time.
#
#   EXTRA=cpu|cuda   which build of vLLM and torch (default: the one of last time; else cuda where nvidia-smi works)
#   PYTHON=PATH      the interpreter, 3.11 (default: the first of python3.11, python3, python that is one)
#   TORCH_ARGS=...   extra arguments of pip for torch alone, e.g. another package index that carries the CPU build
#   PIP_ARGS=...     extra arguments of pip for everything, e.g. --no-index --find-links FOLDER
#   RESOLVE=1        let pip resolve from pyproject.toml instead of installing the lock file
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PLATFORM="$(uname -s | tr '[:upper:]' '[:lower:]')-$(uname -m)"
STAMP=.venv/setup.stamp
LOG=.venv/setup.log
if [ -z "${EXTRA:-}" ] && [ -f .venv/setup.extra ]; then EXTRA="$(cat .venv/setup.extra)"; fi
if [ -z "${EXTRA:-}" ]; then
  if nvidia-smi >/dev/null 2>&1; then EXTRA=cuda; else EXTRA=cpu; fi
fi
LOCK="requirements/$EXTRA-$PLATFORM.txt"

fail() { printf 'setup: %s\n' "$@" >&2; exit 1; }

case "$EXTRA" in cpu | cuda) ;; *) fail "EXTRA is '$EXTRA', expected cpu or cuda" ;; esac

# One line per phase, with its seconds; pip's own words go to the log and are shown only when the phase fails.
phase() {
  local words="$1" start=$SECONDS
  shift
  printf 'setup: %s ... ' "$words"
  if "$@" >>"$LOG" 2>&1; then
    printf '%d s\n' $((SECONDS - start))
  else
    printf 'failed after %d s; the end of %s:\n' $((SECONDS - start)) "$LOG"
    tail -n 15 "$LOG"
    return 1
  fi
}

find_python() {
  local candidate
  for candidate in ${PYTHON:-python3.11 python3 python}; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; then
      command -v "$candidate"
      return
    fi
  done
  fail "no Python 3.11 found (looked for: ${PYTHON:-python3.11 python3 python})." \
    "Install it (Debian, Ubuntu: python3.11 and python3.11-venv; or pyenv, conda) or name it: make setup PYTHON=/path/to/python3.11"
}

# What the environment was built from; a virtual environment that was moved does not work, so its place counts, too.
fingerprint() { { pwd; echo "$EXTRA"; cat pyproject.toml requirements/*.*; } | cksum; }

pip_install() { .venv/bin/python -m pip install --quiet --disable-pip-version-check ${PIP_ARGS:-} "$@"; }

# Whether the lock file is to be installed as it stands; sets DIFFERING to what it lacks.
find_lock() {
  DIFFERING=""
  if [ -f "$LOCK" ]; then DIFFERING="$(.venv/bin/python requirements/lock.py check "$EXTRA" "$LOCK")"; fi
  if [ -f "$LOCK" ] && [ -z "$DIFFERING" ] && [ -z "${RESOLVE:-}" ]; then LOCKED=1; else LOCKED=""; fi
}

install_torch() {
  local version
  if [ -n "$LOCKED" ]; then
    .venv/bin/python requirements/lock.py show torch "$LOCK" >.venv/torch.txt
    version="$(sed 's/^torch==\([^ ]*\).*/\1/' .venv/torch.txt)"
    phase "torch $version" pip_install ${TORCH_ARGS:-} --no-deps --require-hashes -r .venv/torch.txt && return
    fail_torch "$version"
  fi
  version="$(sed -n 's/^ *"torch==\([^"]*\)".*/\1/p' pyproject.toml)"
  if [ "$EXTRA" = cpu ] && [ "${PLATFORM%%-*}" = linux ]; then version="$version+cpu"; fi
  phase "torch $version" pip_install ${TORCH_ARGS:-} "torch==$version" && return
  fail_torch "$version"
}

fail_torch() {
  fail "torch $1 could not be installed." \
    "If pip found no such version: the default index has only the CUDA build (several GB). Name the index of CPU builds that" \
    "PyTorch's installation page gives: make setup TORCH_ARGS='--index-url ADDRESS' (or EXTRA=cuda on a machine with a GPU)." \
    "If pip says that the hashes do not match: the index carries another build of torch than $LOCK knows. Where you trust it," \
    "add the hash that pip got to the lock, as a further --hash."
}

install_dependencies() {
  if [ -n "$LOCKED" ]; then
    phase "the $(grep -c == "$LOCK") packages of $LOCK" pip_install --no-deps --require-hashes -r "$LOCK"
    return
  fi
  if [ -n "$DIFFERING" ]; then echo "setup: $LOCK is older than pyproject.toml ($DIFFERING); 'make lock' renews it afterwards"; fi
  phase "the packages of pyproject.toml, extras $EXTRA and dev" pip_install -e ".[$EXTRA,dev]"
  if ! .venv/bin/python -c 'import torchvision' >>"$LOG" 2>&1; then
    # Builds that do not match this torch break `import transformers`; nothing here needs them.
    .venv/bin/python -m pip uninstall -y -q torchvision torchaudio torchcodec >>"$LOG" 2>&1
  fi
}

if [ -z "${RESOLVE:-}" ] && [ -x .venv/bin/python ] && [ "$(cat "$STAMP" 2>/dev/null)" = "$(fingerprint)" ]; then exit 0; fi

PYTHON_FOUND="$(find_python)"
echo "setup: .venv with $("$PYTHON_FOUND" --version) from $PYTHON_FOUND, extra '$EXTRA' (a few minutes the first time, about 5 GB on disk)"
mkdir -p .venv
rm -f "$STAMP"
: >"$LOG"
phase "virtual environment" "$PYTHON_FOUND" -m venv .venv
find_lock
install_torch
install_dependencies
# With a lock, what builds the project is in it, too.
phase "this project, editable" pip_install --no-deps ${LOCKED:+--no-build-isolation} -e .
phase "check that it imports" .venv/bin/python -c 'import medtvt_rl, ray, torch, transformers; transformers.PreTrainedModel'
echo "$EXTRA" >.venv/setup.extra
fingerprint >"$STAMP"
echo "setup: done in $SECONDS s"
