"""What every test process needs before anything heavy is imported: one thread each, and no look at a model hub."""

from __future__ import annotations

import os

from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

# How long an example takes says something of the machine, not of the code; all else is as Hypothesis chose.
settings.register_profile("patient", settings(), deadline=None)
settings.load_profile("patient")
