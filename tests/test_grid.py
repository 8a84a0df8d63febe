"""The twenty runs of question answering: what is run, what is gathered, and what becomes of it."""
import csv
import json
import os
import re
import time
from unittest import mock

import pytest
from conftest import ROOT, forked_environment, one_line_exit, run, save_small_bert, settings

import compare
from settings import Run, read_flags, read_result, result_path, run_name
from tools import grid, recompute

# What train.py leaves of a run on ten test questions, but for its settings and scores
RESULT = {"best_epoch": 1, "history": [{"validation_f1": 50.0, "validation_loss": 1.0}],
          "trainable_params": 1000, "peak_vram_gb": None, "peak_rss_gb": 1.0,
          "epoch_time_s": 1.0, "test_random": [20.0] * 10,
          "rows": {"train": 40, "validation": 10, "test": 10},
          "environment": {"device": "CPU, 1 thread", "amp": "off"},
          "test_predictions": [[["here"], "here"]] * 10}


def main(*flags):
    grid.main([str(flag) for flag in flags])


def question_file(split, n):
    """The text of a SQuAD file of n questions on n passages."""
    paragraphs = [{"context": f"here is {split} passage {i}.", "qas": [
        {"id": f"{i}", "question": "where is it?",
         "answers": [{"text": "here", "answer_start": 0}]}]} for i in range(n)]
    return json.dumps({"data": [{"title": "t", "paragraphs": paragraphs}]})


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """Flags of a grid that takes seconds: a small model on a small folder of questions."""
    base = tmp_path_factory.mktemp("grid")
    (base / "mine").mkdir()
    for split, n in ("train", 40), ("dev", 10), ("test", 10):
        (base / "mine" / f"{split}.json").write_text(question_file(split, n))
    model = save_small_bert(base / "small")
    return ["--data", base / "mine", "--model", model, "--max-steps", 2, "--amp", "off"]


@pytest.fixture
def made_up(monkeypatch):
    """A search that finds the rates of the study on Portuguese SQuAD, and trainings that all fail
    but those that are finished."""
    def train(flags, _):
        path = read_flags(flags).result
        return read_result(path) if path.exists() else None

    tried = [{"lr": lr, "validation": score, "loss": 1.0} for lr, score in
             ((4.25e-5, 60.0), (2e-4, 70.0))]
    monkeypatch.setattr(grid, "plan", lambda flags, *_: (flags, 2, None))
    monkeypatch.setattr(grid, "search", lambda *_: print("searched") or tried)
    monkeypatch.setattr(grid, "trained", train)
    with mock.patch.dict(os.environ):
        yield


def leave(output, flags, runs, result=RESULT):
    """Put results of some runs, {name: their own flags}, into `output`, as train.py would have,
    with recognisable scores."""
    for i, own in enumerate(runs.values()):
        s = settings(*flags, *own.split())
        path = result_path(output, s)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({**result, "settings": vars(s), "f1": 50.0 + i,
                                    "exact_match": 40.0 + i, "train_time_s": 60.0 * (i + 1)}))


def some(*starts):
    """The runs whose names begin so."""
    return {name: own for name, own in grid.GRID_RUNS.items() if name.startswith(starts)}


def read_grid(output):
    return json.loads((output / "metrics" / "grid.json").read_text())


# --- which runs -----------------------------------------------------------------------------------

def test_twenty_runs_with_the_names_of_the_study():
    assert {"lora_epoch-3_lr_2e-4", "full_epoch-2_lr_4.25e-5",
            "qdora_epoch-2_lr_2e-4"} <= grid.GRID_RUNS.keys()
    for task, runs in ("squad_pt", grid.GRID_RUNS), ("synthetic", grid.SYNTHETIC_RUNS):
        assert len(runs) == 20
        for name, own in runs.items():
            s = settings(*own.split(), "--task", task)
            assert run_name(s).startswith(f"{name}_{task}_")  # the file's name
            assert (float(name.split("_lr_")[1]) == s.lr
                    and s.r == (None if s.method == "full" else 16))
            found, searched, _ = grid.grid_runs(Run(s, None, s.model, ROOT, False), ["--seed", "7"])
            assert list(found) == list(runs) and not searched
            assert found[name] == ["--seed", "7", *own.split()]
    assert (settings("--method", "lora", "--lr", "4.25e-5")
            == settings("--method", "lora", "--lr", "4.25e-05"))


