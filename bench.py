"""How fast each method trains, measured so that it compares: all in turns.

    python bench.py             every method; the peer (peers.py) is Hugging Face's Trainer, with
                                peft for LoRA and DoRA, where accelerate and peft are installed
    python bench.py --tricks    what each speed trick gains, alone and together with the others
    python bench.py --model bert-base-uncased    see growth.py

Other flags are train.py's. A round trains every case once, on 16 batches that stand for an epoch of
it, from the shortest to the longest; a round before the others is for warming up. Writes
metrics/bench.json or metrics/bench_tricks.json.
"""
import importlib.util
import statistics
import sys

from files import check_writable, write_json
from methods import CASES, is_qa
from settings import (
    DEFAULT_MODEL,
    MODELS,
    TRICKS,
    case_label,
    make_parser,
    model_of,
    settings_of,
)
from start import command, fail, start
from studies import TIMED, explain, markdown_table, refuse

# The packages that the peer needs, by the method that it does.
PEERS = {"full": ("accelerate",), "lora_r8": ("accelerate", "peft"),
         "dora": ("accelerate", "peft")}
INFERENCE = {"plain": ("inference: BERT", "full"), "unmerged": ("inference: LoRA r=8", "lora_r8"),
             "merged": ("inference: LoRA r=8, merged", "lora_r8")}


def parse_args(argv):
    """(argparse's result of full fine-tuning, train.py's flags for all cases, whether these are the
    tricks)."""
    start()
    explain(__doc__, argv)
    refuse(TIMED, argv, "is not for bench.py, which times some steps of every method, with and "
                        "without its tricks")

    is_tricks = "--tricks" in argv
    argv = [word for word in argv if word != "--tricks"]
    args = make_parser().parse_args([*argv, "--method", "full"])
    if is_qa(settings_of(args)):
        fail("bench.py measures sentence classification")
    check_writable(args.output / "metrics")
    return args, argv, is_tricks


if __name__ == "__main__":
    SELECTED = parse_args(sys.argv[1:])  # before the slow imports

from importlib.metadata import version

import torch

from model import amp_dtype, environment
from timing import ROUNDS, Case, measure, ratio, show


def train_case(name):
    return Case(case_label(name), "train", CASES[name].flags)


def method_cases():
    """{name: Case}: training with every method, inference, and what the peer can do here."""
    cases = {name: train_case(name) for name in CASES}
    cases |= {name: Case(label, name, CASES[method].flags)
              for name, (label, method) in INFERENCE.items()}
    for name, packages in PEERS.items():
        if all(map(importlib.util.find_spec, packages)):
            peft = " + peft" if "peft" in packages else ""
            cases[f"{name} peer"] = Case(f"{case_label(name)}, Trainer{peft}", "peer",
                                         CASES[name].flags, "peer")
    return cases


def trick_cases():
    """{name: Case}: full fine-tuning and LoRA with all tricks, with none, with all but one, with
    only one."""
    cases = {}
    for method in "full", "lora_r8":
        usual = train_case(method)
        left_out = {"": [], " none": list(TRICKS)}
        left_out |= {f" without {trick}": [trick] for trick in TRICKS}
        left_out |= {f" only {trick}": [t for t in TRICKS if t != trick] for trick in TRICKS}
        for kind, without in left_out.items():
            flags = f"{usual.flags} --without {' '.join(without)}" if without else usual.flags
            # memory is kept for a whole process
            process = "default" if "kept_memory" in without else "ours"
            cases[method + kind] = Case(usual.label + kind, "train", flags, process)
    return cases


def markdown(bench):
    """The table of a bench.json, as Markdown."""
    share = f"share of the {bench['matmul_gflops']:,.0f} GFLOP/s of a matmul (%)"
    header = ["", "step (ms)", "sentences per s", share, "speed against full",
              "speed against the peer"]
    rows = [[case["label"], f"{case['step_ms']:.0f}", f"{case['sentences_per_s']:.0f}",
             f"{100 * case['matmul_share']:.0f}", show(case["vs_full"]), show(case["vs_peer"])]
            for case in bench["cases"].values()]
    return markdown_table(header, rows) + f"\n{bench['caption']}\n"


