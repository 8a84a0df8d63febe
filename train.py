"""Fine-tune BERT one way on one task, measure it, and leave one JSON file.

    python train.py --method adapter --bottleneck 64

The loop is the same for every method: what differs is which tensors exist and which of them train.
Under torchrun own_share, add_up and gather spread it over many processes (the end of model.py).
"""
import sys; sys.path.insert(0, __file__.rpartition("/")[0])  # isort: skip (for PYTHONSAFEPATH=1)
from common import command, fail, start, write_json
from settings import Settings, read_flags

if __name__ == "__main__":
    start()
    read_flags().exit_if_finished()  # before the slow imports, as --help and typos are answered

import math
import time

import numpy as np
import torch
from tqdm import tqdm

import checkpoint
from checks import warmup_steps
from data import encode_splits
from model import (
    add_up,
    amp_dtype,
    build,
    count_params,
    environment,
    first_process_first,
    forget_peak,
    gather,
    join_processes,
    leave_processes,
    load_pretrained,
    own_share,
    peak_memory,
    say_params,
    to_device,
    trained_tensors,
)
from qa import load_task

WEIGHT_DECAY = 0.01  # on matrices only, as in BERT's own fine-tuning
EVAL_BATCH = 32  # rows; with windows of 384 tokens the attention of a layer of bert-base is 0.2 GB
CLIP_NORM = 1.0  # largest L2 norm of all gradients together


def step(model, optimizer, split, rows, device, amp, scaler, accumulation=1):
    """Take one optimizer step on a batch, row numbers of an Encoded split. Return its mean loss, a
    tensor on the device, so that nothing waits for it."""
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    own = own_share(rows)
    batch_loss = scaler.scale(torch.zeros((), device=device))  # a scale, also where own is empty
    for piece in np.array_split(own, min(accumulation, len(own))) if len(own) else ():
        with amp:
            loss = split.forward(model, to_device(split.collate(piece), device)).loss
            loss = loss * (len(piece) / len(rows))  # the pieces' losses add up to the mean
        scaler.scale(loss).backward()  # only fp16 needs the scaler
        batch_loss += loss.detach()
    add_up(batch_loss, trained)
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(trained, CLIP_NORM)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    return batch_loss


@torch.no_grad()
def predict(model, split, device, amp):
    """Return (the mean loss, one prediction per row) of the model on an Encoded split."""
    model.eval()
    loss, predictions = 0.0, {}
    for rows in own_share(split.batches(EVAL_BATCH)):
        with amp:
            out = split.forward(model, to_device(split.collate(rows), device))
        loss += out.loss.item() * len(rows)
        predictions.update(zip(rows.tolist(), split.predict(out, rows)))
    losses, parts = zip(*gather((loss, predictions)))
    predictions = {row: prediction for part in parts for row, prediction in part.items()}
    return sum(losses) / len(split.ids), [predictions[row] for row in range(len(split.ids))]


def evaluate(model, split, device, amp):
    """Return (scores, with the mean loss; the outcome that they are of) of the model on a split."""
    loss, predictions = predict(model, split, device, amp)
    outcome = split.outcome(predictions)
    return {"loss": loss, **split.score(outcome)}, outcome


