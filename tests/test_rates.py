"""The search for learning rates: which ones it tries, which one it takes, and what a study does
with it."""
import json
import math
import re
import shlex
import subprocess
from types import SimpleNamespace

import pytest
from conftest import ROOT, one_line_exit, program, save_small_bert, settings, write_splits

import compare
import rates
from settings import checkpoint_path, has_searched_rates, read_flags
from tools import grid


def tried(**scores):
    """What a search tried: {"1e-3": validation score}; the loss falls with the score."""
    return [{"lr": float(lr), "validation": score, "loss": None if score is None else 1 - score}
            for lr, score in scores.items()]


@pytest.mark.parametrize("steps, centre", [(663, 2e-3), (200, 2e-3), (90, 4e-3), (12_000, 1e-3)])
def test_first_rates_are_around_the_default_and_follow_the_steps(steps, centre):
    first = rates.first_rates(["--method", "lora"], steps)
    assert first == pytest.approx([centre / 2, centre, 2 * centre])
    full = rates.first_rates(["--method", "full", "--model", "some/bert"], steps)
    assert full == pytest.approx([rate / 100 for rate in first])


def test_the_search_goes_on_beyond_an_edge_until_the_best_has_neighbours_or_six_were_tried():
    first = [5e-4, 1e-3, 2e-3]
    inside = tried(**{"5e-4": .7, "1e-3": .8, "2e-3": .6})
    assert [rates.next_rate(inside[:n], first) for n in range(4)] == [*first, None]
    above = tried(**{"5e-4": .6, "1e-3": .7, "2e-3": .8})
    assert rates.next_rate(above, first) == 4e-3
    assert rates.next_rate([*above, *tried(**{"4e-3": .7})], first) is None
    # a rate at which training failed is a neighbour
    assert rates.next_rate([*above, *tried(**{"4e-3": None})], first) is None
    below = tried(**{"5e-4": .8, "1e-3": .7, "2e-3": .6})
    assert rates.next_rate(below, first) == 2.5e-4
    assert rates.next_rate([*above, *tried(**{"4e-3": .81})], first) == 16e-3
    endless = [*above, *tried(**{"4e-3": .81, "16e-3": .82, "64e-3": .83})]
    assert len(endless) == rates.MOST and rates.next_rate(endless, first) is None
    assert rates.beyond(endless) == 256e-3 and rates.beyond(inside) is None


def test_of_equal_scores_one_inside_and_then_the_lower_loss_wins():
    equal = tried(**{"1e-3": .8, "2e-3": .8, "4e-3": .8, "8e-3": .8})
    for entry, loss in zip(equal, (0.4, 0.3, 0.2, 0.1)):
        entry["loss"] = loss
    assert rates.best_rate(equal)["lr"] == 4e-3
    # where all scores are 1, higher rates would have lower losses until one of them collapses
    assert rates.next_rate(equal[:3], [1e-3, 2e-3, 4e-3]) is None


def test_nothing_won_where_all_failed():
    assert rates.best_rate(tried(**{"1e-3": None})) is None


def test_which_tasks_have_searched_rates(data_dir, tmp_path):
    assert has_searched_rates(settings("--method", "lora", "--task", "tweets"))
    for other in (["--task", "sst2"], ["--model", "some/bert"], ["--data", data_dir],
                  ["--task", "synthetic"]):
        assert not has_searched_rates(settings("--method", "lora", *other))
    for flags, words in ((["--data", data_dir], "run_all.sh"), (["--task", "squad"], "run_grid.sh"),
                         (["--lr", "1e-3", "--data", data_dir], ""), ([], "")):
        said = read_flags(["--method", "lora", *map(str, flags)]).said
        assert f"lr {0.001 if '--lr' in flags else 0.002}" in said
        assert words in said and ("default" in said) is bool(words)


# --- a study -------------------------------------------------------------------------------------

