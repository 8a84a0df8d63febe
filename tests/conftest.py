import fcntl
import functools
import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import forks
import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

# What is slow to import is imported where it is needed: xdist's first process needs none of it, and
# its workers wait for that process.
from methods import CASES, DEFAULT_TARGETS, PLACEMENTS, STUDY, TARGETS
from methods import METHODS as ROWS
from settings import make_parser, settings_of


def pytest_configure(config):
    """Start what program() needs in each process that runs tests."""
    if not config.getoption("numprocesses", None):  # it has xdist's workers
        forks.start()


def pytest_collection_finish(session):
    """Leave what was imported out of all garbage collections, which would look at a million objects
    each time. gc.collect() then takes 1 ms instead of 0.4 s."""
    gc.freeze()


def flags_of(name):
    """Flags of train.py for a small size of one row of methods.METHODS."""
    own = {"r": 4, "alpha": 12, "placement": name, "bottleneck": 16}
    used = [(f"--{flag}", value) for flag, value in own.items() if flag in ROWS[name].flags]
    method = "adapter" if name in PLACEMENTS else name
    return ["--method", method, *(word for flag in used for word in flag)]


METHODS = {name: flags_of(name) for name in ROWS}
# LoRA, DoRA and their 4-bit forms on more layers than query and value: "lora all" and so on
WIDE = {f"{name} {targets}": [*METHODS[name], "--targets", targets]
        for name, row in ROWS.items() if "targets" in row.flags
        for targets in TARGETS if targets != DEFAULT_TARGETS}
BUILDS = METHODS | WIDE

# Python finds this project neither beside such a program nor otherwise
ELSEWHERE = """
import importlib.util, json, sys, torch
from transformers import AutoTokenizer, {head}
sentences, folder = json.loads(sys.argv[1]), sys.argv[2]
tokenizer, model = AutoTokenizer.from_pretrained(folder), {head}.from_pretrained(folder).eval()
with torch.no_grad():
    out = model(**tokenizer(*sentences, padding=True, return_tensors="pt"))
logits = out.logits if hasattr(out, "logits") else torch.stack((out.start_logits, out.end_logits))
assert not any(map(importlib.util.find_spec, ("lora", "quant", "checkpoint")))
assert {{type(module).__module__.split(".")[0] for module in model.modules()}} <= {{"torch",
                                                                                "transformers"}}
print(json.dumps([logits.tolist(), list(model.config.id2label.values())]))
"""


def build(method, head_class=None):
    """The tiny BERT in evaluation mode, turned into one of BUILDS."""
    import torch

    from model import apply_method
    model = tiny_bert(head_class=head_class)
    apply_method(model, settings(*BUILDS[method]), torch.float32)
    return model


def randomize(model, std=0.2):
    """Move every trainable tensor away from its initial value: at B = 0 or Up = 0 most equalities
    hold by accident."""
    import torch

    from model import trained_tensors
    torch.manual_seed(5)
    with torch.no_grad():
        for p in trained_tensors(model).values():
            p.add_(std * torch.randn_like(p))
    return model


def settings(*flags):
    return settings_of(make_parser().parse_args([str(f) for f in flags]))


def lengths(max_length, stride=None, max_answer_length=30):
    """What Sentences and Windows read of a run's settings."""
    return SimpleNamespace(max_length=max_length, stride=stride,
                           max_answer_length=max_answer_length)


def load_folder(folder, *flags):
    """The Task of a folder with sentences, as --data FOLDER and these flags ask for it."""
    import data
    return data.load_folder(folder, settings("--method", "full", "--data", folder, *flags))


@functools.cache
def default_model():
    """The folder of the default model, which is read as a whole to check it."""
    from fetch import model_folder
    return model_folder()


@functools.cache
def default_tokenizer():
    from transformers import AutoTokenizer
    return AutoTokenizer.from_pretrained(default_model())


