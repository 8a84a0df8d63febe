"""A trained method as one small file, and the way back onto BERT.

The file is safetensors: the trained tensors and nothing else (methods.METHODS), the new head
included. Its metadata, each value as JSON, say what the tensors mean:

    settings       all flags of the run (settings.settings_of)
    label_names    of the head's outputs; null for question answering
    base           hash_base of the BERT that was trained on
    tokenizer      hash_tokenizer of what made its token ids
    pairs          whether it read pairs of sentences

The frozen tensors are not in the file and did not change: loaded onto the same base, it gives the
same bits. Where a file is read, a folder of peft's can be given instead (peft_format.py).
"""
import copy
import hashlib
import json

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import peft_format
from files import write_whole
from model import apply_method, is_head, trained_tensors
from start import fail

PROBE = ("The caf\u00e9 and the CAFE\u0301 isn't \u00dcn\u00efc\u00f8de, I\u0307stanbul\u200b "
         "stra\u00dfe; \u4e2d\u6587 don\u2019t\x00 re-do "
         "\u0939\u093f\u0928\u094d\u0926\u0940 [MASK] <s> 1,000.5%\u00a0")
# settings that decide what the tensors do; "targets", which only some runs have, is one more
MEANING = ("method", "r", "alpha", "placement", "bottleneck", "reduction")


def hash_base(model):
    """SHA-256 (first 16 hex digits) of a fresh model's parameters (load_pretrained's), its head's
    left out."""
    digest = hashlib.sha256()
    for name, p in sorted(model.named_parameters()):
        if not is_head(model, name):
            digest.update(name.encode())
            digest.update(p.detach().numpy())
    return digest.hexdigest()[:16]


def hash_tokenizer(tokenizer):
    """SHA-256 (first 16 hex digits) of what a tokenizer does, however its files are written: its
    vocabulary, and the ids of a text that shows how it treats case, accents, marks, scripts,
    control characters and punctuation."""
    ids = tokenizer(PROBE)["input_ids"], tokenizer(PROBE, PROBE)["input_ids"]
    does = json.dumps([sorted(tokenizer.get_vocab().items()), ids])
    return hashlib.sha256(does.encode()).hexdigest()[:16]


def describe(model, settings, label_names, tokenizer, pairs=False):
    """The metadata, as a dict, of what will be trained on a fresh model."""
    return {"settings": settings, "label_names": label_names, "base": hash_base(model),
            "tokenizer": hash_tokenizer(tokenizer), "pairs": pairs}


def save(path, model, about):
    """Write the trained tensors of `model`, which `about` describes; whole or not at all."""
    metadata = {key: json.dumps(value) for key, value in about.items()}
    write_whole(path, lambda part: save_file(trained_tensors(model), part, metadata))


def file_of(path):
    """The file with the tensors: of a folder, peft's."""
    return path / peft_format.TENSORS if path.is_dir() else path


def files_of(path):
    """All files of a checkpoint: its own, or of a folder peft's."""
    return [file_of(path), *[path / peft_format.CONFIG] * path.is_dir()]


def read(path, get):
    """get(file) of an open file, or one line on stderr."""
    try:
        with safe_open(file_of(path), "pt") as file:
            return get(file)
    except Exception as e:  # OSError, or safetensors' own for a truncated or foreign file
        fail(f"cannot read the checkpoint {path} ({str(e).splitlines()[0]})")


def read_tensors(path):
    """{name: tensor} of a file; copies, because the file is only mapped."""
    tensors = read(path, lambda file: {name: file.get_tensor(name).clone() for name in file.keys()})
    if path.is_dir():  # peft also saves in 16 bits
        tensors = {peft_format.own_name(name): p.float() for name, p in tensors.items()}
    return tensors


