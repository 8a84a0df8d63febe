"""The study of question answering: twenty runs, and what becomes of them.

    bash run_grid.sh                    trains what is missing, and makes metrics/grid.json, tables
                                        and figures of all runs that worked
    bash run_grid.sh --data DIR         first finds each method's learning rate on one's own
                                        questions; the twenty runs are then at the best and the
                                        better of its neighbours, with more epochs if three are few
                                        steps
    bash run_grid.sh --list             prints the twenty commands, one per line, for xargs -P, GNU
                                        parallel or a Slurm array; with --data after the search
    python -m tools.grid --redraw       draws again what metrics/grid.json of --output holds
    python -m tools.grid --trainer FOLDER --output DIR
                                        gathers runs that Hugging Face's Trainer left

With --trainer, every folder in FOLDER whose name tells a method, a number of epochs and a learning
rate is a run, however the name is written: 2_epochs_base_qa_2e-4 (base is full fine-tuning),
lora-epoch-3_lr_4.25e-05, qdora_epoch-2_lr_2e-4. Its scores are those of the evaluation with the
best eval_f1, and of the last one. Its time is Trainer's train_runtime, evaluation included, for a
resumed training that of the last part.
"""
if not __package__:
    raise SystemExit("error: run this from the project's folder: python -m tools.grid")

import contextlib
import json
import math
import os
import re
import shlex
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import numpy as np

from common import (
    as_written,
    check_ordinary,
    check_writable,
    command,
    fail,
    read_json,
    start,
    warn,
    warned,
    write_columns,
    write_csv,
    write_json,
)
from compare import decide_amp, explain, mixed_hardware, print_commands, print_next, refuse
from fetch import model_folder, synthetic_folder
from methods import CASES, label_of
from rates import TRAIN, best_rate, edge_mark, plan, search, trained
from settings import (
    DEFAULT_MODEL,
    Parser,
    Settings,
    given,
    is_synthetic,
    make_parser,
    read_flags,
    read_settings,
    short,
)
from spread import two_way_interval
from tools.sweep import difference
from tools.synthetic import CHANCE
from verdict import RANDOM, Line, verdict

GRID_METHODS = ("full", "lora", "qlora", "dora", "qdora")
STYLES = CASES | {"lora": CASES["lora_r16"]}
# What the folders of Trainer's runs call them, and words that name a method of no grid
FOLDER_WORDS = {"base": "full", **{method: method for method in GRID_METHODS}}
OTHER_METHODS = "adapter|ia3|loraplus|lora[-_+]plus|adalora|loha|lokr|vera|bitfit|prefix|prompt"


# --- the twenty runs ------------------------------------------------------------------------------

GRID_FLAGS = {name: f"--method {name}" + ("" if name == "full" else " --r 16")
              for name in GRID_METHODS}


def twenty_runs(rates, epochs=(2, 3)):
    """Return {run: flags of train.py}: every method with two numbers of epochs and two learning
    rates. rates: {method: two rates, as texts}."""
    return {f"{name}_epoch-{n}_lr_{lr}": f"{GRID_FLAGS[name]} --epochs {n} --lr {lr}"
            for name in GRID_METHODS for n in epochs for lr in rates[name]}


# The rates of the study on Portuguese SQuAD; the small model's on generated questions are higher.
GRID_RUNS = twenty_runs(dict.fromkeys(GRID_METHODS, ("2e-4", "4.25e-5")))
SYNTHETIC_RUNS = twenty_runs(dict.fromkeys(GRID_METHODS, ("1e-3", "5e-4"))
                             | {"full": ("1e-4", "5e-5")})


def two_rates(tried):
    """Return the best learning rate of a search and the better one of its neighbours."""
    ordered = sorted(tried, key=lambda entry: entry["lr"])
    at = ordered.index(best_rate(tried))
    near = ordered[max(0, at - 1):at] + ordered[at + 1:at + 2]
    return [short(entry["lr"]) for entry in (ordered[at], best_rate(near) or near[0])]


