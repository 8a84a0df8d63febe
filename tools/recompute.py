"""Compute the published intervals again, from the answers in metrics/ and without a training.

    python -m tools.recompute                    of the project's own results; some seconds
    python -m tools.recompute --output DIR       of the study in this folder

Prints every difference to full fine-tuning as it is published and as it comes out again; NLL and
ECE, too, where the probabilities are there.
"""
if not __package__:
    raise SystemExit("error: run this from the project's folder: python -m tools.recompute")

import sys
from itertools import product
from pathlib import Path

import numpy as np

import spread
from common import fail, read_columns, read_json, start
from settings import Parser, read_settings
from tools import sweep
from verdict import points

TOLERANCE = 1e-3  # points; tables have a tenth
MEASURES = "nll", "ece", "nll_scaled", "ece_scaled"


def numbers(path, kind=int):
    """Read a CSV file of numbers of this kind as {column: array}."""
    return {name: np.array(own, dtype=kind) for name, own in read_columns(path).items()}


def measures(labels, likely, parts, runs):
    """Return {measure: one value per training} of probabilities (repetitions, sentences, labels),
    each of whose `parts` one training tested; with the runs' temperatures, scaled ones, too."""
    each = [(labels[part], own[part]) for own in likely for part in parts]
    found = {"nll": [spread.nll(*own) for own in each], "ece": [spread.ece(*own) for own in each]}
    if "temperature" in runs[0]:
        each = [(own, spread.scaled(p, run["temperature"])) for (own, p), run in zip(each, runs)]
        found |= {"nll_scaled": [spread.nll(*own) for own in each],
                  "ece_scaled": [spread.ece(*own) for own in each]}
    return found


