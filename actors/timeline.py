"""What each actor was asked for and when, as the driver saw it: timeline.json, which ui.perfetto.dev opens.

Owns: spans, their lanes, the Trace Event Format (a row per actor; calls that overlap lie in lanes below each other).
Does not own: who records: the pools, around every call. A span reaches from the call to its answer, waiting included.
"""

from __future__ import annotations

import heapq
import json
import threading
import time
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAX_SPANS = 200_000
"""The last so many are kept: some 40 MB of JSON."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """One call; seconds since the timeline began."""

    row: str
    name: str
    start_s: float
    end_s: float
    failed: bool


class Timeline:
    """Collects spans in the driver's thread; may be written from any."""

    def __init__(self) -> None:
        self._spans: deque[Span] = deque(maxlen=MAX_SPANS)
        self._began = time.monotonic()
        self._writing = threading.Lock()

    @contextmanager
    def span(self, row: str, name: str) -> Iterator[None]:
        """Records what happens inside as one span.

        Args:
            row: the actor, e.g. "rollout 0".
            name: what it was asked to do, e.g. "generate group 17".
        """
        start_s, failed = time.monotonic(), True
        try:
            yield
            failed = False
        finally:
            began, end_s = self._began, time.monotonic()
            self._spans.append(Span(row=row, name=name, start_s=start_s - began, end_s=end_s - began, failed=failed))

    def write(self, path: Path) -> None:
        """Writes what was collected so far; appears whole or not at all."""
        temporary = path.with_name(f".{path.name}.tmp")
        with self._writing:
            temporary.write_text(json.dumps({"displayTimeUnit": "ms", "traceEvents": self._events()}))
            temporary.replace(path)

    def _events(self) -> list[dict[str, Any]]:
        rows: dict[str, list[Span]] = defaultdict(list)
        for span in list(self._spans):  # calls end meanwhile
            rows[span.row].append(span)
        events: list[dict[str, Any]] = []
        for pid, row in enumerate(sorted(rows), start=1):
            events.append({"ph": "M", "name": "process_name", "pid": pid, "args": {"name": row}})
            events.append({"ph": "M", "name": "process_sort_index", "pid": pid, "args": {"sort_index": pid}})
            for span, lane in in_lanes(rows[row]):
                events.append(
                    {
                        "ph": "X",
                        "name": span.name,
                        "cat": "failed" if span.failed else "call",
                        "pid": pid,
                        "tid": lane,
                        "ts": round(span.start_s * 1e6, 1),
                        "dur": round((span.end_s - span.start_s) * 1e6, 1),
                    }
                )
        return events


def in_lanes(spans: list[Span]) -> list[tuple[Span, int]]:
    """Each span with the lowest lane (from 1) that is free when it starts; spans of one lane do not overlap."""
    busy: list[tuple[float, int]] = []
    free: list[int] = []
    placed = []
    for span in sorted(spans, key=lambda each: (each.start_s, each.end_s)):
        while busy and busy[0][0] <= span.start_s:
            heapq.heappush(free, heapq.heappop(busy)[1])
        lane = heapq.heappop(free) if free else len(busy) + 1
        heapq.heappush(busy, (span.end_s, lane))
        placed.append((span, lane))
    return placed
