"""Two processes under torchrun train as one does: same batches, same loss, same tensors, one writer."""
import json
import os
import sys

import pytest
import torch
from conftest import ROOT, run
from safetensors.torch import load_file
from transformers import BertConfig, BertForSequenceClassification

import fetch


@pytest.fixture(scope="module")
def without_dropout(tmp_path_factory):
    """A folder with a small random BERT that drops nothing: the masks of two processes cannot equal those of one."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = BertConfig(hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96,
                        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    BertForSequenceClassification(config).save_pretrained(folder)
    for name in "tokenizer.json", "tokenizer_config.json", "vocab.txt":
        (folder / name).write_bytes((fetch.model_folder() / name).read_bytes())
    return folder


def torchrun(n, *flags):
    return run(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", n, ROOT / "train.py",
               *flags, env={**os.environ, "OMP_NUM_THREADS": "1"})


@pytest.mark.parametrize("method, extra", [("full", []), ("lora", ["--accumulation", 2]), ("qdora", [])])
def test_two_processes_take_the_steps_of_one(without_dropout, data_dir, tmp_path, method, extra):
    """80 rows in batches of 27 leave a last batch of 26, and pieces of uneven and even sizes; 12 rows validate."""
    flags = ["--method", method, "--model", without_dropout, "--data", data_dir, "--batch-size", 27, "--epochs", 2,
             "--dropout", 0, "--lr", "1e-3", *extra]
    results, tensors = [], []
    for n in 1, 2:
        done = torchrun(n, *flags, "--output", tmp_path / str(n))
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("epoch 1:") == 1  # one process speaks
        path, = (tmp_path / str(n) / "metrics" / "runs").iterdir()  # and writes
        results.append(json.loads(path.read_text()))
        tensors.append(load_file(tmp_path / str(n) / "checkpoints" / f"{path.stem}.safetensors"))
    one, two = results
    assert (one["environment"]["device"], two["environment"]["device"]) == ("CPU, 1 thread", "2 x CPU, 1 thread")
    for a, b in zip(one["history"], two["history"], strict=True):
        for key in "train_loss", "validation_loss", "validation_f1_macro":
            assert a[key] == pytest.approx(b[key], abs=1e-5), key
    assert one["test_predictions"] == two["test_predictions"] and len(two["test_predictions"]) == 12
    assert tensors[0].keys() == tensors[1].keys()
    for name, tensor in tensors[0].items():
        assert torch.allclose(tensor, tensors[1][name], atol=2e-4), name  # a fifth of one step of Adam at 1e-3


def test_a_last_batch_with_fewer_rows_than_processes(without_dropout, data_dir, tmp_path):
    flags = ["--method", "lora", "--model", without_dropout, "--data", data_dir, "--batch-size", 79, "--epochs", 1,
             "--dropout", 0]
    losses = []
    for n in 1, 2:
        done = torchrun(n, *flags, "--output", tmp_path / str(n))
        assert done.returncode == 0, done.stderr
        path, = (tmp_path / str(n) / "metrics" / "runs").iterdir()
        losses.append(json.loads(path.read_text())["history"][0]["train_loss"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


