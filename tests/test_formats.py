"""Other people's checkpoints: what they compute is computed here too, and nothing is lost on the way and back."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import FRAMES, TOKENIZER, VISION, randomise
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken
from torch.testing import assert_close
from transformers import (
    AutoTokenizer,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    VideoLlavaConfig,
    VideoLlavaImageProcessor,
)
from transformers import VideoLlavaForConditionalGeneration as Port

from vllava import convert
from vllava.batch import IGNORE_INDEX
from vllava.conversation import PLACEHOLDER_IDS, vicuna_v1
from vllava.data.packing import ConversationPacker, pack
from vllava.errors import UserError
from vllava.model import formats
from vllava.model.build import load_tokenizer
from vllava.model.checkpoint import load, load_projector
from vllava.model.encoders import ClipEncoder
from vllava.model.formats import read_original, read_ours, read_port, write_original, write_ours, write_port
from vllava.model.formats.processor import write_processor

PUBLISHED = Path(importlib.util.find_spec("mistral_common").origin).parent / "data" / "tokenizer.model.v1"
DATA = Path(__file__).parent / "data"
PATCHES = (VISION["image_size"] // VISION["patch_size"]) ** 2
LLAMA = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.fixture(scope="module")
def media_tokenizer():
    tokenizer = load_tokenizer(str(TOKENIZER))
    tokenizer.add_tokens([AddedToken(token, special=True) for token in formats.MEDIA_TOKENS])
    return tokenizer


@pytest.fixture(scope="module")
def port(media_tokenizer):
    """A random Video-LLaVA of `transformers`."""
    image, video = media_tokenizer.convert_tokens_to_ids(list(formats.MEDIA_TOKENS))
    config = VideoLlavaConfig(
        vision_config={"model_type": "clip_vision_model", **VISION},
        text_config={"model_type": "llama", **LLAMA, "vocab_size": len(media_tokenizer), "eos_token_id": 1},
        image_token_index=image,
        video_token_index=video,
        image_seq_length=PATCHES,
        video_seq_length=FRAMES * (1 + PATCHES),
    )
    return randomise(Port(config)).eval()


@pytest.fixture(scope="module")
def port_folder(port, media_tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("port")
    port.save_pretrained(folder)
    media_tokenizer.save_pretrained(folder)
    return folder


def imported(read, folder, into, **settings):
    """The model that a foreign checkpoint becomes."""
    write_ours(read(folder, **settings), into)
    model, tokenizer, _ = load(into)
    return model, ConversationPacker(tokenizer, vicuna_v1, model.specs, 4096, 512)


def port_inputs(port, packed):
    """One packed sample as the port takes it."""
    tokens = {
        PLACEHOLDER_IDS["image"]: port.config.image_token_id,
        PLACEHOLDER_IDS["video"]: port.config.video_token_id,
    }
    images = [m.pixels for m in packed.media if m.kind == "image"]
    videos = [m.pixels for m in packed.media if m.kind == "video"]
    media = {"pixel_values": images, "pixel_values_videos": videos}
    ids = torch.tensor([[tokens.get(token, token) for token in packed.token_ids]])
    return {"input_ids": ids, **{name: torch.stack(pixels) for name, pixels in media.items() if pixels}}


@torch.no_grad()
def test_the_port_computes_the_same_logits_loss_and_answers(port, port_folder, mixed_samples, tmp_path):
    model, packer = imported(read_port, port_folder, tmp_path / "ours")
    prepared = [packer.prepare(sample) for sample in mixed_samples]
    batch = pack(prepared)
    theirs, labels = [], []
    for packed in prepared:
        theirs.append(port(**port_inputs(port, packed)).logits[0])
        labels.append(torch.tensor(packed.labels))
    ours = model.logits(batch, torch.arange(len(batch.token_ids)))
    assert_close(ours, torch.cat(theirs), atol=1e-4, rtol=0)

    shifted = torch.cat([logits[:-1] for logits in theirs]), torch.cat([label[1:] for label in labels])
    loss = torch.nn.functional.cross_entropy(*shifted, ignore_index=IGNORE_INDEX)
    assert abs(float(model.loss(batch)) - float(loss)) < 1e-5

    prompts = [packer.prompt(sample) for sample in mixed_samples]
    answers = model.generate(pack(prompts), max_new_tokens=12)
    for prompt, answer in zip(prompts, answers, strict=True):
        inputs = port_inputs(port, prompt)
        new = port.generate(**inputs, max_new_tokens=12, do_sample=False, pad_token_id=0)[0, len(prompt) :].tolist()
        assert answer == (new[: new.index(1)] if 1 in new else new)


def original_checkpoint(folder, towers, tied=False, with_towers=True, seed=0, tokenizer=None):
    """A checkpoint as the original code writes it, and what is in it; `towers` are folders of LanguageBind."""
    tokenizer = tokenizer or load_tokenizer(str(TOKENIZER))
    llm = randomise(LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **LLAMA)), seed)
    tensors = dict(llm.state_dict())
    generator = torch.Generator().manual_seed(seed)
    for name, shape in (
        ("0.weight", (32, VISION["hidden_size"])),
        ("0.bias", (32,)),
        ("2.weight", (32, 32)),
        ("2.bias", (32,)),
    ):
        tensors[f"model.mm_projector.{name}"] = torch.randn(shape, generator=generator) * 0.1
    for kind, tower in towers.items():
        for name, value in load_file(tower / "model.safetensors").items():
            if with_towers and name.startswith("vision_model."):
                tensors[name.replace("vision_model.", f"model.{kind}_tower.{kind}_tower.")] = value
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)  # older versions saved it
    folder.mkdir(exist_ok=True)
    names = sorted(tensors)
    parts = {"pytorch_model-00001-of-00002.bin": names[::2], "pytorch_model-00002-of-00002.bin": names[1::2]}
    for file, held in parts.items():
        torch.save({name: tensors[name] for name in held}, folder / file)
    index = {"weight_map": {name: file for file, held in parts.items() for name in held}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    config = {
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava",
        **{name: getattr(llm.config, name) for name in (*LLAMA, "vocab_size", "rms_norm_eps", "hidden_act")},
        "mm_image_tower": str(towers["image"]) if "image" in towers else None,
        "mm_video_tower": str(towers["video"]) if "video" in towers else None,
        "mm_hidden_size": VISION["hidden_size"],
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "image_aspect_ratio": "pad",
    }
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer.save_pretrained(folder)
    return tensors


@pytest.fixture(scope="module")
def original(image_folder, video_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("original")
    return folder, original_checkpoint(folder, {"image": image_folder, "video": video_folder})


def test_every_tensor_of_an_original_checkpoint_reaches_its_place(original, image_folder, video_folder, tmp_path):
    folder, tensors = original
    model, _ = imported(read_original, folder, tmp_path / "ours")
    for name, value in model.llm.state_dict().items():
        assert torch.equal(value, tensors[name])
    for name, value in model.projector.state_dict().items():
        assert torch.equal(value, tensors[f"model.mm_projector.{name}"])
    for kind in ("image", "video"):
        tower = model.encoder(kind).tower.state_dict()
        assert tower
        for name, value in tower.items():
            assert torch.equal(value, tensors[f"model.{kind}_tower.{kind}_tower.{name}"])
    assert model.specs["video"].frames == FRAMES
    pixels = torch.randn(2, FRAMES, 3, 32, 32)
    assert_close(model.encoder("video")(pixels), ClipEncoder(str(video_folder), "video")(pixels))


def same(one, other):
    """The same parts, to the bit."""
    mine, theirs = ({**p.llm_config.to_dict(), "_name_or_path": None} for p in (one, other))
    assert mine == theirs
    assert one.feature_layer == other.feature_layer
    assert one.tokenizer.get_vocab() == other.tokenizer.get_vocab()
    for mine, theirs in ((one.llm, other.llm), (one.projector, other.projector)):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) and mine[name].dtype == theirs[name].dtype for name in mine)
    assert one.towers.keys() == other.towers.keys()
    for kind, tower in one.towers.items():
        assert tower.config == other.towers[kind].config
        assert tower.tensors.keys() == other.towers[kind].tensors.keys()
        assert all(torch.equal(value, other.towers[kind].tensors[name]) for name, value in tower.tensors.items())


def test_original_to_ours_to_original_and_back_is_the_same_to_the_bit(original, tmp_path):
    parts = read_original(original[0])
    write_ours(parts, tmp_path / "ours")
    same(read_ours(tmp_path / "ours"), parts)
    write_original(read_ours(tmp_path / "ours"), tmp_path / "again")
    same(read_original(tmp_path / "again"), parts)
    written = json.loads((tmp_path / "again" / "config.json").read_text())
    assert written["image_aspect_ratio"] == "pad" and written["mm_projector_type"] == "mlp2x_gelu"


def test_port_to_ours_to_port_and_back_is_the_same_to_the_bit(port, port_folder, tmp_path):
    parts = read_port(port_folder)
    write_ours(parts, tmp_path / "ours")
    write_port(read_ours(tmp_path / "ours"), tmp_path / "again")
    same(read_port(tmp_path / "again"), parts)
    opened = Port.from_pretrained(tmp_path / "again")
    for name, value in port.state_dict().items():
        assert torch.equal(opened.state_dict()[name], value)


def test_half_precision_stays_half_precision(original, tmp_path):
    parts = read_original(original[0])
    parts.llm = {name: value.bfloat16() for name, value in parts.llm.items()}
    write_ours(parts, tmp_path / "ours")
    same(read_ours(tmp_path / "ours"), parts)


def test_a_model_with_temporal_attention_is_exported_to_the_port_only_if_told_so(original, tmp_path):
    parts = read_original(original[0])
    with pytest.raises(UserError, match=r"has temporal attention.*--drop-temporal-attention"):
        write_port(parts, tmp_path / "port")
    assert not (tmp_path / "port").exists()
    write_port(parts, tmp_path / "port", drop_temporal_attention=True)
    assert "temporal attention of the video encoder is missing" in (tmp_path / "port" / "README.md").read_text()
    opened, report = Port.from_pretrained(tmp_path / "port", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert not any("temporal" in name for name in opened.state_dict())


@torch.no_grad()
def test_the_exported_port_generates_the_same_tokens(port_folder, mixed_samples, tmp_path):
    model, packer = imported(read_port, port_folder, tmp_path / "ours")
    write_port(read_ours(tmp_path / "ours"), tmp_path / "exported")
    opened = Port.from_pretrained(tmp_path / "exported").eval()
    for sample in mixed_samples:
        prompt = packer.prompt(sample)
        new = opened.generate(**port_inputs(opened, prompt), max_new_tokens=8, do_sample=False, pad_token_id=0)
        [answer] = model.generate(pack([prompt]), max_new_tokens=8)
        assert new[0, len(prompt) :].tolist()[: len(answer)] == answer


@pytest.fixture(scope="module")
def published(image_folder, video_folder, tmp_path_factory):
    """An original checkpoint with the tokenizer that the paper's models are published with."""
    root = tmp_path_factory.mktemp("published")
    (root / "tokenizer").mkdir()
    shutil.copy(PUBLISHED, root / "tokenizer" / "tokenizer.model")
    settings = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "model_max_length": 2048}
    (root / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(settings))
    towers = {"image": image_folder, "video": video_folder}
    original_checkpoint(root / "llava", towers, tokenizer=load_tokenizer(str(root / "tokenizer")))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (root / "llava" / name).unlink()
    shutil.copy(root / "tokenizer" / "tokenizer_config.json", root / "llava")
    return root / "llava"


