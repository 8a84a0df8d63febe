"""What the two studies share: which runs they are, their results, statistics and tables.

compare.py (sentences) and grid.py (questions) are their front doors, plots.py draws what they
write.
"""
import os
import shlex
import statistics
import sys
from pathlib import Path

from files import read_json
from methods import CASES, FOLD_STUDY, STUDY, is_qa, label_of
from settings import Parser, make_parser, model_of, number, read_flags, settings_of, short
from spread import mean_std
from start import fail
from synthetic import CHANCE

# metrics/comparison.json has called full fine-tuning full_ft from the start
SENTENCE_RUNS, FOLD_RUNS = (
    {"full_ft" if name == "full" else name: CASES[name].flags for name in names}
    for names in (STUDY, FOLD_STUDY))
GRID_METHODS = ("full", "lora", "qlora", "dora", "qdora")


def twenty_runs(full, others):
    """{run: flags of train.py} of the grid: every method with 2 and 3 epochs and two learning
    rates, full fine-tuning's and the others'."""
    return {f"{method}_epoch-{epochs}_lr_{lr}":
            f"--method {method} --epochs {epochs} --lr {lr}"
            + (" --r 16" if method != "full" else "")
            for method in GRID_METHODS for epochs in (2, 3)
            for lr in (full if method == "full" else others)}


# The rates of the study on Portuguese SQuAD; the small model's on synthetic questions are higher.
GRID_RUNS = twenty_runs(("2e-4", "4.25e-5"), ("2e-4", "4.25e-5"))
SYNTHETIC_RATES = ("1e-4", "5e-5"), ("1e-3", "5e-4")  # full fine-tuning's, the others'
SYNTHETIC_RUNS = twenty_runs(*SYNTHETIC_RATES)


def is_synthetic(s):
    return "generator" in s


def grid_runs(s):
    """The twenty runs of a grid on the task of the settings `s`."""
    return SYNTHETIC_RUNS if is_synthetic(s) else GRID_RUNS


# --- flags ---------------------------------------------------------------------------------------

def given(flag, argv):
    return any(word.split("=")[0] == flag for word in argv)


def explain(program, argv):
    """Answer --help of a program, by its docstring, whose other flags are train.py's."""
    if {"-h", "--help"} & set(argv):
        print(f"{program.strip()}\n\npython train.py --help explains the other flags.")
        sys.exit()


# train.py's flags that bench.py and growth.py fix
TIMED = ["--method", "--r", "--targets", "--without", "--accumulation", "--lr", "--epochs",
         "--warmup", "--max-steps", "--fold"]


def refuse(flags, argv, why):
    for flag in flags:
        if given(flag, argv):
            fail(f"{flag} {why}")


def split_seeds(argv):
    """(seeds, the other flags) of --seeds 42 43 44; without it, the one of --seed."""
    parser = Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--seeds", nargs="+", type=number(int, 0, 2**32 - 1))
    known, rest = parser.parse_known_args(argv)
    seeds = known.seeds
    if seeds and given("--seed", rest):
        fail("give --seed or --seeds, not both")
    if seeds and len(set(seeds)) < len(seeds):
        fail(f"--seeds names a seed twice: {' '.join(map(str, seeds))}")
    return seeds or [make_parser().parse_args([*rest, "--method", "full"]).seed], rest


# --- runs ----------------------------------------------------------------------------------------

def commands(runs, argv):
    """One train.py command a run, for a shell."""
    train = [sys.executable, str(Path(__file__).with_name("train.py")), *argv]
    return "\n".join(f"{shlex.join(train)} {flags}" for flags in runs.values())


def print_commands(text):
    """On stdout, in the bytes in which the arguments came: a path that the terminal cannot show is
    a path all the same."""
    sys.stdout.buffer.write(os.fsencode(text + "\n"))


