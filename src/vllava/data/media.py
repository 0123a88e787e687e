"""Pictures to pixels: decode an image file, resize, normalise. No augmentation. Videos: see video.py."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from vllava.errors import UserError

# CLIP's normalisation, which LanguageBind keeps.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
FITS = ("crop", "pad")


def decode_image(data: bytes) -> Image.Image:
    """An image file as RGB; raises UserError if it cannot be read."""
    try:
        return Image.open(io.BytesIO(data)).convert("RGB")
    except UnidentifiedImageError as error:  # whose own words are an object's address
        raise UserError("unreadable image (of no known format)") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"unreadable image ({error})") from error


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
        square = self._pad(picture) if self.fit == "pad" else picture
        return self._normalise([_crop(square, size)])[0]

    def video(self, pictures: list[Image.Image], size: int) -> Tensor:
        """Frames as [F, 3, size, size]."""
        return self._normalise([_crop(picture, size) for picture in pictures])

    def _pad(self, picture: Image.Image) -> Image.Image:
        side = max(picture.size)
        if picture.size == (side, side):
            return picture
        canvas = Image.new("RGB", (side, side), tuple(int(channel * 255) for channel in self.mean))
        canvas.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
        return canvas

    def _normalise(self, pictures: list[Image.Image]) -> Tensor:
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.mean, self.std))
        pixels = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).permute(0, 3, 1, 2)
        # One pass over memory in the layout that is wanted, then two in place: (x / 255 - mean) / std
        return pixels.to(torch.float32, memory_format=torch.contiguous_format).mul_(1 / (255 * std)).sub_(mean / std)


def _crop(picture: Image.Image, size: int) -> Image.Image:
    """Short side to `size` (bicubic), then the centre square."""
    width, height = picture.size
    if (width, height) == (size, size):
        return picture
    scale = size / min(width, height)
    width, height = max(size, round(width * scale)), max(size, round(height * scale))
    picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return picture.crop((left, top, left + size, top + size))
