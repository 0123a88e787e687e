"""Damaged, hostile and foreign picture files: pixels or an error of one line, within memory and time."""

import os
import re
import subprocess
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from picture_fixtures import chunk, encoded, exif, png, tiff
from PIL import Image

from vllava.data.picture import decode_image
from vllava.errors import UserError

HEIC = Path(__file__).parent / "data" / "pictures" / "phone.heic"

# --- what is not read -------------------------------------------------------------------------------------------------

KINDS = {
    "JPEG": lambda picture: encoded(picture, "JPEG"),
    "progressive JPEG": lambda picture: encoded(picture, "JPEG", progressive=True),
    "CMYK JPEG": lambda picture: encoded(picture.convert("CMYK"), "JPEG"),
    "PNG": lambda picture: encoded(picture, "PNG", exif=exif(6)),
    "16-bit PNG": lambda picture: encoded(picture.convert("L").convert("I").convert("I;16"), "PNG"),
    "GIF": lambda picture: encoded(picture.quantize(16), "GIF", transparency=3),
    "WebP": lambda picture: encoded(picture, "WEBP", exif=exif(6)),
    "lossless WebP": lambda picture: encoded(picture.convert("RGBA"), "WEBP", lossless=True),
    "BMP": lambda picture: encoded(picture, "BMP"),
    "TIFF": lambda picture: encoded(picture, "TIFF"),
    "packed TIFF": lambda picture: encoded(picture, "TIFF", compression="tiff_lzw"),
    "float TIFF": lambda picture: encoded(picture.convert("F"), "TIFF"),
    "AVIF": lambda picture: encoded(picture, "AVIF"),
    "HEIC": lambda picture: encoded(picture, "HEIF"),
}


def photo():
    ramp = np.add.outer(np.arange(50) * 3, np.arange(70) * 2)
    return Image.fromarray(((ramp[..., None] + np.array([0, 30, 60])) % 256).astype(np.uint8))


