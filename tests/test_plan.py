"""Plans: counted and measured on real models, and the paper's own cost."""

import json

import pytest
import torch
from shard_fixtures import image_sample, video_sample, write_source
from torch.utils.flop_counter import FlopCounterMode

from vllava import plan
from vllava.data.packing import pack
from vllava.model.build import load_llm, video_llava
from vllava.model.encoders import ClipEncoder, MaeEncoder

SEVEN_B = "model=video_llava_7b"


def planned(*overrides, gpus=8):
    return plan.make(plan.configured(list(overrides)), gpus)


def test_parameters_are_those_of_the_model_that_is_built():
    found = planned("+experiment=stage2")
    image, video = ClipEncoder("assets/languagebind-image", "image"), ClipEncoder("assets/languagebind-video", "video")
    model = video_llava(load_llm("assets/llm"), image, video)
    assert found.parameters == {
        "image encoder": sum(p.numel() for p in image.parameters()),
        "video encoder": sum(p.numel() for p in video.parameters()),
        "projector": sum(p.numel() for p in model.projector.parameters()),
        "llm": sum(p.numel() for p in model.llm.parameters()),
    }
    assert found.tokens == {"image": image.spec.tokens, "video": video.spec.tokens}


def test_mae_is_counted_right():
    found = planned("+experiment=stage2", "+ablation=separated_mae")
    mae = MaeEncoder("assets/mae")
    assert found.parameters["image encoder"] == sum(p.numel() for p in mae.parameters())


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_flops_are_those_that_torch_counts(stage, tokenizer, make_packer, make_sample):
    """Of one forward and backward pass of a sample, up to the small operations that a plan leaves out."""
    from vllava.training.task import freeze_all_but

    image, video = ClipEncoder("assets/languagebind-image", "image"), ClipEncoder("assets/languagebind-video", "video")
    model = video_llava(load_llm("assets/llm"), image, video).train()
    freeze_all_but(model, ["projector"] if stage == "stage1" else ["projector", "llm"])
    packer = make_packer(model)
    for kind, shape in (("image", (3, 48, 48)), ("video", (8, 3, 48, 48))):
        sample = make_sample(f"<{kind}>\nWhat is it?", "It is a small red circle at the top left.")
        sample.media[0] = type(sample.media[0])(kind, torch.randn(shape))
        packed = packer.prepare(sample)
        batch = pack([packed])
        with FlopCounterMode(display=False) as counter:
            model.loss_sum(batch).backward()
        settings = plan.configured([f"+experiment={stage}"])
        text = len(packed) - model.specs[kind].tokens
        settings["recipes"][stage] |= {
            "samples": {kind: 1}, "text_tokens": {kind: text}, "supervised_share": batch.num_supervised / text
        }  # fmt: skip
        assert plan.make(settings, 1).flops[kind] == pytest.approx(counter.get_total_flops(), rel=0.08)


def test_the_papers_stages_cost_what_the_paper_spent():
    assert planned("+experiment=stage1", SEVEN_B).epoch_flops == pytest.approx(4e19, rel=0.25)
    assert planned("+experiment=stage2", SEVEN_B).epoch_flops == pytest.approx(3e19, rel=0.25)


def test_sizes_of_the_papers_model():
    found = planned("+experiment=stage2", SEVEN_B)
    assert found.parameters["llm"] == 6_738_415_616  # Vicuna-7B
    assert found.parameters["projector"] == 1024 * 4096 + 4096 + 4096 * 4096 + 4096
    assert found.tokens == {"image": 256, "video": 8 * 257}
    assert planned("+experiment=stage2", SEVEN_B, "data.num_frames=16").tokens["video"] == 16 * 257


def test_memory_follows_the_trainer():
    alone = planned("+experiment=stage2", SEVEN_B, "trainer=ddp").memory
    zero2 = planned("+experiment=stage2", SEVEN_B, "trainer=zero2").memory
    offload = planned("+experiment=stage2", SEVEN_B, "trainer=zero2_offload")
    fsdp = planned("+experiment=stage2", SEVEN_B, "trainer=fsdp").memory
    learnt = 6_738_415_616 + 20_979_712
    assert alone["gradients"] == 4 * learnt and alone["optimizer"] == 8 * learnt
    assert zero2["gradients"] == 2 * learnt / 8 and zero2["optimizer"] == 12 * learnt / 8
    assert offload.memory["optimizer"] == 0 and offload.host_memory == zero2["optimizer"]
    assert fsdp["optimizer"] == learnt and fsdp["weights"] < alone["weights"] / 4
    first = planned("+experiment=stage1", SEVEN_B, "trainer=ddp")
    assert first.memory["optimizer"] == 8 * 20_979_712
    frozen = sum(first.parameters.values()) - 20_979_712
    assert first.memory["weights"] == 2 * frozen + 6 * 20_979_712


def test_the_command_prints_the_arithmetic_and_the_verdict(capsys):
    plan.main(["+experiment=stage2", SEVEN_B, "trainer=ddp", "--gpu", "a100-80g"])
    printed = capsys.readouterr().out
    assert "does not fit a100-80g" in printed and "2,056 + 150" in printed and "hours at 50% of 8 x 312" in printed
    plan.main(["+experiment=stage2", SEVEN_B, "trainer=zero2", "--gpu", "a100-80g"])
    assert "fits a100-80g" in capsys.readouterr().out
    plan.main(["+experiment=stage1", SEVEN_B, "--json"])
    assert json.loads(capsys.readouterr().out)["tokens"] == {"image": 256, "video": 2056}


def test_samples_may_be_counted_in_the_shards(tmp_path, capsys):
    write_source(tmp_path / "images", [image_sample(f"i{i}") for i in range(3)], per_shard=2)
    write_source(tmp_path / "videos", [video_sample(f"v{i}") for i in range(2)], per_shard=2)
    sources = [f"data.sources.{kind}=[{tmp_path}/{kind}s]" for kind in ("image", "video")]
    plan.main(["+experiment=stage1", SEVEN_B, *sources, "--shards", "--json"])
    assert json.loads(capsys.readouterr().out)["samples"] == {"image": 3, "video": 2}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["+experiment=stage1", "world=/nowhere", "--shards"], "no shards at /nowhere"),
        (["+experiment=stage3"], "stage3"),
        (["+experiment=evaluate"], "a plan is for a stage"),
        (["+experiment=stage1", "model=nothing"], "nothing"),
    ],
)
def test_a_mistake_is_one_paragraph(arguments, message):
    with pytest.raises(SystemExit) as error:
        plan.main(arguments)
    assert str(error.value).startswith("error: ") and message.lower() in str(error.value).lower()
