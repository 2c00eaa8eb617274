"""What keeps a job from being submitted: one message each, and soon."""

from __future__ import annotations

import json
import socket
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import NoReturn

import pytest
import ray

from actors import jobs
from medtvt_rl.config_checks import ConfigError

ROOT = Path(__file__).parents[2]


class JobServer(BaseHTTPRequestHandler):
    """Answers the question for the version; the class attributes say how."""

    status = 200
    answer: object = None

    def do_GET(self) -> None:
        self.send_response(self.status)
        self.end_headers()
        self.wfile.write(json.dumps(self.answer).encode())

    def log_message(self, *_: object) -> None:
        """Silent."""


@pytest.fixture
def server() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), JobServer) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{listening.server_port}"
        listening.shutdown()


@pytest.mark.parametrize(
    ("status", "answer", "token", "expected"),
    [
        (200, {"ray_version": "2.9.0"}, None, rf"runs Ray 2\.9\.0, and here is {ray.__version__}"),
        (403, "no", "wrong", "the token is not the cluster's; name its file: --token-file"),
        (401, "no", None, "asks for a token, and none was found"),
        (200, ["a page"], None, "is no job server of Ray"),
    ],
)
def test_a_server_that_is_not_in_order_is_told(
    server: str, monkeypatch: pytest.MonkeyPatch, status: int, answer: object, token: str | None, expected: str
) -> None:
    monkeypatch.setattr(JobServer, "status", status)
    monkeypatch.setattr(JobServer, "answer", answer)
    with pytest.raises(ConfigError, match=expected):
        jobs.check_cluster(server, token)


def test_a_server_of_our_version_is_in_order(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(JobServer, "answer", {"ray_version": ray.__version__})
    jobs.check_cluster(server, None)


def test_a_dead_address_and_a_silent_one_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "ANSWER_TIMEOUT_S", 0.5)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(ConfigError, match=r"no job server answers at .*ray up"):
            jobs.check_cluster(address, None)
        silent.listen()
        with pytest.raises(ConfigError, match=r"no job server answers at .*ReadTimeout"):
            jobs.check_cluster(address, None)


def test_a_folder_that_is_too_large_names_what_fills_it(tmp_path: Path) -> None:
    for name, size in (("small.txt", 10), ("weights/old/a.bin", 3000), ("runs/quickstart/model.bin", 9000)):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(size))
    (tmp_path / "ignored.bin").write_bytes(bytes(7000))
    (tmp_path / ".gitignore").write_text("ignored.bin\n")
    with pytest.raises(ConfigError, match=r"too large to send.*Largest: weights/old"):
        jobs.check_working_folder(tmp_path, jobs.EXCLUDES, limit_bytes=2000)
    sent = jobs.check_working_folder(tmp_path, [*jobs.EXCLUDES, "weights/"], limit_bytes=2000)
    assert sent == 10 + len("ignored.bin\n")


def test_every_file_of_the_project_is_sent() -> None:
    from ray._private.runtime_env.packaging import _dir_travel, _get_excludes

    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    sent = set[str]()
    _dir_travel(
        ROOT,
        [_get_excludes(ROOT, list(jobs.EXCLUDES))],
        lambda path: sent.add(path.relative_to(ROOT).as_posix()),
        include_gitignore=True,
    )
    assert {name for name in tracked if name} <= sent
    assert not any(name.startswith(("runs/", ".venv/", ".git/")) for name in sent)


def test_a_job_that_the_server_does_not_know_any_more_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    class Forgetful:
        def get_job_info(self, job: str) -> NoReturn:
            raise RuntimeError(f"Request failed with status code 404: Job {job} does not exist.")

    monkeypatch.setattr(jobs, "END_TIMEOUT_S", 0.0)
    with pytest.raises(RuntimeError, match=r"has not told of job job_1 for 0 s.*404: Job job_1 does not exist"):
        jobs.Follower(Forgetful(), "job_1").run()  # type: ignore[arg-type]


def test_the_token_comes_from_where_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert jobs.read_token(None) is None
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("home\n")
    (tmp_path / "other").write_text("other\n")
    (tmp_path / "empty").write_text("\n")
    assert jobs.read_token(None) == "home" and jobs.read_token(str(tmp_path / "other")) == "other"
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for name, expected in (
        ("none", "cannot be read: No such file or directory; name another with --token-file"),
        ("empty", "is empty"),
        ("binary", "cannot be read: it is no text"),
    ):
        with pytest.raises(ConfigError, match=expected):
            jobs.read_token(str(tmp_path / name))


def test_what_is_no_token_is_told_without_its_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "auth_token"
    for secret in ("first-secret\nsecond-secret", "secret secret", "secr\u00e9t", "\ufeffsecret", "secret\x7f"):
        file.write_text(f"{secret}\n", encoding="utf-8")
        monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
        with pytest.raises(ConfigError, match=rf"token file {file} holds no token: expected one word") as from_file:
            jobs.read_token(str(file))
        monkeypatch.setenv("RAY_AUTH_TOKEN", secret)
        with pytest.raises(ConfigError, match=r"^RAY_AUTH_TOKEN holds no token: expected one word") as from_environment:
            jobs.read_token(None)
        told = f"{from_file.value}{from_environment.value}"
        assert "secr" not in told and "\n" not in told
    monkeypatch.setenv("RAY_AUTH_TOKEN", "secret\n")
    assert jobs.read_token(None) == "secret"
