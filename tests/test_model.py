"""The model against slow references: samples one by one, loops instead of packing, no cache, plain transformers."""

import copy
import shutil
from dataclasses import replace

import pytest
import torch
from conftest import FRAMES
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import CLIPModel, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM, ViTMAEModel

from vllava.batch import IGNORE_INDEX, MediumSpec
from vllava.conversation import PLACEHOLDER_IDS
from vllava.data.packing import pack
from vllava.errors import UserError
from vllava.model.build import load_llm
from vllava.model.encoders import ClipEncoder, MaeEncoder
from vllava.model.languagebind import LanguageBind
from vllava.model.video_llava import VideoLlava
from vllava.pixels import normalised

KINDS = {id_: kind for kind, id_ in PLACEHOLDER_IDS.items()}


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def plain_llm(model):
    """The same weights in `transformers`' own Llama with its eager attention."""
    config = copy.deepcopy(model.llm.config)
    config._attn_implementation = "eager"
    llm = LlamaForCausalLM(config).eval()
    llm.load_state_dict(model.llm.state_dict())
    return llm


def embed_slowly(model, packed):
    """The embeddings [T, D] of one sample: stretches of text and one medium at a time, put one after the other."""
    table = model.llm.get_input_embeddings().weight
    media = list(packed.media)
    pieces = []
    previous = None
    left = 0  # of the current medium's tokens
    for token in packed.token_ids:
        if token >= 0:
            pieces.append(table[token][None])
        elif left == 0 or token != previous:
            medium = media.pop(0)
            assert medium.kind == KINDS[token]
            features = model.encoders[medium.kind](medium.pixels[None])[0]
            pieces.append(model.projector(features))
            left = len(features) - 1
        else:
            left -= 1
        previous = token
    assert not media and left == 0
    return torch.cat(pieces)


def loss_slowly(model, llm, packed):
    """The summed loss of one sample, through the plain forward of `transformers`."""
    logits = llm(inputs_embeds=embed_slowly(model, packed)[None]).logits[0]
    labels = torch.tensor(packed.labels)
    return cross_entropy(logits[:-1], labels[1:], reduction="sum", ignore_index=IGNORE_INDEX)


def all_logits(model, batch):
    with torch.no_grad():
        return model.logits(batch, torch.arange(len(batch.token_ids)))


@pytest.fixture
def prepared(model, make_packer, mixed_samples):
    packer = make_packer(model)
    return [packer.prepare(sample) for sample in mixed_samples]


def test_visual_tokens_are_spliced_in_at_their_placeholders(model, prepared):
    expected = torch.cat([embed_slowly(model, packed) for packed in prepared])
    close(model.embed(pack(prepared)), expected)


def test_sample_of_text_alone_needs_no_encoder(make_llm, make_packer, make_sample):
    model = VideoLlava(make_llm())
    packed = make_packer(model).prepare(make_sample("Hello?", "Hello."))
    close(model.embed(pack([packed])), model.llm.get_input_embeddings().weight[packed.token_ids])
    assert model.specs == {}


def test_packed_loss_is_the_sum_over_samples_run_alone(model, prepared):
    llm = plain_llm(model)
    batch = pack(prepared)
    expected = sum(loss_slowly(model, llm, packed) for packed in prepared)
    close(model.loss_sum(batch), expected)
    supervised = sum(label != IGNORE_INDEX for packed in prepared for label in packed.labels)
    close(model.loss(batch), expected / supervised)


def test_packing_is_as_exact_for_a_model_with_absolute_positions(
    image_folder, video_folder, make_packer, mixed_samples, tokenizer, tmp_path
):
    """A Llama sees only distances, so it would not mind if positions ran on from sample to sample; GPT-2 does."""
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
    config = GPT2Config(vocab_size=len(tokenizer), **sizes, bos_token_id=2, eos_token_id=1)
    llm = GPT2LMHeadModel._from_config(config, attn_implementation="eager").eval()
    llm.save_pretrained(tmp_path)
    encoders = ClipEncoder(str(image_folder), "image"), ClipEncoder(str(video_folder), "video")
    model = VideoLlava(load_llm(str(tmp_path)), *encoders)
    packer = make_packer(model)
    prepared = [packer.prepare(sample) for sample in mixed_samples]
    close(model.loss_sum(pack(prepared)), sum(loss_slowly(model, llm, packed) for packed in prepared))


