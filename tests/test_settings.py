"""A run's settings and its name: what decides its result is in both, and nothing else is in the
name."""
import dataclasses
import json
import time

import pytest
import torch
from conftest import METHODS, settings, write_splits

from methods import METHODS as ROWS
from methods import row_of
from settings import (
    QA_TASKS,
    Settings,
    asked_settings,
    bf16_speedup,
    chosen_amp,
    fold_name,
    is_synthetic,
    make_parser,
    read_flags,
    read_settings,
    run_name,
)

HAS_BF16 = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
# of every setting a value that LoRA on `movies` does not have
OTHER = {
    "method": "dora", "r": 4, "alpha": 16.0, "dropout": 0.2, "targets": "all",
    "placement": "pfeiffer", "bottleneck": 32, "reduction": 16, "lr": 1e-5, "epochs": 2,
    "batch_size": 16, "accumulation": 2, "max_length": 64, "stride": 64, "max_answer_length": 20,
    "warmup": 0.2, "seed": 7, "amp": "fp16", "max_steps": 5, "task": "products",
    "text_column": "body", "label_column": "stars", "train_rows": 100, "whole_sentences": True,
    "fold": "2/5", "model": "some/bert", "is_qa": True, "data_sha256": "0" * 16,
    "model_sha256": "0" * 16}
NAMES = [f.name for f in dataclasses.fields(Settings)]


def rows(i, split):
    return f"a {split} film {i}\t{i % 2}"


# --- names ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_made_of_every_setting_but_accumulation(name):
    s = settings("--method", "lora")
    other = dataclasses.replace(s, **{name: OTHER[name]})
    assert other != s and (run_name(other) == run_name(s)) is (name == "accumulation")


@pytest.mark.parametrize("flags", [
    ["--alpha", 16], ["--dropout", 0.2], ["--targets", "attention"], ["--r", 4], ["--lr", "1e-5"],
    ["--epochs", 2], ["--batch-size", 16], ["--max-length", 64], ["--warmup", 0], ["--seed", 7],
    ["--max-steps", 5], ["--task", "products"], ["--train-rows", 100], ["--fold", "2/5"],
    ["--model", "some/bert"], ["--whole-sentences", "--task", "sst2"]],
    ids=lambda flags: " ".join(map(str, flags)))
def test_a_flag_that_changes_the_result_changes_the_name(flags):
    usual = ["--method", "lora"]
    usual += ["--task", "sst2"] if "sst2" in flags else []
    assert run_name(settings(*usual, *flags)) != run_name(settings(*usual))


@pytest.mark.parametrize("flags", [
    ["--accumulation", 2], ["--r", 8], ["--targets", "query", "value"], ["--task", "movies"],
    ["--model", "all-MiniLM-L6-v2"], ["--lr", "0.002"], ["--lr", "2e-3"], ["--max-length", 128],
    ["--bottleneck", 32], ["--reduction", 4], ["--placement", "pfeiffer"], ["--output", "x"]],
    ids=lambda flags: " ".join(map(str, flags)))
def test_a_flag_that_changes_nothing_keeps_the_name(flags):
    """What is the default anyway, what the method does not use, and how the batch is computed."""
    assert run_name(settings("--method", "lora", *flags)) == run_name(settings("--method", "lora"))


@pytest.mark.parametrize("speedup, chosen", [
    (None, "off"), (0.53, "off"), (1.19, "off"), (1.2, "bf16"), (5.0, "bf16")])
