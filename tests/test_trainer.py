"""Runs that Hugging Face's Trainer left, read as those of the grid."""
import csv
import importlib.util
import json
import os

import pytest
import torch
from conftest import ROOT, one_line_exit, program, tiny_bert

import tools.grid as grid


@pytest.mark.parametrize("name, parsed", [
    ("2_epochs_base_qa_2e-4", ("full", 2, 2e-4)),
    ("lora-epoch-3_lr_4.25e-05", ("lora", 3, 4.25e-5)),
    ("qdora_epoch-2_lr_2e-4", ("qdora", 2, 2e-4)), ("QLoRA_lr_2e-4_epochs_3", ("qlora", 3, 2e-4)),
    ("dora_3epochs_lr_0.0002", ("dora", 3, 2e-4)), ("base_qa_12_epochs_5e-05", ("full", 12, 5e-5)),
    ("lora_lr-4.25e-5_epoch3", ("lora", 3, 4.25e-5)), ("loraplus_epoch-3_lr_2e-4", None),
    ("qlora_bert-base_epoch-3_lr_2e-4", ("qlora", 3, 2e-4)),
    ("lora_r_16_epochs_3_lr_2e-4", ("lora", 3, 2e-4)),
    ("lora_bs-8_epochs-3_lr-2e-4", ("lora", 3, 2e-4)),
    ("qa_lora_seed_42_epochs_3_2e-4", ("lora", 3, 2e-4)),
    ("lora_wd_1e-2_epoch-3_lr_2e-4", ("lora", 3, 2e-4)),
    ("lora_eps-1e-8_lr-2e-4_epoch-3", ("lora", 3, 2e-4)),
    ("lora_epoch-3_lr_.5e-4", ("lora", 3, 5e-5)), ("q-lora_epoch-3_lr_2e-4", ("qlora", 3, 2e-4)),
    ("full_lr2e-5_3_epochs", ("full", 3, 2e-5)), ("lora_0.5_epochs_2e-4", None),
    ("lora_1e-4_epoch-3_2e-4", None), ("lora_2_epochs_epoch-3_epoch-4_2e-4", None),
    # the name of a model, not of a method
    ("bert-base_epoch-3_lr_2e-4", None), ("adapter_base_epoch-3_lr_2e-4", None),
    ("lora_qlora_epoch-2_lr_2e-4", None), ("epoch-3_lr_2e-4", None), ("lora_epoch-3", None),
    ("lora_lr_2e-4", None), ("logs", None), ("lora_lr0.0001bs16_epochs3", None),
    ("lora_lr_1.5e-4x_epoch_2", None), ("lora_epoch-2_lr_0_0002", None),
    ("lora_epoch-2_lr_1e-04.old", ("lora", 2, 1e-4))])
def test_names_are_recognised_exactly(name, parsed):
    assert grid.parse_name(name) == parsed


def state(scores, runtime=None):
    """What Trainer (5.23) writes: an entry per training log, one per evaluation, one at the end."""
    log = []
    for epoch, (f1, em) in enumerate(scores, 1):
        log += [{"epoch": float(epoch), "grad_norm": 6.4, "learning_rate": 5e-05, "loss": 1.1,
                 "step": 2 * epoch},
                {"epoch": float(epoch), "eval_exact_match": em, "eval_f1": f1, "eval_loss": 1.0,
                 "eval_runtime": 0.01, "eval_samples_per_second": 1103.5,
                 "eval_steps_per_second": 137.9, "step": 2 * epoch}]
    if runtime:
        log.append({"epoch": 2.0, "step": 4, "total_flos": 27427968.0, "train_loss": 1.1,
                    "train_runtime": runtime, "train_samples_per_second": 39.4,
                    "train_steps_per_second": 9.9})
    return json.dumps({"best_global_step": None, "best_metric": None, "epoch": 2.0,
                       "global_step": 4, "log_history": log, "max_steps": 4, "num_train_epochs": 2,
                       "stateful_callbacks": {}, "train_batch_size": 4, "trial_name": None})


