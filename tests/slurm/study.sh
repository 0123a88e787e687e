#!/bin/bash
# A study whose runs are jobs of SLURM: an arm that fails, a job that is warned and requeued, and the same command again.
# What it needs is in cluster.sh.
set -euo pipefail
cd "$(dirname "$0")/../.."
source tests/slurm/cluster.sh

"$PYTHON" - "$WORK/world" <<'MAKE'
import sys
from pathlib import Path
from data_prep.toy import make
for split in ("stage1", "stage2"):
    make(split, Path(sys.argv[1]), seed=0, scale=0.04, processes=2)
MAKE
mkdir -p "$WORK/conf/study"
cat >"$WORK/conf/study/two.yaml" <<'STUDY'
# @package _global_
defaults: [base, _self_]
study:
  name: two
  baseline: images
  seeds: [1, 2]
  chain: [stage1, stage2]
  overrides: [logger=none, trainer=single, data.workers=0, preview=null, data.features=cache, data.global_batch=2]
  arms:
    images: [+ablation=image_only]
    fails: [+ablation=image_only, "+data.stage2.mixture={video: 2}"]
STUDY
STUDY="$PYTHON train.py +study=two world=$WORK/world runs=$WORK/runs hydra.searchpath=[file://$WORK/conf]"
SLURM="hydra/launcher=submitit_slurm hydra.launcher.cpus_per_task=1"

$STUDY $SLURM >"$WORK/first.log" 2>&1 &
study=$!
steps() { cat "$WORK"/runs/stage2-image_only-s1-*/history.jsonl 2>/dev/null | wc -l; }
for _ in $(seq 900); do [ "$(steps)" -ge 5 ] && break; sleep 0.2; done
job=$(squeue -h -t running -o %A | head -1)
timeout 1 scancel --signal=USR1 "$job" || true # as SLURM warns before a time limit; it would send it again
code=0
wait $study || code=$?
cat "$WORK/first.log"
[ $code -eq 1 ]
grep -q "fails-s1 failed: stage2: data.mixture names 'video'" "$WORK/first.log"
grep -q "2 finished, 2 failed of 4 runs" "$WORK/first.log"
grep -l "resuming the interrupted run" "$WORK"/runs/study-two/logs/*.log

$STUDY arm=images >"$WORK/second.log" 2>&1
[ "$(grep -c "was done already" "$WORK/second.log")" -eq 4 ]
echo "slurm: a study whose runs are jobs, one of them warned and requeued, is whole"
rm -rf "$WORK"
