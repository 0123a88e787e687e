"""Picture files for the tests: by Pillow's encoders, and by hand where Pillow writes no such file."""

import io
import struct
import zlib

import numpy as np
import pillow_heif
from PIL import Image


def encoded(picture, kind, **options):
    """A PIL picture, or an array, as bytes of that file format."""
    picture = picture.copy() if isinstance(picture, Image.Image) else Image.fromarray(picture)
    buffer = io.BytesIO()
    if kind == "HEIF":
        pillow_heif.from_pillow(picture).save(buffer, quality=-1, chroma=444, **options)
    else:
        picture.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(size, depth, colour, rows, *chunks):
    """A PNG of `rows` (bytes of unfiltered lines), with `chunks` before its pixels."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, depth, colour, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + pixels + chunk(b"IEND", b"")


def tiff(pixels, bits, order="<", photometric=1, sample_format=1, size=None, **more):
    """An uncompressed TIFF of one channel; `pixels` are its bytes, `more` further tags (t258=…)."""
    width, height = size
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: height}
    tags |= {279: len(pixels), 339: sample_format} | {int(name[1:]): value for name, value in more.items()}
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8 + len(pixels))
    entries = b"".join(struct.pack(order + "HHII", tag, 4, 1, tags[tag]) for tag in sorted(tags))
    return head + pixels + struct.pack(order + "H", len(tags)) + entries + bytes(4)


def bmp_with_alpha(picture):
    """An RGBA picture as a BMP of version 4, which says where alpha is."""
    pixels = np.asarray(picture)[::-1].tobytes()
    header = struct.pack("<IiiHHIIiiII", 108, *picture.size, 1, 32, 3, len(pixels), 2835, 2835, 0, 0)
    masks = struct.pack("<IIII4s", 0xFF, 0xFF00, 0xFF0000, 0xFF000000, b"sRGB").ljust(68, b"\0")
    return b"BM" + struct.pack("<IHHI", 122 + len(pixels), 0, 0, 122) + header + masks + pixels


def exif(value, order="<", kind=3):
    """EXIF data with nothing but an orientation, of a type by number (3 is SHORT, 4 is LONG)."""
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8)
    stored = struct.pack(order + ("H2x" if kind == 3 else "I"), value)
    return head + struct.pack(order + "HHHI", 1, 274, kind, 1) + stored + bytes(4)


def quadrants(width=96, height=64):
    """Red, green / blue, white: which way up it is can be seen."""
    pixels = np.empty((height, width, 3), np.uint8)
    pixels[: height // 2, : width // 2], pixels[: height // 2, width // 2 :] = (220, 30, 30), (30, 200, 40)
    pixels[height // 2 :, : width // 2], pixels[height // 2 :, width // 2 :] = (30, 40, 220), (240, 240, 240)
    return pixels
