"""Tokenizers of the paper's models: the ids of the original's slow tokenizer, and nothing worse than one paragraph."""

import importlib.util
import json
import os
import re
import resource
import signal
import time
from itertools import pairwise
from pathlib import Path

import pytest
import sentencepiece
from conftest import TOKENIZER
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2 as protobuf
from transformers import AutoTokenizer

from vllava.errors import UserError
from vllava.model.build import load_tokenizer

PUBLISHED = Path(importlib.util.find_spec("mistral_common").origin).parent / "data" / "tokenizer.model.v1"
FROZEN = json.loads((Path(__file__).parent / "data" / "llama_slow_ids.json").read_text())
SPACE = "▁"


def exact(text):
    """A special token as an object: it swallows no white space."""
    return {"content": text, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}


OBJECTS = {"bos_token": exact("<s>"), "eos_token": exact("</s>"), "pad_token": "<unk>", "unk_token": exact("<unk>")}
TEXTS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "[PAD]"}
FOLDERS = {
    "legacy absent": {"tokenizer_config.json": {}, "special_tokens_map.json": OBJECTS},
    "legacy false": {"tokenizer_config.json": {"legacy": False}, "special_tokens_map.json": OBJECTS},
    "special tokens as texts": {"tokenizer_config.json": {"legacy": True}, "special_tokens_map.json": TEXTS},
    "legacy false, added tokens": {
        "tokenizer_config.json": {"legacy": False},
        "special_tokens_map.json": {**OBJECTS, "pad_token": "[PAD]"},
        "added_tokens.json": {"<image>": 32000, "[PAD]": 32001},
    },
}


