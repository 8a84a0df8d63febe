#!/usr/bin/env bash
# The five-way comparison from nothing: environment, model, data, five trainings, numbers and figures.
#
#   bash run_all.sh                                         the default: a small BERT on 8,070 movie sentences, CPU is enough
#   bash run_all.sh --task sst2 --model bert-base-uncased   the full-size study, for a GPU
#
# All arguments go to every run (python train.py --help). Finished runs are skipped, so that an interrupted study goes on
# where it was cut when the same command is given again.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

runs="$("$python" "$here/compare.py" --list "$@")"
while read -r flags; do
  echo "== train.py $flags $*"
  # shellcheck disable=SC2086  # $flags is several words on purpose
  "$python" "$here/train.py" "$@" $flags < /dev/null
done <<< "$runs"
"$python" "$here/compare.py" "$@"
