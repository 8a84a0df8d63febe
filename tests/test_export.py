"""A merged model answers as the unmerged one, and is a plain Hugging Face folder that needs nothing
from here."""
import json

import pytest
import torch
from conftest import (
    BUILDS,
    METHODS,
    build,
    logits,
    one_line_exit,
    program,
    randomize,
    save_small_bert,
    settings,
)
from torch import nn
from transformers import BertForQuestionAnswering, BertForSequenceClassification

import tools.export as export
from methods import PLACEMENTS
from settings import checkpoint_path, read_settings

SENTENCES = ["a good film", "a bad film about a good dog", "no"]


@pytest.mark.parametrize("head_class", [BertForSequenceClassification, BertForQuestionAnswering])
@pytest.mark.parametrize("method", [name for name in BUILDS if name not in PLACEMENTS])
def test_merged_equals_unmerged_and_twice_is_once(method, head_class):
    model = randomize(build(method, head_class))
    plain, names = logits(build("full", head_class)), set(build("full", head_class).state_dict())
    before = logits(model)
    # it learned something, or the equality would say nothing
    assert (before - plain).abs().max() > 0.1
    export.merge(model, settings(*BUILDS[method]))
    assert (logits(model) - before).abs().max() < 1e-5
    assert (set(model.state_dict()) == names
            and all(p.dtype is torch.float32 for p in model.parameters()))
    assert ({type(m) for m in model.bert.encoder.modules() if isinstance(m, nn.Linear)}
            == {nn.Linear})
    once = {name: p.clone() for name, p in model.state_dict().items()}
    export.merge(model, settings(*BUILDS[method]))
    assert all(torch.equal(p, once[name]) for name, p in model.state_dict().items())


@pytest.mark.parametrize("method", ["houlsby", "pfeiffer"])
def test_adapters_cannot_be_merged_and_stay_as_they_are(method):
    model = randomize(build(method))
    before = logits(model)
    with pytest.raises(SystemExit, match="nonlinear"):
        export.merge(model, settings(*METHODS[method]))
    assert torch.equal(logits(model), before)


@pytest.fixture(scope="module")
def checkpoints(study):
    """{name: checkpoint} of a small study."""
    comparison = json.loads((study[0] / "metrics" / "comparison.json").read_text())
    return {name: checkpoint_path(study[0], read_settings(entry["runs"][0]))
            for name, entry in comparison["entries"].items()}


@pytest.fixture(scope="module")
def small_bert(tmp_path_factory):
    return save_small_bert(tmp_path_factory.mktemp("model"))


# one process for all folders, since to start it takes longer than what it does
ELSEWHERE = """
import importlib.util, json, sys, torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline
found, sentences = {}, json.loads(sys.argv[1])
for folder in sys.argv[2:]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        logits = model(**tokenizer(sentences, padding=True, return_tensors="pt")).logits.tolist()
    ask = pipeline("text-classification", folder)
    found[folder] = {"logits": logits, "answer": ask("good " * 600, truncation=True)[0],
                     "longest": ask.tokenizer.model_max_length, "config": model.config.to_dict()}
    assert {type(module).__module__.split(".")[0] for module in model.modules()} <= {"torch",
                                                                                  "transformers"}
assert not any(map(importlib.util.find_spec, ("lora", "quant", "checkpoint")))
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def exported(checkpoints, tmp_path_factory):
    """{name: (folder, what a Python process makes of it that knows nothing of this project)}."""
    base = tmp_path_factory.mktemp("exported")
    folders = {name: base / name for name in ("full", "lora_r8", "qlora")}
    for name, folder in folders.items():
        export.main(export.parse_args([str(checkpoints[name]), "--to", str(folder)]))
    program_file = tmp_path_factory.mktemp("elsewhere") / "elsewhere.py"
    program_file.write_text(ELSEWHERE)
    done = program(program_file, json.dumps(SENTENCES), *folders.values())
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    return {name: (folder, found[str(folder)]) for name, folder in folders.items()}


@pytest.mark.parametrize("name", ["full", "lora_r8", "qlora"])
def test_exported_folder_gives_the_same_logits_elsewhere(name, checkpoints, exported, tmp_path):
    folder, found = exported[name]
    tokenizer, base, base_hash = export.load_base(checkpoints[name])
    model, _ = export.attach(base, base_hash, checkpoints[name])
    with torch.no_grad():
        expected = model(**tokenizer(SENTENCES, padding=True, return_tensors="pt")).logits
        plain = base(**tokenizer(SENTENCES, padding=True, return_tensors="pt")).logits
    logits = torch.tensor(found["logits"])
    assert (logits - expected).abs().max() < 1e-5 and (logits - plain).abs().max() > 1e-3
    assert sorted(path.name for path in folder.parent.iterdir()) == ["full", "lora_r8", "qlora"]
    # for whom a new file is, too
    (tmp_path / "new").touch()
    usual = (tmp_path / "new").stat().st_mode
    assert {file.stat().st_mode for file in (*folder.iterdir(), checkpoints[name])} == {usual}


def test_a_plain_pipeline_takes_the_exported_folder_and_a_long_text(exported):
    for _, found in exported.values():
        assert found["answer"]["label"] in ("0", "1") and found["longest"] == 128
        config = found["config"]
        assert config["problem_type"] == "single_label_classification"
        assert config["dtype"] == "float32"
        assert config["id2label"] == {"0": "0", "1": "1"}
        assert config["label2id"] == {"0": 0, "1": 1}


def test_a_failed_export_leaves_nothing(checkpoints, tmp_path, monkeypatch):
    def full_disk(model, folder):
        (folder / "config.json").write_text("half a file")
        raise RuntimeError("no space left")

    monkeypatch.setattr(BertForSequenceClassification, "save_pretrained", full_disk)
    with pytest.raises(SystemExit, match="error: cannot write .*no space left"):
        export.main(export.parse_args([str(checkpoints["lora_r8"]), "--to", str(tmp_path / "out")]))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flags, words", [
    (["adapter", "--to", "{tmp}/out"], ["adapters cannot be merged"]),
    (["lora_r8", "--to", "{tmp}"], ["already exists", "--to"]),
    (["--to", "{tmp}/out"], ["checkpoint or --method"]),
    (["lora_r8", "--to", "{tmp}/out", "--method", "qlora"], ["checkpoint or --method"]),
    (["--to", "{tmp}/out", "--method", "dora", "--output", "{tmp}"], ["comparison.json"]),
    (["lora_r8", "--to", "{tmp}/" + 300 * "x"], ["cannot write"]),
    (["lora_r8"], ["--to"]),
    (["lora_r8", "--to", "{tmp}/out", "--model", "{small}"], ["another base model"]),
    (["{tmp}/nothing", "--to", "{tmp}/out"], ["nothing", "cannot read"]),
])
def test_what_merge_refuses(flags, words, checkpoints, tmp_path, small_bert):
    (tmp_path / "mine").write_text("mine")
    flags = [checkpoints.get(flag, str(flag).format(tmp=tmp_path, small=small_bert))
             for flag in flags]
    one_line_exit(lambda: export.main(export.parse_args([str(flag) for flag in flags])), *words)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
