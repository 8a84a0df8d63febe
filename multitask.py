"""Many tasks on one base: for each of the four rated tasks a LoRA and an adapter, all in memory,
one at a time in use.

    python multitask.py                          trains what is missing (also full fine-tuning, to
                                                 compare with), measures, draws
    python multitask.py --methods bitfit head    the same with others of methods.CASES

A task is a dict of the tensors that were trained for it, its head included. To switch, the model's
parameters are pointed at another task's tensors: nothing is copied, and the frozen base is there
once.

    one base, n tasks          base + n * trained        bytes, in memory as on disk
    n fully fine-tuned BERTs   n * base

Other flags are train.py's. Writes metrics/multitask.json, figures/multitask.png and
figures/multitask.md.
"""
import subprocess
import sys

from files import check_writable, read_json, write_json
from methods import CASES, is_4bit
from settings import RATED_TASKS, Parser, case_label, case_settings, model_of, read_flags
from start import command, fail, start
from studies import commands, explain, refuse

METHODS = ("lora_r8", "adapter")
COUNTS = (1, 2, 4, 10, 20, 30, 40, 50)  # tasks in memory
SWITCHES = 200  # to take the median of
TURN = [*RATED_TASKS, *reversed(RATED_TASKS)]  # the order in which the tasks are used


def parse_args(argv):
    """{method: {task: the flags of its run (settings.read_flags)}}, and the flags of all."""
    start()
    explain(__doc__, argv)
    fixed = ["--method", "--task", "--data", "--r", "--alpha", "--placement", "--bottleneck",
             "--reduction"]
    refuse([*fixed, "--targets", "--fold"], argv,
           "is what the runs of multitask.py differ in; for one run of your own use train.py")
    parser = Parser(add_help=False, allow_abbrev=False)
    # 4-bit methods do not share the base's weights
    choices = [name for name in CASES if name != "full" and not is_4bit(case_settings(name))]
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=choices)
    known, argv = parser.parse_known_args(argv)
    runs = {method: {task: read_flags([*argv, "--task", task, *CASES[method].flags.split()])
                     for task in RATED_TASKS}
            for method in ["full", *known.methods]}
    check_writable(runs["full"]["movies"].output / "metrics")
    return runs, argv


SELECTED = parse_args(sys.argv[1:]) if __name__ == "__main__" else None  # before the slow imports

import multiprocessing
import os
import resource
from pathlib import Path

import torch

import data
from checkpoint import attach, check_tokenizer, hash_base, read_tensors
from model import (
    RSS_UNIT,
    amp_dtype,
    autocast,
    environment,
    load_pretrained,
    place,
    trained_tensors,
)
from plots import draw_multitask
from predict import milliseconds
from spread import paired_bootstrap
from train import evaluate


def train_missing(runs, argv):
    for method, of_tasks in runs.items():
        for task, run in of_tasks.items():
            if run.result.exists() and not run.checkpoint.exists():
                fail(f"{run.checkpoint} is gone, although its run is finished; delete {run.result} "
                     "to run it again")
            if not run.result.exists():
                line = commands({method: CASES[method].flags}, [*argv, "--task", task])
                print(f"== {line}", flush=True)
                if status := subprocess.run(line, shell=True).returncode:
                    sys.exit(status)  # it has said why


def switch(slots, tensors):
    """Point the trained parameters of a model, `slots`, at the tensors of another task."""
    for name, p in slots.items():
        p.data = tensors[name]


def on_device(tensors, device):
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def resident():
    """Bytes of this process in memory now; outside Linux the most it ever had, which is the same
    while it grows."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_UNIT


def hold(files, model_name, label_names, needs_base, pipe):
    """In a fresh process: send [(n, bytes that n tasks take)], the base included if they need one.
    Stops at a quarter of the machine's memory."""
    limit = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 4
    before, held, measured = resident(), [], []
    if needs_base:
        _, base = load_pretrained(model_name, label_names)
        hash_base(base)  # reads every weight; until then they are only mapped from their file
    for n in COUNTS:
        while len(held) < n and resident() - before < limit:
            held.append(read_tensors(files[len(held) % len(files)]))
        if len(held) == n:
            measured.append((n, resident() - before))
    pipe.send(measured)