def tiny_bert(seed=0, head_class=None):
    """A 2-layer random BERT with non-zero biases and uneven LayerNorms, so that no term of an
    equation is invisible. It classifies sentences if nothing else is asked for."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification
    head_class = head_class or BertForSequenceClassification
    torch.manual_seed(seed)
    labels = 3 if head_class is BertForSequenceClassification else 2  # start and end
    model = head_class(BertConfig(vocab_size=50, hidden_size=64, num_hidden_layers=2,
                                  num_labels=labels, num_attention_heads=4, intermediate_size=128))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.eval()


def tiny_inputs(seed=1):
    import torch
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 50, (4, 9), generator=g)
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([0, 1, 2, 1])}


def logits(model, amp=False):
    """Of a tiny BERT on the tiny inputs; of one for questions (2, batch, tokens): start and end."""
    import torch
    inputs = tiny_inputs()
    del inputs["labels"]
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=amp):
        out = model(**inputs)
    return out.logits if hasattr(out, "logits") else torch.stack((out.start_logits, out.end_logits))


def run(*command, timeout=300, **kwargs):
    return subprocess.run([str(c) for c in command], capture_output=True, text=True,
                          timeout=timeout, **kwargs)


def program(name, *flags):
    """The finished process of `python name flags`, without input, in the project's folder; name: a
    file there, a whole path, or a module such as tools.predict. It starts as forks.py says."""
    words = [ROOT / name] if str(name).endswith(".py") else ["-m", name]
    command = [str(word) for word in (sys.executable, *words, *flags)]
    with (open(os.devnull) as nothing, tempfile.TemporaryFile("w+", errors="replace") as stdout,
          tempfile.TemporaryFile("w+") as stderr):
        streams = [file.fileno() for file in (nothing, stdout, stderr)]
        status = forks.ask(command, os.environ, ROOT, streams)
        said = [file.seek(0) or file.read() for file in (stdout, stderr)]
    return subprocess.CompletedProcess(command, status, *said)


def train(*flags):
    return program("train.py", *flags)


def forked_environment(folder):
    """The environment of a shell script whose Python starts as program() does."""
    (folder / "venv" / "bin").mkdir(parents=True)
    forks.make_python(folder / "venv" / "bin" / "python")
    shutil.copy(ROOT / "requirements.txt", folder / "venv" / "installed.txt")
    return os.environ | {"BERT_VENV": str(folder / "venv")}


def one_line_error(done, *words):
    """A failed process said one line on stderr, with these words, and nothing else."""
    lines = done.stderr.splitlines()
    assert done.returncode != 0 and len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    for word in words:
        assert str(word) in lines[0], lines[0]


def one_line_exit(act, *words):
    """The same of a program that runs in this process, as act()."""
    with pytest.raises(SystemExit) as error:
        act()
    line, = str(error.value.code).splitlines()
    assert line.startswith("error: ") and all(str(word) in line for word in words), line


def one_warning(stderr, *words):
    """Of what a process said on stderr the progress bars left out, there is one line, a warning
    with these words."""
    line, = [line for line in stderr.replace("\r", "\n").splitlines()
             if line.strip() and "step/s]" not in line and "s/step]" not in line
             and "?step" not in line]
    assert line.startswith("warning: ") and all(str(word) in line for word in words), line


def write_splits(folder, sizes, row):
    """Make `folder` with a .tsv file of sizes[split] rows a split; row(i, split) gives one as
    sentence<TAB>label."""
    folder.mkdir()
    for split, n in sizes.items():
        rows = "".join(row(i, split) + "\n" for i in range(n))
        (folder / f"{split}.tsv").write_text("sentence\tlabel\n" + rows)
    return folder


def save_small_bert(folder, **config):
    """A folder, as --model takes it, with a random BERT of 2 layers and the default model's
    tokenizer."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification
    torch.manual_seed(0)
    config = BertConfig(hidden_size=48, num_hidden_layers=2, num_attention_heads=4,
                        intermediate_size=96, **config)
    BertForSequenceClassification(config).save_pretrained(folder)
    for name in "tokenizer.json", "tokenizer_config.json", "vocab.txt":
        (folder / name).write_bytes((default_model() / name).read_bytes())
    return folder


def elsewhere(head, texts, folder, cwd):
    """(logits, label names) of a folder in a Python process that knows nothing of this project;
    cwd: where its program may lie."""
    import torch
    (cwd / "elsewhere.py").write_text(ELSEWHERE.format(head=head))
    done = program(cwd / "elsewhere.py", json.dumps(texts), folder)
    assert done.returncode == 0, done.stderr
    logits, names = json.loads(done.stdout)
    return torch.tensor(logits), names


@pytest.fixture
def data_dir(tmp_path):
    """A folder with 80 / 12 / 12 rows of a task that a few steps cannot solve, but that has both
    labels everywhere."""
    return write_splits(tmp_path / "mine", {"train": 80, "dev": 12, "test": 12}, lambda i, split:
                        f"a {'good' if i % 2 else 'bad'} film number {i * i} of the {split} rows"
                        f"\t{'yes' if i % 2 else 'no'}")


@pytest.fixture(scope="session")
def study(tmp_path_factory):
    """One whole run_all.sh on a small folder of data: (output folder, its flags, the finished
    process). It finds all trainings but the last finished."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        # both workers have this one in common; the first to come runs run_all.sh
        base = base.parent
    base = base / "study"
    flags = ["--data", base / "mine", "--lr", "1e-3", "--max-steps", 4, "--epochs", 2,
             "--batch-size", 16, "--output", base / "out"]
    with open(base.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (base / "done.json").exists():
            base.mkdir()
            write_splits(base / "mine", {"train": 200, "validation": 20, "test": 20},
                         lambda i, split:
                         f"a {'good' if i % 2 else 'bad'} {split} film {i}\t{i % 2}")
            for name in STUDY[:-1]:
                train(*flags, *CASES[name].flags.split())
            done = run("bash", ROOT / "run_all.sh", *flags, env=forked_environment(base))
            (base / "done.json").write_text(json.dumps([done.returncode, done.stdout, done.stderr]))
    return (base / "out", flags,
            subprocess.CompletedProcess([], *json.loads((base / "done.json").read_text())))
