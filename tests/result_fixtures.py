"""Results for the tests, of a benchmark small enough to count by hand."""

from dataclasses import dataclass, field, replace

from vllava.evaluation.benchmark import Benchmark, Metric, Row
from vllava.evaluation.questions import Answer, Verdict, question
from vllava.evaluation.results import Asking, Counts, Data, Judge, Model, Result, result_of
from vllava.evaluation.statistics import Score

ASKING = Asking("vicuna_v1", 16, 8, "index", "pad", "bf16")
MODEL = Model("runs/a/checkpoint", "a" * 64)
JUDGE = Judge("openai", "gpt-x", ["gpt-x-2026-01-01"], {"video_qa": "f" * 64}, {"temperature": 0})
HEADLINES = {  # benchmark -> (metric, group, value), as the benchmarks name them
    "msvd_qa": [("accuracy", "", 68.0), ("score", "", 3.7)],
    "gqa": [("accuracy", "", 61.0)],
    "pope": [
        ("accuracy", "", 84.0),
        ("f1", "", 83.0),
        ("accuracy", "category/adversarial", 81.0),
        ("f1", "category/adversarial", 80.0),
        ("yes", "category/adversarial", 45.0),
    ],
    "llava_bench": [("relative", "", 70.0)],
}


@dataclass
class Colours(Benchmark):
    """Three questions about two pictures."""

    split: str = "test"
    metrics: tuple[Metric, ...] = field(
        default=(Metric("accuracy", ("right",), headline=True), Metric("chance", ("chance",))), init=False
    )

    def questions(self):
        truths = {"q1": "red", "q2": "blue", "q3": "green"}
        return [question(name, f"What colour is {name}?", truth=truth) for name, truth in truths.items()]

    def rows(self, answers, verdicts):
        return [
            Row(
                "b" if answer.question.id == "q3" else "a",
                {"right": float(answer.text == answer.question.truth), "chance": 0.25},
                ("kind/warm",) if answer.question.truth == "red" else ("kind/cold",),
            )
            for answer in answers
        ]


def colours(**changes):
    """What an evaluation of it found, with its resamples: q1 is right, q2 is wrong, q3 is broken."""
    benchmark = Colours("colours", "/data/colours", expected=4, paper={"accuracy": 70.0})
    questions = benchmark.questions()
    answers = [Answer(questions[0], "red"), Answer(questions[1], "red"), Answer(questions[2], None, "cut off")]
    found = result_of(
        benchmark,
        questions,
        answers,
        benchmark.rows(answers, {}),
        asking=ASKING,
        checkpoint=MODEL,
        verdicts={"q1": Verdict("q1", {"pred": "yes"}), "q2": Verdict("q2", None, "Hm.")},
        judge=JUDGE,
        blind_rows=benchmark.rows([Answer(one, "") for one in questions], {}),
        device="cpu",
        date="2026-11-02T10:00:00+00:00",
        seconds=1.234,
    )
    return replace(found[0], **changes), found[1]


def result(benchmark, judge=None, asking=ASKING, checkpoint=MODEL, counts=None, **changes):
    """A result of a published benchmark with the figures of HEADLINES."""
    counted = counts or Counts(3, 3, 0, 3)
    scores = [
        Score(
            metric, group, value, value - 1, value + 1, counted.expected, not group, 1.0 if metric == "score" else 100.0
        )
        for metric, group, value in HEADLINES.get(benchmark, [("accuracy", "", 50.0)])
    ]
    data = Data("/data", "d" * 64, "e" * 64)
    settings = {"split": "", "date": "2026-11-02T10:00:00+00:00", **changes}
    made = Result(benchmark, "", 3, counted, scores, asking, checkpoint, data, judge)
    return replace(made, **settings)
