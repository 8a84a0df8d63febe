"""The fast dropout is dropout: right rate, right scale, independent, seeded; the fast attention is
attention."""
import contextlib
import inspect
import platform
import subprocess
import sys

import pytest
import torch
from conftest import METHODS, ROOT, build, randomize, settings, tiny_bert, tiny_inputs
from torch import nn

import data
import fast
import methods
import model as model_module
from checks import warmup_steps
from model import apply_method, trained_tensors
from model import build as build_model
from tools.bench import TRICKS
from train import make_optimizer, step


@pytest.mark.parametrize("p", [0.1, 0.5, 0.99])  # the last: the largest of --dropout
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mask_has_the_rate_and_scale_of_dropout(p, dtype):
    torch.manual_seed(0)
    x = torch.empty(1001, 999, dtype=dtype)
    mask = fast.dropout_mask(x, p)
    assert mask.dtype is dtype and mask.shape == x.shape
    assert set(mask.unique().tolist()) == {0.0, torch.tensor(1 / (1 - p), dtype=dtype).item()}
    n, dropped = mask.numel(), (mask == 0).float().mean().item()
    assert abs(dropped - p) < 5 * (p * (1 - p) / n) ** 0.5  # five standard errors
    flat = (mask.flatten() == 0).float()
    # four elements share one random number: they must not know of each other
    for lag in 1, 2, 3, 4:
        both = (flat[lag:] * flat[:-lag]).mean().item()
        assert abs(both - p * p) < 5 * (p * p * (1 - p * p) / n) ** 0.5


def test_masks_of_one_seed_and_of_neighbouring_seeds_know_nothing_of_each_other():
    x, p, masks = torch.empty(1000, 1000), 0.3, []
    for seed in 0, 1:
        torch.manual_seed(seed)
        masks += [(fast.dropout_mask(x, p) == 0).float() for _ in range(3)]
    n, sd = x.numel(), (p * p * (1 - p * p)) ** 0.5
    for i, one in enumerate(masks):
        for other in masks[:i]:
            assert abs((one * other).mean().item() - p * p) < 5 * sd / n ** 0.5


def test_every_process_of_every_seed_draws_masks_of_its_own(monkeypatch):
    masks = []
    for seed, rank in (0, 0), (0, 1), (0, 2), (1, 0), (1, 1):
        monkeypatch.setattr(model_module, "RANK", rank)
        s, bert = settings("--method", "head", "--seed", seed), tiny_bert()
        torch.manual_seed(seed)
        build_model(bert, s, torch.device("cpu"))
        masks.append(fast.dropout_mask(torch.empty(1000), 0.5))
    assert len({tuple(mask.tolist()) for mask in masks}) == 5


def test_a_warm_up_that_covers_every_step_is_said(capsys):
    assert warmup_steps(0.1, 100) == 10 and warmup_steps(0.1, 11) == 2 and warmup_steps(0, 1) == 0
    assert not capsys.readouterr().err
    assert (warmup_steps(0.1, 1), warmup_steps(1, 7)) == (1, 7)
    assert capsys.readouterr().err.count("warning: the warm-up covers every step") == 2


def test_random_bits_are_uniform():
    torch.manual_seed(0)
    counts = torch.bincount(fast.random_bits(65536 * 64).long() + 32768, minlength=65536)
    # chi squared with 65,535 degrees of freedom: five standard deviations of sqrt(2 * 65,535)
    assert abs(((counts - 64) ** 2 / 64).sum().item() - 65535) < 5 * 362
    for n in 0, 1, 2, 3, 5:
        assert fast.random_bits(n).shape == (n,)


def test_mask_obeys_the_seed():
    x = torch.empty(1000)
    torch.manual_seed(3)
    first = fast.dropout_mask(x, 0.1)
    assert not torch.equal(first, fast.dropout_mask(x, 0.1))
    torch.manual_seed(3)
    assert torch.equal(first, fast.dropout_mask(x, 0.1))


