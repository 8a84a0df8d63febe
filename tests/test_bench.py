"""tools.bench end to end on a tiny model, --growth on one that is a configuration alone, their
arithmetic on made-up times, and the flags that they refuse."""
import json
import math
import re

import numpy as np
import pytest
import torch
from conftest import ROOT, one_line_exit, program, save_small_bert, settings
from transformers import BertConfig

import data
from methods import CASES
from tools import bench, memory
from tools.bench import TRICKS


def test_ratios_are_medians_of_rounds_with_their_range():
    # rounds 2, 3, 2; the ratio of the medians would be 3
    assert bench.speedup([4.0, 6.0, 9.0], [2.0, 2.0, 4.5]) == (2.0, 2.0, 3.0)
    assert bench.show_speedup((3.0, 2.0, 3.004)) == "3.00 (2.00 to 3.00)"
    assert bench.show_speedup(None) == ""


def test_tables_of_made_up_times():
    def case(label, *ms):
        return {"label": label, "step_ms": ms[1], "step_ms_rounds": ms,
                "sentences_per_s": 32_000 / ms[1],
                "matmul_share": 0.5, "vs_full": (2.0, 1.5, 2.5), "vs_peer": None}

    lines = bench.bench_markdown({"matmul_gflops": 1234.5, "caption": "here.",
                                  "cases": {"x": case("X", 10, 16, 20)}}).splitlines()
    assert ("1,234 GFLOP/s" in lines[0]
            and lines[2] == "| X | 16 | 2000 | 50 | 2.00 (1.50 to 2.50) |"
            and lines[-1] == "here.")
    table = bench.bench_markdown({"matmul_gflops": 1, "caption": "here.", "cases": {
        "x": case("X", 10, 16, 20) | {"vs_peer": (3, 3, 3), "vs_grouped_peer": (2, 2, 2)}}})
    assert "| speed against the peer | speed against the grouped peer |\n" in table
    assert "| 3.00 (3.00 to 3.00) | 2.00 (2.00 to 2.00) |\n" in table
    cases = {name: case(label, 10, 10, 10) for name, (label, *_) in bench.trick_cases().items()}
    cases["full none"] = case("", 40, 40, 40)
    cases["full only cls_only"], cases["full without cls_only"] = (case("", 20, 20, 20),
                                                                   case("", 15, 15, 15))
    table = bench.tricks_markdown({"caption": "here.", "cases": cases})
    row, = (line for line in table.splitlines() if line.startswith("| `cls_only`"))
    assert row.endswith(
        "| 1.00 (1.00 to 1.00) | 1.00 (1.00 to 1.00) | 2.00 (2.00 to 2.00) | 1.50 (1.50 to 1.50) |")
    assert all(f"`{trick}`" in table for trick in TRICKS)


def test_trick_cases_leave_out_what_they_say():
    cases = bench.trick_cases()
    assert len(cases) == 2 * (2 + 2 * len(TRICKS))
    assert cases["full without cls_only"].flags == "--method full"
    assert cases["full without cls_only"].without == ("cls_only",)
    assert set(cases["full only cls_only"].without) == TRICKS.keys() - {"cls_only"}
    # memory that one case keeps is there for all of its process
    for case in cases.values():
        assert case.process == ("default" if "kept_memory" in case.without else "ours")


@pytest.mark.parametrize("by_length, as_peer", [(True, False), (False, False), (True, True)])
def test_sampled_batches_are_as_long_as_the_epoch_s(by_length, as_peer):
    """Trainer's grouped ones are nearly as short as ours."""
    split = data.Encoded()
    # few are long, as in life
    split.lengths = 3 + np.random.default_rng(0).geometric(0.05, size=8000).clip(max=125)
    split.ids, split.usable = [None] * 8000, np.arange(8000)

    def tokens(batches):  # per row, padding included
        return sum(len(b) * split.lengths[b].max() for b in batches) / sum(map(len, batches))

    s = settings("--method", "full", "--batch-size", 32, "--seed", 0)
    sampled = bench.sample(split, s, by_length, as_peer)
    assert len(sampled) == bench.STEPS and {len(b) for b in sampled} == {32}
    assert tokens(sampled) == pytest.approx(
        tokens(split.batches(32, np.random.default_rng(1), by_length)), rel=0.03)


def test_each_case_leaves_out_its_tricks(monkeypatch, tiny):
    run = bench.read_flags([*tiny, "--method", "lora", "--batch-size", "2"])
    rows, seen = bench.load_rows(run, 6), []

    def watch(name):
        function = getattr(bench, name)
        monkeypatch.setattr(bench, name, lambda *args, **kwargs: (
            seen.append((name, kwargs, args)), function(*args, **kwargs))[1])

    for name in "build", "make_optimizer", "sample":
        watch(name)
    for without in (), tuple(TRICKS):
        seen.clear()
        case = bench.Benchmark("", "train", "", without)
        bench.prepare(case, run.settings, *rows)
        (_, _, sampled), (_, built, _), (_, optimized, _) = seen
        assert sampled[2] is (not without) and built == {"without": without}
        assert optimized == {"fused": not without}


