"""Question answering: the data and all that can be wrong with it, windows, the best span, the
scores, and the generated questions."""
import functools
import json
import re
import shutil
from collections import Counter
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from conftest import (
    METHODS,
    build,
    elsewhere,
    lengths,
    one_line_exit,
    program,
    randomize,
    save_small_bert,
    settings,
    train,
)
from transformers import AutoTokenizer, BertConfig, BertForQuestionAnswering

import compare
import fast
import qa
import tools.export as export
import train as train_module
from checkpoint import attach
from fetch import DOWNLOADS, model_folder, synthetic_folder
from model import SpanHead, apply_method, trained_tensors
from tools import synthetic

WORDS = ("alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho "
         "sigma tau upsilon").split()


def question(context, text, question="where is it?", id="q"):
    return qa.make_question({"id": id, "context": context, "question": question,
                             "answers": {"text": [text], "answer_start": [context.index(text)]}})


def load(folder):
    """The Task of a folder with questions, as --data FOLDER asks for it."""
    return qa.load_task(settings("--method", "full", "--data", folder), folder)


def squad(*paragraphs):
    """SQuAD-shaped JSON from (context, [(question, answer text, answer_start)])."""
    return {"version": "1.1", "data": [{"title": "t", "paragraphs": [
        {"context": context, "qas": [{"id": f"{i}-{j}", "question": q,
                                      "answers": [{"text": text, "answer_start": start}]}
                                     for j, (q, text, start) in enumerate(qas)]}
        for i, (context, qas) in enumerate(paragraphs)]}]}


def small_set(n, seed=0):
    """SQuAD-shaped JSON of n questions on n passages, the answer being the word after `is`."""
    rng = np.random.default_rng(seed)
    paragraphs = []
    for i in range(n):
        a, b = rng.choice(WORDS, 2, replace=False)
        context = f"passage {seed} {i}: the key is {a} and the lock was {b}."
        paragraphs.append((context, [("what is the key?", str(a), context.index(f"is {a}") + 3)]))
    return squad(*paragraphs)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(model_folder())


# --- scores ---------------------------------------------------------------------------------------

def test_scores_are_those_of_squad():
    assert (qa.normalize("  The Eiffel-Tower, in  an ANcient town! ")
            == "eiffeltower in ancient town")
    assert qa.exact_match("the Cat.", "cat") == 1 and qa.exact_match("cats", "cat") == 0
    assert qa.f1("the cat sat", "a cat sat down") == pytest.approx(
        2 * (2 / 2) * (2 / 3) / (2 / 2 + 2 / 3))
    # a word counts as often as it is in both
    assert qa.f1("cat cat", "cat") == pytest.approx(2 / 3)
    assert qa.f1("dog", "cat") == 0 and qa.f1("", "cat") == 0


def test_the_best_window_answers_and_the_best_reference_counts(tokenizer):
    questions = [question("it is here", "here")._replace(answers=["there", "here and now"]),
                 question("it is far", "far")]
    windows = qa.Windows(questions, tokenizer, lengths(64, 8))
    windows.question = [0, 0, 1]
    outcome = windows.outcome([(1.0, "nowhere", 0), (2.0, "here", 6), (-5.0, "Far!", 6)])
    assert outcome["predictions"] == [(["there", "here and now"], "here"), (["far"], "Far!")]
    assert outcome["groups"] == [0, 1]  # two passages
    # one word of five, at random
    assert len(outcome["random"]) == 2 and all(0 <= f1 <= 60 for f1 in outcome["random"])
    assert windows.score(outcome) == {"f1": pytest.approx(100 * (0.5 + 1) / 2), "exact_match": 50}


# --- windows and spans ----------------------------------------------------------------------------

@pytest.fixture
def long_passage(tokenizer):
    rng = np.random.default_rng(0)
    contexts = [" ".join(rng.choice(WORDS, 300)) + " unbelievable-answerables "
                + " ".join(rng.choice(WORDS, 100)), "it is here"]
    questions = [question(contexts[0], "unbelievable-answerables"), question(contexts[1], "here")]
    return questions, qa.Windows(questions, tokenizer, lengths(128, 40))


def test_windows_cover_the_passage_and_share_the_stride(long_passage):
    questions, windows = long_passage
    own = [w for w, q in enumerate(windows.question) if q == 0]
    assert (windows.n == 2 and len(own) > 4 and max(windows.lengths) == 128
            and windows.question[-1] == 1)
    pieces = [windows.offsets[w][slice(*windows.passage[w])] for w in own]
    assert pieces[0][0][0] == 0 and pieces[-1][-1][1] == len(questions[0].context)
    for a, b in zip(pieces, pieces[1:]):
        assert np.array_equal(a[-40:], b[:40])  # the same 40 tokens


