"""A pretrained BERT and its tokenizer, loaded and checked: what does not fit itself would train on noise."""
import logging
from pathlib import Path

import numpy as np
import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoTokenizer, BertForQuestionAnswering, BertForSequenceClassification

from fetch import model_folder
from methods import HEAD
from qa import SpanHead
from settings import DEFAULT_MODEL, fail, warn

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # without a network it warns for half a minute


def fit_tokenizer(name, tokenizer, config):
    """End with one line if the tokenizer of the model `name` cannot be right for it; make right what can be."""
    vocabulary = tokenizer.get_vocab()
    if set(vocabulary) <= set(tokenizer.all_special_tokens):
        fail(f"{name} has no tokenizer (tokenizer.json or vocab.txt): every word would be unknown")
    if (largest := max(vocabulary.values())) >= config.vocab_size:
        fail(f"{name}: its tokenizer gives ids up to {largest:,}, its embeddings have {config.vocab_size:,} rows; they "
             "were not made for each other, or tokens were added and the embeddings not resized")
    if tokenizer.pad_token is None:
        if "[PAD]" not in vocabulary:
            fail(f"{name}: its tokenizer has no padding token")
        tokenizer.pad_token = "[PAD]"
    cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id
    one, two = tokenizer("a")["input_ids"], tokenizer("a", "a")["input_ids"]
    if None in (cls, sep) or (one[0], one[-1]) != (cls, sep) or (two[0], two[-1], two.count(sep)) != (cls, sep, 2):
        fail(f"{name}: its tokenizer does not put [CLS] before a text and [SEP] after it, which BERT was trained with")
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    tokenizer.model_max_length = min(tokenizer.model_max_length, config.max_position_embeddings)
    types = ["token_type_ids"] if config.type_vocab_size > 1 else []
    tokenizer.model_input_names = ["input_ids", *types, "attention_mask"]


def load_pretrained(name, label_names):
    """(tokenizer, model in fp32) of a hub id or folder, with a new head that comes from the seed: a
    BertForSequenceClassification with these labels, or a BertForQuestionAnswering where label_names is None."""
    head_class = BertForSequenceClassification if label_names else BertForQuestionAnswering
    folder = model_folder() if name == DEFAULT_MODEL else name
    try:
        config = AutoConfig.from_pretrained(folder)
        if config.model_type != "bert":
            fail(f"{name} is a {config.model_type!r} model; this project fine-tunes BERT (model_type 'bert')")
        if (positions := getattr(config, "position_embedding_type", "absolute")) != "absolute":
            fail(f"{name} has {positions!r} position embeddings; only absolute ones are supported")
        if config.is_decoder:
            fail(f"{name} is a decoder (is_decoder), whose tokens do not see what follows; this project fine-tunes encoders")
        tokenizer = AutoTokenizer.from_pretrained(folder)
        if not label_names and not tokenizer.is_fast:
            fail(f"{name} has no fast tokenizer, which alone tells where in the passage a token stands")
        fit_tokenizer(name, tokenizer, config)
        model, loading = head_class.from_pretrained(
            folder, num_labels=len(label_names or ("start", "end")),
            problem_type="single_label_classification" if label_names else None,
            dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True)
    except Exception as e:  # transformers raises OSError, ValueError, SafetensorError, hub errors and more
        reason = f"{type(e).__name__}: {(str(e).strip() or 'no reason given').splitlines()[0]}"
        if Path(name).is_dir():
            fail(f"{name} holds no BERT that can be loaded ({reason})")
        fail(f"cannot load {name!r}: no such folder, and the Hugging Face hub did not give it ({reason}). "
             f"Offline, --model FOLDER and the default {DEFAULT_MODEL} work")
    untrained = {*loading["missing_keys"], *(key for key, *_ in loading["mismatched_keys"])}
    if missing := sorted(key for key in untrained if not key.startswith(HEAD)):
        hint = "; such a model fits question answering only" if all(".pooler." in key for key in missing) else ""
        fail(f"{name} lacks {len(missing)} of BERT's tensors ({missing[0]} first); they would stay random{hint}")
    if foreign := sorted(key for key in loading["unexpected_keys"] if {"encoder", "embeddings"} & set(key.split("."))
                         and not key.endswith(("position_ids", "token_type_ids"))):
        fail(f"{name} has {len(foreign)} tensors that BERT does not ({foreign[0]} first); without them it is another model")
    if not label_names:
        model.qa_outputs = SpanHead(config.hidden_size, 2)
    head = model.classifier if label_names else model.qa_outputs  # new even where the folder brings a head
    nn.init.normal_(head.weight, std=config.initializer_range)
    nn.init.zeros_(head.bias)
    return tokenizer, model


def check_words(name, split, tokenizer):
    """Warn if more than a tenth of the words of an Encoded split are unknown to the tokenizer of the model `name`; end if
    all are. A word is a token that does not continue one, and no special token."""
    tokens = tokenizer.convert_ids_to_tokens(range(max(tokenizer.get_vocab().values()) + 1))
    special = set(tokenizer.all_special_tokens) - {tokenizer.unk_token}
    starts_word = np.array([token is not None and token not in special and not token.startswith("##") for token in tokens])
    ids = np.concatenate([row.numpy() for row in split.ids])
    words, unknown = starts_word[ids].sum(), (ids == tokenizer.unk_token_id).sum()
    said = (f"{unknown / max(words, 1):.0%} of the training rows' words are unknown to the tokenizer of {name} and become "
            f"{tokenizer.unk_token}")
    if unknown == words:
        fail(said)
    if unknown > words / 10:
        warn(f"{said}; perhaps its vocabulary is of another language, or cased where the tokenizer lower-cases")
