"""Each method's learning rate by validation, then its test score, on growing parts of the data.

    python sweep.py --data DIR                         eight methods on your own files
    python sweep.py --data DIR --train-rows 1000 4000 all --seeds 42 43 44 --methods full lora_r16

Of three learning rates (of run_grid.sh's two for its own methods and questions) a method takes the
one with the best validation score under the first seed; with that one the other seeds run, too.
--rates-from N tries them on N training rows instead of on all. --methods are names of
methods.CASES, or train.py's flags in quotes: "lora --r 64". The runs are train.py's, one after the
other, and other flags are its flags. --train-rows or --methods of a later call join the table of
the earlier ones; what metrics/sweep_NAME.json and sweep_NAME.csv, the answers, hold already is not
run again, even if another machine ran it.
"""
import csv
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np

from files import read_json, write_csv, write_json
from methods import CASES, FOLD_STUDY, METHODS, WIDE_RATE, is_qa, label_of, row_of
from settings import DEFAULT_MODEL, Parser, make_parser, number, read_flags, settings_of
from spread import mean_interval, mean_std, paired_bootstrap
from start import command, fail, start, warn
from studies import (
    GRID_METHODS,
    SYNTHETIC_RATES,
    explain,
    is_synthetic,
    mixed_hardware,
    refuse,
    split_seeds,
)

TRAIN = Path(__file__).with_name("train.py")
# settings in which the runs of one sweep differ
FREE = {"method", "r", "alpha", "dropout", "placement", "bottleneck", "reduction", "targets", "lr",
        "seed", "train_rows"}


def rates_of(s):
    """The learning rates that are tried, for the method, the task and the model of the settings
    `s`."""
    row = row_of(s)
    if is_synthetic(s) and s["method"] in GRID_METHODS:
        # the grid's, so that other seeds repeat its better configurations
        full, others = SYNTHETIC_RATES
        return tuple(sorted(map(float, full if row == METHODS["full"] else others)))
    if s["model"] != DEFAULT_MODEL:
        # a half, one and two times the default
        default = row.rates.questions if is_qa(s) else row.rates.sentences
        return default / 2, default, 2 * default
    if row == METHODS["full"]:
        return 5e-5, 1e-4, 2e-4
    best = WIDE_RATE if "targets" in s else row.rates.rated
    return best / 2, best, 2 * best


def score_name(s):
    return "f1" if is_qa(s) else "f1_macro"


def validation_score(result):
    """The best of all epochs, from which the test score is taken."""
    return max(h[f"validation_{score_name(result['settings'])}"] for h in result["history"])


def run(flags):
    """The result of train.py with these flags, run if it is not there yet; None if it failed."""
    args = read_flags(flags)
    if not args.result.exists():
        print(f"== train.py {shlex.join(flags)}")
        if subprocess.run([sys.executable, TRAIN, *flags]).returncode:
            return None
    return read_json(args.result)


def choose_rate(flags):
    """(best learning rate, {rate: validation score, None of a run that failed})."""
    scores = {}
    for lr in rates_of(settings_of(make_parser().parse_args(flags))):
        result = run([*flags, "--lr", f"{lr:g}"])
        scores[lr] = result and validation_score(result)
    done = {lr: score for lr, score in scores.items() if score is not None}
    if not done:
        fail(f"no learning rate worked for {shlex.join(flags)}")
    return max(done, key=done.get), scores


def answers_of(result):
    """One number a test row: the label's that was predicted, of a question its F1 in percent."""
    if is_qa(result["settings"]):
        from qa import question_scores  # torch is slow to import
        return [round(f1, 6) for f1 in question_scores(result["test_predictions"])["f1"]]
    return [predicted for _, predicted in result["test_predictions"]]


def truth_of(result):
    """{column: what an answer is held against}: the test rows' labels, of questions nothing."""
    return {} if is_qa(result["settings"]) else {
        "label": [label for label, _ in result["test_predictions"]]}


