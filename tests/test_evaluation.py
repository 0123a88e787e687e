"""Questions to a model, the figures made from its answers, and the report."""

import html
import json
import math
import re
from html.parser import HTMLParser

import pytest
import torch
from omegaconf import OmegaConf
from shard_fixtures import ROOT, SPECS, TOKENIZER, image_sample, jpeg, talk, text_sample, video_sample, write_source

from data_prep import toy_language
from vllava.data.build import conversation_packer, sample_decoder
from vllava.data.packing import pack
from vllava.errors import UserError
from vllava.evaluation import generate
from vllava.evaluation.answers import Answer, answer_all, ask, normalise, pictures, read_samples
from vllava.evaluation.benchmarks.held_out import HeldOut, in_words
from vllava.evaluation.blocks import blind
from vllava.evaluation.evaluate import evaluate
from vllava.evaluation.figures import summary, table, types
from vllava.evaluation.predictions import Predictions
from vllava.evaluation.questions import Answer as Answered
from vllava.evaluation.report import sample_rows, write_report
from vllava.model.build import fresh_llm, video_llava

REMEDY = "Make them with `python -m data_prep.toy eval`."

# --- scores -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("Yes", "yes"),
        (" yes. ", "yes"),
        ("TOP   Left", "top left"),
        ("top\nleft.", "top left"),
        ("no .", "no"),
        ("3.5", "3.5"),
        ("", ""),
    ],
)
def test_answers_are_compared_without_case_spaces_and_final_full_stop(given, expected):
    assert normalise(given) == expected


def answer(
    given="red", truth="red", kind="colour", options=("red", "blue"), medium="image", key="k", question="Which?"
):
    return Answer(key, medium, kind, question, truth, given, tuple(options))


@pytest.mark.parametrize(
    ("given", "truth", "expected"),
    [
        ("Red.", "red", True),
        ("red circle", "red", False),
        ("", "red", False),
        ("blue", "red", False),
        ("top  left", "Top left", True),
    ],
)
def test_an_answer_is_correct_where_all_of_it_is_the_truth(given, truth, expected):
    assert answer(given, truth).correct is expected


@pytest.mark.parametrize(("options", "expected"), [(("yes", "no"), 0.5), (tuple("abcde"), 0.2), ((), 0.0)])
def test_chance_is_a_guess_among_the_options(options, expected):
    assert answer(options=options).chance == expected


def test_the_summary_of_four_answers():
    found = [answer("red"), answer("blue"), answer("red"), answer("two", "two", "count", tuple("abcd"))]
    blind = [answer("blue"), answer("blue"), answer("red"), answer("", "two", "count", tuple("abcd"))]
    assert summary(found, blind) == {"accuracy": 0.75, "blind": 0.25, "chance": 0.4375, "n": 4}


def test_types_are_counted_apart_and_temporal_ones_also_together():
    found = [
        answer("red"),
        answer("blue"),
        answer("left", "left", "direction", tuple("abcd")),
        answer("up", "left", "direction", tuple("abcd")),
        answer("a", "a", "order", ("a", "b")),
    ]
    blind = [answer("red"), answer("red"), *(answer("", "x", a.type, a.options) for a in found[2:])]
    assert types(found, blind, {"temporal": ["direction", "order"]}) == {
        "colour": {"accuracy": 0.5, "blind": 1.0, "chance": 0.5, "n": 2},
        "direction": {"accuracy": 0.5, "blind": 0.0, "chance": 0.25, "n": 2},
        "order": {"accuracy": 1.0, "blind": 0.0, "chance": 0.5, "n": 1},
        "temporal": {"accuracy": round(2 / 3, 4), "blind": 0.0, "chance": round(1 / 3, 4), "n": 3},
    }


def test_no_temporal_line_without_temporal_questions():
    assert list(types([answer()], [answer()], {"temporal": ["order"]})) == ["colour"]


def test_temporal_types_are_those_of_the_toy_world():
    toy = OmegaConf.load(ROOT / "conf" / "experiment" / "evaluate.yaml").toy
    assert set(toy.benchmark.groups.temporal) == set(toy_language.TEMPORAL_TYPES)


def metrics_of(found, blind):
    whole = summary(found, blind)
    by_type = {f"image/{kind}": row for kind, row in types(found, blind).items()}
    return {"image": {**whole, "by_source": {"unseen scenes": whole}}, "by_type": by_type}