def test_packed_gradients_are_those_of_samples_run_alone(model, prepared):
    llm = plain_llm(model)
    model.loss(pack(prepared)).backward()
    packed_gradients = {name: p.grad.clone() for name, p in model.projector.named_parameters()}
    llm_gradients = {name: p.grad for name, p in model.llm.named_parameters() if "embed_tokens" not in name}
    model.zero_grad()
    supervised = pack(prepared).num_supervised
    (sum(loss_slowly(model, llm, packed) for packed in prepared) / supervised).backward()
    assert set(packed_gradients) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    for name, parameter in model.projector.named_parameters():
        assert parameter.grad.abs().max() > 1e-4
        close(packed_gradients[name], parameter.grad)
    for name, gradient in llm_gradients.items():
        close(gradient, dict(llm.named_parameters())[name].grad)


def test_loss_and_gradients_in_bfloat16_are_nearly_those_in_float32(model, prepared):
    batch = pack(prepared)
    loss = model.loss(batch)
    loss.backward()
    exact = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        half = model.loss(batch)
    half.backward()
    torch.testing.assert_close(half, loss, rtol=0.02, atol=0)
    for name, parameter in model.projector.named_parameters(prefix="projector"):
        assert torch.cosine_similarity(parameter.grad.flatten(), exact[name].flatten(), dim=0) > 0.99


def test_encoders_get_no_gradient(model, prepared):
    model.loss(pack(prepared)).backward()
    assert all(parameter.grad is None for parameter in model.encoders.parameters())


def test_order_of_the_samples_does_not_change_the_loss(model, prepared):
    expected = model.loss_sum(pack(prepared))
    close(model.loss_sum(pack(prepared[::-1])), expected)
    close(model.loss_sum(pack(prepared[2:] + prepared[:2])), expected)


@pytest.mark.parametrize("changed", range(5))
def test_no_sample_sees_another(changed, model, prepared):
    batch = pack(prepared)
    own = slice(*batch.cu_seqlens[changed : changed + 2].tolist())
    text = torch.ones(len(batch.token_ids), dtype=torch.bool)
    text[torch.cat([batch.image_slots, batch.video_slots])] = False

    before = all_logits(model, batch)
    batch.token_ids[own] = torch.where(text[own], (batch.token_ids[own] + 100) % 639, 0)
    after = all_logits(model, batch)

    assert (before[own] - after[own]).abs().max() > 0.1
    others = torch.ones(len(before), dtype=torch.bool)
    others[own] = False
    close(after[others], before[others])


def test_no_token_sees_a_later_one(model, prepared):
    batch = pack(prepared)
    before = all_logits(model, batch)
    last = int(batch.cu_seqlens[3]) - 1
    batch.token_ids[last] = 5
    after = all_logits(model, batch)
    assert (before[last] - after[last]).abs().max() > 0.1
    others = torch.arange(len(before)) != last
    close(after[others], before[others])


def test_each_medium_reaches_its_own_sample(model, prepared):
    batch = pack(prepared)
    before = all_logits(model, batch)
    batch.videos[1] += 1  # the second video, in the sample with several media
    after = all_logits(model, batch)
    changed = (before - after).abs().amax(1) > 1e-4
    first = int(batch.video_slots[model.specs["video"].tokens])
    expected = (torch.arange(len(before)) >= first) & (torch.arange(len(before)) < batch.cu_seqlens[4])
    assert torch.equal(changed, expected)


def continue_slowly(model, llm, packed, length, end):
    """Greedy decoding of one sample by running the whole sequence again for every token."""
    embeddings = embed_slowly(model, packed)
    tokens = []
    while len(tokens) < length:
        token = int(llm(inputs_embeds=embeddings[None]).logits[0, -1].argmax())
        if token == end:
            break
        tokens.append(token)
        embeddings = torch.cat([embeddings, model.llm.get_input_embeddings().weight[token][None]])
    return tokens


@pytest.mark.parametrize("known_to", ["llm", "llm, as one of several", "caller"])
@torch.no_grad()
def test_generation_of_a_batch_is_greedy_decoding_sample_by_sample(known_to, model, make_packer, mixed_samples):
    packer = make_packer(model)
    prompts = [packer.prompt(sample) for sample in mixed_samples]
    llm = plain_llm(model)
    assert len({len(prompt) for prompt in prompts}) == 5  # of different lengths

    endless = [continue_slowly(model, llm, prompt, 8, end=None) for prompt in prompts]
    end = endless[0][3]
    own = {"llm": end, "llm, as one of several": [end, -1], "caller": None}[known_to]
    ends = [end] if known_to == "caller" else []
    model.llm.generation_config.eos_token_id = own
    expected = [continue_slowly(model, llm, prompt, 8, end) for prompt in prompts]
    assert len({tuple(tokens) for tokens in expected}) == 5
    assert len(expected[0]) <= 3 < 8 == max(len(tokens) for tokens in expected)  # one stops early, one does not

    assert model.generate(pack(prompts), max_new_tokens=8, ends=ends) == expected
    assert [model.generate(pack([prompt]), max_new_tokens=8, ends=ends)[0] for prompt in prompts] == expected


