"""Cross-validation: every sentence tests once, none of them in its own training rows, the same for
every method; and what is made of the runs."""
import csv
import json
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import (
    load_folder,
    one_line_error,
    one_line_exit,
    one_warning,
    program,
    save_small_bert,
    train,
    write_splits,
)
from sklearn.metrics import f1_score, log_loss

import compare
import data
import plots
import rates
from compare import FOLD_RUNS
from settings import make_parser, read_flags
from spread import corrected_interval, ece, paired_interval
from tools import recompute


@pytest.fixture(scope="module")
def folds():
    return [data.load_rated("movies", f"{k}/5") for k in range(1, 6)]


def test_every_movie_sentence_tests_once_and_is_not_in_its_own_training_rows(folds):
    tested = [sentence for task in folds for sentence in task.test.sentences]
    assert len(tested) == len(set(tested)) == 10_070
    one_pool = data.load_rated("movies")
    assert set(tested) == {s for rows in one_pool[1:4] for s in rows.sentences}
    for k, task in enumerate(folds, 1):
        sentences = [set(rows.sentences) for rows in task[1:4]]
        assert [len(part) for part in sentences] == [7056, 1000, 2014]
        assert len(set.union(*sentences)) == 10_070  # disjoint
        shares = [np.mean(rows.labels) for rows in task[1:4]]
        assert max(shares) - min(shares) < 0.001
        assert task.note == f"fold {k} of 5 tests (seed 2003)" and task.label_names[1] == "positive"


def test_folds_are_the_same_for_every_method_seed_and_call(folds):
    assert data.load_rated("movies", "2/5")[1:4] == folds[1][1:4]
    # and validation is not the same rows of every fold's training rows
    assert len({sentence for task in folds for sentence in task.validation.sentences}) > 3000
    lines = commands("--folds", 5, "--repeats", 2)
    assert len(lines) == len(set(lines)) == 8 * 5 * 2
    for i in range(10):  # each training has a seed of its own, the same for all methods
        own = [line for line in lines if f"--seed {42 + i} --fold {i % 5 + 1}/5 " in line]
        assert [line.split("/5 ")[1] for line in own] == list(FOLD_RUNS.values())


def commands(*flags):
    done = program("compare.py", "--list", *flags)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_five_folds_are_the_five_runs_and_three_more():
    assert list(FOLD_RUNS)[:5] == list(compare.RUNS)
    assert list(FOLD_RUNS)[5:] == ["lora_r16_all", "bitfit", "head"]


def test_a_pool_of_one_s_own_and_of_few_rows(tmp_path):
    rows = "".join(f"sentence {i}\t{'abc'[i % 3]}\n" for i in range(60))
    (tmp_path / "train.tsv").write_text("sentence\tlabel\n" + rows)
    tasks = [load_folder(tmp_path, "--fold", f"{k}/4") for k in range(1, 5)]
    assert sorted(s for task in tasks for s in task.test.sentences) == sorted(
        f"sentence {i}" for i in range(60))
    assert [len(task.validation.labels) for task in tasks] == [6] * 4
    assert all(task.label_names == ["a", "b", "c"] for task in tasks)
    one_line_exit(lambda: load_folder(tmp_path, "--fold", "1/20"),
                  "20 folds need 21 rows", "has 20")
    (tmp_path / "train.tsv").write_text("sentence\tlabel\n" + rows + "x\td\n" * 3)
    one_line_exit(lambda: load_folder(tmp_path, "--fold", "2/2"),
                  "2 folds need 4 rows", "'d' has 3")


@pytest.mark.parametrize("flags, words", [
    (["--task", "sst2"], ["sst2", "given", "movies"]),
    (["--task", "ag_news"], ["ag_news", "given"]),
    (["--task", "synthetic"], ["run_grid.sh"]),
    (["--fold", "1/5"], ["--fold"]),
    (["--targets", "all"], ["--targets"])])
def test_what_has_no_folds_is_refused_before_anything_runs(flags, words, monkeypatch):
    monkeypatch.setattr(compare, "start", lambda: None)
    one_line_exit(lambda: compare.main(["--list", "--folds", "5", *flags]), *words)


