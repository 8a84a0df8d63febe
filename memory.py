"""How much memory each method needs in training, from the model's configuration alone: nothing is
allocated.

    python memory.py --model bert-base-uncased --batch-size 32 --max-length 128

    sum = weights + gradients + optimizer + kept for backward
          in bytes; an MB is 1e6 and a GB 1e9 of them

weights    all parameters and buffers, trained and frozen; BERT's position and segment numbers are
           buffers (8 kB). For 4-bit weights, both levels of absmax and the tables of levels too
           (NF4StandIn)
gradients  fp32, of every trained number
optimizer  AdamW's two moments, fp32, of every trained number; without its step counters, 4 bytes a
           tensor
kept       what autograd saves in the forward pass for the backward pass, each storage once however
           many views it has. The model's own parameters and buffers are left out, nothing else:
           token ids count, and so do the bf16 copies that autocast makes of fp32 weights

Temporaries, the CUDA context and what an allocator wastes come on top. Gradients come while what
was kept goes, so the true peak can also be lower. Every row has full length.

Without CUDA this describes the CPU's modules (fast.py), which is what training uses there. On a
GPU, fused attention keeps no (tokens, tokens) matrix and a dropout mask takes one byte an element,
so that the batches are on the safe side; below some 50 tokens they need not be, since only the CPU
shortens the last layer. With CUDA this describes Hugging Face's modules on CUDA, as train.py uses
them. Neither has been measured on a GPU; where there is one, --measure does.
"""
import json
from pathlib import Path

from files import check_writable, write_json
from methods import CASES
from settings import DEFAULT_MODEL, MODELS, Parser, case_label, make_parser, number, settings_of
from start import command, fail, start
from studies import PARTS, ledger_caption, markdown_table


def fields_of(name):
    """The fields of a BertConfig as a dict: of one of MODELS, of a config.json or of a folder that
    holds one."""
    if name in MODELS:
        return MODELS[name]
    path = Path(name) / "config.json" if Path(name).is_dir() else Path(name)
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        fail(f"--model {name}: neither {', '.join(MODELS)} nor a config.json or its folder "
             f"({getattr(e, 'strerror', None) or e})")
    if not isinstance(fields, dict) or fields.get("model_type") != "bert":
        fail(f"--model {name}: {path.name} does not say \"model_type\": \"bert\"")
    return fields


def parse_args(argv=None):
    start()
    p = Parser(description="Predict how much memory each method needs in training.",
               allow_abbrev=False)
    p.add_argument("--model", default=DEFAULT_MODEL, metavar="NAME",
                   help=f"{', '.join(MODELS)}, or a BERT's config.json or its folder; its weights "
                        f"are not read (default: {DEFAULT_MODEL})")
    p.add_argument("--batch-size", type=number(int, 1, 10**6), default=32, metavar="N",
                   help="rows (default: 32)")
    p.add_argument("--max-length", type=number(int, 3, 10**6), default=128, metavar="N",
                   help="tokens of every row (default: 128)")
    p.add_argument("--amp", choices=["bf16", "off"], default="bf16",
                   help="mixed precision of the machine that will train, which need not be this "
                        "one: hence no auto (default: bf16)")
    p.add_argument("--gb", type=number(float, 0.001, 10**6), nargs="+", default=[4, 8, 12, 24],
                   metavar="X", help="memory to find the largest batches for, in 1e9 bytes "
                                     "(default: 4 8 12 24)")
    p.add_argument("--measure", action="store_true",
                   help="also train every method for two steps here, from random weights, and "
                        "count the same bytes")
    p.add_argument("--output", type=Path, default=Path(__file__).parent, metavar="DIR",
                   help="where metrics/memory.json and figures/ledger.png go (default: beside this "
                        "file)")

    args = p.parse_args(argv)
    args.fields = fields_of(args.model)
    longest = args.fields.get("max_position_embeddings", 512)
    if isinstance(longest, int) and args.max_length > longest:
        fail(f"--max-length {args.max_length}: {args.model} reads {longest} tokens at most")
    check_writable(args.output / "metrics")
    return args


# before the slow imports, so that a typo is answered at once
ARGS = parse_args() if __name__ == "__main__" else None

import gc
import math
from unittest import mock

import torch
import transformers
from torch import nn
from torch._subclasses import FakeTensorMode
from transformers import BertConfig, BertForSequenceClassification

