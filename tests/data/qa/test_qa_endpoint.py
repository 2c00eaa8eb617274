"""Calls to an endpoint: what is tried again, what ends the run, what is kept, what is never paid twice."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import pytest
from chat_server import ChatServer, chat_server
from test_qa_validation import ANSWER, NO_FILM, STUDY

from medtvt_rl.data.errors import DataError
from medtvt_rl.data.medtvt_qa import QA_KINDS
from medtvt_rl.data.qa.answering import CUT, AnswerFile, Answering, Tally, item_key
from medtvt_rl.data.qa.build import make_items
from medtvt_rl.data.qa.endpoint import Endpoint, EndpointError, EndpointSettings, check_url
from medtvt_rl.data.qa.templates import Item

ITEMS = make_items([STUDY, NO_FILM, dataclasses.replace(STUDY, study_id="77003")], QA_KINDS, seed=0)


def settings_for(server: ChatServer, **changes: Any) -> EndpointSettings:
    found = EndpointSettings(url=server.url, model="m", call_timeout_s=1.0, tries=3, first_delay_s=0.01)
    return dataclasses.replace(found, **changes)


def ask(
    server: ChatServer,
    path: Path,
    items: list[Item] = ITEMS,
    *,
    attempts: int = 2,
    concurrency: int = 1,
    **changes: Any,
) -> tuple[dict[int, str], Tally, int]:
    settings = settings_for(server, **changes)
    tally = Tally(total=len(items), price_in=1.0, price_out=2.0)

    async def run(file: AnswerFile) -> tuple[dict[int, str], int]:
        async with Endpoint(settings, concurrency) as endpoint:
            answering = Answering(endpoint, settings, file, tally, attempts, concurrency)
            return await answering.run(items), endpoint.calls_failed

    with AnswerFile(path) as file:
        answers, failed = asyncio.run(run(file))
    return answers, tally, failed


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "answers.jsonl"


def test_right_answers_are_taken_and_counted(path: Path) -> None:
    with chat_server() as server:
        answers, tally, failed = ask(server, path, key="secret", request={"temperature": 0.5})
    assert sorted(answers) == list(range(len(ITEMS))) and failed == 0
    assert (tally.accepted, tally.rejected, tally.left_out, tally.done) == (11, 0, 0, 11)
    assert (tally.tokens_in, tally.tokens_out) == (1100, 550)
    assert tally.cost == tally.cost_at_end == pytest.approx(2200 / 1e6)
    assert server.bodies[0]["temperature"] == 0.5 and server.bodies[0]["max_tokens"] == 1024
    assert server.headers[0]["Authorization"] == "Bearer secret"
    assert "secret" not in repr(settings_for(server, key="secret")) + path.read_text()
    assert ANSWER in next(text for text in answers.values() if text.startswith("<think>"))


@pytest.mark.parametrize(
    "fault",
    [429, 500, 503, ("wait", 0.05), "hang", "cut", "reset", b"<html>not json", b"{}", b'{"choices": []}', b"[1]",
     b'{"choices": [{"message": {"content": 7}}]}'],
)  # fmt: skip
def test_a_fault_that_passes_is_tried_again(fault: Any, path: Path) -> None:
    with chat_server(fault, fault) as server:
        answers, tally, failed = ask(server, path, ITEMS[:2])
    assert len(answers) == 2 and failed == 2 and tally.rejected == 0
    assert len(server.prompts) == 4 and len(lines(path)) == 2


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (500, r"3 calls for one answer failed, the last with status 500 \(from_script\); answers so far are kept"),
        ("hang", "the last with no answer within 0.3 s"),
        ("cut", "the last with the connection failed"),
        (b"garbage", "the last with an answer that is no chat completion"),
    ],
)
def test_a_fault_that_stays_ends_the_run_and_keeps_the_answers(fault: Any, message: str, path: Path) -> None:
    with chat_server() as server:
        ask(server, path, ITEMS[:3], call_timeout_s=0.3)
        server.faults += [fault] * 3
        with pytest.raises(EndpointError, match=message) as caught:
            ask(server, path, ITEMS[:6], call_timeout_s=0.3)
        assert "quotes the prompt" not in str(caught.value) and len(server.prompts) == 6
        answers, tally, _ = ask(server, path, ITEMS[:6])
    assert len(answers) == 6 and tally.reused == 3 and len(server.prompts) == 9


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (401, "status 401 .*environment variable"),
        (404, "status 404 .*--model"),
        (400, "status 400 .*--request"),
        (("redirect", "http://127.0.0.1:1/v1"), "status 307; it redirects elsewhere"),
        (("error", 429, "insufficient_quota"), r"status 429 \(insufficient_quota\)"),
    ],
)
def test_a_fault_of_no_use_ends_the_run_at_once(fault: Any, message: str, path: Path) -> None:
    with chat_server(fault) as server:
        with pytest.raises(EndpointError, match=message):
            ask(server, path)
        assert len(server.prompts) == 1


def test_a_prompt_that_is_refused_is_left_out_while_others_go_on(path: Path) -> None:
    with chat_server() as server:
        ask(server, path, ITEMS[:1])
        server.faults.append(400)
    with chat_server() as server:
        answers, tally, _ = ask(server, path, ITEMS[:1])
        assert tally.reused == 1 and server.prompts == []
        server.faults += [("say", "?"), 413]
        answers, tally, _ = ask(server, path, ITEMS[1:4])
    assert sorted(answers) == [1, 2] and (tally.left_out, tally.rejected) == (1, 2)
    assert lines(path)[2]["fault"].startswith("the endpoint refused the prompt with status 413")


def test_wrong_answers_are_asked_anew_then_left_out_and_never_paid_again(path: Path) -> None:
    first = ITEMS[:1]
    with chat_server(("say", "Sinus rhythm."), ("cut off", "Sinus tachycardia."), ("say", "")) as server:
        answers, tally, _ = ask(server, path, first)
        assert answers == {} and (tally.left_out, tally.rejected, len(server.prompts)) == (1, 2, 2)
        again, tally, _ = ask(server, path, first)
        assert again == {} and tally.reused == 2 and tally.tokens_out == 100 and len(server.prompts) == 2
        more, tally, _ = ask(server, path, first, attempts=4)
        assert len(more) == 1 and len(server.prompts) == 4 and tally.rejected == 3
    assert [line.get("fault") for line in lines(path)] == [None, CUT, None, None]


def test_other_labels_model_or_request_ask_anew(path: Path) -> None:
    with chat_server() as server:
        settings = settings_for(server)
        keys = {
            item_key(ITEMS[0], settings),
            item_key(ITEMS[0], dataclasses.replace(settings, model="other")),
            item_key(ITEMS[0], dataclasses.replace(settings, request={"temperature": 1})),
            item_key(dataclasses.replace(ITEMS[0], question="Why?"), settings),
            *(item_key(item, settings) for item in ITEMS),
        }
        assert len(keys) == len(ITEMS) + 3
        # Address, deadlines and tries say nothing of the answer.
        assert item_key(ITEMS[0], dataclasses.replace(settings, url="https://b/v1", tries=9)) in keys


def test_calls_run_at_once_within_their_limit(path: Path) -> None:
    with chat_server() as server:
        server.delay_s = 0.1
        answers, _, _ = ask(server, path, concurrency=4)
        assert len(answers) == len(ITEMS) and 2 <= server.most_under_way <= 4


def test_an_interruption_waits_for_the_calls_under_way_and_pays_none_twice(path: Path) -> None:
    with chat_server() as server:
        server.delay_s = 0.2

        async def interrupted() -> None:
            settings = settings_for(server)
            async with Endpoint(settings, 3) as endpoint:
                with AnswerFile(path) as file:
                    run = Answering(endpoint, settings, file, Tally(total=len(ITEMS)), 2, 3).run(ITEMS)
                    task = asyncio.create_task(run)
                    await asyncio.sleep(0.3)
                    task.cancel()
                    await task

        with pytest.raises(asyncio.CancelledError):
            asyncio.run(interrupted())
        under_way = len(server.prompts)
        assert under_way == 6 and len(lines(path)) == 6
        answers, tally, _ = ask(server, path)
        assert len(answers) == len(server.prompts) == len(ITEMS) and tally.reused == under_way


def test_a_stop_does_not_wait_for_a_long_pause(path: Path) -> None:
    with chat_server(("wait", 60), 404) as server:
        started = time.monotonic()
        with pytest.raises(EndpointError, match="status 404"):
            ask(server, path, concurrency=2)
        assert time.monotonic() - started < 20


def test_the_file_survives_a_crash_and_serves_one_process(path: Path) -> None:
    with chat_server() as server:
        ask(server, path, ITEMS[:2])
        path.write_bytes(path.read_bytes()[:-30])
        answers, tally, _ = ask(server, path, ITEMS[:2])
        assert len(answers) == 2 and tally.reused == 1 and len(server.prompts) == 3
        answers, tally, _ = ask(server, path, ITEMS[:2])
        assert len(answers) == 2 and tally.reused == 2
        with AnswerFile(path), pytest.raises(DataError, match="another build-qa is writing"):
            AnswerFile(path)


@pytest.mark.parametrize(
    "url", ["host/v1", "ftp://host", "https://", "https://me:pass@host/v1", "https://host/v1?key=1"]
)
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="--endpoint"):
        check_url(url)


def test_a_nobody_there_is_told(path: Path) -> None:
    with chat_server() as server:
        settings = settings_for(server)
    with pytest.raises(EndpointError, match="the connection failed"):
        ask(server, path, url=settings.url)
    assert lines(path) == []
