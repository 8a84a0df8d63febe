"""Predict how much memory each method needs in training, from the model's configuration alone:
nothing is allocated.

    python -m tools.memory --model bert-base-uncased --batch-size 32 --max-length 128

weights    all parameters and buffers, trained and frozen; a 4-bit weight with all its constants
gradients  fp32, of every trained number
optimizer  AdamW's two moments, fp32, of every trained number, without its step counters (4 bytes
           per tensor)
kept       what autograd saves in the forward pass for the backward pass. Each storage counts once,
           however many views it has. Only the model's own parameters and buffers are left out:
           token ids count, and so do the bf16 copies that autocast makes of fp32 weights.
peak       the most that is there at once during a step: weights, optimizer, and of the rest what is
           alive, temporaries included. Gradients come while what was kept goes, so that full
           fine-tuning's peak is lower than the sum of its parts.

All in bytes; an MB is 1e6 and a GB 1e9 of them. The CUDA context and what an allocator wastes come
on top. Every row has full length.

Without CUDA this describes the CPU's modules (fast.py), with CUDA Hugging Face's, as train.py uses
them. The CPU's batches are on the safe side for a GPU, where fused attention keeps no (tokens,
tokens) matrix and a dropout mask takes one byte per element. Below some 50 tokens they may be too
large, since only the CPU shortens the last layer. Nothing was measured on a GPU, whose peak
train.py reports.
"""
if not __package__:
    raise SystemExit("error: run this from the project's folder: python -m tools.memory")

from pathlib import Path

from checks import check_config, check_length
from common import check_ordinary, check_writable, command, fail, read_json, start, write_json
from methods import CASES
from settings import DEFAULT_MODEL, Parser, case_label, number, read_flags

# The models that are known without a download: how their configurations differ from BertConfig's
# defaults, which are bert-base-uncased's
MODELS = {
    DEFAULT_MODEL: {"hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536},
    "bert-base-uncased": {},
    "bert-large-uncased": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16,
                           "intermediate_size": 4096},
}
PARTS = {"weights": "weights", "gradients": "gradients", "optimizer": "optimizer",
         "kept": "kept for backward", "peak": "peak"}


def parse_args(argv=None):
    """Read the flags."""
    start()
    p = Parser(description="Predict how much memory each method needs in training.",
               allow_abbrev=False)
    p.add_argument("--model", default=DEFAULT_MODEL, metavar="NAME",
                   help=f"{', '.join(MODELS)}, or a BERT's config.json, its folder or its hub id, "
                        f"if it was downloaded; no weights are read (default: {DEFAULT_MODEL})")
    p.add_argument("--batch-size", type=number(int, 1, 10**6), default=32, metavar="N",
                   help="rows (default: 32)")
    p.add_argument("--max-length", type=number(int, 3, 10**6), default=128, metavar="N",
                   help="tokens of every row (default: 128)")
    p.add_argument("--amp", choices=["bf16", "off"], default="bf16",
                   help="mixed precision of the machine that will train (default: bf16)")
    p.add_argument("--gb", type=number(float, 0.001, 10**6), nargs="+", default=[4, 8, 12, 24],
                   metavar="X", help="memory to find the largest batches for, in 1e9 bytes "
                                     "(default: 4 8 12 24)")
    p.add_argument("--redraw", action="store_true",
                   help="draw the figure and print the table of metrics/memory.json again")
    p.add_argument("--output", type=Path, default=Path(__file__).parents[1], metavar="DIR",
                   help="where metrics/ and figures/ go (default: the project's folder)")
    args = p.parse_args(argv)
    check_writable(args.output / "metrics")
    return args


# before the slow imports, so that a typo is answered at once
ARGS = parse_args() if __name__ == "__main__" else None

import math
import weakref
from unittest import mock

import numpy as np
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import BertConfig, BertForSequenceClassification

import fast
from lora import replace_modules
from model import bert_config, build, git_commit, trained_tensors
from plots import markdown_table, name_rows, plt, save_figure

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


