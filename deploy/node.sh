#!/usr/bin/env bash
# deploy/node.sh --experiment=speedrun
# Trains on one machine, with all its GPUs in one process. Training that was preempted (75) or killed is restarted, up
# to ten starts in all; bad input (2), Ctrl-C (130), a closed pipe (141), and a Python that is missing (127) or not
# executable (126) end it.
set -u
cd "$(dirname "$0")/.."

for _ in $(seq 10); do
  "${PYTHON:-.venv/bin/python}" launch.py "$@"
  code=$?
  case $code in 0 | 2 | 126 | 127 | 130 | 141) break ;; esac
  sleep 10
done
exit $code