def grid_runs(run, flags):
    """Return the twenty runs of the grid that full fine-tuning's Run is one of, {run: flags of
    train.py}, {method: what its search tried}, and the Progress of both, if there is a search. On
    one's own questions each method's learning rate is searched; what is trained already answers at
    once. flags: the study's."""
    runs, tried, progress = SYNTHETIC_RUNS if is_synthetic(run.settings) else GRID_RUNS, {}, None
    if run.data:
        # beside those of the search there are two runs of each method with fewer epochs
        longer, steps, progress = plan(flags, [[]], GRID_FLAGS, run.settings, True,
                                       2 * len(GRID_FLAGS), share_cores())
        tried = dict(zip(GRID_FLAGS, side_by_side(
            lambda own: search([*longer, *own.split()], steps, progress), GRID_FLAGS.values())))
        n = make_parser().parse_args([*longer, "--method", "full"]).epochs
        runs = twenty_runs({name: two_rates(tried[name]) for name in GRID_METHODS},
                           (math.ceil(2 * n / 3), n))
    return {name: [*flags, *own.split()] for name, own in runs.items()}, tried, progress


def fetch_first(run):
    """Make what several runs need before they start at once."""
    if run.model == DEFAULT_MODEL:
        model_folder()
    if is_synthetic(run.settings):
        synthetic_folder(run.settings.data_sha256)


def share_cores():
    """Return how many runs train side by side: one on a GPU; on CPUs two, each on half of the
    cores, for such small batches cannot keep all cores busy."""
    import torch  # slow
    if torch.cuda.is_available():
        return 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, torch.get_num_threads() // 2)))
    os.environ |= {"TQDM_DISABLE": "1", "PYTHONUNBUFFERED": "1"}
    return 2


def side_by_side(function, items):
    """Return what a function that trains makes of each of the items."""
    warned()  # makes the file that the runs share, before two of them ask for it
    with ThreadPoolExecutor(share_cores()) as pool:
        return list(pool.map(function, items))


def train_all(runs, progress=None):
    """Train what is missing of {run: flags of train.py}; return {run: result} of those that
    worked."""
    results = zip(runs, side_by_side(lambda flags: trained(flags, progress), runs.values()))
    return {name: result for name, result in results if result}


# --- runs of Hugging Face's Trainer ---------------------------------------------------------------

def parse_name(name):
    """Return (method, epochs, learning rate) of a run's folder, or None if its name does not say
    each of them once. Words are taken whole, so that lora is not found in qlora; numbers are
    compared as numbers."""
    name = re.sub(r"q[-_]?(lora|dora)", r"q\1", re.sub("bert[-_]base", "bert", name.lower()))
    number = r"(?:\d+\.?\d*|\.\d+)(?:e-?\d+)?"
    # lr_2e-4, lr-0.0002; without lr the one number with an exponent
    rates = (re.findall(rf"(?<![a-z])lr[-_=]?({number})(?![a-z\d]|\.\d)", name)
             or re.findall(r"(?<![a-z\d.-])\d+(?:\.\d+)?e-\d+(?![a-z\d])", name))
    epochs = (re.findall(r"(?<![a-z])epochs?[-_=]?(\d+)(?![a-z\d.])", name)
              or re.findall(r"(?<![a-z\d.-])(\d+)[-_]?epochs?(?![a-z\d])", name))
    methods = {FOLDER_WORDS[word] for word in re.findall("[a-z]+", name) if word in FOLDER_WORDS}
    if ({len(rates), len(epochs), len(methods)} != {1} or not float(rates[0])
            or re.search(OTHER_METHODS, name)):
        return None
    return methods.pop(), int(epochs[0]), float(rates[0])


