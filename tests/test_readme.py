"""The committed results are those of the two default studies, and the README and docs/ show them
and nothing else."""
import csv
import dataclasses
import functools
import io
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from conftest import ROOT, one_line_exit, settings
from sklearn.metrics import f1_score
from test_house import PAPERS

import compare
import plots
from settings import case_label, case_settings, read_settings, short
from tools import bench, grid, memory, multitask, recompute, sweep
from verdict import points

# the committed tables of figures/: where they are shown, and where they are linked
SHOWN = {"answer": "README.md", "sweep_squad_en": "docs/questions.md",
         "sweep_sst2": "docs/how-much-data.md"}
LINKED = {"crossvalidation": "docs/measuring.md", "calibration": "docs/measuring.md",
          "summary": "docs/measuring.md", "grid": "docs/questions.md",
          "sweep_synthetic": "docs/questions.md", "multitask": "docs/use.md",
          "growth_all-MiniLM-L6-v2": "docs/speed.md",
          "growth_bert-base-uncased": "docs/speed.md"}


def committed_bytes(path):
    """The file as committed: a user's own run_all.sh may have put other results in its place."""
    command = ["git", "show", f"HEAD:{path}"]
    if not shutil.which("git") or \
            not (done := subprocess.run(command, cwd=ROOT, capture_output=True)).stdout:
        pytest.skip("not a git checkout")
    return done.stdout


def committed(path):
    return committed_bytes(path).decode("utf-8").replace("\r\n", "\n")


def read(name):
    return json.loads(committed(f"metrics/{name}.json"))


def same_runs(result, *flags):
    """Whether a committed result is of train.py with these flags, in the precision that it had."""
    return read_settings(result) == dataclasses.replace(settings(*flags),
                                                        amp=result["settings"]["amp"])


def of_one_clean_commit(results):
    commits = {r["environment"]["git_commit"] for r in results}
    return len(commits) == 1 and not commits.pop().endswith("-dirty")


def test_committed_comparison_is_the_five_default_runs_of_three_seeds():
    entries = read("comparison")["entries"]
    assert list(entries) == list(compare.RUNS)
    for name, flags in compare.RUNS.items():
        for run, seed in zip(entries[name]["runs"], (42, 43, 44), strict=True):
            # the rates of two methods are those of an earlier search (docs/measuring.md)
            lr = {"full": 2e-4, "lora_r8": 1e-3}.get(name, settings(*flags.split()).lr)
            assert same_runs(run, *flags.split(), "--seed", seed, "--lr", lr)
    assert of_one_clean_commit(r for entry in entries.values() for r in entry["runs"])


def test_committed_cross_validation_is_eight_methods_in_five_folds_twice():
    entries = read("crossvalidation")["entries"]
    assert list(entries) == list(compare.FOLD_RUNS)
    for name, flags in compare.FOLD_RUNS.items():
        assert entries[name]["n"] == len(entries[name]["runs"]) == 10
        for i, run in enumerate(entries[name]["runs"]):
            assert same_runs(run, *flags.split(), "--fold", f"{i % 5 + 1}/5", "--seed", 42 + i)
    for part in slice(5), slice(5, 10):  # the repetitions
        assert of_one_clean_commit(r for entry in entries.values() for r in entry["runs"][part])
    for name in entries.keys() - {"full", "head"}:  # the head's trainings differ more
        vs = entries[name]["vs_full"]
        assert (vs["high"] - vs["low"]) / 2 <= 1.5, name
    # the README's first sentences, and what it says of other rates of full fine-tuning
    lost, every_layer = (entries[name]["vs_full"] for name in ("lora_r8", "lora_r16_all"))
    assert -1.3 < lost["points"] < -1 and lost["high"] < 0
    assert every_layer["low"] < 0 < every_layer["high"]
    # measuring.md: which t intervals exclude 0, and how far the repetitions are apart
    excluded = {name for name, e in entries.items() if (e["vs_full_t"] or {"high": 1})["high"] < 0}
    assert excluded == {"lora_r8", "qlora", "adapter", "bitfit", "head"}
    assert round(entries["adapter"]["vs_full_t"]["high"], 2) == 0
    one, other = (np.mean([r["f1_macro"] for r in entries["full"]["runs"][part]])
                  for part in (slice(5), slice(5, 10)))
    assert round(100 * (other - one), 1) == 0.8
    for rate in [r["vs_full"] for lr, r in read("full_rates")["rates"].items() if lr != "5e-5"]:
        assert all(vs["points"] < 0 for vs in rate.values())
        assert rate["lora_r8"]["high"] < 0 and rate["lora_r16"]["high"] < 0