def test_an_export_to_the_original_has_what_transformers_4_31_opens(published, tmp_path):
    parts = read_original(published)
    write_ours(parts, tmp_path / "ours")
    assert write_original(read_ours(tmp_path / "ours"), tmp_path / "again") == []
    folder = tmp_path / "again"
    config = json.loads((folder / "config.json").read_text())
    assert not {"rope_scaling", "rope_theta", "rope_parameters", "attention_bias"} & config.keys()
    assert config["model_type"] == "llava" and config["pretraining_tp"] == 1
    assert config["mm_use_im_patch_token"] is False and config["mm_use_im_start_end"] is False
    for kind, name in (("image", "LanguageBind_Image"), ("video", "LanguageBind_Video_merge")):
        assert config[f"mm_{kind}_tower"] == str(folder / name) and (folder / name).is_dir()
        assert name in (folder / "README.md").read_text()
    vision = json.loads((folder / "LanguageBind_Video_merge" / "config.json").read_text())["vision_config"]
    assert vision["add_time_attn"] is True and vision["num_frames"] == FRAMES and vision["lora_r"] == 0
    assert json.loads((folder / "LanguageBind_Image" / "config.json").read_text())["model_type"] == "clip"
    opened, report = CLIPVisionModel.from_pretrained(folder / "LanguageBind_Image", output_loading_info=True)
    assert not report["missing_keys"] and opened.config.hidden_size == VISION["hidden_size"]
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "LlamaTokenizer" and settings["legacy"] is False
    assert settings["add_bos_token"] is True and settings["add_eos_token"] is False
    assert settings["bos_token"]["__type"] == "AddedToken" and settings["model_max_length"] == 2048
    assert (folder / "tokenizer.model").read_bytes() == PUBLISHED.read_bytes()
    assert not (folder / "tokenizer.json").exists() and not (folder / "added_tokens.json").exists()
    same(read_original(folder), parts)


