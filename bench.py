"""How fast each method trains, measured so that it compares: all in one process, in turns.

    python bench.py             every method; the peer is Hugging Face's modules, peft (if
                                installed) and random batches
    python bench.py --tricks    what each speed trick gains, alone and together with the others

Other flags are train.py's. A round trains every case once, on 16 batches that stand for an epoch of
it, from the shortest to the longest; a round before the others is for warming up. Writes
metrics/bench.json or metrics/bench_tricks.json.
"""
import statistics
import sys

from files import check_writable, write_json
from methods import CASES, is_qa
from settings import TRICKS, case_label, make_parser, model_of, settings_of
from start import command, fail, start
from studies import explain, markdown_table, refuse

# method: what does the same elsewhere
PEERS = {"full": "Hugging Face", "lora_r8": "peft", "dora": "peft"}
INFERENCE = {"plain": ("inference: BERT", "full"), "unmerged": ("inference: LoRA r=8", "lora_r8"),
             "merged": ("inference: LoRA r=8, merged", "lora_r8")}
ROUNDS, STEPS = 3, 16


def trick_cases():
    """{name: (label, flags)}: full fine-tuning and LoRA with all tricks, with none, with all but
    one, with only one."""
    cases = {}
    for method in "full", "lora_r8":
        label, flags = case_label(method), CASES[method].flags
        cases[method] = (label, flags)
        cases[f"{method} none"] = (f"{label}, no trick", f"{flags} --without {' '.join(TRICKS)}")
        for trick in TRICKS:
            others = " ".join(other for other in TRICKS if other != trick)
            cases[f"{method} without {trick}"] = (f"{label}, without {trick}",
                                                  f"{flags} --without {trick}")
            cases[f"{method} only {trick}"] = (f"{label}, only {trick}",
                                               f"{flags} --without {others}")
    return cases


def parse_args(argv):
    """({name: (label, flags)} to measure, {name: their argparse results}, whether these are the
    tricks)."""
    start()
    explain(__doc__, argv)
    fixed = ["--method", "--r", "--targets", "--without", "--accumulation", "--lr", "--epochs",
             "--warmup", "--max-steps", "--fold"]
    refuse(fixed, argv, "is not for bench.py, which times some steps of every method, with and "
                        "without its tricks")

    is_tricks = "--tricks" in argv
    argv = [word for word in argv if word != "--tricks"]
    cases = trick_cases() if is_tricks else {name: (case_label(name), case.flags)
                                             for name, case in CASES.items()}
    args = {name: make_parser().parse_args(argv + flags.split())
            for name, (_, flags) in cases.items()}
    if is_qa(settings_of(args["full"])):
        fail("bench.py measures sentence classification")
    check_writable(args["full"].output / "metrics")
    return cases, args, is_tricks


if __name__ == "__main__":
    SELECTED = parse_args(sys.argv[1:])  # before the slow imports

import importlib.util
import math
import time
from importlib.metadata import version

import numpy as np
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import data
from distributed import WORLD
from lora import merge_lora
from model import (
    amp_dtype,
    autocast,
    build,
    environment,
    load_pretrained,
    to_device,
    trained_tensors,
)
from train import make_optimizer, step


def matmul_rate(device, dtype):
    """FLOP/s of a product of two square matrices, the best of 10: what the steps are held
    against."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))

    def seconds():
        start = time.perf_counter()
        (a @ b)[0, 0].item()  # waits for the GPU
        return time.perf_counter() - start
    return 2 * n**3 / min(seconds() for _ in range(10))


def nf4_flops(x_shape, packed_shape, weight_shape, *_, out_shape=None, **__):
    return 2 * math.prod(x_shape) * weight_shape[0]


def flops_of(run_round):
    """Floating-point operations of the matrix products of one round, forward and backward."""
    custom = {}
    # one operation to torch, which does not look inside
    if hasattr(torch.ops.bitsandbytes, "gemm_4bit"):
        custom[torch.ops.bitsandbytes.gemm_4bit] = nf4_flops
    with FlopCounterMode(display=False, custom_mapping=custom) as counter:
        run_round()
    return counter.get_total_flops()


def sample(split, batch_size, by_length, seed):
    """STEPS batches that stand for an epoch: of its batches, in order of their longest row, the
    middle one of each sixteenth. Their mean number of tokens, padding included, is the epoch's;
    with the longest batch of all among them, shuffled, random batches would be an eighth too long
    (movies) and their loader seem too slow."""
    batches = split.batches(batch_size, np.random.default_rng(seed), by_length)
    batches = [batch for batch in batches if len(batch) == batch_size] or batches
    batches.sort(key=lambda batch: split.lengths[batch].max())
    n = min(STEPS, len(batches))
    return [batches[(2 * i + 1) * len(batches) // (2 * n)] for i in range(n)]


def with_peft(model, s):
    """The same method by peft, on Hugging Face's own modules."""
    from peft import LoraConfig, get_peft_model
    config = LoraConfig(task_type="SEQ_CLS", r=s["r"], lora_alpha=s["alpha"],
                        lora_dropout=s["dropout"], target_modules=["query", "value"],
                        use_dora=s["method"] == "dora")
    return get_peft_model(model, config)


def make_model(args, label_names, device, dtype, peer=None, without=()):
    """The model of a case as train.py makes it, without some tricks, or that of its `peer`."""
    s = settings_of(args)
    transformers.set_seed(s["seed"])
    _, model = load_pretrained(model_of(args), label_names)
    if peer:
        return (with_peft(model, s) if peer == "peft" else model).to(device)
    return build(model, s | {"without": without}, device, dtype)