def columns_of(name, seeds):
    """The columns of a sweep's CSV that hold its answers, one a seed."""
    return [f"{name}, seed {seed}" for seed in seeds]


def difference(answers, own, full):
    """Test score of some columns of `answers` minus that of full fine-tuning's, of the same seeds,
    in points, with a 95 % interval over test rows and seeds; None where not all are there."""
    if own == full or not {*own, *full} <= set(answers):
        return None
    method, baseline = (np.array([answers[column] for column in columns])
                        for columns in (own, full))  # (seeds, test rows)
    if "label" not in answers:
        return mean_interval(method - baseline)
    return paired_bootstrap(answers["label"], method, baseline)


def entry_of(results, scores, rates_from):
    """What the table holds of one method on one number of rows. results: one a seed; scores:
    choose_rate's."""
    first, name = results[0], score_name(results[0]["settings"])
    entry = {"label": label_of(first["settings"]), "rows": first["rows"], "n": len(results),
             "lr": first["settings"]["lr"], "rates_from": rates_from,
             "tried": [{"lr": lr, "validation": score} for lr, score in scores.items()],
             "trainable_params": first["trainable_params"], "vs_full": None}
    values = {"test": [r[name] for r in results],
              "validation": [validation_score(r) for r in results],
              "minutes": [r["train_time_s"] / 60 for r in results]}
    if "exact_match" in first:
        values["exact_match"] = [r["exact_match"] for r in results]
    for key, own in values.items():
        entry[key], entry[f"{key}_std"] = mean_std(own)
    return entry | {
        "runs": [{key: r[key] for key in ("settings", "best_epoch", "history", "splits",
                                          "environment")} for r in results]}


def odd_setting(s, other):
    """The first setting in which two runs of one sweep may not differ, and these do; or None."""
    return next((key for key in sorted((s.keys() | other.keys()) - FREE)
                 if s.get(key) != other.get(key)), None)


def held(path, s):
    """({name: entry}, {column: answers}) of the sweep at `path`, which a run with the settings `s`
    would join; ends if they are of another task, model or setting."""
    if not path.exists():
        return {}, {}
    there = read_json(path)
    if not isinstance(there, dict) or "entries" not in there:
        fail(f"{path} is damaged (not a sweep); delete it")
    for entry in there["entries"].values():
        other = entry["runs"][0]["settings"]
        if key := odd_setting(s, other):
            fail(f"{path} holds results of another study ({key} {other.get(key)}, here "
                 f"{s.get(key)}); give this one an --output of its own")
    try:
        with open(path.with_suffix(".csv"), newline="", encoding="utf-8") as file:
            head, *rows = csv.reader(file)
    except (OSError, ValueError) as e:
        fail(f"{path.with_suffix('.csv')} is missing or damaged ({e}); delete {path}, too")
    return there["entries"], {name: [int(x) if name == "label" or "label" in head else float(x)
                                     for x in column] for name, column in zip(head, zip(*rows))}


def method_of(name):
    """The method's flags in the name of an entry."""
    return name.rsplit(", ", 1)[0]


def seeds_of(entry):
    return [run["settings"]["seed"] for run in entry["runs"]]


def is_done(entry, seeds, rates_from, s):
    """Whether an entry has these seeds, its learning rate tried on this many rows, no try of it
    failed, and its method is that of the settings `s`."""
    if (entry is None or entry["rates_from"] != rates_from
            or not set(seeds) <= set(seeds_of(entry))):
        return False
    if any(tried["validation"] is None for tried in entry["tried"]):
        return False
    own = entry["runs"][0]["settings"]
    return all(own.get(key) == s.get(key) for key in FREE - {"lr", "seed", "train_rows"})


def size(text):
    """An argparse type: a number of rows, or None of "all"."""
    return None if text == "all" else number(int, 1)(text)


