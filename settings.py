"""The command line: every flag with its default and unit, and from them the identity of a run.

Imports nothing slow, so that --help, a typo and an already finished run are answered at once.
"""
import argparse
import hashlib
import json
import math
import sys
from pathlib import Path

from files import check_name, clear_parts, data_files, fingerprint, model_files, read_json
from methods import (
    CASES,
    CHOICES,
    DEFAULT_TARGETS,
    METHODS,
    PLACEMENTS,
    TARGETS,
    WIDE_RATE,
    is_qa,
    label_of,
)
from start import fail, start

SPLIT_SEED = 42  # splits are the same for every --seed: seeds are compared on the same test rows
DEFAULT_MODEL = "all-MiniLM-L6-v2"  # fetch.py brings it; other names are a folder or a hub id
# Models whose configuration is known here: where it differs from BertConfig's defaults, which are
# bert-base-uncased's
MODELS = {
    DEFAULT_MODEL: {"hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536},
    "bert-base-uncased": {},
    "bert-large-uncased": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16,
                           "intermediate_size": 4096},
}
PORTUGUESE_MODEL = "neuralmind/bert-base-portuguese-cased"  # BERTimbau
RATED_TASKS = ["movies", "products", "tweets", "editorials"]  # fetch.py brings them, too
HUB_TASKS = ["sst2", "ag_news", "mrpc", "rte", "qnli"]
GENERATOR = 4  # synthetic.py's questions: another number, other questions
QA_TASKS = ["synthetic", "squad", "squad_pt"]

# What makes training fast, each with the file it is in; --without NAME leaves it out.
TRICKS = {"length_groups": "batches of one sentence length (data.py)",
          "cheap_dropout": "16 random bits an element (fast.py)",
          "kept_memory": "freed memory stays in the process (fast.py)",
          "cls_only": "a last layer for [CLS] alone (fast.py)",
          "cast_once": "one cast to 16 bits for query, key and value (fast.py)",
          "half_weights": "frozen weights stored in 16 bits (model.py)",
          "fused_adamw": "AdamW in one pass over memory (train.py)"}


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


def fold(text):
    """An argparse type: 2/5, the second of five folds, as [2, 5]."""
    k, slash, n = text.partition("/")
    if not (slash and k.isdecimal() and n.isdecimal() and 1 <= int(k) <= int(n) >= 2):
        raise argparse.ArgumentTypeError(f"{text!r} is not K/N, such as 2/5 for the second of five")
    return [int(k), int(n)]


def add_method_flags(g):
    count, positive = number(int, 1), number(float, 1e-12)
    g.add_argument("--r", type=count, metavar="N",
                   help="rank of LoRA and DoRA (default: 8; on a 4-bit base 16)")
    g.add_argument("--alpha", type=positive, default=32.0, metavar="X",
                   help="LoRA's and DoRA's update is scaled by alpha / r (default: 32)")
    g.add_argument("--dropout", type=number(float, 0, 1, below=True), default=0.1, metavar="P",
                   help="dropout probability on LoRA's or DoRA's input; BERT's own dropout stays "
                        "(default: 0.1)")
    g.add_argument("--targets", nargs="+", default=[DEFAULT_TARGETS], metavar="NAME",
                   help="linear layers of BERT that LoRA and DoRA are put on: query value; "
                        "attention (query, key, value, output); all (these and both layers of the "
                        "FFN) (default: query value)")
    g.add_argument("--placement", choices=PLACEMENTS, default=PLACEMENTS[0],
                   help="adapters: two a layer, LayerNorms train; or one a layer, LayerNorms "
                        f"frozen (default: {PLACEMENTS[0]})")

    size = g.add_mutually_exclusive_group()
    size.add_argument("--bottleneck", type=count, metavar="N",
                      help="width of an adapter, in units (default: 64)")
    size.add_argument("--reduction", type=count, metavar="N",
                      help="the same as hidden size / N; give one of the two")


