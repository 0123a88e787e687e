"""The benchmarks that a judge scores: read from files in their true formats, scored by hand."""

import json
import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from judge_server import JudgeServer

from vllava.errors import UserError
from vllava.evaluation.benchmarks.llava_bench import LlavaBench
from vllava.evaluation.benchmarks.mm_vet import MMVet
from vllava.evaluation.benchmarks.video_chatgpt import VideoChatGPT
from vllava.evaluation.benchmarks.video_qa import VideoQA
from vllava.evaluation.judges.plain import ExactJudge
from vllava.evaluation.judges.prompts import read_prompts
from vllava.evaluation.judges.remote import OpenAiJudge
from vllava.evaluation.questions import Answer, Verdict

ROOT = Path(__file__).parents[1]


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(line) + "\n" for line in content))
    else:
        path.write_text(json.dumps(content))


def table(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)


def configured(name, root, **changes):
    """A benchmark as its configuration makes it; whatever number of questions there is is right."""
    settings = yaml.safe_load((ROOT / "conf" / "benchmark" / f"{name}.yaml").read_text())
    module, _, target = settings.pop("_target_").rpartition(".")
    made = getattr(__import__(module, fromlist=[target]), target)
    return made(**{**settings, "root": str(root), "expected": None, **changes})


def answered(questions, texts):
    """Answers by id; None: broken."""
    assert [question.id for question in questions] == list(texts)
    return [
        Answer(question, texts[question.id], "" if texts[question.id] is not None else "cut") for question in questions
    ]


def verdicts(values):
    return {id: Verdict(id, value, "" if value else "as a judge of taste, I") for id, value in values.items()}


def figures(benchmark, rows, group=None):
    """metric -> figure: of the means of columns over the rows, as a result computes it."""
    rows = [row for row in rows if group is None or group in row.groups]
    found = {}
    for metric in benchmark.metrics:
        means = [np.array([sum(row.values.get(name, 0.0) for row in rows) / len(rows)]) for name in metric.columns]
        found[metric.name] = round(float(metric.of(*means)[0]) * metric.scale, 6)
    return found


def slots_fit(requests):
    """Whether a judge's prompts show just what requests have."""
    prompts = read_prompts()
    return all(set(request.slots) == set(prompts[request.prompt].slots) for request in requests)


# Short answers about videos

ASKED = [
    {"video_name": "vid1", "question": "what is a man doing", "question_id": "0"},
    {"video_name": "vid1", "question": "who runs?", "question_id": "1"},
    {"video_name": "vid2", "question": "how many", "question_id": "2"},
    {"video_name": "vid3", "question": "where", "question_id": "3"},
]
TRUTHS = [
    {"question_id": "0", "answer": "run", "type": 0},
    {"question_id": "1", "answer": "man", "type": 5},
    {"question_id": "2", "answer": "two", "type": 7},
    {"question_id": "3", "answer": "park", "type": 6},
]


def video_qa_folder(root, asked=ASKED, truths=TRUTHS, videos=("vid1.mp4", "vid2.avi", "vid3.webm")):
    write(root / "test_q.json", asked)
    write(root / "test_a.json", truths)
    for name in videos:
        write(root / "videos" / name, b"")


@pytest.mark.parametrize("where", ["", "GPT_Zero_Shot_QA/MSVD_Zero_Shot_QA"])
def test_questions_about_videos_are_asked_as_they_stand(tmp_path, where):
    video_qa_folder(tmp_path / where)
    benchmark = configured("msvd_qa", tmp_path)
    questions = benchmark.questions()
    assert questions[0].conversation == ({"from": "human", "value": "<video>\nwhat is a man doing"},)
    assert [(q.id, q.prompt, q.truth) for q in questions] == [
        ("0", "what is a man doing", "run"),
        ("1", "who runs?", "man"),
        ("2", "how many", "two"),
        ("3", "where", "park"),
    ]
    assert [q.media[0].path.name for q in questions] == ["vid1.mp4", "vid1.mp4", "vid2.avi", "vid3.webm"]
    assert all(q.media[0].kind == "video" and q.media[0].path.is_file() for q in questions)
    assert benchmark.warnings == [] and benchmark.template == "llava_v1" and benchmark.max_new_tokens == 1024


