"""What each method puts in, what trains, what stays frozen, and that the wiring is that of the papers."""
import copy
import re

import pytest
import torch
from conftest import METHODS, build, randomize, settings, tiny_bert, tiny_inputs
from torch.nn import functional as F
from transformers import BertConfig, BertForSequenceClassification

import fast
from adapters import Adapter
from methods import apply_method, count_params, trained_tensors
from train import make_optimizer

# --- exact counts, on the real bert-base configuration -------------------------------------------------------------

BERT_BASE = {  # flags: (method, LayerNorm, head, base); 109,483,778 is BertForSequenceClassification's own count
    ("--method", "full"): (0, 38_400, 1_538, 109_483_778 - 38_400 - 1_538),
    ("--method", "lora", "--r", 8): (294_912, 0, 1_538, 0),
    ("--method", "lora", "--r", 16): (589_824, 0, 1_538, 0),
    ("--method", "adapter", "--bottleneck", 64): (2_379_264, 38_400, 1_538, 0),
    ("--method", "adapter", "--reduction", 16): (1_789_056, 38_400, 1_538, 0),
    ("--method", "adapter", "--placement", "pfeiffer", "--reduction", 16): (894_528, 0, 1_538, 0),
}


@pytest.mark.parametrize("flags", BERT_BASE, ids=lambda flags: " ".join(map(str, flags)))
def test_counts_on_bert_base(flags):
    with torch.device("meta"):  # shapes without memory
        model = BertForSequenceClassification(BertConfig())
        apply_method(model, settings(*flags), torch.float32)
    counts = count_params(model)
    assert tuple(counts["trainable_by_kind"][k] for k in ("method", "layer_norm", "head", "base")) == BERT_BASE[flags]
    assert counts["trainable_params"] == sum(BERT_BASE[flags])
    assert counts["total_params"] == 109_483_778 + BERT_BASE[flags][0]
    assert counts["trainable_pct"] == pytest.approx(100 * counts["trainable_params"] / counts["total_params"])


def test_qlora_counts_weights_not_bytes():
    lora, qlora = count_params(build("lora")), count_params(build("qlora"))
    assert qlora == lora


# --- which tensors train -------------------------------------------------------------------------------------------

LAYER = r"bert\.encoder\.layer\.\d+\."
KEYS = {
    "full": r".*",
    "lora": LAYER + r"attention\.self\.(query|value)\.lora_[AB]|classifier\.(weight|bias)",
    "houlsby": LAYER + r"(attention\.)?output\.(adapter\.(down|up)|LayerNorm)\.(weight|bias)"
               r"|bert\.embeddings\.LayerNorm\.(weight|bias)|classifier\.(weight|bias)",
    "pfeiffer": LAYER + r"output\.adapter\.(down|up)\.(weight|bias)|classifier\.(weight|bias)",
}
KEYS["qlora"] = KEYS["lora"]
N_KEYS = {"full": 41, "lora": 2 * 4 + 2, "qlora": 2 * 4 + 2, "houlsby": 2 * (8 + 4) + 2 + 2, "pfeiffer": 2 * 4 + 2}


@pytest.mark.parametrize("method", METHODS)
def test_exact_trainable_key_set(method):
    model = build(method)
    keys = set(trained_tensors(model))
    assert keys == {name for name, _ in model.named_parameters() if re.fullmatch(KEYS[method], name)}
    assert len(keys) == N_KEYS[method]
    in_optimizer = [p for group in make_optimizer(list(trained_tensors(model).values()), 1e-3).param_groups for p in group["params"]]
    assert len(in_optimizer) == len(keys) and {id(p) for p in in_optimizer} == {id(p) for p in trained_tensors(model).values()}