def study_intervals(path, answers):
    """Yield (what, published, again) of a comparison.json or crossvalidation.json, whose
    predictions are the CSV file `answers`."""
    study = read_json(path, "entries")
    columns, comparisons = numbers(answers), len(study["entries"]) - 1
    labels, fold, full = columns["label"], columns.get("fold"), study["entries"]["full"]
    probabilities = path.with_name(f"{path.stem}_probabilities.npz")
    likely = np.load(probabilities) if probabilities.exists() else None
    parts = [fold == k for k in np.unique(fold)] if fold is not None else [slice(None)]
    found = {}
    for name, entry in study["entries"].items():
        if likely is not None:
            found[name] = measures(labels, likely[name], parts, entry["runs"])
            published = {key: entry[key] for key in ("nll", "ece")} | {
                key: own["mean"] for key, own in entry.get("calibration", {}).items()}
            yield (f"{name}, NLL and ECE", published,
                   {key: np.mean(found[name][key]) for key in published})
        if name == "full":
            continue
        each = [f"seed{seed}" for seed in entry["seeds"]] if fold is None else [
            f"repeat{i + 1}" for i in range(entry["n"] // entry["folds"])]
        method, baseline = (np.stack([columns[f"{who}_{of}"] for of in each])
                            for who in (name, "full"))  # (repetitions, sentences)
        yield name, entry["vs_full"], spread.paired_interval(
            labels, method, baseline, fold, comparisons)
        if fold is not None:
            differences = [100 * np.mean([spread.macro_f1(labels[own], m[own])
                                          - spread.macro_f1(labels[own], b[own])
                                          for m, b in zip(method, baseline)])
                           for own in parts]
            rows = full["runs"][0]["rows"]
            yield (f"{name}, for new rows", entry["vs_full_new_rows"],
                   spread.corrected_interval(differences, rows["test"], rows["train"]))
            yield (f"{name}, t over the folds", entry["vs_full_t"],
                   spread.corrected_interval(differences, 0, rows["train"], comparisons))
        for key, own in entry.get("calibration", {}).items() if likely is not None else ():
            by_fold = np.reshape(np.subtract(found[name][key], found["full"][key]),
                                 (-1, entry["folds"])).mean(0)
            yield f"{name}, {key}", own["vs_full"], spread.corrected_interval(
                by_fold, 0, rows["train"])


def sweep_intervals(path):
    """Yield the same of a sweep."""
    first = next(iter(read_json(path, "entries")["entries"].values()))["runs"][0]
    entries, answers = sweep.held(path, read_settings(first))
    for name, entry in entries.items():
        if entry["vs_full"]:
            full = f"full, {sweep.method_and_rows(name)[1]}"
            own, baseline = (sweep.columns_of(who, sweep.seeds_of(entry)) for who in (name, full))
            yield name, entry["vs_full"], sweep.difference(answers, own, baseline)


def rate_intervals(path, study):
    """Yield the same of the study of folds, whose answers are the CSV file `study`, against full
    fine-tuning at other learning rates, each a column beside `path`."""
    columns, rates = numbers(study), read_json(path, "rates")["rates"]
    for lr, baseline in numbers(path.with_name(f"{path.stem}_predictions.csv")).items():
        vs_full = rates[lr]["vs_full"]
        for name, vs in vs_full.items():
            yield f"{name}, full at {lr}", vs, spread.paired_interval(
                columns["label"], columns[f"{name}_repeat1"][None], baseline[None],
                columns["fold"], len(vs_full))


def grid_intervals(path, answers):
    """Yield the same of a grid.json, the F1 of whose questions are the CSV file `answers`."""
    grid, columns = read_json(path, "runs", "best"), None
    for name, run in grid["runs"].items():
        if "low" in run.get("vs_full", ()):  # versions before kept no answers
            columns = columns or numbers(answers, float)
            yield name, run["vs_full"], sweep.difference(columns, [name], [grid["best"]["full"]])


def multitask_intervals(path, answers):
    """Yield the same of a multitask.json, whose predictions are the CSV file `answers`."""
    study = read_json(path, "tasks", "methods")
    columns = {name: np.array(own) for name, own in read_columns(answers).items()}
    for task, name in product(study["tasks"], list(study["methods"])[1:]):
        own = columns["task"] == task
        yield f"{task}, {name}", study["tasks"][task][name]["vs_full"], spread.paired_bootstrap(
            *(columns[who][own].astype(int) for who in ("label", name, "full")))


def main(argv):
    start()
    parser = Parser(description="Compute the published intervals again.", allow_abbrev=False)
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1], metavar="DIR",
                        help="train.py's --output (default: the project's folder)")
    metrics = parser.parse_args(argv).output / "metrics"
    sources = {  # of each file of results, how they are computed, and of what
        "comparison": (study_intervals, "predictions.csv"),
        "crossvalidation": (study_intervals, "crossvalidation_predictions.csv"),
        "full_rates": (rate_intervals, "crossvalidation_predictions.csv"),
        "grid": (grid_intervals, "grid_answers.csv"),
        "multitask": (multitask_intervals, "multitask_answers.csv")}
    found = {name: compute(metrics / f"{name}.json", metrics / answers)
             for name, (compute, answers) in sources.items()
             if (metrics / f"{name}.json").exists()}
    found |= {path.stem: sweep_intervals(path) for path in sorted(metrics.glob("sweep_*.json"))}
    if not found:
        fail(f"{metrics} holds no study; bash run_all.sh makes one")
    n = 0
    try:
        for file, intervals in found.items():
            for what, *both in intervals:
                digits = 3 if what.endswith(MEASURES) else 1
                published, again = (points(own, digits) if "points" in own else ", ".join(
                    f"{value:.3f}" for value in own.values()) for own in both)
                print(f"{file}: {what}: {published}, again {again}", flush=True)
                if max(abs(both[0][key] - both[1][key]) for key in both[0]) > TOLERANCE:
                    fail(f"{file}.json does not follow from its answers: {what}")
                n += 1
    except (OSError, ValueError, KeyError) as e:
        fail(f"the answers behind {metrics / file}.json are missing or of another study "
             f"({type(e).__name__}: {e})")
    print(f"{n} results came out as published")


if __name__ == "__main__":
    main(sys.argv[1:])