def has_effect(trick, method, bench):
    """Whether a trick does anything for a method where the bench ran; otherwise the numbers show
    the noise."""
    if trick in ("half_weights", "cast_once") and bench["environment"]["amp"] == "off":
        return False
    if trick == "half_weights":
        return method != "full"
    return trick not in ("cheap_dropout", "cls_only") or "CPU" in bench["environment"]["device"]


def tricks_markdown(bench):
    """The table of a bench_tricks.json: how many times faster a trick makes a step, as the only one
    and as the last."""
    def times(method, kind):
        return bench["cases"][f"{method}{kind}"]["step_ms_rounds"]

    rows = []
    for trick, what in TRICKS.items():
        row = [f"`{trick}`: {what}"]
        for method in "lora_r8", "full":
            gains = [show(ratio(times(method, " none"), times(method, f" only {trick}"))),
                     show(ratio(times(method, f" without {trick}"), times(method, "")))]
            row += gains if has_effect(trick, method, bench) else ["no effect here"] * 2
        rows.append(row)
    for label, kind in ("sentences per s without any", " none"), ("sentences per s with all", ""):
        lora, full = (f"{bench['cases'][method + kind]['sentences_per_s']:.0f}"
                      for method in ("lora_r8", "full"))
        rows.append([label, lora, "", full, ""])
    header = ["trick", "LoRA r=8: alone", "LoRA r=8: last", "full: alone", "full: last"]
    return markdown_table(header, rows) + f"\n{bench['caption']}\n"


def results_of(cases, seconds, about, rate):
    """{name: what bench.json says of a case}; seconds, about, rate: measure's."""
    results = {}
    for name, own in seconds.items():
        (flops, n_steps, n_rows), median = about[name], statistics.median(own)
        peer, ms = seconds.get(f"{name} peer"), [1000 * x / n_steps for x in own]
        results[name] = {"label": cases[name].label,
                         "step_ms": statistics.median(ms), "step_ms_rounds": ms,
                         "sentences_per_s": n_rows / median,
                         "matmul_share": flops / median / rate,
                         "vs_full": ratio(seconds["plain" if name in INFERENCE else "full"], own),
                         "vs_peer": ratio(peer, own) if peer else None}
    return results


def main(args, argv, is_tricks):
    if model_of(args) in MODELS and model_of(args) != DEFAULT_MODEL:
        if is_tricks:
            fail(f"--tricks is for {DEFAULT_MODEL} and for models in a folder")
        import growth  # needs no weights
        return growth.main(*growth.parse_args(argv))
    cases = trick_cases() if is_tricks else method_cases()
    s, device = settings_of(args), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = amp_dtype(args.amp, device)
    seconds, about, rate = measure(cases, argv)
    results = results_of(cases, seconds, about, rate)

    packages = {package for name in PEERS if f"{name} peer" in cases for package in PEERS[name]}
    where = environment(device, dtype) | {name: version(name) for name in sorted(packages)}
    caption = (f"{s['model']} on {s['task']}, batches of {s['batch_size']}, at most "
               f"{s['max_length']} tokens, {where['device']}, amp {where['amp']}; medians of "
               f"{ROUNDS} rounds of {about['full'][1]} steps taken in turns, in brackets the "
               "smallest and the largest ratio within a round.")
    bench = {"command": command(), "caption": caption, "matmul_gflops": rate / 1e9,
             "environment": where, "cases": results}
    path = args.output / "metrics" / ("bench_tricks.json" if is_tricks else "bench.json")
    write_json(path, bench)
    print(tricks_markdown(bench) if is_tricks else markdown(bench), end="")
    print(f"\nwrote {path}")


if __name__ == "__main__":
    main(*SELECTED)
