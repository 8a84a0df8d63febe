"""peft's format of LoRA and DoRA: names and content of the two files, there and back, what is not
supported, and where peft is installed, peft itself."""
import functools
import importlib.util
import json
import math
import shutil

import pytest
import torch
from conftest import (
    BUILDS,
    build,
    logits,
    one_line_exit,
    randomize,
    settings,
    tiny_bert,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import BertForQuestionAnswering, BertForSequenceClassification

import checkpoint
import tools.export as export
import tools.predict as predict
from methods import row_of
from model import trained_tensors
from settings import checkpoint_path, read_settings

HAS_PEFT = importlib.util.find_spec("peft") is not None
NAMES = {BertForSequenceClassification: ["no", "perhaps", "yes"], BertForQuestionAnswering: None}
LOW_RANK = [name for name in BUILDS if "r" in row_of(settings(*BUILDS[name])).flags]


def saved(tmp_path, name, head_class=BertForSequenceClassification):
    """(model, its checkpoint, the same as a peft folder)."""
    model = randomize(build(name, head_class))
    task = [] if NAMES[head_class] else ["--task", "squad"]
    about = {"settings": settings(*BUILDS[name], *task), "label_names": NAMES[head_class],
             "tokenizer": None, "pairs": False, "epoch": 2,
             "base": checkpoint.hash_base(tiny_bert(head_class=head_class))}
    path, folder = tmp_path / "own.safetensors", tmp_path / "peft"
    checkpoint.save(path, model, about)
    folder.mkdir()
    export.write_peft(path, folder)
    return model, path, folder


def test_names_and_config_are_peft_s(tmp_path):
    _, _, folder = saved(tmp_path, "lora")
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        assert sorted(file.keys()) == [
            "base_model.model.bert.encoder.layer.0.attention.self.query.lora_A.weight",
            "base_model.model.bert.encoder.layer.0.attention.self.query.lora_B.weight",
            "base_model.model.bert.encoder.layer.0.attention.self.value.lora_A.weight",
            "base_model.model.bert.encoder.layer.0.attention.self.value.lora_B.weight",
            "base_model.model.bert.encoder.layer.1.attention.self.query.lora_A.weight",
            "base_model.model.bert.encoder.layer.1.attention.self.query.lora_B.weight",
            "base_model.model.bert.encoder.layer.1.attention.self.value.lora_A.weight",
            "base_model.model.bert.encoder.layer.1.attention.self.value.lora_B.weight",
            "base_model.model.classifier.bias", "base_model.model.classifier.weight"]
    assert json.loads((folder / "adapter_config.json").read_text()) == {
        "peft_type": "LORA", "task_type": "SEQ_CLS", "r": 4, "lora_alpha": 12.0,
        "base_model_name_or_path": "sentence-transformers/all-MiniLM-L6-v2", "lora_dropout": 0.1,
        "target_modules": ["attention.self.query", "attention.self.value"],
        "modules_to_save": ["classifier"], "use_dora": False, "use_rslora": False, "bias": "none",
        "fan_in_fan_out": False, "init_lora_weights": True, "inference_mode": True}


def test_the_names_of_dora_on_all_layers_and_of_questions(tmp_path):
    _, _, folder = saved(tmp_path, "dora all", BertForQuestionAnswering)
    names = set(load_file(folder / "adapter_model.safetensors"))
    assert "base_model.model.bert.encoder.layer.1.output.dense.lora_magnitude_vector" in names
    assert {"base_model.model.qa_outputs.weight", "base_model.model.qa_outputs.bias"} <= names
    assert len(names) == 2 * 6 * 3 + 2
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["use_dora"] and config["task_type"] == "QUESTION_ANS"
    assert config["target_modules"][3:] == ["attention.output.dense", "intermediate.dense",
                                            "output.dense"]


@pytest.mark.parametrize("head_class", NAMES)
@pytest.mark.parametrize("name", LOW_RANK)
def test_there_and_back_is_the_same_model(name, head_class, tmp_path):
    model, path, folder = saved(tmp_path, name, head_class)
    base = tiny_bert(head_class=head_class)
    again, about = attach(base, folder, checkpoint.hash_base(base))
    assert torch.equal(logits(again), logits(model))
    assert about == checkpoint.read_about(path)
    # and a folder of a folder is that folder
    second = tmp_path / "second"
    second.mkdir()
    export.write_peft(export.as_checkpoint(folder), second)
    assert checkpoint.read_about(export.as_checkpoint(second)) == about
    assert json.loads((second / "adapter_config.json").read_text()) == json.loads(
        (folder / "adapter_config.json").read_text())
    theirs, ours = (load_file(f / "adapter_model.safetensors") for f in (folder, second))
    assert theirs.keys() == ours.keys() and all(torch.equal(p, ours[n]) for n, p in theirs.items())


def attach(base, folder, base_hash="any"):
    """checkpoint.attach for a peft folder."""
    return checkpoint.attach(base, base_hash, export.as_checkpoint(folder))


def foreign(folder, **config):
    """Make a folder as peft itself leaves it: other keys in the config, nothing of ours in the
    metadata."""
    file = folder / "adapter_model.safetensors"
    save_file(load_file(file), file, {"format": "pt"})
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


def test_a_folder_of_another_program_has_labels_without_names_and_any_base(tmp_path):
    model, _, folder = saved(tmp_path, "dora")
    foreign(folder, base_model_name_or_path="google-bert/bert-base-uncased", peft_version="0.21.2")
    base = tiny_bert()
    again, about = attach(base, folder)
    assert torch.equal(logits(again), logits(model))
    assert about["label_names"] == ["LABEL_0", "LABEL_1", "LABEL_2"]
    s = about["settings"]
    assert s.model == "google-bert/bert-base-uncased" and s.method == "dora" and s.task == "peft"
    assert (s.max_length, s.stride, s.is_qa, s.lr) == (512, None, False, None)
    assert about["base"] is about["tokenizer"] is about["epoch"] is None


@pytest.mark.parametrize("said, found", [
    *[(f'{{"model_max_length": {n}}}', 512) for n in (10**30, "Infinity", "null", '"x"')],
    ('{"model_max_length": 128}', 128), ("{}", 512), ("[]", 512)])
def test_the_longest_input_is_what_the_folder_says_and_never_more_than_the_base_reads(
        said, found, tmp_path):
    head_class = BertForQuestionAnswering
    _, _, folder = saved(tmp_path, "lora", head_class)
    base, short = (tiny_bert(head_class=head_class) for _ in range(2))
    (folder / "tokenizer_config.json").write_text(said)
    for _ in range(2):
        for longest, stride in (100, 30), (60, 0):
            short.config.max_position_embeddings = longest
            s = attach(short, folder, checkpoint.hash_base(base))[1]["settings"]
            assert (s.max_length, s.stride) == (longest, stride)
        foreign(folder)
    assert attach(base, folder)[1]["settings"].max_length == found


def test_an_export_of_an_earlier_version_is_refused(tmp_path):
    _, _, folder = saved(tmp_path, "qlora")
    file = folder / "adapter_model.safetensors"
    save_file(load_file(file), file, {"format": "pt", "settings": '{"method": "qlora"}'})
    one_line_exit(lambda: export.as_checkpoint(folder), "earlier version")


def test_a_file_is_itself_and_what_a_folder_becomes_is_gone_at_exit(tmp_path, monkeypatch):
    _, path, folder = saved(tmp_path, "lora")
    at_exit = []
    monkeypatch.setattr(export.atexit, "register", lambda *args, **flags: at_exit.append(
        functools.partial(*args, **flags)))
    assert export.as_checkpoint(path) == path and not at_exit
    file = export.as_checkpoint(folder)
    assert file.name == "peft.safetensors" and file.exists()
    at_exit.pop()()
    assert not file.parent.exists() and folder.exists()


def test_rslora_is_a_matter_of_the_scale_and_16_bits_are_read(tmp_path):
    model, _, folder = saved(tmp_path, "lora")
    # alpha / sqrt(4) of alpha = 6 is 3 = 12 / 4
    foreign(folder, use_rslora=True, lora_alpha=6)
    base = tiny_bert()
    again, _ = attach(base, folder)
    assert torch.allclose(logits(again), logits(model), atol=1e-6)
    file = folder / "adapter_model.safetensors"
    save_file({name: p.bfloat16() for name, p in load_file(file).items()}, file)
    again, _ = attach(base, folder)
    assert {p.dtype for p in trained_tensors(again).values()} == {torch.float32}
    assert torch.allclose(logits(again), logits(model), atol=0.1)


@pytest.mark.parametrize("config, words", [
    ({"peft_type": "IA3"}, ["IA3", "LoRA and DoRA"]), ({"bias": "all"}, ["biases"]),
    ({"rank_pattern": {"query": 4}}, ["rank_pattern"]), ({"alpha_pattern": {"query": 4}},
                                                         ["alpha_pattern"]),
    ({"init_lora_weights": "pissa"}, ["pissa", "frozen weights"]), ({"r": 0}, ["r is 0"]),
    ({"revision": "v2"}, ["revision"]),
    ({"lora_alpha": None}, ["lora_alpha None"]), ({"r": 8}, ["shape"]),
    ({"task_type": "TOKEN_CLS"}, ["TOKEN_CLS", "SEQ_CLS and QUESTION_ANS"]),
    ({"task_type": "QUESTION_ANS"}, ["QUESTION_ANS", "classifier.weight"])])
def test_what_is_not_supported_is_said_in_one_line(config, words, tmp_path):
    _, _, folder = saved(tmp_path, "lora")
    foreign(folder, **config)
    base = tiny_bert()
    one_line_exit(lambda: attach(base, folder), *words)


@pytest.mark.parametrize("change, words", [
    (lambda t: {n: p for n, p in t.items() if "classifier" not in n}, ["no head"]),
    (lambda t: {n: p for n, p in t.items() if "query" not in n}, ["value", "query value"]),
    *[(lambda t, x=x: {n: p * x if "value" in n else p for n, p in t.items()},
       ["value.lora_", "NaN or infinity"]) for x in (math.nan, -math.inf)],
    (lambda t: {n.replace("bert.encoder", "vit.encoder"): p for n, p in t.items()}, ["vit"]),
    (lambda t: {n: p for n, p in t.items() if "layer.1" not in n},
     ["layer.1", "is missing, but torch.float32"]),
    (lambda t: t | {"base_model.model.bert.pooler.dense.weight": torch.ones(2)}, ["pooler"]),
    (lambda t: t | {f"base_model.model.bert.pooler.dense.lora_{x}.weight": torch.ones(2, 2)
                    for x in "AB"}, ["bert.pooler.dense", "not supported", "all-linear"]),
    (lambda t: {n: p for n, p in t.items() if "lora" not in n}, ["nothing"]),
    (lambda t: {n: p[:1].clone() if "classifier" in n else p for n, p in t.items()},
     ["one output"])])
def test_tensors_that_do_not_fit(change, words, tmp_path):
    _, _, folder = saved(tmp_path, "lora")
    file = folder / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)
    base = tiny_bert()
    one_line_exit(lambda: attach(base, folder), *words)


