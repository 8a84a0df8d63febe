"""What each method puts in, what trains, what stays frozen, and that the wiring is that of
the papers."""
import copy
import functools
import re
from types import SimpleNamespace

import adapters_reference
import pytest
import torch
from conftest import BUILDS, METHODS, ROOT, build, randomize, settings, tiny_bert, tiny_inputs
from safetensors.torch import load_file
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from transformers import BertConfig, BertForQuestionAnswering, BertForSequenceClassification

import fast
from adapters import Adapter, put_houlsby, put_pfeiffer
from lora import DoRALinear, LoRALinear, frozen_weight, merge_lora
from model import apply_method, count_params, trained_tensors
from quant import to_nf4
from train import make_optimizer

# --- exact counts, on the real bert-base configuration --------------------------------------------

# flags: (method, LayerNorm, head, base); 109,483,778 is BertForSequenceClassification's own count
BERT_BASE = {
    ("--method", "full"): (0, 38_400, 1_538, 109_483_778 - 38_400 - 1_538),
    ("--method", "lora", "--r", 8): (294_912, 0, 1_538, 0),
    ("--method", "lora", "--r", 16): (589_824, 0, 1_538, 0),
    ("--method", "dora", "--r", 8): (313_344, 0, 1_538, 0),
    ("--method", "dora", "--r", 16): (608_256, 0, 1_538, 0),
    ("--method", "lora", "--r", 8, "--targets", "query", "value"): (294_912, 0, 1_538, 0),
    ("--method", "lora", "--r", 8, "--targets", "attention"): (589_824, 0, 1_538, 0),
    ("--method", "lora", "--r", 8, "--targets", "all"): (1_327_104, 0, 1_538, 0),
    ("--method", "dora", "--r", 8, "--targets", "attention"): (626_688, 0, 1_538, 0),
    ("--method", "dora", "--r", 8, "--targets", "all"): (1_410_048, 0, 1_538, 0),
    ("--method", "adapter", "--bottleneck", 64): (2_379_264, 38_400, 1_538, 0),
    ("--method", "adapter", "--reduction", 16): (1_789_056, 38_400, 1_538, 0),
    ("--method", "adapter", "--placement", "pfeiffer", "--reduction", 16): (894_528, 0, 1_538, 0),
    # 102,912 biases, the pooler's 768 included: the paper's 0.1 M, or 0.09 %
    ("--method", "bitfit"): (0, 19_200, 1_538, 102_912 - 19_200),
    ("--method", "head"): (0, 0, 1_538, 0),
}


@functools.cache
def bert_base(head_class):
    with torch.device("meta"):  # shapes without memory
        return head_class(BertConfig())


def counts_on_bert_base(head_class, *flags):
    model = copy.deepcopy(bert_base(head_class))
    with torch.device("meta"):
        apply_method(model, settings(*flags), torch.float32)
    return count_params(model)


@pytest.mark.parametrize("flags", BERT_BASE, ids=lambda flags: " ".join(map(str, flags)))
def test_counts_on_bert_base(flags):
    counts = counts_on_bert_base(BertForSequenceClassification, *flags)
    assert tuple(counts["trainable_by_kind"][k]
                 for k in ("method", "layer_norm", "head", "base")) == BERT_BASE[flags]
    assert counts["trainable_params"] == sum(BERT_BASE[flags])
    assert counts["total_params"] == 109_483_778 + BERT_BASE[flags][0]
    assert counts["trainable_pct"] == pytest.approx(
        100 * counts["trainable_params"] / counts["total_params"])


QA = 109_483_778 - 590_592  # no pooler; the head has two outputs in both


@pytest.mark.parametrize("method, flags, trained",
                         [("full", [], QA), ("lora", ["--r", 16], 589_824 + 1_538),
                          ("dora", ["--r", 16], 608_256 + 1_538),
                          ("lora", ["--r", 8, "--targets", "all"], 1_327_104 + 1_538),
                          ("bitfit", [], 102_144 + 1_538), ("head", [], 1_538)])
def test_counts_on_bert_base_for_question_answering(method, flags, trained):
    counts = counts_on_bert_base(BertForQuestionAnswering, "--method", method, *flags,
                                 "--task", "squad")
    assert counts["trainable_params"] == trained and counts["trainable_by_kind"]["head"] == 1_538
    assert counts["total_params"] == QA + counts["trainable_by_kind"]["method"]


