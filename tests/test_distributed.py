"""Two and three processes train as one does: same batches, same loss, same tensors in every copy.

torchrun gives each of its processes a few environment variables; a run costs the start of as many
Pythons. Once the real torchrun starts train.py here. Otherwise forks get the same variables.
"""
import json
import socket

import forks
import pytest
import torch
from conftest import ROOT, program, save_small_bert, train, write_splits
from safetensors.torch import load_file

import model

FORKED = """
import os, runpy, signal, sys

world, port, program, *flags = sys.argv[1:]
for rank in range(int(world)):
    if not os.fork():
        signal.alarm(300)
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": world,
                       "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        sys.path[0], sys.argv[:], failed = os.path.dirname(program), [program, *flags], 0
        try:
            runpy.run_path(program, run_name="__main__")
        except SystemExit as e:
            failed = e.code not in (None, 0)
        except BaseException:
            failed = 1
            sys.excepthook(*sys.exc_info())
        sys.stdout.flush()
        os._exit(failed)
sys.exit(max(os.waitstatus_to_exitcode(os.wait()[1]) for rank in range(int(world))))
"""


@pytest.fixture(scope="module")
def without_dropout(tmp_path_factory):
    """A folder with a small random BERT that drops nothing: the masks of two processes cannot equal
    those of one."""
    return save_small_bert(tmp_path_factory.mktemp("model"), hidden_dropout_prob=0.0,
                           attention_probs_dropout_prob=0.0)


def in_forks(n, folder, path, *flags):
    """A program in n processes, as torchrun would start them."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    (folder / "forked.py").write_text(FORKED)
    return program(folder / "forked.py", n, port, path, *flags)


def under_torchrun(n, folder, path, *flags):
    """The same under the real torchrun. What it starts as a program are forks, too."""
    python = forks.make_python(folder / "python")
    return program("torch.distributed.run", "--standalone", "--nproc-per-node", n, "--no-python",
                   python, path, *flags)


@pytest.fixture
def many_rows(tmp_path):
    """80 training, 70 validation and 70 test rows: the last two are three batches of an
    evaluation each."""
    return write_splits(tmp_path / "mine", {"train": 80, "dev": 70, "test": 70}, lambda i, split:
                        f"a {'good' if i % 2 else 'bad'} film {'that is ' * (i % 5)}number {i * i} "
                        f"of {split}\t{i % 2}")


@pytest.mark.parametrize("method, batch_size, extra, torchrun", [
    ("full", 79, [], True), ("qdora", 27, ["--accumulation", 2], False)])
def test_two_processes_take_the_steps_of_one(without_dropout, many_rows, tmp_path, method,
                                             batch_size, extra, torchrun):
    """80 rows in batches of 27 leave a last batch of 26, and pieces of uneven and even sizes; in
    batches of 79, a last one with a row for one of the two processes only."""
    flags = ["--method", method, "--model", without_dropout, "--data", many_rows,
             "--batch-size", batch_size, "--epochs", 2,
             "--dropout", 0, "--amp", "off", "--lr", "1e-3", *extra]
    one = train(*flags, "--output", tmp_path / "1")
    flags += ["--output", tmp_path / "2"]
    two = (under_torchrun if torchrun else in_forks)(2, tmp_path, ROOT / "train.py", *flags)
    results, tensors = [], []
    for n, done in (1, one), (2, two):
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("epoch 1:") == 1  # one process speaks
        path, = (tmp_path / str(n) / "metrics" / "runs").iterdir()  # and writes
        results.append(json.loads(path.read_text()))
        tensors.append(load_file(tmp_path / str(n) / "checkpoints" / f"{path.stem}.safetensors"))
    one, two = results
    threads = one["environment"]["device"].removeprefix("CPU, ")
    assert two["environment"]["device"] == f"2 x CPU, {threads}" and "thread" in threads
    for a, b in zip(one["history"], two["history"], strict=True):
        for key in "train_loss", "validation_loss", "validation_f1_macro":
            assert a[key] == pytest.approx(b[key], abs=1e-5), key
    assert one["test_predictions"] == two["test_predictions"] and len(two["test_predictions"]) == 70
    assert [label for label, _ in two["test_predictions"]] == [i % 2 for i in range(70)]
    assert tensors[0].keys() == tensors[1].keys()
    for name, tensor in tensors[0].items():
        # a fifth of one step of Adam at 1e-3
        assert torch.allclose(tensor, tensors[1][name], atol=2e-4), name


CHOICE = """
import os, sys, torch
import common, settings

common.start()
torch.cuda.is_available = lambda: False
settings.time_bf16 = lambda: float(sys.argv[1 + int(os.environ["RANK"])])
print(settings.chosen_amp("auto"), settings.bf16_speedup())
torch.distributed.destroy_process_group()
"""


@pytest.mark.parametrize("speeds, chosen", [((1.1, 1.3), "off 1.1"), ((1.3, 0.5), "bf16 1.3")])
def test_processes_take_the_precision_that_is_fast_in_the_first_one(speeds, chosen, tmp_path):
    (tmp_path / "choice.py").write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{CHOICE}")
    done = in_forks(2, tmp_path, tmp_path / "choice.py", *speeds)
    assert done.returncode == 0 and done.stdout.splitlines() == [chosen] * 2, done.stderr


STEPS = """
import contextlib, sys, torch
from types import SimpleNamespace
import data, model, qa, train

