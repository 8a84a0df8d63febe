"""Count the training examples of a run and time a step of it, so that a study can say first how
long it will take. rates.py starts this, with flags of train.py:

    python -m tools.probe --method full --data DIR      prints JSON
"""
if not __package__:
    raise SystemExit("error: run this from the project's folder: python -m tools.probe")

import json
import statistics
import time

from common import start
from settings import read_flags


def main():
    start()
    run = read_flags()
    import numpy as np  # slow, as all that follows
    import torch

    import train
    from data import encode_splits
    from model import amp_dtype, build, join_processes, load_pretrained, trained_tensors
    from qa import load_task
    s, device, dtype = run.settings, join_processes(), amp_dtype(run.settings.amp)
    task = load_task(s, run.data)
    tokenizer, model = load_pretrained(run.model, task.label_names)
    model = build(model, s, device, dtype).train()
    split = encode_splits(task, tokenizer, s)[0]["train"]
    optimizer = train.make_optimizer(list(trained_tensors(model).values()), s.lr)
    amp = torch.autocast(device.type, dtype, enabled=dtype is not None)
    scaler = torch.amp.GradScaler(device.type, enabled=False)
    times = []
    for rows in split.batches(s.batch_size, np.random.default_rng(s.seed))[:6]:
        begin = time.perf_counter()
        train.step(model, optimizer, split, rows, device, amp, scaler, s.accumulation).item()
        times.append(time.perf_counter() - begin)
    seconds = statistics.median(times[1:] or times)  # the first step is slow
    print(json.dumps({"examples": len(split.usable), "seconds": seconds}))


if __name__ == "__main__":
    main()
