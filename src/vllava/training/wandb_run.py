"""One W&B run for a run of ours, however often it is interrupted, online or offline, whatever the server does."""

from __future__ import annotations

import base64
import json
import netrc
import os
import secrets
import shutil
import ssl
import struct
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from vllava.errors import UserError, reason

ANSWER_SECONDS = 5.0  # that a server has to say who we are
START_SECONDS = 10.0  # that it has to take a run
FINISH_SECONDS = 60.0  # that a run's end waits for what is not yet sent; it stays in the folder for `wandb sync`
X_AXES = {"samples_seen": "samples_seen", "step": "trainer/global_step"}  # and what W&B calls them
MODES = ("auto", "online", "offline")
_BLOCK = 32768  # of a LevelDB log, which .wandb files are
_HEADER = struct.Struct("<IHB")  # of each of its pieces: check sum, length, which part of a record it is
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


@dataclass
class WandbSettings:
    """What a user decides about W&B: conf/logger/wandb.yaml explains each."""

    project: str = "vllava"
    mode: str = "auto"
    entity: str | None = None
    name: str | None = None
    group: str | None = None
    job_type: str | None = None
    tags: list[str] | None = None
    notes: str | None = None
    x_axis: str = "samples_seen"

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise UserError(f"logger.mode={self.mode!r} is not known; there are: {', '.join(MODES)}.")
        if self.x_axis not in X_AXES:
            raise UserError(f"logger.x_axis={self.x_axis!r} is not known; there are: {', '.join(X_AXES)}.")
        self.tags = [self.tags] if isinstance(self.tags, str) else list(self.tags or [])


def usable_mode(mode: str) -> tuple[str, str]:
    """online, offline or disabled for a mode of MODES, and why it is not online where one would expect it to be.

    Takes ANSWER_SECONDS at most. Raises UserError if `online` is asked for and the server cannot be used.
    """
    if mode == "auto":
        wanted = os.environ.get("WANDB_MODE", "online").lower()
        mode = {"dryrun": "offline", "offline": "offline", "disabled": "disabled"}.get(wanted, "auto")
    if mode in ("offline", "disabled"):
        return mode, ""
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").rstrip("/")
    key, by_token = api_key(host), bool(os.environ.get("WANDB_IDENTITY_TOKEN_FILE"))
    if not key and not by_token:
        if mode == "online":
            raise UserError("logger.mode=online needs a key of W&B: `wandb login`, or set WANDB_API_KEY.")
        return "offline", ""  # nobody asked for W&B
    trouble = what_is_wrong(host, key)
    if trouble and mode == "online":
        raise UserError(f"{trouble} logger.mode=auto trains all the same and keeps the figures for `wandb sync`.")
    return ("offline", trouble) if trouble else ("online", "")


def api_key(host: str) -> str:
    """The key that W&B would use: of the environment, or of the netrc file that `wandb login` writes; empty if none."""
    if key := os.environ.get("WANDB_API_KEY"):
        return key
    for path in (os.environ.get("NETRC"), "~/.netrc", "~/_netrc"):
        try:
            found = (
                netrc.netrc(os.path.expanduser(path)).authenticators(urlparse(host).hostname or "") if path else None
            )
        except (OSError, netrc.NetrcParseError):
            continue
        if found and found[2]:
            return found[2]
    return ""


def what_is_wrong(host: str, key: str) -> str:
    """Ask a W&B server who we are; a sentence about what hinders its use, empty if nothing does.

    W&B's own client tries for minutes before it says anything. Looking up a name has no time limit of its own on many
    systems, so that the question is asked in a thread that is left behind.
    """
    answers: list[str] = []
    asking = threading.Thread(target=lambda: answers.append(_ask(host, key)), daemon=True)
    asking.start()
    asking.join(ANSWER_SECONDS)
    return answers[0] if answers else f"W&B at {host} does not answer within {ANSWER_SECONDS:g} s."


def _ask(host: str, key: str) -> str:
    refused = f"W&B at {host} does not accept the key: log in again with `wandb login --relogin`, or set WANDB_API_KEY."
    question = json.dumps({"query": "query Viewer { viewer { id } }"}).encode()
    try:
        request = urllib.request.Request(f"{host}/graphql", question, {"Content-Type": "application/json"})
        if key:
            request.add_header("Authorization", "Basic " + base64.b64encode(f"api:{key}".encode()).decode())
        with urllib.request.urlopen(request, timeout=ANSWER_SECONDS) as answer:
            body = answer.read()
        try:
            known = json.loads(body)["data"]["viewer"]
        except (ValueError, KeyError, TypeError):
            return f"What answers at {host} is not W&B."
        return "" if known or not key else refused
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            return refused if key else ""
        return "" if error.code == 429 else f"W&B at {host} answers with HTTP {error.code}."
    except urllib.error.URLError as error:
        if isinstance(error.reason, ssl.SSLError):
            return ""  # W&B's client may know certificates that we do not
        cause = error.reason if isinstance(error.reason, Exception) else error
        return f"W&B at {host} cannot be reached ({reason(cause)})."
    except Exception as error:  # whatever a bad URL or a broken connection raises
        return f"W&B at {host} cannot be reached ({reason(error)})."


