"""The command line: every flag with its default and unit, and from them the identity of a run.

Imports nothing slow, so that --help, a typo and an already finished run are answered at once.
"""
import argparse
import glob
import hashlib
import json
import math
import os
import sys
import tempfile
from pathlib import Path

from start import start

SPLIT_SEED = 42  # splits are the same for every --seed, so that seeds are compared on the same test rows
DEFAULT_MODEL = "all-MiniLM-L6-v2"  # fetch.py brings it; every other name is a folder or a Hugging Face hub id

# Learning rates: (the default model on RATED_TASKS, other sentences, questions). The first is the best of the grid 5e-5,
# 2e-4, 5e-4, 1e-3, 2e-3 by validation macro-F1 on `movies` (README, "How the learning rates were chosen"; DoRA was not
# searched and takes LoRA's), the second is usual for bert-base, the third was best in the study on Portuguese SQuAD (README).
DEFAULT_LR = {"full": (2e-4, 2e-5, 4.25e-5), **dict.fromkeys(("lora", "qlora", "dora", "qdora", "adapter"),
                                                           (1e-3, 1e-4, 2e-4))}
PORTUGUESE_MODEL = "neuralmind/bert-base-portuguese-cased"  # BERTimbau
RATED_TASKS = ["movies", "products", "tweets", "editorials"]  # fetch.py brings them, too
HUB_TASKS = ["sst2", "ag_news"]
QA_TASKS = ["synthetic", "squad", "squad_pt"]

# The user's own files: what the file of a split may be called, and of which kinds it may be.
SPLITS = {"train": ("train",), "validation": ("validation", "val", "valid", "dev", "eval"), "test": ("test",)}
TABLES, QUESTIONS = (".tsv", ".csv"), ".json"
LOOKS_LIKE_TABLE = (*TABLES, QUESTIONS, ".jsonl", ".parquet", ".arrow", ".xls", ".xlsx", ".ods")
MODEL_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
               "vocab.txt")
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")

# What makes training fast, each with the file it is in; --without NAME leaves it out.
TRICKS = {"length_groups": "batches of one sentence length (data.py)",
          "cheap_dropout": "16 random bits an element (fast.py)",
          "cls_only": "a last layer for [CLS] alone (fast.py)",
          "half_weights": "frozen weights stored in 16 bits (methods.py)",
          "fused_adamw": "AdamW in one pass over memory (train.py)"}

# The eight cases that bench.py and memory.py measure: name, (label, flags).
CASES = {
    "full": ("full fine-tuning", "--method full"),
    "lora_r8": ("LoRA r=8", "--method lora --r 8"),
    "lora_r16": ("LoRA r=16", "--method lora --r 16"),
    "qlora": ("QLoRA r=16", "--method qlora --r 16"),
    "dora": ("DoRA r=16", "--method dora --r 16"),
    "qdora": ("QDoRA r=16", "--method qdora --r 16"),
    "adapter": ("adapter Houlsby 64", "--method adapter --placement houlsby --bottleneck 64"),
    "pfeiffer": ("adapter Pfeiffer 64", "--method adapter --placement pfeiffer --bottleneck 64"),
}


def one_line(message):
    """A text as one line, whatever is in the names that it quotes."""
    return message.replace("\r", "\\r").replace("\n", "\\n")


def fail(message):
    """End with one line on stderr and exit status 1."""
    sys.exit(one_line(f"error: {message}"))


def warn(message):
    """Say on stderr, in one line, what is legal but perhaps not meant. Of several processes one speaks."""
    if os.environ.get("RANK", "0") == "0":
        print(one_line(f"warning: {message}"), file=sys.stderr)


class Parser(argparse.ArgumentParser):
    def error(self, message):  # argparse would print the whole usage before the line that matters
        fail(f"{message} (see --help)")


def number(kind, low, high=float("inf"), below=False):
    """An argparse type: an int or float in [low, high], or in [low, high) with below=True."""
    def convert(text):
        try:
            value = kind(text)
        except ValueError:
            what = "whole number" if kind is int else "number"
            raise argparse.ArgumentTypeError(f"{text!r} is not a {what}") from None
        if not low <= value <= high or (below and value == high) or math.isinf(value):
            bound = f"at least {low:g}" if high == float("inf") else \
                f"from {low:g} to {'below ' if below else ''}{high:g}"
            raise argparse.ArgumentTypeError(f"must be {bound}, not {text}")
        return value
    return convert