def test_the_table_shows_every_figure():
    found, blind = [answer(), answer("blue")], [answer("blue"), answer("blue")]
    lines = table(metrics_of(found, blind)).splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["IMAGE", "of", "colour"]
    assert all(line.split()[-4:] == ["0.500", "0.000", "0.500", "2"] for line in lines[1:])


# --- asking -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    """A random language model without encoders; weights large enough that its answers differ."""
    torch.manual_seed(0)
    llm = fresh_llm(
        TOKENIZER,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
        initializer_range=0.4,
    )
    return video_llava(llm).eval()


@pytest.fixture(scope="module")
def packer(tokenizer):
    return conversation_packer(SPECS, tokenizer)


def text_samples(tmp_path, questions):
    samples = [
        (
            f"k{i}",
            {"conversations": talk(question, "yes", ""), "question": {"type": "exist", "options": ["yes", "no"]}},
            [],
        )
        for i, question in enumerate(questions)
    ]
    write_source(tmp_path / "s", samples, per_shard=3)
    return list(read_samples(tmp_path / "s", sample_decoder(SPECS), REMEDY))


QUESTIONS = [
    "Is there a red circle?",
    "How many?",
    "What?",
    "Where is the large blue square?",
    "Is it left or right of it, or up?",
]


@pytest.mark.parametrize("batch_size", [2, 3, 5])
def test_questions_asked_together_get_the_answers_they_get_alone(tmp_path, model, packer, batch_size):
    samples = text_samples(tmp_path, QUESTIONS)
    alone = answer_all(model, packer, samples, 1, max_new_tokens=12)
    assert len({a.answer for a in alone}) > 1
    assert answer_all(model, packer, samples, batch_size, max_new_tokens=12) == alone


def test_an_answer_carries_what_the_record_says(tmp_path, model, packer):
    samples = text_samples(tmp_path, QUESTIONS)
    found = answer_all(model, packer, samples, 5, max_new_tokens=2)
    assert [(a.key, a.question, a.truth, a.type, a.options, a.medium) for a in found] == [
        (f"k{i}", question, "yes", "exist", ("yes", "no"), "text") for i, question in enumerate(QUESTIONS)
    ]


def test_greedy_answers_are_the_most_likely_continuation(tmp_path, model, packer):
    [sample] = text_samples(tmp_path, QUESTIONS[:1])
    [found] = answer_all(model, packer, [sample], 1, max_new_tokens=3)
    ids = list(packer.prompt(sample).token_ids)
    start = len(ids)
    for _ in range(3):  # one token at a time, from scratch, without a cache
        with torch.no_grad():
            ids.append(int(model.llm(torch.tensor([ids])).logits[0, -1].argmax()))
    assert packer.tokenizer.decode(ids[start:], skip_special_tokens=True).strip() == found.answer


def test_the_prompt_ends_where_the_answer_would_begin(tmp_path, packer):
    [sample] = text_samples(tmp_path, QUESTIONS[:1])
    assert packer.tokenizer.decode(packer.prompt(sample).token_ids).endswith("USER: Is there a red circle? ASSISTANT:")


def held_out(folder):
    return HeldOut("held_out", "", sources={"image": {"all": str(folder)}}, remedy=REMEDY)


def test_a_blind_question_shows_neither_the_medium_nor_its_place(tmp_path, model, packer):
    """A model without encoders can answer it, and it gets the answer of the same question without a medium."""
    media = [image_sample("a", 40), video_sample("b", 40)]
    write_source(tmp_path / "media", media, per_shard=2)
    write_source(tmp_path / "bare", [text_sample("a"), text_sample("b")], per_shard=2)
    seen, bare = (held_out(tmp_path / name).questions() for name in ("media", "bare"))
    asking = generate.Asking(model, packer, sample_decoder(SPECS), 8, batch_size=2, workers=0)
    found = [
        [one.text for one in generate.answer(asking, asked, Predictions(tmp_path, name, {}))]
        for name, asked in (("blind", list(map(blind, seen))), ("plain", bare))
    ]
    assert found[0] == found[1]
    assert [in_words(Answered(question, "")).medium for question in seen] == ["image", "video"]


def test_a_question_with_its_medium_fills_the_mediums_slots(tmp_path, packer):
    write_source(tmp_path / "s", [image_sample("a"), video_sample("b")], per_shard=2)
    samples = list(read_samples(tmp_path / "s", sample_decoder(SPECS), REMEDY))
    batch = pack([packer.prompt(sample) for sample in samples])
    assert (len(batch.image_slots), len(batch.video_slots)) == (16, 136)


