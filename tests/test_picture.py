"""Picture files to what a viewer shows: values known by construction."""

import re
from pathlib import Path

import numpy as np
import pytest
from picture_fixtures import bmp_with_alpha, chunk, encoded, exif, png, quadrants, tiff
from PIL import Image, ImageCms

from vllava.data.picture import decode_image, image_size
from vllava.errors import UserError

FILES = Path(__file__).parent / "data" / "pictures"
WHITE = (255, 255, 255)


def decoded(data):
    picture = decode_image(data)
    assert type(picture) is Image.Image and picture.mode == "RGB"
    return np.asarray(picture, int)


def shows_quadrants(data, tolerance=4):
    """96 x 64 with red, green, blue and white corners, as `quadrants` draws them."""
    pixels = decoded(data)
    return pixels.shape == (64, 96, 3) and np.abs(pixels[4::55, 4::87] - quadrants()[4::55, 4::87]).max() <= tolerance


# --- the way up -------------------------------------------------------------------------------------------------------

# What a camera stores so that its picture is upright once the orientation is applied, in the words of EXIF 2.3, 4.6.4
STORED = {
    1: lambda shown: shown,  # row 0 is the top, column 0 the left-hand side
    2: lambda shown: shown[:, ::-1],  # top, right
    3: lambda shown: shown[::-1, ::-1],  # bottom, right
    4: lambda shown: shown[::-1],  # bottom, left
    5: lambda shown: shown.transpose(1, 0, 2),  # row 0 is the left-hand side, column 0 the top
    6: lambda shown: shown.transpose(1, 0, 2)[::-1],  # right, top
    7: lambda shown: shown.transpose(1, 0, 2)[::-1, ::-1],  # right, bottom
    8: lambda shown: shown.transpose(1, 0, 2)[:, ::-1],  # left, bottom
}


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF", "HEIF", "MPO"])
def test_a_picture_is_upright_whatever_way_the_camera_was_held(kind, orientation):
    stored = np.ascontiguousarray(STORED[orientation](quadrants()))
    data = encoded(stored, kind, exif=b"Exif\0\0" + exif(orientation))
    assert shows_quadrants(data, tolerance=12)


def test_pictures_of_phones_are_upright():
    assert shows_quadrants((FILES / "exif6.jpg").read_bytes())
    assert shows_quadrants((FILES / "phone.heic").read_bytes())


def test_the_brand_that_avif_and_heic_share_is_told_apart():
    for data in (encoded(quadrants(), "AVIF"), (FILES / "phone.heic").read_bytes()):
        assert data[8:12] in (b"avif", b"heic")
        assert shows_quadrants(data[:8] + b"mif1" + data[12:], 12)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1", "I;16", "CMYK"])
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_pictures_of_every_mode_are_turned(kind, mode):
    if (kind, mode) == ("PNG", "CMYK"):
        return
    grey = np.where(np.arange(96)[:, None] < 48, 0, 65535 if mode == "I;16" else 255) * np.ones((1, 64), int)
    picture = Image.fromarray(grey.astype(np.uint16 if mode == "I;16" else np.uint8))
    data = encoded(picture if mode == "I;16" else picture.convert("RGB").convert(mode), kind, exif=exif(6))
    pixels = decoded(data)
    assert pixels.shape == (64, 96, 3) and pixels[:, :47].min() >= 254 and pixels[:, 49:].max() <= 1


