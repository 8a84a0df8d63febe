"""Choose each method's learning rate by validation, then compare the methods on the test rows, also
after training on parts of the data.

    python -m tools.sweep --data PATH         eight methods on your own files
    python -m tools.sweep --data PATH --train-rows 1000 4000 all --seeds 42 43 44 \\
                          --methods full lora_r16 "lora --r 64"
    python -m tools.sweep --redraw            draw all tables and figures again; nothing is run

A method tries learning rates with the first seed, as run_all.sh does (rates.py). The one with the
best validation score is used for the other seeds, too. --rates-from N tries the rates on N training
rows. --methods takes names of methods.CASES, or flags of train.py in quotes. All other flags are
train.py's and go to every run.

Results go to metrics/sweep_NAME.json, answers to metrics/sweep_NAME.csv. A later call with other
--train-rows or --methods adds to them. What they hold already is not run again, even if another
machine ran it.
"""
if not __package__:
    raise SystemExit("error: run this from the project's folder: python -m tools.sweep")

import shlex
import sys
from itertools import product

import numpy as np

from common import (
    alone,
    as_written,
    command,
    fail,
    read_columns,
    read_json,
    start,
    warn,
    write_columns,
    write_json,
)
from compare import decide_amp, explain, mixed_hardware, refuse, split_seeds
from methods import CASES, FOLD_STUDY, label_of, named
from rates import best_rate, beyond, probe, score_name, search, steps_of, trained, validation_of
from settings import (
    Parser,
    asked_settings,
    case_label,
    case_settings,
    make_parser,
    number,
    read_settings,
    short,
)
from spread import mean_std, paired_interval, two_way_interval
from verdict import LARGEST, RANDOM, largest_class, marks_of

METHOD_SETTINGS = {"method", "r", "alpha", "dropout", "placement", "bottleneck", "reduction",
                   "targets"}
FREE = METHOD_SETTINGS | {"lr", "seed", "train_rows"}  # in which the runs of one sweep differ


def parse_args(argv):
    """Return the flags of a sweep. methods: [(a method's flags, its settings)]; rest: the flags of
    all runs; settings: full fine-tuning's, which are common to all but for FREE."""
    parser = Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--methods", nargs="+", default=FOLD_STUDY)
    parser.add_argument("--train-rows", nargs="+", default=[None],
                        type=lambda n: None if n == "all" else number(int, 1)(n))
    parser.add_argument("--rates-from", type=number(int, 1))
    parser.add_argument("--redraw", action="store_true")
    args, rest = parser.parse_known_args(argv)
    refuse(["--method", "--lr", "--r", "--targets", "--fold"], rest,
           "is what the runs differ in; for one run of your own use train.py")
    args.seeds, args.rest = split_seeds(rest)
    common = make_parser().parse_args([*args.rest, "--method", "full"])
    args.output, args.settings = common.output, asked_settings(common)

    names, args.methods = args.methods, []
    cases = {case: case_settings(case) for case in CASES}
    for name in names:  # a bad flag ends here, not in the first run
        case = named(name, cases)
        flags = (CASES[case].flags if case else f"--method {name}").split()
        for word in flags:
            if word.startswith("--") and word[2:].split("=")[0] not in METHOD_SETTINGS:
                fail(f"--methods {name!r}: {word} must be the same for all methods")
        args.methods.append((flags, asked_settings(make_parser().parse_args([*args.rest, *flags]))))
    return args


# --- runs ----------------------------------------------------------------------------------------

def run_method(flags, seeds, rows, tried_on, steps):
    """Train a method with each seed at its best learning rate: (results, what rates.search tried).
    rows, tried_on: the flags for the training rows of the runs, and of those that choose, which
    take so many steps."""
    tried = search([*flags, "--seed", str(seeds[0]), *tried_on], steps)
    lr = f"{best_rate(tried)['lr']:g}"
    results = [trained([*flags, *rows, "--seed", str(seed), "--lr", lr]) for seed in seeds]
    if None in results:
        fail(f"a run of {shlex.join(flags)} failed; the same command tries it again")
    return results, tried


# --- entries and answers -------------------------------------------------------------------------

def answers_of(result):
    """Return one number per test row: the predicted label, or the F1 of a question in percent."""
    predictions = result["test_predictions"]
    if read_settings(result).is_qa:
        from qa import question_scores  # torch is slow to import
        return [round(f1, 6) for f1 in question_scores(predictions)["f1"]]
    return [predicted for _, predicted in predictions]


def columns_of(name, seeds):
    """Return the columns of the CSV with the answers of an entry, one per seed."""
    return [f"{name}, seed {seed}" for seed in seeds]