def test_samples_are_read_in_their_order_up_to_the_limit(tmp_path):
    keys = write_source(tmp_path / "s", [text_sample(f"k{i}") for i in range(7)], per_shard=3)
    for limit in (None, 1, 4):
        found = [s.key for s in read_samples(tmp_path / "s", sample_decoder(SPECS), REMEDY, limit)]
        assert found == keys[:limit]


def test_an_evaluation_stops_at_a_broken_sample_and_names_it(tmp_path):
    broken = ("bad", {"conversations": talk()}, [("jpg", b"nothing")])
    write_source(tmp_path / "s", [image_sample("good"), broken], per_shard=2)
    with pytest.raises(UserError, match=r"00000.tar:bad: unreadable image"):
        list(read_samples(tmp_path / "s", sample_decoder(SPECS), REMEDY))


UNANSWERED = {
    "one turn": [{"from": "human", "value": "What colour is the square?"}],
    "three turns": [
        {"from": "human", "value": "What colour is the square?"},
        {"from": "gpt", "value": "red"},
        {"from": "human", "value": "And the shape?"},
    ],
}


@pytest.mark.parametrize("turns", UNANSWERED)
def test_a_question_without_an_answer_is_asked_and_not_scored(tmp_path, model, packer, turns):
    conversation = UNANSWERED[turns]
    write_source(tmp_path / "s", [("q", {"id": "q", "conversations": conversation}, [])], per_shard=1)
    samples = list(read_samples(tmp_path / "s", sample_decoder(SPECS), REMEDY, packer=packer))
    [found] = answer_all(model, packer, samples, 1, max_new_tokens=4)
    assert (found.question, found.truth) == (conversation[-1]["value"], None)
    assert not found.scored and not found.correct
    alone = ask(model, packer, samples, 4)
    assert found.answer == alone[0] != ""


def test_questions_without_an_answer_are_counted_apart():
    found = [answer("red"), answer("blue"), answer("red", None), answer("", None, "count")]
    blind = [answer("blue"), answer("red"), answer("red", None), answer("", None, "count")]
    assert summary(found, blind) == {"accuracy": 0.5, "blind": 0.5, "chance": 0.5, "n": 2, "unscored": 2}
    assert summary(found[2:], blind[2:]) == {"accuracy": None, "blind": None, "chance": None, "n": 0, "unscored": 2}
    assert types(found, blind)["count"]["unscored"] == 1
    assert table(metrics_of(found, blind)).splitlines()[-1].split() == ["count", "-", "-", "-", "0"]


def test_the_report_shows_that_a_question_was_not_scored(tmp_path):
    decode = sample_decoder(SPECS)
    write_source(tmp_path / "s", [image_sample("first", 40)], per_shard=1)
    samples = list(read_samples(tmp_path / "s", decode, REMEDY))
    answers = [answer("red", None, key="first")]
    write_report(tmp_path, "Run", metrics_of(answers, answers), sample_rows(samples, answers))
    words = Page((tmp_path / "report.html").read_text()).words
    assert "not scored" in words and "truth" not in words and "None" not in words


@pytest.mark.parametrize(
    ("question", "words"),
    [
        ("colour", '"question" is not of the form'),
        (["colour"], '"question" is not of the form'),
        (None, '"question" is not of the form'),
        ({"type": 5}, "type is not text but int"),
        ({"type": ["colour"]}, "type is not text but list"),
        ({"options": "red"}, "options are not a list of texts"),
        ({"options": {"red": 1}}, "options are not a list of texts"),
        ({"options": [1, 2]}, "options are not a list of texts"),
        ({"options": None}, "options are not a list of texts"),
    ],
)
def test_a_row_of_an_odd_kind_is_named_before_anything_is_asked(tmp_path, question, words):
    odd = ("odd", {"id": ["any"], "conversations": talk(placeholder=""), "question": question}, [])
    write_source(tmp_path / "s", [text_sample("good"), odd], per_shard=2)
    for read in (lambda a: held_out(a).questions(), lambda a: list(read_samples(a, sample_decoder(SPECS), REMEDY))):
        with pytest.raises(UserError, match=rf"00000.tar:odd: .*{words}"):
            read(tmp_path / "s")