def collect(runs, argv):
    """({run: result}, names of the missing runs, output folder) of runs with the flags `argv`.
    Results of other settings are never picked up, because a result's file name is made of its
    settings."""
    results, missing = {}, []
    for name, flags in runs.items():
        args = read_flags(argv + flags.split())
        if args.result.exists():
            results[name] = read_json(args.result)
        else:
            missing.append(name)
    return results, missing, args.output


def mixed_hardware(results):
    """A line that names what differs if times and memory of the results do not compare, or None."""
    for key in "device", "amp":
        if len(values := {str(r["environment"][key]) for r in results}) > 1:
            return (f"runs with different {key} do not compare: {', '.join(sorted(values))}; "
                    "delete one kind's files")
    return None


# --- statistics of the grid ----------------------------------------------------------------------

def rows_of(results):
    """One dict a run, the best F1 first; scores in percent, vs_full in points (None of the run that
    all are compared with), minutes of training without evaluation."""
    rows = [{"run": name, "method": r["settings"]["method"], "epochs": r["settings"]["epochs"],
             "lr": r["settings"]["lr"], "f1": r["f1"], "exact_match": r["exact_match"],
             "validation_f1": max(h["validation_f1"] for h in r["history"]),
             **{f"vs_full_{key}": (r.get("vs_full") or {}).get(key)
                for key in ("points", "low", "high")},
             **{f"f1_{level}": f1 for level, f1 in r.get("f1_by_level", {}).items()},
             **{key: r[key] for key in ("f1_last", "exact_match_last") if key in r},
             "minutes": r["train_time_s"] and r["train_time_s"] / 60,
             "best_epoch": r["best_epoch"],
             "trainable_params": r["trainable_params"], "peak_vram_gb": r["peak_vram_gb"],
             "peak_rss_gb": r["peak_rss_gb"]} for name, r in results.items()]
    return sorted(rows, key=lambda row: -row["f1"])


def statistics_of(rows):
    """One dict a method: n runs, and mean, sample standard deviation, min and max of F1, exact
    match and minutes."""
    out = []
    for method in GRID_METHODS:
        if own := [row for row in rows if row["method"] == method]:
            line = {"method": method, "n": len(own)}
            for key in "f1", "exact_match", "minutes":
                # Trainer's runs may not say how long they took
                values = [row[key] for row in own if row[key] is not None]
                mean, std = mean_std(values) if values else (None, None)
                line |= {f"{key}_mean": mean, f"{key}_std": std,
                         f"{key}_min": min(values, default=None),
                         f"{key}_max": max(values, default=None)}
            out.append(line)
    return out


def best_of(rows):
    """The row with the best validation F1 of every method, of equals the first by name: the test
    questions, by which the rows are sorted, choose nothing."""
    by_name = sorted(rows, key=lambda row: row["run"])
    return [max((row for row in by_name if row["method"] == method),
                key=lambda row: row["validation_f1"]) for method in GRID_METHODS
            if any(row["method"] == method for row in rows)]


def correlation_of(rows):
    """Pearson's correlation of F1 with exact match over the runs; None where one never differs."""
    values = [row["f1"] for row in rows], [row["exact_match"] for row in rows]
    return statistics.correlation(*values) if min(len(set(own)) for own in values) > 1 else None


# --- captions and tables -------------------------------------------------------------------------

def markdown_table(header, rows):
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "".join(f"| {' | '.join(cells)} |\n" for cells in [header, rule, *rows])


def entry_label(entry):
    """What the method of an entry of comparison.json is called."""
    return label_of(entry["runs"][0]["settings"])


def study(runs):
    """One line that says what was compared on what, from a list of runs."""
    run = runs[0]
    if "trainer" in run:
        return f"{len(runs)} runs of Hugging Face's Trainer in {run['trainer']}"
    s, rows = run["settings"], run["rows"]
    what = "questions" if is_qa(s) else "sentences"
    task = "SYNTHETIC questions" if s["task"] == "synthetic" else s["task"]
    devices, amps = (" and ".join(sorted({r["environment"][key] for r in runs}))
                     for key in ("device", "amp"))
    seeds = sorted({r["settings"]["seed"] for r in runs})
    numbers, n = ", ".join(map(str, seeds)), len(seeds)
    size = f"{rows['train']:,} training, {rows['test']:,} test {what}"
    if "fold" in s:
        n_folds = s["fold"][1]
        about = "" if all(r["rows"] == rows for r in runs) else "about "
        size, n = f"{n_folds} folds, each {about}{size}", n * n_folds
    return (f"{s['model']} on {task} ({size}), seed{'s' if len(seeds) > 1 else ''} {numbers} (n = "
            f"{n}), {devices}, amp {amps}")


