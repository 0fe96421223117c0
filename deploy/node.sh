#!/usr/bin/env bash
# deploy/node.sh --experiment=speedrun
# One machine, all its GPUs in one process. What was preempted (75) or cut off goes on by itself; bad input (2), Ctrl-C
# (130) and a Python that is not there (127) end it, and so does a training that fails ten times.
set -u
cd "$(dirname "$0")/.."

for _ in $(seq 10); do
  "${PYTHON:-.venv/bin/python}" launch.py "$@"
  code=$?
  case $code in 0 | 2 | 126 | 127 | 130) break ;; esac
  sleep 10
done
exit $code
