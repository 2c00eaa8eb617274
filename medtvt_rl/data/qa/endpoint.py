"""Calls to an OpenAI-compatible endpoint: one prompt in, one text and its token counts out.

Owns: the request, the deadline of a call, which faults are tried again and how long between, which end the run. Does
not own: which prompts are sent (answering.py). Redirects are not followed: a prompt goes to the address that was named,
or nowhere. Error texts name statuses and codes, never what the server wrote: it may quote the prompt.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol
from urllib.parse import urlsplit

import httpx

from medtvt_rl.data.qa.templates import Message

_AGAIN = {408, 409, 425, 429, *range(500, 600)}
_THIS_PROMPT = {400, 413, 422}
_OF_NO_USE_AGAIN = {"insufficient_quota", "billing_hard_limit_reached"}
_MEND = {
    401: "set the key in the environment variable that --key-variable names",
    403: "the key may not use this model",
    404: "check --endpoint (it usually ends in /v1) and --model",
}


class EndpointError(RuntimeError):
    """The endpoint cannot be used, or did not answer for too long; answers so far are kept."""


class RefusedError(ValueError):
    """The endpoint refuses this one prompt; another try would be refused, too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EndpointSettings:
    """How to reach a model.

    Attributes:
        url: the base address, as in https://host/v1; "/chat/completions" is added.
        key: sent as a bearer token; empty: none is sent.
        max_tokens: longest answer, unless `request` sets a limit of its own.
        request: further fields of the request body, such as {"temperature": 0.7}.
        call_timeout_s: deadline of one call, connection and whole answer.
        tries: calls for one answer before the run ends, where the fault may pass.
        first_delay_s: pause after the first fault; it doubles with each further one, up to a minute.
    """

    url: str
    model: str
    key: str = field(default="", repr=False)
    max_tokens: int = 1024
    request: Mapping[str, Any] = field(default_factory=dict)
    call_timeout_s: float = 120.0
    tries: int = 6
    first_delay_s: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What a model wrote; tokens are 0 where the server does not count them."""

    text: str
    cut: bool
    tokens_in: int
    tokens_out: int


class ChatModel(Protocol):
    """Something that answers a prompt."""

    async def reply(self, messages: Sequence[Message]) -> Reply:
        """Raises RefusedError for a prompt of no use, EndpointError where the run must end."""
        ...

    def stop(self) -> None:
        """From now on no fault is tried again; calls under way may end."""
        ...


class Endpoint:
    """A ChatModel behind HTTP. Use as an asynchronous context; `calls_failed` counts faults that were tried again."""

    def __init__(self, settings: EndpointSettings, connections: int) -> None:
        check_url(settings.url)
        self._settings = settings
        self._address = settings.url.rstrip("/") + "/chat/completions"
        self._client = httpx.AsyncClient(
            headers={"Authorization": f"Bearer {settings.key}"} if settings.key else {},
            timeout=None,
            limits=httpx.Limits(max_connections=connections),
            follow_redirects=False,
        )
        self._ever_answered = False
        self._stopped = asyncio.Event()
        self.calls_failed = 0

    async def __aenter__(self) -> Endpoint:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.aclose()

    def stop(self) -> None:
        """Ends the pauses before further tries, and the tries with them."""
        self._stopped.set()

    async def reply(self, messages: Sequence[Message]) -> Reply:
        """The model's answer, after as many tries as it takes, up to `tries`.

        Raises:
            RefusedError: the server refuses this prompt, and has answered others.
            EndpointError: wrong address, key or model; nothing answered at all; or the last try failed.
        """
        settings, fault, asked_s = self._settings, "", 0.0
        for number in range(settings.tries):
            if number and await self._stopped_during(self._pause_s(number, asked_s)):
                break
            asked_s = 0.0
            try:
                async with asyncio.timeout(settings.call_timeout_s):
                    response = await self._client.post(self._address, json=self._body(messages))
            except TimeoutError:
                fault = f"no answer within {settings.call_timeout_s:g} s"
            except httpx.HTTPError as error:
                fault = f"the connection failed ({type(error).__name__})"
            else:
                if response.status_code == 200:
                    found = read_reply(response.content)
                    if found is not None:
                        self._ever_answered = True
                        return found
                    fault = "an answer that is no chat completion"
                else:
                    fault = self._fault(response)
                    asked_s = _asked_wait_s(response)
            self.calls_failed += 1
        raise EndpointError(
            f"endpoint {settings.url}: {number + 1} calls for one answer failed, the last with {fault}; "
            "answers so far are kept, the same command goes on from there"
        )

    def _body(self, messages: Sequence[Message]) -> dict[str, Any]:
        settings = self._settings
        body: dict[str, Any] = {"model": settings.model, "messages": list(messages), **settings.request}
        if "max_completion_tokens" not in body:
            body.setdefault("max_tokens", settings.max_tokens)
        return body

    def _fault(self, response: httpx.Response) -> str:
        """The words for a fault that may pass. Raises EndpointError or RefusedError for one that will not."""
        status, code = response.status_code, _error_code(response.content)
        words = f"status {status}" + (f" ({code})" if code else "")
        if status in _AGAIN and code not in _OF_NO_USE_AGAIN:
            return words
        if status in _THIS_PROMPT and self._ever_answered:
            raise RefusedError(f"the endpoint refused the prompt with {words}")
        mend = _MEND.get(status, "check --endpoint, --model and --request")
        if 300 <= status < 400:
            mend = "it redirects elsewhere; name the final address yourself"
        raise EndpointError(f"endpoint {self._settings.url}: {words}; {mend}")

    async def _stopped_during(self, pause_s: float) -> bool:
        try:
            await asyncio.wait_for(self._stopped.wait(), pause_s)
        except TimeoutError:
            return False
        return True

    def _pause_s(self, number: int, asked_s: float) -> float:
        doubled = self._settings.first_delay_s * 2 ** (number - 1)
        return max(asked_s, min(60.0, doubled) * random.uniform(0.5, 1.0))


def check_url(url: str) -> None:
    """Raises ValueError for an address that is not http(s)://host[...]."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise ValueError(f"--endpoint: {url!r} is no base address; write one such as https://host/v1")
    if parts.username or parts.password:
        raise ValueError("--endpoint: the address holds a password; put the key into an environment variable instead")


def read_reply(content: bytes) -> Reply | None:
    """A chat completion from the body of a response; None for anything else."""
    try:
        body = json.loads(content)
        choice = body["choices"][0]
        text, usage = choice["message"]["content"], body.get("usage") or {}
        if text is not None and not isinstance(text, str):
            return None
        return Reply(
            text=text or "",
            cut=choice.get("finish_reason") == "length",
            tokens_in=int(usage.get("prompt_tokens") or 0),
            tokens_out=int(usage.get("completion_tokens") or 0),
        )
    except (ValueError, TypeError, KeyError, IndexError, AttributeError):
        return None


def _error_code(content: bytes) -> str:
    """The short code of an error body, if it has one; never its message."""
    try:
        error = json.loads(content)["error"]
        code = error.get("code") or error.get("type") or ""
    except (ValueError, TypeError, KeyError, AttributeError):
        return ""
    return code if isinstance(code, str) and len(code) <= 40 and code.isidentifier() else ""


def _asked_wait_s(response: httpx.Response) -> float:
    """The seconds of a Retry-After header, at most five minutes."""
    try:
        return min(300.0, max(0.0, float(response.headers.get("retry-after", "0"))))
    except ValueError:
        return 0.0
