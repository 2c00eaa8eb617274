"""What may be said of patients outside the data: studies by a salted hash, and no word of a text or a value.

Owns: the hash and its salt, and what is said of an exception that a user's own function raised on patient data. Does
not own: who says it. Data files (the study store, the journal, problems.csv) hold ids and texts as they are; logs,
metrics, reports and error messages do not.
A process says nothing until `open_for` has told it the run's settings: ids are then hashed with a salt of its own.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import secrets
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

logger = logging.getLogger(__name__)

SALT_FILE = "salt"
SALT_BYTES = 32
HASH_DIGITS = 12
PREFIX = "study-"
OWN_PACKAGES = ("medtvt_rl.", "actors.", "pipelines.")


@dataclass
class PrivacyConfig:
    """What a run may say of its patients in logs, metrics, reports and error messages.

    Attributes:
        show_samples: whether answers and true diagnoses are shown in the report, and the words of exceptions that a
            user's own function raised; for simulated patients, or where whoever reads these may read the data.
        salt_file: the salt of the hashes that stand for study ids, so that they agree between runs; None makes one for
            the run, in its folder.
    """

    show_samples: bool = False
    salt_file: str | None = None


class SaltError(ValueError):
    """A salt that cannot be used; the message names the file and the mend."""


class UserCodeError(RuntimeError):
    """A function that the configuration names by a dotted path raised something."""


@dataclass(frozen=True, slots=True)
class _Privacy:
    salt: bytes
    show_samples: bool


_current = _Privacy(salt=secrets.token_bytes(SALT_BYTES), show_samples=False)


def salt_path(config: PrivacyConfig, run_folder: Path) -> Path:
    """Where the salt of a run lies."""
    return run_folder / SALT_FILE if config.salt_file is None else Path(config.salt_file)


def prepare_salt(config: PrivacyConfig, run_folder: Path) -> None:
    """Makes the run's salt where there is none, for its owner's eyes alone.

    Raises:
        SaltError: a configured file is missing, too short, or open to others.
    """
    path = salt_path(config, run_folder)
    if config.salt_file is None and not path.exists():
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "w") as file:
            file.write(secrets.token_hex(SALT_BYTES))
    read_salt(path)


def open_for(config: PrivacyConfig, run_folder: Path) -> None:
    """Settles for this process what it may say. Where the salt cannot be read, ids are hashed with one of its own."""
    global _current
    try:
        salt = read_salt(salt_path(config, run_folder))
    except SaltError as error:
        logger.warning("%s; hashed ids of this process do not agree with those of the run", error)
        salt = _current.salt
    _current = _Privacy(salt=salt, show_samples=config.show_samples)


def shows_samples() -> bool:
    """Whether texts may be shown."""
    return _current.show_samples


def hashed(study_id: str) -> str:
    """What stands for the id of a study, patient, item or prompt: "study-3f9a0c12b7de"."""
    return hash_with(_current.salt, study_id)


def hash_with(salt: bytes, study_id: str) -> str:
    """`hashed` with the salt of another run."""
    digest = hmac.new(salt, study_id.encode("utf-8", "surrogatepass"), hashlib.sha256)
    return f"{PREFIX}{digest.hexdigest()[:HASH_DIGITS]}"


def words_of(error: BaseException) -> str:
    """What may be said of an exception that a user's own function raised: its type and place; its words, too, where
    samples are shown."""
    kind = type(error).__name__
    if _current.show_samples:
        return f"{kind}: {error}"
    frames = traceback.extract_tb(error.__traceback__)
    where = f" in {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    return f"{kind}{where} (privacy.show_samples=true shows its words)"


@contextmanager
def user_code(name: str) -> Iterator[None]:
    """Around a call of a function that the configuration names.

    Raises:
        UserCodeError: it raised something whose words may be of a patient; what this project raises itself, in words
            that say nothing of one, passes as it is.
    """
    try:
        yield
    except Exception as error:
        if _is_own(error):
            raise
        if _current.show_samples:
            raise UserCodeError(f"{name}: {words_of(error)}") from error
        raise UserCodeError(f"{name}: {words_of(error)}") from None


def read_salt(path: Path) -> bytes:
    """The salt of a file. Raises SaltError if it is missing, too short, or open to others."""
    try:
        status, text = path.stat(), path.read_bytes().strip()
    except OSError as error:
        raise SaltError(
            f"privacy.salt_file: {path} cannot be read ({error.strerror}); "
            "write 32 random bytes as hexadecimal digits there, or leave it out"
        ) from error
    if sys.platform != "win32" and status.st_mode & 0o077:
        raise SaltError(f"privacy.salt_file: {path} is open to others; chmod 600 {path}")
    if len(text) < SALT_BYTES:
        raise SaltError(f"privacy.salt_file: {path} holds {len(text)} bytes, expected at least {SALT_BYTES}")
    return text


def _is_own(error: BaseException) -> bool:
    """Whether this project raised it itself, in its own words."""
    own, trace = False, error.__traceback__
    while trace is not None:
        own = str(trace.tb_frame.f_globals.get("__name__", "")).startswith(OWN_PACKAGES)
        trace = trace.tb_next
    return own