def test_folders_that_are_none(tmp_path):
    _, _, folder = saved(tmp_path, "lora")
    empty = tmp_path / "empty"
    empty.mkdir()
    one_line_exit(lambda: export.as_checkpoint(empty), "no peft folder")
    (empty / "adapter_config.json").write_text("{}")
    (empty / "adapter_model.bin").touch()
    one_line_exit(lambda: export.as_checkpoint(empty), "safe_serialization")
    (folder / "adapter_config.json").write_text("[")
    one_line_exit(lambda: export.as_checkpoint(folder), "damaged")
    (folder / "adapter_config.json").unlink()
    one_line_exit(lambda: export.as_checkpoint(folder), "no peft folder")


@pytest.fixture(scope="module")
def trained(study):
    """{name: checkpoint} of a small study."""
    comparison = json.loads((study[0] / "metrics" / "comparison.json").read_text())
    return {name: checkpoint_path(study[0], read_settings(entry["runs"][0]))
            for name, entry in comparison["entries"].items()}


def test_an_export_is_asked_and_merged_like_a_checkpoint(trained, tmp_path, capsys):
    folder = tmp_path / "peft"
    export.main(export.parse_args([str(trained["lora_r8"]), "--to", str(folder), "--format",
                                   "peft"]))
    assert {"adapter_config.json", "adapter_model.safetensors",
            "tokenizer.json"} <= {path.name for path in folder.iterdir()}
    rows = []
    for path in trained["lora_r8"], folder:
        predict.main(predict.parse_args(["a good film", "a bad film", "--checkpoint", str(path)]))
        rows.append([line.split()[-2:] for line in capsys.readouterr().out.splitlines()
                     if "film" in line])
    assert rows[0] == rows[1] and len(rows[0]) == 2
    export.main(export.parse_args([str(folder), "--to", str(tmp_path / "merged")]))
    assert (tmp_path / "merged" / "model.safetensors").exists()
    (tmp_path / "in.txt").write_text("a good film\na bad film\n")
    predict.main(predict.parse_args(["--checkpoint", str(folder), "--input",
                                     str(tmp_path / "in.txt"), "--to", str(tmp_path / "o.csv")]))
    lines = (tmp_path / "o.csv").read_text().splitlines()
    assert [line.split(",")[1] for line in lines[1:]] == [words[0] for words in rows[1]]
    for file in "in.txt", "o.csv":
        (tmp_path / file).unlink()
    # of another program, which does not say which weights it was trained on
    other = foreign(shutil.copytree(folder, tmp_path / "other"),
                    base_model_name_or_path="google-bert/bert-base-uncased")
    files = export.name_files([trained["lora_r8"], other])
    one_line_exit(lambda: predict.load_methods(files), "other", "bert-base-uncased", "--model")
    shutil.rmtree(other)
    for name in "full", "adapter":
        one_line_exit(lambda: export.main(export.parse_args(
            [str(trained[name]), "--to", str(tmp_path / name), "--format", "peft"])),
            "--format merged")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["merged", "peft"]


