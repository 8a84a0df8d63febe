"""The same BERT, faster on a CPU: cheap dropout masks, memory that stays, hidden states cast once a
layer, and a last layer that computes only what is read.

CUDA does not need this file. `python -m tools.bench --tricks` measures what each of them gains
(docs/speed.md).
"""
import common  # noqa: F401 - transformers may import bitsandbytes

# isort: split
import ctypes
import functools

import numpy as np
import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lora import replace_modules

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def keep_memory():
    """Let the C library keep what tensors gave back, for the next ones.

    glibc maps every block of over 32 MB anew and unmaps it after use. The kernel then clears the
    new pages one by one. In full fine-tuning the gradient of the word embeddings is such a block,
    in every step. Other C libraries are left as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:  # the constants are those of malloc.h
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def random_bits(n):
    """Draw n random 16-bit integers (n,), int16. Obeys torch.manual_seed.

    torch's generator draws only a key. The key seeds numpy's SFC64, which draws 64 bits in half the
    time that torch takes.
    """
    key = torch.empty((), dtype=torch.int64).random_().item()
    words = np.random.SFC64(key).random_raw(-(-n // 4))  # uint64
    return torch.from_numpy(words.view(np.int16))[:n]


def dropout_mask(x, p):
    """Draw a tensor of x's shape and type: 0 with probability p, else 1 / (1 - p).

    torch draws a Bernoulli number per element from a serial generator. Here an element has 16
    random bits u in [0, 65536), and is kept if u >= round(65536 p), so that p = 0.1 becomes
    0.10001.
    """
    # int16 in place; through bool it would take three times as long
    keep = random_bits(x.numel()).ge_(round(p * 65536) - 32768).view(x.shape)  # 0 or 1
    scale = torch.tensor(1 / (1 - p), dtype=x.dtype)
    if x.element_size() == 2:  # 0 or the bits of 1 / (1 - p), as an integer of the same size
        return keep.mul_(scale.view(torch.int16)).view(x.dtype)
    return keep.to(x.dtype).mul_(scale)


class Dropout(nn.Dropout):
    """nn.Dropout with cheap masks."""

    def forward(self, x):
        return x * dropout_mask(x, self.p) if self.training and self.p > 0 else x


def attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **_):
    """Compute softmax(Q K^T / sqrt(d) + mask) V with our dropout; Q, K, V (batch, heads, tokens,
    d)."""
    scores = (query * scaling) @ key.transpose(2, 3)  # (batch, heads, tokens, tokens)
    if attention_mask is not None:
        # the mask is fp32, and so would everything after it be
        scores = scores + attention_mask.to(scores.dtype)
    weights = scores.softmax(-1)
    if dropout > 0:
        weights = weights * dropout_mask(weights, dropout)
    return (weights @ value).transpose(1, 2), None  # (batch, tokens, heads, d)


AttentionInterface.register("fast_cpu", attention)
AttentionMaskInterface.register("fast_cpu", eager_mask)


def cast_once(module, inputs):
    """Cast the hidden states before BertSelfAttention.forward (a hook). Otherwise query, key and
    value each cast them, and LoRA's branches draw their masks for the wider type."""
    hidden, *others = inputs
    if torch.is_autocast_enabled("cpu"):
        hidden = hidden.to(torch.get_autocast_dtype("cpu"))
    return hidden, *others


def cls_forward(layer, hidden, attention_mask=None, *_, **__):
    """Take the place of BertLayer.forward in a last layer of which only the first token, [CLS], is
    read afterwards.

    All tokens are attended to, but query, attention output and FFN are those of [CLS] alone:
    (batch, tokens, hidden) -> (batch, 1, hidden). The logits and gradients are the same. Of the
    layer's 12 products of size hidden^2, the other tokens need only the 2 of key and value.
    """
    attention_module, cls = layer.attention.self, hidden[:, :1]
    for hook in attention_module._forward_pre_hooks.values():  # it is not called as a whole here
        hidden, = hook(attention_module, (hidden,))

    def heads(x):  # (batch, tokens, hidden) -> (batch, heads, tokens, d)
        return x.unflatten(-1, (attention_module.num_attention_heads, -1)).transpose(1, 2)

    query = heads(attention_module.query(cls))
    key, value = heads(attention_module.key(hidden)), heads(attention_module.value(hidden))
    attend = ALL_ATTENTION_FUNCTIONS.get(attention_module.config._attn_implementation, attention)
    context, _ = attend(attention_module, query, key, value,
                        None if attention_mask is None else attention_mask[:, :, :1],
                        scaling=attention_module.scaling,
                        dropout=attention_module.dropout.p if layer.training else 0.0)
    a = layer.attention.output(context.flatten(2), cls)  # (batch, 1, hidden)
    return layer.output(layer.intermediate(a), a)


def install(model, without=()):
    """Make a BertForSequenceClassification or BertForQuestionAnswering fast in place. The weights
    and their names stay as they are. without: tricks to leave out (tools.bench)."""
    if "kept_memory" not in without:
        keep_memory()
    if "cast_once" not in without:
        for layer in model.bert.encoder.layer:
            layer.attention.self.register_forward_pre_hook(cast_once)
    reads_all = model.bert.pooler is None  # question answering
    if "cls_only" not in without and not reads_all:
        last = model.bert.encoder.layer[-1]
        last.forward = functools.partial(cls_forward, last)
    if "cheap_dropout" not in without:
        model.set_attn_implementation("fast_cpu")
        replace_modules(model, nn.Dropout, lambda dropout: Dropout(dropout.p))
        model.train(model.training)  # new modules start in training mode
