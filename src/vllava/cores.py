"""How many cores of its machine a process may use."""

from __future__ import annotations

import os

LIMITS = ("OMP_NUM_THREADS", "SLURM_CPUS_PER_TASK")  # in the environment: whoever starts several shares them out


def cores() -> int:
    """The cores that this process may use: those it is bound to, and no more than the environment says."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    said = [int(value) for name in LIMITS if (value := os.environ.get(name, "")).isdigit() and int(value) > 0]
    return min([bound, *said])