@pytest.mark.parametrize("kind", ["image", "video"])
def test_batch_packed_for_another_encoder_is_refused(kind, model, make_packer, make_sample):
    other = replace(make_packer(model), specs={**model.specs, kind: MediumSpec(32, tokens=7, frames=4)})
    batch = pack([other.prepare(make_sample(f"<{kind}>", "A ball"))])
    with pytest.raises(UserError, match="7 slots for visual tokens and the encoder gives"):
        model.embed(batch)


def test_encoders_stay_in_evaluation_mode_while_the_rest_trains(model):
    model.train()
    assert model.llm.training and model.projector.training
    assert not any(module.training for module in model.encoders.modules())


def test_specs_say_what_the_encoders_take_and_give(model, prepared):
    assert model.specs == {"image": MediumSpec(32, 4), "video": MediumSpec(32, 4 * 5, 4)}
    assert {spec.width for spec in model.specs.values()} == {32}
    batch = pack(prepared)
    assert model.encode("image", batch.images).shape == (len(batch.images), 4, 32)
    assert model.encode("video", batch.videos).shape == (len(batch.videos), 20, 32)


def test_features_of_the_paper_are_taken_one_layer_before_the_last(image_folder, mae_folder):
    """Table 7: vision select layer -2. The layer after it would be computed for nothing, so it must not exist."""
    tower = ClipEncoder(str(image_folder), "image").tower
    assert sum("layer_norm1.weight" in name for name in tower.state_dict()) == 3 - 1
    norms = [module for module in MaeEncoder(str(mae_folder)).modules() if isinstance(module, nn.LayerNorm)]
    assert len(norms) == 2 * (3 - 1)  # two in each layer, and no final one


@pytest.mark.parametrize("feature_layer", [0, 1, 2, -1, -2])
@torch.no_grad()
def test_image_features_are_the_hidden_states_of_transformers_clip(feature_layer, clip, image_folder):
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    states = clip.vision_model(images, output_hidden_states=True).hidden_states
    features = ClipEncoder(str(image_folder), "image", feature_layer)(images)
    close(features, states[feature_layer][:, 1:])


@pytest.mark.parametrize("feature_layer", [1, -2])
@torch.no_grad()
def test_mae_features_are_unmasked_and_keep_the_order_of_the_patches(feature_layer, mae_folder):
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    reference = ViTMAEModel.from_pretrained(mae_folder, mask_ratio=0.0).eval()
    torch.manual_seed(8)
    output = reference(images, output_hidden_states=True)
    assert not torch.equal(output.ids_restore, torch.arange(4).expand(3, 4))  # it did shuffle them
    shuffled = output.hidden_states[feature_layer][:, 1:]
    ordered = torch.stack([tokens[order] for tokens, order in zip(shuffled, output.ids_restore, strict=True)])
    close(MaeEncoder(str(mae_folder), feature_layer)(images), ordered)


@torch.no_grad()
def test_pixels_as_they_travel_give_the_tokens_of_normalised_ones(image_folder, video_folder, mae_folder):
    pixels = torch.randint(0, 256, (2, FRAMES, 3, 32, 32), dtype=torch.uint8)
    built = (
        ClipEncoder(str(image_folder), "image"),
        MaeEncoder(str(mae_folder)),
        ClipEncoder(str(video_folder), "video"),
    )
    for encoder, given in zip(built, (pixels[:, 0], pixels[:, 0], pixels), strict=True):
        torch.testing.assert_close(encoder(given), encoder(normalised(given)), rtol=0, atol=0)


@torch.no_grad()
def test_text_tower_of_languagebind_is_that_of_clip_whatever_the_padding(clip):
    ids = torch.tensor([[2, 30, 40, 1, 0, 0], [2, 50, 60, 70, 80, 1]])
    mask = (ids != 0).long()
    reference = CLIPModel._from_config(clip.config, attn_implementation="eager").eval()
    packed = LanguageBind._from_config(clip.config, attn_implementation="packed").eval()
    for model in (reference, packed):
        model.load_state_dict(clip.state_dict())
    pooled = [
        reference.text_model(input_ids=row[None, :end]).pooler_output for row, end in zip(ids, (4, 6), strict=True)
    ]
    expected = nn.functional.normalize(reference.text_projection(torch.cat(pooled)), dim=-1)
    close(packed.embed_text(ids, mask), expected)


ENCODERS = {  # the class, the fixture with a checkpoint's folder, settings, and a key that matters
    "image": (ClipEncoder, "image_folder", {"medium": "image"}, "vision_model.encoder.layers.1.mlp.fc1.weight"),
    "video": (ClipEncoder, "video_folder", {"medium": "video"}, "vision_model.encoder.layers.0.temporal_embedding"),
    "mae": (MaeEncoder, "mae_folder", {}, "vit.embeddings.patch_embeddings.projection.weight"),
}


