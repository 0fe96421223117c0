#!/usr/bin/env bash
# Trains under Slurm and Open MPI on one machine, in two processes with two virtual devices each, and compares the
# losses with those of one process with four: undisturbed, preempted, and with one process killed. Run as root on
# Debian, in a development environment:
#
#   apt-get install slurmctld slurmd slurm-client munge openmpi-bin
#   PYTHON=.venv/bin/python deploy/test_launchers.sh
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHON=$(realpath -s "${PYTHON:-.venv/bin/python}")
work=$(mktemp -d)
export SLURM_CONF=$work/slurm.conf JAX_COMPILATION_CACHE_DIR=$work/compiled JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0
export JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=2

stop() { for pid in "$work"/*.pid; do kill "$(cat "$pid")" || true; done 2>/dev/null; rm -rf "$work"; }
trap stop EXIT

say() { printf '%s  %s\n' "$(date +%H:%M:%S)" "$*"; }
fail() { say "FAILED: $*"; tail -n 40 "$work"/*.log; exit 1; }

# --- the same small training everywhere ------------------------------------------------------------------------------

settings=$("$PYTHON" -c 'from tests.tiny import ARGUMENTS; print(*ARGUMENTS)')
settings+=" --stages=tokenizer,pretrain --pretrain.num-iterations=60 --pretrain.save-every=20 --pretrain.eval-every=30"

alike() { # RUN: its 60 losses equal those of one process, up to rounding
  "$PYTHON" - "$work/one" "$1" <<'PYTHON'
import sys
from jaxchat.runs.metrics import read_metrics

one, run = ({line["step"]: line["loss"] for line in read_metrics(run) if "loss" in line} for run in sys.argv[1:])
assert sorted(one) == sorted(run) == list(range(60)), f"steps {sorted(run)}"
worst = max(abs(run[step] / one[step] - 1) for step in one)
assert worst < 1e-3, f"the losses differ by {worst:.1e}"
print(f"          60 steps, losses equal up to a relative difference of {worst:.0e}")
PYTHON
}

reached() { # RUN STEP: waits until the run has logged that step
  for _ in $(seq 1200); do
    grep -q "\"step\": $2,.*\"loss\"" "$1/metrics.jsonl" 2>/dev/null && return
    sleep 0.1
  done
  fail "$1 has not reached step $2"
}

processes() { pgrep -f "launch.py.*--run-dir=$1( |\$)" | while read -r pid; do # RUN: its Python processes
  [[ $(readlink "/proc/$pid/exe") == *python* ]] && echo "$pid"
done; }

say "one process with four devices"
JAX_NUM_CPU_DEVICES=4 "$PYTHON" launch.py $settings --run-dir="$work/one" >"$work/one.log" 2>&1 || fail "one process"

# --- Slurm -----------------------------------------------------------------------------------------------------------

host=$(hostname -s)
head -c 1024 /dev/urandom >"$work/munge.key" && chmod 600 "$work/munge.key" && chmod 755 "$work"
munged --force --key-file="$work/munge.key" --socket="$work/munge.socket" --pid-file="$work/munged.pid" \
  --log-file="$work/munged.log" --seed-file="$work/munge.seed"
mkdir "$work/state" "$work/spool"
cat >"$SLURM_CONF" <<CONF
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
AuthInfo=socket=$work/munge.socket
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
JobRequeue=1
ReturnToService=2
MpiDefault=none
SlurmctldPidFile=$work/slurmctld.pid
SlurmdPidFile=$work/slurmd.pid
SlurmctldLogFile=$work/slurmctld.log
SlurmdLogFile=$work/slurmd.log
StateSaveLocation=$work/state
SlurmdSpoolDir=$work/spool
NodeName=$host NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=test Nodes=$host Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE
CONF
slurmctld && slurmd
for _ in $(seq 60); do sinfo -h -t idle -o %n | grep -q . && break || sleep 1; done
say "Slurm $(slurmctld -V | cut -d' ' -f2): $(sinfo -h -o '%D node, %t')"

submit() { # NAME: prints the job's number
  sbatch --parsable --nodes=1 --ntasks-per-node=2 --gpus-per-node=0 --cpus-per-task=1 --output="$work/$1.log" \
    deploy/slurm.sh $settings --run-dir="$work/$1"
}

finished() { # JOB NAME: waits until it has completed; Slurm makes a requeued job wait for two minutes
  for _ in $(seq 360); do
    case $(scontrol -o show job "$1" | grep -o "JobState=[A-Z_]*") in
      JobState=COMPLETED) return ;;
      JobState=FAILED | JobState=CANCELLED | JobState=TIMEOUT) scontrol show job "$1" && fail "job $2" ;;
      JobState=PENDING) sleep 10 && scontrol update JobId="$1" StartTime=now 2>/dev/null || true ;;
    esac
    sleep 1
  done
  fail "job $2 has not ended"
}

say "Slurm: train"
job=$(submit slurm)
finished "$job" slurm
grep -o "devices .* of 2 processes" "$work/slurm.log" | sed 's/^/          /'
alike "$work/slurm"

say "Slurm: preempt, as before the time limit"
job=$(submit preempted)
reached "$work/preempted" 25
scancel --batch --signal=TERM "$job"
finished "$job" preempted
grep -h "stopped by SIGTERM\|resuming" "$work/preempted.log" | sed 's/^/          /' | sort -u
grep -q "resuming at step" "$work/preempted.log" || fail "it was not preempted"
alike "$work/preempted"

say "Slurm: kill one of the processes"
job=$(submit killed)
reached "$work/killed" 25
kill -9 "$(processes "$work/killed" | tail -n 1)" && began=$SECONDS
until grep -q "is lost" "$work/killed.log"; do sleep 0.2; ((SECONDS - began < 60)) || fail "the other has not ended"; done
say "          the other has ended after $((SECONDS - began)) s"
finished "$job" killed
grep -h "is lost\|resuming" "$work/killed.log" | sed 's/^/          /'
alike "$work/killed"

# --- Open MPI --------------------------------------------------------------------------------------------------------

mpi() { # NAME: leaves the exit code in $code
  code=0
  mpirun --allow-run-as-root --oversubscribe -np 2 --mca odls_base_sigkill_timeout 3 \
    "$PYTHON" launch.py $settings --run-dir="$work/$1" >>"$work/$1.log" 2>&1 || code=$?
}

say "Open MPI $(mpirun --version | head -1 | grep -o '[0-9.]*$'): train"
mpi mpi
((code == 0)) || fail "mpirun: $code"
grep -o "devices .* of 2 processes" "$work/mpi.log" | sed 's/^/          /'
alike "$work/mpi"

say "Open MPI: SIGTERM to mpirun"
mpi preempted-mpi &
reached "$work/preempted-mpi" 5 # early, since mpirun waits before it passes SIGTERM on
pkill -TERM -f "mpirun.*$work/preempted-mpi"
wait
grep -q "stopped by SIGTERM" "$work/preempted-mpi.log" || fail "it was not preempted"
mpi preempted-mpi
((code == 0)) || fail "mpirun: $code"
grep -h "stopped by SIGTERM\|resuming" "$work/preempted-mpi.log" | sed 's/^/          /' | sort -u
alike "$work/preempted-mpi"

say "Open MPI: kill one of the processes"
mpi killed-mpi &
reached "$work/killed-mpi" 25
began=$SECONDS
kill -9 "$(processes "$work/killed-mpi" | tail -n 1)"
wait
say "          all have ended after $((SECONDS - began)) s"
mpi killed-mpi
((code == 0)) || fail "mpirun: $code"
grep -h "resuming" "$work/killed-mpi.log" | sed 's/^/          /'
alike "$work/killed-mpi"

say "all passed"
