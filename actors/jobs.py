"""A run as a job of a cluster that runs elsewhere: checks that end within seconds, submission, its log, its exit code.

Owns: what goes to Ray's job server. Does not own: what the job does (pipelines/run.py), or the words on the terminal.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import signal
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

import httpx
import ray

from medtvt_rl.config_checks import ConfigError

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

ANSWER_TIMEOUT_S = 10.0
END_TIMEOUT_S = 30.0
STOP_WAIT_S = 300
"""What a job that is asked to stop may take for its checkpoint; after Ray's own 3 s it would be killed. The job's own
environment goes before that of the head."""
POLL_S = 1.0
FIRST_TELL_S, TELL_S = 10.0, 60.0
EXIT_STOPPED = 143
# Beside what .gitignore, .rayignore and Ray itself leave out. Without a slash at its beginning a pattern would leave
# out folders of that name anywhere, e.g. medtvt_rl/data.
EXCLUDES = ("/runs/", "/data/", "/.venv/", ".git/", "*.egg-info/", ".pytest_cache/", ".mypy_cache/", ".ruff_cache/")


def read_token(path: str | None, mend: str = "name another with --token-file") -> str | None:
    """The token of the cluster: from `path`, else from where Ray looks for it; None where there is none.

    Args:
        mend: how the caller's user names another file.

    Raises:
        ConfigError: a file that was named cannot be read, is empty, or what it holds is no token, which is not told.
    """
    if path is None and os.environ.get("RAY_AUTH_TOKEN"):
        return _one_word(os.environ["RAY_AUTH_TOKEN"].strip(), "RAY_AUTH_TOKEN")
    named = path or os.environ.get("RAY_AUTH_TOKEN_PATH")
    file = Path(named or "~/.ray/auth_token").expanduser()
    if not named and not file.is_file():
        return None
    try:
        token = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no text"
        raise ConfigError(f"token file {file} cannot be read: {why}; {mend}") from error
    if not token:
        raise ConfigError(f"token file {file} is empty; `ray get-auth-token --generate` writes one")
    return _one_word(token, f"token file {file}")


def _one_word(token: str, where: str) -> str:
    """The token, where it may stand in a header; a message that quoted another one would tell a secret."""
    if not re.fullmatch("[!-~]+", token):
        raise ConfigError(
            f"{where} holds no token: expected one word of printable ASCII characters, as "
            "`ray get-auth-token --generate` writes it"
        )
    return token


def check_cluster(address: str, token: str | None) -> None:
    """One question to the job server, answered within ANSWER_TIMEOUT_S.

    Raises:
        ConfigError: nothing answers, the token is missing or wrong, or its Ray is another version than ours.
    """
    mend = "start it with `ray up cluster.yaml`, and keep `ray dashboard cluster.yaml` running"
    try:
        answer = httpx.get(f"{address}/api/version", headers=_headers(token), timeout=ANSWER_TIMEOUT_S)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ConfigError(
            f"no job server answers at {address} ({type(error).__name__} {error}".rstrip() + f"); {mend}"
        ) from error
    if answer.status_code in (401, 403):
        given = "the token is not the cluster's" if token else "the cluster asks for a token, and none was found"
        raise ConfigError(f"{address}: {given}; name its file: --token-file ~/.ray/auth_token")
    try:
        there = answer.json()["ray_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{address} answers ({answer.status_code}), but is no job server of Ray; expected the dashboard, port 8265"
        ) from error
    if there != ray.__version__:
        raise ConfigError(
            f"the cluster at {address} runs Ray {there}, and here is {ray.__version__}; set the same in cluster.yaml "
            "(docker, setup_commands) or here"
        )


def check_working_folder(folder: Path, excludes: Sequence[str], limit_bytes: int | None = None) -> int:
    """The size of what would be sent, in bytes before compression.

    Raises:
        ConfigError: it is more than the job server takes; the largest folders are named.
    """
    from ray._private import ray_constants
    from ray._private.runtime_env.packaging import _dir_travel, _get_excludes

    sizes: Counter[str] = Counter()

    def add(path: Path) -> None:
        if path.is_file():
            inner = path.relative_to(folder).parts
            sizes["/".join(inner[:2]) if len(inner) > 2 else inner[0]] += path.stat().st_size

    folder = folder.absolute()
    left_out = [*ray_constants.get_runtime_env_default_excludes(), *excludes]
    _dir_travel(folder, [_get_excludes(folder, left_out)], add, include_gitignore=True)
    limit = ray_constants.DASHBOARD_CLIENT_MAX_SIZE if limit_bytes is None else limit_bytes
    if sizes.total() > limit:
        largest = ", ".join(f"{name} {size / 2**20:.0f} MiB" for name, size in sizes.most_common(3))
        raise ConfigError(
            f"{folder} is too large to send: {sizes.total() / 2**20:.0f} MiB, and the job server takes "
            f"{limit / 2**20:.0f}. Largest: {largest}. Leave them out: --exclude PATTERN"
        )
    return sizes.total()


def connect(address: str, token: str | None) -> JobSubmissionClient:
    """A client of a job server that `check_cluster` found in order."""
    from ray.job_submission import JobSubmissionClient

    # Ray lets this variable, and RAY_ADDRESS after it, win over the argument.
    os.environ["RAY_API_SERVER_ADDRESS"] = address
    for name in ("dashboard_sdk", "job.sdk"):  # their modules set a level of their own
        logging.getLogger(f"ray.dashboard.modules.{name}").setLevel(logging.WARNING)
    return JobSubmissionClient(address, headers=_headers(token))


def submit(client: JobSubmissionClient, entry: str, excludes: Sequence[str], stop_wait_s: int = STOP_WAIT_S) -> str:
    """The id of the job, which may take `stop_wait_s` for its checkpoint when it is asked to stop. A head that has just
    started has no agent yet: it is asked again for END_TIMEOUT_S."""
    deadline = time.monotonic() + END_TIMEOUT_S
    while True:
        try:
            environment = {
                "working_dir": ".",
                "excludes": list(excludes),
                "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(stop_wait_s)},
            }
            return str(client.submit_job(entrypoint=entry, runtime_env=environment))
        except RuntimeError as error:
            if "No available agent" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(1)


class Follower:
    """Prints the output of a job as it comes; a connection that breaks is made again, and nothing is printed twice."""

    def __init__(self, client: JobSubmissionClient, job: str) -> None:
        self._client, self._job = client, job
        self._printed = 0
        self._tell_at = time.monotonic() + FIRST_TELL_S

    def run(self) -> int:
        """The job's own exit code, once it has ended.

        Raises:
            RuntimeError: the job server does not answer any more.
        """
        before = signal.signal(signal.SIGINT, _interrupt)
        try:
            while True:
                info = self._ask()
                self._tell_wait(info)
                try:
                    asyncio.run(self._print())
                except _broken() as error:
                    print(f"connection to the log of job {self._job} lost ({type(error).__name__})", flush=True)
                if info.status.is_terminal():  # and so it was when all that it said was printed
                    return self._code(info)
                time.sleep(POLL_S)
        finally:
            signal.signal(signal.SIGINT, before)

    def _tell_wait(self, info: JobDetails) -> None:
        """A job that does not start is told of, now and then."""
        if info.status == "PENDING" and time.monotonic() > self._tell_at:
            self._tell_at = time.monotonic() + TELL_S
            print(f"job {self._job} waits to be started: {' '.join(str(info.message).split())}", flush=True)

    def _code(self, info: JobDetails) -> int:
        if info.status == "SUCCEEDED":
            return 0
        if info.status == "STOPPED":
            return EXIT_STOPPED
        if info.driver_exit_code is None and info.message:
            print(info.message, flush=True)
        return info.driver_exit_code or 1

    async def _print(self) -> None:
        """Until the connection ends; skips the characters that were printed before."""
        seen = 0
        async for lines in self._client.tail_job_logs(self._job):
            fresh = lines[max(0, self._printed - seen) :]
            seen += len(lines)
            self._printed = max(self._printed, seen)
            print(fresh, end="", flush=True)

    def _ask(self) -> JobDetails:
        """What the job server says of the job."""
        deadline = time.monotonic() + END_TIMEOUT_S
        while True:
            try:
                return self._client.get_job_info(self._job)
            except _broken() as error:
                if time.monotonic() > deadline:
                    raise RuntimeError(
                        f"the job server has not told of job {self._job} for {END_TIMEOUT_S:g} s, which may go on "
                        f"without it; at last: {type(error).__name__}: {error}"
                    ) from error
                time.sleep(POLL_S)


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    """Ctrl-C at once: asyncio's handler cancels what is under way, which the client may take for a lost connection."""
    raise KeyboardInterrupt


def _broken() -> tuple[type[Exception], ...]:
    """What the client raises when a connection breaks or the server does not answer as it should."""
    from ray.dashboard.modules.job.sdk import aiohttp

    return (OSError, RuntimeError, aiohttp.ClientError)


def _headers(token: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"} if token else {}