device, (folder, accumulation, path, *cases) = model.join_processes(), sys.argv[1:]
texts, states = [f"a film {'very ' * i} long" for i in range(7)], {}
s = SimpleNamespace(max_length=32, stride=4, max_answer_length=30)
train.CLIP_NORM = 1e9
for case in cases:
    kind, order = case.split(", ")
    torch.manual_seed(1)
    tokenizer, bert = model.load_pretrained(folder, ["no", "yes"] if kind == "sentences" else None)
    start = {f"{name} at the start": p.detach().clone() for name, p in bert.named_parameters()
             if name.startswith(("classifier", "qa"))}
    if kind == "sentences":
        split = data.Sentences(data.Rows(texts, [i % 2 for i in range(7)]), tokenizer, s)
    else:
        asked = [qa.Question(text, "what?", ["film"], 2, 6) for text in texts]
        split = qa.Windows(asked, tokenizer, s)
    # unlike AdamW it shows a wrong scale of the gradients; the scaler's is a power of two
    sgd, scaler = torch.optim.SGD(bert.parameters(), lr=0.1), torch.amp.GradScaler("cpu")
    losses = [train.step(bert, sgd, split, batch, device, contextlib.nullcontext(), scaler,
                         int(accumulation))
              for batch in split.batches(3, by_length=order == "grouped")[::-1]]
    states[case] = bert.state_dict() | start | {"losses": torch.stack(losses)}
torch.save(states, f"{path}{model.RANK}")
model.leave_processes()
"""
CASES = "sentences, grouped", "questions, grouped", "questions, as they come"


@pytest.fixture(scope="module")
def states(without_dropout, tmp_path_factory):
    """What every process makes of every case, where there are one, two and three of them, in
    batches of 1, 3 and 3 rows: {number of processes: [{case: tensors}]}."""
    folder, states = tmp_path_factory.mktemp("steps"), {}
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{STEPS}"
    (folder / "steps.py").write_text(code)
    for n, accumulation in (1, 1), (2, 2), (3, 1):
        done = in_forks(n, folder, folder / "steps.py", without_dropout, accumulation,
                        folder / f"{n}_", *CASES)
        assert done.returncode == 0, done.stderr
        states[n] = [torch.load(folder / f"{n}_{rank}") for rank in range(n)]
    return states


@pytest.mark.parametrize("case", CASES)
def test_gradients_have_the_scale_of_one_process(states, case):
    one = states[1][0][case]
    for other in states[2] + states[3]:
        for name, tensor in one.items():
            assert torch.allclose(other[case][name], tensor, atol=1e-6), name
    head = "classifier.weight" if case.startswith("sentences") else "qa_outputs.weight"
    assert (one[head] - one[f"{head} at the start"]).abs().max() > 1e-3


@pytest.mark.parametrize("case", CASES)
def test_all_copies_stay_equal(states, case):
    for first, *others in states[2], states[3]:
        for other in others:
            for name, tensor in first[case].items():
                assert torch.equal(other[case][name], tensor), name


# --- on GPUs, with a stand-in for them -----------------------------------------------------------

def test_a_process_is_bound_to_its_gpu_before_the_first_barrier(monkeypatch):
    asked = []
    monkeypatch.setattr(model.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(model.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(model.torch.cuda, "set_device", asked.append)
    monkeypatch.setattr(model.dist, "init_process_group",
                        lambda *args, **more: asked.append((args, more)))
    monkeypatch.setattr(model, "WORLD", 2)
    monkeypatch.setattr(model, "LOCAL_RANK", 1)
    own = model.join_processes()
    bound, ((backend,), more) = asked
    assert str(own) == "cuda:1" == str(bound) and backend == "nccl" and more["device_id"] == own
    assert more["timeout"].total_seconds() > 3600  # while another process downloads


def test_the_peak_of_gpu_memory_is_that_of_training_alone(monkeypatch):
    gpu, state = torch.device("cuda", 0), {"now": 0}
    monkeypatch.setattr(model.torch.cuda, "max_memory_allocated", lambda device: state["now"])
    monkeypatch.setattr(model.torch.cuda, "reset_peak_memory_stats",
                        lambda device: state.update(now=0))
    peaks = {}
    for training, evaluation in (2e9, 9e9), (3e9, 9e9), (1e9, 9e9):
        model.forget_peak(gpu)
        state["now"] = max(state["now"], training)
        peaks = model.peak_memory(gpu, peaks)
        state["now"] = max(state["now"], evaluation)
    assert peaks["peak_vram_gb"] == 3
    cpu = model.peak_memory(torch.device("cpu"), {})
    assert cpu["peak_vram_gb"] is None and cpu["peak_rss_gb"] > 0.1
