"""Asking what run_all.sh left behind, from the command line."""
import io
import json
import re
import shutil
import sys

import pytest
from conftest import one_line_exit, program

import predict
from compare import RUNS
from settings import checkpoint_path


@pytest.fixture
def ask(monkeypatch, capsys):
    """A function that does what the command line does, without starting a process: the lines that
    it prints."""
    def ask(*flags, stdin=""):
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        predict.main(predict.parse_args([str(flag) for flag in flags]))
        return capsys.readouterr().out.splitlines()
    return ask


def refused(ask, *flags, words):
    one_line_exit(lambda: ask(*flags), *words)


def cells(line):
    """Label and probability in every cell of a line of the table."""
    return re.findall(r"(\* )?(\S+) ([01]\.\d\d)(?=\s|$)", line)


def test_five_sentences_by_five_methods(study):
    done = program("predict.py", "--output", study[0])
    assert done.returncode == 0 and not done.stderr, done.stderr
    head, *rows = done.stdout.splitlines()
    assert head.split() == list(RUNS)
    for sentence, row in zip(predict.SENTENCES, rows):
        assert row.startswith(sentence) and len(cells(row)) == 5
        assert all(label in ("0", "1") and 0.5 <= float(p) <= 1 for _, label, p in cells(row))
    for name, row in zip(("ms per sentence", "ms to switch", "its file (MB)"), rows[5:]):
        assert row.startswith(name) and all(float(value) > 0 for value in row.split()[-5:])


def test_own_sentences_from_arguments_and_stdin_are_the_same(study, ask):
    given = ask("--output", study[0], "--method", "lora_r8", "a good film", "a bad film")
    read = ask("--output", study[0], "--method", "lora_r8", stdin="a good film\n\n a bad film \n")
    assert given[0].split() == ["lora_r8"] and given[:3] == read[:3]
    assert [row.split("  ")[0] for row in given[1:3]] == ["a good film", "a bad film"]


def test_any_checkpoints(study, ask):
    path, *_ = (study[0] / "checkpoints").glob("*lora_r16*")
    assert ask("--checkpoint", path, "--output", "/nonexistent",
               "a good film")[0].split() == [path.stem]


def test_disagreement_is_marked(monkeypatch, capsys):
    answers = {"a": ("yes", 0.9), "b": ("yes", 0.6), "c": ("no", 0.8)}
    monkeypatch.setattr(predict, "classify",
                        lambda method, tokenizer, sentence: answers[method.name])
    methods = [predict.Method(name, None, {}, 1.0, 2.0) for name in answers]
    predict.compare_sentences(methods, None, ["perhaps"])
    out = capsys.readouterr().out
    assert [bool(star) for star, *_ in cells(out.splitlines()[1])] == [False, False, True]
    assert out.endswith("* not what most methods say\n")
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
def test_bad_flags(flags, words, study, ask):
    refused(ask, "--output", study[0], *flags, words=words)


def test_damaged_and_missing_checkpoints(study, tmp_path, ask):
    for folder in "metrics", "checkpoints":
        shutil.copytree(study[0] / folder, tmp_path / folder)
    entry = json.loads((tmp_path / "metrics" / "comparison.json").read_text())["qlora"]
    path = checkpoint_path(tmp_path, entry["runs"][0]["settings"])
    path.write_bytes(path.read_bytes()[:1000])
    refused(ask, "--output", tmp_path, words=[path, "cannot read"])
    path.unlink()
    refused(ask, "--output", tmp_path,
            words=["qlora", path.name, "delete", f"{path.stem}.json", "run_all.sh"])
    assert len(ask("--output", tmp_path, "--method", "adapter", "good")) == 5
    for content in "{}", "[]", '{"full_ft": {}}', "[":
        (tmp_path / "metrics" / "comparison.json").write_text(content)
        refused(ask, "--output", tmp_path, words=["comparison.json", "damaged"])
    lora, = (tmp_path / "checkpoints").glob("*lora_r8*")
    there, _ = ask("--checkpoint", lora, "--checkpoint", study[0] / "checkpoints" / lora.name,
                   "good")[:2]
    assert there.split() == [str(lora), str(study[0] / "checkpoints" / lora.name)]
    refused(ask, "--question", "who?", "--context", "he.", "--checkpoint", lora,
            words=["sentences"])
