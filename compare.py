"""The five runs of the sentence study: their flags, and their results together in
metrics/comparison.json.

`python compare.py --list` prints the commands, five for each of --seeds. `python compare.py` finds
their results, writes the comparison and draws it. Other flags are train.py's, and select the runs
that were trained with them.
"""
import sys

from files import write_csv, write_json
from methods import is_qa
from settings import checkpoint_path, make_parser, settings_of
from spread import mean_std, paired_bootstrap
from start import fail, start
from studies import SENTENCE_RUNS as RUNS
from studies import (
    collect,
    commands,
    explain,
    mixed_hardware,
    print_commands,
    refuse,
    split_seeds,
)


def combine(runs, baseline):
    """One method's entry of comparison.json: means and standard deviations over its runs (one a
    seed), its macro-F1 against that of full fine-tuning, the `baseline` runs of the same seeds, and
    the runs themselves."""
    first = runs[0]
    entry = {"n": len(runs), "seeds": [run["settings"]["seed"] for run in runs]}
    entry |= {key: first[key]
              for key in ("trainable_params", "trainable_by_kind", "total_params", "trainable_pct",
                          "checkpoint_mb")}

    values = {key: [run[key] for run in runs]
              for key in ("f1_macro", "accuracy", "peak_vram_gb", "peak_rss_gb")}
    values["epoch_time_s"] = [h["seconds"] for run in runs for h in run["history"]]
    for key, own in values.items():
        entry[key], entry[f"{key}_std"] = (None, None) if None in own else mean_std(own)

    labels = [label for label, _ in first["test_predictions"]]
    method, full = ([[predicted for _, predicted in run["test_predictions"]] for run in side]
                    for side in (runs, baseline))
    entry["vs_full"] = None if runs is baseline else paired_bootstrap(labels, method, full)
    entry["best_epoch"] = [run["best_epoch"] for run in runs]
    return entry | {"runs": [{key: run[key] for key in run if key != "test_predictions"}
                             for run in runs]}


def prediction_rows(runs):
    """One dict a test sentence: its label, and the label that each run predicted for it."""
    columns = {f"{name}_seed{run['settings']['seed']}": run["test_predictions"]
               for name in runs for run in runs[name]}
    labels = [label for label, _ in next(iter(columns.values()))]
    return [{"label": label, **{column: pairs[i][1] for column, pairs in columns.items()}}
            for i, label in enumerate(labels)]


def collect_seeds(seeds, argv):
    """({run: [result of each seed]}, output folder); ends if one is missing."""
    runs = {name: [] for name in RUNS}
    for seed in seeds:
        results, missing, output = collect(RUNS, [*argv, "--seed", str(seed)])
        if missing:
            fail(f"not finished with these settings and seed {seed}: {', '.join(missing)}; bash "
                 "run_all.sh with the same flags runs them")
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
    refuse(["--method", "--r"], argv,
           "is what the five runs differ in; for one run of your own use train.py")
    to_list = "--list" in argv
    seeds, argv = split_seeds([word for word in argv if word != "--list"])
    # a bad flag ends here, too
    if is_qa(settings_of(make_parser().parse_args(argv + ["--method", "full"]))):
        fail("run_all.sh compares sentence classifiers; for question answering there is "
             "run_grid.sh")
    if to_list:
        print_commands("\n".join(commands(RUNS, [*argv, "--seed", str(seed)]) for seed in seeds))
        return

    runs, output = collect_seeds(seeds, argv)
    if line := mixed_hardware([run for name in runs for run in runs[name]]):
        fail(line)
    comparison = {name: combine(runs[name], runs["full_ft"]) for name in RUNS}
    write_json(output / "metrics" / "comparison.json", comparison)
    write_csv(output / "metrics" / "predictions.csv", prediction_rows(runs))
    from plots import draw  # matplotlib is slow to import
    draw(output)


if __name__ == "__main__":
    main(sys.argv[1:])
