r"""LoRA: Low-Rank Adaptation of Large Language Models (Hu et al. 2021,
https://arxiv.org/abs/2106.09685), and DoRA: Weight-Decomposed Low-Rank Adaptation (Liu et al. 2024,
https://arxiv.org/abs/2402.09353).

A frozen linear layer with weight W0 and bias b, which makes h of x, gets a trainable neighbour of
rank r: A with r rows, B with r columns, scaled by s = alpha / r (LoRA's section 4.1):

    LoRA    h = W0 x + b + s B A dropout(x)               equation (3) of the LoRA paper

        x ----> W0, b (frozen) ----------------> + ----> h
          \--> dropout --> A (r, in) --> B (out, r), * s

DoRA learns the length of each row of the weight apart from its direction, ||.|| being the norm of a
row (the paper's columns: its W is (in, out), nn.Linear's weight (out, in)); the magnitudes m (out)
start as ||W0||:

    DoRA    W' = m (W0 + s B A) / ||W0 + s B A||          equation (5) of the DoRA paper
            h  = W' x + b

In training W0 + s B A is formed for its norms alone, without a gradient, so that nothing of that
size is kept for the backward pass; with one number per row,

            g = m / ||W0 + s B A||
            h = g (W0 x) + g s B A x + b

With dropout W0 x stays whole, and all that training changed, W' - W0, sees dropout(x), as in peft
(by DoRA's author, https://github.com/huggingface/peft/pull/1474):

            h = W0 x + b + (g - 1) W0 dropout(x) + g s B A dropout(x)
"""
import math

import torch
from torch import nn
from torch.nn import functional as F


def frozen_weight(linear):
    """Return the weight (out, in) that `linear` multiplies by; a 4-bit one is dequantised."""
    return linear.dequantize() if hasattr(linear, "dequantize") else linear.weight


def plain_linear(base, weight):
    """Make an nn.Linear, in fp32, with this weight (out, in) and the bias of `base`."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=base.bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.float())
    if base.bias is not None:
        linear.bias = nn.Parameter(base.bias.detach().float())
    return linear


class LoRALinear(nn.Module):
    """A linear layer `base` (nn.Linear or NF4Linear, in -> out features) plus a low-rank update of
    rank r.

    Trains r * (in + out) numbers: lora_A (r, in) and lora_B (out, r). Freezing `base` is the
    caller's job. forward: x (..., in) -> (..., out).
    """

    def __init__(self, base, r, alpha, dropout):
        super().__init__()
        self.base = base
        self.lora_A = nn.Parameter(torch.empty(r, base.in_features))
        # B = 0: training starts at the base model.
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, r))
        # Uniform, as in the authors' code (the paper, section 4.1: Gaussian). With A stored as
        # (r, in), a = sqrt(5) gives U(-1/sqrt(in), 1/sqrt(in)); stored as (in, r), it would not.
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.dropout = nn.Dropout(dropout)  # on a CPU fast.py puts a cheaper one in its place
        self.scaling = alpha / r

    def forward(self, x):
        # h = W0 x + b + s B A dropout(x); s multiplies A dropout(x), which is only r wide
        low_rank = self.scaling * F.linear(self.dropout(x), self.lora_A)  # (..., r)
        return self.base(x) + F.linear(low_rank, self.lora_B)  # (..., out)

    @torch.no_grad()
    def merged_weight(self):
        """Compute the one weight (out, in) that does the same: W0 + s B A, in the precision of A
        and B, fp32, whatever autocast says."""
        with torch.autocast(self.lora_A.device.type, enabled=False):
            w0 = frozen_weight(self.base).to(self.lora_A.dtype)
            return torch.addmm(w0, self.lora_B, self.lora_A, alpha=self.scaling)


def row_norms_of(weight):
    """Compute the row norms (out,) of a weight (out, in), clamped above 0 so that pruned rows do
    not divide by zero."""
    return weight.norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)


class DoRALinear(LoRALinear):
    """A LoRALinear with a magnitude per output row: trains `magnitude` (out) too, r * (in + out) +
    out numbers."""

    def __init__(self, base, r, alpha, dropout):
        super().__init__(base, r, alpha, dropout)
        # so that W' starts as W0
        self.magnitude = nn.Parameter(frozen_weight(base).detach().float().norm(dim=1))

    @torch.no_grad()
    def row_norms(self):
        """Compute ||W0 + s B A|| (out), a constant to autograd, as section 4.3 of the paper
        proposes to save memory."""
        return row_norms_of(super().merged_weight())

    def forward(self, x):
        # g = m / ||W0 + s B A||
        g = self.magnitude / self.row_norms()  # (out)
        dropped = self.dropout(x)
        y = self.base(x)  # W0 x + b
        y_dropped = self.base(dropped) if self.training and self.dropout.p > 0 else y
        if self.base.bias is not None:
            y_dropped = y_dropped - self.base.bias.to(y.dtype)  # g scales W0 x, not b
        # h = W0 x + b + (g - 1) W0 dropout(x) + g s B A dropout(x)
        g_s_B = (g * self.scaling)[:, None] * self.lora_B  # (out, r)
        low_rank = F.linear(F.linear(dropped, self.lora_A), g_s_B)  # (..., out)
        return y + (g - 1).to(y.dtype) * y_dropped + low_rank

    @torch.no_grad()
    def merged_weight(self):
        """Compute W' (out, in)."""
        w = super().merged_weight()  # W0 + s B A
        # W' = m (W0 + s B A) / ||W0 + s B A||
        return (self.magnitude / row_norms_of(w))[:, None] * w


def put_lora(model, s, layer_class=LoRALinear):
    """Put `layer_class` on the linear layers of every BertLayer that the settings name."""
    for layer in model.bert.encoder.layer:
        for name in s.target_layers:
            base = layer.get_submodule(name)
            layer.set_submodule(name, layer_class(base, s.r, s.alpha, s.dropout))


def put_dora(model, s):
    """Put DoRALinear on the same layers."""
    put_lora(model, s, DoRALinear)


def replace_modules(root, kind, make):
    """Put make(module) in the place of every module in `root` that is exactly of class `kind`."""
    for module in list(root.modules()):
        for name, child in list(module.named_children()):
            if type(child) is kind:
                setattr(module, name, make(child))


def merge_lora(model):
    """Fold every LoRALinear and DoRALinear of the model into a plain nn.Linear; where there is
    none, nothing happens."""
    for kind in LoRALinear, DoRALinear:
        replace_modules(model.bert.encoder, kind,
                        lambda module: plain_linear(module.base, module.merged_weight()))