# --- a model without numbers ---------------------------------------------------------------------

class KeepNothing(torch.autograd.Function):
    """Turn x (..., in) into (..., out), and its gradient back, without numbers. `weight` is what
    bitsandbytes dequantises for a moment, (out, in)."""

    @staticmethod
    def forward(ctx, x, size):
        ctx.size, weight = size, x.new_empty(size)
        return x.new_empty(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx, gradient):
        weight = gradient.new_empty(ctx.size, dtype=torch.float32).to(gradient.dtype)
        return gradient.new_empty(*gradient.shape[:-1], weight.shape[1]), None


class NF4StandIn(nn.Module):
    """A quant.NF4Linear without numbers, because bitsandbytes' weights have to be allocated: the
    same stored bytes and the same types. It keeps nothing for backward, since bitsandbytes needs
    its 4-bit weight alone there, not x.

    forward: x (..., in) -> (..., out) in compute_dtype.
    """

    def __init__(self, linear, compute_dtype):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.compute_dtype = compute_dtype
        n, blocks = linear.weight.numel(), math.ceil(linear.weight.numel() / 64)
        # half a byte per weight, a byte per block of them (quant.py), and in fp32 a constant per
        # 256 blocks, tables of 16 and 256 levels and a mean: see bitsandbytes.functional.QuantState
        size = math.ceil(n / 2) + blocks + 4 * (math.ceil(blocks / 256) + 16 + 256 + 1)
        self.register_buffer("packed", torch.empty(size, dtype=torch.uint8))
        self.bias = (None if linear.bias is None
                     else nn.Parameter(linear.bias.detach().to(compute_dtype)))

    def forward(self, x):
        return KeepNothing.apply(x.to(self.compute_dtype), (self.out_features, self.in_features))

    def dequantize(self):
        return self.packed.new_empty(self.out_features, self.in_features, dtype=torch.float32)


def stand_in_encoder(model, compute_dtype):
    """Do what quant.quantize_encoder does, without numbers."""
    replace_modules(model.bert.encoder, nn.Linear, lambda linear: NF4StandIn(linear, compute_dtype))


