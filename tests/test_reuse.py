"""A task of one's own: the example keeps to its size, and docs/reuse.md says what the code does."""

from __future__ import annotations

import ast
import inspect
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from medtvt_rl.config import Config, load_config
from medtvt_rl.data.tokenizer import byte_tokenizer
from medtvt_rl.dotted import resolve
from medtvt_rl.learner.engine import TrainingEngine
from medtvt_rl.rewards.config import RewardConfig
from medtvt_rl.rewards.scorer import Scorer
from medtvt_rl.rollout.engine import RolloutEngine
from medtvt_rl.rollout.vllm_engine import VllmEngine
from medtvt_rl.types import Example, Prompt
from pipelines.answers import Ablating, Evaluator
from pipelines.command import check_named
from pipelines.judging import ComparesTexts

ROOT = Path(__file__).resolve().parent.parent
DOCS = (ROOT / "docs" / "reuse.md").read_text()
TASK = ROOT / "configs" / "text_task.py"


def documented_methods(heading: str) -> dict[str, list[str]]:
    """Method -> parameters, as the first column of the table below a heading has them."""
    section = DOCS.split(heading, 1)[1].split("\n#", 1)[0]
    cells = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    found = re.findall(r"`(\w+)\(([^)]*)\)", " ".join(cells))
    return {name: [each.partition("=")[0].strip(" *.") for each in given.split(",") if each] for name, given in found}


def parameters(function: Callable[..., Any]) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name not in ("self", "_ray_trace_ctx")]


@pytest.mark.parametrize(
    "path",
    [
        "actors.rollout_generator:RolloutGenerator",
        "actors.reward_scorer:RewardScorer",
        "actors.reference_policy:ReferencePolicy",
        "actors.learner_worker:LearnerWorker",
    ],
)
def test_the_contracts_of_the_actors_are_those_of_the_code(path: str) -> None:
    documented = documented_methods(f"### `{path}`")
    actor = resolve(path, "docs").__ray_metadata__.modified_class
    public = {name: method for name, method in vars(actor).items() if inspect.isfunction(method) and name[0] != "_"}
    assert documented == {name: parameters(method) for name, method in public.items()}


@pytest.mark.parametrize(
    ("heading", "protocol"),
    [
        ("## Another rollout engine", RolloutEngine),
        ("## Another trainer", TrainingEngine),
        ("## A measure of your own", (Evaluator, Ablating, ComparesTexts)),
    ],
)
def test_the_protocols_are_documented_whole(heading: str, protocol: Any) -> None:
    kinds = protocol if isinstance(protocol, tuple) else (protocol,)
    methods = {n: parameters(f) for kind in kinds for n, f in vars(kind).items() if inspect.isfunction(f)}
    expected = {name: given for name, given in methods.items() if not name.startswith("_")}
    assert documented_methods(heading) == expected


def test_every_file_that_is_shown_is_written_for_the_tests_and_every_setting_is_known(written: Path) -> None:
    first_lines = re.findall(r"```python\n(.*)\n", DOCS)
    assert {f"# {path.name}" for path in written.glob("*.py")} == set(first_lines)
    shown = re.findall(r"```yaml\n(.*?)```", DOCS, re.DOTALL)
    assert len(shown) >= 8
    for text in shown:
        OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.create(text))


def test_the_usual_engine_has_what_the_protocol_asks_for() -> None:
    for name, method in vars(RolloutEngine).items():
        if inspect.isfunction(method) and not name.startswith("_"):
            assert parameters(getattr(VllmEngine, name)) == parameters(method), name


