"""Pictures to pixels: decode an image file as a viewer shows it, resize, normalise. No augmentation."""

from __future__ import annotations

import importlib.util
import io
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from vllava.errors import UserError, reason

# CLIP's normalisation, which LanguageBind keeps.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
FITS = ("crop", "pad")

# What photographs, drawings and screenshots come as. No others are tried: Pillow would start Ghostscript for an EPS.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM")
_HEIC = re.compile(rb"....ftyp(hei[cxms]|hev[cxms]|mif1|msf1)", re.S)

# Limits on what a file's header says, before anything is decoded.
MAX_PIXELS = 64 * 2**20  # a picture of that size takes up to 700 MB while it is decoded
MAX_SIDE = 2**15  # padded to a square, a longer one would take more than ten seconds
MAX_ASPECT = 200  # long side to short side: a thinner one has nothing to show, and resized it would be huge

Transpose = Image.Transpose
_UPRIGHT = {  # by the orientation that a camera wrote (EXIF, tag 0x0112)
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}


def decode_image(data: bytes) -> Image.Image:
    """An image file as RGB as a viewer shows it: upright, on white, 8 bits a channel; of several pictures the first.

    Colour profiles are not applied, as in the original. Raises UserError if the file cannot be read, or is larger or
    thinner than the limits above.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about sizes, which are judged here, and odd metadata
            return _as_shown(_opened(data))
    except UserError:
        raise
    except UnidentifiedImageError as error:  # whose own words are an object's address
        raise UserError("unreadable image (of no known format)") from error
    except Exception as error:  # decoders raise whatever they like at a damaged file
        raise UserError(f"unreadable image ({reason(error)})") from error


def _opened(data: bytes) -> Image.Image:
    """The picture, not decoded yet, if it is within the limits."""
    if _HEIC.match(data):
        if importlib.util.find_spec("pillow_heif") is None:
            raise UserError("unreadable image (HEIC needs the package pillow-heif: pip install 'vllava[heif]')")
        import pillow_heif

        heif = pillow_heif.open_heif(data)
        _check_size(*heif.size)
        return heif.to_pillow()
    picture = Image.open(io.BytesIO(data), formats=FORMATS)
    _check_size(*picture.size)
    return picture


def _check_size(width: int, height: int) -> None:
    short, long = sorted((width, height))
    if short < 1 or long > MAX_SIDE or width * height > MAX_PIXELS:
        limits = f"at most {MAX_PIXELS:,} pixels and {MAX_SIDE:,} a side"
        raise UserError(f"unreadable image ({width} x {height} pixels; {limits} are taken)")
    if long > MAX_ASPECT * short:
        raise UserError(f"unreadable image ({width} x {height} pixels: more than {MAX_ASPECT} times as long as wide)")


def _as_shown(picture: Image.Image) -> Image.Image:
    picture.load()
    if picture.mode.startswith("I") or picture.mode == "F":
        picture = _to_8_bits(picture)
    upright = _UPRIGHT.get(_orientation(picture) or 1)
    if upright is not None:
        picture = picture.transpose(upright)
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    picture = picture.convert("RGBA")
    shown = Image.new("RGB", picture.size, "white")
    shown.paste(picture, mask=picture.getchannel("A"))
    return shown


def _orientation(picture: Image.Image) -> int | None:
    """What EXIF or XMP data say; a picture whose metadata are damaged is shown as it is stored, as viewers do."""
    try:
        return int(picture.getexif().get(0x0112, 1))
    except Exception:
        return None


def _to_8_bits(picture: Image.Image) -> Image.Image:
    """Grey of 16 or 32 bits or of floating point, by the smallest range that holds it: 0 to 1, 255 or 65,535.

    Integers of 16 bits, and of a PGM, always range to 65,535; floating point up to 1 is taken for 0 to 1.
    Raises UserError for values outside, whose range nobody states.
    """
    values = np.asarray(picture)
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= 65_535):  # NaN neither
        raise UserError(f"unreadable image (grey values from {low} to {high}: their range is not known)")
    if "16" in picture.mode or picture.format == "PPM" or high > 255:
        top = 65_535
    else:
        top = 1 if picture.mode == "F" and high <= 1 else 255
    eight = np.empty(values.shape, np.uint8)
    for first in range(0, len(eight), 256):  # some rows at a time: wider numbers of all of them would take much memory
        eight[first : first + 256] = np.rint(values[first : first + 256] * np.float32(255 / top))
    shown = Image.fromarray(eight)
    shown.getexif()[0x0112] = _orientation(picture)
    return shown


@dataclass(frozen=True)
class Preprocess:
    """Pictures to normalised pixels.

    `fit` is "crop" (short side to the size, centre crop: the paper, 4.1.3) or "pad" (pad to a square with
    the mean colour, then resize: the original's second stage). Frames of videos are always cropped.
    """

    fit: str = "crop"
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD

    def __post_init__(self) -> None:
        if self.fit not in FITS:
            raise UserError(f"data.image_fit={self.fit!r} is not known; there are: {', '.join(FITS)}.")

    def image(self, picture: Image.Image, size: int) -> Tensor:
        """One picture as [3, size, size]."""
        square = self._pad(picture, size) if self.fit == "pad" else _crop(picture, size)
        return self._normalise([square])[0]

    def video(self, pictures: Sequence[Image.Image], size: int) -> Tensor:
        """Frames as [F, 3, size, size]."""
        return self._normalise([_crop(picture, size) for picture in pictures])

    def _pad(self, picture: Image.Image, size: int) -> Image.Image:
        """The picture in the middle of a square of the mean colour, brought to `size`.

        The square of a long picture would be huge. Pillow resizes rows first and then columns, so the rows are
        resized some at a time, and the result is the same to the bit.
        """
        colour = tuple(int(channel * 255) for channel in self.mean)
        side = max(picture.size)
        left, top = (side - picture.width) // 2, (side - picture.height) // 2
        narrow = Image.new("RGB", (size, side), colour)
        at_once = max(2**22 // side, 1)
        for first in range(0, picture.height, at_once):
            rows = min(at_once, picture.height - first)
            strip = Image.new("RGB", (side, rows), colour)
            strip.paste(picture.crop((0, first, picture.width, first + rows)), (left, 0))
            narrow.paste(strip.resize((size, rows), Image.Resampling.BICUBIC), (0, top + first))
        return narrow.resize((size, size), Image.Resampling.BICUBIC)

    def _normalise(self, pictures: list[Image.Image]) -> Tensor:
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.mean, self.std))
        pixels = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).permute(0, 3, 1, 2)
        # One pass over memory in the layout that is wanted, then two in place: (x / 255 - mean) / std
        return pixels.to(torch.float32, memory_format=torch.contiguous_format).mul_(1 / (255 * std)).sub_(mean / std)


def _crop(picture: Image.Image, size: int) -> Image.Image:
    """Short side to `size` (bicubic), the long side truncated as the original's processors do; the centre square."""
    width, height = picture.size
    if (width, height) == (size, size):
        return picture
    short = min(width, height)
    width, height = size * width // short, size * height // short
    picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return picture.crop((left, top, left + size, top + size))