@pytest.mark.parametrize("method", [name for name in BUILDS if name.startswith(("lora", "dora"))])
def test_4_bit_methods_count_weights_not_bytes(method):
    assert count_params(build("q" + method)) == count_params(build(method))


# --- which tensors train --------------------------------------------------------------------------

LAYER = r"bert\.encoder\.layer\.\d+\."
KEYS = {
    "full": r".*",
    "lora": LAYER + r"attention\.self\.(query|value)\.lora_[AB]|classifier\.(weight|bias)",
    "houlsby": LAYER + r"(attention\.)?output\.(adapter\.(down|up)|LayerNorm)\.(weight|bias)"
               r"|bert\.embeddings\.LayerNorm\.(weight|bias)|classifier\.(weight|bias)",
    "pfeiffer": LAYER + r"output\.adapter\.(down|up)\.(weight|bias)|classifier\.(weight|bias)",
    "bitfit": r".*\.bias|classifier\.weight",
    "head": r"classifier\.(weight|bias)",
    "lora attention": LAYER + r"attention\.(self\.(query|key|value)|output\.dense)\.lora_[AB]"
                      r"|classifier\.(weight|bias)",
    "lora all": LAYER + r"(attention\.self\.(query|key|value)|attention\.output\.dense"
                r"|intermediate\.dense|output\.dense)\.lora_[AB]|classifier\.(weight|bias)",
}
N_KEYS = {"full": 41, "lora": 2 * 4 + 2, "dora": 2 * 6 + 2, "houlsby": 2 * (8 + 4) + 2 + 2,
          "pfeiffer": 2 * 4 + 2, "bitfit": 2 * 8 + 2 + 2, "head": 2,
          "lora attention": 2 * 8 + 2, "dora attention": 2 * 12 + 2,
          "lora all": 2 * 12 + 2, "dora all": 2 * 18 + 2}
for where in "", " attention", " all":
    KEYS[f"dora{where}"] = KEYS[f"lora{where}"].replace("lora_[AB]", "(lora_[AB]|magnitude)")
    for method in "lora", "dora":
        KEYS[f"q{method}{where}"] = KEYS[f"{method}{where}"]
        N_KEYS[f"q{method}{where}"] = N_KEYS[f"{method}{where}"]


@pytest.mark.parametrize("method", BUILDS)
def test_exact_trainable_key_set(method):
    model = build(method)
    keys = set(trained_tensors(model))
    in_qa = set(trained_tensors(build(method, BertForQuestionAnswering)))
    assert in_qa == {k.replace("classifier", "qa_outputs") for k in keys if "pooler" not in k}
    assert keys == {name for name, _ in model.named_parameters()
                    if re.fullmatch(KEYS[method], name)}
    assert len(keys) == N_KEYS[method]
    groups = make_optimizer(list(trained_tensors(model).values()), 1e-3).param_groups
    in_optimizer = [p for group in groups for p in group["params"]]
    assert (len(in_optimizer) == len(keys)
            and {id(p) for p in in_optimizer} == {id(p) for p in trained_tensors(model).values()})


