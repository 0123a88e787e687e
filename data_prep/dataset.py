"""A data set as one short file says it (conf/prepare/NAME.yaml): where the files are, and which fields mean what."""

from __future__ import annotations

import dataclasses
import difflib
import glob
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllava.errors import UserError, reading

CONF = Path(__file__).parents[1] / "conf" / "prepare"
SPEAKERS = ("human", "gpt", "system")


@dataclass(frozen=True)
class Fields:
    """The names under which a row may hold a thing. A row that holds two different values under them is rejected.

    A name with braces is a pattern over the row's fields: `"{page_dir}/{videoid}.mp4"`.
    """

    id: tuple[str, ...] = ("id",)
    conversations: tuple[str, ...] = ("conversations", "messages", "conversation")
    system: tuple[str, ...] = ("system", "system_prompt")
    image: tuple[str, ...] = ("image", "images")
    video: tuple[str, ...] = ("video", "videos")
    video_id: tuple[str, ...] = ("video_id", "video_name")  # where no medium is named: a video file, any extension
    question: tuple[str, ...] = ("question", "q", "Q")
    answer: tuple[str, ...] = ("answer", "a", "A")
    pairs: tuple[str, ...] = ("qa", "QA")  # several questions and answers about the same medium


@dataclass(frozen=True)
class Dataset:
    """Where the files of a data set are and how its rows are to be read. Relative names are relative to `root`.

    `one | other | third` means the first of them that exists.
    """

    name: str
    root: Path
    annotations: tuple[str, ...]  # files, folders or globs, read in this order; what a glob finds is sorted
    images: str = "."  # the folder that names of images start from
    videos: str = "."
    videos_by_id: str = ""  # the folder of videos that rows name by an id; by default that of videos
    split: str = ""  # of a Hugging Face data set that has several
    rows: str = ""  # the key that holds the list of rows, in a JSON file that is one object
    source: str = ""  # what records say they come from; the data set's name by default
    instructions: tuple[str, ...] = ()  # what is asked where a row has an answer and no question: a caption
    speakers: dict[str, str] = field(default_factory=dict)  # further names of speakers: {narrator: gpt}
    unanswered: bool = False  # keep rows without an answer: to be asked, not trained on
    outside: bool = False  # media may lie outside of the folders: absolute names and `..`
    fields: Fields = Fields()


def read_dataset(name: str | Path, overrides: Sequence[str] = ()) -> Dataset:
    """A data set by the name of a file in conf/prepare or the path of one, with `key=value` overrides.

    Raises UserError for a file that cannot be read, unknown keys, values of the wrong kind, what is missing.
    """
    path = _file(str(name))
    values = _values(path, overrides)
    where = f"the data set {path.name}"
    _known(where, values, {f.name for f in dataclasses.fields(Dataset)})
    fields = values.get("fields") or {}
    if not isinstance(fields, Mapping):
        raise UserError(f"fields={fields!r} in {where} is not of the form fields.image=picture.")
    _known(f"fields of {where}", fields, {f.name for f in dataclasses.fields(Fields)})
    content = {key: _value(key, value, hint) for key, value, hint in _typed(Dataset, values) if key != "fields"}
    names = Fields(**{key: _value(f"fields.{key}", value, hint) for key, value, hint in _typed(Fields, fields)})
    for key, what in (("root", "the folder of its files"), ("annotations", "its files of rows")):
        if not content.get(key):
            raise UserError(f"{where[0].upper()}{where[1:]} does not say {key}, {what}: add {key}=… to the command.")
    content["root"] = root = Path(content["root"]).expanduser().absolute()
    if not root.is_dir():
        raise UserError(f"There is no folder {root}: root=… says where the files of the data set {path.stem} are.")
    for key in ("images", "videos", "videos_by_id"):
        if content.get(key):
            content[key] = first_there(root, content[key])
    return Dataset(**{"name": path.stem, **content, "fields": names})


def first_there(root: Path, alternatives: str) -> str:
    """The first of `one | other` that exists under `root`, or the first of all where none does."""
    names = [name.strip() for name in alternatives.split("|")]
    return next((name for name in names if found(root, name)), names[0])


def found(root: Path, name: str) -> list[Path]:
    """What lies under a name, or what a glob finds, sorted; of a relative name under `root`."""
    path = root / Path(name).expanduser()
    if path.exists():
        return [path]
    pattern = str(path) if path == Path(name).expanduser() else f"{glob.escape(str(root))}/{name}"
    return [Path(file) for file in sorted(glob.glob(pattern, recursive=True))]


def _file(name: str) -> Path:
    path = Path(name).expanduser()
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise UserError(f"There is no file {path}: name a data set of conf/prepare or the path of a YAML file.")
        return path
    known = sorted(file.stem for file in CONF.glob("*.yaml"))
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"Did you mean {near[0]!r}? " if near else ""
        raise UserError(
            f"There is no data set {name!r}. {hint}Known are: {', '.join(known)}; for your own, copy "
            f"{CONF / 'mine.yaml'} and name the path of the copy."
        )
    return CONF / f"{name}.yaml"


def _values(path: Path, overrides: Sequence[str]) -> dict[str, Any]:
    from omegaconf import DictConfig, OmegaConf  # not needed where rows are read, in many processes

    for override in overrides:
        if "=" not in override or override.startswith("="):
            raise UserError(f"{override!r} is no setting of a data set: write key=value, as in root=/data/llava.")
    with reading(f"The data set {path}", "It is a YAML file of keys and values; conf/prepare/mine.yaml explains them."):
        written = OmegaConf.load(path)
        if not isinstance(written, DictConfig):
            raise UserError(f"The data set {path} is no mapping of keys to values: conf/prepare/mine.yaml shows one.")
        merged = OmegaConf.merge(written, OmegaConf.from_dotlist(list(overrides)))
        for key in OmegaConf.missing_keys(merged):
            raise UserError(f"The data set {path.name} does not say {key}: add {key}=… to the command.")
        return typing.cast(dict[str, Any], OmegaConf.to_container(merged, resolve=True))


def _known(where: str, keys: Mapping[Any, Any], known: set[str]) -> None:
    for key in sorted(map(str, keys)):
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are: {', '.join(sorted(known))}."
            raise UserError(f"Unknown key {key!r} in {where}: {hint}")


def _typed(cls: type, values: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    hints = typing.get_type_hints(cls)
    return [(key, value, hints[key]) for key, value in values.items() if value is not None]


def _value(key: str, value: Any, hint: Any) -> Any:
    """A value of the YAML as the dataclass has it; raises UserError for one of another kind."""
    if hint is bool and isinstance(value, bool):
        return value
    if hint in (str, Path) and isinstance(value, (str, int, float)) and not isinstance(value, bool):
        return str(value)
    if hint == tuple[str, ...]:
        texts = [value] if isinstance(value, str) else value
        if isinstance(texts, list) and all(isinstance(text, str) for text in texts):
            return tuple(texts)
    if hint == dict[str, str] and isinstance(value, Mapping) and set(value.values()) <= set(SPEAKERS):
        return {str(name): speaker for name, speaker in value.items()}
    speakers = f"of the form {{name: speaker}} with {', '.join(SPEAKERS)}"
    expected = {bool: "true or false", str: "a text", Path: "a path", dict[str, str]: speakers}
    what = expected.get(hint, "a text or a list of texts")
    raise UserError(f"{key}={value!r} of a data set is not of the right kind: it is {what}.")
