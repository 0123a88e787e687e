"""The judge: nothing is paid for twice, nothing is lost, and what cannot be read is said to be unjudged."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from email.utils import formatdate
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from judge_server import JudgeServer

from vllava.errors import UserError
from vllava.evaluation.judges.endpoint import asked_wait
from vllava.evaluation.judges.plain import ExactJudge, NoJudge
from vllava.evaluation.judges.prompts import PROMPTS, read_prompts
from vllava.evaluation.judges.remote import OpenAiJudge
from vllava.evaluation.judges.replies import parsed
from vllava.evaluation.judges.store import FILE, Reply, Store
from vllava.evaluation.questions import Request

ROOT = Path(__file__).parents[1]
KEY = "sk-obviously-not-a-key-4711"
FIELDS = {name: prompt.fields for name, prompt in read_prompts().items()}
YES, NO = '{"pred": "yes", "score": 4}', '{"pred": "no", "score": 1}'


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server = JudgeServer()
    yield server
    server.close()


def judge(server, **changes):
    quick = {"backoff": 0.001, "seconds": 5.0, "concurrency": 4, "yes": True}
    return OpenAiJudge(**{"model": "judge", "base_url": server.base_url, **quick, **changes})


def requests(count, prompt="video_qa"):
    slots = [{"question": f"What is {n}?", "answer": f"<{n}>", "prediction": f"it is {n}"} for n in range(count)]
    return [Request(f"q{n}", prompt, filled) for n, filled in enumerate(slots)]


def contents(judged):
    return {id: verdict.values for id, verdict in judged.verdicts.items()}


def quiet(_):
    pass


# What is asked


def test_a_prompt_fills_in_its_slots_and_nothing_else():
    prompt = read_prompts()["video_qa"]
    filled = {"question": "Who {answer}?", "answer": "a {dog}", "prediction": '{"pred": "yes"}'}
    system, user = prompt.messages(filled)
    assert system["role"] == "system" and "video" in system["content"]
    assert 'Question: Who {answer}?\nCorrect answer: a {dog}\nPredicted answer: {"pred": "yes"}\n' in user["content"]
    assert '{"pred": "yes", "score": 4}' in user["content"]  # the form of the reply, which has no slots
    assert prompt.messages(filled, attempt=1)[1]["content"].endswith(prompt.reminder)


def test_every_prompt_reads_the_reply_that_it_shows():
    for name, prompt in read_prompts().items():
        slots = dict.fromkeys(prompt.slots, "text")
        shown = prompt.messages(slots)[-1]["content"]
        example = next(line for line in shown.splitlines() if line.startswith("{"))
        values = parsed(example, prompt.fields)
        assert values and set(values) == set(prompt.schema["required"]), name
        assert values == json.loads(example)


def test_the_prompts_show_what_each_benchmark_gives_them():
    slots = {name: set(prompt.slots) for name, prompt in read_prompts().items()}
    generic = dict.fromkeys(["video_qa", "correctness", "detail", "context", "temporal", "mm_vet"])
    assert slots == {
        **{name: {"question", "answer", "prediction"} for name in generic},
        "consistency": {"question1", "question2", "answer", "prediction1", "prediction2"},
        "llava_bench": {"caption", "question", "reference", "prediction"},
    }


def test_a_file_of_a_folder_takes_the_place_of_ours(tmp_path):
    text = "system: Judge.\nuser: '{question} {answer} {prediction}'\n"
    (tmp_path / "video_qa.yaml").write_text(text)
    (tmp_path / "mm_vet.yaml").write_text("user: '{question} | {answer} | {prediction} |'\nformat: numbers\n")
    ours, found = read_prompts(), read_prompts(tmp_path)
    assert found["video_qa"].messages({"question": "Q", "answer": "A", "prediction": "P"}) == [
        {"role": "system", "content": "Judge."},
        {"role": "user", "content": "Q A P"},
    ]
    assert found["video_qa"].fields == ours["video_qa"].fields
    assert found["video_qa"].sha256 != ours["video_qa"].sha256 and found["detail"] == ours["detail"]
    assert found["mm_vet"].schema is None and found["mm_vet"].messages(
        {"question": "Q", "answer": "", "prediction": ""}
    )


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("video_qa", "user: '{question} {answer}'", "never shows {prediction}"),
        ("video", "user: x", "'video_qa'"),
        ("video_qa", "system: x", "no text under the key user"),
        ("video_qa", "usr: x\nuser: '{question} {answer} {prediction}'", "'user'"),
        ("video_qa", "user: [", "cannot be read"),
    ],
)
def test_a_folder_of_prompts_that_does_not_fit_is_said_in_words(tmp_path, name, text, said):
    (tmp_path / f"{name}.yaml").write_text(text)
    with pytest.raises(UserError) as error:
        read_prompts(tmp_path)
    assert said in str(error.value)
    with pytest.raises(UserError, match="is no folder with prompts"):
        read_prompts(tmp_path / "elsewhere")


def test_the_schema_is_strict_and_has_every_field():
    assert read_prompts()["video_qa"].schema == {
        "type": "object",
        "properties": {
            "pred": {"type": "string", "enum": ["yes", "no"]},
            "score": {"type": "integer", "description": "a whole number from 0 to 5"},
        },
        "required": ["pred", "score"],
        "additionalProperties": False,
    }


# What comes back


@pytest.mark.parametrize(
    ("reply", "values"),
    [
        ('{"pred": "yes", "score": 4}', ("yes", 4)),
        ("{'pred': 'no', 'score': 0}", ("no", 0)),  # Python
        ("{''pred': 'yes', ''score': 4.8}", ("yes", 4.8)),  # doubled quotes; not cut to 4
        ('```json\n{"pred": "Yes.", "score": "5"}\n```', ("yes", 5)),
        ('Sure! {"pred": "no", "score": 2} because', ("no", 2)),
        ('{"pred": true, "score": 3}', ("yes", 3)),
        ("{'pred': False, 'score': 3}", ("no", 3)),
        ('{"pred": "yes", "score": 9}', ("yes", 5)),
        ('{"pred": "yes", "score": -1}', ("yes", 0)),
        ('{"Pred": "YES", "Score": 1}', ("yes", 1)),
        ("{pred: yes, score: 3}", ("yes", 3)),
        ("pred: yes\nscore: 3", ("yes", 3)),
        ("**Pred**: no; **score** = 3.5", ("no", 3.5)),
        ('{"pred": "yes", "score": 4', ("yes", 4)),  # cut
        ('<think>{"pred": "no", "score": 0} at first…</think>{"pred": "yes", "score": 5}', ("yes", 5)),
        ('{"pred": "yes" or "no", "score": n} {"pred": "no", "score": 1}', ("no", 1)),
        ('{"pred": "yes", "score": 4} {"pred": "no", "score": 1}', ("yes", 4)),  # the first one
        ("", None),
        ("yes", None),
        ('{"pred": "maybe", "score": 4}', None),
        ('{"pred": "yes"}', None),
        ('{"pred": "yes", "score": null}', None),
        ('{"pred": "yes", "score": true}', None),
        ('{"pred": "yes", "score": NaN}', None),
        ("pred: yes, score: 4/5", None),  # four fifths, or four?
        ("pred: yes, score: 4.5/5", None),
        ("score: 2 if lenient, score: 1 if strict, pred: no", None),  # two things of one
    ],
)
def test_a_reply_is_read_with_tolerance(reply, values):
    found = parsed(reply, FIELDS["video_qa"])
    assert found == (values and {"pred": values[0], "score": values[1]})


@pytest.mark.parametrize(
    ("reply", "score"),
    [('{"score": 0.5}', 0.5), ("0.5", 0.5), (" 1 ", 1), ("0.5 since", None), ('{"score": 5}', None), ("80", None)],
)
def test_a_number_of_another_scale_is_no_score(reply, score):
    found = parsed(reply, FIELDS["mm_vet"])
    assert found == (None if score is None else {"score": score})


@pytest.mark.parametrize(
    ("reply", "scores"),
    [
        ("8 7.5\nThe first …", (8, 7.5)),
        ("8, 7", (8, 7)),
        ("8 7 are my scores", (8, 7)),
        ("Scores: 8 7", None),
        ("8/10 7/10", None),
        ("8", None),
        ("\n", None),
    ],
)
def test_numbers_on_the_first_line_are_read_in_their_order(reply, scores):
    found = parsed(reply, FIELDS["llava_bench"], numbers=True)
    assert found == (scores and {"first": scores[0], "second": scores[1]})


@given(st.text() | st.text(alphabet="{}'\":,predsco 0123456789yn.-"))
def test_whatever_is_replied_is_read_as_what_may_be_or_not_at_all(reply):
    for fields in (FIELDS["video_qa"], FIELDS["llava_bench"]):
        found = parsed(reply, fields)
        assert found is None or set(found) == {field.name for field in fields}
        for field in fields if found else ():
            value = found[field.name]
            assert value in field.one_of if field.one_of else field.least <= value <= field.most


@given(st.sampled_from(["yes", "no"]), st.floats(0, 5))
def test_what_json_and_python_write_is_read_to_the_digit(pred, score):
    values = {"pred": pred, "score": score}
    assert parsed(json.dumps(values), FIELDS["video_qa"]) == parsed(repr(values), FIELDS["video_qa"]) == values


# The store


def test_a_cut_last_line_costs_one_reply_and_no_other(tmp_path):
    store = Store(tmp_path)
    for number in range(3):
        store.add(f"k{number}", Reply(f"said {number}", "s", 1, 2))
    store.close()
    whole = (tmp_path / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(whole[:-7])
    store = Store(tmp_path)
    assert len(store) == 2 and "k2" not in store
    store.add("k2", Reply("again"))
    store.add("k3", Reply("said 3"))
    store.close()
    store = Store(tmp_path)
    assert [store[f"k{n}"].text for n in range(4)] == ["said 0", "said 1", "again", "said 3"]


def test_lines_of_somebody_else_are_passed_over(tmp_path):
    (tmp_path / FILE).write_bytes(
        b'[1]\n{"key": "a"}\n{"key": "b", "text": 5}\n\xff\xfe\n{"key": "c", "text": "ok"}\n7\n'
    )
    store = Store(tmp_path)
    assert len(store) == 1 and store["c"] == Reply("ok")


def test_an_empty_reply_is_never_written(tmp_path):
    store = Store(tmp_path)
    store.add("k", Reply("  \n"))
    store.close()
    assert "k" in store and not (tmp_path / FILE).exists()


# An endpoint


def test_each_content_is_asked_once_and_its_reply_stands_for_all(server, tmp_path):
    server.say = lambda text: YES if "it is 1" in text else NO
    asked = [*requests(3), Request("twin", "video_qa", requests(3)[1].slots)]
    judged = judge(server).judge(asked, tmp_path, quiet)
    yes, no = {"pred": "yes", "score": 4}, {"pred": "no", "score": 1}
    assert contents(judged) == {"q0": no, "q1": yes, "q2": no, "twin": yes} and list(judged.verdicts)[-1] == "twin"
    assert len(server.asked) == 3
    body = server.asked[0]
    assert body["model"] == "judge" and body["temperature"] == 0 and body["max_tokens"] == 512
    assert body["response_format"]["json_schema"]["schema"] == read_prompts()["video_qa"].schema
    assert judged.about == {
        "name": "openai",
        "base_url": server.base_url,
        "model": "judge",
        "temperature": 0.0,
        "max_tokens": 512,
        "options": {},
        "snapshots": {"judge-2024-01-01": 3},
        "prompts": {"video_qa": read_prompts()["video_qa"].sha256},
        "attempts": 3,
        "requests": 4,
        "judged": 4,
        "unjudged": 0,
        "replies": 3,
        "structured_replies": 3,
        "tokens": {"input": 300, "output": 30},
        "cost": None,
    }
    again = judge(server).judge(asked, tmp_path, quiet)
    assert again == judged and len(server.asked) == 3


@pytest.mark.parametrize(
    "changes",
    [{"model": "other"}, {"temperature": 0.5}, {"options": {"seed": 1}}, {"max_tokens": 9}, {"base_url": "localhost"}],
)
def test_whatever_can_decide_a_reply_is_part_of_its_key(server, tmp_path, changes):
    judge(server).judge(requests(1), tmp_path, quiet)
    if "base_url" in changes:
        changes = {"base_url": server.base_url.replace("127.0.0.1", "localhost")}
    judge(server, **changes).judge(requests(1), tmp_path, quiet)
    assert len(server.asked) == 2
    assert server.asked[1].get("seed") == changes.get("options", {}).get("seed")


def test_another_prompt_is_another_request(server, tmp_path):
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "video_qa.yaml").write_text("user: '{question} {answer} {prediction}'")
    judge(server).judge(requests(1), tmp_path, quiet)
    judged = judge(server, prompts=str(tmp_path / "prompts")).judge(requests(1), tmp_path, quiet)
    assert server.asked[1]["messages"] == [{"role": "user", "content": "What is 0? <0> it is 0"}]
    assert judged.about["prompts"]["video_qa"] != read_prompts()["video_qa"].sha256


def test_no_more_is_asked_at_a_time_than_may_be(server, tmp_path):
    server.delay = 0.02
    judge(server, concurrency=3).judge(requests(12), tmp_path, quiet)
    assert server.most_open == 3


@pytest.mark.parametrize("fault", [500, 503, 408, "cut", "hang up", "garbage", (429, {"Retry-After": "0"})])
def test_what_may_pass_is_tried_again(server, tmp_path, fault):
    server.faults.extend([fault, None, fault, fault])
    judged = judge(server).judge(requests(6), tmp_path, quiet)
    assert judged.about["judged"] == 6 and len(server.asked) == 9 and len(server.answered) == 6


def test_a_call_takes_no_longer_than_it_may(server, tmp_path):
    server.faults.extend(["slow", "drip"])
    judged = judge(server, seconds=0.4).judge(requests(3), tmp_path, quiet)
    assert judged.about["judged"] == 3 and len(server.asked) == 5


@pytest.mark.parametrize("header", [{"Retry-After": "0.4"}, {"retry-after-ms": "400"}])
def test_all_calls_wait_as_long_as_the_endpoint_asks(server, tmp_path, header):
    server.faults.append((429, header))
    judge(server).judge(requests(6), tmp_path, quiet)
    waited = [moment - server.times[0] for moment in server.times[1:]]
    assert len(waited) == 6 and min(waited) >= 0.39


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after": "7"}, 7),
        ({"retry-after": "0.5"}, 0.5),
        ({"retry-after-ms": "250", "retry-after": "1"}, 0.25),
        ({"retry-after": formatdate(0, usegmt=True)}, 0),
        ({"retry-after": "-3"}, 0),
        ({"retry-after": "soon"}, 0),
        ({}, 0),
    ],
)
def test_a_server_asks_to_wait_in_seconds_or_until_a_date(headers, seconds):
    error = Exception()
    error.response = SimpleNamespace(headers=headers)
    assert asked_wait(error) == seconds
    error.response.headers = {"retry-after": formatdate(time.time() + 100, usegmt=True)}
    assert 95 < asked_wait(error) <= 100


def test_who_is_told_to_wait_while_others_are_answered_does_not_give_up(server, tmp_path):
    server.always = lambda text: (429, {}) if "it is 0" in text and len(server.answered) < 9 else None
    server.delay = 0.02
    assert judge(server, retries=2, concurrency=2).judge(requests(10), tmp_path, quiet).about["judged"] == 10


def test_an_endpoint_that_asks_to_wait_for_hours_is_not_waited_for(server, tmp_path):
    server.faults.append((429, {"Retry-After": "7200"}))
    with pytest.raises(UserError, match="asks to wait 7,200 s"):
        judge(server).judge(requests(2), tmp_path, quiet)


def test_an_endpoint_that_never_replies_ends_it_after_so_many_tries(server, tmp_path):
    server.always = 500
    with pytest.raises(UserError, match=r"no reply in 3 tries .*the same command asks the rest"):
        judge(server, retries=2, concurrency=1).judge(requests(5), tmp_path, quiet)
    assert len(server.asked) == 3
    server.always = None
    assert judge(server).judge(requests(5), tmp_path, quiet).about["judged"] == 5


def test_one_request_that_always_fails_does_not_stop_the_others(server, tmp_path):
    server.always = lambda text: 500 if "it is 0" in text else None
    with pytest.raises(UserError, match=r"1 requests got no reply .*9 others were answered and are kept"):
        judge(server, retries=3).judge(requests(10), tmp_path, quiet)
    server.always = None
    before = len(server.asked)
    assert judge(server).judge(requests(10), tmp_path, quiet).about["judged"] == 10
    assert len(server.asked) == before + 1


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (401, "does not accept the key"),
        (403, "does not let this key ask"),
        (404, "judge.model=judge"),
        (400, "judge.temperature=null"),
        ("quota", "no quota left"),
    ],
)
def test_what_cannot_pass_stops_at_the_first_reply(server, tmp_path, fault, said):
    server.always = fault
    with pytest.raises(UserError) as error:
        judge(server).judge(requests(9), tmp_path, quiet)
    assert said in str(error.value) and len(server.asked) == (2 if fault == 400 else 1)  # 400: plainly, too


def test_a_wrong_key_is_said_without_the_key(server, tmp_path):
    server.key = "sk-another"
    with pytest.raises(UserError) as error:
        judge(server).judge(requests(1), tmp_path, quiet)
    assert "key_variable" in str(error.value) and KEY not in str(error.value)


def test_an_endpoint_without_schemas_is_asked_plainly_from_then_on(server, tmp_path):
    server.no_schema, server.say = True, lambda text: "{''pred': 'yes', ''score': 4.8}"
    judged = judge(server).judge(requests(5), tmp_path, quiet)
    assert set(map(str, contents(judged).values())) == {str({"pred": "yes", "score": 4.8})}
    assert ["response_format" in body for body in server.asked] == [True] + [False] * 5
    assert judged.about["structured_replies"] == 0
    judge(server).judge(requests(5), tmp_path, quiet)
    assert len(server.asked) == 6  # how they were had does not matter to what is kept


def test_what_cannot_be_read_is_asked_again_and_then_stands_as_unjudged(server, tmp_path):
    replies = {"it is 0": ["well", "hm", "I cannot"], "it is 1": ["well", YES], "it is 2": [YES]}
    server.say = lambda text: next(said for asked, said in replies.items() if asked in text).pop(0)
    judged = judge(server).judge(requests(3), tmp_path, quiet)
    assert [contents(judged)[f"q{n}"] and contents(judged)[f"q{n}"]["pred"] for n in range(3)] == [None, "yes", "yes"]
    assert judged.verdicts["q0"].reply == "I cannot" and judged.verdicts["q1"].reply == YES
    assert judged.about["judged"] == 2 and judged.about["unjudged"] == 1 and judged.about["replies"] == 6
    assert judged.about["tokens"] == {"input": 600, "output": 60}
    assert judged.warnings == ["1 of 3 requests stand as unjudged: no reply to them could be read."]
    assert len({json.dumps(body["messages"]) for body in server.asked}) == 5  # reminded once, then asked once more
    assert judge(server).judge(requests(3), tmp_path, quiet) == judged and len(server.asked) == 6


def test_empty_replies_are_not_kept(server, tmp_path):
    server.always = lambda text: "empty" if "it is 0" in text else None
    judged = judge(server, attempts=2).judge(requests(2), tmp_path, quiet)
    assert contents(judged)["q0"] is None and len(server.asked) == 3
    server.always = None
    assert judge(server, attempts=2).judge(requests(2), tmp_path, quiet).about["judged"] == 2
    assert len(server.asked) == 4


def test_content_that_the_endpoint_refuses_is_unjudged_and_stops_nothing(server, tmp_path):
    server.always = lambda text: "refuse" if "it is 1" in text else None
    judged = judge(server).judge(requests(4), tmp_path, quiet)
    assert judged.about["judged"] == 3 and "filtered" in judged.verdicts["q1"].reply
    assert "filtered" not in (tmp_path / FILE).read_text()


def test_several_snapshots_of_a_model_are_warned_of(server, tmp_path):
    server.snapshot = lambda text: "late" if "it is 2" in text else "early"
    judged = judge(server).judge(requests(4), tmp_path, quiet)
    assert judged.about["snapshots"] == {"early": 3, "late": 1}
    assert "early (3), late (1)" in judged.warnings[0]


# Kills


def test_what_a_stop_at_any_request_leaves_is_not_asked_again(server, tmp_path):
    for stop_at in range(8):
        server.faults.extend([None] * stop_at + [404])
        with pytest.raises(UserError):
            judge(server, concurrency=3).judge(requests(60), tmp_path, quiet)
        server.faults.clear()
    assert judge(server).judge(requests(60), tmp_path, quiet).about["judged"] == 60
    assert len(server.answered) == len(set(server.answered)) == 60


@pytest.mark.parametrize(("sent", "lost"), [(signal.SIGKILL, 2), (signal.SIGINT, 0)])
def test_a_kill_half_way_loses_nothing_and_pays_nothing_twice(server, tmp_path, sent, lost):
    server.delay = 0.01
    script = (
        "import sys; sys.path[:0] = ['src', 'tests']\n"
        "from test_judge import judge, requests, quiet\n"
        "from types import SimpleNamespace as S\n"
        f"judge(S(base_url={server.base_url!r}), concurrency=2).judge(requests(200), {str(tmp_path)!r}, quiet)\n"
    )
    environment = {**os.environ, "OPENAI_API_KEY": KEY}
    killed = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
    while len(server.answered) < 20:
        assert killed.poll() is None
        time.sleep(0.005)
    killed.send_signal(sent)
    killed.wait(20)
    time.sleep(0.1)  # for what the server has begun
    answered, kept = len(server.answered), len(Store(tmp_path))
    assert answered - lost <= kept <= answered < 200  # but for what was on its way when the process died
    judged = judge(server).judge(requests(200), tmp_path, quiet)
    assert judged.about["judged"] == 200 and len(server.answered) - answered == 200 - kept


def test_the_key_appears_nowhere(server, tmp_path, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    server.say = lambda text: f"{YES} {KEY}"  # an endpoint that says it back
    server.snapshot = f"model {KEY}"
    server.faults.extend([None, (500, {}), (429, {"Retry-After": "0"}), "cut"])
    said = []
    judged = judge(server).judge(requests(4), tmp_path, said.append)
    errors = []
    for fault in (401, 403, 400, 404, 500, "quota", "refuse", "garbage", (429, {"Retry-After": "9999"})):
        server.always = fault
        try:
            errors.append(str(judge(server, retries=1).judge(requests(5)[4:], tmp_path, said.append).verdicts))
        except UserError as error:
            assert error.__cause__ is None
            errors.append(str(error))
    assert len(errors) == 9 and set(server.bearers) == {f"Bearer {KEY}"}  # and there it is
    texts = [caplog.text, *capfd.readouterr(), *errors, *said, str(judged), str(vars(judged)), repr(judge(server))]
    texts += [path.read_text() for path in tmp_path.rglob("*") if path.is_file()]
    assert not [text for text in texts if KEY in text or KEY[:12] in text]


# Costs


def test_the_cost_is_told_before_and_counted_after(server, tmp_path):
    said = []
    judged = judge(server, price={"input": 2.0, "output": 10.0}).judge(requests(4), tmp_path, said.append)
    messages = read_prompts()["video_qa"].messages(requests(1)[0].slots)
    tokens = 4 * sum(len(message["content"]) for message in messages) // 4 + 4 * 8
    assert f"4 requests to judge that have no reply yet: about {tokens:,} tokens in" in said[0] and "60 out" in said[0]
    assert f"about {(tokens * 2 + 60 * 10) / 1e6:,.2f}" in said[0]
    assert judged.about["cost"] == pytest.approx((400 * 2 + 40 * 10) / 1e6)
    said.clear()
    judge(server).judge(requests(4), tmp_path, said.append)
    assert said == []  # nothing is asked, so nothing is told
    judge(server).judge(requests(5), tmp_path, said.append)
    assert said[0].startswith("1 requests") and "unknown" in said[0]


def test_nobody_to_ask_is_a_no(server, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(UserError, match=r"judge.yes=true"):
        judge(server, yes=False).judge(requests(1), tmp_path, quiet)
    free = judge(server, yes=False, price={"input": 0, "output": 0}).judge(requests(1), tmp_path, quiet)
    assert free.about["judged"] == 1 and len(server.asked) == 1
    judge(server, yes=False).judge(requests(1), tmp_path, quiet)  # there is nothing to pay for


@pytest.mark.parametrize(("answer", "begins"), [("y", True), ("YES", True), ("", False), ("no", False)])
def test_it_begins_when_somebody_says_yes(server, tmp_path, monkeypatch, answer, begins):
    monkeypatch.setattr("sys.stdin", type("Terminal", (), {"isatty": lambda self: True})())
    monkeypatch.setattr("builtins.input", lambda prompt: answer)
    if begins:
        assert judge(server, yes=False).judge(requests(1), tmp_path, quiet).about["judged"] == 1
    else:
        with pytest.raises(UserError, match="as you wished"):
            judge(server, yes=False).judge(requests(1), tmp_path, quiet)
        assert server.asked == []


def test_a_budget_stops_it_and_keeps_what_was_judged(server, tmp_path):
    server.usage = (1_000_000, 0)
    limited = {"price": {"input": 1.0, "output": 0.0}, "budget": 3.5, "concurrency": 1}
    with pytest.raises(UserError, match=r"judge.budget=3.5 is reached: 3 is spent, on 3 requests. 3 of"):
        judge(server, **limited).judge(requests(9), tmp_path, quiet)
    assert len(server.answered) == 3 == len(Store(tmp_path))
    judged = judge(server).judge(requests(9), tmp_path, quiet)
    assert judged.about["judged"] == 9 and len(server.answered) == 9


def test_a_number_of_requests_is_a_limit_too(server, tmp_path):
    limited = judge(server, max_requests=4)
    with pytest.raises(UserError, match=r"judge.max_requests=4 is reached"):
        limited.judge(requests(9), tmp_path, quiet)
    assert len(server.answered) == 4
    with pytest.raises(UserError, match=r"judge.max_requests=4 is reached"):  # of a command, not of a benchmark
        limited.judge(requests(9), tmp_path, quiet)
    assert len(server.answered) == 4


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": ""}, "judge.model is not set"),
        ({"budget": 1.0}, "judge.price"),
        ({"concurrency": 0}, "judge.concurrency"),
        ({"price": {"input": "cheap", "output": 1}}, "judge.price"),
        ({"price": {"input": 1.0}}, "judge.price"),
        ({"seconds": "long"}, "judge.seconds"),
    ],
)
def test_settings_that_do_not_fit_are_said_before_anything_is_asked(server, changes, said):
    with pytest.raises(UserError) as error:
        judge(server, **changes)
    assert said in str(error.value)


def test_a_key_that_is_not_there_is_asked_for_by_the_name_of_its_variable(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(UserError, match="OPENAI_API_KEY is not set"):
        OpenAiJudge(model="judge")
    monkeypatch.setenv("MY_KEY", "two words")
    with pytest.raises(UserError, match="MY_KEY holds characters") as error:
        OpenAiJudge(model="judge", key_variable="MY_KEY")
    assert "two words" not in str(error.value)


def test_a_server_of_ones_own_needs_no_key(server, tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    assert judge(server).judge(requests(1), tmp_path, quiet).about["judged"] == 1


def test_without_the_package_it_says_how_to_install_it(server, monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(UserError, match=r"pip install 'vllava\[benchmarks\]'"):
        judge(server)


# Judges without an endpoint


@pytest.mark.parametrize(
    ("prediction", "answer", "right"),
    [
        ("Yes.", "yes", True),
        ("The two dogs", "2 dogs", True),
        ("a dog", "dog", True),
        ("dogs", "dog", False),
        ("the dog runs", "dog", False),
        ("", "dog", False),
        ("the", "a", False),  # nothing is left of either
        ("A", "a", True),
    ],
)
def test_an_exact_match_is_one_after_normalisation(tmp_path, prediction, answer, right):
    request = Request("q", "video_qa", {"question": "What?", "answer": answer, "prediction": prediction})
    judged = ExactJudge().judge([request], tmp_path, quiet)
    assert judged.verdicts["q"].values == {"pred": "yes" if right else "no"}
    assert judged.about["name"] == "exact" and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("prompt", sorted(set(FIELDS) - {"video_qa"}))
def test_an_exact_match_gives_no_scores(tmp_path, prompt):
    slots = dict.fromkeys(read_prompts()[prompt].slots, "text")
    with pytest.raises(UserError, match="judge=openai and judge=local can"):
        ExactJudge().judge([Request("q", prompt, slots)], tmp_path, quiet)


def test_no_judge_says_nothing(tmp_path):
    assert NoJudge().judge(requests(2), tmp_path, quiet).verdicts == {}


def test_a_language_model_on_this_machine_judges_by_the_same_prompts(tmp_path):
    from vllava.evaluation.judges.local import LocalJudge

    local = LocalJudge(model=str(ROOT / "assets" / "llm"), max_tokens=4, batch_size=2)
    judged = local.judge(requests(3), tmp_path, quiet)
    assert set(judged.verdicts) == {"q0", "q1", "q2"} and judged.about["name"] == "local"
    assert judged.about["weights"] and judged.about["unjudged"] == 3  # a toy of 4 words; they are kept
    assert all(verdict.reply for verdict in judged.verdicts.values())
    lone = LocalJudge(model=str(ROOT / "assets" / "llm"), max_tokens=4, batch_size=1).judge(
        requests(3), tmp_path / "other", quiet
    )
    assert lone.verdicts == judged.verdicts  # padding decides nothing
    kept = LocalJudge(model=str(ROOT / "assets" / "llm"), max_tokens=4)
    kept._replies = None  # nothing is asked
    assert kept.judge(requests(3), tmp_path, quiet) == judged


@pytest.mark.parametrize("name", ["none", "exact", "openai", "local"])
def test_the_configurations_name_what_there_is(name, server):
    settings = yaml.safe_load((ROOT / "conf" / "judge" / f"{name}.yaml").read_text())
    module, _, target = settings.pop("_target_").rpartition(".")
    settings.pop("_convert_", None)
    made = getattr(__import__(module, fromlist=[target]), target)(
        **{key: str(ROOT / "assets" / "llm") if value == "???" else value for key, value in settings.items()}
    )
    assert made.name == name
    assert set(settings) == set(getattr(made, "__dataclass_fields__", {})), "every setting has its line"
    defaults = {key: field.default for key, field in made.__dataclass_fields__.items() if key != "model"}
    assert all(settings[key] == defaults[key] for key in defaults if isinstance(defaults[key], (int, float, str)))
    assert PROMPTS.is_dir()
