"""What inspect_data shows is what a run trains on, its figures are right, and it finds what would waste a run."""

import base64
import html
import io
import itertools
import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image
from shard_fixtures import ROOT, SPECS, TOKENIZER, image_file, jpeg, mp4, talk, write_source
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from data_prep.toy_render import encode_mp4
from vllava import inspect_data, plan
from vllava.batch import IGNORE_INDEX, MediumSpec
from vllava.data.build import conversation_data
from vllava.data.index import index_path
from vllava.data.mixture import Source
from vllava.data.packing import ConversationPacker
from vllava.data.samples import Sample
from vllava.data.shards import ShardReader
from vllava.data.video import video_decoder
from vllava.inspection.batches import first_batches
from vllava.inspection.findings import Run, findings, plain
from vllava.inspection.reasons import read_rejects
from vllava.inspection.statistics import MODALITIES, SourceStatistics, survey, token_edges
from vllava.inspection.texts import measure
from vllava.inspection.tokens import chips
from vllava.model.encoders import ClipEncoder, MaeEncoder
from vllava.model.tokenizer import load_tokenizer
from vllava.templates import TEMPLATES


def image(number, question="What is it?", answer="a red circle"):
    return f"i{number:03d}", {"conversations": talk(question, answer)}, [("jpg", jpeg(number))]


def video(number, question="What moves?", answer="a blue square"):
    return f"v{number:03d}", {"conversations": talk(question, answer, "<video>")}, [("mp4", mp4(number))]


def text(number, question="How many circles are there?", answer="two circles"):
    return f"t{number:03d}", {"conversations": talk(f"{question} {number}", answer, "")}, []


BAD = {"id": "without a conversation"}


def data_of(folders, tokenizer, **settings):
    """The data module of folders by modality."""
    given = {"modalities": ["image", "video", "text"], "global_batch": 2, "seed": 3, "workers": 0, "specs": SPECS}
    sources = {kind: [str(folder)] for kind, folder in folders.items()}
    return conversation_data(tokenizer=tokenizer, sources=sources, **{**given, **settings})


def survey_of(data):
    sources = [Source("image", folder) for folder in data.sources]
    packer = data.assembler
    return survey(data.shards, sources, data.draws, packer.lengths(data.shards), packer.max_length)


def run_of(data, batches=1, **changes):
    texts = [measure(data.shards, number, data.assembler) for number in range(len(data.sources))]
    known = {"global_batch": data.global_batch, "epochs": 1, "max_steps": -1, "max_broken_share": 0.01}
    return Run(survey_of(data), texts, first_batches(data, batches, 100), **{**known, **changes})


@pytest.fixture
def source(tmp_path):
    """Writes samples to a folder of shards."""

    def write(samples, name="source", per_shard=6):
        write_source(tmp_path / name, samples, per_shard)
        return tmp_path / name

    return write


# --- figures over all indexes -----------------------------------------------------------------------------------------


def test_figures_of_a_source_are_those_of_its_samples(source, tokenizer):
    wide = image_file(np.zeros((20, 50, 3), np.uint8))
    both = ("both", {"conversations": talk("Both?", "yes", "<image>\n<video>")}, [("png", wide), ("mp4", mp4(9, 25))])
    broken = ("broken", BAD, [])
    samples = [*map(image, range(3)), *map(video, range(2)), *map(text, range(4)), both, broken]
    data = data_of({"image": source(samples)}, tokenizer)
    [found] = survey_of(data).sources
    assert found.modalities == {"image": 3, "video": 2, "text": 4, "mixed": 1, "unreadable": 1}
    assert (found.samples, found.drawn, found.times, found.unindexed) == (11, 11, 1.0, 0)
    assert sorted(found.column("frames")) == [8, 8, 25]
    assert sorted(found.column("width") * 1000 + found.column("height")) == [50020, 64064, 64064, 64064]
    assert found.common_sizes() == [(64, 64, 3), (50, 20, 1)]
    assert sorted(found.column("turns")) == [2] * 10
    assert found.tokens_of("image") == pytest.approx(true_lengths(data, "image"), abs=2)  # texts are estimated
    assert found.tokens_of("video") == pytest.approx(true_lengths(data, "video"), abs=2)
    spoken = [talk("How many circles are there? 0", "two circles", "")] * 4
    expected = sum(len(turn["value"]) for conversation in spoken for turn in conversation)
    assert found.column("characters")[found.column("modality") == MODALITIES.index("text")].sum() == expected
    assert found.quantiles("turns") == [2, 2, 2, 2, 2] and SourceStatistics("image", "x", 0, 0, 9).quantiles("x") == []
    assert [row[0] for row in found.broken.rows] == [1] and found.broken.rows[0][2].endswith("00001.tar:broken")


