"""The runs of the sentence study, and what becomes of them.

    python compare.py               five runs per seed, on the task's own test rows:
                                    metrics/comparison.json
    python compare.py --folds 5     eight settings in each of five folds, so that every sentence is
                                    tested once: metrics/crossvalidation.json
                      --repeats 3   and three times, each training with a seed of its own

`bash run_all.sh` is the same with an environment of its own. It trains what is missing, one run
after the other, so that an interrupted study goes on where it was cut. --list prints the commands
instead. Without folds, --seeds 42 43 44 trains each method three times. All other flags go to every
run: python train.py --help.

On other data, or with another model, each method first tries some learning rates, in its first run
of all, and takes the one that validates best (rates.py). Where three epochs are few steps, there
are more epochs. --lr X takes one rate for all methods instead.
"""
import sys; sys.path.insert(0, __file__.rpartition("/")[0])  # isort: skip (for PYTHONSAFEPATH=1)
import contextlib
import os
import shlex
from pathlib import Path

import numpy as np

from common import fail, start, warn, write_csv, write_json, write_whole
from methods import CASES, FOLD_STUDY, STUDY, row_of
from rates import TRAIN, best_rate, edge_mark, first_rates, plan, search, trained
from settings import (
    Parser,
    any_seed,
    asked_settings,
    case_label,
    checkpoint_path,
    given,
    has_searched_rates,
    make_parser,
    number,
    read_flags,
    read_result,
    read_settings,
    settings_of,
)
from spread import calibrated, corrected_interval, macro_f1, mean_std, paired_interval
from verdict import best_line, even_rows, largest_class, marks_of

# of a result; too much for a study's file
ROW_BY_ROW = {"test_predictions", "test_probabilities", "validation"}
RUNS, FOLD_RUNS = ({name: CASES[name].flags for name in names} for names in (STUDY, FOLD_STUDY))


# --- flags of a study ----------------------------------------------------------------------------

def explain(program, argv):
    """Answer --help of a program, whose other flags are train.py's, by its docstring."""
    if {"-h", "--help"} & set(argv):
        print(f"{program.strip()}\n\npython train.py --help explains the other flags.")
        sys.exit()


def refuse(flags, argv, why):
    """Exit if one of the flags is on a command line."""
    for flag in flags:
        if given(flag, argv):
            fail(f"{flag} {why}")


def split_seeds(argv):
    """Take --seeds 42 43 44 out of the flags: (seeds, the other flags). Without it the seed is that
    of --seed."""
    parser = Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--seeds", nargs="+", type=any_seed)
    known, rest = parser.parse_known_args(argv)
    seeds = known.seeds
    if seeds and given("--seed", rest):
        fail("give --seed or --seeds, not both")
    if seeds and len(set(seeds)) < len(seeds):
        fail(f"--seeds names a seed twice: {' '.join(map(str, seeds))}")
    return seeds or [make_parser().parse_args([*rest, "--method", "full"]).seed], rest


def split_folds(argv):
    """Take --folds N and --repeats M out of the flags: (N or None, M, the other flags)."""
    parser = Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--folds", type=number(int, 2, 1000))
    parser.add_argument("--repeats", type=number(int, 1, 1000))
    known, rest = parser.parse_known_args(argv)
    if known.folds:
        refuse(["--seeds"], rest, "does not go with --folds, where each training has a seed of its "
                                  "own, from --seed on; --repeats 3 takes three for each fold")
    elif known.repeats:
        fail("--repeats goes with --folds; without folds there is --seeds 42 43 44")
    return known.folds, known.repeats or 1, rest


def parts_of(seeds, folds, repeats=1):
    """Return the flags of each part of a study, in which every method runs once: a seed, or a fold
    with a seed of its own, so that no chance of a seed befalls all folds."""
    if not folds:
        return [["--seed", str(seed)] for seed in seeds]
    return [["--seed", str(seeds[0] + i), "--fold", f"{i % folds + 1}/{folds}"]
            for i in range(folds * repeats)]