def run_id(run_dir: Path) -> str:
    """The id of a run folder's W&B run: wandb/run.json keeps it."""
    path = run_dir / "wandb" / "run.json"
    try:
        return str(json.loads(path.read_text())["id"])
    except (OSError, ValueError, KeyError, TypeError):  # none yet, or cut off while it was written
        path.parent.mkdir(parents=True, exist_ok=True)
        made = secrets.token_hex(5)
        unfinished = path.with_name("run.json.part")
        unfinished.write_text(json.dumps({"id": made}) + "\n")
        os.replace(unfinished, path)
        return made


def open_run(run_dir: Path, settings: WandbSettings, mode: Any, config: dict[str, Any]) -> tuple[Any, int]:
    """Open a run folder's W&B run, or go on with it; returns it and the last step that it holds, 0 if none.

    Raises whatever wandb raises if that fails.
    """
    os.environ.setdefault("WANDB_SILENT", "true")
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # or it waits for a dead server when all is done
    import wandb

    made = run_id(run_dir)
    clear_empty_parts(run_dir, made)
    run = wandb.init(
        project=settings.project,
        entity=settings.entity,
        name=settings.name or run_dir.name,
        group=settings.group,
        job_type=settings.job_type,
        tags=settings.tags or None,
        notes=settings.notes,
        config=config,
        dir=run_dir,
        id=made,
        mode=mode,
        resume="allow" if mode == "online" else None,
        reinit="finish_previous",
        settings=wandb.Settings(console="off", init_timeout=START_SECONDS, finish_timeout=FINISH_SECONDS),
    )
    run.define_metric("trainer/global_step")
    run.define_metric("samples_seen")
    run.define_metric("*", step_metric=X_AXES[settings.x_axis])
    if mode != "online":
        return run, held_offline(run_dir, made, settings.project)
    for part in parts(run_dir, made):
        # The server's run is filled from history.jsonl with what it lacks: `wandb sync` would put it there again.
        if part.parent.name.startswith("offline-") and not part.with_name(f"{part.name}.synced").exists():
            part.with_name(f"{part.name}.synced").touch()
    return run, max(run.starting_step - 1, 0)


def stop_client() -> None:
    """End W&B's client, which tries for ever to reach a server once it was told to."""
    import wandb

    with suppress(Exception):
        wandb.teardown(exit_code=1)


def parts(run_dir: Path, made: str) -> list[Path]:
    """The .wandb files of a run, one for each time it was started, in that order."""
    found = (run_dir / "wandb").glob(f"*run-*-{made}/run-{made}.wandb")
    return sorted(found, key=lambda path: path.parent.name.removeprefix("offline-"))


def clear_empty_parts(run_dir: Path, made: str) -> None:
    """Remove what a start left behind that was killed before W&B wrote anything: `wandb sync` stops at such a file."""
    for part in parts(run_dir, made):
        if part.parent.name.startswith("offline-") and next(records(part), None) is None:
            shutil.rmtree(part.parent)


def held_offline(run_dir: Path, made: str, project: str) -> int:
    """The last step in the .wandb files of a run that belong to a project; 0 if there is none."""
    last = 0
    for part in parts(run_dir, made):
        for record in records(part):
            kind = record.WhichOneof("record_type")
            if kind == "run" and record.run.project != project:
                break
            if kind == "history":
                last = max(last, record.history.step.num)
    return last


def records(path: Path) -> Iterator[Any]:
    """The records of a .wandb file, up to where the writing broke off.

    The file is a LevelDB log after seven bytes of its own: https://github.com/google/leveldb/blob/main/doc/log_format.md
    The check sums are left out: what is damaged in the middle was not written by a kill.
    """
    from google.protobuf.message import DecodeError
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, piece = path.read_bytes(), 7, b""
    while True:
        if (left := _BLOCK - place % _BLOCK) < _HEADER.size:
            place += left
        if place + _HEADER.size > len(data):
            return
        _, length, kind = _HEADER.unpack_from(data, place)
        place += _HEADER.size
        if kind not in (_FULL, _FIRST, _MIDDLE, _LAST) or place + length > len(data):
            return
        piece = (b"" if kind in (_FULL, _FIRST) else piece) + data[place : place + length]
        place += length
        if kind in (_FULL, _LAST):
            record = Record()
            try:
                record.ParseFromString(piece)
            except DecodeError:
                return
            yield record
