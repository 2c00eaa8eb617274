"""Watches for the notice that the cloud will take this machine away, and drains its Ray node then.

    python -m actors.spot_notice aws|gcp

Runs beside `ray start` on machines that may be taken away (cluster.yaml starts it), and ends once it has drained the
node, or where nothing answers at the address of the cloud's metadata service. On Kubernetes it isn't needed: Ray
drains its node when the pod gets SIGTERM.

Sources: "Spot Instance interruption notices" and "Use the Instance Metadata Service" in the Amazon EC2 user guide (two
minutes ahead); "Preemptible VM instances" in the documentation of Compute Engine (30 seconds ahead).

Owns: asking the clouds, telling Ray. Does not own: what a run does then (drain.py).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from http import HTTPStatus
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import ProxyHandler, Request, build_opener

POLL_S = 2.0
ANSWER_S = 2.0
SILENT_TRIES = 15
GCP_NOTICE_S = 30.0
COMMAND_S = 5.0
"""What the start of `ray drain-node` is taken to cost."""
DRAIN_TIMEOUT_S, AGAIN_S = 60.0, 1.0


def aws(base: str) -> float | None:
    """Seconds until an EC2 spot instance is taken away, None where nothing is planned.

    Raises:
        OSError, ValueError, KeyError: no answer, or not such a one.
    """
    ask = {"X-aws-ec2-metadata-token-ttl-seconds": "60"}
    token = _read(Request(f"{base}/latest/api/token", headers=ask, method="PUT"))
    try:
        headers = {"X-aws-ec2-metadata-token": token}
        notice = json.loads(_read(Request(f"{base}/latest/meta-data/spot/instance-action", headers=headers)))
    except HTTPError as error:
        if error.code == HTTPStatus.NOT_FOUND:
            return None
        raise
    at = datetime.fromisoformat(notice["time"])
    return max(0.0, (at - datetime.now(UTC)).total_seconds())


def gcp(base: str) -> float | None:
    """The same of a spot machine of Compute Engine."""
    headers = {"Metadata-Flavor": "Google"}
    is_taken = _read(Request(f"{base}/computeMetadata/v1/instance/preempted", headers=headers)).strip() == "TRUE"
    return GCP_NOTICE_S if is_taken else None


CLOUDS: dict[str, tuple[Callable[[str], float | None], str]] = {
    "aws": (aws, "http://169.254.169.254"),
    "gcp": (gcp, "http://metadata.google.internal"),
}


def wait_for_notice(ask: Callable[[str], float | None], base: str, poll_s: float) -> float:
    """Returns the seconds left once there is a notice.

    Raises:
        OSError, ValueError, KeyError: nothing has ever answered as it should, SILENT_TRIES times in a row.
    """
    failed, known = 0, False
    while True:
        try:
            seconds, known = ask(base), True
        except (OSError, ValueError, KeyError):
            seconds, failed = None, failed + 1
            if failed >= SILENT_TRIES and not known:
                raise
        if seconds is not None:
            return seconds
        time.sleep(poll_s)


def drain(seconds: float, node_id: str | None, address: str | None) -> int:
    """Tells Ray that a node will be gone after so many seconds, again where it does not take it; the last exit code of
    `ray drain-node`."""
    until, code = time.monotonic() + seconds, 1
    command = [str(Path(sys.executable).with_name("ray")), "drain-node", "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
    command += ["--reason-message", "spot notice"]
    command += [f"--node-id={node_id}"] if node_id else []
    command += [f"--address={address}"] if address else []
    while code != 0 and (left := until - time.monotonic()) > 0:
        told = ["--deadline-remaining-seconds", str(int(max(0.0, left - COMMAND_S)))]
        try:
            code = subprocess.run([*command, *told], check=False, timeout=min(left, DRAIN_TIMEOUT_S)).returncode
        except subprocess.TimeoutExpired:
            code = 1
        if code != 0:
            time.sleep(AGAIN_S)
    return code


def main(argv: Sequence[str] | None = None) -> int:
    """0 when the node was drained, 1 where Ray refused, 2 where the cloud does not answer."""
    parser = argparse.ArgumentParser(prog="python -m actors.spot_notice", description=__doc__.splitlines()[0])
    parser.add_argument("cloud", choices=sorted(CLOUDS))
    parser.add_argument("--metadata", metavar="URL", help="of the metadata service, in place of the cloud's own")
    parser.add_argument("--node-id", help="of the Ray node; that of this machine where it has one only")
    parser.add_argument("--address", help="of the Ray cluster; that of this machine's node")
    parser.add_argument("--every", type=float, default=POLL_S, metavar="SECONDS")
    args = parser.parse_args(argv)
    ask, base = CLOUDS[args.cloud]
    try:
        seconds = wait_for_notice(ask, args.metadata or base, args.every)
    except (OSError, ValueError, KeyError) as error:
        print(f"spot_notice: no answer at {args.metadata or base}: {error}", file=sys.stderr)
        return 2
    print(f"spot_notice: this machine is taken away in {seconds:.0f} s; its Ray node is drained", flush=True)
    return 1 if drain(seconds, args.node_id, args.address) else 0


def _read(request: Request) -> str:
    with build_opener(ProxyHandler({})).open(request, timeout=ANSWER_S) as answer:
        text: str = answer.read().decode()
    return text


if __name__ == "__main__":
    sys.exit(main())