def test_tokens_beyond_the_vocabulary_are_written_for_the_original_too(published, tmp_path):
    wider = formats.with_media_tokens(read_original(published))
    assert write_original(wider, tmp_path / "wider") == []
    assert json.loads((tmp_path / "wider" / "added_tokens.json").read_text()) == {"<image>": 32000, "<video>": 32001}
    again = read_original(tmp_path / "wider")
    same(again, wider)
    text = "a <image> b</s> c"
    assert again.tokenizer(text)["input_ids"] == wider.tokenizer(text)["input_ids"]


def test_a_tokenizer_that_the_original_cannot_open_is_said(original, tmp_path, capsys):
    convert.main(["import", str(original[0]), str(tmp_path / "ours")])
    convert.main(["export", str(tmp_path / "ours"), str(tmp_path / "back"), "--to", "original"])
    assert "the original code cannot open its tokenizer" in capsys.readouterr().err
    assert "reads a tokenizer.model" in (tmp_path / "back" / "README.md").read_text()


def test_a_tower_of_the_hub_keeps_its_name_and_its_folder_is_read_from_the_export(published, tmp_path):
    parts = read_original(published)
    names = {
        "mm_image_tower": "LanguageBind/LanguageBind_Image",
        "mm_video_tower": "LanguageBind/LanguageBind_Video_merge",
    }
    parts.settings |= names
    write_original(parts, tmp_path / "named")
    config = json.loads((tmp_path / "named" / "config.json").read_text())
    assert {name: config[name] for name in names} == names
    same(read_original(tmp_path / "named"), parts)
    parts.settings |= {"mm_image_tower": "someone/another", "mm_video_tower": "someone/another"}
    write_original(parts, tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    assert config["mm_video_tower"] == str(tmp_path / "other" / "LanguageBind_Video_merge")


def test_a_folder_of_a_tower_needs_no_weights_where_the_checkpoint_has_them(original, tmp_path):
    towers = {}
    for kind in ("image", "video"):
        source = json.loads((original[0] / "config.json").read_text())[f"mm_{kind}_tower"]
        (tmp_path / kind).mkdir()
        shutil.copy(f"{source}/config.json", tmp_path / kind)
        towers[kind] = str(tmp_path / kind)
    same(read_original(original[0], towers), read_original(original[0]))


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("mm_projector_type", "linear"),
        ("mm_projector_type", "mlp3x_gelu"),
        ("mm_vision_select_feature", "cls_patch"),
        ("mm_use_im_start_end", True),
        ("mm_use_im_patch_token", True),
        ("mm_vision_tower", "openai/clip-vit-large-patch14-336"),
        ("mm_depth_tower", "LanguageBind/LanguageBind_Depth"),
        ("mm_patch_merge_type", "spatial_unpad"),
        ("mm_resampler_type", "qformer"),
        ("mm_vision_select_layer", [-2, -1]),
        ("image_aspect_ratio", "anyres"),
        ("rope_scaling", {"type": "yarn", "factor": 2.0}),
        ("rope_scaling", {"rope_type": "llama3", "factor": 8.0}),
        ("rope_scaling", 3),
        ("rope_theta", 1000000.0),
        ("pretraining_tp", 2),
        ("attention_bias", True),
        ("quantization_config", {"bits": 4}),
        ("model_type", "llava_mpt"),
    ],
)
def test_a_setting_that_we_do_not_have_is_refused_by_name(setting, value, original, tmp_path):
    folder = changed(original[0], tmp_path, **{setting: value})
    with pytest.raises(UserError, match=rf"does not have: {setting}="):
        read_original(folder)


