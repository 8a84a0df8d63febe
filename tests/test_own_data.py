"""The way of a user's own data, from a file to a pipeline: the lines of the README as they stand
there, on a small table of three classes."""
import csv
import json
import re
import shlex
import subprocess
from types import SimpleNamespace

import pytest
from conftest import ROOT, program, save_small_bert

import rates

KINDS = {"billing": ["invoice", "refund", "price"], "login": ["password", "account", "email"],
         "crash": ["error", "screen", "bug"]}


def write_table(path, n, with_labels=True):
    """A table with a text and a class, in columns of any name, and an id."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "body", *["category"] * with_labels])
        for i in range(n):
            label = list(KINDS)[i % 3]
            words = KINDS[label]
            text = f"The {words[i % 3]} and the {words[(i // 3) % 3]} of number {i * 7 % 1000}"
            writer.writerow([f"T{i}", text, *[label] * with_labels])


@pytest.fixture(scope="module")
def blocks():
    """The code of the README's section, {language: code}."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("\n## Your own data\n")[1]
    section = section.split("\n## ")[0]
    assert len(section.strip().splitlines()) <= 30
    return re.findall(r"```(\w+)\n(.*?)```", section, flags=re.S)


def test_the_readme_s_lines_lead_from_a_file_to_a_pipeline(blocks, tmp_path, monkeypatch, capfd):
    (_, study), (_, tools), (_, python) = blocks
    write_table(tmp_path / "tickets.csv", 240)
    write_table(tmp_path / "new.csv", 30, with_labels=False)
    model = save_small_bert(tmp_path / "small")

    def here(words):
        files = "tickets.csv", "results/tickets", "new.csv", "labelled.csv", "my_bert"
        return [str(tmp_path / word) if word in files else word for word in words]

    # the study, its trainings in forks and short
    import compare
    monkeypatch.setattr(compare, "start", lambda: None)
    monkeypatch.setattr(rates, "subprocess", SimpleNamespace(
        run=lambda command, **_: run_fork(command), PIPE=None, DEVNULL=None))
    monkeypatch.chdir(tmp_path)
    bash, script, *flags = shlex.split(study)
    assert (bash, script) == ("bash", "run_all.sh")
    compare.main([*here(flags), "--model", str(model), "--epochs", "2", "--lr", "3e-3", "--amp",
                  "off"])
    said = capfd.readouterr().out
    assert "'body'" in said and "'category'" in said and "**Not told.**" in said
    entries = json.loads((tmp_path / "results/tickets/metrics/comparison.json").read_text())
    assert entries["entries"]["full"]["runs"][0]["settings"]["text_column"] == "body"

    # the three commands; the study's own lines name the folder of this model as well
    printed = said[said.index("What next"):].splitlines()[1:4]
    for line, own in zip(tools.splitlines(), printed, strict=True):
        words, own = shlex.split(line), shlex.split(own, comments=True)
        assert words[:3] == ["python", "-m", own[2]] and {"--output", "--model"} <= set(own)
        if words[2] != "tools.demo":  # that one does not end
            done = program(words[2], *here(words[3:]), "--model", model)
            assert done.returncode == 0, done.stderr
    with open(tmp_path / "labelled.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 30 and {row["lora_r8"] for row in rows} <= set(KINDS)

    # the pipeline gives the labels that the file got
    names = {}
    exec(python, names)
    assert "label" in capfd.readouterr().out
    ask = names["pipeline"]("text-classification", "my_bert")
    for row in rows:
        answer, = ask([row["body"]], truncation=True)
        assert answer["label"] == row["lora_r8"]
        assert answer["score"] == pytest.approx(float(row[f"lora_r8 {answer['label']}"]), abs=1e-4)


def run_fork(command):
    """Run python FILE FLAGS, or python -P -m MODULE FLAGS, in a fork, as subprocess.run does."""
    done = program(*command[3:] if command[1] == "-P" else command[1:])
    return subprocess.CompletedProcess(command, done.returncode, done.stdout)
