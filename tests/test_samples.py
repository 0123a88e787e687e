"""The members of a shard's sample become a conversation and its media, or an error that says what is wrong."""

import io
import json

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from shard_fixtures import audio_file, image_file, jpeg, mp4, talk

from data_prep.toy_render import encode_jpeg
from vllava.batch import MediumSpec
from vllava.data.build import conversation_packer, sample_decoder
from vllava.errors import UserError

SPECS = {"image": MediumSpec(32, 4, width=8), "video": MediumSpec(32, 20, 4, width=8)}


def members(*media, record=None, **changes):
    """Members of a sample from (name, data), with a record whose first turn shows what `changes` says."""
    record = record or {"id": "x", "conversations": talk(**changes)}
    return {"json": json.dumps(record).encode(), **dict(media)}


@pytest.fixture(scope="module")
def decode():
    return sample_decoder(SPECS)


def shades(sample):
    """The brightness of each frame of a sample's only video, as its encoder gets them."""
    [video] = sample.media
    return video.pixels.float().mean((1, 2, 3)).tolist()


# --- what a file is ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["0.mp4", "0.m4v", "0.3gp", "0.flv", "0.MOV", "0.dat", "0.jpg"])
def test_the_placeholder_says_that_a_file_is_a_video_whatever_its_name(name, decode):
    sample = decode("k", members((name, mp4()), placeholder="<video>"))
    assert sample.kinds == ["video"] and sample.media[0].pixels.shape == (4, 3, 32, 32)


@pytest.mark.parametrize("name", ["0.jpg", "0.JPG", "0.jfif", "0.mp4", "0.x"])
def test_the_placeholder_says_that_a_file_is_an_image_whatever_its_name(name, decode):
    sample = decode("k", members((name, jpeg()), placeholder="<image>"))
    assert sample.kinds == ["image"] and sample.media[0].pixels.shape == (3, 32, 32)


def test_a_gif_is_what_the_placeholder_says(decode):
    frames = [Image.new("L", (32, 32), 10 + 40 * i) for i in range(5)]
    buffer = io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:], duration=100)
    gif = buffer.getvalue()
    assert decode("k", members(("0.gif", gif), placeholder="<image>")).kinds == ["image"]
    rising = shades(decode("k", members(("0.gif", gif), placeholder="<video>")))
    assert rising == sorted(rising) and len(set(rising)) == 4
    # More placeholders than files: a GIF may answer to either, so nobody can say which one is text.
    with pytest.raises(UserError, match="placeholders and media differ"):
        decode("k", members(("0.gif", gif), placeholder="<image><video>"))


def test_text_about_tags_needs_no_medium_and_does_not_disturb_one(decode):
    about = "What does <video> do, and <image>?"
    assert decode("k", members(question=about, placeholder="")).media == []
    tagged = [{"from": "human", "value": "<image>\nIs there a <video> tag?"}, {"from": "gpt", "value": "No <image>."}]
    sample = decode("k", members(("0.jpg", jpeg()), record={"conversations": tagged}))
    assert sample.kinds == ["image"] and sample.conversation == tagged
    tagged[0]["value"] = "Is there an <image> tag?\n<video>"
    assert decode("k", members(("0.bin", mp4()), record={"conversations": tagged})).kinds == ["video"]


@pytest.mark.parametrize("key", ["image", "video"])
def test_a_record_that_names_a_medium_which_is_not_there_is_an_error(key, decode):
    record = {key: "photos/1.jpg", "conversations": talk(placeholder=f"<{key}>")}
    with pytest.raises(UserError, match=rf"names {key} 'photos/1.jpg', but the sample holds no medium"):
        decode("k", members(record=record))


def test_dropped_turns_are_counted(decode):
    record = {"conversations": [{"from": "gpt", "value": "Hello!"}, *talk(placeholder="")]}
    sample = decode("k", members(record=record))
    assert sample.dropped_turns == 1 and sample.conversation == talk(placeholder="")


# --- prepared frames --------------------------------------------------------------------------------------------------


def frame(shade):
    return encode_jpeg(np.full((32, 32, 3), shade, np.uint8))


@settings(max_examples=20, deadline=None)
@given(
    count=st.sampled_from([1, 4, 12, 128]), width=st.integers(1, 4), start=st.sampled_from([0, 1]), shuffle=st.randoms()
)
def test_prepared_frames_are_ordered_by_number_however_it_is_written(count, width, start, shuffle):
    files = [(f"0.frame{i + start:0{width}d}.jpg", frame(10 + 240 * i // count)) for i in range(count)]
    shuffle.shuffle(files)
    specs = {"video": MediumSpec(32, 5 * count, count)}
    found = shades(sample_decoder(specs)("k", members(*files, placeholder="<video>")))
    assert found == sorted(found) and len(found) == count


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        (["0", "1", "3", "4"], "prepared frames of medium 0: number 2 is missing"),
        (["2", "3", "4", "5"], "prepared frames of medium 0: number 0 is missing"),
        (["0", "1", "01", "2"], "prepared frames of medium 0: two have the number 1"),
        (["0", "1", "2"], "3 prepared frames, the model takes 4"),
    ],
)
def test_a_gap_between_frames_or_a_number_given_twice_is_an_error(numbers, message, decode):
    files = [(f"0.frame{number}.jpg", jpeg()) for number in numbers]
    with pytest.raises(UserError, match=message):
        decode("k", members(*files, placeholder="<video>"))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["0.jpg", "2.jpg"], "media: number 1 is missing"),
        (["1.jpg", "2.jpg"], "media: number 0 is missing"),
        (["0.jpg", "0.png"], "medium 0 has 2 files"),
        (["0.jpg", "0.frame0.jpg"], "medium 0 has 2 files"),
        (["0.jpg", "00.jpg"], "medium 0 has 2 files"),
        (["jpg", "0.jpg"], "member 'jpg' is no medium"),
        (["mp4"], "member 'mp4' is no medium"),
        (["0"], "member '0' is no medium"),
    ],
)
def test_media_that_are_not_numbered_one_after_the_other_are_an_error(names, message, decode):
    with pytest.raises(UserError, match=message):
        decode("k", members(*[(name, jpeg()) for name in names], placeholder="<image>" * max(1, len(names))))