def changed(folder, tmp_path, **settings):
    """The same checkpoint with other settings."""
    copy = tmp_path / "changed"
    shutil.copytree(folder, copy)
    config = {**json.loads((copy / "config.json").read_text()), **settings}
    (copy / "config.json").write_text(json.dumps(config))
    return copy


@pytest.mark.parametrize(
    ("ratio", "fit", "written"),
    [("pad", "pad", "pad"), ("square", "crop", "square"), (None, "crop", "square")],
)
def test_the_aspect_ratio_decides_how_images_are_fitted(ratio, fit, written, original, tmp_path):
    parts = read_original(changed(original[0], tmp_path, image_aspect_ratio=ratio))
    write_ours(parts, tmp_path / "ours")
    assert load(tmp_path / "ours")[2].image_fit == fit
    write_original(read_ours(tmp_path / "ours"), tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["image_aspect_ratio"] == written


def test_scaled_positions_are_kept_in_the_form_of_4_31(original, tmp_path):
    scaling = {"type": "linear", "factor": 2.0}
    parts = read_original(changed(original[0], tmp_path, rope_scaling=scaling, tune_mm_mlp_adapter=True))
    assert parts.llm_config.rope_parameters == {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    write_original(parts, tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["rope_scaling"] == scaling
    same(read_original(tmp_path / "again"), parts)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "rope_theta=500000"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 5e5, "factor": 2.0}}, "rope_theta=500000"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"head_dim": 16}, "head_dim=16"),
    ],
)
def test_a_llama_that_the_original_would_compute_otherwise_is_not_exported(changes, message, original, tmp_path):
    parts = read_original(original[0])
    parts.llm_config = LlamaConfig(**{**parts.llm_config.to_dict(), **changes})
    with pytest.raises(UserError, match=message):
        write_original(parts, tmp_path / "no")
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    "settings",
    [
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": "2"},
        {"hidden_size": None},
        {"num_attention_heads": 0},
        {"mm_image_tower": 5},
        {"vocab_size": -1},
        {"hidden_act": "magic"},
    ],
)
def test_a_checkpoint_with_senseless_sizes_is_one_clear_message(settings, original, tmp_path):
    folder = changed(original[0], tmp_path, **settings)
    with pytest.raises(SystemExit, match="error: "):
        convert.main(["import", str(folder), str(tmp_path / "no")])
    assert not (tmp_path / "no").exists()


