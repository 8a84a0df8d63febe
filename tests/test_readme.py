"""The committed results are those of the two default studies, and the README shows them and nothing else."""
import csv
import json
import re
import shutil

import pytest
from conftest import ROOT, run, settings

import compare
import grid
import plots


def committed(path):
    """The file as committed: a user's own run_all.sh may have put other results in its place."""
    if not shutil.which("git") or not (done := run("git", "show", f"HEAD:{path}", cwd=ROOT)).stdout:
        pytest.skip("not a git checkout")
    return done.stdout


def test_committed_comparison_is_the_five_default_runs():
    comparison = json.loads(committed("metrics/comparison.json"))
    assert {name: r["settings"] for name, r in comparison.items()} == \
        {name: settings(*flags.split()) for name, flags in compare.RUNS.items()}
    assert len({r["environment"]["git_commit"] for r in comparison.values()}) == 1
    assert not any(r["environment"]["git_commit"].endswith("-dirty") for r in comparison.values())


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


def test_every_link_of_the_readme_leads_somewhere():
    links = re.findall(r"\]\(([^):#]+)\)", committed("README.md"))
    assert len(links) > 10 and all((ROOT / link).exists() for link in links)
