"""Four tasks on one base, on a small BERT: nobody's answers change, and memory grows by
what was trained."""
import json

import pytest
from conftest import one_line_exit, save_small_bert

import multitask
import train as train_module
from methods import CASES
from settings import RATED_TASKS, parse_args


@pytest.fixture(scope="module")
def eleven_runs(tmp_path_factory):
    """(flags, output folder) of eleven finished runs; the twelfth is missing."""
    base = tmp_path_factory.mktemp("multitask")
    # a high learning rate, so that a few steps make four different models
    flags = ["--model", save_small_bert(base / "model"), "--output", base / "out", "--epochs", 1,
             "--max-steps", 8, "--max-length", 12, "--lr", 0.02, "--seed", 5]
    flags = [str(flag) for flag in flags]
    for method in "full", *multitask.METHODS:
        for task in RATED_TASKS:
            if (method, task) != ("lora_r8", "tweets"):
                own = CASES[method].flags.split()
                train_module.main(parse_args([*flags, "--task", task, *own]))
    return flags, base / "out"


def test_all_of_it(eleven_runs, capfd):
    flags, output = eleven_runs
    multitask.main(*multitask.parse_args(flags))
    out = capfd.readouterr().out
    # only that one was trained
    assert out.count("== ") == 1 and "--method lora --r 8" in out and "--task tweets" in out
    result = json.loads((output / "metrics" / "multitask.json").read_text())
    for task in RATED_TASKS:
        for method in "lora_r8", "adapter":
            row = result["tasks"][task][method]
            assert row["changed_predictions"] == 0 and row["together"] == [row["f1_macro"]] * 2
    full, lora = (result["methods"][method] for method in ("full", "lora_r8"))
    assert (full["trained_bytes"] == result["base_bytes"]
            and lora["trained_bytes"] == 4 * (2 * 2 * 2 * 8 * 48 + 2 * 48 + 2))
    measured = dict(full["memory"])
    assert (measured[50] - measured[10]) / 40 == pytest.approx(full["trained_bytes"], rel=0.05)
    measured = dict(lora["memory"])
    assert measured[50] < 40 * full["trained_bytes"] / 2 and measured[50] > result["base_bytes"]
    assert (output / "figures" / "multitask.png").stat().st_size > 10_000
    assert (output / "figures" / "multitask.md").read_text() in out


def test_without_switching_the_answers_would_be_others(eleven_runs, monkeypatch):
    flags, output = eleven_runs
    monkeypatch.setattr(multitask, "switch", lambda slots, tensors: None)
    monkeypatch.setattr(multitask, "memory_of", lambda *args: [(1, 1), (50, 50)])
    multitask.main(*multitask.parse_args(flags))
    tasks = json.loads((output / "metrics" / "multitask.json").read_text())["tasks"]
    assert all(tasks[task]["lora_r8"]["changed_predictions"] > 0 for task in ("products", "tweets"))


def test_other_methods_too(eleven_runs):
    flags, output = eleven_runs
    flags = [*flags[:2], "--methods", "bitfit", "head", *flags[2:]]
    for method in "bitfit", "head":
        for task in RATED_TASKS:
            own = CASES[method].flags.split()
            train_module.main(parse_args([*flags[:2], *flags[5:], "--task", task, *own]))
    multitask.main(*multitask.parse_args(flags))
    result = json.loads((output / "metrics" / "multitask.json").read_text())
    assert list(result["methods"]) == ["full", "bitfit", "head"]
    for row in result["tasks"].values():
        assert row["bitfit"]["changed_predictions"] == row["head"]["changed_predictions"] == 0
    assert result["methods"]["head"]["trained_bytes"] == 4 * (2 * 48 + 2)
    for name in "bert", "full", "qlora":  # 4-bit methods have encoder weights of their own
        one_line_exit(lambda: multitask.parse_args(["--methods", name]), "--methods", "bitfit")


def test_a_deleted_checkpoint_is_said_and_its_result_kept(eleven_runs):
    flags, output = eleven_runs
    path = next((output / "checkpoints").glob("tweets_full*"))
    path.unlink()
    before = sorted(output.rglob("*"))
    with pytest.raises(SystemExit, match=f"error: .*{path.name} is gone.*delete"):
        multitask.main(*multitask.parse_args(flags))
    assert sorted(output.rglob("*")) == before


def test_a_process_that_dies_is_said(tmp_path):
    with pytest.raises(SystemExit, match="error: the process that measures .* has died"):
        multitask.memory_of([tmp_path / "nothing"], None, None, False)


@pytest.mark.parametrize("flag", ["--task", "--data", "--method", "--r", "--targets", "--fold"])
def test_what_the_runs_differ_in_is_refused(flag):
    with pytest.raises(SystemExit, match=f"error: {flag} is what the runs"):
        multitask.parse_args([flag, "x"])