def test_the_port_s_processor_is_what_its_own_classes_write(original, tmp_path):
    write_processor(tmp_path, 224, 14, "vicuna_v1", has_bos=True)
    written = {file.name: json.loads(file.read_text()) for file in tmp_path.glob("*.json")}
    assert written["processor_config.json"] == json.loads((DATA / "video_llava_processor.json").read_text())
    image = VideoLlavaImageProcessor.from_pretrained(tmp_path).to_dict()
    assert image.pop("processor_class", None) in (None, "VideoLlavaProcessor")
    assert image == VideoLlavaImageProcessor().to_dict()
    for kind, name in (("image", "preprocessor_config.json"), ("video", "video_preprocessor_config.json")):
        assert written[name].pop("processor_class") == "VideoLlavaProcessor"
        assert written[name] == written["processor_config.json"][f"{kind}_processor"]


def test_the_port_s_chat_template_writes_vicuna_s_prompt(published, tmp_path):
    parts = read_original(published)
    write_port(parts, tmp_path / "port", drop_temporal_attention=True)
    files = {file.name for file in (tmp_path / "port").iterdir()}
    assert {"tokenizer.model", "tokenizer.json", "chat_template.jinja", "processor_config.json"} <= files
    own = json.loads((tmp_path / "port" / "processor_config.json").read_text())
    assert own["patch_size"] == 16 and own["image_processor"]["crop_size"] == {"height": 32, "width": 32}
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "port")
    asked = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    turns = [
        {"role": "user", "content": asked},
        {"role": "assistant", "content": "A ball."},
        {"role": "user", "content": "Its colour?"},
    ]
    assert tokenizer.apply_chat_template(turns, tokenize=False) == (
        "<s>A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. USER: <image>\nWhat is it? ASSISTANT: A ball.</s>"
        "USER: Its colour? ASSISTANT:"
    )


def test_a_port_with_settings_that_we_do_not_have_is_refused_by_name(port_folder, tmp_path):
    for setting, value in (("projector_hidden_act", "relu"), ("vision_feature_select_strategy", "full")):
        folder = changed(port_folder, tmp_path / setting, **{setting: value})
        with pytest.raises(UserError, match=f"{setting}='{value}'"):
            read_port(folder)


