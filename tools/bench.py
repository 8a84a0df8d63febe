"""Measure how fast each method trains. All cases take turns, so that a busy machine slows all of
them alike.

    python -m tools.bench            every method; the peer is Hugging Face's Trainer, with peft for
                                     LoRA and DoRA, where accelerate and peft are installed, as it
                                     is used and with group_by_length
    python -m tools.bench --study    and puts the seconds of an epoch into
                                     metrics/crossvalidation.json, whose runs trained side by side
                                     or on several machines
    python -m tools.bench --tricks   what each speed trick gains, alone and after all the others;
                                     those of fast.py act on a CPU alone
    python -m tools.bench --growth [--model bert-base-uncased]
                                     how the time grows with the length of the rows: random weights,
                                     random tokens, so that nothing has to be downloaded
    python -m tools.bench --redraw   draws every metrics/growth_*.json again

Other flags are train.py's. A round runs every case once, on 16 batches that stand for an epoch of
it, from the shortest to the longest. A round before the others warms up and counts the matrix
products. Writes metrics/bench.json, bench_tricks.json or growth_MODEL.json.
"""
if not __package__:
    raise SystemExit("error: run this from the project's folder: python -m tools.bench")

import importlib.util
import statistics
import sys

from common import check_writable, command, fail, read_json, start, write_json
from compare import explain, refuse
from methods import CASES
from settings import Parser, case_label, read_flags

# What makes training fast, each with the file it is in
TRICKS = {"length_groups": "batches of one sentence length (data.py)",
          "cheap_dropout": "16 random bits an element (fast.py)",
          "kept_memory": "freed memory stays in the process (fast.py)",
          "cls_only": "a last layer for [CLS] alone (fast.py)",
          "cast_once": "in mixed precision, one cast for query, key and value (fast.py)",
          "half_weights": "in mixed precision, frozen weights in 16 bits (model.py)",
          "fused_adamw": "AdamW in one pass over memory (train.py)"}
INFERENCE = {"plain": ("inference: BERT", "full"), "unmerged": ("inference: LoRA r=8", "lora_r8"),
             "merged": ("inference: LoRA r=8, merged", "lora_r8")}
# The methods of the peer and the packages that it needs, which are not in requirements.txt. The
# package with adapters needs an older transformers than ours.
PEERS, PACKAGES = ("full", "lora_r8", "dora"), ("accelerate", "peft")
# How it is used: on random batches, or on batches of rows of about one length
USED = {"peer": "", "grouped_peer": ", group_by_length"}
ROUNDS, STEPS = 3, 16
# --growth: tokens in a row, of which a table shows some; rows in a batch, and tokens at most
LENGTHS, SHOWN_LENGTHS = (16, 32, 64, 128, 256, 512), (32, 128, 512)
BATCH_SIZES, MOST_TOKENS = (1, 8, 32), 4096
GROWN = ("full", "lora_r8")  # the methods that are measured at every length and batch size


def parse_args(argv=None):
    """Read bench's own flags; `flags` are train.py's, and `run` is the Run that they ask for."""
    start()
    argv = sys.argv[1:] if argv is None else argv
    explain(__doc__, argv)
    parser = Parser(add_help=False, allow_abbrev=False)
    for flag in "--study", "--tricks", "--growth", "--redraw":
        parser.add_argument(flag, action="store_true")
    args, flags = parser.parse_known_args(argv)
    if sum((args.study, args.tricks, args.growth, args.redraw)) > 1:
        fail("take one of --study, --tricks, --growth and --redraw, which is for growth's figures")
    refuse(["--method", "--r", "--targets", "--accumulation", "--lr", "--epochs", "--warmup",
            "--max-steps", "--fold"], argv, "is not for tools.bench, which times some steps of "
                                            "every method")
    if args.growth:
        refuse(["--max-length", "--batch-size", "--task", "--data"], argv,
               "is not for --growth, which times random tokens of several lengths")
    args.flags = [*flags, "--method", "full"]  # a case's own come after these
    args.run = read_flags(args.flags)
    if args.run.settings.is_qa:
        fail("tools.bench measures sentence classification")
    if args.study and not study_path(args.run.output).exists():
        fail(f"there is no {study_path(args.run.output)}; bash run_all.sh --folds 5 makes it")
    check_writable(args.run.output / "metrics")
    return args


