"""A conversation becomes exactly the right token ids, and loss falls on exactly the answers."""

import copy
import itertools
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shard_fixtures import turns
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from vllava.batch import IGNORE_INDEX
from vllava.conversation import (
    MAX_CHARACTERS,
    MAX_TURNS,
    PLACEHOLDER_IDS,
    TEMPLATES,
    encode,
    ends_of_turn,
    media_in,
    read_conversation,
    template,
    without_media,
)
from vllava.data.build import conversation_packer
from vllava.errors import UserError

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
REASONS_LAST = (  # as templates do that show the reasoning, here an empty one, of the last answer only
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{{ '<think></think>' if m['role'] == 'assistant' and loop.last }}{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FORGETS_ANSWERS = CHATML.replace("m['content']", "'' if m['role'] == 'assistant' and not loop.last else m['content']")
ENDLESS = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"


def tokenise(text, tokenizer):
    """Token ids of a text; each placeholder becomes its id."""
    ids = []
    for part in re.split(r"(<image>|<video>)", text):
        if part in ("<image>", "<video>"):
            ids.append(PLACEHOLDER_IDS[part[1:-1]])
        else:
            ids += tokenizer(part, add_special_tokens=False)["input_ids"]
    return ids


def labelled(parts, tokenizer):
    """Ids and labels of (text, supervised) parts; right where no token of this tokenizer spans two parts."""
    ids, labels = [], []
    for text, supervised in parts:
        part = tokenise(text, tokenizer)
        ids += part
        labels += part if supervised else [IGNORE_INDEX] * len(part)
    return ids, labels


def supervised_text(encoded, tokenizer):
    return tokenizer.decode([label for label in encoded.labels if label != IGNORE_INDEX])


@pytest.fixture(scope="session")
def chat_tokenizer(tokenizer):
    return with_chat_template(tokenizer, CHATML)


def with_chat_template(tokenizer, text):
    changed = copy.deepcopy(tokenizer)
    changed.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    changed.chat_template = text
    return changed


ROUNDS = [
    ("<image>\nWhat is it?", "A red ball"),
    ("And its colour", "Red."),
    ("Où est-il ? 在哪里", "À gauche — 左边 🙂"),
    ("Say nothing", ""),
    ("", "You said nothing."),
    ("Compare <video> with <image><image>", " They\n\ndiffer:  a lot "),
]


@pytest.mark.parametrize("rounds", range(1, 7))
def test_vicuna_supervises_each_answer_and_its_end_token(rounds, tokenizer):
    parts = []
    for question, answer in ROUNDS[:rounds]:
        before = "" if parts else f"<s>{SYSTEM} "
        parts += [(f"{before}USER: {question} ASSISTANT:", False), (f" {answer}</s>", True)]
    ids, labels = labelled(parts, tokenizer)

    encoded = encode(turns(*sum(ROUNDS[:rounds], ())), tokenizer, TEMPLATES["vicuna_v1"])

    assert encoded.token_ids == ids
    assert encoded.labels == labels
    assert encoded.token_ids == tokenise("".join(text for text, _ in parts), tokenizer)
    assert supervised_text(encoded, tokenizer) == "".join(f" {answer}</s>" for _, answer in ROUNDS[:rounds])


def test_media_keep_their_order_over_the_turns(tokenizer):
    encoded = encode(turns(*sum(ROUNDS, ())), tokenizer, TEMPLATES["vicuna_v1"])
    assert encoded.media == ["image", "video", "image", "image"]


def test_plain_keeps_the_media_and_drops_the_instruction(tokenizer):
    encoded = encode(turns("Describe <image> and\n<video> briefly.", "Two balls."), tokenizer, TEMPLATES["plain"])
    assert (encoded.token_ids, encoded.labels) == labelled(
        [("<s>", False), ("<image><video>", False), ("Two balls.\n", True)], tokenizer
    )


def test_chat_template_supervises_what_follows_each_generation_prompt(chat_tokenizer):
    conversation = turns("<image>\nWhat is it?", "A ball.", "<video> And now?", "Two 🙂", "Why", "")
    parts = []
    for question, answer in zip(conversation[::2], conversation[1::2], strict=True):
        parts += [(f"<|im_start|>user\n{question['value']}<|im_end|>\n<|im_start|>assistant\n", False)]
        parts += [(f"{answer['value']}<|im_end|>", True), ("\n", False)]
    encoded = encode(conversation, chat_tokenizer, TEMPLATES["chat"])
    assert (encoded.token_ids, encoded.labels) == labelled(parts, chat_tokenizer)


def test_chat_template_that_writes_its_last_turn_otherwise_is_labelled_on_the_answers_alone(tokenizer):
    tokenizer = with_chat_template(tokenizer, REASONS_LAST)
    conversation = turns("One?", "Two.", "Three?", "Four.")
    encoded = encode(conversation, tokenizer, TEMPLATES["chat"])
    assert tokenizer.decode(encoded.token_ids) == tokenizer.apply_chat_template(
        [{"role": r, "content": t["value"]} for r, t in zip(["user", "assistant"] * 2, conversation, strict=True)],
        tokenize=False,
    )
    assert supervised_text(encoded, tokenizer) == "Two.<|im_end|>Four.<|im_end|>"


def test_chat_template_that_loses_an_answer_or_its_end_is_refused(tokenizer):
    changed = with_chat_template(tokenizer, FORGETS_ANSWERS)
    encode(turns("One?", "Two."), changed, TEMPLATES["chat"])  # a single round has no earlier turn
    with pytest.raises(UserError, match="leaves out answer 1"):
        encode(turns("One?", "Two.", "Three?", "Four."), changed, TEMPLATES["chat"])
    with pytest.raises(UserError, match=r"no special token.*where to stop"):
        encode(turns("One?", "Two."), with_chat_template(tokenizer, ENDLESS), TEMPLATES["chat"])
    for unfit in (FORGETS_ANSWERS, ENDLESS):  # and before there is any data
        with pytest.raises(UserError, match="chat template"):
            conversation_packer({}, with_chat_template(tokenizer, unfit), "chat")


def test_a_turn_ends_with_the_token_its_template_taught(chat_tokenizer):
    ends = {name: ends_of_turn(chat_tokenizer, TEMPLATES[name]) for name in TEMPLATES}
    assert chat_tokenizer.convert_ids_to_tokens(ends["vicuna_v1"]) == ["</s>"]
    assert chat_tokenizer.convert_ids_to_tokens(ends["chat"]) == ["<|im_end|>"]
    assert chat_tokenizer.decode(ends["plain"]) == "\n"


def test_tokenizer_without_a_chat_template_is_refused(tokenizer):
    with pytest.raises(UserError, match="no chat template"):
        encode(turns("One?", "Two."), tokenizer, TEMPLATES["chat"])


def metaspace_tokenizer():
    """SentencePiece's way, as Llama's and Vicuna's tokenizer: a word carries the space before it."""
    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    core.decoder = decoders.Metaspace(prepend_scheme="first")
    return _trained(core, pre_tokenizers.ByteLevel.alphabet())


def trimming_tokenizer():
    """RoBERTa's way: the offsets of a word leave out the space before it."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.ByteLevel(trim_offsets=True)
    return _trained(core, pre_tokenizers.ByteLevel.alphabet())


def _trained(core, alphabet, extra=()):
    special = ["<s>", "</s>", "<unk>", *extra]
    text = [SYSTEM, "USER: What is it? ASSISTANT: A red ball", "USER: Where? ASSISTANT: On the left. <|im_start|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(text, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def llama_tokenizer():
    """Llama's own file: the space before the first word is put there by a normaliser, unknown letters are bytes."""
    core = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")  # no token reaches over a space
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = _trained(core, [], extra=[f"<0x{byte:02X}>" for byte in range(256)])
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer


def by_the_originals_rule(tokenizer, rounds):
    """Token ids and labels as the original finds them: by tokenising each round, and its beginning, once more.

    Each stretch of text between placeholders is tokenised on its own and loses its BOS.
    """

    def ids_of(text):
        parts = re.split("(<image>|<video>)", text)
        ids = [tokenizer.bos_token_id]
        for part in parts:
            medium = PLACEHOLDER_IDS.get(part.strip("<>")) if part in ("<image>", "<video>") else None
            ids += [medium] if medium else tokenizer(part)["input_ids"][1:]
        return ids

    texts = [f"USER: {question} ASSISTANT: {answer}" for question, answer in rounds]
    texts[0] = f"{SYSTEM} {texts[0]}"
    ids = ids_of("".join(f"{text}</s>" for text in texts))
    labels = [IGNORE_INDEX] * len(ids)
    at = 1
    for text, (_, answer) in zip(texts, rounds, strict=True):
        asked = len(ids_of(text.removesuffix(answer))) - 2
        length = len(ids_of(text))
        labels[at + asked : at + length] = ids[at + asked : at + length]
        at += length
    assert at == len(ids), "the original would mask the whole sample"
    return ids, labels


@settings(max_examples=150, deadline=None)
@given(
    rounds=st.lists(
        st.tuples(
            st.lists(
                st.sampled_from(["What is it?", "Où est le café?", "<image>\n", "<video>\n", "two 🙂", "x"]), min_size=1
            ),
            st.sampled_from(["A red ball", "è un caffè ☕", "No.", "On the left. It moves.", "42", "左"]),
        ),
        min_size=1,
        max_size=6,
    )
)
def test_vicuna_labels_are_those_of_the_originals_rule(rounds):
    tokenizer = llama_tokenizer()
    rounds = [(" ".join(question), answer) for question, answer in rounds]
    encoded = encode(turns(*sum(rounds, ())), tokenizer, TEMPLATES["vicuna_v1"])
    assert (encoded.token_ids, encoded.labels) == by_the_originals_rule(tokenizer, rounds)


@pytest.mark.parametrize("make", [metaspace_tokenizer, trimming_tokenizer, llama_tokenizer])
def test_other_kinds_of_tokenizers_are_labelled_as_exactly(make):
    tokenizer = make()
    encoded = encode(turns("What is it?", "A red ball", "Where?", "On the left."), tokenizer, TEMPLATES["vicuna_v1"])
    whole = f"{SYSTEM} USER: What is it? ASSISTANT: A red ball</s>USER: Where? ASSISTANT: On the left.</s>"
    assert encoded.token_ids == [tokenizer.bos_token_id, *tokenizer(whole, add_special_tokens=False)["input_ids"]]

    runs, previous = [], IGNORE_INDEX
    for label in encoded.labels:
        if label != IGNORE_INDEX:
            runs = [*runs, []] if previous == IGNORE_INDEX else runs
            runs[-1].append(label)
        previous = label
    assert [tokenizer.decode(run).strip() for run in runs] == ["A red ball</s>", "On the left.</s>"]


@pytest.mark.parametrize("name", ["vicuna_v1", "chat", "plain"])
def test_prompt_is_where_the_answer_would_begin(name, chat_tokenizer):
    conversation = turns("<image>\nWhat is it?", "A ball.", "<video>And now?", "Two balls")
    prompt = encode(conversation[:3], chat_tokenizer, TEMPLATES[name])
    whole = encode(conversation, chat_tokenizer, TEMPLATES[name])
    answer = whole.token_ids[len(prompt.token_ids) :]
    assert whole.token_ids[: len(prompt.token_ids)] == prompt.token_ids
    learnt = [label for label in whole.labels[len(prompt.token_ids) :] if label != IGNORE_INDEX]
    assert learnt == answer[: len(learnt)]
    assert chat_tokenizer.decode(answer[len(learnt) :]) == ("\n" if name == "chat" else "")
    assert whole.labels[: len(prompt.token_ids)] == prompt.labels
    assert chat_tokenizer.decode(answer).startswith(" Two balls" if name == "vicuna_v1" else "Two balls")


def test_conversation_without_an_answer_has_no_loss(tokenizer):
    encoded = encode(turns("What is it?"), tokenizer, TEMPLATES["vicuna_v1"])
    assert set(encoded.labels) == {IGNORE_INDEX}
    assert tokenizer.decode(encoded.token_ids) == f"<s>{SYSTEM} USER: What is it? ASSISTANT:"


def test_without_media_leaves_the_words(tokenizer):
    assert without_media(turns("<image>\nWhat is it?", "A ball")) == turns("What is it?", "A ball")


@pytest.mark.parametrize(
    ("conversation", "message"),
    [
        ([], "empty"),
        ([{"from": "human", "value": "a"}, {"from": "human", "value": "b"}], "turn 2 is from 'human', expected 'gpt'"),
        ([{"from": "gpt", "value": "a"}], "turn 1 is from 'gpt', expected 'human'"),
        ([{"from": "narrator", "value": "a"}], "turn 1 is from 'narrator'"),
        ([{"from": "human", "value": None}], "turn 1 is not of the form"),
        ([{"from": "human"}], "turn 1 is not of the form"),
        (["What is it?"], "turn 1 is not of the form"),
        ("What is it?", "not a list of turns but str"),
    ],
)
def test_malformed_conversation_is_refused_with_the_turn(conversation, message, tokenizer):
    with pytest.raises(UserError, match=message):
        encode(conversation, tokenizer, TEMPLATES["vicuna_v1"])


def test_unknown_template_is_refused_with_the_names_there_are():
    with pytest.raises(UserError, match=r"'vicuna'.*vicuna_v1.*plain.*chat"):
        template("vicuna")


words = st.text(max_size=30).filter(lambda text: "<" not in text)
questions = st.lists(words | st.sampled_from(["<image>", "<video>", "<image><image>"]), max_size=4).map("".join)


def rendered(rounds, name):
    if name == "plain":
        return "<s>" + "".join("".join(re.findall("<image>|<video>", q)) + f"{a}\n" for q, a in rounds)
    if name in ("vicuna_v1", "llava_v1"):
        system = SYSTEM if name == "vicuna_v1" else SYSTEM.replace("user", "human")
        return f"<s>{system} " + "".join(f"USER: {q} ASSISTANT: {a}</s>" for q, a in rounds)
    turn = "<|im_start|>{}\n{}<|im_end|>\n"
    return "".join(turn.format("user", q) + turn.format("assistant", a) for q, a in rounds)


@settings(max_examples=40, deadline=None)
@given(rounds=st.lists(st.tuples(questions, words), min_size=1, max_size=4), name=st.sampled_from(list(TEMPLATES)))
def test_no_text_or_medium_is_lost_and_labels_are_the_tokens_themselves(rounds, name, chat_tokenizer):
    encoded = encode(turns(*sum(rounds, ())), chat_tokenizer, TEMPLATES[name])

    names = {id_: f"<{kind}>" for kind, id_ in PLACEHOLDER_IDS.items()}
    whole = ""
    for is_text, group in itertools.groupby(encoded.token_ids, key=lambda token: token >= 0):
        run = list(group)
        whole += chat_tokenizer.decode(run) if is_text else "".join(names[token] for token in run)
    assert whole == rendered(rounds, name)
    assert all(label in (token, IGNORE_INDEX) for token, label in zip(encoded.token_ids, encoded.labels, strict=True))
    before, end = {"chat": ("", "<|im_end|>"), "plain": ("", "\n")}.get(name, (" ", "</s>"))
    supervised = "".join(before + answer + end for _, answer in rounds)
    assert supervised_text(encoded, chat_tokenizer) == supervised


# --- what a record may say --------------------------------------------------------------------------------------------


def test_a_first_turn_from_gpt_is_dropped_and_counted():
    record = {"conversations": [{"from": "gpt", "value": "Welcome!"}, *turns("What is a circle?", "A round shape.")]}
    assert read_conversation(record) == (turns("What is a circle?", "A round shape."), 1)
    assert read_conversation({"conversations": turns("Hm?", "Yes.")}) == (turns("Hm?", "Yes."), 0)


@pytest.mark.parametrize(
    "record",
    [
        {"conversations": [{"from": "system", "value": "One word."}, *turns("Colour?", "red")]},
        {"system": "One word.", "conversations": turns("Colour?", "red")},
        {"system": "One word.", "conversations": [{"from": "system", "value": "One word."}, *turns("Colour?", "red")]},
        {
            "messages": [
                {"role": "system", "content": "One word."},
                {"role": "user", "content": "Colour?"},
                {"role": "assistant", "content": "red"},
            ]
        },
        {
            "system": "One word.",
            "conversations": [{"role": "user", "value": "Colour?"}, {"from": "gpt", "content": "red"}],
        },
    ],
    ids=["a turn", "a key", "both", "roles and contents", "mixed names"],
)
@pytest.mark.parametrize("name", ["vicuna_v1", "llava_v1", "chat"])
def test_a_system_text_takes_the_place_of_the_templates_own(record, name, chat_tokenizer):
    conversation, dropped = read_conversation(record)
    encoded = encode(conversation, chat_tokenizer, TEMPLATES[name])
    text = chat_tokenizer.decode(encoded.token_ids)
    begins = "<|im_start|>system\nOne word.<|im_end|>\n" if name == "chat" else "<s>One word. USER: Colour?"
    assert text.startswith(begins) and "curious" not in text and dropped == 0
    assert chat_tokenizer.decode([t for t in encoded.labels if t >= 0], skip_special_tokens=True).strip() == "red"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({}, 'needs "conversations" or "messages"'),
        ({"conversations": turns("a", "b"), "system": 5}, '"system" is not a text but int'),
        (
            {"conversations": [{"from": "system", "value": "x"}, *turns("a", "b")], "system": "y"},
            "two different system texts",
        ),
        ({"conversations": [*turns("a", "b"), {"from": "system", "value": "x"}]}, "turn 3 is from 'system'"),
        ({"conversations": [{"from": "gpt", "value": "a"}] * 2}, "turn 2 is from 'gpt', expected 'human'"),
        ({"conversations": [{"from": "system", "value": "x"}]}, "empty"),
        ({"conversations": [{"from": ["human"], "value": "x"}]}, "turn 1 is from"),
        ({"conversations": turns("half a pair: \ud83d", "b")}, "turn 1 is no valid text: half a surrogate pair"),
        ({"conversations": turns("a", "\ufdd0")}, "turn 2 holds a noncharacter"),
        ({"conversations": turns(*["a"] * (MAX_TURNS + 1))}, "1,001 turns, more than 1,000"),
        ({"conversations": turns("a", "b" * MAX_CHARACTERS)}, "1,000,001 characters, more than 1,000,000"),
    ],
    ids=str,
)
def test_a_record_that_is_no_conversation_is_refused_with_the_place(record, message):
    with pytest.raises(UserError, match=message):
        read_conversation(record)


