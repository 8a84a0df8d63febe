"""Four tasks on one base, on a small BERT and a few rows: nobody's answers change, and memory grows
by what was trained."""
import json
import os
from subprocess import CompletedProcess
from types import SimpleNamespace

import forks
import pytest
from conftest import ROOT, one_line_exit, program, save_small_bert

import data
import rates
import train
from settings import RATED_TASKS
from tools import multitask, recompute


@pytest.fixture(scope="module")
def seven_runs(tmp_path_factory):
    """(flags, output folder) of seven finished runs, full fine-tuning's and LoRA's; LoRA's on
    tweets is missing. While it is in use, the four tasks are small and easy, each other task is the
    opposite of the one before, and compare.py trains in this process."""
    base = tmp_path_factory.mktemp("multitask")

    def made_up_ratings(task):
        sign, path = (-1) ** RATED_TASKS.index(task), base / f"{task}.txt"
        path.write_text("".join(f"{i}\t{sign * (2 if i % 2 else -2)}\ta {word} film {i}\n"
                                for i, word in enumerate(["bad", "good"] * 100)))
        return path

    def train_here(command, **_):
        train.main(command[2:])
        return CompletedProcess(command, 0)

    # large weights and a high learning rate, so that a few steps make different models
    model = save_small_bert(base / "model", initializer_range=0.3)
    flags = ["--model", model, "--output", base / "out", "--epochs", 2, "--max-steps", 8,
             "--max-length", 12, "--lr", 0.02, "--seed", 5]
    flags = [str(flag) for flag in flags]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "ratings_file", made_up_ratings)
        patch.setattr(rates, "subprocess", SimpleNamespace(run=train_here, DEVNULL=None))
        _, runs = multitask.parse_args(["--methods", "lora_r8", *flags])
        for method, of_tasks in runs.items():
            for task, own in of_tasks.items():
                if (method, task) != ("lora_r8", "tweets"):
                    train.main(own)
        yield flags, base / "out"


def measured(flags, *methods):
    """What main writes for these methods."""
    args, runs = multitask.parse_args(["--methods", *methods, *flags])
    multitask.main(args, runs)
    return json.loads((args.output / "metrics" / "multitask.json").read_text())


# What memory_of does, in a fork that has imported torch already. It prints what hold() would send.
MEASURE = """
import json, sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, sys.argv[1])
from tools.multitask import hold

files, *others = json.loads(sys.argv[2])
hold(list(map(Path, files)), *others, SimpleNamespace(send=lambda found: print(json.dumps(found))))
"""


def test_all_of_it(seven_runs, tmp_path, monkeypatch, capfd):
    def memory_of(files, *others):
        asked = json.dumps([list(map(str, files)), *others])
        done = program(tmp_path / "measure.py", ROOT, asked)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    (tmp_path / "measure.py").write_text(MEASURE)
    monkeypatch.setattr(multitask, "memory_of", memory_of)
    flags, output = seven_runs
    result = measured(flags, "lora_r8")
    out = capfd.readouterr().out
    # only that one was trained
    assert out.count("== ") == 1 and "--task tweets --method lora --r 8" in out
    for task in RATED_TASKS:
        row = result["tasks"][task]["lora_r8"]
        assert row["changed_predictions"] == 0 and row["together"] == [row["f1_macro"]] * 2
        assert row["vs_full"]["low"] <= row["vs_full"]["points"] <= row["vs_full"]["high"]
    monkeypatch.setattr(recompute, "start", lambda: None)
    recompute.main(["--output", str(output)])
    assert "4 results came out as published" in capfd.readouterr().out
    answers = output / "metrics" / "multitask_answers.csv"
    text = answers.read_text()
    assert text.startswith("task,label,full,lora_r8\n") and text.count("\ntweets,") == 20
    answers.write_text(text.replace("\ntweets,0", "\ntweets,1"))
    one_line_exit(lambda: recompute.main(["--output", str(output)]), "tweets, lora_r8")
    full, lora = (result["methods"][method] for method in ("full", "lora_r8"))
    assert (full["trained_bytes"] == result["base_bytes"]
            and lora["trained_bytes"] == 4 * (2 * 2 * 2 * 8 * 48 + 2 * 48 + 2))
    held = dict(full["memory"])
    assert (held[50] - held[10]) / 40 == pytest.approx(full["trained_bytes"], rel=0.05)
    held = dict(lora["memory"])
    assert held[50] < 40 * full["trained_bytes"] / 2 and held[50] > result["base_bytes"]
    assert (output / "figures" / "multitask.png").stat().st_size > 10_000
    assert (output / "figures" / "multitask.md").read_text() in out