def true_lengths(data, modality):
    reader = ShardReader(data.shards, 10)
    return [
        len(data.assembler.prepare(data.decode(*reader.read(number, index))))
        for number in range(len(data.shards))
        for index, facts in enumerate(reader.facts(number))
        if facts.modality == modality
    ]


def test_a_histogram_has_every_sample_in_its_bin():
    rng = np.random.default_rng(0)
    tokens, kinds = rng.integers(1, 5000, 500), rng.integers(len(MODALITIES), size=500)
    found = SourceStatistics("image", "x", 500, 500, 1000, columns={"tokens": tokens, "modality": kinds})
    edges, counts = found.histogram()
    assert edges[0] == 0 and edges[1] == 16 and edges[-1] > 5000 and np.allclose(edges[5:] / edges[1:-4], 2)
    for number, kind in enumerate(MODALITIES):
        bins = itertools.pairwise(edges)
        by_hand = [sum(low <= t < high for t in tokens[kinds == number]) for low, high in bins]
        assert counts[kind].tolist() == by_hand
    assert found.too_long == sum(t > 1000 for t in tokens)
    assert token_edges(1, 100)[-1] >= 150  # there is room for the limit


def test_a_mixture_says_how_often_each_sample_is_shown(source, tokenizer):
    folders = {"image": source(map(image, range(4)), "i"), "text": source(map(text, range(10)), "t")}
    shown = survey_of(data_of(folders, tokenizer, mixture={"image": 3, "text": 0.5}))
    assert [(one.drawn, one.times) for one in shown.sources] == [(12, 3.0), (5, 0.5)]
    assert shown.drawn == 17


