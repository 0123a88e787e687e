"""Benchmarks of a few questions each, in the files in which they are published: the original's and Parquet."""

import base64
import csv
import json
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from vllava.errors import UserError
from vllava.evaluation.questions import Answer

CONF = Path(__file__).parents[1] / "conf"
SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
UNANSWERABLE = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."
NAMES = ["gqa", "mmbench", "pope", "science_qa", "text_vqa", "vizwiz", "vizwiz_val", "vqav2", "vqav2_val"]
LAYOUTS = ["files", "tables"]
PREPARED = {
    "gqa": "gqa/llava_gqa_testdev_balanced.jsonl",
    "pope": "pope/llava_pope_test.jsonl",
    "text_vqa": "textvqa/llava_textvqa_val_v051_ocr.jsonl",
    "vizwiz": "vizwiz/llava_test.jsonl",
    "vqav2": "vqav2/llava_vqav2_mscoco_test-dev2015.jsonl",
}
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])

# --- asking -----------------------------------------------------------------------------------------------------------


@cache
def settings(name):
    with initialize_config_dir(str(CONF), version_base=None):
        return compose(f"benchmark/{name}").benchmark


def benchmark(name, root, **changes):
    """A benchmark as its configuration makes it, but for how many questions there should be."""
    return instantiate(settings(name), root=str(root), **{"expected": None, **changes})


def answered(found, replies):
    """Answers to the questions by id; a question without a reply could not be asked."""
    assert set(replies) <= {question.id for question in found}
    return [Answer(question, replies.get(question.id)) for question in found]


def figures(found, rows, group=None):
    """Metric -> its figure over all rows or a group's, each column's mean taken over them."""
    rows = [row for row in rows if group is None or group in row.groups]
    return {
        metric.name: metric.scale
        * float(metric.of(*(np.mean([row.values.get(column, 0.0) for row in rows]) for column in metric.columns)))
        for metric in found.metrics
    }


# --- writing ----------------------------------------------------------------------------------------------------------


def write(name, layout, root):
    """A benchmark's folder, by the function below that makes it."""
    globals()[f"{name.removesuffix('_val')}_{layout}"](root)


def asked(name, layout, root, **changes):
    write(name, layout, root)
    found = benchmark(name, root, **changes)
    return found, found.questions()


