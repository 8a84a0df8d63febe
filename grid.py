"""The question-answering study: twenty runs, their results together, in tables, CSV files and
figures.

`python grid.py --list` prints the twenty commands, one a line, for xargs -P, GNU parallel or a
Slurm array. `python grid.py` brings together what is finished and names what is not; `python
grid.py --trainer FOLDER`, with an --output of its own, does that with runs that Hugging Face's
Trainer left (trainer.py). Other flags are train.py's.
"""
import contextlib
import sys
from pathlib import Path

import numpy as np

from fetch import model_folder
from files import check_writable, read_json, write_csv, write_json
from methods import is_qa
from settings import DEFAULT_MODEL, Parser, make_parser, model_of, settings_of
from spread import mean_interval
from start import command, fail, start, warn
from studies import (
    GRID_RUNS,
    SYNTHETIC_RUNS,
    best_of,
    collect,
    commands,
    explain,
    given,
    grid_runs,
    mixed_hardware,
    print_commands,
    refuse,
    rows_of,
    statistics_of,
)
from trainer import read_runs


def held_runs(path):
    """{run: result} of the grid.json at `path`, {} if there is none; ends if it is damaged."""
    there = read_json(path) if path.exists() else {}
    if not isinstance(there, dict) or not all(
            isinstance(run, dict) and "settings" in run for run in there.values()):
        fail(f"{path} is damaged (not runs of the grid); delete it")
    return there


def check_same_study(path, argv, runs):
    """End if grid.json at `path` is of another task, model, seed or setting than the flags: it
    would be overwritten."""
    there = held_runs(path)
    if any("trainer" in run for run in there.values()):
        fail(f"{path} holds Trainer's runs; give this one an --output of its own")
    if there.keys() - (GRID_RUNS | SYNTHETIC_RUNS).keys():
        fail(f"{path} is damaged (not runs of the grid); delete it")
    for name in there:
        held = there[name]["settings"]
        if name not in runs:
            fail(f"{path} holds results of another study ({name}); give this one an --output of "
                 "its own")
        asked = settings_of(make_parser().parse_args(argv + runs[name].split()))
        for key in asked | held:
            if held.get(key) != asked.get(key):
                fail(f"{path} holds results of another study ({key} {held.get(key)}, here "
                     f"{asked.get(key)}); give this one an --output of its own")


def add_scores(results):
    """Give every result `f1_by_level`, where its questions have levels, and `vs_full`: its F1 minus
    that of full fine-tuning's run with the best validation F1, question by question. Their answers
    stay in the runs' own files."""
    import qa  # torch is slow to import
    f1 = {name: np.array(qa.question_scores(result.pop("test_predictions"))["f1"])
          for name, result in results.items()}
    full = next((row["run"] for row in best_of(rows_of(results)) if row["method"] == "full"), None)
    for name, result in results.items():
        if levels := result.pop("test_levels", None):
            result["f1_by_level"] = {level: float(f1[name][np.array(levels) == level].mean())
                                     for level in dict.fromkeys(levels)}
        if full and name != full:
            result["vs_full"] = mean_interval(f1[name] - f1[full])


def write(output, results):
    """The JSON, CSV files, figures and tables of a grid's results."""
    write_json(output / "metrics" / "grid.json", results)
    rows = rows_of(results)
    write_csv(output / "metrics" / "grid_results.csv", rows)
    write_csv(output / "metrics" / "grid_best.csv", best_of(rows))
    write_csv(output / "metrics" / "grid_statistics.csv", statistics_of(rows))
    from plots import draw_grid  # matplotlib is slow to import
    draw_grid(output)


def bring_trainer(argv):
    """The same for runs of Trainer."""
    parser = Parser(description="Runs of Hugging Face's Trainer.", allow_abbrev=False)
    parser.add_argument("--trainer", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args(argv)
    results, missing = read_runs(args.trainer)
    check_writable(args.output)
    merged = args.output / "metrics" / "grid.json"
    if not all("trainer" in run for run in held_runs(merged).values()):
        fail(f"{merged} holds runs that train.py made; choose another --output")
    write(args.output, {name: result | {"command": command()} for name, result in results.items()})
    if missing:
        print(f"missing: {', '.join(missing)}")


def main(argv):
    start()
    explain(__doc__, argv)
    refuse(["--method", "--r", "--epochs", "--lr"], argv,
           "is part of what the twenty runs are; for one run of your own use train.py")
    if given("--trainer", argv):
        bring_trainer(argv)
        return
    to_list = "--list" in argv
    argv = [word for word in argv if word != "--list"]

    if not given("--task", argv) and not given("--data", argv):
        argv = ["--task", "synthetic", *argv]
    # a bad flag ends here, not in the first run
    args = make_parser().parse_args(argv + ["--method", "full"])
    settings = settings_of(args)
    if not is_qa(settings):
        fail("run_grid.sh is for question answering (with --data, a folder with train.json); for "
             "sentences there is run_all.sh")
    merged, runs = args.output / "metrics" / "grid.json", grid_runs(settings)
    check_same_study(merged, argv, runs)
    if to_list:
        if model_of(args) == DEFAULT_MODEL:  # before several runs start at once and all download it
            with contextlib.redirect_stdout(sys.stderr):  # stdout is for the commands
                model_folder()
        print_commands(commands(runs, argv))
        return

    results, missing, output = collect(runs, argv)
    if not results:
        fail("no run of this grid is finished; bash run_grid.sh with the same flags runs them")
    add_scores(results)
    write(output, results)
    if line := mixed_hardware(results.values()):
        warn(f"the minutes do not compare: {line}")
    if missing:
        print(f"{len(missing)} of {len(runs)} runs are missing: {', '.join(missing)}")


if __name__ == "__main__":
    main(sys.argv[1:])
