"""Export what was trained for other programs, and read what peft has trained.

    python -m tools.export --method lora_r8 --to FOLDER
    python -m tools.export checkpoints/NAME.safetensors --to FOLDER --format peft

--method takes the run of a study in --output, as tools.predict does. The first command makes a
plain Hugging Face folder, which needs nothing from here: what LoRA or DoRA learned is folded into
BERT's own weights.

    LoRA    W = W0 + s B A                                lora.py, computed in fp32
    DoRA    W = m (W0 + s B A) / ||W0 + s B A||

A 4-bit W0 is dequantised first, and W stays in float, because rounding it to 4 bits once more could
undo what was learned.

The second leaves it beside the weights, in the two files that PeftModel.from_pretrained takes.
base_config.json is the config to load the base with: the number of labels and their names, which
peft's files do not hold. adapter_config.json says what is put where; adapter_model.safetensors has
the tensors, named as peft 0.21 names them:

    base_model.model.bert.encoder.layer.0.attention.self.query.lora_A.weight           (r, in)
    base_model.model.bert.encoder.layer.0.attention.self.query.lora_B.weight           (out, r)
    base_model.model.bert.encoder.layer.0.attention.self.query.lora_magnitude_vector   (out)  DoRA
    base_model.model.classifier.weight, ...bias       the head; of questions qa_outputs

peft's scale is alpha / r, too, or with use_rslora alpha / sqrt(r) (Kalajdzievski 2023,
https://arxiv.org/abs/2312.03732). peft does not say whether the base was 4-bit. An export from here
says so in the metadata of its tensors. Such a folder can be given instead of a checkpoint, here and
to tools.predict.

In both formats model_max_length of the tokenizer is the run's --max-length, so that truncation=True
cuts where training did.
"""
if not __package__:
    raise SystemExit("error: run this from the project's folder: python -m tools.export")

import argparse
from pathlib import Path

from common import check_writable, fail, start
from settings import Parser


def parse_args(argv=None):
    start()
    p = Parser(description=__doc__, allow_abbrev=False,
               formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("checkpoint", nargs="?", type=Path,
                   help="what train.py left in checkpoints/, or a peft folder")
    p.add_argument("--to", type=Path, metavar="FOLDER", required=True,
                   help="export the model and its tokenizer here")
    p.add_argument("--method", metavar="NAME",
                   help="instead, a method of the study in --output, as its table names it")
    p.add_argument("--output", type=Path, default=Path(__file__).parents[1], metavar="DIR",
                   help="where metrics/ and checkpoints/ are (default: the project's folder)")
    p.add_argument("--format", choices=["merged", "peft"], default="merged",
                   help="merged: a BERT for transformers; peft: what was trained (default: merged)")
    p.add_argument("--model", metavar="FOLDER",
                   help="where the base is, if it was a folder (default: as in training)")
    args = p.parse_args(argv)
    if bool(args.checkpoint) == bool(args.method):
        fail("give a checkpoint or --method")
    try:
        if args.to.exists():
            fail(f"{args.to} already exists; choose another --to")
        folder = args.to.resolve().parent
    except (OSError, RuntimeError) as e:  # RuntimeError: a symbolic link to itself
        fail(f"cannot write {args.to}: {e}")
    check_writable(folder, "--to")
    return args


ARGS = parse_args() if __name__ == "__main__" else None  # before the slow imports

import atexit
import dataclasses
import json
import math
import re
import shutil
import tempfile

import torch
from safetensors.torch import save_file

import checkpoint
from checkpoint import attach, read_about, read_tensors
from common import check_ordinary, read_json, usual_mode, write_json, write_whole
from lora import merge_lora
from methods import CASES, HEAD, TARGETS, label_of, named, row_of
from model import load_pretrained
from settings import DEFAULT_MODEL, Settings, checkpoint_path, read_settings, result_path

PEFT_CONFIG, PEFT_TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX, LAYERS = "base_model.model.", "bert.encoder.layer."
ENDS = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "magnitude": "lora_magnitude_vector"}
HUB_NAME = f"sentence-transformers/{DEFAULT_MODEL}"  # the same weights as fetch.py's
TASK_TYPES = {"classifier.": "SEQ_CLS", "qa_outputs.": "QUESTION_ANS"}  # by the head
# what peft's LoRA may have and ours has not
FOREIGN = ("rank_pattern", "alpha_pattern", "lora_bias", "layer_replication", "use_qalora",
           "target_parameters", "trainable_token_indices", "alora_invocation_tokens", "revision")
PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva")  # others change the frozen weights


