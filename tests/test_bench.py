"""bench.py end to end on a tiny model, growth.py on one that is a configuration alone, their
arithmetic on made-up times, and the flags that they refuse."""
import json

import numpy as np
import pytest
import torch
from conftest import ROOT, one_line_error, program, save_small_bert

import bench
import data
import growth
import timing
from methods import CASES
from settings import TRICKS


def test_ratios_are_of_medians_and_their_range_of_rounds():
    # medians 6 and 2; rounds 2, 3, 2
    assert timing.ratio([4.0, 6.0, 9.0], [2.0, 2.0, 4.5]) == (3.0, 2.0, 3.0)
    assert timing.show((3.0, 2.0, 3.004)) == "3.00 (2.00 to 3.00)" and timing.show(None) == ""


def test_tables_of_made_up_times():
    def case(label, *ms):
        return {"label": label, "step_ms": ms[1], "step_ms_rounds": ms,
                "sentences_per_s": 32_000 / ms[1],
                "matmul_share": 0.5, "vs_full": (2.0, 1.5, 2.5), "vs_peer": None}

    lines = bench.markdown({"matmul_gflops": 1234.5, "caption": "here.",
                            "cases": {"x": case("X", 10, 16, 20)}}).splitlines()
    assert ("1,234 GFLOP/s" in lines[0]
            and lines[2] == "| X | 16 | 2000 | 50 | 2.00 (1.50 to 2.50) |  |"
            and lines[-1] == "here.")
    cases = {name: case(label, 10, 10, 10) for name, (label, *_) in bench.trick_cases().items()}
    environment = {"amp": "off", "device": "CPU, 2 threads"}
    cases["full none"] = case("", 40, 40, 40)
    cases["full only cls_only"], cases["full without cls_only"] = (case("", 20, 20, 20),
                                                                   case("", 15, 15, 15))
    table = bench.tricks_markdown({"caption": "here.", "cases": cases, "environment": environment})
    row, = (line for line in table.splitlines() if line.startswith("| `cls_only`"))
    assert row.endswith(
        "| 1.00 (1.00 to 1.00) | 1.00 (1.00 to 1.00) | 2.00 (2.00 to 2.00) | 1.50 (1.50 to 1.50) |")
    assert all(f"`{trick}`" in table for trick in TRICKS)
    for trick in "half_weights", "cast_once":
        row, = (line for line in table.splitlines() if line.startswith(f"| `{trick}`"))
        assert row.count("no effect here") == 4


def test_trick_cases_leave_out_what_they_say():
    cases = bench.trick_cases()
    assert len(cases) == 2 * (2 + 2 * len(TRICKS))
    assert cases["full without cls_only"].flags == "--method full --without cls_only"
    assert set(cases["full only cls_only"].flags.split()[3:]) == TRICKS.keys() - {"cls_only"}
    # memory that one case keeps is there for all of its process
    for case in cases.values():
        without = "kept_memory" in case.flags
        assert case.process == ("default" if without else "ours")


@pytest.mark.parametrize("by_length", [True, False])
def test_sampled_batches_are_as_long_as_the_epoch_s(by_length):
    split = data.Encoded()
    # few are long, as in life
    split.lengths = 3 + np.random.default_rng(0).geometric(0.05, size=8000).clip(max=125)
    split.ids, split.usable = [None] * 8000, np.arange(8000)

    def tokens(batches):  # per row, padding included
        return sum(len(b) * split.lengths[b].max() for b in batches) / sum(map(len, batches))

    sampled = timing.sample(split, 32, by_length, seed=0)
    assert len(sampled) == timing.STEPS and {len(b) for b in sampled} == {32}
    assert tokens(sampled) == pytest.approx(
        tokens(split.batches(32, np.random.default_rng(1), by_length)), rel=0.03)


def test_bench_measures_every_method(data_dir, tmp_path):
    model = save_small_bert(tmp_path / "model")
    done = program("bench.py", "--model", model, "--data", data_dir, "--batch-size", 16,
                   "--output", tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "metrics" / "bench.json").read_text())
    cases = result["cases"]
    assert {*CASES, "plain", "unmerged", "merged"} <= cases.keys() == bench.method_cases().keys()
    assert bench.markdown(result) in done.stdout
    for case in cases.values():
        assert len(case["step_ms_rounds"]) == timing.ROUNDS and case["sentences_per_s"] > 0

    def flops(name):  # a step's, up to a factor that all cases share
        return cases[name]["matmul_share"] * cases[name]["step_ms"]

    assert result["matmul_gflops"] > 1
    # 4-bit products are counted, too
    assert flops("qlora") == pytest.approx(flops("lora_r16"), rel=0.05)
    assert (flops("lora_r8") < flops("lora_r16") < flops("dora")
            and flops("lora_r8") < 0.9 * flops("full"))
    assert cases["full"]["vs_full"][0] == 1
    for name in bench.PEERS:
        if f"{name} peer" in cases:
            # padding, and the last layer for all tokens
            assert flops(name) < flops(f"{name} peer") and cases[name]["vs_peer"][0] > 0


