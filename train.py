"""Fine-tune BERT one way on one task, measure it, and leave one JSON file.

    python train.py --method adapter --bottleneck 64

The loop is the same for every method: what differs is which tensors exist and which of them train
(methods.py, model.py).
"""
from settings import model_of, parse_args

ARGS = parse_args() if __name__ == "__main__" else None  # before the slow imports

import math
import time

import numpy as np
import torch
import transformers
from torch import nn
from tqdm import tqdm
from transformers import get_linear_schedule_with_warmup

import checkpoint
import data
import distributed
import qa
from distributed import LOCAL_RANK, RANK, WORLD, gather
from files import part_of, put_in_place, write_json
from methods import is_qa
from model import (
    amp_dtype,
    autocast,
    build,
    check_words,
    count_params,
    environment,
    load_pretrained,
    peak_memory,
    to_device,
    trained_tensors,
)
from start import fail

WEIGHT_DECAY = 0.01  # on matrices only, as in BERT's own fine-tuning
EVAL_BATCH = 32  # rows; with windows of 384 tokens the attention of a layer of bert-base is 0.2 GB
CLIP_NORM = 1.0  # largest L2 norm of all gradients together


def step(model, optimizer, split, batch, device, amp, scaler, accumulation=1):
    """One optimizer step on a batch, row numbers of an Encoded split. Returns this process's part
    of the mean loss, a tensor on the device, so that nothing waits for it; the parts of all
    processes add up."""
    total_loss = torch.zeros((), device=device)
    n_pieces = min(accumulation, math.ceil(len(batch) / WORLD))
    # the batch's mean loss = sum over all micro-batches of |piece| / |batch| * the piece's mean
    for piece in np.array_split(batch[RANK::WORLD], n_pieces):
        weight = len(piece) / len(batch)
        piece = piece if len(piece) else batch[:1]  # with weight 0: all processes must take part
        with amp:
            loss = split.forward(model, to_device(split.collate(piece), device)).loss * weight
        scaler.scale(loss * WORLD).backward()  # WORLD, since gradients are averaged over processes
        total_loss += loss.detach()
    scaler.unscale_(optimizer)
    tensors = [p for group in optimizer.param_groups for p in group["params"]]
    nn.utils.clip_grad_norm_(tensors, CLIP_NORM)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    return total_loss


@torch.no_grad()
def evaluate(model, split, device, amp):
    """({loss (mean per row), and the split's own scores}, its outcome) of the model on an Encoded
    split."""
    model.eval()
    loss, predictions = 0.0, {}
    for rows in split.batches(EVAL_BATCH)[RANK::WORLD]:
        with amp:
            out = split.forward(model, to_device(split.collate(rows), device))
        loss += out.loss.item() * len(rows)
        predictions.update(zip(rows.tolist(), split.predict(out, rows)))
    losses, parts = zip(*gather((loss, predictions)))
    predictions = {row: prediction for part in parts for row, prediction in part.items()}
    outcome = split.outcome([predictions[row] for row in range(len(split.ids))])
    return {"loss": sum(losses) / len(split.ids), **split.score(outcome)}, outcome


def show(scores):
    return ", ".join(f"{name} {value:.4f}" for name, value in scores.items())


