"""The documentation's code runs, and its paths exist."""

import random
import re
from pathlib import Path

import pytest

from data_prep.toy import make
from data_prep.toy_render import encode_jpeg, encode_mp4, render
from data_prep.toy_scene import draw_clip, draw_picture

ROOT = Path(__file__).parents[1]
PAGES = [
    "README.md",
    "docs/architecture.md",
    "docs/benchmarks.md",
    "docs/library.md",
    "docs/fidelity.md",
    "docs/data.md",
    "docs/runs.md",
    "docs/studies.md",
    "docs/study.md",
    "docs/study/paper.md",
    "docs/study/alignment.md",
    "docs/study/data_amount.md",
    "docs/study/no_stage1.md",
    "docs/study/swapped.md",
    "docs/study/video_share.md",
    "docs/when.md",
    "docs/watching.md",
    "docs/verdicts.md",
    "docs/cluster.md",
    "data_prep/README.md",
]


def test_library_page_runs(checkpoint, tmp_path):
    rng = random.Random(0)
    (tmp_path / "scene.jpg").write_bytes(encode_jpeg(render(draw_picture(rng))[0]))
    (tmp_path / "clip.mp4").write_bytes(encode_mp4(render(draw_clip(rng))))
    make("stage2", tmp_path, seed=0, scale=0.005, processes=1)
    names = {
        "checkpoint": checkpoint,
        "image_file": tmp_path / "scene.jpg",
        "video_file": tmp_path / "clip.mp4",
        "shards": str(tmp_path / "stage2" / "images"),
    }
    code = "\n".join(re.findall(r"```python\n(.*?)```", (ROOT / "docs/library.md").read_text(), re.S))
    exec(compile(code, "docs/library.md", "exec"), names)
    assert names["loss"].item() > 0
    assert names["batch"].num_samples > 0
    assert names["step"].broken == []


@pytest.mark.parametrize("page", PAGES)
def test_links_and_named_files_exist(page):
    text = (ROOT / page).read_text()
    links = [*re.findall(r"\]\((?!http)([^)#]+)\)", text), *re.findall(r'<img src="([^"]+)"', text)]
    linked = [(ROOT / page).parent / link for link in links]
    named = [ROOT / name for name in re.findall(r"`((?:src|conf|docs|data_prep|tests|assets)/[\w./-]*)`", text)]
    assert not [path for path in linked + named if "NAME" not in path.name and not path.exists()]


def test_readme_names_only_make_targets_that_exist():
    targets = re.findall(r"^([a-z0-9]+):", (ROOT / "Makefile").read_text(), re.M)
    named = re.findall(r"`?make ([a-z0-9]+)`?", (ROOT / "README.md").read_text())
    assert set(named) - {"and"} <= set(targets)