def make_parser():
    p = Parser(description="Fine-tune BERT one way and measure it.", allow_abbrev=False,
               formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=28, width=110))
    count, positive = number(int, 1), number(float, 1e-12)
    p.add_argument("--method", required=True, choices=list(DEFAULT_LR),
                   help="what trains: all of BERT, LoRA or DoRA, the two on a 4-bit base, or bottleneck adapters")
    g = p.add_argument_group("the method")
    g.add_argument("--r", type=count, default=None, metavar="N", 
                   help="rank of LoRA and DoRA (default: 8; on a 4-bit base 16)")
    g.add_argument("--alpha", type=positive, default=32.0, metavar="X",
                   help="LoRA's and DoRA's update is scaled by alpha / r (default: 32)")
    g.add_argument("--dropout", type=number(float, 0, 1, below=True), default=0.1, metavar="P",
                   help="dropout probability on LoRA's or DoRA's input; BERT's own dropout stays (default: 0.1)")
    g.add_argument("--placement", choices=["houlsby", "pfeiffer"], default="houlsby",
                   help="adapters: two a layer, LayerNorms train; or one a layer, LayerNorms frozen (default: houlsby)")
    size = g.add_mutually_exclusive_group()
    size.add_argument("--bottleneck", type=count, metavar="N", help="width of an adapter, in units (default: 64)")
    size.add_argument("--reduction", type=count, metavar="N", help="the same as hidden size / N; give one of the two")
    g = p.add_argument_group("training")
    g.add_argument("--lr", type=positive, metavar="X", help="peak learning rate (default: full 2e-5, others 1e-4; "
                   f"rated tasks with {DEFAULT_MODEL}: full 2e-4, others 1e-3; questions: full 4.25e-5, others 2e-4)")
    g.add_argument("--epochs", type=count, default=3, metavar="N", help="passes over the training rows (default: 3)")
    g.add_argument("--batch-size", type=count, metavar="N",
                   help="sentences or windows of a passage per optimizer step (default: 32; questions 8, synthetic 4)")
    g.add_argument("--accumulation", type=count, default=1, metavar="N",
                   help="pieces a batch is computed in, when it does not fit in memory (default: 1)")
    g.add_argument("--max-length", type=number(int, 3), metavar="N", help="longest input, in tokens: the rest of a "
                   "sentence is cut, a passage goes into several windows (default: 128; questions 384)")
    g.add_argument("--stride", type=count, metavar="N", help="questions: tokens that neighbouring windows of a passage "
                   "share (default: 128)")
    g.add_argument("--max-answer-length", type=count, metavar="N",
                   help="questions: the longest answer that is predicted, in tokens (default: 30)")
    g.add_argument("--warmup", type=number(float, 0, 1), default=0.1, metavar="F",
                   help="fraction of all steps in which the learning rate rises, before it falls to 0 (default: 0.1)")
    g.add_argument("--seed", type=number(int, 0, 2**32 - 1), default=42, metavar="N",
                   help="seed of torch, numpy, random and transformers (default: 42)")
    g.add_argument("--amp", choices=["auto", "bf16", "fp16", "off"], default="auto",
                   help="mixed precision; auto: bf16 where the hardware has it, else fp16 on CUDA, else off "
                        "(default: auto)")
    g.add_argument("--max-steps", type=count, metavar="N",
                   help="stop after N optimizer steps, for smoke runs (default: no limit)")
    g.add_argument("--without", nargs="+", choices=TRICKS, default=[], metavar="TRICK", help="leave out what makes "
                   "training fast, to measure it: " + ", ".join(f"{name} ({what})" for name, what in TRICKS.items())
                   + " (default: nothing is left out)")
    g = p.add_argument_group("model, data and results")
    g.add_argument("--model", metavar="NAME", help=f"hub id or local folder of a BERT (default: {DEFAULT_MODEL}, from "
                   f"the package registry; squad_pt: {PORTUGUESE_MODEL}, from the hub)")
    task = g.add_mutually_exclusive_group()
    task.add_argument("--task", choices=RATED_TASKS + HUB_TASKS + QA_TASKS, default="movies",
                      help=f"sentences: {', '.join(RATED_TASKS)} (from the package registry), sst2, ag_news (from the "
                           "hub); questions: synthetic (generated), squad, squad_pt (hub) (default: movies)")
    task.add_argument("--data", type=Path, metavar="DIR", help="your own train, validation and test files instead: "
                      ".tsv or .csv with the columns sentence and label, or SQuAD-format .json (default: none)")
    g.add_argument("--output", type=Path, default=Path(__file__).parent, metavar="DIR",
                   help="where metrics/, figures/ and checkpoints/ go (default: beside this file)")
    return p


def list_folder(folder):
    """The names in a folder, sorted."""
    try:
        return sorted(os.listdir(folder))
    except OSError as e:
        fail(f"cannot read {folder}: {e.strerror}")


