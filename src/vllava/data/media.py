"""Pictures to pixels: resize, crop or pad. No augmentation. Files: see picture.py, video.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vllava.data.picture import decode_image
from vllava.errors import UserError
from vllava.pixels import CLIP_MEAN, CLIP_STD, normalised

__all__ = ["CLIP_MEAN", "CLIP_STD", "FITS", "Preprocess", "decode_image"]

FITS = ("crop", "pad")
BAND = 512  # rows of a padded picture that are in memory at a time


@dataclass(frozen=True)
class Preprocess:
    """Pictures to pixels of an encoder's size.

    `fit` is "crop" (short side to the size, centre crop: the paper, 4.1.3) or "pad" (pad to a square with
    the mean colour, then resize: the original's second stage). Frames of videos are always cropped.
    """

    fit: str = "crop"
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD

    def __post_init__(self) -> None:
        if self.fit not in FITS:
            raise UserError(f"data.image_fit={self.fit!r} is not known; there are: {', '.join(FITS)}.")

    def image_pixels(self, picture: Image.Image, size: int) -> Tensor:
        """One picture as [3, size, size] uint8: what travels to the device, which normalises it."""
        return _stacked([self._pad(picture, size) if self.fit == "pad" else _crop(picture, size)])[0]

    def video_pixels(self, pictures: Sequence[Image.Image], size: int) -> Tensor:
        """Frames as [F, 3, size, size] uint8."""
        return _stacked([_crop(picture, size) for picture in pictures])

    def image(self, picture: Image.Image, size: int) -> Tensor:
        """One picture as an encoder takes it, [3, size, size] float32."""
        return normalised(self.image_pixels(picture, size), self.mean, self.std)

    def video(self, pictures: Sequence[Image.Image], size: int) -> Tensor:
        """Frames as an encoder takes them, [F, 3, size, size] float32."""
        return normalised(self.video_pixels(pictures, size), self.mean, self.std)

    def _pad(self, picture: Image.Image, size: int) -> Image.Image:
        """The picture in the middle of a square of the mean colour, resized to `size`.

        The square of a long picture would not fit into memory. Resizing goes across first and down then, so that the
        rows can be narrowed in bands, and rows without the picture not at all: the same pixels.
        """
        side = max(picture.size)
        colour = tuple(int(channel * 255) for channel in self.mean)
        left, top = (side - picture.width) // 2, (side - picture.height) // 2
        narrow = Image.new("RGB", (size, side), colour)
        for row in range(0, picture.height, BAND):
            strip = picture.crop((0, row, picture.width, min(row + BAND, picture.height)))
            band = Image.new("RGB", (side, strip.height), colour)
            band.paste(strip, (left, 0))
            narrow.paste(band.resize((size, band.height), Image.Resampling.BICUBIC), (0, top + row))
        return narrow.resize((size, size), Image.Resampling.BICUBIC)


def _stacked(pictures: list[Image.Image]) -> Tensor:
    pixels = np.stack([np.asarray(picture) for picture in pictures])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def _crop(picture: Image.Image, size: int) -> Image.Image:
    """Short side to `size`, the long one in proportion and truncated (bicubic); then the centre square."""
    short = min(picture.size)
    width, height = (size * side // short for side in picture.size)
    picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return picture.crop((left, top, left + size, top + size))