@pytest.mark.parametrize(
    "conversation", [[], [{"from": "gpt", "value": "red"}], [{"from": "human", "value": 5}], "text", None, [5], {}]
)
def test_a_conversation_that_asks_nothing_is_named(tmp_path, packer, conversation):
    write_source(tmp_path / "s", [("odd", {"id": 1, "conversations": conversation}, [])], per_shard=1)
    with pytest.raises(UserError, match=r"00000.tar:odd: "):
        list(read_samples(tmp_path / "s", sample_decoder(SPECS), REMEDY, packer=packer))


@pytest.mark.parametrize("answered", [5, None, ["red"], {"value": "red"}])
def test_a_true_answer_that_is_no_text_is_named(tmp_path, answered):
    turns = [{"from": "human", "value": "Which?"}, {"from": "gpt", "value": answered}]
    write_source(tmp_path / "s", [("odd", {"id": 1, "conversations": turns}, [])], per_shard=1)
    with pytest.raises(UserError, match=r"00000.tar:odd: "):
        list(read_samples(tmp_path / "s", sample_decoder(SPECS), REMEDY))


def test_a_question_whose_media_do_not_fit_its_text_is_named_before_it_is_asked(tmp_path, packer):
    odd = ("odd", {"id": 1, "conversations": talk(placeholder="<image><image>")}, [("jpg", jpeg())])
    write_source(tmp_path / "s", [image_sample("good"), odd], per_shard=2)
    with pytest.raises(UserError, match=r"00000.tar:odd: "):
        list(read_samples(tmp_path / "s", sample_decoder(SPECS), REMEDY, packer=packer))


def ask_all(checkpoint, sources, run_dir):
    run_dir.mkdir(exist_ok=True)
    metrics = evaluate(str(checkpoint), {"image": sources}, str(run_dir), REMEDY, max_new_tokens=2, decoder="pyav")
    rows = [json.loads(line) for line in (run_dir / "answers.jsonl").read_text().splitlines()]
    assert json.loads((run_dir / "metrics.json").read_text()) == metrics and (run_dir / "report.html").is_file()
    return metrics, rows


def test_an_evaluation_asks_what_has_no_answer_and_says_so(checkpoint, tmp_path, capsys):
    without = [{"from": "human", "value": "<image>\nWhat colour is the square?"}]
    bare = ("q", {"id": "q", "conversations": without}, [("jpg", jpeg())])
    write_source(tmp_path / "bare", [bare], per_shard=1)
    write_source(tmp_path / "mixed", [image_sample("a"), bare], per_shard=2)
    metrics, rows = ask_all(checkpoint, {"one": str(tmp_path / "mixed")}, tmp_path / "run")
    assert (metrics["image"]["n"], metrics["image"]["unscored"]) == (1, 1)
    assert [(row["key"], row["truth"], row["correct"]) for row in rows] == [("a", "a circle", False), ("q", None, None)]
    assert rows[1]["question"] == "What colour is the square?"
    assert "1 of 2 questions have no true answer: asked, not scored" in capsys.readouterr().out
    metrics, rows = ask_all(checkpoint, {"one": str(tmp_path / "bare")}, tmp_path / "run")
    assert (metrics["image"]["accuracy"], metrics["image"]["n"], len(rows)) == (None, 0, 1)


def test_an_odd_row_of_the_last_source_is_named_before_the_first_is_asked(checkpoint, tmp_path, monkeypatch):
    odd = ("odd", {"id": 1, "conversations": talk(), "question": {"options": "red"}}, [("jpg", jpeg())])
    write_source(tmp_path / "good", [image_sample("a")], per_shard=1)
    write_source(tmp_path / "odd", [odd], per_shard=1)
    monkeypatch.setattr("vllava.evaluation.generate.answer", None)
    with pytest.raises(UserError, match=r"odd/00000.tar:odd: the question's options are not a list of texts"):
        ask_all(checkpoint, {"one": str(tmp_path / "good"), "two": str(tmp_path / "odd")}, tmp_path / "run")


def test_missing_questions_are_an_error_that_ends_with_the_remedy(tmp_path):
    with pytest.raises(UserError, match=r"data_prep\.toy eval"):
        list(read_samples(tmp_path / "nowhere", sample_decoder(SPECS), REMEDY))


