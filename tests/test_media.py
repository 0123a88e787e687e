"""Files to pixels, against references written out here."""

import io
import resource
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from shard_fixtures import image_file, jpeg, mp4
from transformers.models.video_llava.image_processing_video_llava import VideoLlavaImageProcessor

from data_prep.toy_render import encode_mp4
from vllava.data.media import Preprocess, decode_image
from vllava.data.video import video_decoder
from vllava.errors import UserError
from vllava.pixels import CLIP_MEAN, CLIP_STD

# --- images -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("picture", "expected"),
    [
        (Image.new("L", (9, 7), 77), (77, 77, 77)),
        (Image.new("RGBA", (9, 7), (10, 20, 30, 255)), (10, 20, 30)),
        (Image.new("RGB", (9, 7), (200, 100, 50)).quantize(4), (200, 100, 50)),
        (Image.new("1", (9, 7), 1), (255, 255, 255)),
    ],
    ids=["grey", "alpha", "palette", "black and white"],
)
def test_every_kind_of_picture_becomes_rgb(picture, expected):
    decoded = decode_image(image_file(picture))
    assert decoded.mode == "RGB" and decoded.size == (9, 7)
    assert decoded.getpixel((4, 3)) == expected


@pytest.mark.parametrize(
    "data",
    [b"", b"no picture at all", jpeg()[:200], image_file(Image.new("RGB", (64, 64)), "PNG")[:60]],
    ids=["empty file", "no picture", "cut JPEG", "cut PNG"],
)
def test_a_picture_that_cannot_be_read_is_an_error(data):
    with pytest.raises(UserError, match="unreadable image"):
        decode_image(data)


def test_a_png_with_a_damaged_chunk_is_an_error():
    data = bytearray(image_file(np.random.default_rng(0).integers(0, 255, (300, 300, 3), np.uint8)))
    second = data.index(b"IDAT", data.index(b"IDAT") + 4)
    data[second : second + 4] = b"\xd5I\x01\x1f"
    with pytest.raises(UserError, match="unreadable image"):
        decode_image(bytes(data))


# --- pixels -----------------------------------------------------------------------------------------------------------


def normalised(pixels):
    """CLIP's normalisation of [H, W, 3] uint8, one value at a time."""
    out = np.empty((3, *pixels.shape[:2]), np.float64)
    for channel in range(3):
        out[channel] = (pixels[..., channel] / 255.0 - CLIP_MEAN[channel]) / CLIP_STD[channel]
    return out


