"""What decides a run: one line for each setting, with its default and reason. The flags of train.py
are made of these lines, and the name of a run of their values.

Imports nothing slow, so that --help and a typo are answered at once.
"""
import argparse
import dataclasses
import functools
import hashlib
import json
import math
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from timeit import timeit

from checks import find_columns
from common import (
    as_written,
    check_name,
    data_files,
    fail,
    fingerprint,
    meet_processes,
    model_files,
    read_json,
    warn,
)
from methods import CASES, CHOICES, DEFAULT_TARGETS, METHODS, PLACEMENTS, TARGETS, label_of, lr_for

SPLIT_SEED = 42  # splits are the same for every --seed: seeds are compared on the same test rows
DEFAULT_MODEL = "all-MiniLM-L6-v2"  # fetch.py brings it; other names are a folder or a hub id
PORTUGUESE_MODEL = "neuralmind/bert-base-portuguese-cased"  # BERTimbau
RATED_TASKS = ["movies", "products", "tweets", "editorials"]  # fetch.py brings them, too
HUB_TASKS = ["sst2", "ag_news"]
QA_TASKS = ["synthetic", "squad", "squad_pt"]
# The fingerprint of the generated questions. It changes when tools/synthetic.py makes others.
SYNTHETIC_SHA256 = "9dbbecb2df675ab0"


# --- types of values -----------------------------------------------------------------------------

def number(kind, low, high=float("inf")):
    """Make an argparse type: an int or float in [low, high]."""
    def convert(text):
        try:
            value = kind(text)
        except ValueError:
            what = "whole number" if kind is int else "number"
            raise argparse.ArgumentTypeError(f"{text!r} is not a {what}") from None
        if not low <= value <= high or math.isinf(value):
            bound = f"at least {low:g}" if math.isinf(high) else f"from {low:g} to {high:g}"
            raise argparse.ArgumentTypeError(f"must be {bound}, not {text}")
        return value
    return convert


def fold_name(text):
    """Check an argparse value: 2/5 is the second of five folds."""
    k, slash, n = text.partition("/")
    if not (slash and k.isdecimal() and n.isdecimal() and 1 <= int(k) <= int(n) >= 2):
        raise argparse.ArgumentTypeError(f"{text!r} is not K/N, such as 2/5 for the second of five")
    return f"{int(k)}/{int(n)}"


count, length, positive = number(int, 1), number(int, 3), number(float, 1e-12)
share, probability = number(float, 0, 1), number(float, 0, 0.99)  # fast.py's masks: 16 bits
any_seed = number(int, 0, 2**32 - 1)


def flag(default, type, help, **more):
    """Make the field of a setting that has a flag. A default of None depends on other settings; the
    help then says how."""
    if type is bool:
        return field(default=default, metadata={"help": help, "action": "store_true"})
    if default is not None:
        help += f" (default: {default})"
    if not {"choices", "metavar"} & more.keys():
        more |= {"metavar": "X" if type in (positive, share, probability) else "N"}
    return field(default=default, metadata={"help": help, "type": type, **more})


# --- the settings --------------------------------------------------------------------------------

AMP = ["auto", "bf16", "fp16", "off"]
TASKS = RATED_TASKS + HUB_TASKS + QA_TASKS
TARGETS_SAID = "linear layers with LoRA or DoRA: query value; attention; or all, with the FFN's"