# --- the real thing -------------------------------------------------------------------------------

def assert_same(theirs, model, name):
    """Logits within fp32's rounding, which these uneven weights make larger than 1e-6; and in
    double precision equal, where weights are not 4-bit."""
    assert (logits(theirs) - logits(model)).abs().max() < 2e-5
    if name.split()[0] in ("lora", "dora"):
        assert (logits(theirs.double()) - logits(model.double())).abs().max() < 1e-12


@pytest.mark.skipif(not HAS_PEFT, reason="peft is not installed")
@pytest.mark.parametrize("head_class", NAMES)
@pytest.mark.parametrize("name", LOW_RANK)
def test_peft_gives_the_same_logits(name, head_class, tmp_path):
    from peft import PeftModel
    model, _, folder = saved(tmp_path, name, head_class)
    base = tiny_bert(head_class=head_class)
    if row_of(settings(*BUILDS[name])).is_4bit:
        from quant import quantize_encoder
        quantize_encoder(base, torch.float32)
    assert_same(PeftModel.from_pretrained(base, folder).eval(), model, name)


@pytest.mark.skipif(not HAS_PEFT, reason="peft is not installed")
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("head_class", NAMES)
@pytest.mark.parametrize("targets", [["query", "value"], ["query", "key", "value", "output.dense",
                                                          "intermediate.dense"]])
def test_what_peft_saves_is_read(targets, head_class, dora, tmp_path):
    from peft import LoraConfig, get_peft_model
    theirs = get_peft_model(tiny_bert(head_class=head_class), LoraConfig(
        task_type="SEQ_CLS" if NAMES[head_class] else "QUESTION_ANS", r=3, lora_alpha=7,
        target_modules=targets, use_dora=dora, use_rslora=not dora))
    torch.manual_seed(3)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if p.requires_grad:
                p.add_(0.2 * torch.randn_like(p))
    theirs.save_pretrained(tmp_path / "theirs")
    base = tiny_bert(head_class=head_class)
    model, about = attach(base, tmp_path / "theirs")
    assert_same(theirs.eval(), model, "dora" if dora else "lora")
    assert about["settings"].r == 3
    assert about["settings"].targets == ("query value" if len(targets) == 2 else "all")
