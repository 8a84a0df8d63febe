"""Two processes under torchrun train as one does: same batches, same loss, same tensors,
one writer."""
import json
import os
import sys

import pytest
import torch
from conftest import ROOT, run, save_small_bert, write_splits
from safetensors.torch import load_file


@pytest.fixture(scope="module")
def without_dropout(tmp_path_factory):
    """A folder with a small random BERT that drops nothing: the masks of two processes cannot equal
    those of one."""
    return save_small_bert(tmp_path_factory.mktemp("model"), hidden_dropout_prob=0.0,
                           attention_probs_dropout_prob=0.0)


def launch(n, *program):
    """`program` in n processes under torchrun, or without it in one."""
    torchrun = ["-m", "torch.distributed.run", "--standalone",
                "--nproc-per-node", n] if n > 1 else []
    return run(sys.executable, *torchrun, *program,
               env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})


@pytest.fixture
def many_rows(tmp_path):
    """80 training, 70 validation and 70 test rows: the last two are three batches of an
    evaluation each."""
    return write_splits(tmp_path / "mine", {"train": 80, "dev": 70, "test": 70}, lambda i, split:
                        f"a {'good' if i % 2 else 'bad'} film {'that is ' * (i % 5)}number {i * i} "
                        f"of {split}\t{i % 2}")


@pytest.mark.parametrize("method, batch_size, extra",
                         [("full", 79, []), ("qdora", 27, ["--accumulation", 2])])
def test_two_processes_take_the_steps_of_one(without_dropout, many_rows, tmp_path, method,
                                             batch_size, extra):
    """80 rows in batches of 27 leave a last batch of 26, and pieces of uneven and even sizes; in
    batches of 79, a last one with a row for one of the two processes only."""
    flags = ["--method", method, "--model", without_dropout, "--data", many_rows,
             "--batch-size", batch_size, "--epochs", 2,
             "--dropout", 0, "--amp", "off", "--lr", "1e-3", *extra]
    results, tensors = [], []
    for n in 1, 2:
        done = launch(n, ROOT / "train.py", *flags, "--output", tmp_path / str(n))
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("epoch 1:") == 1  # one process speaks
        path, = (tmp_path / str(n) / "metrics" / "runs").iterdir()  # and writes
        results.append(json.loads(path.read_text()))
        tensors.append(load_file(tmp_path / str(n) / "checkpoints" / f"{path.stem}.safetensors"))
    one, two = results
    assert (one["environment"]["device"], two["environment"]["device"]) == (
        "CPU, 1 thread", "2 x CPU, 1 thread")
    for a, b in zip(one["history"], two["history"], strict=True):
        for key in "train_loss", "validation_loss", "validation_f1_macro":
            assert a[key] == pytest.approx(b[key], abs=1e-5), key
    assert one["test_predictions"] == two["test_predictions"] and len(two["test_predictions"]) == 70
    assert [label for label, _ in two["test_predictions"]] == [i % 2 for i in range(70)]
    assert tensors[0].keys() == tensors[1].keys()
    for name, tensor in tensors[0].items():
        # a fifth of one step of Adam at 1e-3
        assert torch.allclose(tensor, tensors[1][name], atol=2e-4), name


STEPS = """
import contextlib, sys, torch
import data, distributed, model, qa, train
device, folder, accumulation, *cases, path = distributed.join(), *sys.argv[1:]
texts, states = [f"a film {'very ' * i} long" for i in range(7)], {}
train.CLIP_NORM = 1e9
for case in cases:
    kind, order = case.split(", ")
    torch.manual_seed(1)
    tokenizer, bert = model.load_pretrained(folder, ["no", "yes"] if kind == "sentences" else None)
    start = {f"{name} at the start": p.detach().clone() for name, p in bert.named_parameters()
             if name.startswith(("classifier", "qa"))}
    replica = distributed.parallel(bert)
    if kind == "sentences":
        rows = data.Rows(texts, [i % 2 for i in range(7)])
        split = data.Sentences(rows, tokenizer, {"max_length": 32})
    else:
        asked = [qa.Question(text, "what?", ["film"], 2, 6) for text in texts]
        split = qa.Windows(asked, tokenizer, {"max_length": 32, "stride": 4})
    # unlike AdamW it shows a wrong scale of the gradients
    sgd, scaler = torch.optim.SGD(bert.parameters(), lr=0.1), torch.amp.GradScaler(
        "cpu", enabled=False)
    for batch in split.batches(4, by_length=order == "grouped"):
        train.step(replica, sgd, split, batch, device, contextlib.nullcontext(), scaler,
                   int(accumulation))
    states[case] = bert.state_dict() | start
    del replica
if distributed.RANK == 0:
    torch.save(states, path)
distributed.leave()
"""
CASES = "sentences, grouped", "questions, grouped", "questions, as they come"


@pytest.fixture(scope="module")
def states(without_dropout, tmp_path_factory):
    """What one, two and three processes make of every case: [{case: tensors}]."""
    folder, states = tmp_path_factory.mktemp("steps"), []
    (folder / "steps.py").write_text(STEPS)
    for n, accumulation in (1, 1), (2, 2), (3, 1):
        done = launch(n, folder / "steps.py", without_dropout, accumulation, *CASES,
                      folder / "state.pt")
        assert done.returncode == 0, done.stderr
        states.append(torch.load(folder / "state.pt"))
    return states


@pytest.mark.parametrize("case", CASES)
def test_gradients_have_the_scale_of_one_process(states, case):
    one, *others = (state[case] for state in states)
    for name, tensor in one.items():
        for other in others:
            assert torch.allclose(other[name], tensor, atol=1e-6), name
    head = "classifier.weight" if case.startswith("sentences") else "qa_outputs.weight"
    assert (one[head] - one[f"{head} at the start"]).abs().max() > 1e-3
