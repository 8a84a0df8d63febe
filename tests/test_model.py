"""Models that do not fit themselves are refused in one line, or made right; unknown words
are said."""
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import (
    METHODS,
    lengths,
    one_line_exit,
    one_warning,
    randomize,
    save_small_bert,
    settings,
)
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BertForMaskedLM,
    BertTokenizerFast,
    PreTrainedTokenizerFast,
)

import checkpoint
import data
import qa
import tools.export as export
import tools.predict as predict
import train
from checks import check_words
from model import apply_method, count_params, load_pretrained, trained_tensors

QUESTION = qa.Question("it is here", "where?", ["here"], 6, 10)
LABELS = ["no", "yes"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The small BERT as a folder, which nobody changes."""
    return save_small_bert(tmp_path_factory.mktemp("saved") / "model")


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of it to spoil."""
    return shutil.copytree(saved, tmp_path / "model")


@pytest.fixture
def without_pooler(folder):
    """The small BERT as a masked language model leaves it: without pooler and head."""
    torch.manual_seed(1)
    BertForMaskedLM(AutoConfig.from_pretrained(folder)).save_pretrained(folder)
    return folder


def train_lora(model, data_dir, tmp_path):
    """The checkpoint of two steps of LoRA, trained in this process."""
    train.main(["--method", "lora", "--model", str(model), "--data", str(data_dir), "--max-steps",
                "2", "--epochs", "1", "--output", str(tmp_path / "out")])
    path, = (tmp_path / "out" / "checkpoints").iterdir()
    return path


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def without_tokenizer(folder):
    for name in "tokenizer.json", "tokenizer_config.json", "vocab.txt":
        (folder / name).unlink()


def with_more_words(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["lovely", "muddled"])
    tokenizer.save_pretrained(folder)


def without_padding_token(folder):
    (folder / "vocab.txt").unlink()
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace("[PAD]", "[PUD]"))
    edit_json(path, padding=None)
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "cls_token": "[CLS]", "sep_token": "[SEP]",
        "unk_token": "[UNK]"}))


def without_special_tokens(folder):
    backend = AutoTokenizer.from_pretrained(folder).backend_tokenizer
    backend.post_processor = TemplateProcessing(single="$A", pair="$A $B:1", special_tokens=[])
    PreTrainedTokenizerFast(tokenizer_object=backend, cls_token="[CLS]", sep_token="[SEP]",
                            unk_token="[UNK]", pad_token="[PAD]").save_pretrained(folder)