def test_without_switching_the_answers_would_be_others(seven_runs, monkeypatch):
    flags, _ = seven_runs
    monkeypatch.setattr(multitask, "switch", lambda slots, tensors: None)
    monkeypatch.setattr(multitask, "memory_of", lambda *args: [(1, 1), (50, 50)])
    tasks = measured(flags, "lora_r8")["tasks"]
    changed = {task: row["lora_r8"]["changed_predictions"] for task, row in tasks.items()}
    assert changed["movies"] == changed["tweets"] == 0  # the same task twice
    assert changed["products"] > 10 and changed["editorials"] > 10  # of twice 20 rows


def test_other_methods_too_and_they_are_drawn_again(seven_runs, monkeypatch, capfd):
    flags, output = seven_runs
    monkeypatch.setattr(multitask, "memory_of", lambda *args: [(1, 1), (50, 50)])
    result = measured(flags, "bitfit", "head")
    assert list(result["methods"]) == ["full", "bitfit", "head"]
    for row in result["tasks"].values():
        for method in "bitfit", "head":
            assert row[method]["changed_predictions"] == 0
            assert row[method]["together"] == [row[method]["f1_macro"]] * 2
    assert result["methods"]["head"]["trained_bytes"] == 4 * (2 * 48 + 2)

    table, figure = output / "figures" / "multitask.md", output / "figures" / "multitask.png"
    before = table.read_text(), figure.read_bytes()
    table.unlink()
    figure.unlink()
    capfd.readouterr()
    multitask.main(*multitask.parse_args(["--redraw", "--output", str(output)]))
    assert (table.read_text(), figure.read_bytes()) == before
    assert before[0] in capfd.readouterr().out


def test_all_runs_are_of_one_precision(tmp_path, monkeypatch):
    monkeypatch.setattr(multitask.torch.cuda, "is_available", lambda: False)
    for speedup, amp in (2, "bf16"), (0.5, "off"):
        monkeypatch.setattr("settings.bf16_speedup", lambda: speedup)
        _, runs = multitask.parse_args(["--output", str(tmp_path)])
        for own in (own for of_tasks in runs.values() for own in of_tasks.values()):
            assert own[own.index("--amp") + 1] == amp


def test_methods_that_can_be_chosen():
    assert list(multitask.parse_args([])[1]) == ["full", "lora_r8", "adapter"]
    for name in "bert", "full", "qlora":  # 4-bit methods have encoder weights of their own
        one_line_exit(lambda: multitask.parse_args(["--methods", name]), "--methods", "bitfit")


def test_a_deleted_checkpoint_is_said_and_its_result_kept(seven_runs):
    flags, output = seven_runs
    path = next((output / "checkpoints").glob("tweets_full*"))
    path.unlink()
    before = sorted(output.rglob("*"))
    with pytest.raises(SystemExit, match=f"error: .*{path.name} is gone.*delete"):
        multitask.main(*multitask.parse_args(flags))
    assert sorted(output.rglob("*")) == before


def test_memory_is_measured_in_a_process_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(multitask, "hold", forks.echo)
    files = [tmp_path / "a", tmp_path / "b"]
    process, *said = multitask.memory_of(files, "model", ["0", "1"], True)
    assert said == [files, True] and process != os.getpid()


def test_a_process_that_dies_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(multitask, "hold", os._exit)  # it takes no five arguments
    with pytest.raises(SystemExit, match="error: the process that measures .* has died"):
        multitask.memory_of([tmp_path / "nothing"], None, None, False)


@pytest.mark.parametrize("flag", ["--task", "--data", "--method", "--r", "--targets", "--fold"])
def test_what_the_runs_differ_in_is_refused(flag):
    with pytest.raises(SystemExit, match=f"error: {flag} is what the runs"):
        multitask.parse_args([flag, "x"])