def damaged(name, tmp_path, change):
    """The error of reading a benchmark whose prepared file's lines were changed."""
    write(name, "files", tmp_path)
    path = tmp_path / PREPARED[name]
    path.write_text("\n".join(change(path.read_text().splitlines())))
    with pytest.raises(UserError) as error:
        benchmark(name, tmp_path).questions()
    return str(error.value), path


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def write_jsonl(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def write_images(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(f"the image {name}".encode())


def write_table(path, rows, group=1000):
    """Rows as the library `datasets` writes them; images as bytes, in a column "image"."""
    path.parent.mkdir(parents=True, exist_ok=True)
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = {name: [row.get(name) for row in rows] for name in names}
    arrays = {
        name: pa.array(values, IMAGE) if name == "image" else pa.array(values) for name, values in columns.items()
    }
    pq.write_table(pa.table(arrays), path, row_group_size=group)


def stored(name):
    return {"bytes": f"the image {name}".encode(), "path": None}


def write_tsv(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)


# --- VQAv2 ------------------------------------------------------------------------------------------------------------

VQAV2 = [  # id, image, question, ten answers, kind of answer
    (11, 1, "Is it red?", ["yes"] * 10, "yes/no"),
    (12, 1, "How many dogs?", ["2"] * 2 + ["two"] + ["3"] * 7, "number"),
    (21, 2, "What does it say?", ["stop sign."] * 10, "other"),
    (22, 2, "What colour?", ["red"] * 5 + ["blue"] * 5, "other"),
]


def vqav2_files(root):
    folder = root / "vqav2"
    asked = [{"question_id": id, "image_id": image, "question": text} for id, image, text, _, _ in VQAV2]
    write_json(folder / "v2_OpenEnded_mscoco_val2014_questions.json", {"questions": asked})
    known = [
        {
            "question_id": id,
            "answer_type": kind,
            "answers": [{"answer": answer, "answer_id": number} for number, answer in enumerate(answers, 1)],
        }
        for id, _, _, answers, kind in reversed(VQAV2)  # joined by id, whatever the order
    ]
    write_json(folder / "v2_mscoco_val2014_annotations.json", {"annotations": known})
    write_images(folder / "val2014", "COCO_val2014_000000000001.jpg", "COCO_val2014_000000000002.jpg")
    prepared = [
        {"question_id": id, "image": f"COCO_test2015_{image:012d}.jpg", "text": text + SHORT, "category": "default"}
        for id, image, text, _, _ in VQAV2
    ]
    write_jsonl(folder / "llava_vqav2_mscoco_test-dev2015.jsonl", prepared)
    write_jsonl(folder / "llava_vqav2_mscoco_test2015.jsonl", [{**prepared[0], "question_id": 5}, *prepared])
    write_images(folder / "test2015", "COCO_test2015_000000000001.jpg", "COCO_test2015_000000000002.jpg")


def vqav2_tables(root):
    rows = [
        {
            "question_id": id,
            "image_id": image,
            "question": text,
            "answer_type": kind,
            "answers": [{"answer": answer, "answer_id": number} for number, answer in enumerate(answers, 1)],
            "image": stored(image),
        }
        for id, image, text, answers, kind in VQAV2
    ]
    write_table(root / "data" / "validation-00000-of-00002.parquet", rows[:2])
    write_table(root / "data" / "validation-00001-of-00002.parquet", rows[2:])
    tests = [{**row, "answers": None, "answer_type": None} for row in rows]
    write_table(root / "data" / "testdev-00000-of-00001.parquet", tests)
    write_table(root / "data" / "test-00000-of-00001.parquet", [{**tests[0], "question_id": 5}, *tests])


# --- GQA --------------------------------------------------------------------------------------------------------------

GQA = {
    "201": ("n1", "Is the sky dark?", "no", "verify", "attr"),
    "202": ("n1", "Which side is the chair on?", "left", "choose", "rel"),
    "203": ("n2", "What is it?", "dining table", "query", "obj"),
    "204": ("n2", "Who is it?", "man", "query", "obj"),
}


def _official(id):
    image, text, answer, structural, semantic = GQA[id]
    return {
        "question": text,
        "answer": answer,
        "imageId": image,
        "isBalanced": id != "204",
        "types": {"structural": structural, "semantic": semantic, "detailed": f"{semantic}Fine"},
        "semantic": [{"operation": "select", "argument": "it", "dependencies": []}] * (2 if id == "203" else 1),
    }


def gqa_files(root):
    folder = root / "gqa"
    write_json(folder / "data" / "testdev_balanced_questions.json", {id: _official(id) for id in GQA})
    lines = [{"question_id": id, "image": f"{q[0]}.jpg", "text": q[1] + SHORT} for id, q in GQA.items()]
    write_jsonl(folder / "llava_gqa_testdev_balanced.jsonl", lines)
    write_images(folder / "data" / "images", "n1.jpg", "n2.jpg")


def gqa_tables(root):
    rows = [{"id": id, **_official(id)} for id in GQA]
    write_table(root / "testdev_balanced_instructions" / "testdev-00000-of-00001.parquet", rows)
    images = [{"id": name, "image": stored(name)} for name in ("n2", "n1")]
    write_table(root / "testdev_balanced_images" / "testdev-00000-of-00001.parquet", images)


# --- VizWiz -----------------------------------------------------------------------------------------------------------

VIZWIZ = [  # number, question, ten answers
    (0, "What is this?", ["unanswerable"] * 6 + ["a can"] * 4),
    (1, "How many are there?", ["none"] * 3 + ["zero"] + ["5"] * 6),
    (2, "colour? Thank you. ", ["blue"] * 1 + ["navy"] * 9),
]


def vizwiz_files(root):
    folder = root / "vizwiz"
    known = [
        {
            "image": f"VizWiz_val_{n:08d}.jpg",
            "question": text,
            "answers": [{"answer": answer, "answer_confidence": "yes"} for answer in answers],
            "answer_type": "other",
            "answerable": 1,
        }
        for n, text, answers in VIZWIZ
    ]
    write_json(folder / "val.json", known)
    write_images(folder / "val", *(record["image"] for record in known))
    names = [f"VizWiz_test_{n:08d}.jpg" for n, _, _ in VIZWIZ]
    lines = [
        {"question_id": name, "image": name, "text": text.capitalize() + UNANSWERABLE + SHORT}
        for name, (_, text, _) in zip(names, VIZWIZ, strict=True)
    ]
    write_jsonl(folder / "llava_test.jsonl", lines)
    write_json(folder / "test.json", [{"image": name, "question": "?"} for name in names])
    write_images(folder / "test", *names)


def vizwiz_tables(root):
    for split in ("val", "test"):
        rows = [
            {
                "question_id": f"VizWiz_{split}_{n:08d}.jpg",
                "question": text,
                "answers": answers if split == "val" else None,
                "category": "other",
                "image": stored(n),
            }
            for n, text, answers in VIZWIZ
        ]
        write_table(root / "data" / f"{split}-00000-of-00001.parquet", rows)


# --- ScienceQA --------------------------------------------------------------------------------------------------------

SCIENCE = {  # id -> question, choices, answer, hint, with image
    "4": ("Which is solid?", ["milk", "rock"], 1, "", True),
    "5": ("Which is largest?", ["ant", "cat", "whale"], 2, "Look at the picture.", True),
    "7": ("Which word is a verb?", ["run", "sun"], 0, "", False),
    "8": ("Which flies?", ["bird", "fish"], 0, "", True),
}


def science_prompt(id):
    text, choices, _, hint, _ = SCIENCE[id]
    options = "".join(f"\n{letter}. {choice}" for letter, choice in zip("ABC", choices, strict=False))
    return (f"Context: {hint}\n" if hint else "") + text + options


def science_qa_files(root):
    folder = root / "scienceqa"
    problems = {
        id: {
            "question": text,
            "choices": choices,
            "answer": answer,
            "hint": hint,
            "image": "image.png" if image else None,
            "subject": "natural science" if image else "language science",
        }
        for id, (text, choices, answer, hint, image) in SCIENCE.items()
    }
    write_json(folder / "problems.json", problems)
    write_json(folder / "pid_splits.json", {"test": list(SCIENCE), "train": ["1"]})
    prepared = [
        {
            "id": id,
            **({"image": f"{id}/image.png"} if SCIENCE[id][4] else {}),
            "conversations": [
                {"from": "human", "value": ("<image>\n" if SCIENCE[id][4] else "") + science_prompt(id) + "\n"},
                {"from": "gpt", "value": "ABC"[SCIENCE[id][2]]},
            ],
        }
        for id in SCIENCE
    ]
    write_json(folder / "llava_test_CQM-A.json", prepared)
    write_images(folder / "images" / "test", *(f"{id}/image.png" for id in SCIENCE if SCIENCE[id][4]))


def science_qa_tables(root):
    """Questions with an image alone, which have no id there."""
    rows = [
        {"image": stored(id), "question": text, "choices": choices, "answer": answer, "hint": hint}
        for id, (text, choices, answer, hint, image) in SCIENCE.items()
        if image
    ]
    write_table(root / "ScienceQA-IMG" / "test-00000-of-00001.parquet", rows)
    write_table(root / "ScienceQA-FULL" / "test-00000-of-00001.parquet", [{**rows[0], "image": None}, *rows])


# --- TextVQA ----------------------------------------------------------------------------------------------------------

TEXTVQA = [  # id, image, question, ten answers, tokens
    (901, "aa1", "what brand is it?", ["Nokia"] * 4 + ["nokia phone"] * 6, ["NOKIA", "3310"]),
    (902, "aa1", "what number?", ["1,000"] * 2 + ["1000"] * 1 + ["10"] * 7, []),
    (903, "bb2", "whose shop?", ["John's"] * 1 + ["the John's"] * 1 + ["x"] * 8, ["John's"]),
]


def text_vqa_files(root):
    folder = root / "textvqa"
    known = [
        {"question_id": id, "image_id": image, "question": text, "answers": answers, "image_classes": []}
        for id, image, text, answers, _ in TEXTVQA
    ]
    write_json(folder / "TextVQA_0.5.1_val.json", {"data": known, "dataset_type": "val"})
    lines = [
        {
            "question_id": image,
            "image": f"{image}.jpg",
            "text": f"{text.capitalize()}\nReference OCR token: {', '.join(tokens)}{SHORT}",
        }
        for _, image, text, _, tokens in reversed(TEXTVQA)
    ]
    write_jsonl(folder / "llava_textvqa_val_v051_ocr.jsonl", lines)
    write_images(folder / "train_images", "aa1.jpg", "bb2.jpg")


def text_vqa_tables(root):
    rows = [
        {
            "image_id": image,
            "question_id": id,
            "question": text,
            "image": stored(image),
            "answers": answers,
            "ocr_tokens": tokens,
        }
        for id, image, text, answers, tokens in TEXTVQA
    ]
    write_table(root / "data" / "validation-00000-of-00001.parquet", rows)


# --- POPE -------------------------------------------------------------------------------------------------------------

POPE = {  # setting -> questions: id in it, image, thing, label
    "adversarial": [
        (1, "im1", "dog", "yes"),
        (2, "im1", "cat", "no"),
        (3, "im2", "car", "yes"),
        (4, "im2", "bus", "no"),
    ],
    "popular": [(1, "im1", "dog", "yes"), (2, "im1", "person", "no")],
    "random": [(1, "im1", "dog", "yes"), (2, "im1", "pear", "no"), (3, "im2", "cup", "yes")],
}


def _there(thing):
    return f"Is there a {thing} in the image?"


def pope_files(root):
    folder = root / "pope"
    lines = [
        {"question_id": id, "image": f"{image}.jpg", "text": _there(thing) + SHORT, "category": setting}
        for setting, questions in POPE.items()
        for id, image, thing, _ in questions
    ]
    write_jsonl(folder / "llava_pope_test.jsonl", lines)
    for setting, questions in POPE.items():
        labels = [
            {"question_id": id + 100, "image": f"{image}.jpg", "text": _there(thing), "label": label}
            for id, image, thing, label in reversed(questions)  # not by position
        ]
        write_jsonl(folder / "coco" / f"coco_pope_{setting}.json", labels)
    write_images(folder / "val2014", "im1.jpg", "im2.jpg")


def _pope_rows(setting):
    return [
        {
            "question_id": str(id),
            "question": _there(thing),
            "answer": label,
            "image_source": image,
            "image": stored(image),
        }
        for id, image, thing, label in POPE[setting]
    ]


def pope_tables(root):
    for setting in POPE:
        write_table(root / "Full" / f"{setting}-00000-of-00001.parquet", _pope_rows(setting))
    every = [{**row, "category": setting} for setting in POPE for row in _pope_rows(setting)]
    write_table(root / "data" / "test-00000-of-00001.parquet", every)


def pope_one_table(root):
    """The settings in a column."""
    every = [{**row, "category": setting} for setting in POPE for row in _pope_rows(setting)]
    write_table(root / "all.parquet", every)


# --- MMBench ----------------------------------------------------------------------------------------------------------

MMBENCH = [  # index, question, hint, options, answer, category, image
    (7, "What is it?", "Look.", ["cat", "dog"], "B", "object", "p1"),
    (1_000_007, "What is it?", "Look.", ["dog", "cat"], "A", "object", "p1"),
    (9, "Which\ncolour?", "", ["red", "NA", "None"], "A", "attribute", "p2"),
    (1_000_009, "Which\ncolour?", "", ["NA", "None", "red"], "C", "attribute", "p2"),
    (2_000_009, "Which\ncolour?", "", ["None", "red", "NA"], "B", "attribute", "p2"),
]


def _mmbench(empty, l2):
    for index, text, hint, options, answer, category, image in MMBENCH:
        letters = dict(zip("ABCD", [*options, empty, empty], strict=False))
        yield (
            {"index": index, "question": text, "hint": hint or empty, **letters, "answer": answer, "category": category}
            | {"source": "s", l2: f"{category} group", "comment": empty, "split": "dev"},
            image,
        )


def mmbench_files(root, reference=False):
    """With `reference` the image of a later row is the index of the first with it."""
    rows, first = [], {}
    for row, image in _mmbench("", "l2-category"):
        cell = base64.b64encode(f"the image {image}".encode()).decode()
        if reference and image in first:
            cell = first[image]
        first.setdefault(image, row["index"])
        rows.append({**row, "image": cell})
    write_tsv(root / "mmbench" / "mmbench_dev_20230712.tsv", rows)


def mmbench_tables(root):
    rows = [{**row, "image": stored(image)} for row, image in _mmbench("nan", "L2-category")]
    write_table(root / "en" / "dev-00000-of-00001.parquet", rows)
    write_table(root / "cn" / "dev-00000-of-00001.parquet", rows)