def test_new_media_tokens_have_embeddings_of_zero_and_change_nothing_else(original):
    parts = read_original(original[0])
    wider = formats.with_media_tokens(parts)
    rows = len(parts.llm["model.embed_tokens.weight"])
    assert wider.llm_config.vocab_size == rows + 2 == len(wider.tokenizer)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(wider.llm[name][:rows], parts.llm[name]) and not wider.llm[name][rows:].any()
    assert len(parts.tokenizer) == rows
    assert formats.with_media_tokens(wider) is wider


def test_towers_that_the_checkpoint_does_not_hold_come_from_their_own_folders(image_folder, video_folder, tmp_path):
    towers = {"image": image_folder, "video": video_folder}
    original_checkpoint(tmp_path / "whole", towers)
    original_checkpoint(tmp_path / "bare", towers, with_towers=False)
    same(read_original(tmp_path / "bare"), read_original(tmp_path / "whole"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("model.norm.weight"), r"missing: model\.norm\.weight"),
        (lambda tensors: tensors.pop("model.mm_projector.2.bias"), r"projector.*missing: 2\.bias"),
        (lambda tensors: tensors.update({"model.extra": torch.ones(1)}), r"left over: model\.extra"),
        (lambda tensors: tensors.update({"lm_head.weight": torch.ones(3, 32)}), r"shape \(3, 32\).*lm_head\.weight"),
        (
            lambda tensors: tensors.pop("model.video_tower.video_tower.encoder.layers.0.temporal_embedding"),
            r"video tower.*missing: encoder\.layers\.0\.temporal_embedding",
        ),
    ],
    ids=["missing", "projector", "left over", "shape", "tower"],
)
def test_a_foreign_checkpoint_is_one_clear_message(change, message, image_folder, video_folder, tmp_path):
    tensors = original_checkpoint(tmp_path / "one", {"image": image_folder, "video": video_folder})
    for file in tmp_path.glob("one/pytorch_model*"):
        file.unlink()
    change(tensors)
    save_file(
        {name: value.contiguous().clone() for name, value in tensors.items()}, tmp_path / "one" / "model.safetensors"
    )
    with pytest.raises(UserError, match=message):
        read_original(tmp_path / "one")


def test_a_truncated_checkpoint_is_one_clear_message(image_folder, video_folder, tmp_path):
    original_checkpoint(tmp_path / "one", {"image": image_folder, "video": video_folder})
    second = tmp_path / "one" / "pytorch_model-00002-of-00002.bin"
    second.write_bytes(second.read_bytes()[:-500])
    with pytest.raises(UserError, match=r"pytorch_model-00002-of-00002\.bin cannot be read"):
        read_original(tmp_path / "one")
    second.unlink()
    with pytest.raises(UserError, match=r"lacks files.*pytorch_model-00002-of-00002\.bin"):
        read_original(tmp_path / "one")


@pytest.mark.parametrize("read", [read_original, read_port])
def test_a_checkpoint_of_another_kind_is_refused(read, image_folder):
    with pytest.raises(UserError, match="is no "):
        read(image_folder)


def test_the_command_imports_and_exports(port_folder, original, tmp_path, capsys):
    convert.main(["import", str(original[0]), str(tmp_path / "ours")])
    convert.main(["export", str(tmp_path / "ours"), str(tmp_path / "back"), "--to", "original"])
    same(read_original(tmp_path / "back"), read_original(original[0]))
    convert.main(["import", str(port_folder), str(tmp_path / "ported")])
    convert.main(["export", str(tmp_path / "ported"), str(tmp_path / "port"), "--to", "transformers"])
    same(read_port(tmp_path / "port"), read_port(port_folder))
    with pytest.raises(SystemExit, match=r"error: The video tower has temporal attention"):
        convert.main(["export", str(tmp_path / "ours"), str(tmp_path / "no"), "--to", "transformers"])
    with pytest.raises(SystemExit, match="error: No checkpoint at"):
        convert.main(["import", str(tmp_path / "nowhere" / "at all"), str(tmp_path / "no")])


def test_an_original_projector_file_starts_a_stage(original, tmp_path):
    model, _ = imported(read_original, original[0], tmp_path / "ours")
    file = tmp_path / "mm_projector.bin"
    torch.save({n: v for n, v in original[1].items() if "mm_projector" in n}, file)
    randomise(model.projector, seed=9)
    load_projector(model, file)
    for name, value in model.projector.state_dict().items():
        assert torch.equal(value, original[1][f"model.mm_projector.{name}"])
