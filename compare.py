"""The five runs of the study: their flags, and their results brought together in metrics/comparison.json.

`python compare.py --list` prints the five sets of flags for train.py. `python compare.py` finds the five results,
writes the comparison and draws it. Other flags are train.py's, and select the runs that were trained with them.
"""
import json
import sys

from settings import fail, make_parser, result_path, settings_of, write_whole

RUNS = {
    "full_ft": "--method full",
    "lora_r8": "--method lora --r 8",
    "lora_r16": "--method lora --r 16",
    "qlora": "--method qlora --r 16",
    "adapter": "--method adapter",
}


def collect(argv):
    """({run: result}, output folder) of the five runs with the flags `argv`; results of other settings are never
    picked up, because a result's file name is made of its settings."""
    results, missing = {}, []
    for name, flags in RUNS.items():
        args = make_parser().parse_args(argv + flags.split())
        path = result_path(args.output, settings_of(args))
        if path.exists():
            results[name] = json.loads(path.read_text())
        else:
            missing.append(name)
    if missing:
        fail(f"not finished with these settings: {', '.join(missing)}; bash run_all.sh with the same flags runs them")
    for key in "device", "amp":  # times and memory of different hardware do not compare
        if len(values := {str(r["environment"][key]) for r in results.values()}) > 1:
            fail(f"runs with different {key} do not compare: {', '.join(sorted(values))}; delete one kind's files")
    return results, args.output


def main(argv):
    for flag in "--method", "--r":
        if any(word.split("=")[0] == flag for word in argv):
            fail(f"{flag} is what the five runs differ in; for one run of your own use train.py")
    if "--list" in argv:
        argv.remove("--list")
        make_parser().parse_args(argv + ["--method", "full"])  # a bad flag ends here, not in the first run
        print("\n".join(RUNS.values()))
        return
    results, output = collect(argv)
    text = json.dumps(results, indent=1) + "\n"
    write_whole(output / "metrics" / "comparison.json", lambda part: part.write_text(text))
    from plots import draw  # matplotlib is slow to import
    draw(output)


if __name__ == "__main__":
    main(sys.argv[1:])