def read_about(path):
    """What describe() gave when the file was written."""
    if path.is_dir():
        peft_format.read_config(path)  # says what is no peft folder
    metadata = read(path, lambda file: file.metadata() or {})
    if path.is_dir():
        shapes = read(path, lambda file: {name: file.get_slice(name).get_shape()
                                          for name in file.keys()})
        return peft_format.make_about(path, shapes, metadata)
    try:
        about = {key: json.loads(metadata[key]) for key in ("settings", "label_names", "base")}
        # files of earlier versions do not say
        about["tokenizer"] = json.loads(metadata.get("tokenizer", "null"))
        about["pairs"] = json.loads(metadata.get("pairs", "false"))
        if {*MEANING, "model", "model_sha256", "max_length"} <= set(about["settings"]):
            return about
    except (KeyError, ValueError, TypeError):
        pass
    fail(f"{path} does not say what it was trained on; an earlier version or another program "
         "wrote it")


def check_base(path, about, base):
    """End if the checkpoint at `path` was trained on another base than the one with the hash
    `base`; peft's folders do not say."""
    if about["base"] not in (None, base):
        fail(f"{path} was trained on another base model: {about['settings']['model']}, with the "
             f"SHA-256 {about['base']}..., not {base}...")


def check_tokenizer(path, about, tokenizer):
    """End if the checkpoint at `path`, which `about` describes, was trained with another
    tokenizer."""
    if about["tokenizer"] not in (None, own := hash_tokenizer(tokenizer)):
        fail(f"{path} was trained with another tokenizer, with the SHA-256 "
             f"{about['tokenizer']}..., not {own}...: the same words would be other tokens")


def fill(path, model, assign):
    """Put all tensors of a file into a model, or none and one line on stderr. assign: in the place
    of the model's own parameters, which stay as they are; otherwise copied into them."""
    own, tensors = trained_tensors(model), read_tensors(path)
    if missing := sorted(own.keys() - tensors.keys()):
        fail(f"{path} lacks {len(missing)} of the {len(own)} tensors that train, {missing[0]} "
             "first")
    if extra := sorted(tensors.keys() - own.keys()):
        fail(f"{path} has {len(extra)} tensors that this method does not train, {extra[0]} first")
    for name, p in own.items():
        found = tensors[name]
        if (found.shape, found.dtype) != (p.shape, p.dtype):
            fail(f"{path}: {name} is {found.dtype} of shape {tuple(found.shape)}, not {p.dtype} of "
                 f"{tuple(p.shape)}")
    model.load_state_dict(tensors, strict=False, assign=assign)


def load(path, model, about):
    """Put a file back into a model that apply_method has made, as `about` describes it; whole or
    not at all."""
    found = read_about(path)
    check_base(path, found, about["base"])
    if found["label_names"] != about["label_names"]:
        fail(f"{path} is of another task: its labels are {found['label_names']}, not "
             f"{about['label_names']}")
    for key in (*MEANING, "targets"):
        has, asked = found["settings"].get(key), about["settings"].get(key)
        if has != asked:
            fail(f"{path} has {key} {has}, not {asked}")
    fill(path, model, assign=False)


def share(model):
    """A second model over the same storage: modules and nn.Parameters are new, so that they can be
    replaced, frozen or cast without a trace on the first, but no number is copied."""
    memo = {id(p): nn.Parameter(p.data, requires_grad=False) for p in model.parameters()}
    return copy.deepcopy(model, memo | {id(b): b for b in model.buffers()})


def attach(base, base_hash, path, compute_dtype=torch.float32):
    """(model, about): the trained method of a file on a fresh model `base` (load_pretrained's) with
    the hash_base `base_hash`. What is frozen lies where the base's own does, so that many methods
    and tasks share it; what was trained, 4-bit weights and a frozen encoder in another
    `compute_dtype` are the new model's. In evaluation mode."""
    about = read_about(path)
    check_base(path, about, base_hash)
    model = share(base)
    if about["label_names"]:  # tasks on one base may have other labels, and another number of them
        model.config.id2label = dict(enumerate(about["label_names"]))
        model.config.label2id = {name: i for i, name in enumerate(about["label_names"])}
        model.num_labels = len(about["label_names"])
        model.classifier = nn.Linear(model.config.hidden_size, model.num_labels)
    apply_method(model, about["settings"], compute_dtype)
    fill(path, model, assign=True)
    return model.eval(), about