def test_repeated_samples_and_shared_media_are_told_apart(source, tokenizer):
    again = [(f"again{n}", *image(1)[1:]) for n in range(2)]
    same_words = ("other-picture", image(1)[1], [("jpg", jpeg(77))])
    same_picture = ("other-words", image(1, "Which colour?")[1], image(1)[2])
    frames = [
        (f"f{n}", {"conversations": talk(placeholder="<video>")}, [("jpg", [jpeg(n // 2)] * 3)]) for n in range(4)
    ]
    everything = [image(1), *again, same_words, same_picture, *frames, text(1), ("t2", *text(1)[1:])]
    seen = survey_of(data_of({"image": source(everything, per_shard=3)}, tokenizer))
    assert (seen.samples.total, seen.samples.distinct) == (11, 6)  # 2 of the picture, 2 of frames, 1 text come again
    times, keys = seen.samples.examples[0]
    assert times == 3 and [key.rpartition(":")[2] for key in keys] == ["i001", "again0", "again1"]
    assert (seen.media.total, seen.media.distinct, seen.media.shared) == (9, 4, 3)


def test_without_an_index_media_are_not_compared_and_a_note_says_so(source, tokenizer):
    folder = source([image(1), ("again", *image(1)[1:]), *map(text, range(20))])
    for shard in folder.glob("*.tar"):
        index_path(shard).unlink()
    run = run_of(data_of({"image": folder}, tokenizer))
    assert run.survey.samples.total == 20
    assert run.survey.sources[0].modalities == {"image": 2, "text": 20}
    [note] = findings(run)
    assert note.note and "4 shards" in note.text and f"python -m data_prep.index {folder}" in note.text


def test_rejects_are_counted_by_their_reason(tmp_path):
    rows = [
        {"where": f"a.json row {n}", "id": n, "medium": f"{n}.jpg", "reason": f"'{n}.jpg' is missing"} for n in range(3)
    ]
    lines = [json.dumps(row) for row in rows] + ['{"where": "b', json.dumps({"where": "x", "reason": "no answer"})]
    (tmp_path / "rejects.jsonl").write_text("\n".join(lines))
    found = read_rejects(str(tmp_path))
    assert found.total == 5
    assert found.rows[0] == (3, "'0.jpg' is missing", "a.json row 0, 0.jpg")
    assert {reason for _, reason, _ in found.rows[1:]} == {"the line cannot be read", "no answer"}
    assert read_rejects(str(tmp_path / "nowhere")).total == 0


# --- what is found ----------------------------------------------------------------------------------------------------

FINE = [*map(image, range(8)), *map(video, range(4)), *map(text, range(12))]
STRANGE = "Photosynthesis converts sunlight, carbon dioxide and water into glucose; chlorophyll absorbs wavelengths."


def unk_tokenizer():
    """Words, of which it knows few."""
    words = ["<unk>", "</s>", "<s>", "USER", "ASSISTANT", ":", "?", "circle", "a", "red"]
    core = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="</s>", bos_token="<s>")


NO_PICTURES = [(f"b{n}", image(n)[1], [("jpg", b"no picture %d" % n)]) for n in range(9)]
LONG = [text(n, "circle " * 300) for n in range(20, 23)]
AGAIN = [(f"d{n}", *image(1)[1:]) for n in range(8)]
TWO_ROUNDS = {"conversations": [*talk(), *talk("And?", placeholder="")]}
MISFIT = {"misfit": "data.max_length is more than the context."}
TROUBLE = {  # samples, settings of the data, of the run, words of the finding
    "broken in the index": ([*FINE, *[(f"b{n}", BAD, []) for n in range(3)]], {}, {}, "broken, most of them"),
    "broken when read": ([*FINE, *NO_PICTURES], {}, {}, "9 of the first 33"),
    "too long": ([*FINE, *LONG], {"max_length": 256}, {}, "raise data.max_length"),
    "no encoder": (FINE, {"specs": {"image": SPECS["image"]}}, {}, "4 of 24 samples .* kind video.*encoder/video"),
    "does not fit": (FINE, {}, MISFIT, "more than the context"),
    "unknown words": (FINE, {"tokenizer": unk_tokenizer()}, {}, "unknown to the tokenizer"),
    "spelt words": ([text(n, STRANGE, STRANGE) for n in range(24)], {}, {}, "spelt one by one.*sunlight"),
    "not supervised": ([text(n, "circle " * 200, "no") for n in range(24)], {}, {}, "are supervised, so hardly"),
    "duplicates": ([*FINE, *AGAIN], {}, {}, "25% of the samples repeat.*9 times"),
    "few steps": (FINE, {"global_batch": 4}, {}, "The run has 6 optimiser steps"),
    "few steps at most": (FINE, {}, {"max_steps": 5}, "The run has 5 optimiser steps"),
    "another template": (
        [(f"s{n}", TWO_ROUNDS, [("jpg", jpeg(n))]) for n in range(24)],
        {"template": "chat"},
        {},
        "24 of 24 conversations .* cannot be written as data.template",
    ),
}


@pytest.mark.parametrize("name", TROUBLE)
def test_each_trouble_is_found_once(name, source, tokenizer):
    samples, settings, changes, words = TROUBLE[name]
    settings = {"tokenizer": tokenizer, **settings}
    if name == "another template":
        settings["tokenizer"] = one_round(load_tokenizer(TOKENIZER))
    batches = 17 if name == "broken when read" else 0
    run = run_of(data_of({"image": source(samples, per_shard=12)}, **settings), batches, **changes)
    problems = [finding.text for finding in findings(run) if not finding.note]
    assert len(problems) == 1 and re.search(words, problems[0]), problems


def one_round(tokenizer):
    """A tokenizer whose own template refuses a third turn that asks 'And?'."""
    tokenizer.chat_template = (
        "{% for m in messages %}{% if 'And?' in m.content %}{{ raise_exception('no') }}{% endif %}"
        "{{ m.role }}: {{ m.content }}{% if m.role == 'assistant' %}</s>{% endif %}\n{% endfor %}"
    )
    return tokenizer


def test_fine_data_have_no_findings(source, tokenizer):
    assert findings(run_of(data_of({"image": source(FINE)}, tokenizer))) == []


def test_what_is_within_the_limit_is_but_noted(source, tokenizer):
    folder = source([*FINE, ("b", BAD, [])])
    (folder / "rejects.jsonl").write_text(json.dumps({"where": "a row 1", "reason": "no answer"}))
    notes = findings(run_of(data_of({"image": folder}, tokenizer)))
    assert all(note.note for note in notes) and len(notes) == 2
    assert "1 of 25 samples" in notes[0].text and "1 rows (3.8%) were rejected" in notes[1].text
    assert plain(notes).startswith("nothing found") and plain(notes).count("note: ") == 2


def test_a_few_samples_without_an_encoder_are_but_noted_as_training_leaves_them_out(source, tokenizer):
    samples = [*map(image, range(8)), *map(text, range(16)), video(0)]
    data = data_of({"image": source(samples)}, tokenizer, specs={"image": SPECS["image"]})
    [note] = findings(run_of(data, max_broken_share=0.1))
    assert note.note and re.search("1 of 25 samples .* no encoder, and are left out: choose one", note.text)


def test_kinds_that_are_too_many_only_together_are_found(source, tokenizer):
    samples = [*FINE, ("b", BAD, []), text(50, "circle " * 300)]
    problems = [
        f.text for f in findings(run_of(data_of({"image": source(samples)}, tokenizer, max_length=256))) if not f.note
    ]
    assert len(problems) == 1 and "broken or too long" in problems[0]


def test_the_worst_comes_first(source, tokenizer):
    samples = [*FINE, *[(f"b{n}", BAD, []) for n in range(3)]]
    run = run_of(data_of({"image": source(samples)}, tokenizer), max_steps=5, misfit="It does not fit.")
    found = findings(run)
    assert [finding.waste for finding in found] == [1, 0.5, pytest.approx(3 / 27)]


# --- what is shown ----------------------------------------------------------------------------------------------------


def test_batches_are_those_that_a_run_trains_on(source, tokenizer):
    broken = ("broken", image(0)[1], [("jpg", b"no picture")])
    data = data_of({"image": source([*FINE, broken])}, tokenizer, global_batch=9, token_budget=600)
    shown = first_batches(data, 5, 100)
    steps = list(data.train_dataloader())
    assert len(shown) == len(steps) == 3
    for batch, step in zip(shown, steps, strict=True):
        assert [(one.key, one.broken) for one in batch.broken] == step.broken
        assert [[one.key.rpartition(":")[2] for one in row.samples] for row in batch.rows] == [
            row.keys for row in step.micro_batches
        ]
        for row, packed in zip(batch.rows, step.micro_batches, strict=True):
            assert row.tokens == len(packed.token_ids)
            assert [one.tokens for one in row.samples] == packed.cu_seqlens.diff().tolist()
            marked = [chip.supervised for one in row.samples for chip in one.chips for _ in range(chip.tokens)]
            assert marked == (packed.labels != IGNORE_INDEX).tolist()
            assert sum(one.supervised for one in row.samples) == packed.num_supervised
            visual = len(packed.image_slots) + len(packed.video_slots)
            assert sum(one.tokens - one.text for one in row.samples) == visual
    assert sum(len(batch.rows) for batch in shown) > 3
    assert len(first_batches(data, 1, 100)) == 1 and first_batches(data, 0, 100) == []


def test_samples_beyond_the_number_are_shown_in_figures_alone(source, tokenizer):
    data = data_of({"image": source(FINE)}, tokenizer, global_batch=8)
    [batch] = first_batches(data, 1, 3)
    assert sum(one.whole for one in batch.samples) == 3 and len(batch.samples) == 8
    assert all(one.tokens and one.supervised for one in batch.samples)


def test_pictures_and_times_are_those_of_the_decoder(source, tokenizer):
    moving = np.random.default_rng(0).integers(0, 255, (30, 64, 64, 3), np.uint8)
    clip = encode_mp4(moving)
    prepared = {"conversations": talk(placeholder="<video>"), "frame_times": {"0": [n / 2 for n in range(8)]}}
    samples = [
        ("clip", {"conversations": talk(placeholder="<video>")}, [("mp4", clip)]),
        ("prepared", prepared, [("jpg", [jpeg(n) for n in range(8)])]),
    ]
    data = data_of({"image": source(samples)}, tokenizer)
    [batch] = first_batches(data, 1, 100)
    shown = {one.key.rpartition(":")[2]: one.media[0] for one in batch.samples}
    assert shown["clip"].times == tuple(video_decoder("auto")(clip, 8).times)
    assert shown["prepared"].times == (0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5)
    pixels = data.decode("clip", {"json": json.dumps(samples[0][1]).encode(), "0.mp4": clip}).media[0].pixels
    for uri, frame in zip(shown["clip"].pictures, pixels, strict=True):
        picture = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
        assert np.array_equal(np.asarray(picture), frame.permute(1, 2, 0).numpy())


TEXTS = [
    "How many red circles are there?",
    "视频里有什么？一只猫🐈‍⬛和👩‍👩‍👧。",  # noqa: RUF001
    "Zażółć gęślą jaźń, Ωμέγα,\tטקסט\n\n  spaces  ",  # noqa: RUF001
]


@pytest.mark.parametrize("words", TEXTS)
@pytest.mark.parametrize("kind", ["bytes", "words in sentencepiece's form"])
def test_tokens_together_are_the_prompt(words, kind, tokenizer):
    known = tokenizer if kind == "bytes" else sentencepiece_like(words)
    packer = ConversationPacker(known, TEMPLATES["vicuna_v1"], SPECS, 4096, 4096)
    packed = packer.prepare(Sample("x", talk(words, words, ""), []))
    found = chips(packed, known, SPECS)
    assert sum(chip.tokens for chip in found) == len(packed)
    marked = [chip.supervised for chip in found for _ in range(chip.tokens)]
    assert marked == [label != IGNORE_INDEX for label in packed.labels]
    answer = "".join(chip.text for chip in found if chip.supervised and chip.kind == "text").replace("⏎\n", "\n")
    assert answer.replace("\\t", "\t").strip(" ") == words.strip(" ")
    assert [chip.text for chip in found if chip.kind == "special"] == ["<s>", "</s>"]


def sentencepiece_like(words):
    """Single characters with ▁ for spaces, and bytes for what it does not know."""
    from tokenizers import decoders, normalizers

    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256)), "▁"]
    pieces += sorted({c for c in words + TEXTS[0] + "ASSISTANT:USER ACchatbewnorigly.'fvudpq" if c.isascii()} - {" "})
    core = Tokenizer(models.BPE({p: n for n, p in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True))
    core.normalizer = normalizers.Replace(" ", "▁")
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def test_each_medium_is_one_chip_and_unknown_tokens_are_marked(make_sample):
    specs = {"image": MediumSpec(32, 5), "video": MediumSpec(32, 12, 4)}
    tokenizer = unk_tokenizer()
    packer = ConversationPacker(tokenizer, TEMPLATES["vicuna_v1"], specs, 4096, 4096)
    found = chips(packer.prepare(make_sample("<image><image> red zebra <video>", "circle")), tokenizer, specs)
    media = [(chip.text, chip.kind, chip.tokens) for chip in found if chip.kind in specs]
    assert media == [("image: 5 tokens", "image", 5)] * 2 + [("video: 12 tokens", "video", 12)]
    after = [chip.text.strip() for chip in found[found.index(("image: 5 tokens", "image", False, 5)) + 2 :]]
    assert after[:2] == ["red", "<unk>"]
    assert next(chip for chip in found if chip.text.strip() == "circle").supervised


# --- the command ------------------------------------------------------------------------------------------------------


def inspected(tmp_path, *arguments):
    """The exit status and the page of a command line."""
    out = tmp_path / "page.html"
    status = inspect_data.main(["+experiment=stage2", *arguments, "--out", str(out)])
    return status, out.read_text(encoding="utf-8")


def test_the_page_shows_what_strangers_wrote_and_obeys_none_of_it(source, tmp_path, capsys):
    attack = "<script>alert('x')</script><img src=http://x/y> 猫🐈 \u202e &amp; </style>"
    key = "<b>key"
    samples = [(key, {"conversations": talk(attack, attack)}, [("jpg", jpeg(1))]), *FINE]
    samples += [("broken", {"conversations": talk("q", "a", "<image>" * 2)}, [("jpg", b"GIF8<i>")])]
    folder = source(samples, "<u>folder")
    (folder / "rejects.jsonl").write_text(json.dumps({"where": "<em>row", "reason": "<h9>reason"}))
    status, page = inspected(tmp_path, f"data.sources.image=['{folder}']", "--batches", "20", "data.global_batch=2")
    assert status == 0 and "note: " in capsys.readouterr().out
    assert not re.search(r"<script|<img src=http|<b>key|<u>|<em>|<h9>|\u202e", page)
    assert page.count("</style>") == 1 and page.count("<style>") == 1
    for source_of in re.findall(r'(?:src|href)="([^"]*)"', page):
        assert source_of.startswith("data:image/")
    plain_text = html.unescape(re.sub(r"<[^>]*>", "", page))
    assert "<script>alert('x')</script>" in plain_text and "猫" in plain_text and "🐈" in plain_text
    assert "<em>row" in plain_text and "<h9>reason" in plain_text and "\\u202e" in plain_text


def test_check_exits_1_on_what_would_waste_a_run(source, tmp_path, capsys):
    folder = source(map(text, range(24)))  # texts alone: no medium anywhere
    sources = f"data.sources.text=[{folder}]"
    assert inspected(tmp_path, sources, "data.global_batch=2", "--check")[0] == 0
    assert "nothing found that would waste this run" in capsys.readouterr().out
    status, page = inspected(tmp_path, sources, "data.global_batch=8", "data.max_length=5000", "--check")
    printed = capsys.readouterr().out
    assert status == 1 and printed.startswith("2 findings would waste this run\nproblem: data.max_length=5,000 is more")
    assert page.index("is more than the LLM") < page.index("3 optimiser steps")
    assert inspected(tmp_path, sources, "data.global_batch=8", "--batches", "0")[0] == 0


def test_no_weights_are_read_and_published_encoders_are_known(source, tmp_path):
    for name in ("languagebind-image", "languagebind-video", "llm"):
        shutil.copytree(ROOT / "assets" / name, tmp_path / name, ignore=shutil.ignore_patterns("*.safetensors"))
    foundations = [f"foundations.{name.replace('-', '_')}={tmp_path / name}" for name in ("languagebind-image", "llm")]
    foundations.append(f"foundations.languagebind_video={tmp_path / 'languagebind-video'}")
    folder = source(FINE)
    _, page = inspected(tmp_path, f"data.sources.image=[{folder}]", "data.global_batch=12", *foundations)
    assert "image: 9 tokens" in page and "video: 80 tokens" in page and "48 \u00d7 48 pixels" in page
    published = ["model=video_llava_7b", f"tokenizer={TOKENIZER}"]
    _, page = inspected(tmp_path, f"data.sources.image=[{folder}]", "data.global_batch=12", *published)
    assert "image: 256 tokens" in page and "video: 2,056 tokens" in page and "224 \u00d7 224 pixels" in page


def test_specs_from_settings_are_those_of_the_encoders():
    settings = plan.configured(["+experiment=stage2"])
    found = {kind: encoder.spec for kind, encoder in plan.plan_encoders(settings).items()}
    loaded = {kind: ClipEncoder(f"assets/languagebind-{kind}", kind).spec for kind in ("image", "video")}
    assert found == loaded and found["image"].width == loaded["image"].width
    mae = plan.plan_encoders(plan.configured(["+experiment=stage2", "+ablation=separated_mae"]))["image"].spec
    assert mae == MaeEncoder("assets/mae").spec
    assert plan.context(settings) == 4096


def test_what_is_no_page_of_ours_is_not_replaced(source, tmp_path, capsys):
    sources = f"data.sources.text=[{source(map(text, range(24)))}]"
    inspected(tmp_path, sources)
    inspected(tmp_path, sources)  # its own it may
    (tmp_path / "page.html").write_text("<!doctype html>mine")
    with pytest.raises(SystemExit, match="no page of this command"):
        inspected(tmp_path, sources)
    assert (tmp_path / "page.html").read_text() == "<!doctype html>mine"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["+experiment=full"], "one of stage1, stage2"),
        (["+experiment=evaluate"], "trains on nothing"),
        (["+experiment=align_image"], "does not train on conversations"),
        (["+experiment=stage2", "data.sources.image=[/nowhere]"], "No shards at /nowhere"),
        (["+experiment=stage2", "data.source.image=[/nowhere]"], "did you mean"),
        (["+experiment=stage2", "--batches", "-1"], "argument --batches: '-1' is not a whole number from 0"),
    ],
)
def test_a_mistake_is_one_paragraph(arguments, message, tmp_path):
    with pytest.raises(SystemExit) as error:
        inspect_data.main([*arguments, "--out", str(tmp_path / "page.html")])
    assert str(error.value).startswith("error: ") and message in str(error.value)
    assert not (tmp_path / "page.html").exists()