def test_the_precision_that_auto_chose_gives_the_name_of_the_same_flag(speedup, chosen,
                                                                       monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("settings.bf16_speedup", lambda: speedup)
    auto, given = settings("--method", "full"), settings("--method", "full", "--amp", chosen)
    assert auto == given and auto.amp == chosen == chosen_amp("auto")
    assert run_name(auto) == run_name(given)
    off = settings("--method", "full", "--amp", "off")
    assert (run_name(off) == run_name(auto)) is (chosen == "off")
    said = read_flags(["--method", "full"]).said
    measured = f" (bf16 at {speedup:.2f} times fp32's speed)" if speedup else ""
    assert said.startswith(f"amp {chosen}{measured}, lr ")
    # before torch is imported it is not known, and nothing is named by it
    assert asked_settings(make_parser().parse_args(["--method", "full"])).amp == "auto"


@pytest.fixture
def cpu_with_bf16(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)


def test_the_speed_of_bf16_is_the_shortest_of_three_times_after_a_slow_one(cpu_with_bf16,
                                                                           monkeypatch):
    seconds = iter([9, 1, 2, 5, 3, 4, 8, 6])  # fp32, bf16, fp32, ...
    monkeypatch.setattr("settings.timeit", lambda act, number: next(seconds))
    assert bf16_speedup.__wrapped__() == 2 / 4
    for on_cuda, has_bf16 in (True, True), (False, False):  # nothing is timed
        monkeypatch.setattr(torch.cuda, "is_available", lambda: on_cuda)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_bf16)
        assert bf16_speedup.__wrapped__() is None


def test_the_speed_of_bf16_is_soon_known(cpu_with_bf16, monkeypatch):
    if not HAS_BF16:  # emulated, such factors take half a second
        monkeypatch.setattr("settings.FACTORS", ((64, 64), (64, 256)))
    times = []
    for _ in range(5):  # other tests run beside this one
        begin = time.perf_counter()
        assert 0 < bf16_speedup.__wrapped__() < 100
        times.append(time.perf_counter() - begin)
    assert min(times) < 0.1


def test_where_the_folders_are_is_not_in_the_name(tmp_path, monkeypatch):
    names = set()
    for place in "here", "there":
        (tmp_path / place).mkdir()
        folder = write_splits(tmp_path / place / "mine", {"train": 60}, rows)
        model = tmp_path / place / "bert"
        model.mkdir()
        (model / "config.json").write_text("{}")
        (model / "model.safetensors").write_bytes(b"weights")
        names.add(run_name(settings("--method", "lora", "--data", folder, "--model", model)))
    monkeypatch.chdir(folder)
    names.add(run_name(settings("--method", "lora", "--data", ".", "--model", "../bert/")))
    assert len(names) == 1
    (tmp_path / "other").mkdir()
    model.rename(tmp_path / "other" / "bart")
    model = tmp_path / "other" / "bart"
    s = settings("--method", "lora", "--data", folder, "--model", model)
    assert run_name(s) not in names and s.model == "bart"
    (model / "model.safetensors").write_bytes(b"others")
    changed = settings("--method", "lora", "--data", folder, "--model", model)
    assert changed == dataclasses.replace(s, model_sha256=changed.model_sha256) != s
    assert run_name(changed) != run_name(s)


def test_changed_data_is_another_run(tmp_path):
    d = write_splits(tmp_path / "d", {"train": 60}, rows)
    before = settings("--method", "full", "--data", d)
    with open(d / "train.tsv", "a") as file:
        file.write("one more\t1\n")
    after = settings("--method", "full", "--data", d)
    assert after != before and run_name(after) != run_name(before)


def test_names_can_be_read():
    name = lambda *flags: run_name(settings(*flags)).rsplit("_", 1)[0]
    assert name("--method", "full") == "movies_full_seed42"
    assert name("--method", "lora", "--r", 16, "--seed", 7) == "movies_lora_r16_seed7"
    assert name("--method", "lora", "--targets", "all") == "movies_lora_r8_all_seed42"
    assert name("--method", "adapter") == "movies_adapter_houlsby_64_seed42"
    assert (name("--method", "adapter", "--placement", "pfeiffer", "--reduction", 16)
            == "movies_adapter_pfeiffer_rf16_seed42")
    assert (name("--method", "head", "--fold", "02/5", "--train-rows", 100)
            == "movies_head_fold2of5_n100_seed42")
    assert (name("--method", "full", "--task", "squad", "--lr", "4.25e-05", "--epochs", 2)
            == "full_epoch-2_lr_4.25e-5_squad_seed42")
    assert fold_name("02/05") == "2/5"


