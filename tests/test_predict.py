"""Asking what was trained, from the command line: single texts, files of texts and of questions."""
import csv
import functools
import io
import json
import os
import re
import shutil
import sys
import time
import tracemalloc
from types import SimpleNamespace

import pytest
import torch
from conftest import default_tokenizer, one_line_exit, program, settings, tiny_bert
from transformers import BertForQuestionAnswering

import tools.predict as predict
from checkpoint import read_about
from compare import RUNS
from qa import Question
from settings import checkpoint_path, read_settings

TEXTS = ["a good film", "", "a bad film, with a comma", 'a "quoted" film', "Ein schöner Film",
         "word " * 300, "two\nlines"]


@functools.cache
def loaded(model, *files, load=predict.load_methods):
    """load_methods of (name, checkpoint) pairs, which takes longer than what most tests here do
    with them."""
    return load(dict(files), model)


@pytest.fixture
def act(study, monkeypatch):
    """A function that does what the command line does, in this process, with the methods of a small
    study."""
    monkeypatch.setattr(predict, "load_methods", lambda files, model=None:
                        loaded(model, *files.items()))

    def act(*flags, stdin=""):
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        predict.main(predict.parse_args(["--output", str(study[0]), *map(str, flags)]))
    return act


# --- single texts ---------------------------------------------------------------------------------

@pytest.fixture
def ask(act, capsys):
    """The same, which returns the lines that are printed."""
    def ask(*flags, stdin=""):
        act(*flags, stdin=stdin)
        return capsys.readouterr().out.splitlines()
    return ask


def refused(act, *flags, words):
    one_line_exit(lambda: act(*flags), *words)


def cells(line):
    """Label and probability in every cell of a line of the table."""
    return re.findall(r"(\* )?(\S+) ([01]\.\d\d)(?=\s|$)", line)


def test_five_sentences_by_five_methods(act, capsys):
    act()
    done = capsys.readouterr()
    head, *rows = done.out.splitlines()
    assert not done.err
    assert head.split() == list(RUNS)
    for sentence, row in zip(predict.SENTENCES, rows):
        assert row.startswith(sentence) and len(cells(row)) == 5
        assert all(label in ("0", "1") and 0.5 <= float(p) <= 1 for _, label, p in cells(row))
    for name, row in zip(("ms per sentence", "ms to switch", "its file (MB)"), rows[5:]):
        assert row.startswith(name) and all(float(value) > 0 for value in row.split()[-5:])


def test_own_sentences_from_arguments_and_stdin_are_the_same(ask):
    given = ask("--method", "lora_r8", "a good film", "a bad film")
    read = ask("--method", "lora_r8", stdin="a good film\n\n a bad film \n")
    assert given[0].split() == ["lora_r8"] and given[:3] == read[:3]
    assert [row.split("  ")[0] for row in given[1:3]] == ["a good film", "a bad film"]


def test_a_cut_text_is_said(act, capsys):
    act("--method", "lora_r8", "good", "word " * 200)
    assert "warning: 1 of the texts were cut at the 128 tokens" in capsys.readouterr().err


def test_any_checkpoints(study, ask):
    path, *_ = (study[0] / "checkpoints").glob("*lora_r16*")
    assert ask("--checkpoint", path, "--output", "/nonexistent",
               "a good film")[0].split() == [path.stem]


def test_disagreement_is_marked(monkeypatch, capsys):
    answers = {"a": ("yes", 0.9), "b": ("yes", 0.6), "c": ("no", 0.8)}
    monkeypatch.setattr(predict, "classify",
                        lambda method, tokenizer, sentence: answers[method.name])
    monkeypatch.setattr(predict, "encode", lambda *_: SimpleNamespace(n_cut=0))
    methods = [predict.Trained(name, None, {}, 1.0, 2.0) for name in answers]
    predict.compare_sentences(methods, None, ["perhaps"])
    out = capsys.readouterr().out
    assert [bool(star) for star, *_ in cells(out.splitlines()[1])] == [False, False, True]
    assert out.endswith("* the methods disagree, and most do not say this\n")
    answers["c"] = ("yes", 0.5)
    predict.compare_sentences(methods, None, ["perhaps"])
    assert "*" not in capsys.readouterr().out
    # of two that disagree neither is what most say
    answers["b"] = ("no", 0.5)
    predict.compare_sentences(methods[:2], None, ["perhaps"])
    assert capsys.readouterr().out.splitlines()[1].count("*") == 2