def command_of(script, results, seeds=()):
    """The command that made a study, told from its runs: its data, its model, its seeds, and what
    is not the default. results: [(the study's own flags, result)]."""
    first, parse = results[0][1], make_parser().parse_args
    if "trainer" in first:
        return first["command"]
    s, has_questions = first["settings"], is_qa(first["settings"])
    data = (["--data", s["task"]] if s["data_sha256"] else
            ["--task", s["task"]] * (s["task"] != ("synthetic" if has_questions else "movies")))
    hub = "squad" if has_questions else "sst2"
    asked = parse(["--method", "full", "--task", hub if s["data_sha256"] else s["task"]])
    is_usual = s["model"] == model_of(asked) and not s["model_sha256"]
    model = [] if is_usual else ["--model", s["model"]]
    folds = ["--folds", str(s["fold"][1])] if "fold" in s else []

    # one's own data, and sentences with another model, have the defaults of a task of the hub
    like = hub if s["data_sha256"] or model and not has_questions else s["task"]
    told = {"method", "task", "data_sha256", "model", "model_sha256", "fold", "generator",
            *["seed"] * (len(seeds) > 1)}
    others = {}  # a flag may be one that full fine-tuning does not have
    for flags, result in results:
        own = result["settings"]
        if "targets" in own and "--targets" not in flags:  # the default rate is then another
            others["targets"] = own["targets"]
            flags += f" --targets {own['targets']}"
        usual = settings_of(parse([*flags.split(), "--task", like]))
        others |= {key: value for key, value in own.items()
                   if key not in told and value is not None and value != usual.get(key)}
    words = []
    for key, value in others.items():
        values = value if isinstance(value, list) else [value] * (value is not True)
        words += [f"--{key.replace('_', '-')}", *map(str, values)]
    seeds = ["--seeds", *map(str, seeds)] if len(seeds) > 1 else []
    return shlex.join(["bash", script, *folds, *data, *model, *words, *seeds])


def made_by(entries):
    return command_of("run_all.sh", [(FOLD_RUNS[name], entry["runs"][0])
                                     for name, entry in entries.items()],
                      entries["full_ft"]["seeds"])


def study_of(entries):
    return study([run for entry in entries.values() for run in entry["runs"]])


def caption(entries):
    n = entries["full_ft"]["n"]
    spread, drawn = ("seeds, for the time over all epochs", "seeds and test sentences") if n > 1 \
        else ("epochs", "test sentences")
    return (f"{study_of(entries)}; ± is the standard deviation over the {spread}; [ ] is a 95 % "
            f"interval, by a paired bootstrap over {drawn}; made by `{made_by(entries)}`")


def memory_key(entries):
    """The GPU's peak where there was a GPU, else that of the whole process."""
    if all(entry["peak_vram_gb"] is not None for entry in entries.values()):
        return "peak_vram_gb", "peak GPU memory (GB)"
    return "peak_rss_gb", "peak resident memory (GB)"


def plus_minus(entry, key, digits, scale=1):
    std = entry[f"{key}_std"]
    spread = "" if std is None else f" ± {scale * std:.{digits}f}"
    return f"{scale * entry[key]:.{digits}f}{spread}"


def points(vs):
    return "" if vs is None else f"{vs['points']:+.1f} [{vs['low']:+.1f}, {vs['high']:+.1f}]"