def study_path(output):
    """Return where the study is whose times --study measures."""
    return output / "metrics" / "crossvalidation.json"


ARGS = parse_args() if __name__ == "__main__" else None  # before the slow imports

import math
import multiprocessing
import tempfile
import time
from importlib.metadata import version
from typing import NamedTuple

import numpy as np
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm
from transformers import BertConfig, BertForSequenceClassification

from data import Encoded, load_sentences
from lora import merge_lora
from model import WORLD, amp_dtype, build, environment, load_pretrained, to_device, trained_tensors
from plots import draw_study, markdown_table, plt, save_figure, write_table
from spread import mean_std
from tools import memory
from train import make_optimizer, step

MACHINE = torch.device(memory.DEVICE)


class Benchmark(NamedTuple):
    """Hold one case of what is measured."""
    label: str
    kind: str  # "train", "product", one of USED or of INFERENCE
    flags: str  # train.py's
    without: tuple = ()  # TRICKS that are left out

    @property
    def process(self):
        """Name the process that runs it. The peer has one of its own, so that nothing that makes
        ours fast is in it. So has what keeps no memory: memory is kept for a whole process."""
        if self.kind in USED:
            return "peer"
        return "default" if "kept_memory" in self.without else "ours"


# what the steps are held against: products of two square matrices
PRODUCT = Benchmark("one matrix product", "product", "")


# --- one round of a case -------------------------------------------------------------------------

class RandomRows(Encoded):
    """`n` rows of random tokens, all as long as --max-length allows."""

    def __init__(self, n, config, s):
        self.ids = torch.randint(config.vocab_size, (n, s.max_length))
        self.lengths, self.usable = np.full(n, s.max_length), np.arange(n)

    def collate(self, rows):
        ids = self.ids[rows]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids),
                "labels": torch.zeros(len(rows), dtype=torch.int64)}


def load_rows(run, n_random):
    """Load the training rows of a Run: (Encoded, a function that makes (tokenizer, fresh model)).
    n_random: so many rows of random tokens instead, with random weights and without tokenizer."""
    if n_random:
        config = BertConfig(**memory.MODELS[run.settings.model])
        return (RandomRows(n_random, config, run.settings),
                lambda: (None, BertForSequenceClassification(config)))
    task = load_sentences(run.settings, run.data)
    tokenizer, _ = load_pretrained(run.model, task.label_names)
    return (task.encode(task.train, tokenizer, run.settings),
            lambda: load_pretrained(run.model, task.label_names))


