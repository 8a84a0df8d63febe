"""Data-parallel training with torch's own DistributedDataParallel. torchrun starts the processes:

    torchrun --nproc-per-node 2 train.py --method lora

Each process holds the whole model and computes its share of every batch; the gradients are averaged
over the processes before every step, so that all copies stay equal and take the steps that one
process would take. Started without torchrun there is one process, and nothing here does anything.
Several machines need an --output folder that they share.
"""
import os
import sys

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from start import fail

RANK = int(os.environ.get("RANK", 0))  # number of this process among all, on all machines
WORLD = int(os.environ.get("WORLD_SIZE", 1))  # how many there are
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))  # number of this process on its machine


def join():
    """Meet the other processes, over NCCL between GPUs and Gloo between CPUs; the torch.device of
    this one."""
    device = torch.device("cuda", LOCAL_RANK) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        if LOCAL_RANK >= (n := torch.cuda.device_count()):
            fail(f"there are {n} GPUs here; torchrun --nproc-per-node {n} starts as many processes")
        torch.cuda.set_device(device)
    if WORLD > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")  # one process speaks for all
    return device


def wait():
    """Go on when all processes are here."""
    if WORLD > 1:
        dist.barrier()


def parallel(model):
    """The model to train with: its gradients are averaged over the processes at the end of every
    backward pass."""
    return DistributedDataParallel(model, broadcast_buffers=False) if WORLD > 1 else model


def gather(value):
    """[value of process 0, value of process 1, ...], in every process; any object that pickle
    takes."""
    values = [value]
    if WORLD > 1:
        values = [None] * WORLD
        dist.all_gather_object(values, value)
    return values


def share(tensors):
    """Overwrite the tensors of all processes by those of process 0."""
    if WORLD > 1:
        for tensor in tensors:
            dist.broadcast(tensor, 0)


def leave():
    if WORLD > 1:
        dist.destroy_process_group()
