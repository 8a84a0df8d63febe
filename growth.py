"""What to expect of a model, and how its time grows: random weights on rows of random tokens, all
of one length, so that nothing has to be downloaded. The time does not depend on the numbers.

    python bench.py --model bert-base-uncased     runs this
    python growth.py                              for the small model

Every method at three lengths; full fine-tuning and LoRA at six lengths and three batch sizes, as
far as a batch has at most 4,096 tokens. Writes growth_MODEL.json into metrics/, its table and its
picture into figures/.
"""
import sys

from files import check_writable, write_json
from methods import CASES
from settings import MODELS, case_label, make_parser, model_of, settings_of
from start import command, fail, start
from studies import explain, refuse

LENGTHS = 32, 128, 512  # tokens, for every method
GRID = 16, 32, 64, 128, 256, 512  # for full fine-tuning and LoRA
BATCHES = 1, 8, 32
MOST = 4096  # tokens in a batch


def parse_args(argv):
    """(argparse's result of full fine-tuning, train.py's flags for all cases)."""
    start()
    explain(__doc__, argv)
    fixed = ["--method", "--r", "--targets", "--without", "--accumulation", "--lr", "--epochs",
             "--warmup", "--max-steps", "--fold", "--max-length", "--batch-size", "--task",
             "--data"]
    refuse(fixed, argv, "is not for this, which times every method on random tokens of several "
                        "lengths")
    args = make_parser().parse_args([*argv, "--method", "full"])
    if model_of(args) not in MODELS:
        fail(f"--model {model_of(args)}: the configurations known here are {', '.join(MODELS)}")
    check_writable(args.output / "metrics")
    return args, argv


if __name__ == "__main__":
    SELECTED = parse_args(sys.argv[1:])  # before the slow imports

import torch
from transformers import BertConfig

import memory
from model import amp_dtype, environment
from plots import draw_growth
from timing import Case, matmul_rate, measure, ratio


def point(seconds, about, rate):
    """What is said of a Case: rounds and matrix products of timing.measure."""
    flops, _, n_rows = about
    ms = sorted(1000 * x / n_rows for x in seconds)
    return {"ms_per_sentence": ms[len(ms) // 2], "ms_per_sentence_rounds": ms,
            "bound_ms": 1000 * flops / n_rows / rate}


def measure_methods(args, argv, dtype, rate):
    """{length: {name: point, times as fast as full fine-tuning, bytes by memory.py's ledger}}."""
    config, table = BertConfig(**MODELS[model_of(args)], num_labels=2), {}
    for length in LENGTHS:
        batch = min(32, MOST // length)
        flags = ["--max-length", str(length), "--batch-size", str(batch)]
        cases = {name: Case(f"{case_label(name)}, {length} tokens", "train", case.flags)
                 for name, case in CASES.items()}
        seconds, about = measure(cases, [*argv, *flags], batch)
        table[length] = {"batch_size": batch, "methods": {}}
        for name, case in CASES.items():
            ledger = memory.predict(config, case.flags, batch, length, dtype)
            table[length]["methods"][name] = point(seconds[name], about[name], rate) | {
                "label": case_label(name), "vs_full": ratio(seconds["full"], seconds[name]),
                "bytes": sum(ledger[part] for part in memory.PARTS)}
    return table


def measure_grid(argv, rate):
    """[{method, length, batch_size, point}] of full fine-tuning and LoRA."""
    points = []
    for length in GRID:
        sizes = [n for n in BATCHES if n * length <= MOST]
        cases = {(name, n): Case(f"{case_label(name)}, {n} x {length} tokens", "train",
                                 f"{CASES[name].flags} --batch-size {n}")
                 for name in ("full", "lora_r8") for n in sizes}
        seconds, about = measure(cases, [*argv, "--max-length", str(length)], max(sizes))
        points += [{"method": name, "length": length, "batch_size": n,
                    **point(seconds[name, n], about[name, n], rate)} for name, n in cases]
    return points


def main(args, argv):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    s, dtype = settings_of(args), amp_dtype(args.amp, device)
    rate = matmul_rate(device, dtype or torch.float32)
    growth = {"command": command(), "model": s["model"], "matmul_gflops": rate / 1e9,
              "environment": environment(device, dtype),
              "lengths": measure_methods(args, argv, dtype, rate),
              "grid": measure_grid(argv, rate)}
    name = f"growth_{s['model']}"
    write_json(args.output / "metrics" / f"{name}.json", growth)
    draw_growth(args.output, name)


if __name__ == "__main__":
    main(*SELECTED)