@pytest.fixture
def made_up(tmp_path, monkeypatch):
    """A folder of data, and trainings that are made up: (its flags, {method: its best rate, the
    peak of its validation scores}, the calls of train.py). Test scores prefer the lowest rate."""
    data = write_splits(tmp_path / "mine", {"train": 200, "validation": 20, "test": 20},
                        lambda i, split: f"{split} film {i}\t{i % 2}")
    best = {"full": 2e-4, "lora": 4e-3, "qlora": 1e-3, "adapter": 5e-4}
    asked = []

    def run_program(command, **_):
        program, flags = command[1], command[2:]
        if program == "-P":
            size = json.dumps({"examples": 200, "seconds": 1})
            return subprocess.CompletedProcess(command, 0, f"200 rows\n{size}")
        asked.append(flags)
        run = read_flags(flags)
        score = 0.9 - 0.05 * abs(math.log2(best[run.settings.method] / run.settings.lr))
        labels = [i % 2 for i in range(20)]
        history = [{"epoch": 1, "seconds": 1.0, "train_loss": 0.1, "validation_loss": 1 - score,
                    "validation_f1_macro": score}]
        run.result.parent.mkdir(parents=True, exist_ok=True)
        run.result.write_text(json.dumps({
            "settings": vars(run.settings), "history": history, "f1_macro": 1 - run.settings.lr,
            "accuracy": 1.0, "nll": 0.1, "ece": 0.1, "best_epoch": 1, "trainable_params": 10,
            "trainable_by_kind": {"method": 8, "layer_norm": 0, "head": 2}, "total_params": 100,
            "trainable_pct": 10, "peak_vram_gb": None, "peak_rss_gb": 1.0, "epoch_time_s": 1.0,
            "train_time_s": 1.0, "rows": {"train": 200, "validation": 20, "test": 20},
            "splits": "", "environment": {"device": "CPU", "amp": "off"},
            "test_predictions": [[y, y] for y in labels],
            "test_probabilities": [[0.5, 0.5]] * 20}))
        file = checkpoint_path(run.output, run.settings)
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(b"x" * 1000)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(rates, "subprocess",
                        SimpleNamespace(run=run_program, DEVNULL=None, PIPE=None))
    monkeypatch.setattr(compare, "start", lambda: None)
    flags = ["--data", str(data), "--amp", "off", "--output", str(tmp_path / "out")]
    return flags, best, asked


def test_a_study_finds_each_method_s_rate_by_validation_and_uses_it(made_up, tmp_path, capsys,
                                                                    monkeypatch):
    flags, best, asked = made_up
    compare.main(flags)
    said = capsys.readouterr().out
    study = json.loads((tmp_path / "out" / "metrics" / "comparison.json").read_text())
    for name, entry in study["entries"].items():
        lr = best[entry["runs"][0]["settings"]["method"]]
        assert entry["runs"][0]["settings"]["lr"] == lr, name
        rates_tried = [t["lr"] for t in entry["tried"]]
        assert len(rates_tried) == len(set(rates_tried)) >= 3
        assert min(rates_tried) < lr < max(rates_tried) and not entry["marks"]
    # nothing is trained twice, and few steps become more by more epochs
    assert len(asked) == len(set(map(tuple, asked)))
    assert all(own[own.index("--epochs") + 1] == "29" for own in asked)
    for words in ("29 epochs, 203 steps", "tries 3 to 6", "[1 of 15, ", "15 to 30 trainings",
                  "LoRA r=8: 4e-3 validates best", " lost.**", "What next", "--method full"):
        assert words in said, words
    # after each method there is a line of all that have a result
    so_far = re.findall("^test macro-F1 so far: (.*)$", said, flags=re.M)
    assert [line.count("n = 1)") for line in so_far] == [1, 2, 3, 4, 5]
    assert "full fine-tuning 0.99" in so_far[0] and "adapter Houlsby 64" in so_far[4]
    # and after each run of a search one of what validated how well
    searched = re.findall("^LoRA r=8, validation so far: (.*)$", said, flags=re.M)
    assert [line.count(": ") for line in searched] == [1, 2, 3, 4] and "4e-3: " in searched[2]
    assert said.count(", validation so far: ") == len(asked)
    lines = said[said.index("What next"):].splitlines()[1:4]
    ask, export, page = (shlex.split(line, comments=True) for line in lines)
    assert ask[1:3] == ["-m", "tools.predict"] and page[2] == "tools.demo"
    assert all((tmp_path / "out").samefile(ROOT / words[words.index("--output") + 1])
               for words in (ask, export, page)) and export[2] == "tools.export"

    # the same command trains nothing; another seed takes the rates that were found
    monkeypatch.setattr("plots.draw_study", lambda *_: None)
    n = len(asked)
    compare.main(flags)
    assert len(asked) == n and "validation so far" not in capsys.readouterr().out
    compare.main([*flags, "--seeds", "42", "43"])
    assert len(asked) == n + 5 and all("43" in own for own in asked[n:])
    assert [float(own[own.index("--lr") + 1]) for own in asked[n:]] == [
        best[name] for name in ("full", "lora", "lora", "qlora", "adapter")]