def find_state(folder):
    """Return the path of a run's trainer_state.json: its own, or that of the checkpoint with the
    highest number; None if there is neither."""
    if (own := folder / "trainer_state.json").exists():
        return own
    checkpoints = {int(path.parent.name.removeprefix("checkpoint-")): path
                   for path in folder.glob("checkpoint-*/trainer_state.json")
                   if path.parent.name.removeprefix("checkpoint-").isdecimal()}
    return checkpoints[max(checkpoints)] if checkpoints else None


def in_percent(path, evaluations):
    """Return Trainer's evaluations with F1 and exact match in percent: some metrics give
    fractions, and no trained model has an F1 of 1 percent."""
    keys = "eval_f1", "eval_exact_match"
    if max(e[key] for e in evaluations for key in keys) > 1:
        return evaluations
    warn(f"{path}: F1 and exact match are taken as fractions of 1, not as percent")
    return [e | {key: 100 * e[key] for key in keys} for e in evaluations]


def trainer_run(folder):
    """Read a run's folder as a result of the grid, but for its settings; None if there is no
    evaluation yet."""
    # run_qa.py evaluates after it has written the state, into files of their own
    ends = [folder / "eval_results.json", folder / "all_results.json"]
    paths = [path for path in (find_state(folder), *ends) if path and path.exists()]
    logs, evaluations, steps = [], [], {}
    try:
        for path in paths:
            check_ordinary(path)
            state = json.loads(path.read_text(encoding="utf-8"))
            log = state.get("log_history", [{"epoch": 0.0, **state}])
            logs, steps = [*logs, *log], steps or state
            if found := [e for e in log if math.isfinite(e.get("eval_f1", math.nan))]:
                evaluations = evaluations or in_percent(path, found)
        if not evaluations:
            return None
        times = [e["train_runtime"] for e in logs if "train_runtime" in e]
        best, last = max(evaluations, key=lambda e: e["eval_f1"]), evaluations[-1]
        if steps.get("global_step", 0) < steps.get("max_steps", 0):
            warn(f"{paths[0]} ends at step {steps['global_step']:,} of {steps['max_steps']:,}: "
                 "what came later, if anything did, is not in its scores")
        return {"f1": best["eval_f1"], "exact_match": best["eval_exact_match"],
                "f1_last": last["eval_f1"], "exact_match_last": last["eval_exact_match"],
                "best_epoch": round(best["epoch"], 2),
                "history": [{"validation_f1": e["eval_f1"]} for e in evaluations],
                "train_time_s": times[-1] if times else None,
                "trainable_params": None, "peak_vram_gb": None, "peak_rss_gb": None}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        fail(f"{path} is damaged ({type(e).__name__}: {e})")


def trainer_runs(folder):
    """Read a folder of Trainer's runs: ({run: result}, [names of the missing runs]). A run is
    missing if others have its method, its epochs and its rate, but none has all three."""
    if not folder.is_dir():
        fail(f"--trainer {folder}: no such folder")
    found, unfinished = {}, set()
    for path in sorted(path for path in folder.iterdir() if path.is_dir()):
        if not (parsed := parse_name(path.name)):
            warn(f"{path} is left out: its name does not say method, epochs and learning rate")
        elif parsed in found:
            fail(f"{found[parsed][0]} and {path} are both {' '.join(map(str, parsed))}")
        elif result := trainer_run(path):
            told = dict(zip(("method", "epochs", "lr"), parsed), task=folder.resolve().name)
            # a folder does not tell the other settings
            settings = dict.fromkeys(vars(Settings())) | told | {"is_qa": True}
            found[parsed] = path, result | {"settings": settings, "trainer": str(folder)}
        else:
            unfinished.add(parsed)
    if not found:
        fail(f"{folder} holds no run of Trainer with an eval_f1 in its trainer_state.json")

    methods, epochs, rates = map(set, zip(*found, *unfinished))
    methods = [method for method in GRID_METHODS if method in methods]
    results, missing = {}, []
    for run in product(methods, sorted(epochs), sorted(rates, reverse=True)):
        name = f"{run[0]}_epoch-{run[1]}_lr_{short(run[2])}"
        if run in found:
            results[name] = found[run][1]
        else:
            missing.append(name)
    return results, missing