@pytest.fixture(params=METHODS)
def pair(request):
    """(the method on Hugging Face's own modules, the same model made fast), every trained tensor
    moved from its start."""
    plain, quick = (randomize(build(request.param)) for _ in range(2))
    fast.install(quick)
    return plain, quick


def test_fast_model_is_the_same_model_in_evaluation_and_drops_in_training(pair):
    plain, quick = pair
    x = tiny_inputs()
    assert not any(type(m) is nn.Dropout for m in quick.modules())
    assert list(quick.state_dict()) == list(plain.state_dict())
    assert torch.allclose(quick(**x).logits, plain(**x).logits, atol=1e-5)
    quick.train()
    assert not torch.allclose(quick(**x).logits, quick(**x).logits, atol=1e-3)


def test_gradients_are_the_same_without_dropout(pair):
    for model in pair:
        model(**tiny_inputs()).loss.backward()  # evaluation mode: no dropout
    plain, quick = (trained_tensors(model) for model in pair)
    for name, p in plain.items():
        assert p.grad.any() and torch.allclose(p.grad, quick[name].grad, atol=1e-5), name


@pytest.mark.parametrize("without", ["cls_only", "cheap_dropout"])
def test_each_trick_can_be_left_out_and_changes_no_answer(without):
    model, less = (randomize(build("houlsby")) for _ in range(2))
    fast.install(model)
    fast.install(less, [without])
    assert any(type(m) is nn.Dropout for m in less.modules()) is (without == "cheap_dropout")
    assert ("forward" in vars(less.bert.encoder.layer[-1])) is (without != "cls_only")
    for m in model, less:
        m(**tiny_inputs()).loss.backward()
    for name, p in trained_tensors(model).items():
        assert torch.allclose(p.grad, trained_tensors(less)[name].grad, atol=1e-5), name
    less.train()
    assert not torch.allclose(less(**tiny_inputs()).logits, less(**tiny_inputs()).logits, atol=1e-3)


@pytest.mark.parametrize("method", ["full", "lora", "dora", "houlsby"])
def test_one_cast_gives_the_same_bits_as_three(method):
    once, thrice = (randomize(build(method)) for _ in range(2))
    fast.install(once)
    fast.install(thrice, ["cast_once"])
    with torch.autocast("cpu", torch.bfloat16):
        out = [model(**tiny_inputs()) for model in (once, thrice)]
    assert torch.equal(out[0].logits, out[1].logits)
    for o in out:
        o.loss.backward()
    one, three = (torch.cat([p.grad.flatten() for p in trained_tensors(model).values()])
                  for model in (once, thrice))
    # the three's gradients are added up in 16 bits
    assert one.any() and (one - three).norm() < 0.01 * three.norm()
    seen = []
    for model in once, thrice:
        query = model.bert.encoder.layer[0].attention.self.query
        query.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
        with torch.autocast("cpu", torch.bfloat16):
            model(**tiny_inputs())
    assert seen == [torch.bfloat16, torch.float32]


@pytest.mark.parametrize("without", [[], ["kept_memory"]])
def test_memory_is_kept_unless_it_is_left_out(without, monkeypatch):
    calls = []
    monkeypatch.setattr(fast, "keep_memory", lambda: calls.append(1))
    fast.install(tiny_bert(), without)
    assert len(calls) == (not without)


