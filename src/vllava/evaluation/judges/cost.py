"""What judging costs: an estimate before it starts, a question, and a limit."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated

from vllava.checks import NotNegative, Range
from vllava.errors import UserError
from vllava.evaluation.judges.asking import Case, Say

CHARACTERS = 4  # of a token, about, in English
_PER_MESSAGE = 4  # tokens


@dataclass(frozen=True)
class Price:
    """Of a million tokens, in whatever currency."""

    input: Annotated[float, Range(0)]
    output: Annotated[float, Range(0)]

    def of(self, tokens_in: float, tokens_out: float) -> float:
        return (tokens_in * self.input + tokens_out * self.output) / 1e6


@dataclass(frozen=True)
class Estimate:
    """Tokens of some requests: the characters of what is asked by 4, and the usual reply of each prompt."""

    requests: int
    tokens_in: int
    tokens_out: int

    @classmethod
    def of(cls, cases: Sequence[Case], attempt: int = 0) -> Estimate:
        messages = [message["content"] for case in cases for message in case.messages(attempt)]
        tokens_in = sum(len(content) for content in messages) // CHARACTERS + _PER_MESSAGE * len(messages)
        return cls(len(cases), tokens_in, sum(case.prompt.reply_tokens for case in cases))

    def told(self, model: str, price: Price | None) -> str:
        """The estimate in a sentence or two."""
        text = (
            f"{self.requests:,} requests to {model} that have no reply yet: about {self.tokens_in:,} tokens in, at "
            f"{CHARACTERS} characters each, and {self.tokens_out:,} out. "
        )
        if price is None:
            return text + "What that costs is unknown: judge.price={input: …, output: …} is that of a million tokens."
        cost = price.of(self.tokens_in, self.tokens_out)
        return text + f"That costs about {cost:,.2f}, and more where replies have to be asked for again."


def has_terminal() -> bool:
    """Whether there is somebody who can be asked."""
    return bool(sys.stdin) and sys.stdin.isatty()


def consent(told: str, yes: bool, say: Say) -> None:
    """Say what it costs and ask whether to begin; raises UserError where nobody says yes."""
    say(told)
    if yes:
        return
    if not has_terminal():
        raise UserError(
            f"The judge was not asked: {told} Nobody can be asked here whether to begin, for there is no terminal: "
            "judge.yes=true says so beforehand. The predictions are kept."
        )
    if input("Begin? [y/N] ").strip().lower() not in ("y", "yes"):
        raise UserError(
            "The judge was not asked, as you wished. The predictions are kept; started again, it asks again."
        )


@dataclass
class Purse:
    """Counts what is spent, and says when a limit would be passed by one request more.

    What has come counts by what the endpoint says it took, what is on its way by its estimate, and by how much
    estimates have fallen short of that so far.
    """

    price: Price | None = None
    budget: NotNegative | None = None
    most: int | None = None  # requests
    requests: int = 0
    spent: float = 0.0
    _underway: float = field(default=0.0, init=False)
    _estimated: float = field(default=0.0, init=False)  # for what is spent

    def take(self, estimate: Estimate) -> bool:
        """Whether one request more may be sent; then it is underway."""
        cost = self._cost(estimate)
        short = max(1.0, self.spent / self._estimated) if self._estimated else 1.0
        if self.most is not None and self.requests >= self.most:
            return False
        if self.budget is not None and self.spent + short * (self._underway + cost) > self.budget:
            return False
        self.requests += 1
        self._underway += cost
        return True

    def settle(self, estimate: Estimate, tokens_in: int | None, tokens_out: int | None) -> None:
        """A request has come back, and took so many tokens; None: it does not say."""
        self.drop(estimate)
        took_in = estimate.tokens_in if tokens_in is None else tokens_in
        took_out = estimate.tokens_out if tokens_out is None else tokens_out
        self.spent += self.price.of(took_in, took_out) if self.price else 0.0
        self._estimated += self._cost(estimate)

    def drop(self, estimate: Estimate) -> None:
        """A request came to nothing."""
        self._underway -= self._cost(estimate)

    @property
    def limit(self) -> str:
        """The limit that was reached, in words."""
        if self.most is not None and self.requests >= self.most:
            return f"judge.max_requests={self.most} is reached"
        return f"judge.budget={self.budget:g} is reached: {self.spent:.4g} is spent, on {self.requests:,} requests"

    def _cost(self, estimate: Estimate) -> float:
        return self.price.of(estimate.tokens_in, estimate.tokens_out) if self.price else 0.0
