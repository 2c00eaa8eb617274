"""What an actor made is brought to the node of the driver, so that it does not go down with the actor's.

Large return values stay in the memory of the node that made them; small ones travel to the driver with the answer. A
finished group waits for its step, and a node may go at any time: what lies elsewhere is copied here. Completions and
log-probs are some hundred kilobytes a group.

Owns: the copy. Does not own: when a value is ready, or what becomes of the actor that cannot hand it over (roster.py).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import ray
from ray.experimental import get_object_locations

Keep = Callable[[Any], Awaitable[Any]]


async def keep_here(reference: ray.ObjectRef) -> ray.ObjectRef:
    """A reference to the same value, which does not hang on any other node. The value must be ready.

    Raises:
        ray.exceptions.ObjectLostError: it is gone already. It may also never arrive: give it a deadline.
    """
    nodes = get_object_locations([reference])[reference]["node_ids"]
    if not nodes or ray.get_runtime_context().get_node_id() in nodes:
        return reference
    return ray.put(await reference)


async def as_it_is(reference: Any) -> Any:
    """For actors on the driver's own node."""
    return reference