def decide_amp(flags, held=()):
    """Return train.py's flags for all runs of a study, with --amp auto decided, once. Exit if its
    results, those that are `held` and those in files, are of another precision."""
    args = make_parser().parse_args([*flags, "--method", "full"])
    if args.amp != "auto":
        return flags
    s, files = settings_of(args), (args.output / "metrics" / "runs").glob("*.json")
    made = [run["settings"] for run in (*held, *map(read_result, files))]
    same = "task", "data_sha256", "model", "model_sha256"
    amps = {own["amp"] for own in made if all(own.get(key) == getattr(s, key) for key in same)}
    if amps and s.amp not in amps:
        fail(f"{args.output} has results of this study in {max(amps)}, and --amp auto is {s.amp} "
             f"here: --amp {max(amps)} goes on where the machine has it, --amp {s.amp} with "
             "another --output begins anew")
    return [*flags, "--amp", s.amp]


# --- runs ----------------------------------------------------------------------------------------

def print_commands(runs):
    """Print one train.py command per run, in the bytes in which the arguments came: a path that the
    terminal cannot show is a path all the same."""
    for flags in runs:
        line = shlex.join([sys.executable, str(TRAIN), *flags]) + "\n"
        sys.stdout.buffer.write(os.fsencode(line))


def checkpoint_mb(output, result):
    """Return the size of what a run trained, in units of 1e6 bytes; None if the file is gone."""
    file = checkpoint_path(output, read_settings(result))
    return file.stat().st_size / 1e6 if file.exists() else None


def mixed_hardware(results):
    """Return a line that says why times and memory of the results do not compare, or None."""
    for key in "device", "amp", "cpu":  # versions before did not say the last
        if len(values := {r["environment"].get(key) for r in results} - {None}) > 1:
            return (f"runs with different {key}: {', '.join(sorted(values))}; times and memory do "
                    "not compare (delete one kind's files to run them again)")
    return None


# --- results -------------------------------------------------------------------------------------

def summarise(runs):
    """Return what an entry of comparison.json and of crossvalidation.json share: what is the same
    in all runs of a method, means and standard deviations of the rest, and the runs themselves."""
    first = runs[0]
    entry = {"n": len(runs), "seeds": list(dict.fromkeys(r["settings"]["seed"] for r in runs))}
    entry |= {key: first[key]
              for key in ("trainable_params", "trainable_by_kind", "total_params", "trainable_pct",
                          "checkpoint_mb")}
    keys = "f1_macro", "accuracy", "nll", "ece", "peak_vram_gb", "peak_rss_gb"
    values = {key: [run[key] for run in runs] for key in keys}
    values["epoch_time_s"] = [h["seconds"] for run in runs for h in run["history"]]
    for key, own in values.items():
        entry[key], entry[f"{key}_std"] = (None, None) if None in own else mean_std(own)
    entry["best_epoch"] = [run["best_epoch"] for run in runs]
    entry["runs"] = [{key: run[key] for key in run if key not in ROW_BY_ROW} for run in runs]
    return entry


def joined(runs, n_folds, what):
    """Join what the runs left of their test rows, each time one fold after the other: (repetitions,
    sentences, 2) ints of test_predictions, (repetitions, sentences, labels) of
    test_probabilities."""
    return np.array([[row for run in runs[i:i + n_folds] for row in run[what]]
                     for i in range(0, len(runs), n_folds)])