def test_committed_predictions_of_the_folds_are_those_of_the_cross_validation():
    entries = read("crossvalidation")["entries"]
    rows = list(csv.DictReader(committed("metrics/crossvalidation_predictions.csv").splitlines()))
    assert len(rows) == 10_070
    labels = [row["label"] for row in rows]
    for name, entry in entries.items():
        predicted = [[row[f"{name}_repeat{again}"] for row in rows] for again in (1, 2)]
        scores = [f1_score(labels, own, average="macro") for own in predicted]
        assert np.mean(scores) == pytest.approx(entry["f1_macro"])
        for i, r in enumerate(entry["runs"]):
            own = [(row["label"], label) for row, label in zip(rows, predicted[i // 5])
                   if row["fold"] == str(i % 5 + 1)]
            assert f1_score(*zip(*own), average="macro") == pytest.approx(r["f1_macro"])


def test_committed_grid_is_the_twenty_default_runs():
    results = read("grid")["runs"]
    assert list(results) == list(grid.SYNTHETIC_RUNS)
    for name, flags in grid.SYNTHETIC_RUNS.items():
        assert same_runs(results[name], "--task", "synthetic", *flags.split())
    assert of_one_clean_commit(results.values())
    rows = list(csv.DictReader(committed("metrics/grid_results.csv").splitlines()))
    assert ([row["run"] for row in rows] == [row["run"] for row in grid.rows_of(results)]
            and len(rows) == 20)
    assert ({row["run"]: float(row["f1"]) for row in rows}
            == {name: r["f1"] for name, r in results.items()})


@pytest.fixture(scope="module")
def redrawn(tmp_path_factory):
    """A folder with the committed metrics, and all that is drawn from them."""
    folder = tmp_path_factory.mktemp("redrawn")
    (folder / "metrics").mkdir()
    for path in ROOT.glob("metrics/*.*"):
        (folder / "metrics" / path.name).write_bytes(committed_bytes(f"metrics/{path.name}"))
    for study in "comparison", "crossvalidation":
        plots.draw_study(folder, study)
    for tool in grid, sweep, memory, multitask, bench:
        tool.redraw(folder)
    plots.draw_layers(folder / "figures" / "layers.png")
    return folder / "figures"


def test_every_committed_table_is_redrawn(redrawn):
    tables = {path.stem for path in ROOT.glob("figures/*.md")}
    assert tables == {*SHOWN, *LINKED} == {path.stem for path in redrawn.glob("*.md")}
    for name, paper in (SHOWN | LINKED).items():
        table = (redrawn / f"{name}.md").read_text(encoding="utf-8")
        assert committed(f"figures/{name}.md") == table, name
        shown = table if name in SHOWN else f"](../figures/{name}.md)"
        assert shown in committed(paper), name


@pytest.mark.parametrize("path", sorted(ROOT.glob("metrics/*.json")), ids=lambda p: p.stem)
def test_every_file_of_results_says_of_which_commit_it_is(path):
    def commits(value):
        if isinstance(value, dict):
            own = [value["git_commit"]] if "git_commit" in value else []
            value = [*own, *value.values()]
        elif not isinstance(value, list):
            return [value] if re.fullmatch("[0-9a-f]{40}(-dirty)?", str(value)) else []
        return [commit for part in value for commit in commits(part)]

    found = commits(json.loads(path.read_text()))
    assert found and all(found)


def test_every_committed_figure_is_redrawn(redrawn):
    figures = {path.name for path in ROOT.glob("figures/*.png")}
    assert figures == {path.name for path in redrawn.glob("*.png")}
    for name in figures:
        own, here = (plots.plt.imread(io.BytesIO(content))
                     for content in (committed_bytes(f"figures/{name}"),
                                     (redrawn / name).read_bytes()))
        assert own.shape == here.shape, name
        # other versions of a font library draw edges a little differently
        assert np.abs(own - here).mean() < 1e-3, name


def test_committed_predictions_are_those_of_the_comparison():
    comparison = read("comparison")["entries"]
    rows = list(csv.DictReader(committed("metrics/predictions.csv").splitlines()))
    labels = [row["label"] for row in rows]
    for name, entry in comparison.items():
        for r in entry["runs"]:
            predicted = [row[f"{name}_seed{r['settings']['seed']}"] for row in rows]
            assert f1_score(labels, predicted, average="macro") == pytest.approx(r["f1_macro"])


@pytest.mark.parametrize("path", sorted(ROOT.glob("metrics/sweep_*.json")), ids=lambda p: p.stem)
def test_committed_answers_of_a_sweep_give_its_scores(path):
    first = next(iter(json.loads(path.read_text())["entries"].values()))["runs"][0]
    entries, answers = sweep.held(path, read_settings(first))
    for name, entry in entries.items():
        own = sweep.columns_of(name, sweep.seeds_of(entry))
        scores = [np.mean(answers[column]) if "label" not in answers else
                  f1_score(answers["label"], answers[column], average="macro") for column in own]
        assert np.mean(scores) == pytest.approx(entry["test"], abs=1e-4)


def test_published_intervals_come_out_again_and_a_changed_answer_is_seen(tmp_path, monkeypatch,
                                                                         capsys):
    monkeypatch.setattr(recompute, "start", lambda: None)
    recompute.main([])
    assert "113 results came out as published" in capsys.readouterr().out
    (tmp_path / "metrics").mkdir()
    shutil.copy(ROOT / "metrics" / "comparison.json", tmp_path / "metrics")
    text = (ROOT / "metrics" / "predictions.csv").read_text().splitlines()
    flipped = [text[0], *(line[:-1] + str(1 - int(line[-1])) for line in text[1:20]), *text[20:]]
    for lines, words in ((text, None), (flipped, ["does not follow", "adapter"]),
                         (text[:1], ["answers behind"])):
        (tmp_path / "metrics" / "predictions.csv").write_text("\n".join(lines) + "\n")
        act = functools.partial(recompute.main, ["--output", str(tmp_path)])
        one_line_exit(act, *words) if words else act()
    one_line_exit(lambda: recompute.main(["--output", str(tmp_path / "none")]), "holds no study")
    # a study of folds that was trained again with other methods
    (tmp_path / "metrics" / "comparison.json").unlink()
    for name in "full_rates.json", "full_rates_predictions.csv":
        shutil.copy(ROOT / "metrics" / name, tmp_path / "metrics")
    (tmp_path / "metrics" / "crossvalidation_predictions.csv").write_text("label,fold\n1,1\n")
    one_line_exit(act, "answers behind", "full_rates.json", "lora_r8_repeat1")


def test_tables_that_are_only_in_docs_are_those_of_the_results():
    ledger = read("memory")
    assert (ledger["model"], ledger["batch_size"], ledger["max_length"]) == (
        "bert-base-uncased", 32, 128)
    assert memory.ledger_markdown(ledger) in committed("docs/memory.md")
    assert bench.bench_markdown(read("bench")) in committed("docs/speed.md")
    assert bench.tricks_markdown(read("bench_tricks")) in committed("docs/speed.md")


def test_the_tables_of_learning_rates_are_those_of_the_results():
    paper, entries = committed("docs/measuring.md"), read("crossvalidation")["entries"]
    rates = read("full_rates")["rates"]
    for name, entry in entries.items():
        own = entry["runs"][0]["settings"]["lr"]
        searched = read("lr_search")["runs"][name]
        assert searched["chosen"] == own == case_settings(name).lr
        means = {short(mean["lr"]): f"{mean['validation_f1_macro']:.4f}"
                 for mean in searched["means"]}
        row, = (line for line in paper.splitlines()
                if line.startswith(f"| {case_label(name)} |") and ": " in line)
        tried = dict(re.findall(r"([\d.]+e-\d): (0\.\d+)", row))
        assert tried.items() <= means.items() and {short(own * x) for x in (0.5, 1, 2)} <= {*tried}
        if name != "full":
            cells = [points(rate["vs_full"][name]) for rate in rates.values()]
            assert f"| {case_label(name)} | {' | '.join(cells)} |" in paper
    first = [run["f1_macro"] for run in entries["full"]["runs"][:5]]
    assert [fold["f1_macro"] for fold in rates["5e-5"]["by_fold"]] == pytest.approx(first)


# --- numbers in sentences ------------------------------------------------------------------------

# Not measured, but counted or chosen: the tests of the counts, the settings or the equations pin
# them, or they are another project's, with its name beside them.
ELSEWHERE = {
    "README.md": {"2014", "3.11"},  # a year; a version
    "docs/choices.md": {"0.10001", "2019", "2021", "2022", "2023", "2024", "2025", "102,912"},
    "docs/full-size.md": {"2019", "1810.04805", "7,600", "87,000", "119,000"},
    "docs/measuring.md": {"10,000", "2003", "2017", "109,483,778", "294,912", "1,538", "589,824",
                          "313,344", "2,379,264", "38,400", "9807086"},  # the last: a commit
    "docs/memory.md": {"3,367", "1,929"},  # measured once, of which no file was kept
    # what did not pay: one interleaved run, of which no file was kept
    "docs/speed.md": {"0.99", "1.05", "1.02", "0.95", "2,048"},
    "docs/use.md": {"8888", "29400", "7860", "2,048"},
}
NUMBER = r"(?<![\w.,-])(?:\d{1,3}(?:,\d{3})+|\d+\.\d{2,}|\d{4,})(?![\w]|[.,]\d)"
SCALES = (1, 100, 1e-3, 1e-6, 1e-9, 1e3, 1 / 60)  # percent, kB, MB, GB, milliseconds, minutes


def leaves(value):
    """All numbers in a JSON value."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [leaf for part in value for leaf in leaves(part)]
    return [value] if isinstance(value, (int, float)) and not isinstance(value, bool) else []


def generated():
    """The tables that are made by code, and compared as a whole above."""
    return [*(committed(f"figures/{name}.md") for name in SHOWN | LINKED),
            bench.bench_markdown(read("bench")), bench.tricks_markdown(read("bench_tricks")),
            memory.ledger_markdown(read("memory"))]


def measured_values():
    files = [committed(f"metrics/{path.name}") for path in sorted(ROOT.glob("metrics/*.json"))]
    return np.unique([leaf for file in files for leaf in leaves(json.loads(file))])


def unknown_numbers(paper, text, values):
    """The numbers of a text, three digits or more, that no value is, rounded as they are."""
    text = re.sub(r"```.*?```|`[^`]*`", "", text, flags=re.S)
    # the table of the study on Portuguese SQuAD, which is quoted
    text = re.sub(r"The study that\s+the grid repeats.*?Its QLoRA runs", "", text, flags=re.S)
    unknown = []
    for number in set(re.findall(NUMBER, text)) - ELSEWHERE.get(paper, set()):
        x, digits = float(number.replace(",", "")), len(number.partition(".")[2])
        tolerance = 10.0 ** -digits / 1e3
        if not any((abs(np.round(values * scale, digits) - x) < tolerance).any()
                   for scale in SCALES):
            unknown.append(number)
    return unknown


@pytest.mark.parametrize("paper", PAPERS)
def test_every_number_stands_in_a_file_of_metrics(paper):
    text, values = committed(paper), measured_values()
    for table in generated():
        text = text.replace(table.strip(), "")
    assert not unknown_numbers(paper, text, values)
    assert unknown_numbers(paper, "F1 is 0.98765 of 12,345,678.", values)  # it can fail


# --- words ---------------------------------------------------------------------------------------

def words(text):
    return sum(bool(re.search("[A-Za-z0-9]", word)) for word in text.split())


def test_readme_and_docs_are_short():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(readme.splitlines()) <= 130 and len(readme.split()) <= 1500  # as wc counts
    assert len(re.findall(r"\d+(?:[.,]\d+)*", readme)) <= 150  # those in r=16 and SST-2, too
    docs = {path.name: words(path.read_text(encoding="utf-8")) for path in ROOT.glob("docs/*.md")}
    assert sum(docs.values()) <= 9000, docs
