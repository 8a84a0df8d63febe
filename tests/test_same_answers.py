"""The same answers everywhere: what docs/use.md says to call on an export of either kind answers as
tools.predict does, also where a text, a pair or a passage is too long."""
import functools
import importlib.util
import json
import random
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT, default_tokenizer, randomize, save_small_bert, settings
from transformers import AutoConfig, AutoModelForQuestionAnswering, AutoTokenizer, BertModel
from transformers import AutoModelForSequenceClassification as AutoModelForSentences

import checkpoint
import data
import tools.export as export
import tools.predict as predict
from model import apply_method, load_pretrained
from qa import Question

needs_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None,
                                reason="peft is not installed")
LABELS, LENGTH = ["no", "perhaps", "yes"], 90
BASE = "downloads/all-MiniLM-L6-v2"
USE = (ROOT / "docs" / "use.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder in which the snippets of docs/use.md run as they stand: a base without a head, a
    LoRA's checkpoint and both exports; and the same of QLoRA and of questions."""
    folder = tmp_path_factory.mktemp("place")
    (folder / BASE).mkdir(parents=True)
    # weights so large that random texts have different answers
    small = save_small_bert(folder / BASE, initializer_range=0.3)
    BertModel.from_pretrained(small).save_pretrained(small)
    for name, labels, *flags in [
            ("", LABELS, "lora"), ("4bit_", LABELS, "qlora"),
            ("qa_", None, "lora", "--task", "squad", "--stride", 16, "--max-answer-length", 5)]:
        s = settings("--r", 4, "--amp", "off", "--max-length", LENGTH, "--model", small,
                     "--method", *flags)
        tokenizer, base = load_pretrained(str(small), labels)
        trained = checkpoint.share_storage(base)
        apply_method(trained, s, torch.float32)
        about = checkpoint.describe(base, s, data.Task(labels, *[None] * 3, "", None), tokenizer)
        path = folder / f"{name}own.safetensors"
        checkpoint.save(path, randomize(trained), about)
        export.export(path, folder / f"{name}merged", str(small))
        export.export(path, folder / f"{name}my_lora", str(small), is_peft=True)
    return folder


def own(place, name=""):
    """(tools.predict's Trained, tokenizer) of a checkpoint of `place`."""
    tokenizer, [method] = predict.load_methods({"own": place / f"{name}own.safetensors"},
                                               str(place / BASE))
    return method, tokenizer


@functools.cache
def words():
    """The words that are one token, each."""
    return sorted(w for w in default_tokenizer().get_vocab() if w.isalpha() and w.isascii())


def texts(*lengths, seed=0):
    """A random text of so many tokens for each length."""
    draw = random.Random(seed)
    return [" ".join(draw.choices(words(), k=n)) for n in lengths]


def run_snippet(folder):
    """What `ask` is after the Python snippet of docs/use.md that reads this folder."""
    code, = [code for code in re.findall(r"```python\n(.*?)```", USE, flags=re.S)
             if f'"{folder}"' in code]
    names = {}
    exec(code, names)
    return names["ask"]


def assert_same(ask, asked, probabilities):
    """A pipeline gives each text the label, and all labels the probabilities, that we give."""
    for said, expected in zip(ask(asked, truncation=True, top_k=None), probabilities, strict=True):
        assert said[0]["label"] == LABELS[np.argmax(expected)]
        found = {own["label"]: own["score"] for own in said}
        assert [found[label] for label in LABELS] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("folder", ["merged", pytest.param("my_lora", marks=needs_peft)])
def test_a_pipeline_says_what_tools_predict_says(folder, place, monkeypatch, capsys):
    method, tokenizer = own(place)
    monkeypatch.chdir(place)
    ask = run_snippet(folder)
    assert capsys.readouterr().out.count("'label'") == 2
    singles = texts(1, 2, 87, 88, 89, 90, 200, 600, 2000, 2000, 5, 10, 20, 30, 50, 60)
    expected, n_cut = predict.probabilities(method, tokenizer, singles)
    # all labels are among the answers, and the texts are as long as they should be
    assert {int(np.argmax(p)) for p in expected} == {0, 1, 2} and n_cut == 6
    assert_same(ask, singles, expected)
    label, probability = predict.classify(method, tokenizer, singles[-1])
    assert ask(singles[-1], truncation=True)[0] == {
        "label": label, "score": pytest.approx(probability, abs=1e-4)}

    # the longer one is cut, token by token, until both fit
    lengths = (3, 43, 44, 80, 2000)
    pairs = [pair for i, n in enumerate(lengths)
             for pair in zip(texts(*lengths, seed=i), texts(*[n] * len(lengths), seed=i + 9))]
    of_pairs, n_cut = predict.probabilities(method, tokenizer, pairs)
    assert len({int(np.argmax(p)) for p in of_pairs}) == 3
    assert n_cut == sum(a + b > LENGTH - 3 for a in lengths for b in lengths)
    as_dicts = [{"text": a, "text_pair": b} for a, b in pairs]
    assert_same(ask, as_dicts, of_pairs)

    # as before, when the tokenizer said 512
    ask.tokenizer.model_max_length = 512
    for asked, own_answers in [(singles, expected), (as_dicts, of_pairs)]:
        with pytest.raises(AssertionError):
            assert_same(ask, asked, own_answers)


@needs_peft
def test_other_ways_into_a_peft_folder(place, tmp_path):
    from peft import AutoPeftModelForSequenceClassification as AutoPeft
    method, tokenizer = own(place)
    folder = shutil.copytree(place / "my_lora", tmp_path / "my_lora")
    peft_config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(
        peft_config | {"base_model_name_or_path": str(place / BASE)}))
    tokens = tokenizer(texts(20, 30), padding=True, return_tensors="pt")
    config = AutoConfig.from_pretrained(folder / "base_config.json")
    for theirs in (AutoPeft.from_pretrained(folder, id2label=config.id2label),
                   AutoModelForSentences.from_pretrained(folder, config=config)):
        assert theirs.config.id2label == dict(enumerate(LABELS))
        with torch.no_grad():
            assert (theirs.eval()(**tokens).logits - method.model(**tokens).logits).abs().max() < (
                1e-5)
    # and from here
    _, [again] = predict.load_methods(export.name_files([place / "my_lora"]), str(place / BASE))
    assert again.about == method.about


