"""The committed results are those of one default study, and the README shows them and nothing else."""
import json
import re
import shutil

import pytest
from conftest import ROOT, run, settings

import compare
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


def test_every_link_of_the_readme_leads_somewhere():
    links = re.findall(r"\]\(([^):#]+)\)", committed("README.md"))
    assert len(links) > 10 and all((ROOT / link).exists() for link in links)