@pytest.mark.parametrize("more, n", [(["--lr", "1e-3"], 5), (["--folds", "2"], None)])
def test_a_rate_that_is_given_skips_the_search_and_folds_search_on_the_first(more, n, made_up,
                                                                             capsys, monkeypatch):
    flags, _, asked = made_up
    monkeypatch.setattr(compare, "write_study", lambda *_: None)
    data = flags[1]
    (ROOT / data / "validation.tsv").unlink()
    (ROOT / data / "test.tsv").unlink()
    if "--folds" in more:
        monkeypatch.setitem(made_up[1], "bitfit", 5e-3)
        monkeypatch.setitem(made_up[1], "head", 1e-1)
    compare.main([*flags, *more])
    if n:
        assert len(asked) == n and not any("--epochs" in own for own in asked)
        return
    searched = [own for own in asked if "1/2" in own]
    last = [own for own in asked if "2/2" in own]
    assert len(last) == 8 and asked[-8:] == last and len(searched) >= 24


def test_list_prints_the_first_rates_of_a_search(made_up, capfd):
    flags, _, asked = made_up
    compare.main(["--list", *flags])
    lines = capfd.readouterr().out.splitlines()
    assert not asked and len(lines) == 15 and all(" --lr " in line for line in lines)


def test_a_method_for_which_no_rate_works_ends_the_study(made_up, monkeypatch):
    flags, _, _ = made_up
    failed = SimpleNamespace(run=lambda command, **_: subprocess.CompletedProcess(command, 1),
                             DEVNULL=None, PIPE=None)
    monkeypatch.setattr(rates, "subprocess", failed)
    one_line_exit(lambda: rates.search([*flags, "--method", "full"], 200), "no learning rate")
    # what was killed is no bad rate
    failed.run = lambda command, **_: subprocess.CompletedProcess(command, -9)
    one_line_exit(lambda: rates.search([*flags, "--method", "full"], 200), "signal 9")


def test_what_there_is_to_train_on_is_measured(data_dir, tmp_path):
    model = save_small_bert(tmp_path / "small")
    done = program("tools.probe", "--method", "full", "--data", data_dir, "--model", model, "--amp",
                   "off")
    size = json.loads(done.stdout.splitlines()[-1])
    assert size["examples"] == 80 and 0 < size["seconds"] < 60, done.stderr


# --- the grid of questions -----------------------------------------------------------------------

def test_a_grid_is_at_the_best_rate_and_the_better_of_its_neighbours(tmp_path):
    found = tried(**{"5e-4": .7, "1e-3": .8, "2e-3": .75})
    assert grid.two_rates(found) == ["1e-3", "2e-3"]
    assert grid.two_rates(tried(**{"5e-4": None, "1e-3": .8, "2e-3": None})) == ["1e-3", "5e-4"]
    runs = grid.twenty_runs(dict.fromkeys(grid.GRID_METHODS, ("1e-3", "2e-3")), (4, 5))
    assert len(runs) == 20 and "lora_epoch-4_lr_2e-3" in runs