def test_answers_are_mapped_to_tokens_and_null_windows_to_cls(long_passage, tokenizer):
    questions, windows = long_passage
    holding = [w for w in range(len(windows.ids)) if windows.spans[w].any()]
    assert 2 <= len(holding) < len(windows.ids)
    for w in range(len(windows.ids)):
        start, end = windows.spans[w].tolist()
        q, offsets = questions[windows.question[w]], windows.offsets[w]
        if w in holding:
            assert q.context[offsets[start][0]:offsets[end][1]] == q.answers[0]
            assert tokenizer.decode(windows.ids[w][start:end + 1]).replace(" ", "") == q.answers[0]
        else:
            piece = offsets[slice(*windows.passage[w])]
            assert (start, end) == (0, 0) and not (piece[0][0] <= q.start and q.end <= piece[-1][1])


def test_collate_marks_question_passage_and_padding(long_passage, tokenizer):
    _, windows = long_passage
    x = windows.collate(np.array([0, len(windows.ids) - 1]))
    expected = tokenizer(["where is it?"], ["it is here"])
    n = len(expected["input_ids"][0])
    assert (x["input_ids"][1, :n].tolist() == expected["input_ids"][0]
            and not x["input_ids"][1, n:].any())
    assert (x["token_type_ids"][1, :n].tolist() == expected["token_type_ids"][0]
            and not x["token_type_ids"][1, n:].any())
    assert x["attention_mask"].sum(1).tolist() == [128, n]
    assert x["start_positions"].tolist() == windows.spans[[0, -1], 0].tolist()


def test_predicted_span_is_the_best_valid_one(long_passage):
    questions, windows = long_passage
    rows = np.arange(len(windows.ids))
    torch.manual_seed(0)
    start, end = torch.randn(2, len(rows), 128)
    start[:, 1] = end[:, 1] = 9  # a token of the question: never an answer
    start[:, 0] = end[:, 0] = 9  # [CLS] neither
    start[:, -30], end[:, 20] = 8, 8  # end before start
    start[0, 40], end[0, 70], end[0, 69] = 8, 8, 7  # 31 tokens, too many; 30 tokens
    found = windows.predict(SimpleNamespace(start_logits=start, end_logits=end), rows)
    for row, (score, answer, at) in zip(rows, found):
        first, last = windows.passage[row]
        pairs = {(i, j): (start[row, i] + end[row, j]).item()
                 for i in range(first, last) for j in range(i, min(last, i + 30))}
        i, j = max(pairs, key=pairs.get)
        offsets, context = windows.offsets[row], questions[windows.question[row]].context
        assert (score == pytest.approx(pairs[i, j])
                and answer == context[offsets[i][0]:offsets[j][1]] and at == offsets[i][0])
        assert row != 0 or (i, j) == (40, 69)


def test_windows_without_their_answer_are_not_trained_on(tokenizer):
    words = " ".join(WORDS * 4)
    # longer than what neighbouring windows share: in none as a whole
    long = question(words, " ".join(WORDS * 3))
    padded = question("it is  here ", " here ")
    assert padded.context[padded.start:padded.end] == "here"
    windows = qa.Windows([padded, long, padded], tokenizer, lengths(64, 8))
    assert windows.usable.tolist() == [0, len(windows.ids) - 1] and len(windows.ids) == 4
    trained = np.concatenate(windows.batches(4, np.random.default_rng(0)))
    assert (sorted(trained) == windows.usable.tolist()
            and len(np.concatenate(windows.batches(4))) == len(windows.ids))


def test_questions_are_cut_at_64_tokens_and_never_crowd_out_the_passage(tokenizer):
    long = question("it is here", "here", question=" ".join(WORDS * 20))
    windows = qa.Windows([long], tokenizer, lengths(128, 40))
    assert windows.passage[0][0] == 1 + 64 + 1 and windows.spans[0].any()