def write(folder, files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return folder


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Folders as the models are published, each with its tokenizer."""
    root = tmp_path_factory.mktemp("published")
    made = {}
    for number, (name, files) in enumerate(FOLDERS.items()):
        config = {"tokenizer_class": "LlamaTokenizer", **files["tokenizer_config.json"]}
        model = {"tokenizer.model": PUBLISHED.read_bytes()}
        folder = write(root / str(number), {**model, **files, "tokenizer_config.json": config})
        made[name] = folder, load_tokenizer(str(folder))
    return made


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


# --- the ids ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FOLDERS)
def test_the_ids_are_those_that_the_slow_tokenizer_gave(published, name):
    tokenizer = published[name][1]
    wrong = [t for t, wanted in zip(FROZEN["texts"], FROZEN["ids"][name], strict=True) if ids(tokenizer, t) != wanted]
    assert not wrong and len(FROZEN["texts"]) > 200


@pytest.mark.parametrize("name", ["special tokens as texts", "legacy false, added tokens"])
def test_a_saved_tokenizer_gives_the_same_ids_and_keeps_its_file(published, name, tmp_path):
    folder, tokenizer = published[name]
    tokenizer.save_pretrained(tmp_path / "one")
    load_tokenizer(str(tmp_path / "one")).save_pretrained(tmp_path / "two")
    assert (tmp_path / "two" / "tokenizer.model").read_bytes() == (folder / "tokenizer.model").read_bytes()
    again = load_tokenizer(str(tmp_path / "two"))
    assert [ids(again, text) for text in FROZEN["texts"]] == FROZEN["ids"][name]
    assert again.special_tokens_map == tokenizer.special_tokens_map and len(again) == len(tokenizer)
    alone = AutoTokenizer.from_pretrained(tmp_path / "two")  # without what `legacy: false` does after a special token
    plain = [text for text in FROZEN["texts"] if not re.search(r"<|\[PAD\]|▁", text)]
    assert [ids(alone, text) for text in plain] == [ids(tokenizer, text) for text in plain]


class Slow:
    """The slow tokenizer of 4.31 in other words: SentencePiece on what lies between special tokens."""

    def __init__(self, legacy, swallowing=()):
        self.pieces = sentencepiece.SentencePieceProcessor(model_file=str(PUBLISHED))
        self.legacy, self.swallowing = legacy, swallowing

    def __call__(self, text):
        if not self.legacy:
            text = SPACE + text.replace(SPACE, " ")
        parts = re.split("(<s>|</s>|<unk>)", text)
        for index in range(1, len(parts), 2):
            if parts[index] in self.swallowing:
                parts[index - 1], parts[index + 1] = parts[index - 1].rstrip(), parts[index + 1].lstrip()
        found = []
        for index, part in enumerate(parts):
            found += [self.pieces.piece_to_id(part)] if index % 2 else self.between(part)
        return found

    def between(self, part):
        if self.legacy or part.startswith(SPACE):
            return self.pieces.encode(part if self.legacy else part[1:])
        tokens = self.pieces.encode(part, out_type=str)
        if tokens and not part.startswith(" "):
            tokens[0] = tokens[0].removeprefix(SPACE)
        return [self.pieces.piece_to_id(token) for token in tokens if token]


some_text = (
    st.lists(
        st.one_of(
            st.sampled_from(
                ["</s>", "<s>", "<unk>", " ", "  ", "\n", "\t", SPACE, "USER:", " ASSISTANT:", "é", "漢", "🦄"]
            ),
            st.sampled_from(
                ["</", "s>", "<0x41>", "http://a.b/?c=d", "==", "''", "\r\n", "3.14", "ﬁ", "e\u0301", "\ufffe", "\0"]
            ),
            st.text(max_size=6),
            st.text(alphabet="ab =▁", max_size=25),
            st.integers(1, 20).map(lambda number: " " * number),
        ),
        max_size=8,
    )
    .map("".join)
    .map(lambda text: re.sub("[\ud800-\udfff\x1c-\x1f]", "", text))
)


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("legacy absent", Slow(legacy=True)),
        ("legacy false", Slow(legacy=False)),
        ("special tokens as texts", Slow(legacy=True, swallowing=("<s>", "</s>", "<unk>"))),
    ],
)
def test_any_text_gives_the_ids_of_sentencepiece(published, name, reference):
    @settings(max_examples=250, deadline=None, derandomize=True, database=None)
    @given(some_text)
    def same(text):
        assert ids(published[name][1], text) == reference(text)

    same()


@pytest.mark.parametrize("character", [" ", "=", "a", "-", "\n", "漢"])
def test_runs_of_one_character_give_the_ids_of_sentencepiece(published, character):
    tokenizer, reference = published["legacy absent"][1], Slow(legacy=True)
    for count in range(1, 120):
        assert ids(tokenizer, character * count) == reference(character * count)


def test_the_reference_is_right_on_the_ids_that_the_slow_tokenizer_gave():
    for name, reference in {"legacy absent": Slow(True), "legacy false": Slow(False)}.items():
        assert [reference(text) for text in FROZEN["texts"]] == FROZEN["ids"][name]


def test_a_space_after_a_placeholder_stays(published):
    tokens = published["legacy absent"][1].convert_ids_to_tokens
    for name in FOLDERS:
        assert tokens(ids(published[name][1], " ASSISTANT:"))[:2] == [SPACE, "▁ASS"]


def test_what_legacy_means_after_a_special_token(published):
    shown = {name: t.convert_ids_to_tokens(ids(t, "a</s>USER")) for name, (_, t) in published.items()}
    assert shown["legacy absent"] == ["▁a", "</s>", "▁US", "ER"]
    assert shown["legacy false"] == ["▁a", "</s>", "US", "ER"]
    tokenizer = published["legacy false"][1]
    assert tokenizer.tokenize("a</s>USER") == shown["legacy false"]
    assert ids(tokenizer, ["a</s>USER", "b"]) == [ids(tokenizer, "a</s>USER"), ids(tokenizer, "b")]


@pytest.mark.parametrize("name", ["legacy absent", "legacy false"])
def test_the_time_grows_with_the_text_and_no_faster(published, name):
    tokenizer = published[name][1]
    start = time.process_time()
    assert len(ids(tokenizer, "a</s>USER: b" * 10_000)) > 50_000
    assert time.process_time() - start < 8  # a tenth of it, unless each token looks at all of them


# --- offsets and text -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FOLDERS)
def test_offsets_cover_the_text_in_order_and_end_with_it(published, name):
    tokenizer = published[name][1]

    @settings(max_examples=150, deadline=None, derandomize=True, database=None)
    @given(some_text)
    def ordered(text):
        found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        offsets = found["offset_mapping"]
        assert len(offsets) == len(found["input_ids"]) == len(found["attention_mask"])
        assert all(0 <= first < last <= len(text) for first, last in offsets)
        assert all(a[0] <= b[0] and a[1] <= b[1] for a, b in pairwise(offsets))
        assert set(range(len(text))) == {place for first, last in offsets for place in range(first, last)}
        for token, (first, last) in zip(found["input_ids"], offsets, strict=True):
            if token in (1, 2):
                assert text[first:last].strip() in ("<s>", "</s>")

    ordered()


def test_bytes_and_the_space_before_a_text_belong_to_their_characters(published):
    found = published["legacy absent"][1]("</s>\né漢x", add_special_tokens=False, return_offsets_mapping=True)
    tokens = published["legacy absent"][1].convert_ids_to_tokens(found["input_ids"])
    assert list(zip(tokens, found["offset_mapping"], strict=True)) == [
        ("</s>", (0, 4)),
        (SPACE, (4, 5)),
        ("<0x0A>", (4, 5)),
        ("é", (5, 6)),
        *((f"<0x{byte:02X}>", (6, 7)) for byte in "漢".encode()),
        ("x", (7, 8)),
    ]


def test_decoding_gives_the_text_back(published):
    tokenizer = published["legacy absent"][1]

    @settings(max_examples=100, deadline=None, derandomize=True, database=None)
    @given(some_text.filter(lambda text: "<" not in text and SPACE not in text))
    def back(text):
        assert tokenizer.decode(ids(tokenizer, text), skip_special_tokens=True) == text

    back()


# --- settings, on a small model ---------------------------------------------------------------------------------------


def small(change=lambda model: None):
    """A tokenizer.model of a few pieces: what Llama's says, in little."""
    model = protobuf.ModelProto()
    model.trainer_spec.model_type, model.trainer_spec.byte_fallback = protobuf.TrainerSpec.BPE, True
    model.normalizer_spec.name, model.normalizer_spec.remove_extra_whitespaces = "identity", False
    kinds = protobuf.ModelProto.SentencePiece
    for text, kind in (("<unk>", kinds.UNKNOWN), ("<s>", kinds.CONTROL), ("</s>", kinds.CONTROL)):
        model.pieces.add(piece=text, type=kind)
    for byte in range(256):
        model.pieces.add(piece=f"<0x{byte:02X}>", type=kinds.BYTE)
    for rank, text in enumerate(["ab", "▁a", "▁ab", "abc", *"▁abc"]):
        model.pieces.add(piece=text, score=-rank)
    change(model)
    return model.SerializeToString()


def load_small(folder, config=None, change=lambda model: None, **files):
    files = {name.replace("__", "."): content for name, content in files.items()}
    config = {"tokenizer_config.json": config} if config is not None else {}
    return load_tokenizer(str(write(folder, {"tokenizer.model": small(change), **config, **files})))


def test_the_settings_of_4_31_are_kept(tmp_path):
    tokenizer = load_small(tmp_path / "bare")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (1, 2, 0)
    assert tokenizer.pad_token is None and tokenizer.padding_side == "right"
    assert tokenizer("ab")["input_ids"] == [1, *ids(tokenizer, "ab")] and len(tokenizer) == 267
    other = load_small(
        tmp_path / "other",
        {"add_bos_token": False, "add_eos_token": True, "model_max_length": 7, "pad_token": "[PAD]"},
        chat_template__jinja=b"{{ messages[0]['content'] }}",
    )
    other.save_pretrained(tmp_path / "saved")
    for one in (other, load_tokenizer(str(tmp_path / "saved"))):
        assert one("ab")["input_ids"] == [*ids(one, "ab"), 2]
        assert one.model_max_length == 7 and one.pad_token_id == 267
        assert one.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "x"


def test_a_character_that_is_no_piece_is_unknown_where_there_are_no_bytes(tmp_path):
    def without_bytes(model):
        model.trainer_spec.byte_fallback = False
        del model.pieces[3:259]

    data = small(without_bytes)
    tokenizer = load_small(tmp_path, change=without_bytes)
    reference = sentencepiece.SentencePieceProcessor(model_proto=data)
    for text in ("a漢漢b", "漢", "ab 漢字 ab"):
        assert ids(tokenizer, text) == reference.encode(text)


def test_no_space_is_put_before_where_the_model_says_so(tmp_path):
    def without_prefix(model):
        model.normalizer_spec.add_dummy_prefix = False

    for legacy in (True, False):
        tokenizer = load_small(tmp_path / str(legacy), {"legacy": legacy}, change=without_prefix)
        reference = sentencepiece.SentencePieceProcessor(model_proto=small(without_prefix))
        for text in ("ab", " ab", "abc abc"):
            assert ids(tokenizer, text) == reference.encode(text)
            assert ids(tokenizer, f"</s>{text}") == [2, *reference.encode(text)]


def test_a_tokenizer_json_of_llamas_kind_is_read_as_it_stands(published, tmp_path):
    folder = tmp_path / "published"
    published["legacy absent"][1].save_pretrained(folder)
    (folder / "tokenizer.model").unlink()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    for config in ({"tokenizer_class": "LlamaTokenizerFast"}, {}):
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        tokenizer = load_tokenizer(str(folder))
        assert [ids(tokenizer, text) for text in FROZEN["texts"]] == FROZEN["ids"]["legacy absent"]
    tokenizer.save_pretrained(tmp_path / "saved")
    assert ids(load_tokenizer(str(tmp_path / "saved")), " a</s> b") == ids(tokenizer, " a</s> b")


# --- strangers' files -------------------------------------------------------------------------------------------------


def piece(number, **changes):
    """A change of one piece."""

    def change(model):
        for name, value in changes.items():
            setattr(model.pieces[number], name, value)

    return change


def setting(part, **changes):
    def change(model):
        for name, value in changes.items():
            setattr(getattr(model, part), name, value)

    return change


BPE = small()
DAMAGED = {
    "empty": b"",
    "cut": BPE[:-3],
    "cut in a piece": BPE[:100],
    "zeros": bytes(500),
    "a length of 2^31": b"\x0a\xff\xff\xff\xff\x07abc",
    "a length of 2^63": b"\x0a" + b"\xff" * 8 + b"\x7fabc",
    "a number without end": b"\x0a" + b"\xff" * 30,
    "text": b"hello world\n" * 50,
    "a page": b"<!DOCTYPE html><html></html>",
    "a pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 499723\n",
    "a pickle": b"\x80\x04cos\nsystem\n(S'true'\ntR.",
    "tiktoken": b"\n".join(b"IQ== %d" % i for i in range(500)),
    "bad text": BPE.replace("▁ab".encode(), b"\xff\xfe\xfd" + b"ab"),
}
OTHER = {
    "unigram": (setting("trainer_spec", model_type=1), "unigram"),
    "word": (setting("trainer_spec", model_type=3), "word"),
    "char": (setting("trainer_spec", model_type=4), "char"),
    "normalisation": (setting("normalizer_spec", precompiled_charsmap=b"abc"), "precompiled normalisation"),
    "spaces removed": (setting("normalizer_spec", remove_extra_whitespaces=True), "removal of extra spaces"),
    "spaces kept": (setting("normalizer_spec", escape_whitespaces=False), "not escaped"),
    "suffixes": (setting("trainer_spec", treat_whitespace_as_suffix=True), "spaces as suffixes"),
    "user-defined": (piece(260, type=4), "user-defined"),
    "unused": (piece(260, type=5), "unused"),
    "two unknown": (piece(260, type=2), "2 unknown"),
    "no unknown": (piece(0, type=3), "0 unknown"),
    "a byte less": (piece(10, type=1), "each byte"),
    "twice": (piece(260, piece="ab"), "'ab' 2 times"),
    "nothing": (piece(260, piece=""), "empty"),
    "long": (piece(260, piece="a" * 300), "too long"),
    "no number": (piece(260, score=float("nan")), "not a number"),
    "ties": (piece(260, score=-0.0), "same score"),
    "unreachable": (piece(260, piece="xy"), "no pieces themselves"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_tokenizer_model_is_named(name, tmp_path):
    write(tmp_path, {"tokenizer.model": DAMAGED[name]})
    with pytest.raises(UserError, match=r"tokenizer\.model is not a SentencePiece model"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("name", OTHER)
def test_a_tokenizer_model_of_another_kind_is_refused_by_name(name, tmp_path):
    change, message = OTHER[name]
    with pytest.raises(UserError, match=rf"tokenizer\.model .*{message}"):
        load_small(tmp_path, change=change)


TOY = json.loads((TOKENIZER / "tokenizer.json").read_text())
TOY_CONFIG = json.loads((TOKENIZER / "tokenizer_config.json").read_text())
EVIL = {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
NO_OBJECT = [[], 3, None, "x", b"{", b"[" * 200_000, b'{"a":' * 100_000, "{}".encode("utf-16")]
BAD_SETTINGS = {
    "legacy": "no",
    "add_bos_token": 3,
    "add_eos_token": [],
    "model_max_length": "a",
    "bos_token": 5,
    "unk_token": None,
    "pad_token": {"content": ""},
    "additional_special_tokens": {"a": 1},
    "chat_template": 5,
    "added_tokens_decoder": [1],
    "tokenizer_class": {"a": 1},
    "auto_map": EVIL,
}
FILES = ("tokenizer_config", "special_tokens_map", "added_tokens")
BESIDE = [
    *({file: content} for file in FILES for content in NO_OBJECT),
    *({"tokenizer_config": {name: value}} for name, value in BAD_SETTINGS.items()),
    *({"added_tokens": {"x": index}} for index in (2**31, -1, 1.5, "267", True, 268, 10**12)),
    {"tokenizer_config": {"unk_token": "[UNK]"}},
    {"tokenizer_config": {"tokenizer_class": "T5Tokenizer"}},
    {"tokenizer_config": b'{"model_max_length": NaN}'},
    {"tokenizer_config": {"added_tokens_decoder": {"999999999": {"content": "x"}}}},
    {"special_tokens_map": {"eos_token": {"x": 1}}},
    {"added_tokens": {"<s>": 5}},
    {"added_tokens": {"x": 267, "y": 267}},
    {"added_tokens": {"": 267}},
]


@pytest.mark.parametrize("files", BESIDE, ids=lambda files: str(files)[:50])
def test_bad_settings_beside_a_tokenizer_model_are_one_clear_message(files, tmp_path):
    files = {f"{file}.json": content for file, content in files.items()}
    write(tmp_path, {"tokenizer.model": BPE, "evil.py": b"open('ran', 'w')", **files})
    with pytest.raises(UserError, match=re.escape(str(tmp_path))):
        load_tokenizer(str(tmp_path))


def toy(**changes):
    return {"tokenizer.json": {**TOY, **changes}, "tokenizer_config.json": TOY_CONFIG}


JSONS = {
    "a list": {"tokenizer.json": []},
    "nothing": {},
    "a cut file": {"tokenizer.json": json.dumps(TOY).encode()[:3000]},
    "an empty file": {"tokenizer.json": b""},
    "deep": {"tokenizer.json": b'{"a":' * 100_000},
    "an unknown model": toy(model={"type": "Magic"}),
    "merges of nothing": toy(model={"type": "BPE", "vocab": {"a": 0}, "merges": ["x y"]}),
    "a huge id": toy(model={"type": "WordLevel", "vocab": {"a": 2**32 - 1, "[UNK]": 1}, "unk_token": "[UNK]"}),
    "an id beyond": toy(model={"type": "BPE", "vocab": {"a": 10**11}, "merges": []}),
    "an empty unigram": toy(model={"type": "Unigram", "vocab": [], "unk_id": 5}),
    "a bad expression": toy(normalizer={"type": "Replace", "pattern": {"Regex": "(("}, "content": ""}),
    "a bad pre-tokenizer": toy(pre_tokenizer={"type": "Nope"}),
    "bad added tokens": toy(added_tokens=[3]),
    "no unknown token": toy(model={"type": "WordLevel", "vocab": {"q": 0}, "unk_token": "[UNK]"}),
    "a bad setting": {**toy(), "tokenizer_config.json": {**TOY_CONFIG, "bos_token": 5}},
    "a bad length": {**toy(), "tokenizer_config.json": {**TOY_CONFIG, "model_max_length": "a"}},
    "its own code": {**toy(), "tokenizer_config.json": {"tokenizer_class": "Evil", "auto_map": EVIL}},
    "a bad code map": {**toy(), "tokenizer_config.json": {**TOY_CONFIG, "auto_map": 5}},
    "settings that are a list": {**toy(), "tokenizer_config.json": []},
    "a Llama without a vocabulary": {**toy(model=None), "tokenizer_config.json": {"tokenizer_class": "LlamaTokenizer"}},
}


@pytest.mark.parametrize("name", JSONS)
def test_a_bad_tokenizer_json_is_one_clear_message(name, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked at the terminal"))
    write(tmp_path, {"evil.py": f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass".encode(), **JSONS[name]})
    with pytest.raises(UserError, match=re.escape(str(tmp_path))):
        load_tokenizer(str(tmp_path))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("path", ["", " ", "no/such/folder", "a\0b", "/nowhere/at/all"])
def test_a_folder_that_is_not_there_is_one_clear_message(path):
    with pytest.raises(UserError, match=r"[Nn]o tokenizer"):
        load_tokenizer(path)


def bomb(texts):
    """A file of many pieces, made by hand: SentencePiece's own library would need the memory."""
    return b"".join(b"\x0a" + bytes([len(t) + 2]) + b"\x0a" + bytes([len(t)]) + t for t in texts)


LARGE = {
    "many pieces": {"tokenizer.model": bomb(b"%d" % number for number in range(400_000))},
    "many empty pieces": {"tokenizer.model": b"\x0a\x00" * 8_000_000},
    "a large file": {"tokenizer.model": bytes(20 << 20)},
    "a table": toy(normalizer={"type": "Precompiled", "precompiled_charsmap": "////fwAAAAA="}),
    "a table in a sequence": toy(
        normalizer={"type": "Sequence", "normalizers": [{"type": "Precompiled", "precompiled_charsmap": "////fwAA"}]}
    ),
}


@pytest.mark.parametrize("name", LARGE)
def test_claims_of_great_size_cost_no_memory_and_end_no_process(name, tmp_path):
    write(tmp_path, LARGE[name])
    child = os.fork()
    if child == 0:  # with a GiB more than now, and 20 seconds
        code = 1
        try:
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30),) * 2)
            signal.alarm(20)
            load_tokenizer(str(tmp_path))
        except UserError:
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
