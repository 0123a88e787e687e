"""Other people's checkpoints: the original Video-LLaVA's layout and that of the port in `transformers`.

Every format is read into, and written from, the same parts (parts.py): the LLM, the projector and two vision towers. A
tensor is never converted, so reading what was written gives the same bits. `python -m vllava.convert` is the command.
"""

from vllava.model.formats.original import read_original, write_original
from vllava.model.formats.ours import read_ours, write_ours
from vllava.model.formats.packed import pack
from vllava.model.formats.parts import Parts, Tower
from vllava.model.formats.port import MEDIA_TOKENS, read_port, with_media_tokens, write_port

__all__ = [
    "MEDIA_TOKENS",
    "Parts",
    "Tower",
    "pack",
    "read_original",
    "read_ours",
    "read_port",
    "with_media_tokens",
    "write_original",
    "write_ours",
    "write_port",
]
