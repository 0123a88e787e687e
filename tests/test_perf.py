"""The benchmarks compare like with like, and their arithmetic is right. No test here depends on the time it takes."""

import json
import os

import numpy as np
import pytest
import torch
from torch.testing import assert_close
from transformers import CLIPVisionConfig, LlamaConfig

from perf import decoding, gpu
from perf.__main__ import main, table
from perf.contenders import MIXTURES, TRAINED, Geometry, Loop, build, draw, packed, padded, train_only
from perf.timing import Timing, exponent, take_turns
from vllava.data.video import video_decoder
from vllava.model.build import load_tokenizer
from vllava.plan import configured, make

SMALL = Geometry(hidden_size=48, layers=1, vision_width=32, vision_layers=2, image_size=32, frames=2)


@pytest.fixture(scope="module", autouse=True)
def at_the_root():
    before = os.getcwd()
    os.chdir(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    yield
    os.chdir(before)


@pytest.mark.parametrize("mixture", MIXTURES)
def test_both_contenders_learn_the_same_from_the_same_samples(mixture):
    model, port = build(SMALL)
    samples = draw(model, MIXTURES[mixture])
    parts = TRAINED[mixture.split()[0]]
    ours = Loop(model.train(), train_only(model, parts), bf16=False)
    theirs = Loop(port.train(), train_only(port, parts), bf16=False)
    assert sum(p.numel() for p in ours.trained) == sum(p.numel() for p in theirs.trained)
    for _ in range(2):
        assert ours.packed_step(packed(samples)) == pytest.approx(theirs.padded_step(padded(port, samples)), abs=1e-5)
    assert_close(model.projector[0].weight, port.model.multi_modal_projector.linear_1.weight, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("mixture", "images", "videos"), [("stage1", 558, 702), ("stage2", 665, 100)])
def test_mixtures_are_the_papers(mixture, images, videos):
    counts = MIXTURES[mixture].counts
    assert counts["image"] / sum(counts.values()) == pytest.approx(images / (images + videos), abs=0.01)


@pytest.mark.parametrize(("mixture", "share"), [("stage1", 0.62), ("stage2", 0.35)])
def test_padding_takes_what_it_takes_at_the_papers_size(mixture, share):
    """Section 4.1.2's data in batches as long as the longest: 62 % and 35 % of the tokens are of use."""
    model, port = build(Geometry(layers=1, vision_layers=2))
    samples = draw(model, MIXTURES[mixture])
    assert sum(map(len, samples)) / padded(port, samples)["input_ids"].numel() == pytest.approx(share, abs=0.02)


def test_ratios_are_taken_within_a_turn():
    drifting = Timing({"a": [1.0, 2.0, 4.0], "b": [2.0, 4.0, 8.0]})  # the machine slows down, the ratio stays
    assert drifting.ratio("a", "b") == 2.0 and drifting.ratio("b", "a") == 0.5


def test_every_contender_runs_once_a_turn_and_warming_up_does_not_count():
    calls = []
    timing = take_turns({name: lambda name=name: calls.append(name) or len(calls) for name in "ab"}, repeats=3)
    assert sorted(calls) == ["a"] * 4 + ["b"] * 4
    assert sorted([*timing.seconds["a"], *timing.seconds["b"]]) == [3, 4, 5, 6, 7, 8]


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_the_fitted_exponent_is_that_of_a_power_law(power):
    assert exponent([2, 4, 8, 32], [3 * size**power for size in (2, 4, 8, 32)]) == pytest.approx(power)


@pytest.mark.parametrize("stage", gpu.STAGES)
def test_the_benchmark_of_gpus_runs_at_a_small_size_where_there_is_none(stage):
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    tower |= {"image_size": 32, "patch_size": 16}
    words = len(load_tokenizer("assets/tokenizer"))
    size = gpu.Size(
        LlamaConfig(vocab_size=words, hidden_size=48, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4),
        CLIPVisionConfig(**tower, add_time_attn=False, num_frames=1),
        CLIPVisionConfig(**tower, add_time_attn=True, num_frames=2),
    )
    plan = make(configured([f"+experiment={stage}", "model=video_llava_7b"]), 1)
    row = gpu.measure(size, stage, plan, torch.device("cpu"), checkpointing=True, repeats=1, samples=4)
    assert row["useful tokens/s"] > row["samples/s"] > 0 and row["MFU"] is None  # a CPU's peak is not known


def test_what_is_found_is_written_down(tmp_path, monkeypatch, capsys):
    rows = [{"who": "ours", "ratio": 2.5, "samples/s": 1234.5}, {"who": "port", "ratio": None}]
    monkeypatch.setattr("perf.generation.run", lambda repeats, bf16: rows)
    assert main(["generation", "--out", str(tmp_path), "--repeats", "7"]) == 0
    found = json.loads((tmp_path / "generation.json").read_text())
    assert found["rows"] == rows and found["repeats"] == 7 and found["machine"]["threads"] > 0
    assert table(rows) in capsys.readouterr().out
    assert "| ours | 2.5 | 1,234 |" in table(rows)


def test_an_unknown_benchmark_is_refused_with_those_there_are(capsys):
    with pytest.raises(SystemExit):
        main(["speed"])
    assert "no benchmark is called speed; there are: step, ablation" in capsys.readouterr().err


def test_videos_of_the_benchmark_of_decoding_last_as_long_as_they_say_and_every_decoder_takes_their_frames():
    data = decoding.video(64, 48, 20, {})
    clip = decoding.CONTENDERS["ours"](data)
    assert len(clip) == decoding.FRAMES and video_decoder("auto")(data, 8).duration == pytest.approx(20)
    for decode in decoding.CONTENDERS.values():
        pairs = zip(clip, decode(data), strict=True)
        assert all(np.abs(np.asarray(one, int) - np.asarray(other, int)).max() <= 3 for one, other in pairs)
