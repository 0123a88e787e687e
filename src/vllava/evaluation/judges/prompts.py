"""What judges are asked with: a file for each prompt, with what is said, what is filled in and what comes back."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from vllava.errors import UserError, reading, require_known
from vllava.evaluation.judges.replies import Field

PROMPTS = Path(__file__).parents[4] / "conf" / "judge" / "prompts"
_KEYS = ("system", "user", "reply", "format", "reply_tokens")
_FIELD_KEYS = ("one_of", "from", "to", "whole", "outside")
_SLOT = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Prompt:
    """One prompt: its texts, the slots that are filled in, and the fields of the reply.

    numbers: the reply is no JSON but numbers on its first line, as the published wordings of LLaVA-Bench and MM-Vet
    have it. reply_tokens: of a usual reply, for the estimate of costs. sha256: of the file.
    """

    name: str
    system: str
    user: str
    slots: tuple[str, ...]
    fields: tuple[Field, ...]
    numbers: bool
    reply_tokens: int
    sha256: str

    def messages(self, slots: Mapping[str, str], attempt: int = 0) -> list[dict[str, str]]:
        """The conversation for one request. From the second attempt on it ends in a reminder of the reply's form."""
        user = _SLOT.sub(lambda found: slots[found[1]] if found[1] in self.slots else found[0], self.user)
        if attempt:
            user += f"\n\n{self.reminder}"
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, {"role": "user", "content": user}]

    @property
    def reminder(self) -> str:
        """What is added where a reply could not be read."""
        if self.numbers:
            return f"Write only {' and '.join(str(field) for field in self.fields)}, as digits, on one line."
        form = ", ".join(f'"{field.name}": …' for field in self.fields)
        return f"Write only {{{form}}}, with {', '.join(f'{field.name} {field}' for field in self.fields)}."

    @property
    def schema(self) -> dict[str, Any] | None:
        """The reply as a JSON schema that is strict in OpenAI's sense; None where it is no JSON."""
        if self.numbers:
            return None
        return {
            "type": "object",
            "properties": {field.name: field.schema for field in self.fields},
            "required": [field.name for field in self.fields],
            "additionalProperties": False,
        }


def read_prompts(folder: str | Path | None = None) -> dict[str, Prompt]:
    """Every prompt by its name; files of a folder take the place of ours of the same names.

    Raises UserError for a folder without any, a file that is none of ours by name or misses what ours has.
    """
    own = {path.stem: _read(path) for path in sorted(PROMPTS.glob("*.yaml"))}
    if folder is None:
        return own
    where = Path(folder).expanduser()
    files = sorted(where.glob("*.yaml")) if where.is_dir() else []
    if not files:
        raise UserError(f"judge.prompts={folder} is no folder with prompts: {', '.join(own)}, each NAME.yaml.")
    require_known(f"judge.prompts={folder}", [path.stem for path in files], own)
    return own | {path.stem: _read(path, own[path.stem]) for path in files}


def _read(path: Path, ours: Prompt | None = None) -> Prompt:
    """A prompt's file; one that replaces ours has the same slots, and the same reply unless it says otherwise."""
    with reading(f"The judge's prompt {path}", "It is YAML with the keys of those in conf/judge/prompts."):
        content = path.read_bytes()
        given = yaml.safe_load(content)
        if not isinstance(given, dict) or not isinstance(given.get("user"), str):
            raise UserError(f"The judge's prompt {path} has no text under the key user.")
        require_known(f"the judge's prompt {path}", given, _KEYS)
        user, found = given["user"].strip(), tuple(dict.fromkeys(_SLOT.findall(given["user"])))
        if ours and (lost := [slot for slot in ours.slots if slot not in found]):
            raise UserError(f"The judge's prompt {path} never shows {{{lost[0]}}}: it has to, somewhere in user.")
        return Prompt(
            name=path.stem,
            system=str(given.get("system") or "").strip(),
            user=user,
            slots=ours.slots if ours else found,
            fields=_fields(path, given["reply"]) if ours is None or "reply" in given else ours.fields,
            numbers=_numbers(path, given.get("format", "json")),
            reply_tokens=int(given.get("reply_tokens", ours.reply_tokens if ours else 20)),
            sha256=hashlib.sha256(content).hexdigest(),
        )


def _numbers(path: Path, form: object) -> bool:
    if form not in ("json", "numbers"):
        raise UserError(f"The judge's prompt {path} has format: {form}, but there are json and numbers.")
    return form == "numbers"


def _fields(path: Path, reply: Mapping[str, Mapping[str, Any]]) -> tuple[Field, ...]:
    fields = []
    for name, given in reply.items():
        require_known(f"reply.{name} of the judge's prompt {path}", given, _FIELD_KEYS)
        one_of: Sequence[str] = given.get("one_of", ())
        if not one_of and not {"from", "to"} <= set(given):
            raise UserError(f"reply.{name} of the judge's prompt {path} has neither one_of nor from and to.")
        limits = (float(given.get("from", 0)), float(given.get("to", 0)))
        refuses = given.get("outside", "clamp") == "refuse"
        # `yes` and `no` without quotes are true and false in YAML
        choices = tuple(("yes" if one else "no") if isinstance(one, bool) else str(one) for one in one_of)
        fields.append(Field(str(name), choices, *limits, whole=bool(given.get("whole")), refuses=refuses))
    return tuple(fields)