def test_answers_are_joined_by_id_whatever_their_order(tmp_path):
    video_qa_folder(tmp_path, truths=TRUTHS[::-1])
    assert [q.truth for q in configured("msvd_qa", tmp_path).questions()] == ["run", "man", "two", "park"]
    numbers = [{**record, "question_id": int(record["question_id"])} for record in TRUTHS[::-1]]
    video_qa_folder(tmp_path, truths=numbers)  # "0" and 0 are the same
    assert [q.truth for q in configured("msvd_qa", tmp_path).questions()] == ["run", "man", "two", "park"]


def test_answers_without_ids_are_joined_by_place_with_a_warning(tmp_path):
    video_qa_folder(tmp_path, truths=[{"answer": record["answer"]} for record in TRUTHS])
    benchmark = configured("msvd_qa", tmp_path)
    assert [q.truth for q in benchmark.questions()] == ["run", "man", "two", "park"]
    assert "by their places" in benchmark.warnings[0]
    video_qa_folder(tmp_path, truths=[{"answer": record["answer"]} for record in TRUTHS[1:]])
    with pytest.raises(UserError, match="4 questions and 3 answers"):
        configured("msvd_qa", tmp_path).questions()


@pytest.mark.parametrize(
    ("asked", "truths", "said"),
    [
        (ASKED, TRUTHS[:3], "no answer to '3'"),
        (ASKED, [*TRUTHS, TRUTHS[0]], "'0' is there twice"),
        ([*ASKED, ASKED[0]], TRUTHS, "'0' is there twice"),
        (ASKED, [{"question_id": "0"}, *TRUTHS[1:]], "no 'answer'"),
        ([{"question": "a", "question_id": "0"}], TRUTHS, "'video_name'"),
        ([{**ASKED[0], "video_name": "../../etc/passwd"}], TRUTHS, "is no name of a file"),
        ({"0": ASKED[0]}, TRUTHS, "no list of records"),
    ],
)
def test_files_that_do_not_fit_are_said_before_anything_is_asked(tmp_path, asked, truths, said):
    video_qa_folder(tmp_path, asked, truths)
    with pytest.raises(UserError) as error:
        configured("msvd_qa", tmp_path).questions()
    assert said in str(error.value)


def test_what_is_missing_or_of_another_number_is_warned_of(tmp_path):
    video_qa_folder(tmp_path, truths=[*TRUTHS, {"question_id": "9", "answer": "x"}], videos=["vid1.mp4", "vid2.mkv"])
    benchmark = configured("msvd_qa", tmp_path, expected=13157)
    questions = benchmark.questions()
    assert questions[3].media[0].path.name == "vid3.mp4"  # where it would be
    said = " ".join(benchmark.warnings)
    assert "answers 1 questions" in said and "4 questions are found, 13,157" in said and "vid3.mp4" in said


@pytest.mark.parametrize(
    ("there", "found"),
    [
        (["all_test/v_abc.mp4"], "v_abc.mp4"),
        (["all_test/abc.mkv"], "abc.mkv"),
        (["all_test/abc.mp4", "all_test/v_abc.avi"], "v_abc.avi"),
        (["all_test/v_abc.mkv", "all_test/v_abc.mov", "all_test/v_abc.avi"], "v_abc.avi"),
        (["videos/v_abc.webm"], "v_abc.webm"),
        (["v_abc.MP4"], "v_abc.MP4"),
        (["all_test/V_ABC.mp4"], None),  # names of videos have cases
    ],
)
def test_a_video_is_the_first_of_its_name_with_or_without_its_prefix(tmp_path, there, found):
    video_qa_folder(tmp_path, [{**ASKED[0], "video_name": "abc"}], TRUTHS[:1], ())
    for name in there:
        write(tmp_path / name, b"")
    medium = configured("activitynet_qa", tmp_path).questions()[0].media[0]
    assert medium.path.is_file() == bool(found) and (not found or medium.path.name == found)


def test_a_name_with_its_ending_and_a_folder_elsewhere_are_found(tmp_path):
    video_qa_folder(tmp_path / "data", [{**ASKED[0], "video_name": "video7010.mp4"}], TRUTHS[:1], ())
    write(tmp_path / "elsewhere" / "video7010.mp4", b"")
    benchmark = configured("msrvtt_qa", tmp_path / "data", videos=["videos", str(tmp_path / "elsewhere")])
    assert benchmark.questions()[0].media[0].path == tmp_path / "elsewhere" / "video7010.mp4"


TEXTS = {"0": "He is running.", "1": "A dog", "2": "2", "3": None}


def video_qa(tmp_path):
    video_qa_folder(tmp_path)
    benchmark = configured("activitynet_qa", tmp_path)
    return benchmark, answered(benchmark.questions(), TEXTS)