def test_nothing_there(tmp_path, ask):
    refused(ask, "--output", tmp_path, words=["comparison.json", "run_all.sh"])
    refused(ask, "--output", tmp_path, "--question", "who?", "--context", "he.",
            words=["grid.json", "run_grid.sh"])


@pytest.mark.parametrize("flags, words", [
    (["--method", "dora"], ["dora", "lora_r8"]),
    (["--question", "who?"], ["--context"]),
    (["--question", "who?", "--context", " "], ["--context is empty"]),
    (["--question", "who?", "--context", "he.", "a film"], ["sentences, or"]),
    (["good", " "], ["empty"]),
    (["--method", ""], ["lora_r8"]),
    (["caf\udce9"], ["UTF-8"]),
    (["--model", "/nonexistent", "good"], ["/nonexistent"]),
])
def test_bad_flags(flags, words, ask):
    refused(ask, *flags, words=words)


def test_damaged_and_missing_checkpoints(study, tmp_path, ask):
    for folder in "metrics", "checkpoints":
        shutil.copytree(study[0] / folder, tmp_path / folder)
    comparison = tmp_path / "metrics" / "comparison.json"
    entry = json.loads(comparison.read_text())["entries"]["qlora"]
    path = checkpoint_path(tmp_path, read_settings(entry["runs"][0]))
    path.write_bytes(path.read_bytes()[:1000])
    refused(ask, "--output", tmp_path, words=[path, "cannot read"])
    path.unlink()
    refused(ask, "--output", tmp_path,
            words=["qlora", path.name, "delete", f"{path.stem}.json", "run_all.sh"])
    assert len(ask("--output", tmp_path, "--method", "adapter", "good")) == 5
    for content in ("{}", "[]", '{"entries": {}}', '{"entries": {"full": {}}}',
                    '{"entries": {"full": {"runs": []}}}',
                    '{"entries": {"full": {"runs": [{"settings": {"rank": 8}}]}}}', "["):
        comparison.write_text(content)
        refused(ask, "--output", tmp_path, words=["comparison.json", "damaged"])
    lora, = (tmp_path / "checkpoints").glob("*lora_r8*")
    there, _ = ask("--checkpoint", lora, "--checkpoint", study[0] / "checkpoints" / lora.name,
                   "good")[:2]
    assert there.split() == [str(lora), str(study[0] / "checkpoints" / lora.name)]
    refused(ask, "--question", "who?", "--context", "he.", "--checkpoint", lora,
            words=["sentences"])


def test_the_newest_study_is_asked(study, tmp_path):
    shutil.copytree(study[0], tmp_path / "both")
    old = tmp_path / "both" / "metrics" / "comparison.json"
    new = old.with_name("crossvalidation.json")
    entries = json.loads(old.read_text())["entries"]
    new.write_text(json.dumps({"entries": {"lora_r8": entries["lora_r8"]}}))
    for age, names in (60, ["lora_r8"]), (-60, list(entries)):
        os.utime(old, (time.time() - age,) * 2)
        assert list(predict.find(tmp_path / "both")) == names


def test_a_sweep_alone_is_asked_at_its_rates_and_every_name_is_known(study, tmp_path, ask):
    shutil.copytree(study[0] / "checkpoints", tmp_path / "checkpoints")
    entries = json.loads((study[0] / "metrics" / "comparison.json").read_text())["entries"]
    rows = {"rows": {"train": 200}}
    (tmp_path / "metrics").mkdir()
    (tmp_path / "metrics" / "sweep_mine.json").write_text(json.dumps({"entries": {
        "full, all rows": entries["full"] | rows, "lora --r 8, all rows": entries["lora_r8"] | rows,
        "qlora --r 16, 30 rows": entries["qlora"] | {"rows": {"train": 30}}}}))
    files = predict.find(tmp_path)
    assert files == {name: tmp_path / file.relative_to(study[0])
                     for name, file in predict.find(study[0]).items() if name in files}
    assert list(files) == ["full", "lora_r8"]
    for name in "lora_r8", "LoRA r=8", "lora", "lora-r8":
        assert list(predict.find(tmp_path, only=name)) == ["lora_r8"]
    names = predict.find(study[0])
    for name, case in (("full fine-tuning", "full"), ("houlsby", "adapter"), ("QLoRA", "qlora")):
        assert list(predict.find(study[0], only=name)) == [case] and case in names
    refused(ask, "--output", study[0], "--method", "lora", words=["lora_r8", "lora_r16"])


