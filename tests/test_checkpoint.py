"""What is saved comes back to the bit, onto a fresh base and beside other methods; what does not
fit changes nothing."""
import functools
import json

import pytest
import torch
from conftest import BUILDS, METHODS, default_tokenizer, logits, randomize, settings, tiny_bert
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertTokenizerFast,
)

import checkpoint
import data
from fetch import model_folder
from model import apply_method, trained_tensors

LABELS = ["no", "perhaps", "yes"]


@functools.cache
def tiny_tokenizer():
    """One of eight words: the default model's takes longer to hash than all else here."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film"]
    return BertTokenizerFast(vocab={word: i for i, word in enumerate(words)})


def trained(method, path, dtype=torch.float32, labels=LABELS,
            head_class=BertForSequenceClassification):
    """(model with random trained tensors, its description), saved at `path`."""
    s = settings(*BUILDS[method])
    model = tiny_bert(head_class=head_class)
    task = data.Task(labels, None, None, None, "", None)
    about = checkpoint.describe(model, s, task, tiny_tokenizer())
    apply_method(model, s, dtype)
    checkpoint.save(path, randomize(model), about)
    return model, about


def fresh(head_seed=11, head_class=BertForSequenceClassification):
    """The same base with another head."""
    model = tiny_bert(head_class=head_class)
    torch.manual_seed(head_seed)
    for p in (model.classifier if head_class is BertForSequenceClassification
              else model.qa_outputs).parameters():
        p.data.normal_()
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", BUILDS)
def test_a_fresh_base_gives_the_same_bits(method, dtype, tmp_path):
    model, about = trained(method, tmp_path / "x.safetensors", dtype)
    base = fresh()
    attached, found = checkpoint.attach(base, about["base"], tmp_path / "x.safetensors", dtype)
    amp = dtype is torch.bfloat16
    answers = logits(attached, amp)
    assert found == about and torch.equal(answers, logits(model, amp))
    assert not torch.allclose(answers, logits(base, amp), atol=0.1)


@pytest.mark.parametrize("method", METHODS)
def test_questions_too(method, tmp_path):
    model, about = trained(method, tmp_path / "x.safetensors", labels=None,
                           head_class=BertForQuestionAnswering)
    attached, _ = checkpoint.attach(fresh(head_class=BertForQuestionAnswering), about["base"],
                                    tmp_path / "x.safetensors")
    assert torch.equal(logits(attached), logits(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("order", [list(METHODS), list(METHODS)[::-1]], ids=["forth", "back"])
def test_all_methods_share_one_base_and_leave_it_as_it_was(order, dtype, tmp_path):
    base, models, expected, amp = fresh(), {}, {}, dtype is torch.bfloat16
    before, plain = {name: p.clone() for name, p in base.state_dict().items()}, logits(base, amp)
    trains = {}
    for method in order:
        model, about = trained(method, tmp_path / method, dtype)
        expected[method] = logits(model, amp)
        models[method], _ = checkpoint.attach(base, about["base"], tmp_path / method, dtype)
        trains[method] = set(trained_tensors(model))
    for method in [*order, *reversed(order)]:
        assert torch.equal(logits(models[method], amp), expected[method])
        assert set(trained_tensors(models[method])) == trains[method]
    assert torch.equal(logits(base, amp), plain)
    assert all(p.requires_grad and p.dtype is torch.float32 for p in base.parameters())
    assert all(torch.equal(p, before[name]) for name, p in base.state_dict().items())
    if amp:  # the encoder's frozen weights are then each model's own
        return
    bases = {p.data_ptr() for p in base.parameters()}
    for method, model in models.items():
        own = trained_tensors(model)
        assert not any(p.data_ptr() in bases for p in own.values())
        frozen = [p for name, p in model.named_parameters()
                  if name not in own and not hasattr(p, "quant_state")]
        if method not in ("qlora", "qdora"):  # those also have biases in their own type
            assert all(p.data_ptr() in bases for p in frozen) and bool(frozen) is (method != "full")


def test_a_task_with_another_number_of_labels(tmp_path):
    model, about = trained("lora", tmp_path / "x", labels=LABELS)
    base = BertForSequenceClassification(
        tiny_bert().config.__class__(**tiny_bert().config.to_dict() | {"num_labels": 5}))
    base.bert = tiny_bert().bert
    attached, _ = checkpoint.attach(base.eval(), about["base"], tmp_path / "x")
    assert (torch.equal(logits(attached), logits(model))
            and attached.config.id2label == dict(enumerate(LABELS)))
    assert base.config.num_labels == 5 and base.classifier.out_features == 5


def changed(path, **metadata):
    """The file again with other tensors (a function of them) or metadata."""
    change = metadata.pop("tensors", lambda tensors: tensors)
    about = checkpoint.as_metadata(checkpoint.read_about(path))
    about |= {key: json.dumps(value) for key, value in metadata.items()}
    save_file(change(checkpoint.read_tensors(path)), path, about)


NAME = "bert.encoder.layer.0.attention.self.query.lora_A"


@pytest.mark.parametrize("damage, words", [
    (lambda path: changed(path, tensors=lambda t: {k: v for k, v in t.items() if k != NAME}),
     rf"{NAME} is missing, but torch.float32 of shape \(4, 64\)"),
    (lambda path: changed(path, tensors=lambda t: t | {"bert.pooler.dense.bias": torch.ones(64)}),
     r"pooler.dense.bias is torch.float32 of shape \(64,\), but missing"),
    (lambda path: changed(path, tensors=lambda t: t | {NAME: torch.ones(5, 64)}),
     rf"{NAME} is .*\(5, 64\), but .*\(4, 64\)"),
    (lambda path: changed(path, tensors=lambda t: t | {NAME: t[NAME].half()}),
     f"{NAME} is torch.float16 .* but torch.float32"),
    (lambda path: changed(path, tensors=lambda t: t | {NAME: t[NAME] / 0}),
     f"{NAME} holds NaN or inf"),
    (lambda path: changed(path, settings=None), "does not say"),
    (lambda path: changed(path, settings={"method": "lora"}), "does not say"),
    (lambda path: changed(path, base="0" * 16), "another process"),
    (lambda path: changed(path, tokenizer="0" * 16), "another process"),
    (lambda path: changed(path, label_names=["bad", "good", "meh"]), "another process"),
    (lambda path: changed(path, settings=vars(settings(*METHODS["dora"]))), "another process"),
    (lambda path: changed(path, settings=vars(settings("--method", "lora", "--r", 4))),
     "another process"),
    (lambda path: changed(path, epoch=2), "another process"),
    (lambda path: path.write_bytes(path.read_bytes()[:-1]), "cannot read"),
    (lambda path: path.write_bytes(b""), "cannot read"),
    (lambda path: path.write_text("not a checkpoint"), "cannot read"),
    (lambda path: save_file(load_file(path), path), "does not say what it was trained on"),
    (lambda path: save_file(load_file(path), path, {"format": "pt", "settings": "{"}),
     "does not say"),
    (lambda path: path.unlink(), "cannot read"),
])
def test_what_does_not_fit_is_one_line_and_nothing_is_loaded(damage, words, tmp_path):
    path = tmp_path / "x.safetensors"
    model, about = trained("lora", path)
    with torch.no_grad():
        for p in trained_tensors(model).values():
            p.add_(1)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    damage(path)
    with pytest.raises(SystemExit, match=words) as error:
        checkpoint.load(path, model, about)
    assert len(str(error.value).splitlines()) == 1 and str(path) in str(error.value)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


def test_another_base_is_refused(tmp_path):
    _, about = trained("lora", tmp_path / "x")
    with pytest.raises(SystemExit, match=f"another base model: .*{about['base']}.*, not 0000"):
        checkpoint.attach(fresh(), "0" * 16, tmp_path / "x")


def test_another_tokenizer_with_the_same_weights_is_refused(tmp_path):
    """The same words would be other tokens. How the files are written makes no difference, and
    peft's folders, which do not say, are taken."""
    about = {"tokenizer": checkpoint.hash_tokenizer(default_tokenizer())}
    rewritten = tmp_path / "rewritten"
    default_tokenizer().save_pretrained(rewritten)
    (rewritten / "vocab.txt").unlink(missing_ok=True)
    checkpoint.check_tokenizer("x", about, AutoTokenizer.from_pretrained(rewritten))
    words = str(model_folder() / "vocab.txt")
    cased = BertTokenizerFast(words, do_lower_case=False)
    marks = BertTokenizerFast(words, strip_accents=False)
    added = AutoTokenizer.from_pretrained(rewritten)
    added.add_tokens(["muddled"])
    for other in cased, marks, added:
        with pytest.raises(SystemExit, match="another tokenizer"):
            checkpoint.check_tokenizer("x", about, other)
    checkpoint.check_tokenizer("x", {"tokenizer": None}, cased)


def test_a_whole_file_is_loaded(tmp_path):
    model, about = trained("lora", tmp_path / "x")
    expected = logits(model)
    with torch.no_grad():
        for p in trained_tensors(model).values():
            p.add_(1)
    checkpoint.load(tmp_path / "x", model, about)
    assert torch.equal(logits(model), expected)


def test_the_base_is_told_by_its_weights_and_not_by_its_head():
    same, head, other = (checkpoint.hash_base(m) for m in (tiny_bert(), fresh(), tiny_bert(seed=3)))
    assert same == head != other