def bits_without_numbers(n):
    """Take the place of fast.random_bits for fake tensors, which numpy cannot fill: the same
    bytes."""
    return torch.empty(-(-n // 4), dtype=torch.int64).view(torch.int16)[:n]


# --- counting ------------------------------------------------------------------------------------

class Alive(TorchDispatchMode):
    """Count the bytes that operations allocate and that are not freed yet, and their peak; `own`:
    storages that do not count (stored's)."""

    def __init__(self, own):
        super().__init__()
        self.sizes, self.bytes, self.peak = dict.fromkeys(own, 0), 0, 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        for tensor in filter(torch.is_tensor, tree_leaves(out)):
            storage = tensor.untyped_storage()
            if storage._cdata not in self.sizes:
                self.sizes[storage._cdata] = storage.nbytes()
                self.bytes += storage.nbytes()
                weakref.finalize(storage, self.free, storage._cdata)
        self.peak = max(self.peak, self.bytes)
        return out

    def free(self, identity):
        self.bytes -= self.sizes.pop(identity)


def make_model(config, flags, dtype, quantize=None):
    """Make the model of one method as train.py does, in training mode. quantize: instead of
    quant.quantize_encoder."""
    model, s = BertForSequenceClassification(config), read_flags(flags.split()).settings
    return build(model, s, torch.device(DEVICE), dtype, quantize).train()


def stored(model):
    """Return {identity of a storage: its bytes} of all parameters and buffers, and of what goes
    with a 4-bit weight."""
    tensors = [*model.parameters(), *model.buffers()]
    for q in [p.quant_state for p in model.parameters() if hasattr(p, "quant_state")]:
        tensors += [q.absmax, q.code, q.offset, q.state2.absmax, q.state2.code]
    return {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}


def fixed_bytes(model):
    """Count the bytes that do not depend on the batch: {weights, gradients, optimizer}."""
    trained = sum(p.numel() for p in trained_tensors(model).values())
    return {"weights": sum(stored(model).values()), "gradients": 4 * trained,
            "optimizer": 8 * trained}


def count_kept(model, batch_size, max_length, dtype, **inputs):
    """Run one batch forward: (its loss, the bytes kept for backward). inputs: what the model gets
    besides token ids and labels."""
    own, kept = stored(model), {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            # alive until they are counted, so that no identity is used twice
            kept[storage._cdata] = storage
        return tensor.detach()  # a node that holds its own output would never be freed

    ids = torch.zeros(batch_size, max_length, dtype=torch.int64, device=DEVICE)
    labels = torch.zeros(batch_size, dtype=torch.int64, device=DEVICE)
    with (torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
          torch.autocast(DEVICE, dtype=dtype, enabled=dtype is not None)):
        loss = model(input_ids=ids, labels=labels, **inputs).loss
    n_bytes = sum(storage.nbytes() for storage in kept.values())
    kept.clear()  # autograd holds `pack`, and with it the dict, to the end of the backward pass
    return loss, n_bytes


def backward(model, loss):
    """Do what follows the forward pass in train.step; the optimizer, fused, allocates nothing."""
    loss.backward()
    nn.utils.clip_grad_norm_(trained_tensors(model).values(), 1.0)


def predict_bytes(config, flags, batch_size, max_length, dtype, gb=()):
    """Predict the bytes of one method: {weights, gradients, optimizer, kept, peak, fits: {GB: the
    largest batch}}. dtype: autocast's, or None; gb: memory sizes in 1e9 bytes.

    The tensors are fake ones: those have shape, type and device, but no memory.
    """
    with torch.device("meta"):  # trunc_normal_ does not know fake tensors
        model = make_model(config, flags, dtype, stand_in_encoder)
    row = fixed_bytes(model)
    with (mock.patch.object(fast, "random_bits", bits_without_numbers),
          FakeTensorMode(allow_non_fake_inputs=True)):  # the meta tensors, until they are replaced
        model.to_empty(device=DEVICE)
        kept, peaks = {}, {}

        def measure(n):
            model.zero_grad()
            with Alive(stored(model)) as alive:
                # Without an attention mask: Hugging Face drops one that is all ones, but cannot
                # look into a fake one.
                loss, kept[n] = count_kept(model, n, max_length, dtype)
                backward(model, loss)
            peaks[n] = row["weights"] + row["optimizer"] + alive.peak

        for n in {1, batch_size, 16 * batch_size, 32 * batch_size} if gb else {batch_size}:
            measure(n)
        for x in gb:  # beyond the largest measured batch no line is on the safe side
            while (n := largest_batch(peaks, x * 1e9)) > max(peaks):
                measure(n)
    return {**row, "kept": kept[batch_size], "peak": peaks[batch_size],
            "fits": {f"{x:g}": largest_batch(peaks, x * 1e9) for x in gb}}


def largest_batch(peaks, size):
    """Return how many rows fit into `size` bytes, by {rows: peak} of a few batches.

    A peak is the largest of the sums at some moments, and each of these is c + k n, for k bytes per
    row. So the peak bends upwards, and a line between two batches is on the safe side.
    """
    ns = sorted(peaks)
    at = next((i for i in range(1, len(ns) - 1) if size < peaks[ns[i]]), len(ns) - 1)
    low, high = ns[at - 1], ns[at]
    k = (peaks[high] - peaks[low]) / (high - low)
    return max(0, low + math.floor((size - peaks[low]) / k))


# --- table and figure ----------------------------------------------------------------------------

def ledger_caption(ledger):
    """Say what a memory.json is of."""
    on_cpu = ledger["device"] == "cpu"
    modules = "the CPU's modules (fast.py)" if on_cpu else "Hugging Face's modules on CUDA"
    return (f"Predicted for {ledger['model']}, batches of {ledger['batch_size']} rows of "
            f"{ledger['max_length']} tokens, amp {ledger['amp']}, {modules}")


def ledger_markdown(ledger):
    """Make the table and caption of a memory.json, as Markdown."""
    header = ["method", *(f"{name} (MB)" for name in PARTS.values()),
              *(f"largest batch in {x} GB" for x in ledger["methods"]["full"]["fits"])]
    rows = [[row["label"], *(f"{row[part] / 1e6:,.1f}" for part in PARTS),
             *(f"{n:,}" if n else "–" for n in row["fits"].values())]
            for row in ledger["methods"].values()]
    return markdown_table(header, rows) + (
        f"\n{ledger_caption(ledger)}. A batch fits if its peak fits; the CUDA context comes on "
        "top. – means that not even one row fits.\n")


def draw_ledger(ledger, path):
    """Draw each method's peak as one stacked bar."""
    rows = ledger["methods"].values()
    fig, ax = plt.subplots(figsize=(9, 4))
    left = np.zeros(len(rows))
    weights, optimizer, peak = (np.array([row[part] for row in rows]) / 1e9
                                for part in ("weights", "optimizer", "peak"))
    for name, gb, color in (("weights", weights, "#332288"), ("optimizer", optimizer, "#44AA99"),
                            ("activations, gradients and the like", peak - weights - optimizer,
                             "#DDCC77")):
        bars = ax.barh(range(len(rows)), gb, left=left, color=color, label=name, height=0.65)
        left += gb
    ax.bar_label(bars, [f"{total:.2f}" for total in left], padding=6)

    name_rows(ax, [row["label"] for row in rows])
    ax.margins(x=0.08)
    ax.set_xlabel("peak memory of a training step (GB)")
    ax.legend(fontsize=9, loc="center right")
    fig.suptitle(ledger_caption(ledger), fontsize=9)
    save_figure(fig, path)


def redraw(output):
    """Draw the figure of output/metrics/memory.json, and print its table."""
    path, figure = output / "metrics" / "memory.json", output / "figures" / "ledger.png"
    if not path.exists():
        fail(f"there is no {path}; python -m tools.memory makes it")
    ledger = read_json(path)
    draw_ledger(ledger, figure)
    print(f"{ledger_markdown(ledger)}\n{path} holds these numbers; drew {figure}")


def load_config(args):
    """Return the configuration that the flags name, with two labels; exit if this project can make
    no model of it, or none that reads rows as long as --max-length."""
    name = args.model
    check_ordinary(Path(name))
    try:
        config = (BertConfig(**MODELS[name]) if name in MODELS else
                  bert_config(name, local_files_only=True))
        check_config(name, config)
        check_length(args, config)
        config.num_labels, config.problem_type = 2, "single_label_classification"
        with torch.device("meta"):
            make_model(config, CASES["full"].flags, None)
    except Exception as e:  # whatever Hugging Face and PyTorch make of nonsense
        fail(f"--model {name}: no configuration of a BERT ({type(e).__name__}: "
             f"{' '.join(str(e).split())}); take {', '.join(MODELS)}, a config.json, its folder or "
             "the hub id of what was downloaded")
    return config


def main(args):
    if args.redraw:
        redraw(args.output)
        return
    config = load_config(args)
    batch = args.batch_size, args.max_length, torch.bfloat16 if args.amp == "bf16" else None
    methods = {name: {"label": case_label(name),
                      **predict_bytes(config, case.flags, *batch, args.gb)}
               for name, case in CASES.items()}
    write_json(args.output / "metrics" / "memory.json", {
        "command": command(), "model": args.model, "batch_size": args.batch_size,
        "max_length": args.max_length, "amp": args.amp, "device": DEVICE,
        "git_commit": git_commit(), "methods": methods})
    redraw(args.output)


if __name__ == "__main__":
    main(ARGS)
