"""The five runs of the sentence study: their flags, and their results together in metrics/comparison.json.

`python compare.py --list` prints the five commands. `python compare.py` finds the five results, writes the comparison
and draws it. Other flags are train.py's, and select the runs that were trained with them.
"""
import json
import shlex
import sys
from pathlib import Path

from settings import fail, make_parser, result_path, settings_of, write_whole

RUNS = {
    "full_ft": "--method full",
    "lora_r8": "--method lora --r 8",
    "lora_r16": "--method lora --r 16",
    "qlora": "--method qlora --r 16",
    "adapter": "--method adapter",
}


def read_json(path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        fail(f"{path} is damaged ({e}); delete it")


def given(flag, argv):
    return any(word.split("=")[0] == flag for word in argv)


def commands(runs, argv):
    """One train.py command a run, for a shell."""
    train = [sys.executable, str(Path(__file__).with_name("train.py")), *argv]
    return "\n".join(f"{shlex.join(train)} {flags}" for flags in runs.values())


def collect(runs, argv):
    """({run: result}, names of the missing runs, output folder) of runs with the flags `argv`. Results of other
    settings are never picked up, because a result's file name is made of its settings."""
    results, missing = {}, []
    for name, flags in runs.items():
        args = make_parser().parse_args(argv + flags.split())
        path = result_path(args.output, settings_of(args))
        if path.exists():
            results[name] = read_json(path)
        else:
            missing.append(name)
    return results, missing, args.output


def mixed_hardware(results):
    """A line that names what differs if times and memory of the results do not compare, else None."""
    for key in "device", "amp":
        if len(values := {str(r["environment"][key]) for r in results.values()}) > 1:
            return f"runs with different {key} do not compare: {', '.join(sorted(values))}; delete one kind's files"
    return None


def main(argv):
    for flag in "--method", "--r":
        if given(flag, argv):
            fail(f"{flag} is what the five runs differ in; for one run of your own use train.py")
    to_list = "--list" in argv
    argv = [word for word in argv if word != "--list"]
    if "stride" in settings_of(make_parser().parse_args(argv + ["--method", "full"])):  # a bad flag ends here, too
        fail("run_all.sh compares sentence classifiers; for question answering there is run_grid.sh")
    if to_list:
        print(commands(RUNS, argv))
        return
    results, missing, output = collect(RUNS, argv)
    if missing:
        fail(f"not finished with these settings: {', '.join(missing)}; bash run_all.sh with the same flags runs them")
    if line := mixed_hardware(results):
        fail(line)
    text = json.dumps(results, indent=1) + "\n"
    write_whole(output / "metrics" / "comparison.json", lambda part: part.write_text(text))
    from plots import draw  # matplotlib is slow to import
    draw(output)


if __name__ == "__main__":
    main(sys.argv[1:])