def sample(split, s, by_length=True, as_peer=False):
    """Choose STEPS batches that stand for an epoch: of its batches, in order of their longest row,
    the middle one of each sixteenth.

    Their mean number of tokens, padding included, is the epoch's. Random batches would be an eighth
    too long (movies) because of the longest of all, and their loader would seem too slow. as_peer:
    the batches are Trainer's with group_by_length.
    """
    if as_peer:
        from transformers.trainer_pt_utils import get_length_grouped_indices
        torch.manual_seed(s.seed)
        order = np.array(get_length_grouped_indices(split.lengths.tolist(), s.batch_size))
        batches = [order[i:i + s.batch_size] for i in range(0, len(order), s.batch_size)]
    else:
        batches = split.batches(s.batch_size, np.random.default_rng(s.seed), by_length)
    batches = [batch for batch in batches if len(batch) == s.batch_size] or batches
    batches.sort(key=lambda batch: split.lengths[batch].max())
    n = min(STEPS, len(batches))
    return [batches[(2 * i + 1) * len(batches) // (2 * n)] for i in range(n)]


def timed(run_batch, batches):
    """Make a function that runs a round, run_batch(batch) of each, and returns its seconds."""
    def run_round():
        begin = time.perf_counter()
        for batch in batches:
            out = run_batch(batch)
        out.flatten()[0].item()  # waits for the GPU
        return time.perf_counter() - begin
    return run_round


def prepare_peer(s, split, fresh, is_grouped):
    """Return what prepare() does for the peer's training, on random batches or on grouped ones."""
    from transformers import DataCollatorWithPadding, PrinterCallback, Trainer

    torch.manual_seed(s.seed)
    tokenizer, model = fresh()
    if s.method != "full":
        from peft import LoraConfig, get_peft_model
        model = get_peft_model(model, LoraConfig(
            task_type="SEQ_CLS", r=s.r, lora_alpha=s.alpha, lora_dropout=s.dropout,
            target_modules=["query", "value"], use_dora=s.method == "dora"))
    batches = sample(split, s, by_length=False, as_peer=is_grouped)
    rows = [{"input_ids": split.ids[i].tolist(), "labels": int(split.labels[i])}
            for i in np.concatenate(batches)]
    arguments = transformers.TrainingArguments(
        tempfile.gettempdir(), per_device_train_batch_size=s.batch_size, max_steps=len(batches),
        learning_rate=1e-5, weight_decay=0.01, bf16=s.amp == "bf16", fp16=s.amp == "fp16",
        use_cpu=MACHINE.type == "cpu", train_sampling_strategy="sequential", save_strategy="no",
        logging_strategy="no", report_to=[], disable_tqdm=True, seed=s.seed)
    trainer = Trainer(model, arguments, train_dataset=rows,
                      data_collator=DataCollatorWithPadding(tokenizer))
    trainer.remove_callback(PrinterCallback)
    # from when model and loader are made to when the loss is on the CPU, as timed() does it
    return lambda: trainer.train().metrics["train_runtime"], batches


def prepare(case, s, split, fresh):
    """Return (a function that runs one round of a case and returns its seconds, the batches of a
    round). s: the settings of its flags; split, fresh: load_rows's."""
    if case.kind in USED:
        return prepare_peer(s, split, fresh, case.kind == "grouped_peer")
    dtype = amp_dtype(s.amp)
    if case.kind == "product":
        n = 8192 if MACHINE.type == "cuda" else 2048
        a, b = (torch.randn(n, n, device=MACHINE, dtype=dtype or torch.float32) for _ in range(2))
        batches = [range(n)] * STEPS
        return timed(lambda _: a @ b, batches), batches

    torch.manual_seed(s.seed)
    model, amp = fresh()[1], torch.autocast(MACHINE.type, dtype, enabled=dtype is not None)
    batches = sample(split, s, "length_groups" not in case.without)
    if case.kind in INFERENCE:
        model = build(model, s, MACHINE).eval()
        if case.kind == "merged":
            merge_lora(model)

        @torch.no_grad()
        def run_batch(rows):
            with amp:
                return model(**to_device(split.collate(rows), MACHINE)).logits
    else:
        model = build(model, s, MACHINE, dtype, without=case.without).train()
        optimizer = make_optimizer(list(trained_tensors(model).values()), 1e-5,
                                   fused="fused_adamw" not in case.without)
        scaler = torch.amp.GradScaler(MACHINE.type, enabled=dtype is torch.float16)

        def run_batch(rows):
            return step(model, optimizer, split, rows, MACHINE, amp, scaler)
    return timed(run_batch, batches), batches


# --- rounds in turns -----------------------------------------------------------------------------

def nf4_flops(x_shape, packed_shape, weight_shape, *_, out_shape=None, **__):
    return 2 * math.prod(x_shape) * weight_shape[0]


def flops_of(run_round):
    """Count the floating-point operations of the matrix products of one round, forward and
    backward."""
    custom = {}
    # one operation to torch, which does not look inside
    if hasattr(torch.ops.bitsandbytes, "gemm_4bit"):
        custom[torch.ops.bitsandbytes.gemm_4bit] = nf4_flops
    with FlopCounterMode(display=False, custom_mapping=custom) as counter:
        run_round()
    return counter.get_total_flops()


def serve(pipe, flags, n_random):
    """Run a process that measures. It answers a case by the seconds of one round. The first time it
    warms up, and answers by the round's (floating-point operations, steps, rows)."""
    start()
    rows, rounds = load_rows(read_flags(flags), n_random), {}
    while case := pipe.recv():
        if case not in rounds:
            s = read_flags([*flags, *case.flags.split()]).settings
            rounds[case], batches = prepare(case, s, *rows)
            pipe.send((flops_of(rounds[case]), len(batches), sum(map(len, batches))))
        else:
            pipe.send(rounds[case]())


def time_in_turns(cases, flags, n_random=None):
    """Time the cases, a round of each after one of every other. Return {name: (seconds of each
    round, floating-point operations, steps and rows of a round)}, and the FLOP/s of PRODUCT, which
    takes its turns, too. flags: train.py's for all; n_random: load_rows's."""
    if WORLD > 1:
        fail("tools.bench is for one process; start it without torchrun")
    # spawned: in a fork of this process a GPU may not work
    context, pipes, cases = multiprocessing.get_context("spawn"), {}, {None: PRODUCT, **cases}
    answers = {name: [] for name in cases}
    for name in tqdm([*cases] * (1 + ROUNDS), unit="case"):
        case = cases[name]
        if case.process not in pipes:
            pipes[case.process], theirs = context.Pipe()
            context.Process(target=serve, args=(theirs, flags, n_random), daemon=True).start()
            theirs.close()
        try:
            pipes[case.process].send(case)
            answers[name].append(pipes[case.process].recv())
        except (EOFError, ConnectionError):
            fail(f"the process that measures {case.label} has ended")
    for pipe in pipes.values():
        pipe.send(None)
    timings = {name: (seconds, *about) for name, (about, *seconds) in answers.items()}
    seconds, flops, *_ = timings.pop(None)
    return timings, flops / statistics.median(seconds)


def speedup(slow, quick):
    """Return how many times faster: the median, the smallest and the largest of the rounds, in each
    of which both ran."""
    each = [s / q for s, q in zip(slow, quick)]
    return statistics.median(each), min(each), max(each)


def show_speedup(values):
    return "" if values is None else "{:.2f} ({:.2f} to {:.2f})".format(*values)


# --- every method, every trick -------------------------------------------------------------------

def method_cases():
    """Return {name: Benchmark}: training with every method, inference, and what the peer can do
    here."""
    cases = {name: Benchmark(case_label(name), "train", case.flags) for name, case in CASES.items()}
    cases |= {name: Benchmark(label, name, CASES[method].flags)
              for name, (label, method) in INFERENCE.items()}
    if all(map(importlib.util.find_spec, PACKAGES)):
        for name in PEERS:
            label = f"{case_label(name)}, Trainer{'' if name == 'full' else ' + peft'}"
            cases |= {f"{name} {kind}": Benchmark(label + how, kind, CASES[name].flags)
                      for kind, how in USED.items()}
    return cases


def trick_cases():
    """Return {name: Benchmark}: full fine-tuning and LoRA with all tricks, with none, with all but
    one, with only one."""
    left_out = {"": (), " none": tuple(TRICKS)}
    left_out |= {f" without {trick}": (trick,) for trick in TRICKS}
    left_out |= {f" only {trick}": tuple(t for t in TRICKS if t != trick) for trick in TRICKS}
    return {name + kind: Benchmark(case_label(name) + kind, "train", CASES[name].flags, without)
            for name in ("full", "lora_r8") for kind, without in left_out.items()}


def results_of(cases, timings, rate):
    """Return {name: what bench.json says of a case}; timings, rate: time_in_turns's."""
    results = {}
    for name, (seconds, flops, n_steps, n_rows) in timings.items():
        median, ms = statistics.median(seconds), [1000 * x / n_steps for x in seconds]
        full = timings["plain" if name in INFERENCE else "full"]
        peers = {kind: timings.get(f"{name} {kind}") for kind in USED}
        results[name] = {
            "label": cases[name].label, "step_ms": statistics.median(ms), "step_ms_rounds": ms,
            "sentences_per_s": n_rows / median, "matmul_share": flops / median / rate,
            "vs_full": speedup(full[0], seconds),
            **{f"vs_{kind}": peer and speedup(peer[0], seconds) for kind, peer in peers.items()}}
    return results


def bench_markdown(study):
    """Make the table and caption of a bench.json, as Markdown."""
    share = f"share of the {study['matmul_gflops']:,.0f} GFLOP/s of a matmul (%)"
    cases = study["cases"].values()
    names = {"full": "full", "peer": "the peer", "grouped_peer": "the grouped peer"}
    against = [kind for kind in names  # earlier versions have no grouped peer
               if any(case.get(f"vs_{kind}") for case in cases)]
    header = ["", "step (ms)", "sentences per s", share,
              *(f"speed against {names[kind]}" for kind in against)]
    rows = [[case["label"], f"{case['step_ms']:.0f}", f"{case['sentences_per_s']:.0f}",
             f"{100 * case['matmul_share']:.0f}",
             *(show_speedup(case[f"vs_{kind}"]) for kind in against)] for case in cases]
    return markdown_table(header, rows) + f"\n{study['caption']}\n"


def tricks_markdown(study):
    """Make the table and caption of a bench_tricks.json, as Markdown: how many times faster a trick
    makes a step, as the only one and as the last. One that has no effect here shows the noise."""
    cases, rows = study["cases"], []

    def gain(slow, quick):
        return show_speedup(speedup(*(cases[name]["step_ms_rounds"] for name in (slow, quick))))

    for trick, what in TRICKS.items():
        row = [f"`{trick}`: {what}"]
        for method in "lora_r8", "full":
            row += [gain(f"{method} none", f"{method} only {trick}"),
                    gain(f"{method} without {trick}", method)]
        rows.append(row)
    for label, kind in ("sentences per s without any", " none"), ("sentences per s with all", ""):
        lora, full = (f"{cases[method + kind]['sentences_per_s']:.0f}"
                      for method in ("lora_r8", "full"))
        rows.append([label, lora, "", full, ""])
    header = ["trick", "LoRA r=8: alone", "LoRA r=8: last", "full: alone", "full: last"]
    return markdown_table(header, rows) + f"\n{study['caption']}\n"


def measure_speed(args):
    """Measure every method, or with --tricks every trick; write the numbers, print the table."""
    cases, s = trick_cases() if args.tricks else method_cases(), args.run.settings
    timings, rate = time_in_turns(cases, args.flags)
    has_peer = any(case.kind == "peer" for case in cases.values())
    where = (environment(MACHINE, amp_dtype(s.amp))
             | {name: version(name) for name in PACKAGES if has_peer})
    caption = (f"{s.model} on {s.task}, batches of {s.batch_size}, at most {s.max_length} tokens, "
               f"{where['device']}, amp {where['amp']}; medians of {ROUNDS} rounds of "
               f"{timings['full'][2]} steps taken in turns, in brackets the smallest and the "
               "largest ratio within a round.")
    study = {"command": command(), "caption": caption, "matmul_gflops": rate / 1e9,
             "environment": where, "cases": results_of(cases, timings, rate)}
    name, table = ("bench_tricks", tricks_markdown) if args.tricks else ("bench", bench_markdown)
    path = args.run.output / "metrics" / f"{name}.json"
    write_json(path, study)
    print(f"{table(study)}\nwrote {path}")
    if args.study:
        time_study(args.run.output, study)


def time_study(output, bench):
    """Put the times of a bench.json into the study of folds, and draw it again: median and standard
    deviation over the rounds of an epoch's seconds, as if full fine-tuning were equally fast in all
    rounds, since a busy machine slows a round's methods alike."""
    study = read_json(study_path(output), "entries")
    full, where = bench["cases"]["full"], bench["environment"]
    for name, entry in study["entries"].items():
        run = entry["runs"][0]
        steps = math.ceil(run["rows"]["train"] / run["settings"]["batch_size"])
        step_ms = (full["step_ms_rounds"] if name == "full" else
                   [full["step_ms"] / ratio for ratio in bench["cases"][name]["vs_full"]])
        seconds = [steps * ms / 1000 for ms in step_ms]
        entry["epoch_time_s"] = statistics.median(seconds)
        entry["epoch_time_s_std"] = mean_std(seconds)[1]
    study["timed"] = (f"{len(full['vs_full'])} rounds of `{bench['command']}` ({where['device']}, "
                      f"amp {where['amp']})")
    write_json(study_path(output), study)
    draw_study(output, "crossvalidation")


# --- growth --------------------------------------------------------------------------------------

def measure_length(length, flags):
    """Time rows of one length: GROWN in batches of every size, at SHOWN_LENGTHS every method in
    those of the largest. Return {(method, batch size): what is said of it}, PRODUCT's FLOP/s."""
    sizes = [n for n in BATCH_SIZES if n * length <= MOST_TOKENS]
    cases = {(name, n): Benchmark(f"{case_label(name)}, {n} x {length} tokens", "train",
                                  f"{case.flags} --batch-size {n}")
             for name, case in CASES.items() for n in sizes
             if name in GROWN or n == sizes[-1] and length in SHOWN_LENGTHS}
    timings, rate = time_in_turns(cases, [*flags, "--max-length", str(length)], sizes[-1])
    points = {}
    for case, (seconds, flops, _, n_rows) in timings.items():
        ms = [1000 * x / n_rows for x in seconds]
        points[case] = {"ms_per_sentence": statistics.median(ms), "ms_per_sentence_rounds": ms,
                        "bound_ms": 1000 * flops / n_rows / rate}
    return points, rate


def compare_methods(points, length, s):
    """Return what a growth_MODEL.json says of one of SHOWN_LENGTHS: of every method, beside its
    point, how many times as fast as full fine-tuning it is, and its bytes by tools.memory."""
    config, size = BertConfig(**memory.MODELS[s.model], num_labels=2), max(n for _, n in points)
    methods = {}
    for name, case in CASES.items():
        ledger = memory.predict_bytes(config, case.flags, size, length, amp_dtype(s.amp))
        methods[name] = points[name, size] | {
            "label": case_label(name), "bytes": ledger["peak"],
            "vs_full": speedup(*(points[other, size]["ms_per_sentence_rounds"]
                                 for other in ("full", name)))}
    return {"batch_size": size, "methods": methods}


def measure_growth(args):
    """Measure how the time grows with the length of the rows; write the numbers and draw them."""
    s, rates = args.run.settings, []
    if s.model not in memory.MODELS:
        fail(f"--growth --model {s.model}: the configurations known here are "
             f"{', '.join(memory.MODELS)}")
    growth = {"command": command(), "model": s.model,
              "environment": environment(MACHINE, amp_dtype(s.amp)), "lengths": {}, "grid": []}
    for length in LENGTHS:
        points, rate = measure_length(length, args.flags)
        rates.append(rate)
        growth["grid"] += [{"method": name, "length": length, "batch_size": n, **point}
                           for (name, n), point in points.items() if name in GROWN]
        if length in SHOWN_LENGTHS:
            growth["lengths"][length] = compare_methods(points, length, s)
    growth["matmul_gflops"] = statistics.median(rates) / 1e9
    path = args.run.output / "metrics" / f"growth_{s.model}.json"
    write_json(path, growth)
    draw_growth(path)


def growth_caption(growth):
    """Say what a growth_MODEL.json is of."""
    where, rounds = growth["environment"], growth["grid"][0]["ms_per_sentence_rounds"]
    return (f"{growth['model']} with random weights on random tokens, {where['device']}, amp "
            f"{where['amp']}, one matrix product {growth['matmul_gflops']:,.0f} GFLOP/s; medians "
            f"of {len(rounds)} rounds taken in turns")


def growth_markdown(growth):
    """Make the table and caption of a growth_MODEL.json, as Markdown: one line per method, three
    columns per length."""
    parts = growth["lengths"]
    header = ["method"] + [column for length, part in parts.items() for column in (
        f"{length} tokens x {part['batch_size']}: sentences per s", "against full", "memory (GB)")]
    rows = [[case["label"]] + [cell for part in parts.values() for cell in (
                f"{1000 / part['methods'][name]['ms_per_sentence']:.2f}",
                show_speedup(part["methods"][name]["vs_full"]),
                f"{part['methods'][name]['bytes'] / 1e9:.2f}")]
            for name, case in next(iter(parts.values()))["methods"].items()]
    return (markdown_table(header, rows) + f"\n{growth_caption(growth)}, in brackets the smallest "
            "and the largest ratio within a round; memory: the peak of tools.memory; made by "
            f"`{growth['command']}`.\n")


def draw_growth(path):
    """Draw what a metrics/growth_MODEL.json holds into figures/, and print the table: how many
    times as fast as full fine-tuning LoRA trains, by the length and number of the rows."""
    growth, figure = read_json(path, "grid"), path.parents[1] / "figures" / f"{path.stem}.png"
    full, lora = ({(p["batch_size"], p["length"]): p for p in growth["grid"] if p["method"] == name}
                  for name in GROWN)
    sizes, lengths = (sorted({key[i] for key in full}) for i in (0, 1))
    fig, ax = plt.subplots(figsize=(8, 4.2))

    for i, n in enumerate(sizes):
        own = [length for length in lengths if (n, length) in full]
        middle, low, high = np.transpose([speedup(*(points[n, length]["ms_per_sentence_rounds"]
                                                    for points in (full, lora))) for length in own])
        at = np.array(own) * 1.06 ** (i - 1)  # beside one another
        ax.errorbar(at, middle, [middle - low, high - middle], marker="os^"[i % 3], markersize=8,
                    capsize=3, color=plt.cm.Blues(0.4 + 0.6 * i / max(1, len(sizes) - 1)),
                    label=f"batches of {n}")
    bound = {key[1]: point["bound_ms"] / lora[key]["bound_ms"] for key, point in full.items()}
    ax.errorbar(list(bound), list(bound.values()), fmt="k--", label="by counted matrix products")
    ax.axhline(1, color=CASES["full"].color, linewidth=1)
    ax.set(title=f"{case_label(GROWN[1])} trains how many times as fast as full fine-tuning",
           xlabel="tokens in a row; bar: range of the rounds", ylabel="times as fast", xscale="log")
    ax.set_xticks(lengths, list(map(str, lengths)))
    ax.minorticks_off()
    ax.legend(fontsize=10)
    fig.suptitle(growth_caption(growth).partition("; ")[0], fontsize=9)
    save_figure(fig, figure)
    write_table(figure.with_suffix(".md"), growth_markdown(growth))


def redraw(output):
    """Draw every metrics/growth_*.json of `output` again."""
    paths = sorted((output / "metrics").glob("growth_*.json"))
    if not paths:
        fail(f"{output / 'metrics'} holds no growth_*.json; --growth makes it")
    for path in paths:
        draw_growth(path)


def main(args):
    if args.redraw:
        redraw(args.run.output)
    elif args.growth:
        measure_growth(args)
    else:
        measure_speed(args)


if __name__ == "__main__":
    main(ARGS)