@pytest.mark.parametrize("method", METHODS)
def test_fast_model_is_the_same_model(method):
    plain, quick = (randomize(build(method, BertForQuestionAnswering)) for _ in range(2))
    fast.install(quick)
    ids = torch.randint(1, 50, (4, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0
    x = {"input_ids": ids, "attention_mask": mask,
         "token_type_ids": (torch.arange(9) > 3).long().expand(4, 9),
         "start_positions": torch.tensor([4, 5, 6, 0]), "end_positions": torch.tensor([4, 6, 8, 0])}
    outs = [model(**x) for model in (plain, quick)]
    kept = mask.bool()
    assert torch.allclose(outs[0].start_logits[kept], outs[1].start_logits[kept], atol=1e-5)
    for out in outs:
        out.loss.backward()
    for name, p in trained_tensors(plain).items():
        assert torch.allclose(p.grad, trained_tensors(quick)[name].grad, atol=1e-5), name


@pytest.mark.parametrize("method", ["full", "lora", "dora"])
def test_padding_changes_neither_loss_nor_gradient_nor_answer(method, tokenizer):
    windows = qa.Windows([question(f"it is {'very ' * i}far, near {w}", w)
                          for i, w in enumerate(WORDS[:6])],
                         tokenizer, lengths(64, 8))
    model = randomize(build_for(tokenizer, method))
    x = windows.collate(np.arange(6))
    found = []
    for extra in 0, 1, 23:
        padded = {name: torch.nn.functional.pad(tensor, (0, extra)) if tensor.dim() == 2 else tensor
                  for name, tensor in x.items()}
        model.zero_grad()
        out = windows.forward(model, padded)
        out.loss.backward()
        found.append((out.loss.item(), [p.grad.clone() for p in trained_tensors(model).values()],
                      windows.predict(out, np.arange(6))))
    for loss, grads, answers in found[1:]:
        assert (loss == pytest.approx(found[0][0], abs=1e-6)
                and [a for _, *a in answers] == [a for _, *a in found[0][2]])
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(grads, found[0][1]))
    logits = model(**{name: x[name] for name in ("input_ids", "attention_mask", "token_type_ids")})
    expected = []  # the equation written out: only tokens are in the sums
    for i, n in enumerate(windows.lengths):
        for scores, at in ((logits.start_logits[i, :n], x["start_positions"][i]),
                           (logits.end_logits[i, :n], x["end_positions"][i])):
            expected.append(torch.log(torch.exp(scores).sum()) - scores[at])
    assert found[0][0] == pytest.approx(sum(expected).item() / 12, abs=1e-5)


def build_for(tokenizer, method):
    """A small BERT for questions with this tokenizer's vocabulary, without dropout, turned into one
    of METHODS."""
    torch.manual_seed(0)
    model = BertForQuestionAnswering(
        BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
                   hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))
    apply_method(model, settings(*METHODS[method], "--dropout", 0) if method != "full"
                 else settings(*METHODS[method]), torch.float32)
    return model


@pytest.mark.parametrize("by_length", [True, False])
def test_accumulation_changes_neither_loss_nor_step(by_length, tokenizer):
    windows = qa.Windows([question(f"it is {'very ' * (7 * i % 12)}far, near {WORDS[i]}", WORDS[i])
                          for i in range(12)],
                         tokenizer, lengths(64, 8))
    batches = windows.batches(6, np.random.default_rng(0), by_length)
    results = []
    for accumulation in 1, 2, 4:
        model = randomize(build_for(tokenizer, "full"))
        sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        off = torch.autocast("cpu", enabled=False), torch.amp.GradScaler("cpu", enabled=False)
        losses = [train_module.step(model, sgd, windows, batch, torch.device("cpu"), *off,
                                    accumulation).item()
                  for batch in batches]
        results.append((losses, [p.detach().clone() for p in model.parameters()]))
    for losses, tensors in results[1:]:
        assert losses == pytest.approx(results[0][0], abs=1e-5)
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(tensors, results[0][1]))