@pytest.mark.parametrize(
    ("data", "upright"),
    [
        (exif(6, ">"), True),
        (exif(6, "<", kind=4), True),
        (exif(6, ">", kind=4), True),
        (b"Exif\0\0" + exif(6), True),
        (exif(6) + b"what a camera's maker adds", True),
        (exif(6)[:22], True),  # cut after the entry
        (exif(0), False),
        (exif(9), False),
        (exif(70000, kind=4), False),
        (exif(6, kind=2), False),  # "text"
        (b"", False),
        (b"Exif\0\0", False),
        (b"not EXIF at all", False),
        (b"II*\0", False),
        (b"II*\0\xff\xff\xff\xff", False),
        (exif(6)[:17], False),  # cut within the entry
        (b"MM\0*\0\0\0\x08\xff\xff" + bytes(30), False),
    ],
)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_that_cannot_be_read_does_not_spoil_a_picture(kind, data, upright):
    stored = STORED[6](quadrants())
    if kind == "JPEG" and not data.startswith(b"Exif"):
        data = b"Exif\0\0" + data
    if kind == "PNG":
        file = png((64, 96), 8, 2, [row.tobytes() for row in stored], chunk(b"eXIf", data))
    else:
        file = encoded(np.ascontiguousarray(stored), kind, exif=data, quality=95)
    assert shows_quadrants(file, 12) == upright
    assert decoded(file).shape == ((64, 96, 3) if upright else (96, 64, 3))


def test_malformed_exif_does_not_spoil_a_tiff_or_an_avif():
    camera = Image.Exif()
    camera[271], camera[274] = "a maker", 6
    avif = encoded(np.ascontiguousarray(STORED[6](quadrants())), "AVIF", exif=camera.tobytes())
    place = re.search(rb"(II|MM)(\*\0|\0\*).{0,30}a maker", avif, re.DOTALL).start()
    assert shows_quadrants(avif[:place] + b"????" + avif[place + 4 :], 12)
    grey = np.arange(24, dtype=np.uint8).reshape(4, 6)
    for garbage in (0, 3, 60, 2**31, 2**32 - 1):  # where the EXIF directory, and GPS, should be
        file = tiff(grey.tobytes(), 8, size=(6, 4), t274=4, t34665=garbage, t34853=garbage)
        assert (decoded(file)[..., 0] == grey[::-1]).all()


