"""The image benchmarks' figures, worked out by hand, and the files that their servers take."""

import io
import json
import math

import benchmark_fixtures as fixtures
import pytest
from benchmark_fixtures import (
    LAYOUTS,
    LETTER,
    PREPARED,
    SHORT,
    UNANSWERABLE,
    answered,
    asked,
    benchmark,
    damaged,
    figures,
    settings,
)
from openpyxl import load_workbook

from vllava.errors import UserError

# --- VQAv2 ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_vqav2_val_is_scored_as_the_server_scores_an_upload(layout, tmp_path):
    found, questions = asked("vqav2_val", layout, tmp_path)
    assert questions[0].prompt == "Is it red?" + SHORT
    # All ten say yes: 1. Three of ten say 2, one of them in a word: 0.9. All ten say "stop sign.", and an upload has no
    # full stop: 0. The last could not be asked: 0.
    rows = found.rows(answered(questions, {"11": "Yes.", "12": "Two", "21": "stop sign."}), {})
    assert figures(found, rows)["accuracy"] == pytest.approx(100 * (1 + 0.9 + 0 + 0) / 4)
    assert figures(found, rows, "answer_type/number")["accuracy"] == pytest.approx(90)
    assert figures(found, rows, "answer_type/other")["accuracy"] == 0
    assert rows[0].cluster == rows[1].cluster != rows[2].cluster == rows[3].cluster


@pytest.mark.parametrize("layout", LAYOUTS)
def test_vqav2_s_upload_has_all_ids_of_test2015_and_processed_answers(layout, tmp_path):
    found, questions = asked("vqav2", layout, tmp_path)
    assert found.metrics == () and found.paper == {"accuracy": 74.7}
    replies = {"11": "The Cat.", "12": "none", "21": "two dogs"}
    upload = found.exports(answered(questions, replies))["vqav2_upload.json"]
    assert upload == [
        {"question_id": 5, "answer": ""},  # not asked: of test2015 alone
        {"question_id": 11, "answer": "cat"},
        {"question_id": 12, "answer": "0"},
        {"question_id": 21, "answer": "2 dogs"},
        {"question_id": 22, "answer": ""},  # could not be asked
    ]
    with pytest.raises(UserError, match="1 questions of VQAv2's test-dev have no answer, 22 is one"):
        found.exports(answered(questions, replies)[:3])


def test_vqav2_says_where_an_upload_will_lack_ids(tmp_path):
    fixtures.vqav2_files(tmp_path)
    (tmp_path / "vqav2" / "llava_vqav2_mscoco_test2015.jsonl").unlink()
    found = benchmark("vqav2", tmp_path)
    questions = found.questions()
    assert "does not tell all ids of test2015" in found.warnings[0]
    assert len(found.exports(answered(questions, {}))["vqav2_upload.json"]) == 4


def test_the_paper_s_figure_stands_beside_its_own_split_alone(tmp_path):
    assert benchmark("vqav2", tmp_path, split="val").paper == {}
    with pytest.raises(Exception, match=r"benchmark\.split='tst' is not known"):
        benchmark("vizwiz", tmp_path, split="tst")


# --- GQA --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gqa_wants_the_very_answer_but_for_case_and_full_stops_at_its_end(layout, tmp_path):
    found, questions = asked("gqa", layout, tmp_path)
    rows = found.rows(answered(questions, {"201": "No..", "202": "the left", "203": "Dining table", "204": "x"}), {})
    # Question 204 is not among the balanced ones: it is asked and does not count.
    assert figures(found, rows)["accuracy"] == pytest.approx(100 * 2 / 3)
    assert figures(found, rows, "binary")["accuracy"] == 50
    assert figures(found, rows, "open")["accuracy"] == 100
    groups = {"structural/query", "semantic/obj", "detailed/objFine", "open", "steps/2", "words/3"}
    assert set(rows[2].groups) == groups