# --- files of texts -------------------------------------------------------------------------------

def write(path, texts=TEXTS):
    """The texts as a file of the kind that its name says, with a column of their own."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        if path.suffix == ".jsonl":
            file.writelines(json.dumps({"id": i, "text": t, "more": {"a": i}}) + "\n"
                            for i, t in enumerate(texts))
        elif path.suffix == ".txt":
            file.writelines(t.replace("\n", " ") + "\n" for t in texts)
        elif path.suffix == ".tsv":
            file.write("id\tsentence\n")
            file.writelines(f"{i}\t{t}\n".replace("\n", " ").strip(" ") + "\n"
                            for i, t in enumerate(texts))
        else:
            csv.writer(file).writerows([("id", "sentence"), *enumerate(texts)])
    return path


def read(path):
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("kind, to", [("csv", "csv"), ("tsv", "jsonl"), ("jsonl", "csv"),
                                      ("jsonl", "jsonl"), ("txt", "csv")])
def test_every_row_comes_back_with_label_and_probabilities(kind, to, act, tmp_path, capsys):
    source, out = write(tmp_path / f"in.{kind}"), tmp_path / f"out.{to}"
    act("--input", source, "--to", out)
    rows, column = read(out), "text" if kind in ("jsonl", "txt") else "sentence"
    assert len(rows) == len(TEXTS)
    for row, text in zip(rows, TEXTS):
        same = text if kind in ("csv", "jsonl") else text.replace("\n", " ")
        assert row[column].strip() == same.strip()
        for name in "full", "lora_r8", "qlora", "adapter":
            if not text:
                assert row[name] == row[f"{name} 0"] == ""
                continue
            p = [float(row[f"{name} {label}"]) for label in "01"]
            assert sum(p) == pytest.approx(1, abs=1e-5)
            assert row[name] == "01"[p[1] > p[0]]
    if kind == "jsonl":
        assert rows[2]["more"] == ({"a": 2} if to == "jsonl" else '{"a": 2}')
    done, said = capsys.readouterr()
    assert f"wrote {out}: {len(TEXTS)} rows" in done
    assert ("rows, 1 of them with line breaks\n" in done) is (kind in ("csv", "jsonl"))
    for words in "1 of the texts are empty", "1 of the texts were cut at the 128 tokens":
        assert words in said
    assert sorted(p.name for p in tmp_path.iterdir()) == [source.name, out.name]
    one_line_exit(lambda: act("--input", source, "--to", out), "already exists")


def test_the_answers_are_those_of_one_by_one(act, study, tmp_path, monkeypatch):
    monkeypatch.setattr(predict, "amp_dtype", lambda amp: None)  # as they are, in fp32
    monkeypatch.setattr(predict, "CHUNK_ROWS", 3)
    act("--input", write(tmp_path / "in.csv"), "--to", tmp_path / "out.csv", "--method", "lora_r8")
    tokenizer, (method,) = loaded(None, *predict.find(study[0], only="lora_r8").items())
    for row, text in zip(read(tmp_path / "out.csv"), TEXTS, strict=True):
        if text:
            label, p = predict.classify(method, tokenizer, text)
            assert row["lora_r8"] == label
            assert float(row[f"lora_r8 {label}"]) == pytest.approx(p, abs=2e-6)


def test_files_are_answered_in_the_precision_of_the_run_and_single_texts_in_fp32(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(predict.train, "predict", lambda model, split, device, amp: (0, amp))
    for amp, is_file, speedup, is_half in (
            ("bf16", True, 2, True), ("fp16", True, 2, True), ("auto", True, 2, True),
            ("bf16", True, 0.5, False), ("off", True, 2, False), ("bf16", False, 2, False)):
        monkeypatch.setattr("settings.bf16_speedup", lambda: speedup)
        s = settings("--method", "full", "--amp", "off")
        object.__setattr__(s, "amp", amp)  # as it was resolved on another machine
        method = predict.Trained("m", torch.nn.Linear(2, 2), {"settings": s}, 1, 1)
        with predict.outputs(method, None, is_file):
            out = method.model(torch.ones(1, 2))
        assert (out.dtype is torch.bfloat16) is is_half


@pytest.mark.parametrize("text, flags, words", [
    ("id,sentence\n1,a\n2\n", [], ["line 3", "expected 2"]),
    ("sentence\na,b\n", [], ["line 2", "expected 1"]),
    ("sentence,sentence\na,b\n", [], ["'sentence' is there 2 times"]),
    ("a,b\n1,2\n", [], ["--column", "a, b"]), ("a,b\n1,2\n", ["--column", "c"], ["'c'", "a, b"]),
    ("sentence\n", [], ["no rows"]), ("", [], ["no rows"]),
    ("sentence,,\na,b,c\n", [], ["'' is there 2 times"]),
    ("id;text\n1;a film\n", [], ["line 1", "'id;text'", "';' between", "','"]),
    ("id\ttext\n1\ta film\n", [], ["line 1", "'\\t' between"]),
    ('sentence\n"a\n', [], ["in.csv"]), ("sentence,lora_r8\na,b\n", [], ["'lora_r8' already"])])
def test_bad_tables_are_one_line_before_anything_is_answered(text, flags, words, act, tmp_path,
                                                             monkeypatch):
    monkeypatch.setattr(predict, "label_texts", None)
    (tmp_path / "in.csv").write_text(text)
    one_line_exit(lambda: act("--input", tmp_path / "in.csv", "--to", tmp_path / "o.csv", *flags),
                  *words)
    assert [p.name for p in tmp_path.iterdir()] == ["in.csv"]


@pytest.mark.parametrize("name, text, words", [
    ("in.csv", "a film that I liked\nanother\n", ["'a film that I liked'", "no label"]),
    ("in.tsv", "fine\nanother\n", ["'fine'", "no label"]),
    ("in.csv", 'id,text\n1,"good\n2,bad\n3,so so\n4,fine"\n', ["opens at line 2", "line 5"]),
    ("in.csv", 'text\n"good' + 12 * "\nfine" + '"\n', ["opens at line 2", "closes at line 14"]),
    ("in.tsv", 'id\ttext\n1\t"a ""good"" film"\n', ["1 rows, line 2 first, look quoted"]),
    ("in.csv", 'id,text\n1,"good\nfine"\n', []), ("in.csv", "text\ngood\n", []),
    ("in.csv", "customer review\ngood\n", ["'customer review'", "--column"]),
    ("in.csv", 'id,text\n1,"good, fine\nAnn"\n', []),
    ("in.csv", 'text\n"Hi!\n\nI liked it.\nAnn"\n', [])])
def test_what_may_cost_rows_is_said_as_in_training(name, text, words, tmp_path, capsys):
    (tmp_path / name).write_text(text)
    predict.check_input(tmp_path / name, None, [], False)
    said = capsys.readouterr().err
    assert said.count("warning: ") == bool(words) and all(word in said for word in words), said


@pytest.mark.parametrize("text, words", [
    (b'{"text": "a"}\n[1]\n', ["line 2", "not an object"]), (b'{"text": \n', ["line 1", "JSON"]),
    (b'{"text": "a"}\n{"text": 3}\n', ["line 2", "no text"]),
    (b'{"text": "a"}\n{"body": "b"}\n', ["line 2", "no 'text'"]), (b'{"text": "\xff"}', ["UTF-8"])])
def test_bad_json_lines(text, words, act, tmp_path):
    (tmp_path / "in.jsonl").write_bytes(text)
    one_line_exit(lambda: act("--input", tmp_path / "in.jsonl", "--to", tmp_path / "o.csv"), *words)


@pytest.mark.parametrize("flags, words", [
    (["--input", "a.csv"], ["go together"]), (["--to", "a.csv"], ["go together"]),
    (["--column", "a"], ["go together"]), (["--input", "a.xlsx", "--to", "b.csv"], [".xlsx"]),
    (["--input", "a.csv", "--to", "b.txt"], ["b.txt", ".jsonl"]),
    (["--input", "a.json", "--to", "b.csv"], [".json"]),
    (["--input", "a.json", "--to", "-"], [".json"]),
    (["--input", "a.csv", "--to", "b.csv", "a sentence"], ["or --input"]),
    (["--input", "a.txt", "--to", "b.csv", "--column", "x"], ["--column is for"]),
    (["--input", "nothing.csv", "--to", "b.csv"], ["nothing.csv", "No such file"])])
def test_flags_that_do_not_go_together(flags, words, act):
    one_line_exit(lambda: act(*flags), *words)


def pipe(content, encoding):
    return io.TextIOWrapper(io.BytesIO(content), encoding=encoding, errors="surrogateescape")


def test_a_pipe_that_is_not_utf_8(study, act, tmp_path, monkeypatch):
    for to in "-", tmp_path / "out.csv":
        monkeypatch.setattr(io, "StringIO", lambda _: pipe(b"a film\n\xff\n", "ascii"))
        one_line_exit(lambda: act("--method", "lora_r8", "--input", "-", "--to", to),
                      "stdin is not UTF-8: byte 0xff")
    assert not list(tmp_path.iterdir())


def test_a_pipe(act, monkeypatch, capfd):
    monkeypatch.setattr(io, "StringIO", lambda text: pipe(text.encode(), "latin-1"))
    act("--method", "lora_r8", "--input", "-", "--to", "-",
        stdin="a good film\na bad film for 5 €\n")
    said = capfd.readouterr()
    head, *rows = said.out.splitlines()
    assert head == "text,lora_r8,lora_r8 0,lora_r8 1" and not said.err
    assert [row.split(",")[0] for row in rows] == ["a good film", "a bad film for 5 €"]


def test_a_second_sentence_that_is_not_read_is_said(tmp_path, act, capsys):
    (tmp_path / "in.csv").write_text("sentence,sentence2\na film,another\n")
    act("--input", tmp_path / "in.csv", "--to", tmp_path / "o.csv", "--method", "lora_r8")
    assert "sentence2 is not read" in capsys.readouterr().err


def test_two_columns_of_one_name_are_refused(study, tmp_path, act):
    files = predict.find(study[0])
    (tmp_path / "in.csv").write_text("text\nA film.\n")
    name, label = "lora", read_about(files["lora_r8"])["label_names"][0]
    for own, path in (name, files["lora_r8"]), (f"{name} {label}", files["lora_r16"]):
        shutil.copy(path, tmp_path / f"{own}.safetensors")
    one_line_exit(lambda: act("--checkpoint", tmp_path / f"{name}.safetensors",
                              "--checkpoint", tmp_path / f"{name} {label}.safetensors",
                              "--input", tmp_path / "in.csv", "--to", tmp_path / "out.csv"),
                  "two columns", f"{name} {label}")


def test_a_lone_carriage_return_stays_in_its_row(tmp_path, act):
    texts = ["one\rrow", "and another", "three\r\nfour", "five\r\n"]
    act("--input", write(tmp_path / "in.jsonl", texts), "--to", tmp_path / "o.csv", "--method",
        "lora_r8")
    assert [row["text"] for row in read(tmp_path / "o.csv")] == texts
    assert (tmp_path / "o.csv").read_bytes().count(b"\r") == 3  # the rows themselves end in \n
    (tmp_path / "head.csv").write_bytes(b'sentence,"a\rb"\na film,1\n')
    act("--input", tmp_path / "head.csv", "--to", tmp_path / "p.csv", "--method", "lora_r8")
    assert read(tmp_path / "p.csv")[0]["a\rb"] == "1"


def test_a_file_name_may_be_no_utf_8(tmp_path, act):
    source = tmp_path / b"caf\xe9.csv".decode("utf-8", "surrogateescape")
    act("--input", write(source), "--to", tmp_path / "o.csv", "--method", "lora_r8")
    assert len(read(tmp_path / "o.csv")) == len(TEXTS)


# Runs tools.predict in a fork of itself, and kills it as soon as a file like PART is there.
KILLED = """
import glob, os, runpy, signal, sys, time

