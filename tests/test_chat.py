"""Talking with a checkpoint at the terminal."""

import pytest
import torch
from conftest import TOKENIZER, randomise
from shard_fixtures import jpeg, mp4

from vllava import chat
from vllava.data.build import conversation_packer, sample_decoder
from vllava.data.samples import Sample
from vllava.evaluation.answers import ask
from vllava.model.build import load_tokenizer
from vllava.model.checkpoint import load
from vllava.model.encoders import ClipEncoder
from vllava.training.stage import Stage
from vllava.training.task import Recipe

QUESTIONS = ["What is it?", "Where is it?"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("media")
    (folder / "a.jpg").write_bytes(jpeg(90))
    (folder / "b.mp4").write_bytes(mp4(170))
    return folder


@pytest.fixture
def checkpoint(model, image_folder, video_folder, tmp_path):
    encoders = {
        kind: {"_target_": "vllava.model.encoders.ClipEncoder", "path": str(folder), "medium": kind}
        for kind, folder in (("image", image_folder), ("video", video_folder))
    }
    settings = {"encoder": encoders, "tokenizer": "", "data": {"template": "vicuna_v1", "image_fit": "crop"}}
    task = Stage(randomise(model), ["projector", "llm"], Recipe(lr=1.0))
    task.export(tmp_path / "checkpoint", load_tokenizer(str(TOKENIZER)), settings)
    return tmp_path / "checkpoint"


@pytest.fixture
def talk(checkpoint, files, capsys):
    """Ask, and return the lines that are printed."""

    def run(*arguments, media=("--video", "b.mp4", "--image", "a.jpg")):
        shown = [str(files / word) if "." in word else word for word in media]
        assert chat.main(["--checkpoint", str(checkpoint), "--max-new-tokens", "9", *shown, *arguments]) == 0
        return capsys.readouterr().out.splitlines()

    return run


def test_the_answers_are_those_of_the_whole_conversation_about_the_media_in_their_order(talk, checkpoint, files):
    model, tokenizer, _ = load(checkpoint)
    decode = sample_decoder(model.specs, "crop")
    media = [decode.video((files / "b.mp4").read_bytes()), decode.image((files / "a.jpg").read_bytes())]
    packer = conversation_packer(model.specs, tokenizer)
    conversation, expected = [{"from": "human", "value": "<video>\n<image>\n" + QUESTIONS[0]}], []
    for question in [*QUESTIONS[1:], None]:
        expected += ask(model, packer, [Sample("", conversation, media)], 9)
        conversation += [{"from": "gpt", "value": expected[-1]}, {"from": "human", "value": question}]
    assert len(set(expected)) == 2 and all(expected)
    assert talk(*QUESTIONS) == expected


def test_media_are_encoded_once_however_many_questions_there_are(talk, monkeypatch):
    calls, forward = [], ClipEncoder.forward
    monkeypatch.setattr(ClipEncoder, "forward", lambda self, pixels: calls.append(1) or forward(self, pixels))
    talk(*QUESTIONS, "And why?")
    assert len(calls) == 2


def test_the_first_question_may_say_where_the_media_stand(talk, checkpoint, files):
    model, tokenizer, _ = load(checkpoint)
    decode = sample_decoder(model.specs, "crop")
    media = [decode.video((files / "b.mp4").read_bytes()), decode.image((files / "a.jpg").read_bytes())]
    asked = "<video> before <image>, what changed?"
    sample = Sample("", [{"from": "human", "value": asked}], media)
    assert talk(asked) == ask(model, conversation_packer(model.specs, tokenizer), [sample], 9)
    assert len(talk("Is <video> a tag?", media=("--image", "a.jpg"))) == 1  # of a medium that is not shown: text
    with pytest.raises(SystemExit, match="placeholders and media differ"):
        talk("Is <image> a tag?")


def test_sampling_follows_from_its_seed(talk):
    hot = ["--temperature", "5", "--seed"]
    assert talk(QUESTIONS[0], *hot, "1") == talk(QUESTIONS[0], *hot, "1")
    assert len({tuple(talk(QUESTIONS[0], *hot, str(seed))) for seed in range(4)}) > 1
    assert talk(QUESTIONS[0], *hot, "1", "--top-p", "0.000001") == talk(QUESTIONS[0])  # only the likeliest is left


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--image", "nowhere.jpg"], "There is no file nowhere.jpg"),
        (["--temperature", "-1"], "argument --temperature: '-1' is not a number from 0"),
        (["--top-p", "0"], "argument --top-p: '0' is not a number above 0 to 1"),
    ],
)
def test_a_mistake_is_told_in_a_line(arguments, message, checkpoint, capsys):
    with pytest.raises(SystemExit) as stopped:
        chat.main(["--checkpoint", str(checkpoint), "Why?", *arguments])
    told = f"{stopped.value.code} {capsys.readouterr().err}"
    assert message in told and "Traceback" not in told


def test_a_damaged_file_is_named(checkpoint, tmp_path):
    (tmp_path / "torn.jpg").write_bytes(b"no picture")
    with pytest.raises(SystemExit, match=r"torn\.jpg: unreadable image"):
        chat.main(["--checkpoint", str(checkpoint), "--image", str(tmp_path / "torn.jpg"), "Why?"])


def test_what_is_typed_is_answered_until_an_empty_line(talk, monkeypatch):
    lines = iter([QUESTIONS[0], " ", "not reached"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    assert talk() == talk(QUESTIONS[0])
    assert torch.is_grad_enabled()
