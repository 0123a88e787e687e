"""Rows of Parquet files and of Hugging Face data sets on disk (Arrow files), a batch in memory at a time."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from vllava.errors import UserError, reading

BATCH = 1024  # rows of text read at a time
MEDIA_BATCH = 16  # rows with media in them
REMEDY = "Is it cut or damaged? Copy or download it again."
_SPLIT = re.compile(r"(?:^|[-._/ ])(train|training|validation|valid|val|dev|test|testing|eval)(?=$|[-._/ \d])", re.I)

_JSON = re.compile(r"(?!dataset_info|\.).*\.(json|jsonl|ndjson)(\.gz)?")


def table_rows(path: Path, wanted: Collection[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """("row 17", the row) of a Parquet or Arrow file; only the `wanted` columns are read.

    Raises UserError for a file that cannot be read, or has none of the columns.
    """
    with reading(f"{path}", REMEDY):
        number = 0
        for batch in _batches(path, wanted):
            for row in batch.to_pylist():
                yield f"row {number}", row
                number += 1


def table_count(path: Path) -> int:
    """How many rows a Parquet or Arrow file has; media are not read."""
    with reading(f"{path}", REMEDY):
        if _is_parquet(path):
            return _arrow("parquet").ParquetFile(path).metadata.num_rows
        with _arrow().memory_map(str(path)) as file:
            return sum(batch.num_rows for batch in _arrow_batches(file))


def is_table(path: Path) -> bool:
    """Whether a file begins as Parquet and Arrow files do."""
    with reading(f"{path}"), open(path, "rb") as file:
        head = file.read(6)
    return head.startswith((b"PAR1", b"\xff\xff\xff\xff")) or head == b"ARROW1"


def table_files(folder: Path, split: str) -> list[Path]:
    """The files of a Hugging Face data set in a folder: one written by save_to_disk, or a snapshot of one.

    Of a snapshot these are its Parquet files or, where there are none, its JSON files.

    Raises UserError where there are none, or several splits of which `split` chooses none.
    """
    if (folder / "dataset_dict.json").is_file():
        with reading(f"{folder / 'dataset_dict.json'}", REMEDY):
            splits = json.loads((folder / "dataset_dict.json").read_bytes())["splits"]
        return _saved(folder / _chosen(folder, list(map(str, splits)), split))
    if (folder / "state.json").is_file():
        return _saved(folder)
    every = sorted(path for path in folder.rglob("*") if path.is_file())
    files = [path for path in every if path.suffix in (".parquet", ".arrow")]
    files = files or [path for path in every if _JSON.fullmatch(path.name)]
    if not files:
        raise UserError(f"{folder} is a folder in which no file of rows lies: neither Parquet nor Arrow nor JSON.")
    by_split: dict[str, list[Path]] = {}
    for path in files:
        found = _SPLIT.search(path.relative_to(folder).as_posix().rpartition(".")[0])
        by_split.setdefault(found[1].lower() if found else "", []).append(path)
    return by_split[_chosen(folder, list(by_split), split)]


def _chosen(folder: Path, splits: list[str], split: str) -> str:
    if split in splits:
        return split
    if len(splits) == 1 and not split:
        return splits[0]
    names = ", ".join(repr(name) for name in splits)
    what = f"no split {split!r}; it has" if split else "several splits"
    raise UserError(f"{folder} holds {what}: {names}. Choose one: split=NAME.")


def _saved(folder: Path) -> list[Path]:
    """The Arrow files that save_to_disk wrote, in its order."""
    with reading(f"{folder / 'state.json'}", REMEDY):
        state = json.loads((folder / "state.json").read_bytes())
        if state.get("_indices_data_files"):
            raise UserError(f"{folder} is a selection of another data set's rows: save it by flatten_indices() first.")
        return [folder / Path(file["filename"]).name for file in state["_data_files"]]


def _batches(path: Path, wanted: Collection[str]) -> Iterator[Any]:
    if _is_parquet(path):
        # Not buffered ahead: a row group of pictures is as large as the pictures.
        file = _arrow("parquet").ParquetFile(path, pre_buffer=False, buffer_size=2**20)
        columns = _columns(path, file.schema_arrow, wanted)
        size = _batch_rows(file.schema_arrow, columns)
        yield from file.iter_batches(size, columns=columns, use_threads=False)
        return
    with _arrow().OSFile(str(path)) as file:  # no memory map: what was read of it would stay in this process's memory
        for batch in _arrow_batches(file):
            columns = _columns(path, batch.schema, wanted)
            batch = batch.select(columns)
            size = _batch_rows(batch.schema, columns)
            for start in range(0, batch.num_rows, size):
                yield batch.slice(start, size)


def _arrow_batches(file: Any) -> Iterator[Any]:
    """The batches of an Arrow file of either kind: the stream that `datasets` writes, or one with an index."""
    arrow = _arrow()
    if file.read(6) == b"ARROW1":
        reader = arrow.ipc.open_file(file)
        yield from (reader.get_batch(index) for index in range(reader.num_record_batches))
    else:
        file.seek(0)
        yield from arrow.ipc.open_stream(file)


def _is_parquet(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(4) == b"PAR1"


def _columns(path: Path, schema: Any, wanted: Collection[str]) -> list[str]:
    columns = [name for name in schema.names if name in wanted]
    if not columns:
        raise UserError(
            f"{path} has none of the columns that its data set names ({', '.join(sorted(wanted))}); it has "
            f"{', '.join(schema.names[:20])}. Say which is which by fields.NAME=COLUMN."
        )
    return columns


def _batch_rows(schema: Any, columns: list[str]) -> int:
    return MEDIA_BATCH if any("binary" in str(schema.field(name).type) for name in columns) else BATCH


def _arrow(module: str = "") -> Any:
    """pyarrow, or a module of it; raises UserError where it is not installed."""
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(
            "Parquet files and Hugging Face data sets need pyarrow: pip install 'vllava[prepare]'."
        ) from error
    return getattr(pyarrow, module) if module else pyarrow
