"""Checkpoints from and to other formats, and packed whole: `python -m vllava.convert --help`."""

from __future__ import annotations

import sys
from pathlib import Path

from vllava.commands import Parser
from vllava.errors import UserError, reading, stop
from vllava.folders import require_replaceable
from vllava.model.checkpoint import find_parts, read_description
from vllava.model.files import Checkpoint, local_folder
from vllava.model.finding import Folders, add_foundations
from vllava.model.formats import pack, read_original, read_ours, read_port, write_original, write_ours, write_port
from vllava.model.llm import require_sizes


def import_checkpoint(source: str, out: Path, towers: dict[str, str], template: str, overwrite: bool = False) -> None:
    """Write one of our checkpoint folders from an original checkpoint or one of the port in `transformers`.

    overwrite: even where `out` holds what we did not write; never what is being read.
    """
    folder = local_folder(source)
    named = [Checkpoint(folder).config.get(f"mm_{kind}_tower") for kind in ("image", "video")]
    read = [path for path in (*towers.values(), *named) if isinstance(path, str) and path]
    require_replaceable(out, overwrite, [folder, *map(Path, read)])
    checkpoint = Checkpoint(folder)
    require_sizes(checkpoint)
    with reading(f"The checkpoint {folder}", "Is it complete, and a Video-LLaVA?"):
        is_port = checkpoint.config.get("model_type") == "video_llava"
        parts = read_port(folder) if is_port else read_original(folder, towers)
    write_ours(parts, out, template, overwrite=overwrite)


def export_checkpoint(
    source: Path,
    out: Path,
    layout: str,
    drop_temporal_attention: bool,
    overwrite: bool = False,
    foundations: Folders = (),
) -> list[str]:
    """Write one of our checkpoint folders in another layout; returns what its code cannot do with it.

    overwrite: as for `import_checkpoint`. foundations: folders to look into for what the checkpoint does not hold.
    """
    description = read_description(source)
    read = find_parts(source, description, foundations).values()
    require_replaceable(out, overwrite, [source, *map(Path, read)])
    with reading(f"The checkpoint {source}", "Is it complete?"):
        parts = read_ours(source, foundations)
    if layout == "original":
        return write_original(parts, out, overwrite)
    write_port(parts, out, drop_temporal_attention, overwrite)
    return []


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(
        "python -m vllava.convert",
        "Checkpoints from and to other formats.",
        "export outputs/runs/stage2-united-s1/checkpoint out --to original",
    )
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
    whole = commands.add_parser("pack", help="a vllava checkpoint with all it refers to, in one folder")
    whole.add_argument("source", type=Path, help="a run's checkpoint folder")
    whole.add_argument("out", type=Path, help="folder to write")
    whole.add_argument("--link", action="store_true", help="hard links in place of copies, where possible")
    for command in (give, whole):
        add_foundations(command)
    for command in (take, give, whole):
        command.add_argument(
            "--overwrite", action="store_true", help="replace OUT even if it holds what this program did not write"
        )
    options = parser.parse_args(arguments)
    try:
        if options.command == "import":
            towers = {"image": options.image_tower, "video": options.video_tower}
            given = {kind: path for kind, path in towers.items() if path}
            import_checkpoint(options.source, options.out, given, options.template, options.overwrite)
        elif options.command == "pack":
            pack(options.source, options.out, options.foundations, options.overwrite, options.link)
        else:
            notes = export_checkpoint(
                options.source,
                options.out,
                options.to,
                options.drop_temporal_attention,
                options.overwrite,
                options.foundations,
            )
            for note in notes:
                print(f"note: the original code cannot open {note}", file=sys.stderr)
    except UserError as error:
        stop(error)
    print(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
