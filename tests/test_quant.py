"""NF4 against a reference written from the QLoRA paper, and the traps of training on a
4-bit base."""
import bitsandbytes as bnb
import numpy as np
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from conftest import settings, tiny_bert, tiny_inputs
from scipy.stats import norm
from torch import nn
from torch.nn import functional as F

from model import apply_method
from quant import quantize_encoder, to_nf4


def nf4_levels():
    """16 quantiles of N(0, 1): 8 above zero, 7 below, and zero itself, scaled to [-1, 1] (QLoRA,
    section 3)."""
    edge = (1 - 1 / 32 + 1 - 1 / 30) / 2
    above = norm.ppf(np.linspace(edge, 0.5, 9)[:-1])
    below = -norm.ppf(np.linspace(edge, 0.5, 8)[:-1])
    levels = np.sort(np.concatenate([above, [0], below]))
    return torch.tensor(levels / levels.max(), dtype=torch.float32)


def reference_codes(weight):
    """(codes 0..15, absmax) of each run of 64 weights."""
    blocks = weight.reshape(-1, 64)
    absmax = blocks.abs().amax(1, keepdim=True)
    return (blocks[..., None] / absmax[..., None] - nf4_levels()).abs().argmin(-1), absmax


@pytest.fixture
def pair():
    torch.manual_seed(0)
    linear = nn.Linear(128, 192)
    return linear, to_nf4(linear, torch.float32)


def test_nf4_codes_equal_the_reference_bit_for_bit(pair):
    linear, quantized = pair
    codes, _ = reference_codes(linear.weight.detach())
    # the first code is the high half of the byte
    packed = codes.flatten()[0::2] * 16 + codes.flatten()[1::2]
    assert torch.equal(quantized.weight.data.flatten(), packed.to(torch.uint8))


def test_dequantised_weight_is_level_times_absmax(pair):
    linear, quantized = pair
    codes, absmax = reference_codes(linear.weight.detach())
    dequantised = dequantize_4bit(quantized.weight.data,
                                  quantized.weight.quant_state).reshape(-1, 64)
    # double quantisation stores absmax in 8 bits: a per cent or so off, never more
    assert torch.allclose(dequantised, nf4_levels()[codes] * absmax,
                          atol=0.02 * absmax.max().item())
    assert quantized.weight.quant_state.nested and quantized.weight.quant_state.quant_type == "nf4"
    relative = (dequantised - linear.weight.detach().reshape(-1, 64)).norm() / linear.weight.norm()
    assert 0.05 < relative < 0.12


def test_forward_and_input_gradient_equal_the_dequantised_layer(pair):
    _, quantized = pair
    weight = dequantize_4bit(quantized.weight.data, quantized.weight.quant_state)
    x = torch.randn(5, 128, requires_grad=True)
    grad = torch.randn(5, 192)
    y = quantized(x)
    expected = F.linear(x, weight, quantized.bias)
    assert torch.allclose(y, expected, atol=1e-5)
    assert torch.allclose(torch.autograd.grad(y, x, grad)[0],
                          torch.autograd.grad(expected, x, grad)[0], atol=1e-5)


def qlora(compute_dtype=torch.float32):
    model = tiny_bert()
    apply_method(model, settings("--method", "qlora", "--r", 4), compute_dtype)
    return model


@pytest.mark.parametrize("compute_dtype", [torch.bfloat16, torch.float32])
def test_exactly_the_encoder_linears_are_nf4(compute_dtype):
    model = qlora(compute_dtype)
    quantized = [name for name, m in model.named_modules() if isinstance(m, bnb.nn.Linear4bit)]
    assert (len(quantized) == 2 * 6
            and all(name.startswith("bert.encoder.layer.") for name in quantized))
    for m in model.modules():
        if isinstance(m, bnb.nn.Linear4bit):
            assert (m.weight.quant_type == "nf4" and m.weight.compress_statistics
                    and m.compute_dtype is compute_dtype)
            assert (m.weight.data.dtype is torch.uint8
                    and m.weight.data.numel() == m.in_features * m.out_features // 2)
            assert not m.weight.requires_grad and not m.bias.requires_grad
    plain = tiny_bert()
    for name, p in plain.named_parameters():
        if "encoder" not in name or "LayerNorm" in name:
            assert torch.equal(p, model.get_parameter(name))


def test_gradients_still_flow_after_an_evaluation():
    model, x = qlora(), tiny_inputs()
    with torch.no_grad():
        model.eval()(**x)
        for layer in model.bert.encoder.layer:
            layer.attention.self.query.lora_B.normal_()
    for m in model.modules():
        # where the CPU offers it, bitsandbytes would repack on evaluation
        if isinstance(m, bnb.nn.Linear4bit):
            assert (not m.support_avx512bf16_for_cpu
                    and not getattr(m.weight.quant_state, "packing_format_for_cpu", False))
    model.train()(**x).loss.backward()
    assert model.bert.encoder.layer[0].attention.self.query.lora_A.grad.abs().max() > 0


def test_at_the_start_qdora_is_the_quantised_model_too():
    model, x = tiny_bert(), tiny_inputs()
    apply_method(model, settings("--method", "qdora", "--r", 4), torch.float32)
    assert torch.allclose(model(**x).logits, qlora()(**x).logits, atol=1e-6)


def test_at_the_start_qlora_is_the_quantised_model():
    plain, x = tiny_bert(), tiny_inputs()
    original = plain(**x).logits
    quantize_encoder(plain, torch.float32)
    assert (torch.equal(qlora()(**x).logits, plain(**x).logits)
            and not torch.equal(plain(**x).logits, original))


def test_answers_in_the_compute_type_under_autocast(pair):
    quantized = to_nf4(pair[0], torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert (quantized(torch.randn(3, 128)).dtype is pair[0](torch.randn(3, 128)).dtype
                is torch.bfloat16)