# A new process: the heap of this one may have a hole of 36 MB, which is used before more is mapped.
FAULTS = f"""
import ctypes
import resource

M_TRIM_THRESHOLD, M_MMAP_MAX = {fast.M_TRIM_THRESHOLD}, {fast.M_MMAP_MAX}
{inspect.getsource(fast.keep_memory)}
libc, size = ctypes.CDLL(None), ctypes.c_size_t(36 * 2**20)
libc.malloc.restype = ctypes.c_void_p

def faults():
    # up to nine times glibc splits the block for small ones first
    for _ in range(40):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        block = ctypes.c_void_p(libc.malloc(size))
        libc.memset(block, 1, size)
        libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

usual = faults()
keep_memory()
print(usual, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_kept_memory_is_not_mapped_anew():
    done = subprocess.run([sys.executable, "-c", FAULTS], cwd=ROOT, capture_output=True, text=True,
                          check=True)
    usual, kept = map(int, done.stdout.split())
    assert kept < 10 < usual


@pytest.mark.parametrize("method", ["lora", "houlsby", "pfeiffer"])
def test_frozen_weights_in_16_bits_are_what_autocast_computes_with(method):
    half, single = (tiny_bert() for _ in range(2))
    for model, half_weights in (half, True), (single, False):
        torch.manual_seed(3)
        apply_method(model, settings(*METHODS[method]), torch.bfloat16, half_weights=half_weights)
    assert {p.dtype for p in half.bert.encoder.parameters()} == {torch.float32, torch.bfloat16}
    assert ({p.dtype for p in single.parameters()}
            == {p.dtype for p in trained_tensors(half).values()} == {torch.float32})
    out = []
    for model in half, single:
        randomize(model)
        with torch.autocast("cpu", torch.bfloat16):
            out.append(model(**tiny_inputs()))
        out[-1].loss.backward()
    assert torch.equal(out[0].logits, out[1].logits)
    for name, p in trained_tensors(half).items():
        assert p.grad.any() and torch.equal(p.grad, trained_tensors(single)[name].grad), name


def test_dora_on_16_bit_weights_starts_as_these_weights():
    model = tiny_bert()
    apply_method(model, settings(*METHODS["dora"]), torch.bfloat16)
    layer = model.bert.encoder.layer[0].attention.self.query
    assert layer.base.weight.dtype is torch.bfloat16 and layer.magnitude.dtype is torch.float32
    assert torch.equal(layer.magnitude, layer.row_norms())


class RandomTokens(data.Encoded):
    """Rows of 16 tokens of the tiny BERT."""

    def __init__(self, n):
        self.ids = torch.randint(50, (n, 16))

    def collate(self, rows):
        ids = self.ids[rows]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids),
                "labels": torch.zeros(len(rows), dtype=torch.int64)}


@pytest.mark.parametrize("method", ["full", "lora", "dora", "houlsby"])
def test_no_trick_changes_the_losses_of_20_steps(method):
    losses = {}
    flags = ["--dropout", 0] if "dropout" in methods.METHODS[method].flags else []
    for without in (), tuple(TRICKS):
        model, cpu = tiny_bert(), torch.device("cpu")
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        torch.manual_seed(0)
        s = settings(*METHODS[method], *flags)
        model = build_model(model, s, cpu, without=without).train()
        split = RandomTokens(80)
        optimizer = make_optimizer(list(trained_tensors(model).values()), 1e-3,
                                   fused="fused_adamw" not in without)
        scaler, batches = torch.amp.GradScaler("cpu", enabled=False), torch.arange(80).view(20, 4)
        losses[without] = [step(model, optimizer, split, batch.numpy(), cpu,
                                contextlib.nullcontext(), scaler).item() for batch in batches]
    quick, plain = losses.values()
    assert len(set(quick)) == 20 and quick == pytest.approx(plain, abs=1e-5)


def test_attention_weights_are_dropped():
    torch.manual_seed(0)
    q, k = torch.randn(2, 4, 6, 8), torch.randn(2, 4, 6, 8)
    values = torch.eye(6).expand(2, 4, 6, 6)  # with V = I the output is the weights
    weights, _ = fast.attention(None, q, k, values, None, scaling=8 ** -0.5, dropout=0.5)
    exact = (q @ k.transpose(2, 3) * 8 ** -0.5).softmax(-1).transpose(1, 2)
    kept = weights != 0
    assert 0.3 < kept.float().mean() < 0.7
    assert torch.allclose(weights[kept], 2 * exact[kept], atol=1e-6)
