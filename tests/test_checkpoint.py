"""Checkpoints from strangers: what does not fit is refused in one paragraph, nothing of theirs is run."""

import json
import logging
import os
import pickle
import re
import resource
import shutil
import struct
import sys
import traceback
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import TOKENIZER
from safetensors.torch import load_file, save_file

from vllava import chat, convert
from vllava.errors import UserError
from vllava.model.build import fresh_llm, languagebind, load_llm, load_tokenizer, video_llava
from vllava.model.checkpoint import Description, load, load_projector, read_description, save_trained
from vllava.model.encoders import ClipEncoder, MaeEncoder
from vllava.model.files import Checkpoint, read_tensors
from vllava.model.lora import Lora, add_lora, merged

UP = "model.layers.0.mlp.up_proj.weight"
SIZES = {
    **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    "num_key_value_heads": 2,
}


def edit_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    tensors = change(dict(tensors)) or tensors
    save_file({name: value.clone() for name, value in tensors.items()}, folder / "model.safetensors", {"format": "pt"})


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_header(path, change):
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    changed = change(header)
    written = changed if isinstance(changed, bytes) else json.dumps(changed or header).encode()
    path.write_bytes(struct.pack("<Q", len(written)) + written + data[8 + length :])


def pickled(folder, change=lambda tensors: tensors, **how):
    """The weights as pytorch_model.bin instead."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(change(tensors), folder / "pytorch_model.bin", **how)


def sharded(folder, change=lambda weight_map: weight_map):
    """The weights in two files with an index instead."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {name: f"model-0000{1 + index % 2}-of-00002.safetensors" for index, name in enumerate(sorted(tensors))}
    for file in set(weight_map.values()):
        save_file({name: tensors[name].clone() for name in weight_map if weight_map[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": change(weight_map)}))


def without(name):
    return lambda tensors: {key: value for key, value in tensors.items() if key != name}


@pytest.fixture
def llm_folder(make_llm, tmp_path):
    make_llm().save_pretrained(tmp_path / "llm")
    load_tokenizer(str(TOKENIZER)).save_pretrained(tmp_path / "llm")
    return tmp_path / "llm"


# --- the tensors of a language model ----------------------------------------------------------------------------------

UNFIT = {
    "missing": (without(UP), rf"does not fit LlamaForCausalLM: missing: {UP}\."),
    "left over": (lambda t: {**t, "model.vision.weight": torch.zeros(2)}, r"left over: model\.vision\.weight\."),
    "all renamed": (lambda t: {f"module.{n}": v for n, v in t.items()}, r"missing: .* and 30 more\."),
    "renamed": (
        lambda t: {n.replace("up_proj", "up"): v for n, v in t.items()},
        rf"missing: {UP}; .*left over: .*mlp\.up\.",
    ),
    "another shape": (lambda t: {**t, UP: torch.zeros(7, 5)}, rf"shape \(7, 5\), expected \(64, 32\): {UP}\."),
    "whole numbers": (lambda t: {**t, UP: t[UP].to(torch.int8)}, rf"int8, expected numbers of 16 bits or more: {UP}\."),
    "eight bits": (lambda t: {**t, UP: t[UP].to(torch.float8_e4m3fn)}, rf"float8_e4m3fn, expected .*{UP}"),
    "no output layer": (without("lm_head.weight"), r"missing: lm_head\.weight\."),
}


@pytest.mark.parametrize("kind", UNFIT)
def test_a_language_model_with_other_tensors_is_refused_by_name_and_without_a_table(llm_folder, kind, capfd):
    change, words = UNFIT[kind]
    edit_tensors(llm_folder, change)
    with pytest.raises(UserError, match=words):
        load_llm(str(llm_folder))
    shown = capfd.readouterr()
    assert "REPORT" not in shown.out + shown.err


@pytest.mark.parametrize(
    "how", ["as saved", "no prefix", "constants", "half", "pickled", "pickled, old", "sharded", "names a kernel"]
)
def test_a_language_model_in_any_right_form_is_the_same(make_llm, llm_folder, how):
    change = {
        "no prefix": lambda t: {n.removeprefix("model."): v for n, v in t.items()},
        "constants": lambda t: {**t, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)},
        "half": lambda t: {n: v.half() for n, v in t.items()},
    }
    if how in change:
        edit_tensors(llm_folder, change[how])
    elif how.startswith("pickled"):
        pickled(llm_folder, _use_new_zipfile_serialization=how == "pickled")
    elif how == "sharded":
        sharded(llm_folder)
    elif how == "names a kernel":  # which `transformers` would look for on a hub, and run
        edit_json(llm_folder / "config.json", attn_implementation="some/kernel")
    found, expected = load_llm(str(llm_folder)), make_llm()
    for name, value in expected.state_dict().items():
        wanted = value.half().float() if how == "half" else value
        assert torch.equal(found.state_dict()[name], wanted), name
    assert found.generation_config.eos_token_id == expected.generation_config.eos_token_id == 1
    assert found.sha256 == Checkpoint(llm_folder).sha256 and found.folder == llm_folder


def test_tied_weights_are_rightly_absent_where_the_settings_say_so(make_llm, tmp_path):
    make_llm(tie_word_embeddings=True).save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    llm = load_llm(str(tmp_path))
    assert torch.equal(llm.lm_head.weight, make_llm(tie_word_embeddings=True).lm_head.weight)
    edit_json(tmp_path / "config.json", tie_word_embeddings=False)
    with pytest.raises(UserError, match=r"missing: lm_head\.weight"):
        load_llm(str(tmp_path))


def test_a_fresh_model_starts_from_one_of_its_own_sizes_only(llm_folder, image_folder, tmp_path):
    assert torch.equal(
        fresh_llm(str(TOKENIZER), **SIZES, start_from=str(llm_folder)).state_dict()[UP],
        load_file(llm_folder / "model.safetensors")[UP],
    )
    with pytest.raises(UserError, match=rf"{llm_folder} is not of the sizes asked for: shape \(32, 64\)"):
        fresh_llm(str(TOKENIZER), **{**SIZES, "intermediate_size": 48}, start_from=str(llm_folder))
    tower = {"intermediate_size": 64, "num_attention_heads": 4, "hidden_act": "quick_gelu"}
    vision = {**tower, "hidden_size": 16, "num_hidden_layers": 3, "image_size": 32, "patch_size": 16}
    text = {**tower, "hidden_size": 32, "num_hidden_layers": 1, "max_position_embeddings": 16}
    with pytest.raises(UserError, match=rf"{image_folder} does not fit: shape"):
        languagebind(vision, text, 16, str(TOKENIZER), start_from=str(image_folder))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_named_in_a_warning(llm_folder, image_folder, value, caplog):
    edit_tensors(llm_folder, lambda t: {**t, UP: t[UP].index_fill(0, torch.tensor(3), value)})
    with caplog.at_level(logging.WARNING):
        load_llm(str(llm_folder))
        assert caplog.messages == [f"{llm_folder} has weights that are no numbers (NaN or infinite): {UP}"]
        ClipEncoder(str(image_folder), "image")
    assert len(caplog.messages) == 1


# --- what a stranger's checkpoint may not do --------------------------------------------------------------------------


class Trap:
    """Ends the process when it is unpickled."""

    def __reduce__(self):
        return os._exit, (77,)


def announce(**entry):
    """Let a tensor's header say something else."""
    return lambda folder: edit_header(folder / "model.safetensors", lambda h: h[sorted(h)[-1]].update(entry))


def lie_in_zip(folder):
    pickled(folder)
    source = zipfile.ZipFile(folder / "pytorch_model.bin")
    largest = max(source.infolist(), key=lambda member: member.file_size).filename
    members = {member.filename: source.read(member) for member in source.infolist()}
    with zipfile.ZipFile(folder / "pytorch_model.bin", "w") as target:
        for name, data in members.items():
            target.writestr(name, data[:4] if name == largest else data)


def bomb(folder):
    pickled(folder)
    with zipfile.ZipFile(folder / "pytorch_model.bin", "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("pytorch_model/data/bomb", bytes(1 << 26))


def remote_code(folder):
    edit_json(
        folder / "config.json", model_type="own", auto_map={"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}
    )
    (folder / "own.py").write_text("import os\nos._exit(77)\n")


def index(**changes):
    return lambda folder: sharded(folder, lambda weight_map: {**weight_map, **changes})


def config(**changes):
    def edit(folder):
        given = json.loads((folder / "config.json").read_text())
        given.get("vision_config", given).update(changes)
        (folder / "config.json").write_text(json.dumps(given))

    return edit


ANY = {  # what is done to a folder of weights, and words of the answer
    "a cut file": (lambda f: os.truncate(f / "model.safetensors", 9000), "cannot be read .*complete"),
    "an empty file": (lambda f: os.truncate(f / "model.safetensors", 0), "cannot be read"),
    "more bytes than tensors": (
        lambda f: (f / "model.safetensors").open("ab").write(b"12345678"),
        "tensors end at byte",
    ),
    "a header longer than the file": (
        lambda f: (f / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 62) + b"{}"),
        "announces a header of 4,611,686,018,427,387,904 bytes",
    ),
    "a header deeply nested": (
        lambda f: edit_header(f / "model.safetensors", lambda _: b"[" * 500_000),
        "recursion",
    ),
    "a name twice": (
        lambda f: edit_header(f / "model.safetensors", lambda h: json.dumps(h)[:-1].encode() + b', "a": 1, "a": 2}'),
        "twice",
    ),
    "a shape larger than its bytes": (announce(shape=[10**12]), r"of shape \[1000000000000\] has"),
    "a negative shape": (announce(shape=[-1, -1]), "negative"),
    "offsets beyond the end": (announce(shape=[1], data_offsets=[10**15, 10**15 + 4]), "ends at byte"),
    "an unknown type": (announce(dtype="Q3_K"), "unknown type, Q3_K"),
    "pickled code": (lambda f: pickled(f, lambda t: {**t, "x": Trap()}), "never run"),
    "pickled code alone": (
        lambda f: (
            (f / "model.safetensors").rename(f / "x") and (f / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
        ),
        "never run",
    ),
    "a list of tensors": (lambda f: pickled(f, lambda t: list(t.values())), "holds a list"),
    "nested tensors": (lambda f: pickled(f, lambda t: {"state_dict": t}), "'state_dict' is no plain tensor"),
    "a tensor of one number repeated": (
        lambda f: pickled(f, lambda t: {**t, min(t): torch.zeros(1).expand(10**12)}),
        "tensors have 4,000,",
    ),
    "fewer bytes than announced in a zip": (lie_in_zip, "other sizes than it holds"),
    "a zip that unpacks to more": (bomb, "compressed"),
    "a shard that is not there": (index(x="model-00003-of-00002.safetensors"), "lacks files that its .*00003"),
    "an index that names a file elsewhere": (index(x="../../x.safetensors"), r"may not name: \.\./\.\./x"),
    "an index that names a tensor nowhere": (index(x="model-00001-of-00002.safetensors"), "its index lists: x"),
    "an index of numbers": (index(x=5), "weight_map"),
    "an index without a map": (lambda f: sharded(f, lambda _: {}), "weight_map"),
    "settings deeply nested": (lambda f: (f / "config.json").write_text("[" * 500_000), "config.json cannot be read"),
    "settings in a list": (lambda f: (f / "config.json").write_text("[]"), "holds a list"),
    "settings of 20 MB": (lambda f: (f / "config.json").write_text(" " * (20 << 20)), "20,971,520 bytes"),
    "a size in words": (config(hidden_size="abc"), "hidden_size"),
    "no size": (config(hidden_size=None), "hidden_size"),
    "a negative size": (config(hidden_size=-1), "hidden_size=-1"),
    "a size beyond memory": (config(intermediate_size=10**12), "intermediate_size=1000000000000"),
    "layers beyond time": (config(num_hidden_layers=10**9), "num_hidden_layers=1000000000"),
    "another size": (config(hidden_size=64), r"shape \(.*expected \(.*64"),
}
OF_LLM = {
    "code of its own": (remote_code, r"needs program code of its own \(auto_map .*never run"),
    "quantised": (lambda f: edit_json(f / "config.json", quantization_config={"quant_method": "gptq"}), "is quantised"),
    "adapters": (lambda f: (f / "adapter_config.json").write_text("{}"), "holds adapters"),
    "an unknown kind": (config(model_type="zzz"), "zzz"),
    "a kind that is no language model": (config(model_type="clip"), "a clip is not among the causal LMs"),
    "a vocabulary beyond memory": (config(vocab_size=10**7), r"expected \(10000000, 32\)"),
    "heads of 10^7 numbers": (config(head_dim=10**7), "expected"),
    "generation settings in a list": (
        lambda f: (f / "generation_config.json").write_text("[]"),
        "generation_config.json",
    ),
}
BUILD = {
    "llm": lambda folder: load_llm(str(folder)),
    "image": lambda folder: ClipEncoder(str(folder), "image"),
    "mae": lambda folder: MaeEncoder(str(folder)),
}


def in_a_process_of_its_own(call, path):
    """How a forked process with a GiB more than this one, and 30 seconds, fares: its exit code and what it wrote."""
    process = os.fork()
    if process == 0:
        code = 3
        try:
            torch.set_num_threads(1)  # the threads of the process that forked are not there
            with open(path, "w", errors="backslashreplace") as sys.stderr:
                pages = int(Path("/proc/self/statm").read_text().split()[0])
                resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (1 << 30),) * 2)
                resource.setrlimit(resource.RLIMIT_CPU, (30, 30))
                try:
                    call()
                    code = 0
                except UserError as error:
                    print(error.paragraph, file=sys.stderr)
                    code = 1
                except SystemExit as error:
                    print(str(error.code).removeprefix("error: "), file=sys.stderr)
                    code = 1
                except BaseException:
                    traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), path.read_text()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("kind", ["llm", "image", "mae"])
def test_damaged_and_hostile_weights_end_in_one_paragraph_within_time_and_memory(
    kind, llm_folder, image_folder, mae_folder, tmp_path
):
    source = {"llm": llm_folder, "image": image_folder, "mae": mae_folder}[kind]
    for name, (harm, words) in {**ANY, **(OF_LLM if kind == "llm" else {})}.items():
        folder = tmp_path / "stranger's"
        shutil.copytree(source, folder)
        harm(folder)
        code, text = in_a_process_of_its_own(lambda: BUILD[kind](folder), tmp_path / "log")  # noqa: B023
        assert code == 1 and re.search(words, text) and text.count("\n") == 1 and len(text) < 3000, (name, code, text)
        shutil.rmtree(folder)


# --- a projector and the LLM it was trained with ----------------------------------------------------------------------


@pytest.fixture
def trained(llm_folder, image_folder, video_folder, tmp_path):
    """A checkpoint as a stage writes it, from the LLM of a folder."""

    def make(names, llm=llm_folder, folder="run", **adapters):
        encoders = {
            kind: {"_target_": "vllava.model.encoders.ClipEncoder", "path": str(path), "medium": kind}
            for kind, path in (("image", image_folder), ("video", video_folder))
        }
        model = with_encoders(llm, image_folder, video_folder, **adapters)
        model.llm = merged(model.llm)
        description = Description(encoders, str(llm), "vicuna_v1", "pad", names)
        save_trained(model, load_tokenizer(str(TOKENIZER)), description, tmp_path / folder)
        return tmp_path / folder

    return make


def with_encoders(llm, image, video, **adapters):
    built = load_llm(str(llm))
    built = add_lora(built, Lora(**adapters)) if adapters else built
    return video_llava(built, ClipEncoder(str(image), "image"), ClipEncoder(str(video), "video"))


@pytest.fixture
def another_llm(make_llm, tmp_path):
    make_llm(seed=1).save_pretrained(tmp_path / "another")
    return tmp_path / "another"


def test_a_projector_goes_with_the_llm_it_was_trained_with_and_no_other(
    trained, llm_folder, another_llm, image_folder, video_folder
):
    projector = trained(["projector"]) / "projector.safetensors"
    towers = image_folder, video_folder
    for adapters in ({}, {"r": 2, "alpha": 4}):  # stage 2, whole or by adapters
        load_projector(with_encoders(llm_folder, *towers, **adapters), projector)
        with pytest.raises(UserError, match=rf"trained with another LLM than {another_llm} \(their hashes differ"):
            load_projector(with_encoders(another_llm, *towers, **adapters), projector)


@pytest.mark.parametrize("recorded", [True, False])
def test_a_projector_trained_together_with_its_llm_belongs_to_that_one(
    trained, llm_folder, image_folder, video_folder, recorded
):
    run = trained(["projector", "llm"])
    edit_tensors(run / "llm", lambda t: {**t, UP: t[UP] + 1})  # as training would
    description = json.loads((run / "vllava.json").read_text())
    description["sha256"]["llm"] = Checkpoint(run / "llm").sha256
    if not recorded:  # as by earlier versions
        del description["sha256"]["llm"]
    (run / "vllava.json").write_text(json.dumps(description))
    towers = image_folder, video_folder
    load_projector(with_encoders(run / "llm", *towers), run / "projector.safetensors")
    with pytest.raises(UserError, match=rf"another LLM than {llm_folder}"):
        load_projector(with_encoders(llm_folder, *towers), run / "projector.safetensors")


def test_the_hash_of_a_trained_llm_is_that_of_what_was_written(trained):
    run = trained(["projector", "llm.*.lora_*"], r=2, alpha=4)
    assert read_description(run).sha256["llm"] == Checkpoint(run / "llm").sha256
    load(run)
    edit_tensors(run / "llm", lambda t: {**t, UP: t[UP] + 1})
    with pytest.raises(UserError, match=rf"{run} was trained with another LLM than {run / 'llm'}"):
        load(run)


def test_an_llm_named_by_its_hub_id_is_known_by_its_hash_too(trained, llm_folder, tmp_path, monkeypatch):
    (tmp_path / "cached").mkdir()
    llm_folder.rename(tmp_path / "cached" / "llm")
    from vllava.model import files

    monkeypatch.setattr(
        files, "snapshot_download", lambda name, **_: {"lmsys/vicuna": str(tmp_path / "cached/llm")}[name]
    )
    run = trained(["projector"], "lmsys/vicuna")
    assert read_description(run).sha256["llm"] == Checkpoint(tmp_path / "cached" / "llm").sha256
    load_llm("lmsys/vicuna")
    edit_tensors(tmp_path / "cached" / "llm", lambda t: {**t, UP: t[UP] + 1})
    with pytest.raises(UserError, match="another LLM"):
        load_projector(
            video_llava(
                load_llm("lmsys/vicuna"), ClipEncoder(read_description(run).encoders["image"]["path"], "image")
            ),
            run / "projector.safetensors",
        )


# --- descriptions and commands ----------------------------------------------------------------------------------------


def described(**changes):
    return lambda run: edit_json(run / "vllava.json", **changes)


def encoder(**changes):
    def edit(run):
        encoders = json.loads((run / "vllava.json").read_text())["encoders"]
        encoders["video"] |= changes
        edit_json(run / "vllava.json", encoders=encoders)

    return edit


DESCRIPTIONS = {
    **{
        f"{key}={value!r:.9}": (described(**{key: value}), key)
        for key in ("encoders", "llm", "trained")
        for value in (5, None, [5])
    },
    "sha256 in a list": (described(sha256=["x"]), "sha256 is"),
    "a key of another program": (described(zzz=1), "zzz"),
    "a list": (lambda run: (run / "vllava.json").write_text("[]"), "holds a list"),
    "deeply nested": (lambda run: (run / "vllava.json").write_text("[" * 500_000), "recursion"),
    "no text": (lambda run: (run / "vllava.json").write_bytes(b"\xff\xfe\0\x81"), "vllava.json cannot be read"),
    "a third medium": (described(encoders={"audio": {}}), "encoders is"),
    "frames beyond memory": (encoder(frames=10**9), "frames=1000000000"),
    "frames in words": (encoder(frames="eight"), "frames='eight'"),
    "a layer in words": (encoder(feature_layer="last"), "feature_layer='last'"),
    "a path that is none": (encoder(path="x\0y"), "No checkpoint"),
    "a path without end": (encoder(path="x" * 5000), "File name too long"),
    "an llm without end": (described(llm="x" * 5000), "File name too long"),
    "a program": (encoder(_target_="os.system", path="x"), r"os\.system.*not loaded"),
    "a module that is none": (encoder(_target_="vllava.model.encoders.a.b.C"), "not loaded"),
    "a cut projector": (
        lambda run: os.truncate(run / "projector.safetensors", 5000),
        "projector.safetensors cannot be read",
    ),
    "a projector of code": (
        lambda run: (run / "projector.safetensors").write_bytes(pickle.dumps(Trap())),
        "cannot be read",
    ),
}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_hostile_descriptions_end_in_one_paragraph_at_the_command_line(trained, tmp_path):
    run = trained(["projector"])
    kept = {name: (run / name).read_bytes() for name in ("vllava.json", "projector.safetensors")}
    for name, (harm, words) in DESCRIPTIONS.items():
        harm(run)
        code, text = in_a_process_of_its_own(lambda: chat.main(["--checkpoint", str(run), "Hello"]), tmp_path / "log")
        assert code == 1 and re.search(words, text) and text.count("\n") == 1 and len(text) < 3000, (name, code, text)
        for file, data in kept.items():
            (run / file).write_bytes(data)
    load(run)


def test_a_converted_checkpoint_never_takes_the_place_of_the_users_files(trained, tmp_path, capsys):
    run, out = trained(["projector", "llm"]), tmp_path / "out"
    export = ["export", str(run), str(out), "--to", "original"]
    assert convert.main(export) == 0 and convert.main(export) == 0  # our own earlier output is replaced
    (out / "results.csv").write_text("mine")
    with pytest.raises(SystemExit, match=r"error: .*results\.csv.*--overwrite"):
        convert.main(export)
    assert (out / "results.csv").read_text() == "mine"
    base = read_description(run).encoders["image"]["path"]
    for place in (run, run / "llm", run.parent, base, "", ".", "/", run / "vllava.json"):
        for more in ([], ["--overwrite"]):
            with pytest.raises(SystemExit, match="error: "):
                convert.main(["export", str(run), str(place), "--to", "original", *more])
    load(run)  # all there
    assert convert.main([*export, "--overwrite"]) == 0
    assert not (out / "results.csv").exists()
    again = ["import", str(out), str(tmp_path / "again")]
    assert convert.main(again) == 0 and convert.main(again) == 0
    with pytest.raises(SystemExit, match=r"error: .*being read"):
        convert.main(["import", str(out), str(out), "--overwrite"])
    assert read_tensors(out / "model.safetensors")
