#!/usr/bin/env bash
# The question-answering study from nothing: twenty trainings (full, LoRA, QLoRA, DoRA, QDoRA x 2 or 3 epochs x two
# learning rates), tables, CSV files and figures.
#
#   bash run_grid.sh           the default: a small BERT on generated questions, two CPU cores are enough
#   bash run_grid.sh --task squad_pt --output results/squad_pt       BERTimbau on Portuguese SQuAD, for a GPU
#   bash run_grid.sh --data questions.json --output results/mine       your own questions, at learning rates searched for them
#   bash run_grid.sh --list [flags]      prints the twenty commands instead of running them
#
# All arguments go to every run (python train.py --help). Finished runs are skipped; a failed one does not stop the
# others, and the exit status is then 1.
set -euo pipefail
# shellcheck source=setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

# -P and this path: the project's modules are found, and none of the folder in which the user stands.
export PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" -P -m tools.grid "$@"