def test_the_orientation_of_xmp_and_of_old_pngs_is_read():
    rows = [row.tobytes() for row in STORED[6](quadrants())]
    hexed = (b"Exif\0\0" + exif(6)).hex().encode()
    old = chunk(b"tEXt", b"Raw profile type exif\0\nexif\n%8d\n%b\n" % (len(hexed) // 2, hexed))
    xmp = chunk(b"iTXt", b'XML:com.adobe.xmp\0\0\0\0\0<rdf:Description tiff:Orientation="6"/>')
    assert shows_quadrants(png((64, 96), 8, 2, rows, old))
    assert shows_quadrants(png((64, 96), 8, 2, rows, xmp))
    packet = b"<x:xmpmeta><tiff:Orientation>6</tiff:Orientation></x:xmpmeta>"
    assert shows_quadrants(encoded(np.ascontiguousarray(STORED[6](quadrants())), "WEBP", xmp=packet, quality=95), 12)
    broken = chunk(b"tEXt", b"Raw profile type exif\0\nexif\n  9\nno hex\n")
    assert decoded(png((64, 96), 8, 2, rows, broken)).shape == (96, 64, 3)


# --- 16 bits and floating point ---------------------------------------------------------------------------------------

RAMP = np.rint(np.arange(96) * 65535 / 95)
EIGHT_BITS = [round(column * 255 / 95) for column in range(96)]


def stored_ramp(dtype, factor=1.0):
    return np.tile(RAMP * factor, (4, 1)).astype(dtype).tobytes()


DEEP = {
    "PNG": lambda: (FILES / "grey16.png").read_bytes(),
    "PNG by Pillow": lambda: encoded(np.tile(RAMP, (4, 1)).astype(np.uint16), "PNG"),
    "TIFF, little-endian": lambda: tiff(stored_ramp("<u2"), 16, size=(96, 4)),
    "TIFF, big-endian": lambda: tiff(stored_ramp(">u2"), 16, ">", size=(96, 4)),
    "TIFF, compressed": lambda: encoded(np.tile(RAMP, (4, 1)).astype(np.uint16), "TIFF", compression="tiff_lzw"),
    "TIFF, white is zero": lambda: tiff((65535 - RAMP).astype("<u2").tobytes() * 4, 16, photometric=0, size=(96, 4)),
    "TIFF, 15 bits and a sign": lambda: tiff(stored_ramp("<i2", 32767 / 65535), 16, sample_format=2, size=(96, 4)),
    "TIFF, 16 bits in 32": lambda: encoded(Image.fromarray(np.tile(RAMP, (4, 1)).astype(np.int32)), "TIFF"),
    "TIFF, 8 bits in 32": lambda: tiff(stored_ramp(">i4", 255 / 65535), 32, ">", sample_format=2, size=(96, 4)),
    "TIFF, 31 bits": lambda: tiff(stored_ramp("<i4", 32768), 32, sample_format=2, size=(96, 4)),
    "TIFF, 32 bits": lambda: tiff(stored_ramp("<u4", 65537), 32, size=(96, 4)),
    "TIFF, numbers to 1": lambda: encoded(Image.fromarray(np.tile(RAMP / 65535, (4, 1)).astype(np.float32)), "TIFF"),
    "TIFF, numbers to 255": lambda: tiff(stored_ramp(">f4", 255 / 65535), 32, ">", sample_format=3, size=(96, 4)),
    "TIFF, numbers to 65535": lambda: tiff(stored_ramp("<f4"), 32, sample_format=3, size=(96, 4)),
}  # fmt: skip


@pytest.mark.parametrize("name", DEEP)
def test_more_than_8_bits_are_brought_to_8(name):
    pixels = decoded(DEEP[name]())
    assert (pixels == pixels[:1, :, :1]).all()  # grey, and every row the same
    tolerance = 1 if "8 bits in 32" in name or "15 bits" in name else 0  # whose own steps are that coarse
    assert np.abs(pixels[0, :, 0] - EIGHT_BITS).max() <= tolerance
    if name == "PNG":
        assert pixels.mean() == 127.5


def test_12_bits_are_brought_to_8():
    values = np.arange(0, 4096, 65)  # 64 of them, two in three bytes
    pairs = values.reshape(-1, 2)
    packed = np.stack([pairs[:, 0] >> 4, (pairs[:, 0] & 15) << 4 | pairs[:, 1] >> 8, pairs[:, 1] & 255], 1)
    pixels = decoded(tiff(packed.astype(np.uint8).tobytes(), 12, size=(64, 1)))
    assert pixels[0, :, 0].tolist() == [round(int(value) * 255 / 4095) for value in values]


@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bits_of_colour_are_brought_to_8_within_one_level(kind, channels):
    pixels = np.stack([RAMP, RAMP[::-1], np.full(96, 40000), np.full(96, 65535)][:channels], 1)
    expected = np.stack([EIGHT_BITS, EIGHT_BITS[::-1], np.full(96, 156)], 1)
    if kind == "PNG":
        data = png((96, 1), 16, 2 if channels == 3 else 6, [pixels.astype(">u2").tobytes()])
    else:
        data = tiff(pixels.astype("<u2").tobytes(), 16, photometric=2, size=(96, 1), t277=channels)
    assert np.abs(decoded(data)[0] - expected).max() <= 1


def test_a_little_over_white_and_under_black_is_cut_off():
    """As resampling leaves it; it must not make of white a 1 of 255."""
    values = np.array([[-0.05, 0.0, 0.5, 1.0, 1.06]], np.float32)
    assert decoded(encoded(Image.fromarray(values), "TIFF"))[0, :, 0].tolist() == [0, 0, 128, 255, 255]


@pytest.mark.parametrize(
    "values",
    [[-1.0, 1.0], [0.0, 1e6], [0.0, np.nan], [np.nan, 1.0], [0.0, np.inf], [-np.inf, 1.0], [-9000.0, 8000.0]],
)
def test_numbers_that_do_not_say_what_is_white_are_an_error(values):
    with pytest.raises(UserError, match=r"unreadable image \(TIFF: values from .* what is white\)"):
        decode_image(encoded(Image.fromarray(np.array([values], np.float32)), "TIFF"))


# --- transparency -----------------------------------------------------------------------------------------------------


def drawing():
    """Black on nothing, with an edge that is half transparent."""
    alpha = np.zeros((64, 96), np.uint8)
    alpha[16:48, 24:72], alpha[16:48, 24] = 255, 128
    return alpha


def shows_the_drawing(data):
    pixels = decoded(data)
    return (
        (pixels[:16] == 255).all()
        and (pixels[:, 73:] == 255).all()
        and (pixels[17:47, 26:70] == 0).all()
        and np.abs(pixels[20:40, 24] - 127).max() <= 1
    )


def on_nothing(mode):
    alpha = Image.fromarray(drawing())
    picture = Image.new("L" if mode in ("LA", "La") else "RGB", alpha.size, 0)
    picture.putalpha(alpha)
    return picture.convert(mode) if mode in ("RGBa", "La") else picture


def drawing_rows():
    return [row.tobytes() for row in drawing()]


def deep_drawing(channels):
    """Rows of 16 bits a channel, the last of which is the drawing's alpha."""
    pixels = np.zeros((64, 96, channels), ">u2")
    pixels[..., -1] = drawing() * 257.0
    return [row.tobytes() for row in pixels]


PALETTE, ALPHAS = chunk(b"PLTE", bytes(768)), chunk(b"tRNS", bytes(range(256)))  # black of every opacity
TRANSPARENT = {
    "file": lambda: (FILES / "black_on_transparent_rgba.png").read_bytes(),
    "RGBA PNG": lambda: encoded(on_nothing("RGBA"), "PNG"),
    "LA PNG": lambda: encoded(on_nothing("LA"), "PNG"),
    "RGBA WebP": lambda: encoded(on_nothing("RGBA"), "WEBP", lossless=True, exact=True),
    "RGBA TIFF": lambda: encoded(on_nothing("RGBA"), "TIFF"),
    "premultiplied TIFF": lambda: encoded(on_nothing("RGBA"), "TIFF", tiffinfo={338: 1}),
    "LA TIFF": lambda: encoded(on_nothing("LA"), "TIFF"),
    "RGBA BMP": lambda: bmp_with_alpha(on_nothing("RGBA")),
    "RGBA AVIF": lambda: encoded(on_nothing("RGBA"), "AVIF", quality=100),
    "RGBA HEIC": lambda: encoded(on_nothing("RGBA"), "HEIF"),
    "16-bit RGBA PNG": lambda: png((96, 64), 16, 6, deep_drawing(4)),
    "16-bit LA PNG": lambda: png((96, 64), 16, 4, deep_drawing(2)),
    "palette PNG, a byte for each": lambda: png((96, 64), 8, 3, drawing_rows(), PALETTE, ALPHAS),
    "palette TIFF with alpha": lambda: encoded(on_nothing("RGBA").convert("PA"), "TIFF"),
}  # fmt: skip


@pytest.mark.parametrize("name", TRANSPARENT)
def test_transparency_is_laid_on_white(name):
    data = TRANSPARENT[name]()
    pixels = decoded(data)
    if "file" in name:  # it has no soft edge
        assert (pixels[:16] == 255).all() and (pixels[17:47, 26:70] == 0).all() and pixels.mean() == 191.25
    else:
        assert shows_the_drawing(data)


def grey_rows(depth):
    """All levels of that depth in one row, packed."""
    levels = range(2**depth) if depth < 16 else range(0, 65536, 257)
    bits = "".join(f"{level:0{depth}b}" for level in levels)
    row = int(bits.ljust(8, "0"), 2).to_bytes(max(1, len(bits) // 8), "big")
    return len(levels), [row] * 3


@pytest.mark.parametrize(("depth", "key"), [(1, 1), (1, 0), (2, 2), (4, 9), (8, 200), (16, 257 * 200)])
def test_the_transparent_grey_of_a_png_becomes_white_and_no_other(depth, key):
    width, rows = grey_rows(depth)
    pixels = decoded(png((width, 3), depth, 0, rows, chunk(b"tRNS", key.to_bytes(2, "big"))))
    step = 255 // (width - 1)
    expected = [255 if level * (257 if depth == 16 else 1) == key else level * step for level in range(width)]
    assert pixels[0, :, 0].tolist() == expected


@pytest.mark.parametrize("depth", [8, 16])
def test_the_transparent_colour_of_a_png_becomes_white_and_no_other(depth):
    scale, dtype = (1, ">u1") if depth == 8 else (257, ">u2")
    colours = np.array([(10, 20, 30), (10, 20, 31), (0, 0, 0)])
    key = (np.array((10, 20, 30)) * scale).astype(">u2").tobytes()
    pixels = decoded(png((3, 1), depth, 2, [(colours * scale).astype(dtype).tobytes()], chunk(b"tRNS", key)))
    assert pixels[0].tolist() == [[255, 255, 255], [10, 20, 31], [0, 0, 0]]


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
@pytest.mark.parametrize("alphas", [b"\xff\x00", b"\xff\x80", b"\x00", b"\xff\xff"])
def test_the_palette_of_a_png_has_its_transparency(depth, alphas):
    palette = chunk(b"PLTE", bytes((200, 0, 0, 0, 0, 100)))
    row = b"\x01".rjust(2, b"\0")[: 2 if depth == 8 else 1] if depth == 8 else bytes([1 << (8 - 2 * depth)])
    pixels = decoded(png((2, 1), depth, 3, [row], palette, chunk(b"tRNS", alphas)))
    for colour, alpha, pixel in zip([(200, 0, 0), (0, 0, 100)], (*alphas, 255), pixels[0], strict=False):
        expected = [round((level * alpha + 255 * (255 - alpha)) / 255) for level in colour]
        assert np.abs(pixel - expected).max() <= 1


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "AVIF", "TIFF"])
def test_of_an_animation_the_first_frame_is_read(kind):
    frames = [on_nothing("RGBA")] + [Image.new("RGBA", (96, 64), colour) for colour in ("red", "blue")]
    if kind == "GIF":
        first = Image.fromarray(np.where(drawing() > 200, 1, 0).astype(np.uint8)).convert("P")
        first.putpalette([0, 255, 0, 0, 0, 0])
        data = encoded(first, kind, save_all=True, append_images=frames[1:], transparency=0, disposal=2)
        pixels = decoded(data)
        assert (pixels[:16] == 255).all() and (pixels[17:47, 26:70] == 0).all()
    else:
        options = {"WEBP": {"lossless": True}, "AVIF": {"quality": 100}}.get(kind, {})
        assert shows_the_drawing(encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options))


@pytest.mark.parametrize("disposal", [0, 1, 2, 3])
def test_what_the_first_picture_of_a_gif_does_not_cover_is_white(disposal):
    data = bytearray(encoded(Image.new("P", (20, 10), 0), "GIF"))
    data[6:10] = bytes((40, 0, 30, 0))  # a sheet of 40 x 30
    frame = data.index(b",", 13)
    data[frame + 1 : frame + 5] = bytes((5, 0, 8, 0))  # its picture at (5, 8)
    control = bytes((0x21, 0xF9, 4, disposal << 2, 0, 0, 0, 0))
    pixels = decoded(bytes(data[:frame]) + control + bytes(data[frame:]))
    assert pixels.shape == (30, 40, 3)
    assert (pixels[8:18, 5:25] == 0).all()
    assert pixels.sum() == 255 * 3 * (40 * 30 - 20 * 10)


# --- colour spaces ----------------------------------------------------------------------------------------------------

INKS = np.array(
    [[(0, 0, 0, 0), (255, 0, 0, 0), (0, 255, 0, 0), (0, 0, 255, 0), (0, 0, 0, 255), (100, 50, 0, 60)]], np.uint8
)
PRINTED = [(255, 255, 255), (0, 255, 255), (255, 0, 255), (255, 255, 0), (0, 0, 0), (118, 157, 195)]


def patches(colours, size=16):
    """Squares of one colour each, so that a JPEG keeps them."""
    return np.repeat(np.repeat(colours, size, 0), size, 1)


def centres(pixels, size=16):
    return pixels[size // 2, size // 2 :: size]


@pytest.mark.parametrize("adobe", [True, False])
def test_a_cmyk_jpeg_has_its_colours(adobe):
    data = encoded(Image.fromarray(patches(INKS), "CMYK"), "JPEG", quality=100, subsampling=0)
    place = data.index(b"Adobe") - 4
    if not adobe:  # Pillow takes those without the mark to be inverted as well, as programs write them
        data = data[:place] + data[place + 16 :]
    assert np.abs(centres(decoded(data)) - PRINTED).max() <= 4


def test_a_ycck_jpeg_has_its_colours():
    """Adobe stores inks inverted; YCCK has the YCbCr of the inverse of that, which is the inks, and K as it was."""
    inks = Image.fromarray(patches(INKS)[..., :3]).convert("YCbCr")
    stored = np.concatenate([np.asarray(inks), 255 - patches(INKS)[..., 3:]], -1)
    data = bytearray(encoded(Image.fromarray(255 - stored, "CMYK"), "JPEG", quality=100, subsampling=0))
    data[data.index(b"Adobe") + 11] = 2  # YCCK
    assert np.abs(centres(decoded(bytes(data))) - PRINTED).max() <= 6


def test_a_cmyk_tiff_has_its_colours():
    assert np.abs(centres(decoded(encoded(Image.fromarray(patches(INKS), "CMYK"), "TIFF"))) - PRINTED).max() <= 1


def srgb(light, a, b):
    """CIE L*a*b* under D50 as sRGB, by the formulas of CIE 15 and IEC 61966-2-1."""
    y = (light + 16) / 116
    xyz = [
        value**3 if value > 6 / 29 else 3 * (6 / 29) ** 2 * (value - 4 / 29) for value in (y + a / 500, y, y - b / 200)
    ]
    to_linear = [
        [3.1338561, -1.6168667, -0.4906146],
        [-0.9787684, 1.9161415, 0.033454],
        [0.0719453, -0.2289914, 1.4052427],
    ]
    linear = np.array(to_linear) @ (np.array(xyz) * (0.96422, 1, 0.82521))
    return [round(255 * (12.92 * v if v <= 0.0031308 else 1.055 * v ** (1 / 2.4) - 0.055)) for v in linear]


def test_a_lab_tiff_has_its_colours():
    colours = [(0, 0, 0), (100, 0, 0), (50, 0, 0), (60, 30, 40), (40, -20, 10), (70, -10, -30), (80, 5, 60)]
    stored = np.array([[(round(light * 2.55), a + 128, b + 128) for light, a, b in colours]], np.uint8)
    data = encoded(
        Image.merge("LAB", [Image.fromarray(np.ascontiguousarray(stored[..., i])) for i in range(3)]), "TIFF"
    )
    assert np.abs(decoded(data)[0] - [srgb(*colour) for colour in colours]).max() <= 2


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "HEIF"])
def test_a_grey_picture_stays_grey(kind):
    pixels = decoded(encoded(Image.new("L", (64, 48), 77), kind))
    assert pixels.shape == (48, 64, 3) and np.abs(pixels - 77).max() <= 1


def test_colour_profiles_are_ignored():
    """As by the original: a profile changes no pixel."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ")).tobytes()
    assert (decoded(encoded(quadrants(), "PNG", icc_profile=profile)) == quadrants()).all()


@pytest.mark.parametrize("orientation", [None, 1, 6])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("progressive", [False, True])
def test_the_size_of_a_jpeg_is_known_from_its_head(mode, progressive, orientation):
    tags = Image.Exif()
    if orientation:
        tags[0x0112] = orientation
    for size in ((1, 1), (640, 360), (17, 300)):
        data = encoded(Image.new("RGB", size).convert(mode), "JPEG", progressive=progressive, exif=tags)
        assert image_size(data) == decode_image(data).size == (size[::-1] if orientation == 6 else size)


def test_the_size_of_a_jpeg_that_is_too_large_or_cut_is_not_told():
    data = bytearray(encoded(Image.new("RGB", (640, 360)), "JPEG"))
    with pytest.raises(UserError, match="unreadable image"):
        image_size(bytes(data[:60]))
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = b"\xff\xff\xff\xff"
    with pytest.raises(UserError, match="at most 49 million"):
        image_size(bytes(data))