def data_files(folder):
    """({split: path} of the train, validation and test files in the user's own folder, whether they hold questions)."""
    names = list_folder(folder)
    found = {split: [folder / (stem + suffix) for stem in stems for suffix in (*TABLES, QUESTIONS) if stem + suffix in names]
             for split, stems in SPLITS.items()}
    kinds = {path.suffix == QUESTIONS: path.name for paths in found.values() for path in paths}
    if len(kinds) > 1:
        fail(f"{folder} has sentences ({kinds[False]}) and questions ({kinds[True]}); a folder is for one of the two")
    for paths in found.values():
        if len(paths) > 1:
            fail(f"{folder} has both {paths[0].name} and {paths[1].name}; keep one")
    return {split: paths[0] for split, paths in found.items() if paths}, True in kinds


def warn_unread(folder):
    """Name what looks like a table or a split in the user's own folder and is not read."""
    read = {path.name for path in data_files(folder)[0].values()}
    stems = {stem for of_split in SPLITS.values() for stem in of_split}
    if left := [name for name in list_folder(folder) if name not in read and not name.startswith(".") and
                (Path(name).suffix.lower() in LOOKS_LIKE_TABLE or Path(name).stem.lower() in stems)]:
        fewer = ", ".join(left[:5]) + (f" and {len(left) - 5} more" if len(left) > 5 else "")
        warn(f"{folder}: not read: {fewer}; read are " + ", ".join(sorted(read)))


def model_files(folder):
    """The files of a model's folder that are read: configuration, tokenizer and one set of weights, of several the one
    that transformers takes."""
    names = list_folder(folder)
    weights = next((name for name in WEIGHT_FILES if name in names), None)
    shards = weights.split(".")[0] + "-" if weights and weights.endswith(".index.json") else None
    return [folder / name for name in names if name in (*MODEL_FILES, weights) or shards and name.startswith(shards)]


def fingerprint(files):
    """SHA-256 (first 16 hex digits) of the names and bytes of some files, to tell changed data or weights."""
    digest = hashlib.sha256()
    try:
        for path in sorted(files):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    except OSError as e:
        fail(f"cannot read {path}: {e.strerror}")
    return digest.hexdigest()[:16]


def model_of(args):
    """The name of the model that the flags ask for."""
    return args.model or (PORTUGUESE_MODEL if args.task == "squad_pt" and not args.data else DEFAULT_MODEL)


def settings_of(args):
    """All that decides a run's result, as a dict for JSON. Flags that the method does not use are None, so that
    passing --alpha to all methods does not make another full fine-tuning out of it. Only question answering has a
    "stride", only a run that leaves out a trick has "without"."""
    model = model_of(args)
    files, is_qa = data_files(args.data) if args.data else ([], args.task in QA_TASKS)
    case = 2 if is_qa else 0 if model == DEFAULT_MODEL and args.task in RATED_TASKS and not args.data else 1
    max_length, stride = args.max_length or (384 if is_qa else 128), args.stride or 128
    batch_size = args.batch_size or (32 if not is_qa else 4 if args.task == "synthetic" and not args.data else 8)
    if is_qa and max_length < stride + 70:  # 64 tokens of question, 3 special tokens, and some way to go
        fail(f"--max-length {max_length} leaves no room beside a question and --stride {stride}; at least stride + 70")
    for flag, value in ("--stride", args.stride), ("--max-answer-length", args.max_answer_length):
        if value and not is_qa:
            fail(f"{flag} is for question answering; a sentence is one window and has a label")
    local_model = model != DEFAULT_MODEL and Path(model).is_dir()
    if not local_model and (model.startswith((".", "/", "~")) or model.count("/") > 1):
        fail(f"--model {model}: no such folder")
    without = set(args.without) - ({"half_weights"} if args.method == "full" else set())  # it has no frozen weights
    without -= {"cls_only"} if is_qa else set()  # question answering reads every token
    is_adapter = args.method == "adapter"
    is_lora = args.method != "full" and not is_adapter
    return {
        "method": args.method,
        "r": (args.r or (16 if args.method.startswith("q") else 8)) if is_lora else None,
        "alpha": args.alpha if is_lora else None,
        "dropout": args.dropout if is_lora else None,
        "placement": args.placement if is_adapter else None,
        "bottleneck": (args.bottleneck or (None if args.reduction else 64)) if is_adapter else None,
        "reduction": args.reduction if is_adapter else None,
        "lr": args.lr or DEFAULT_LR[args.method][case],
        "epochs": args.epochs, "batch_size": batch_size, "accumulation": args.accumulation, "max_length": max_length,
        "warmup": args.warmup, "seed": args.seed, "amp": args.amp,
        **({"stride": stride, "max_answer_length": args.max_answer_length or 30} if is_qa else {}),
        "max_steps": args.max_steps, **({"without": sorted(without)} if without else {}),
        "task": args.data.resolve().name if args.data else args.task,
        "data_sha256": fingerprint(files.values()) if args.data else None,
        "model": Path(model).resolve().name if local_model else model,
        "model_sha256": fingerprint(model_files(Path(model))) if local_model else None,
    }


