"""LanguageBind-Video's vision tower against a slow reference: plain matrix products, one token at a time.

The reference is written from the description of the layer, not from our code. In every layer, before the
attention within a frame, the temporal embedding is added to the tokens (not for a single frame), then each token
position attends over the frames, with a layer norm and a residual of its own. Hidden state 0 comes after the
pre-layer-norm; a hidden state has no post-layer-norm.
"""

import json
import shutil

import pytest
import torch
from conftest import FRAMES
from safetensors.torch import load_file

from vllava.errors import UserError
from vllava.model.encoders import ClipEncoder

HEADS, PATCH = 4, 16


def norm(x, weights, name):
    centred = x - x.mean()
    return centred / (centred.pow(2).mean() + 1e-5).sqrt() * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def linear(x, weights, name):
    return weights[f"{name}.weight"] @ x + weights[f"{name}.bias"]


def attend(tokens, weights, name):
    """Every token of a list attends to all of them."""
    queries, keys, values = ([linear(x, weights, f"{name}.{part}_proj") for x in tokens] for part in "qkv")
    size = len(tokens[0]) // HEADS
    outputs = []
    for query in queries:
        heads = []
        for head in range(HEADS):
            part = slice(head * size, (head + 1) * size)
            scores = torch.stack([query[part] @ key[part] for key in keys]) / size**0.5
            shares = scores.exp() / scores.exp().sum()
            heads.append(sum(share * value[part] for share, value in zip(shares, values, strict=True)))
        outputs.append(linear(torch.cat(heads), weights, f"{name}.out_proj"))
    return outputs


def embed(picture, weights):
    """The tokens of a frame: CLS and the patches row by row, with their positions, after the pre-layer-norm."""
    kernel = weights["embeddings.patch_embedding.weight"].flatten(1)
    tokens = [weights["embeddings.class_embedding"]]
    for row in range(0, picture.shape[1], PATCH):
        for column in range(0, picture.shape[2], PATCH):
            tokens.append(kernel @ picture[:, row : row + PATCH, column : column + PATCH].flatten())
    positions = weights["embeddings.position_embedding.weight"]
    return [norm(token + position, weights, "pre_layrnorm") for token, position in zip(tokens, positions, strict=True)]


def over_time(frames, weights, name):
    """Attention over the frames of a video, frames[frame][position]."""
    shifted = [list(tokens) for tokens in frames]
    for position in range(len(frames[0])):
        track = [tokens[position] for tokens in frames]
        if len(frames) > 1:
            track = [x + e for x, e in zip(track, weights[f"{name}.temporal_embedding"][0], strict=True)]
        normed = [norm(x, weights, f"{name}.temporal_layer_norm1") for x in track]
        for frame, change in enumerate(attend(normed, weights, f"{name}.temporal_attn")):
            shifted[frame][position] = track[frame] + change
    return shifted


def within_frame(tokens, weights, name):
    normed = [norm(x, weights, f"{name}.layer_norm1") for x in tokens]
    tokens = [x + change for x, change in zip(tokens, attend(normed, weights, f"{name}.self_attn"), strict=True)]
    outputs = []
    for x in tokens:
        inner = linear(norm(x, weights, f"{name}.layer_norm2"), weights, f"{name}.mlp.fc1")
        outputs.append(x + linear(inner * torch.sigmoid(1.702 * inner), weights, f"{name}.mlp.fc2"))
    return outputs


def reference(video, weights, layers):
    """The tokens of a video [F, 3, H, W], or of an image as one frame, after so many layers: [F, 1 + P, E]."""
    frames = [embed(picture, weights) for picture in video]
    for layer in range(layers):
        name = f"encoder.layers.{layer}"
        if f"{name}.temporal_embedding" in weights:
            frames = over_time(frames, weights, name)
        frames = [within_frame(tokens, weights, name) for tokens in frames]
    return torch.stack([torch.stack(tokens) for tokens in frames])


def vision_weights(folder):
    start = "vision_model."
    tensors = load_file(folder / "model.safetensors").items()
    return {name.removeprefix(start): value for name, value in tensors if name.startswith(start)}


@pytest.mark.parametrize(("feature_layer", "layers"), [(0, 0), (1, 1), (-2, 2), (-1, 3)])
def test_video_features_are_those_of_the_reference(feature_layer, layers, video_folder):
    videos = torch.randn(2, 4, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    weights = vision_weights(video_folder)
    with torch.no_grad():
        features = ClipEncoder(str(video_folder), "video", feature_layer)(videos)
    expected = torch.stack([reference(video, weights, layers).flatten(0, 1) for video in videos])
    assert features.shape == (2, 4 * 5, 32)
    torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-5)


