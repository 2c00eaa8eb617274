"""The fit finds the coefficients that made the observations; files of timings are read back, or refused with a word."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import numpy as np
import pytest
from timing_models import timings

from medtvt_rl.simulation.clock import run_simulated
from medtvt_rl.simulation.cores import Cores
from medtvt_rl.simulation.engine import SimulatedEngine
from medtvt_rl.simulation.fit import Generated, fit_engine, fit_line
from medtvt_rl.simulation.timings import Timings, TimingsError

TRUE = timings(
    decode_s=((1.0, 0.004), (8.0, 0.006), (32.0, 0.01), (128.0, 0.03)),
    prefill_group_s=0.02,
    prefill_completion_s=0.001,
    prefill_token_s=2e-4,
    recompute_token_s=1e-4,
)


def observed(groups: int, size: int, prompt: int, seed: int, updated: bool = False) -> Generated:
    """What an engine of TRUE timings takes."""
    random = np.random.default_rng(seed)
    lengths = [tuple(int(n) for n in random.integers(20, 90, size)) for _ in range(groups)]

    async def main() -> tuple[float, float | None]:
        engine, loop, at_s = SimulatedEngine(TRUE, Cores(), 128), asyncio.get_running_loop(), None
        making = [engine.generate(row, prompt) for row in lengths]
        if updated:
            await asyncio.sleep(0.8)
            at_s = loop.time()
            await engine.update(1)
        await asyncio.gather(*making)
        engine.end()
        return loop.time(), at_s

    seconds, at_s = run_simulated(main())
    share = None if at_s is None else at_s / seconds
    return Generated(seconds=seconds, lengths=tuple(lengths), prompt_tokens=(prompt,) * groups, updated_at=share)


def test_the_engine_is_found_in_what_it_did() -> None:
    settings = [(1, 1), (2, 1), (4, 1), (1, 8), (2, 8), (4, 8), (8, 8), (16, 8)]
    seen = [
        observed(groups, size, prompt, seed + 10 * prompt)
        for seed, (groups, size) in enumerate(settings)
        for prompt in (20, 60, 120)
    ]
    seen += [observed(16, 8, 20, seed, updated=True) for seed in range(3)]
    found = fit_engine(seen, max_running=128)
    assert found.error < 0.01
    assert [number for number, _ in found.decode_s] == [1, 8, 32, 128]
    for (_, expected), (_, seconds) in zip(TRUE.decode_s, found.decode_s):
        assert seconds == pytest.approx(expected, rel=0.1)
    assert found.recompute_token_s == pytest.approx(TRUE.recompute_token_s, rel=0.5)
    fitted = timings(
        decode_s=found.decode_s,
        prefill_group_s=found.prefill_group_s,
        prefill_completion_s=found.prefill_completion_s,
        prefill_token_s=found.prefill_token_s,
    )
    assert fitted.prefill_s(8, 60) == pytest.approx(TRUE.prefill_s(8, 60), rel=0.15)


def test_noise_does_not_make_times_negative() -> None:
    noise = np.random.default_rng(0)
    seen = []
    for seed in range(24):
        one = observed((1, 2, 4, 16)[seed % 4], 8, 20, seed)
        seen.append(
            Generated(
                seconds=one.seconds * float(noise.lognormal(0, 0.3)),
                lengths=one.lengths,
                prompt_tokens=one.prompt_tokens,
            )
        )
    found = fit_engine(seen, max_running=128)
    steps = [seconds for _, seconds in found.decode_s]
    assert steps == sorted(steps) and steps[0] > 0
    assert min(found.prefill_group_s, found.prefill_completion_s, found.prefill_token_s, found.context_s) >= 0


def test_a_line() -> None:
    assert fit_line([10, 20, 40], [1.2, 1.4, 1.8])[:2] == pytest.approx((1.0, 0.02))


def test_timings_come_back_from_their_file(tmp_path: Path) -> None:
    TRUE.write(tmp_path / "timings.json")
    assert Timings.read(tmp_path / "timings.json") == TRUE


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no"),
        ("not json", "no JSON"),
        ("[1]", "no file of timings"),
        ({"load_s": None}, "no time"),
        ({"load_s": -1.0}, "no time"),
        ({"decode_s": []}, "no time"),
        ("without load_s", "missing: load_s"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_with_the_mend(tmp_path: Path, content: object, message: str) -> None:
    path = tmp_path / "timings.json"
    TRUE.write(path)
    whole = json.loads(path.read_text())
    if content is None:
        path.unlink()
    elif content == "without load_s":
        path.write_text(json.dumps({name: value for name, value in whole.items() if name != "load_s"}))
    elif isinstance(content, dict):
        path.write_text(json.dumps({**whole, **content}))
    else:
        path.write_text(str(content))
    with pytest.raises(TimingsError, match=message) as refused:
        Timings.read(path)
    assert "medtvt-rl bench" in str(refused.value)
