#!/bin/bash
# A job that SLURM warns, and that requeues itself, ends with the weights of an undisturbed run: `make slurm`.
#
# Needs Debian's packages slurmctld, slurmd, slurm-client and munge, and root. A SLURM of one node is set up below a
# temporary folder, with nothing of it in /etc, and taken down at the end.
set -euo pipefail
cd "$(dirname "$0")/../.."
ROOT=$PWD
WORK=$(mktemp -d /tmp/vllava-slurm-XXXX)
NODE=$(hostname -s)
export OMP_NUM_THREADS=1 PYTHONPATH="$ROOT/src:$ROOT" SLURM_CONF="$WORK/slurm.conf"
PYTHON="$ROOT/.venv/bin/python"

pids=()
down() { for pid in "${pids[@]}"; do kill "$pid" 2>/dev/null || true; done; }
trap down EXIT

mkdir -p "$WORK"/{state,spool,munge}
chmod 755 "$WORK" "$WORK/munge"
head -c 1024 /dev/urandom >"$WORK/munge.key"
chmod 400 "$WORK/munge.key"
munged --foreground --force --key-file="$WORK/munge.key" --socket="$WORK/munge/socket" \
    --pid-file="$WORK/munge/pid" --log-file="$WORK/munge/log" --seed-file="$WORK/munge/seed" &
pids+=($!)
cat >"$SLURM_CONF" <<CONF
ClusterName=one
SlurmctldHost=$NODE(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$WORK/munge/socket,cred_expire=5
StateSaveLocation=$WORK/state
SlurmdSpoolDir=$WORK/spool
SlurmctldPidFile=$WORK/slurmctld.pid
SlurmdPidFile=$WORK/slurmd.pid
SlurmctldPort=16817
SlurmdPort=16818
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2
MpiDefault=none
ReturnToService=2
JobRequeue=1
NodeName=$NODE NodeAddr=127.0.0.1 CPUs=$(nproc) State=UNKNOWN
PartitionName=all Nodes=$NODE Default=YES MaxTime=INFINITE State=UP
CONF
sleep 1
slurmctld -D >"$WORK/slurmctld.log" 2>&1 &
pids+=($!)
slurmd -D -N "$NODE" >"$WORK/slurmd.log" 2>&1 &
pids+=($!)
for _ in $(seq 60); do sinfo -h 2>/dev/null | grep -q idle && break; sleep 1; done
sinfo

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