@pytest.fixture
def folder(tmp_path):
    """A folder with Trainer's runs: with a state of its own, with checkpoints alone, unfinished."""
    def put(path, text):
        path = tmp_path / "runs" / path / "trainer_state.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    put("2_epochs_base_qa_2e-4", state([(80.0, 70.0), (79.0, 69.5)], 6000.0))
    put("2_epochs_base_qa_2e-4/checkpoint-4", state([(1.0, 1.0)]))
    put("lora-epoch-2_lr_2e-4", state([(70.0, 55.0), (75.0, 60.0)], 3000.0))
    # the numerically last, not the last by name or by date
    put("lora-epoch-3_lr_4.25e-05/checkpoint-1000", state([(60.0, 50.0), (66.0, 52.0)]))
    put("lora-epoch-3_lr_4.25e-05/checkpoint-999", state([(60.0, 50.0)]))
    put("qlora_epoch-2_lr_2e-4", state([]))
    (tmp_path / "runs" / "dora_epoch-3_lr_2e-4").mkdir()
    (tmp_path / "runs" / "notes").mkdir()
    return tmp_path / "runs"


def main(*flags):
    grid.main([str(flag) for flag in flags])


def test_the_study_is_made_from_the_runs(folder, tmp_path):
    out = tmp_path / "out"
    done = program("tools.grid", "--trainer", folder, "--output", out)
    assert done.returncode == 0, done.stderr
    assert "notes is left out" in done.stderr and len(done.stderr.splitlines()) == 1
    with open(out / "metrics" / "grid_results.csv") as file:
        rows = {row["run"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["full_epoch-2_lr_2e-4", "lora_epoch-2_lr_2e-4", "lora_epoch-3_lr_4.25e-5"]
    full, lora, slow = rows.values()
    assert (full["f1"], full["exact_match"], full["best_epoch"]) == ("80.0", "70.0", "1.0")
    assert (full["f1_last"], full["exact_match_last"], full["minutes"]) == ("79.0", "69.5", "100.0")
    assert (slow["f1"], slow["minutes"]) == ("66.0", "") and lora["minutes"] == "50.0"
    # what others have, with other epochs or rates, and what has begun
    missing = done.stdout.splitlines()[-1]
    assert missing.startswith("missing: ") and "full_epoch-3_lr_2e-4" in missing
    assert "qlora_epoch-2_lr_2e-4" in missing and "dora_epoch-3_lr_2e-4" in missing
    assert "lora_epoch-2_lr_2e-4," not in missing.replace("qlora_epoch-2_lr_2e-4", "")
    text = (out / "figures" / "grid.md").read_text()
    assert "3 runs of Hugging Face's Trainer" in text
    assert "bootstrap" not in text and "| lora_epoch-3_lr_4.25e-5 | 66.00 |" in text
    command = f"python -m tools.grid --trainer {folder} --output {out}"
    assert json.loads((out / "metrics" / "grid.json").read_text())["command"] == command
    assert f"made by `{command}`" in text
    assert (out / "figures" / "grid_f1.png").stat().st_size > 10_000
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    main("--redraw", "--output", out)
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_a_run_that_was_cut_is_named(folder, tmp_path):
    path = folder / "lora-epoch-2_lr_2e-4" / "trainer_state.json"
    path.write_text(path.read_text().replace('"max_steps": 4', '"max_steps": 6000'))
    # no run says how long it took
    for path in folder.rglob("trainer_state.json"):
        path.write_text(path.read_text().replace("train_runtime", "runtime"))
    done = program("tools.grid", "--trainer", folder, "--output", tmp_path / "out")
    assert done.returncode == 0 and "ends at step 4 of 6,000" in done.stderr
    assert "UserWarning" not in done.stderr


def test_fractions_are_percent_and_nan_is_no_score(folder, capsys):
    path = folder / "lora-epoch-2_lr_2e-4" / "trainer_state.json"
    path.write_text(state([(0.70, 0.55), (float("nan"), 0.60), (0.85, 0.6), (0.8, 0.5)]))
    results, _ = grid.trainer_runs(folder)
    run = results["lora_epoch-2_lr_2e-4"]
    assert (run["f1"], run["exact_match"], run["best_epoch"], run["f1_last"]) == (85, 60, 3, 80)
    assert "taken as fractions" in capsys.readouterr().err
    assert results["full_epoch-2_lr_2e-4"]["f1"] == 80


@pytest.mark.parametrize("name", ["eval_results.json", "all_results.json"])
def test_scores_that_run_qa_wrote_after_its_state(name, folder):
    for own in state([]), None:
        path = folder / "qlora_epoch-2_lr_2e-4" / "trainer_state.json"
        path.write_text(own) if own else path.unlink()
        (path.parent / name).write_text(json.dumps({
            "epoch": 2.0, "eval_exact_match": 61.0, "eval_f1": 73.5, "eval_samples": 100,
            **({"train_runtime": 30.0} if name == "all_results.json" else {})}))
        results, missing = grid.trainer_runs(folder)
        result = results["qlora_epoch-2_lr_2e-4"]
        assert (result["f1"], result["exact_match"], result["best_epoch"]) == (73.5, 61, 2)
        assert result["train_time_s"] == (30 if name == "all_results.json" else None)


def test_all_files_of_run_qa_are_read_together(folder, capsys):
    """Its state has steps and time, eval_results.json the scores, all_results.json both."""
    own = folder / "qlora_epoch-2_lr_2e-4"
    content = json.loads(state([])) | {"global_step": 4, "max_steps": 6}
    content["log_history"].append({"epoch": 2.0, "train_runtime": 30.0})
    (own / "trainer_state.json").write_text(json.dumps(content))
    scores = {"epoch": 2.0, "eval_exact_match": 61.0, "eval_f1": 73.5}
    (own / "eval_results.json").write_text(json.dumps(scores))
    (own / "all_results.json").write_text(json.dumps(scores | {"train_runtime": 30.0}))
    result = grid.trainer_runs(folder)[0]["qlora_epoch-2_lr_2e-4"]
    assert (result["f1"], result["best_epoch"], result["train_time_s"]) == (73.5, 2, 30)
    assert len(result["history"]) == 1 and "ends at step 4 of 6:" in capsys.readouterr().err


def test_file_dates_do_not_count(folder):
    for path in folder.rglob("trainer_state.json"):
        os.utime(path, (1, 1))
    results, _ = grid.trainer_runs(folder)
    assert results["lora_epoch-3_lr_4.25e-5"]["f1"] == 66.0
    assert results["lora_epoch-3_lr_4.25e-5"]["train_time_s"] is None


def test_what_cannot_be_read_is_one_line(folder, tmp_path):
    one_line_exit(lambda: grid.trainer_runs(tmp_path / "nothing"), "no such folder")
    (tmp_path / "empty").mkdir()
    one_line_exit(lambda: grid.trainer_runs(tmp_path / "empty"), "holds no run")
    (folder / "lora_epoch-2_lr_0.0002").mkdir()
    os.replace(folder / "lora-epoch-3_lr_4.25e-05" / "checkpoint-999" / "trainer_state.json",
               folder / "lora_epoch-2_lr_0.0002" / "trainer_state.json")
    one_line_exit(lambda: grid.trainer_runs(folder), "are both lora 2")
    for text in "{", '{"log_history": 3}', "[]":
        (folder / "lora_epoch-2_lr_0.0002" / "trainer_state.json").unlink(missing_ok=True)
        (folder / "2_epochs_base_qa_2e-4" / "trainer_state.json").write_text(text)
        one_line_exit(lambda: grid.trainer_runs(folder), "damaged")
    one_line_exit(lambda: main("--trainer", folder), "--output")
    one_line_exit(lambda: main("--trainer", folder, "--output", ROOT), "damaged")


@pytest.mark.skipif(not importlib.util.find_spec("accelerate"), reason="Trainer needs accelerate")
def test_a_folder_that_trainer_wrote_itself(tmp_path):
    from transformers import Trainer, TrainingArguments
    rows = [{"input_ids": torch.tensor([1, 2, 3, i]), "labels": torch.tensor(i % 3)}
            for i in range(8)]
    scores = iter([55.0, 60.0])
    args = TrainingArguments(
        str(tmp_path / "runs" / "dora_epoch-2_lr_2e-4"), num_train_epochs=2, logging_steps=1,
        per_device_train_batch_size=4, eval_strategy="epoch", save_strategy="epoch", use_cpu=True,
        report_to="none", disable_tqdm=True)
    Trainer(tiny_bert(), args, train_dataset=rows, eval_dataset=rows,
            compute_metrics=lambda _: {"f1": (f1 := next(scores)), "exact_match": f1 / 2}).train()
    results, missing = grid.trainer_runs(tmp_path / "runs")
    result = results["dora_epoch-2_lr_2e-4"]
    # without save_state only the checkpoints have a state, without a runtime
    assert (result["f1"], result["exact_match"], result["best_epoch"], missing) == (60, 30, 2, [])
    assert result["train_time_s"] is None
