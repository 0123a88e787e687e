"""What every judge that is a model has in common: each content is asked once, again where the reply says nothing."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllava.errors import UserError
from vllava.evaluation.judges.prompts import Prompt, read_prompts
from vllava.evaluation.judges.replies import parsed
from vllava.evaluation.judges.store import Reply, Store, key_of
from vllava.evaluation.questions import Request, Verdict

Say = Callable[[str], object]


@dataclass(frozen=True)
class Judged:
    """What a judge found. verdicts: by the id of the request, one for each.

    about: for the result: which judge, model, snapshots, settings, prompts (name -> SHA-256), how many requests were
    judged and unjudged, tokens and costs. Two figures compare only where name, model, snapshots, settings and prompts
    are the same.
    """

    verdicts: dict[str, Verdict]
    about: dict[str, Any]
    warnings: list[str] = field(default_factory=list)


@dataclass
class Case:
    """A prompt with its slots filled in, asked for all requests of the same content at once.

    settings: what else decides the reply. attempts: how often it is asked until a reply can be read.
    """

    prompt: Prompt
    slots: Mapping[str, str]
    settings: Mapping[str, Any]
    attempts: int
    ids: list[str] = field(default_factory=list)
    _keys: dict[int, str] = field(default_factory=dict, init=False)

    def messages(self, attempt: int) -> list[dict[str, str]]:
        return self.prompt.messages(self.slots, attempt)

    def key(self, attempt: int) -> str:
        """What finds the reply to an attempt in a store."""
        if attempt not in self._keys:
            asked = {"messages": self.messages(attempt), "schema": self.prompt.schema, "attempt": attempt}
            self._keys[attempt] = key_of({**self.settings, **asked})
        return self._keys[attempt]

    def next_attempt(self, store: Store) -> int | None:
        """The number of the attempt that is to be made; None where a reply could be read, or all are used up."""
        for attempt in range(self.attempts):
            key = self.key(attempt)
            if key not in store:
                return attempt
            if self.values(store[key]) is not None:
                return None
        return None

    def values(self, reply: Reply) -> dict[str, str | float] | None:
        return parsed(reply.text, self.prompt.fields, self.prompt.numbers)

    def replies(self, store: Store) -> list[Reply]:
        """The replies that there are, the last of them the one that counts."""
        found: list[Reply] = []
        for attempt in range(self.attempts):
            key = self.key(attempt)
            if key not in store or (found and self.values(found[-1]) is not None):
                break
            found.append(store[key])
        return found


@dataclass
class ModelJudge(ABC):
    """A judge that is a language model. prompts: a folder whose files take the place of ours; None: ours."""

    prompts: str | None = None
    attempts: int = 3

    name = ""

    def __post_init__(self) -> None:
        self._prompts = read_prompts(self.prompts)

    @property
    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What decides a reply, beside what is asked: part of its key, and of the result."""

    @abstractmethod
    def ask(self, cases: Sequence[Case], store: Store, say: Say) -> None:
        """Put replies of all cases into the store; raises UserError where that ends early, what came is kept."""

    def require(self, requests: Sequence[Request]) -> None:
        """Raises UserError, before anything is computed, where these requests cannot be made whatever is answered."""
        self._cases(requests)

    def judge(self, requests: Sequence[Request], store: str | Path, say: Say = print) -> Judged:
        """Verdicts about all requests; `store` is the folder of the replies, of this run and of others.

        Asked again after any kind of end, it asks only what has no reply yet. A request whose replies all say nothing
        stands as unjudged, its last reply with it.
        """
        cases = self._cases(requests)
        with closing(Store(store)) as replies:
            waiting = [case for case in cases if case.next_attempt(replies) is not None]
            if waiting:
                replies.open()
                self.ask(waiting, replies, say)
            found = [(case, case.replies(replies)) for case in cases]
        return self._judged(found, requests)

    def _cases(self, requests: Sequence[Request]) -> list[Case]:
        cases: dict[tuple, Case] = {}
        settings = self.settings
        for request in requests:
            content = (request.prompt, *sorted(request.slots.items()))
            if content not in cases:
                prompt = self._prompts[request.prompt]
                if lost := [slot for slot in prompt.slots if slot not in request.slots]:
                    raise UserError(f"The judge's prompt {prompt.name} shows {{{lost[0]}}}, which no request has.")
                cases[content] = Case(prompt, request.slots, settings, self.attempts)
            cases[content].ids.append(request.id)
        return list(cases.values())

    def _judged(self, found: Sequence[tuple[Case, list[Reply]]], requests: Sequence[Request]) -> Judged:
        by_id: dict[str, Verdict] = {}
        for case, replies in found:
            values = case.values(replies[-1]) if replies else None
            said = replies[-1].text if replies else ""
            by_id.update({id: Verdict(id, values, said) for id in case.ids})
        verdicts = {request.id: by_id[request.id] for request in requests}
        unjudged = sum(verdict.values is None for verdict in verdicts.values())
        spoken = [reply for _, replies in found for reply in replies]
        snapshots = Counter(reply.snapshot for reply in spoken if reply.snapshot)
        about = {
            "name": self.name,
            **self.settings,
            "snapshots": dict(sorted(snapshots.items())),
            "prompts": {name: self._prompts[name].sha256 for name in sorted({one.prompt for one in requests})},
            "attempts": self.attempts,
            "requests": len(requests),
            "judged": len(requests) - unjudged,
            "unjudged": unjudged,
            "replies": len(spoken),
            "structured_replies": sum(reply.structured for reply in spoken),
            "tokens": {
                "input": _total(reply.tokens_in for reply in spoken),
                "output": _total(reply.tokens_out for reply in spoken),
            },
        }
        return Judged(verdicts, about, _warnings(snapshots, unjudged, len(requests)))


def _total(numbers: Iterable[int | None]) -> int | None:
    """The sum of what is known; None where nothing is."""
    known = [number for number in numbers if number is not None]
    return sum(known) if known else None


def _warnings(snapshots: Counter[str], unjudged: int, requests: int) -> list[str]:
    found = []
    if len(snapshots) > 1:
        counts = ", ".join(f"{name} ({count:,})" for name, count in sorted(snapshots.items()))
        found.append(f"Several snapshots of the judge's model answered, and may judge differently: {counts}.")
    if unjudged:
        found.append(f"{unjudged:,} of {requests:,} requests stand as unjudged: no reply to them could be read.")
    return found
