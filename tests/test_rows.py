"""Rows of annotations become records and media, or are rejected with a reason."""

import base64
import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shard_fixtures import turns

from data_prep.dataset import Dataset, Fields
from data_prep.rows import MediaRef, draft
from vllava.data.record import parse
from vllava.errors import UserError

ROOT = Path("/data/set")
JPEG = b"\xff\xd8\xff\xe0 a picture"
MP4 = b"\0\0\0\x20ftypisom a film"


def dataset(**settings):
    return Dataset(**{"name": "mine", "root": ROOT, "annotations": ("a.json",), **settings})


def texts(row, **settings):
    return [turn["value"] for turn in draft(row, dataset(**settings)).record["conversations"]]


def media(row, **settings):
    return [(ref.kind, str(ref.path.relative_to(ROOT))) for ref in draft(row, dataset(**settings)).media]


def why(row, **settings):
    with pytest.raises(UserError) as error:
        draft(row, dataset(**settings))
    return error.value.paragraph


def members(made):
    """The files of a sample as a shard holds them, with pictures and films for media."""
    files = {"json": json.dumps(made.record).encode()}
    kinds = {"image": ("jpg", JPEG), "video": ("mp4", MP4)}
    return files | {f"{n}.{kinds[ref.kind][0]}": kinds[ref.kind][1] for n, ref in enumerate(made.media)}


# --- the published data sets ------------------------------------------------------------------------------------------


def test_a_row_of_llava_pretrain_becomes_a_record_with_its_image_in_a_nested_folder():
    row = {
        "id": "004539375",
        "image": "00453/004539375.jpg",
        "conversations": turns("Render a clear and concise summary of the photo.\n<image>", "select luxury furniture"),
    }
    made = draft(row, dataset(images="images"))
    assert made.record == {"id": "004539375", "source": "mine", "conversations": row["conversations"]}
    assert made.media == [MediaRef("image", ROOT / "images/00453/004539375.jpg", None, "00453/004539375.jpg")]


@pytest.mark.parametrize(
    "value", ["<video>\nWrite a terse summary.", "<image>\nWrite a terse summary.", "Write a terse summary."]
)
def test_a_video_is_shown_by_its_placeholder_by_that_of_an_image_or_by_none(value):
    row = {"id": 0, "video": "valley/000001_000050/1066674784.mp4", "conversations": turns(value, "Aerial view.")}
    assert texts(row) == ["<video>\nWrite a terse summary.", "Aerial view."]
    assert media(row) == [("video", "valley/000001_000050/1066674784.mp4")]


def test_one_placeholder_of_an_image_for_each_frame_is_one_video():
    row = {"video": "a.mp4", "conversations": turns("<image>\n" * 8 + "What happens?", "A door opens.")}
    assert texts(row) == ["<video>\nWhat happens?", "A door opens."]


def test_a_text_only_row_has_no_media():
    row = {"id": "wgByO4Y_0", "model": "", "conversations": turns("Who are you?", "A model.")}
    assert media(row) == []
    assert draft(row, dataset()).record["id"] == "wgByO4Y_0"


def test_a_question_of_video_instruct_finds_its_video_by_the_id():
    row = {"q": "What is he doing?", "a": "Skating.", "video_id": "v_k_ZXmr8pmrs"}
    assert texts(row) == ["<video>\nWhat is he doing?", "Skating."]
    assert media(row, videos_by_id="Activity_Videos") == [("video", "Activity_Videos/v_k_ZXmr8pmrs")]


# --- own data ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "kept"),
    [("a", "a"), (7, 7), (1.5, "1.5"), (True, "True"), (["x", 1], "['x', 1]"), (b"k", "b'k'"), ("\ud800", "\\ud800")],
)
def test_an_id_is_a_number_or_a_text(given, kept):
    made = draft({"id": given, "conversations": turns("Hi", "Ho")}, dataset())
    assert made.record["id"] == kept
    assert json.loads(json.dumps(made.record).encode())["id"] == kept


