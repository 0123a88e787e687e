"""Imports inside the package point one way."""

import ast
from functools import cache
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src" / "vllava"

# What each part of the package may import from the package; parts that are not listed put a run together.
MAY_IMPORT = {
    "errors": set(),
    "checks": {"errors"},
    "cores": set(),
    "pixels": set(),
    "folders": {"errors"},
    "stops": {"errors"},
    "batch": {"errors"},
    "templates": {"errors"},
    "conversation": {"batch", "errors", "templates"},
    "data": {"batch", "checks", "cores", "errors", "folders", "conversation", "pixels"},
    "model": {"batch", "checks", "errors", "folders", "conversation", "pixels"},
    "training": {"batch", "checks", "errors", "folders", "model", "pixels", "stops"},
    "inspection": {"batch", "errors", "conversation", "data", "training"},
    "features": {"data", "errors", "folders", "model"},
    "evaluation": {"batch", "checks", "errors", "features", "folders", "conversation", "data", "model"},
    "verdicts": {"checks", "errors", "data", "evaluation"},
}
HYDRA = {"hydra", "omegaconf"}
# fmt: off
MAY_USE_HYDRA = {
    "answering.py", "chain.py", "config.py", "inspect_data.py", "lineage.py", "options.py", "plan.py", "run.py",
    "settle.py", "study_plan.py", "study_run.py", "study_sweep.py",
}
# fmt: on


def imported_modules(code, package="vllava"):
    """Dotted names of everything a module imports, anywhere in it; relative ones written out."""
    found = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            base = ".".join(parents[: len(parents) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            found |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return found


@cache
def modules():
    return [(path.relative_to(SRC), path.read_text()) for path in sorted(SRC.rglob("*.py"))]


def imports_of(path, code):
    return imported_modules(code, ".".join(("vllava", *path.parent.parts)))


def parts_imported(path, code):
    """The parts of the package that a module imports ("data", "errors", …)."""
    names = {name.split(".")[1] for name in imports_of(path, code) if name.startswith("vllava.")}
    return names & {p.stem for p in SRC.iterdir()}


@pytest.mark.parametrize("part", MAY_IMPORT)
def test_a_part_imports_only_what_lies_below_it(part):
    own = [(path, code) for path, code in modules() if path.parts[0].removesuffix(".py") == part]
    assert own, f"there is no vllava.{part}"
    wrong = {str(path): parts_imported(path, code) - MAY_IMPORT[part] - {part} for path, code in own}
    assert not {path: names for path, names in wrong.items() if names}


def test_every_folder_of_the_package_has_its_rule():
    assert {path.name for path in SRC.iterdir() if path.is_dir() and path.name != "__pycache__"} <= set(MAY_IMPORT)


def test_only_what_composes_a_run_knows_hydra():
    users = {str(path) for path, code in modules() if {n.split(".")[0] for n in imports_of(path, code)} & HYDRA}
    assert users == MAY_USE_HYDRA


@pytest.mark.parametrize("unwanted", ["torchvision", "data_prep", "tests"])
def test_nothing_imports(unwanted):
    users = [str(p) for p, c in modules() if any(f"{n}.".startswith(f"{unwanted}.") for n in imports_of(p, c))]
    assert users == []


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("import vllava.data.shards as s", "vllava.data.shards"),
        ("from vllava import data", "vllava.data"),
        ("from vllava.data.shards import Shard", "vllava.data.shards"),
        ("def f():\n    from vllava.data import media", "vllava.data.media"),
        ("if True:\n    import torchvision.io", "torchvision.io"),
        ("from ..data import shards", "vllava.data.shards"),
        ("from . import splice", "vllava.model.splice"),
    ],
)
def test_every_way_of_importing_is_seen(code, expected):
    assert expected in imported_modules(code, "vllava.model")
