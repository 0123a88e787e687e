"""A judge that is a causal LM on this machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel

from vllava.checks import Count, hints_of, require_all
from vllava.errors import UserError, reading, time_limit
from vllava.evaluation.judges.asking import Case, ModelJudge, Say
from vllava.evaluation.judges.store import Reply, Store
from vllava.model.files import Checkpoint
from vllava.model.llm import quiet, read_config
from vllava.model.tokenizer import load_tokenizer

_TEMPLATE_SECONDS = 10.0


@dataclass
class LocalJudge(ModelJudge):
    """Asks a language model in batches, greedily; conf/judge/local.yaml says what each setting is.

    The folder or hub id is looked at on construction, the weights are read when there is something to ask. Its replies
    are kept by the hash of these weights. Raises UserError for a checkpoint that is not one of a causal LM.
    """

    model: str = ""
    max_tokens: Count = 64
    batch_size: Count = 16
    attempts: Count = 2
    template_options: Mapping[str, Any] = field(default_factory=dict)
    device: str = "auto"

    name = "local"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.template_options = dict(self.template_options)
        require_all("judge", dict(vars(self)), hints_of(type(self)))
        if not self.model:
            raise UserError("judge.model is not set: give the folder or the hub id of a causal LM.")
        self._checkpoint = Checkpoint(self.model)
        self._config = read_config(self._checkpoint, self.model)
        self._tokenizer = load_tokenizer(str(self._checkpoint.folder))

    @property
    def settings(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "weights": self._checkpoint.sha256,
            "temperature": 0.0,
            "max_tokens": self.max_tokens,
            "template_options": self.template_options,
        }

    def ask(self, cases: Sequence[Case], store: Store, say: Say) -> None:
        say(f"{len(cases):,} requests to {self.model}.")
        with tqdm(total=len(cases), desc="judging", unit=" requests", disable=None, leave=False) as bar:
            while waiting := [(case, n) for case in cases if (n := case.next_attempt(store)) is not None]:
                texts = [(self._text(case.messages(attempt)), case.key(attempt)) for case, attempt in waiting]
                texts.sort(key=lambda pair: -len(pair[0]))  # alike in length, so that little is padded
                for start in range(0, len(texts), self.batch_size):
                    chunk = texts[start : start + self.batch_size]
                    for (_, key), reply in zip(chunk, self._replies([text for text, _ in chunk]), strict=True):
                        store.add(key, reply)
                    bar.update(len(chunk))

    def _text(self, messages: list[dict[str, str]]) -> str:
        """A conversation as the model's template writes it; one paragraph after the other where it has none."""
        if not self._tokenizer.chat_template:
            return "\n\n".join(message["content"] for message in messages) + "\n\n"
        try:
            return self._templated(messages)
        except UserError:  # some know no system message
            content = "\n\n".join(message["content"] for message in messages)
            return self._templated([{"role": "user", "content": content}])

    def _templated(self, messages: list[dict[str, str]]) -> str:
        what = f"The chat template of {self.model}"
        with reading(what), time_limit(_TEMPLATE_SECONDS, f"{what} takes longer than {_TEMPLATE_SECONDS:g} s."):
            return self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, **self.template_options
            )

    @torch.no_grad()
    def _replies(self, texts: list[str]) -> list[Reply]:
        """One batch, padded on the left."""
        special = not self._tokenizer.chat_template  # a template writes its own
        rows = [self._tokenizer(text, add_special_tokens=special)["input_ids"] for text in texts]
        width, device = max(map(len, rows)), self._llm.device
        ids = torch.tensor([[0] * (width - len(row)) + row for row in rows], device=device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
        ends = self._llm.generation_config.eos_token_id
        made = self._llm.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=self.max_tokens,
            do_sample=False,
            num_beams=1,
            temperature=None,
            top_p=None,
            top_k=None,
            eos_token_id=self._tokenizer.eos_token_id if ends is None else ends,
            pad_token_id=0,
        )[:, width:]
        said = self._tokenizer.batch_decode(made, skip_special_tokens=True)
        return [Reply(text.strip(), "", len(row)) for text, row in zip(said, rows, strict=True)]

    @cached_property
    def _llm(self) -> PreTrainedModel:
        """The weights as they are stored, on the device."""
        device = ("cuda" if torch.cuda.is_available() else "cpu") if self.device == "auto" else self.device
        with reading(f"The judge's model at {self.model}"), quiet():
            llm = AutoModelForCausalLM.from_pretrained(
                self._checkpoint.folder,
                config=self._config,
                dtype="auto",
                trust_remote_code=False,
                use_safetensors=any(path.suffix == ".safetensors" for path in self._checkpoint.weights),
            )
            return llm.to(device).eval()
