#!/bin/bash
# A job that SLURM warns, and that requeues itself, ends with the weights of an undisturbed run: `make slurm`.
# What it needs is in cluster.sh.
set -euo pipefail
cd "$(dirname "$0")/../.."
source tests/slurm/cluster.sh

"$PYTHON" - "$WORK/world" <<'MAKE'
import sys
from pathlib import Path
from data_prep.toy import make
for split in ("stage1", "eval"):
    make(split, Path(sys.argv[1]), seed=0, scale=0.04, processes=2)
MAKE
RUN="$PYTHON train.py +experiment=stage1 world=$WORK/world logger=none data.global_batch=12 data.workers=1 trainer=single"
$RUN run_dir="$WORK/whole" >"$WORK/whole.log" 2>&1

cat >"$WORK/job.sh" <<JOB
#!/bin/bash
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=$WORK/job.log
cd "$ROOT"
echo "start number \${SLURM_RESTART_COUNT:-0}"
srun $RUN run_dir=$WORK/run
code=\$?
echo "exit code \$code"
if [ \$code -eq 138 ]; then scontrol requeue \$SLURM_JOB_ID; fi
exit \$code
JOB
JOB=$(sbatch --parsable "$WORK/job.sh")
steps() { cat "$WORK/run/history.jsonl" 2>/dev/null | wc -l; }
for _ in $(seq 600); do [ "$(steps)" -ge 5 ] && break; sleep 0.2; done
scancel --signal=USR1 "$JOB" # as --signal=USR1@TIME does before the time limit: to all steps, not to the batch script
for _ in $(seq 300); do
    [ -f "$WORK/run/metrics.json" ] && ! squeue -h -j "$JOB" 2>/dev/null | grep -q . && break
    sleep 1
done
grep -v Training "$WORK/job.log" || true
grep -q "exit code 138" "$WORK/job.log"
grep -q "start number 1" "$WORK/job.log"
cmp "$WORK/whole/checkpoint/projector.safetensors" "$WORK/run/checkpoint/projector.safetensors"
echo "slurm: warned, requeued, and ended with the same bits"
rm -rf "$WORK"