def test_list_prints_twenty_commands_wherever_the_user_stands(tmp_path):
    for name in "common.py", "json.py":  # none of the user's own modules is taken for ours
        (tmp_path / name).write_text("raise SystemExit('not ours')")
    there = sorted(tmp_path.rglob("*"))
    done = run("bash", ROOT / "run_grid.sh", "--list", "--task", "squad_pt", "--amp", "off",
               "--output", "with space", cwd=tmp_path)
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and len(lines) == 20 and sorted(tmp_path.rglob("*")) == there
    for line, own in zip(lines, grid.GRID_RUNS.values()):
        assert f"{ROOT / 'train.py'} --task squad_pt " in line and line.endswith(own)
        assert "'with space'" in line


def test_list_prints_five_commands_of_the_other_study_and_runs_none(data_dir, tmp_path, capsys):
    output, file = tmp_path / "out", tmp_path / "found.tsv"
    # what is found in a file is not said among the commands
    file.write_text((data_dir / "train.tsv").read_text().replace("sentence\tlabel", "text\ty"))
    for data in data_dir, file:
        compare.main(["--list", "--data", str(data), "--output", str(output), "--lr", "1e-3"])
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 5 and not output.exists()
        assert all(f"train.py --data {data} " in line for line in lines)


def test_what_all_runs_need_is_made_before_they_start(monkeypatch, tmp_path, capsys, flags,
                                                      made_up):
    made = []
    monkeypatch.setattr(grid, "model_folder", lambda: made.append("model") or print("fetching"))
    monkeypatch.setattr(grid, "synthetic_folder", made.append)
    main("--list", *flags, "--output", tmp_path)
    said = capsys.readouterr()
    assert not made and len(said.out.splitlines()) == 20 and said.err == 5 * "searched\n"
    main("--list", "--output", tmp_path)
    assert made == ["model", settings("--method", "full", "--task", "synthetic").data_sha256]
    said = capsys.readouterr()
    assert len(said.out.splitlines()) == 20 and said.err == "fetching\n"  # stdout is the commands'


def test_flags_that_do_not_fit(tmp_path):
    for words, own in ((["run_all.sh"], ["--task", "movies"]),
                       (["--lr", "train.py"], ["--lr", "1e-3"]),
                       (["there is no", "run_grid.sh"], ["--redraw"]),
                       (["unrecognized arguments: --task"], ["--redraw", "--task", "squad"])):
        one_line_exit(lambda: main(*own, "--output", tmp_path), *words)
    assert not list(tmp_path.iterdir())


def test_run_grid_explains_itself(capsys):
    with pytest.raises(SystemExit) as error:
        main("--list", "--help")
    assert not error.value.code
    said = capsys.readouterr().out
    assert "run_grid.sh --data" in said and "python train.py --help" in said


@pytest.mark.parametrize("on_cuda, asked, threads", [(False, None, "4"), (False, "3", "3"),
                                                     (True, None, None)])
def test_two_runs_at_a_time_on_a_cpu_and_one_on_a_gpu(on_cuda, asked, threads, monkeypatch):
    begun, at_once, seen = set(), [], set()

    def train(flags, _):
        begun.add(flags)
        time.sleep(0.1)
        at_once.append(len(begun))
        seen.add(os.environ.get("OMP_NUM_THREADS"))
        begun.remove(flags)
        return None if flags == "c" else {"flags": flags}

    monkeypatch.setattr("torch.cuda.is_available", lambda: on_cuda)
    monkeypatch.setattr("torch.get_num_threads", lambda: 8)
    monkeypatch.setattr(grid, "trained", train)
    with mock.patch.dict(os.environ):
        os.environ.pop("OMP_NUM_THREADS", None)
        if asked:
            os.environ["OMP_NUM_THREADS"] = asked
        results = grid.train_all({name.upper(): name for name in "abcdef"})
    assert list(results) == list("ABDEF") and results["D"] == {"flags": "d"}
    assert max(at_once) == (1 if on_cuda else 2) and len(at_once) == 6 and seen == {threads}


# --- what is gathered -----------------------------------------------------------------------------

