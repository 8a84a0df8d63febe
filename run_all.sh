#!/usr/bin/env bash
# The comparison of five ways to fine-tune BERT, from nothing: environment, model, data, trainings, numbers and figures.
#
#   bash run_all.sh        the default: a small BERT on 8,070 movie sentences; two CPU cores are enough
#   bash run_all.sh --seeds 42 43 44        the same with three seeds, for the spread
#   bash run_all.sh --folds 5        eight settings on five folds, so that every sentence is tested once
#   bash run_all.sh --folds 5 --repeats 3        the same three times, each training with a seed of its own
#   bash run_all.sh --data tickets.csv --output results/tickets        your own texts, at learning rates searched for them
#   bash run_all.sh --list [flags]      prints the commands instead of running them
#   bash run_all.sh --task sst2 --model bert-base-uncased --output results/sst2     the full-size study, for a GPU
#
# All other flags go to every run (python train.py --help). Finished runs are skipped, so the same command continues an
# interrupted study.
set -euo pipefail
# shellcheck source=setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
exec "$python" "$here/compare.py" "$@"