@dataclass(frozen=True)
class Settings:
    # the method; what it does not use is None
    method: str = flag(None, str, "what trains (methods.py)", choices=CHOICES, required=True)
    r: int | None = flag(None, count, "rank of LoRA and DoRA (default: 8; on a 4-bit base 16)")
    alpha: float | None = flag(32.0, positive, "LoRA's and DoRA's update is scaled by alpha / r")
    dropout: float | None = flag(0.1, probability, "on LoRA's and DoRA's input; BERT's own stays")
    targets: str | None = flag(DEFAULT_TARGETS, str, TARGETS_SAID, nargs="+", metavar="NAME")
    placement: str | None = flag(PLACEMENTS[0], str, "see adapters.py", choices=PLACEMENTS)
    bottleneck: int | None = flag(None, count, "width of an adapter, in units (default: 64)")
    reduction: int | None = flag(None, count, "the same as hidden size / N; give one of the two")
    # training
    lr: float = flag(None, positive, "peak learning rate (default: methods.py, by method and task)")
    epochs: int = flag(3, count, "passes over the training rows")
    batch_size: int = flag(None, count, "rows per step (default: 32; questions 8, synthetic 4)")
    accumulation: int = flag(1, count, "pieces a batch is computed in, if memory is short")
    max_length: int = flag(None, length, "longest input, in tokens (default: 128; questions 384)")
    stride: int | None = flag(None, count, "questions: tokens that windows share (default: 128)")
    max_answer_length: int | None = flag(None, count, "questions: longest answer (default: 30)")
    warmup: float = flag(0.1, share, "share of the steps in which the rate rises, before it falls")
    seed: int = flag(42, any_seed, "of the new head, the order of the rows and dropout")
    amp: str = flag("auto", str, "mixed precision; auto: bf16 or fp16, if it is fast", choices=AMP)
    max_steps: int | None = flag(None, count, "stop after N steps, for smoke runs (default: none)")
    # data and model
    task: str = flag(None, str, "the last three are questions (default: movies)", choices=TASKS)
    text_column: str | None = flag(None, str, "texts of --data (default: found)", metavar="NAME")
    label_column: str | None = flag(None, str, "labels of --data (default: found)", metavar="NAME")
    train_rows: int | None = flag(None, count, "train on N rows; a larger N contains them "
                                  "(default: all)")
    whole_sentences: bool = flag(False, bool, "hold out whole sentences, no phrases (for SST-2)")
    fold: str | None = flag(None, fold_name, "cross-validation: of N parts of all rows the K-th "
                            "tests (default: none)", metavar="K/N")
    model: str = flag(None, str, f"hub id or folder of a BERT (default: {DEFAULT_MODEL}; squad_pt: "
                      f"{PORTUGUESE_MODEL})", metavar="NAME")
    # told from the files, not by flags
    is_qa: bool = False  # whether the task is question answering
    data_sha256: str | None = None  # fingerprint of the files of --data, or of generated questions
    model_sha256: str | None = None  # fingerprint of the files of a model's folder

    @property
    def target_layers(self):
        """Name the linear layers of a BertLayer that LoRA and DoRA are put on."""
        return TARGETS[self.targets]


NOT_IN_NAME = ("accumulation",)  # settings that do not change what is learned


@dataclass(frozen=True)
class Run:
    """Hold one run: its settings, and where its files are."""
    settings: Settings
    data: Path | None  # the user's file or folder
    model: str  # hub id or folder
    output: Path
    has_default_rate: bool  # neither --lr nor a rate that was searched for this task
    is_auto: bool = False  # whether the machine chose the precision

    @property
    def said(self):
        """Say the precision, with bf16's speed on a CPU that has it, and the learning rate, with
        the way to a better one if nobody chose it for this task."""
        script = "run_grid.sh" if self.settings.is_qa else "run_all.sh"
        speed = f" (bf16 at {bf16_speedup():.2f} times fp32's speed)" if bf16_speedup() else ""
        return f"amp {self.settings.amp}{speed}, lr {self.settings.lr:g}" + (
            f" (the default; bash {script} with the same --data or --task searches a better one)"
            if self.has_default_rate else "")

    @property
    def result(self):
        return result_path(self.output, self.settings)

    @property
    def checkpoint(self):
        return checkpoint_path(self.output, self.settings)

    def exit_if_finished(self):
        """Exit with status 0 if the result is there; exit with one line if it could not be
        written."""
        if self.result.exists():
            made = read_result(self.result)["environment"]
            print(f"finished already: {self.result} ({made['device']}, amp {made['amp']}; delete "
                  "it to run again)")
            sys.exit()
        check_name(self.result)
        check_name(self.checkpoint)
        for amp in AMP[1:] if self.is_auto else ():
            other = result_path(self.output, dataclasses.replace(self.settings, amp=amp))
            if other.exists():
                warn(f"{other} is the same run in {amp}; --amp auto is {self.settings.amp} here, "
                     "and trains it anew")


