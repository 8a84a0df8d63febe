"""A pretrained BERT, loaded and turned into one of the methods, on its device; and what is said of
the machine. In the end what torchrun's processes have to do with one another."""
import contextlib
import logging
import os
import platform
import re
import resource
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import transformers
from torch import nn
from transformers import AutoTokenizer, BertForQuestionAnswering, BertForSequenceClassification

import fast
from adapters import put_houlsby, put_pfeiffer
from checks import check_config, check_length, check_loading, fit_tokenizer
from common import fail, meet_processes, warn
from fetch import model_folder
from lora import put_dora, put_lora
from methods import HEAD, kind_of, row_of, trains
from settings import DEFAULT_MODEL, bf16_speedup

# What puts a method into BERT: function(model, settings). The others add nothing.
PUT = {"lora": put_lora, "qlora": put_lora, "dora": put_dora, "qdora": put_dora,
       "houlsby": put_houlsby, "pfeiffer": put_pfeiffer}
POOLER = "bert.pooler.dense."
RSS_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes in a unit of ru_maxrss
RANK = int(os.environ.get("RANK", 0))  # number of this process among all, on all machines
WORLD = int(os.environ.get("WORLD_SIZE", 1))  # how many there are
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))  # number of this process on its machine

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
# without a network it warns for half a minute
logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


# --- loading -------------------------------------------------------------------------------------

class SpanHead(nn.Linear):
    """The head of question answering, (batch, tokens, hidden) -> (batch, tokens, 2), in fp32
    whatever autocast says: with bf16's 8 bits many spans would have the same score."""

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.float())


def is_head(model, name):
    """Tell whether the parameter of this name is new and trains in every method: the head's, and
    the pooler's where load_pretrained had to make one."""
    return name.startswith(HEAD) or getattr(model, "new_pooler", False) and name.startswith(POOLER)


def bert_config(name, **where):
    """Load the configuration of a hub id, folder or file; old BERTs do not say what they are."""
    raw, _ = transformers.BertConfig.get_config_dict(name, **where)
    is_old = "model_type" not in raw and "hidden_size" in raw
    kind = transformers.BertConfig if is_old else transformers.AutoConfig
    return kind.from_pretrained(name, **where)


def load_pretrained(name, label_names):
    """Load a hub id or folder: (tokenizer, model in fp32) with a new head that comes from the seed.
    The model is a BertForSequenceClassification with these labels, or a BertForQuestionAnswering
    where label_names is None."""
    head_class = BertForSequenceClassification if label_names else BertForQuestionAnswering
    folder = model_folder() if name == DEFAULT_MODEL else name
    try:
        config = bert_config(folder)
        check_config(name, config)
        tokenizer = AutoTokenizer.from_pretrained(folder, config=config)
        if not label_names and not tokenizer.is_fast:
            fail(f"{name} has no fast tokenizer, which alone tells where in the passage a token "
                 "stands")
        fit_tokenizer(name, tokenizer, config)
        model, loading = head_class.from_pretrained(
            folder, num_labels=len(label_names or ("start", "end")),
            problem_type="single_label_classification" if label_names else None,
            dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True)
    except Exception as e:
        # transformers raises OSError, ValueError, SafetensorError, hub errors...
        reason = f"{type(e).__name__}: {(str(e).strip() or 'no reason given').splitlines()[0]}"
        if Path(name).is_dir():
            fail(f"{name} holds no BERT that can be loaded ({reason})")
        fail(f"cannot load {name!r}: no such folder, and the Hugging Face hub did not give it "
             f"({reason}). Offline, --model FOLDER and the default {DEFAULT_MODEL} work")
    # a masked language model has no pooler; half of one is a damaged file
    model.new_pooler = {POOLER + "weight", POOLER + "bias"} <= set(loading["missing_keys"])
    check_loading(name, model, loading, lambda key: is_head(model, key))

    model.config.return_dict = True  # whatever config.json says: outputs are read by name
    model.config.output_hidden_states = model.config.output_attentions = False
    for p in model.parameters():  # as other tools' .bin files have them, no file could hold them
        p.data = p.data.contiguous()
    if not label_names:
        model.qa_outputs = SpanHead(config.hidden_size, 2)
    heads = [model.classifier if label_names else model.qa_outputs]  # new even where there is one
    if model.new_pooler:
        warn(f"{name} has no pooler; a new one trains with the head, in every method")
        heads.append(model.bert.pooler.dense)
    for linear in heads:
        nn.init.normal_(linear.weight, std=config.initializer_range)
        nn.init.zeros_(linear.bias)
    return tokenizer, model