# --- checkpoints that are read -------------------------------------------------------------------

def runs_of(path, content):
    """Return {method: the result of its first run, with the learning rate that was chosen} of a
    study's JSON."""
    if path.name == "grid.json":
        results = content["runs"]
        if any(result.get("trainer") for result in results.values()):
            fail(f"{path} is of Trainer's runs, whose checkpoints are not here")
        return {method: results[run] for method, run in content["best"].items()}
    entries = content["entries"]
    if path.name.startswith("sweep_"):  # of the largest number of training rows
        n = max(entry["rows"]["train"] for entry in entries.values())
        names = {case.flags: name for name, case in CASES.items()}
        # an entry is called "lora --r 16, all rows"
        entries = {names.get(f"--method {name.rpartition(', ')[0]}", name): entry
                   for name, entry in entries.items() if entry["rows"]["train"] == n}
    return {name: entry["runs"][0] for name, entry in entries.items()}


def find(output, is_qa=False, only=None):
    """Return {method: checkpoint} of the newest study in output/metrics: of sentences what
    run_all.sh left, of questions run_grid.sh's best run of every method by validation F1, or else
    what tools.sweep left. is_qa: None takes either. only: a method's name, as anything calls it."""
    script = "run_grid.sh" if is_qa else "run_all.sh"
    sentences, questions = ["comparison.json", "crossvalidation.json"], ["grid.json"]
    names = {False: sentences, True: questions, None: sentences + questions}[is_qa]
    metrics = output / "metrics"
    paths = [metrics / name for name in names if (metrics / name).exists()]
    if not paths:
        paths = list(metrics.glob("sweep_*.json"))
    if not paths:
        fail(f"{metrics / names[0]} is not there; bash {script} makes it (and --output says where)")
    path = max(paths, key=lambda path: path.stat().st_mtime)
    content = read_json(path)
    try:
        runs = {name: read_settings(result) for name, result in runs_of(path, content).items()}
    except (LookupError, TypeError, AttributeError, ValueError):
        runs = {}

    if not runs:
        fail(f"{path} is damaged or of an earlier version; bash {script} makes it anew")
    chosen = only and named(only, runs)
    if only is not None and not chosen:
        fail(f"--method {only}: {path} has {', '.join(runs)}")
    files = {name: checkpoint_path(output, s) for name, s in runs.items() if chosen in (None, name)}
    for name, file in files.items():
        if not file.exists():
            result = result_path(output, runs[name])
            delete = f"delete {result}, and " if result.exists() else ""
            fail(f"{file}, the checkpoint of {name} in {path}, is not there (checkpoints are not "
                 f"part of a clone); {delete}bash {script}, with the flags that it was made with, "
                 "trains it, and --checkpoint FILE asks any other")
    return files


def load_base(path, model_name=None):
    """Return (tokenizer, base, its hash) for a checkpoint; model_name: instead of the model that it
    was trained on."""
    about = read_about(path)
    s = about["settings"]
    if s.model_sha256 and not model_name:
        fail(f"{path} was trained on a model in the folder {s.model}; --model FOLDER says where "
             "that is")
    tokenizer, base = load_pretrained(model_name or s.model, about["label_names"])
    checkpoint.check_tokenizer(path, about, tokenizer)
    return tokenizer, base.eval(), checkpoint.hash_base(base)


def name_files(paths):
    """Return {name: checkpoint} of checkpoints and peft folders. The name is that of the file or
    folder, or its path where two names are the same."""
    names = [path.resolve().name if path.is_dir() else path.stem for path in paths]
    if len(set(names)) < len(names):
        names = map(str, paths)
    return dict(zip(names, map(as_checkpoint, paths)))


def as_checkpoint(path):
    """Return a path that checkpoint.py can read: `path` itself, or if that is a peft folder, a
    temporary file of the folder's name, made from it and removed at exit."""
    if not path.is_dir():
        return path
    config = read_config(path)
    # peft also saves in 16 bits
    tensors = {own_name(name): p.float() for name, p in read_tensors(path / PEFT_TENSORS).items()}
    about = describe_folder(path, config, tensors)
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    file = folder / f"{path.resolve().name}.safetensors"
    write_whole(file, lambda part: save_file(tensors, part, checkpoint.as_metadata(about)))
    return file


# --- peft's format -------------------------------------------------------------------------------

def peft_name(name):
    """Return what peft calls one of our trained tensors."""
    for own, end in ENDS.items():
        if name.endswith("." + own):
            name = name.removesuffix(own) + end
    return PREFIX + name


