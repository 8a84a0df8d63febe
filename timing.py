"""Cases of training and inference timed in turns, a round of each after one of every other, so that
a busy machine slows all of them alike.

The cases run in processes that serve them: one for all that is ours, one with the C library's usual
memory (fast.keep_memory is for a whole process), one for the peer. A round is a number of batches;
the first warms up and counts the matrix products.
"""
import functools
import math
import multiprocessing
import statistics
import time
from typing import NamedTuple

import numpy as np
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm
from transformers import BertConfig, BertForSequenceClassification

import data
from distributed import WORLD
from lora import merge_lora
from model import (
    amp_dtype,
    autocast,
    build,
    load_pretrained,
    to_device,
    trained_tensors,
)
from settings import MODELS, make_parser, model_of, settings_of
from start import fail, start
from train import make_optimizer, step

ROUNDS, STEPS = 3, 16


class Case(NamedTuple):
    label: str
    kind: str  # what is measured: a key of PREPARE
    flags: str  # train.py's
    process: str = "ours"  # in which process: "ours", "default" memory, or the "peer"'s


# what the steps are held against: products of two square matrices
PRODUCT = Case("one matrix product", "product", "--method full")


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


class RandomRows(data.Encoded):
    """`n` rows of random tokens, all as long as --max-length allows."""

    def __init__(self, n, config, s):
        self.ids = torch.randint(config.vocab_size, (n, s["max_length"]))
        self.lengths, self.usable = np.full(n, s["max_length"]), np.arange(n)

    def collate(self, rows):
        ids = self.ids[rows]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids),
                "labels": torch.zeros(len(rows), dtype=torch.int64)}


class Place(NamedTuple):
    """What all cases of a process share."""
    device: torch.device
    dtype: torch.dtype  # autocast's, or None
    split: data.Encoded  # the training rows
    fresh: object  # () -> (tokenizer or None, a model to train)


def load(argv, random_rows):
    """The Place of train.py's flags. random_rows: how many rows of random tokens to take, with
    random weights, instead of the task's own."""
    args = make_parser().parse_args([*argv, "--method", "full"])
    s, device = settings_of(args), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype, name = amp_dtype(args.amp, device), model_of(args)
    if random_rows:
        config = BertConfig(**MODELS[name])
        return Place(device, dtype, RandomRows(random_rows, config, s),
                     lambda: (None, BertForSequenceClassification(config)))
    task = data.load_task(args.task, args.data, s)
    split = task.encode(task.train, load_pretrained(name, task.label_names)[0], s)
    return Place(device, dtype, split, lambda: load_pretrained(name, task.label_names))


def timed(run_round):
    """The function that runs a round and returns its seconds."""
    def run_timed():
        begin = time.perf_counter()
        run_round()
        return time.perf_counter() - begin
    return run_timed


def prepare_training(args, place):
    """(a function that trains for one round and returns its seconds, the batches of a round)."""
    s, (device, dtype, split, fresh) = settings_of(args), place
    without = s.get("without", ())
    transformers.set_seed(s["seed"])
    model = build(fresh()[1], s, device, dtype).train()
    optimizer = make_optimizer(list(trained_tensors(model).values()), 1e-5,
                               fused="fused_adamw" not in without)
    batches = sample(split, s["batch_size"], "length_groups" not in without, s["seed"])
    amp = autocast(device, dtype)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)

    def train_round():
        for batch in batches:
            loss = step(model, optimizer, split, batch, device, amp, scaler)
        loss.item()  # waits for the GPU
    return timed(train_round), batches


def prepare_inference(args, place, is_merged=False):
    """The same for inference."""
    s, (device, dtype, split, fresh) = settings_of(args), place
    model = build(fresh()[1], s, device).eval()
    if is_merged:
        merge_lora(model)
    batches = sample(split, s["batch_size"], True, s["seed"])

    @torch.no_grad()
    def infer_round():
        for batch in batches:
            with autocast(device, dtype):
                logits = model(**to_device(split.collate(batch), device)).logits
        logits.sum().item()  # waits for the GPU
    return timed(infer_round), batches


def prepare_peer(args, place):
    """The same for the peer's training, on random batches."""
    from peers import prepare  # Trainer is slow to import
    s = settings_of(args)
    transformers.set_seed(s["seed"])
    tokenizer, model = place.fresh()
    batches = sample(place.split, s["batch_size"], False, s["seed"])
    return prepare(model, tokenizer, s, place.split, batches, place.dtype), batches


def prepare_product(_, place):
    """The same for PRODUCT."""
    device, n = place.device, 8192 if place.device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=place.dtype or torch.float32) for _ in range(2))

    def multiply_round():
        for _ in range(STEPS):
            c = a @ b  # (n, n)
        c[0, 0].item()  # waits for the GPU
    return timed(multiply_round), [range(n)] * STEPS


PREPARE = {"train": prepare_training, "plain": prepare_inference, "unmerged": prepare_inference,
           "merged": functools.partial(prepare_inference, is_merged=True), "peer": prepare_peer,
           "product": prepare_product}


def serve(pipe, argv, random_rows):
    """A process that measures: it answers a Case by the seconds of one round; the first time it
    warms up and answers by the round's (floating-point operations, steps, rows)."""
    start()
    place, rounds = load(argv, random_rows), {}
    while case := pipe.recv():
        if case not in rounds:
            args = make_parser().parse_args([*argv, *case.flags.split()])
            rounds[case], batches = PREPARE[case.kind](args, place)
            pipe.send((flops_of(rounds[case]), len(batches), sum(map(len, batches))))
        else:
            pipe.send(rounds[case]())


def measure(cases, argv, random_rows=None):
    """{name: [seconds of each round]} and {name: (floating-point operations, steps, rows) of a
    round} of the cases, in turns, and the FLOP/s of PRODUCT, which takes its turn. argv: train.py's
    flags for all; random_rows: load's."""
    if WORLD > 1:
        fail("timing is for one process; start it without torchrun")
    context, pipes, cases = multiprocessing.get_context("spawn"), {}, {None: PRODUCT, **cases}
    for process in dict.fromkeys(case.process for case in cases.values()):
        pipes[process], theirs = context.Pipe()
        context.Process(target=serve, args=(theirs, argv, random_rows), daemon=True).start()
        theirs.close()

    def ask(case):
        try:
            pipes[case.process].send(case)
            return pipes[case.process].recv()
        except (EOFError, BrokenPipeError):
            fail(f"the process that measures {case.label} has ended")

    turns = [*cases] * (1 + ROUNDS)
    answers = {name: [] for name in cases}
    for name in tqdm(turns, unit="case"):
        answers[name].append(ask(cases[name]))
    for pipe in pipes.values():
        pipe.send(None)
    about = {name: own.pop(0) for name, own in answers.items()}
    rate = about.pop(None)[0] / statistics.median(answers.pop(None))
    return answers, about, rate


def ratio(slow, quick):
    """How many times faster: of the medians, and the smallest and largest of the rounds, in each of
    which both ran."""
    each = [s / q for s, q in zip(slow, quick)]
    return statistics.median(slow) / statistics.median(quick), min(each), max(each)


def show(values):
    return "" if values is None else "{:.2f} ({:.2f} to {:.2f})".format(*values)
