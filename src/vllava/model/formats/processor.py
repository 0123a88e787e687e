"""The processors of other code as JSON files, which need none of the libraries that the processors themselves need."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

# CLIP's normalisation, which LanguageBind keeps.
MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


def image_settings(size: int) -> dict[str, Any]:
    """Short side to `size` (bicubic), centre square, CLIP's normalisation, as the image processors of CLIP say it."""
    return {
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": MEAN,
        "image_std": STD,
        "do_convert_rgb": True,
    }


# Messages whose content is a text, or a list of texts, images and videos; `vicuna_v1` of conversation.py in Jinja.
VICUNA = (
    "{{ bos_token }}{{ SYSTEM }} "
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}USER: {% elif message['role'] == 'assistant' %} {% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% else %}<{{ part['type'] }}>\n{% endif %}"
    "{% endfor %}{% endif %}"
    "{% if message['role'] == 'user' %} ASSISTANT:{% elif message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
)
_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


def write_processor(folder: Path, size: int, patch_size: int, template: str, has_bos: bool) -> None:
    """The files of `VideoLlavaProcessor`, in the form that every version of `transformers` reads.

    A chat template goes with them where the model's own template is vicuna_v1: of the others, one has no turns and
    the other is the tokenizer's.
    """
    image = {"image_processor_type": "VideoLlavaImageProcessor", **image_settings(size)}
    video = {
        "video_processor_type": "VideoLlavaVideoProcessor",
        **image_settings(size),
        "do_sample_frames": False,
        "return_metadata": False,
    }
    own = {
        "patch_size": patch_size,
        "num_additional_image_tokens": 1,
        "vision_feature_select_strategy": "default",
        "image_token": "<image>",
        "video_token": "<video>",
    }
    name = {"processor_class": "VideoLlavaProcessor"}
    files = {
        "preprocessor_config.json": {**image, **name},
        "video_preprocessor_config.json": {**video, **name},
        "processor_config.json": {**own, **name, "image_processor": image, "video_processor": video},
    }
    for file, settings in files.items():
        (folder / file).write_text(json.dumps(settings, indent=1) + "\n")
    if template == "vicuna_v1":
        text = VICUNA if has_bos else VICUNA.removeprefix("{{ bos_token }}")
        (folder / "chat_template.jinja").write_text(text.replace("{{ SYSTEM }}", _SYSTEM))