PART = sys.argv.pop(1)
sys.path[0] = os.getcwd()
if not (child := os.fork()):
    signal.alarm(300)
    runpy.run_module("tools.predict", run_name="__main__", alter_sys=True)
    os._exit(0)
while not glob.glob(PART) and not os.waitpid(child, os.WNOHANG)[0]:
    time.sleep(0.001)
os.kill(child, signal.SIGKILL)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_killed_process_leaves_no_output_and_the_same_command_then_works(study, act, tmp_path):
    """A process of its own and a real signal, while rows are answered."""
    texts = [f"{'very ' * (i % 8)}long film {i}" for i in range(100)]
    source, out = write(tmp_path / "in.txt", texts), tmp_path / "out.jsonl"
    flags = ["--method", "lora_r8", "--input", source, "--to", out]
    (tmp_path / "killed.py").write_text(KILLED)
    done = program(tmp_path / "killed.py", tmp_path / "*.part", "--output", study[0], *flags)
    assert done.stdout.split() == ["-9"], done.stderr
    assert not out.exists() and list(tmp_path.glob("*.part"))
    act(*flags)
    assert [row["text"] for row in read(out)] == texts


def test_twenty_times_as_many_rows_need_no_more_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(predict, "CHUNK_ROWS", 256)
    monkeypatch.setattr(predict, "label_texts", lambda methods, tokenizer, texts:
                        ([{"m": "0", "m 0": 1.0} for _ in texts], 0))
    monkeypatch.setattr(predict, "label_columns", lambda methods: ["m", "m 0"])
    peaks, about = [], {"pairs": False, "settings": settings("--method", "full")}
    for n in 750, 15_000:
        source = tmp_path / f"{n}.txt"
        source.write_text("a film of some length, with some words in it\n" * n)
        args = predict.parse_args(["--input", str(source), "--to", str(tmp_path / f"{n}.csv")])
        tracemalloc.start()
        predict.predict_rows([predict.Trained("m", None, about, 0, 0)], None, args)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0]
    assert 1.6 * peaks[0] < (tmp_path / "15000.txt").stat().st_size
    assert len((tmp_path / "15000.csv").read_text().splitlines()) == 15_001


