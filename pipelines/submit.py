"""`medtvt-rl submit -c configs/X.yaml`: the stages of a run as a job of a cluster that runs elsewhere.

Owns: arguments, and the words on the terminal. Does not own: the way to the job server (actors/jobs.py).
"""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import sys
from pathlib import Path

from medtvt_rl.config_checks import ConfigError
from pipelines.command import EXIT_FAILED, EXIT_USAGE, check_named, fail, load, positive

ADDRESS = "http://127.0.0.1:8265"
EXIT_INTERRUPTED = 130


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-c", "--config", required=True, help="configuration, below the current folder")
    parser.add_argument(
        "--address", help=f"of the job server (default RAY_API_SERVER_ADDRESS, RAY_ADDRESS if http, else {ADDRESS})"
    )
    parser.add_argument("--token-file", help="the cluster's token (default RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token)")
    parser.add_argument("--exclude", action="append", default=[], metavar="PATTERN", help="not sent, as in .gitignore")
    parser.add_argument("--python", default="python", help="interpreter on the cluster's head (default python)")
    parser.add_argument(
        "--stop-wait-s",
        type=positive,
        default=300,
        metavar="S",
        help="to write a checkpoint when stopped (default 300)",
    )
    parser.add_argument("--no-follow", action="store_true", help="return as soon as the job is accepted")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that override the file")


def command(args: argparse.Namespace) -> int:
    """The job's own exit code; 0 at once with --no-follow; 1 or 2 for what keeps it from being submitted."""
    from actors.jobs import EXCLUDES, Follower, check_cluster, check_working_folder, connect, read_token, submit

    logging.getLogger("ray").setLevel(logging.ERROR)
    address = _address(args.address)
    excludes = [*EXCLUDES, *args.exclude]
    try:
        if Path(args.config).is_absolute() or ".." in Path(args.config).parts:
            raise ConfigError(f"--config {args.config}: it must lie below the current folder, which is what is sent")
        check_named(load(args.config, args.overrides), runs_here=False)
        token = read_token(args.token_file)
        size = check_working_folder(Path.cwd(), excludes)
        check_cluster(address, token)
    except ConfigError as error:
        return fail(str(error), EXIT_USAGE)
    entry = f"{args.python} {shlex.join(['-m', 'pipelines.run', '-c', args.config, *args.overrides])}"
    print(f"sending {size / 2**20:.1f} MiB to {address}", flush=True)
    try:
        client = connect(address, token)
        job = submit(client, entry, excludes, args.stop_wait_s)
    except (OSError, RuntimeError, ValueError) as error:
        return fail(f"the job was not accepted: {' '.join(str(error).split())}", EXIT_FAILED)
    known = f"--address {address} {job}"
    print(f"job {job}: {entry}\n  log: ray job logs -f {known}\n  stop: ray job stop {known}", flush=True)
    if args.no_follow:
        return 0
    try:
        code = Follower(client, job).run()
    except KeyboardInterrupt:
        print(f"\njob {job} goes on; to stop it: ray job stop {known}", flush=True)
        return EXIT_INTERRUPTED
    except (OSError, RuntimeError) as error:
        return fail(" ".join(str(error).split()), EXIT_FAILED)
    if code:
        return fail(f"job {job} ended with exit code {code}; what is finished is kept: submit it again to go on", code)
    print(f"job {job} succeeded", flush=True)
    return 0


def _address(given: str | None) -> str:
    """With its scheme, and without a slash at the end."""
    job_server = os.environ.get("RAY_API_SERVER_ADDRESS")
    cluster = os.environ.get("RAY_ADDRESS", "")
    address = given or job_server or (cluster if cluster.startswith("http") else ADDRESS)
    return (address if "://" in address else f"http://{address}").rstrip("/")


if __name__ == "__main__":
    from pipelines.cli import main

    sys.exit(main(["submit", *sys.argv[1:]]))