def make_optimizer(trained, lr, fused=True):
    """Make AdamW. Biases and LayerNorms, the one-dimensional tensors, are not decayed."""
    groups = [{"params": [p for p in trained if p.dim() >= 2], "weight_decay": WEIGHT_DECAY},
              {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, fused=fused)


def main(argv=None):
    run = read_flags(argv)
    run.exit_if_finished()
    s: Settings = run.settings
    device, dtype = join_processes(), amp_dtype(s.amp)
    torch.manual_seed(s.seed)  # one head for all; CUDA may differ in bits (torch, Reproducibility)

    # --- data and model --------------------------------------------------------------------------
    with first_process_first():
        task = load_task(s, run.data)
        tokenizer, model = load_pretrained(run.model, task.label_names)
    about = checkpoint.describe(model, s, task, tokenizer)
    model = build(model, s, device, dtype)
    params, trained = count_params(model), list(trained_tensors(model).values())
    print(f"{s.method}: {say_params(params)}, {device.type}, {run.said}")
    splits, note = encode_splits(task, tokenizer, s)
    train, validation, test = splits.values()

    # --- optimizer and schedule ------------------------------------------------------------------
    steps_per_epoch = math.ceil(len(train.usable) / s.batch_size)
    total_steps = min(s.epochs * steps_per_epoch, s.max_steps or math.inf)
    optimizer, warmup = make_optimizer(trained, s.lr), warmup_steps(s.warmup, total_steps)
    def rate(t):  # as a share of the peak: it rises over the warm-up, then falls to 0
        return t / warmup if t < warmup else (total_steps - t) / max(1, total_steps - warmup)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    amp = torch.autocast(device.type, dtype, enabled=dtype is not None)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)
    rng = np.random.default_rng(s.seed)  # the data order's own: no method can shift it

    history, peaks, best_score, validated = [], {}, -math.inf, None
    for epoch in range(1, math.ceil(total_steps / steps_per_epoch) + 1):
        # --- train -------------------------------------------------------------------------------
        model.train()
        forget_peak(device)
        batches = train.batches(s.batch_size, rng)[:total_steps - (epoch - 1) * steps_per_epoch]
        total_loss, begin = 0.0, time.perf_counter()
        for batch in tqdm(batches, f"epoch {epoch}/{s.epochs}", unit="step", mininterval=1):
            loss = step(model, optimizer, train, batch, device, amp, scaler, s.accumulation)
            total_loss += len(batch) * loss
            schedule.step()  # also where GradScaler.step (torch.amp) left one out: rates end at 0
        train_loss = total_loss.item() / sum(map(len, batches))  # .item() waits for the GPU
        seconds, peaks = time.perf_counter() - begin, peak_memory(device, peaks)

        # --- validate ----------------------------------------------------------------------------
        scores, outcome = evaluate(model, validation, device, amp)
        if not (math.isfinite(train_loss) and math.isfinite(scores["loss"])):
            fail(f"the loss of epoch {epoch} is not finite; try a lower --lr than {s.lr:g}")
        history.append({"epoch": epoch, "train_loss": train_loss, "seconds": seconds,
                        **{f"validation_{name}": value for name, value in scores.items()}})
        print(f"epoch {epoch}: {seconds:.1f} s, train loss {train_loss:.4f}, validation "
              f"{train.show(scores)}")

        # --- keep the best epoch -----------------------------------------------------------------
        if scores[train.metric] > best_score:
            best_score, about["epoch"], validated = scores[train.metric], epoch, outcome
            checkpoint.save(run.checkpoint, model, about)

    # --- test once, with the best epoch; what is frozen is not in its file, and did not change ---
    checkpoint.load(run.checkpoint, model, about)
    scores, outcome = evaluate(model, test, device, amp)
    del scores["loss"]  # it means nothing where an answer's place is unknown
    leave_processes()
    seconds = [h["seconds"] for h in history]
    write_json(run.result, {  # last: the file says that the run is finished
        "command": command(), **params, **scores, "best_epoch": about["epoch"],
        "train_time_s": sum(seconds), "epoch_time_s": float(np.mean(seconds)), **peaks,
        "history": history, "splits": note, "label_names": task.label_names, "settings": vars(s),
        "rows": {name: split.n for name, split in splits.items()}, "label_counts": train.counts,
        "environment": environment(device, dtype), "validation": validated,
        **{f"test_{what}": values for what, values in outcome.items()}})
    print(f"test {train.show(scores)} (epoch {about['epoch']}), wrote {run.result}")


if __name__ == "__main__":
    main()
