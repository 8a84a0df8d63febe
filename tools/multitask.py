"""Hold many tasks on one base: a LoRA and an adapter for each of the four rated tasks, all in
memory, one at a time in use.

    python -m tools.multitask                          trains what is missing (full fine-tuning,
                                                       too, to compare with), measures, draws
    python -m tools.multitask --methods bitfit head    the same with others of methods.CASES
    python -m tools.multitask --redraw                 draws figure and tables again, no more

A task is a dict of the tensors that were trained for it, its head included. To switch, the model's
parameters are pointed at another task's tensors. Nothing is copied, and the frozen base is in
memory once.

    one base, n tasks          base + n * trained        bytes, in memory as on disk
    n fully fine-tuned BERTs   n * base

Other flags are train.py's. The results are metrics/multitask.json, figures/multitask.png and
figures/multitask.md.
"""
if not __package__:
    raise SystemExit("error: run this from the project's folder: python -m tools.multitask")

import sys

from common import check_writable, command, fail, read_json, start, write_columns, write_json
from compare import decide_amp, explain, refuse
from methods import CASES, named, row_of
from rates import trained
from settings import (
    RATED_TASKS,
    Parser,
    asked_settings,
    case_label,
    case_settings,
    make_parser,
    model_of,
    read_flags,
    read_settings,
)

DEFAULT_METHODS = ("lora_r8", "adapter")
TASK_COUNTS = (1, 2, 4, 10, 20, 30, 40, 50)  # tasks in memory
SWITCHES = 200  # to take the median of
ROUND = [*RATED_TASKS, *reversed(RATED_TASKS)]  # the order in which the tasks are used


def parse_args(argv):
    """Return (train.py's flags, read; {method: {task: the flags of its run}}, empty with
    --redraw)."""
    start()
    explain(__doc__, argv)
    refuse(["--method", "--task", "--data", "--r", "--alpha", "--targets", "--placement",
            "--bottleneck", "--reduction", "--fold"], argv,
           "is what the runs of tools.multitask differ in; for one run of your own use train.py")
    parser = Parser(add_help=False, allow_abbrev=False)
    # 4-bit methods do not share the base's weights
    all_settings = {name: case_settings(name) for name in CASES}
    choices = [name for name, s in all_settings.items() if name != "full" and not row_of(s).is_4bit]
    parser.add_argument("--methods", nargs="+", default=DEFAULT_METHODS, choices=choices,
                        type=lambda name: named(name, all_settings) or name)
    parser.add_argument("--redraw", action="store_true")
    known, rest = parser.parse_known_args(argv)
    args = make_parser().parse_args([*rest, "--method", "full"])
    asked_settings(args)  # a bad flag ends here
    check_writable(args.output / "metrics")
    methods = [] if known.redraw else ["full", *known.methods]
    rest = decide_amp(rest) if methods else rest
    return args, {method: {task: [*rest, "--task", task, *CASES[method].flags.split()]
                           for task in RATED_TASKS} for method in methods}


ARGS = parse_args(sys.argv[1:]) if __name__ == "__main__" else None  # before the slow imports

import multiprocessing
import os
import resource
from pathlib import Path

import numpy as np
import torch

from checkpoint import attach, check_tokenizer, hash_base, read_tensors
from model import RSS_UNIT, amp_dtype, environment, load_pretrained, place, trained_tensors
from spread import paired_bootstrap
from tools.predict import milliseconds


def train_missing(runs):
    """Train the runs that are not finished: {method: {task: result}}, with the path of what was
    trained as its `file`."""
    results = {}
    for method, of_tasks in runs.items():
        results[method] = {}
        for task, flags in of_tasks.items():
            run = read_flags(flags)
            if run.result.exists() and not run.checkpoint.exists():
                fail(f"{run.checkpoint} is gone, although its run is finished; delete {run.result} "
                     "to run it again")
            result = trained(flags) or sys.exit(1)  # it has said why
            results[method][task] = result | {"file": run.checkpoint}
    return results


def switch(slots, tensors):
    """Point the trained parameters of a model, `slots`, at the tensors of another task."""
    for name, p in slots.items():
        p.data = tensors[name]