def test_gqa_counts_steps_as_its_script_does_without_those_that_only_ask(tmp_path):
    fixtures.gqa_files(tmp_path)
    path = tmp_path / "gqa" / "data" / "testdev_balanced_questions.json"
    steps = {  # operation: argument, with "exist", "query: name" or "choose name" anywhere in it
        "201": [("select", "sky"), ("verify color", "dark"), ("exist", "?")],
        "202": [("select", "chair"), ("choose name", "left|right"), ("choose rel", "left|right")],
        "203": [("select", "table"), ("query", "name")],
    }
    program = {id: [{"operation": o, "argument": a} for o, a in steps.get(id, [])] for id in fixtures.GQA}
    known = json.loads(path.read_text())
    path.write_text(json.dumps({id: {**known[id], "semantic": program[id]} for id in known}))
    found = {question.id: question.about["groups"] for question in benchmark("gqa", tmp_path).questions()}
    assert ["steps/2" in found["201"], "steps/2" in found["202"], "steps/1" in found["203"]] == [True] * 3
    path.write_text(json.dumps({id: {**known[id], "semantic": ["select: it"]} for id in known}))
    with pytest.raises(UserError, match="201: the types or the semantic steps"):
        benchmark("gqa", tmp_path).questions()


def test_gqa_s_converted_predictions_have_every_question(tmp_path):
    found, questions = asked("gqa", "files", tmp_path)
    converted = found.exports(answered(questions, {"201": "No.", "202": "Left side.."}))
    assert converted["testdev_balanced_predictions.json"] == [
        {"questionId": "201", "prediction": "no"},
        {"questionId": "202", "prediction": "left side"},
        {"questionId": "203", "prediction": ""},
        {"questionId": "204", "prediction": ""},
    ]


def test_gqa_refuses_a_file_that_lacks_a_balanced_question(tmp_path):
    error, _ = damaged("gqa", tmp_path, lambda lines: lines[1:])
    assert "1 balanced questions" in error and "'201'" in error


# --- VizWiz -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_vizwiz_val_compares_answers_in_one_form(layout, tmp_path):
    found, questions = asked("vizwiz_val", layout, tmp_path)
    assert questions[0].prompt == "What is this?" + UNANSWERABLE + SHORT
    names = [question.id for question in questions]
    # Six say unanswerable: 1. none and zero are both 0, of four: 1. One says blue: 0.3.
    rows = found.rows(answered(questions, dict(zip(names, ["Unanswerable.", "None", "Blue"], strict=True))), {})
    assert figures(found, rows)["accuracy"] == pytest.approx(100 * (1 + 1 + 0.3) / 3)
    assert figures(found, rows, "answer_type/other") == figures(found, rows)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_vizwiz_s_upload_is_in_the_order_of_its_questions(layout, tmp_path):
    found, questions = asked("vizwiz", layout, tmp_path)
    replies = {questions[0].id: "Unanswerable", questions[2].id: "The Navy."}
    assert found.exports(answered(questions, replies))["vizwiz_upload.json"] == [
        {"image": "VizWiz_test_00000000.jpg", "answer": "unanswerable"},
        {"image": "VizWiz_test_00000001.jpg", "answer": ""},
        {"image": "VizWiz_test_00000002.jpg", "answer": "navy"},
    ]


def test_vizwiz_refuses_a_file_that_lacks_a_question_of_the_official_list(tmp_path):
    error, _ = damaged("vizwiz", tmp_path, lambda lines: lines[:2])
    assert "VizWiz_test_00000002.jpg" in error


# --- ScienceQA --------------------------------------------------------------------------------------------------------


def test_scienceqa_s_headline_is_over_questions_with_an_image(tmp_path):
    found, questions = asked("science_qa", "files", tmp_path)
    assert questions[2].media == () and questions[2].prompt == "Which word is a verb?\nA. run\nB. sun" + LETTER
    # With an image: right, a letter that is no choice (wrong), and one that could not be asked. Without: unparsed.
    rows = found.rows(answered(questions, {"4": "The answer is B.", "5": "D. shark", "7": "a"}), {})
    assert figures(found, rows) == pytest.approx(
        {"accuracy": 100 / 3, "all_accuracy": 100 / 4, "unparsed": 100 / 4}, nan_ok=True
    )
    assert figures(found, rows, "subject/natural science")["all_accuracy"] == pytest.approx(100 / 3)


def test_scienceqa_from_tables_takes_those_with_an_image(tmp_path):
    found, questions = asked("science_qa", "tables", tmp_path, expected=4241)
    assert [question.id for question in questions] == ["0", "1", "2"]
    assert questions[1].prompt == fixtures.science_prompt("5") + LETTER
    rows = found.rows(answered(questions, {"0": "B", "1": "C. whale", "2": ""}), {})
    assert figures(found, rows) == pytest.approx({"accuracy": 200 / 3, "all_accuracy": 200 / 3, "unparsed": 100 / 3})