def table(entries):
    """(header, rows) of the comparison, as strings."""
    key, what = memory_key(entries)
    header = ["method", "lr", "trainable", "of which method / LayerNorm / head", "% of all", "n",
              "test macro-F1", "vs full (points)", "accuracy", "best epochs", "s per epoch",
              what, "trained file (MB)"]

    rows = []
    for name, entry in entries.items():
        kinds, mb = entry["trainable_by_kind"], entry["checkpoint_mb"]
        parts = "/".join(f" {kinds[kind]:,} " for kind in ("method", "layer_norm", "head")).strip()
        rows.append([
            entry_label(entry), short(entry["runs"][0]["settings"]["lr"]),
            f"{entry['trainable_params']:,}", parts if name != "full_ft" else "everything",
            f"{entry['trainable_pct']:.2f}", f"{entry['n']}", plus_minus(entry, "f1_macro", 4),
            points(entry["vs_full"]), plus_minus(entry, "accuracy", 4),
            ", ".join(map(str, entry["best_epoch"])), plus_minus(entry, "epoch_time_s", 1),
            plus_minus(entry, key, 2), "–" if mb is None else f"{mb:.2f}"])
    return header, rows


def fold_caption(entries):
    full = entries["full_ft"]
    return (f"{study_of(entries)}; every one of the {full['test_rows']:,} sentences is tested once "
            "a seed, and macro-F1, NLL (negative log-likelihood, nats) and ECE (expected "
            "calibration error, 15 bins) are of all of them together; ± is the standard deviation "
            "over the folds, for the time over all epochs; [ ] is a 95 % interval, by a paired "
            "bootstrap over folds and sentences, and, for trainings on new rows, Nadeau and "
            f"Bengio's, around the mean of the folds; made by `{made_by(entries)}`")


def fold_table(entries):
    """(header, rows) of a cross-validation, as strings."""
    key, what = memory_key(entries)
    header = ["method", "lr", "trainable", "% of all", "n", "macro-F1", "vs full (points)",
              "for new rows", "NLL", "ECE (%)", "s per epoch", what, "trained file (MB)"]
    rows = []
    for entry in entries.values():
        new, mb = entry["vs_full_new_rows"], entry["checkpoint_mb"]
        rows.append([
            entry_label(entry), short(entry["runs"][0]["settings"]["lr"]),
            f"{entry['trainable_params']:,}", f"{entry['trainable_pct']:.2g}"
            if entry["trainable_pct"] < 1 else f"{entry['trainable_pct']:.1f}", f"{entry['n']}",
            plus_minus(entry, "f1_macro", 4), points(entry["vs_full"]),
            f"[{new['low']:+.1f}, {new['high']:+.1f}]" if new else "",
            plus_minus(entry, "nll", 3), plus_minus(entry, "ece", 1, 100),
            plus_minus(entry, "epoch_time_s", 1), plus_minus(entry, key, 2),
            "–" if mb is None else f"{mb:.2f}" if mb >= 0.01 else f"{mb:.2g}"])
    return header, rows


def fold_markdown(entries):
    return markdown_table(*fold_table(entries)) + f"\n{fold_caption(entries)}.\n"


def markdown(entries):
    return markdown_table(*table(entries)) + f"\n{caption(entries)}.\n"