@pytest.mark.parametrize("row", [{}, {"id": None}])
def test_a_row_without_an_id_has_none(row):
    assert "id" not in draft({**row, "conversations": turns("Hi", "Ho")}, dataset()).record


@pytest.mark.parametrize(
    "named",
    [
        {"image": "a.jpg"},
        {"image": ["a.jpg"]},
        {"images": ["a.jpg"]},
        {"images": "a.jpg", "image": None},
        {"image": "a.jpg", "images": ["a.jpg"], "video": ""},
        {"image": {"bytes": None, "path": "a.jpg"}},
        {"image": "file:///data/set/a.jpg"},
        {"image": "/data/set/a.jpg"},
        {"image": "./b/../a.jpg", "videos": []},
        {"image": [["a.jpg"]]},
        {"image": "a.jpg", "video": float("nan")},
    ],
)
def test_every_way_to_name_an_image_is_read(named):
    row = {**named, "conversations": turns("<image>\nWhat?", "A cat.")}
    assert media(row) == [("image", "a.jpg")]


def test_names_are_kept_as_they_are_written():
    names = ["Ünï cödé/图片 1.JPG", "a%20b#c?.jpg", "sub\\win.jpg", "UPPER/CASE.JPEG"]
    row = {"image": names, "conversations": turns("<image>" * 4, "Four.")}
    assert [ref.name for ref in draft(row, dataset()).media] == names
    assert [path for _, path in media(row)] == [names[0], names[1], "sub/win.jpg", names[3]]


def test_a_file_uri_may_be_quoted():
    row = {"image": "file:///data/set/%C3%9C%20b.jpg", "conversations": turns("<image>", "A.")}
    assert media(row) == [("image", "Ü b.jpg")]
    row = {"image": "file://localhost/data/set/%FF?.jpg", "conversations": turns("<image>", "A.")}
    assert media(row) == [("image", "\udcff?.jpg")]  # a name that is no UTF-8


@pytest.mark.parametrize(
    "value",
    [
        "data:image/jpeg;base64," + base64.b64encode(JPEG).decode(),
        {"bytes": JPEG, "path": "somewhere/a.jpg"},
        {"bytes": JPEG, "path": None},
        JPEG,
        bytearray(JPEG),
    ],
)
def test_media_in_the_row_are_bytes(value):
    for row in (
        {"image": value, "question": "What?", "answer": "A cat."},
        {"images": [value], "conversations": turns("<image>\nWhat?", "A cat.")},
        {"messages": [{"role": "user", "content": [{"type": "image", "image": value}, "What?"]},
                      {"role": "assistant", "content": "A cat."}]},
    ):  # fmt: skip
        made = draft(row, dataset())
        assert made.media == [MediaRef("image", None, JPEG, "image 1 of the row")]
        assert [turn["value"] for turn in made.record["conversations"]] == ["<image>\nWhat?", "A cat."]


def test_long_base64_without_a_scheme_is_a_picture():
    data = JPEG + bytes(1000)
    row = {"image": base64.b64encode(data).decode(), "question": "What?", "answer": "Noise."}
    assert draft(row, dataset()).media[0].data == data


def test_media_come_in_the_order_of_their_placeholders():
    row = {
        "video": ["1.mp4", "2.mp4"],
        "image": ["a.jpg", "b.jpg"],
        "conversations": turns("<video><image>\nFirst", "One.", "<image> then <video>", "Two."),
    }
    assert [name for _, name in media(row)] == ["1.mp4", "a.jpg", "b.jpg", "2.mp4"]


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "image": "a.jpg"},
        {"type": "image", "path": "a.jpg"},
        {"type": "image", "url": "file:///data/set/a.jpg"},
        {"type": "image_url", "image_url": {"url": "a.jpg"}},
        {"type": "input_image", "image_url": "a.jpg"},
        {"image": "a.jpg"},
        {"type": "image", "text": None, "image": "a.jpg", "video": None},
    ],
)
def test_content_parts_name_their_media(part):
    content = [{"type": "text", "text": "Look:"}, part, {"type": "text", "text": "What is it?"}]
    row = {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "A cat."}]}
    assert texts(row) == ["Look:\n<image>\nWhat is it?", "A cat."]
    assert media(row) == [("image", "a.jpg")]