@pytest.mark.parametrize("method", BUILDS)
def test_frozen_stays_bit_equal_and_everything_trainable_moves(method):
    model = build(method)
    fast.install(model)
    model.train()
    before = copy.deepcopy(dict(model.named_parameters()))
    optimizer = make_optimizer(list(trained_tensors(model).values()), 1e-3)
    for step in range(2):  # B = 0 at the start: A moves from the second step on
        model(**tiny_inputs(step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, p in model.named_parameters():
        same = p.dtype == before[name].dtype and torch.equal(p, before[name])
        assert same != p.requires_grad, (
            f"{name}: {'did not move' if same else 'is frozen but moved'}")


@pytest.mark.parametrize("method", ["qlora", "dora", "qdora"])
def test_low_rank_methods_start_from_the_a_of_lora(method):
    lora, other = trained_tensors(build("lora")), trained_tensors(build(method))
    assert lora.keys() <= other.keys() and all(torch.equal(lora[k], other[k]) for k in lora)


def test_all_methods_start_from_the_same_head():
    plain = tiny_bert()
    for method in METHODS:
        assert torch.equal(build(method).classifier.weight, plain.classifier.weight)


# --- the equations --------------------------------------------------------------------------------

@pytest.mark.parametrize("method", ["lora", "dora", "pfeiffer", "houlsby"])
def test_identity_at_the_start(method):
    plain, model, x = tiny_bert(), build(method), tiny_inputs()
    # with Up = 0 an adapter is the identity; its own start is close to that
    if method in ("pfeiffer", "houlsby"):
        h = torch.randn(100, 64)
        for module in model.modules():
            if isinstance(module, Adapter):
                assert 0 < module(h).norm() / h.norm() < {"houlsby": 1e-4, "pfeiffer": 0.05}[method]
        for name, p in trained_tensors(model).items():
            if ".up." in name:
                p.data.zero_()
    # m / ||W0|| is 1 exactly, but b is taken away and added again: equal up to rounding
    if method == "dora":
        assert torch.allclose(model(**x).logits, plain(**x).logits, atol=1e-6)
    else:
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
        # B = 0: whatever dropout did, the base path did not see it
        assert torch.equal(q.train()(x), q.base(x))
        q.lora_B.normal_()
        assert not torch.allclose(q(x), q(x)) and torch.equal(q.eval()(x), q(x))


# DoRA on a layer that is not square, with a bias, alpha != r, B and m far from their start: at the
# start most mistakes (norm over the wrong dimension, scaled bias, scaling left out of the norm) are
# invisible.

def dora_layer(base=None, dropout=0.0):
    torch.manual_seed(0)
    layer = DoRALinear(base or nn.Linear(64, 192), r=4, alpha=12, dropout=dropout)
    with torch.no_grad():
        layer.lora_B.normal_()
        layer.magnitude.mul_(torch.rand(192) + 0.5)
    return layer


def written_out_dora(layer, x, detach=True):
    """h = W' x + b with W' = m (W0 + s B A) / ||W0 + s B A||, the slow way, one row of W'
    at a time."""
    updated = frozen_weight(layer.base) + 12 / 4 * layer.lora_B @ layer.lora_A
    norms = torch.stack([row.pow(2).sum().sqrt() for row in updated])
    norms = norms.detach() if detach else norms
    rows = [m * row / norm for m, row, norm in zip(layer.magnitude, updated, norms)]
    return torch.stack([x @ row for row in rows], -1) + layer.base.bias, torch.stack(rows)


def test_dora_of_a_pruned_row_is_no_nan():
    base = nn.Linear(64, 192)
    with torch.no_grad():
        base.weight[7] = 0
    layer = DoRALinear(base, r=4, alpha=12, dropout=0.1)
    x = torch.randn(5, 64)
    optimizer = torch.optim.AdamW([layer.lora_A, layer.lora_B, layer.magnitude], lr=0.1)
    for _ in range(3):
        layer(x).square().sum().backward()
        optimizer.step()
    assert not torch.allclose(layer(x), base(x), atol=0.1)
    assert torch.allclose(layer.eval()(x)[:, 7], base.bias[7])
    assert layer.merged_weight().isfinite().all() and not layer.merged_weight()[7].any()


@pytest.mark.parametrize("kind", ["fp32", "nf4"])
def test_dora_forward_merge_and_gradients_equal_the_written_out_layer(kind):
    base = nn.Linear(64, 192)
    layer = dora_layer(to_nf4(base, torch.float32) if kind == "nf4" else base)
    x, grad = torch.randn(3, 5, 64, requires_grad=True), torch.randn(3, 5, 192)
    h, (expected, weight) = layer(x), written_out_dora(layer, x)
    assert torch.allclose(h, expected, atol=1e-5)
    assert torch.allclose(layer.merged_weight(), weight, atol=1e-5)
    # rows of W' have norm m
    assert torch.allclose(layer.merged_weight().norm(dim=1), layer.magnitude, atol=1e-5)
    # merged = unmerged
    assert torch.allclose(h, F.linear(x, layer.merged_weight(), layer.base.bias), atol=1e-5)
    assert not torch.allclose(h, layer.base(x), atol=0.1)
    tensors = [layer.lora_A, layer.lora_B, layer.magnitude, x]
    got = torch.autograd.grad(h, tensors, grad)
    for name, a, b in zip(("A", "B", "m", "x"), got, torch.autograd.grad(expected, tensors, grad)):
        assert torch.allclose(a, b, atol=1e-5 * b.abs().max().item()), name
    undetached = torch.autograd.grad(written_out_dora(layer, x, detach=False)[0], tensors, grad)
    for name, a, b, same in zip(("A", "B", "m"), got, undetached, (False, False, True)):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-4) == same, name


def test_dora_dropout_leaves_w0_x_alone():
    """W0 x + b + (g - 1) W0 dropout(x) + g s B A dropout(x): with m = ||W0 + s B A||, g is 1."""
    layer = dora_layer(dropout=0.5)
    x = torch.randn(3, 5, 64)
    with torch.no_grad():
        assert not torch.allclose(layer(x), layer(x)) and torch.equal(layer.eval()(x), layer(x))
        mask = 2.0 * (torch.rand(3, 5, 64) < 0.5)
        layer.dropout = nn.Identity()
        layer.dropout.p, layer.dropout.forward = 0.5, lambda x: x * mask
        layer.train()
        g = layer.magnitude / layer.row_norms()
        w, s = layer.base.weight, 12 / 4
        expected = (x @ w.T + layer.base.bias + (g - 1) * ((x * mask) @ w.T)
                    + g * s * ((x * mask) @ layer.lora_A.T @ layer.lora_B.T))
        assert torch.allclose(layer(x), expected, atol=1e-4)
        layer.lora_B.zero_()
        layer.magnitude.copy_(layer.row_norms())
        assert torch.allclose(layer(x), layer.base(x), atol=1e-5)


def test_dora_under_autocast_answers_in_bf16_with_an_fp32_norm():
    layer, x = dora_layer(), torch.randn(3, 64)
    norms, expected = layer.row_norms(), written_out_dora(layer, x)[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.row_norms(), norms) and layer.row_norms().dtype is torch.float32
        assert layer(x).dtype is layer.base(x).dtype is torch.bfloat16
        assert (layer(x) - expected).norm() < 0.01 * expected.norm()


def test_lora_merged_equals_unmerged():
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(64, 192), r=4, alpha=12, dropout=0.1).eval()
    nn.init.normal_(layer.lora_B)
    x = torch.randn(3, 5, 64)
    assert torch.allclose(layer(x), F.linear(x, layer.merged_weight(), layer.base.bias), atol=1e-4)
    assert not torch.allclose(layer(x), layer.base(x), atol=0.1)


