"""Run benchmarks and write what they find: `python -m perf [PART …]`; without a part, all that need no GPU."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from perf import (
    ablation,
    answering,
    balance,
    data,
    decoding,
    end_to_end,
    generation,
    gpu,
    loader,
    memory,
    prepare,
    scaling,
    sharded,
    step,
)

_MODULES = (
    step,
    ablation,
    balance,
    data,
    loader,
    prepare,
    decoding,
    end_to_end,
    generation,
    answering,
    memory,
    scaling,
    sharded,
    gpu,
)
PARTS = {part.__name__.split(".")[1]: part for part in _MODULES}


def table(rows: list[dict]) -> str:
    """Rows as a table in Markdown."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [columns, ["---"] * len(columns), *[[_text(row.get(name)) for name in columns] for row in rows]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
    return "" if value is None else str(value)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m perf", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--repeats", type=int, default=5, help="turns that are counted (default: %(default)s)")
    parser.add_argument("--bf16", action="store_true", help="mixed precision instead of float32")
    parser.add_argument("--out", type=Path, default=Path("outputs/bench"), help="folder (default: %(default)s)")
    options = parser.parse_args(arguments)
    if unknown := sorted(set(options.parts) - set(PARTS)):
        parser.error(f"no benchmark is called {', '.join(unknown)}; there are: {', '.join(PARTS)}")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    options.out.mkdir(parents=True, exist_ok=True)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    machine = {
        "torch": torch.__version__,
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "gpu": device,
    }
    for name in options.parts or [name for name in PARTS if name != "gpu"]:
        part = PARTS[name]
        rows = part.run(options.repeats, options.bf16)
        if not rows:
            continue
        found = {
            "what": part.HEADER,
            "machine": machine,
            "bf16": options.bf16,
            "repeats": options.repeats,
            "rows": rows,
        }
        path = options.out / f"{name}{'-bf16' if options.bf16 else ''}.json"
        path.write_text(json.dumps(found, indent=1) + "\n")
        print(f"\n## {name}\n{part.HEADER}\n\n{table(rows)}\n\n{path}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
