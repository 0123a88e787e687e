"""A picture file reaches the model as a viewer shows it, or not at all."""

import io
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms
from shard_fixtures import ROOT, image_file, jpeg
from transformers.models.video_llava.image_processing_video_llava import VideoLlavaImageProcessor

from vllava.data.media import CLIP_MEAN, MAX_ASPECT, MAX_PIXELS, MAX_SIDE, Preprocess, decode_image
from vllava.errors import UserError

DATA = ROOT / "tests" / "data" / "pictures"
CORNERS = np.array([[[220, 30, 30], [30, 200, 40]], [[30, 40, 220], [255, 255, 255]]], np.uint8)


def quadrants(width=96, height=64):
    """Red and green above blue and white."""
    return Image.fromarray(CORNERS.repeat(height // 2, 0).repeat(width // 2, 1))


def corners(picture):
    pixels = np.asarray(picture, int)
    return np.stack([[pixels[y, x] for x in (3, -4)] for y in (3, -4)])


def saved(picture, kind, **options):
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


# --- upright ----------------------------------------------------------------------------------------------------------

# How a camera stores a picture that is to be shown as it is, by what it writes beside it.
STORED = {
    1: lambda p: p,
    2: np.fliplr,
    3: lambda p: np.rot90(p, 2),
    4: np.flipud,
    5: lambda p: p.swapaxes(0, 1),
    6: lambda p: np.rot90(p, 1),
    7: lambda p: np.rot90(p.swapaxes(0, 1), 2),
    8: lambda p: np.rot90(p, -1),
}


def turned(orientation, kind, base=None):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](np.asarray(base or quadrants()))))
    options = {"tiffinfo": {0x0112: orientation}} if kind == "TIFF" else {"exif": exif}
    return saved(stored, kind, **options, **({"quality": 95} if kind in ("JPEG", "AVIF") else {}))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", STORED)
def test_pictures_are_upright(orientation, kind):
    shown = decode_image(turned(orientation, kind))
    assert shown.size == (96, 64)
    assert np.abs(corners(shown) - CORNERS).max() <= 30  # WebP and AVIF compress colours


def test_a_deep_grey_picture_is_upright_too():
    ramp = Image.fromarray(np.tile(np.linspace(0, 65535, 32).astype(np.uint16), (8, 1)))
    for kind in ("PNG", "TIFF"):
        shown = np.asarray(decode_image(turned(6, kind, ramp)))
        assert shown.shape == (8, 32, 3) and (np.diff(shown[0, :, 0].astype(int)) > 0).all()


def test_a_phones_photo_is_upright():
    shown = decode_image((DATA / "exif6.jpg").read_bytes())
    assert shown.size == (96, 64) and np.abs(corners(shown) - CORNERS).max() <= 20


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_that_is_none_changes_nothing(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.abs(corners(decode_image(saved(quadrants(), "PNG", exif=exif))) - CORNERS).max() == 0


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", b"junk"]
)
def test_damaged_metadata_do_not_spoil_a_picture(exif):
    assert (
        np.abs(corners(decode_image(saved(quadrants(), "JPEG", exif=b"Exif\0\0" + exif, quality=95))) - CORNERS).max()
        <= 20
    )


def test_frames_and_pictures_in_memory_are_taken_as_they_are():
    frame = quadrants()
    frame.getexif()[0x0112] = 6
    assert Preprocess().video([frame], 64).shape == (1, 3, 64, 64)
    assert (Preprocess().image(frame, 64) == Preprocess().image(quadrants(), 64)).all()


# --- eight bits -------------------------------------------------------------------------------------------------------


def ramp(top, dtype, width=96):
    return np.tile((np.arange(width) * (top / (width - 1))).astype(dtype), (8, 1))


RAMPS = {
    "PNG of 16 bits": saved(Image.fromarray(ramp(65535, np.uint16)), "PNG"),
    "TIFF of 16 bits": saved(Image.fromarray(ramp(65535, np.uint16)), "TIFF"),
    "TIFF of 16 bits, big-endian": saved(Image.fromarray(ramp(65535, ">u2")), "TIFF"),
    "PGM of 16 bits": b"P5 96 8 65535\n" + ramp(65535, ">u2").tobytes(),
    "TIFF of 32 bits, to 65,535": saved(Image.fromarray(ramp(65535, np.int32)), "TIFF"),
    "TIFF of 32 bits, to 255": saved(Image.fromarray(ramp(255, np.int32)), "TIFF"),
    "floating point to 1": saved(Image.fromarray(ramp(1, np.float32)), "TIFF"),
    "floating point to 255": saved(Image.fromarray(ramp(255, np.float32)), "TIFF"),
    "floating point to 65,535": saved(Image.fromarray(ramp(65535, np.float32)), "TIFF"),
    "PNG of 8 bits": saved(Image.fromarray(ramp(255, np.uint8)), "PNG"),
}