def short(lr):
    """A learning rate as it is said: 4.25e-05 is 4.25e-5, 0.0002 is 2e-4."""
    mantissa, exponent = f"{lr:e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def run_name(s):
    """A readable name and 8 hex digits of all settings: two different runs never share a file. Question answering
    names a run as its study does: lora_epoch-3_lr_2e-4."""
    tag = hashlib.sha256(json.dumps(s, sort_keys=True).encode()).hexdigest()[:8]
    size = s["r"] and f"r{s['r']}" or s["reduction"] and f"rf{s['reduction']}" or s["bottleneck"]
    is_qa = "stride" in s
    start = [f"{s['method']}_epoch-{s['epochs']}_lr_{short(s['lr'])}", s["task"]] if is_qa else [s["task"], s["method"]]
    parts = [*start, s["placement"], size, f"seed{s['seed']}", tag]
    return "_".join(str(part) for part in parts if part)


def result_path(output, s):
    """Where the run with the settings `s` leaves its JSON. The file exists if and only if the run is finished."""
    return output / "metrics" / "runs" / f"{run_name(s)}.json"


def checkpoint_path(output, s):
    """Where it leaves what it trained, the tensors of its best epoch (checkpoint.py)."""
    return output / "checkpoints" / f"{run_name(s)}.safetensors"


def part_of(path):
    """A neighbour of `path` that is this process's own, to be written first and then renamed (put_in_place)."""
    return path.with_name(f"{path.name}.{os.uname().nodename}-{os.getpid()}.part")


def put_in_place(part, path):
    """Rename a written file to `path`, which so never exists half-written, whoever else writes it."""
    try:
        with open(part, "rb") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as e:
        fail(f"cannot write {path}: {e.strerror}")


def clear_parts(path):
    """Remove what killed processes of this machine had begun to write for `path`."""
    for part in path.parent.glob(f"{glob.escape(path.name)}.{glob.escape(os.uname().nodename)}-*.part"):
        try:
            os.kill(int(part.stem.rsplit("-", 1)[1]), 0)
        except ProcessLookupError:
            part.unlink(missing_ok=True)
        except (OSError, ValueError):
            pass  # another user's process, which lives


def write_whole(path, write):
    """Let `write(part)` make a neighbour file and rename it to `path`."""
    part = part_of(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        clear_parts(path)
        write(part)
    except Exception as e:  # OSError, or safetensors' own for the same causes
        fail(f"cannot write {path}: {e}")
    put_in_place(part, path)


def write_json(path, value):
    write_whole(path, lambda part: part.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8"))


def read_json(path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        fail(f"{path} is damaged ({e}); delete it")


def check_writable(folder, flag="--output"):
    """End now, not after the training, if no file can be made in `folder`, which `flag` named."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as e:
        fail(f"cannot write into {folder}: {e.strerror}; choose another {flag}")


def check_name(path):
    """The same if no file can be made that is called `path`."""
    check_writable(path.parent)
    try:
        str(path).encode()  # safetensors takes no other names
        part_of(path).touch()
        part_of(path).unlink()
        if path.is_dir():
            fail(f"cannot write {path}: it is a folder")
    except UnicodeEncodeError:
        fail(f"cannot write {ascii(str(path))}: the name is not UTF-8; rename that folder")
    except OSError as e:
        fail(f"cannot write {path}: {e.strerror}; a shorter folder name makes a shorter file name")


def read_flags(argv=None):
    """The flags of train.py, with .settings, .result and .checkpoint."""
    args = make_parser().parse_args(argv)
    args.settings = settings_of(args)
    args.result = result_path(args.output, args.settings)
    args.checkpoint = checkpoint_path(args.output, args.settings)
    return args


def parse_args(argv=None):
    """read_flags; ends with status 0 if that run is finished."""
    start()
    args = read_flags(argv)
    if args.result.exists():
        made = read_json(args.result).get("environment", {})  # --amp auto has one name on all machines
        print(f"finished already: {args.result} (amp {made.get('amp')}, {made.get('device')}; delete it to run again)")
        sys.exit(0)
    for path in args.result, args.checkpoint:
        check_name(path)
        clear_parts(path)
    return args
