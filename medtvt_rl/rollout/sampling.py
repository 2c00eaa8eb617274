"""Seeds of sampled completions: a function of (run seed, group id, completion index) alone."""

from __future__ import annotations

import hashlib


def completion_seed(run_seed: int, group_id: int, index: int) -> int:
    """A 31-bit seed, so that the same policy gives the same text whatever the placement."""
    digest = hashlib.blake2b(f"{run_seed}/{group_id}/{index}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") & 0x7FFFFFFF
