"""Checkpoints from and to other formats: `python -m vllava.convert --help`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from vllava.errors import UserError, reading
from vllava.model.files import Checkpoint, local_folder
from vllava.model.formats import read_original, read_ours, read_port, write_original, write_ours, write_port


def import_checkpoint(source: str, out: Path, towers: dict[str, str], template: str) -> None:
    """Write one of our checkpoint folders from an original checkpoint or one of the port in `transformers`."""
    folder = local_folder(source)
    with reading(f"The checkpoint {source}", "Is it complete, and a Video-LLaVA?"):
        if Checkpoint(folder).config.get("model_type") == "video_llava":
            parts = read_port(folder)
        else:
            parts = read_original(folder, towers)
    write_ours(parts, out, template)


def export_checkpoint(source: Path, out: Path, layout: str, drop_temporal_attention: bool) -> list[str]:
    """Write one of our checkpoint folders in another layout; returns what its code cannot do with it."""
    with reading(f"The checkpoint {source}", "Is it complete?"):
        parts = read_ours(source)
    if layout == "original":
        return write_original(parts, out)
    write_port(parts, out, drop_temporal_attention)
    return []


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m vllava.convert", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    take = commands.add_parser("import", help="an original Video-LLaVA, or one of transformers, to a vllava checkpoint")
    take.add_argument("source", help="folder or hub id")
    take.add_argument("out", type=Path, help="folder to write")
    for kind in ("image", "video"):
        take.add_argument(
            f"--{kind}-tower", metavar="PATH", help=f"folder or hub id of the {kind} tower, if not as the config says"
        )
    take.add_argument("--template", default="vicuna_v1", help="of its prompts (default: %(default)s)")
    give = commands.add_parser("export", help="a vllava checkpoint to another layout")
    give.add_argument("source", type=Path, help="a run's checkpoint folder")
    give.add_argument("out", type=Path, help="folder to write")
    give.add_argument("--to", choices=("original", "transformers"), required=True, help="the layout")
    give.add_argument(
        "--drop-temporal-attention",
        action="store_true",
        help="export to transformers although its port has no temporal attention: it will be another model",
    )
    options = parser.parse_args(arguments)
    try:
        if options.command == "import":
            towers = {"image": options.image_tower, "video": options.video_tower}
            import_checkpoint(options.source, options.out, {k: v for k, v in towers.items() if v}, options.template)
        else:
            notes = export_checkpoint(options.source, options.out, options.to, options.drop_temporal_attention)
            for note in notes:
                print(f"note: the original code cannot open {note}", file=sys.stderr)
    except UserError as error:
        sys.exit(f"error: {error.paragraph}")
    print(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
