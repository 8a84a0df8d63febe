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
grid() { PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}" "$python" -P -m tools.grid "$@"; }

for flag in "$@"; do
  case "$flag" in
    -h | --help)
      echo "run_grid.sh runs five methods, each for 2 and 3 epochs and with two learning rates; --list prints the commands."
      echo "--method, --r, --epochs and --lr are what the runs differ in; all other flags are train.py's:"
      exec "$python" "$here/train.py" --help ;;
    --list)
      grid "$@"
      exit ;;
  esac
done
grid --search "$@"  # of one's own questions: each method's learning rate
runs="$(grid --list "$@")"
jobs=1
if ! command -v nvidia-smi > /dev/null; then
  # On a CPU two runs at a time, each on half of the cores: such small batches cannot keep all cores busy.
  jobs=2
  cores="$(nproc 2> /dev/null || getconf _NPROCESSORS_ONLN)"
  export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores > 1 ? cores / 2 : 1))}" TQDM_DISABLE=1 PYTHONUNBUFFERED=1
fi
# Each warning comes once, not once a run: what was said is in this file.
BERT_WARNED="$(mktemp)"
export BERT_WARNED
trap 'rm -f "$BERT_WARNED"' EXIT
failed=0
# shellcheck disable=SC2016  # $0 is the inner shell's: the run
printf '%s\n' "$runs" | tr '\n' '\0' | xargs -0 -n 1 -P "$jobs" \
  bash -c 'echo "== $0"; bash -c "$0" < /dev/null || { echo "failed: $0" >&2; exit 1; }' || failed=1
grid "$@"
if ((failed)); then
  echo "error: some runs failed, see above; the same command tries them again" >&2
  exit 1
fi