def test_the_files_of_a_run_have_its_name(tmp_path):
    run = read_flags(["--method", "lora", "--output", str(tmp_path)])
    name = run_name(run.settings)
    assert run.result == tmp_path / "metrics" / "runs" / f"{name}.json"
    assert run.checkpoint == tmp_path / "checkpoints" / f"{name}.safetensors"


# --- settings -------------------------------------------------------------------------------------

SAMPLES = [*METHODS.values(), ["--method", "adapter", "--reduction", "16"],
           ["--method", "lora", "--fold", "2/5", "--max-steps", "5"],
           *(["--method", "qdora", "--task", task] for task in (*QA_TASKS, "sst2"))]


@pytest.mark.parametrize("flags", SAMPLES, ids=lambda flags: " ".join(map(str, flags)))
def test_every_setting_is_there_and_is_none_if_it_is_not_used(flags):
    s = settings(*flags)
    assert list(vars(s)) == NAMES
    own = row_of(s).flags
    for name in {name for row in ROWS.values() for name in row.flags}:
        is_other_width = name == ("bottleneck" if s.reduction else "reduction")
        assert (getattr(s, name) is None) is (name not in own or is_other_width), name
    for name in "stride", "max_answer_length":
        assert (getattr(s, name) is None) is not s.is_qa
    assert (s.data_sha256 is not None) is is_synthetic(s) is (s.task == "synthetic")
    for name in ("method", "lr", "epochs", "batch_size", "accumulation", "max_length", "warmup",
                 "seed", "amp", "task", "model"):
        assert getattr(s, name) is not None, name
    assert s.amp in ("bf16", "fp16", "off")


@pytest.mark.parametrize("flags", SAMPLES, ids=lambda flags: " ".join(map(str, flags)))
def test_settings_come_back_from_json(flags):
    s = settings(*flags)
    found = json.loads(json.dumps(vars(s)))
    assert Settings(**found) == s == read_settings({"settings": found})
    assert vars(Settings(**found)) == vars(s) and run_name(Settings(**found)) == run_name(s)


def test_every_setting_with_a_flag_has_it_under_its_name():
    """And none of the rest."""
    flags = vars(make_parser().parse_args(["--method", "full"])).keys() - {"data", "output"}
    assert flags == set(NAMES) - {"is_qa", "data_sha256", "model_sha256"}


# --- default learning rates -----------------------------------------------------------------------

def test_the_rates_of_the_small_model_are_the_searched_ones_whatever_the_task(tmp_path):
    d = write_splits(tmp_path / "d", {"train": 60}, rows)
    small = [["--task", "sst2"], ["--data", d], ["--task", "tweets"], ["--task", "squad"]]
    large = [["--model", "bert-base-uncased"], ["--model", "bert-base-uncased", "--data", d]]
    for method, tuned, usual in (("full", 5e-5, 2e-5), ("lora", 2e-3, 1e-4), ("qlora", 1e-3, 1e-4),
                                 ("adapter", 1e-3, 1e-4)):
        assert settings("--method", method).lr == tuned
        assert [settings("--method", method, *flags).lr for flags in small] == [tuned] * 4
        assert [settings("--method", method, *flags).lr for flags in large] == [usual] * 2
        assert settings("--method", method, "--lr", "3e-3").lr == 3e-3
    for r, tuned in (8, 2e-3), (16, 1e-3), (4, 1e-3):
        assert settings("--method", "lora", "--r", r).lr == tuned
    for targets, tuned in (["query", "value"], 2e-3), (["query value"], 2e-3), (["all"], 5e-4):
        wide = ["--targets", *targets]
        assert settings("--method", "lora", *wide).lr == tuned
        assert settings("--method", "lora", *wide, *large[0]).lr == 1e-4
        # a flag of other methods changes nothing of these
        assert settings("--method", "head", *wide) == settings("--method", "head")
    assert settings("--method", "lora", *wide).targets == "all"
    assert settings("--method", "lora", "--targets", "query", "value") == settings(
        "--method", "lora")