def test_scienceqa_says_which_questions_of_its_split_are_not_asked(tmp_path):
    fixtures.science_qa_files(tmp_path)
    fixtures.write_json(tmp_path / "scienceqa" / "pid_splits.json", {"test": ["4", "5", "7", "8", "99"]})
    found = benchmark("science_qa", tmp_path)
    found.questions()
    assert "1 questions of" in found.warnings[0] and "99" in found.warnings[0]


# --- TextVQA ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_textvqa_gives_an_answer_what_it_is_worth_to_ten_people(layout, tmp_path):
    found, questions = asked("text_vqa", layout, tmp_path)
    prompts = {question.id: question.prompt for question in questions}
    assert prompts["901"] == "What brand is it?\nReference OCR token: NOKIA, 3310" + SHORT
    assert prompts["902"] == "What number?\nReference OCR token: " + SHORT
    # Four say nokia: 1. Three say 1000, with a comma or without: 0.9. Two say john 's, once with an article: 0.6.
    rows = found.rows(answered(questions, {"901": "Nokia.", "902": "1000", "903": "John's"}), {})
    assert figures(found, rows)["accuracy"] == pytest.approx(100 * (1 + 0.9 + 0.6) / 3)
    assert len({row.cluster for row in rows}) == 2


def test_textvqa_knows_all_forms_of_prepared_prompts(tmp_path):
    def change(lines):
        whose, number, brand = map(json.loads, lines)
        whose["text"] = f"Reference OCR token: x\n{'Whose shop?'}{SHORT}"
        brand["text"] = "OCR tokens: A Question: What brand is it? Short answer:"
        return map(json.dumps, (whose, number, brand))

    fixtures.text_vqa_files(tmp_path)
    path = tmp_path / PREPARED["text_vqa"]
    path.write_text("\n".join(change(path.read_text().splitlines())))
    assert [question.id for question in benchmark("text_vqa", tmp_path).questions()] == ["903", "902", "901"]


@pytest.mark.parametrize(
    ("text", "said"),
    [("one line", "none of the known forms"), ("a\nb\nc\nd", "none of the known forms"), (f"Who?{SHORT}", "'who?'")],
)
def test_textvqa_refuses_a_prompt_whose_question_is_not_known(text, said, tmp_path):
    error, path = damaged("text_vqa", tmp_path, lambda lines: [json.dumps(json.loads(lines[0]) | {"text": text})])
    assert f"{path}:1: " in error and said in error


def test_textvqa_takes_the_answers_of_a_question_that_is_asked_twice_in_turn(tmp_path):
    fixtures.text_vqa_files(tmp_path)
    folder = tmp_path / "textvqa"
    known = json.loads((folder / "TextVQA_0.5.1_val.json").read_text())
    again = {**known["data"][0], "question_id": 999, "answers": ["other"] * 10}
    fixtures.write_json(folder / "TextVQA_0.5.1_val.json", {"data": [*known["data"], again]})
    path = tmp_path / PREPARED["text_vqa"]
    path.write_text(path.read_text() + path.read_text().splitlines()[-1])
    questions = benchmark("text_vqa", tmp_path).questions()
    assert [question.id for question in questions] == ["903", "902", "901", "999"]
    assert questions[3].truth == ["other"] * 10


def test_textvqa_refuses_a_question_without_ten_answers(tmp_path):
    fixtures.text_vqa_files(tmp_path)
    path = tmp_path / "textvqa" / "TextVQA_0.5.1_val.json"
    known = json.loads(path.read_text())
    known["data"][1]["answers"].pop()
    path.write_text(json.dumps(known))
    with pytest.raises(UserError, match="data, record 1: there are not 10 answers"):
        benchmark("text_vqa", tmp_path).questions()


# --- POPE -------------------------------------------------------------------------------------------------------------

# adversarial: hit, false yes (unparsed), false no, right no. popular: hit, right no. random: hit, right no, and one
# that could not be asked, whose truth is yes.
POPE_REPLIES = {
    "adversarial/1": "Yes",
    "adversarial/2": "",
    "adversarial/3": "No, there is not.",
    "adversarial/4": "No",
    "popular/1": "Yes, there is.",
    "popular/2": "no",
    "random/1": "yes",
    "random/2": "There is not. Yes",
}