def parse(argv):
    """([(a method's flags, its settings)], sizes, rates_from, seeds, the other flags)."""
    parser = Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--methods", nargs="+", default=FOLD_STUDY)
    parser.add_argument("--train-rows", nargs="+", type=size, default=[None])
    parser.add_argument("--rates-from", type=number(int, 1))
    known, rest = parser.parse_known_args(argv)
    refuse(["--method", "--lr", "--r", "--targets", "--fold"], rest,
           "is what the runs differ in; for one run of your own use train.py")
    seeds, rest = split_seeds(rest)
    methods = [shlex.split(CASES[name].flags if name in CASES else f"--method {name}")
               for name in known.methods]
    common, with_settings = read_flags([*rest, "--method", "full"]).settings, []
    for flags in methods:  # a bad flag ends here, not in the first run
        refuse(["--lr", "--seed", "--fold", "--train-rows"], flags, "does not belong to a method")
        s = read_flags([*rest, *flags]).settings
        if key := odd_setting(s, common):
            fail(f"--methods {shlex.join(flags[1:])!r}: {key.replace('_', ' ')} must be the same "
                 "for all methods")
        with_settings.append((flags, s))
    return with_settings, known.train_rows, known.rates_from, seeds, rest


def main(argv):
    start()
    explain(__doc__, argv)
    methods, sizes, rates_from, seeds, rest = parse(argv)
    args = read_flags([*rest, "--method", "full"])
    path = args.output / "metrics" / f"sweep_{args.settings['task']}.json"
    entries, _ = held(path, args.settings)

    for n in sizes:
        rows = ["--train-rows", str(n)] if n else []
        for flags, s in methods:
            name = f"{shlex.join(flags[1:])}, {n or 'all'} rows"
            if is_done(entries.get(name), seeds, rates_from, s):
                continue
            common, base = [*rest, *flags], ["--seed", str(seeds[0])]
            tried_on = ["--train-rows", str(rates_from)] if rates_from else rows
            lr, scores = choose_rate([*common, *base, *tried_on])
            results = [run([*common, *rows, "--seed", str(seed), "--lr", f"{lr:g}"])
                       for seed in seeds]
            if None in results:
                fail(f"a run of {shlex.join(flags)} failed; the same command tries it again")
            entries, answers = held(path, args.settings)  # another sweep may have added its own
            answers = {column: own for column, own in answers.items()
                       if not column.startswith(f"{name}, seed ")}  # of another rate or seed
            answers |= truth_of(results[0]) | dict(zip(columns_of(name, seeds),
                                                       map(answers_of, results)))
            entry = {"command": command(), **entry_of(results, scores, rates_from)}
            taken = {other["label"] for who, other in entries.items()
                     if method_of(who) != method_of(name)}
            if entry["label"] in taken:  # two methods that differ in --alpha, say
                entry["label"] = method_of(name)
            entries[name] = entry
            # before the JSON, which says that they are there
            write_csv(path.with_suffix(".csv"), [dict(zip(answers, row))
                                                 for row in zip(*answers.values())])
            write_json(path, {"command": command(), "entries": entries})
    entries, answers = held(path, args.settings)
    for name, entry in entries.items():
        if failed := [f"{t['lr']:g}" for t in entry["tried"] if t["validation"] is None]:
            warn(f"{name}: no result at {', '.join(failed)}; the same command tries it again")
        own, full = (columns_of(who, seeds_of(entry))
                     for who in (name, name.replace(method_of(name), "full", 1)))
        entry["vs_full"] = difference(answers, own, full)
    if line := mixed_hardware([run for entry in entries.values() for run in entry["runs"]]):
        warn(line)
    write_json(path, {"command": command(), "entries": entries})
    from plots import draw_sweep  # matplotlib is slow to import
    draw_sweep(args.output, path.stem)


if __name__ == "__main__":
    main(sys.argv[1:])