def grid_markdown(runs):
    """Four tables of the question-answering grid: all runs, their statistics, the best of each
    method with its F1 by level, the top five."""
    rows, first = rows_of(runs), next(iter(runs.values()))
    header = ["run", "F1 (%)", "vs full (points)", "exact match (%)", "training (min)",
              "best epoch", "trainable"]
    cells = [[row["run"], f"{row['f1']:.2f}", points(runs[row["run"]].get("vs_full")),
              f"{row['exact_match']:.2f}",
              "–" if row["minutes"] is None else f"{row['minutes']:.2f}",
              f"{row['best_epoch']} of {row['epochs']}",
              "–" if row["trainable_params"] is None else f"{row['trainable_params']:,}"]
             for row in rows]
    chance = [["one of the four at random", f"{CHANCE:.1f}", "", "25.00", "", "", "0"]]
    chance *= is_synthetic(first["settings"])

    def spread(line, key):
        std = line[f"{key}_std"]
        if line[f"{key}_mean"] is None:
            return "–"
        return (f"{line[f'{key}_mean']:.2f} ± {'–' if std is None else f'{std:.2f}'} "
                f"({line[f'{key}_min']:.2f} to {line[f'{key}_max']:.2f})")

    by_method = [[line["method"], str(line["n"]),
                  *(spread(line, key) for key in ("f1", "exact_match", "minutes"))]
                 for line in statistics_of(rows)]
    levels = list(first.get("f1_by_level", {}))
    best = [[row["run"], f"{row['f1']:.2f}", points(runs[row["run"]].get("vs_full")),
             f"{row['validation_f1']:.2f}", *(f"{row[f'f1_{level}']:.1f}" for level in levels)]
            for row in best_of(rows)]
    flags = grid_runs(first["settings"])
    missing = [name for name in flags if name not in runs and "trainer" not in first]
    command = command_of("run_grid.sh", [(flags.get(name, ""), r) for name, r in runs.items()])
    interval = ("" if "trainer" in first else
                "; [ ] is a 95 % interval, by a paired bootstrap over test questions, of the "
                "difference to full fine-tuning's run with the best validation F1")
    correlation = correlation_of(rows)
    return (f"All {len(runs)} runs by F1: {study(list(runs.values()))}{interval}; made by "
            f"`{command}`.\n\n"
            + markdown_table(header, cells + chance)
            + (f"\nMissing: {', '.join(missing)}.\n" if missing else "")
            + "\nBy method, mean ± standard deviation (min to max) over the n configurations, not "
            "over seeds:\n\n"
            + markdown_table(["method", "n", "F1 (%)", "exact match (%)", "training (min)"],
                             by_method)
            + "\nBest configuration of each method, by validation F1"
            + ("; the last columns are the F1 of each level" if levels else "") + ":\n\n"
            + markdown_table(["run", "F1 (%)", "vs full (points)", "validation F1 (%)", *levels],
                             best)
            + "\nTop five:\n\n" + markdown_table(header, cells[:5])
            + ("" if correlation is None else "\nPearson's correlation of F1 with exact match over "
               f"the {len(rows)} runs: {correlation:.3f}.\n"))


def chosen_rate(entry):
    """The learning rate of a sweep's entry, marked where nothing beyond it was tried."""
    rates = [tried["lr"] for tried in entry["tried"]]
    mark = {max(rates): " ↑", min(rates): " ↓"}.get(entry["lr"], "")
    return short(entry["lr"]) + mark


def sweep_caption(sweep):
    entries = sweep["entries"].values()
    runs = [run for entry in entries for run in entry["runs"]]
    s, seeds = runs[0]["settings"], sorted({run["settings"]["seed"] for run in runs})
    several = len(seeds) > 1
    # parts of a sweep may be from different machines
    where = " or ".join(sorted({"{device}, amp {amp}".format(**run["environment"])
                                for run in runs}))
    n_tried = " or ".join(map(str, sorted({sum(try_["validation"] is not None
                                               for try_ in entry["tried"]) for entry in entries})))
    tried_on = " or on ".join(f"{n:,} rows" if n else "as many rows"
                              for n in sorted({entry["rates_from"] or 0 for entry in entries}))
    return (f"{s['model']} on {s['task']}, {s['epochs']} epochs, seed{'s' * several} "
            f"{', '.join(map(str, seeds))}, {where}; each learning rate is the best of "
            f"{n_tried} by validation, of runs on {tried_on}; "
            + ("± is the standard deviation over the seeds; " if several else "")
            + "[ ] is a 95 % interval, by a paired bootstrap over test rows"
            + (" and seeds" if several else ""))