# --- placeholders and text --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("conversation", "media"),
    [
        (turns("List three tags.", "<article>, <audio> and <video>."), []),
        (turns("What is the <video> tag for?", "It embeds a video."), []),
        (turns("Does <image> exist in HTML?", "No, it is <img>, not <image>."), []),
        (turns("<image>\nWhich tag shows it, <video>?", "<img>, not <video>."), ["image"]),
        (turns("<video>\nIs <image> in it?", "no"), ["video"]),
        (turns("<image><video>", "Both <image> and <video>."), ["image", "video"]),
    ],
    ids=lambda value: None,
)
@pytest.mark.parametrize("name", ["vicuna_v1", "chat"])
def test_a_placeholder_without_a_medium_is_text(conversation, media, name, chat_tokenizer):
    looks = [*media]
    assert media_in(conversation, [None] * len(media), looks) == media
    encoded = encode(conversation, chat_tokenizer, TEMPLATES[name], media)
    assert encoded.media == media
    names = {id_: f"<{kind}>" for kind, id_ in PLACEHOLDER_IDS.items()}
    runs = itertools.groupby(encoded.token_ids, key=lambda token: token >= 0)
    written = "".join(
        chat_tokenizer.decode(run) if text else "".join(map(names.get, run))
        for text, run in ((text, list(run)) for text, run in runs)
    )
    assert all(turn["value"] in written for turn in conversation)
    assert conversation[1]["value"] in supervised_text(encoded, chat_tokenizer)