# --- end to end ----------------------------------------------------------------------------------

# `python -m tools.bench` with one round of two steps, whose processes need not import all anew
QUICK = f"""
import multiprocessing, sys
sys.path.insert(0, {str(ROOT)!r})
from tools import bench
bench.ROUNDS, bench.STEPS = 1, 2
forks = multiprocessing.get_context("fork")
multiprocessing.get_context = lambda method: forks
bench.main(bench.parse_args())
"""


def test_bench_measures_every_method(data_dir, tmp_path):
    (tmp_path / "quick.py").write_text(QUICK)
    done = program(tmp_path / "quick.py", "--model", save_small_bert(tmp_path / "model"),
                   "--data", data_dir, "--batch-size", 16, "--output", tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "metrics" / "bench.json").read_text())
    cases = result["cases"]
    assert {*CASES, "plain", "unmerged", "merged"} <= cases.keys() == bench.method_cases().keys()
    # whatever Trainer prints would be in between
    assert done.stdout == (f"{bench.bench_markdown(result)}\n"
                           f"wrote {tmp_path / 'metrics' / 'bench.json'}\n")
    for case in cases.values():
        assert len(case["step_ms_rounds"]) == 1 and case["sentences_per_s"] > 0

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
            assert cases[name]["vs_grouped_peer"][0] > 0


def test_times_go_into_a_study_of_folds(tmp_path):
    (tmp_path / "metrics").mkdir()
    study, measured = (json.loads((ROOT / "metrics" / f"{name}.json").read_text())
                       for name in ("crossvalidation", "bench"))
    bench.write_json(bench.study_path(tmp_path), study)
    bench.time_study(tmp_path, measured)
    timed = json.loads(bench.study_path(tmp_path).read_text())["entries"]
    steps = math.ceil(7056 / 32)
    for name, entry in study["entries"].items():
        ratio = sorted(measured["cases"][name]["vs_full"])[1]
        assert timed[name]["epoch_time_s"] == pytest.approx(
            steps * measured["cases"]["full"]["step_ms"] / 1000 / ratio)
        entry |= {key: timed[name][key] for key in ("epoch_time_s", "epoch_time_s_std")}
    assert timed == study["entries"]  # and nothing else
    row, = re.findall(r"\| head only \|.*", (tmp_path / "figures" / "answer.md").read_text())
    assert f"| {timed['head']['epoch_time_s']:.1f} ± " in row
    assert "time over 3 rounds of `python -m tools.bench`" in (
        tmp_path / "figures" / "answer.md").read_text()


def test_a_process_of_a_tool_run_as_a_module_gets_as_far_as_the_model(data_dir, tmp_path):
    """When it ends, it says why in one line, and the program says so in another one."""
    model = save_small_bert(tmp_path / "model")
    (model / "model.safetensors").write_bytes(b"broken")
    done = program("tools.bench", "--model", model, "--data", data_dir, "--output", tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    for words in ("holds no BERT that can be loaded",
                  "error: the process that measures one matrix product has ended\n"):
        assert done.stderr.count(words) == 1, done.stderr


@pytest.mark.parametrize("flags, words", [
    (["--method", "full"], ["--method"]), (["--without", "cls_only"], ["--without"]),
    (["--lr", "1e-3"], ["--lr"]), (["--output", ROOT / "train.py"], ["--output"]),
    (["--task", "synthetic"], ["sentence"]), (["--epochs", 0], ["--epochs"]),
    (["--growth", "--model", "bert-base-uncased", "--max-length", 64], ["--max-length"]),
    (["--growth", "--tricks"], ["--tricks"]), (["--redraw", "--study"], ["--study"]),
    (["--study", "--output", "nothing"], ["no nothing/metrics/crossvalidation.json", "--folds"])])
def test_bad_flags(flags, words):
    one_line_exit(lambda: bench.parse_args([str(flag) for flag in flags]), *words)


def test_growth_is_of_known_configurations():
    one_line_exit(lambda: bench.main(bench.parse_args(["--growth", "--model", "other"])),
                  "other", "large")


# --- random rows of one length --------------------------------------------------------------------

@pytest.fixture
def tiny(monkeypatch):
    """train.py's flags for a small model of which nothing but the configuration is known."""
    fields = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
              "intermediate_size": 64, "vocab_size": 99}
    monkeypatch.setitem(memory.MODELS, "tiny", fields)
    return ["--model", "tiny", "--max-length", "12"]


