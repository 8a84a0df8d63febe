"""4-bit NF4 weights: QLoRA (Dettmers et al. 2023, https://arxiv.org/abs/2305.14314), through
bitsandbytes.

    Y = X doubleDequant(c1, c2, W_NF4) + s X L1 L2        equation (5) of the paper, s as in (3)

W is (in, out) there, nn.Linear's weight transposed, so that L1 is A^T and L2 is B^T (lora.py).

Each run of 64 weights is divided by its largest magnitude (absmax, c2) and every quotient is
rounded to the nearest of 16 levels, the quantiles of a normal distribution, so that a weight costs
4 bits. Double quantisation stores the absmax values themselves in 8 bits, in blocks of 256 with one
fp32 constant each (c1): 4 + 8 / 64 + 32 / (64 * 256) = 4.127 bits a weight in all. The forward
pass dequantises a weight, multiplies, and forgets it; the backward pass dequantises it once more.
"""
import common  # noqa: F401 - before bitsandbytes

# isort: split
import bitsandbytes as bnb
from torch import nn

from lora import plain_linear, replace_modules


class NF4Linear(bnb.nn.Linear4bit):
    """A Linear4bit that answers in its compute type, as nn.Linear does under autocast: x (..., in)
    -> (..., out). Linear4bit itself answers in the type of its input, LayerNorm's fp32, so that
    GELU and attention would keep twice the bytes."""

    def forward(self, x):
        # X doubleDequant(c1, c2, W_NF4) + b
        return super().forward(x.to(self.compute_dtype))

    def dequantize(self):
        """Return the weight (out, in) that it multiplies by, in the type it had before it was
        quantised."""
        return bnb.functional.dequantize_4bit(self.weight.data, self.weight.quant_state)


def to_nf4(linear, compute_dtype):
    """Make a frozen NF4Linear with the weight and bias of `linear`, quantised at once; it
    multiplies in `compute_dtype`."""
    # on "meta" it draws no random weights that nobody reads: LoRA on it starts from the same A as
    # LoRA without it
    quantized = NF4Linear(linear.in_features, linear.out_features, bias=linear.bias is not None,
                          compute_dtype=compute_dtype, device="meta")
    quantized.weight = bnb.nn.Params4bit(linear.weight.detach(), requires_grad=False,
                                         quant_type="nf4", compress_statistics=True,
                                         module=quantized)
    if linear.bias is not None:
        # bitsandbytes would cast it in place on the first forward; frozen means frozen
        quantized.bias = nn.Parameter(linear.bias.detach().to(compute_dtype), requires_grad=False)
    # In eval mode on CPUs with AVX512-BF16, bitsandbytes would repack the weight into a layout for
    # inference alone: after the first validation, backward would end in a RuntimeError and
    # dequantize() give another weight.
    quantized.support_avx512bf16_for_cpu = False
    # Params4bit quantises when it is moved to a device, also to the one that it is on
    return quantized.to(linear.weight.device)


def dequantize_encoder(model):
    """Turn every NF4Linear of the encoder into an nn.Linear, in fp32, that multiplies by the same
    weight."""
    replace_modules(model.bert.encoder, NF4Linear, lambda nf4: plain_linear(nf4, nf4.dequantize()))


def quantize_encoder(model, compute_dtype):
    """Turn every nn.Linear of the encoder into NF4. Embeddings, LayerNorms, pooler and head stay as
    they are."""
    replace_modules(model.bert.encoder, nn.Linear, lambda linear: to_nf4(linear, compute_dtype))
