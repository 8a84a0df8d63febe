"""The twenty runs of question answering: what is run, what is gathered, and what becomes of it."""
import csv
import json

import numpy as np
import pytest
from conftest import ROOT, forked_environment, one_line_exit, run, save_small_bert, settings

import compare
import tools.grid as grid
from settings import Run, read_flags, result_path, run_name

# What train.py leaves of a run on ten test questions, but for its settings and scores
RESULT = {"best_epoch": 1, "history": [{"validation_f1": 50.0}], "trainable_params": 1000,
          "peak_vram_gb": None, "peak_rss_gb": 1.0,
          "epoch_time_s": 1.0, "test_random": [20.0] * 10,
          "rows": {"train": 40, "validation": 10, "test": 10},
          "environment": {"device": "CPU, 1 thread", "amp": "off"},
          "test_predictions": [[["here"], "here"]] * 10}


def main(*flags):
    grid.main([str(flag) for flag in flags])


def question_file(n):
    """The text of a SQuAD file of n questions on n passages."""
    paragraphs = [{"context": f"passage {i}: it is here.", "qas": [
        {"id": f"{i}", "question": "where is it?",
         "answers": [{"text": "here", "answer_start": len(f"passage {i}: it is ")}]}]}
        for i in range(n)]
    return json.dumps({"data": [{"title": "t", "paragraphs": paragraphs}]})


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """Flags of a grid that takes seconds: a small model on a small folder of questions."""
    base = tmp_path_factory.mktemp("grid")
    (base / "mine").mkdir()
    for split, n in ("train", 40), ("dev", 10), ("test", 10):
        (base / "mine" / f"{split}.json").write_text(question_file(n))
    model = save_small_bert(base / "small")
    return ["--data", base / "mine", "--model", model, "--max-steps", 2, "--amp", "off"]


TRIED = [{"lr": lr, "validation": score, "loss": 1.0} for lr, score in
         ((4.25e-5, 60.0), (2e-4, 70.0))]


def leave_search(output, flags):
    """Put a search into `output` that found the rates of the study on Portuguese SQuAD."""
    (output / "metrics").mkdir(parents=True, exist_ok=True)
    (output / "metrics" / "grid_rates.json").write_text(json.dumps({
        "command": "python -m tools.grid --search", "epochs": 3,
        "name": grid.search_name(read_flags([*map(str, flags), "--method", "full"])),
        "tried": dict.fromkeys(grid.GRID_METHODS, TRIED)}))


def leave(output, flags, names, result=RESULT):
    """Put results of some runs of the grid into `output`, as train.py would have, with
    recognisable scores."""
    leave_search(output, flags)
    for i, (name, own) in enumerate(grid.GRID_RUNS.items()):
        if name in names:
            s = settings(*flags, *own.split())
            path = result_path(output, s)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({**result, "settings": vars(s), "f1": 50.0 + i,
                                        "exact_match": 40.0 + i, "train_time_s": 60.0 * (i + 1)}))


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
            assert grid.grid_runs(Run(s, None, s.model, ROOT, False)) is runs
    assert (settings("--method", "lora", "--lr", "4.25e-5")
            == settings("--method", "lora", "--lr", "4.25e-05"))


def test_list_prints_twenty_commands_wherever_the_user_stands(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "train.json").write_text(question_file(20))
    for name in "common.py", "json.py":  # none of the user's own modules is taken for ours
        (tmp_path / name).write_text("raise SystemExit('not ours')")
    leave_search(tmp_path / "with space", ["--data", tmp_path / "mine", "--amp", "off"])
    there = sorted(tmp_path.rglob("*"))
    done = run("bash", ROOT / "run_grid.sh", "--list", "--data", "mine", "--amp", "off",
               "--output", "with space", cwd=tmp_path)
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and len(lines) == 20 and sorted(tmp_path.rglob("*")) == there
    for line, own in zip(lines, grid.GRID_RUNS.values()):
        assert f"{ROOT / 'train.py'} --data mine " in line and line.endswith(own)
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


def test_what_all_runs_need_is_made_before_they_start(monkeypatch, tmp_path, capsys, flags):
    made = []
    monkeypatch.setattr(grid, "model_folder", lambda: made.append("model") or print("fetching"))
    monkeypatch.setattr(grid, "synthetic_folder", made.append)
    leave_search(tmp_path, flags)
    main("--list", *flags, "--output", tmp_path)
    assert not made and len(capsys.readouterr().out.splitlines()) == 20
    main("--list", "--output", tmp_path)
    assert made == ["model", settings("--method", "full", "--task", "synthetic").data_sha256]
    said = capsys.readouterr()
    assert len(said.out.splitlines()) == 20 and said.err == "fetching\n"  # stdout is the commands'


def test_flags_that_do_not_fit(tmp_path):
    for words, own in ((["run_all.sh"], ["--task", "movies"]),
                       (["--lr", "train.py"], ["--lr", "1e-3"]),
                       (["no run of this grid"], []),
                       (["there is no", "run_grid.sh"], ["--redraw"]),
                       (["unrecognized arguments: --task"], ["--redraw", "--task", "squad"])):
        one_line_exit(lambda: main(*own, "--output", tmp_path), *words)
    assert not list(tmp_path.iterdir())


# --- what is gathered -----------------------------------------------------------------------------