@pytest.mark.parametrize("layout", [*LAYOUTS, "one_table"])
def test_pope_s_figures_are_means_of_the_three_settings(layout, tmp_path):
    found, questions = asked("pope", layout, tmp_path)
    rows = found.rows(answered(questions, POPE_REPLIES), {})
    assert figures(found, rows) == pytest.approx(
        {
            "accuracy": 100 * (2 / 4 + 2 / 2 + 2 / 3) / 3,
            "f1": 100 * (2 / 4 + 2 / 2 + 2 / 3) / 3,  # 2 hits / (2 hits + false yes + false no): 2/4, 2/2, 2/3
            "precision": 100 * (1 / 2 + 1 + 1) / 3,
            "recall": 100 * (1 / 2 + 1 + 1 / 2) / 3,
            "yes": 100 * (2 / 4 + 1 / 2 + 1 / 3) / 3,
            "unparsed": 100 * (1 / 4) / 3,
        }
    )
    assert figures(found, rows, "setting/adversarial")["precision"] == pytest.approx(50)
    assert figures(found, rows, "setting/random")["accuracy"] == pytest.approx(200 / 3)
    assert len({row.cluster for row in rows}) == 2  # images, in whatever setting


def test_pope_s_figure_is_undefined_where_nothing_divides(tmp_path):
    found, questions = asked("pope", "files", tmp_path)
    rows = found.rows(answered(questions, {question.id: "No" for question in questions}), {})
    found_figures = figures(found, rows)
    assert found_figures["precision"] != found_figures["precision"]  # it never said yes
    assert (found_figures["recall"], found_figures["f1"], found_figures["yes"]) == (0, 0, 0)


def test_pope_refuses_a_question_without_a_label_and_says_labels_without_a_question(tmp_path):
    def change(lines):
        return [*lines[1:], lines[1]]

    error, _ = damaged("pope", tmp_path, change)
    assert "'Is there a cat in the image?" in error and "no label" in error
    path = tmp_path / PREPARED["pope"]
    path.write_text("\n".join(path.read_text().splitlines()[:-1]))
    found = benchmark("pope", tmp_path)
    found.questions()
    assert found.warnings[0].startswith("1 labels of adversarial are of no question")


@pytest.mark.parametrize("number", [8910, 9000])
def test_both_published_numbers_of_pope_are_right(number, tmp_path):
    line = {"image": "x.jpg", "category": "random"}
    texts = [f"Is there a thing {n} in the image?" for n in range(number)]
    lines = [{**line, "question_id": n, "text": text + SHORT} for n, text in enumerate(texts)]
    fixtures.write_jsonl(tmp_path / "llava_pope_test.jsonl", lines)
    fixtures.write_jsonl(
        tmp_path / "coco" / "coco_pope_random.json", [{**line, "text": text, "label": "no"} for text in texts]
    )
    for setting in ("adversarial", "popular"):
        fixtures.write_jsonl(tmp_path / "coco" / f"coco_pope_{setting}.json", [])
    fixtures.write_images(tmp_path / "val2014", "x.jpg")
    found = benchmark("pope", tmp_path, expected=settings("pope").expected)
    assert len(found.questions()) == number and found.warnings == []


# --- MMBench ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_mmbench_wants_every_order_of_the_options_to_be_right(layout, tmp_path):
    found, questions = asked("mmbench", layout, tmp_path)
    assert questions[0].prompt == "Look.\nWhat is it?\nA. cat\nB. dog" + LETTER
    assert questions[2].prompt == "Which\ncolour?\nA. red\nB. NA\nC. None" + LETTER  # neither is a missing option
    replies = {"7": "B.", "1000007": "a dog", "9": "A", "1000009": "C", "2000009": "I cannot tell"}
    rows = found.rows(answered(questions, replies), {})
    # Question 7: a letter and the text of the only option in it. Question 9: its third order is not answered.
    assert figures(found, rows) == pytest.approx({"accuracy": 50, "vanilla_accuracy": 100, "unparsed": 100 / 5})
    assert figures(found, rows, "category/object")["accuracy"] == 100
    assert figures(found, rows, "l2-category/attribute group")["accuracy"] == 0
    assert [row.cluster for row in rows] == [questions[0].media[0].key, questions[2].media[0].key]


def test_mmbench_counts_an_order_that_could_not_be_asked_as_wrong(tmp_path):
    found, questions = asked("mmbench", "files", tmp_path)
    rows = found.rows(answered(questions, {"7": "B", "9": "A", "1000009": "C", "2000009": "B"}), {})
    assert figures(found, rows) == pytest.approx({"accuracy": 50, "vanilla_accuracy": 100, "unparsed": 0})


