"""A pretrained BERT, loaded and checked, and what becomes of it: one of the methods, on a
device."""
import importlib
import logging
import platform
import resource
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import transformers
from torch import nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BertForQuestionAnswering,
    BertForSequenceClassification,
)

import fast
from distributed import WORLD
from fetch import model_folder
from methods import HEAD, is_4bit, kind_of, row_of, trains
from settings import DEFAULT_MODEL
from start import fail, warn

RSS_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes in a unit of ru_maxrss
POOLER = "bert.pooler.dense."

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


def check_config(name, config):
    """End with one line if the model `name` is none that this project can fine-tune."""
    if config.model_type != "bert":
        fail(f"{name} is a {config.model_type!r} model; this project fine-tunes BERT (model_type "
             "'bert')")
    positions = getattr(config, "position_embedding_type", "absolute")
    if positions != "absolute":
        fail(f"{name} has {positions!r} position embeddings; only absolute ones are supported")
    if config.is_decoder:
        fail(f"{name} is a decoder (is_decoder), whose tokens do not see what follows; this "
             "project fine-tunes encoders")


def fit_tokenizer(name, tokenizer, config):
    """End with one line if the tokenizer of the model `name` cannot be right for it; make right
    what can be."""
    vocabulary = tokenizer.get_vocab()
    if set(vocabulary) <= set(tokenizer.all_special_tokens):
        fail(f"{name} has no tokenizer (tokenizer.json or vocab.txt): every word would be unknown")
    largest = max(vocabulary.values())
    if largest >= config.vocab_size:
        fail(f"{name}: its tokenizer gives ids up to {largest:,}, its embeddings have "
             f"{config.vocab_size:,} rows; they were not made for each other, or tokens were added "
             "and the embeddings not resized")
    if tokenizer.pad_token is None:
        if "[PAD]" not in vocabulary:
            fail(f"{name}: its tokenizer has no padding token")
        tokenizer.pad_token = "[PAD]"

    if config.vocab_size - largest > 1000:  # fewer only fill up a matrix
        warn(f"{name}: its embeddings have {config.vocab_size:,} rows, but its tokenizer gives ids "
             f"up to {largest:,} only; perhaps it is another model's")

    cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id
    one, two = tokenizer("a")["input_ids"], tokenizer("a", "a")["input_ids"]
    is_wrapped = (one[0], one[-1]) == (two[0], two[-1]) == (cls, sep) and two.count(sep) == 2
    if None in (cls, sep) or not is_wrapped:
        fail(f"{name}: its tokenizer does not put [CLS] before a text and [SEP] after it, which "
             "BERT was trained with")

    tokenizer.padding_side = tokenizer.truncation_side = "right"
    tokenizer.model_max_length = min(tokenizer.model_max_length, config.max_position_embeddings)
    types = ["token_type_ids"] if config.type_vocab_size > 1 else []
    tokenizer.model_input_names = ["input_ids", *types, "attention_mask"]


def is_head(model, name):
    """Whether the parameter of this name is new and trains in every method: the head's, and the
    pooler's where load_pretrained had to make one."""
    return name.startswith(HEAD) or getattr(model, "new_pooler", False) and name.startswith(POOLER)


def check_loading(name, model, loading):
    """End with one line if the file and BERT do not have the same tensors, heads left out, or if
    one is not finite."""
    untrained = {*loading["missing_keys"], *(key for key, *_ in loading["mismatched_keys"])}
    # a masked language model has no pooler; half of one is a damaged file
    model.new_pooler = {POOLER + "weight", POOLER + "bias"} <= set(loading["missing_keys"])
    if missing := sorted(key for key in untrained if not is_head(model, key)):
        fail(f"{name} lacks {len(missing)} of BERT's tensors ({missing[0]} first); they would stay "
             "random")
    foreign = [key for key in sorted(loading["unexpected_keys"])
               if {"encoder", "embeddings"} & set(key.split("."))
               and not key.endswith(("position_ids", "token_type_ids"))]  # older versions' buffers
    if foreign:
        fail(f"{name} has {len(foreign)} tensors that BERT does not ({foreign[0]} first); without "
             "them it is another model")
    if bad := [key for key, p in model.named_parameters()
               if not is_head(model, key) and not p.isfinite().all()]:
        fail(f"{name} has {len(bad)} tensors with NaN or infinity ({bad[0]} first)")


def load_pretrained(name, label_names):
    """(tokenizer, model in fp32) of a hub id or folder, with a new head that comes from the seed: a
    BertForSequenceClassification with these labels, or a BertForQuestionAnswering where label_names
    is None."""
    head_class = BertForSequenceClassification if label_names else BertForQuestionAnswering
    folder = model_folder() if name == DEFAULT_MODEL else name
    try:
        config = AutoConfig.from_pretrained(folder)
        check_config(name, config)
        tokenizer = AutoTokenizer.from_pretrained(folder)
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
    check_loading(name, model, loading)

    if not label_names:
        model.qa_outputs = SpanHead(config.hidden_size, 2)
    head = model.classifier if label_names else model.qa_outputs  # new even where there is one
    heads = [head]
    if model.new_pooler:
        warn(f"{name} has no pooler; a new one trains with the head, in every method")
        heads.append(model.bert.pooler.dense)
    for linear in heads:
        nn.init.normal_(linear.weight, std=config.initializer_range)
        nn.init.zeros_(linear.bias)
    return tokenizer, model


