"""Studies as `train.py +study=NAME` leaves them, with answers drawn from a model of how right each system is."""

import json
import math

import numpy as np

ARMS = ("united", "separated_mae", "separated_clip", "video_only", "image_only")
MEDIA = {"video_only": ("video",), "image_only": ("image",)}
COMPARED = {"better": "united"}
CLAIMS = {
    "alignment_images": {"says": "Alignment before projection helps images", "paper": "Table 5", "medium": "image",
                         "worse": ["separated_mae", "separated_clip"], **COMPARED},
    "alignment_videos": {"says": "Alignment before projection helps videos", "paper": "Figure 4", "medium": "video",
                         "worse": ["separated_mae"], **COMPARED},
    "joint_videos": {"says": "Joint training helps videos", "paper": "Table 6", "medium": "video",
                     "worse": ["video_only"], **COMPARED},
    "joint_images": {"says": "Joint training helps images", "paper": "Figure 5", "medium": "image",
                     "worse": ["image_only"], **COMPARED},
    "hallucination": {"says": "Joint training lowers hallucination", "paper": "Figure 5", "medium": "image",
                      "types": ["exist"], "worse": ["image_only"], **COMPARED},
}  # fmt: skip
TYPES = {"image": ("colour", "shape", "count"), "video": ("direction", "order", "colour")}
SETTINGS = ("random", "popular", "adversarial")


def answers(skill, media, rng_of_seed, questions=120, probes=90):
    """The lines of answers.jsonl: skill(figure) is the log-odds that an easy question is answered right."""
    lines = []
    for figure, count in {
        **dict.fromkeys(media, questions),
        **({"probes": probes} if "image" in media else {}),
    }.items():
        hard = np.random.default_rng(len(figure)).normal(0, 1.5, count)  # the same questions for all
        chance = 1 / (1 + np.exp(-(skill(figure) + rng_of_seed.normal(0, 0.05) - hard)))
        for number, right in enumerate(rng_of_seed.random(count) < chance):
            if figure == "probes":
                key, kind, options = "eval-probes", f"exist_{SETTINGS[number % 3]}", ["yes", "no"]
                truth = options[number // 3 % 2]
            else:
                novel = "novel-" if number % 5 == 0 else ""
                key, kind = f"eval-{novel}{figure}s", TYPES[figure][number % 3]
                options, truth = ["red", "blue"], "red"
            said = truth if right else next(one for one in options if one != truth)
            lines.append({
                "key": f"{key}-{number:06d}", "medium": "image" if figure == "probes" else figure, "type": kind,
                "question": f"What of {number}?", "truth": truth, "answer": said, "options": options,
                "correct": bool(right),
            })  # fmt: skip
    return lines


def metrics(lines):
    """metrics.json of such answers, as an evaluation writes it, with a blind run that is always half right."""
    found = {"by_type": {}, "seconds": 1.0}
    for medium in dict.fromkeys(line["medium"] for line in lines):
        own = [line for line in lines if line["medium"] == medium]
        parts = {line["key"].rpartition("-")[0].removeprefix("eval-") for line in own}
        row = {"blind": 0.5, "chance": 0.4}
        by_source = {
            part: {**row, "accuracy": 0.0, "n": sum(part == line["key"][5:].rpartition("-")[0] for line in own)}
            for part in sorted(parts)
        }
        found[medium] = {**row, "accuracy": sum(line["correct"] for line in own) / len(own), "n": len(own),
                         "by_source": by_source}  # fmt: skip
    return found


def history(skill, seed, steps=60):
    """The rows of history.jsonl of a run whose loss falls the lower, the more its system can."""
    rng = np.random.default_rng(seed)
    rows = []
    for step in range(1, steps + 1):
        loss = 2 * math.exp(-step / 20) + 0.5 - 0.05 * skill + float(rng.normal(0, 0.05))
        row = {"step": step, "lr": 1e-4, "loss": loss, "gradient_norm": 1.0, "samples_seen": 16.0 * step}
        rows.append({**row, "val_loss": loss + 0.1, "val_loss/image": loss + 0.2} if step % 20 == 0 else row)
    return rows


def write_study(folder, skills, seeds=(1, 2, 3), states=None, levels=None, axis=None, claims=CLAIMS, **sizes):
    """A study's folder. skills: arm -> figure -> log-odds, or a function of the level's x that gives these.

    states: (arm, seed) -> what is other about a run: its state, its error, the parts that are left.
    """
    folder.mkdir(parents=True, exist_ok=True)
    levels = levels or {"all": None}
    runs = []
    for arm in skills:
        for level, x in levels.items():
            for seed in seeds:
                other = (states or {}).get((arm, seed), {})
                name = f"{arm}-{level}-s{seed}"
                parts = {}
                skill = skills[arm](x) if callable(skills[arm]) else skills[arm]
                if other.get("state", "finished") == "finished":
                    rng = np.random.default_rng(abs(hash_of(name)))
                    lines = answers(lambda figure, s=skill: s[figure], MEDIA.get(arm, ("image", "video")), rng, **sizes)
                    parts = {part: f"../runs/{name}/{part}" for part in ("stage1", "stage2", "evaluate")}
                    for part, place in parts.items():
                        (folder / place).mkdir(parents=True)
                        if part == "evaluate":
                            text = "".join(json.dumps(line) + "\n" for line in lines)
                            (folder / place / "answers.jsonl").write_text(text)
                            (folder / place / "metrics.json").write_text(json.dumps(metrics(lines)))
                        else:
                            rows = history(max(skill.values()), seed)
                            text = "".join(json.dumps(row) + "\n" for row in rows)
                            (folder / place / "history.jsonl").write_text(text)
                runs.append({"arm": arm, "level": level, "seed": seed, "state": "finished", "error": None,
                             "parts": parts, "overrides": [], "seconds": 600.0, "ended": "2026", **other})  # fmt: skip
    content = {
        "name": "paper", "title": "The paper's ablations", "baseline": "united", "seeds": list(seeds),
        "chain": ["stage1", "stage2", "evaluate"], "arms": {arm: {"overrides": []} for arm in skills}, "axis": axis,
        "levels": {name: {"overrides": [], "chain": None, "x": x} for name, x in levels.items()},
        "claims": {name: one for name, one in claims.items() if {*one["worse"]} <= {*skills}},
        "overrides": [], "before": {}, "given": [], "runs": runs,
    }  # fmt: skip
    (folder / "study.json").write_text(json.dumps(content))
    return folder


def hash_of(name):
    """A number of a name, the same in every process."""
    return int.from_bytes(name.encode()[-12:], "little")


SKILLS = {
    "united": {"image": 3.0, "video": 2.2, "probes": 2.6},
    "separated_mae": {"image": 0.6, "video": 1.9, "probes": 0.2},
    "separated_clip": {"image": 2.7, "video": 2.1, "probes": 2.4},
    "video_only": {"video": 1.5},
    "image_only": {"image": 2.3, "probes": 2.3},
}
