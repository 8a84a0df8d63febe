"""Fine-tune BERT one way on one task, measure it, and leave one JSON file.

    python train.py --method adapter --bottleneck 64

The loop is the same for every method: what differs is which tensors exist and which of them train (methods.py).
"""
from settings import fail, model_of, parse_args, part_of, put_in_place, write_json

ARGS = parse_args() if __name__ == "__main__" else None  # before the slow imports, so that a typo is answered at once

import math
import platform
import resource
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import transformers
from torch import nn
from tqdm import tqdm
from transformers import get_linear_schedule_with_warmup

import checkpoint
import data
import distributed
import fast
import qa
from distributed import LOCAL_RANK, RANK, WORLD, gather
from methods import apply_method, count_params, trained_tensors
from model import check_words, load_pretrained

WEIGHT_DECAY = 0.01  # on matrices only, as in BERT's own fine-tuning
EVAL_BATCH = 32  # rows; with windows of 384 tokens the attention of one layer of bert-base is 0.2 GB
CLIP_NORM = 1.0  # largest L2 norm of all gradients together
RSS_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes in a unit of ru_maxrss


def has_bf16(device):
    """Whether the hardware multiplies in bf16. A CPU that emulates it was 5 times slower than in fp32 (60 and 280
    GFLOP/s on 2 cores with AVX-512 but neither AMX nor AVX512-BF16)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def amp_dtype(mode, device):
    """The type of autocast for --amp: torch.bfloat16, torch.float16, or None for plain fp32."""
    if mode == "bf16" and not has_bf16(device):
        fail(f"--amp bf16: this {device.type} has no bf16 arithmetic; --amp auto takes what it has")
    if mode == "fp16" and device.type != "cuda":
        fail("--amp fp16 needs a CUDA device; use --amp auto")
    if mode == "auto":
        mode = "bf16" if has_bf16(device) else "fp16" if device.type == "cuda" else "off"
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[mode]


def to_device(inputs, device):
    """A dict of CPU tensors on the device; from pinned memory, so that the copy does not hold up the CPU."""
    if device.type == "cuda":
        return {name: tensor.pin_memory().to(device, non_blocking=True) for name, tensor in inputs.items()}
    return inputs


def step(model, optimizer, split, batch, device, amp, scaler, accumulation=1):
    """One optimizer step on a batch, row numbers of an Encoded split. Returns this process's part of the mean loss, a
    tensor on the device, so that nothing waits for it; the parts of all processes add up."""
    total_loss = torch.zeros((), device=device)
    n_pieces = min(accumulation, math.ceil(len(batch) / WORLD))
    for piece in np.array_split(batch[RANK::WORLD], n_pieces):  # gradients of the pieces add up
        weight = len(piece) / len(batch)
        if not len(piece):
            piece = batch[:1]  # with weight 0: all processes must take part
        with amp:
            loss = split.forward(model, to_device(split.collate(piece), device)).loss * weight
        scaler.scale(loss * WORLD).backward()  # times WORLD, since gradients are averaged over the processes
        total_loss += loss.detach()
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], CLIP_NORM)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    return total_loss


@torch.no_grad()
def evaluate(model, split, device, amp):
    """({loss (mean per row), and the split's own scores}, [(truth, answer)]) of the model on an Encoded split."""
    model.eval()
    loss, predictions = 0.0, {}
    for rows in split.batches(EVAL_BATCH)[RANK::WORLD]:
        with amp:
            out = split.forward(model, to_device(split.collate(rows), device))
        loss += out.loss.item() * len(rows)
        predictions.update(zip(rows.tolist(), split.predict(out, rows)))
    losses, parts = zip(*gather((loss, predictions)))
    predictions = {row: prediction for part in parts for row, prediction in part.items()}
    pairs = split.pairs([predictions[row] for row in range(len(split.ids))])
    return {"loss": sum(losses) / len(split.ids), **split.score(pairs)}, pairs


def show(scores):
    return ", ".join(f"{name} {value:.4f}" for name, value in scores.items())


def make_optimizer(trained, lr, fused=True):
    """AdamW over a list of tensors; biases and LayerNorms, the one-dimensional ones, are not decayed."""
    groups = [{"params": [p for p in trained if p.dim() >= 2], "weight_decay": WEIGHT_DECAY},
              {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, fused=fused or None)  # None: torch's default, one operation at a time


def git_commit():
    """Hash of the checked-out commit, with -dirty where files differ from it; None without git or a checkout."""
    try:
        git = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
                             cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:
        return None
    return git.stdout.strip() or None


def environment(device, dtype):
    """What made the numbers, besides the settings."""
    threads = torch.get_num_threads()
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {threads} thread{'s' if threads > 1 else ''}"
    return {"device": f"{WORLD} x {name}" if WORLD > 1 else name,
            "amp": str(dtype).removeprefix("torch.") if dtype else "off", "python": platform.python_version(),
            "torch": torch.__version__, "transformers": transformers.__version__,
            "bitsandbytes": version("bitsandbytes"), "git_commit": git_commit()}


def main(args):
    s, without = args.settings, args.settings.get("without", ())
    device = distributed.join()
    dtype = amp_dtype(s["amp"], device)
    if LOCAL_RANK > 0:
        distributed.wait()  # until the first process of this machine has downloaded what is missing
    task = (qa if "stride" in s else data).load_task(args)
    print(f"{s['task']}: {task.note}")
    transformers.set_seed(s["seed"])  # random, numpy and torch, CUDA included
    tokenizer, model = load_pretrained(model_of(args), task.label_names)
    if LOCAL_RANK == 0:
        distributed.wait()
    if s["max_length"] > (longest := model.config.max_position_embeddings):
        fail(f"--max-length {s['max_length']}: {s['model']} reads {longest} tokens at most")
    about = checkpoint.describe(model, s, task.label_names, tokenizer)
    apply_method(model, s, dtype or torch.float32)
    if device.type == "cpu":
        fast.install(model, without)
    model.to(device)
    params = count_params(model)
    kinds = ", ".join(f"{kind} {n:,}" for kind, n in params["trainable_by_kind"].items() if n)
    print(f"{s['method']}: {params['trainable_params']:,} of {params['total_params']:,} parameters train "
          f"({params['trainable_pct']:.3f} %: {kinds}), lr {s['lr']:g}, {device.type}, amp {dtype or 'off'}")

    train, validation, test = (task.encode(rows, tokenizer, s) for rows in (task.train, task.validation, task.test))
    check_words(s["model"], train, tokenizer)
    splits = {"train": train, "validation": validation, "test": test}
    notes = [task.note, *(f"{name}: {split.note}" for name, split in splits.items() if split.note)]
    print("\n".join(notes[1:]), end="\n" * (len(notes) > 1))
    rows = {name: split.n for name, split in splits.items()}
    print(", ".join(f"{n:,} {split}" for split, n in rows.items()) + f" rows; training examples: {len(train.usable):,}"
          f" of {len(train.ids):,}")
    if not len(train.usable):
        fail("no window holds the whole of its question's answer; try a larger --max-length or --stride")
    steps_per_epoch = math.ceil(len(train.usable) / s["batch_size"])
    total_steps = min(s["epochs"] * steps_per_epoch, s["max_steps"] or math.inf)
    replica, trained = distributed.parallel(model), list(trained_tensors(model).values())
    if RANK > 0:
        torch.manual_seed(s["seed"] + 2**32 * RANK)  # dropout masks of its own, which no other --seed has
    optimizer = make_optimizer(trained, s["lr"], fused="fused_adamw" not in without)
    schedule = get_linear_schedule_with_warmup(optimizer, math.ceil(s["warmup"] * total_steps), total_steps)
    amp = torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)  # otherwise it does nothing
    rng = np.random.default_rng(s["seed"])  # the data order: its own generator, so no method can shift it

    history, best_file = [], part_of(args.checkpoint)  # this process's own, should the same run go on in another
    for epoch in range(1, math.ceil(total_steps / steps_per_epoch) + 1):
        model.train()
        batches = train.batches(s["batch_size"], rng, "length_groups" not in without)
        batches = batches[:total_steps - (epoch - 1) * steps_per_epoch]
        total_loss, start = torch.zeros((), device=device), time.perf_counter()
        title = f"epoch {epoch}/{s['epochs']}"
        for batch in batches if RANK > 0 else tqdm(batches, desc=title, unit="step", mininterval=1):
            total_loss += len(batch) * step(replica, optimizer, train, batch, device, amp, scaler, s["accumulation"])
            schedule.step()
        total_loss = sum(gather(total_loss.item()))  # .item() waits for the GPU: only then the clock is right
        loss, seconds = total_loss / sum(map(len, batches)), time.perf_counter() - start

        scores, _ = evaluate(model, validation, device, amp)
        history.append({"epoch": epoch, "train_loss": loss, "seconds": seconds,
                        **{f"validation_{name}": value for name, value in scores.items()}})
        print(f"epoch {epoch}: train loss {loss:.4f}, validation {show(scores)}, {seconds:.1f} s")
        best = max(history, key=lambda h: h[f"validation_{train.metric}"])  # the first of equals
        if best is history[-1] and RANK == 0:
            checkpoint.save(best_file, model, about)

    # Only the best epoch sees the test rows, once. The frozen tensors are not in the file and did not change.
    if RANK == 0:
        checkpoint.load(best_file, model, about)
    distributed.share([p.data for p in trained])  # the file is perhaps on another machine
    scores, pairs = evaluate(model, test, device, amp)
    del scores["loss"]  # of test questions without a known place it is none
    seconds = [h["seconds"] for h in history]
    peak_vram = max(gather(torch.cuda.max_memory_allocated())) if device.type == "cuda" else None
    peak_rss = max(gather(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)) * RSS_UNIT  # of the largest process
    del replica  # before leave(): its destructor may otherwise wait for a Gloo thread that waits for Python's lock
    distributed.leave()
    if RANK > 0:
        return
    result = {**params, **scores, "best_epoch": best["epoch"],
              "epoch_time_s": float(np.mean(seconds)), "train_time_s": sum(seconds),
              "peak_vram_gb": peak_vram and peak_vram / 1e9, "peak_rss_gb": peak_rss / 1e9,
              "history": history, "label_names": task.label_names, "splits": "; ".join(notes),
              "rows": rows, "settings": s, "environment": environment(device, dtype), "test_predictions": pairs}
    put_in_place(best_file, args.checkpoint)
    write_json(args.result, result)  # last: it says that the run is finished
    print(f"test {show(scores)} (epoch {best['epoch']}), {result['epoch_time_s']:.1f} s per epoch, wrote {args.result}")


if __name__ == "__main__":
    try:
        main(ARGS)
    except torch.OutOfMemoryError:
        fail("the GPU has no memory left; --accumulation 2 computes the same batches in halves")