@pytest.mark.parametrize("name", RAMPS)
def test_a_ramp_from_black_to_white_is_one(name):
    shown = np.asarray(decode_image(RAMPS[name]), int)
    wanted = np.array([column * 255 / 95 for column in range(96)])
    assert np.abs(shown[4] - wanted[:, None]).max() <= 1
    assert shown[4, 0].tolist() == [0, 0, 0] and shown[4, -1].tolist() == [255, 255, 255]


def test_a_dark_picture_of_16_bits_stays_dark():
    dark = np.full((8, 8), 200, np.uint16)
    assert np.asarray(decode_image(image_file(Image.fromarray(dark)))).max() == 1
    assert np.asarray(decode_image((DATA / "grey16.png").read_bytes())).mean() == pytest.approx(127.5, abs=0.5)


def png_of_16_bits(pixels):
    """An RGB PNG of 16 bits, which Pillow cannot write."""
    height, width = pixels.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_colours_of_16_bits_keep_their_values():
    wide = np.stack([ramp(65535, np.uint16), ramp(30000, np.uint16), 65535 - ramp(65535, np.uint16)], -1)
    assert np.abs(np.asarray(decode_image(png_of_16_bits(wide)), int) - wide / 257).max() <= 1


@pytest.mark.parametrize("values", [[-1.0, 0.5], [0.0, 1e6], [0.0, np.nan], [0.0, np.inf]])
def test_grey_values_of_an_unknown_range_are_an_error(values):
    picture = Image.fromarray(np.array([values] * 2, np.float32))
    with pytest.raises(UserError, match=r"unreadable image \(grey values.*range is not known"):
        decode_image(saved(picture, "TIFF"))


# --- on white ---------------------------------------------------------------------------------------------------------


def drawing(mode):
    """A black rectangle in the middle of a transparent sheet of black."""
    alpha = np.zeros((64, 96), np.uint8)
    alpha[16:48, 24:72] = 255
    if mode == "RGBA":
        return Image.fromarray(np.dstack([np.zeros((64, 96, 3), np.uint8), alpha]))
    if mode == "LA":
        return Image.merge("LA", (Image.new("L", (96, 64)), Image.fromarray(alpha)))
    picture = Image.fromarray((alpha > 0).astype(np.uint8) * 7)  # 7 is drawn, 0 is clear
    if mode == "P":
        picture.putpalette(bytes(24))
    if mode == "RGB":
        picture = Image.merge("RGB", [picture] * 3)
    return picture


@pytest.mark.parametrize(
    ("mode", "kind", "options"),
    [
        ("RGBA", "PNG", {}),
        ("RGBA", "WEBP", {"lossless": True}),
        ("RGBA", "TIFF", {}),
        ("RGBA", "AVIF", {"quality": 95}),
        ("LA", "PNG", {}),
        ("P", "PNG", {"transparency": 0}),
        ("P", "PNG", {"transparency": b"\0" + b"\xff" * 7}),
        ("P", "GIF", {"transparency": 0}),
        ("L", "PNG", {"transparency": 0}),
        ("RGB", "PNG", {"transparency": (0, 0, 0)}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_transparent_is_white(mode, kind, options):
    shown = np.asarray(decode_image(saved(drawing(mode), kind, **options)), int)
    assert shown[32, 48].max() <= 10 and shown[20, 30].max() <= 10
    assert all(shown[y, x].min() >= 250 for y, x in ((3, 3), (3, -4), (-4, 3), (-4, -4), (32, 5)))


def test_half_transparent_is_half_white():
    shown = decode_image(image_file(Image.new("RGBA", (8, 8), (200, 0, 100, 128))))
    assert np.abs(np.array(shown.getpixel((4, 4))) - [227, 127, 177]).max() <= 1


def test_an_animation_shows_its_first_frame():
    frames = [Image.new("RGBA", (16, 16), colour) for colour in ((250, 0, 0, 255), (0, 250, 0, 255))]
    for kind in ("GIF", "WEBP", "PNG"):
        data = saved(frames[0], kind, save_all=True, append_images=frames[1:])
        assert np.abs(np.array(decode_image(data).getpixel((8, 8))) - [250, 0, 0]).max() <= 6


# --- colours ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_inks_become_light(kind):
    inks = Image.new("CMYK", (16, 16), (0, 200, 200, 20))
    shown = np.array(decode_image(saved(inks, kind)).getpixel((8, 8)))
    assert shown[0] > 200 and shown[1:].max() < 80


def test_lab_is_shown_in_its_colours():
    to_lab = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
    lab = ImageCms.applyTransform(quadrants(), to_lab)
    assert np.abs(corners(decode_image(saved(lab, "TIFF"))) - CORNERS).max() <= 4


def test_an_iphones_photo_is_read_where_its_package_is_installed(monkeypatch):
    data = (DATA / "phone.heic").read_bytes()
    shown = decode_image(data)
    assert shown.size == (96, 64) and np.abs(corners(shown) - CORNERS).max() <= 25
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"unreadable image \(HEIC needs the package pillow-heif: pip install"):
        decode_image(data)


# --- as the original and the port resize ------------------------------------------------------------------------------


def noise(width, height):
    return Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8))