def far(a, b):
    """The distance of two tensors, as a share of the second."""
    return ((a - b).norm() / b.norm()).item()


def updated_weights(model):
    """{name: W' of plain BERT} of every layer that LoRA or DoRA is on, written out, with a way back
    for gradients; and the head."""
    weights = {f"classifier.{name}": p for name, p in model.classifier.named_parameters()}
    for path, module in model.named_modules():
        if isinstance(module, LoRALinear):
            w = module.base.weight + 12 / 4 * module.lora_B @ module.lora_A
            if isinstance(module, DoRALinear):
                w = module.magnitude[:, None] * w / w.norm(dim=1, keepdim=True).detach()
            weights[f"{path}.weight"] = w
    return weights


@pytest.mark.parametrize("targets, n", [("", 2), (" attention", 4), (" all", 6)])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_logits_and_gradients_are_those_of_plain_bert_with_the_updated_weights(method, targets, n):
    model, x = randomize(build(method + targets), 0.05), tiny_inputs()
    weights, tensors = updated_weights(model), list(trained_tensors(model).values())
    assert len(weights) == 2 * n + 2
    got, expected = model(**x), functional_call(tiny_bert(), weights, kwargs=x)
    assert far(got.logits, tiny_bert()(**x).logits) > 1e-2
    assert far(got.logits, expected.logits) < 1e-6
    for a, b in zip(*(torch.autograd.grad(out.loss, tensors) for out in (got, expected))):
        assert (a - b).abs().max() < 1e-6 and far(a, b) < 3e-6