def test_partial_grid_draws_what_is_there_and_names_what_is_missing(flags, tmp_path, capsys):
    there = [name for name in grid.GRID_RUNS if name.startswith("qlora")]
    leave(tmp_path, flags, there)
    main(*flags, "--output", tmp_path)
    said = capsys.readouterr().out
    # and no lora among them
    assert list(read_grid(tmp_path)["runs"]) == there
    assert (read_grid(tmp_path)["command"]
            == " ".join(map(str, ["bash run_grid.sh", *flags, "--output", tmp_path])))
    assert ("16 of 20 runs are missing" in said
            and "lora_epoch-2_lr_2e-4, lora_epoch-2_lr_4.25e-5" in said)
    with open(tmp_path / "metrics" / "grid_statistics.csv") as file:
        line, = csv.DictReader(file)
    f1s = [50.0 + i for i, name in enumerate(grid.GRID_RUNS) if name in there]
    assert ((line["method"], line["n"]) == ("qlora", "4")
            and float(line["f1_mean"]) == pytest.approx(np.mean(f1s)))
    assert (float(line["f1_std"]) == pytest.approx(np.std(f1s, ddof=1))
            and float(line["minutes_max"]) == f1s[-1] - 49)
    assert (tmp_path / "figures" / "grid_f1.png").stat().st_size > 10_000
    assert "No run of full fine-tuning is finished" in said

    # it is drawn again from grid.json alone
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    for path in (tmp_path / "figures").iterdir():
        path.unlink()
    main("--redraw", "--output", tmp_path)
    assert before == {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    leave(tmp_path, flags, list(grid.GRID_RUNS)[:1],
          {**RESULT, "environment": {"device": "another", "amp": "off"}})
    capsys.readouterr()
    main(*flags, "--output", tmp_path)
    said = capsys.readouterr()
    assert "the minutes do not compare" in said.err and "full_epoch-2_lr_2e-4" in said.out


def test_what_another_machine_took_for_auto_is_no_other_study(flags, tmp_path, monkeypatch,
                                                              capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    runs = {name: {"settings": vars(settings(*flags, *own.split())) | {"amp": "bf16"}}
            for name, own in grid.GRID_RUNS.items()}
    path = tmp_path / "metrics" / "grid.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"command": "bash run_grid.sh", "runs": runs}))
    *auto, amp, off = flags
    leave_search(tmp_path, flags)
    main("--list", *auto, "--output", tmp_path)
    one_line_exit(lambda: main("--list", *auto, amp, off, "--output", tmp_path),
                  "holds results of another study (amp bf16, here off)")
    for speedup, amp in (2, "bf16"), (0.5, "off"):
        monkeypatch.setattr("settings.bf16_speedup", lambda: speedup)
        capsys.readouterr()
        main("--list", *auto, "--amp", "auto", "--output", tmp_path)
        assert capsys.readouterr().out.count(f" --amp {amp} --method ") == 20


def test_another_study_is_not_written_over(flags, tmp_path):
    runs = {name: {"settings": vars(settings(*flags, *own.split()))}
            for name, own in grid.GRID_RUNS.items() if name.startswith("qlora")}
    path = tmp_path / "metrics" / "grid.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"command": "bash run_grid.sh", "runs": runs}))
    before = path.read_bytes()
    another = save_small_bert(tmp_path.parent / "another_model", vocab_size=31000)
    leave_search(tmp_path, flags)
    for other in (flags[:4] + ["--max-steps", 3], ["--task", "synthetic"], [*flags, "--seed", 7],
                  [*flags, "--alpha", 16], [*flags, "--model", another]):
        for to_list in [], ["--list"]:
            one_line_exit(lambda: main(*to_list, *other, "--output", tmp_path),
                          "holds results of another study", "--output")
    assert path.read_bytes() == before
    damaged = ['{"full": {}}', "{", "[]", "3", json.dumps(runs),
               '{"command": "a", "runs": {}}', '{"command": "a", "runs": {"a": 3}}',
               '{"command": "a", "runs": {"qlora_epoch-2_lr_2e-4": {"settings": 3}}}']
    for damage in damaged:
        path.write_text(damage)
        for own in flags, ["--redraw"]:
            one_line_exit(lambda: main(*own, "--output", tmp_path), "damaged", "delete it")


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

def test_run_grid_skips_what_is_finished_goes_on_after_a_failure_and_then_mends_it(flags, tmp_path):
    name, *others = grid.GRID_RUNS  # the first one fails
    leave(tmp_path, flags, others)
    stem = result_path(tmp_path, settings(*flags, *grid.GRID_RUNS[name].split())).stem
    # a folder where a file should go
    blocked = tmp_path / "checkpoints" / f"{stem}.safetensors"
    blocked.mkdir(parents=True)
    command = ["bash", ROOT / "run_grid.sh", *flags, "--output", tmp_path]
    environment = forked_environment(tmp_path)
    done = run(*command, env=environment)
    assert done.returncode == 1 and f"failed: {tmp_path / 'venv/bin/python'}" in done.stderr
    assert "cannot write" in done.stderr and done.stdout.count("finished already") == 19
    assert f"1 of 20 runs are missing: {name}" in done.stdout
    assert list(read_grid(tmp_path)["runs"]) == others
    with open(tmp_path / "metrics" / "grid_results.csv") as file:
        rows = list(csv.DictReader(file))
    assert ([float(r["f1"]) for r in rows] == sorted((float(r["f1"]) for r in rows), reverse=True)
            and len(rows) == 19)
    blocked.rmdir()
    done = run(*command, env=environment)
    assert (done.returncode == 0 and done.stdout.count("finished already") == 19
            and "missing" not in done.stdout and blocked.is_file())
    assert list(read_grid(tmp_path)["runs"]) == list(grid.GRID_RUNS)
