"""Questions cut into blocks of work, and what the processes that decode make of a block.

Blocks follow from the questions and the batch size alone. What is computed together is so the same whatever the number
of devices, of workers and of stops, and the answers with it, to the bit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch.utils.data import DataLoader, Dataset

from vllava.batch import MediumSpec
from vllava.conversation import placeholders, without_media
from vllava.data.broken import why
from vllava.data.datamodule import start_worker
from vllava.data.packing import ConversationPacker, PackedSample
from vllava.data.patience import RemoteUserError
from vllava.data.samples import Medium, Sample, SampleDecoder
from vllava.errors import UserError
from vllava.evaluation.questions import Medium as Shown
from vllava.evaluation.questions import Question

_CHARACTERS = 4  # of a token, about


def weight(question: Question, specs: Mapping[str, MediumSpec]) -> int:
    """How long a prompt is, in characters, with what its media take.

    For putting like beside like this is near enough, and takes no time; tokens are counted by the workers, all at once.
    """
    visual = sum(specs[medium.kind].tokens for medium in question.media if medium.kind in specs)
    return sum(len(turn["value"]) for turn in question.conversation) + _CHARACTERS * visual


def blocks(questions: Sequence[Question], specs: Mapping[str, MediumSpec], batch_size: int) -> list[list[int]]:
    """The numbers of the questions of each block, the longest prompts first.

    Questions about one medium stay together, so that it is decoded and encoded once: they are a block of their own
    where they are more than a batch, else they share one with others of about their length.
    """
    weights = [weight(question, specs) for question in questions]
    groups: dict[Any, list[int]] = {}
    for number, question in enumerate(questions):
        alone = len(question.media) != 1
        groups.setdefault(number if alone else (question.media[0].kind, question.media[0].key), []).append(number)
    found: list[list[int]] = []
    room = 0
    for group in sorted(groups.values(), key=lambda one: -max(weights[number] for number in one)):
        if len(group) > room:
            found.append([])
            room = batch_size
        found[-1] += sorted(group, key=lambda number: -weights[number])
        room -= len(group)
    return found


def blind(question: Question) -> Question:
    """The same question without its media and their placeholders, to see what the words give away."""
    kinds = [medium.kind for medium in question.media]
    return replace(question, conversation=tuple(without_media(question.conversation, kinds)), media=())


@dataclass(frozen=True)
class Prepared:
    """A block ready for the model: its media decoded once each, its prompts with the numbers of their media.

    broken: number of a question -> why it cannot be asked.
    """

    media: list[Medium]
    prompts: list[tuple[int, PackedSample, list[int]]]  # (number of the question, prompt, its media)
    broken: dict[int, str]


@dataclass(frozen=True)
class Blocks(Dataset):
    """Blocks of questions by their number. context: the tokens that the language model can look at, if there is an end.

    Whatever is wrong with a medium or a prompt breaks the questions that show it, and no other; what is wrong with a
    server raises.
    """

    questions: Sequence[Question]
    blocks: Sequence[Sequence[int]]
    decode: SampleDecoder
    packer: ConversationPacker
    context: int | None = None

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, block: int) -> Prepared:
        found: dict[tuple[str, str], Medium | str] = {}
        numbers: dict[tuple[str, str], int] = {}
        prepared = Prepared([], [], {})
        for number in self.blocks[block]:
            question = self.questions[number]
            keys = [(medium.kind, medium.key) for medium in question.media]
            for key, medium in zip(keys, question.media, strict=True):
                if key not in found:
                    found[key] = decoded(getattr(medium, "encoded", medium), self.decode)
                if isinstance(shown := found[key], Medium) and key not in numbers:
                    numbers[key] = len(prepared.media)
                    prepared.media.append(shown)
            media = [found[key] for key in keys]
            reasons = [reason for reason in media if isinstance(reason, str)]
            try:
                if reasons:
                    raise UserError("; ".join(dict.fromkeys(reasons)))
                prompt = self._prompt(question, [medium for medium in media if isinstance(medium, Medium)])
            except Exception as error:  # of a stranger's question
                prepared.broken[number] = why(error)
            else:
                prepared.prompts.append((number, prompt, [numbers[key] for key in keys]))
        return prepared

    def _prompt(self, question: Question, media: list[Medium]) -> PackedSample:
        shown = Counter(kind for _, kind in placeholders(question.conversation))
        for kind, count in Counter(medium.kind for medium in media).items():
            if shown[kind] > count:
                raise UserError(f"its text itself holds <{kind}>, which stands for a medium: it cannot be asked so")
        prompt = self.packer.prompt(Sample(question.id, list(question.conversation), media))
        if self.context and len(prompt) >= self.context:
            raise UserError(
                f"its prompt of {len(prompt):,} tokens leaves no room for an answer: the language model's context is "
                f"{self.context:,}"
            )
        return replace(prompt, media=[])


def decoded(medium: Shown, decode: SampleDecoder) -> Medium | str:
    """A medium as the model takes it, or why it cannot be had."""
    try:
        if hasattr(medium, "decoded"):  # of a shard, where it may be frames or features already
            return medium.decoded(decode)
        data = medium.read()
        return decode.image(data) if medium.kind == "image" else decode.video(data)
    except RemoteUserError:  # of a server, not of the medium
        raise
    except Exception as error:  # of a stranger's file: memory and recursion errors among them
        return why(error)


class Loader:
    """The blocks of these numbers, in order, prepared ahead by `workers` processes: two each at most.

    Without a length, for the blocks of a run's processes differ in number.
    """

    def __init__(self, dataset: Blocks, numbers: Sequence[int], workers: int) -> None:
        self.dataset, self.numbers, self.workers = dataset, numbers, workers

    def __iter__(self) -> Iterator[Prepared]:
        loader: DataLoader = DataLoader(
            self.dataset,
            batch_size=None,
            sampler=self.numbers,
            num_workers=min(self.workers, len(self.numbers)),
            worker_init_fn=start_worker,
        )
        for prepared in loader:
            # What lies in memory shared with a worker, of which containers have little, is copied at once.
            shared = loader.num_workers > 0
            media = [replace(one, pixels=one.pixels.clone()) for one in prepared.media] if shared else prepared.media
            yield replace(prepared, media=media)