def own_name(name):
    """Return what we call one of peft's tensors."""
    name = name.removeprefix(PREFIX).replace("magnitude_vector.weight", "magnitude_vector")
    for own, end in ENDS.items():
        if name.endswith("." + end):
            name = name.removesuffix(end) + own
    return name


def write_peft(path, folder):
    """Write a checkpoint of LoRA or DoRA into `folder` as peft would. What peft's files do not say,
    such as the names of the labels, goes into the metadata, which peft does not read."""
    about, tensors = read_about(path), read_tensors(path)
    s = about["settings"]
    head = "qa_outputs" if s.is_qa else "classifier"
    new_pooler = ["pooler"] if any(".pooler." in name for name in tensors) else []
    write_json(folder / PEFT_CONFIG, {
        "peft_type": "LORA", "task_type": TASK_TYPES[f"{head}."],
        "base_model_name_or_path": HUB_NAME if s.model == DEFAULT_MODEL else s.model,
        "r": s.r, "lora_alpha": s.alpha, "lora_dropout": s.dropout,
        "target_modules": list(s.target_layers), "modules_to_save": [head, *new_pooler],
        "use_dora": "magnitude" in row_of(s).adds, "use_rslora": False, "bias": "none",
        "fan_in_fan_out": False, "init_lora_weights": True, "inference_mode": True})
    save_file({peft_name(name): p for name, p in tensors.items()}, folder / PEFT_TENSORS,
              {"format": "pt", **checkpoint.as_metadata(about)})


def read_config(folder):
    """Return the content of a folder's adapter_config.json. Exit if it is not of a LoRA or DoRA
    that we have."""
    path = folder / PEFT_CONFIG
    if not path.exists():
        fail(f"{folder} is no peft folder: {PEFT_CONFIG} is not there")
    if not (folder / PEFT_TENSORS).exists():
        fail(f"{folder} has no {PEFT_TENSORS}; peft writes it with save_pretrained(folder, "
             "safe_serialization=True)")
    check_ordinary(path)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        kind, r, alpha = config["peft_type"], config.get("r"), config.get("lora_alpha")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        fail(f"{path} is damaged")
    if kind != "LORA":
        fail(f"{folder} is peft's {kind}; LoRA and DoRA alone are read")
    if not isinstance(r, int) or not isinstance(alpha, (int, float)) or r < 1 or alpha <= 0:
        fail(f"{path}: r is {r} and lora_alpha {alpha}")
    if config.get("task_type") not in (*TASK_TYPES.values(), None):
        fail(f"{folder} is for {config['task_type']}; {' and '.join(TASK_TYPES.values())} are read")
    if found := [key for key in FOREIGN if config.get(key)]:
        fail(f"{folder}: {found[0]} is not supported")
    if config.get("bias", "none") != "none":
        fail(f"{folder} trained biases (bias {config['bias']!r}), which is not supported")
    if config.get("init_lora_weights", True) not in PLAIN_STARTS:
        fail(f"{folder}: init_lora_weights {config['init_lora_weights']!r} changes the frozen "
             "weights, which is not supported")
    return config


def find_targets(folder, names):
    """Return which of methods.TARGETS the trained tensors with these names are on."""
    layers = {}  # {number: names of its linear layers with LoRA}
    for name in names:
        if name.endswith(".lora_A"):
            module = name.removesuffix(".lora_A")
            found = re.fullmatch(re.escape(LAYERS) + r"(\d+)\.(.+)", module)
            if not found:
                fail(f"{folder}: LoRA is on {module}, which is not supported; on {LAYERS}* alone "
                     'it is (peft\'s "all-linear" takes the pooler, too)')
            layers.setdefault(int(found[1]), set()).add(found[2])
    for targets, own in TARGETS.items():
        if layers and all(found == set(own) for found in layers.values()):
            return targets
    least = min(layers.values(), key=len, default=set())
    fail(f"{folder}: LoRA is on {', '.join(sorted(least)) or 'nothing'} of a layer; every layer "
         f"must have it on one of: {'; '.join(TARGETS)}")