# --- scores ---------------------------------------------------------------------------------------

def add_scores(results):
    """Give every result `f1_by_level`, where its questions have levels, and `vs_full`: its F1 minus
    that of full fine-tuning's run with the best validation F1, over the same questions. Return the
    F1 of every question, {run: F1s in percent}, and its `group`, if there are groups."""
    import qa  # torch is slow to import
    f1 = {name: np.round(qa.question_scores(result.pop("test_predictions"))["f1"], 6)
          for name, result in results.items()}
    answers = dict(f1)
    full = next((row["run"] for row in best_of(rows_of(results)) if row["method"] == "full"), None)
    for name, result in results.items():
        result.pop("validation", None)
        if groups := result.pop("test_groups", None):
            answers["group"] = groups
        if levels := result.pop("test_levels", None):
            result["f1_by_level"] = {level: float(f1[name][np.array(levels) == level].mean())
                                     for level in dict.fromkeys(levels)}
        result["grouped"] = groups is not None
        if full and name != full:
            result["vs_full"] = difference(answers, [name], [full])
        if random := result.pop("test_random", None):
            result["random_f1"] = statistics.mean(random)
            low = two_way_interval(f1[name] - random, groups=groups)["low"]
            result["beats_random"] = low > 0
    return answers


def rows_of(results):
    """Return one dict per run, the best F1 first: scores in percent, vs_full in points (None for
    the run that all are compared with), minutes of training without evaluation."""
    rows = []
    for name, r in results.items():
        vs, levels = r.get("vs_full") or {}, r.get("f1_by_level", {})
        rows.append({
            "run": name, **{key: r["settings"][key] for key in ("method", "epochs", "lr")},
            "f1": r["f1"], "exact_match": r["exact_match"],
            "validation_f1": max(h["validation_f1"] for h in r["history"]),
            **{f"vs_full_{key}": vs.get(key) for key in ("points", "low", "high")},
            **{f"f1_{level}": f1 for level, f1 in levels.items()},
            **{key: r[key] for key in ("f1_last", "exact_match_last") if key in r},
            "minutes": r["train_time_s"] and r["train_time_s"] / 60,
            **{key: r[key] for key in ("best_epoch", "trainable_params", "peak_vram_gb",
                                       "peak_rss_gb")}})
    return sorted(rows, key=lambda row: -row["f1"])


def best_of(rows):
    """Return each method's row with the best validation F1, of equal ones the first by name: the
    test questions must choose nothing."""
    best = {}
    for row in sorted(rows, key=lambda row: (GRID_METHODS.index(row["method"]),
                                             -row["validation_f1"], row["run"])):
        best.setdefault(row["method"], row)
    return list(best.values())


# --- tables ---------------------------------------------------------------------------------------

def title_of(runs):
    """Return one line that says what was compared on what; and what the scores are of: the test
    questions, or what Trainer evaluated on."""
    from plots import study
    first = next(iter(runs.values()))
    if "trainer" in first:
        return f"{len(runs)} runs of Hugging Face's Trainer in {first['trainer']}", "evaluation"
    return study(list(runs.values())), "test"


def or_dash(value, form):
    """Write a number, or a dash for None."""
    return "–" if value is None else format(value, form)


def floor_of(runs):
    """Return (name, F1 in percent, exact match as a text) of answers that need no training; None if
    that is not known."""
    first = next(iter(runs.values()))
    if is_synthetic(read_settings(first)):
        return "one of the four at random", CHANCE, "25.00"
    return (RANDOM, first["random_f1"], "") if "random_f1" in first else None


