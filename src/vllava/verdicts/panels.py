"""W&B's pages as code: a workspace of training runs, and a study's report. Needs wandb-workspaces."""

from __future__ import annotations

import re
from typing import Any

from vllava.evaluation.layout import as_markdown
from vllava.verdicts.plots import Plot
from vllava.verdicts.report import HOW, Report, as_text, pictures_of, title_of
from vllava.verdicts.tables import tables_of

X = "samples_seen"  # the same for any batch size
ARM, SEED, EXPERIMENT = "ablation", "seed", "experiment"  # in the configuration that a run sends
LEARNING = {  # as our loggers write them -> what they are called
    "loss": "loss",
    "val_loss": "held-out loss",
    "val_accuracy": "held-out accuracy, of the samples shown",
    "gradient_norm": "gradient norm before clipping",
    "lr": "learning rate",
}
EFFICIENCY = {
    "useful_token_share": "useful tokens, of all",
    "supervised_token_share": "supervised tokens, of all",
    "samples_per_second": "samples per second",
    "tokens_per_second": "tokens per second",
    "mfu": "MFU",
    "data_wait_share": "share of time spent waiting for data",
    "memory_gb": "memory, GB",
}
PARTS = {"val_loss/.+": "held-out loss by medium and source", "val_accuracy/.+": "held-out accuracy by medium"}
SAMPLES = "held_out_samples"  # the table of answers


def workspace(entity: str, project: str, experiment: str, baseline: str | None = None) -> Any:
    """A workspace of an experiment's runs, grouped by arm, with the differences to a baseline run where there is one.

    baseline: the id of a W&B run of the project.
    """
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws

    sections = [
        ws.Section(name="Learning, by system", panels=[_by_arm(*one) for one in LEARNING.items()], is_open=True),
        ws.Section(
            name="Learning, every seed",
            panels=[
                wr.LinePlot(title=title, x=X, y=[name], aggregate=False)
                for name, title in LEARNING.items()
                if name != "lr"
            ],
        ),
        ws.Section(name="By medium and source", panels=[_by_name(*one) for one in PARTS.items()]),
        ws.Section(name="Throughput, by system", panels=[_by_arm(*one) for one in EFFICIENCY.items()], is_open=True),
        ws.Section(name="Held-out samples", panels=[wr.WeavePanelSummaryTable(table_name=SAMPLES)]),
    ]
    return ws.Workspace(
        entity=entity,
        project=project,
        name=f"{experiment}: systems and seeds",
        sections=sections,
        settings=ws.WorkspaceSettings(x_axis=X, max_runs=50),
        runset_settings=ws.RunsetSettings(
            filters=ws.And(ws.Config(EXPERIMENT) == experiment),
            groupby=[ws.Config(ARM)],
            order=[ws.Ordering(ws.Config(SEED), ascending=True)],
            pinned_columns=[f"config:{ARM}", f"config:{SEED}", "summary:loss", "summary:val_loss"],
            baseline_run=baseline,
        ),
    )


def study_report(entity: str, project: str, experiment: str, study: Report) -> Any:
    """A report of a study: its verdicts, its plots, its runs' curves and its tables."""
    import wandb_workspaces.reports.v2 as wr
    from wandb_workspaces import expr

    found = study.found
    verdicts = as_text(study).partition("\n## ")[0].partition("\n")[2].strip()
    keys = [key for key, _ in _keyed(study)]
    # A set of runs that names no project is of the report's own, and is not looked for on the server.
    runs = wr.Runset(name="training", filters=expr.And(expr.Config(EXPERIMENT) == experiment))
    own = wr.Runset(name="study", filters=expr.And(expr.Metric("ID") == run_of(study)))
    tables = as_markdown(tables_of(found), [*found.remarks, *HOW])
    blocks: Any = [
        wr.TableOfContents(),
        wr.H2("Claims"),
        wr.MarkdownBlock(verdicts),
        wr.H2("Plots"),
        wr.PanelGrid(runsets=[own], panels=[wr.MediaBrowser(title="Figures", media_keys=keys, num_columns=3)]),
        wr.H2("Learning curves"),
        wr.PanelGrid(runsets=[runs], panels=[_by_arm(*one) for one in LEARNING.items()]),
        wr.H2("Figures"),
        wr.MarkdownBlock(tables),
    ]
    return wr.Report(project, entity, title_of(found), f"The study {found.study.name}.", blocks, width="fluid")


def log_study(entity: str, project: str, study: Report, **settings: Any) -> None:
    """A run of its own that holds a study's plots, and its verdicts as a table; made again, it takes their place.

    W&B's files lie in the study's folder. settings: of wandb.init.
    """
    import wandb

    name = run_of(study)
    asked = {
        "entity": entity,
        "project": project,
        "id": name,
        "name": name,
        "job_type": "study",
        "config": {EXPERIMENT: "study", "study": study.found.study.name},
        "dir": study.found.study.path.parent,
        "resume": "allow",
    }
    with wandb.init(**{**asked, **settings}) as run:
        pictures = {key: wandb.Html(f'<img src="{plot.uri}" alt="{plot.title}">') for key, plot in _keyed(study)}
        run.log({**pictures, "study/verdicts": _verdicts(study)})


def specification(made: Any) -> str:
    """A workspace or a report as JSON, as W&B's API takes it."""
    return made._to_model().model_dump_json(by_alias=True, exclude_none=True)


def run_of(study: Report) -> str:
    """The id of the W&B run that holds a study's plots."""
    return "study-" + re.sub(r"[^\w-]", "-", study.found.study.name, flags=re.ASCII)


def _keyed(study: Report) -> list[tuple[str, Plot]]:
    """The study's plots, with the names that they are logged by."""
    return [(f"study/{name.removesuffix('.svg')}", one) for name, one in pictures_of(study).items()]


def _verdicts(study: Report) -> Any:
    import wandb

    columns = ["claim", "level", "better", "worse", "verdict", "points", "low", "high", "p", "corrected", "why"]
    rows: list[list[Any]] = []
    for one in study.found.verdicts:
        gain = one.gain
        numbers = [None] * 4 if gain is None else [*(100 * v for v in (gain.value, gain.low, gain.high)), gain.p]
        claim = one.claim
        rows.append([claim.says, one.level, claim.better, claim.worse, one.ruling, *numbers, one.corrected, one.why])
    return wandb.Table(columns=columns, data=rows, allow_mixed_types=True)


def _by_arm(name: str, title: str) -> Any:
    """A metric of every system: the mean of its seeds, and the lowest and highest of them."""
    import wandb_workspaces.reports.v2 as wr

    return wr.LinePlot(
        title=title, x=X, y=[name], groupby=wr.Config(ARM), groupby_aggfunc="mean", groupby_rangefunc="minmax"
    )


def _by_name(pattern: str, title: str) -> Any:
    import wandb_workspaces.reports.v2 as wr

    return wr.LinePlot(title=title, x=X, metric_regex=pattern)