def test_the_judge_is_asked_about_what_was_answered_and_no_more(tmp_path):
    benchmark, answers = video_qa(tmp_path)
    requests = benchmark.requests(answers)
    assert [(request.id, request.prompt) for request in requests] == [
        ("0", "video_qa"),
        ("1", "video_qa"),
        ("2", "video_qa"),
    ]
    wanted = {"question": "what is a man doing", "answer": "run", "prediction": "He is running."}
    assert requests[0].slots == wanted and slots_fit(requests)


def test_what_is_unjudged_or_broken_is_wrong_in_the_headline_and_left_out_beside_it(tmp_path):
    benchmark, answers = video_qa(tmp_path)
    judged = verdicts({"0": {"pred": "yes", "score": 4.8}, "1": {"pred": "no", "score": 1}, "2": None})
    rows = benchmark.rows(answers, judged)
    assert figures(benchmark, rows) == {
        "accuracy": 25.0,  # one of four
        "score": 1.45,  # (4.8 + 1 + 0 + 0) / 4
        "accuracy_judged": 50.0,
        "score_judged": 2.9,
        "unjudged": 25.0,
    }
    assert [metric.name for metric in benchmark.metrics if metric.headline] == ["accuracy", "score"]
    assert [row.groups for row in rows] == [("type/motion",), ("type/object",), ("type/number",), ("type/location",)]
    assert figures(benchmark, rows, "type/motion")["accuracy"] == 100.0
    assert [row.cluster for row in rows] == [answer.question.media[0].key for answer in answers]
    assert rows[0].cluster == rows[1].cluster != rows[2].cluster


def test_nothing_judged_is_nothing_right(tmp_path):
    benchmark, answers = video_qa(tmp_path)
    found = figures(benchmark, benchmark.rows(answers, verdicts(dict.fromkeys("012"))))
    assert found["accuracy"] == 0 and found["unjudged"] == 75 and math.isnan(found["accuracy_judged"])


def test_an_exact_match_gives_an_accuracy_and_no_score(tmp_path):
    benchmark, answers = video_qa(tmp_path)
    found = figures(
        benchmark, benchmark.rows(answers, ExactJudge().judge(benchmark.requests(answers), tmp_path).verdicts)
    )
    assert found["accuracy"] == 25.0  # "2" is two; "He is running." is not run
    assert found["accuracy_judged"] == pytest.approx(100 / 3) and math.isnan(found["score"])
    assert math.isnan(found["score_judged"]) and found["unjudged"] == 0


def test_predictions_are_written_as_the_original_writes_them(tmp_path):
    benchmark, answers = video_qa(tmp_path)
    lines = benchmark.exports(answers)["merge.jsonl"]
    assert lines[0] == {"id": "0", "question": "what is a man doing", "answer": "run", "pred": "He is running."}
    assert lines[3]["pred"] == "" and len(lines) == 4


@pytest.mark.parametrize("name", ["msvd_qa", "msrvtt_qa", "tgif_qa", "activitynet_qa"])
def test_a_data_set_in_parquet_has_the_same_questions(tmp_path, name):
    rows = [{**asked, **truth} for asked, truth in zip(ASKED, TRUTHS, strict=True)]
    table(tmp_path / "data" / "test-00000-of-00002.parquet", rows[:3])
    table(tmp_path / "data" / "test-00001-of-00002.parquet", rows[3:])
    write(tmp_path / "videos" / "vid2.mkv", b"")
    questions = configured(name, tmp_path).questions()
    assert [(q.id, q.prompt, q.truth) for q in questions] == [
        (row["question_id"], row["question"], row["answer"]) for row in rows
    ]
    assert questions[2].media[0].path == tmp_path / "videos" / "vid2.mkv"


def test_a_data_set_may_call_its_columns_otherwise_or_hold_its_videos(tmp_path):
    rows = [{"video": f"clips/{n}.mp4", "question": f"q{n}", "answer": n, "id": n} for n in range(2)]
    table(tmp_path / "named" / "test.parquet", rows)
    write(tmp_path / "named" / "clips" / "1.mp4", b"")
    questions = configured("tgif_qa", tmp_path / "named").questions()
    assert [(q.id, q.truth) for q in questions] == [("0", "0"), ("1", "1")]
    assert questions[1].media[0].path == tmp_path / "named" / "clips" / "1.mp4"
    inside = [
        {"video_name": "a", "video": {"bytes": b"film", "path": "a.mp4"}, "question": f"q{n}", "answer": "x"}
        for n in "12"
    ]
    table(tmp_path / "inside" / "test.parquet", inside)
    questions = configured("tgif_qa", tmp_path / "inside").questions()
    assert [q.id for q in questions] == ["a_0", "a_1"] and questions[1].media[0].read() == b"film"
    assert questions[0].media[0].key == questions[1].media[0].key == "a"


