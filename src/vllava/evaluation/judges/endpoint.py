"""One endpoint that speaks OpenAI's protocol: calls with a time limit, tried again for as long as that can help."""

from __future__ import annotations

import asyncio
import email.utils
import logging
import random
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from vllava.data.address import shown
from vllava.errors import UserError, reason
from vllava.evaluation.judges.store import Reply

_REFUSALS = ("content_filter", "content_policy_violation", "context_length_exceeded", "string_above_max_length")
_NO_SCHEMA = ("response_format", "json_schema", "structured output", "guided_json", "guided decoding")
_KEY = "Check the key in the environment variable that judge.key_variable names."
_LOUD = 5.0  # seconds of a pause that is told of


class RefusedError(Exception):
    """The endpoint will not answer this one request, whoever asks: its content is too long, or not to its liking."""


class GaveUpError(Exception):
    """All tries of one request failed, while others were answered."""


@dataclass
class Endpoint:
    """Calls to one model. `client` is an AsyncOpenAI without retries of its own.

    seconds: the limit of one call. retries: how often a call is tried again. backoff: seconds before the first of
    these, doubled each time; longest_wait: that a server may ask for. scrub: takes the key out of a text.
    """

    client: Any
    model: str
    scrub: Callable[[str], str]
    say: Callable[[str], object]
    seconds: float
    retries: int
    backoff: float
    longest_wait: float
    structured: bool
    answered: int = field(default=0, init=False)
    held: bool = field(default=False, init=False)  # a reply was held to a schema
    stopping: asyncio.Event = field(default_factory=asyncio.Event, init=False)
    met: asyncio.Event = field(default_factory=asyncio.Event, init=False)  # something came of the first call
    _not_before: float = field(default=0.0, init=False)
    _told: float = field(default=0.0, init=False)

    async def ask(self, body: dict[str, Any], schema: dict[str, Any] | None) -> Reply:
        """The reply to a chat; raises RefusedError, GaveUpError, and UserError where nothing more can come."""
        failures, answered_before = 0, self.answered
        while True:
            await self._pause(self._not_before - time.monotonic())
            structured = self.structured and schema is not None
            form = {"type": "json_schema", "json_schema": {"name": "judgement", "schema": schema, "strict": True}}
            try:
                call = self.client.chat.completions.create(**body, **({"response_format": form} if structured else {}))
                reply = self._read(await asyncio.wait_for(call, self.seconds), structured)
            except Exception as error:
                if structured and self._has_no_schema(error):
                    self.structured = False  # from now on, for all
                    continue
                if getattr(error, "status_code", None) == 429 and self.answered > answered_before:
                    failures, answered_before = 0, self.answered  # others' turn, not a failure
                failures += 1
                self._check(error)
                self.met.set()
                if failures > self.retries:
                    self._give_up(error, failures, self.answered > answered_before)
                await self._wait(error, failures)
            else:
                self.answered += 1
                self.held |= structured
                self.met.set()
                return reply

    def _read(self, response: Any, structured: bool) -> Reply:
        """A response as a reply; raises ValueError for what is none."""
        try:
            message, usage = response.choices[0].message, response.usage
            text = message.content or getattr(message, "refusal", None) or ""
            took_in, took_out = (usage.prompt_tokens, usage.completion_tokens) if usage else (None, None)
            snapshot = self.scrub(str(response.model or ""))
            return Reply(self.scrub(str(text)), snapshot, took_in, took_out, structured)
        except (AttributeError, IndexError, TypeError) as error:
            raise ValueError("what came is no chat completion") from error

    def _has_no_schema(self, error: Exception) -> bool:
        """Whether an endpoint cannot hold replies to a schema: it says so, or takes no request that it never took."""
        if getattr(error, "status_code", None) not in (400, 422, 501) or getattr(error, "code", None) in _REFUSALS:
            return False
        return not self.held or any(word in str(error).lower() for word in _NO_SCHEMA)

    def _check(self, error: Exception) -> None:
        """Raises where another try cannot help."""
        status, code = getattr(error, "status_code", None), str(getattr(error, "code", None) or "")
        said = self._said(error)
        if code in _REFUSALS or status == 413:
            raise RefusedError(said) from None
        if status == 401:
            raise UserError(f"The judge's endpoint does not accept the key (HTTP 401). {_KEY}") from None
        if status == 403:
            raise UserError(f"The judge's endpoint does not let this key ask ({said}). {_KEY}") from None
        if status == 404:
            raise UserError(
                f"The judge's endpoint does not know judge.model={self.model} or has nothing at "
                f"judge.base_url ({said}). An address often ends in /v1."
            ) from None
        if code == "insufficient_quota" or status == 402:
            raise UserError(
                f"The judge's endpoint has no quota left for this key ({said}). What was judged is kept: once there is "
                "credit, the same command asks the rest."
            ) from None
        if status is not None and 400 <= status < 500 and status not in (408, 409, 425, 429):
            raise UserError(
                f"The judge's endpoint cannot take the request ({said}). judge.temperature=null, judge.max_tokens=null "
                "and judge.structured=false leave out what some models do not have; judge.options adds to it."
            ) from None
        asked = asked_wait(error)
        if asked > self.longest_wait:
            raise UserError(
                f"The judge's endpoint asks to wait {asked:,.0f} s ({said}), longer than judge.longest_wait="
                f"{self.longest_wait:g}. What was judged is kept: the same command asks the rest."
            ) from None

    def _give_up(self, error: Exception, tries: int, others: bool) -> None:
        said = self._said(error)
        if others:
            raise GaveUpError(said) from None
        raise UserError(
            f"The judge's endpoint gave no reply in {tries} tries ({said}). judge.seconds={self.seconds:g} is the "
            f"limit of one, judge.retries={self.retries} says how often to try again. What was judged is kept: the "
            "same command asks the rest."
        ) from None

    async def _wait(self, error: Exception, failures: int) -> None:
        """Before the next try: longer each time, and as long as the server asks, which holds for all calls."""
        asked = asked_wait(error)
        if asked:
            self._not_before = max(self._not_before, time.monotonic() + asked)
        pause = min(60.0, self.backoff * 2 ** (failures - 1)) * random.SystemRandom().uniform(0.5, 1.0)
        if max(pause, asked) >= _LOUD and time.monotonic() > self._told + 60:
            self._told = time.monotonic()
            self.say(f"The judge's endpoint: {self._said(error)}. Trying again in {max(pause, asked):.0f} s.")
        await self._pause(max(pause, asked))

    async def _pause(self, seconds: float) -> None:
        """Wait, unless or until the judge stops."""
        if seconds > 0:
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self.stopping.wait(), seconds)
        if self.stopping.is_set():
            raise asyncio.CancelledError

    def _said(self, error: Exception) -> str:
        """An error in one line without what is secret."""
        if isinstance(error, (asyncio.TimeoutError, TimeoutError)) or "Timeout" in type(error).__name__:
            return f"no reply within {self.seconds:g} s"
        status = getattr(error, "status_code", None)
        causes = [error] if status or error.__cause__ is None else [error, error.__cause__]
        # The key goes first: a message that is cut short may end in a part of it.
        said = " ".join(reason(Exception(self.scrub(str(one)) or type(one).__name__)) for one in causes)
        return shown(f"HTTP {status}: {said}" if status else said)


def asked_wait(error: Exception) -> float:
    """The seconds that a server asks to wait: a number of them, or a date; 0 where it asks for nothing."""
    headers = getattr(getattr(error, "response", None), "headers", None) or {}
    for name, unit in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        given = str(headers.get(name, "")).strip()
        with suppress(ValueError):
            return max(0.0, min(float(given) / unit, 1e9))
        with suppress(ValueError, TypeError, IndexError):
            return max(0.0, email.utils.parsedate_to_datetime(given).timestamp() - time.time())
    return 0.0


def quiet_libraries() -> None:
    """Keep the client's libraries from logging each request, and what is in it."""
    for name in ("openai", "httpx", "httpx2", "httpcore", "httpcore2"):
        logging.getLogger(name).setLevel(logging.WARNING)