def lines_of_grid(content):
    """Return what the verdict reads: of every method its best run by validation F1."""
    runs, lines = content["runs"], []
    for row in best_of(rows_of(runs)):
        name, run = row["method"], runs[row["run"]]
        marks = edge_mark(content.get("tried", {}).get(name))
        if not run.get("beats_random", True):
            marks = [f"not shown to beat {RANDOM}", *marks]
        gb = run["peak_rss_gb"] if run["peak_vram_gb"] is None else run["peak_vram_gb"]
        lines.append(Line(name, label_of(read_settings(run)), row["f1"], run.get("vs_full"),
                          run["epoch_time_s"], gb, 4e-6 * run["trainable_params"], marks))
    return lines


def grid_markdown(content):
    """Make the two tables of a grid.json, as Markdown: all runs, and the best one of each method
    with its F1 by level."""
    from plots import floor_row, markdown_table, points
    runs = content["runs"]
    rows, first = rows_of(runs), next(iter(runs.values()))
    title, kind = title_of(runs)
    vs_full = {name: points(run.get("vs_full")) for name, run in runs.items()}
    levels = list(first.get("f1_by_level", {}))
    missing = content.get("missing", [])

    header = ["run", "F1 (%)", "vs full (points)", "exact match (%)", "training (min)",
              "best epoch", "trainable"]
    cells = [[row["run"], f"{row['f1']:.2f}", vs_full[row["run"]], f"{row['exact_match']:.2f}",
              or_dash(row["minutes"], ".2f"), f"{row['best_epoch']} of {row['epochs']}",
              or_dash(row["trainable_params"], ",")] for row in rows]
    floor = floor_of(runs)
    chance = [floor_row(header, floor[0], {"F1 (%)": f"{floor[1]:.1f}", "trainable": "0",
                                           "exact match (%)": floor[2]})] if floor else []
    has_intervals = kind == "test" and "grouped" in first  # versions before kept no answers
    best = [[row["run"], f"{row['f1']:.2f}", vs_full[row["run"]], f"{row['validation_f1']:.2f}",
             *(f"{row[f'f1_{level}']:.1f}" for level in levels)] for row in best_of(rows)]
    interval = ("; [ ] is a 95 % interval, over test questions only, of the "
                "difference to full fine-tuning's run with the best validation F1"
                if has_intervals else "")

    return "".join([
        f"All {len(runs)} runs by F1: {title}{interval}; made by `{content['command']}`.\n\n",
        markdown_table(header, cells + chance),
        f"\nMissing: {', '.join(missing)}.\n" if missing else "",
        "\nBest configuration of each method, by validation F1",
        "; the last columns are the F1 of each level" if levels else "", ":\n\n",
        markdown_table(["run", "F1 (%)", "vs full (points)", "validation F1 (%)", *levels], best),
        "\n" + verdict(lines_of_grid(content), "F1", first["rows"]["test"], 1)
        if has_intervals else ""])


# --- figures --------------------------------------------------------------------------------------

def grid_bars(runs, path):
    """Draw the F1 of every run, the best on top."""
    from plots import name_rows, plt, save_figure
    rows, (title, kind) = rows_of(runs), title_of(runs)
    fig, ax = plt.subplots(figsize=(9, 0.32 * len(rows) + 1.2))
    bars = ax.barh(range(len(rows)), [row["f1"] for row in rows],
                   color=[STYLES[row["method"]].color for row in rows], height=0.7)
    ax.bar_label(bars, fmt="%.1f", padding=4)
    if floor := floor_of(runs):
        ax.axvline(floor[1], color="#AA3377", linestyle="--", label=floor[0])
        ax.legend(fontsize=9, loc="lower right")
    name_rows(ax, [row["run"] for row in rows])
    ax.margins(x=0.08, y=0.02)
    ax.set_xlabel(f"{kind} F1 (%)")
    fig.suptitle(title, fontsize=9)
    save_figure(fig, path)