def memory_of(files, *args):
    # fresh: nothing of this process is in its memory
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=hold, args=(files, *args, sender))
    process.start()
    # this end; when the process dies, the other closes too, and recv() does not wait for ever
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        process.join()
        fail("the process that measures the memory of many tasks has died "
             f"(status {process.exitcode})")


def score_together(model, tensors, splits, alone, full, device, amp):
    """{task: a method's scores alone and together}; full: the results of full fine-tuning."""
    slots, rows = trained_tensors(model), {}
    for task in TURN:
        switch(slots, tensors[task])
        scores, outcome = evaluate(model, splits[task], device, amp)
        answers, full_answers = ([answer for _, answer in results[task]["test_predictions"]]
                                 for results in (alone, full))

        row = rows.setdefault(task, {"f1_macro": alone[task]["f1_macro"], "together": [],
                                     "changed_predictions": 0})
        row["together"].append(scores["f1_macro"])
        row["changed_predictions"] += sum(own != answer
                                          for (_, own), answer in zip(outcome["predictions"],
                                                                      answers))
        if len(row["together"]) == 1:
            labels = [label for label, _ in outcome["predictions"]]
            row["vs_full"] = paired_bootstrap(labels, [answers], [full_answers])
    return rows


def time_switches(model, tensors, file, device):
    """(milliseconds of a switch to a task in memory, milliseconds of one to a task's file)."""
    slots, order = trained_tensors(model), iter(TURN * SWITCHES)
    _, switch_ms = milliseconds(lambda: switch(slots, tensors[next(order)]), SWITCHES)
    _, load_ms = milliseconds(lambda: switch(slots, on_device(read_tensors(file), device)), 20)
    return switch_ms, load_ms


def main(runs, argv):
    train_missing(runs, argv)
    first = runs["full"]["movies"]
    s = first.settings
    results = {method: {task: read_json(run.result) for task, run in of_tasks.items()}
               for method, of_tasks in runs.items()}

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = amp_dtype(first.amp, device)
    amp = autocast(device, dtype)

    tasks = {task: data.load_task(run.task) for task, run in runs["full"].items()}
    labels = tasks["movies"].label_names  # the same for all four
    tokenizer, base = load_pretrained(model_of(first), labels)
    base_hash, base_bytes = hash_base(base), sum(p.nbytes for p in base.parameters())
    splits = {name: task.encode(task.test, tokenizer, s) for name, task in tasks.items()}

    table = {task: {"test_rows": split.n, "full": {"f1_macro": results["full"][task]["f1_macro"]}}
             for task, split in splits.items()}
    methods = {}
    for method in runs:
        files = [runs[method][task].checkpoint for task in RATED_TASKS]
        model, about = attach(base, base_hash, files[0], dtype or torch.float32)
        check_tokenizer(files[0], about, tokenizer)
        model = place(model, device)
        tensors = {task: on_device(read_tensors(file), device)
                   for task, file in zip(RATED_TASKS, files)}

        if method != "full":
            alone, full = results[method], results["full"]
            rows = score_together(model, tensors, splits, alone, full, device, amp)
            for task, row in rows.items():
                table[task][method] = row
        switch_ms, load_ms = time_switches(model, tensors, files[0], device)
        methods[method] = {
            "label": case_label(method),
            "trained_bytes": sum(t.nbytes for t in tensors["movies"].values()),
            "file_bytes": files[0].stat().st_size, "switch_ms": switch_ms, "load_ms": load_ms,
            "memory": memory_of(files, model_of(first), labels, method != "full")}

    study = {"command": command(), "model": s["model"], "seed": s["seed"],
             "base_bytes": base_bytes, "tasks": table, "methods": methods,
             "environment": environment(device, dtype)}
    write_json(first.output / "metrics" / "multitask.json", study)
    draw_multitask(first.output)


if __name__ == "__main__":
    main(*SELECTED)
