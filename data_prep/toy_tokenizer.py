"""Train the toy world's tokenizer on its text: `python -m data_prep.toy_tokenizer`.

A byte-level BPE: the toy world's words become one token each, any other text still has tokens. The phrases in which a
scene is written out (`toy_language.phrases`) are one token each as well.
"""

from __future__ import annotations

import argparse
import json
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from data_prep.toy_language import phrases
from vllava.conversation import VICUNA_SYSTEM
from vllava.errors import UserError
from vllava.folders import replacing

VOCABULARY = 1024  # at most; the toy world's words need fewer
SHARDS = 10  # of each source: enough to have seen every word


def texts(world: Path) -> Iterator[str]:
    """The turns of the foundations' conversations, as a template would write them."""
    yield from [f"{VICUNA_SYSTEM} USER: ASSISTANT: "] * 100
    for source in ("text", "images", "videos"):
        for path in sorted((world / "foundations" / source).glob("*.tar"))[:SHARDS]:
            with tarfile.open(path) as tar:
                for member in tar:
                    if member.name.endswith(".json"):
                        record = json.load(tar.extractfile(member))  # type: ignore[arg-type]
                        for message in record["conversations"]:
                            yield f" {message['value']}".replace("<image>", "").replace("<video>", "")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m data_prep.toy_tokenizer", description=__doc__.splitlines()[0])
    parser.add_argument("--world", type=Path, default=Path("data/toy"), help="the toy world (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("assets/tokenizer"), help="folder (default: %(default)s)")
    options = parser.parse_args(arguments)
    if not any((options.world / "foundations" / "text").glob("*.tar")):
        sys.exit(
            f"error: no shards in {options.world}/foundations. Make them with `python -m data_prep.toy foundations`."
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    # </s> is not id 2: CLIP's text tower reads that number as "no end token known" and looks for the largest id.
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "</s>", "<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(options.world), trainer)
    # lstrip: the token takes the space before it, as the tokens of words do.
    tokenizer.add_tokens([AddedToken(phrase, lstrip=True, normalized=False) for phrase in phrases()])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=4096
    )
    try:
        with replacing(options.out) as unfinished:
            fast.save_pretrained(unfinished)
    except UserError as error:
        sys.exit(f"error: {error.paragraph}")
    print(f"{options.out}: {len(fast)} tokens")
    return 0


if __name__ == "__main__":
    sys.exit(main())
