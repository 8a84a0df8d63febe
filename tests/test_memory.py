"""The predicted bytes against closed forms, against what real training steps keep, and against
bitsandbytes."""
import functools
import gc
import itertools
import json
import math
import sys
import time
from unittest import mock

import pytest
import torch
from conftest import ROOT, one_line_error, one_line_exit, program, run
from torch import nn
from torch.profiler import profile
from transformers import BertConfig

import fast
from fetch import DOWNLOADS
from methods import CASES
from model import trained_tensors
from quant import to_nf4
from settings import DEFAULT_MODEL, case_label
from tools import memory
from train import make_optimizer

# numbers that train, two labels; position and segment numbers, int64
BERT_BASE, BUFFERS = 109_483_778, 8 * (512 + 512)
SMALL = {"model_type": "bert", "vocab_size": 50, "hidden_size": 64, "num_hidden_layers": 2,
         "num_attention_heads": 4, "intermediate_size": 128}
GB = 0.0001, 0.001, 0.03, 0.5  # the same wherever a prediction needs some, so that it is made once


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setattr(memory, "DEVICE", "cpu")


def flags(method):
    return CASES[method].flags


def config(name, **other):
    return BertConfig(**memory.MODELS[name] | other)


def bytes_of(row):
    return {part: row[part] for part in memory.PARTS}


def measure_bytes(config, flags, batch_size, max_length, dtype):
    """Count what predict_bytes predicts in two real training steps on the CPU, from random weights;
    `peak` as torch.profiler saw the allocator."""
    gc.collect()  # what the last method left in reference cycles would count in the peak
    model = memory.make_model(config, flags, dtype)
    trained = list(trained_tensors(model).values())
    optimizer = make_optimizer(trained, 1e-5)
    mask = torch.ones(batch_size, max_length, dtype=torch.int64)

    def train_step():
        loss, kept = memory.count_kept(model, batch_size, max_length, dtype, attention_mask=mask)
        memory.backward(model, loss)
        optimizer.step()
        gradients = sum(p.grad.nbytes for p in trained)
        optimizer.zero_grad()
        return kept, gradients

    # numpy draws the bits, in memory that torch's profiler does not see
    with mock.patch.object(fast, "random_bits", memory.bits_without_numbers):
        train_step()  # makes the optimizer's moments, so that only the second has the usual peak
        weights = sum(memory.stored(model).values())
        moments = sum(t.nbytes for state in optimizer.state.values()
                      for name, t in state.items() if name != "step")
        with profile(profile_memory=True) as profiled:
            kept, gradients = train_step()
    changes = [event.nbytes() for event in profiled.profiler.kineto_results.events()
               if event.name() == "[memory]"]
    return {"weights": weights, "gradients": gradients, "optimizer": moments, "kept": kept,
            "peak": weights + moments + max(itertools.accumulate(changes))}


def same_bytes(own, measured):
    """All parts are equal, and the peaks up to what an operation allocates inside."""
    own, measured = bytes_of(own), bytes_of(measured)
    assert own.pop("peak") == pytest.approx(measured.pop("peak"), rel=0.05)
    assert own == measured and all(own.values())


@functools.cache
def predicted(method, dtype, gb=()):
    """The prediction for 3 rows of 24 tokens in a small BERT."""
    return memory.predict_bytes(BertConfig(**SMALL), flags(method), 3, 24, dtype, gb)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("method", CASES)
def test_prediction_equals_real_training_steps(method, dtype):
    measured = measure_bytes(BertConfig(**SMALL), flags(method), 3, 24, dtype)
    same_bytes(predicted(method, dtype), measured)


@pytest.mark.parametrize("method, targets", [("dora", "all"), ("qlora", "attention")])
def test_prediction_equals_real_training_steps_on_more_layers(method, targets):
    wide = f"--method {method} --targets {targets}"
    sizes = 3, 24, torch.bfloat16
    same_bytes(memory.predict_bytes(BertConfig(**SMALL), wide, *sizes),
               measure_bytes(BertConfig(**SMALL), wide, *sizes))


@pytest.mark.parametrize("method", ["lora_r8", "qdora"])
def test_prediction_equals_real_training_steps_of_the_default_model(method):
    sizes = config(DEFAULT_MODEL, num_hidden_layers=2), flags(method), 2, 16, None
    same_bytes(memory.predict_bytes(*sizes), measure_bytes(*sizes))


def test_gradients_and_what_is_kept_are_not_there_at_once():
    row = memory.predict_bytes(config(DEFAULT_MODEL), flags("full"), 8, 128, None)
    assert row["peak"] < 0.9 * (sum(bytes_of(row).values()) - row["peak"])
    # all that is kept is there when the backward pass begins
    for method in "full", "lora_r8":
        row = predicted(method, None)
        assert row["peak"] > row["weights"] + row["optimizer"] + row["kept"]


