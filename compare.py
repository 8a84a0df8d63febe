"""The runs of the sentence study: their flags, and their results together.

    python compare.py               metrics/comparison.json: five runs a seed, on the task's own
                                    test rows
    python compare.py --folds 5     metrics/crossvalidation.json: eight methods in each of five
                                    folds, so that every sentence tests once

With --list they print the commands instead, one a line. Both work with --seeds 42 43 44. Other
flags are train.py's, and select the runs that were trained with them.
"""
import sys

import numpy as np

from files import write_csv, write_json
from methods import is_qa
from settings import Parser, checkpoint_path, make_parser, number, settings_of
from spread import corrected_interval, ece, macro_f1, mean_std, nll, paired_bootstrap
from start import fail, start
from studies import (
    FOLD_RUNS,
    collect,
    commands,
    explain,
    mixed_hardware,
    print_commands,
    refuse,
    split_seeds,
)
from studies import SENTENCE_RUNS as RUNS


def split_folds(argv):
    """(number of folds or None, the other flags)."""
    parser = Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--folds", type=number(int, 2, 1000))
    known, rest = parser.parse_known_args(argv)
    return known.folds, rest


def parts_of(seeds, folds):
    """The flags of each part of a study, in which every method runs once: a seed, or one fold of a
    seed."""
    if not folds:
        return [["--seed", str(seed)] for seed in seeds]
    return [["--seed", str(seed), "--fold", f"{k}/{folds}"]
            for seed in seeds for k in range(1, folds + 1)]


def summarise(runs):
    """What an entry of comparison.json and of crossvalidation.json share: what is the same in all
    runs of a method, means and standard deviations of the rest, and the runs themselves."""
    first = runs[0]
    seeds = dict.fromkeys(run["settings"]["seed"] for run in runs)
    entry = {"n": len(runs), "seeds": list(seeds)}
    entry |= {key: first[key]
              for key in ("trainable_params", "trainable_by_kind", "total_params", "trainable_pct",
                          "checkpoint_mb")}
    keys = "f1_macro", "accuracy", "nll", "ece", "peak_vram_gb", "peak_rss_gb"
    values = {key: [run.get(key) for run in runs] for key in keys}
    values["epoch_time_s"] = [h["seconds"] for run in runs for h in run["history"]]
    for key, own in values.items():
        entry[key], entry[f"{key}_std"] = (None, None) if None in own else mean_std(own)
    entry["best_epoch"] = [run["best_epoch"] for run in runs]
    entry["runs"] = [{key: run[key] for key in run
                      if key not in ("test_predictions", "test_probabilities")} for run in runs]
    return entry


def joined(runs, n_folds, what):
    """What the runs of each seed left of their test rows, its folds one after the other: (seeds,
    sentences, 2) ints of test_predictions, (seeds, sentences, labels) of test_probabilities."""
    return np.array([[row for run in runs[i:i + n_folds] for row in run[what]]
                     for i in range(0, len(runs), n_folds)])


def combine(runs, baseline):
    """One method's entry of comparison.json: means and standard deviations over its runs (one a
    seed), and its macro-F1 against that of full fine-tuning, the `baseline` runs of the same
    seeds."""
    pairs, full = (joined(own, 1, "test_predictions") for own in (runs, baseline))
    vs = None if runs is baseline else paired_bootstrap(pairs[0, :, 0], pairs[..., 1], full[..., 1])
    return summarise(runs) | {"vs_full": vs}