def add_training_flags(g):
    count, positive = number(int, 1), number(float, 1e-12)
    g.add_argument("--lr", type=positive, metavar="X",
                   help="peak learning rate (default: full 2e-5, bitfit, head 1e-3, others 1e-4; "
                        f"rated tasks with {DEFAULT_MODEL}: full 2e-4, bitfit 5e-3, head 1e-1, "
                        "more --targets 5e-4, others 1e-3; questions: full 4.25e-5, bitfit, head "
                        "1e-3, others 2e-4)")
    g.add_argument("--epochs", type=count, default=3, metavar="N",
                   help="passes over the training rows (default: 3)")
    g.add_argument("--batch-size", type=count, metavar="N",
                   help="sentences or windows of a passage per optimizer step (default: 32; "
                        "questions 8, synthetic 4)")
    g.add_argument("--accumulation", type=count, default=1, metavar="N",
                   help="pieces a batch is computed in, when it does not fit in memory "
                        "(default: 1)")

    g.add_argument("--max-length", type=number(int, 3), metavar="N",
                   help="longest input, in tokens: the rest of a sentence is cut, a passage goes "
                        "into several windows (default: 128; questions 384)")
    g.add_argument("--stride", type=count, metavar="N",
                   help="questions: tokens that neighbouring windows of a passage share "
                        "(default: 128)")
    g.add_argument("--max-answer-length", type=count, metavar="N",
                   help="questions: the longest answer that is predicted, in tokens (default: 30)")

    g.add_argument("--warmup", type=number(float, 0, 1), default=0.1, metavar="F",
                   help="fraction of all steps in which the learning rate rises, before it falls "
                        "to 0 (default: 0.1)")
    g.add_argument("--seed", type=number(int, 0, 2**32 - 1), default=42, metavar="N",
                   help="seed of torch, numpy, random and transformers (default: 42)")
    g.add_argument("--amp", choices=["auto", "bf16", "fp16", "off"], default="auto",
                   help="mixed precision; auto: bf16 where the hardware has it, else fp16 on CUDA, "
                        "else off (default: auto)")
    g.add_argument("--max-steps", type=count, metavar="N",
                   help="stop after N optimizer steps, for smoke runs (default: no limit)")
    g.add_argument("--without", nargs="+", choices=TRICKS, default=[], metavar="TRICK",
                   help="leave out what makes training fast, to measure it: "
                        + ", ".join(f"{name} ({what})" for name, what in TRICKS.items())
                        + " (default: nothing is left out)")


def add_data_flags(g):
    g.add_argument("--model", metavar="NAME",
                   help=f"hub id or local folder of a BERT (default: {DEFAULT_MODEL}, from the "
                        f"package registry; squad_pt: {PORTUGUESE_MODEL}, from the hub)")
    task = g.add_mutually_exclusive_group()
    task.add_argument("--task", choices=RATED_TASKS + HUB_TASKS + QA_TASKS, default="movies",
                      help=f"sentences: {', '.join(RATED_TASKS)} (from the package registry), "
                           "sst2, ag_news, and of pairs mrpc, rte, qnli (from the hub); "
                           "questions: synthetic (generated), "
                           "squad, squad_pt (hub) (default: movies)")
    task.add_argument("--data", type=Path, metavar="DIR",
                      help="your own train, validation and test files instead: .tsv, .csv or "
                           ".jsonl with the columns sentence and label, and for pairs sentence2, "
                           "or SQuAD-format .json (default: none)")
    g.add_argument("--text-column", metavar="NAME",
                   help="what the column sentence of --data is called (default: sentence)")
    g.add_argument("--label-column", metavar="NAME",
                   help="what the column label of --data is called (default: label)")
    g.add_argument("--train-rows", type=number(int, 1), metavar="N",
                   help="train on N of the training rows, with the labels' shares, or questions, "
                        "by passage; a smaller N's are among a larger N's (default: all)")
    g.add_argument("--whole-sentences", action="store_true",
                   help="rows that are parts of one another, as SST-2's: what train gives up for "
                        "validation (or test) are whole sentences, and their parts are left out "
                        "(default: rows, whatever they are part of)")
    g.add_argument("--fold", type=fold, metavar="K/N",
                   help="cross-validation: of N parts of all rows, the K-th tests and the others "
                        "train and validate; for tasks without test rows of their own (default: "
                        "none)")
    g.add_argument("--output", type=Path, default=Path(__file__).parent, metavar="DIR",
                   help="where metrics/, figures/ and checkpoints/ go (default: beside this file)")