def on_device(tensors, device):
    """Move a dict of tensors to the device."""
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def score_together(model, tensors, splits, alone, full, device, amp):
    """Test a method on every task twice, switching in between, and return {task: its scores}.
    alone, full: {task: result} of the runs of the method and of full fine-tuning."""
    from train import evaluate  # slow, and not needed where memory is measured
    slots, rows = trained_tensors(model), {}
    for task, result in alone.items():
        labels, answers = zip(*result["test_predictions"])
        _, full_answers = zip(*full[task]["test_predictions"])
        rows[task] = {"f1_macro": result["f1_macro"], "together": [], "changed_predictions": 0,
                      "vs_full": paired_bootstrap(labels, answers, full_answers)}
    for task in ROUND:
        switch(slots, tensors[task])
        scores, outcome = evaluate(model, splits[task], device, amp)
        rows[task]["together"].append(scores["f1_macro"])
        rows[task]["changed_predictions"] += sum(
            now != before for (_, now), (_, before) in
            zip(outcome["predictions"], alone[task]["test_predictions"], strict=True))
    return rows


def resident():
    """Return the bytes of this process in memory now; outside Linux the most it ever had, which is
    the same while it grows."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_UNIT


def hold(files, model_name, label_names, needs_base, pipe):
    """Send [(n, bytes that n tasks take)] from a fresh process, the base included if the tasks need
    one. Stop at a quarter of the machine's memory."""
    limit = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 4
    before, tasks, measured = resident(), [], []
    if needs_base:
        _, base = load_pretrained(model_name, label_names)
        hash_base(base)  # reads every weight; until then they are only mapped from their file
    for n in TASK_COUNTS:
        while len(tasks) < n and resident() - before < limit:
            tasks.append(read_tensors(files[len(tasks) % len(files)]))
        if len(tasks) == n:
            measured.append((n, resident() - before))
    pipe.send(measured)


