# A SLURM of one node for tests, to be sourced: below $WORK, with nothing of it in /etc, taken down at the end.
#
# Needs Debian's packages slurmctld, slurmd, slurm-client and munge, and root. Sets SLURM_CONF, PYTHON and ROOT.
set -euo pipefail
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