def test_closed_forms():
    def three(method):
        with torch.device("meta"):
            model = memory.make_model(config("bert-base-uncased"), flags(method), None,
                                      memory.stand_in_encoder)
        row = memory.fixed_bytes(model)
        return row["weights"] - BUFFERS, row["gradients"], row["optimizer"]

    assert sum(three("full")) == 16 * BERT_BASE
    assert sum(three("lora_r8")) == 4 * (BERT_BASE + 294_912) + 12 * 296_450
    assert three("adapter") == (4 * (BERT_BASE + 2_379_264), 4 * 2_419_202, 8 * 2_419_202)
    # a layer of bert-base has four matrices of 768^2 and two of 768 * 3072
    saved = 12 * sum(count * (4 * n - nf4_bytes(n))
                     for n, count in ((768 * 768, 4), (768 * 3072, 2)))
    assert three("qlora")[0] == 4 * (BERT_BASE + 589_824) - saved


def nf4_bytes(n):
    """Half a byte for one of n weights, a byte for 64, 4 for 64 * 256; and tables of 16 and 256
    levels, and a mean."""
    return math.ceil(n / 2) + math.ceil(n / 64) + 4 * math.ceil(n / 64 / 256) + 4 * (16 + 256 + 1)


# in all, 64 * 256 goes into the first
@pytest.mark.parametrize("shape", [(384, 1536), (128, 128), (100, 77), (5, 3)])
def test_stand_in_stores_what_bitsandbytes_stores(shape):
    linear = nn.Linear(*shape)
    real, stand_in = to_nf4(linear, torch.bfloat16), memory.NF4StandIn(linear, torch.bfloat16)
    state = real.weight.quant_state
    tensors = [t for t in state.as_dict().values() if isinstance(t, torch.Tensor)]
    counted = sum(t.untyped_storage().nbytes() for t in [real.weight.data, *tensors, state.offset])
    assert sum(b.nbytes for b in stand_in.buffers()) == counted == nf4_bytes(linear.weight.numel())
    assert (sum(memory.stored(stand_in).values()) == sum(memory.stored(real).values())
            == counted + 2 * shape[1])


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("plain, nf4", [("lora_r16", "qlora"), ("dora", "qdora")])
def test_4_bits_make_weights_smaller_and_nothing_else(plain, nf4, dtype):
    plain, nf4 = (bytes_of(predicted(method, dtype)) for method in (plain, nf4))
    assert nf4["weights"] < plain["weights"] and nf4["peak"] < plain["peak"]
    assert nf4 | dict.fromkeys(("weights", "peak")) == plain | dict.fromkeys(("weights", "peak"))