def test_the_placeholder_says_what_a_file_is_unless_there_are_more_placeholders_than_files():
    assert media_in(turns("<video>", "x"), [None], ["image"]) == ["video"]
    assert media_in(turns("<image><video>", "x"), ["image", None]) == ["image", "video"]
    with pytest.raises(UserError, match=r"shows <image> in turn 1, <image> in turn 3, the sample has file"):
        media_in(turns("<image>", "x", "<image>", "y"), [None], ["image"])


def test_media_that_only_an_answer_shows_are_an_error_that_names_the_turn(tokenizer):
    with pytest.raises(UserError, match=r"shows none, the sample has file; turn 2 holds a placeholder"):
        media_in(turns("Draw a circle.", "<image>"), [None], ["image"])
    with pytest.raises(UserError, match="turn 2 holds a placeholder"):
        encode(turns("Draw a circle.", "<image>"), tokenizer, TEMPLATES["vicuna_v1"], ["image"])


def test_without_media_keeps_the_placeholders_that_are_text():
    assert without_media(turns("<image>\nIs <video> a tag?", "Yes"), ["image"]) == turns("Is <video> a tag?", "Yes")


def test_the_largest_conversations_are_encoded_in_linear_time(chat_tokenizer):
    conversation = turns(*["What colour is it?", "red"] * (MAX_TURNS // 2))
    encoded = encode(conversation, chat_tokenizer, TEMPLATES["chat"])
    learned = [label for label in encoded.labels if label >= 0]
    assert chat_tokenizer.decode(learned) == "red<|im_end|>" * (MAX_TURNS // 2)
