"""Pictures to normalised pixels: resize, crop or pad, normalise. No augmentation. Files: see picture.py, video.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vllava.data.picture import decode_image
from vllava.errors import UserError

__all__ = ["CLIP_MEAN", "CLIP_STD", "FITS", "Preprocess", "decode_image"]

# CLIP's normalisation, which LanguageBind keeps.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
FITS = ("crop", "pad")
BAND = 512  # rows of a padded picture that are in memory at a time


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
        return self._normalise([self._pad(picture, size) if self.fit == "pad" else _crop(picture, size)])[0]

    def video(self, pictures: Sequence[Image.Image], size: int) -> Tensor:
        """Frames as [F, 3, size, size]."""
        return self._normalise([_crop(picture, size) for picture in pictures])

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

    def _normalise(self, pictures: list[Image.Image]) -> Tensor:
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.mean, self.std))
        pixels = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).permute(0, 3, 1, 2)
        # One pass over memory in the layout that is wanted, then two in place: (x / 255 - mean) / std
        return pixels.to(torch.float32, memory_format=torch.contiguous_format).mul_(1 / (255 * std)).sub_(mean / std)


def _crop(picture: Image.Image, size: int) -> Image.Image:
    """Short side to `size`, the long one in proportion and truncated (bicubic); then the centre square."""
    short = min(picture.size)
    width, height = (size * side // short for side in picture.size)
    picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return picture.crop((left, top, left + size, top + size))