# --- the command line ----------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    def error(self, message):  # argparse would print the whole usage before the line that matters
        fail(f"{message} (see --help)")


def make_parser():
    """Make the parser of train.py's flags."""
    def formatter(prog):
        return argparse.HelpFormatter(prog, max_help_position=28, width=110)

    p = Parser(description="Fine-tune BERT one way and measure it.", allow_abbrev=False,
               formatter_class=formatter)
    for f in dataclasses.fields(Settings):
        if f.metadata:
            p.add_argument(f"--{f.name.replace('_', '-')}", default=f.default, **f.metadata)
    p.add_argument("--data", type=Path, metavar="PATH",
                   help="your own file instead of --task, or a folder with train, validation and "
                        "test files: .tsv, .csv or .jsonl with columns sentence and label, or the "
                        "only ones of texts and of labels, and for pairs sentence2, or "
                        "SQuAD-format .json (default: none)")
    p.add_argument("--output", type=Path, default=Path(__file__).parent, metavar="DIR",
                   help="where metrics/, figures/ and checkpoints/ go (default: beside train.py)")
    return p


def given(flag, argv):
    """Tell whether a flag is on a command line."""
    return any(word.split("=")[0] == flag for word in argv)


def model_of(args):
    """Return the name of the model that the flags ask for."""
    return args.model or (PORTUGUESE_MODEL if args.task == "squad_pt" else DEFAULT_MODEL)


def method_settings(args, row):
    """Resolve the settings that belong to the method. Those that it does not use are None, so that
    passing --alpha to all methods does not make another full fine-tuning out of it."""
    if args.bottleneck and args.reduction:
        fail("give --bottleneck or --reduction, not both")
    targets = args.targets if isinstance(args.targets, str) else " ".join(args.targets)
    if targets not in TARGETS:
        fail(f"--targets {targets}: choose from {', '.join(TARGETS)}")
    values = {"r": args.r or (16 if row.is_4bit else 8), "alpha": args.alpha,
              "dropout": args.dropout, "targets": targets, "placement": args.placement,
              "bottleneck": args.bottleneck or (None if args.reduction else 64),
              "reduction": args.reduction}
    return {name: value if name in row.flags else None for name, value in values.items()}


def length_settings(args, is_qa):
    """Resolve the batch size, the longest input, and what only question answering has: stride and
    longest answer."""
    if not is_qa:
        for name in "stride", "max_answer_length":
            if getattr(args, name):
                fail(f"--{name.replace('_', '-')} is for question answering; a sentence is one "
                     "window and has a label")
        return {"batch_size": args.batch_size or 32, "max_length": args.max_length or 128}
    s = {"batch_size": args.batch_size or (4 if args.task == "synthetic" else 8),
         "max_length": args.max_length or 384, "stride": args.stride or 128,
         "max_answer_length": args.max_answer_length or 30}
    if s["max_length"] < s["stride"] + 70:  # 64 tokens of question, 3 special ones, and some way on
        fail(f"--max-length {s['max_length']} leaves no room beside a question and --stride "
             f"{s['stride']}; at least stride + 70")
    return s