# Video-ChatGPT

GENERIC = [
    {"video_name": "v_a", "Q": "What happens?", "A": "A man cooks."},
    {"video_name": "v_b", "Q": "What happens there?", "A": "A race."},
    {"video_name": "v_a", "Q": "Where?", "A": "In a kitchen."},
]
TEMPORAL = [{"video_name": "v_a", "Q": "What is first?", "A": "He washes."}]
CONSISTENCY = [
    {"video_name": "v_a", "Q1": "What does he do?", "Q2": "What is he doing?", "A": "He cooks."},
    {"video_name": "v_b", "Q1": "Who wins?", "Q2": "Who is first?", "A": "Nobody."},
]
IDS = [
    "generic/v_a_0",
    "generic/v_b_0",
    "generic/v_a_1",
    "temporal/v_a_0",
    "consistency/v_a_0/1",
    "consistency/v_a_0/2",
    "consistency/v_b_0/1",
    "consistency/v_b_0/2",
]


def five_folder(root, **files):
    parts = {"generic": GENERIC, "temporal": TEMPORAL, "consistency": CONSISTENCY, **files}
    for part, records in parts.items():
        write(root / "Benchmarking_QA" / f"{part}_qa.json", records)
    for name in ("v_a.mp4", "v_b.mkv"):
        write(root / "Test_Videos" / name, b"")


@pytest.fixture
def five(tmp_path):
    five_folder(tmp_path / "Video_5_Benchmark")
    benchmark = configured("video_chatgpt", tmp_path)
    return benchmark, benchmark.questions()


def test_generic_questions_are_asked_once_and_pairs_apart(five):
    benchmark, questions = five
    assert [question.id for question in questions] == IDS and benchmark.warnings == []
    assert [question.prompt for question in questions[3:6]] == [
        "What is first?",
        "What does he do?",
        "What is he doing?",
    ]
    assert all(len(question.conversation) == 1 and question.media[0].path.is_file() for question in questions)


def test_the_judge_sees_both_questions_of_a_pair(five):
    benchmark, questions = five
    requests = benchmark.requests(answered(questions, {id: f"about {id}" for id in IDS}))
    assert [request.id for request in requests][:4] == [
        "generic/v_a_0#correctness",
        "generic/v_a_0#detail",
        "generic/v_a_0#context",
        "generic/v_b_0#correctness",
    ]
    assert len(requests) == 9 + 1 + 2 and slots_fit(requests)
    assert requests[-2].prompt == "consistency" and requests[-2].slots == {
        "question1": "What does he do?",
        "question2": "What is he doing?",
        "answer": "He cooks.",
        "prediction1": "about consistency/v_a_0/1",
        "prediction2": "about consistency/v_a_0/2",
    }


def test_five_means_are_of_what_each_aspect_was_asked(five):
    benchmark, questions = five
    answers = answered(questions, {**dict.fromkeys(IDS, "text"), "generic/v_b_0": None, "consistency/v_b_0/2": None})
    assert len(benchmark.requests(answers)) == 6 + 1 + 1  # nothing about what nobody answered
    judged = verdicts(
        {
            "generic/v_a_0#correctness": {"score": 5},
            "generic/v_a_0#detail": {"score": 2.5},
            "generic/v_a_0#context": None,
            "generic/v_a_1#correctness": {"score": 4},
            "generic/v_a_1#detail": {"score": 3},
            "generic/v_a_1#context": {"score": 1},
            "temporal/v_a_0#temporal": {"score": 2},
            "consistency/v_a_0#consistency": {"score": 3},
        }
    )
    rows = benchmark.rows(answers, judged)
    found = figures(benchmark, rows)
    assert len(rows) == 6
    assert {name: found[name] for name in ("correctness", "detail", "context", "temporal", "consistency")} == {
        "correctness": 3.0,  # (5 + 0 + 4) / 3
        "detail": round(5.5 / 3, 6),
        "context": round(1 / 3, 6),
        "temporal": 2.0,
        "consistency": 1.5,  # (3 + 0) / 2
    }
    assert found["correctness_judged"] == 4.5 and found["context_judged"] == 1 and found["consistency_judged"] == 3
    assert found["unjudged"] == 12.5  # 1 of 8
    assert rows[0].cluster == rows[2].cluster == rows[3].cluster == rows[4].cluster != rows[1].cluster


