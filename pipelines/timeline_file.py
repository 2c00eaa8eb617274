"""timeline.json of a run folder: written while the run goes, so that one that hangs or is killed leaves it, too.

Owns: when it is written, and what becomes of that of an earlier life of the run. Does not own: what it holds
(actors/timeline.py).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

from actors.timeline import Timeline

FILE = "timeline.json"
EVERY_S, SHARE = 60.0, 0.01
"""Seconds between two writings, and the share of the time that they may take: a long timeline is written less often."""


class TimelineFile:
    """The file of one timeline in a run folder."""

    def __init__(self, timeline: Timeline, folder: Path, tell: Callable[[str], None]) -> None:
        self._timeline, self._folder, self._tell = timeline, folder, tell

    def begin(self, version: int) -> None:
        """Puts aside what the run left before it goes on from a version: timeline_to_VERSION.json; one that begins anew
        forgets it."""
        path = self._folder / FILE
        if version > 0 and path.is_file():
            path.replace(self._folder / f"timeline_to_{version}.json")
        path.unlink(missing_ok=True)

    def write(self) -> None:
        """Only told where it fails: it must not hide what ended the run."""
        try:
            self._timeline.write(self._folder / FILE)
        except OSError as error:
            self._tell(f"no timeline: {error}")

    async def keep(self, every_s: float = EVERY_S) -> None:
        """Writes it again and again, until it is cancelled."""
        pause_s = every_s
        while True:
            await asyncio.sleep(pause_s)
            began = time.monotonic()
            await asyncio.to_thread(self.write)
            pause_s = max(every_s, (time.monotonic() - began) / SHARE)
