"""The names that Ray gives to accelerators, and the nearest of them to one that it does not know.

Owns: these two. Does not own: where a name may stand (medtvt_rl/roles.py, cluster_faults.py).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from medtvt_rl.config_checks import ConfigError
from medtvt_rl.roles import PlacementConfig, declared


def known_accelerators() -> list[str]:
    """The values that Ray gives to ray.io/accelerator-type."""
    from ray.util.accelerators import accelerators

    found = (value for name, value in vars(accelerators).items() if name[0].isupper() and isinstance(value, str))
    return sorted(set(found))


def nearest(name: str, known: Iterable[str]) -> str:
    """The nearest known name, as the end of a message; upper and lower case are alike."""
    by_lower = {one.lower(): one for one in known}
    found = difflib.get_close_matches(name.lower(), list(by_lower), n=1, cutoff=0.6)
    return f"; did you mean {by_lower[found[0]]!r}?" if found else ""


def check_accelerators(placement: PlacementConfig) -> None:
    """Raises ConfigError for a name that Ray does not know."""
    for key, wanted in declared(placement):
        _check(f"{key}.accelerator", wanted.accelerator or [])


def _check(key: str, names: list[str]) -> None:
    if not names:
        return
    known = known_accelerators()
    for name in names:
        if name not in known:
            hint = nearest(name, known) or f"; it knows {', '.join(known)}"
            raise ConfigError(f"{key}: Ray knows no accelerator {name!r}{hint}")