def test_the_five_lists_are_written_as_the_original_writes_them(five):
    benchmark, questions = five
    answers = answered(questions, {**{id: id for id in IDS}, "temporal/v_a_0": None})
    exports = benchmark.exports(answers)
    assert sorted(exports) == [
        "consistency_qa.json",
        "contextual_qa.json",
        "correctness_qa.json",
        "detail_qa.json",
        "temporal_qa.json",
    ]
    assert exports["correctness_qa.json"] == [
        {**record, "pred": id} for record, id in zip(GENERIC, IDS[:3], strict=True)
    ]
    assert exports["temporal_qa.json"] == [{**TEMPORAL[0], "pred": ""}]
    assert exports["consistency_qa.json"][0] == {**CONSISTENCY[0], "pred1": IDS[4], "pred2": IDS[5]}


def test_the_five_lists_keep_whatever_else_a_record_holds_in_its_order(tmp_path):
    five_folder(tmp_path, generic=[{"Q": "Why?", "A": "So.", "video_name": "v_a", "number": 3}])
    found = configured("video_chatgpt", tmp_path)
    answers = [Answer(question, "x") for question in found.questions()]
    written = json.dumps(found.exports(answers)["detail_qa.json"])
    assert written == '[{"Q": "Why?", "A": "So.", "video_name": "v_a", "number": 3, "pred": "x"}]'


def test_ids_do_not_change_when_a_sample_is_missing(five):
    benchmark, questions = five
    answers = [Answer(question, "x") for question in questions if question.id != "generic/v_a_0"]
    assert "generic/v_a_1#correctness" in [request.id for request in benchmark.requests(answers)]
    half = [answer for answer in answers if answer.question.id != "consistency/v_a_0/2"]
    assert [request.id for request in benchmark.requests(half)][-1] == "consistency/v_b_0#consistency"
    assert "consistency/v_a_0#consistency" not in [request.id for request in benchmark.requests(half)]


def test_a_file_in_the_place_of_another_is_noticed(tmp_path):
    five_folder(tmp_path, consistency=TEMPORAL)
    with pytest.raises(UserError, match="has no 'Q1'"):
        configured("video_chatgpt", tmp_path).questions()
    five_folder(tmp_path, temporal=CONSISTENCY)
    with pytest.raises(UserError, match="has no 'Q'"):
        configured("video_chatgpt", tmp_path).questions()
    five_folder(tmp_path, temporal=GENERIC)
    with pytest.raises(UserError, match="are the same"):
        configured("video_chatgpt", tmp_path).questions()
    five_folder(tmp_path)
    (tmp_path / "Benchmarking_QA" / "temporal_qa.json").unlink()
    with pytest.raises(UserError, match=r"temporal_qa\.json"):
        configured("video_chatgpt", tmp_path).questions()


def five_tables(root, consistency):
    blank = {"question": "None", "question_1": "None", "question_2": "None"}

    def rows(records):
        return [{**blank, "video_name": r["video_name"], "question": r["Q"], "answer": r["A"]} for r in records]

    table(root / "Generic" / "test-00000-of-00001.parquet", rows(GENERIC))
    table(root / "Temporal" / "test-00000-of-00001.parquet", rows(TEMPORAL))
    table(root / "Consistency" / "test-00000-of-00001.parquet", [{**blank, **row} for row in consistency])
    for name in ("v_a.mp4", "v_b.mkv"):
        write(root / "Test_Videos" / name, b"")


HALVES = [
    {"video_name": record["video_name"], "answer": record["A"], f"question_{n}": record[f"Q{n}"]}
    for record in CONSISTENCY
    for n in (1, 2)
]
WHOLE = [
    {"video_name": r["video_name"], "answer": r["A"], "question_1": r["Q1"], "question_2": r["Q2"]} for r in CONSISTENCY
]