def combine_folds(runs, baseline, n_folds):
    """One method's entry of crossvalidation.json: f1_macro, nll and ece are of all sentences
    together (the mean over the seeds), their standard deviations those over the folds of all seeds,
    like all else. vs_full and vs_full_new_rows: see spread.py. rows_to_resolve: how many test
    sentences would have shown the difference to full fine-tuning, had it been as large as here and
    the trainings these."""
    pairs, full = (joined(own, n_folds, "test_predictions") for own in (runs, baseline))
    labels, predicted, full = pairs[0, :, 0], pairs[..., 1], full[..., 1]
    probabilities = joined(runs, n_folds, "test_probabilities")
    everything = np.ones((1, len(labels)))
    entry = summarise(runs) | {
        "test_rows": len(labels), "folds": n_folds,
        "f1_macro": float(np.mean([macro_f1(labels, own, everything) for own in predicted])),
        "nll": float(np.mean([nll(labels, own) for own in probabilities])),
        "ece": float(np.mean([ece(labels, own) for own in probabilities])),
        "vs_full": None, "vs_full_new_rows": None, "rows_to_resolve": None}
    if runs is baseline:
        return entry

    fold = np.repeat(range(n_folds), [len(r["test_predictions"]) for r in runs[:n_folds]])
    vs = paired_bootstrap(labels, predicted, full, fold)
    # an interval over sentences alone is as wide as 1 / sqrt(rows)
    of_sentences = paired_bootstrap(labels, predicted, full, replicates=2000)
    half = (of_sentences["high"] - of_sentences["low"]) / 2
    differences = [100 * (run["f1_macro"] - other["f1_macro"])
                   for run, other in zip(runs, baseline)]
    by_fold = np.reshape(differences, (-1, n_folds)).mean(0)
    rows = runs[0]["rows"]
    return entry | {
        "vs_full": vs,
        "vs_full_new_rows": corrected_interval(by_fold, rows["test"], rows["train"]),
        "rows_to_resolve": round(len(labels) * (half / vs["points"]) ** 2)
        if vs["points"] else None}


def prediction_rows(runs, n_folds=None):
    """One dict a test sentence: its label, its fold, and the label that each run predicted for it,
    or each seed's run of the fold."""
    size = n_folds or 1
    first = next(iter(runs.values()))[:size]
    rows = [{"label": label} | ({"fold": k} if n_folds else {})
            for k, run in enumerate(first, 1) for label, _ in run["test_predictions"]]
    for name, own in runs.items():
        for run, pairs in zip(own[::size], joined(own, size, "test_predictions"), strict=True):
            for row, (_, label) in zip(rows, pairs, strict=True):
                row[f"{name}_seed{run['settings']['seed']}"] = label
    return rows


def collect_parts(study, parts, argv):
    """({run: [result of each part]}, output folder); ends if one is missing."""
    runs = {name: [] for name in study}
    for part in parts:
        results, missing, output = collect(study, [*argv, *part])
        if missing:
            fail(f"not finished with these settings and {' '.join(part)}: {', '.join(missing)}; "
                 "bash run_all.sh with the same flags runs them")
        for name, result in results.items():
            if "test_predictions" not in result:
                fail(f"{output / 'metrics' / 'runs'} has results of an earlier version, without "
                     "predictions; delete it")
            file = checkpoint_path(output, result["settings"])
            result["checkpoint_mb"] = file.stat().st_size / 1e6 if file.exists() else None
            runs[name].append(result)
    return runs, output


def main(argv):
    start()
    explain(__doc__, argv)
    to_list = "--list" in argv
    folds, argv = split_folds([word for word in argv if word != "--list"])
    refuse(["--method", "--r", "--targets", "--fold"], argv,
           "is what the runs of the study differ in; for one run of your own use train.py")
    seeds, argv = split_seeds(argv)
    study, parts = FOLD_RUNS if folds else RUNS, parts_of(seeds, folds)
    # a bad flag ends here, and a task that cannot be cut into folds
    s = settings_of(make_parser().parse_args([*argv, *parts[0], "--method", "full"]))
    if is_qa(s):
        fail("run_all.sh compares sentence classifiers; for question answering there is "
             "run_grid.sh")
    if to_list:
        print_commands("\n".join(commands(study, [*argv, *part]) for part in parts))
        return

    runs, output = collect_parts(study, parts, argv)
    if line := mixed_hardware([run for name in runs for run in runs[name]]):
        fail(line)
    full, metrics = runs["full_ft"], output / "metrics"
    if folds:
        entries = {name: combine_folds(runs[name], full, folds) for name in study}
        write_json(metrics / "crossvalidation.json", entries)
        write_csv(metrics / "crossvalidation_predictions.csv", prediction_rows(runs, folds))
    else:
        write_json(metrics / "comparison.json", {name: combine(runs[name], full) for name in study})
        write_csv(metrics / "predictions.csv", prediction_rows(runs))
    from plots import draw, draw_folds  # matplotlib is slow to import
    (draw_folds if folds else draw)(output)


if __name__ == "__main__":
    main(sys.argv[1:])