@pytest.mark.parametrize("flags, words", [
    (["--method", "full"], ["--method"]), (["--without", "cls_only"], ["--without"]),
    (["--lr", "1e-3"], ["--lr"]), (["--output", ROOT / "bench.py"], ["--output"]),
    (["--task", "synthetic"], ["sentence"]), (["--epochs", 0], ["--epochs"])])
def test_bad_flags(flags, words):
    one_line_error(program("bench.py", *flags), *words)


# --- random rows of one length --------------------------------------------------------------------

@pytest.fixture
def tiny(monkeypatch):
    """train.py's flags for a small model of which nothing but the configuration is known."""
    fields = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
              "intermediate_size": 64, "vocab_size": 99}
    monkeypatch.setitem(timing.MODELS, "tiny", fields)
    return ["--model", "tiny", "--max-length", "12"]


def test_random_rows_train_without_anything_to_download(tiny):
    place = timing.load(tiny, 6)
    args = timing.make_parser().parse_args([*tiny, "--method", "lora", "--batch-size", "2"])
    run_round, batches = timing.PREPARE["train"](args, place)
    assert [len(batch) for batch in batches] == [2, 2, 2] and run_round() > 0
    inputs = place.split.collate(batches[0])
    assert inputs["input_ids"].shape == (2, 12) and inputs["attention_mask"].all()
    product, rows = timing.PREPARE["product"](args, place)
    assert timing.flops_of(product) == len(rows) * 2 * 2048**3 or torch.cuda.is_available()
    longer = timing.load([*tiny, "--max-length", "24"], 6)
    twice, _ = timing.PREPARE["train"](args, longer)
    # less than twice: the last layer computes the first token alone
    assert timing.flops_of(twice) > 1.6 * timing.flops_of(run_round)


def test_what_to_expect_of_a_model_is_a_table_and_a_figure(tmp_path, monkeypatch):
    def measured(cases, argv, random_rows):
        length = int(argv[argv.index("--max-length") + 1])
        asked.append((length, random_rows))
        rows = {name: random_rows for name in cases}
        # full fine-tuning takes twice as long
        return ({name: [0.1 * length * (1 + (case.flags.split()[1] == "full"))] * 3
                 for name, case in cases.items()},
                {name: (1e9 * length, 1, n) for name, n in rows.items()}, 1e11)

    asked = []
    monkeypatch.setattr(growth, "measure", measured)
    growth.main(*growth.parse_args(["--output", str(tmp_path)]))
    result = json.loads((tmp_path / "metrics" / "growth_all-MiniLM-L6-v2.json").read_text())
    assert asked[:3] == [(32, 32), (128, 32), (512, 8)] and (512, 8) in asked[3:]
    assert {p["batch_size"] * p["length"] <= growth.MOST for p in result["grid"]} == {True}
    part = result["lengths"]["128"]
    assert part["batch_size"] == 32 and set(part["methods"]) == set(CASES)
    lora, full = part["methods"]["lora_r8"], part["methods"]["full"]
    assert lora["vs_full"] == [2, 2, 2] and lora["ms_per_sentence"] == pytest.approx(400)
    assert lora["bound_ms"] == pytest.approx(1000 * 128e9 / 32 / 1e11)
    assert lora["bytes"] < full["bytes"]
    table = (tmp_path / "figures" / "growth_all-MiniLM-L6-v2.md").read_text()
    row, = (line for line in table.splitlines() if line.startswith("| LoRA r=8 |"))
    assert [cell.strip() for cell in row.split("|")][5:7] == ["2.50", "2.00 (2.00 to 2.00)"]
    assert (tmp_path / "figures" / "growth_all-MiniLM-L6-v2.png").stat().st_size > 5000


@pytest.mark.parametrize("flags, words", [
    (["--model", "bert-base-uncased", "--max-length", 64], ["--max-length"]),
    (["--model", "bert-base-uncased", "--tricks"], ["--tricks"])])
def test_bad_flags_of_a_model_without_weights(flags, words):
    one_line_error(program("bench.py", *flags), *words)
    one_line_error(program("growth.py", "--model", "other"), "other", "large")
