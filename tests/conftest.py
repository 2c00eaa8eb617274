"""What every test process needs before anything heavy is imported: one thread each, and no look at a model hub."""

from __future__ import annotations

import os
from datetime import timedelta

from hypothesis import HealthCheck, settings

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

# How long an example takes says something of the machine, not of the code; all else is as Hypothesis chose.
settings.register_profile("patient", settings(), deadline=None)
# The fuzzers of tests/fuzz: a few cases that are the same each time, or with MEDTVT_RL_FUZZ=fuzz many fresh ones. What
# takes longer than the deadline hangs, for whoever waits for it.
hostile = settings(
    deadline=timedelta(seconds=20),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture],
)
settings.register_profile("fuzz-quick", hostile, max_examples=20, derandomize=True)
settings.register_profile("fuzz", hostile, max_examples=400, print_blob=True)
settings.load_profile("patient")
