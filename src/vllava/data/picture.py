"""Picture files to pixels as a viewer shows them: 8-bit RGB, upright, on white. Nothing in a file is trusted.

Only the formats in FORMATS, each by its own class of Pillow (`Image.open` would try every plugin, and starts
Ghostscript for an EPS). Animations and documents of several pages give their first picture. Colour profiles are
ignored, as the original and the port in transformers ignore them.
"""

from __future__ import annotations

import io
import re
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image, ImageCms
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from vllava.data import tiff
from vllava.errors import UserError, reason

# Limits, kept before anything is decoded. Decoding takes 8 to 16 bytes a pixel: within them, less than 720 MiB.
MAX_PIXELS = 49_000_000  # the largest photo of an iPhone, 8064 x 6048, passes
MAX_WEBP_PIXELS = 40_000_000  # always 16 bytes a pixel, as its decoder keeps canvases of its own
MAX_SIDE = 16_384  # the longest panoramas of phones, and of a WebP; padding a strip to a square takes a second
MAX_ASPECT = 100  # a centre crop of a longer strip shows less than 1 % of it, and resizing it would take gigabytes
MAX_SCANS = 100  # of a JPEG: a progressive one has about ten, each goes over the whole picture
MAX_BLOCKS = 100_000  # of a GIF before its first picture: 25 MB of comments

FLOAT_TOPS = (1, 255, 65535)  # what may stand for white in a picture of floating point numbers
INT_TOPS = (255, 65535, 2**31 - 1, 2**32 - 1)  # and in one of 32-bit integers
BAND = 256  # rows that are brought to 8 bits at a time


def decode_image(data: bytes) -> Image.Image:
    """An image file as RGB, upright, on white; raises UserError of one line if it cannot be read or is too large."""
    with _format_of(data) as name:
        return _decode(data, name)


def image_size(data: bytes) -> tuple[int, int]:
    """Width and height of an image file, upright, from its head; raises UserError if it is no image."""
    if (size := _plain_jpeg_size(data)) is not None:
        return size
    with _format_of(data) as name:
        image = FORMATS[name][1](data)
        width, height = image.size
        check_size(width, height)
        return (height, width) if _orientation(image) > 4 else (width, height)