def sweep_markdown(sweep):
    """The table of a sweep: a line a method and number of training rows."""
    has_questions = any("exact_match" in e for e in sweep["entries"].values())
    header = ["training rows", "method", "lr", "n", "validation F1", "test F1",
              "vs full (points)", *["exact match"] * has_questions, "training (min)", "trainable"]
    rows = [[f"{e['rows']['train']:,}", e["label"], chosen_rate(e), str(e["n"]),
             *(plus_minus(e, key, 2 if has_questions else 4) for key in ("validation", "test")),
             points(e["vs_full"]), *[plus_minus(e, "exact_match", 2) for _ in range(has_questions)],
             plus_minus(e, "minutes", 1), f"{e['trainable_params']:,}"]
            for e in sorted(sweep["entries"].values(), key=lambda e: e["rows"]["train"])]
    commands = dict.fromkeys(f"`{entry['command']}`" for entry in sweep["entries"].values())
    return (markdown_table(header, rows)
            + f"\n{sweep_caption(sweep)}; ↑ and ↓ mark the highest and the lowest rate that was "
            f"tried, beyond which a better one may lie; made by {' and '.join(commands)}.\n")


# The parts of a ledger (memory.py)
PARTS = {"weights": "weights", "gradients": "gradients", "optimizer": "optimizer",
         "kept": "kept for backward"}


def ledger_caption(ledger):
    on_cpu = ledger["device"] == "cpu"
    modules = "the CPU's modules (fast.py)" if on_cpu else "Hugging Face's modules on CUDA"
    return (f"Predicted for {ledger['model']}, batches of {ledger['batch_size']} rows of "
            f"{ledger['max_length']} tokens, amp {ledger['amp']}, {modules}")


def bytes_of(study, name, n, own):
    """What n tasks take, computed: the base once, unless every task has its own. own:
    "trained_bytes" or "file_bytes"."""
    return n * study["methods"][name][own] + (0 if name == "full" else study["base_bytes"])


def multitask_caption(study):
    where = study["environment"]
    return f"{study['model']}, seed {study['seed']} (n = 1), {where['device']}, amp {where['amp']}"


def multitask_markdown(study):
    """Two tables: scores alone and together, and what n tasks take."""
    def f1(values):
        return " / ".join(f"{value:.4f}" for value in values)

    others = [name for name in study["methods"] if name != "full"]
    header = ["task", "test sentences", "full fine-tuning"]
    for name in others:
        header += [f"{study['methods'][name]['label']}: alone / together", "vs full (points)"]
    rows = [[task, f"{row['test_rows']:,}", f1([row["full"]["f1_macro"]])]
            + [cell for name in others
               for cell in (f1([row[name]["f1_macro"], *row[name]["together"][-1:]]),
                            points(row[name]["vs_full"]))]
            for task, row in study["tasks"].items()]

    most = study["methods"][others[0]]["memory"][-1][0]
    counts = (1, 4, 10, most)
    cost = []
    for name, method in study["methods"].items():
        measured = dict(method["memory"])
        held = [f"{(measured.get(n) or bytes_of(study, name, n, 'trained_bytes')) / 1e6:,.0f}"
                + ("" if n in measured else "*") for n in counts]
        cost.append([method["label"], f"{method['file_bytes'] / 1e6:.2f}",
                     f"{1000 * method['switch_ms']:.0f}", f"{method['load_ms']:.1f}", *held,
                     f"{bytes_of(study, name, most, 'file_bytes') / 1e6:,.0f}"])
    header_cost = ["", "file of one task (MB)", "switch in memory (µs)",
                   "switch from the file (ms)",
                   *(f"{n} task{'s' if n > 1 else ''} in memory (MB)" for n in counts),
                   f"{most} tasks on disk (MB)"]

    computed = "; * computed" if any("*" in cell for row in cost for cell in row) else ""
    caption = (f"{multitask_caption(study)}; [ ] is a 95 % interval, by a paired bootstrap over "
               "test sentences. Memory is measured in a fresh process, beyond Python and its "
               "libraries; for all but full fine-tuning with the base and its tokenizer"
               f"{computed}.")
    return (markdown_table(header, rows) + "\n" + markdown_table(header_cost, cost)
            + f"\n{caption}\n")