def make_parser():
    def formatter(prog):
        return argparse.HelpFormatter(prog, max_help_position=28, width=110)

    p = Parser(description="Fine-tune BERT one way and measure it.", allow_abbrev=False,
               formatter_class=formatter)
    p.add_argument("--method", required=True, choices=CHOICES,
                   help="what trains: all of BERT, LoRA or DoRA, the two on a 4-bit base, its "
                        "biases (bitfit), nothing but the head, or bottleneck adapters")
    add_method_flags(p.add_argument_group("the method"))
    add_training_flags(p.add_argument_group("training"))
    add_data_flags(p.add_argument_group("model, data and results"))
    return p


def model_of(args):
    """The name of the model that the flags ask for."""
    is_portuguese = args.task == "squad_pt" and not args.data
    return args.model or (PORTUGUESE_MODEL if is_portuguese else DEFAULT_MODEL)


def method_settings(args, row):
    """The settings of the method's own; what it does not use is None, so that passing --alpha to
    all methods does not make another full fine-tuning out of it."""
    values = {
        "r": args.r or (16 if row.is_4bit else 8),
        "alpha": args.alpha,
        "dropout": args.dropout,
        "placement": args.placement,
        "bottleneck": args.bottleneck or (None if args.reduction else 64),
        "reduction": args.reduction,
    }
    return {name: value if name in row.flags else None for name, value in values.items()}


def question_settings(args):
    """Batch size, longest input, and what only question answering has: stride, longest answer."""
    is_synthetic = args.task == "synthetic" and not args.data
    s = {"batch_size": args.batch_size or (4 if is_synthetic else 8),
         "max_length": args.max_length or 384, "stride": args.stride or 128,
         "max_answer_length": args.max_answer_length or 30,
         **({"generator": GENERATOR} if is_synthetic else {})}
    if s["max_length"] < s["stride"] + 70:  # 64 tokens of question, 3 special ones, and some way on
        fail(f"--max-length {s['max_length']} leaves no room beside a question and --stride "
             f"{s['stride']}; at least stride + 70")
    return s


def sentence_settings(args):
    for flag in "stride", "max_answer_length":
        if getattr(args, flag):
            fail(f"--{flag.replace('_', '-')} is for question answering; a sentence is one window "
                 "and has a label")
    return {"batch_size": args.batch_size or 32, "max_length": args.max_length or 128}


def column_settings(args, has_questions):
    """The names of --data's columns, where they are not the default."""
    given = {"text_column": (args.text_column, "sentence"),
             "label_column": (args.label_column, "label")}
    given = {key: name for key, (name, usual) in given.items() if name not in (None, usual)}
    if given and (has_questions or not args.data):
        fail(f"--{next(iter(given)).replace('_', '-')} is for --data with sentences")
    return given


def check_fold(args, files, has_questions):
    """End if the task cannot be cut into folds: cross-validation needs one pool of sentences."""
    if has_questions:
        fail("folds are for sentences; question answering has run_grid.sh")
    if args.data and (given := sorted(set(files) - {"train"})):
        fail(f"{args.data} has {files[given[0]].name}; folds are for one pool of rows, a folder "
             "with train.csv or train.tsv alone")
    if not args.data and args.task not in RATED_TASKS:
        fail(f"the test rows of {args.task} are given; folds are for one pool of rows: "
             f"{', '.join(RATED_TASKS)}, or --data DIR with training rows alone")