def noise(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def test_normalisation_is_clips():
    assert pytest.approx((0.48145466, 0.4578275, 0.40821073)) == CLIP_MEAN
    assert pytest.approx((0.26862954, 0.26130258, 0.27577711)) == CLIP_STD
    picture = noise(64, 64)
    np.testing.assert_allclose(Preprocess().image(picture, 64).numpy(), normalised(np.asarray(picture)), atol=1e-5)


def test_crop_takes_the_centre_square_of_a_picture_whose_short_side_fits():
    wide, tall = noise(100, 64), noise(64, 90)
    centre = normalised(np.asarray(wide)[:, 18:82])
    np.testing.assert_allclose(Preprocess("crop").image(wide, 64).numpy(), centre, atol=1e-5)
    centre = normalised(np.asarray(tall)[13:77])
    np.testing.assert_allclose(Preprocess("crop").image(tall, 64).numpy(), centre, atol=1e-5)


def test_crop_brings_the_short_side_to_the_size_first():
    picture = noise(192, 128)
    resized = np.asarray(picture.resize((96, 64), Image.Resampling.BICUBIC))
    np.testing.assert_allclose(Preprocess("crop").image(picture, 64).numpy(), normalised(resized[:, 16:80]), atol=1e-5)


SIZES = [(500, 375), (640, 480), (640, 427), (427, 640), (333, 500), (1001, 333), (225, 224), (227, 224), (50, 77)]


def ports_pixels(picture):
    return VideoLlavaImageProcessor()(picture, return_tensors="np", return_legacy_image_output=False)["pixel_values"][0]


@pytest.mark.parametrize("size", SIZES)
def test_cropped_pixels_are_those_of_the_port_in_transformers(size):
    picture = noise(*size)
    ports = VideoLlavaImageProcessor()(picture, return_tensors="np", return_legacy_image_output=False)["pixel_values"][
        0
    ]
    assert np.abs(Preprocess("crop").image(picture, 224).numpy() - ports).max() <= 5e-7
    assert np.abs(Preprocess("crop").video([picture], 224)[0].numpy() - ports).max() <= 5e-7


@pytest.mark.parametrize("size", SIZES)
def test_padded_pixels_are_those_of_the_originals_square_through_the_ports_processor(size):
    """expand2square: a square of int(255 * mean), the picture in its middle, half pixels rounded down."""
    picture, (width, height) = noise(*size), size
    square = np.empty((max(size), max(size), 3), np.uint8)
    square[:] = (122, 116, 104)
    top, left = (width - height) // 2 if width > height else 0, (height - width) // 2 if height > width else 0
    square[top : top + height, left : left + width] = np.asarray(picture)
    expected = ports_pixels(Image.fromarray(square))
    assert np.abs(Preprocess("pad").image(picture, 224).numpy() - expected).max() <= 5e-7


@settings(max_examples=40, deadline=None)
@given(width=st.integers(1, 1500), height=st.integers(1, 1500), size=st.sampled_from([1, 32, 64, 224]))
def test_padding_in_bands_gives_the_pixels_of_the_whole_square(width, height, size):
    picture, side = noise(width, height), max(width, height)
    square = Image.new("RGB", (side, side), (122, 116, 104))
    square.paste(picture, ((side - width) // 2, (side - height) // 2))
    whole = np.asarray(square.resize((size, size), Image.Resampling.BICUBIC))
    assert np.abs(Preprocess("pad").image(picture, size).numpy() - normalised(whole)).max() < 1e-6


def test_a_long_strip_is_padded_without_its_square_in_memory():
    """The square of this one takes a gigabyte."""
    strip, limits = Image.new("RGB", (16000, 200), (200, 0, 0)), resource.getrlimit(resource.RLIMIT_AS)
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + 300 * 2**20, limits[1]))
    try:
        pixels = Preprocess("pad").image(strip, 64)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert pixels[0, 32].min() > 0.4 and abs(pixels[:, 0]).max() < 0.02  # the strip, and the mean colour above it


def test_pad_puts_the_picture_in_the_middle_of_a_square_of_the_mean_colour():
    picture = noise(64, 40)
    square = np.empty((64, 64, 3), np.uint8)
    square[:] = [int(0.48145466 * 255), int(0.4578275 * 255), int(0.40821073 * 255)]
    square[12:52] = np.asarray(picture)
    np.testing.assert_allclose(Preprocess("pad").image(picture, 64).numpy(), normalised(square), atol=1e-5)


def test_pad_keeps_the_whole_picture_where_crop_cuts_its_ends():
    pixels = np.zeros((64, 192, 3), np.uint8)
    pixels[:, :32], pixels[:, -32:] = (255, 0, 0), (0, 0, 255)
    picture = Image.fromarray(pixels)
    padded, cropped = (Preprocess(fit).image(picture, 64) for fit in ("pad", "crop"))
    red = (1 - CLIP_MEAN[0]) / CLIP_STD[0]
    assert padded[0, 32, 2] == pytest.approx(red, abs=0.1)
    assert cropped[0].max() < 0


@settings(max_examples=40, deadline=None)
@given(width=st.integers(1, 400), height=st.integers(1, 400), fit=st.sampled_from(["crop", "pad"]))
def test_every_picture_becomes_a_square_of_the_size(width, height, fit):
    assert Preprocess(fit).image(Image.new("RGB", (width, height)), 32).shape == (3, 32, 32)


def test_frames_of_videos_are_cropped_also_where_images_are_padded():
    frames = [noise(100, 64, seed) for seed in range(8)]
    stacked = Preprocess("pad").video(frames, 64)
    assert stacked.shape == (8, 3, 64, 64)
    for frame, pixels in zip(frames, stacked, strict=True):
        np.testing.assert_allclose(pixels.numpy(), normalised(np.asarray(frame)[:, 18:82]), atol=1e-5)


def test_decoding_twice_gives_the_same_pixels():
    for _ in range(5):
        one, other = (Preprocess().video(video_decoder("auto")(mp4(), 8), 64) for _ in range(2))
        assert (one == other).all()
        one, other = (Preprocess("pad").image(decode_image(image_file(noise(70, 50))), 64) for _ in range(2))
        assert (one == other).all()


@pytest.mark.parametrize("fit", ["crop", "pad"])
def test_left_stays_left(fit):
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[:, :32] = 255
    for _ in range(20):
        image = Preprocess(fit).image(decode_image(image_file(pixels)), 64)
        assert image[..., :30].min() > image[..., 34:].max()
        video = Preprocess(fit).video(video_decoder("auto")(encode_mp4(np.stack([pixels] * 8)), 8), 64)
        assert video[..., :30].min() > video[..., 34:].max()


def test_an_unknown_fit_is_an_error_that_lists_the_known_ones():
    with pytest.raises(UserError, match="crop, pad"):
        Preprocess("stretch")


def test_a_picture_in_memory_and_its_lossless_file_give_the_same_pixels():
    picture = noise(80, 60)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    assert (Preprocess().image(picture, 64) == Preprocess().image(decode_image(buffer.getvalue()), 64)).all()