import fast
from lora import replace_modules
from model import build, trained_tensors
from plots import draw_ledger

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class KeepNothing(torch.autograd.Function):
    """x (..., in) -> (..., out), without numbers. No prediction gets as far as a backward pass."""

    @staticmethod
    def forward(ctx, x, out_features):
        return x.new_empty(*x.shape[:-1], out_features)


class NF4StandIn(nn.Module):
    """quant.NF4Linear without numbers, because bitsandbytes' weights have to be allocated: the same
    stored bytes and the same types. It keeps nothing for backward: bitsandbytes needs its 4-bit
    weight alone there, not x.

    forward: x (..., in) -> (..., out) in compute_dtype.
    """

    def __init__(self, linear, compute_dtype):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.compute_dtype = compute_dtype
        n = linear.weight.numel()
        blocks = math.ceil(n / 64)
        # n / 2 + n / 64 + 4 n / (64 * 256) bytes, and 4 (16 + 256 + 1) a layer: see
        # bitsandbytes.functional.QuantState
        for name, size, dtype in (("packed", math.ceil(n / 2), torch.uint8),
                                  ("absmax", blocks, torch.uint8),
                                  ("nested_absmax", math.ceil(blocks / 256), torch.float32),
                                  ("code", 16, torch.float32), ("nested_code", 256, torch.float32),
                                  ("offset", 1, torch.float32)):
            self.register_buffer(name, torch.empty(size, dtype=dtype))
        self.bias = (None if linear.bias is None
                     else nn.Parameter(linear.bias.detach().to(compute_dtype)))

    def forward(self, x):
        return KeepNothing.apply(x.to(self.compute_dtype), self.out_features)

    def dequantize(self):
        return self.offset.new_empty(self.out_features, self.in_features)


def stand_in_encoder(model, compute_dtype):
    """quant.quantize_encoder without numbers."""
    replace_modules(model.bert.encoder, nn.Linear, lambda linear: NF4StandIn(linear, compute_dtype))