def test_parts_without_a_name_stand_for_the_media_beside_the_turns():
    content = [{"type": "video"}, {"type": "image"}, {"type": "text", "text": "Compare."}]
    row = {
        "images": ["a.jpg"],
        "videos": ["b.mp4"],
        "messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "Same."}],
    }
    assert texts(row)[0] == "<video>\n<image>\nCompare."
    assert media(row) == [("video", "b.mp4"), ("image", "a.jpg")]


def test_placeholders_in_the_text_say_where_the_media_of_parts_stand():
    content = [{"type": "image", "image": "a.jpg"}, {"type": "text", "text": "What is <image> here?"}]
    row = {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "A cat."}]}
    assert texts(row)[0] == "What is <image> here?"
    assert media(row) == [("image", "a.jpg")]


def test_system_texts_are_kept_wherever_they_stand():
    expected = [{"from": "system", "value": "Be brief."}, *turns("Hi", "Ho")]
    for row in (
        {"system": "Be brief.", "conversations": turns("Hi", "Ho")},
        {"conversations": expected},
        {"messages": [{"role": "System", "content": [{"type": "text", "text": "Be brief."}]},
                      {"role": "USER", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]},
    ):  # fmt: skip
        assert draft(row, dataset()).record["conversations"] == expected


@pytest.mark.parametrize(
    "row",
    [
        {"question": "What?", "answer": "A cat."},
        {"q": "What?", "a": "A cat."},
        {"Q": "What?", "A": "A cat.", "question": None},
        {"qa": [{"q": "What?", "a": "A cat."}]},
    ],
)
def test_questions_and_answers_are_conversations(row):
    assert texts({**row, "image": "a.jpg"}) == ["<image>\nWhat?", "A cat."]


@pytest.mark.parametrize("named", [{"video_name": "v_1.mp4"}, {"video_name": "v_1.mp4", "video_id": ""}])
def test_a_video_may_be_named_by_a_name_of_its_own(named):
    assert media({"Q": "What?", "A": "A cat.", **named}) == [("video", "v_1.mp4")]


def test_fields_may_have_any_name_or_be_put_together():
    fields = Fields(question=("prompt",), answer=("response",), video=("{folder}/{number:03d}.mp4",))
    row = {"prompt": "What?", "response": 3, "folder": "x", "number": 7}
    assert texts(row, fields=fields) == ["<video>\nWhat?", "3"]
    assert media(row, fields=fields) == [("video", "x/007.mp4")]


def test_a_caption_asks_one_of_the_instructions_always_the_same():
    captions = [{"image": "a.jpg", "caption": f"Cat {number}."} for number in range(20)]
    settings = {"fields": Fields(answer=("caption",)), "instructions": ("X", "Y")}
    asked = [texts(row, **settings)[0] for row in captions]
    assert set(asked) == {"<image>\nX", "<image>\nY"}
    assert [texts(row, **settings)[0] for row in captions] == asked


def test_turns_of_a_table_may_be_columns_or_json():
    for conversation in (
        {"from": ["human", "gpt"], "value": ["Hi", "Ho"]},
        json.dumps(turns("Hi", "Ho")),
        [{"from": "human", "value": "Hi", "role": None}, {"from": None, "role": "assistant", "content": "Ho"}],
    ):
        assert texts({"conversations": conversation, "messages": None}) == ["Hi", "Ho"]


def test_further_speakers_may_be_named():
    row = {"conversations": [{"from": "customer", "value": "Hi"}, {"from": "agent", "value": "Ho"}]}
    assert texts(row, speakers={"customer": "human", "agent": "gpt"}) == ["Hi", "Ho"]
    assert "speakers are" in why(row)


def test_a_first_answer_without_a_question_is_left_out():
    row = {"image": "a.jpg", "conversations": [{"from": "gpt", "value": "Hello"}, *turns("<image>", "A cat.")]}
    assert texts(row) == ["<image>", "A cat."]


def test_the_type_of_a_test_question_is_kept():
    question = {"type": "colour", "options": ["red", "blue"]}
    assert draft({"question": question, "conversations": turns("?", "red")}, dataset()).record["question"] == question


def test_tags_in_texts_are_text():
    html = "Why does <video> not play?\n<video>\n<source src=x>\n</video>"
    assert texts({"conversations": turns(html, "Use <image>.")}) == [html, "Use <image>."]
    row = {"image": "a.jpg", "conversations": turns("<image>\nIs this a <video> tag?", "Yes.")}
    assert media(row) == [("image", "a.jpg")]


@pytest.mark.parametrize(
    "value",
    [
        "<image>",
        "<image>\nWhat?",
        "What?\n<image>",
        " <video> \r\nWhat?\n",
        "What?\n \t<video> ",
        "<image>\n<image>\n?",
    ],
)
def test_a_placeholder_on_a_line_of_its_own_needs_its_medium(value):
    assert "the row names none" in why({"conversations": turns("Hi", "Ho", value, "A.")})


@pytest.mark.parametrize(
    "value", ["<image> is a tag", "What is <image>", "a\n<video>\nb", "\n" * 500_000 + "a <video>"]
)
def test_a_placeholder_within_a_text_needs_none(value):
    assert texts({"conversations": turns(value, "A.")}) == [value, "A."]


# --- trouble ----------------------------------------------------------------------------------------------------------

ASKED = turns("<image>\nWhat?", "A cat.")
TROUBLE = {
    "not an object": ([], "the row is not an object but list"),
    "no conversation": ({"id": 1, "image": "a.jpg"}, "the record has no conversation"),
    "null conversation": ({"conversations": None}, "the record has no conversation"),
    "empty conversation": ({"conversations": []}, "the conversation is empty"),
    "a conversation of text": ({"conversations": "Hi"}, "not a list of turns but str"),
    "a conversation of broken JSON": ({"conversations": "[{"}, "a text that is no JSON"),
    "columns of two lengths": ({"conversations": {"from": ["human"], "value": []}}, "of different lengths"),
    "a turn of text": ({"conversations": ["Hi", "Ho"]}, "turn 1 is not of the form"),
    "a turn without text": ({"conversations": [{"from": "human"}]}, "it has no text"),
    "an unknown speaker": ({"conversations": [{"from": "narrator", "value": "Hi"}]}, "turn 1 is from 'narrator'"),
    "no speaker": ({"conversations": [{"value": "Hi"}]}, "turn 1 is from 'None'"),
    "two questions in a row": ({"conversations": [*turns("Hi")] * 2}, "turn 2 is from 'human', expected 'gpt'"),
    "no answer": ({"conversations": turns("Hi")}, "it has no answer"),
    "only a system text": ({"conversations": [{"from": "system", "value": "Hi"}]}, "the conversation is empty"),
    "an empty answer": ({"conversations": turns("Hi", "Ho", "Hu", " \n")}, "turn 4 is an empty answer"),
    "two system texts": ({"system": "A", "conversations": [{"from": "system", "value": "B"}, *ASKED]}, "two different"),
    "half a character": ({"conversations": turns("\ud800", "Ho")}, "half a surrogate pair"),
    "too many turns": ({"conversations": turns(*["Hi"] * 1001)}, "more than 1,000"),
    "a question alone": ({"q": "What?", "video_id": "v"}, "a question and no answer"),
    "an empty answer to a question": ({"q": "What?", "a": "", "video_id": "v"}, "a question and no answer"),
    "a blank answer to a question": ({"q": "What?", "a": "  ", "video_id": "v"}, "empty answer"),
    "an answer alone": ({"a": "A cat.", "image": "a.jpg"}, "an answer and no question"),
    "nothing asked or answered": ({"q": "", "a": "", "video_id": "v"}, "no question and no answer"),
    "an answer that is a list": ({"q": "What?", "a": ["x"], "video_id": "v"}, "is not a text but list"),
    "two questions": ({"q": "What?", "question": "Who?", "a": "x"}, "two different things under"),
    "pairs that are none": ({"qa": "x", "video_id": "v"}, "no list of objects"),
    "an image without a name": ({"conversations": ASKED}, "the text shows <image> in turn 1, the row names none"),
    "an empty name": ({"image": "", "conversations": ASKED}, "the row names none"),
    "fewer placeholders": ({"image": ["a", "b"], "conversations": ASKED}, "placeholders and media differ"),
    "more placeholders": ({"image": "a", "conversations": turns("<image><image>", "A.")}, "the text shows <image> in"),
    "a placeholder in the answer": (
        {"image": ["a", "b"], "conversations": turns("<image>", "<image>")}, "only human turns may show media",
    ),
    "kinds that differ": (
        {"image": "a.jpg", "video": "b.mp4", "conversations": turns("<image><image>", "A.")}, "media differ",
    ),
    "two kinds and no placeholder": (
        {"image": "a.jpg", "video": "b.mp4", "conversations": turns("What?", "A.")}, "the text shows none",
    ),
    "frames apart": ({"video": "a", "conversations": turns("<image> and <image>", "A.")}, "media differ"),
    "an image named twice": ({"image": "a", "images": ["b"], "conversations": ASKED}, "under 'image' and 'images'"),
    "an image named in the turns and beside them": (
        {"image": "b.jpg", "messages": [{"role": "user", "content": [{"type": "image", "image": "a.jpg"}]},
                                        {"role": "assistant", "content": "A."}]}, "names images twice",
    ),
    "a part without a name": (
        {"messages": [{"role": "user", "content": [{"type": "image"}]}, {"role": "assistant", "content": "A."}]},
        "nothing names its file",
    ),
    "a part of another type": (
        {"messages": [{"role": "user", "content": [{"type": "audio", "audio": "a.wav"}]}]}, "of the type 'audio'",
    ),
    "an image in an answer": (
        {"messages": [{"role": "user", "content": "Draw."},
                      {"role": "assistant", "content": [{"type": "image", "image": "a"}]}]}, "not the human's",
    ),
    "an address": ({"image": "https://x.org/a.jpg", "conversations": ASKED}, "is an address"),
    "a bucket": ({"video": "s3://x/a.mp4", "conversations": turns("Hi", "Ho")}, "is an address"),
    "a name that leads out": ({"image": "../a.jpg", "conversations": ASKED}, "'../a.jpg' leads out of the data set's"),
    "an absolute name": ({"image": "/etc/passwd", "conversations": ASKED}, "'/etc/passwd' leads out"),
    "a folder of a like name": ({"image": "/data/set2/a.jpg", "conversations": ASKED}, "leads out"),
    "a URI that leads out": ({"image": "file:///etc/passwd", "conversations": ASKED}, "leads out"),
    "a video id that leads out": ({"q": "?", "a": "!", "video_id": "../v"}, "leads out"),
    "the folder itself": ({"image": ".", "conversations": ASKED}, "leads out"),
    "a null character": ({"image": "a\0.jpg", "conversations": ASKED}, "null character"),
    "a number for a name": ({"image": 5, "conversations": ASKED}, "no name of a file but int"),
    "frames for a video": ({"videos": [["1.jpg", "2.jpg"]], "conversations": turns("<video>", "A.")}, "is a list"),
    "no bytes": ({"image": {"bytes": b"", "path": "a"}, "conversations": ASKED}, "has no bytes"),
    "cut base64": ({"image": "data:image/png;base64,abc", "conversations": ASKED}, "no base64"),
    "a cut URI": ({"image": "data:image/png;base64", "conversations": ASKED}, "without a comma"),
}  # fmt: skip


@pytest.mark.parametrize("trouble", TROUBLE)
def test_a_row_in_trouble_is_rejected_with_a_reason(trouble):
    row, reason = TROUBLE[trouble]
    assert reason in why(row)


def test_media_may_lie_outside_where_the_data_set_says_so():
    row = {"image": ["../a.jpg", "/b/c.jpg"], "conversations": turns("<image><image>", "A.")}
    assert [str(ref.path) for ref in draft(row, dataset(outside=True)).media] == ["/data/a.jpg", "/b/c.jpg"]


def test_a_folder_of_media_may_lie_outside():
    row = {"image": "a.jpg", "conversations": turns("<image>", "A.")}
    assert draft(row, dataset(images="/elsewhere")).media[0].path == Path("/elsewhere/a.jpg")


def test_questions_without_answers_are_kept_where_the_data_set_says_so():
    assert texts({"q": "What?", "image": "a"}, unanswered=True) == ["<image>\nWhat?"]
    assert texts({"conversations": turns("What?")}, unanswered=True) == ["What?"]


# --- what is accepted is read again -----------------------------------------------------------------------------------

words = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
pieces = st.lists(st.sampled_from(["<image>", "<video>", "\n", "What?", " ", "</video>", "é"]), max_size=6).map("".join)
values = st.one_of(words, pieces)
contents = st.one_of(
    values,
    st.lists(
        st.one_of(
            st.builds(lambda text: {"type": "text", "text": text}, values),
            st.sampled_from([{"type": "image"}, {"image": "a.jpg"}, {"type": "video", "video": "b.mp4"}]),
        ),
        max_size=3,
    ),
)  # fmt: skip
files = st.one_of(st.none(), st.just("a.jpg"), st.lists(st.sampled_from(["a.jpg", "b/c.JPG"]), max_size=3))
speakers = st.sampled_from(["human", "gpt", "user", "assistant"])
rounds = st.lists(st.tuples(contents, st.one_of(st.just("Yes."), values)), min_size=1, max_size=3)
conversations = st.one_of(
    rounds.map(lambda pairs: turns(*(value for pair in pairs for value in pair))),
    st.lists(st.builds(lambda who, what: {"role": who, "content": what}, speakers, contents), max_size=4),
)
rows_of_any_kind = st.fixed_dictionaries(
    {"conversations": conversations},
    optional={"image": files, "images": files, "video": files, "system": words, "id": st.integers(), "q": words},
)


@st.composite
def rows_that_fit(draw):
    """Rows whose placeholders and media agree in number, in one form or another."""
    kinds = draw(st.lists(st.sampled_from(["image", "video"]), min_size=1, max_size=4))
    human = ["", ""]
    for kind in kinds:
        human[draw(st.integers(0, 1))] += draw(st.sampled_from(["{0}", "{0}\n", "see {0} "])).format(f"<{kind}>")
    shown = [kind for text in human for kind in re.findall("<(image|video)>", text)]
    named = {kind: [f"{n}.x" for n, k in enumerate(shown) if k == kind] for kind in set(kinds)}
    if len(named) == 1 and draw(st.booleans()):  # without placeholders, or with those of the other kind
        mark = draw(st.sampled_from(["", "<image>", "<video>"]))
        human = [re.sub("<(image|video)>", mark, text) for text in human]
    return {"conversations": turns(human[0], "Yes.", f"{human[1]}And?", "No.")} | named


@settings(max_examples=200, deadline=None)
@given(rows_that_fit())
def test_media_that_fit_are_accepted_and_read_again(row):
    made = draft(row, dataset())
    assert parse(members(made)).kinds == [ref.kind for ref in made.media]
    assert sorted(ref.name for ref in made.media) == made_names(row)


def made_names(row):
    return sorted(name for kind in ("image", "video") for name in row.get(kind, []))


@settings(max_examples=400, deadline=None)
@given(rows_of_any_kind)
def test_what_is_accepted_is_read_again_with_the_same_turns_and_media(row):
    try:
        made = draft(row, dataset())
    except UserError:
        return
    read = parse(members(made))
    assert read.conversation == made.record["conversations"]
    assert read.kinds == [ref.kind for ref in made.media]
    assert read.dropped_turns == 0
    if made.certain:  # whatever the media turn out to be
        unknown = {name: data if name == "json" else b"GIF89a" for name, data in members(made).items()}
        assert parse(unknown).kinds == read.kinds
    assert any(turn["from"] == "gpt" for turn in read.conversation)