def make_optimizer(trained, lr, fused=True):
    """AdamW over a list of tensors; biases and LayerNorms, the one-dimensional ones, are not
    decayed."""
    groups = [{"params": [p for p in trained if p.dim() >= 2], "weight_decay": WEIGHT_DECAY},
              {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, fused=fused)  # False: one operation at a time


def main(args):
    s, device = args.settings, distributed.join()
    without, dtype = s.get("without", ()), amp_dtype(s["amp"], device)

    # data and model; the first process of a machine downloads what is missing while others wait
    if LOCAL_RANK > 0:
        distributed.wait()
    task = (qa if is_qa(s) else data).load_task(args.task, args.data, s)
    print(f"{s['task']}: {task.note}")
    transformers.set_seed(s["seed"])  # random, numpy and torch, CUDA included
    tokenizer, model = load_pretrained(model_of(args), task.label_names)
    if LOCAL_RANK == 0:
        distributed.wait()
    if s["max_length"] > (longest := model.config.max_position_embeddings):
        fail(f"--max-length {s['max_length']}: {s['model']} reads {longest} tokens at most")
    about = checkpoint.describe(model, s, task.label_names, tokenizer, data.has_pairs(task))

    model = build(model, s, device, dtype)
    params = count_params(model)
    kinds = ", ".join(f"{kind} {n:,}" for kind, n in params["trainable_by_kind"].items() if n)
    print(f"{s['method']}: {params['trainable_params']:,} of {params['total_params']:,} parameters "
          f"train ({params['trainable_pct']:.3f} %: {kinds}), lr {s['lr']:g}, {device.type}, "
          f"amp {dtype or 'off'}")

    train, validation, test = (task.encode(rows, tokenizer, s)
                               for rows in (task.train, task.validation, task.test))
    check_words(s["model"], train, tokenizer)
    splits = {"train": train, "validation": validation, "test": test}
    notes = [f"{name}: {split.note}" for name, split in splits.items() if split.note]
    rows = {name: split.n for name, split in splits.items()}
    print(*notes, ", ".join(f"{n:,} {name}" for name, n in rows.items()) +
          f" rows; training examples: {len(train.usable):,} of {len(train.ids):,}", sep="\n")
    if not len(train.usable):
        fail("no window holds the whole of its question's answer; try a larger --max-length or "
             "--stride")

    # the optimizer, its schedule, and what draws random numbers
    steps_per_epoch = math.ceil(len(train.usable) / s["batch_size"])
    total_steps = min(s["epochs"] * steps_per_epoch, s["max_steps"] or math.inf)
    replica, trained = distributed.parallel(model), list(trained_tensors(model).values())
    if RANK > 0:
        torch.manual_seed(s["seed"] + 2**32 * RANK)  # dropout masks that no other --seed has
    optimizer = make_optimizer(trained, s["lr"], fused="fused_adamw" not in without)
    warmup = math.ceil(s["warmup"] * total_steps)
    schedule = get_linear_schedule_with_warmup(optimizer, warmup, total_steps)
    amp = autocast(device, dtype)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)
    rng = np.random.default_rng(s["seed"])  # the data order's own: no method can shift it

    history, best_file = [], part_of(args.checkpoint)  # no other process with this run writes it
    for epoch in range(1, math.ceil(total_steps / steps_per_epoch) + 1):
        model.train()
        batches = train.batches(s["batch_size"], rng, "length_groups" not in without)
        batches = batches[:total_steps - (epoch - 1) * steps_per_epoch]
        total_loss, start = torch.zeros((), device=device), time.perf_counter()
        title = f"epoch {epoch}/{s['epochs']}"
        for batch in batches if RANK > 0 else tqdm(batches, title, unit="step", mininterval=1):
            loss = step(replica, optimizer, train, batch, device, amp, scaler, s["accumulation"])
            total_loss += len(batch) * loss
            schedule.step()
        total_loss = sum(gather(total_loss.item()))  # .item() waits for the GPU; then the clock
        loss, seconds = total_loss / sum(map(len, batches)), time.perf_counter() - start

        scores, _ = evaluate(model, validation, device, amp)
        if not math.isfinite(either := loss + scores["loss"]):
            fail(f"the loss of epoch {epoch} is {either}; try a lower --lr than {s['lr']:g}")
        history.append({"epoch": epoch, "train_loss": loss, "seconds": seconds,
                        **{f"validation_{name}": value for name, value in scores.items()}})
        print(f"epoch {epoch}: train loss {loss:.4f}, validation {show(scores)}, {seconds:.1f} s")
        best = max(history, key=lambda h: h[f"validation_{train.metric}"])  # the first of equals
        if best is history[-1] and RANK == 0:
            checkpoint.save(best_file, model, about)

    # Only the best epoch sees the test rows, once. What is frozen is not in the file, nor changed.
    if RANK == 0:
        checkpoint.load(best_file, model, about)
    distributed.share([p.data for p in trained])  # the file is perhaps on another machine
    scores, outcome = evaluate(model, test, device, amp)
    del scores["loss"]  # of test questions without a known place it is none
    seconds, peaks = [h["seconds"] for h in history], zip(*gather(peak_memory(device)))
    vram, rss = (max(peak) if None not in peak else None for peak in peaks)  # largest process
    del replica  # its destructor may otherwise wait for a Gloo thread that waits for Python's lock
    distributed.leave()
    if RANK > 0:
        return
    result = {**params, **scores, "best_epoch": best["epoch"], "train_time_s": sum(seconds),
              "epoch_time_s": float(np.mean(seconds)), "peak_vram_gb": vram, "peak_rss_gb": rss,
              "history": history, "label_names": task.label_names, "rows": rows, "settings": s,
              "splits": "; ".join([task.note, *notes]), "environment": environment(device, dtype),
              **{f"test_{what}": values for what, values in outcome.items()}}
    put_in_place(best_file, args.checkpoint)
    write_json(args.result, result)  # last: it says that the run is finished
    print(f"test {show(scores)} (epoch {best['epoch']}), {result['epoch_time_s']:.1f} s per epoch, "
          f"wrote {args.result}")


if __name__ == "__main__":
    try:
        main(ARGS)
    except torch.OutOfMemoryError:
        fail("the GPU has no memory left; --accumulation 2 computes the same batches in halves")