# --- files of questions ---------------------------------------------------------------------------

def squad(answers):
    return {"data": [{"paragraphs": [{"context": f"In {1900 + i} Ada Reed came to Oslo.", "qas": [
        {"id": f"q{i}", "question": "When did Ada Reed come?", **answers(i)}]}]}
        for i in range(5)]}


def test_questions_give_the_answer_file_and_the_scores(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(predict, "CHUNK_ROWS", 2)
    monkeypatch.setattr(predict, "spans", lambda method, tokenizer, questions:
                        [(q.context.split()[1], 3) for q in questions])
    method = predict.Trained("lora", None, {}, 1, 1)
    for name, answers, words in (
            ("known", lambda i: {"answers": [{"text": f"{1900 + i % 4}", "answer_start": 3}]},
             "F1 80.00, exact match 80.00 (5 questions)"),
            ("unknown", lambda i: {}, ""), ("empty", lambda i: {"answers": []}, "")):
        source, out = tmp_path / f"{name}.json", tmp_path / f"{name}_answers.json"
        source.write_text(json.dumps(squad(answers)))
        args = predict.parse_args(["--input", str(source), "--to", str(out)])
        predict.predict_questions([method], None, args)
        assert json.loads(out.read_text()) == {f"q{i}": f"{1900 + i}" for i in range(5)}
        assert words in capsys.readouterr().out and not list(tmp_path.glob("*.p*"))
    one_line_exit(lambda: predict.predict_questions([method] * 2, None, args), "--method NAME")


def test_a_batch_of_questions_is_answered_as_one_by_one():
    bert = tiny_bert(head_class=BertForQuestionAnswering)
    bert.resize_token_embeddings(len(default_tokenizer()))
    s = settings("--method", "full", "--task", "squad", "--amp", "off")
    method = predict.Trained("m", bert, {"settings": s}, 1, 1)
    asked = [Question("one two three " * (1 + 40 * i), f"what {i}?", [""], None, None)
             for i in range(5)]
    together = predict.spans(method, default_tokenizer(), asked)
    assert together == [predict.answer(method, default_tokenizer(), q.question, q.context)
                        for q in asked]
