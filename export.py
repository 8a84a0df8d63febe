"""What was trained, in the formats that other programs take.

    python export.py checkpoints/NAME.safetensors --to FOLDER                  a plain Hugging Face
                                                                               folder
    python export.py checkpoints/NAME.safetensors --to FOLDER --format peft    LoRA or DoRA for peft

The first folds what LoRA or DoRA learned into BERT's own weights, so that the folder needs nothing
from here; the second leaves it beside them (peft_format.py). A peft folder can be exported, too.

    LoRA    W = W0 + s B A                                lora.py, computed in fp32
    DoRA    W = m (W0 + s B A) / ||W0 + s B A||

A 4-bit W0 is dequantised first, and W stays in float, because rounding it to 4 bits once more could
undo what was learned. --requantized JSON does that all the same, and scores the test rows.
"""
import argparse
from pathlib import Path

from files import check_writable, data_files, fingerprint, usual_mode, write_json
from methods import is_4bit, is_qa, label_of, row_of
from settings import Parser
from start import command, fail, start


def parse_args(argv=None):
    start()
    p = Parser(description=__doc__, allow_abbrev=False,
               formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("checkpoint", nargs="+", type=Path, help="what train.py left in checkpoints/")
    what = p.add_mutually_exclusive_group(required=True)
    what.add_argument("--to", type=Path, metavar="FOLDER",
                      help="export the model and its tokenizer")
    what.add_argument("--requantized", type=Path, metavar="JSON",
                      help="measure instead, for QLoRA and QDoRA")
    p.add_argument("--format", choices=["merged", "peft"], default="merged",
                   help="merged: a BERT for transformers; peft: what was trained, for peft "
                        "(default: merged)")
    p.add_argument("--model", metavar="FOLDER",
                   help="where the base is, if it was a folder (default: as in training)")
    p.add_argument("--data", type=Path, metavar="DIR",
                   help="where the data are, if they were a folder (default: none)")

    args = p.parse_args(argv)
    if args.to and len(args.checkpoint) > 1:
        fail(f"--to takes one checkpoint, not {len(args.checkpoint)}")
    if args.to and args.data:
        fail("--data is for --requantized")
    if args.requantized and args.format != "merged":
        fail("--format is for --to")
    flag, path = ("--to", args.to) if args.to else ("--requantized", args.requantized)
    try:
        if path.is_dir() or args.to and args.to.exists():
            fail(f"{path} is there already; choose another {flag}")
        folder = path.resolve().parent
    except (OSError, RuntimeError) as e:  # RuntimeError: a symbolic link to itself
        fail(f"cannot write {path}: {e}")
    check_writable(folder, flag)
    return args


ARGS = parse_args() if __name__ == "__main__" else None  # before the slow imports

import json
import shutil
import tempfile

import torch
from safetensors.torch import save_file

import data
import peft_format
import qa
from checkpoint import attach, read_about, read_tensors
from lora import LoRALinear, frozen_weight, merge_lora
from model import autocast
from predict import load_base
from studies import markdown_table
from train import evaluate


def merge(model, s):
    """Turn a model of the settings `s` (checkpoint.attach) into a plain BERT, in place. Twice is
    once."""
    if not row_of(s).merges:
        fail(f"adapters cannot be merged ({label_of(s)}): a nonlinear function stands between "
             "their two matrices, so that no weight of BERT's own does the same. LoRA, DoRA, QLoRA "
             "and QDoRA can")
    merge_lora(model)
    if is_4bit(s):
        from quant import dequantize_encoder
        dequantize_encoder(model)
    # a wrapper that is left would be exported without a word
    with torch.device("meta"):
        plain = set(type(model)(model.config).state_dict())
    if left := sorted(set(model.state_dict()) ^ plain):
        fail(f"{label_of(s)} was not merged: {left[0]} is left")


def write_peft(path, folder):
    """Write a checkpoint of LoRA or DoRA into `folder` as peft would. What peft's files do not say,
    such as the names of the labels, is in the metadata, which peft does not read."""
    about, tensors = read_about(path), read_tensors(path)
    metadata = {"format": "pt", **{key: json.dumps(value) for key, value in about.items()}}
    write_json(folder / peft_format.CONFIG, peft_format.make_config(about["settings"], tensors))
    save_file({peft_format.peft_name(name): p for name, p in tensors.items()},
              folder / peft_format.TENSORS, metadata)


def export(path, folder, model_name=None, is_peft=False):
    """Write a checkpoint as a folder for transformers, merged and in fp32, or for peft, with the
    tokenizer; whole or not at all."""
    tokenizer, base, base_hash = load_base(path, model_name)
    model, about = attach(base, base_hash, path)
    if is_peft:
        peft_format.make_config(about["settings"])  # ends for methods that peft's LoRA has not
    else:
        merge(model, about["settings"])
    folder = folder.resolve()
    part = Path(tempfile.mkdtemp(dir=folder.parent, prefix=folder.name[:100] + "."))
    try:
        write_peft(path, part) if is_peft else model.save_pretrained(part)
        tokenizer.save_pretrained(part)
        for made in (part, *part.iterdir()):
            usual_mode(made)
        part.rename(folder)
    except (Exception, SystemExit) as e:  # OSError, safetensors' own for the same causes, or fail
        shutil.rmtree(part, ignore_errors=True)
        fail(f"cannot write {folder}: {e}")


def load_test(s, tokenizer, folder):
    """The test rows that the run with the settings `s` was scored on."""
    if s["data_sha256"] and not folder:
        fail(f"it was trained on the folder {s['task']}; --data DIR says where that is")
    if folder and fingerprint(data_files(folder)[0].values()) != s["data_sha256"]:
        fail(f"{folder} is not what it was trained on, which is {s['task']}")
    task = (qa if is_qa(s) else data).load_task(s["task"], folder, s)
    return task.encode(task.test, tokenizer, s)


def check_requantized(paths):
    """End if some checkpoints cannot be measured together."""
    all_settings = [read_about(path)["settings"] for path in paths]
    for path, s in zip(paths, all_settings):
        if not is_4bit(s):
            fail(f"{path} is {s['method']}; only QLoRA and QDoRA have 4-bit weights that could be "
                 "requantised")
    if len(set(map(is_qa, all_settings))) > 1:
        fail("some of these were trained on sentences and some on questions; a table is of one")


@torch.no_grad()
def requantize(path, model_name, folder):
    """What merging a 4-bit model does to its scores on the test rows: in float, and rounded to 4
    bits again."""
    from quant import quantize_encoder
    tokenizer, base, base_hash = load_base(path, model_name)
    model, about = attach(base, base_hash, path)
    s = about["settings"]
    split = load_test(s, tokenizer, folder)
    device = torch.device("cpu")
    amp = autocast(device, None)
    wrapped = {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}
    before = {name: frozen_weight(m.base).float() for name, m in wrapped.items()}
    own, before_merging = evaluate(model, split, device, amp)
    result = {"settings": s, "test_rows": split.n, "unmerged": own}

    def score(name):
        scores, outcome = evaluate(model, split, device, amp)
        pairs = zip(outcome["predictions"], before_merging["predictions"])
        result[name] = scores | {"changed_predictions": sum(a != b for a, b in pairs)}

    merge(model, s)
    merged = {name: model.get_submodule(name).weight.clone() for name in wrapped}
    score("merged")
    quantize_encoder(model, torch.float32)
    score("requantized")
    rounded = {name: model.get_submodule(name).dequantize() for name in wrapped}

    def norm(a, b):
        return float(torch.stack([(a[name] - b[name]).norm() for name in a]).norm())
    # Frobenius norms over all weights that LoRA is on: of the update W - W0, and of the error of
    # rounding W
    return result | {"update_norm": norm(merged, before), "rounding_norm": norm(rounded, merged)}


def markdown(results):
    """The table of --requantized."""
    metric = "f1" if "f1" in results[0]["unmerged"] else "f1_macro"
    digits = 2 if metric == "f1" else 4
    header = ["", "seed", "4-bit W0, update beside it", "merged, in float", "predictions changed",
              "merged, in 4 bits", "predictions changed", "rounding error / update"]
    rows = [[r["settings"]["method"], str(r["settings"]["seed"]),
             f"{r['unmerged'][metric]:.{digits}f}",
             f"{r['merged'][metric]:.{digits}f}", str(r["merged"]["changed_predictions"]),
             f"{r['requantized'][metric]:.{digits}f}", str(r["requantized"]["changed_predictions"]),
             f"{r['rounding_norm'] / r['update_norm']:.2f}"] for r in results]
    return markdown_table(header, rows)


def main(args):
    if args.to:
        export(args.checkpoint[0], args.to, args.model, args.format == "peft")
        print(f"wrote {args.to}")
    else:
        check_requantized(args.checkpoint)
        results = [{"command": command()} | requantize(path, args.model, args.data)
                   for path in args.checkpoint]
        write_json(args.requantized, results)
        print(markdown(results) + f"\nwrote {args.requantized}")


if __name__ == "__main__":
    main(ARGS)
