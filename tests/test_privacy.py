"""What is said of patients: hashes that agree where they should, and no words of a user's own exceptions."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from medtvt_rl import privacy
from medtvt_rl.data.errors import DataError
from medtvt_rl.privacy import PrivacyConfig, SaltError, UserCodeError


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    before = privacy._current
    yield
    privacy._current = before


def opened(config: PrivacyConfig, folder: Path) -> str:
    folder.mkdir(exist_ok=True)
    privacy.prepare_salt(config, folder)
    privacy.open_for(config, folder)
    return privacy.hashed("4711")


def test_each_run_has_a_salt_of_its_own_that_stays(tmp_path: Path) -> None:
    first, second = opened(PrivacyConfig(), tmp_path / "a"), opened(PrivacyConfig(), tmp_path / "b")
    assert first != second and first == opened(PrivacyConfig(), tmp_path / "a")
    assert (tmp_path / "a" / "salt").stat().st_mode & 0o777 == 0o600
    assert "4711" not in first and len(first) == len("study-") + 12


def test_a_configured_salt_makes_runs_agree(tmp_path: Path) -> None:
    salt = tmp_path / "salt"
    salt.write_text("s" * 64)
    salt.chmod(0o600)
    config = PrivacyConfig(salt_file=str(salt))
    assert opened(config, tmp_path / "a") == opened(config, tmp_path / "b")
    assert not (tmp_path / "a" / "salt").exists()


@pytest.mark.parametrize(
    ("content", "mode", "words"),
    [(None, 0o600, "cannot be read"), ("s" * 64, 0o644, "open to others"), ("short", 0o600, "holds 5 bytes")],
)
def test_a_salt_that_protects_nothing_is_refused(tmp_path: Path, content: str | None, mode: int, words: str) -> None:
    salt = tmp_path / "salt"
    if content is not None:
        salt.write_text(content)
        salt.chmod(mode)
    with pytest.raises(SaltError, match=rf"privacy\.salt_file: .*{words}"):
        privacy.prepare_salt(PrivacyConfig(salt_file=str(salt)), tmp_path)


def test_without_a_salt_at_hand_a_process_still_says_no_id(tmp_path: Path) -> None:
    privacy.open_for(PrivacyConfig(), tmp_path / "nowhere")
    assert privacy.hashed("4711").startswith("study-") and "4711" not in privacy.hashed("4711")


def raises(error: Exception) -> None:
    raise error


def test_the_words_of_a_users_exception_are_kept_back(tmp_path: Path) -> None:
    opened(PrivacyConfig(), tmp_path)
    with pytest.raises(UserCodeError) as caught, privacy.user_code("task.items mine:Items"):
        raises(KeyError("patient 4711"))
    assert str(caught.value).startswith("task.items mine:Items: KeyError in test_privacy.py:")
    assert "4711" not in str(caught.value) and caught.value.__suppress_context__


def test_they_are_said_where_samples_are_shown(tmp_path: Path) -> None:
    opened(PrivacyConfig(show_samples=True), tmp_path)
    with pytest.raises(UserCodeError, match="patient 4711"), privacy.user_code("task.items mine:Items"):
        raises(KeyError("patient 4711"))


def test_the_projects_own_errors_pass(tmp_path: Path) -> None:
    from medtvt_rl.data.study_store import StudyStore

    with pytest.raises(DataError, match="no study store"), privacy.user_code("task.items"):
        StudyStore.open(tmp_path)
