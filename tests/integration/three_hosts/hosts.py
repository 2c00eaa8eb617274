"""A laptop and hosts with their own sshd on this one machine, each in namespaces of its own, joined by a switch.

Owns: making and ending them, programs on the laptop. Does not own: what runs on them (walk.py).
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

import psutil

PROJECT = Path(__file__).resolve().parents[3]
SCRIPT = Path(__file__).with_name("world.sh")
NETWORK = "10.77.0."
PACKAGES = {"sshd": "openssh-server", "rsync": "rsync"}
START_TIMEOUT_S = 60.0
DIE_WITH_PARENT = 1
"""prctl's PR_SET_PDEATHSIG."""


def missing() -> str | None:
    """Why no hosts can be made here; None if they can."""
    if os.geteuid() != 0:
        return "hosts in namespaces need root"
    wanted = ("ip", "unshare", "nsenter", "ssh", "ssh-keygen")
    lacking = [name for name in wanted if shutil.which(name) is None]
    if lacking:
        return f"hosts in namespaces need the programs {', '.join(lacking)}"
    probe = ["unshare", "--mount", "--net", "--pid", "--uts", "--fork", "ip", "link", "add", "probe", "type", "bridge"]
    done = subprocess.run(probe, capture_output=True, text=True, timeout=30, check=False)
    if done.returncode:
        return f"namespaces or bridges are not allowed here: {done.stderr.strip()}"
    absent = _absent()
    if absent and shutil.which("apt-get") is None:
        return f"the hosts need {' and '.join(absent)}, which are not installed"
    return None


def _absent() -> list[str]:
    """Debian packages of what the hosts need and this machine does not have."""
    places = f"{os.environ['PATH']}:/usr/sbin"
    return [package for program, package in PACKAGES.items() if shutil.which(program, path=places) is None]


def fetch_tools(folder: Path) -> None:
    """Unpacks the packages that are not installed into `folder`, which the hosts see on top of this machine's files.

    Raises:
        RuntimeError: apt cannot fetch them.
    """
    folder.mkdir(parents=True)
    absent = _absent()
    if not absent:
        return
    archives = folder.with_name("archives")
    (archives / "partial").mkdir(parents=True)
    fetch = ["apt-get", "install", "--yes", "--no-install-recommends", "--download-only"]
    options = ["-o", f"Dir::Cache::archives={archives}", "-o", "APT::Sandbox::User=root"]
    done = subprocess.run([*fetch, *options, *absent], capture_output=True, text=True, timeout=120, check=False)
    if done.returncode:
        raise RuntimeError(f"{' and '.join(absent)} cannot be fetched; install them: {done.stderr.strip()[-500:]}")
    for archive in archives.glob("*.deb"):
        subprocess.run(["dpkg", "--extract", archive, folder], check=True, timeout=60)
    for name in ("bin", "sbin", "lib"):  # links to those in /usr, which a folder of the same name would hide
        if (folder / name).is_dir():
            shutil.copytree(folder / name, folder / "usr" / name, symlinks=True, dirs_exist_ok=True)
            shutil.rmtree(folder / name)


class World:
    """The laptop and the hosts, from `with` to its end; nothing of them is left, even if this process is killed.

    Args:
        folder: theirs while they live; `folder`/shared is /shared on every host.
        offers: host name -> arguments of `ray start`, which the host finds in /etc/ray_offer.
    """

    def __init__(self, folder: Path, offers: Mapping[str, str]) -> None:
        self.folder = folder
        self.addresses = {"laptop": f"{NETWORK}1"} | {
            name: f"{NETWORK}{index}" for index, name in enumerate(offers, start=11)
        }
        self._offers = offers
        self._outer: subprocess.Popen[bytes] | None = None
        self._first = 0

    def __enter__(self) -> World:
        self._write_folder()
        command = ["unshare", "--mount", "--net", "--pid", "--uts", "--fork", "--kill-child", "--mount-proc"]
        self._outer = subprocess.Popen(
            [*command, "bash", SCRIPT],
            env={
                **os.environ,
                "FOLDER": str(self.folder),
                "PROJECT": str(PROJECT),
                "GATEWAY": self.addresses["laptop"],
            },
            stdout=(self.folder / "laptop.log").open("wb"),
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=_die_with_parent,
        )
        try:
            self._wait_until_up()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the first process, and with it all others; returns when the last is gone."""
        if self._outer is None:
            return
        if self._first and self._outer.poll() is None:
            os.kill(self._first, signal.SIGKILL)
        else:
            self._outer.kill()
        self._outer.wait(timeout=60)
        self._outer = None

    def processes(self) -> list[psutil.Process]:
        """All that run on the laptop and the hosts."""
        assert self._outer is not None, "the world is not up"
        return psutil.Process(self._outer.pid).children(recursive=True)

    def laptop_file(self, path: str) -> Path:
        """Where a file of the laptop lies, as seen from here."""
        return Path(f"/proc/{self._first}/root") / path.removeprefix("/")

    def laptop(self, command: Sequence[str], environment: Mapping[str, str] | None = None) -> list[str]:
        """The command line that runs `command` on the laptop, in the project's folder."""
        variables = {
            "HOME": "/root",
            "LANG": "C.UTF-8",
            "PATH": f"{sys.prefix}/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONUNBUFFERED": "1",
            **(environment or {}),
        }
        assigned = [f"{name}={value}" for name, value in variables.items()]
        enter = ["nsenter", f"--target={self._first}", "--mount", "--net", "--pid", "--uts", "--root", "--wd=/"]
        return [*enter, "env", "--ignore-environment", f"--chdir={PROJECT}", *assigned, *command]

    def _write_folder(self) -> None:
        fetch_tools(self.folder / "tools")
        for name in ("offers", "roots", "shared"):
            (self.folder / name).mkdir()
        for name, offer in self._offers.items():
            (self.folder / "offers" / name).write_text(offer + "\n")
        pairs = [f"{name}={address}\n" for name, address in self.addresses.items()]
        (self.folder / "machines").write_text("".join(pairs))
        folders = dict.fromkeys(str(Path(each).resolve()) for each in (sys.base_prefix, sys.prefix))
        (self.folder / "visible").write_text("".join(f"{each}\n" for each in folders))
        for name in ("host_key", "key"):
            keygen = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", self.folder / name]
            subprocess.run(keygen, check=True, timeout=30)
        shutil.copy(self.folder / "key.pub", self.folder / "authorized_keys")

    def _wait_until_up(self) -> None:
        """Returns when every sshd answers the laptop."""
        deadline = time.monotonic() + START_TIMEOUT_S
        waiting = [f"{name}'s sshd" for name in self._offers]
        while waiting:
            assert self._outer is not None
            if self._outer.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"waited {START_TIMEOUT_S:g} s for {waiting[0]}; {self._logs()}")
            time.sleep(0.2)
            if not (self.folder / "ready").exists():
                continue
            self._first = psutil.Process(self._outer.pid).children()[0].pid
            waiting = [f"{name}'s sshd" for name in self._offers if not self._answers(self.addresses[name])]

    def _answers(self, address: str) -> bool:
        probe = self.laptop(["timeout", "2", "bash", "-c", f"exec 3<>/dev/tcp/{address}/22"])
        return subprocess.run(probe, capture_output=True, timeout=30, check=False).returncode == 0

    def _logs(self) -> str:
        logs = {path.name: path.read_text(errors="replace").strip() for path in self.folder.glob("*.log")}
        return "; ".join(f"{name}: {text[-500:]}" for name, text in logs.items() if text)


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(DIE_WITH_PARENT, signal.SIGKILL)