def test_members_that_are_no_media_are_left_alone(decode):
    sample = decode("k", members(("0.jpg", jpeg()), ("txt", b"a note"), ("cls", b"3"), ("meta.json", b"{")))
    assert sample.kinds == ["image"]


# --- features ---------------------------------------------------------------------------------------------------------


def features(tensor, name="features"):
    return safetensors.torch.save({name: tensor})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_features_are_what_the_encoder_made(dtype, decode):
    made = torch.randn(4, 8).to(dtype)
    [medium] = decode("k", members(("0.image.safetensors", features(made)))).media
    assert medium.kind == "image" and torch.equal(medium.pixels, made)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "cannot be read"),
        (features(torch.zeros(4, 8))[:-1], "cannot be read"),
        ((2**40).to_bytes(8, "little") + b"{}", "cannot be read"),
        (features(torch.zeros(4, 8), "others"), "cannot be read"),
        (features(torch.zeros(3, 8)), r"shape \(3, 8\), the model's image encoder gives 4 x 8"),
        (features(torch.zeros(4, 7)), r"shape \(4, 7\)"),
        (features(torch.zeros(4)), r"shape \(4,\)"),
        (features(torch.zeros(1, 4, 8)), r"shape \(1, 4, 8\)"),
        (features(torch.zeros(())), r"shape \(\)"),
        (features(torch.zeros(4, 8, dtype=torch.int64)), "no finite numbers"),
        (features(torch.zeros(4, 8, dtype=torch.float64)), "no finite numbers of 16 or 32 bits"),
        (features(torch.full((4, 8), torch.nan)), "no finite numbers"),
        (features(torch.tensor([[0.0] * 31 + [-torch.inf]]).reshape(4, 8)), "no finite numbers"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_features_that_are_not_the_encoders_are_an_error(data, message, decode):
    with pytest.raises(UserError, match=message):
        decode("k", members(("0.image.safetensors", data)))


def test_features_of_another_medium_than_the_text_shows_are_an_error(decode):
    made = features(torch.zeros(4, 8))
    with pytest.raises(UserError, match="shows <video>, the sample holds frames or features of a medium of kind image"):
        decode("k", members(("0.image.safetensors", made), placeholder="<video>"))
    with pytest.raises(UserError, match="shows <image>, the sample holds frames or features of a medium of kind video"):
        decode("k", members(*[(f"0.frame{i}.jpg", jpeg()) for i in range(4)], placeholder="<image>"))


def test_a_file_that_is_neither_is_an_error(decode):
    for placeholder in ("<image>", "<video>"):
        with pytest.raises(UserError, match=r"unreadable|no frames"):
            decode("k", members(("0.mp3", audio_file()), placeholder=placeholder))
    with pytest.raises(UserError, match="unreadable image"):
        decode("k", members(("0.mp4", mp4())))
    with pytest.raises(UserError, match="no encoder for a medium of kind video"):
        sample_decoder({"image": SPECS["image"]})("k", members(("0.mp4", mp4()), placeholder="<video>"))


def test_what_is_wrong_with_a_medium_that_could_not_be_encoded_is_told_again(decode):
    with pytest.raises(UserError, match="it was broken"):
        decode("k", members(("broken", b"it was broken")))


def test_an_image_of_a_lossless_file_has_its_pixels(decode):
    picture = np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)
    [medium] = decode("k", members(("0.png", image_file(picture)))).media
    again = decode.preprocess.image_pixels(Image.fromarray(picture), 32)
    assert torch.equal(medium.pixels, again)


# --- whatever a record holds ------------------------------------------------------------------------------------------

words = st.sampled_from(
    ["human", "gpt", "user", "assistant", "system", "<image>", "<video>\n", "x", "", "\ud800", "</s>"]
)
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=8,
)
near_turns = st.fixed_dictionaries(
    {}, optional={"from": words | anything, "role": words, "value": words | anything, "content": words}
)
near_records = st.fixed_dictionaries(
    {},
    optional={
        "conversations": st.lists(near_turns | anything, max_size=4) | anything,
        "messages": st.lists(near_turns, max_size=4),
        "system": words | anything,
        "image": anything,
        "id": anything,
    },
)


@settings(max_examples=300, deadline=None)
@given(
    record=near_records | anything, media=st.lists(st.sampled_from([b"", b"GIF8", b"\xff\xd8\xff", b"x"]), max_size=2)
)
def test_any_record_is_a_sample_or_an_error_in_words(record, media, decode, packer):
    held = {"json": json.dumps(record).encode(), **{f"{i}.x": data for i, data in enumerate(media)}}
    try:
        packer.prepare(decode("k", held))
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 700


@pytest.fixture(scope="module")
def packer(tokenizer):
    return conversation_packer(SPECS, tokenizer)