@pytest.mark.parametrize("consistency", [HALVES, WHOLE, [HALVES[0], HALVES[2], HALVES[3], HALVES[1]]])
def test_the_data_set_of_the_five_has_the_same_questions(tmp_path, five, consistency):
    five_tables(tmp_path / "set", consistency)
    questions = configured("video_chatgpt", tmp_path / "set").questions()
    wanted = [(q.id, q.prompt, q.truth, q.media[0].path.name, q.about) for q in five[1]]
    assert [(q.id, q.prompt, q.truth, q.media[0].path.name, q.about) for q in questions] == wanted


@pytest.mark.parametrize(
    ("consistency", "said"), [(HALVES[:3], "has no second question"), (HALVES[1:], "without its first")]
)
def test_half_a_pair_is_an_error(tmp_path, consistency, said):
    five_tables(tmp_path, consistency)
    with pytest.raises(UserError, match=said):
        configured("video_chatgpt", tmp_path).questions()


# LLaVA-Bench in the wild

WILD = [
    {"question_id": 0, "image": "001.jpg", "text": "What is this?", "category": "conv"},
    {"question_id": 1, "image": "001.jpg", "text": "Describe it.", "category": "detail"},
    {"question_id": 2, "image": "002.jpg", "text": "Why?", "category": "complex"},
    {"question_id": 3, "image": "003.jpg", "text": "And this?", "category": "conv"},
]
CONTEXT = [
    {"id": "001", "image": "001.jpg", "caption": "A lake."},
    {"id": "002", "image": "002.jpg", "caption": ["A man.", "A dog."]},
    {"id": "003", "image": "003.jpg", "caption": "A cup."},
]
GPT4 = [{"question_id": n, "text": f"reference {n}", "answer_id": f"a{n}"} for n in (3, 2, 1, 0)]


@pytest.fixture
def wild(tmp_path):
    folder = tmp_path / "llava-bench-in-the-wild"
    write(folder / "questions.jsonl", WILD)
    write(folder / "context.jsonl", CONTEXT)
    write(folder / "answers_gpt4.jsonl", GPT4)
    for name in ("001.jpg", "002.jpg", "003.jpg"):
        write(folder / "images" / name, b"")
    benchmark = configured("llava_bench", tmp_path)
    return benchmark, benchmark.questions()


def test_references_and_captions_are_joined_by_id_and_image(wild):
    benchmark, questions = wild
    answers = answered(questions, {"0": "lake", "1": "a lake", "2": "why not", "3": None})
    requests = benchmark.requests(answers)
    assert len(requests) == 3 and slots_fit(requests) and benchmark.warnings == []
    assert requests[2].slots == {
        "caption": "A man.\nA dog.",
        "question": "Why?",
        "reference": "reference 2",
        "prediction": "why not",
    }
    assert questions[0].conversation[0]["value"] == "<image>\nWhat is this?"
    line = benchmark.exports(answers)["merge.jsonl"][0]
    assert (line["question_id"], line["prompt"], line["text"]) == (0, "What is this?", "lake")


def test_the_figure_is_the_ratio_of_means_without_what_is_unjudged(wild):
    benchmark, questions = wild
    answers = answered(questions, {"0": "a", "1": "b", "2": "c", "3": None})
    judged = verdicts({"0": {"first": 8, "second": 6}, "1": {"first": 9, "second": 9.5}, "2": None})
    rows = benchmark.rows(answers, judged)
    assert figures(benchmark, rows) == {
        "relative": round(100 * (6 + 9.5 + 1) / (8 + 9 + 10), 6),  # what was broken counts 1 to 10
        "model": round(10 * 16.5 / 3, 6),
        "reference": 90.0,
        "relative_judged": round(100 * 15.5 / 17, 6),
        "unjudged": 25.0,
    }
    assert figures(benchmark, rows, "category/detail")["relative"] == round(100 * 9.5 / 9, 6)
    assert figures(benchmark, rows, "category/conv")["relative"] == round(100 * 7 / 18, 6)
    alone = figures(benchmark, rows, "category/complex")
    assert math.isnan(alone["relative"]) and alone["unjudged"] == 100
    assert rows[0].cluster == rows[1].cluster


@pytest.mark.parametrize("lost", ["context.jsonl", "answers_gpt4.jsonl"])
def test_a_record_without_its_other_half_is_named(tmp_path, wild, lost):
    write(tmp_path / "llava-bench-in-the-wild" / lost, (CONTEXT if lost == "context.jsonl" else GPT4)[:1])
    with pytest.raises(UserError, match=lost.replace(".", r"\.")):
        configured("llava_bench", tmp_path).questions()