@pytest.mark.parametrize("targets, names", [
    ("", ["query", "value"]), (" attention", r".*\.(query|key|value|attention\.output\.dense)"),
    (" all", r"bert\.encoder\..*\.(query|key|value|dense)")])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_logits_and_gradients_are_those_of_peft(method, targets, names):
    peft = pytest.importorskip("peft")
    ours, x = randomize(build(method + targets), 0.05), tiny_inputs()
    config = peft.LoraConfig(r=4, lora_alpha=12, target_modules=names, use_dora=method == "dora")
    theirs = peft.get_peft_model(tiny_bert(), config).base_model.model.eval()
    theirs.classifier.requires_grad_(True)

    def their_name(name):
        return re.sub(r"(lora_[AB]|lora_magnitude_vector)$", r"\1.default.weight",
                      name.replace("magnitude", "lora_magnitude_vector"))

    own, other = trained_tensors(ours), trained_tensors(theirs)
    assert {their_name(name) for name in own} == set(other)
    with torch.no_grad():
        for name, p in own.items():
            other[their_name(name)].copy_(p)
    got, expected = ours(**x), theirs(**x)
    assert far(got.logits, expected.logits) < 1e-6
    grads = torch.autograd.grad(got.loss, list(own.values()))
    other_grads = torch.autograd.grad(expected.loss, [other[their_name(name)] for name in own])
    for name, a, b in zip(own, grads, other_grads):
        assert (a - b).abs().max() < 1e-6 and far(a, b) < 3e-6, name


def test_the_key_s_bias_is_the_one_that_bitfit_trains_for_nothing():
    """q (k + b) = q k + q b adds the same to every score of a query, which softmax takes away."""
    model, x = randomize(build("bitfit")), tiny_inputs()
    before = model(**x).logits
    for name, moves in ("key", False), ("query", True), ("value", True):
        with torch.no_grad():
            model.bert.encoder.layer[0].attention.self.get_submodule(name).bias.normal_()
        assert torch.allclose(model(**x).logits, before, atol=1e-5) is not moves


@pytest.mark.parametrize("method", [name for name in BUILDS if "lora" in name or "dora" in name])
def test_merged_model_is_plain_bert_with_the_same_answers(method):
    model, x = randomize(build(method)), tiny_inputs()
    before, base = model(**x).logits, build(method)(**x).logits
    merge_lora(model)
    assert not any(isinstance(module, LoRALinear) for module in model.modules())
    for layer in model.bert.encoder.layer:
        assert type(layer.attention.self.query) is type(layer.attention.self.value) is nn.Linear
    assert (torch.allclose(model(**x).logits, before, atol=1e-5)
            and not torch.allclose(before, base, atol=0.1))
    once = copy.deepcopy(model.state_dict())
    merge_lora(model)  # a second time there is nothing left to merge
    assert all(torch.equal(tensor, once[name]) for name, tensor in model.state_dict().items())


def bottleneck(adapter, x, act):
    return (act(x @ adapter.down.weight.T + adapter.down.bias) @ adapter.up.weight.T
            + adapter.up.bias)


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


@pytest.mark.parametrize("kind, put", [("houlsby", put_houlsby), ("pfeiffer", put_pfeiffer)])
def test_adapters_give_what_the_library_adapters_gives(kind, put):
    kept = load_file(ROOT / "tests" / "adapters_reference.safetensors")
    model = BertForSequenceClassification(BertConfig(**adapters_reference.CONFIG))
    put(model, SimpleNamespace(bottleneck=adapters_reference.BOTTLENECK))
    model = model.double().eval()
    of_base = {name.removeprefix("base."): p for name, p in kept.items()
               if name.startswith("base.")}
    own = {name.removeprefix(f"{kind}.").replace("adapters.it.adapter_down.0", "adapter.down")
           .replace("adapters.it.adapter_up", "adapter.up"): p
           for name, p in kept.items() if name.startswith(f"{kind}.encoder")}
    model.bert.load_state_dict(of_base | own)  # each tensor has its place

    def distance():
        out = model.bert(kept["ids"], attention_mask=kept["mask"]).last_hidden_state
        return (out - kept[f"{kind}.out"]).abs().max()

    assert distance() < 1e-12
    for name, p in model.named_parameters():
        if ".adapter." in name:
            p.data.zero_()
    assert distance() > 0.1  # without them it is another function


@pytest.mark.parametrize("method, std, cut", [("houlsby", 0.88e-3, 2e-3), ("pfeiffer", 0.02, None)])
def test_adapter_initialisation(method, std, cut):
    weights = torch.cat([p.detach().flatten() for n, p in build(method).named_parameters()
                         if ".adapter." in n and "weight" in n])
    biases = [p for n, p in build(method).named_parameters() if ".adapter." in n and "bias" in n]
    assert weights.std() == pytest.approx(std, rel=0.05) and not any(b.any() for b in biases)
    assert cut is None or weights.abs().max() <= cut