def check_words(name, split, tokenizer):
    """Warn if more than a tenth of the words of an Encoded split are unknown to the tokenizer of
    the model `name`; end if all are. A word is a token that neither continues one nor is
    special."""
    tokens = tokenizer.convert_ids_to_tokens(range(max(tokenizer.get_vocab().values()) + 1))
    special = set(tokenizer.all_special_tokens) - {tokenizer.unk_token}
    is_word = np.array([token is not None and token not in special
                        and not token.startswith("##") for token in tokens])
    ids = np.concatenate([row.numpy() for row in split.ids])
    n_words, n_unknown = is_word[ids].sum(), (ids == tokenizer.unk_token_id).sum()
    said = (f"{n_unknown / max(n_words, 1):.0%} of the training rows' words are unknown to the "
            f"tokenizer of {name} and become {tokenizer.unk_token}")
    if n_unknown == n_words:
        fail(said)
    if n_unknown > n_words / 10:
        warn(f"{said}; perhaps its vocabulary is of another language, or cased where the "
             "tokenizer lower-cases")
        return
    capitals = np.mean([word != word.lower() for word in tokenizer.get_vocab()])
    if capitals > 0.02 and tokenizer("A")["input_ids"] == tokenizer("a")["input_ids"]:
        warn(f"the tokenizer of {name} lower-cases, so that {capitals:.0%} of its vocabulary never "
             "come; a cased model needs \"do_lower_case\": false in tokenizer_config.json")


# --- building ------------------------------------------------------------------------------------

def apply_method(model, s, compute_dtype=torch.float32, quantize=None):
    """Turn a fresh BertForSequenceClassification or BertForQuestionAnswering into the method of the
    settings `s` (methods.METHODS), in place.

    compute_dtype: the type in which frozen weights are multiplied, autocast's or fp32. quantize:
    instead of quant.quantize_encoder. Draws from torch's global generator only after the head was
    made, so all methods start from the same head.
    """
    row = row_of(s)
    if is_4bit(s):
        if quantize is None:  # bitsandbytes is slow to import and needed here only
            from quant import quantize_encoder as quantize
        quantize(model, compute_dtype)
    elif "half_weights" not in s.get("without", ()):
        # Autocast rounds a frozen weight to this type in every step, to the same bits: so once is
        # enough. DoRA's norms are then those of the rounded weight, which is the one that it
        # multiplies by. What trains stays in fp32.
        for name, module in model.bert.encoder.named_modules():
            if isinstance(module, nn.Linear):
                for leaf, p in module.named_parameters():
                    if not trains(row, f"bert.encoder.{name}.{leaf}"):
                        p.data = p.data.to(compute_dtype)

    if row.put:
        file, function = row.put.split(".")
        getattr(importlib.import_module(file), function)(model, s)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trains(row, name) or is_head(model, name))
    model.train(model.training)  # new modules start in training mode; the model may be evaluating


def place(model, device, without=()):
    """The model on its device; on a CPU made fast (fast.py). without: tricks to leave out."""
    if device.type == "cpu":
        fast.install(model, without)
    # memory.py's models have no numbers that could be moved
    return model if next(model.parameters()).is_meta else model.to(device)


def build(model, s, device, dtype=None, quantize=None):
    """A fresh model as the method of the settings `s`, on its device, ready to train. dtype:
    autocast's, or None."""
    apply_method(model, s, dtype or torch.float32, quantize)
    return place(model, device, s.get("without", ()))


def trained_tensors(model):
    """{name: parameter} of all that trains: what the optimizer gets, what is saved and counted."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def count_params(model):
    """Numbers of parameters: the trainable ones by kind, and `total_params` with the frozen ones.

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


# --- the machine ---------------------------------------------------------------------------------

def has_bf16(device):
    """Whether the hardware multiplies in bf16. A CPU that emulates it was 5 times slower than in
    fp32 (60 and 280 GFLOP/s on 2 cores with AVX-512 but neither AMX nor AVX512-BF16)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def amp_dtype(mode, device):
    """The type of autocast for --amp: torch.bfloat16, torch.float16, or None for plain fp32."""
    if mode == "bf16" and not has_bf16(device):
        fail(f"--amp bf16: this {device.type} has no bf16 arithmetic; --amp auto takes what it has")
    if mode == "fp16" and device.type != "cuda":
        fail("--amp fp16 needs a CUDA device; use --amp auto")
    if mode == "auto":
        mode = "bf16" if has_bf16(device) else "fp16" if device.type == "cuda" else "off"
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[mode]


def autocast(device, dtype):
    """The context in which a model of this type runs forward; None is plain fp32."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


def to_device(inputs, device):
    """A dict of CPU tensors on the device; from pinned memory, so that the CPU need not wait."""
    if device.type == "cuda":
        return {name: tensor.pin_memory().to(device, non_blocking=True)
                for name, tensor in inputs.items()}
    return inputs


def git_commit():
    """Hash of the checked-out commit, with -dirty where files differ from it; None without git or a
    checkout."""
    try:
        git = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=40",
                              "--exclude=*"],
                             cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:
        return None
    return git.stdout.strip() or None


def peak_memory(device):
    """(GPU memory that torch allocated or None, resident memory of this process), at most, in units
    of 1e9 bytes."""
    vram = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else None
    return vram, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_UNIT / 1e9


def environment(device, dtype):
    """What made the numbers, besides the settings."""
    n = torch.get_num_threads()
    cpu = f"CPU, {n} thread{'s' if n > 1 else ''}"
    name = torch.cuda.get_device_name() if device.type == "cuda" else cpu
    return {"device": f"{WORLD} x {name}" if WORLD > 1 else name,
            "amp": str(dtype).removeprefix("torch.") if dtype else "off",
            "python": platform.python_version(), "torch": torch.__version__,
            "transformers": transformers.__version__, "bitsandbytes": version("bitsandbytes"),
            "git_commit": git_commit()}