def test_mmbench_counts_a_question_only_where_all_its_orders_were_asked(tmp_path):
    found, questions = asked("mmbench", "files", tmp_path)
    replies = {"7": "B", "1000007": "A", "9": "A", "1000009": "C", "2000009": "B"}
    rows = found.rows(answered(questions, replies)[:3], {})  # of question 9 one order of three
    assert [row.values["complete"] for row in rows] == [1, 0]
    assert figures(found, rows) == pytest.approx({"accuracy": 100, "vanilla_accuracy": 100, "unparsed": 0})
    rows = found.rows(answered(questions, replies | {"1000007": "C"})[1:2], {})
    assert rows[0].values["complete"] == rows[0].values["first"] == 0
    assert all(math.isnan(figures(found, rows)[name]) for name in ("accuracy", "vanilla_accuracy"))


def test_mmbench_in_another_language_is_not_taken_for_the_english_one(tmp_path):
    fixtures.mmbench_tables(tmp_path)
    (tmp_path / "en" / "dev-00000-of-00001.parquet").unlink()
    with pytest.raises(UserError, match=r"cn.*in Chinese"):
        benchmark("mmbench", tmp_path).questions()


def test_mmbench_s_images_may_be_another_row_s(tmp_path):
    fixtures.mmbench_files(tmp_path, reference=True)
    questions = benchmark("mmbench", tmp_path).questions()
    assert [question.media[0].read() for question in questions] == [b"the image p1"] * 2 + [b"the image p2"] * 3


def test_mmbench_without_answers_has_no_figures_and_says_so(tmp_path):
    fixtures.mmbench_files(tmp_path)
    path = tmp_path / "mmbench" / "mmbench_dev_20230712.tsv"
    path.write_text(path.read_text().replace("\tanswer\t", "\tsolution\t"))
    found = benchmark("mmbench", tmp_path)
    questions = found.questions()
    assert found.metrics == () and "5 rows have no answer" in found.warnings[0]
    assert found.rows(answered(questions, {}), {}) == []


def test_mmbench_s_upload_is_the_table_its_server_took(tmp_path):
    found, questions = asked("mmbench", "files", tmp_path)
    upload = found.exports(answered(questions, {"7": "=B\x07", "9": "A"}))["mmbench_upload.xlsx"]
    rows = list(load_workbook(io.BytesIO(upload)).active.iter_rows(values_only=True))
    assert rows[0] == ("index", "question", "A", "B", "C", "D", "prediction", "answer", "split")
    assert rows[1] == (7, "What is it?", "cat", "dog", None, None, "=B", "B", "dev")
    assert [row[6] for row in rows[1:]] == ["=B", None, "A", None, None]


def test_mmbench_names_a_row_that_is_cut(tmp_path):
    fixtures.mmbench_files(tmp_path)
    path = tmp_path / "mmbench" / "mmbench_dev_20230712.tsv"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:2], lines[2][:12]]))
    with pytest.raises(UserError, match=rf"{path}:3: the row has 2 cells, the header 14"):
        benchmark("mmbench", tmp_path).questions()


def test_mmbench_names_a_quote_that_is_never_closed(tmp_path):
    path = tmp_path / "mmbench" / "mmbench_dev_20230712.tsv"
    fixtures.mmbench_files(tmp_path)
    path.write_text(path.read_text() + '9\t"who')
    with pytest.raises(UserError, match=rf"{path}:\d+: .*unexpected end of data"):
        benchmark("mmbench", tmp_path).questions()


def test_mmbench_reads_a_cell_with_a_separator_of_lines_that_is_none_here(tmp_path):
    fixtures.mmbench_files(tmp_path)
    path = tmp_path / "mmbench" / "mmbench_dev_20230712.tsv"
    path.write_text(path.read_text().replace("What is it?", "What is\u2028it?"))
    question = benchmark("mmbench", tmp_path).questions()[1]
    assert "What is\u2028it?" in question.prompt and question.media[0].read() == b"the image p1"


def test_mmbench_needs_to_know_which_file_is_meant(tmp_path):
    fixtures.mmbench_files(tmp_path)
    folder = tmp_path / "mmbench"
    (folder / "mmbench_dev_cn_20231003.tsv").write_text("index\tquestion\n")
    assert len(benchmark("mmbench", tmp_path).questions()) == 5
    (folder / "mmbench_dev_20230712.tsv").rename(folder / "mmbench_dev_en_20231003.tsv")
    assert len(benchmark("mmbench", tmp_path).questions()) == 5
    (folder / "MMBench_DEV_EN.tsv").write_text("index\tquestion\n")
    with pytest.raises(UserError, match=r"one file mmbench_dev_….tsv is needed"):
        benchmark("mmbench", tmp_path).questions()
