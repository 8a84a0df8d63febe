# shellcheck shell=bash disable=SC2034
# Sourced by run_all.sh, run_grid.sh and tests/run.sh: makes .venv with the pinned requirements and sets $here and $python.
# $BERT_VENV is another place for it: the containers bring theirs in /opt/venv.
set -euo pipefail  # run alone, too: an installation that failed must not look finished
# the first hides the files beside a program from Python, the second the texts that transformers needs to start
unset PYTHONSAFEPATH PYTHONOPTIMIZE
here="$(CDPATH= cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
venv="${BERT_VENV:-$here/.venv}"
python="$venv/bin/python"
if ! cmp -s "$here/requirements.txt" "$venv/installed.txt"; then
  python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    { echo "error: Python 3.11 or newer is needed, python3 is $(python3 -V 2>&1)" >&2; exit 1; }
  echo "setting up $venv (once; some minutes and about 2 GB, more with CUDA)" >&2
  python3 -m venv "$venv"
  # The pip that comes with Python 3.11 takes 15 s longer.
  "$python" -m pip install -qq --disable-pip-version-check --no-compile pip==26.3
  "$python" -m pip install -qq --disable-pip-version-check --no-compile -r "$here/requirements.txt"
  # Compile what is imported and nothing else: of 14,000 files that saves half a minute.
  (cd "$here" && unset PYTHONDONTWRITEBYTECODE
   "$python" -c "import plots, quant" & "$python" -c "import train"
   wait $!)
  cp "$here/requirements.txt" "$venv/installed.txt"  # last: an interrupted installation is done again
fi
