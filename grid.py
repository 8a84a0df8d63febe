"""The question-answering study: twenty runs, their results together, in tables, CSV files and figures.

`python grid.py --list` prints the twenty commands, one a line, for xargs -P, GNU parallel or a Slurm array.
`python grid.py` brings together what is finished and names what is not. Other flags are train.py's.
"""
import contextlib
import sys

from compare import collect, commands, explain, given, mixed_hardware, print_commands, refuse, write_csv
from fetch import model_folder
from settings import DEFAULT_MODEL, fail, make_parser, model_of, read_json, settings_of, warn, write_json
from spread import mean_std
from start import start

METHODS = ("full", "lora", "qlora", "dora", "qdora")
RUNS = {f"{method}_epoch-{epochs}_lr_{lr}":
        f"--method {method} --epochs {epochs} --lr {lr}" + (" --r 16" if method != "full" else "")
        for method in METHODS for epochs in (2, 3) for lr in ("2e-4", "4.25e-5")}


def rows_of(results):
    """One dict a run, the best F1 first; f1 and exact_match in percent, minutes of training without evaluation."""
    rows = [{"run": name, "method": r["settings"]["method"], "epochs": r["settings"]["epochs"],
             "lr": r["settings"]["lr"], "f1": r["f1"], "exact_match": r["exact_match"],
             "minutes": r["train_time_s"] / 60, "best_epoch": r["best_epoch"],
             "trainable_params": r["trainable_params"], "peak_vram_gb": r["peak_vram_gb"],
             "peak_rss_gb": r["peak_rss_gb"]} for name, r in results.items()]
    return sorted(rows, key=lambda row: -row["f1"])


def statistics_of(rows):
    """One dict a method: n runs, and mean, sample standard deviation, min and max of F1, exact match and minutes."""
    out = []
    for method in METHODS:
        if own := [row for row in rows if row["method"] == method]:
            line = {"method": method, "n": len(own)}
            for key in "f1", "exact_match", "minutes":
                values = [row[key] for row in own]
                mean, std = mean_std(values)
                line |= {f"{key}_mean": mean, f"{key}_std": std, f"{key}_min": min(values), f"{key}_max": max(values)}
            out.append(line)
    return out


def best_of(rows):
    """The row with the best F1 of every method."""
    return [next(row for row in rows if row["method"] == method) for method in METHODS
            if any(row["method"] == method for row in rows)]


def check_same_study(path, argv):
    """End if grid.json at `path` is of another task, model, seed or setting than the flags: it would be overwritten."""
    there = read_json(path) if path.exists() else {}
    if not isinstance(there, dict) or not all(name in RUNS and "settings" in there[name] for name in there):
        fail(f"{path} is damaged (not runs of the grid); delete it")
    for name in there:
        held = there[name]["settings"]
        asked = settings_of(make_parser().parse_args(argv + RUNS[name].split()))
        for key in asked | held:
            if held.get(key) != asked.get(key):
                fail(f"{path} holds results of another study ({key} {held.get(key)}, here {asked.get(key)}); "
                     "give this one an --output of its own")


def main(argv):
    start()
    explain(__doc__, argv)
    refuse(["--method", "--r", "--epochs", "--lr"], argv,
           "is part of what the twenty runs are; for one run of your own use train.py")
    to_list = "--list" in argv
    argv = [word for word in argv if word != "--list"]
    if not given("--task", argv) and not given("--data", argv):
        argv = ["--task", "synthetic", *argv]
    args = make_parser().parse_args(argv + ["--method", "full"])  # a bad flag ends here, not in the first run
    if "stride" not in settings_of(args):
        fail("run_grid.sh is for question answering (with --data, a folder with train.json); for sentences there is "
             "run_all.sh")
    merged = args.output / "metrics" / "grid.json"
    check_same_study(merged, argv)
    if to_list:
        if model_of(args) == DEFAULT_MODEL:  # before several runs start at once and all download it
            with contextlib.redirect_stdout(sys.stderr):  # stdout is for the commands
                model_folder()
        print_commands(commands(RUNS, argv))
        return
    results, missing, output = collect(RUNS, argv)
    if not results:
        fail("no run of this grid is finished; bash run_grid.sh with the same flags runs them")
    for result in results.values():
        result.pop("test_predictions", None)  # they stay in the runs' own files
    write_json(merged, results)
    rows = rows_of(results)
    write_csv(output / "metrics" / "grid_results.csv", rows)
    write_csv(output / "metrics" / "grid_best.csv", best_of(rows))
    write_csv(output / "metrics" / "grid_statistics.csv", statistics_of(rows))
    from plots import draw_grid  # matplotlib is slow to import
    draw_grid(output)
    if line := mixed_hardware(results.values()):
        warn(f"the minutes do not compare: {line}")
    if missing:
        print(f"{len(missing)} of {len(RUNS)} runs are missing: {', '.join(missing)}")


if __name__ == "__main__":
    main(sys.argv[1:])
