"""A data set as one short file says it (conf/prepare/NAME.yaml): where the files are, and which fields mean what."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Fields:
    """The names under which a row may hold a thing. A row that holds two different values under them is rejected.

    A name with braces is a pattern over the row's fields: `"{page_dir}/{videoid}.mp4"`.
    """

    id: tuple[str, ...] = ("id",)
    conversations: tuple[str, ...] = ("conversations", "messages")
    system: tuple[str, ...] = ("system",)
    image: tuple[str, ...] = ("image", "images")
    video: tuple[str, ...] = ("video", "videos")
    video_id: tuple[str, ...] = ("video_id",)  # where a row names no medium: a video file of this name, any extension
    question: tuple[str, ...] = ("question", "q", "Q")
    answer: tuple[str, ...] = ("answer", "a", "A")


@dataclass(frozen=True)
class Dataset:
    """Where the files of a data set are and how its rows are to be read. Relative names are relative to `root`."""

    name: str
    root: Path
    annotations: tuple[str, ...]  # files, folders or globs, read in this order; what a glob finds is sorted
    images: str = "."  # the folder that names of images start from
    videos: str = "."
    format: str = "auto"  # json | jsonl | parquet | arrow: by content and name
    split: str = ""  # of a Hugging Face data set that has several
    rows: str = ""  # the key that holds the list of rows, in a JSON file that is an object
    source: str = ""  # what records say they come from; the data set's name by default
    instructions: tuple[str, ...] = ()  # what a row that has an answer and no question (a caption) asks
    speakers: dict[str, str] = field(default_factory=dict)  # further names of speakers: {narrator: gpt}
    unanswered: bool = False  # keep rows without an answer: to be asked, never trained on
    outside: bool = False  # media may lie outside of the folders: absolute names and `..`
    fields: Fields = Fields()


def read_dataset(name: str | Path, overrides: Sequence[str] = ()) -> Dataset:
    """A data set by the name of a file in conf/prepare or the path of one, with `key=value` overrides.

    Raises UserError for a file that cannot be read, unknown keys, values of the wrong kind, what is missing.
    """
    raise NotImplementedError