@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_that_is_cut_short_is_an_error(kind):
    data = KINDS[kind](photo())
    for share in range(1, 19):  # the last bytes of a PNG hold no pixels
        with pytest.raises(UserError, match=r"^unreadable image \(.+\)$"):
            decode_image(data[: len(data) * share // 20])


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_picture_gives_pixels_or_an_error_of_one_line(kind):
    data, rng, errors = KINDS[kind](photo()), np.random.default_rng(0), 0
    extremes = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
    for case in range(150):
        damaged = bytearray(data)
        if case % 3 == 0:  # a few bits
            for place in rng.integers(len(data), size=rng.integers(1, 10)):
                damaged[place] ^= 1 << rng.integers(8)
        elif case % 3 == 1:  # a number in a header
            place, value = rng.integers(min(len(data) - 4, 300)), extremes[rng.integers(len(extremes))]
            damaged[place : place + 4] = value.to_bytes(4, "big" if case % 2 else "little")
        else:  # a piece that is missing
            start, end = sorted(rng.integers(len(data), size=2))
            del damaged[start:end]
        try:
            assert decode_image(bytes(damaged)).mode == "RGB"
        except UserError as error:
            errors += 1
            assert re.fullmatch(r"unreadable image \(.{3,400}\)", str(error))
    assert errors > 5


OTHERS = {
    "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n(%stdout) (w) file\n%%EOF\n",
    "PDF": b"%PDF-1.7\n1 0 obj\n<<>>\nendobj\n%%EOF",
    "SVG": b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><rect width="9" height="9"/></svg>',
    "FITS": b"SIMPLE  =                    T".ljust(80) + b"END".ljust(2800),
    "WMF": b"\xd7\xcd\xc6\x9a\0\0" + bytes(40),
    "HDF5": b"\x89HDF\r\n\x1a\n" + bytes(90),
    "PPM": b"P6 2 2 255\n" + bytes(12),
    "PSD": b"8BPS\0\1" + bytes(40),
    "film": b"\0\0\0\x18ftypisom\0\0\0\0isomavc1",
    "text": b"not a picture " * 20,
    "nothing": b"",
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_formats_are_an_error_that_lists_those_that_are_read(kind):
    with pytest.raises(UserError, match=r"of no known format; known are JPEG, .*HEIC\)$"):
        decode_image(OTHERS[kind])


def test_no_program_is_started_for_any_file(tmp_path, monkeypatch):
    for program in ("gs", "gswin64c", "convert", "xv", "djpeg"):
        (tmp_path / program).write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
        (tmp_path / program).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    for data in OTHERS.values():
        with pytest.raises(UserError):
            decode_image(data)
    assert not (tmp_path / "started").exists()


def test_without_pillow_heif_a_heic_is_an_error_that_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(
        UserError, match=r"unreadable image \(HEIC: it needs pillow-heif: pip install 'vllava\[heif\]'\)"
    ):
        decode_image(HEIC.read_bytes())


def test_decoding_changes_nothing_for_others():
    limit = Image.MAX_IMAGE_PIXELS
    script = "from PIL import Image; from vllava.data.picture import decode_image as d; import sys; "
    script += "d(open(sys.argv[1], 'rb').read()); assert 'HEIF' not in Image.OPEN and '.heic' not in Image.EXTENSION"
    subprocess.run([sys.executable, "-c", script, HEIC], check=True)
    assert limit == Image.MAX_IMAGE_PIXELS


def test_nothing_of_pillows_is_shown_or_raised_about_odd_but_good_pictures():
    odd = [
        png((2, 2), 8, 0, [b"ab"] * 2, chunk(b"acTL", bytes(8))),  # "Invalid APNG"
        tiff(bytes(24), 8, size=(6, 4), t282=1, t34665=7),  # "Metadata Warning", a directory in the pixels
        png((2, 1), 8, 3, [b"\0\1"], chunk(b"PLTE", bytes(6)), chunk(b"tRNS", b"\x80\x90")),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for data in odd:
            decode_image(data)


# --- limits -----------------------------------------------------------------------------------------------------------


def stating(kind, width, height):
    """A file of that kind with a small picture, whose header states another size."""
    little, big = ((width.to_bytes(n, order), height.to_bytes(n, order)) for n, order in ((2, "little"), (4, "big")))
    data = bytearray(KINDS[kind](photo()))
    if kind == "JPEG":
        place = data.index(b"\xff\xc0") + 5
        data[place : place + 4] = height.to_bytes(2, "big") + width.to_bytes(2, "big")
    elif kind == "PNG":
        data[16:33] = b"".join(big) + data[24:29] + chunk(b"IHDR", b"".join(big) + data[24:29])[-4:]
    elif kind == "GIF":
        data[6:10] = b"".join(little)
    elif kind == "WebP":
        data[24:30] = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    elif kind == "BMP":
        data[18:26] = width.to_bytes(4, "little") + height.to_bytes(4, "little")
    elif kind == "TIFF":
        data = bytearray(tiff(bytes(10), 8, size=(width, height)))
    else:
        place = -1
        while (place := data.find(b"ispe", place + 1)) > 0:
            data[place + 8 : place + 16] = b"".join(big)
    return bytes(data)


# In a process of its own, so that its memory can be measured: prints each outcome, then what the peak grew by, in MiB
MEASURED = """
import resource, struct, sys
from PIL import Image, ImageCms
from vllava.data.picture import decode_image
data = sys.stdin.buffer.read()
idle = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
while data:
    (size,), data = struct.unpack_from("<I", data), data[4:]
    try:
        print("x".join(map(str, decode_image(data[:size]).size)))
    except Exception as error:
        print(f"{type(error).__name__}: {error}")
    data = data[size:]
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - idle) // 1024)
"""


def measured(files):
    """What each file gave, and the memory that decoding took at its peak, in MiB."""
    framed = b"".join(len(data).to_bytes(4, "little") + data for data in files)
    out = subprocess.run([sys.executable, "-c", MEASURED], input=framed, capture_output=True, check=True, timeout=60)
    assert not out.stderr
    *outcomes, grown = out.stdout.decode().splitlines()
    return outcomes, int(grown)


SIZED = ["JPEG", "PNG", "GIF", "WebP", "BMP", "TIFF", "AVIF", "HEIC"]


def test_huge_and_thin_pictures_are_errors_that_cost_no_memory():
    sizes = [(12000, 12000), (16000, 16001), (7001, 7001), (1, 16000), (16000, 1), (30, 7001), (7001, 30)]
    cases = [(kind, size) for kind in SIZED for size in sizes]
    outcomes, grown = measured([stating(kind, *size) for kind, size in cases])
    for (kind, size), outcome in zip(cases, outcomes, strict=True):
        shown = np.maximum(size, (70, 50)) if kind == "GIF" else size  # its sheet is never smaller than its picture
        stated = rf"UserError: unreadable image \({shown[0]} x {shown[1]} pixels; (at most|a side).*\)"
        refused = stated if kind not in ("AVIF", "HEIC") else stated + rf"|UserError: unreadable image \({kind}: .*\)"
        assert re.fullmatch(refused, outcome), (kind, size, outcome)
    assert grown < 60


def test_metadata_that_unfold_in_memory_do_not():
    small = encoded(photo(), "PNG")
    # 20,000 tags, each of which is all of half a megabyte
    head, entry = b"II*\0\x08\0\0\0" + (20000).to_bytes(2, "little"), np.dtype("<u2,<u2,<u4,<u4")
    entries = np.array([(1000 + tag, 7, 500_000, 240_014) for tag in range(20000)], entry).tobytes()
    heap = head + entries + bytes(500_004)
    jpeg, pieces = encoded(photo(), "JPEG"), [heap[at : at + 65000] for at in range(0, len(heap), 65000)]
    segments = b"".join(b"\xff\xe1" + (len(piece) + 8).to_bytes(2, "big") + b"Exif\0\0" + piece for piece in pieces)
    gif = encoded(photo().quantize(16), "GIF")
    frame = gif.index(b",", 13 + 3 * 16)
    bomb = zlib.compress(bytes(50_000_000))
    files = {
        "EXIF in a PNG": small[:33] + chunk(b"eXIf", heap) + small[33:],
        "EXIF in a WebP": encoded(photo(), "WEBP", exif=heap),
        "EXIF in a JPEG": jpeg[:2] + segments + jpeg[20:],
        "TIFF": heap,
        "text": small[:33] + chunk(b"zTXt", b"a\0\0" + bomb) + small[33:],
        "profile": small[:33] + chunk(b"iCCP", b"a\0\0" + bomb) + small[33:],
        "comments": gif[:frame] + b"!\xfe" + b"\x01a" * 1_000_000 + b"\0" + gif[frame:],
        "frames": gif[:-1] + gif[frame:-1] * 2000 + b";",
        "tiles": tiff(bytes(100), 8, size=(10, 10), t322=30000, t323=30000),
    }
    outcomes, grown = measured(list(files.values()))
    expected = ["70x50"] * 3 + ["tags overlap", "too large", "too large", "100000 blocks", "70x50", "30000 x 30000"]
    assert all(part in outcome for part, outcome in zip(expected, outcomes, strict=True)), outcomes
    assert grown < 80


def test_a_jpeg_of_many_scans_is_an_error_and_one_with_a_film_behind_it_is_read():
    data = KINDS["progressive JPEG"](photo())
    last, end = data.rindex(b"\xff\xda"), data.rindex(b"\xff\xd9")
    scan = data[last:end]
    assert decode_image(data[:end] + scan * 50 + data[end:]).size == (70, 50)
    with pytest.raises(UserError, match="more than 100 scans"):
        decode_image(data[:end] + scan * 100 + data[end:])
    assert decode_image(data + b"\0\0\0\x18ftypmp42" + scan * 1000).size == (70, 50)


def test_the_largest_pictures_are_read_within_their_memory():
    """49 million pixels; the bound is a little over what the costliest kinds take, 12 to 16 bytes a pixel."""
    rows = [bytes(7000 * 4)] * 7000
    outcomes, grown = measured([png((7000, 7000), 8, 6, rows, chunk(b"eXIf", exif(6)))])
    assert outcomes == ["7000x7000"] and grown < 600
