"""A judge behind an endpoint that speaks OpenAI's protocol: OpenAI's own, or any other."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from tqdm import tqdm

from vllava.checks import Count, NotNegative, Positive, Range, Whole, hints_of, require_all
from vllava.data.address import shown
from vllava.errors import UserError
from vllava.evaluation.judges.asking import Case, Judged, ModelJudge, Say
from vllava.evaluation.judges.cost import Estimate, Price, Purse, consent, has_terminal
from vllava.evaluation.judges.endpoint import Endpoint, GaveUpError, RefusedError, quiet_libraries
from vllava.evaluation.judges.store import Reply, Store
from vllava.evaluation.questions import Request

_OPENAI = "https://api.openai.com/v1"


@dataclass
class OpenAiJudge(ModelJudge):
    """Asks a model at an endpoint, several requests at a time; conf/judge/openai.yaml says what each setting is.

    Raises UserError on construction where the package or the key is missing, or settings do not fit each other. The key
    comes from the environment and goes to the endpoint, and nowhere else.
    """

    model: str = ""
    base_url: str = _OPENAI
    key_variable: str = "OPENAI_API_KEY"
    temperature: Annotated[float, Range(0, 2)] | None = 0.0
    max_tokens: Count | None = 512
    options: Mapping[str, Any] = field(default_factory=dict)
    structured: bool = True
    concurrency: Count = 8
    seconds: Positive = 120.0
    retries: Whole = 8
    backoff: Positive = 1.0
    longest_wait: NotNegative = 600.0
    attempts: Count = 3
    price: Price | Mapping[str, float] | None = None
    budget: Positive | None = None
    max_requests: Count | None = None
    yes: bool = False

    name = "openai"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.options = dict(self.options)
        require_all("judge", dict(vars(self)), hints_of(type(self)))
        price = Price(**self.price) if isinstance(self.price, Mapping) else self.price
        if not self.model:
            raise UserError("judge.model is not set: name a model of the endpoint.")
        if self.budget is not None and price is None:
            raise UserError("judge.budget needs judge.price={input: …, output: …}, that of a million tokens.")
        self._key = _key(self.key_variable, needed=self.base_url == _OPENAI)
        _require_package()
        self._purse = Purse(price, self.budget, self.max_requests)

    @property
    def settings(self) -> dict[str, Any]:
        return {
            "base_url": shown(self.base_url),
            "model": self.model,
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
            "options": self.options,
        }

    def require(self, requests: Sequence[Request]) -> None:
        super().require(requests)
        if not self._begins_unasked and not has_terminal():
            raise UserError(
                "judge=openai asks before it spends anything, and there is no terminal to ask at: judge.yes=true says "
                "so beforehand, and judge.budget=… or judge.max_requests=… limit what is spent."
            )

    @property
    def _begins_unasked(self) -> bool:
        price = self._purse.price
        return self.yes or (price is not None and price.of(1, 1) == 0)

    def judge(self, requests: Sequence[Request], store: Any, say: Say = print) -> Judged:
        judged = super().judge(requests, store, say)
        tokens, price = judged.about["tokens"], self._purse.price
        told = price is not None and None not in tokens.values()
        judged.about["cost"] = price.of(tokens["input"], tokens["output"]) if price and told else None
        return judged

    def ask(self, cases: Sequence[Case], store: Store, say: Say) -> None:
        consent(Estimate.of(cases).told(self.model, self._purse.price), self._begins_unasked, say)
        quiet_libraries()
        with tqdm(total=len(cases), desc="judging", unit=" requests", disable=None, leave=False) as bar:
            asyncio.run(_Round(self, store, say, bar).run(cases))

    def _scrub(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text


class _Round:
    """One round of requests, all of them waiting, over one client."""

    def __init__(self, judge: OpenAiJudge, store: Store, say: Say, bar: Any) -> None:
        self.judge, self.store, self.say, self.bar = judge, store, say, bar
        self.given_up: list[str] = []
        self.settled = 0

    async def run(self, cases: Sequence[Case]) -> None:
        import openai

        judge, waiting = self.judge, iter(cases)
        async with openai.AsyncOpenAI(
            api_key=judge._key or "none", base_url=judge.base_url, max_retries=0, timeout=judge.seconds
        ) as client:
            self.endpoint = Endpoint(
                client=client,
                model=judge.model,
                scrub=judge._scrub,
                say=self.say,
                seconds=judge.seconds,
                retries=judge.retries,
                backoff=judge.backoff,
                longest_wait=judge.longest_wait,
                structured=judge.structured,
            )

            async def work() -> None:
                for case in waiting:
                    await self._settle(case)

            workers = [asyncio.create_task(work())]
            try:
                met = asyncio.create_task(self.endpoint.met.wait())  # what is wrong with all shows at the first call
                await asyncio.wait([met, *workers], return_when=asyncio.FIRST_COMPLETED)
                met.cancel()
                if not workers[0].done():
                    workers += [asyncio.create_task(work()) for _ in range(min(judge.concurrency, len(cases)) - 1)]
                await asyncio.wait(workers, return_when=asyncio.FIRST_EXCEPTION)
            finally:  # what is on its way is paid for, so it is waited for
                self.endpoint.stopping.set()
                ended = await asyncio.gather(*workers, return_exceptions=True)
        errors = [error for error in ended if isinstance(error, BaseException)]
        for error in sorted(errors, key=lambda error: isinstance(error, asyncio.CancelledError)):
            raise error  # the cause, before those that were stopped for it
        if self.given_up:
            raise UserError(
                f"{len(self.given_up):,} requests got no reply from the judge's endpoint, however often they were "
                f"tried ({self.given_up[0]}); {self.settled:,} others were answered and are kept in {self.store.path}. "
                "The same command asks only what is missing."
            )

    async def _settle(self, case: Case) -> None:
        """Ask until a reply can be read, or no attempt is left."""
        while (attempt := case.next_attempt(self.store)) is not None:
            if self.endpoint.stopping.is_set():
                raise asyncio.CancelledError
            try:
                self.store.add(case.key(attempt), await self._paid(case, attempt))
            except RefusedError as error:
                for rest in range(attempt, case.attempts):
                    self.store.hold(case.key(rest), Reply(f"(refused by the endpoint: {error})"))
            except GaveUpError as error:
                self.given_up.append(str(error))
                return
        self.settled += 1
        self.bar.update()

    async def _paid(self, case: Case, attempt: int) -> Reply:
        judge, estimate = self.judge, Estimate.of([case], attempt)
        if not judge._purse.take(estimate):
            raise UserError(
                f"{judge._purse.limit}. {self.settled:,} of the requests that were waiting are answered, and kept in "
                f"{self.store.path}: with a higher limit the same command asks the rest."
            )
        given = {"temperature": judge.temperature, "max_tokens": judge.max_tokens}
        body: dict[str, Any] = {"model": judge.model, "messages": case.messages(attempt)}
        body |= {name: value for name, value in given.items() if value is not None}
        try:
            reply = await self.endpoint.ask({**body, "extra_body": judge.options or None}, case.prompt.schema)
        except BaseException:
            judge._purse.drop(estimate)
            raise
        judge._purse.settle(estimate, reply.tokens_in, reply.tokens_out)
        return reply


def _key(variable: str, needed: bool) -> str:
    """The key in an environment variable; raises UserError where one is needed and none is there, or it is none."""
    key = os.environ.get(variable, "").strip()
    if needed and not key:
        raise UserError(
            f"The judge's endpoint needs a key, and the environment variable {variable} is not set: export it. "
            "judge.key_variable names another one; judge=exact and judge=local need none."
        )
    if not key.isascii() or not key.isprintable() or " " in key:
        raise UserError(f"The environment variable {variable} holds characters that no key has: set it anew.")
    return key


def _require_package() -> None:
    try:
        import openai  # noqa: F401
    except ImportError as error:
        raise UserError("judge=openai needs the package openai: pip install 'vllava[benchmarks]'.") from error
