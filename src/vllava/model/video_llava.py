"""Video-LLaVA: frozen encoders, one shared projector, any causal LM of `transformers`."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from vllava.batch import IGNORE_INDEX, Batch, MediumSpec
from vllava.errors import UserError
from vllava.model.encoders import Encoder
from vllava.model.loss import CHUNK, PLAIN_HEADS, chunked_cross_entropy
from vllava.model.projector import projector
from vllava.model.splice import splice
from vllava.pixels import normalised


class VideoLlava(nn.Module):
    """The model of the paper's Figure 2. Either encoder may be missing, and then its medium is not understood."""

    llm: Any  # a causal LM of `transformers`

    def __init__(
        self, llm: nn.Module, image_encoder: Encoder | None = None, video_encoder: Encoder | None = None
    ) -> None:
        super().__init__()
        self.llm = llm
        encoders = {"image": image_encoder, "video": video_encoder}
        self.encoders = nn.ModuleDict({kind: encoder for kind, encoder in encoders.items() if encoder is not None})
        sizes = {self.encoder(kind).hidden_size for kind in self.encoders}
        if len(sizes) > 1:
            raise UserError(f"One projector serves both encoders, but their hidden sizes differ: {sorted(sizes)}.")
        width = self.llm.get_input_embeddings().embedding_dim
        self.projector = projector(sizes.pop(), width) if sizes else nn.Identity()

    def encoder(self, kind: str) -> Encoder:
        """The encoder of a medium."""
        return cast(Encoder, self.encoders[kind])

    @property
    def specs(self) -> dict[str, MediumSpec]:
        """What the data must deliver for each medium."""
        return {kind: self.encoder(kind).spec for kind in self.encoders}

    def require_context(self, max_length: int) -> None:
        """Raises UserError unless samples of up to `max_length` tokens fit the LLM, and each medium fits a sample."""
        require_context(context_of(self.llm.config), self.specs, max_length)

    def train(self, mode: bool = True) -> VideoLlava:
        """Encoders stay in evaluation mode: they are never trained (paper, Table 7)."""
        super().train(mode)
        self.encoders.eval()
        return self

    @torch.no_grad()
    def features(self, kind: str, pixels: Tensor) -> Tensor:
        """Images [N, 3, H, W] or videos [N, F, 3, H, W], uint8 or normalised, to what the encoder gives, [N, P, E]."""
        return self.encoders[kind](normalised(pixels))

    def encode(self, kind: str, pixels: Tensor) -> Tensor:
        """Images [N, 3, H, W] or videos [N, F, 3, H, W] to projected visual tokens [N, P, D] (equation 1).

        Features [N, P, E] that the encoder gave before are projected as they are.
        """
        return self.projector(self.features(kind, pixels) if pixels.ndim > 3 else pixels)

    def embed(self, batch: Batch) -> Tensor:
        """The packed row as embeddings [T, D], visual tokens spliced in at their slots."""
        row = self.llm.get_input_embeddings()(batch.token_ids)
        if len(batch.images):
            row = splice(row, self.encode("image", batch.images), batch.image_slots)
        if len(batch.videos):
            row = splice(row, self.encode("video", batch.videos), batch.video_slots)
        if self.training and self.encoders and not len(batch.images) and not len(batch.videos):
            # Where ranks train together, each needs a gradient, if one of zero, for the projector too.
            nothing = row.new_zeros(1, next(iter(self.encoders.values())).hidden_size)
            row = row + 0 * self.projector(nothing).sum()
        return row

    def logits(self, batch: Batch, positions: Tensor) -> Tensor:
        """Next-token logits [len(positions), V] at the given places of the row; no others are computed."""
        return self.llm(**self._row(batch), logits_to_keep=positions).logits[0]

    def loss_sum(self, batch: Batch) -> Tensor:
        """The summed negative log likelihood of the supervised tokens (equation 2); divide by `num_supervised`."""
        supervised = (batch.labels != IGNORE_INDEX).nonzero().squeeze(1)
        labels = batch.labels[supervised]
        before = supervised - 1  # the token that predicts the label
        if len(labels) <= CHUNK or self.llm.config.model_type not in PLAIN_HEADS:
            return cross_entropy(self.logits(batch, before).float(), labels, reduction="sum")
        hidden = self.llm.get_decoder()(**self._row(batch)).last_hidden_state[0]
        return chunked_cross_entropy(hidden[before], self.llm.get_output_embeddings(), labels)

    def _row(self, batch: Batch) -> dict[str, Any]:
        """What the LLM is called with."""
        return {
            "inputs_embeds": self.embed(batch)[None],
            "position_ids": batch.position_ids[None],
            "cu_seq_lens_q": batch.cu_seqlens,
            "max_length_q": batch.longest,
            "use_cache": False,
        }

    def loss(self, batch: Batch) -> Tensor:
        """The mean negative log likelihood over the batch's supervised tokens."""
        return self.loss_sum(batch) / batch.num_supervised

    @torch.no_grad()
    def generate(
        self, batch: Batch, max_new_tokens: int = 64, ends: Collection[int] = (), **sampling
    ) -> list[list[int]]:
        """Continue every sample of the batch; greedy unless `do_sample=True` and friends are given.

        Returns the new token ids of each sample, up to one of the LLM's own end tokens or of `ends`, which is left
        out. `transformers`' own generation with its KV cache does the work, on left-padded embeddings.
        """
        return self._continue(*self._padded(batch), max_new_tokens, ends, **sampling)

    @torch.no_grad()
    def generate_after(
        self, stems: Batch, batch: Batch, of: Tensor, max_new_tokens: int = 64, ends: Collection[int] = ()
    ) -> list[list[int]] | None:
        """As `generate`, greedy, for samples that go on from a stem each: sample s from stem `of[s]`, int64.

        Stems are of one length, and go through the LLM once for all their samples. None where its cache cannot do that.
        """
        rows = self.embed(stems).unflatten(0, (stems.num_samples, -1))
        cache = self.llm(inputs_embeds=rows, use_cache=True, logits_to_keep=1).past_key_values
        if not isinstance(cache, DynamicCache) or not all(type(layer) is DynamicLayer for layer in cache.layers):
            return None
        cache.batch_select_indices(of)
        embeddings, mask = self._padded(batch)
        before = rows.shape[1]  # in the cache: what stands there is not looked at
        embeddings = pad(embeddings, (0, 0, before, 0))
        return self._continue(
            embeddings, pad(mask, (before, 0), value=True), max_new_tokens, ends, past_key_values=cache
        )

    def _padded(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """A batch's samples as embeddings [S, L, D], padded on the left, and where they are [S, L]."""
        lengths = batch.cu_seqlens.diff()
        segments = self.embed(batch).split(lengths.tolist())
        embeddings = pad_sequence([s.flip(0) for s in segments], batch_first=True).flip(1)
        return embeddings, torch.arange(embeddings.shape[1], 0, -1, device=lengths.device) <= lengths[:, None]

    def _continue(
        self, embeddings: Tensor, mask: Tensor, max_new_tokens: int, ends: Collection[int], **more: Any
    ) -> list[list[int]]:
        config = self.llm.generation_config
        own = config.eos_token_id
        stops = {*ends, *(own if isinstance(own, list) else [own] if own is not None else [])}
        output = self.llm.generate(
            inputs_embeds=embeddings,
            attention_mask=mask.long(),
            max_new_tokens=max_new_tokens,
            eos_token_id=sorted(stops) or None,
            pad_token_id=config.pad_token_id if config.pad_token_id is not None else min(stops, default=0),
            **{"do_sample": False, **more},
        )
        return [_until(row, stops) for row in output.tolist()]


def _until(tokens: list[int], ends: set[int]) -> list[int]:
    """The tokens before the first end token."""
    for index, token in enumerate(tokens):
        if token in ends:
            return tokens[:index]
    return tokens


def context_of(config: Any) -> int | None:
    """The tokens that a language model of such settings can look at, if there is a limit."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def require_context(context: int | None, specs: dict[str, MediumSpec], max_length: int) -> None:
    """Raises UserError unless samples of up to `max_length` tokens fit the LLM's context, and each medium a sample."""
    if context and max_length > context:
        raise UserError(
            f"data.max_length={max_length:,} is more than the LLM's context of {context:,} tokens. Lower it to "
            f"{context:,}, or choose an LLM with a longer context."
        )
    for kind, spec in specs.items():
        if spec.tokens < max_length:
            continue
        each = spec.tokens // spec.frames
        most = (max_length - 1) // each
        fewer = f"Take at most {most} frames (data.num_frames={most}), or raise" if most else "Raise"
        raise UserError(
            f"{spec.frames} frames x {each:,} tokens = {spec.tokens:,} visual tokens of one {kind} leave no room "
            f"for text: a sample may have data.max_length={max_length:,} tokens, the LLM's context is "
            f"{context or 'without limit'}. {fewer} data.max_length."
        )