def test_a_program_refuses_what_has_no_folds(tmp_path):
    mine = write_splits(tmp_path / "mine", {"train": 80, "dev": 12},
                        lambda i, split: f"{split} {i}\t{i % 2}")
    one_line_error(program("compare.py", "--list", "--folds", 5, "--data", mine),
                   "dev.tsv", "one pool")


@pytest.mark.parametrize("fold", ["0/5", "6/5", "1/1", "2", "a/b", "1/5/2", "-1/5"])
def test_a_fold_that_is_none(fold):
    one_line_exit(lambda: make_parser().parse_args(["--method", "head", f"--fold={fold}"]),
                  repr(fold), "2/5")


@pytest.mark.parametrize("folds", [1, "x"])
def test_a_number_of_folds_that_is_none(folds):
    one_line_exit(lambda: compare.split_folds(["--folds", str(folds)]), "--folds")


@pytest.mark.parametrize("flags, word", [("--folds 5 --seeds 42 43", "--repeats 3"),
                                         ("--repeats 3", "--folds"),
                                         ("--folds 5 --repeats 0", "0")])
def test_repetitions_go_with_folds_and_seeds_do_not(flags, word):
    one_line_exit(lambda: compare.split_folds(flags.split()), word)


def test_a_fold_is_trained_tested_and_skipped_when_finished(tmp_path):
    pool = write_splits(tmp_path / "pool", {"train": 90}, lambda i, _:
                        f"a {'good' if i % 2 else 'bad'} film {i}\t{i % 2}")
    flags = ["--method", "bitfit", "--model", save_small_bert(tmp_path / "model"), "--data", pool,
             "--fold", "3/3", "--max-steps", 2, "--output", tmp_path / "out"]
    done = train(*flags)
    assert done.returncode == 0 and "fold 3 of 3 tests" in done.stdout, done.stderr
    path, = (tmp_path / "out" / "metrics" / "runs").iterdir()
    result = json.loads(path.read_text())
    assert path.name.startswith("pool_bitfit_fold3of3_seed42_")
    assert result["rows"] == {"train": 51, "validation": 9, "test": 30}
    labels, probabilities = np.array(result["test_predictions"])[:, 0], result["test_probabilities"]
    assert np.sum(probabilities, axis=1) == pytest.approx(1)
    assert result["nll"] == pytest.approx(log_loss(labels, probabilities))
    best, validated = result["history"][result["best_epoch"] - 1], result["validation"]
    labels = np.array(validated["predictions"])[:, 0]
    assert best["validation_nll"] == pytest.approx(log_loss(labels, validated["probabilities"]))
    assert "finished already" in train(*flags).stdout


# --- a whole study of made-up runs ---------------------------------------------------------------

N_FOLDS, ROWS, REPEATS = 3, 40, 2


def make_run(flags, labels, right, rng):
    """Leave the result of a run that is `right` about a share of its test rows, and sure of it."""
    made = read_flags([str(flag) for flag in flags])
    predicted = np.where(rng.random(len(labels)) < right, labels, 1 - labels)
    sure = rng.uniform(0.5, 1, len(labels))
    one = np.where(predicted == 1, sure, 1 - sure)
    outcome = {"predictions": np.stack([labels, predicted], 1).tolist(),
               "probabilities": np.stack([1 - one, one], 1).tolist()}
    result = {
        "trainable_params": 5, "trainable_by_kind": {}, "total_params": 10, "trainable_pct": 50.0,
        "f1_macro": f1_score(labels, predicted, average="macro"),
        "accuracy": float(np.mean(labels == predicted)),
        "nll": log_loss(labels, outcome["probabilities"]),
        "ece": ece(labels, outcome["probabilities"]),
        "peak_vram_gb": None, "peak_rss_gb": 1 + rng.random(), "best_epoch": 1,
        "history": [{"seconds": 1 + rng.random(), "train_loss": 0.1}],
        "settings": vars(made.settings),
        "rows": {"train": 70, "validation": 10, "test": len(labels)},
        "splits": "", "environment": {"device": "CPU, 2 threads", "amp": "off"},
        "validation": outcome, **{f"test_{what}": own for what, own in outcome.items()}}
    made.result.parent.mkdir(parents=True, exist_ok=True)
    made.result.write_text(json.dumps(result))
    return made.result