def describe_folder(folder, config, tensors):
    """Return what checkpoint.describe says of a run for a peft folder with this config and these
    tensors (by our names)."""
    targets = find_targets(folder, tensors)
    heads = [head for head in HEAD if f"{head}weight" in tensors]
    if len(heads) != 1:
        fail(f"{folder} has no head (classifier or qa_outputs, in peft's modules_to_save): what "
             "it answers is not in it")
    if config.get("task_type") not in (TASK_TYPES[heads[0]], None):
        fail(f"{folder} is for {config['task_type']}, but its head is {heads[0]}weight")
    is_qa, n_labels = heads[0] == "qa_outputs.", len(tensors[f"{heads[0]}weight"])
    if n_labels < 2:
        fail(f"{folder} has a head with one output, a regression's, which is not supported")

    # an export from here left in the metadata what peft's files do not say
    file = folder / PEFT_TENSORS
    is_ours = "settings" in checkpoint.read(file, lambda opened: opened.metadata() or {})
    about = read_about(file) if is_ours else describe_foreign(folder, config, is_qa, n_labels)
    method = "dora" if config.get("use_dora") else "lora"
    if row_of(about["settings"]).is_4bit:
        method = f"q{method}"
    # s = alpha / sqrt(r) = (alpha sqrt(r)) / r
    scale = math.sqrt(config["r"]) if config.get("use_rslora") else 1
    return about | {"settings": dataclasses.replace(
        about["settings"], method=method, targets=targets, r=config["r"],
        alpha=config["lora_alpha"] * scale, dropout=config.get("lora_dropout", 0.0))}


def describe_foreign(folder, config, is_qa, n_labels):
    """Return what can be said of a folder that another program wrote. Labels get transformers'
    names, the longest input is the tokenizer's, and what nothing tells is None."""
    model = config.get("base_model_name_or_path") or DEFAULT_MODEL
    check_ordinary(folder / "tokenizer_config.json")
    try:
        said = (folder / "tokenizer_config.json").read_text(encoding="utf-8")
        max_length = int(json.loads(said)["model_max_length"])
    except (OSError, ValueError, LookupError, TypeError, OverflowError):
        max_length = None  # the base's then (checkpoint.fit_length)
    s = Settings(method="lora", placement=None, task=folder.resolve().name, is_qa=is_qa,
                 model=DEFAULT_MODEL if model == HUB_NAME else model, max_length=max_length,
                 stride=128 if is_qa else None, max_answer_length=30 if is_qa else None)
    labels = None if is_qa else [f"LABEL_{i}" for i in range(n_labels)]
    return {"settings": s, "label_names": labels, "base": None, "tokenizer": None, "pairs": False,
            "epoch": None}


# --- exporting -----------------------------------------------------------------------------------

def merge(model, s):
    """Turn a model of the settings `s` (checkpoint.attach) into a plain BERT, in place. Twice is
    the same as once."""
    if not row_of(s).merges:
        fail(f"adapters cannot be merged ({label_of(s)}): a nonlinear function stands between "
             "their two matrices, so that no weight of BERT's own does the same. LoRA, DoRA, QLoRA "
             "and QDoRA can")
    merge_lora(model)
    if row_of(s).is_4bit:
        from quant import dequantize_encoder  # bitsandbytes is slow to import
        dequantize_encoder(model)
    # a wrapper that is left would be exported without a word
    with torch.device("meta"):
        plain = set(type(model)(model.config).state_dict())
    if left := sorted(set(model.state_dict()) ^ plain):
        fail(f"{label_of(s)} was not merged: {left[0]} is left")


def export(path, folder, model_name=None, is_peft=False):
    """Write a checkpoint as a folder for transformers, merged and in fp32, or for peft, with the
    tokenizer; whole or not at all."""
    tokenizer, base, base_hash = load_base(path, model_name)
    model, about = attach(base, base_hash, path)
    s = about["settings"]
    if not is_peft:
        merge(model, s)
    elif "r" not in row_of(s).flags:
        fail(f"{label_of(s)} has no place in peft's format of LoRA; --format merged exports what "
             "can be merged")
    folder = folder.resolve()
    part = Path(tempfile.mkdtemp(dir=folder.parent, prefix=folder.name[:100] + "."))
    try:
        if is_peft:
            write_peft(path, part)
            # not config.json: beside one of that name, transformers expects the base's weights
            model.config.to_json_file(part / "base_config.json")
        else:
            model.save_pretrained(part)
        tokenizer.model_max_length = s.max_length
        tokenizer.save_pretrained(part)
        for made in (part, *part.iterdir()):
            usual_mode(made)
        part.rename(folder)
    except (Exception, SystemExit) as e:  # OSError, safetensors' own for the same causes, or fail
        shutil.rmtree(part, ignore_errors=True)
        fail(f"cannot write {folder}: {e}")


def main(args):
    if args.method:
        args.checkpoint, = find(args.output, None, args.method).values()
    export(as_checkpoint(args.checkpoint), args.to, args.model, args.format == "peft")
    print(f"wrote {args.to}")


if __name__ == "__main__":
    main(ARGS)
