"""Fail if the demo's figures are under the bars: `python .ci/bars.py outputs/demo/metrics.json`."""

import json
import sys
from pathlib import Path


def problems(metrics: dict) -> list[str]:
    """What is under its bar."""
    found = []
    for medium, bar in (("image", 0.85), ("video", 0.75)):
        row = metrics[medium]
        if row["accuracy"] < bar:
            found.append(f"{medium} accuracy {row['accuracy']} < {bar}")
        if row["n"] < 400:
            found.append(f"{medium} n {row['n']} < 400")
        if abs(row["blind"] - row["chance"]) > 0.10:
            found.append(f"{medium} blind {row['blind']} is not within 0.10 of chance {row['chance']}")
    temporal = metrics["by_type"]["video/temporal"]
    if temporal["accuracy"] < 0.65:
        found.append(f"motion and order accuracy {temporal['accuracy']} < 0.65")
    return found


if __name__ == "__main__":
    under = problems(json.loads(Path(sys.argv[1]).read_text()))
    print("\n".join(under) or "the demo's figures are above all bars")
    sys.exit(bool(under))