def difference(answers, own, full):
    """Subtract full fine-tuning's test score from a method's, in points, with a 95 % interval over
    test rows and seeds. own, full: columns of `answers`, one per seed. None if a column is missing
    or the two are the same."""
    if own == full or not {*own, *full} <= set(answers):
        return None
    method, baseline = (np.array([answers[column] for column in columns])
                        for columns in (own, full))  # (seeds, test rows)
    if "label" not in answers:
        return two_way_interval(method - baseline, groups=answers.get("group"))
    return paired_interval(answers["label"], method, baseline)


def entry_of(results, tried, rates_from):
    """Make the entry of one method on one number of rows. results: one per seed; tried:
    rates.search's."""
    first = results[0]
    s = read_settings(first)
    entry = {"command": command(), "label": label_of(s), "rows": first["rows"], "n": len(results),
             "lr": s.lr, "rates_from": rates_from, "tried": tried,
             "trainable_params": first["trainable_params"], "vs_full": None}
    values = {"test": [r[score_name(s)] for r in results],
              "validation": [validation_of(r)["validation"] for r in results],
              "minutes": [r["train_time_s"] / 60 for r in results]}
    if s.is_qa:
        values["exact_match"] = [r["exact_match"] for r in results]
        entry["random_f1"] = mean_std(first["test_random"])[0]
        beats = two_way_interval(np.subtract([answers_of(r) for r in results],
                                             first["test_random"]), groups=first.get("test_groups"))
        entry["marks"] = [] if beats["low"] > 0 else [f"not shown to beat {RANDOM}"]
    else:
        labels = np.array([label for label, _ in first["test_predictions"]])
        entry["marks"] = marks_of(labels, np.array([answers_of(r) for r in results]), results)
    for key, own in values.items():
        entry[key], entry[f"{key}_std"] = mean_std(own)
    kept = "settings", "best_epoch", "history", "splits", "environment"
    return entry | {"runs": [{key: result[key] for key in kept} for result in results]}


def seeds_of(entry):
    """Return the seeds of an entry's runs."""
    return [read_settings(run).seed for run in entry["runs"]]


def method_and_rows(name):
    """Split "lora --r 16, all rows", the name of an entry, at the comma."""
    return name.rsplit(", ", 1)


def is_done(entry, seeds, rates_from, s):
    """Tell whether an entry has these seeds, its learning rate was tried on this many rows without
    a failure, and its method is that of the settings `s`."""
    if entry is None or None in [tried["validation"] for tried in entry["tried"]]:
        return False
    own = read_settings(entry["runs"][0])
    is_same_method = all(getattr(own, key) == getattr(s, key) for key in METHOD_SETTINGS)
    has_seeds = set(seeds) <= set(seeds_of(entry))
    return is_same_method and has_seeds and entry["rates_from"] == rates_from


def held(path, s):
    """Return ({name: entry}, {column: answers}) of the sweep at `path`, to which a run with the
    settings `s` would be added. Exit if they are of another task, model or setting."""
    if not path.exists():
        return {}, {}
    entries = read_json(path, "entries")["entries"]
    common = vars(s).keys() - FREE
    if s.amp == "auto":
        common -= {"amp"}  # another machine may have taken it for something else
    with as_written(path):
        others = [read_settings(entry["runs"][0]) for entry in entries.values()]
    for other, key in product(others, sorted(common)):
        if getattr(s, key) != getattr(other, key):
            fail(f"{path} holds results of another study ({key} {getattr(other, key)}, here "
                 f"{getattr(s, key)}); give this one an --output of its own")
    try:
        columns = read_columns(path.with_suffix(".csv"))
        kind = int if "label" in columns else float
        return entries, {name: list(map(kind, column)) for name, column in columns.items()}
    except (OSError, ValueError) as e:
        fail(f"{path.with_suffix('.csv')} is missing or damaged ({e}); delete {path}, too")


def add_entry(path, s, name, entry, results):
    """Write an entry and the answers of its results into the sweep at `path`; return all
    entries."""
    entries, answers = held(path, s)  # read now: another sweep may have added its own
    # answers of an earlier rate or seed go
    answers = {column: own for column, own in answers.items()
               if not column.startswith(f"{name}, seed ")}
    if groups := results[0].get("test_groups"):
        answers["group"] = groups
    if not s.is_qa:
        answers["label"] = [label for label, _ in results[0]["test_predictions"]]
    answers |= zip(columns_of(name, seeds_of(entry)), map(answers_of, results))
    method, _ = method_and_rows(name)
    taken = {other["label"] for who, other in entries.items() if method_and_rows(who)[0] != method}
    if entry["label"] in taken:  # two methods that differ in --alpha, say
        entry["label"] = method
    entries[name] = entry
    # before the JSON, which says that they are there
    write_columns(path.with_suffix(".csv"), answers)
    write_json(path, {"command": command(), "floor": None, "entries": entries})
    return entries


