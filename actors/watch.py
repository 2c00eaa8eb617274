"""Every actor of a role has to say that it lives, and one with an engine what that has done.

Owns: asking so, the errors of those that do not answer or whose engine serves no more, whether an engine stands still.
Does not own: what becomes of them (roster.py), or the deadlines of their work.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping

from ray.exceptions import RayError

from actors.deadline import DeadlineError, within
from actors.member import Member
from medtvt_rl.rollout.pending import EngineBrokenError


class Watch:
    """Asks every actor that serves, twice in `silence_s`.

    Args:
        lose: told who is of no use any more, and why.
    """

    def __init__(
        self,
        role: str,
        silence_s: float,
        serving: Callable[[], Iterable[Member]],
        lose: Callable[[Member, Exception], object],
    ) -> None:
        self._role, self._silence_s, self._serving, self._lose = role, silence_s, serving, lose

    async def run(self) -> None:
        """Goes on until it is cancelled."""
        while True:
            await asyncio.sleep(self._silence_s / 2)
            await asyncio.gather(*(self._hear(member) for member in list(self._serving())))

    async def _hear(self, member: Member) -> None:
        seconds, who = self._silence_s, f"{self._role} {member.index}"
        try:
            answer = member.handle.health.remote()
            health = await within(answer, seconds, f"{who} to say that it lives", "supervision.silence_s")
        except (DeadlineError, RayError) as error:
            self._lose(member, error)
            return
        if isinstance(health, Mapping):
            if health["ok"]:
                await self._look(member, seconds)
            else:
                self._lose(member, EngineBrokenError(health["broken"]))

    async def _look(self, member: Member, seconds: float) -> None:
        """Notes what an engine has done; where that is not to be had nothing is known of it."""
        try:
            totals = await within(member.handle.stats.remote(), seconds, "its totals", "supervision.silence_s")
        except (DeadlineError, RayError):
            return
        member.seen_at = time.monotonic()
        if totals != member.totals:
            member.totals, member.moved_at = totals, member.seen_at

    def is_still(self, member: Member, since: float) -> bool:
        """Whether the engine of a member that had work is known to have done nothing for `silence_s`, since then."""
        return member.seen_at - max(member.moved_at, since) > self._silence_s > 0
