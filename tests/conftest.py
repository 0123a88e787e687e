"""Tiny random models, checkpoints and samples that the tests share. Nothing here is trained."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run side by side, and threads that wait for a core slow all down
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a path that is not there must fail, not be looked up on a hub

import pytest
import torch
import warm
from hydra.core.hydra_config import HydraConfig
from transformers import CLIPConfig, CLIPModel, ViTMAEConfig, ViTMAEForPreTraining

from vllava.conversation import TEMPLATES
from vllava.data.packing import ConversationPacker
from vllava.data.samples import Medium, Sample
from vllava.model.build import fresh_llm, load_tokenizer
from vllava.model.checkpoint import Description, save_trained
from vllava.model.encoders import ClipEncoder
from vllava.model.languagebind import LanguageBind
from vllava.model.video_llava import VideoLlava

TOKENIZER = Path(__file__).parents[1] / "assets" / "tokenizer"
FRAMES = 4
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 16,
}
TEXT = {
    "vocab_size": 639,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 16,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}


@pytest.fixture(autouse=True)
def hydra_left_as_found():
    """Hydra keeps the last composed configuration in a singleton."""
    before = HydraConfig.instance().cfg
    yield
    HydraConfig.instance().cfg = before


def randomise(module, seed=0):
    """Give every parameter, biases and layer norms included, values that matter: an omission must show."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        is_norm_weight = "norm" in name and name.endswith("weight")
        parameter.data = 1 + 0.3 * noise if is_norm_weight else 0.2 * noise
    return module


@pytest.fixture(scope="session")
def tokenizer():
    return load_tokenizer(str(TOKENIZER))


@pytest.fixture(scope="session")
def make_clip():
    """A CLIP, or a LanguageBind-Video if the vision settings ask for temporal attention."""

    def make(**vision):
        config = CLIPConfig(vision_config={**VISION, **vision}, text_config=TEXT, projection_dim=16)
        build = LanguageBind if vision.get("add_time_attn") else CLIPModel
        return randomise(build(config)).eval()

    return make


@pytest.fixture(scope="session")
def clip(make_clip):
    return make_clip()


@pytest.fixture(scope="session")
def video_clip(make_clip):
    return make_clip(add_time_attn=True, num_frames=FRAMES)


@pytest.fixture(scope="session")
def image_folder(clip, tmp_path_factory):
    """A checkpoint of LanguageBind-Image, which has CLIP's form."""
    folder = tmp_path_factory.mktemp("languagebind-image")
    clip.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def video_folder(video_clip, tmp_path_factory):
    """A checkpoint of LanguageBind-Video."""
    folder = tmp_path_factory.mktemp("languagebind-video")
    video_clip.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def mae():
    decoder = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = ViTMAEConfig(**VISION, **{f"decoder_{name}": value for name, value in decoder.items()})
    return randomise(ViTMAEForPreTraining(config)).eval()


@pytest.fixture(scope="session")
def mae_folder(mae, tmp_path_factory):
    """A checkpoint of a masked autoencoder."""
    folder = tmp_path_factory.mktemp("mae")
    mae.save_pretrained(folder)
    return folder


@pytest.fixture
def make_llm():
    """A tiny Llama; grouped key heads, so that attention has to repeat them."""

    def make(seed=0, **changes):
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 512}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
        return randomise(fresh_llm(str(TOKENIZER), **{**sizes, **heads, **changes}), seed)

    return make


@pytest.fixture
def make_model(make_llm, image_folder, video_folder):
    """A tiny Video-LLaVA with both encoders."""

    def make(seed=0, **llm):
        encoders = ClipEncoder(str(image_folder), "image"), ClipEncoder(str(video_folder), "video")
        model = VideoLlava(make_llm(seed, **llm), *encoders)
        randomise(model.projector, seed)
        return model.eval()

    return make


@pytest.fixture
def model(make_model):
    return make_model()


@pytest.fixture
def checkpoint(make_model, tokenizer, image_folder, video_folder, tmp_path):
    """A whole checkpoint of the tiny model."""
    build = "vllava.model.encoders.ClipEncoder"
    folders = {"image": image_folder, "video": video_folder}
    encoders = {kind: {"_target_": build, "path": str(path), "medium": kind} for kind, path in folders.items()}
    description = Description(encoders, "llm", "vicuna_v1", "crop", ["projector", "llm"])
    save_trained(make_model(), tokenizer, description, tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


@pytest.fixture
def make_packer(tokenizer):
    """The packer for a model's encoders."""

    def make(model, template="vicuna_v1", token_budget=4096, max_length=512):
        return ConversationPacker(tokenizer, TEMPLATES[template], model.specs, token_budget, max_length)

    return make


@pytest.fixture
def make_sample():
    """A sample from its turns, the human's first, with random pixels for the placeholders in them."""

    def make(*turns, key="sample", seed=0):
        generator = torch.Generator().manual_seed(seed)
        shapes = {"image": (3, 32, 32), "video": (FRAMES, 3, 32, 32)}
        shown = [word.split(">")[0] for turn in turns for word in turn.split("<")[1:]]
        media = [Medium(kind, torch.randn(shapes[kind], generator=generator)) for kind in shown if kind in shapes]
        speakers = ("human", "gpt")
        conversation = [{"from": speakers[index % 2], "value": turn} for index, turn in enumerate(turns)]
        return Sample(key, conversation, media)

    return make


@pytest.fixture
def mixed_samples(make_sample):
    """Every combination a batch may hold: one image, one video, several media, several rounds, none."""
    return [
        make_sample("<image>\nWhat colour is it?", "It is red.", key="image", seed=1),
        make_sample("How many legs has a large black spider?", "Eight", key="text", seed=2),
        make_sample("<video>\nWhat moves?", "A blue ball", "Where to?", "To the left.", key="video", seed=3),
        make_sample("<image> before <video> and <image> after: what changed?", "Nothing", key="several", seed=4),
        make_sample("Look: <video>", "A cube falls.", "And here: <image>?", "It lies.", key="rounds", seed=5),
    ]


@pytest.fixture
def train(tmp_path):
    """A function that runs train.py with the given arguments and returns (exit code, what it wrote to stderr)."""

    def run(*arguments):
        settings = [f"runs={tmp_path / 'runs'}", "logger=none"]
        code, _, told = warm.train([*arguments, *settings], tmp_path / "log")
        return code, told

    return run
