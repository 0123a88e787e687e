"""Look at a run's data before it starts: `python -m vllava.inspect_data +experiment=stage2 data=mine`.

Writes a page with the first batches as the model will see them and figures over all indexes, and says what would waste
the run. No weights are loaded.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from vllava.checks import Whole
from vllava.commands import Parser, number
from vllava.config import composed
from vllava.data.address import shown
from vllava.data.datamodule import DataModule
from vllava.data.mixture import Source
from vllava.data.packing import ConversationPacker
from vllava.errors import UserError, stopping_at_mistakes
from vllava.inspection.batches import first_batches
from vllava.inspection.findings import Finding, Run, findings, plain
from vllava.inspection.page import require_ours, write_page
from vllava.inspection.statistics import survey
from vllava.inspection.texts import measure
from vllava.model.tokenizer import load_tokenizer
from vllava.model.video_llava import require_context
from vllava.plan import context, plan_encoders
from vllava.settle import EVALUATE

NO_PAGE = (
    "{} does not train on conversations: there is no page for it. Look at the data of a stage (+experiment=stage2)."
)
WHOLE = 256  # samples that are shown with pictures and tokens, where nothing else is said


def look(cfg: DictConfig, batches: int, out: Path, whole: int = WHOLE) -> list[Finding]:
    """Write the page of a settled configuration; returns what was found. Raises UserError where nothing can be read."""
    if batches < 0 or whole < 0:
        raise UserError("--batches and --samples are numbers from 0.")
    require_ours(out)
    settings: Any = OmegaConf.to_container(cfg, resolve=True)
    data, specs = _data(cfg, settings)
    packer = data.assembler
    if not isinstance(packer, ConversationPacker):
        raise UserError(NO_PAGE.format(cfg.experiment))
    seen = survey(data.shards, _sources(settings["data"]), data.draws, packer.lengths(data.shards), packer.max_length)
    texts = [measure(data.shards, number, packer) for number in range(len(data.sources))]
    first = first_batches(data, batches, whole)
    run = Run(
        seen,
        texts,
        first,
        data.global_batch,
        _epochs(settings["trainer"]),
        settings["trainer"].get("max_steps", -1),
        settings["task"]["max_broken_share"],
        _misfit(settings, specs),
    )
    found = findings(run)
    title = f"{cfg.experiment} ({cfg.ablation}): the data"
    write_page(out, title, _shown_settings(settings, run), found, seen, texts, first, packer.token_budget)
    return found


def _data(cfg: DictConfig, settings: dict[str, Any]) -> tuple[DataModule, dict]:
    """The data module as a run would build it, and the specs of its encoders, from their settings alone."""
    if cfg.chain:
        stages = ", ".join(name for name in cfg.chain if name != EVALUATE)
        raise UserError(f"{cfg.experiment} is a chain: look at one of {stages} (+experiment=NAME).")
    if cfg.evaluation and "_target_" in cfg.evaluation:
        raise UserError(f"{cfg.experiment} trains on nothing: look at the data of a stage (+experiment=stage2).")
    if str(cfg.data._target_).endswith("caption_data"):
        raise UserError(NO_PAGE.format(cfg.experiment))
    specs = {kind: encoder.spec for kind, encoder in plan_encoders(settings).items()}
    tokenizer = load_tokenizer(settings["tokenizer"])
    return instantiate(cfg.data, _convert_="all")(specs=specs, tokenizer=tokenizer), specs


def _sources(data: dict[str, Any]) -> list[Source]:
    """The sources in the order in which the data module has them."""
    return [Source(kind, folder) for kind in data["modalities"] for folder in data["sources"].get(kind) or []]


def _epochs(trainer: dict[str, Any]) -> int | None:
    epochs = trainer.get("max_epochs")
    return None if epochs in (None, -1) else epochs


def _misfit(settings: dict[str, Any], specs: dict) -> str | None:
    try:
        require_context(context(settings), specs, settings["data"]["max_length"])
    except UserError as error:
        return error.paragraph
    return None


def _shown_settings(settings: dict[str, Any], run: Run) -> dict[str, object]:
    data = settings["data"]
    wanted = ("template", "image_fit", "num_frames", "frame_sampling", "max_length", "token_budget", "global_batch")
    return {
        "tokenizer": settings["tokenizer"],
        **{key: data[key] for key in wanted if data.get(key) is not None},
        **({"mixture": shown(str(data["mixture"]))} if data.get("mixture") else {}),
        "seed": data["seed"],
        "optimiser steps": "without end" if run.steps is None else f"{run.steps:,}",
    }


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(
        "python -m vllava.inspect_data",
        "Look at a run's data before it starts: a page with its first batches as the model will see them.",
        "+experiment=stage2 data=mine --out page.html",
    )
    parser.add_argument(
        "overrides", nargs="+", metavar="key=value", help="as for train.py: +experiment=stage2 data=mine …"
    )
    parser.add_argument(
        "--batches", type=number(Whole), default=2, metavar="N", help="global batches to show (default: %(default)s)"
    )
    parser.add_argument(
        "--samples",
        type=number(Whole),
        default=WHOLE,
        metavar="N",
        help="show so many of their samples whole (default: %(default)s)",
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="the page (default: outputs/inspect/EXPERIMENT-ABLATION.html)"
    )
    parser.add_argument("--check", action="store_true", help="exit with status 1 where something would waste the run")
    options = parser.parse_intermixed_args(arguments)
    with stopping_at_mistakes(InstantiationException):  # in which Hydra wraps what a constructor raised
        cfg = composed(options.overrides)
        out = options.out or Path("outputs/inspect") / f"{cfg.experiment}-{cfg.ablation}.html"
        found = look(cfg, options.batches, out, options.samples)
    print(plain(found))
    print(f"the page: {out}")
    return int(options.check and any(not finding.note for finding in found))


if __name__ == "__main__":
    sys.exit(main())