@pytest.fixture(scope="module")
def made_up(tmp_path_factory):
    """(folder, {(run, repetition, fold): result path})."""
    folder, rng, paths = tmp_path_factory.mktemp("folds"), np.random.default_rng(0), {}
    for fold in range(1, N_FOLDS + 1):
        labels = rng.integers(0, 2, ROWS)
        for again in range(REPEATS):
            for i, (name, flags) in enumerate(FOLD_RUNS.items()):
                part = ["--seed", 41 + again * N_FOLDS + fold, "--fold", f"{fold}/{N_FOLDS}",
                        "--output", folder]
                paths[name, again, fold] = make_run([*flags.split(), *part], labels, 0.9 - 0.04 * i,
                                                    rng)
    return folder, paths


def study_flags(folder):
    return ["--folds", str(N_FOLDS), "--repeats", str(REPEATS), "--output", str(folder)]


def test_made_up_folds_are_pooled_and_compared(made_up, capsys, monkeypatch):
    folder, paths = made_up
    monkeypatch.setattr(recompute, "start", lambda: None)
    done = program("compare.py", *study_flags(folder))
    assert done.returncode == 0 and "==" not in done.stdout, done.stderr
    study = json.loads((folder / "metrics" / "crossvalidation.json").read_text())
    entries, command = study["entries"], study["command"]
    assert command == f"bash run_all.sh --folds 3 --repeats 2 --output {folder}"
    assert list(entries) == list(FOLD_RUNS)
    results = {key: json.loads(path.read_text()) for key, path in paths.items()}
    scores = {}
    labels, fold = (np.array(own) for own in zip(*[
        (pair[0], k) for k in range(1, N_FOLDS + 1)
        for pair in results["full", 0, k]["test_predictions"]]))
    predicted = {name: np.array([[pair[1] for k in range(1, N_FOLDS + 1) for pair in
                                  results[name, again, k]["test_predictions"]]
                                 for again in range(REPEATS)]) for name in entries}
    for name, entry in entries.items():
        scores[name] = np.mean([f1_score(labels, own, average="macro") for own in predicted[name]])
        assert entry["f1_macro"] == pytest.approx(scores[name])
        own = [results[name, again, k] for again in range(REPEATS) for k in range(1, N_FOLDS + 1)]
        assert entry["f1_macro_std"] == pytest.approx(np.std([r["f1_macro"] for r in own], ddof=1))
        assert (entry["n"], entry["test_rows"], entry["seeds"]) == (6, 120, [*range(42, 48)])
        for key in "nll", "ece":
            each = [r[key] for r in own]
            assert entry[key] == entry["calibration"][key]["mean"] == pytest.approx(np.mean(each))
            assert entry["calibration"][key]["std"] == pytest.approx(np.std(each, ddof=1))
        # the made-up validation rows are the test rows, which a temperature then suits best
        assert entry["calibration"]["nll_scaled"]["mean"] < entry["nll"]
        assert not compare.ROW_BY_ROW & set(entry["runs"][0])
    assert entries["full"]["vs_full"] is None
    vs = entries["head"]["vs_full"]
    assert vs["points"] == pytest.approx(100 * (scores["head"] - scores["full"]))
    assert vs["low"] < vs["points"] < vs["high"] < 0
    assert vs == pytest.approx(paired_interval(labels, predicted["head"], predicted["full"], fold,
                                               comparisons=7))
    by_fold = {key: [np.mean([results["head", again, k][key] - results["full", again, k][key]
                              for again in range(REPEATS)]) for k in range(1, N_FOLDS + 1)]
               for key in ("f1_macro", "nll")}
    assert entries["head"]["vs_full_new_rows"] == pytest.approx(
        corrected_interval(100 * np.array(by_fold["f1_macro"]), 40, 70))
    assert entries["head"]["calibration"]["nll"]["vs_full"] == pytest.approx(
        corrected_interval(by_fold["nll"], 0, 70))
    assert "NLL, scaled" in (folder / "figures" / "calibration.md").read_text()
    assert (folder / "figures" / "glance.png").stat().st_size > 10_000
    table = (folder / "figures" / "crossvalidation.md").read_text()
    assert table in done.stdout and f"made by `{command}`" in table
    assert "3 folds, each 70 training" in table and "seeds 42 to 47 (n = 6 trainings)" in table
    recompute.main(["--output", str(folder)])
    said = capsys.readouterr().out
    assert said.count(", NLL and ECE: ") == 8 and "57 results came out as published" in said
    path = folder / "metrics" / "crossvalidation_probabilities.npz"
    whole, changed = path.read_bytes(), dict(np.load(path))
    changed["bitfit"] = changed["bitfit"] ** 0.9  # the same answers, no longer a sum of one
    np.savez(path, **changed)
    one_line_exit(lambda: recompute.main(["--output", str(folder)]), "bitfit, NLL and ECE")
    path.write_bytes(whole)
    answer = (folder / "figures" / "answer.md").read_text()
    assert answer in done.stdout and "**Not told.**" in answer
    assert answer.startswith("| method | % trained | macro-F1 |")

    with open(folder / "metrics" / "crossvalidation_predictions.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 120 and [row["fold"] for row in rows[::ROWS]] == ["1", "2", "3"]
    for again in range(REPEATS):
        assert [int(row[f"bitfit_repeat{again + 1}"]) for row in rows] == list(
            predicted["bitfit"][again])


def answer_of(study):
    return plots.answer_markdown(plots.read_study(study))


def test_a_missing_fold_is_trained_and_no_other(made_up, capsys, monkeypatch):
    folder, paths = made_up
    path, asked = paths["bitfit", 1, 2], []
    text = path.read_text()

    def trains(command, **_):
        asked.append(read_flags(command[2:]).result)
        path.write_text(text)
        return SimpleNamespace(returncode=len(asked) - 1)

    monkeypatch.setattr(compare, "start", lambda: None)
    monkeypatch.setattr(rates, "subprocess", SimpleNamespace(run=trains, DEVNULL=None))
    monkeypatch.setattr(plots, "draw_study", lambda *_: None)
    monkeypatch.setattr(compare, "plan", lambda flags, *_: (flags, 1, None))  # it would train
    study = folder / "metrics" / "crossvalidation.json"
    compare.main(study_flags(folder))
    before = study.read_text()
    path.unlink()
    compare.main(study_flags(folder))
    assert asked == [path] and study.read_text() == before
    # a result of another machine loses no other one, and decides nothing by time or memory
    assert "| time |" in answer_of(study)
    path.write_text(text.replace("CPU, 2 threads", "a GPU"))
    capsys.readouterr()
    compare.main(study_flags(folder))
    one_warning(capsys.readouterr().err, "a GPU", "do not compare")
    answer = answer_of(study)
    assert "CPU, 2 threads and a GPU" in answer and "| quality |" in answer
    assert "| time |" not in answer and "less time" not in answer and "less memory" not in answer
    plots.glance(plots.read_study(study), "training", folder / "glance.png")
    for kind, is_said in ("another CPU, AVX512", True), (None, False):  # None: it is not known
        capsys.readouterr()
        for other, own in (path, kind), (paths["full", 0, 1], "a CPU, AVX2"):
            result = json.loads(text if other == path else other.read_text())
            result["environment"]["cpu"] = own
            other.write_text(json.dumps(result))
        compare.main(study_flags(folder))
        assert ("a CPU, AVX2, another CPU, AVX512" in capsys.readouterr().err) is is_said
        assert ("| time |" not in answer_of(study)) is is_said
    path.write_text(text)
    compare.main(study_flags(folder))
    path.unlink()  # the next training fails: the others' results stand
    one_line_exit(lambda: compare.main(study_flags(folder)), "bitfit", "tries again")
    assert asked == [path, path]
    whole, others = (json.loads(own)["entries"] for own in (before, study.read_text()))
    assert list(others) == [name for name in whole if name != "bitfit"]
    assert others["lora_r8"]["runs"] == whole["lora_r8"]["runs"]
    path.write_text(text)
    paths["full", 0, 1].unlink()  # without full fine-tuning there is nothing to compare with
    others = study.read_text()
    monkeypatch.setattr(rates, "subprocess", SimpleNamespace(
        run=lambda *_, **__: SimpleNamespace(returncode=1), DEVNULL=None))
    one_line_exit(lambda: compare.main(study_flags(folder)), "full", "tries again")
    assert study.read_text() == others
