"""The plug-in without an engine: light to import, found by its entry point."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import entry_points


def test_importing_the_plugin_and_the_engine_imports_no_vllm() -> None:
    code = (
        "import sys, medtvt_rl.model.vllm_plugin, medtvt_rl.rollout.vllm_engine; "
        "sys.exit(any(name == 'vllm' or name.startswith('vllm.') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


def test_the_entry_point_names_register() -> None:
    found = {point.name: point.value for point in entry_points(group="vllm.general_plugins")}
    assert found["medtvt_rl"] == "medtvt_rl.model.vllm_plugin:register"