def bits_without_numbers(n):
    """fast.random_bits for fake tensors, which numpy cannot fill: the same bytes."""
    return torch.empty(-(-n // 4), dtype=torch.int64).view(torch.int16)[:n]


def make_model(config, flags, dtype, quantize=None):
    """The model of one method as train.py makes it, in training mode; quantize: instead of
    quant.quantize_encoder."""
    s = settings_of(make_parser().parse_args(flags.split()))
    model = BertForSequenceClassification(config)
    return build(model, s, torch.device(DEVICE), dtype, quantize).train()


def stored(model):
    """{identity of a storage: its bytes} of all parameters and buffers, and of what goes with a
    4-bit weight."""
    tensors = [*model.parameters(), *model.buffers()]
    for q in [p.quant_state for p in model.parameters() if hasattr(p, "quant_state")]:
        tensors += [q.absmax, q.code, q.offset, q.state2.absmax, q.state2.code]
    return {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}


def forward(model, batch_size, max_length, dtype, **inputs):
    """(loss, bytes kept for backward) of one batch; inputs: what the model gets besides token ids
    and labels."""
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
    return loss, sum(storage.nbytes() for storage in kept.values())


def predict(config, flags, batch_size, max_length, dtype, gb=()):
    """{weights, gradients, optimizer, kept: bytes; fits: {GB: largest batch, None where this
    cannot tell}} of one method, from fake tensors: those have shape, type and device, but no
    memory. dtype: autocast's, or None; gb: memory sizes in 1e9 bytes."""
    with torch.device("meta"):  # trunc_normal_ does not know fake tensors
        model = make_model(config, flags, dtype, stand_in_encoder)

    with (mock.patch.object(fast, "random_bits", bits_without_numbers),
          FakeTensorMode(allow_non_fake_inputs=True)):  # the meta tensors, until they are replaced
        model.to_empty(device=DEVICE)
        trained = sum(p.numel() for p in trained_tensors(model).values())
        row = {"weights": sum(stored(model).values()), "gradients": 4 * trained,
               "optimizer": 8 * trained}
        # Without an attention mask: Hugging Face drops one that is all ones, but cannot look into a
        # fake one.
        kept, kept_by_one_more = (forward(model, n, max_length, dtype)[1]
                                  for n in (batch_size, batch_size + 1))

    # kept(n) = c + k n: k bytes a row, and c of bf16 copies. Exactly, so the largest n that fits
    # needs no search.
    k = kept_by_one_more - kept
    room = {f"{x:g}": x * 1e9 - sum(row.values()) for x in gb}
    fits = {x: max(0, batch_size + int((room[x] - kept) // k)) for x in room}
    if k < 2 * max_length * config.hidden_size:
        # not even one layer's output: it is temporaries that bound the batch
        fits = dict.fromkeys(room)
    return {**row, "kept": kept, "fits": fits}


def measure(config, flags, batch_size, max_length, dtype):
    """The same bytes counted in real training steps on DEVICE, from random weights, and `peak`:
    what CUDA's allocator had given out at most, None without CUDA."""
    from train import make_optimizer  # slow to import
    gc.collect()  # what the method before left in reference cycles would count in its peak
    model = make_model(config, flags, dtype)
    trained = list(trained_tensors(model).values())
    optimizer = make_optimizer(trained, 1e-5)
    mask = torch.ones(batch_size, max_length, dtype=torch.int64, device=DEVICE)

    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    # the first step makes the optimizer's moments, so that only the second has the usual peak
    for _ in range(2):
        optimizer.zero_grad()
        loss, kept = forward(model, batch_size, max_length, dtype, attention_mask=mask)
        loss.backward()
        optimizer.step()

    moments = [t for state in optimizer.state.values()
               for name, t in state.items() if name != "step"]
    return {"weights": sum(stored(model).values()),
            "gradients": sum(p.grad.nbytes for p in trained),
            "optimizer": sum(t.nbytes for t in moments), "kept": kept,
            "peak": torch.cuda.max_memory_allocated() if DEVICE == "cuda" else None}


def mb(n):
    return f"{n / 1e6:,.1f}"


def markdown(ledger):
    """The table and the caption of a memory.json, as Markdown."""
    header = ["method", *(f"{name} (MB)" for name in PARTS.values()), "sum (MB)",
              *(f"largest batch in {x} GB" for x in ledger["methods"]["full"]["fits"])]
    rows = [[row["label"], *(mb(row[c]) for c in PARTS), mb(sum(row[c] for c in PARTS)),
             *("*" if n is None else f"{n:,}" if n else "–" for n in row["fits"].values())]
            for row in ledger["methods"].values()]
    return markdown_table(header, rows) + (
        f"\n{ledger_caption(ledger)}. A batch fits if this sum does; temporaries and the CUDA "
        "context come on top. – is not even one row, * is as many as the temporaries allow.\n")


def print_measured(config, batch, predicted):
    """Train every method for two steps, and print the bytes beside those that were predicted."""
    header = ["predicted / measured", *(f"{name} (MB)" for name in PARTS.values()),
              "peak GPU memory (MB)"]
    rows = []
    for name, case in CASES.items():
        try:
            measured = measure(config, case.flags, *batch)
        except RuntimeError as e:  # there is a type of its own for a full GPU, not for a full CPU
            if "memory" not in str(e):
                raise
            fail("there is not enough memory here for --measure; take a smaller --batch-size")
        rows.append([predicted[name]["label"],
                     *(f"{mb(predicted[name][part])} / {mb(measured[part])}" for part in PARTS),
                     mb(measured["peak"]) if DEVICE == "cuda" else "–"])
    print("\n" + markdown_table(header, rows), end="")


def main(args):
    transformers.logging.set_verbosity_error()
    try:
        config = BertConfig(**{**args.fields, "num_labels": 2,
                               "problem_type": "single_label_classification"})
        with torch.device("meta"):
            make_model(config, CASES["full"].flags, None)
    except Exception as e:  # whatever Hugging Face and PyTorch make of nonsense
        fail(f"--model {args.model}: no BERT can be made of this configuration "
             f"({type(e).__name__}: {' '.join(str(e).split())})")

    batch = args.batch_size, args.max_length, torch.bfloat16 if args.amp == "bf16" else None
    methods = {name: {"label": case_label(name), **predict(config, case.flags, *batch, args.gb)}
               for name, case in CASES.items()}
    ledger = {"command": command(), "model": args.model, "batch_size": args.batch_size,
              "max_length": args.max_length, "amp": args.amp, "device": DEVICE, "methods": methods}
    path = args.output / "metrics" / "memory.json"
    write_json(path, ledger)
    draw_ledger(args.output)
    print(markdown(ledger) + f"\nwrote {path} and drew figures/ledger.png")
    if args.measure:
        print_measured(config, batch, methods)


if __name__ == "__main__":
    main(ARGS)