def compare_entries(path, s):
    """Compare every entry of the sweep at `path` with full fine-tuning's; warn about runs that
    failed or do not compare."""
    entries, answers = held(path, s)
    for name, entry in entries.items():
        if failed := [f"{t['lr']:g}" for t in entry["tried"] if t["validation"] is None]:
            warn(f"{name}: no result at {', '.join(failed)}; the same command tries it again")
        own, full = (columns_of(who, seeds_of(entry))
                     for who in (name, f"full, {method_and_rows(name)[1]}"))
        entry["vs_full"] = difference(answers, own, full)
    if line := mixed_hardware([run for entry in entries.values() for run in entry["runs"]]):
        warn(line)
    write_json(path, {"command": command(), "floor": floor_of_sweep(entries, answers),
                      "entries": entries})


def floor_of_sweep(entries, answers):
    """Return [name, score] of answers that need no training, the score as `test` in an entry."""
    if "label" in answers:
        return [LARGEST, largest_class(answers["label"])["f1_macro"]]
    random = [entry["random_f1"] for entry in entries.values() if entry.get("random_f1")]
    return [RANDOM, random[0]] if random else None


# --- table and figure ----------------------------------------------------------------------------

def chosen_rate(entry):
    """Write the learning rate of an entry, with an arrow if nothing beyond it was tried."""
    further = beyond(entry["tried"])
    return short(entry["lr"]) + ("" if not further else " ↑" if further > entry["lr"] else " ↓")


def sweep_caption(sweep):
    """Say what the table of a sweep shows; up to the semicolon, what was run."""
    entries = sweep["entries"].values()
    runs = [run for entry in entries for run in entry["runs"]]
    s, seeds = read_settings(runs[0]), sorted({seed for e in entries for seed in seeds_of(e)})
    # parts of a sweep may be from different machines
    where = sorted({"{device}, amp {amp}".format(**run["environment"]) for run in runs})
    n_tried = sorted({sum(t["validation"] is not None for t in e["tried"]) for e in entries})
    tried_on = [f"{n:,} rows" if n else "as many rows"
                for n in sorted({entry["rates_from"] or 0 for entry in entries})]
    many, n = len(seeds) > 1, {entry["n"] for entry in entries}
    over = "test rows and seeds" if max(n) > 1 else "test rows only"
    if 1 in n and over.endswith("seeds"):
        over += " (n = 1: test rows only)"
    together = ("; questions about one passage, or that differ in names and numbers alone, are "
                "drawn together") * s.is_qa
    return (f"{s.model} on {s.task}, {s.epochs} epoch{'s' * (s.epochs > 1)}, seed{'s' * many} "
            f"{', '.join(map(str, seeds))}, {' or '.join(where)}; each learning rate is the best "
            f"of {' or '.join(map(str, n_tried))} by validation, of runs on "
            f"{' or on '.join(tried_on)}; {'± is the standard deviation over the seeds; ' * many}"
            f"[ ] is the 95 % interval of the difference, over {over}{together}")


def sweep_markdown(sweep):
    """Make the table of a sweep, with one line per method and number of training rows, and its
    caption."""
    from plots import floor_row, markdown_table, plus_minus, points  # matplotlib is slow
    entries = sorted(sweep["entries"].values(), key=lambda e: e["rows"]["train"])
    has_questions = any("exact_match" in e for e in entries)
    more, digits = (["exact match"], 2) if has_questions else ([], 4)
    header = ["training rows", "method", "lr", "n", "validation F1", "test F1",
              "vs full (points)", *more, "training (min)", "trainable"]
    rows = [[f"{e['rows']['train']:,}", e["label"] + (" †" if e["marks"] else ""), chosen_rate(e),
             str(e["n"]),
             plus_minus(e, "validation", digits), plus_minus(e, "test", digits),
             points(e["vs_full"]), *(plus_minus(e, "exact_match", digits) for _ in more),
             plus_minus(e, "minutes", 1), f"{e['trainable_params']:,}"] for e in entries]
    if floor := sweep["floor"]:
        rows.append(floor_row(header, "", {"method": floor[0], "trainable": "0",
                                           "test F1": f"{floor[1]:.{digits}f}"}))
    marks = "".join(f"† {mark}; " for mark in dict.fromkeys(m for e in entries for m in e["marks"]))
    commands = dict.fromkeys(f"`{e['command']}`" for e in sweep["entries"].values())
    return (markdown_table(header, rows)
            + f"\n{sweep_caption(sweep)}; ↑ and ↓ mark the highest and the lowest rate that was "
            f"tried, beyond which a better one may lie; {marks}made by {' and '.join(commands)}.\n")


