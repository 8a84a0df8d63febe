"""The committed results are those of the two default studies, and the README shows them and nothing else."""
import csv
import json
import re
import shutil

import pytest
from conftest import ROOT, run, settings
from sklearn.metrics import f1_score

import bench
import compare
import grid
import memory
import merge
import plots


def committed(path):
    """The file as committed: a user's own run_all.sh may have put other results in its place."""
    if not shutil.which("git") or not (done := run("git", "show", f"HEAD:{path}", cwd=ROOT)).stdout:
        pytest.skip("not a git checkout")
    return done.stdout


def test_committed_comparison_is_the_five_default_runs_of_three_seeds():
    comparison = json.loads(committed("metrics/comparison.json"))
    assert {name: [r["settings"] for r in entry["runs"]] for name, entry in comparison.items()} == \
        {name: [settings(*flags.split(), "--seed", seed) for seed in (42, 43, 44)] for name, flags in compare.RUNS.items()}
    commits = {r["environment"]["git_commit"] for entry in comparison.values() for r in entry["runs"]}
    assert len(commits) == 1 and not commits.pop().endswith("-dirty")


def test_readme_table_is_the_one_of_the_results():
    table = plots.markdown(json.loads(committed("metrics/comparison.json")))
    assert committed("figures/summary.md") == table and table in committed("README.md")


def test_committed_grid_is_the_twenty_default_runs():
    results = json.loads(committed("metrics/grid.json"))
    assert {name: r["settings"] for name, r in results.items()} == \
        {name: settings("--task", "synthetic", *flags.split()) for name, flags in grid.RUNS.items()}
    assert len({r["environment"]["git_commit"] for r in results.values()}) == 1
    assert not any(r["environment"]["git_commit"].endswith("-dirty") for r in results.values())


def test_readme_tables_of_the_grid_are_those_of_the_results():
    results = json.loads(committed("metrics/grid.json"))
    tables = plots.grid_markdown(results)
    assert committed("figures/grid.md") == tables and tables in committed("README.md")
    rows = list(csv.DictReader(committed("metrics/grid_results.csv").splitlines()))
    assert [row["run"] for row in rows] == [row["run"] for row in grid.rows_of(results)] and len(rows) == 20
    assert {row["run"]: float(row["f1"]) for row in rows} == {name: r["f1"] for name, r in results.items()}


def test_committed_predictions_are_those_of_the_comparison():
    comparison = json.loads(committed("metrics/comparison.json"))
    rows = list(csv.DictReader(committed("metrics/predictions.csv").splitlines()))
    labels = [row["label"] for row in rows]
    for name, entry in comparison.items():
        for r in entry["runs"]:
            predicted = [row[f"{name}_seed{r['settings']['seed']}"] for row in rows]
            assert f1_score(labels, predicted, average="macro") == pytest.approx(r["f1_macro"])


def test_readme_tables_of_memory_and_speed_are_those_of_the_results():
    readme = committed("README.md")
    ledger = json.loads(committed("metrics/memory.json"))
    assert (ledger["model"], ledger["batch_size"], ledger["max_length"]) == ("bert-base-uncased", 32, 128)
    assert memory.markdown(ledger) in readme
    assert bench.markdown(json.loads(committed("metrics/bench.json"))) in readme
    assert bench.tricks_markdown(json.loads(committed("metrics/bench_tricks.json"))) in readme


def test_readme_tables_of_many_tasks_and_of_requantizing_are_those_of_the_results():
    readme = committed("README.md")
    tables = plots.multitask_markdown(json.loads(committed("metrics/multitask.json")))
    assert committed("figures/multitask.md") == tables and tables in readme
    assert merge.markdown(json.loads(committed("metrics/requantized.json"))) in readme


def test_every_link_of_the_readme_leads_somewhere():
    links = re.findall(r"\]\(([^):#]+)\)", committed("README.md"))
    assert len(links) > 10 and all((ROOT / link).exists() for link in links)
