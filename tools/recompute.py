"""Compute the published intervals again, from the answers in metrics/ and without a training.

    python -m tools.recompute                    of the project's own results; some seconds
    python -m tools.recompute --output DIR       of the study in this folder

Prints every difference to full fine-tuning of comparison.json, crossvalidation.json,
full_rates.json and the sweeps as it is published and as it comes out again; NLL and ECE, too, where
the probabilities are there.
The answers behind grid.json and multitask.json are not kept.
"""
if not __package__:
    raise SystemExit("error: run this from the project's folder: python -m tools.recompute")

import sys
from pathlib import Path

import numpy as np

from common import fail, read_columns, read_json, start
from settings import Parser, read_settings
from spread import corrected_interval, ece, macro_f1, nll, paired_interval
from tools import sweep
from verdict import points

TOLERANCE = 1e-3  # points; tables have a tenth


def numbers(path):
    """Read a CSV file of whole numbers as {column: array}."""
    return {name: np.array(own, dtype=int) for name, own in read_columns(path).items()}


def study_intervals(path, answers):
    """Yield (method, what, published, again) of a comparison.json or crossvalidation.json, whose
    predictions are the CSV file `answers`."""
    study = read_json(path, "entries")
    columns = numbers(answers)
    labels, fold, full = columns["label"], columns.get("fold"), study["entries"]["full"]
    probabilities = path.with_name(f"{path.stem}_probabilities.npz")
    likely = np.load(probabilities) if probabilities.exists() else None
    parts = [fold == k for k in np.unique(fold)] if fold is not None else [slice(None)]
    for name, entry in study["entries"].items():
        if likely is not None:
            yield (name, ", NLL and ECE", {key: entry[key] for key in ("nll", "ece")},
                   {key: np.mean([of(labels[part], own[part]) for own in likely[name]
                                  for part in parts])
                    for key, of in (("nll", nll), ("ece", ece))})
        if name == "full":
            continue
        each = [f"seed{seed}" for seed in entry["seeds"]] if fold is None else [
            f"repeat{i + 1}" for i in range(entry["n"] // entry["folds"])]
        method, baseline = (np.stack([columns[f"{who}_{of}"] for of in each])
                            for who in (name, "full"))  # (repetitions, sentences)
        yield name, "", entry["vs_full"], paired_interval(
            labels, method, baseline, fold, len(study["entries"]) - 1)
        if fold is not None:
            differences = [100 * np.mean([macro_f1(labels[own], m[own])
                                          - macro_f1(labels[own], b[own])
                                          for m, b in zip(method, baseline)])
                           for own in parts]
            rows = full["runs"][0]["rows"]
            yield (name, ", for new rows", entry["vs_full_new_rows"],
                   corrected_interval(differences, rows["test"], rows["train"]))
            for key, own in entry["calibration"].items():
                each = [run[key] - other[key] for run, other in
                        zip(entry["runs"], study["entries"]["full"]["runs"], strict=True)]
                by_fold = np.reshape(each, (-1, entry["folds"])).mean(0)
                yield (name, f", {key}", own["vs_full"],
                       corrected_interval(by_fold, 0, rows["train"]))


def sweep_intervals(path):
    """Yield the same of a sweep."""
    first = next(iter(read_json(path, "entries")["entries"].values()))["runs"][0]
    entries, answers = sweep.held(path, read_settings(first))
    for name, entry in entries.items():
        if entry["vs_full"]:
            full = f"full, {sweep.method_and_rows(name)[1]}"
            own, baseline = (sweep.columns_of(who, sweep.seeds_of(entry)) for who in (name, full))
            yield name, "", entry["vs_full"], sweep.difference(answers, own, baseline)


def rate_intervals(path, study):
    """Yield the same of the study of folds, whose answers are the CSV file `study`, against full
    fine-tuning at other learning rates, each a column beside `path`."""
    columns, rates = numbers(study), read_json(path, "rates")["rates"]
    for lr, baseline in numbers(path.with_name(f"{path.stem}_predictions.csv")).items():
        vs_full = rates[lr]["vs_full"]
        for name, vs in vs_full.items():
            yield f"{name}, full at {lr}", "", vs, paired_interval(
                columns["label"], columns[f"{name}_repeat1"][None], baseline[None],
                columns["fold"], len(vs_full))


def main(argv):
    start()
    parser = Parser(description="Compute the published intervals again.", allow_abbrev=False)
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1], metavar="DIR",
                        help="train.py's --output (default: the project's folder)")
    metrics = parser.parse_args(argv).output / "metrics"
    found = {}
    for name, answers in (("comparison", "predictions"),
                          ("crossvalidation", "crossvalidation_predictions")):
        if (metrics / f"{name}.json").exists():
            found[name] = study_intervals(metrics / f"{name}.json", metrics / f"{answers}.csv")
    if (metrics / "full_rates.json").exists():
        found["full_rates"] = rate_intervals(metrics / "full_rates.json",
                                             metrics / "crossvalidation_predictions.csv")
    found |= {path.stem: sweep_intervals(path) for path in sorted(metrics.glob("sweep_*.json"))}
    if not found:
        fail(f"{metrics} holds no study; bash run_all.sh makes one")
    n = 0
    try:
        for file, intervals in found.items():
            for method, what, *both in intervals:
                digits = 1 if what in ("", ", for new rows") else 3
                published, again = (points(own, digits) if "points" in own else
                                    "{nll:.3f}, {ece:.3f}".format(**own) for own in both)
                print(f"{file}: {method}{what}: {published}, again {again}", flush=True)
                if max(abs(both[0][key] - both[1][key]) for key in both[0]) > TOLERANCE:
                    fail(f"{file}.json does not follow from its answers: {method}{what}")
                n += 1
    except (OSError, ValueError, KeyError) as e:
        fail(f"the answers behind {metrics / file}.json are missing or of another study "
             f"({type(e).__name__}: {e})")
    print(f"{n} results came out as published")


if __name__ == "__main__":
    main(sys.argv[1:])