def prepare(args, split, label_names, device, dtype, peer=None):
    """(a function that trains for one round, the batches it trains on) of a case, or of its
    `peer`."""
    s = settings_of(args)
    # Trainer has a fused AdamW, too
    without = set(TRICKS) - {"fused_adamw"} if peer else s.get("without", ())
    model = make_model(args, label_names, device, dtype, peer, without).train()
    optimizer = make_optimizer(list(trained_tensors(model).values()), 1e-5,
                               fused="fused_adamw" not in without)
    batches = sample(split, s["batch_size"], "length_groups" not in without, s["seed"])
    amp = autocast(device, dtype)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)

    def train_round():
        for batch in batches:
            loss = step(model, optimizer, split, batch, device, amp, scaler)
        loss.item()  # waits for the GPU
    return train_round, batches


def prepare_inference(args, split, label_names, device, dtype, is_merged):
    """The same for inference."""
    s = settings_of(args)
    model = make_model(args, label_names, device, None).eval()
    if is_merged:
        merge_lora(model)
    batches = sample(split, s["batch_size"], True, s["seed"])

    @torch.no_grad()
    def infer_round():
        for batch in batches:
            with autocast(device, dtype):
                logits = model(**to_device(split.collate(batch), device)).logits
        logits.sum().item()  # waits for the GPU
    return infer_round, batches


def ratio(slow, quick):
    """How many times faster: of the medians, and the smallest and largest of the rounds, in each of
    which both ran."""
    each = [s / q for s, q in zip(slow, quick)]
    return statistics.median(slow) / statistics.median(quick), min(each), max(each)


def show(values):
    return "" if values is None else "{:.2f} ({:.2f} to {:.2f})".format(*values)


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
    if trick == "half_weights":
        return method != "full" and bench["environment"]["amp"] != "off"
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
    header = ["trick", "LoRA r=8: alone", "LoRA r=8: in place", "full: alone", "full: in place"]
    return markdown_table(header, rows) + f"\n{bench['caption']}\n"


def prepare_all(cases, args, is_tricks, has_peft, common):
    """({name: label}, {name: (a function that runs one round, its batches)}) of cases and peers."""
    labels, rounds = {}, {}
    for name, (label, _) in cases.items():
        labels[name], rounds[name] = label, prepare(args[name], *common)
        if not is_tricks and name in PEERS and (has_peft or PEERS[name] != "peft"):
            labels[f"{name} peer"] = f"{label}, {PEERS[name]}"
            rounds[f"{name} peer"] = prepare(args[name], *common, PEERS[name])
    if not is_tricks:
        for name, (label, case) in INFERENCE.items():
            labels[name] = label
            rounds[name] = prepare_inference(args[case], *common, name == "merged")
    return labels, rounds


def time_rounds(rounds):
    """{name: [seconds of each round]}, the cases in turns."""
    seconds = {name: [] for name in rounds}
    turns = [name for _ in range(ROUNDS) for name in rounds]
    for name in tqdm(turns, unit="case"):
        start = time.perf_counter()
        rounds[name][0]()
        seconds[name].append(time.perf_counter() - start)
    return seconds


def results_of(labels, rounds, flops, seconds, rate):
    """{name: what bench.json says of a case}; rate: matmul_rate's."""
    results = {}
    for name, own in seconds.items():
        batches, median, peer = rounds[name][1], statistics.median(own), seconds.get(f"{name} peer")
        ms = [1000 * x / len(batches) for x in own]
        results[name] = {"label": labels[name],
                         "step_ms": statistics.median(ms), "step_ms_rounds": ms,
                         "sentences_per_s": sum(map(len, batches)) / median,
                         "matmul_share": flops[name] / median / rate,
                         "vs_full": ratio(seconds["plain" if name in INFERENCE else "full"], own),
                         "vs_peer": ratio(peer, own) if peer else None}
    return results


def main(cases, args, is_tricks):
    if WORLD > 1:
        fail("bench.py is for one process; start it without torchrun")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    first = args["full"]
    s, dtype = settings_of(first), amp_dtype(first.amp, device)
    task = data.load_task(first.task, first.data)
    split = task.encode(task.train, load_pretrained(model_of(first), task.label_names)[0], s)
    common = split, task.label_names, device, dtype
    has_peft = importlib.util.find_spec("peft") is not None

    labels, rounds = prepare_all(cases, args, is_tricks, has_peft, common)
    rate = matmul_rate(device, dtype or torch.float32)
    # the warm-up, too
    flops = {name: flops_of(run_round) for name, (run_round, _) in rounds.items()}
    seconds = time_rounds(rounds)
    results = results_of(labels, rounds, flops, seconds, rate)

    where = environment(device, dtype) | ({"peft": version("peft")} if has_peft else {})
    caption = (f"{s['model']} on {s['task']}, batches of {s['batch_size']}, at most "
               f"{s['max_length']} tokens, {where['device']}, amp {where['amp']}; medians of "
               f"{ROUNDS} rounds of {len(rounds['full'][1])} steps taken in turns, in brackets the "
               "smallest and the largest ratio within a round.")
    bench = {"command": command(), "caption": caption, "matmul_gflops": rate / 1e9,
             "environment": where, "cases": results}
    path = first.output / "metrics" / ("bench_tricks.json" if is_tricks else "bench.json")
    write_json(path, bench)
    print(tricks_markdown(bench) if is_tricks else markdown(bench), end="")
    print(f"\nwrote {path}")


if __name__ == "__main__":
    main(*SELECTED)