def combine(runs, baseline, comparisons, n_folds=None, tried=None):
    """Make one method's entry of comparison.json or crossvalidation.json: means and standard
    deviations over its runs, and its macro-F1 against that of full fine-tuning, the `baseline` runs
    of the same seeds and folds, one of so many comparisons. tried: what rates.search returned, if
    it chose the rate.

    With folds, f1_macro is of all sentences together (the mean over the repetitions), and there are
    vs_full_new_rows (see spread.py), vs_full_t, Student's t over the folds, and calibration:
    {measure: {mean, std, vs_full}}, with a t interval over the folds.
    """
    size, is_full = n_folds or 1, runs is baseline
    pairs, full = (joined(own, size, "test_predictions") for own in (runs, baseline))
    labels, predicted, full = pairs[0, :, 0], pairs[..., 1], full[..., 1]
    fold = np.repeat(range(size), [len(run["test_predictions"]) for run in runs[:size]])
    entry = summarise(runs) | {
        "tried": tried,
        "even_rows": even_rows(labels),
        "marks": [*marks_of(labels, predicted, runs, fold), *edge_mark(tried)],
        "vs_full": None if is_full else
        paired_interval(labels, predicted, full, fold, comparisons)}
    if not n_folds:
        return entry

    def by_fold(key):  # (folds,)
        each = [run[key] - other[key] for run, other in zip(runs, baseline)]
        return np.reshape(each, (-1, n_folds)).mean(0)

    rows = runs[0]["rows"]
    return entry | {
        "test_rows": len(labels), "folds": n_folds,
        "f1_macro": float(np.mean([macro_f1(labels, own) for own in predicted])),
        "vs_full_new_rows": None if is_full else
        corrected_interval(100 * by_fold("f1_macro"), rows["test"], rows["train"]),
        "vs_full_t": None if is_full else
        corrected_interval(100 * by_fold("f1_macro"), 0, rows["train"], comparisons),
        "calibration": {key: {
            **dict(zip(("mean", "std"), mean_std([run[key] for run in runs]))),
            "vs_full": None if is_full else corrected_interval(by_fold(key), 0, rows["train"])}
            for key in ("nll", "ece", "nll_scaled", "ece_scaled")
            if all(key in run for run in (*runs, *baseline))}}


def prediction_rows(runs, n_folds=None):
    """Return one dict per test sentence: its label, its fold, and the label that each run predicted
    for it, or each repetition's run of the fold."""
    size = n_folds or 1
    first = next(iter(runs.values()))[:size]
    rows = [{"label": label} | ({"fold": k} if n_folds else {})
            for k, run in enumerate(first, 1) for label, _ in run["test_predictions"]]
    for name, own in runs.items():
        for i, pairs in enumerate(joined(own, size, "test_predictions"), 1):
            of = f"repeat{i}" if n_folds else f"seed{own[i - 1]['settings']['seed']}"
            for row, (_, label) in zip(rows, pairs, strict=True):
                row[f"{name}_{of}"] = label
    return rows


def write_arrays(path, arrays):
    """Write {name: array} as a compressed .npz file."""
    def write(part):
        with open(part, "wb") as file:  # numpy would add its ending to a path
            np.savez_compressed(file, **arrays)
    write_whole(path, write)


def so_far(runs):
    """Write the mean test score of each method that has runs, {name: results}, as one line, with
    the points to full fine-tuning's in the same seeds and folds."""
    said, full = [], [r["f1_macro"] for r in runs["full"]]
    for name, own in runs.items():
        if n := len(own):
            score = np.mean([r["f1_macro"] for r in own])
            points = f"{100 * (score - np.mean(full[:n])):+.1f}, " if name != "full" else ""
            said.append(f"{case_label(name)} {score:.4f} ({points}n = {n})")
    return f"test macro-F1 so far: {', '.join(said)}"


def print_next(output, lines, results, model, kind=".csv"):
    """Print what one can do with the trained models of a study, as commands to copy. lines: the
    verdict's; results: {method: result}; model: a base's folder, or None; kind: of the files that
    tools.predict reads and writes."""
    here = TRAIN.parent

    def said(path):
        path = Path(os.path.abspath(path))  # a link to Python stays one
        return shlex.quote(str(path.relative_to(here) if path.is_relative_to(here) else path))

    best = best_line(lines)
    # adapters cannot be merged
    exported = best_line([line for line in lines
                          if row_of(read_settings(results[line.name])).merges])
    base = f" --model {said(model)}" if model else ""
    python, output = said(sys.executable), said(output)
    print(f"What next, in the folder {here}:\n"
          f"  {python} -m tools.predict --output {output}{base} --method {best.name} "
          f"--input new{kind} --to labelled{kind}\n"
          f"  {python} -m tools.export --output {output}{base} --method {exported.name} "
          f"--to my_bert   # for transformers\n"
          f"  {python} -m tools.demo --output {output}{base}   # a page that asks all methods")