class Toy(nn.Module):
    """Keeps x (2 * 3 numbers) for the gradient of w, and y for those of exp, sin and w; w
    itself is its own."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(3))

    def forward(self, input_ids, labels):
        x = input_ids.float()
        y = (x * self.w).exp()
        self.loss = y.view(6).sin().sum() + (y * self.w).sum()
        return self


def test_every_storage_counts_once_and_the_models_own_never():
    loss, kept = memory.count_kept(Toy(), 2, 3, None)
    assert kept == 2 * (2 * 3 * 4)
    loss.backward()  # what was packed can be unpacked


def test_a_padded_row_costs_nothing():
    """The mask is fp32; added to bf16 scores, it would make them and what follows twice as
    large."""
    model, mask = (memory.make_model(BertConfig(**SMALL), flags("full"), torch.bfloat16),
                   torch.ones(3, 24).long())
    mask[0, 20:] = 0
    kept = [memory.count_kept(model, 3, 24, torch.bfloat16, **inputs)[1]
            for inputs in ({}, {"attention_mask": mask})]
    assert kept[0] == kept[1]


@pytest.mark.parametrize("method, dtype",
                         [("full", None), ("qlora", torch.bfloat16), ("pfeiffer", torch.bfloat16)])
def test_largest_batch_fits_and_one_more_does_not(method, dtype):
    def peak(n):
        return memory.predict_bytes(BertConfig(**SMALL), flags(method), n, 24, dtype)["peak"]

    row = predicted(method, dtype, GB)
    fits = row["fits"]
    assert list(fits) == ["0.0001", "0.001", "0.03", "0.5"]
    assert fits["0.0001"] == 0 and fits["0.03"] > 100 and row["weights"] > 0.0001e9
    assert peak(fits["0.03"]) <= 0.03e9 < peak(fits["0.03"] + 1)


def test_a_batch_far_beyond_those_that_were_measured_fits():
    """One row at a time, gradients set the peak, whose line says nothing of many rows."""
    sizes = config(DEFAULT_MODEL, num_hidden_layers=2), flags("full")
    n = memory.predict_bytes(*sizes, 1, 16, torch.bfloat16, (2,))["fits"]["2"]
    assert 1.9e9 < memory.predict_bytes(*sizes, n, 16, torch.bfloat16)["peak"] <= 2e9


def test_a_dequantised_weight_is_there_in_two_types_for_a_moment():
    sizes = (config("bert-base-uncased", num_hidden_layers=1, vocab_size=2000), flags("qlora"), 1,
             16, torch.bfloat16)
    same_bytes(memory.predict_bytes(*sizes), measure_bytes(*sizes))


def test_between_two_batches_the_largest_is_on_the_safe_side():
    def peak(n):
        return max(1000 + 10 * n, 400 + 40 * n)  # they are equal at n = 20

    peaks = {n: peak(n) for n in (1, 8, 128, 256)}
    for size, n in (1000, 0), (1085, 8), (1100, 10), (4000, 90), (20_000, 490):
        found = memory.largest_batch(peaks, size)
        assert found <= n and peak(found) <= max(size, 1000)
        if n != 10:
            assert n - found <= 8


def test_the_head_alone_keeps_next_to_nothing():
    head, bitfit = (predicted(method, None, GB) for method in ("head", "bitfit"))
    assert 0 < head["kept"] < 3 * 2 * 24 * 64 and head["fits"]["0.03"] > bitfit["fits"]["0.03"]


def test_nothing_is_allocated(tmp_path):
    """The weights of 4 layers of bert-large alone are 0.3 GB; their prediction takes Python
    objects."""
    (tmp_path / "predict.py").write_text(
        f"import resource, sys\nsys.path.insert(0, {str(ROOT)!r})\n"
        "from tools import memory\n"
        "from transformers import BertConfig\n"
        "memory.DEVICE = 'cpu'\n"
        "for name, layers in (memory.DEFAULT_MODEL, 1), ('bert-large-uncased', 4):\n"
        "    config = BertConfig(**memory.MODELS[name] | {'num_hidden_layers': layers})\n"
        "    row = memory.predict_bytes(config, '--method full', 32, 128, None)\n"
        "    print(row['weights'], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)")
    done = program(tmp_path / "predict.py")
    assert done.returncode == 0, done.stderr
    (small, before), (large, after) = (map(int, line.split()) for line in done.stdout.splitlines())

    def layer(hidden, wide):
        return 4 * hidden * hidden + 2 * hidden * wide + 9 * hidden + wide

    # of the whole models, with 6 and 24 layers
    assert small == 4 * (22_713_986 - 5 * layer(384, 1536)) + BUFFERS
    assert large == 4 * (335_143_938 - 20 * layer(1024, 4096)) + BUFFERS
    assert (after - before) * (1 if sys.platform == "darwin" else 1024) < 100e6


def test_default_model_is_the_one_that_is_fetched():
    path = DOWNLOADS / DEFAULT_MODEL / "config.json"
    if not path.exists():
        pytest.skip("the default model is not downloaded")
    fetched, built_in = BertConfig(**json.loads(path.read_text())), config(DEFAULT_MODEL)
    for key in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
                "intermediate_size",
                "hidden_act", "max_position_embeddings", "type_vocab_size", "hidden_dropout_prob",
                "attention_probs_dropout_prob"):
        assert getattr(built_in, key) == getattr(fetched, key), key


def parsed(*flags):
    return memory.parse_args([str(flag) for flag in flags])


def test_command_line(tmp_path, capsys, monkeypatch):
    some = "full", "head"
    monkeypatch.setattr(memory, "CASES", {name: CASES[name] for name in some})
    (tmp_path / "config.json").write_text(
        json.dumps({**SMALL, "num_labels": 5, "problem_type": "regression"}))
    memory.main(parsed("--model", tmp_path, "--batch-size", 3, "--max-length", 24, "--amp", "off",
                       "--gb", *GB[1:], "--output", tmp_path))
    said = capsys.readouterr()
    assert not said.err
    ledger = json.loads((tmp_path / "metrics" / "memory.json").read_text())
    assert memory.ledger_markdown(ledger) in said.out
    assert {key: ledger[key] for key in ("model", "batch_size", "max_length", "amp", "device")} == \
        {"model": str(tmp_path), "batch_size": 3, "max_length": 24, "amp": "off", "device": "cpu"}
    assert tuple(ledger["methods"]) == some
    for name in some:
        row = predicted(name, None, GB)
        fits = {gb: n for gb, n in row["fits"].items() if gb != "0.0001"}
        assert ledger["methods"][name] == {"label": case_label(name), **row, "fits": fits}

    drawn = (tmp_path / "figures" / "ledger.png").read_bytes()
    (tmp_path / "figures" / "ledger.png").unlink()
    memory.main(parsed("--redraw", "--output", tmp_path))
    assert (tmp_path / "figures" / "ledger.png").read_bytes() == drawn and len(drawn) > 10_000
    assert memory.ledger_markdown(ledger) in capsys.readouterr().out


def test_a_model_of_the_hub_is_read_from_the_cache(tmp_path, monkeypatch):
    cached = tmp_path / "models--someone--small"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("abc")
    (cached / "snapshots" / "abc").mkdir(parents=True)
    (cached / "snapshots" / "abc" / "config.json").write_text(json.dumps(SMALL))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    config = memory.load_config(parsed("--model", "someone/small", "--output", tmp_path))
    assert SMALL.items() <= config.to_dict().items()


def test_table_shows_the_ledger():
    row = {"weights": 1_234_560_000, "gradients": 340_000, "optimizer": 680_000, "kept": 50_000_000,
           "peak": 1_300_000_000, "fits": {"4": 0, "8": 1234}}
    lines = memory.ledger_markdown({
        "model": "some-bert", "batch_size": 7, "max_length": 99, "amp": "bf16", "device": "cpu",
        "methods": {"full": {"label": "full fine-tuning", **row},
                    "qlora": {"label": "QLoRA", **row}}}).splitlines()
    assert lines[2] == "| full fine-tuning | 1,234.6 | 0.3 | 0.7 | 50.0 | 1,300.0 | – | 1,234 |"
    assert lines[0].endswith("| largest batch in 4 GB | largest batch in 8 GB |")
    assert lines[3].startswith("| QLoRA | ")
    for words in "some-bert", "7 rows", "99 tokens", "amp bf16", "CPU's modules":
        assert words in lines[-1]


@pytest.mark.parametrize("flags, words", [
    (["--model", "bert-huge"], ["bert-huge", "bert-large-uncased", "config.json"]),
    (["--model", "{}"], ["model_type", "config.json"]),
    (["--model", "{}/none.json"], ["none.json", "config.json"]),
    (["--model", "{}/broken.json"], ["broken.json", "not a valid JSON"]),
    (["--model", "{}/list.json"], ["list.json", "model_type"]),
    (["--model", "{}/roberta.json"], ["roberta.json", "model_type"]),
    (["--model", "{}/decoder.json"], ["decoder.json", "is_decoder"]),
    (["--max-length", 513], ["--max-length 513", 512]),
    (["--batch-size", 0], ["--batch-size", "0"]),
    (["--gb", 4, "much"], ["--gb", "much"]),
    (["--amp", "auto"], ["--amp", "auto"]),
    (["--output", "{}/broken.json"], ["broken.json"]),
])
def test_bad_input_is_one_line(flags, words, tmp_path):
    for name, text in {"broken": "{", "list": "[]", "roberta": '{"model_type": "roberta"}',
                       "decoder": json.dumps(SMALL | {"is_decoder": True})}.items():
        (tmp_path / f"{name}.json").write_text(text)
    flags = ["--output", tmp_path / "out", *(str(flag).format(tmp_path) for flag in flags)]
    one_line_exit(lambda: memory.main(parsed(*flags)), *words)
    assert not list(tmp_path.rglob("memory.json"))


def test_bad_input_is_answered_before_the_slow_imports(tmp_path):
    start = time.time()
    done = run(sys.executable, "-m", "tools.memory", "--batch-size", 0, "--output", tmp_path,
               cwd=ROOT)
    assert time.time() - start < 3
    one_line_error(done, "--batch-size", "0")
    assert done.returncode == 1 and not done.stdout and not list(tmp_path.rglob("memory.json"))


def test_redrawing_what_is_not_there_is_one_line(tmp_path):
    one_line_exit(lambda: memory.main(parsed("--redraw", "--output", tmp_path)), "memory.json")


@pytest.mark.parametrize("field, words", [
    ({"hidden_size": 65}, "multiple"), ({"hidden_size": "wide"}, "hidden_size"),
    ({"num_hidden_layers": 0}, "layer"),
    ({"hidden_act": "nosuch"}, "nosuch"),
    ({"max_position_embeddings": "512"}, "max_position_embeddings")])
def test_impossible_configuration_is_one_line(field, words, tmp_path):
    path = tmp_path / "my_layers.json"
    path.write_text(json.dumps({**SMALL, **field}))
    one_line_exit(lambda: memory.main(parsed("--model", path, "--output", tmp_path)),
                  f"error: --model {path}", words)