# --- building ------------------------------------------------------------------------------------

def apply_method(model, s, compute_dtype=torch.float32, quantize=None, half_weights=True):
    """Turn a fresh BertForSequenceClassification or BertForQuestionAnswering into the method of the
    settings `s` (methods.METHODS), in place.

    compute_dtype: the type in which frozen weights are multiplied, autocast's or fp32. quantize:
    instead of quant.quantize_encoder. half_weights: whether frozen weights are stored in that type,
    too. The head has been drawn before, so that what is drawn here cannot change it: all methods
    start from the same head.
    """
    row = row_of(s)
    if row.is_4bit:
        if quantize is None:  # bitsandbytes is slow to import and needed here only
            from quant import quantize_encoder as quantize
        quantize(model, compute_dtype)
    elif half_weights:
        # Autocast rounds a frozen weight to this type in every step, to the same bits: so once is
        # enough. DoRA's norms are then those of the rounded weight, which is the one that it
        # multiplies by. What trains stays in fp32.
        for name, module in model.bert.encoder.named_modules():
            if isinstance(module, nn.Linear):
                for leaf, p in module.named_parameters():
                    if not trains(row, f"bert.encoder.{name}.{leaf}"):
                        p.data = p.data.to(compute_dtype)

    if put := PUT.get(s.placement or s.method):
        put(model, s)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trains(row, name) or is_head(model, name))
    model.train(model.training)  # new modules start in training mode; the model may be evaluating


def place(model, device, without=()):
    """Put the model on its device, and make it fast on a CPU (fast.py). without: tricks to leave
    out."""
    if device.type == "cpu":
        fast.install(model, without)
    # tools.memory's models have no numbers that could be moved
    return model if next(model.parameters()).is_meta else model.to(device)


def build(model, s, device, dtype=None, quantize=None, without=()):
    """Turn a fresh model into the method of the settings `s`, on its device, ready to train. dtype:
    autocast's, or None; without: tricks to leave out (tools.bench)."""
    check_length(s, model.config)
    apply_method(model, s, dtype or torch.float32, quantize, "half_weights" not in without)
    if RANK > 0:
        # dropout masks of its own; mixed, as torch on a CPU reads only the low 32 bits of a seed
        torch.manual_seed(int(np.random.SeedSequence((s.seed, RANK)).generate_state(1, "u8")[0]))
    return place(model, device, without)


def trained_tensors(model):
    """Return {name: parameter} of all that trains: what the optimizer gets, what is saved and
    counted."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def count_params(model):
    """Count parameters: the trainable ones by kind, and `total_params` with the frozen ones.

    4-bit weights are stored two to a byte, but counted as the weights they stand for.
    """
    def numel(p):
        return p.quant_state.shape.numel() if hasattr(p, "quant_state") else p.numel()

    kinds = {"method": 0, "layer_norm": 0, "head": 0, "base": 0}
    for name, p in trained_tensors(model).items():
        kinds["head" if is_head(model, name) else kind_of(name)] += p.numel()
    trainable, total = sum(kinds.values()), sum(numel(p) for p in model.parameters())
    return {"trainable_params": trainable, "trainable_by_kind": kinds, "total_params": total,
            "trainable_pct": 100 * trainable / total}


def say_params(params):
    """Write what count_params counted as a text."""
    kinds = ", ".join(f"{kind} {n:,}" for kind, n in params["trainable_by_kind"].items() if n)
    return (f"{params['trainable_params']:,} of {params['total_params']:,} parameters train "
            f"({params['trainable_pct']:.3f} %: {kinds})")


# --- the machine ---------------------------------------------------------------------------------

def amp_dtype(amp):
    """Return the type of autocast for bf16, fp16 or off: None is plain fp32."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[amp]


