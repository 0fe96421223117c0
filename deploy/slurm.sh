#!/usr/bin/env bash
# sbatch deploy/slurm.sh --experiment=speedrun --run-dir=/shared/runs/speedrun
#SBATCH --job-name=jaxchat
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@180
# One task per GPU. Three minutes before the time limit, and whenever the job is preempted, the tasks get SIGTERM: they
# save and exit with code 75. After that, or after losing a process (76), the job is requeued and resumes.
set -u
cd "$SLURM_SUBMIT_DIR"

# --kill-on-bad-exit=0: when one process ends, the others end on their own, with the right messages and exit codes.
# --cpus-per-task: some versions of srun do not inherit it from the options above.
srun --kill-on-bad-exit=0 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" "${PYTHON:-.venv/bin/python}" launch.py "$@" &
step=$!
trap 'scancel --signal=TERM "$SLURM_JOB_ID.0"' TERM
while kill -0 $step 2>/dev/null; do wait $step; done # a signal interrupts wait
wait $step
code=$?
case $code in 75 | 76 | 137) scontrol requeue "$SLURM_JOB_ID" ;; esac
exit $code
