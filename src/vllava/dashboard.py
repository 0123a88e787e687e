"""`python -m vllava.dashboard`: a workspace and a study's report on a W&B server, made by code."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from vllava.commands import Parser
from vllava.errors import UserError, reason, stop
from vllava.training.wandb_run import api_key, what_is_wrong
from vllava.verdicts import panels
from vllava.verdicts.report import Report, report_on
from vllava.verdicts.study_file import FINISHED, StudyFile

NEEDED = "Dashboards need wandb-workspaces: pip install 'vllava[study]'."


def require_package() -> None:
    """Raises UserError where wandb-workspaces is not installed."""
    try:
        import wandb_workspaces  # noqa: F401
    except ImportError as error:
        raise UserError(NEEDED) from error


def require_server() -> None:
    """Raises UserError, in words, unless a W&B server can be reached with a key that it takes."""
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").rstrip("/")
    key = api_key(host)
    if not key:
        raise UserError(
            "A dashboard is kept by a W&B server, which needs a key: `wandb login`, or set WANDB_API_KEY. --show "
            "prints what would be sent, without a server."
        )
    if trouble := what_is_wrong(host, key):
        raise UserError(f"{trouble} --show prints what would be sent, without a server.")


def baseline_run(given: str | None, study: StudyFile | None, experiment: str) -> str | None:
    """The W&B id of the run that others are shown against: of a run's folder, or as it is given.

    Without one: of the first finished run of a study's baseline that W&B knows. Raises UserError where a folder that is
    given has no W&B run.
    """
    if given is not None:
        if not Path(given).is_dir():
            return given
        if (found := _id_of(Path(given))) is None:
            raise UserError(
                f"{given} has no W&B run (wandb/run.json): name a run trained with logger=wandb, or its id."
            )
        return found
    if study is None:
        return None
    runs = [run for run in study.runs if run.arm == study.baseline and run.state == FINISHED]
    found_ids = [_id_of(run.parts[experiment]) for run in runs if experiment in run.parts]
    return next((one for one in found_ids if one is not None), None)


def _id_of(run_dir: Path) -> str | None:
    try:
        return str(json.loads((run_dir / "wandb" / "run.json").read_text())["id"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def specifications(
    entity: str, project: str, experiment: str, baseline: str | None, study: Report | None
) -> dict[str, Any]:
    """What would be sent to a server: the workspace's, and the study's report's where there is one."""
    made: dict[str, Any] = {"workspace": panels.workspace(entity, project, experiment, baseline)}
    if study is not None:
        made["report"] = panels.study_report(entity, project, experiment, study)
    return made


def as_json(made: dict[str, Any]) -> str:
    """The specifications as W&B's API takes them."""
    content = {name: json.loads(panels.specification(one)) for name, one in made.items()}
    return json.dumps(content, indent=1, ensure_ascii=False)


def send(entity: str, project: str, made: dict[str, Any], study: Report | None) -> list[str]:
    """Save all on the server, a study's plots as a run of its own first; returns the addresses.

    Raises UserError where the server does not take them.
    """
    try:
        if study is not None:
            panels.log_study(entity, project, study)
        return [made[name].save().url for name in made]
    except Exception as error:  # whatever W&B's client raises
        raise UserError(
            f"W&B did not take the dashboard of {entity}/{project} ({reason(error)}). Look whether the entity and the "
            f"project are right and yours to write to; --show prints what would be sent, without a server."
        ) from error


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(
        "python -m vllava.dashboard",
        "Makes a workspace for a project's training runs on a W&B server: losses, gradient norm, throughput and "
        "held-out samples, systems beside one another. With --study also a report of that study.",
        "--entity me --project vllava --study outputs/runs/paper",
    )
    parser.add_argument("--entity", required=True, help="the user or team that the project belongs to")
    parser.add_argument("--project", required=True, help="where the runs are: logger.project of the training")
    parser.add_argument("--experiment", default="stage2", help="whose runs are shown (default: %(default)s)")
    parser.add_argument("--study", metavar="FOLDER", help="a study's folder: a report of its claims, tables and plots")
    parser.add_argument(
        "--baseline",
        metavar="RUN",
        help="the run that others are shown against: its folder or W&B id (default: of the study's baseline)",
    )
    parser.add_argument("--show", action="store_true", help="print what would be sent, as JSON, and send nothing")
    options = parser.parse_args(arguments)
    try:
        require_package()
        study = report_on(options.study) if options.study else None
        if not options.show:
            require_server()
        baseline = baseline_run(options.baseline, study.found.study if study else None, options.experiment)
        made = specifications(options.entity, options.project, options.experiment, baseline, study)
        said = [as_json(made)] if options.show else send(options.entity, options.project, made, study)
    except UserError as error:
        stop(error)
    print("\n".join(said))
    return 0


if __name__ == "__main__":
    sys.exit(main())