@pytest.fixture(params=ENCODERS)
def damaged(request, tmp_path):
    """A copy of a checkpoint to damage: its folder, how to load it, and a key that matters.

    `transformers` may report a key of a masked autoencoder without the prefix "vit.".
    """
    build, folder, settings, key = ENCODERS[request.param]
    shutil.copytree(request.getfixturevalue(folder), tmp_path / "checkpoint")
    return tmp_path / "checkpoint", lambda: build(str(tmp_path / "checkpoint"), **settings), key


def rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def test_missing_key_is_named(damaged):
    folder, load, key = damaged
    rewrite(folder, lambda tensors: tensors.pop(key))
    with pytest.raises(UserError, match=key.removeprefix("vit.")):
        load()


def test_left_over_key_is_named(damaged):
    folder, load, key = damaged
    extra = key.replace("weight", "adapter").replace("temporal_embedding", "adapter")
    rewrite(folder, lambda tensors: tensors.update({extra: torch.zeros(2)}))
    with pytest.raises(UserError, match=extra.removeprefix("vit.")):
        load()


def test_wrong_shape_is_named(damaged):
    folder, load, key = damaged
    rewrite(folder, lambda tensors: tensors.update({key: torch.zeros(7, 5)}))
    with pytest.raises(UserError, match=rf"(?s)(7, 5).*{key.removeprefix('vit.')}|{key.removeprefix('vit.')}.*(7, 5)"):
        load()


def test_truncated_weights_file_is_named(damaged):
    folder, load, _ = damaged
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match=str(weights)):
        load()


def test_broken_config_is_named(damaged):
    folder, load, _ = damaged
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json"):
        load()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_file_that_is_not_there_is_named(damaged, name):
    folder, load, _ = damaged
    (folder / name).unlink()
    with pytest.raises(UserError, match=name):
        load()


def test_pickled_weights_give_the_same_features_and_half_precision_is_widened(image_folder, tmp_path):
    shutil.copy(image_folder / "config.json", tmp_path)
    half = {name: value.half() for name, value in load_file(image_folder / "model.safetensors").items()}
    torch.save(half, tmp_path / "pytorch_model.bin")
    encoder = ClipEncoder(str(tmp_path), "image")
    for name, value in encoder.tower.state_dict().items():
        assert torch.equal(value, half[f"vision_model.{name}"].float())


class Trap:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_pickled_weights_never_run_code(image_folder, tmp_path):
    shutil.copy(image_folder / "config.json", tmp_path)
    torch.save({"vision_model.pre_layrnorm.bias": Trap(tmp_path / "sprung")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model\.bin"):
        ClipEncoder(str(tmp_path), "image")
    assert not (tmp_path / "sprung").exists()


def test_video_checkpoint_is_no_image_encoder(video_folder):
    with pytest.raises(UserError, match="has temporal attention: it is not an encoder for images"):
        ClipEncoder(str(video_folder), "image")


def test_image_checkpoint_is_no_video_encoder(image_folder):
    with pytest.raises(UserError, match="has no temporal attention: it is not an encoder for videos"):
        ClipEncoder(str(image_folder), "video")


@pytest.mark.parametrize("feature_layer", [-5, 4])
def test_feature_layer_that_does_not_exist_is_refused(feature_layer, image_folder, mae_folder):
    for build in (
        lambda: ClipEncoder(str(image_folder), "image", feature_layer),
        lambda: MaeEncoder(str(mae_folder), feature_layer),
    ):
        with pytest.raises(UserError):
            build()


def test_encoders_of_different_widths_cannot_share_a_projector(make_llm, make_clip, video_folder, tmp_path):
    make_clip(hidden_size=16).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="hidden sizes differ"):
        VideoLlava(make_llm(), ClipEncoder(str(tmp_path), "image"), ClipEncoder(str(video_folder), "video"))


def test_a_sample_length_that_does_not_fit_is_refused_with_the_arithmetic(make_llm, image_folder, video_folder):
    encoders = ClipEncoder(str(image_folder), "image"), ClipEncoder(str(video_folder), "video", frames=32)
    model = VideoLlava(make_llm(max_position_embeddings=256), *encoders)
    model.require_context(200)
    with pytest.raises(UserError, match=r"max_length=300 is more than the LLM's context of 256"):
        model.require_context(300)
    with pytest.raises(UserError, match=r"32 frames x 5 tokens = 160 visual tokens.*max_length=150.*num_frames=29"):
        model.require_context(150)