def with_foreign_tensors(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["bert.encoder.layer.0.attention.self.distance_embedding.weight"] = torch.ones(9, 12)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def with_nan(folder, value=float("nan")):
    tensors = load_file(folder / "model.safetensors")
    tensors["bert.encoder.layer.1.output.dense.bias"][3] = value
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def with_infinity(folder):
    with_nan(folder, -float("inf"))


@pytest.mark.parametrize("spoil, words", [
    (with_nan, ["1 tensors with NaN", "layer.1.output.dense.bias"]),
    (with_infinity, ["1 tensors with NaN or infinity", "layer.1.output.dense.bias"]),
    (without_tokenizer, ["no tokenizer"]),
    (with_more_words, ["ids up to 30,522", "30,522 rows"]),
    (lambda folder: edit_json(folder / "config.json", position_embedding_type="relative_key"),
     ["'relative_key'", "absolute"]),
    (lambda folder: edit_json(folder / "config.json", is_decoder=True), ["decoder"]),
    (without_padding_token, ["padding token"]),
    (without_special_tokens, ["[CLS]", "[SEP]"]),
    (with_foreign_tensors, ["distance_embedding", "1 tensors"]),
], ids=lambda x: getattr(x, "__name__", ""))
@pytest.mark.parametrize("label_names", [LABELS, None], ids=["sentences", "questions"])
def test_what_cannot_be_right_is_refused(spoil, words, label_names, folder):
    spoil(folder)
    one_line_exit(lambda: load_pretrained(str(folder), label_names), folder, *words)


def test_an_old_base_that_does_not_say_what_it_is(folder):
    expected, _ = load_pretrained(str(folder), LABELS)
    config = json.loads((folder / "config.json").read_text())
    del config["model_type"]
    (folder / "config.json").write_text(json.dumps(config))
    for name in "tokenizer.json", "tokenizer_config.json":  # vocab.txt is all it had
        (folder / name).unlink(missing_ok=True)
    tokenizer, model = load_pretrained(str(folder), LABELS)
    assert model.config.model_type == "bert"
    assert tokenizer("a film").input_ids == expected("a film").input_ids


def test_a_base_as_other_tools_leave_it_is_loaded_saved_and_computed_with(folder, tmp_path):
    """Tensors that are not contiguous, which only a .bin holds; a config that asks for tuples."""
    def act():
        tokenizer, model = load_pretrained(str(folder), LABELS)
        save_file(model.state_dict(), tmp_path / "x")
        return checkpoint.hash_base(model), model.eval()(**tokenizer("a film", return_tensors="pt"))

    expected, _ = act()
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save({name: p.t().contiguous().t() if p.dim() == 2 else p
                for name, p in tensors.items()}, folder / "pytorch_model.bin")
    edit_json(folder / "config.json", return_dict=False, output_hidden_states=True,
              output_attentions=True)
    found, out = act()
    assert found == expected and out.logits.shape == (1, len(LABELS))
    assert not out.hidden_states and out.attentions is None


def test_rows_without_a_word_are_refused(saved):
    tokenizer, _ = load_pretrained(str(saved), LABELS)
    rows = data.Sentences(data.Rows(["\u200b", "\u200e"], [0, 1]), tokenizer, lengths(32)).ids
    one_line_exit(lambda: check_words("it", rows, tokenizer), "no word")


def test_it_is_refused_before_the_training(folder, data_dir, tmp_path, capsys):
    with_more_words(folder)
    capsys.readouterr()
    one_line_exit(lambda: train_lora(folder, data_dir, tmp_path), "ids up to 30,522")
    assert capsys.readouterr() == ("", "")


def inputs_of(folder):
    """(ids and mask of two sentences, all inputs of two questions, their logits) of the
    model in a folder."""
    torch.manual_seed(0)
    tokenizer, model = load_pretrained(str(folder), LABELS)
    rows = data.Sentences(data.Rows(["a good film", "bad"], [0, 1]), tokenizer, lengths(16))
    sentences = rows.collate(np.arange(2))
    tokenizer, model = load_pretrained(str(folder), None)
    windows = qa.Windows([QUESTION, QUESTION._replace(question="where is it?")], tokenizer,
                         lengths(32, 4))
    questions = windows.collate(np.arange(2))
    with torch.no_grad():
        out = windows.forward(model.eval(), questions)
    assert out.loss.isfinite() and windows.spans.any()
    return sentences, questions, out.start_logits


@pytest.fixture(scope="module")
def plain_inputs(saved):
    return inputs_of(saved)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def without_types(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    tokenizer.save_pretrained(folder)


def from_the_left(folder):
    edit_json(folder / "tokenizer_config.json", padding_side="left", truncation_side="left")


def padding_token_unnamed(folder):
    backend = AutoTokenizer.from_pretrained(folder).backend_tokenizer
    PreTrainedTokenizerFast(tokenizer_object=backend, cls_token="[CLS]", sep_token="[SEP]",
                            unk_token="[UNK]").save_pretrained(folder)


@pytest.mark.parametrize("spoil", [without_types, from_the_left, padding_token_unnamed])
def test_what_can_be_made_right_gives_the_same_inputs(spoil, plain_inputs, folder):
    spoil(folder)
    a, b = plain_inputs, inputs_of(folder)
    assert same(a[0], b[0]) and same(a[1], b[1]) and torch.equal(a[2], b[2])
    assert b[1]["token_type_ids"].tolist()[0][-2:] == [0, 0] and b[1]["token_type_ids"].any()
    long = qa.Windows([QUESTION._replace(context="it is here " + "and there " * 50)],
                      load_pretrained(str(folder), None)[0], lengths(32, 4))
    # the first window starts where the passage does
    assert long.offsets[0][long.passage[0][0]][0] == 0


def test_a_model_with_one_token_type_gets_none(tmp_path):
    _, questions, logits = inputs_of(save_small_bert(tmp_path / "model", type_vocab_size=1))
    assert "token_type_ids" not in questions and logits.shape[0] == 2


def cased(folder):
    words = (folder / "vocab.txt").read_text().splitlines()
    (folder / "cased.txt").write_text("".join(w[:1].upper() + w[1:] + "\n" if w[:1].isalpha()
                                              else w + "\n" for w in words))
    (folder / "tokenizer.json").unlink()
    BertTokenizerFast(str(folder / "cased.txt"), do_lower_case=True).save_pretrained(folder)


def test_unknown_words_are_said_with_their_share(saved, folder, data_dir, tmp_path, capsys):
    cased(folder)
    capsys.readouterr()
    train_lora(folder, data_dir, tmp_path)
    one_warning(capsys.readouterr().err, "% of the training rows' words", "[UNK]")
    for first, split in enumerate(("train", "dev", "test"), 0x13a0):
        head, *rows = (data_dir / f"{split}.tsv").read_text().splitlines()
        rows = [f"{chr(first)}{chr(0x13a0 + i % 40)}{chr(0x13a0 + i // 40)}\t{row.split(chr(9))[1]}"
                for i, row in enumerate(rows)]  # Cherokee: no row twice, and nothing is known
        (data_dir / f"{split}.tsv").write_text("\n".join([head, *rows]) + "\n")
    capsys.readouterr()
    one_line_exit(lambda: train_lora(saved, data_dir, tmp_path), "100%", "[UNK]")
    assert not capsys.readouterr().err


def test_words_that_never_come_and_rows_that_no_id_reaches_are_said(folder, capsys):
    words = (folder / "vocab.txt").read_text().splitlines()[:29000]
    words = [w.capitalize() if i > 25000 and w.isalpha() else w for i, w in enumerate(words)]
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.txt").write_text("\n".join(dict.fromkeys(words)) + "\n")
    BertTokenizerFast(str(folder / "vocab.txt"), do_lower_case=True).save_pretrained(folder)
    tokenizer, _ = load_pretrained(str(folder), LABELS)
    rows = data.Rows(["a good film and a bad one"], [0])
    check_words("it", data.Sentences(rows, tokenizer, lengths(32)).ids, tokenizer)
    few, cased = capsys.readouterr().err.splitlines()
    assert few.startswith("warning: ") and "30,522 rows" in few
    assert cased.startswith("warning: ") and "lower-cases" in cased and "do_lower_case" in cased


def test_predict_and_merge_refuse_another_tokenizer(folder, data_dir, tmp_path, capsys):
    path = train_lora(folder, data_dir, tmp_path)
    assert "warning" not in capsys.readouterr().err
    assert len(checkpoint.read_about(path)["tokenizer"]) == 16
    (folder / "tokenizer.json").unlink()
    BertTokenizerFast(str(folder / "vocab.txt"), do_lower_case=False).save_pretrained(folder)
    for act in (lambda: predict.main(predict.parse_args(["--checkpoint", str(path),
                                                         "--model", str(folder), "A film"])),
                lambda: export.main(export.parse_args([str(path), "--model", str(folder),
                                                       "--to", str(tmp_path / "merged")]))):
        one_line_exit(act, "another tokenizer")


@pytest.mark.parametrize("method", ["lora", "head", "full", "houlsby"])
def test_a_new_pooler_trains_with_the_head_and_is_counted_as_head(method, without_pooler, tmp_path,
                                                                  capsys):
    folder = without_pooler
    torch.manual_seed(3)
    tokenizer, model = load_pretrained(str(folder), LABELS)
    assert "has no pooler; a new one trains with the head" in capsys.readouterr().err
    s = settings(*METHODS[method], "--model", folder)
    task = data.Task(LABELS, None, None, None, "", data.Sentences)
    about = checkpoint.describe(model, s, task, tokenizer)
    trained = checkpoint.share_storage(model)
    apply_method(trained, s, torch.float32)
    names = set(trained_tensors(trained))
    assert {"bert.pooler.dense.weight", "bert.pooler.dense.bias"} <= names
    assert count_params(trained)["trainable_by_kind"]["head"] == 48 * 48 + 48 + 2 * 48 + 2
    if method in ("full", "houlsby"):  # the two would share what trains with the base
        return
    # in the file, and the base is the same whatever its new pooler was drawn as
    randomize(trained)
    path = tmp_path / "own.safetensors"
    checkpoint.save(path, trained, about)
    torch.manual_seed(4)
    _, again = load_pretrained(str(folder), LABELS)
    assert not torch.equal(again.bert.pooler.dense.weight, model.bert.pooler.dense.weight)
    loaded, _ = checkpoint.attach(again, about["base"], path)
    inputs = tokenizer(["a good film"], return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, trained.eval()(**inputs).logits)


def test_the_default_s_pooler_is_its_own(capsys):
    _, model = load_pretrained("all-MiniLM-L6-v2", LABELS)
    assert not model.new_pooler and not capsys.readouterr().err
    apply_method(model, settings("--method", "lora"), torch.float32)
    assert "bert.pooler.dense.weight" not in trained_tensors(model)


def test_half_a_pooler_is_a_damaged_file(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["bert.pooler.dense.bias"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    one_line_exit(lambda: load_pretrained(str(folder), LABELS), "lacks 1", "pooler")


def test_a_model_without_pooler_is_trained_asked_and_exported(without_pooler, data_dir, tmp_path,
                                                              capsys):
    model = without_pooler
    path = train_lora(model, data_dir, tmp_path)
    said = capsys.readouterr()
    assert said.err.count("has no pooler") == 1 and "head 2,450" in said.out
    export.main(export.parse_args([str(path), "--model", str(model), "--to",
                                   str(tmp_path / "merged")]))
    assert "bert.pooler.dense.weight" in load_file(tmp_path / "merged" / "model.safetensors")
    export.main(export.parse_args([str(path), "--model", str(model), "--to",
                                   str(tmp_path / "peft"), "--format", "peft"]))
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["classifier", "pooler"]
    predict.main(predict.parse_args(["a film", "--checkpoint", str(tmp_path / "peft"),
                                     "--model", str(model)]))
