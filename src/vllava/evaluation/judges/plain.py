"""Judges that ask no model: an exact match, and none at all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from vllava.errors import UserError
from vllava.evaluation.judges.asking import Judged
from vllava.evaluation.judges.prompts import read_prompts
from vllava.evaluation.normalise import vqa_answer
from vllava.evaluation.questions import Request, Verdict


@dataclass
class NoJudge:
    """Nobody judges: no verdicts, so there is nothing to score."""

    name = "none"

    def require(self, requests: Sequence[Request]) -> None:
        """Nothing is needed."""

    def judge(self, requests: Sequence[Request], store: str | Path, say: Callable[[str], object] = print) -> Judged:
        """No verdicts. Nothing is written to `store`."""
        return Judged({}, {"name": self.name, "requests": len(requests), "judged": 0, "unjudged": len(requests)})


@dataclass
class ExactJudge:
    """Right is what equals the correct answer after the VQA normalisation. Only for a yes or no about one answer."""

    name = "exact"

    def require(self, requests: Sequence[Request]) -> None:
        """Raises UserError for prompts that ask for more than whether a prediction is right."""
        prompts = read_prompts()
        for request in requests:
            words = {field.name: set(field.one_of) for field in prompts[request.prompt].fields}
            if words.get("pred") != {"yes", "no"} or not {"answer", "prediction"} <= set(request.slots):
                raise UserError(
                    f"judge=exact cannot judge what conf/judge/prompts/{request.prompt}.yaml asks for: an exact match "
                    "says right or wrong and no more. judge=openai and judge=local can; judge=none judges nothing."
                )

    def judge(self, requests: Sequence[Request], store: str | Path, say: Callable[[str], object] = print) -> Judged:
        """{"pred": "yes" or "no"} for each request, without a score. Nothing is written to `store`."""
        self.require(requests)
        verdicts = {request.id: _verdict(request) for request in requests}
        about = {"name": self.name, "requests": len(requests), "judged": len(requests), "unjudged": 0}
        return Judged(verdicts, about)


def _verdict(request: Request) -> Verdict:
    said, right = request.slots["prediction"], request.slots["answer"]
    # Nothing is left of an answer such as "a": then the words themselves are compared.
    same = vqa_answer(said) == vqa_answer(right) if vqa_answer(right) else said.strip().lower() == right.strip().lower()
    return Verdict(request.id, {"pred": "yes" if same else "no"})