def settings_of(args):
    """All that decides a run's result, as a dict for JSON. Only a run that leaves out a trick has
    "without", only one with other targets than query and value "targets", only one of a
    cross-validation "fold", only one on a part of the training rows "train_rows", only one that
    validates by whole sentences "whole_sentences", only one whose files name their columns
    otherwise "text_column" and "label_column", only one on synthetic questions "generator"."""
    model = model_of(args)
    is_local = model != DEFAULT_MODEL and Path(model).is_dir()
    if not is_local and (model.startswith((".", "/", "~")) or model.count("/") > 1):
        fail(f"--model {model}: no such folder")

    files, has_questions = data_files(args.data) if args.data else ([], args.task in QA_TASKS)
    is_rated = model == DEFAULT_MODEL and args.task in RATED_TASKS and not args.data
    if args.fold:
        check_fold(args, files, has_questions)
    if args.whole_sentences and (has_questions or args.fold or
                                 not args.data and args.task not in ("sst2", "ag_news")):
        fail("--whole-sentences is for sst2, ag_news and --data, without folds: the others' rows "
             "are pairs or no parts of one another, and questions are held out by passage")
    row = METHODS[args.placement if args.method == "adapter" else args.method]
    targets = " ".join(args.targets)
    if targets not in TARGETS:
        fail(f"--targets {targets}: choose from {', '.join(TARGETS)}")
    is_wide = "targets" in row.flags and targets != DEFAULT_TARGETS
    rate = "questions" if has_questions else "rated" if is_rated else "sentences"
    lr = WIDE_RATE if is_wide and is_rated else getattr(row.rates, rate)

    without = set(args.without)
    if row.trains == ("",) or row.is_4bit:
        without -= {"half_weights"}  # nothing is frozen, or in 4 bits
    if has_questions:
        without -= {"cls_only"}  # every token is read
    return {
        "method": args.method,
        **method_settings(args, row),
        "lr": args.lr or lr,
        "epochs": args.epochs, "accumulation": args.accumulation,
        **(question_settings if has_questions else sentence_settings)(args),
        "warmup": args.warmup, "seed": args.seed, "amp": args.amp, "max_steps": args.max_steps,
        **({"without": sorted(without)} if without else {}),
        **({"targets": targets} if is_wide else {}),
        **({"fold": args.fold} if args.fold else {}),
        **({"train_rows": args.train_rows} if args.train_rows else {}),
        **({"whole_sentences": True} if args.whole_sentences else {}),
        **column_settings(args, has_questions),
        "task": args.data.resolve().name if args.data else args.task,
        "data_sha256": fingerprint(files.values()) if args.data else None,
        "model": Path(model).resolve().name if is_local else model,
        "model_sha256": fingerprint(model_files(Path(model))) if is_local else None,
    }


def case_settings(name):
    """The settings of one of methods.CASES, with train.py's defaults."""
    return settings_of(make_parser().parse_args(CASES[name].flags.split()))


def case_label(name):
    """What tables and figures call one of methods.CASES."""
    return label_of(case_settings(name))


def short(lr):
    """A learning rate as it is said: 4.25e-05 is 4.25e-5, 0.0002 is 2e-4."""
    mantissa, exponent = f"{lr:e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def run_name(s):
    """A readable name and 8 hex digits of all settings: two different runs never share a file.
    Question answering names a run as its study does: lora_epoch-3_lr_2e-4."""
    tag = hashlib.sha256(json.dumps(s, sort_keys=True).encode()).hexdigest()[:8]
    size = s["r"] and f"r{s['r']}" or s["reduction"] and f"rf{s['reduction']}" or s["bottleneck"]
    grid_name = f"{s['method']}_epoch-{s['epochs']}_lr_{short(s['lr'])}"
    first = [grid_name, s["task"]] if is_qa(s) else [s["task"], s["method"]]
    fold = "fold{}of{}".format(*s["fold"]) if "fold" in s else None
    n_rows = f"n{s['train_rows']}" if "train_rows" in s else None
    parts = [*first, s["placement"], size, s.get("targets"), fold, n_rows, f"seed{s['seed']}", tag]
    return "_".join(str(part) for part in parts if part)


def result_path(output, s):
    """Where the run with the settings `s` leaves its JSON. The file exists if and only if the run
    is finished."""
    return output / "metrics" / "runs" / f"{run_name(s)}.json"


def checkpoint_path(output, s):
    """Where it leaves what it trained, the tensors of its best epoch (checkpoint.py)."""
    return output / "checkpoints" / f"{run_name(s)}.safetensors"


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
        # --amp auto has one name on all machines
        made = read_json(args.result).get("environment", {})
        print(f"finished already: {args.result} (amp {made.get('amp')}, {made.get('device')}; "
              "delete it to run again)")
        sys.exit(0)
    for path in args.result, args.checkpoint:
        check_name(path)
        clear_parts(path)
    return args