def test_the_data_set_of_the_wild_has_the_same_questions(tmp_path, wild):
    rows = [
        {
            "question_id": q.id,
            "question": q.prompt,
            "image": {"bytes": q.id.encode(), "path": None},
            "category": q.about["category"],
            "caption": q.about["caption"],
            "gpt_answer": q.truth,
            "image_id": q.media[0].path.stem,
        }
        for q in wild[1]
    ]
    table(tmp_path / "set" / "data" / "train-00000-of-00001.parquet", rows)
    questions = configured("llava_bench", tmp_path / "set").questions()
    assert [(q.id, q.conversation, q.truth, q.about["caption"], q.about["category"]) for q in questions] == [
        (q.id, q.conversation, q.truth, q.about["caption"], q.about["category"]) for q in wild[1]
    ]
    assert questions[2].media[0].read() == b"2"
    assert questions[0].media[0].key == questions[1].media[0].key != questions[2].media[0].key


# MM-Vet

VET = {
    "v1_0": {"question": "What is x?", "answer": "-1<AND>-5", "capability": ["ocr", "math"], "imagename": "a.png"},
    "v1_1": {"question": "Which car?", "answer": "red<OR>crimson", "capability": ["rec", "know"], "imagename": "b.jpg"},
    "v1_2": {"question": "What is y?", "answer": "7", "capability": ["math", "ocr"], "imagename": "a.png"},
    "v1_3": {"question": "Who?", "answer": "a clown", "capability": ["rec"], "imagename": "c.jpg"},
}


@pytest.fixture
def vet(tmp_path):
    folder = tmp_path / "mm-vet"
    write(folder / "mm-vet.json", VET)
    lines = [
        {"question_id": n, "image": record["imagename"], "text": record["question"], "category": "default"}
        for n, record in enumerate(VET.values())
    ]
    write(folder / "llava-mm-vet.jsonl", lines)
    for name in ("a.png", "b.jpg", "c.jpg"):
        write(folder / "images" / name, b"")
    benchmark = configured("mm_vet", tmp_path)
    return benchmark, benchmark.questions()


def test_mm_vet_is_asked_and_judged_by_its_ids(vet):
    benchmark, questions = vet
    answers = answered(questions, {"v1_0": "-1", "v1_1": "crimson", "v1_2": None, "v1_3": "a clown"})
    requests = benchmark.requests(answers)
    assert [request.id for request in requests] == ["v1_0", "v1_1", "v1_3"] and slots_fit(requests)
    assert requests[0].slots == {"question": "What is x?", "answer": "-1 <AND> -5", "prediction": "-1"}
    assert requests[1].slots["answer"] == "red <OR> crimson"
    exports = benchmark.exports(answers)
    assert exports["mm-vet.json"] == {"v1_0": "-1", "v1_1": "crimson", "v1_2": "", "v1_3": "a clown"}
    assert [line["question_id"] for line in exports["merge.jsonl"]] == [0, 1, 3] and benchmark.warnings == []


def test_mm_vet_is_the_mean_score_of_all_and_of_each_capability_and_set(vet):
    benchmark, questions = vet
    answers = answered(questions, {"v1_0": "-1", "v1_1": "crimson", "v1_2": None, "v1_3": "a clown"})
    judged = verdicts({"v1_0": {"score": 0.5}, "v1_1": {"score": 1.0}, "v1_3": None})
    rows = benchmark.rows(answers, judged)
    assert figures(benchmark, rows) == {"total": 37.5, "total_judged": 75.0, "unjudged": 25.0}
    assert figures(benchmark, rows, "capability/ocr")["total"] == 25.0  # 0.5 and the broken one
    assert figures(benchmark, rows, "capability/rec") == {"total": 50.0, "total_judged": 100.0, "unjudged": 50.0}
    assert figures(benchmark, rows, "set/ocr_math")["total"] == 25.0  # in whatever order they stand
    assert rows[0].groups == ("capability/ocr", "capability/math", "set/ocr_math")
    assert rows[0].cluster == rows[2].cluster