def redraw(output):
    """Draw everything that output/metrics/grid.json holds into output/figures/, and print the
    tables."""
    from plots import write_table
    path, figures = output / "metrics" / "grid.json", output / "figures"
    if not path.exists():
        fail(f"there is no {path}; bash run_grid.sh makes it")
    content = read_json(path, "command", "runs")
    with as_written(path):
        for result in content["runs"].values():
            read_settings(result)
    grid_bars(content["runs"], figures / "grid_f1.png")
    write_table(figures / "grid.md", grid_markdown(content))


# --- the command line -----------------------------------------------------------------------------

def write_grid(output, made_by, results, missing, tried):
    """Write the JSON, the CSV file, the figure and the tables of a grid's results."""
    metrics, rows = output / "metrics", rows_of(results)
    best = {row["method"]: row["run"] for row in best_of(rows)}  # which tools.export takes
    write_json(metrics / "grid.json", {"command": made_by, "missing": missing, "tried": tried,
                                       "best": best, "runs": results})
    write_csv(metrics / "grid_results.csv", rows)
    redraw(output)


def gather_trainer(argv):
    """Gather the runs that Trainer left."""
    parser = Parser(allow_abbrev=False)
    parser.add_argument("--trainer", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args(argv)
    results, missing = trainer_runs(args.trainer)
    check_writable(args.output)
    write_grid(args.output, command(), results, missing, {})
    if missing:
        print(f"missing: {', '.join(missing)}")


def write_results(run, runs, results, tried, made_by):
    """Write what the runs found, {run: result}; exit with status 1 if some of `runs` failed. tried:
    grid_runs'; made_by: the command."""
    if not results:
        fail("no run worked, see above")
    answers = add_scores(results)
    # before the JSON, which says that they are there
    write_columns(run.output / "metrics" / "grid_answers.csv", answers)
    missing = [name for name in runs if name not in results]
    write_grid(run.output, made_by, results, missing, tried)
    if line := mixed_hardware(results.values()):
        warn(line)
    if missing:
        fail(f"{len(missing)} of {len(runs)} runs failed, see above; the same command tries them "
             f"again: {', '.join(missing)}")
    lines = lines_of_grid({"runs": results, "tried": tried})
    chosen = {row["method"]: results[row["run"]] for row in best_of(rows_of(results))}
    print_next(run.output, lines, chosen, run.settings.model_sha256 and run.model, ".json")


def main(argv):
    start()
    explain(__doc__, argv)
    refuse(["--method", "--r", "--epochs", "--lr"], argv,
           "is part of what the twenty runs are; for one run of your own use train.py")
    if given("--trainer", argv):
        return gather_trainer(argv)
    if given("--redraw", argv):
        parser = Parser(allow_abbrev=False)
        parser.add_argument("--redraw", action="store_true")
        parser.add_argument("--output", type=Path, default=TRAIN.parent)
        return redraw(parser.parse_args(argv).output)

    asked = [word for word in argv if word != "--list"]
    has_task = given("--task", asked) or given("--data", asked)
    flags = asked if has_task else ["--task", "synthetic", *asked]
    run = read_flags([*flags, "--method", "full"])  # a bad flag ends here, not in the first run
    if not run.settings.is_qa:
        fail("run_grid.sh is for question answering (with --data, a .json); for "
             "sentences there is run_all.sh")
    flags, is_list = decide_amp(flags), "--list" in argv
    # stdout is for the commands
    with contextlib.redirect_stdout(sys.stderr if is_list else sys.stdout):
        fetch_first(run)
        runs, tried, progress = grid_runs(run, flags)
    if is_list:
        return print_commands(runs.values())
    write_results(run, runs, train_all(runs, progress), tried,
                  shlex.join(["bash", "run_grid.sh", *asked]))


if __name__ == "__main__":
    main(sys.argv[1:])