def test_logits_are_fp32_under_autocast(tokenizer):
    model = build_for(tokenizer, "full")
    model.qa_outputs = SpanHead(32, 2)
    ids = torch.randint(1000, 2000, (8, 64), generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        assert (model.bert.encoder.layer[0].attention.self.query(torch.ones(1, 32)).dtype
                is torch.bfloat16)
        start = model(input_ids=ids).start_logits
    # rounded to bf16, fewer than 100 are left
    assert start.dtype is torch.float32 and len(start.unique()) > 500
    assert len(start.bfloat16().unique()) < 400


@pytest.mark.parametrize("context, answer", [
    ("Caio ordered one cafe\u0301 at table 1. It was hot.", "cafe\u0301"),
    ("Ana went to sa\u0303o paulo", "sa\u0303o paulo"),
    ("he drank a cafe\u0301", "cafe\u0301"),  # nothing after the last mark
    ("a\u0302\u0323 b\u0302\u0323c e\u0302\u0323.", "e\u0302\u0323"),
    ("\u0939\u093f\u0928\u094d\u0926\u0940 \u092e\u0947\u0902 "  # Hindi
     "\u0926\u093f\u0932\u094d\u0932\u0940 \u0939\u0948", "\u0926\u093f\u0932\u094d\u0932\u0940"),
    ("\u05e9\u05b8\u05c1\u05dc\u05d5\u05b9\u05dd \u05e2\u05d5\u05b9\u05dc\u05b8\u05dd\u05b8",
     "\u05e2\u05d5\u05b9\u05dc\u05b8\u05dd\u05b8"),  # Hebrew with points
    ("\u0e44\u0e1b\u0e01\u0e34\u0e19\u0e19\u0e49\u0e33",
     "\u0e19\u0e49\u0e33"),  # Thai, without spaces
    ("a soft hy\u00adphen\u00ad", "hy\u00adphen"),  # inside a word they are of it
    ("it is cafe\u0301\u200b, or \u200ftea", "cafe\u0301"), ("in Oslo\u200e\u2060 now", "Oslo"),
    ("in \u200fOslo\x07\ufeff", "Oslo"), ("here \u0d28\u0d4d\u200d", "\u0d28\u0d4d\u200d"),
])
def test_answers_reach_over_what_belongs_to_no_token(context, answer, tokenizer):
    windows = qa.Windows([question(context, answer)], tokenizer, lengths(64, 8))
    (start, end), offsets = windows.spans[0].tolist(), windows.offsets[0]
    assert start > 0
    found = context[offsets[start][0]:qa.past_marks(context, offsets[end][1])]
    if "\u0e44" not in context:  # of a Thai word without spaces BERT makes one token
        assert found == answer and qa.f1(found, answer) == qa.exact_match(found, answer) == 1
    first, last = windows.passage[0]
    reached = {i for a, b in offsets[first:last] for i in range(a, qa.past_marks(context, b))}
    # each character that is seen belongs to a token
    unseen = "\x07\u00ad\u200b\u200e\u200f\u2060\ufeff"
    assert {i for i, c in enumerate(context) if not c.isspace() and c not in unseen} <= reached


@pytest.mark.parametrize("context, answer", [
    ("\u200bParis is big", "\u200bParis"), ("\u00adParis is", "\u00adParis"),
    ("it is Paris\u200b", "Paris\u200b"), ("Paris\x07", " Paris\x07".strip())])
def test_an_answer_that_ends_in_what_is_not_seen_is_trained_on(context, answer, tokenizer):
    windows = qa.Windows([question(context, answer)], tokenizer, lengths(64, 8))
    (start, end), offsets = windows.spans[0].tolist(), windows.offsets[0]
    assert windows.usable.tolist() == [0]
    assert context[offsets[start][0]:offsets[end][1]] == "Paris"


def test_a_mark_at_the_edge_of_a_window(tokenizer):
    words = [f"cafe\u0301{i}" if i % 3 else "e\u0301" for i in range(60)]
    context = " ".join(words)
    windows = qa.Windows([question(context, " ".join(words[20:23]))], tokenizer,
                         lengths(48, 20))
    held = [w for w in range(len(windows.ids)) if windows.spans[w].any()]
    assert len(windows.ids) > 3 and held
    for w in held:
        (start, end), offsets = windows.spans[w].tolist(), windows.offsets[w]
        past = qa.past_marks(context, offsets[end][1])
        assert context[offsets[start][0]:past] == " ".join(words[20:23])


def test_answers_that_are_too_long_are_counted_and_the_limit_can_be_raised(tokenizer):
    long = "a very " + "long and " * 20 + "winding road"  # 44 tokens
    questions = [question(f"Ana walked {long}. Then it rained.", long),
                 question("it is here", "here"),
                 question(f"it is {long}", long)._replace(answers=[long, "a road"])]
    scores = SimpleNamespace(start_logits=torch.zeros(3, 64), end_logits=torch.zeros(3, 64))
    for limit, n in (30, 1), (43, 1), (44, 0):
        windows = qa.Windows(questions, tokenizer,
                             lengths(64, 8, limit))
        assert (windows.note.startswith(f"{n} of 3 questions" if n else "")
                and bool(windows.note) is bool(n))
        scores.start_logits[0, windows.spans[0, 0]] = scores.end_logits[0, windows.spans[0, 1]] = 9
        (_, answer, _), *_ = windows.predict(scores, [0, 1, 2])
        assert (answer == long) is (limit == 44)


# --- data -----------------------------------------------------------------------------------------

def test_missing_splits_are_filled_by_whole_passages(tmp_path):
    paragraphs = [(f"passage {i} is {w}.",
                   [(f"what is it {j}?", w, len(f"passage {i} is ")) for j in range(3)])
                  for i, w in enumerate(WORDS)]
    (tmp_path / "train.json").write_text(json.dumps(squad(*paragraphs)))
    (tmp_path / "dev.json").write_text(json.dumps(small_set(5)))
    task = load(tmp_path)
    assert (len(task.test) == 5 and len(task.train) + len(task.validation) == 60
            and len(task.validation) == 6)
    assert not {q.context for q in task.train} & {q.context for q in task.validation}
    assert "validation questions are the test; 6 questions of train" in task.note


def test_a_file_of_questions_is_read_as_a_folder_with_train_alone(tmp_path):
    (tmp_path / "letters.json").write_text(json.dumps(small_set(20)))
    task = load(tmp_path / "letters.json")
    assert task[1:] == load(tmp_path)[1:] and len(task.train) == 17
    flags = ["--method", "lora", "--data", tmp_path / "letters.json"]
    assert settings(*flags).is_qa and settings(*flags).task == "letters"
    one_line_exit(lambda: settings(*flags, "--text-column", "x"), "--text-column")


def test_misaligned_answers_are_counted_and_left_out_of_training_only(tmp_path):
    broken = [("it is here", [("where?", "there", 6)]), ("it is here", [("where?", "here", 5)]),
              ("it is here", [("where?", "here", 600)]), ("it is here", [("where?", "here", -1)])]
    for split in "train", "validation", "test":
        content = small_set(6)
        content["data"] += squad(*broken)["data"]
        (tmp_path / f"{split}.json").write_text(json.dumps(content))
    task = load(tmp_path)
    assert ([len(rows) for rows in task[1:4]] == [6, 6, 10]
            and "8 questions left out of train and validation" in task.note)
    assert all(q.context[q.start:q.end] == q.answers[0] for q in task.train)
    (tmp_path / "train.json").write_text(json.dumps(squad(*broken)))
    with pytest.raises(SystemExit,
                       match="no answer of the 4 train questions stands at its answer_start"):
        load(tmp_path)


def test_questions_that_are_trained_on_and_tested_are_said(tmp_path, capsys):
    train = small_set(40)
    for split, content in ("train", train), ("test", {"data": train["data"][:2]}):
        (tmp_path / f"{split}.json").write_text(json.dumps(content))
    load(tmp_path)
    assert "test rows stand in the training rows, too" in capsys.readouterr().err


def test_only_generated_questions_have_levels_and_groups_of_their_own(tmp_path):
    content = squad(("it is here", [("where?", "here", 6)]))
    question = content["data"][0]["paragraphs"][0]["qas"][0]
    for name, level, group in (("5a7a", None, "it is here"),
                               ("synthetic-test-1", "hard", "hard: where?")):
        question |= {"id": name, "level": "hard"}  # as HotpotQA says it
        (tmp_path / "a.json").write_text(json.dumps(content))
        (found,) = map(qa.make_question, qa.read_squad(tmp_path / "a.json"))
        assert (found.level, found.group) == (level, group)


GOOD = squad(("it is here", [("where?", "here", 6)]))


def without(key, *path):
    content = json.loads(json.dumps(GOOD))
    owner = content
    for step in path:
        owner = owner[step]
    del owner[key]
    return content


QAS = ("data", 0, "paragraphs", 0, "qas", 0)


@pytest.mark.parametrize("content, words", [
    (without("data"), "no key 'data' in the whole"),
    ([], "no key 'data' in the whole"),
    ({"data": {}}, "'data' in the whole is '{}', not a list"),
    (without("paragraphs", "data", 0), r"no key 'paragraphs' in data\[0\]"),
    (without("context", "data", 0, "paragraphs", 0),
     r"no key 'context' in data\[0\].paragraphs\[0\]"),
    (without("question", *QAS), r"no key 'question' in data\[0\].paragraphs\[0\].qas\[0\]"),
    (without("answers", *QAS), "question '0-0' has no answer"),
    (without("answer_start", *QAS, "answers", 0), r"no key 'answer_start' in .*qas\[0\].answers"),
    (squad(("it is here", [("where?", "here", "6")])), "'answer_start' in .* is '6', not a int"),
    (squad(("it is here", [("  ", "here", 6)])), "question '0-0' is empty"),
    ({"data": []}, "has no questions"),
    (squad(("it is here", [("where?", "here", True)])),
     "'answer_start' in .* is 'True', not a int"),
    (squad(("it is \ud800 here", [("where?", "here", 8)])), "half of a surrogate pair"),
    ({"data": [3]}, r"no key 'paragraphs' in data\[0\]"),
    *[({"data": [{"paragraphs": [{"context": "it is here", "qas": [qa_]}]}]},
       r"no key 'question' in data\[0\].paragraphs\[0\].qas\[0\]")
      for qa_ in ("where?", None, 5, ["where?"])],
    (without(0, *QAS, "answers"), "has no answer; SQuAD 2.0"),
    (squad(("it is here", [("where?", " ", 5)])), "has no answer; SQuAD 2.0"),
])
def test_json_that_is_not_squad(tmp_path, content, words):
    (tmp_path / "train.json").write_text(json.dumps(content))
    with pytest.raises(SystemExit, match=words):
        load(tmp_path)


@pytest.mark.parametrize("content, words", [(b'{"data": [', "cannot read"),
                                            (b'{"data": "caf\xe9"}', "not UTF-8: byte 0xe9"),
                                            (b"[" * 100_000, "cannot read")])
def test_files_that_are_not_json(tmp_path, content, words):
    (tmp_path / "train.json").write_bytes(content)
    with pytest.raises(SystemExit, match=words):
        load(tmp_path)


# --- the generated questions ----------------------------------------------------------------------

@functools.cache
def pattern(text):
    """The pattern of a wording, with a group for each of its placeholders."""
    return re.compile(re.sub(r"\\{(\w)\\}", r"(?P<\1>.+)", re.escape(text)))


def parse(texts, sentence):
    """{placeholder: text} of the one wording of `texts` that a sentence has, or None."""
    found = [m.groupdict() for text in texts if (m := pattern(text).fullmatch(sentence))]
    assert len(found) < 2, (sentence, found)
    return found[0] if found else None


def facts_of(context):
    """[(kind, person or pronoun, answer)] of a passage, by the wordings."""
    facts = []
    for sentence in re.findall(r"[^.]+[.]", context):
        read = [(kind, *map(match.get, "xy")) for kind, (statements, *_) in
                synthetic.RELATIONS.items() if (match := parse(statements, sentence.strip()))]
        assert len(read) == 1, sentence
        facts += read
    return facts


def solve(q):
    """The answer of a question by the rule of its level, from nothing but passage and question."""
    if q["level"] == "number":
        asked, facts = parse(synthetic.COUNTS[1], q["question"]), []
        for sentence in re.findall(r"[^.]+[.]", q["context"]):
            read = parse(synthetic.COUNTS[0], sentence.strip())
            facts += [(read["x"], read["a"], read["y"]), (read["x"], read["b"], read["z"])]
        answers = [n for x, thing, n in facts if (x, thing) == (asked["x"], asked["a"])]
    else:
        facts = facts_of(q["context"])
        (kind, x), = [(kind, match["x"]) for kind, (_, questions, _) in
                      synthetic.RELATIONS.items() if (match := parse(questions, q["question"]))]
        assert len({f[0] for f in facts}) == (4 if q["level"] == "match" else 2)
        if q["level"] == "match":
            answers = [y for k, _, y in facts if k == kind]
        if q["level"] == "distractor":
            assert len({who for _, who, _ in facts}) == 4
            answers = [y for k, who, y in facts if (k, who) == (kind, x)]
        if q["level"] == "pronoun":
            assert not any((k, who) == (kind, x) for k, who, _ in facts)
            answers = [y for (_, before, _), (k, who, y) in zip(facts, facts[1:])
                       if who in ("She", "He") and (k, before) == (kind, x)]
        if q["level"] == "join":
            (other, told), = [(k, match["y"]) for k, (_, _, descriptions) in
                              synthetic.RELATIONS.items() if (match := parse(descriptions, x))]
            person, = [who for k, who, y in facts if (k, y) == (other, told)]
            answers = [y for k, who, y in facts if (k, who) == (kind, person)]
    answer, = answers
    return answer


@pytest.mark.parametrize("split", synthetic.SIZES)
def test_synthetic_questions_are_solved_by_the_rule_of_their_level(split):
    made = synthetic.make_questions(split)
    assert made == synthetic.make_questions(split) and len(made) == synthetic.SIZES[split]
    expected = synthetic.TRAINED if split == "train" else synthetic.LEVELS
    counts = {level: len(made) * n // len(expected) for level, n in Counter(expected).items()}
    assert Counter(q["level"] for q in made) == counts
    for q in made:
        answer, start = q["answers"]["text"][0], q["answers"]["answer_start"][0]
        assert solve(q) == answer and len(set(q["choices"])) == 4, q
        # one of the four at random is right one time in four, wherever it stands
        assert q["context"][start:start + len(answer)] == answer and answer in q["choices"]
        assert not q["context"][start - 1:start].isalnum()  # "3 June" is not that of "13 June"
    places = Counter((q["level"], q["choices"].index(q["answers"]["text"][0])) for q in made)
    for level, n in counts.items():
        own = [places[level, i] for i in ((1, 3) if level == "pronoun" else range(4))]
        assert sum(own) == n and min(own) > 0.5 * n / len(own), own


def test_chance_is_the_mean_over_the_four_answers():
    scores = [qa.f1(choice, q["answers"]["text"][0]) for q in synthetic.make_questions("test")
              for choice in q["choices"]]
    assert 100 * sum(scores) / len(scores) == pytest.approx(synthetic.CHANCE, abs=0.05)


def test_synthetic_splits_share_no_name_and_no_wording():
    words = {
        split: {w for q in synthetic.make_questions(split)
                for w in (q["context"] + q["question"]).replace(".", " ").replace("?", " ").split()}
        for split in synthetic.SIZES}
    for a, b in ("train", "validation"), ("train", "test"), ("validation", "test"):
        shared = words[a] & words[b]
        common = {"When", "Which", "What", "Who", "How", "In", "For", "On", "Where", "At", "There",
                  "The", "She", "He"}
        assert not {w for w in shared if w[0].isupper()} - common, shared
        assert not {w for w in shared if w.isdigit()}
        assert not words[a] & set(synthetic.THINGS[b])
    lists = [wordings for relation in synthetic.RELATIONS.values()
             for wordings in zip(relation, (2, 1, 1))] + list(zip(synthetic.COUNTS, (2, 1)))
    for texts, held_out in lists:
        parts = [synthetic.wordings(split, texts, held_out) for split in synthetic.SIZES]
        assert sum(parts, []) == texts and all(parts) and len(set(texts)) == len(texts)


def test_the_files_of_the_generated_questions_are_those_that_are_generated():
    task = qa.load_task(settings("--method", "full", "--task", "synthetic"))
    assert "SYNTHETIC passages and questions" in task.note
    for split in synthetic.SIZES:
        made = [qa.make_question(q) for q in synthetic.make_questions(split)]
        assert getattr(task, split) == made and made[0].level == "match"
    # of the test's: level, relation and wording; a number's is what is counted
    groups = Counter(q.group for q in task.test)
    assert len(groups) == 37 and sum(name.startswith("number") for name in groups) == 2
    # questions of another fingerprint are none of ours
    one_line_exit(lambda: synthetic_folder("0" * 16), "could not generate", DOWNLOADS)


# --- the command line -----------------------------------------------------------------------------

@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished QDoRA run of a small model on a small folder of questions: its flags, folders,
    result, and what it said."""
    base = tmp_path_factory.mktemp("qa")
    data, model = base / "mine", save_small_bert(base / "small")
    data.mkdir()
    for seed, (split, n) in enumerate((("train", 40), ("dev", 10), ("test", 10))):
        (data / f"{split}.json").write_text(json.dumps(small_set(n, seed)))
    flags = ["--method", "qdora", "--data", data, "--model", model, "--epochs", 2, "--max-steps", 6]
    done = train(*flags, "--output", base / "out")
    assert done.returncode == 0, done.stderr
    result, = (base / "out" / "metrics" / "runs").iterdir()
    checkpoint, = (base / "out" / "checkpoints").iterdir()
    return SimpleNamespace(data=data, model=model, flags=flags, output=base / "out",
                           checkpoint=checkpoint, result=json.loads(result.read_text()),
                           stdout=done.stdout)


def test_one_run_measures_all(finished):
    r = finished.result
    assert r["trainable_by_kind"] == {"method": 2 * 2 * (16 * 2 * 48 + 48), "layer_norm": 0,
                                      "head": 2 * 48 + 2, "base": 0}
    assert (0 <= r["exact_match"] <= r["f1"] <= 100 and len(r["history"]) == 2
            and r["rows"] == {"train": 40, "validation": 10, "test": 10})
    assert r["best_epoch"] == max(r["history"], key=lambda h: h["validation_f1"])["epoch"]
    assert r["train_time_s"] == pytest.approx(sum(h["seconds"] for h in r["history"]))
    assert (r["settings"]["stride"], r["settings"]["max_length"], r["settings"]["batch_size"]) == (
        128, 384, 8)
    assert "f1_macro" not in r and "mine: splits as given" in finished.stdout


def test_same_seed_same_numbers(finished, tmp_path):
    assert train(*finished.flags, "--output", tmp_path).returncode == 0
    again = json.loads(next((tmp_path / "metrics" / "runs").iterdir()).read_text())
    histories = [[{key: value for key, value in h.items() if key != "seconds"}
                  for h in r["history"]] for r in (finished.result, again)]
    assert histories[0] == histories[1] and again["f1"] == finished.result["f1"]


def test_a_task_that_does_not_fit(finished, data_dir, tmp_path):
    def refused(main, *words, flags):
        argv = [str(flag) for flag in (*flags, "--output", tmp_path)]
        one_line_exit(lambda: main(argv), *words)

    full = ["--method", "full", "--data"]
    refused(compare.main, "run_grid.sh", flags=["--data", finished.data])
    refused(train_module.main, "--stride", flags=[*full, data_dir, "--stride", 8])
    refused(train_module.main, "--max-length", "--stride 128",
            flags=[*full, finished.data, "--max-length", 128])
    (tmp_path / "long").mkdir()
    words = " ".join(WORDS * 9)  # no window of 96 tokens holds such an answer
    (tmp_path / "long" / "train.json").write_text(json.dumps(
        squad(*[(f"{i} {words}", [("where?", words, len(f"{i} "))]) for i in range(30)])))
    refused(train_module.main, "no window", "--max-length",
            flags=[*full, tmp_path / "long", "--model", finished.model, "--max-length", 96,
                   "--stride", 8])


def test_hub_questions_without_network(monkeypatch):
    def nobody_answers(*_, **__):
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr(datasets, "load_dataset", nobody_answers)
    for task in "squad", "squad_pt":
        s = settings("--method", "lora", "--task", task)
        one_line_exit(lambda: qa.load_task(s), "hub", "--task synthetic", "--data PATH")


def test_portuguese_questions_take_the_portuguese_model():
    flags = ["--method", "full", "--task", "squad_pt"]
    assert settings(*flags).model == "neuralmind/bert-base-portuguese-cased"
    assert settings(*flags, "--model", "x").model == "x"


def test_a_question_is_asked_from_the_command_line(finished, tmp_path):
    """tools.predict takes the best run of every method in the grid; here there is one, of QDoRA."""
    (tmp_path / "metrics").mkdir()
    (tmp_path / "metrics" / "grid.json").write_text(json.dumps(
        {"command": "bash run_grid.sh", "best": {"qdora": "qdora_epoch-2_lr_2e-4"},
         "runs": {"qdora_epoch-2_lr_2e-4": finished.result}}))
    shutil.copytree(finished.output / "checkpoints", tmp_path / "checkpoints")
    context = "It was Anna who wrote the letter, and Karl who read it."
    done = program("tools.predict", "--output", tmp_path, "--model", finished.model,
                   "--question", "Who was it?", "--context", context)
    assert done.returncode == 0 and not done.stderr, done.stderr
    head, row = done.stdout.splitlines()
    name, *_ = row.split()
    answer = row[len(name):head.index("answer") + len("answer")].strip()
    assert name == "qdora" and answer and answer in context


def test_a_merged_question_answering_model_needs_nothing_from_here(finished, tmp_path):
    path, model = finished.checkpoint, str(finished.model)
    export.main(export.parse_args([str(path), "--model", model, "--to", str(tmp_path / "out")]))
    texts = [["who?", "where was it?"], ["it was Anna", "it was in Rome, in a garden"]]
    found, _ = elsewhere("AutoModelForQuestionAnswering", texts, tmp_path / "out", tmp_path)
    tokenizer, base, base_hash = export.load_base(path, model)
    trained, _ = attach(base, base_hash, path)
    with torch.no_grad():
        out = trained(**tokenizer(*texts, padding=True, return_tensors="pt"))
    assert (found - torch.stack((out.start_logits, out.end_logits))).abs().max() < 1e-5
