"""The five runs of the sentence study: their flags, and their results together in metrics/comparison.json.

`python compare.py --list` prints the commands, five for each of --seeds. `python compare.py` finds their results,
writes the comparison and draws it. Other flags are train.py's, and select the runs that were trained with them.
"""
import csv
import os
import shlex
import sys
from pathlib import Path

from settings import (Parser, checkpoint_path, fail, make_parser, number, read_flags, read_json, settings_of, write_json,
                      write_whole)
from spread import mean_std, paired_bootstrap
from start import start

RUNS = {
    "full_ft": "--method full",
    "lora_r8": "--method lora --r 8",
    "lora_r16": "--method lora --r 16",
    "qlora": "--method qlora --r 16",
    "adapter": "--method adapter",
}


def given(flag, argv):
    return any(word.split("=")[0] == flag for word in argv)


def explain(program, argv):
    """Answer --help of a program, by its docstring, whose other flags are train.py's."""
    if {"-h", "--help"} & set(argv):
        print(f"{program.strip()}\n\npython train.py --help explains the other flags.")
        sys.exit()


def refuse(flags, argv, why):
    for flag in flags:
        if given(flag, argv):
            fail(f"{flag} {why}")


def commands(runs, argv):
    """One train.py command a run, for a shell."""
    train = [sys.executable, str(Path(__file__).with_name("train.py")), *argv]
    return "\n".join(f"{shlex.join(train)} {flags}" for flags in runs.values())


def print_commands(text):
    """On stdout, in the bytes in which the arguments came: a path that the terminal cannot show is a path all the same."""
    sys.stdout.buffer.write(os.fsencode(text + "\n"))


def collect(runs, argv):
    """({run: result}, names of the missing runs, output folder) of runs with the flags `argv`. Results of other
    settings are never picked up, because a result's file name is made of its settings."""
    results, missing = {}, []
    for name, flags in runs.items():
        args = read_flags(argv + flags.split())
        if args.result.exists():
            results[name] = read_json(args.result)
        else:
            missing.append(name)
    return results, missing, args.output


def write_csv(path, rows):
    """Write dicts of the same keys as a CSV file with a header."""
    def write(part):
        with open(part, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    write_whole(path, write)


def mixed_hardware(results):
    """A line that names what differs if times and memory of the results do not compare, else None."""
    for key in "device", "amp":
        if len(values := {str(r["environment"][key]) for r in results}) > 1:
            return f"runs with different {key} do not compare: {', '.join(sorted(values))}; delete one kind's files"
    return None


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


def combine(runs, baseline):
    """One method's entry of comparison.json: means and standard deviations over its runs (one a seed), its macro-F1
    against that of full fine-tuning, the `baseline` runs of the same seeds, and the runs themselves."""
    first = runs[0]
    entry = {"n": len(runs), "seeds": [run["settings"]["seed"] for run in runs]}
    entry |= {key: first[key] for key in ("trainable_params", "trainable_by_kind", "total_params", "trainable_pct",
                                      "checkpoint_mb")}
    values = {key: [run[key] for run in runs] for key in ("f1_macro", "accuracy", "peak_vram_gb", "peak_rss_gb")}
    values["epoch_time_s"] = [h["seconds"] for run in runs for h in run["history"]]
    for key, own in values.items():
        entry[key], entry[f"{key}_std"] = (None, None) if None in own else mean_std(own)
    labels = [label for label, _ in first["test_predictions"]]
    method, full = ([[predicted for _, predicted in run["test_predictions"]] for run in side]
                    for side in (runs, baseline))
    entry["vs_full"] = None if runs is baseline else paired_bootstrap(labels, method, full)
    entry["best_epoch"] = [run["best_epoch"] for run in runs]
    return entry | {"runs": [{key: run[key] for key in run if key != "test_predictions"} for run in runs]}


def prediction_rows(runs):
    """One dict a test sentence: its label, and the label that each run predicted for it."""
    columns = {f"{name}_seed{run['settings']['seed']}": run["test_predictions"] for name in runs for run in runs[name]}
    labels = [label for label, _ in next(iter(columns.values()))]
    return [{"label": label, **{column: pairs[i][1] for column, pairs in columns.items()}}
            for i, label in enumerate(labels)]


def main(argv):
    start()
    explain(__doc__, argv)
    refuse(["--method", "--r"], argv, "is what the five runs differ in; for one run of your own use train.py")
    to_list = "--list" in argv
    seeds, argv = split_seeds([word for word in argv if word != "--list"])
    if "stride" in settings_of(make_parser().parse_args(argv + ["--method", "full"])):  # a bad flag ends here, too
        fail("run_all.sh compares sentence classifiers; for question answering there is run_grid.sh")
    by_seed = [[*argv, "--seed", str(seed)] for seed in seeds]
    if to_list:
        print_commands("\n".join(commands(RUNS, flags) for flags in by_seed))
        return
    runs = {name: [] for name in RUNS}
    for seed, flags in zip(seeds, by_seed):
        results, missing, output = collect(RUNS, flags)
        if missing:
            fail(f"not finished with these settings and seed {seed}: {', '.join(missing)}; bash run_all.sh with the "
                 "same flags runs them")
        for name in RUNS:
            if "test_predictions" not in results[name]:
                fail(f"{output / 'metrics' / 'runs'} has results of an earlier version, without predictions; delete it")
            file = checkpoint_path(output, results[name]["settings"])
            results[name]["checkpoint_mb"] = file.stat().st_size / 1e6 if file.exists() else None
            runs[name].append(results[name])
    if line := mixed_hardware([run for name in runs for run in runs[name]]):
        fail(line)
    comparison = {name: combine(runs[name], runs["full_ft"]) for name in RUNS}
    write_json(output / "metrics" / "comparison.json", comparison)
    write_csv(output / "metrics" / "predictions.csv", prediction_rows(runs))
    from plots import draw  # matplotlib is slow to import
    draw(output)


if __name__ == "__main__":
    main(sys.argv[1:])
