"""Parts of the training rows, whole sentences held out, and the sweep over rates and sizes."""
import csv
import dataclasses
import fcntl
import json
import os
import shutil
import sys
from collections import Counter

import numpy as np
import pytest
from conftest import (
    ROOT,
    one_line_error,
    one_line_exit,
    run,
    save_small_bert,
    settings,
    write_splits,
)

import data
import qa
import rates
import spread
import train
from settings import SYNTHETIC_SHA256, result_path, run_name
from tools import sweep

SHARED = ROOT.parent / "shared" / "data"


def pool(n=97):
    """Rows of three labels, 1 : 2 : 4 or so, in no order."""
    labels = [(i * i + i // 3) % 7 for i in range(n)]
    return data.Rows([f"row {i}" for i in range(n)], [0 if y < 1 else 1 if y < 3 else 2
                                                      for y in labels])


# --- parts of the training rows -------------------------------------------------------------------

def test_parts_are_nested_stratified_and_always_the_same():
    rows, before = pool(), set()
    task = data.make_task(rows, data.Rows(["v"] * 3, [0, 1, 2]), data.Rows(["t"], [1]))
    shares = Counter(task.train.labels)
    for n in 8, 20, 60, len(rows.labels):
        part = data.train_on(task, n)
        assert part.train == data.train_on(task, n).train and len(part.train.sentences) == n
        assert part[2:4] == task[2:4] and f"{n} of 97" in part.note
        for label, count in Counter(part.train.labels).items():
            assert abs(count - n * shares[label] / len(rows.labels)) <= 1
        # every sentence keeps its label
        assert set(zip(*part.train)) <= set(zip(*task.train))
        assert before <= set(part.train.sentences)
        before = set(part.train.sentences)
    assert before == set(rows.sentences)
    # not the first rows of the file
    assert set(data.train_on(task, 20).train.sentences) != {f"row {i}" for i in range(20)}


@pytest.mark.parametrize("n, words", [(98, ["98", "97 training rows"]),
                                      (1, ["leaves no row", "label"])])
def test_a_part_that_cannot_be_had(n, words):
    task = data.make_task(pool(), data.Rows(["v"], [0]), data.Rows(["t"], [1]))
    one_line_exit(lambda: data.train_on(task, n), "--train-rows", *words)


def test_parts_of_questions_are_whole_passages_but_for_the_last():
    questions = [qa.Question(f"passage {i % 12}", f"question {i}", ["1"], None, None)
                 for i in range(60)]  # 5 on each of 12 passages
    task, before = qa.Task(None, questions, [], [], "", None), []
    for n in 7, 15, 60:
        part = qa.train_on_passages(task, n)
        assert part.train[:len(before)] == before and len(part.train) == n
        counts = list(Counter(q.context for q in part.train).values())
        assert counts[:-1] == [5] * (n // 5 - (n % 5 == 0))
        assert f"{n} of 60 training questions, on {len(counts)} of 12 passages" in part.note
        before = part.train
    assert before != questions and sorted(before) == sorted(questions)
    one_line_exit(lambda: qa.train_on_passages(task, 61), "--train-rows 61", "60 training")


def test_the_part_is_in_the_identity():
    whole, part = settings("--method", "lora"), settings("--method", "lora", "--train-rows", 500)
    assert whole.train_rows is None and not whole.whole_sentences
    assert dataclasses.replace(whole, train_rows=500) == part and "_n500_" in run_name(part)
    names = {run_name(settings("--method", "full", "--task", "sst2", *flags)) for flags in
             ([], ["--train-rows", 500], ["--train-rows", 501], ["--whole-sentences"])}
    assert len(names) == 4


def test_other_synthetic_questions_are_another_run():
    made, real = (settings("--method", "full", "--task", task) for task in ("synthetic", "squad"))
    assert made.data_sha256 == SYNTHETIC_SHA256 and real.data_sha256 is None
    assert run_name(made) != run_name(dataclasses.replace(made, data_sha256="of other ones"))


def test_a_part_trains(data_dir, tmp_path, capsys):
    flags = ["--method", "lora", "--data", data_dir, "--output", tmp_path, "--max-steps", 2,
             "--model", save_small_bert(tmp_path / "small")]
    train.main([*map(str, flags), "--train-rows", "12"])
    path, = (tmp_path / "metrics" / "runs").iterdir()
    result = json.loads(path.read_text())
    assert result["rows"] == {"train": 12, "validation": 12, "test": 12}
    assert "12 of 80 training rows" in result["splits"]
    one_line_exit(lambda: train.main([*map(str, flags), "--train-rows", "1000"]), "training rows")


# --- whole sentences ------------------------------------------------------------------------------

def treebank(n=40):
    """Rows as SST-2 has them: sentences, parts of them, and a part that all have in common."""
    rows = data.Rows(["the film"], [0])
    for i in range(n):
        for text in f"the film number {i} is fine", f"number {i} is fine", f"number  {i}":
            rows.sentences.append(text)
            rows.labels.append(i % 2)
    return rows


def test_whole_sentences_are_held_out_with_all_that_stands_in_them_alone():
    rows = treebank()
    rest, out = data.carve_whole(rows, 10)
    assert len(out.sentences) == 10 and sorted(out.labels) == [0] * 5 + [1] * 5
    assert all(text.startswith("the film number") for text in out.sentences)
    for text in out.sentences:
        number = text.split()[3]
        assert not [row for row in rest.sentences if number in row.split()]
    # "the film" stands in other sentences, too, and stays
    assert "the film" in rest.sentences and len(rest.sentences) == 1 + 3 * 30
    assert data.carve_whole(rows, 10) == (rest, out)
    assert set(zip(*rest)) | set(zip(*out)) <= set(zip(*rows))


def test_a_long_text_is_refused():
    one_line_exit(lambda: data.carve_whole(data.Rows(["word " * 201], [0]), 1), "201 words")


def test_whole_sentences_in_a_task_and_what_has_none(tmp_path):
    alone = write_splits(tmp_path / "alone", {"train": 60}, lambda i, _: f"row {i}\t{i % 2}")
    task = data.make_task(treebank(), whole=True)
    assert "12 whole sentences of train validate" in task.note
    assert len(task.train.sentences) == 1 + 3 * 16 and "49 of 121 rows are left" in task.note
    for flags in (["--task", "movies"], ["--task", "squad"],
                  ["--data", alone, "--fold", "1/5"]):
        one_line_exit(lambda: settings("--method", "full", "--whole-sentences", *flags),
                      "--whole-sentences")
    one_line_exit(lambda: data.make_task(*[treebank()] * 3, whole=True), "all splits are given")


@pytest.mark.skipif(not (SHARED / "sst2").exists(), reason="SST-2 is not here")
def test_sst2_validates_by_whole_sentences():
    s = settings("--method", "full", "--data", SHARED / "sst2", "--whole-sentences",
                 "--train-rows", 4000)
    task = data.load_sentences(s, SHARED / "sst2")
    validation = [" ".join(s.split()) for s in task.validation.sentences]
    assert len(validation) == 1000 and len(task.train.sentences) == 4000
    assert np.mean([len(s.split()) for s in validation]) > 17  # a row of SST-2 has 9 words
    rows = {" ".join(s.split()) for s in task.train.sentences}
    assert not rows & set(validation)


# --- the sweep ------------------------------------------------------------------------------------

def made_up(s, scores, answers):
    """A result of train.py with these validation scores of its epochs and these predictions."""
    return {"settings": vars(s), "f1_macro": 0.5,
            "rows": {"train": s.train_rows or 60, "validation": 12, "test": len(answers)},
            "history": [{"validation_f1_macro": score, "validation_loss": 0.3, "train_loss": 0.1}
                        for score in scores], "best_epoch": 1,
            "train_time_s": 30.0, "trainable_params": 5, "splits": "", "test_predictions": answers,
            "environment": {"device": "none", "amp": "off"}}


def rates_of(*flags):
    """The learning rates that a search tries first."""
    return rates.first_rates(list(map(str, flags)), 750)


@pytest.fixture
def swept(tmp_path, monkeypatch):
    """(flags, output folder) of a sweep of which all runs are there."""
    monkeypatch.setattr(sweep, "start", lambda: None)
    monkeypatch.setattr(sweep, "probe", lambda flags: {"examples": 8000, "seconds": 1.0})
    folder = write_splits(tmp_path / "mine", {"train": 60, "dev": 12, "test": 40},
                          lambda i, split: f"{split} {i}\t{i % 2}")
    flags = ["--data", str(folder), "--output", str(tmp_path / "out")]
    labels = [i % 2 for i in range(40)]
    for n in [], ["--train-rows", 30]:
        for method, wrong in (["--method", "full"], 4), (["--method", "lora", "--r", 16], 10):
            for lr in rates_of(*method, *flags):
                for seed in 42, 43:
                    s = settings(*method, *flags, *n, "--lr", lr, "--seed", seed)
                    path = result_path(tmp_path / "out", s)
                    path.parent.mkdir(parents=True, exist_ok=True)
                    best = 0.9 if s.lr == rates_of(*method, *flags)[1] else 0.6
                    answers = [[y, 1 - y if i < wrong + (seed == 43) else y]
                               for i, y in enumerate(labels)]
                    path.write_text(json.dumps(made_up(s, [0.3, best], answers)))
    return flags, tmp_path / "out"


def entries_of(output):
    return json.loads((output / "metrics" / "sweep_mine.json").read_text())["entries"]


def test_a_sweep_takes_the_rate_that_validates_best_and_compares_the_seeds(swept, capsys,
                                                                           monkeypatch):
    flags, output = swept
    asked = [*flags, "--methods", "full", "lora --r 16", "--seeds", "42", "43"]
    sweep.main(asked)
    entries = entries_of(output)
    assert list(entries) == ["full, all rows", "lora --r 16, all rows"]
    full, lora = entries.values()
    assert lora["lr"] == rates_of("--method", "lora", "--r", "16")[1] and lora["n"] == 2
    assert [t["validation"] for t in lora["tried"]] == [0.6, 0.9, 0.6]
    assert lora["validation"] == pytest.approx(0.9) and full["vs_full"] is None
    labels = np.arange(40) % 2

    def wrong(n):
        return np.where(np.arange(40) < n, 1 - labels, labels)

    expected = spread.paired_interval(labels, [wrong(10), wrong(11)], [wrong(4), wrong(5)])
    assert lora["vs_full"] == pytest.approx(expected)
    assert -17 < lora["vs_full"]["points"] < -13 and lora["vs_full"]["high"] < 0
    for name in "sweep_mine.png", "sweep_mine.md":
        assert (output / "figures" / name).stat().st_size > 500

    # other sizes join, and the table is in their order
    sweep.main([*asked, "--train-rows", "30"])
    entries = entries_of(output)
    assert [e["rows"]["train"] for e in entries.values()] == [60, 60, 30, 30]
    lines = (output / "figures" / "sweep_mine.md").read_text().splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:6]] == ["30", "30", "60", "60"]
    done = run(sys.executable, "-m", "tools.sweep", *asked, "--epochs", 1, cwd=ROOT)
    one_line_error(done, "another study", "epochs")

    # on another machine, without the runs: the committed files are enough, and nothing is lost
    path = output / "metrics" / "sweep_mine.json"
    before, answers = path.read_text(), path.with_suffix(".csv").read_text()
    shutil.rmtree(output / "metrics" / "runs")
    monkeypatch.setattr(sweep, "draw_sweep", lambda path: None)
    sweep.main([*asked, "--train-rows", "all", "30"])
    assert "== python train.py" not in capsys.readouterr().out
    assert entries_of(output) == json.loads(before)["entries"]
    head, *rows = csv.reader(answers.splitlines())
    assert head[:2] == ["label", "full, all rows, seed 42"] and len(head) == 9 and len(rows) == 40
    assert [int(row[2]) for row in rows] == wrong(5).tolist()
    lora = entries["lora --r 16, all rows"]
    same, wider = (settings("--method", "lora", "--r", 16, *more, *flags)
                   for more in ([], ["--alpha", 64]))
    assert sweep.is_done(lora, [42, 43], None, same) and sweep.is_done(lora, [43], None, same)
    assert not sweep.is_done(lora, [42, 44], None, same)
    assert not sweep.is_done(lora, [42, 43], 30, same)
    assert not sweep.is_done(lora, [42, 43], None, wider)
    failed = lora | {"tried": [{"lr": 1.0, "validation": None}, *lora["tried"][1:]]}
    assert not sweep.is_done(failed, [42, 43], None, same)
    for other, best_of in (lora, "3"), (failed, "2 or 3"):
        caption = sweep.sweep_caption({"entries": {"full": full, "lora": other}})
        assert f"each learning rate is the best of {best_of} by validation" in caption

    # --amp auto fits what another machine took it for, one that was asked for does not
    assert sweep.held(path, dataclasses.replace(same, amp="auto"))[0] == entries_of(output)
    one_line_exit(lambda: sweep.held(path, dataclasses.replace(same, amp="fp16")), "another study",
                  "amp")


def test_a_sweep_goes_on_in_one_precision(swept, monkeypatch):
    flags, output = swept
    methods = ["--methods", "full", "lora --r 16"]
    monkeypatch.setattr(sweep, "draw_sweep", lambda path: None)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    asked, own = [], settings("--method", "full", *flags).amp
    sweep.main([*flags, *methods])
    shutil.rmtree(output / "metrics" / "runs")  # the sweep holds what it needs
    monkeypatch.setattr(sweep, "run_method", lambda flags, *_: asked.append(flags) or sys.exit())
    for speedup, amp in (2, "bf16"), (0.5, "off"):
        monkeypatch.setattr("settings.bf16_speedup", lambda: speedup)
        sweep.main([*flags, *methods])
        with pytest.raises(SystemExit) as ended:
            sweep.main([*flags, "--methods", "head"])
        if amp == own:
            assert asked.pop()[-4:] == ["--amp", amp, "--method", "head"]
        else:
            assert not asked and f"--amp {own} goes on" in ended.value.code


def test_a_sweep_that_adds_its_row_is_alone(swept, monkeypatch):
    flags, output = swept
    held, add_entry = [], sweep.add_entry

    def watched(*args):
        lock = os.open(output / "metrics", os.O_RDONLY)
        with pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(lock)
        held.append(args)
        return add_entry(*args)

    monkeypatch.setattr(sweep, "draw_sweep", lambda path: None)
    monkeypatch.setattr(sweep, "add_entry", watched)
    sweep.main([*flags, "--methods", "full"])
    assert len(held) == 1


def test_redraw_draws_again_what_is_there(swept, capsys):
    flags, output = swept
    one_line_exit(lambda: sweep.main(["--redraw", *flags]), "sweep_")
    sweep.main([*flags, "--methods", "full", "lora --r 16"])
    said, figures = capsys.readouterr().out, output / "figures"
    before = {path.name: path.read_bytes() for path in figures.iterdir()}
    assert before.keys() == {"sweep_mine.md", "sweep_mine.png"}
    shutil.rmtree(figures)
    sweep.main(["--redraw", *flags[2:]])
    assert {path.name: path.read_bytes() for path in figures.iterdir()} == before
    again = capsys.readouterr().out
    assert again.startswith("| training rows") and said.endswith(again)


@pytest.mark.parametrize("entries", [[], [3], {"x": 3}, {"x": {"runs": [{"settings": {"y": 1}}]}}])
def test_a_damaged_sweep_is_one_line(entries, swept, tmp_path):
    path = tmp_path / "sweep_mine.json"
    path.write_text(json.dumps({"entries": entries}))
    one_line_exit(lambda: sweep.held(path, settings("--method", "full", *swept[0])), "damaged")


def test_answers_of_another_rate_or_seed_are_in_no_interval(swept, monkeypatch):
    flags, output = swept
    monkeypatch.setattr(sweep, "draw_sweep", lambda path: None)

    def entries(*more):
        sweep.main([*flags, *map(str, more)])
        return entries_of(output)

    both = entries("--methods", "full", "lora --r 16", "--seeds", 42, 43)
    assert both["lora --r 16, all rows"]["vs_full"]
    fewer = entries("--methods", "full", "--seeds", 42, "--rates-from", 30)
    assert fewer["full, all rows"]["n"] == 1 and fewer["lora --r 16, all rows"]["vs_full"] is None
    with open(output / "metrics" / "sweep_mine.csv") as file:
        assert "full, all rows, seed 43" not in next(csv.reader(file))


def test_methods_of_one_label_are_told_by_their_flags(swept, monkeypatch):
    flags, output = swept
    monkeypatch.setattr(sweep, "draw_sweep", lambda path: None)
    labels = [i % 2 for i in range(40)]
    wide = ["--method", "lora", "--r", 16, "--alpha", 64]
    for lr in rates_of(*wide, *flags):
        s = settings(*wide, *flags, "--lr", lr)
        score = 0.5 if lr == rates_of(*wide, *flags)[1] else 0.4
        result_path(output, s).write_text(json.dumps(made_up(s, [score],
                                                             list(zip(labels, labels)))))
    sweep.main([*flags, "--methods", "full", "lora --r 16", "lora --r 16 --alpha 64"])
    assert [e["label"] for e in entries_of(output).values()] == ["full fine-tuning", "LoRA r=16",
                                                                 "lora --r 16 --alpha 64"]


def test_rates_from_a_part_are_tried_on_it_and_named_methods_are_known(swept, monkeypatch):
    flags, _ = swept
    asked = []

    def stand_in(flags, steps):
        asked.append(flags)
        return [{"lr": rate, "validation": 0.5 + rate, "loss": 0.1}
                for rate in rates.first_rates(flags, steps)]

    monkeypatch.setattr(sweep, "search", stand_in)
    monkeypatch.setattr(sweep, "draw_sweep", lambda path: None)
    sweep.main([*flags, "--methods", "full fine-tuning", "LoRA r=16", "--rates-from", "30",
                "--seeds", "43"])
    assert [own[own.index("--train-rows") + 1] for own in asked] == ["30", "30"]
    assert [name for name in entries_of(swept[1])] == ["full, all rows", "lora --r 16, all rows"]


@pytest.mark.parametrize("flags, words", [
    (["--lr", "1e-3"], ["--lr", "train.py"]), (["--methods", "lorra"], ["invalid choice"]),
    (["--train-rows", "many"], ["whole number"]), (["--seeds", 42, 42], ["twice"]),
    (["--methods", "lora --lr 1e-3"], ["--lr"]), (["--methods", "lora --output x"], ["--output"]),
    (["--methods", "full", "lora --epochs 5"], ["epochs", "same for all"])])
def test_bad_flags_end_before_anything_runs(flags, words, data_dir):
    one_line_exit(lambda: sweep.main(["--data", str(data_dir), *map(str, flags)]), *words)


def test_a_sweep_takes_a_file(data_dir):
    args = sweep.parse_args(["--data", str(data_dir / "train.tsv"), "--methods", "lora"])
    assert args.settings.task == "train" and args.methods[0][1].data_sha256


def test_questions_are_compared_one_by_one():
    s = vars(settings("--method", "full", "--task", "squad"))

    def answers(texts):
        return sweep.answers_of({"settings": s, "test_predictions": [[["new york"], text]
                                                                     for text in texts]})

    held = {"own": answers(["new york", "york"] * 20), "full": answers(["new york"] * 40)}
    assert held["own"][:2] == [100, 66.666667]
    assert sweep.difference(held, ["own"], ["other"]) is None
    vs = sweep.difference(held, ["own"], ["full"])
    assert vs["points"] == pytest.approx(-100 / 6)
    assert vs["low"] < vs["points"] < vs["high"] < 0
    together = sweep.difference(held | {"group": [0, 0, 1, 1] * 10}, ["own"], ["full"])
    assert together == vs | {"low": vs["points"], "high": vs["points"]}  # the passages are alike
    unlike = sweep.difference(held | {"group": [0, 1, 2, 3] * 10}, ["own"], ["full"])
    assert unlike["low"] < vs["low"]


def test_the_table_marks_a_best_rate_beyond_which_nothing_was_tried():
    def arrow(*scores):
        tried = [{"lr": lr, "validation": score, "loss": 0.1}
                 for lr, score in zip((5e-4, 1e-3, 2e-3), scores)]
        return sweep.chosen_rate({"lr": rates.best_rate(tried)["lr"], "tried": tried})

    assert [arrow(0.7, 0.6, None), arrow(0.6, 0.7, None), arrow(0.6, 0.7, 0.8)] == [
        "5e-4 ↓", "1e-3", "2e-3 ↑"]