def write_study(output, model, command, runs, tried, folds):
    """Write what a study found, its runs {method: results}: JSON, predictions, probabilities,
    tables, figures; and say what one can do with it. model: a base's folder, or None."""
    comparisons, metrics = len(runs) - 1, output / "metrics"
    if folds:
        runs = {name: [calibrated(run) for run in own] for name, own in runs.items()}
    entries = {name: combine(own, runs["full"], comparisons, folds, tried.get(name))
               for name, own in runs.items()}
    rows = prediction_rows(runs, folds)
    name, predictions = (("crossvalidation", "crossvalidation_predictions") if folds else
                         ("comparison", "predictions"))
    # of each method (repetitions, sentences, labels), in the order of the predictions
    likely = {method: joined(own, folds or 1, "test_probabilities").astype(np.float32)
              for method, own in runs.items()}
    write_json(metrics / f"{name}.json", {
        "command": command, "floor": largest_class([row["label"] for row in rows]),
        "entries": entries})
    write_csv(metrics / f"{predictions}.csv", rows)
    write_arrays(metrics / f"{name}_probabilities.npz", likely)
    from plots import draw_study, lines_of  # matplotlib is slow to import
    draw_study(output, name)
    first = {method: own[0] for method, own in runs.items()}
    print_next(output, lines_of({"entries": entries}), first, model)


def main(argv):
    start()
    explain(__doc__, argv)
    command = shlex.join(["bash", "run_all.sh", *argv])
    folds, repeats, flags = split_folds([word for word in argv if word != "--list"])
    refuse(["--method", "--r", "--targets", "--fold"], flags,
           "is what the runs of the study differ in; for one run of your own use train.py")
    seeds, flags = split_seeds(flags)
    study, parts = FOLD_RUNS if folds else RUNS, parts_of(seeds, folds, repeats)
    # a bad flag ends here, and a task that cannot be cut into folds
    args = make_parser().parse_args([*flags, *parts[0], "--method", "full"])
    s, is_list = asked_settings(args), "--list" in argv
    if s.is_qa:
        fail("run_all.sh compares sentence classifiers; questions have run_grid.sh")
    searches = not (given("--lr", flags) or has_searched_rates(s))
    flags = decide_amp(flags)
    jobs = [[*flags, *part, *own.split()] for part in parts for own in study.values()]
    tried, progress = {}, None
    if searches or not is_list and any(not read_flags(job).result.exists() for job in jobs):
        with contextlib.redirect_stdout(sys.stderr if is_list else sys.stdout):
            flags, steps, progress = plan(flags, parts, study, s, searches)
    if is_list:
        if searches:  # what comes after the first rates depends on their results
            jobs = [[*flags, *parts[0], *own.split(), "--lr", f"{lr:g}"] for own in study.values()
                    for lr in first_rates([*flags, *own.split()], steps)]
        print_commands(jobs)
        return

    runs, line, failed = {name: [] for name in study}, None, set()
    for part in parts:
        for name, own in study.items():
            if {"full", name} & failed:
                continue
            rate = []
            if searches:
                if part is parts[0]:
                    tried[name] = search([*flags, *part, *own.split()], steps, progress)
                rate = ["--lr", f"{best_rate(tried[name])['lr']:g}"]
            if not (result := trained([*flags, *part, *own.split(), *rate], progress)):
                failed.add(name)
                continue
            runs[name].append(result | {"checkpoint_mb": checkpoint_mb(args.output, result)})
            said, line = line, mixed_hardware([run for own in runs.values() for run in own])
            if line != said:
                warn(line)
            if progress:
                print(so_far(runs), flush=True)
    model = args.model if s.model_sha256 else None
    if "full" not in failed:
        runs = {name: own for name, own in runs.items() if name not in failed}
        write_study(args.output, model, command, runs, tried, folds)
    if failed:
        fail(f"no whole result of {' '.join(sorted(failed))}, see above; the same command tries "
             "again")


if __name__ == "__main__":
    main(sys.argv[1:])