def test_partial_grid_draws_what_is_there_and_names_what_is_missing(flags, tmp_path, capsys,
                                                                    made_up):
    one_line_exit(lambda: main(*flags, "--output", tmp_path), "no run worked")
    assert not list(tmp_path.iterdir())
    leave(tmp_path, flags, there := some("qlora"))
    (tmp_path / "metrics" / "grid.json").write_text("{")  # it is made anew
    one_line_exit(lambda: main(*flags, "--output", tmp_path), "16 of 20 runs failed",
                  "full_epoch-2_lr_2e-4", "lora_epoch-2_lr_2e-4, lora_epoch-2_lr_4.25e-5")
    said = capsys.readouterr().out
    # and no lora among them
    assert list(read_grid(tmp_path)["runs"]) == list(there)
    assert (read_grid(tmp_path)["command"]
            == " ".join(map(str, ["bash run_grid.sh", *flags, "--output", tmp_path])))
    with open(tmp_path / "metrics" / "grid_results.csv") as file:
        rows = {row["run"]: row for row in csv.DictReader(file)}
    assert list(rows) == list(there)[::-1]
    assert float(rows[list(there)[1]]["f1"]) == 51 and float(rows[list(there)[1]]["minutes"]) == 2
    assert (tmp_path / "figures" / "grid_f1.png").stat().st_size > 10_000
    assert "No run of full fine-tuning is finished" in said

    # it is drawn again from grid.json alone
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    for path in (tmp_path / "figures").iterdir():
        path.unlink()
    main("--redraw", "--output", tmp_path)
    assert before == {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    leave(tmp_path, flags, some("full_epoch-2_lr_2e-4"),
          {**RESULT, "environment": {"device": "another", "amp": "off"}})
    capsys.readouterr()
    one_line_exit(lambda: main(*flags, "--output", tmp_path), "15 of 20 runs failed")
    said = capsys.readouterr()
    assert "times and memory do not compare" in said.err and "full_epoch-2_lr_2e-4" in said.out


def test_a_grid_decides_its_precision_once_and_goes_on_in_no_other(flags, tmp_path, monkeypatch,
                                                                   capsys, made_up):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    *auto, _, _ = flags
    for speedup, amp in (2, "bf16"), (0.5, "off"):
        monkeypatch.setattr("settings.bf16_speedup", lambda: speedup)
        for asked in [], ["--amp", "auto"]:
            main("--list", *auto, *asked, "--output", tmp_path)
            assert capsys.readouterr().out.count(f" --amp {amp} --method ") == 20
    leave(tmp_path, flags, some("full"))
    monkeypatch.setattr("settings.bf16_speedup", lambda: 2)
    one_line_exit(lambda: main("--list", *auto, "--output", tmp_path),
                  "results of this study in off, and --amp auto is bf16 here")


def test_a_damaged_grid_is_one_line(flags, tmp_path):
    path = tmp_path / "metrics" / "grid.json"
    path.parent.mkdir()
    for damage in '{"full": {}}', "{", "[]", "3":
        path.write_text(damage)
        one_line_exit(lambda: main("--redraw", "--output", tmp_path), "damaged", "delete it")


def test_runs_are_compared_question_by_question_and_by_level():
    levels, truth = ["easy", "hard"] * 50, [[f"word {i}"] for i in range(100)]

    def result(name, wrong, validation):
        s = settings(*grid.SYNTHETIC_RUNS[name].split(), "--task", "synthetic")
        answers = [[refs, "no" if i in wrong else refs[0]] for i, refs in enumerate(truth)]
        return {**RESULT, "settings": vars(s), "f1": 100 - len(wrong), "exact_match": 0,
                "train_time_s": 1, "history": [{"validation_f1": validation}],
                "test_predictions": answers, "test_levels": levels, "test_random": [20.0] * 100}

    # by validation the second is full fine-tuning's best, though the test likes the first better
    best = "full_epoch-3_lr_1e-4"
    results = {"full_epoch-2_lr_5e-5": result("full_epoch-2_lr_5e-5", set(), 50),
               best: result(best, {1, 3}, 60),
               "lora_epoch-3_lr_1e-3": result("lora_epoch-3_lr_1e-3", {1, 3, 5, 7, 9, 10}, 55)}
    grid.add_scores(results)
    assert "vs_full" not in results[best] and not any("test_levels" in r for r in results.values())
    lora = results["lora_epoch-3_lr_1e-3"]
    assert lora["f1_by_level"] == {"easy": 98, "hard": 90}
    assert lora["vs_full"]["points"] == -4 and -9 < lora["vs_full"]["low"] < -4
    assert lora["vs_full"]["high"] <= 0 == 4 + lora["vs_full"]["points"]
    text = grid.grid_markdown({"command": "bash run_grid.sh", "runs": results})
    assert "| one of the four at random | 25.4 |" in text and "| 98.0 | 90.0 |" in text
    row = [row for row in grid.best_of(grid.rows_of(results)) if row["method"] == "full"]
    assert [r["run"] for r in row] == [best] and "Missing: " not in text
    assert results[best]["random_f1"] == 20 and results[best]["beats_random"]
    text = grid.grid_markdown({"command": "bash run_grid.sh", "runs": results, "missing": ["x"]})
    assert "Missing: x." in text


def test_of_equals_by_validation_the_test_chooses_none():
    rows = [{"run": name, "method": "lora", "validation_f1": 80.0, "f1": f1}
            for name, f1 in (("b", 60.0), ("a", 50.0), ("c", 40.0))]
    assert [row["run"] for row in grid.best_of(rows)] == ["a"]


# --- the whole ------------------------------------------------------------------------------------

def test_run_grid_searches_skips_what_is_finished_goes_on_after_a_failure_and_then_mends_it(
        flags, tmp_path, capsys, monkeypatch):
    # the middle of three rates validates best, then the highest; one is not tried yet
    rates = {name: ["8.5e-5", "1.7e-4", "3.4e-4"] if name == "full" else ["4e-4", "8e-4", "1.6e-3"]
             for name in grid.GRID_METHODS}
    for i, score in enumerate((97.0, 99.0, 98.0)):
        searched = {name: f"{own} --lr {rates[name][i]}" for name, own in grid.GRID_FLAGS.items()
                    if i or name != "dora"}
        leave(tmp_path, flags, searched,
              {**RESULT, "history": [{"validation_f1": score, "validation_loss": 1.0}]})
    runs = grid.twenty_runs({name: own[1:] for name, own in rates.items()})
    command = ["bash", ROOT / "run_grid.sh", *flags, "--output", tmp_path]
    environment = forked_environment(tmp_path)
    done = run(*command, "--list", env=environment)
    lines = done.stdout.splitlines()  # and nothing of what the search trained
    assert done.returncode == 0 and len(lines) == 20, done.stderr
    assert all(line.endswith(own) for line, own in zip(lines, runs.values()))
    assert done.stderr.count("python train.py --") == 1 == done.stderr.count("wrote ")
    assert result_path(tmp_path, settings(*flags, "--method", "dora", "--r", 16,
                                          "--lr", "4e-4")).exists()

    name, *others = runs  # the first one fails
    leave(tmp_path, flags, {name: runs[name] for name in others if "epoch-2" in name})
    stem = result_path(tmp_path, settings(*flags, *runs[name].split())).stem
    # a folder where a file should go
    blocked = tmp_path / "checkpoints" / f"{stem}.safetensors"
    blocked.mkdir(parents=True)
    done = run(*command, env=environment)
    # 15 of the search and, beyond those of the twenty that it trained, two of each method
    assert done.returncode == 1
    assert len(re.findall(r"== \[\d+ of 25, .* left\] python train.py --", done.stdout)) == 1
    first, last = done.stderr.splitlines()
    assert "cannot write" in first and "1 of 20 runs failed" in last and name in last
    assert list(read_grid(tmp_path)["runs"]) == others
    assert [entry["lr"] for entry in read_grid(tmp_path)["tried"]["lora"]] == pytest.approx(
        [float(lr) for lr in rates["lora"]])
    with open(tmp_path / "metrics" / "grid_results.csv") as file:
        rows = list(csv.DictReader(file))
    assert ([float(r["f1"]) for r in rows] == sorted((float(r["f1"]) for r in rows), reverse=True)
            and len(rows) == 19)
    blocked.rmdir()
    done = run(*command, env=environment)
    assert done.returncode == 0 and not done.stderr and blocked.is_file()
    assert done.stdout.count("] python train.py --") == 1 and "What next" in done.stdout
    assert list(read_grid(tmp_path)["runs"]) == list(runs)
    # the intervals follow from the answers beside them
    monkeypatch.setattr(recompute, "start", lambda: None)
    recompute.main(["--output", str(tmp_path)])
    assert "19 results came out as published" in capsys.readouterr().out
    answers = tmp_path / "metrics" / "grid_answers.csv"
    rows = [line.split(",") for line in answers.read_text().splitlines()]
    rows[1][rows[0].index("lora_epoch-2_lr_8e-4")] = "50.0"
    answers.write_text("\n".join(map(",".join, rows)))
    one_line_exit(lambda: recompute.main(["--output", str(tmp_path)]), "grid.json does not follow")
