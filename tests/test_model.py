"""Models that do not fit themselves are refused in one line, or made right; unknown words
are said."""
import json

import numpy as np
import pytest
import torch
from conftest import (
    METHODS,
    one_line_error,
    one_line_exit,
    one_warning,
    randomize,
    save_small_bert,
    settings,
    train,
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
import export
import predict
import qa
from fetch import model_folder
from model import apply_method, check_words, count_params, load_pretrained, trained_tensors

QUESTION = qa.Question("it is here", "where?", ["here"], 6, 10)


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


def with_nan(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["bert.encoder.layer.1.output.dense.bias"][3] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("spoil, words", [
    (with_nan, ["1 tensors with NaN", "layer.1.output.dense.bias"]),
    (without_tokenizer, ["no tokenizer"]),
    (with_more_words, ["ids up to 30,522", "30,522 rows"]),
    (lambda folder: edit_json(folder / "config.json", position_embedding_type="relative_key"),
     ["'relative_key'", "absolute"]),
    (lambda folder: edit_json(folder / "config.json", is_decoder=True), ["decoder"]),
    (without_padding_token, ["padding token"]),
    (without_special_tokens, ["[CLS]", "[SEP]"]),
    (with_foreign_tensors, ["distance_embedding", "1 tensors"]),
], ids=lambda x: getattr(x, "__name__", ""))
@pytest.mark.parametrize("label_names", [["no", "yes"], None], ids=["sentences", "questions"])
def test_what_cannot_be_right_is_refused(spoil, words, label_names, tmp_path):
    spoil(folder := save_small_bert(tmp_path / "model"))
    one_line_exit(lambda: load_pretrained(str(folder), label_names), folder, *words)


def test_it_is_refused_before_the_training(data_dir, tmp_path):
    with_more_words(folder := save_small_bert(tmp_path / "model"))
    one_line_error(train("--method", "lora", "--model", folder, "--data", data_dir,
                         "--output", tmp_path / "out"),
                   "ids up to 30,522")


def inputs_of(folder):
    """(ids and mask of two sentences, all inputs of two questions, their logits) of the
    model in a folder."""
    torch.manual_seed(0)
    tokenizer, model = load_pretrained(str(folder), ["no", "yes"])
    rows = data.Sentences(data.Rows(["a good film", "bad"], [0, 1]), tokenizer, {"max_length": 16})
    sentences = rows.collate(np.arange(2))
    tokenizer, model = load_pretrained(str(folder), None)
    windows = qa.Windows([QUESTION, QUESTION._replace(question="where is it?")], tokenizer,
                         {"max_length": 32, "stride": 4})
    questions = windows.collate(np.arange(2))
    with torch.no_grad():
        out = windows.forward(model.eval(), questions)
    assert out.loss.isfinite() and windows.spans.any()
    return sentences, questions, out.start_logits


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
def test_what_can_be_made_right_gives_the_same_inputs(spoil, tmp_path):
    plain, other = (save_small_bert(tmp_path / name) for name in ("plain", "other"))
    spoil(other)
    a, b = inputs_of(plain), inputs_of(other)
    assert same(a[0], b[0]) and same(a[1], b[1]) and torch.equal(a[2], b[2])
    assert b[1]["token_type_ids"].tolist()[0][-2:] == [0, 0] and b[1]["token_type_ids"].any()
    long = qa.Windows([QUESTION._replace(context="it is here " + "and there " * 50)],
                      load_pretrained(str(other), None)[0], {"max_length": 32, "stride": 4})
    # the first window starts where the passage does
    assert long.offsets[0][long.passage[0][0]][0] == 0


def test_a_model_with_one_token_type_gets_none(tmp_path):
    _, questions, logits = inputs_of(save_small_bert(tmp_path / "model", type_vocab_size=1))
    assert "token_type_ids" not in questions and logits.shape[0] == 2


def cased(folder):
    words = (model_folder() / "vocab.txt").read_text().splitlines()
    (folder / "cased.txt").write_text("".join(w[:1].upper() + w[1:] + "\n" if w[:1].isalpha()
                                              else w + "\n" for w in words))
    (folder / "tokenizer.json").unlink()
    BertTokenizerFast(str(folder / "cased.txt"), do_lower_case=True).save_pretrained(folder)


def test_unknown_words_are_said_with_their_share(data_dir, tmp_path):
    cased(folder := save_small_bert(tmp_path / "model"))
    done = train("--method", "lora", "--model", folder, "--data", data_dir, "--max-steps", 2,
                 "--epochs", 1, "--output", tmp_path / "out")
    assert done.returncode == 0
    one_warning(done.stderr, "% of the training rows' words", "[UNK]")
    for first, split in enumerate(("train", "dev", "test"), 0x13a0):
        head, *rows = (data_dir / f"{split}.tsv").read_text().splitlines()
        rows = [f"{chr(first)}{chr(0x13a0 + i % 40)}{chr(0x13a0 + i // 40)}\t{row.split(chr(9))[1]}"
                for i, row in enumerate(rows)]  # Cherokee: no row twice, and nothing is known
        (data_dir / f"{split}.tsv").write_text("\n".join([head, *rows]) + "\n")
    one_line_error(train("--method", "lora", "--model", save_small_bert(tmp_path / "plain"),
                         "--data", data_dir, "--output", tmp_path / "out"),
                   "100%", "[UNK]")


def test_words_that_never_come_and_rows_that_no_id_reaches_are_said(tmp_path, capsys):
    folder = save_small_bert(tmp_path / "model")
    words = (model_folder() / "vocab.txt").read_text().splitlines()[:29000]
    words = [w.capitalize() if i > 25000 and w.isalpha() else w for i, w in enumerate(words)]
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.txt").write_text("\n".join(dict.fromkeys(words)) + "\n")
    BertTokenizerFast(str(folder / "vocab.txt"), do_lower_case=True).save_pretrained(folder)
    tokenizer, _ = load_pretrained(str(folder), ["no", "yes"])
    rows = data.Rows(["a good film and a bad one"], [0])
    check_words("it", data.Sentences(rows, tokenizer, {"max_length": 32}), tokenizer)
    few, cased = capsys.readouterr().err.splitlines()
    assert few.startswith("warning: ") and "30,522 rows" in few
    assert cased.startswith("warning: ") and "lower-cases" in cased and "do_lower_case" in cased


def test_predict_and_merge_refuse_another_tokenizer(data_dir, tmp_path):
    model = save_small_bert(tmp_path / "model")
    done = train("--method", "lora", "--model", model, "--data", data_dir, "--max-steps", 2,
                 "--epochs", 1, "--output", tmp_path / "out")
    assert (done.returncode == 0
            and not [line for line in done.stderr.splitlines() if "warning" in line])
    path, = (tmp_path / "out" / "checkpoints").iterdir()
    assert len(checkpoint.read_about(path)["tokenizer"]) == 16
    (model / "tokenizer.json").unlink()
    BertTokenizerFast(str(model / "vocab.txt"), do_lower_case=False).save_pretrained(model)
    for act in (lambda: predict.main(predict.parse_args(["--checkpoint", str(path),
                                                         "--model", str(model), "A film"])),
                lambda: export.main(export.parse_args([str(path), "--model", str(model),
                                                     "--to", str(tmp_path / "merged")]))):
        one_line_exit(act, "another tokenizer")


def masked_language_model(folder):
    """The small BERT as a masked language model left it: without pooler and head."""
    save_small_bert(folder)
    config = AutoConfig.from_pretrained(folder)
    torch.manual_seed(1)
    BertForMaskedLM(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("method", ["lora", "head", "full", "houlsby"])
def test_a_new_pooler_trains_with_the_head_and_is_counted_as_head(method, tmp_path, capsys):
    folder = masked_language_model(tmp_path / "mlm")
    torch.manual_seed(3)
    tokenizer, model = load_pretrained(str(folder), ["no", "yes"])
    assert "has no pooler; a new one trains with the head" in capsys.readouterr().err
    s = settings(*METHODS[method], "--model", folder)
    about = checkpoint.describe(model, s, ["no", "yes"], tokenizer)
    trained = checkpoint.share(model)
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
    _, again = load_pretrained(str(folder), ["no", "yes"])
    assert not torch.equal(again.bert.pooler.dense.weight, model.bert.pooler.dense.weight)
    loaded, _ = checkpoint.attach(again, about["base"], path)
    inputs = tokenizer(["a good film"], return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, trained.eval()(**inputs).logits)


def test_the_default_s_pooler_is_its_own(capsys):
    _, model = load_pretrained("all-MiniLM-L6-v2", ["no", "yes"])
    assert not model.new_pooler and not capsys.readouterr().err
    apply_method(model, settings("--method", "lora"), torch.float32)
    assert "bert.pooler.dense.weight" not in trained_tensors(model)


def test_half_a_pooler_is_a_damaged_file(tmp_path):
    folder = save_small_bert(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    del tensors["bert.pooler.dense.bias"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    one_line_exit(lambda: load_pretrained(str(folder), ["no", "yes"]), "lacks 1", "pooler")


def test_a_model_without_pooler_is_trained_asked_and_exported(data_dir, tmp_path):
    model = masked_language_model(tmp_path / "mlm")
    done = train("--method", "lora", "--model", model, "--data", data_dir, "--max-steps", 2,
                 "--epochs", 1, "--output", tmp_path / "out")
    assert done.returncode == 0 and done.stderr.count("has no pooler") == 1, done.stderr
    assert "head 2,450" in done.stdout
    path, = (tmp_path / "out" / "checkpoints").iterdir()
    export.main(export.parse_args([str(path), "--model", str(model), "--to",
                                   str(tmp_path / "merged")]))
    assert "bert.pooler.dense.weight" in load_file(tmp_path / "merged" / "model.safetensors")
    export.main(export.parse_args([str(path), "--model", str(model), "--to",
                                   str(tmp_path / "peft"), "--format", "peft"]))
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["classifier", "pooler"]
    predict.main(predict.parse_args(["a film", "--checkpoint", str(tmp_path / "peft"),
                                     "--model", str(model)]))
