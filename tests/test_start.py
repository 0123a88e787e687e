"""What a LanguageBind starts from: a checkpoint, or some modules of one."""

import pytest
import torch
import yaml
from conftest import TOKENIZER
from safetensors.torch import load_file, save_file

from vllava.config import PROJECT
from vllava.errors import UserError
from vllava.model.build import languagebind
from vllava.model.languagebind import LanguageBind
from vllava.pixels import normalised

IMAGES, VIDEOS = (PROJECT / "assets" / name for name in ("languagebind-image", "languagebind-video"))
SIZES = yaml.safe_load((PROJECT / "conf/model/toy_languagebind.yaml").read_text())["model"]
TOWERS = {"text": SIZES["text"], "projection_dim": SIZES["projection_dim"], "tokenizer_path": str(TOKENIZER)}
OF_VIDEOS = {**SIZES["vision"], "add_time_attn": True, "num_frames": 8}
CLIPS = torch.randint(0, 256, (2, 8, 3, 48, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
WORDS = torch.tensor([[1, 7, 9, 2]])


def started(folder, vision=OF_VIDEOS, **settings):
    return languagebind(vision, **TOWERS, start_from=str(folder), **settings).eval()


def saved(folder):
    return LanguageBind.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def test_a_video_encoder_that_starts_from_an_image_encoder_is_nearly_that_encoder_on_every_frame():
    images = saved(IMAGES)
    pooled = torch.stack([images.vision_model(normalised(frame)).pooler_output for frame in CLIPS])
    expected = torch.nn.functional.normalize(images.visual_projection(pooled.mean(1)), dim=-1)
    model = started(IMAGES)
    found = model.embed_media(CLIPS)
    assert (found * expected).sum(-1).min() > 0.999  # the frames' embeddings are small
    for layer in model.vision_model.encoder.layers:
        layer.temporal_embedding.zero_()
    torch.testing.assert_close(model.embed_media(CLIPS), expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_one_that_starts_from_a_video_encoder_keeps_its_temporal_attention():
    torch.testing.assert_close(started(VIDEOS).embed_media(CLIPS), saved(VIDEOS).embed_media(CLIPS))


@torch.no_grad()
def test_modules_that_start_afresh_take_nothing_of_the_checkpoint_and_the_others_all():
    model, images = started(IMAGES, fresh=["vision_model", "visual_projection"]), saved(IMAGES)
    mask = torch.ones_like(WORDS)
    torch.testing.assert_close(model.embed_text(WORDS, mask), images.embed_text(WORDS, mask))
    taken = images.state_dict()
    for name, value in model.named_parameters():
        if name.startswith(("vision_model", "visual_projection")) and name in taken and value.dim() > 1:
            assert not torch.isclose(value, taken[name]).any(dim=-1).all(), name


def test_an_image_encoder_starts_from_another():
    expected = saved(IMAGES).state_dict()
    assert all(
        torch.equal(value, expected[name]) for name, value in started(IMAGES, SIZES["vision"]).state_dict().items()
    )


def test_a_module_that_the_model_does_not_have_is_named():
    with pytest.raises(UserError, match=r"names 'vision', which the model does not have; it has: text_model, "):
        started(IMAGES, fresh=["vision"])


def test_temporal_attention_that_is_there_in_part_is_refused(tmp_path):
    tensors = load_file(VIDEOS / "model.safetensors")
    lost = "vision_model.encoder.layers.2.temporal_attn.out_proj.weight"
    del tensors[lost]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text((VIDEOS / "config.json").read_text())
    with pytest.raises(UserError, match=f"does not fit: missing: {lost}"):
        started(tmp_path)
