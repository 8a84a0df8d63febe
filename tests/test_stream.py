"""Files of texts and of questions, answered by predict.py --input and --to."""
import csv
import functools
import gc
import io
import json
import signal
import subprocess
import sys
import time
import tracemalloc

import pytest
import torch
from conftest import ROOT, one_line_exit, run

import model
import predict
import stream
from qa import Question

TEXTS = ["a good film", "", "a bad film, with a comma", 'a "quoted" film', "Ein schöner Film",
         "word " * 300, "two\nlines"]


@functools.cache
def loaded(model, *files, load=predict.load_methods):
    """load_methods of (name, checkpoint) pairs, which takes longer than what most tests here do
    with them."""
    return load(dict(files), model)


@pytest.fixture
def ask(study, monkeypatch):
    """Do what the command line does, in this process, with the methods of a small study."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    monkeypatch.setattr(predict, "load_methods", lambda files, model=None:
                        loaded(model, *files.items()))

    def ask(*flags):
        args = predict.parse_args(["--output", str(study[0]), *map(str, flags)])
        predict.main(args)
    return ask


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


def interrupted(ask, *flags):
    """Do what the command line does until it is interrupted, and let go of its files, as a process
    does that ends."""
    with pytest.raises(KeyboardInterrupt):
        ask(*flags)
    gc.collect()


@pytest.mark.parametrize("kind, to", [("csv", "csv"), ("tsv", "jsonl"), ("jsonl", "csv"),
                                      ("jsonl", "jsonl"), ("txt", "csv")])
def test_every_row_comes_back_with_label_and_probabilities(kind, to, ask, tmp_path, capsys):
    source, out = write(tmp_path / f"in.{kind}"), tmp_path / f"out.{to}"
    ask("--input", source, "--to", out)
    rows, column = read(out), "text" if kind in ("jsonl", "txt") else "sentence"
    assert len(rows) == len(TEXTS)
    for row, text in zip(rows, TEXTS):
        same = text if kind in ("csv", "jsonl") else text.replace("\n", " ")
        assert row[column].strip() == same.strip()
        for name in "full_ft", "lora_r8", "qlora", "adapter":
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
    for words in "1 of the texts are empty", "1 of the texts were cut at the 128 tokens":
        assert words in said
    assert sorted(p.name for p in tmp_path.iterdir()) == [source.name, out.name]


def test_the_answers_are_those_of_one_by_one(ask, study, tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "amp_dtype", lambda mode, device: None)  # as they are, in fp32
    ask("--input", write(tmp_path / "in.csv"), "--to", tmp_path / "out.csv", "--method", "lora_r8")
    files = predict.find(study[0], only="lora_r8")
    tokenizer, (method,) = predict.load_methods(files)
    for row, text in zip(read(tmp_path / "out.csv"), TEXTS):
        if text:
            label, p = predict.classify(method, tokenizer, text)
            assert row["lora_r8"] == label
            assert float(row[f"lora_r8 {label}"]) == pytest.approx(p, abs=2e-6)


def test_files_are_answered_in_the_precision_of_the_run(monkeypatch):
    monkeypatch.setattr(model, "has_bf16", lambda device: True)
    for settings, is_half in ({"amp": "auto"}, True), ({"amp": "off"}, False), ({}, True):
        method = predict.Method("m", torch.nn.Linear(2, 2), {"settings": settings}, 1, 1)
        with stream.precision(method):
            out = method.model(torch.ones(1, 2))
        assert (out.dtype is torch.bfloat16) is is_half


def test_a_killed_process_goes_on_where_it_stopped(study, tmp_path, monkeypatch, ask, capsys):
    texts = [f"film number {i} is {'good' if i % 3 else 'bad'}" for i in range(40)]
    source, whole = write(tmp_path / "in.csv", texts), tmp_path / "whole.csv"
    monkeypatch.setattr(stream, "CHUNK", 8)
    ask("--input", source, "--to", whole, "--method", "lora_r8")

    real, calls, out = stream.answered, [], tmp_path / "out.csv"

    def stops(methods, tokenizer, chunk):
        calls.append(chunk[0])
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(methods, tokenizer, chunk)

    monkeypatch.setattr(stream, "answered", stops)
    interrupted(ask, "--input", source, "--to", out, "--method", "lora_r8")
    assert not out.exists()
    # as if the power had gone while the next chunk was written
    part = tmp_path / "out.csv.part"
    part.write_bytes(part.read_bytes() + b"24,film nu")
    ask("--input", source, "--to", out, "--method", "lora_r8")
    assert "going on after 24 rows" in capsys.readouterr().err
    assert out.read_bytes() == whole.read_bytes() and calls[4] == texts[24] and len(calls) == 6
    assert not part.exists() and not (tmp_path / "out.csv.progress").exists()
    one_line_exit(lambda: ask("--input", source, "--to", out), "is there already")


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
def test_bad_tables_are_one_line_before_anything_is_answered(text, flags, words, ask, tmp_path,
                                                             monkeypatch):
    monkeypatch.setattr(stream, "answered", None)
    (tmp_path / "in.csv").write_text(text)
    one_line_exit(lambda: ask("--input", tmp_path / "in.csv", "--to", tmp_path / "o.csv", *flags),
                  *words)
    assert [p.name for p in tmp_path.iterdir()] == ["in.csv"]


@pytest.mark.parametrize("text, words", [
    (b'{"text": "a"}\n[1]\n', ["line 2", "not an object"]), (b'{"text": \n', ["line 1", "JSON"]),
    (b'{"text": "a"}\n{"text": 3}\n', ["line 2", "no text"]),
    (b'{"text": "a"}\n{"body": "b"}\n', ["line 2", "no 'text'"]), (b'{"text": "\xff"}', ["UTF-8"])])
def test_bad_json_lines(text, words, ask, tmp_path):
    (tmp_path / "in.jsonl").write_bytes(text)
    one_line_exit(lambda: ask("--input", tmp_path / "in.jsonl", "--to", tmp_path / "o.csv"), *words)


@pytest.mark.parametrize("flags, words", [
    (["--input", "a.csv"], ["go together"]), (["--to", "a.csv"], ["go together"]),
    (["--column", "a"], ["go together"]), (["--input", "a.xlsx", "--to", "b.csv"], [".xlsx"]),
    (["--input", "a.csv", "--to", "b.txt"], ["b.txt", ".jsonl"]),
    (["--input", "a.json", "--to", "b.csv"], [".json"]),
    (["--input", "a.csv", "--to", "b.csv", "a sentence"], ["or --input"]),
    (["--input", "a.txt", "--to", "b.csv", "--column", "x"], ["--column is for"]),
    (["--input", "nothing.csv", "--to", "b.csv"], ["nothing.csv", "No such file"])])
def test_flags_that_do_not_go_together(flags, words, ask):
    one_line_exit(lambda: ask(*flags), *words)


def test_a_pipe_that_is_not_utf_8(study):
    done = run("bash", "-c", f"printf 'a film\\n\\xff\\n' | LC_ALL=C {sys.executable} "
               f"{ROOT / 'predict.py'} --output {study[0]} --method lora_r8 --input - --to -")
    line, = done.stderr.splitlines()
    assert done.returncode == 1 and "stdin is not UTF-8: byte 0xff" in line


def test_a_pipe(study):
    done = run("bash", "-c", "export PYTHONIOENCODING=latin-1; "
               f"printf 'a good film\\na bad film for 5 €\\n' | {sys.executable} "
               f"{ROOT / 'predict.py'} --output {study[0]} --method lora_r8 --input - --to - "
               "| cut -d, -f1,2")
    assert done.returncode == 0 and not done.stderr, done.stderr
    head, *rows = done.stdout.splitlines()
    assert head == "text,lora_r8"
    assert [row.split(",")[0] for row in rows] == ["a good film", "a bad film for 5 €"]


def test_counts_survive_a_kill_and_old_progress_is_not_taken_for_another_part(
        tmp_path, monkeypatch, ask, capsys, study):
    texts = ["a film" if i % 4 else "" for i in range(40)]
    source, out = write(tmp_path / "in.csv", texts), tmp_path / "out.csv"
    monkeypatch.setattr(stream, "CHUNK", 8)
    real, calls = stream.answered, []

    def stops(methods, tokenizer, chunk):
        calls.append(chunk)
        if len(calls) in (3, 4, 6):
            raise KeyboardInterrupt
        return real(methods, tokenizer, chunk)

    monkeypatch.setattr(stream, "answered", stops)
    # after 16 rows
    interrupted(ask, "--input", source, "--to", out, "--method", "lora_r8")
    # other answers do not take its place
    other = write(tmp_path / "other.csv", ["another film"] * 40)
    part = tmp_path / "out.csv.part"
    before = part.read_bytes()
    files = predict.find(study[0])
    for flags in (("--input", other, "--method", "lora_r8"), ("--input", source),
                  ("--input", source, "--checkpoint", files["lora_r8"])):  # another column
        one_line_exit(lambda: ask(*flags, "--to", out), "out.csv.part", "16 answers", "delete it")
    assert part.read_bytes() == before
    part.unlink()
    # it is begun anew, and does not get as far as a chunk
    interrupted(ask, "--input", other, "--to", out, "--method", "lora_r8")
    assert not (tmp_path / "out.csv.progress").exists()
    # after 8
    interrupted(ask, "--input", source, "--to", out, "--method", "lora_r8")
    ask("--input", source, "--to", out, "--method", "lora_r8")
    said = capsys.readouterr().err
    assert "going on after 8 rows" in said and "10 of the texts are empty" in said
    assert [row["sentence"] for row in read(out)] == texts


def test_the_order_of_the_methods_is_part_of_an_output(tmp_path, monkeypatch, ask, study):
    source, out = write(tmp_path / "in.csv", ["a film"] * 20), tmp_path / "out.csv"
    files = predict.find(study[0])
    flags = [["--checkpoint", files[name]] for name in ("lora_r8", "adapter")]
    monkeypatch.setattr(stream, "CHUNK", 8)
    real, calls = stream.answered, []

    def stops(*args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(stream, "answered", stops)
    interrupted(ask, "--input", source, "--to", out, *flags[0], *flags[1])
    one_line_exit(lambda: ask("--input", source, "--to", out, *flags[1], *flags[0]), "8 answers")
    ask("--input", source, "--to", out, *flags[0], *flags[1])
    assert len(read(out)) == 20


def test_two_processes_do_not_write_one_output(tmp_path):
    first = stream.Part(tmp_path / "out.csv", {"input": 1})
    first.file.write("a\n")
    first.keep(1)
    for identity in {"input": 1}, {"input": 2}, None:
        one_line_exit(lambda: stream.Part(tmp_path / "out.csv", identity), "another process")
    first.file.write("b\n")
    first.keep(1)
    first.finish("rows")
    assert (tmp_path / "out.csv").read_text() == "a\nb\n"
    assert [path.name for path in tmp_path.iterdir()] == ["out.csv"]


def test_a_second_sentence_that_is_not_read_is_said(tmp_path, ask, capsys):
    (tmp_path / "in.csv").write_text("sentence,sentence2\na film,another\n")
    ask("--input", tmp_path / "in.csv", "--to", tmp_path / "o.csv", "--method", "lora_r8")
    assert "sentence2 is not read" in capsys.readouterr().err


def test_a_lone_carriage_return_stays_in_its_row(tmp_path, ask):
    texts = ["one\rrow", "and another", "three\r\nfour"]
    ask("--input", write(tmp_path / "in.jsonl", texts), "--to", tmp_path / "o.csv", "--method",
        "lora_r8")
    assert [row["text"] for row in read(tmp_path / "o.csv")] == texts
    (tmp_path / "head.csv").write_bytes(b'sentence,"a\rb"\na film,1\n')
    ask("--input", tmp_path / "head.csv", "--to", tmp_path / "p.csv", "--method", "lora_r8")
    assert read(tmp_path / "p.csv")[0]["a\rb"] == "1"


def test_a_file_name_may_be_no_utf_8(tmp_path, ask):
    source = tmp_path / b"caf\xe9.csv".decode("utf-8", "surrogateescape")
    ask("--input", write(source), "--to", tmp_path / "o.csv", "--method", "lora_r8")
    assert len(read(tmp_path / "o.csv")) == len(TEXTS)


def test_kill_loses_no_chunk(study, tmp_path):
    """The same as above with a real process and a real signal."""
    texts = [f"{'very ' * (i % 8)}long film {i}" for i in range(stream.CHUNK + 400)]
    source, out = write(tmp_path / "in.txt", texts), tmp_path / "out.jsonl"
    command = [sys.executable, ROOT / "predict.py", "--output", study[0], "--method", "lora_r8",
               "--input", source, "--to", out]
    process = subprocess.Popen(list(map(str, command)), stderr=subprocess.DEVNULL)
    progress, end = tmp_path / "out.jsonl.progress", time.time() + 200
    while not progress.exists() and time.time() < end and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = json.loads(progress.read_text())["rows"]
    assert kept % stream.CHUNK == 0 and not out.exists()
    done = run(*command)
    assert done.returncode == 0 and f"going on after {kept:,} rows" in done.stderr
    assert [row["text"] for row in read(out)] == texts


def test_twenty_times_as_many_rows_need_no_more_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "answered", lambda methods, tokenizer, texts:
                        ([{"m": "0", "m 0": 1.0} for _ in texts], 0))
    monkeypatch.setattr(stream, "label_columns", lambda methods: ["m", "m 0"])
    peaks = []
    for n in 3000, 60_000:
        source = tmp_path / f"{n}.txt"
        source.write_text("a film of some length, with some words in it\n" * n)
        args = predict.parse_args(["--input", str(source), "--to", str(tmp_path / f"{n}.csv")])
        tracemalloc.start()
        stream.predict_rows([predict.Method("m", None, {"pairs": False}, 0, 0)], None, {}, args)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0]
    assert 1.6 * peaks[0] < (tmp_path / "60000.txt").stat().st_size
    assert len((tmp_path / "60000.csv").read_text().splitlines()) == 60_001


# --- questions ------------------------------------------------------------------------------------

def squad(answers):
    return {"data": [{"paragraphs": [{"context": f"In {1900 + i} Ada Reed came to Oslo.", "qas": [
        {"id": f"q{i}", "question": "When did Ada Reed come?", **answers(i)}]}]}
        for i in range(5)]}


def test_questions_give_the_answer_file_and_the_scores(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(stream, "CHUNK", 2)
    monkeypatch.setattr(stream, "answer", lambda method, tokenizer, questions:
                        [(q.context.split()[1], 3) for q in questions])
    method, path = predict.Method("lora", None, {}, 1, 1), tmp_path / "weights"
    path.write_text("")
    for name, answers, words in (
            ("known", lambda i: {"answers": [{"text": f"{1900 + i % 4}", "answer_start": 3}]},
             "F1 80.00, exact match 80.00 (5 questions)"),
            ("unknown", lambda i: {}, ""), ("empty", lambda i: {"answers": []}, "")):
        source, out = tmp_path / f"{name}.json", tmp_path / f"{name}_answers.json"
        source.write_text(json.dumps(squad(answers)))
        args = predict.parse_args(["--input", str(source), "--to", str(out)])
        stream.predict_questions([method], None, {"lora": path}, args)
        assert json.loads(out.read_text()) == {f"q{i}": f"{1900 + i}" for i in range(5)}
        assert words in capsys.readouterr().out and not list(tmp_path.glob("*.p*"))
    one_line_exit(lambda: stream.predict_questions([method] * 2, None, {}, args), "--method NAME")


def test_a_batch_of_questions_is_answered_as_one_by_one(tmp_path):
    from conftest import default_tokenizer, settings, tiny_bert
    from transformers import BertForQuestionAnswering
    bert = tiny_bert(head_class=BertForQuestionAnswering)
    bert.resize_token_embeddings(len(default_tokenizer()))
    s = settings("--method", "full", "--task", "squad", "--amp", "off")
    method = predict.Method("m", bert, {"settings": s}, 1, 1)
    asked = [Question("one two three " * (1 + 40 * i), f"what {i}?", [""], None, None)
             for i in range(5)]
    together = stream.answer(method, default_tokenizer(), asked)
    assert together == [predict.answer(method, default_tokenizer(), q.question, q.context)
                        for q in asked]