def check_task(args, files, is_qa):
    """Exit if flags about the rows do not fit the task."""
    is_columns = args.text_column or args.label_column
    if is_columns and (is_qa or not args.data):
        fail(f"--{'text' if args.text_column else 'label'}-column is for --data with sentences")
    has_parts = not is_qa and not args.fold and (args.data or args.task in HUB_TASKS)
    if args.whole_sentences and not has_parts:
        fail("--whole-sentences is for sst2, ag_news and --data, without folds: the others' rows "
             "are pairs or no parts of one another, and questions are held out by passage")
    if args.fold and is_qa:
        fail("folds are for sentences; question answering has run_grid.sh")
    if args.fold and args.data and (given := sorted(set(files) - {"train"})):
        fail(f"{args.data} has {files[given[0]].name}; folds are for one pool of rows: a "
             "file, or a folder with one")
    if args.fold and not args.data and args.task not in RATED_TASKS:
        fail(f"the test rows of {args.task} are given; folds are for one pool of rows: "
             f"{', '.join(RATED_TASKS)}, or --data PATH with training rows alone")


def asked_settings(args):
    """Resolve the flags to Settings, all but --amp auto, which needs torch to be imported."""
    if args.data and args.task:
        fail("give --task or --data, not both")
    args.task = args.task or (None if args.data else "movies")
    model = model_of(args)
    row = METHODS[args.placement if args.method == "adapter" else args.method]
    is_folder = model != DEFAULT_MODEL and Path(model).is_dir()
    if not is_folder and (model.startswith((".", "/", "~")) or model.count("/") > 1):
        fail(f"--model {model}: no such folder")
    files, is_qa = data_files(args.data) if args.data else ({}, args.task in QA_TASKS)
    check_task(args, files, is_qa)
    text, label = (find_columns(files["train"], args.text_column, args.label_column)
                   if args.data and not is_qa else (None, None))
    own = method_settings(args, row)
    rate = (lr_for(row, own["r"], own["targets"]) if model == DEFAULT_MODEL else
            row.rates.questions if is_qa else row.rates.sentences)
    names = {f.name for f in dataclasses.fields(Settings)}
    values = {name: value for name, value in vars(args).items() if name in names}
    values |= own | length_settings(args, is_qa) | {
        "lr": args.lr or rate, "is_qa": is_qa,
        "text_column": None if text == "sentence" else text,
        "label_column": None if label == "label" else label,
        "task": args.task if not args.data else
        args.data.stem if args.data.is_file() else args.data.resolve().name,
        "data_sha256": fingerprint(files.values()) if args.data else
        SYNTHETIC_SHA256 if args.task == "synthetic" else None,
        "model": Path(model).resolve().name if is_folder else model,
        "model_sha256": fingerprint(model_files(Path(model))) if is_folder else None}
    return Settings(**values)


FACTORS = (512, 384), (384, 1536)  # the shapes of two matrices in the small model's training
LEAST_SPEEDUP = 1.2  # that bf16 must have on a CPU; noise does not cross it


def time_bf16():
    """Return how many times as fast in bf16 as in fp32 this CPU multiplies FACTORS, by the shortest
    of three times each, taken in turns. None without instructions for bf16: emulated, it was 5
    times slower."""
    import torch  # slow
    if not (torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()):
        return None
    sides = [[torch.ones(shape, dtype=dtype) for shape in FACTORS]
             for dtype in (torch.float32, torch.bfloat16)]
    times = [[timeit(lambda: torch.mm(*side), number=1) for side in sides] for _ in range(4)]
    fp32, bf16 = map(min, zip(*times[1:]))  # the first try is slow
    return fp32 / bf16


@functools.cache
def bf16_speedup():
    """Return what time_bf16 measures, once a process; None on CUDA. torchrun's processes must take
    the same type, and each would time another number: all get that of the first one."""
    import torch  # slow
    if torch.cuda.is_available():
        return None
    measured = [None if int(os.environ.get("RANK", 0)) else time_bf16()]
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        meet_processes()
        torch.distributed.broadcast_object_list(measured)
    return measured[0]


