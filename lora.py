r"""LoRA: Low-Rank Adaptation of Large Language Models (Hu et al. 2021, https://arxiv.org/abs/2106.09685).

A frozen linear layer W0 gets a trainable low-rank neighbour:

    h = W0 x + b + (alpha / r) B A dropout(x)        equation (3) of the paper, with its section 4.1 scaling

        x ----> W0, b (frozen) -----------------------> + ----> h
          \--> dropout --> A (r, in) --> B (out, r) --/
                                          * alpha / r
"""
import math

import torch
from torch import nn
from torch.nn import functional as F


class LoRALinear(nn.Module):
    """A linear layer `base` (nn.Linear or bnb.nn.Linear4bit, in -> out features) plus a low-rank update of rank r.

    Trains r * (in + out) numbers: lora_A (r, in) and lora_B (out, r). Freezing `base` is the caller's job.
    forward: x (..., in) -> (..., out).
    """

    def __init__(self, base, r, alpha, dropout):
        super().__init__()
        self.base = base
        self.lora_A = nn.Parameter(torch.empty(r, base.in_features))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, r))  # B = 0: training starts at the base model
        # With A stored as (r, in), a = sqrt(5) gives U(-1/sqrt(in), 1/sqrt(in)); stored as (in, r), it would not.
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.dropout = nn.Dropout(dropout)
        self.scaling = alpha / r

    def forward(self, x):
        # h = W0 x + b + (alpha / r) B A dropout(x), scaled while it is only r wide
        low_rank = self.scaling * F.linear(self.dropout(x), self.lora_A)  # (..., r)
        return self.base(x) + F.linear(low_rank, self.lora_B)  # (..., out)


def inject_lora(model, r, alpha, dropout):
    """Put LoRA on the query and value projections of every layer (the paper's choice, its section 7.1)."""
    for layer in model.bert.encoder.layer:
        attention = layer.attention.self
        attention.query = LoRALinear(attention.query, r, alpha, dropout)
        attention.value = LoRALinear(attention.value, r, alpha, dropout)