def test_random_rows_train_without_anything_to_download(tiny, monkeypatch):
    monkeypatch.setattr(bench, "STEPS", 3)
    flags = [*tiny, "--method", "lora", "--batch-size", "2"]
    train, s = bench.Benchmark("", "train", ""), bench.read_flags(flags).settings
    split, fresh = bench.load_rows(bench.read_flags(flags), 6)
    run_round, batches = bench.prepare(train, s, split, fresh)
    assert [len(batch) for batch in batches] == [2, 2, 2] and run_round() > 0
    inputs = split.collate(batches[0])
    assert inputs["input_ids"].shape == (2, 12) and inputs["attention_mask"].all()
    product, rows = bench.prepare(bench.PRODUCT, s, split, fresh)
    assert bench.flops_of(product) == len(rows) * 2 * 2048**3 or torch.cuda.is_available()
    longer = bench.read_flags([*flags, "--max-length", "24"])
    twice, _ = bench.prepare(train, longer.settings, *bench.load_rows(longer, 6))
    # less than twice: the last layer computes the first token alone
    assert bench.flops_of(twice) > 1.6 * bench.flops_of(run_round)


def test_the_bytes_of_a_method_are_the_ledger_s(tiny, monkeypatch):
    monkeypatch.setattr(bench, "CASES", {name: CASES[name] for name in ("full", "lora_r8")})
    points = {(name, n): {"ms_per_sentence_rounds": [4.0 * n]} for name in bench.CASES
              for n in (1, 2)}
    part = bench.compare_methods(points, 12, settings(*tiny, "--method", "full", "--amp", "off"))
    assert part["batch_size"] == 2
    config = BertConfig(**memory.MODELS["tiny"], num_labels=2)
    for name, case in bench.CASES.items():
        ledger = memory.predict_bytes(config, case.flags, 2, 12, None)
        assert part["methods"][name]["bytes"] == ledger["peak"]
    assert part["methods"]["lora_r8"]["bytes"] < part["methods"]["full"]["bytes"]


def test_what_to_expect_of_a_model_is_a_table_and_a_figure(tmp_path, monkeypatch):
    def measured(cases, flags, n_random):
        length = int(flags[flags.index("--max-length") + 1])
        asked.append((length, n_random))
        # full fine-tuning takes twice as long
        return {name: ([0.1 * length * (1 + (case.flags.split()[1] == "full"))] * 3,
                       1e9 * length, 1, n_random) for name, case in cases.items()}, 1e11

    asked = []
    monkeypatch.setattr(bench, "time_in_turns", measured)
    monkeypatch.setattr(memory, "predict_bytes", lambda config, flags, n, length, dtype: {
        "peak": n + length + config.hidden_size + ("full" in flags)})
    bench.main(bench.parse_args(["--growth", "--output", str(tmp_path)]))
    result = json.loads((tmp_path / "metrics" / "growth_all-MiniLM-L6-v2.json").read_text())
    assert asked == [(16, 32), (32, 32), (64, 32), (128, 32), (256, 8), (512, 8)]
    assert all(p["batch_size"] * p["length"] <= bench.MOST_TOKENS for p in result["grid"])
    assert len(result["grid"]) == 2 * (4 * 3 + 2 * 2)  # each once
    assert list(result["lengths"]) == ["32", "128", "512"]
    part = result["lengths"]["128"]
    assert part["batch_size"] == 32 and set(part["methods"]) == set(CASES)
    lora, full = part["methods"]["lora_r8"], part["methods"]["full"]
    assert lora["vs_full"] == [2, 2, 2] and lora["ms_per_sentence"] == pytest.approx(400)
    assert lora["bound_ms"] == pytest.approx(1000 * 128e9 / 32 / 1e11)
    assert lora["bytes"] == 32 + 128 + 384 == full["bytes"] - 1
    table = (tmp_path / "figures" / "growth_all-MiniLM-L6-v2.md").read_text()
    row, = (line for line in table.splitlines() if line.startswith("| LoRA r=8 |"))
    assert [cell.strip() for cell in row.split("|")][5:7] == ["2.50", "2.00 (2.00 to 2.00)"]
    figure = tmp_path / "figures" / "growth_all-MiniLM-L6-v2.png"
    assert figure.stat().st_size > 5000

    drawn = {path: path.read_bytes() for path in (figure, figure.with_suffix(".md"))}
    for path in drawn:
        path.unlink()
    bench.main(bench.parse_args(["--redraw", "--output", str(tmp_path)]))
    assert {path: path.read_bytes() for path in drawn} == drawn


def test_redrawing_without_numbers_is_one_line(tmp_path):
    one_line_exit(lambda: bench.main(bench.parse_args(["--redraw", "--output", str(tmp_path)])),
                  "growth_*.json")
