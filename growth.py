"""What to expect of a model, and how its time grows: random weights on rows of random tokens, all
of one length, so that nothing has to be downloaded. The time does not depend on the numbers.

    python bench.py --model bert-base-uncased     runs this
    python growth.py                              for the small model

Every method at three lengths; full fine-tuning and LoRA at six lengths and three batch sizes, as
far as a batch has at most 4,096 tokens. Writes growth_MODEL.json into metrics/, its table and its
picture into figures/.
"""
import statistics
import sys

from files import check_writable, write_json
from methods import CASES
from settings import MODELS, case_label, make_parser, model_of, settings_of
from start import command, fail, start
from studies import TIMED, explain, markdown_table, refuse

LENGTHS = 32, 128, 512  # tokens, for every method
GRID = 16, 32, 64, 128, 256, 512  # for full fine-tuning and LoRA
BATCHES = 1, 8, 32
MOST = 4096  # tokens in a batch


def parse_args(argv):
    """(argparse's result of full fine-tuning, train.py's flags for all cases)."""
    start()
    explain(__doc__, argv)
    refuse([*TIMED, "--max-length", "--batch-size", "--task", "--data"], argv,
           "is not for this, which times every method on random tokens of several lengths")
    args = make_parser().parse_args([*argv, "--method", "full"])
    if model_of(args) not in MODELS:
        fail(f"--model {model_of(args)}: the configurations known here are {', '.join(MODELS)}")
    check_writable(args.output / "metrics")
    return args, argv


if __name__ == "__main__":
    SELECTED = parse_args(sys.argv[1:])  # before the slow imports

import matplotlib.pyplot as plt
import numpy as np
import torch
from transformers import BertConfig

import memory
from model import amp_dtype, environment
from plots import save
from timing import Case, measure, ratio, show


def point(seconds, about, rate):
    """What is said of a Case: rounds and matrix products of timing.measure."""
    flops, _, n_rows = about
    ms = [1000 * x / n_rows for x in seconds]
    return {"ms_per_sentence": statistics.median(ms), "ms_per_sentence_rounds": ms,
            "bound_ms": 1000 * flops / n_rows / rate}


def measure_methods(args, argv, dtype, rates):
    """{length: {name: point, times as fast as full fine-tuning, bytes by memory.py's ledger}}.
    rates: those of measure are added to it."""
    config, table = BertConfig(**MODELS[model_of(args)], num_labels=2), {}
    for length in LENGTHS:
        batch = min(32, MOST // length)
        flags = ["--max-length", str(length), "--batch-size", str(batch)]
        cases = {name: Case(f"{case_label(name)}, {length} tokens", "train", case.flags)
                 for name, case in CASES.items()}
        seconds, about, rate = measure(cases, [*argv, *flags], batch)
        rates.append(rate)
        table[length] = {"batch_size": batch, "methods": {}}
        for name, case in CASES.items():
            ledger = memory.predict(config, case.flags, batch, length, dtype)
            table[length]["methods"][name] = point(seconds[name], about[name], rate) | {
                "label": case_label(name), "vs_full": ratio(seconds["full"], seconds[name]),
                "bytes": sum(ledger[part] for part in memory.PARTS)}
    return table


def measure_grid(argv, rates):
    """[{method, length, batch_size, point}] of full fine-tuning and LoRA. rates: as above."""
    points = []
    for length in GRID:
        sizes = [n for n in BATCHES if n * length <= MOST]
        cases = {(name, n): Case(f"{case_label(name)}, {n} x {length} tokens", "train",
                                 f"{CASES[name].flags} --batch-size {n}")
                 for name in ("full", "lora_r8") for n in sizes}
        seconds, about, rate = measure(cases, [*argv, "--max-length", str(length)], max(sizes))
        rates.append(rate)
        points += [{"method": name, "length": length, "batch_size": n,
                    **point(seconds[name, n], about[name, n], rate)} for name, n in cases]
    return points


def caption(growth):
    where, rounds = growth["environment"], growth["grid"][0]["ms_per_sentence_rounds"]
    return (f"{growth['model']} with random weights on random tokens, {where['device']}, amp "
            f"{where['amp']}, one matrix product {growth['matmul_gflops']:,.0f} GFLOP/s; medians "
            f"of {len(rounds)} rounds taken in turns")


def markdown(growth):
    """The table of a growth_MODEL.json: a line a method, three columns a length."""
    parts = growth["lengths"]
    header = ["method"] + [column for length, part in parts.items() for column in (
        f"{length} tokens x {part['batch_size']}: sentences per s", "against full", "memory (GB)")]
    rows = [[case["label"]] + [cell for part in parts.values() for cell in (
                f"{1000 / part['methods'][name]['ms_per_sentence']:.2f}",
                show(part["methods"][name]["vs_full"]),
                f"{part['methods'][name]['bytes'] / 1e9:.2f}")]
            for name, case in next(iter(parts.values()))["methods"].items()]
    return (markdown_table(header, rows) + f"\n{caption(growth)}, in brackets the smallest and the "
            "largest ratio within a round; memory by memory.py's ledger; made by "
            f"`{growth['command']}`.\n")


def draw(growth, path):
    """Time per row against its length, and the time that its matrix products alone would take."""
    points, sizes = growth["grid"], sorted({p["batch_size"] for p in growth["grid"]})
    fig, axes = plt.subplots(1, 2, figsize=(12, 4.5), sharey=True)

    for ax, method in zip(axes, ("full", "lora_r8")):
        for i, n in enumerate(sizes):
            own = [p for p in points if (p["method"], p["batch_size"]) == (method, n)]
            lengths, ms = ([p[key] for p in own] for key in ("length", "ms_per_sentence"))
            ends = np.array([p["ms_per_sentence_rounds"] for p in own]).T
            ax.errorbar(lengths, ms, [ms - ends.min(0), ends.max(0) - ms], color=f"C{i}",
                        marker="os^"[i % 3], capsize=3, label=f"batches of {n}")
        bound = {p["length"]: p["bound_ms"] for p in points if p["method"] == method}
        ax.plot(list(bound), list(bound.values()), "k--", label="its matrix products alone")
        ax.set(title=case_label(method), xlabel="tokens in a row", xscale="log", yscale="log")
        ax.set_xticks(list(bound), list(map(str, bound)))
        ax.minorticks_off()
    axes[0].set_ylabel("training time per row (ms)")
    axes[0].legend(fontsize=9)
    fig.suptitle(caption(growth), fontsize=9)
    save(fig, path)


def main(args, argv):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    s, dtype = settings_of(args), amp_dtype(args.amp, device)
    rates = []
    growth = {"command": command(), "model": s["model"],
              "environment": environment(device, dtype),
              "lengths": measure_methods(args, argv, dtype, rates),
              "grid": measure_grid(argv, rates)}
    growth["matmul_gflops"] = statistics.median(rates) / 1e9
    name, figures = f"growth_{s['model']}", args.output / "figures"
    write_json(args.output / "metrics" / f"{name}.json", growth)
    draw(growth, figures / f"{name}.png")
    (figures / f"{name}.md").write_text(markdown(growth), encoding="utf-8")
    print(markdown(growth) + f"\nfigures are in {figures}")


if __name__ == "__main__":
    main(*SELECTED)