def _plain_jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Width and height of a JPEG file by its markers alone, ten times as fast; None if anything is out of the ordinary.

    That is, if it might be turned (by EXIF or XMP, in an APP1), is of no usual kind, or is not whole up to its scan.
    """
    at, size, progressive = 2, None, False
    if not data.startswith(b"\xff\xd8\xff"):
        return None
    while at + 9 < len(data) and data[at] == 0xFF:
        kind, length = data[at + 1], data[at + 2] << 8 | data[at + 3]
        if kind == 0xDA:
            if size is None or (progressive and data.count(_SCAN) > MAX_SCANS):
                return None
            check_size(*size)
            return size
        if kind == 0xE1 or not 0xC0 <= kind <= 0xFE or 0xD0 <= kind <= 0xD9:
            return None
        if kind in (0xC0, 0xC1, 0xC2):
            height, width = data[at + 5] << 8 | data[at + 6], data[at + 7] << 8 | data[at + 8]
            if data[at + 4] != 8 or data[at + 9] not in (1, 3, 4) or not (height and width) or size is not None:
                return None
            size, progressive = (width, height), kind == 0xC2
        at += 2 + length
    return None


@contextmanager
def _format_of(data: bytes) -> Iterator[str]:
    """The format of an image file; whatever goes wrong with the file inside becomes a UserError."""
    name = next((name for name, (start, _) in FORMATS.items() if re.match(start, data, re.DOTALL)), None)
    if name is None:
        raise UserError(f"unreadable image (of no known format; known are {', '.join(FORMATS)})")
    try:
        with warnings.catch_warnings():  # Pillow's remarks on metadata and sizes: not for the screen, nor errors
            warnings.simplefilter("ignore")
            yield name
    except UserError:
        raise
    except Exception as error:  # whatever a library raises at a damaged file
        raise UserError(f"unreadable image ({name}: {reason(error)})") from error


def _decode(data: bytes, name: str) -> Image.Image:
    image = FORMATS[name][1](data)
    check_size(*image.size)
    # A GIF's first picture may cover a part of the sheet; the rest is transparent, whatever Pillow fills it with.
    covered = image.tile[0][1] if isinstance(image, _Gif) else None
    image.load()
    check_size(*image.size)  # a HEIC tells its size for certain only now
    _correct_key(image, data)
    turn = _TURNS.get(_orientation(image))
    picture = _rgb(image)
    del image  # its pixels and its file
    if covered and covered != (0, 0, *picture.size):
        sheet = Image.new("RGB", picture.size, "white")
        sheet.paste(picture.crop(covered), covered[:2])
        picture = sheet
    return picture if turn is None else picture.transpose(turn)


def check_size(width: int, height: int, most: int = MAX_PIXELS) -> None:
    """Raises UserError for a picture that is too large or too thin."""
    size = f"unreadable image ({width} x {height} pixels; "
    if width * height > most:
        raise UserError(f"{size}at most {most // 1_000_000} million are read)")
    if max(width, height) > MAX_SIDE:
        raise UserError(f"{size}a side has at most {MAX_SIDE})")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise UserError(f"{size}a side is at most {MAX_ASPECT} times the other)")


# --- opening ----------------------------------------------------------------------------------------------------------


class _Jpeg(JpegImageFile):
    """A JPEG whose EXIF nobody reads but `_orientation`; of an MPO, the first picture."""

    def getexif(self) -> Image.Exif:
        return Image.Exif()


def _jpeg(data: bytes) -> ImageFile:
    # What follows the picture (a phone's film, or more pictures) may look like any number of scans.
    if data.count(_SCAN) > MAX_SCANS and _scans(data) > MAX_SCANS:
        raise ValueError(f"more than {MAX_SCANS} scans")
    return _Jpeg(io.BytesIO(data))


_SCAN = b"\xff\xda"


def _scans(data: bytes) -> int:
    """The scans of the first picture in a JPEG file."""
    at, scans = 2, 0
    while marker := _MARKER.search(data, at):
        if marker[0] == b"\xff\xd9":
            break
        scans += marker[0] == _SCAN
        at = marker.end() + int.from_bytes(data[marker.end() : marker.end() + 2], "big")
    return scans


_MARKER = re.compile(rb"\xff[\x02-\xcf\xd9-\xfe]")  # those with a length, and the end


class _Gif(GifImageFile):
    """A GIF whose comments do not take far more memory than the file."""

    blocks = 0

    def data(self) -> bytes | None:
        self.blocks += 1
        if self.blocks > MAX_BLOCKS:
            raise ValueError(f"more than {MAX_BLOCKS} blocks before its first picture")
        return super().data()


class _Tiff(TiffImageFile):
    """A TIFF of whose directories only the first is read; Pillow turns it upright while loading."""

    def getexif(self) -> Image.Exif:
        exif = Image.Exif()
        exif[tiff.ORIENTATION] = self.tag_v2.get(tiff.ORIENTATION, 1)
        return exif


def _tiff(data: bytes) -> ImageFile:
    try:
        tiff.check_directory(data)
    except struct.error as error:
        raise ValueError("its directory is cut short") from error
    image = _Tiff(io.BytesIO(data))
    width, height = (image.tag_v2.get(tag, 1) for tag in (tiff.TILE_WIDTH, tiff.TILE_LENGTH))
    if width * height > MAX_PIXELS:  # decoded as one piece, however small the picture
        raise ValueError(f"tiles of {width} x {height} pixels")
    return image


def _webp(data: bytes) -> ImageFile:
    # The canvas is allocated when the file is opened: its size has to be known before.
    chunk, width, height = data[12:16], 1, 1
    if chunk == b"VP8X":
        width, height = (int.from_bytes(data[at : at + 3], "little") + 1 for at in (24, 27))
    elif chunk == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    elif chunk == b"VP8 ":
        width, height = (int.from_bytes(data[at : at + 2], "little") & 0x3FFF for at in (26, 28))
    check_size(width, height, MAX_WEBP_PIXELS)
    return WebPImageFile(io.BytesIO(data))


def _avif(data: bytes) -> ImageFile:
    try:
        from PIL.AvifImagePlugin import AvifImageFile
    except ImportError as error:
        raise ValueError("it needs Pillow 11.3 or newer") from error
    # Its EXIF does not say how it is turned, but Pillow reads it, and fails where it is malformed: hide it.
    return AvifImageFile(io.BytesIO(re.sub(rb"(infe\x02.{7}|infe\x03.{9})Exif", rb"\1none", data, flags=re.DOTALL)))


def _heic(data: bytes) -> ImageFile:
    try:
        from pillow_heif import HeifImageFile  # used as it is: registering it would change Pillow for everyone
    except ImportError as error:
        raise ValueError("it needs pillow-heif: pip install 'vllava[heif]'") from error
    return HeifImageFile(io.BytesIO(data))


# The formats of photos, drawings and scans on the web, on phones and in data sets. A file's first bytes, its opener.
FORMATS = {
    "JPEG": (rb"\xff\xd8\xff", _jpeg),
    "PNG": (rb"\x89PNG\r\n\x1a\n", lambda data: PngImageFile(io.BytesIO(data))),
    "WebP": (rb"RIFF.{4}WEBP", _webp),
    "GIF": (rb"GIF8[79]a", lambda data: _Gif(io.BytesIO(data))),
    "BMP": (rb"BM", lambda data: BmpImageFile(io.BytesIO(data))),
    "TIFF": (rb"II[*+]\0|MM\0[*+]", _tiff),
    "AVIF": (rb".{4}ftyp(avi[fs]|m[is]f1.{4}(.{4}){0,9}avi[fs])", _avif),
    "HEIC": (rb".{4}ftyp(he[iv][cxms]|m[is]f1)", _heic),
}


# --- the way up -------------------------------------------------------------------------------------------------------

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _orientation(image: ImageFile) -> int:
    """EXIF's orientation, 1 to 8; else XMP's. 1 where there is none that can be read, or a library has applied it."""
    if image.format in ("TIFF", "HEIF"):
        return 1
    exif = image.info.get("exif")
    try:
        if exif is None and "Raw profile type exif" in image.info:  # how ImageMagick wrote it into a PNG
            exif = bytes.fromhex("".join(image.info["Raw profile type exif"].split("\n")[3:]))
        if exif:
            return tiff.orientation(re.sub(rb"^(Exif\0\0){1,2}", b"", exif))
    except (ValueError, struct.error):  # a malformed one, which does not make a picture a bad one
        pass
    xmp = image.info.get("xmp") or image.info.get("XML:com.adobe.xmp", "").encode()
    found = re.search(rb'tiff:Orientation(?:="|>)([1-8])', xmp)
    return int(found[1]) if found else 1


# --- 8-bit RGB --------------------------------------------------------------------------------------------------------


def _rgb(image: ImageFile) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        return _eight_bits(image).convert("RGB")
    if image.mode == "LAB":
        lab, srgb = (ImageCms.createProfile(space) for space in ("LAB", "sRGB"))
        return ImageCms.buildTransform(lab, srgb, "LAB", "RGB").apply(image)
    if not image.has_transparency_data:
        return image.convert("RGB")
    picture = image if image.mode == "RGBA" else image.convert("RGBA")
    sheet = Image.new("RGB", picture.size, "white")
    sheet.paste(picture, mask=picture)
    return sheet


def _eight_bits(image: ImageFile) -> Image.Image:
    """Grey levels of 16 or 32 bits or floating point, as a picture of 8 bits.

    16 bits run from 0 to 65535 (a TIFF's 12 bits to 4095, signed ones to 32767). Floating point numbers and 32-bit
    integers do not say what is white: it is the first of FLOAT_TOPS or INT_TOPS that the largest value does not exceed
    by more than a tenth, which resampling may do. ValueError where no top fits, or values go as far below 0.
    """
    values, tags = np.asarray(image), getattr(image, "tag_v2", {})
    bits, kind = (np.ravel(tags.get(tag, 1))[0] for tag in (tiff.BITS, tiff.SAMPLE_FORMAT))
    if image.mode == "I" and bits == 32 and kind == 1:
        values = values.view(np.uint32)
    if image.mode.startswith("I;16"):
        top = 4095 if bits == 12 else 65535
    elif bits == 16:
        top = 32767
    else:
        top = _white(values, FLOAT_TOPS if image.mode == "F" else INT_TOPS)
    grey = np.empty(values.shape, np.uint8)
    for row in range(0, len(values), BAND):
        grey[row : row + BAND] = np.rint(np.clip(values[row : row + BAND] * (255.0 / top), 0, 255))
    if tags.get(tiff.PHOTOMETRIC, 1) == 0:  # Pillow inverts those of 8 bits only
        np.subtract(255, grey, out=grey)
    if isinstance(key := image.info.get("transparency"), int):
        grey[values == key] = 255
    return Image.fromarray(grey)


def _white(values: np.ndarray, tops: tuple[int, ...]) -> int:
    low, high = float(values.min()), float(values.max())
    top = next((top for top in tops if high <= 1.1 * top), 0)
    if not top or not low >= -0.1 * top:
        raise ValueError(f"values from {low:g} to {high:g}, which do not say what is black and what is white")
    return top


def _correct_key(image: ImageFile, data: bytes) -> None:
    """A PNG states its transparent colour at its own bit depth; Pillow compares that with pixels of 8 bits."""
    key = image.info.get("transparency")
    if not isinstance(image, PngImageFile) or key is None:
        return
    depth = data[24]
    if image.mode == "L" and depth < 8:
        image.info["transparency"] = key * 255 // (2**depth - 1)
    elif image.mode == "RGB" and depth == 16:
        image.info["transparency"] = tuple(level >> 8 for level in key)