def test_an_endpoint_judges_a_benchmark_from_end_to_end(tmp_path, vet, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    server = JudgeServer(lambda text: '{"score": 0.5}' if "Prediction: -1" in text else "as you like it")
    try:
        benchmark, questions = vet
        answers = answered(questions, {"v1_0": "-1", "v1_1": "crimson", "v1_2": None, "v1_3": "-1, I think"})
        judge = OpenAiJudge(model="m", base_url=server.base_url, attempts=2, yes=True)
        judged = judge.judge(benchmark.requests(answers), tmp_path / "kept", lambda _: None)
        found = figures(benchmark, benchmark.rows(answers, judged.verdicts))
    finally:
        server.close()
    assert found == {"total": 25.0, "total_judged": 50.0, "unjudged": 25.0} and len(server.asked) == 4
    assert judged.verdicts["v1_1"].reply == "as you like it" and judged.about["unjudged"] == 1


def test_mm_vet_needs_no_prepared_file_and_says_what_a_prepared_one_lacks(tmp_path, vet):
    (tmp_path / "mm-vet" / "llava-mm-vet.jsonl").unlink()
    alone = configured("mm_vet", tmp_path).questions()
    assert [(q.id, q.conversation, q.truth, q.about) for q in alone] == [
        (q.id, q.conversation, q.truth, q.about) for q in vet[1]
    ]
    write(tmp_path / "mm-vet" / "llava-mm-vet.jsonl", [{"question_id": 0, "image": "a.png", "text": "What is x?"}])
    with pytest.raises(UserError, match=r"llava-mm-vet\.jsonl has nothing for v1_1"):
        configured("mm_vet", tmp_path).questions()
    write(tmp_path / "mm-vet" / "mm-vet.json", {"v1_0": {**VET["v1_0"], "capability": ["ocr", "magic"]}})
    with pytest.raises(UserError, match="magic"):
        configured("mm_vet", tmp_path).questions()


def test_the_data_set_of_mm_vet_has_the_same_questions(tmp_path, vet):
    rows = [
        {
            "question_id": id,
            "image": {"bytes": id.encode(), "path": record["imagename"]},
            "question": record["question"],
            "answer": record["answer"],
            "image_source": "web",
            "capability": ",".join(record["capability"]),
        }
        for id, record in VET.items()
    ]
    table(tmp_path / "set" / "data" / "test-00000-of-00001.parquet", rows)
    questions = configured("mm_vet", tmp_path / "set").questions()
    assert [(q.id, q.conversation, q.truth, q.about) for q in questions] == [
        (q.id, q.conversation, q.truth, q.about) for q in vet[1]
    ]
    assert questions[3].media[0].read() == b"v1_3"


# All of them


@given(st.lists(st.sampled_from([None, "broken", ("yes", 5), ("no", 2), ("yes", 0)]), min_size=1, max_size=12))
def test_the_headline_never_exceeds_what_was_judged(tmp_path_factory, states):
    root = tmp_path_factory.mktemp("qa")
    asked = [{"video_name": "v", "question": "q", "question_id": n} for n in range(len(states))]
    video_qa_folder(root, asked, [{"answer": "a", "question_id": n} for n in range(len(states))])
    benchmark = configured("msvd_qa", root)
    texts = {str(n): None if state == "broken" else "x" for n, state in enumerate(states)}
    judged = {
        str(n): state and {"pred": state[0], "score": state[1]} for n, state in enumerate(states) if state != "broken"
    }
    found = figures(benchmark, benchmark.rows(answered(benchmark.questions(), texts), verdicts(judged)))
    right = sum(state not in (None, "broken") and state[0] == "yes" for state in states)
    assert found["accuracy"] == pytest.approx(100 * right / len(states))
    assert math.isnan(found["accuracy_judged"]) or found["accuracy_judged"] >= found["accuracy"]
    assert found["unjudged"] == pytest.approx(100 * states.count(None) / len(states))


@pytest.mark.parametrize(
    ("name", "kind", "headline"),
    [
        *((name, VideoQA, {"accuracy", "score"}) for name in ("msvd_qa", "msrvtt_qa", "tgif_qa", "activitynet_qa")),
        ("llava_bench", LlavaBench, {"relative"}),
        ("mm_vet", MMVet, {"total"}),
    ],
)
def test_the_papers_figures_are_those_of_headline_metrics(tmp_path, name, kind, headline):
    benchmark = configured(name, tmp_path)
    assert type(benchmark) is kind and benchmark.name == name and set(benchmark.paper) == headline
    assert {metric.name for metric in benchmark.metrics if metric.headline} == headline


def test_without_data_it_says_what_was_looked_for(tmp_path):
    for name, kind in (("msvd_qa", "test_q.json"), ("video_chatgpt", "generic_qa"), ("mm_vet", "mm-vet.json")):
        with pytest.raises(UserError, match=kind):
            configured(name, tmp_path).questions()
    assert VideoChatGPT(name="v", root=str(tmp_path)).paper == {}
