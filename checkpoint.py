"""A trained method as one small file, and the way back onto BERT.

The file is safetensors: the trained tensors and nothing else (methods.METHODS), the new head
included. Its metadata, each value as JSON, say what the tensors mean:

    settings       all settings of the run (settings.Settings)
    label_names    of the head's outputs; null for question answering
    base           hash_base of the BERT that was trained on
    tokenizer      hash_tokenizer of what made its token ids
    pairs          whether it read pairs of sentences
    epoch          after which epoch it was saved

The frozen tensors are not in the file and did not change: loaded onto the same base, it gives the
same bits.
"""
import copy
import dataclasses
import hashlib
import json

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from common import check_ordinary, fail, write_whole
from model import apply_method, is_head, trained_tensors
from settings import Settings

PROBE = ("The caf\u00e9 and the CAFE\u0301 isn't \u00dcn\u00efc\u00f8de, I\u0307stanbul\u200b "
         "stra\u00dfe; \u4e2d\u6587 don\u2019t\x00 re-do "
         "\u0939\u093f\u0928\u094d\u0926\u0940 [MASK] <s> 1,000.5%\u00a0")


def hash_base(model):
    """Return the SHA-256 (first 16 hex digits) of a fresh model's parameters (load_pretrained's),
    its head's left out."""
    digest = hashlib.sha256()
    for name, p in sorted(model.named_parameters()):
        if not is_head(model, name):
            digest.update(name.encode())
            digest.update(p.detach().numpy())
    return digest.hexdigest()[:16]


def hash_tokenizer(tokenizer):
    """Return the SHA-256 (first 16 hex digits) of what a tokenizer does, however its files are
    written: its vocabulary, and the ids of a text that shows how it treats case, accents, marks,
    scripts, control characters and punctuation."""
    ids = tokenizer(PROBE)["input_ids"], tokenizer(PROBE, PROBE)["input_ids"]
    does = json.dumps([sorted(tokenizer.get_vocab().items()), ids])
    return hashlib.sha256(does.encode()).hexdigest()[:16]


def describe(model, s, task, tokenizer):
    """Return the metadata, as a dict, of what will be trained on a fresh model. epoch comes when it
    is saved."""
    return {"settings": s, "label_names": task.label_names, "base": hash_base(model),
            "tokenizer": hash_tokenizer(tokenizer), "pairs": task.has_pairs, "epoch": None}


def as_metadata(about):
    """Return metadata as safetensors takes them: each value as JSON."""
    about = about | {"settings": vars(about["settings"])}
    return {key: json.dumps(value) for key, value in about.items()}


def save(path, model, about):
    """Write the trained tensors of `model`, which `about` describes; whole or not at all."""
    write_whole(path, lambda part: save_file(trained_tensors(model), part, as_metadata(about)))


def read(path, get):
    """Return get(file) of an open safetensors file, or exit with one line."""
    check_ordinary(path)
    try:
        with safe_open(path, "pt") as file:
            return get(file)
    except Exception as e:  # OSError, or safetensors' own for a truncated or foreign file
        fail(f"cannot read the checkpoint {path} ({str(e).splitlines()[0]})")


def read_tensors(path):
    """Return {name: tensor} of a file; copies, because the file is only mapped."""
    return read(path, lambda file: {name: file.get_tensor(name).clone() for name in file.keys()})


def read_about(path):
    """Return what describe() gave when the file was written."""
    metadata = read(path, lambda file: file.metadata() or {})
    try:
        about = {key: json.loads(metadata[key]) for key in
                 ("settings", "label_names", "base", "tokenizer", "pairs", "epoch")}
        s = Settings(**about["settings"])
        if vars(s) != about["settings"]:
            raise ValueError  # some are missing
        return about | {"settings": s}
    except (KeyError, ValueError, TypeError):
        fail(f"{path} does not say what it was trained on; an earlier version or another program "
             "wrote it")


def check_tokenizer(path, about, tokenizer):
    """Exit if the checkpoint at `path`, which `about` describes, was trained with another
    tokenizer."""
    if about["tokenizer"] not in (None, own := hash_tokenizer(tokenizer)):
        fail(f"{path} was trained with another tokenizer, with the SHA-256 "
             f"{about['tokenizer']}..., not {own}...: the same words would be other tokens")


def fill(path, model, tensors, assign):
    """Put all trained tensors of the checkpoint at `path` into a model, or none and exit. assign:
    in the place of the model's own parameters, which stay as they are; otherwise copied into
    them."""
    own = trained_tensors(model)
    for name in sorted(own.keys() | tensors.keys()):
        found, needed = (f"{group[name].dtype} of shape {tuple(group[name].shape)}"
                         if name in group else "missing" for group in (tensors, own))
        if found != needed:
            fail(f"{path}: {name} is {found}, but {needed} in what this method trains")
        if not tensors[name].isfinite().all():
            fail(f"{path}: {name} holds NaN or infinity")
    model.load_state_dict(tensors, strict=False, assign=assign)


def load(path, model, about):
    """Put back what save(path, model, about) wrote; whole or not at all."""
    if read_about(path) != about:
        fail(f"{path} is not what this run saved: another process trains the same run")
    fill(path, model, read_tensors(path), assign=False)


def share_storage(model):
    """Make a second model over the same storage: modules and nn.Parameters are new, so that they
    can be replaced, frozen or cast without a trace on the first, but no number is copied."""
    memo = {id(p): nn.Parameter(p.data, requires_grad=False) for p in model.parameters()}
    return copy.deepcopy(model, memo | {id(b): b for b in model.buffers()})


def fit_length(about, config):
    """Return `about` with the longest input that a base of this config reads where a peft folder
    does not say it, or asks for more."""
    s, longest = about["settings"], config.max_position_embeddings
    length = min(s.max_length or longest, longest)
    stride = s.stride and min(s.stride, max(length - 70, 0))  # as settings.length_settings has it
    return about | {"settings": dataclasses.replace(s, max_length=length, stride=stride)}


def attach(base, base_hash, path, compute_dtype=torch.float32):
    """Put the trained method of a file on a fresh model `base` (load_pretrained's) with the
    hash_base `base_hash`: (model, about), in evaluation mode.

    What is frozen lies where the base's own does, so that many methods and tasks share it. What was
    trained, 4-bit weights and a frozen encoder in another `compute_dtype` are the new model's.
    """
    about, tensors = fit_length(read_about(path), base.config), read_tensors(path)
    if about["base"] not in (None, base_hash):  # None: it does not say (peft's folders)
        fail(f"{path} was trained on another base model: {about['settings'].model}, with the "
             f"SHA-256 {about['base']}..., not {base_hash}...")
    model = share_storage(base)
    if about["label_names"]:  # tasks on one base may have other labels, and another number of them
        model.config.id2label = dict(enumerate(about["label_names"]))
        model.config.label2id = {name: i for i, name in enumerate(about["label_names"])}
        model.num_labels = len(about["label_names"])
        model.classifier = nn.Linear(model.config.hidden_size, model.num_labels)
    apply_method(model, about["settings"], compute_dtype)
    fill(path, model, tensors, assign=True)
    return model.eval(), about