@pytest.mark.parametrize("method", METHODS)
def test_frozen_stays_bit_equal_and_everything_trainable_moves(method):
    model = build(method)
    fast.install(model)
    model.train()
    before = copy.deepcopy(dict(model.named_parameters()))
    optimizer = make_optimizer(list(trained_tensors(model).values()), 1e-3)
    for step in range(4):  # B = 0 and m = 0 at the start: A moves from the second step on
        model(**tiny_inputs(step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, p in model.named_parameters():
        same = p.dtype == before[name].dtype and torch.equal(p, before[name])
        assert same != p.requires_grad, f"{name}: {'did not move' if same else 'is frozen but moved'}"


def test_qlora_starts_from_the_a_of_lora():
    lora, qlora = trained_tensors(build("lora")), trained_tensors(build("qlora"))
    assert lora.keys() == qlora.keys() and all(torch.equal(lora[k], qlora[k]) for k in lora)


def test_all_methods_start_from_the_same_head():
    plain = tiny_bert()
    for method in METHODS:
        assert torch.equal(build(method).classifier.weight, plain.classifier.weight)


# --- the equations -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("method", ["lora", "pfeiffer", "houlsby"])
def test_identity_at_the_start(method):
    plain, model, x = tiny_bert(), build(method), tiny_inputs()
    if method != "lora":  # with Up = 0 an adapter is the identity; its own start is close to that
        h = torch.randn(100, 64)
        for module in model.modules():
            if isinstance(module, Adapter):
                assert 0 < module(h).norm() / h.norm() < {"houlsby": 1e-4, "pfeiffer": 0.05}[method]
        for name, p in trained_tensors(model).items():
            if ".up." in name:
                p.data.zero_()
    assert torch.equal(model(**x).logits, plain(**x).logits)
    assert not torch.allclose(randomize(model)(**x).logits, plain(**x).logits, atol=1e-2)


def test_lora_equation_and_initialisation():
    model = build("lora")
    q = model.bert.encoder.layer[0].attention.self.query
    assert q.lora_A.shape == (4, 64) and q.lora_B.shape == (64, 4) and not q.lora_B.any()
    assert 0.9 / 8 < q.lora_A.abs().max() <= 1 / 8  # U(-1/sqrt(in), 1/sqrt(in)), in = 64
    randomize(model)
    x = torch.randn(3, 5, 64)
    delta = 12 / 4 * q.lora_B @ q.lora_A
    assert torch.allclose(q(x), x @ (q.base.weight + delta).T + q.base.bias, atol=1e-5)
    for layer in model.bert.encoder.layer:
        assert type(layer.attention.self.key).__name__ == "Linear"


def test_lora_dropout_is_on_the_low_rank_branch_only():
    q = build("lora").bert.encoder.layer[0].attention.self.query
    x = torch.randn(3, 5, 64)
    with torch.no_grad():
        assert torch.equal(q.train()(x), q.base(x))  # B = 0: whatever dropout did, the base path did not see it
        q.lora_B.normal_()
        assert not torch.allclose(q(x), q(x)) and torch.equal(q.eval()(x), q(x))


def bottleneck(adapter, x, act):
    return act(x @ adapter.down.weight.T + adapter.down.bias) @ adapter.up.weight.T + adapter.up.bias


def test_houlsby_wiring_against_a_written_out_layer():
    layer = randomize(build("houlsby")).bert.encoder.layer[1]
    gelu = lambda x: 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x ** 3)))
    for module in layer.attention.output, layer.output:
        h, a = torch.randn(2, 7, module.dense.in_features), torch.randn(2, 7, 64)
        dense = module.dense(h)
        expected = module.LayerNorm(dense + bottleneck(module.adapter, dense, gelu) + a)
        assert torch.allclose(module(h, a), expected, atol=1e-5)
        assert not torch.allclose(expected, module.LayerNorm(dense + a), atol=1e-2)


def test_pfeiffer_wiring_against_a_written_out_layer():
    layer = randomize(build("pfeiffer")).bert.encoder.layer[1]
    module = layer.output
    h, a = torch.randn(2, 7, 128), torch.randn(2, 7, 64)
    dense = module.dense(h)
    u = module.LayerNorm(dense + a)
    expected = module.LayerNorm(dense + bottleneck(module.adapter, u, F.relu) + a)
    assert torch.allclose(module(h, a), expected, atol=1e-5)
    skip_after_norm = module.LayerNorm(u + bottleneck(module.adapter, u, F.relu) + a)
    assert not torch.allclose(expected, skip_after_norm, atol=1e-2)
    assert type(layer.attention.output).__name__ == "BertSelfOutput"


@pytest.mark.parametrize("method, std, cut", [("houlsby", 0.88e-3, 2e-3), ("pfeiffer", 0.02, None)])
def test_adapter_initialisation(method, std, cut):
    weights = torch.cat([p.detach().flatten() for n, p in build(method).named_parameters() if ".adapter." in n and "weight" in n])
    biases = [p for n, p in build(method).named_parameters() if ".adapter." in n and "bias" in n]
    assert weights.std() == pytest.approx(std, rel=0.05) and not any(b.any() for b in biases)
    assert cut is None or weights.abs().max() <= cut