def test_image_features_without_temporal_attention_are_those_of_the_reference(image_folder):
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    weights = vision_weights(image_folder)
    with torch.no_grad():
        features = ClipEncoder(str(image_folder), "image")(images)
    expected = torch.cat([reference(image[None], weights, layers=2)[:, 1:] for image in images])
    torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-5)


def test_single_frame_gets_temporal_attention_without_the_temporal_embedding(make_clip, tmp_path):
    make_clip(add_time_attn=True, num_frames=1).save_pretrained(tmp_path)
    videos = torch.randn(2, 1, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        features = ClipEncoder(str(tmp_path), "video")(videos)
    expected = torch.cat([reference(video, vision_weights(tmp_path), layers=2) for video in videos])
    torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-5)


def test_embedding_of_a_video_is_the_mean_over_its_frames(video_clip, video_folder):
    videos = torch.randn(2, 4, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    weights = vision_weights(video_folder)
    projection = load_file(video_folder / "model.safetensors")["visual_projection.weight"]
    with torch.no_grad():
        embedded = video_clip.embed_media(videos)
    for video, result in zip(videos, embedded, strict=True):
        frames = reference(video, weights, layers=3)[:, 0]
        mean = sum(projection @ norm(frame, weights, "post_layernorm") for frame in frames) / 4
        torch.testing.assert_close(result, mean / mean.norm(), rtol=1e-5, atol=1e-5)


def test_order_of_the_frames_matters(video_folder):
    encoder = ClipEncoder(str(video_folder), "video", feature_layer=1)
    video = torch.randn(1, 4, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        forward, backward = (encoder(v).unflatten(1, (4, 5)) for v in (video, video.flip(1)))
    assert (forward - backward.flip(1)).abs().max() > 1e-2


@pytest.mark.parametrize("frames", [1, 2, 8, 16])
def test_temporal_embeddings_are_interpolated_for_another_number_of_frames(frames, video_folder):
    known = ClipEncoder(str(video_folder), "video").tower.encoder.layers[1].temporal_embedding[0]
    encoder = ClipEncoder(str(video_folder), "video", frames=frames)
    found = encoder.tower.encoder.layers[1].temporal_embedding[0]
    assert encoder.spec.frames == frames == len(found)
    for index in range(frames):
        place = index * (len(known) - 1) / max(frames - 1, 1)
        below, above = known[int(place)], known[min(int(place) + 1, len(known) - 1)]
        torch.testing.assert_close(found[index], below + (above - below) * (place - int(place)))
    assert encoder(torch.randn(2, frames, 3, 32, 32)).shape == (2, encoder.spec.tokens, encoder.hidden_size)


def test_the_checkpoints_own_number_of_frames_changes_nothing(video_folder):
    pixels = torch.randn(1, FRAMES, 3, 32, 32)
    one, other = (ClipEncoder(str(video_folder), "video", frames=frames) for frames in (None, FRAMES))
    assert one(pixels).equal(other(pixels))


def test_a_tower_without_temporal_attention_sees_each_frame_alone(image_folder):
    encoder = ClipEncoder(str(image_folder), "video", frames=3, temporal=False)
    image = ClipEncoder(str(image_folder), "image")
    pixels = torch.randn(2, 3, 3, 32, 32)
    found = encoder(pixels).unflatten(1, (3, -1))[:, :, 1:]  # without CLS, as an image's
    for frame in range(3):
        torch.testing.assert_close(found[:, frame], image(pixels[:, frame]))


def test_a_tower_with_temporal_attention_is_not_used_without_it(video_folder):
    with pytest.raises(UserError, match="it is not for temporal=false"):
        ClipEncoder(str(video_folder), "video", temporal=False)


def test_settings_that_a_published_file_lists_beside_the_towers_are_no_obstacle(video_folder, tmp_path):
    shutil.copytree(video_folder, tmp_path / "published")
    config = json.loads((video_folder / "config.json").read_text())
    config["model_type"] = "LanguageBindVideo"
    config["vision_config"] |= {
        "bad_words_ids": None, "early_stopping": False, "force_patch_dropout": 0.5, "id2label": {"0": "LABEL_0"},
        "lora_r": 16, "max_length": 20, "pruned_heads": {}, "torchscript": False, "torch_dtype": None,
        "video_decode_backend": "decord",
    }  # fmt: skip
    (tmp_path / "published" / "config.json").write_text(json.dumps(config))
    pixels = torch.randn(1, FRAMES, 3, 32, 32)
    one, other = (ClipEncoder(str(folder), "video") for folder in (video_folder, tmp_path / "published"))
    assert one(pixels).equal(other(pixels))