def to_device(inputs, device):
    """Move a dict of CPU tensors to the device; from pinned memory, so that the CPU need not
    wait."""
    if device.type == "cuda":
        return {name: tensor.pin_memory().to(device, non_blocking=True)
                for name, tensor in inputs.items()}
    return inputs


def git_commit():
    """Return the hash of the checked-out commit, with -dirty where files differ from it; None
    without git or a checkout."""
    try:
        git = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=40",
                              "--exclude=*"],
                             cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:
        return None
    return git.stdout.strip() or None


def forget_peak(device):
    """Begin a new peak of GPU memory. That of evaluation, in larger batches, is not training's."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device, before):
    """Return the peaks of the largest process, in units of 1e9 bytes: of GPU memory that torch
    allocated since forget_peak, or None, and of resident memory. `before`: what this returned for
    earlier epochs; the larger peak counts."""
    vram = torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else 0
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_UNIT / 1e9
    vram, rss = map(max, zip(*gather((vram, rss))))
    return {"peak_vram_gb": max(vram, before.get("peak_vram_gb") or 0) or None, "peak_rss_gb": rss}


def environment(device, dtype):
    """Return what made the numbers, besides the settings."""
    n, info = torch.get_num_threads(), Path("/proc/cpuinfo")
    kind = re.search("model name\\s*: (.*)", info.read_text() if info.exists() else "")
    cpu = f"CPU, {n} thread{'s' if n > 1 else ''}"
    name = torch.cuda.get_device_name() if device.type == "cuda" else cpu
    return {"device": f"{WORLD} x {name}" if WORLD > 1 else name,
            "amp": str(dtype).removeprefix("torch.") if dtype else "off",
            "cpu": f"{kind[1] if kind else platform.machine()}, "
                   f"{torch.backends.cpu.get_cpu_capability()}", "bf16_speedup": bf16_speedup(),
            "python": platform.python_version(), "torch": torch.__version__,
            "transformers": transformers.__version__, "bitsandbytes": version("bitsandbytes"),
            "git_commit": git_commit()}


# --- several processes ---------------------------------------------------------------------------
# Data parallelism by torchrun. Each process holds the whole model and computes its share of every
# batch; the gradients are added up before every step, so that all copies stay equal and take the
# steps that one process would take. Nothing is sent at the start: all read the same file, draw from
# the same seed, and quantise on the CPU: Linear4bit does so in its first .to(device)
# (bitsandbytes' documentation), and place() moves the model later. So CPUs of several machines
# should be of one kind. In one process join_processes chooses the device, and the other functions
# change nothing.

def join_processes():
    """Meet the other processes. Return the torch.device of this one."""
    device = torch.device("cuda", LOCAL_RANK) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        if LOCAL_RANK >= (n := torch.cuda.device_count()):
            fail(f"there are {n} GPUs here; torchrun --nproc-per-node {n} starts as many processes")
        torch.cuda.set_device(device)
    if WORLD > 1:
        meet_processes(device if device.type == "cuda" else None)
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")  # one process speaks for all
    return device


@contextlib.contextmanager
def first_process_first():
    """Let the first process of a machine download what is missing while the others wait."""
    if WORLD > 1 and LOCAL_RANK > 0:
        dist.barrier()
    yield
    if WORLD > 1 and LOCAL_RANK == 0:
        dist.barrier()


def own_share(items):
    """Return this process's share of the rows of a batch, or of the batches of a split."""
    return items[RANK::WORLD]


def add_up(loss, trained):
    """Add up the loss and the gradients of all processes, in place."""
    if WORLD > 1:
        for p in trained:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad  # it had no row
        for tensor in loss, *(p.grad for p in trained):
            dist.all_reduce(tensor)


def gather(value):
    """Return [value of process 0, value of process 1, ...] in every process; any object that pickle
    takes."""
    values = [value]
    if WORLD > 1:
        values = [None] * WORLD
        dist.all_gather_object(values, value)
    return values


def leave_processes():
    """Part from the other processes; only the first one goes on."""
    if WORLD > 1:
        dist.destroy_process_group()
    if RANK > 0:
        sys.exit()