def test_the_text_task_is_small_and_imports_public_types_alone() -> None:
    source = TASK.read_text()
    assert source.count("\n") <= 40
    modules = {
        node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    assert {name for name in modules if str(name).startswith(("medtvt_rl", "actors", "pipelines"))} == {
        "medtvt_rl.types"
    }


def test_the_text_task_is_found_from_the_folder_of_the_clone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    config = load_config("configs/text_task.yaml")
    check_named(config)
    tokenizer = byte_tokenizer()
    made = {s: resolve(config.task.prompts, "")(config, tokenizer, s) for s in ("train", "validation", "test")}
    ids = [prompt.prompt_id for prompts in made.values() for prompt in prompts]
    assert len(set(ids)) == len(ids)
    first = made["test"][0]
    assert isinstance(first, Prompt)
    assert tokenizer.decode(first.token_ids) == f"<bos><user>{first.prompt_id}<assistant>"
    assert int(first.ground_truth) == sum(map(int, first.prompt_id.split("+")))
    taught = resolve(str(config.task.examples), "")(config, tokenizer, "train")
    assert all(isinstance(example, Example) for example in taught) and len(taught) < len(made["train"])


BYTES = byte_tokenizer()


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_a_byte_tokenizer_reads_any_text(text: str) -> None:
    ids = BYTES(text, add_special_tokens=False)["input_ids"]
    if not re.search("<(pad|bos|eos|user|assistant)>", text):
        assert BYTES.decode(ids, skip_special_tokens=True) == text
        assert len(ids) == len(text.encode())


@pytest.fixture
def judge(written: Path) -> ModuleType:
    import judge  # type: ignore[import-not-found]

    return judge  # type: ignore[no-any-return]


@pytest.fixture
def endpoint() -> Iterator[SimpleNamespace]:
    """A server that answers as its `answers` say, one after the other, and keeps what it was asked."""
    state = SimpleNamespace(asked=[], answers=[])

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            state.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            code, text, seconds = state.answers.pop(0)
            time.sleep(seconds)
            self.send_response(code)
            self.end_headers()
            self.wfile.write(json.dumps({"choices": [{"message": {"content": text}}]}).encode())

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    state.url = f"http://127.0.0.1:{server.server_port}"
    yield state
    server.shutdown()
    server.server_close()


def test_the_reward_of_a_judge(judge: ModuleType, endpoint: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge.time, "sleep", lambda seconds: None)
    endpoint.answers = [(200, " 7\n", 0), (503, "", 0), (200, "10", 0), (200, "ten", 0), (401, "", 0)]
    options = {"url": endpoint.url, "model": "m"}
    scorer = Scorer({"judge": RewardConfig(function="judge:marked", options=options)})
    scored = scorer.score(["good", "after a fault", "no number", "refused"], "truth")
    assert scored.components["judge"].tolist() == pytest.approx([0.7, 1.0, 0.0, 0.0])
    assert scored.failed.tolist() == [False, False, True, True]
    assert "answered 'ten'" in str(scored.reasons[2]) and "401" in str(scored.reasons[3])
    assert len(endpoint.asked) == 5
    assert endpoint.asked[0]["model"] == "m"
    assert endpoint.asked[0]["messages"][0]["content"].startswith("Reference: truth\nAnswer: good\n")


def test_a_judge_that_is_late_or_gone_raises_in_time(judge: ModuleType, endpoint: SimpleNamespace) -> None:
    endpoint.answers = [(200, "7", 1.5)]
    started = time.monotonic()
    with pytest.raises(OSError, match="timed out"):
        judge.marked("a", "b", endpoint.url, "m", timeout_s=0.2, attempts=1)
    with pytest.raises(OSError, match="refused"):
        judge.marked("a", "b", "http://127.0.0.1:1", "m", attempts=1)
    assert time.monotonic() - started < 1.5


@pytest.mark.parametrize("apart", [False, True])
def test_the_reward_of_a_program(written: Path, tmp_path: Path, apart: bool) -> None:
    import sandbox  # type: ignore[import-not-found]

    def prints(program: str, timeout_s: float = 20.0) -> float:
        return float(sandbox.prints(program, "3", timeout_s, apart))

    if apart:
        try:
            sandbox.check_apart()
        except RuntimeError as error:
            pytest.skip(f"this machine does not let a user make namespaces: {error}")
    assert prints("print(1 + 2)") == 1
    assert prints("print(4)") == 0
    assert prints("print(3); raise SystemExit(1)") == 0
    assert prints("x = bytearray(10**9); print(3)") == 0
    assert prints("print(3, 'x' * 2_000_000)") == 0
    assert prints("import os; print(3 if not set(os.environ) - {'LC_CTYPE'} else os.environ)") == 1
    marker = tmp_path / "outlived"
    left = f"import os, time\nif not os.fork():\n    time.sleep(1)\n    open({str(marker)!r}, 'w')\nelse:\n    print(3)"
    assert prints(left) == 1
    started = time.monotonic()
    assert prints("import time; time.sleep(60)", timeout_s=0.5) == 0
    assert time.monotonic() - started < 20
    time.sleep(1.5)
    assert not marker.exists()
    online = "import socket\ntry:\n    socket.create_connection(('127.0.0.1', {}), 2)\nexcept OSError:\n    print(3)"
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        assert prints(online.format(server.server_port)) == float(apart)


def test_a_program_that_cannot_be_kept_apart_is_no_wrong_answer(
    written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sandbox

    refusing = tmp_path / "unshare"
    refusing.write_text("#!/bin/sh\necho 'unshare failed: Operation not permitted' >&2\nexit 1\n")
    refusing.chmod(0o755)
    monkeypatch.setattr(sandbox, "APART", [str(refusing), *sandbox.APART[1:]])
    sandbox.check_apart.cache_clear()
    scored = Scorer({"tests": RewardConfig(function="sandbox:prints")}).score(["print(3)"], "3")
    assert scored.failed.tolist() == [True]
    assert "Operation not permitted; allow user namespaces" in str(scored.reasons[0])
    assert sandbox.prints("print(3)", "3", apart=False) == 1