@needs_peft
def test_qlora_on_a_base_that_peft_s_user_loads_in_4_bits(place):
    from peft import PeftModel
    from transformers import BitsAndBytesConfig
    method, tokenizer = own(place, "4bit_")
    folder = place / "4bit_my_lora"
    code = re.search(r"`(BitsAndBytesConfig\(.*?\))`", USE)[1]

    def logits(code):
        base = AutoModelForSentences.from_pretrained(
            place / BASE, config=AutoConfig.from_pretrained(folder / "base_config.json"),
            quantization_config=eval(code, {"BitsAndBytesConfig": BitsAndBytesConfig}),
            device_map="cpu")
        for module in base.modules():
            module.support_avx512bf16_for_cpu = False  # as in quant.py: bitsandbytes would use bf16
        with torch.no_grad():
            return PeftModel.from_pretrained(base, folder).eval()(**tokens).logits

    tokens = tokenizer(texts(20, 30), padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = method.model(**tokens).logits
    assert (logits(code) - expected).abs().max() < 1e-5
    assert (logits(code.replace("bert.pooler", "pooler")) - expected).abs().max() > 1e-3
    with pytest.raises(AssertionError):
        logits(re.sub(r", llm_int8_skip_modules=\[.*?\]", "", code))


# --- questions -----------------------------------------------------------------------------------

def best_span(model, tokenizer, question, passage):
    """The best span of a passage, in the windows that docs/use.md says, and where it starts. model:
    a function of tokens."""
    windows = tokenizer(question, passage, truncation="only_second", stride=16,
                        return_overflowing_tokens=True, return_offsets_mapping=True, padding=True,
                        return_tensors="pt")
    tokens = {name: windows[name] for name in tokenizer.model_input_names}
    with torch.no_grad():
        out = model(**tokens)
    spans = [(float(out.start_logits[w, i] + out.end_logits[w, j]), int(offsets[i][0]),
              int(offsets[j][1]))
             for w, offsets in enumerate(windows["offset_mapping"])
             for i, part in enumerate(windows.sequence_ids(w)) if part == 1
             for j in range(i, min(i + 5, len(offsets))) if windows.sequence_ids(w)[j] == 1]
    _, begin, end = max(spans)
    return passage[begin:end], begin


@pytest.mark.parametrize("folder", ["merged", pytest.param("my_lora", marks=needs_peft)])
def test_questions(folder, place):
    method, tokenizer = own(place, "qa_")
    path = place / f"qa_{folder}"
    if folder == "merged":
        ask = AutoModelForQuestionAnswering.from_pretrained(path).eval()
    else:
        from peft import PeftModel
        model = PeftModel.from_pretrained(AutoModelForQuestionAnswering.from_pretrained(
            place / BASE, config=AutoConfig.from_pretrained(path / "base_config.json")), path)
        ask = model.eval().base_model
        # what model(**tokens) does: it drops token_type_ids
        tokens = tokenizer(*texts(8, 20), return_tensors="pt")
        with torch.no_grad():
            expected = method.model(**tokens).start_logits
            assert torch.equal(ask(**tokens).start_logits, expected)
            assert (model(**tokens).start_logits - expected).abs().max() > 0.1
            del tokens["token_type_ids"]
            assert torch.equal(ask(**tokens).start_logits, model(**tokens).start_logits)

    asked = list(zip(texts(2, 5, 8, 6, 4, 3), texts(1, 10, 30, 100, 600, 2000, seed=1)))
    expected = predict.spans(method, tokenizer, [Question(passage, question, [""], None, None)
                                                 for question, passage in asked])
    found = [best_span(ask, AutoTokenizer.from_pretrained(path), *pair) for pair in asked]
    assert found == expected and len({begin for _, begin in expected}) > 4