SIZES = [(500, 375), (640, 480), (640, 427), (427, 640), (333, 500), (501, 377), (224, 224), (225, 300), (100, 60)]


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_cropped_pixels_are_those_of_the_port(width, height):
    picture = noise(width, height)
    theirs = VideoLlavaImageProcessor()(picture, return_tensors="pt", return_legacy_image_output=False)["pixel_values"]
    assert (Preprocess("crop").image(picture, 224) - theirs[0]).abs().max() <= 5e-7


@pytest.mark.parametrize(("width", "height"), [*SIZES, (1, 150), (3000, 20), (20, 3000), (901, 900)])
def test_padded_pixels_are_those_of_the_whole_square(width, height):
    picture = noise(width, height)
    side = max(picture.size)
    square = Image.new("RGB", (side, side), tuple(int(value * 255) for value in CLIP_MEAN))
    square.paste(picture, ((side - width) // 2, (side - height) // 2))
    theirs = VideoLlavaImageProcessor()(square, return_tensors="pt", return_legacy_image_output=False)["pixel_values"]
    assert (Preprocess("pad").image(picture, 224) - theirs[0]).abs().max() <= 5e-7


# --- files that are refused -------------------------------------------------------------------------------------------


def bmp_header(width, height):
    """The header of a bitmap, without its pixels."""
    return b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, *[0] * 6)


@pytest.mark.parametrize(
    ("width", "height"),
    [(MAX_PIXELS // 4000, 4001), (12_000, 12_000), (MAX_SIDE + 1, 900), (1, MAX_ASPECT + 1), (20000, 1)],
)
def test_a_picture_beyond_the_limits_is_refused_by_its_header(width, height):
    with pytest.raises(UserError, match=rf"unreadable image \({width} x {height} pixels"):
        decode_image(bmp_header(width, height))


@pytest.mark.parametrize(
    "data",
    [
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(x) run\n%%EOF\n",
        b"%PDF-1.4\n",
        b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>",
        saved(quadrants(), "ICO"),
        saved(quadrants(), "PCX"),
        saved(quadrants(), "TGA"),
    ],
    ids=["EPS", "PDF", "SVG", "ICO", "PCX", "TGA"],
)
def test_only_formats_of_pictures_are_tried(data):
    with pytest.raises(UserError, match="unreadable image"):
        decode_image(data)


FILES = {kind: saved(noise(50, 40), kind) for kind in ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "AVIF", "PPM")}
FILES |= {"HEIC": (DATA / "phone.heic").read_bytes(), "turned": turned(6, "JPEG"), "deep": RAMPS["PNG of 16 bits"]}


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_picture_is_pixels_or_an_error_of_one_line(name):
    rng = np.random.default_rng(0)
    for _ in range(60):
        data = bytearray(FILES[name])
        for place in rng.integers(min(len(data), rng.choice([64, len(data)])), size=rng.integers(1, 6)):
            data[place] = rng.choice([0, 127, 255, rng.integers(256)])
        try:
            assert decode_image(bytes(data[: len(data) // rng.choice([1, 1, 2])])).mode == "RGB"
        except UserError as error:
            assert str(error).startswith("unreadable image (") and "\n" not in str(error)


def test_the_largest_pictures_fit_in_a_gibibyte():
    code = """
import io, resource
from PIL import Image
from vllava.data.media import Preprocess, decode_image
idle = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for mode, size, fit in (("RGBA", (8192, 8192), "pad"), ("F", (8192, 8192), "crop")):
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, "TIFF")
    Preprocess(fit).image(decode_image(buffer.getvalue()), 224)
    del buffer
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - idle) // 1024)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert int(done.stdout) < 1024 + 512  # the file itself and its copies are a part of it


def test_limits_do_not_change_those_of_pillow():
    before = Image.MAX_IMAGE_PIXELS, set(Image.OPEN)
    decode_image(jpeg())
    assert before[0] == Image.MAX_IMAGE_PIXELS and "HEIF" not in set(Image.OPEN) - before[1]