# --- the report -------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Every address a page refers to, its tags and its text."""

    def __init__(self, text):
        super().__init__()
        self.addresses, self.tags, self.words = [], set(), ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href", "srcset", "data", "action")]

    def handle_data(self, data):
        self.words += data


@pytest.fixture
def report(tmp_path):
    """The report of an image and a video, one answered with markup."""
    decode = sample_decoder(SPECS)
    write_source(tmp_path / "s", [image_sample("first", 40), video_sample("second", 90)], per_shard=2)
    samples = list(read_samples(tmp_path / "s", decode, REMEDY))
    nasty = "<script>alert('1')</script> & <b>"
    answers = [
        answer(nasty, "red", key="first", question="Is <i> there?"),
        answer("left", "left", "direction", medium="video", key="<second>"),
    ]
    plot = tmp_path / "loss.png"
    plot.write_bytes(jpeg())
    rows = sample_rows(samples, answers)
    metrics = metrics_of(answers, answers)
    write_report(tmp_path, "Run <1>", metrics, rows, {"stage 1": plot, "lost": tmp_path / "no.png"}, {"a fact": "<u>"})
    return (tmp_path / "report.html").read_text()


def test_the_report_needs_no_other_file(report):
    page = Page(report)
    assert page.addresses and all(address.startswith("data:image/") for address in page.addresses)
    assert not page.tags & {"script", "link", "iframe", "object", "embed", "base"}
    assert not re.search(r"https?:|url\(|@import", report)


def test_the_report_escapes_what_it_quotes(report):
    assert html.escape("<script>alert('1')</script> & <b>", quote=False).split("'")[0] in report
    page = Page(report)
    assert not page.tags & {"script", "b", "i", "u", "second"}
    for quoted in ("<script>alert('1')</script> & <b>", "Is <i> there?", "<second>", "Run <1>", "<u>"):
        assert quoted in page.words


def test_the_report_shows_the_image_eight_frames_and_the_plot_that_exists(report):
    assert len(Page(report).addresses) == 1 + 8 + 1


def test_the_report_gives_the_truth_beside_a_wrong_answer_only(report):
    assert report.count("truth: ") == 1
    assert "truth: red" in report


def test_the_report_draws_every_accuracy_with_its_interval_beside_blind_and_chance(tmp_path):
    """75 of 100 are right, of which Wilson's interval is worked out below."""
    row = {"accuracy": 0.75, "blind": 0.3, "chance": None, "n": 100}
    metrics = {"image": {**row, "by_source": {"<seen>": row}}, "by_type": {"image/colour": row}}
    write_report(tmp_path, "Run", metrics, [])
    page = (tmp_path / "report.html").read_text()
    bars = re.findall(r'<div class="bar".*?</div></div>', page, re.S)
    assert len(bars) == 1 + 3  # the medium by itself, then every line of the table
    z = 1.959964
    middle, reach = 0.75 + z**2 / 200, z * math.sqrt(0.75 * 0.25 / 100 + z**2 / 40000)
    low, high = ((middle + sign * reach) / (1 + z**2 / 100) for sign in (-1, 1))
    for one in bars:
        assert re.findall(r'class="value" style="width: ([\d.]+)%', one) == ["75.0"]
        between = [float(part) for part in re.search(r'between" style="left: (.*?)%; width: (.*?)%', one).groups()]
        assert between == pytest.approx([100 * low, 100 * (high - low)], abs=0.006)
        assert re.findall(r'class="mark (\w+)" style="left: ([\d.]+)%', one) == [("blind", "30.0")]
    assert page.count(f"{low:.3f} to {high:.3f}") == len(bars)


def test_the_report_draws_no_bar_where_nothing_was_scored(tmp_path):
    row = {"accuracy": None, "blind": None, "chance": None, "n": 0}
    write_report(tmp_path, "Run", {"image": {**row, "by_source": {}}, "by_type": {}}, [])
    assert '<div class="bar"' not in (tmp_path / "report.html").read_text()


def test_pictures_in_the_report_are_what_the_model_saw(tmp_path):
    decode = sample_decoder(SPECS)
    write_source(tmp_path / "s", [image_sample("a", 40), video_sample("b", 200)], per_shard=2)
    image, video = (pictures(s) for s in read_samples(tmp_path / "s", decode, REMEDY))
    assert [len(image), len(video)] == [1, 8]
    for shown, shade in ((image, 40), (video, 200)):
        assert all(abs(value - shade) <= 3 for picture in shown for value in picture.getpixel((20, 30)))
