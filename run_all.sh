#!/usr/bin/env bash
# The five-way comparison from nothing: environment, model, data, five trainings, numbers and figures.
#
#   bash run_all.sh        the default: a small BERT on 8,070 movie sentences, two CPU cores are enough
#   bash run_all.sh --seeds 42 43 44        the same with three seeds each, for the spread
#   bash run_all.sh --folds 5        eight settings of six methods on five folds of all sentences, so that each is tested once
#   bash run_all.sh --list [flags]      prints the commands instead of running them
#   bash run_all.sh --task sst2 --model bert-base-uncased --output results/sst2     the full-size study, for a GPU
#
# All other arguments go to every run (python train.py --help). Finished runs are skipped, so that an interrupted study
# goes on where it was cut when the same command is given again.
set -euo pipefail
# shellcheck source=setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

for flag in "$@"; do
  case "$flag" in
    -h | --help)
      echo "run_all.sh runs the five methods, with --seeds N N N once a seed, with --folds N eight in each of N folds."
      echo "--list prints the commands. All other flags are train.py's:"
      exec "$python" "$here/train.py" --help ;;
    --list) exec "$python" "$here/compare.py" "$@" ;;
  esac
done
runs="$("$python" "$here/compare.py" --list "$@")"
while read -r run; do
  echo "== $run"
  bash -c "$run" < /dev/null
done <<< "$runs"
"$python" "$here/compare.py" "$@"