def memory_of(files, model_name, label_names, needs_base):
    """Return what hold() sends; its process is fresh, so that nothing of this one is counted."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=hold,
                              args=(files, model_name, label_names, needs_base, sender))
    process.start()
    # recv() ends when both copies of the other end are closed: this one, and that of a process
    # that dies
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        process.join()
        fail("the process that measures the memory of many tasks has died "
             f"(status {process.exitcode})")


def bytes_of(study, name, n, own):
    """Compute what n tasks take: the base once, unless every task has its own. own: "trained_bytes"
    or "file_bytes"."""
    return n * study["methods"][name][own] + (0 if name == "full" else study["base_bytes"])


def multitask_caption(study):
    """Say what was measured, and where."""
    where = study["environment"]
    return f"{study['model']}, seed {study['seed']} (n = 1), {where['device']}, amp {where['amp']}"


def multitask_markdown(study):
    """Make two tables, of the scores alone and together and of what n tasks take, and their
    caption."""
    from plots import markdown_table, points  # slow, and not needed where memory is measured
    methods = study["methods"]
    others = [name for name in methods if name != "full"]
    header = ["task", "test sentences", "full fine-tuning"]
    for name in others:
        header += [f"{methods[name]['label']}: alone / together", "vs full (points)"]
    rows = []
    for task, scores in study["tasks"].items():
        row = [task, f"{scores['test_rows']:,}", f"{scores['full']['f1_macro']:.4f}"]
        for own in (scores[name] for name in others):
            row += [f"{own['f1_macro']:.4f} / {own['together'][-1]:.4f}", points(own["vs_full"])]
        rows.append(row)

    most = methods[others[0]]["memory"][-1][0]
    counts = (1, 4, 10, most)
    cost_header = ["", "file of one task (MB)", "switch in memory (µs)",
                   "switch from the file (ms)",
                   *(f"{n} task{'s' if n > 1 else ''} in memory (MB)" for n in counts),
                   f"{most} tasks on disk (MB)"]
    costs, note = [], ""
    for name, method in methods.items():
        measured, taken = dict(method["memory"]), []
        for n in counts:
            if n in measured:
                taken.append(f"{measured[n] / 1e6:,.0f}")
            else:
                taken.append(f"{bytes_of(study, name, n, 'trained_bytes') / 1e6:,.0f}*")
                note = "; * computed"
        costs.append([method["label"], f"{method['file_bytes'] / 1e6:.2f}",
                      f"{1000 * method['switch_ms']:.0f}", f"{method['load_ms']:.1f}", *taken,
                      f"{bytes_of(study, name, most, 'file_bytes') / 1e6:,.0f}"])

    return (f"{markdown_table(header, rows)}\n{markdown_table(cost_header, costs)}\n"
            f"{multitask_caption(study)}; [ ] is a 95 % interval, over test sentences only. "
            "Memory is measured in a fresh process, beyond Python and its libraries; "
            f"for all but full fine-tuning with the base and its tokenizer{note}.\n")


def redraw(output):
    """Draw output/metrics/multitask.json into output/figures/, and print its tables."""
    from plots import name_rows, plt, save_figure, write_table
    study = read_json(output / "metrics" / "multitask.json", "tasks", "methods")
    tasks, methods, figures = list(study["tasks"]), study["methods"], output / "figures"
    fig, (scores, memory) = plt.subplots(1, 2, figsize=(9, 1.2 + len(tasks) * len(methods) / 4))

    for i, (name, method) in enumerate(methods.items()):
        _, color, marker = CASES[name]
        f1 = [study["tasks"][task][name]["f1_macro"] for task in tasks]
        at = np.arange(len(tasks)) + 0.8 / len(methods) * (i - (len(methods) - 1) / 2)
        bars = scores.barh(at, f1, 0.7 / len(methods), color=color)
        scores.bar_label(bars, fmt="%.3f", padding=3, fontsize=10)
        counts, measured = np.array(method["memory"]).T
        memory.plot(counts, measured / 1e9, color=color, marker=marker, markersize=7,
                    label=f"{method['label']}: {measured[-1] / 1e9:.2f} GB for {counts[-1]}")

    name_rows(scores, tasks)
    scores.set(title="test macro-F1", xlim=(0, 1.15), xticks=[0, 0.5, 1])
    memory.set(title="resident memory (GB)", xlabel="tasks held at once")
    memory.legend(fontsize=9, loc="upper left")
    fig.suptitle(multitask_caption(study), fontsize=9)
    save_figure(fig, figures / "multitask.png")
    write_table(figures / "multitask.md", multitask_markdown(study))


def measure(method, results, base, base_hash, tokenizer, splits, device):
    """Put a method on the base and return (its entry, but for the memory; {task: its scores})."""
    own, full = results[method], results["full"]
    file, dtype = own["movies"]["file"], amp_dtype(read_settings(own["movies"]).amp)
    model, about = attach(base, base_hash, file, dtype or torch.float32)
    check_tokenizer(file, about, tokenizer)
    model = place(model, device)
    tensors = {task: on_device(read_tensors(result["file"]), device)
               for task, result in own.items()}
    amp = torch.autocast(device.type, dtype, enabled=dtype is not None)
    scores = {} if method == "full" else score_together(model, tensors, splits, own, full, device,
                                                        amp)
    slots, order = trained_tensors(model), iter(ROUND * SWITCHES)
    _, switch_ms = milliseconds(lambda: switch(slots, tensors[next(order)]), SWITCHES)
    _, load_ms = milliseconds(lambda: switch(slots, on_device(read_tensors(file), device)), 20)
    return {"label": case_label(method),
            "trained_bytes": sum(t.nbytes for t in tensors["movies"].values()),
            "file_bytes": file.stat().st_size,
            "switch_ms": switch_ms, "load_ms": load_ms}, scores


def main(args, runs):
    if not runs:
        redraw(args.output)
        return
    from qa import load_task  # slow, too
    results, model_name = train_missing(runs), model_of(args)
    s = read_settings(results["full"]["movies"])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tasks = {task: load_task(read_settings(result)) for task, result in results["full"].items()}
    labels = tasks["movies"].label_names  # the same for all four
    tokenizer, base = load_pretrained(model_name, labels)
    base_hash = hash_base(base)
    splits = {name: task.encode(task.test, tokenizer, s) for name, task in tasks.items()}

    table = {task: {"test_rows": splits[task].n, "full": {"f1_macro": result["f1_macro"]}}
             for task, result in results["full"].items()}
    methods = {}
    for method, of_tasks in results.items():
        entry, scores = measure(method, results, base, base_hash, tokenizer, splits, device)
        for task, row in scores.items():
            table[task][method] = row
        files = [result["file"] for result in of_tasks.values()]
        entry["memory"] = memory_of(files, model_name, labels, method != "full")
        methods[method] = entry

    # before the JSON, which says that they are there
    pairs = {method: [(task, *pair) for task, result in of_tasks.items()
                      for pair in result["test_predictions"]]
             for method, of_tasks in results.items()}  # (task, label, predicted)
    write_columns(args.output / "metrics" / "multitask_answers.csv", {
        "task": [task for task, *_ in pairs["full"]], "label": [y for _, y, _ in pairs["full"]],
        **{method: [predicted for *_, predicted in own] for method, own in pairs.items()}})
    write_json(args.output / "metrics" / "multitask.json",
               {"command": command(), "model": s.model, "seed": s.seed,
                "base_bytes": sum(p.nbytes for p in base.parameters()), "tasks": table,
                "methods": methods, "environment": environment(device, amp_dtype(s.amp))})
    redraw(args.output)


if __name__ == "__main__":
    main(*ARGS)