def chosen_amp(mode):
    """Return what --amp `mode` is on this machine: bf16, fp16 or off."""
    if mode == "off":
        return mode
    import torch  # slow
    on_cuda, speedup = torch.cuda.is_available(), bf16_speedup()
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False) if on_cuda else speedup
    if mode == "bf16" and not has_bf16:
        fail(f"this {'GPU' if on_cuda else 'CPU'} has no bf16 arithmetic; use --amp auto")
    if mode == "fp16" and not on_cuda:
        fail("--amp fp16 needs a CUDA device; use --amp auto")
    if mode != "auto":
        return mode
    if on_cuda:
        return "bf16" if has_bf16 else "fp16"
    return "bf16" if has_bf16 and speedup >= LEAST_SPEEDUP else "off"


def settings_of(args):
    """Resolve the flags (make_parser's) to Settings: all that decides a run's result."""
    s = asked_settings(args)
    return dataclasses.replace(s, amp=chosen_amp(s.amp))


def has_searched_rates(s):
    """Tell whether the default rates are those that a search found for this task and model."""
    return s.model == DEFAULT_MODEL and s.task in RATED_TASKS and not s.data_sha256


def read_flags(argv=None):
    """Read train.py's flags and return the Run that they ask for."""
    args = make_parser().parse_args(argv)
    s = settings_of(args)
    is_default = not args.lr and not has_searched_rates(s)
    return Run(s, args.data, model_of(args), args.output, is_default, args.amp == "auto")


def read_result(path):
    """Read the JSON that a finished run left."""
    result = read_json(path, "settings", "environment", "history")
    with as_written(path):
        read_settings(result), result["environment"]["device"], result["environment"]["amp"]
    return result


def read_settings(result):
    """Return the Settings in a result's JSON."""
    return Settings(**result["settings"])


# --- names ---------------------------------------------------------------------------------------

def is_synthetic(s):
    """Tell whether the settings are of generated questions."""
    return s.data_sha256 == SYNTHETIC_SHA256


def case_settings(name):
    """Return the settings of one of methods.CASES, with train.py's defaults."""
    return asked_settings(make_parser().parse_args(CASES[name].flags.split()))


def case_label(name):
    """Return what tables and figures call one of methods.CASES."""
    return label_of(case_settings(name))


def short(lr):
    """Write a learning rate as it is said: 4.25e-05 is 4.25e-5, 0.0002 is 2e-4."""
    mantissa, exponent = f"{lr:e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def run_name(s):
    """Name a run: readable words, and 8 hex digits of all settings that decide its result, so that
    two different runs never share a file. Questions: lora_epoch-3_lr_2e-4 and so on."""
    decide = {k: v for k, v in dataclasses.asdict(s).items() if k not in NOT_IN_NAME}
    tag = hashlib.sha256(json.dumps(decide, sort_keys=True).encode()).hexdigest()[:8]
    size = s.r and f"r{s.r}" or s.reduction and f"rf{s.reduction}" or s.bottleneck
    first = ([f"{s.method}_epoch-{s.epochs}_lr_{short(s.lr)}", s.task] if s.is_qa
             else [s.task, s.method])
    targets = None if s.targets == DEFAULT_TARGETS else s.targets
    fold = s.fold and f"fold{s.fold.replace('/', 'of')}"
    n_rows = s.train_rows and f"n{s.train_rows}"
    parts = [*first, s.placement, size, targets, fold, n_rows, f"seed{s.seed}", tag]
    return "_".join(str(part) for part in parts if part)


def result_path(output, s):
    """Return where the run with the settings `s` leaves its JSON. The file exists if and only if
    the run is finished."""
    return output / "metrics" / "runs" / f"{run_name(s)}.json"


def checkpoint_path(output, s):
    """Return where it leaves the trained tensors of its best epoch (checkpoint.py)."""
    return output / "checkpoints" / f"{run_name(s)}.safetensors"