def draw_sweep(path):
    """Draw the sweep at `path` into figures/, a row or a line per method, and print its table."""
    from plots import FAR, name_rows, plt, plus_minus, save_figure, write_table
    sweep, figures = read_json(path, "entries", "floor"), path.parents[1] / "figures"
    entries = sorted(sweep["entries"].values(), key=lambda e: e["rows"]["train"])
    ranked = sorted(entries, key=lambda e: (e["label"] != case_label("full"), -e["test"]))
    far = [e for e in entries if e["label"] == case_label("head") and e["vs_full"]
           and e["vs_full"]["points"] < -FAR]  # it would press all others together
    labels = list(dict.fromkeys(e["label"] for e in ranked if e not in far))
    looks = {case_label(name): {"color": c, "marker": m} for name, (_, c, m) in CASES.items()}
    sizes = sorted({e["rows"]["train"] for e in entries})
    is_one = len(sizes) == 1
    fig, axes = plt.subplots(1, 2, figsize=(9, 1.2 + 0.4 * len(labels) if is_one else 4.2),
                             sharey=is_one, subplot_kw={"xmargin": 0.1, "ymargin": 0.12})

    for i, label in enumerate(labels):
        own = [e for e in entries if e["label"] == label]
        test, std, points, low, high = np.array([(e["test"], e["test_std"], *map(
            (e["vs_full"] or {}).get, ("points", "low", "high"))) for e in own], float).T
        look = looks.get(label, {"color": "#777777", "marker": "*"}) | {"ms": 8, "capsize": 3}
        hollow = [k for k, e in enumerate(own) if e["n"] == 1 and not is_one]
        # beside one another, not on one another
        at = np.log([e["rows"]["train"] for e in own]) + 0.1 * (i - (len(labels) - 1) / 2)
        for ax, x, ends, said in (
                (axes[0], test, [std], plus_minus(own[0], "test", 1 if test[0] > 1 else 3)),
                (axes[1], points, [points - low, high - points], f"{points[0]:+.1f}")):
            ax.errorbar(*((x, [i], None, ends) if is_one else (at, x, ends)), label=label, **look)
            ax.plot(at[hollow], x[hollow], look["marker"], color="white", ms=4, zorder=5)
            if is_one and not np.isnan(x[0]):
                ax.annotate(said, (x[0], i), (0, 7), textcoords="offset points", ha="center",
                            bbox={"color": "white", "pad": 0})
    (axes[1].axvline if is_one else axes[1].axhline)(0, color="black", linewidth=1)
    axes[0].set_title("test F1" + ", bar: std over seeds" * any(e["n"] > 1 for e in entries)
                      + "; hollow: one seed" * (not is_one))
    axes[1].set_title("points against full, bar: 95 % interval")
    if is_one:
        name_rows(axes[0], labels)
    else:
        axes[0].legend(fontsize=9)
        plt.setp(axes, xticks=np.log(sizes), xticklabels=[f"{n:,}" for n in sizes])
    note = f"{sizes[0]:,} training rows" if is_one else "training rows"
    for e in far[-1:]:
        note += f"; {e['label']} is below the scale: {e['test']:.3g} on {e['rows']['train']:,}"
    fig.supxlabel(note, fontsize=11)
    fig.suptitle(sweep_caption(sweep).partition(";")[0], fontsize=9)
    save_figure(fig, figures / f"{path.stem}.png")
    write_table(figures / f"{path.stem}.md", sweep_markdown(sweep))


def redraw(output):
    """Draw every sweep in output/metrics/ again."""
    paths = sorted(output.glob("metrics/sweep_*.json"))
    if not paths:
        fail(f"{output / 'metrics'} holds no sweep_*.json; python -m tools.sweep makes one")
    for path in paths:
        draw_sweep(path)


def main(argv):
    start()
    explain(__doc__, argv)
    args = parse_args(argv)
    if args.redraw:
        redraw(args.output)
        return
    path = args.output / "metrics" / f"sweep_{args.settings.task}.json"
    entries, _ = held(path, args.settings)

    for n in args.train_rows:
        rows = ["--train-rows", str(n)] if n else []
        tried_on = ["--train-rows", str(args.rates_from)] if args.rates_from else rows
        names = {f"{shlex.join(flags[1:])}, {n or 'all'} rows": (flags, s)
                 for flags, s in args.methods}
        missing = [name for name, (_, s) in names.items()
                   if not is_done(entries.get(name), args.seeds, args.rates_from, s)]
        if missing:
            rest = decide_amp(args.rest, [run for e in entries.values() for run in e["runs"]])
            size = probe([*rest, *tried_on, "--method", "full"])
        for name in missing:
            flags, s = names[name]
            results, tried = run_method([*rest, *flags], args.seeds, rows, tried_on,
                                        steps_of(s, size["examples"]))
            entry = entry_of(results, tried, args.rates_from)
            with alone(path.parent):
                entries = add_entry(path, args.settings, name, entry, results)
    with alone(path.parent):
        compare_entries(path, args.settings)
    draw_sweep(path)


if __name__ == "__main__":
    main(sys.argv[1:])
