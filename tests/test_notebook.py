"""The notebook runs from top to bottom on what run_all.sh leaves, and is committed with the outputs
of such a run."""
import base64
import importlib
import inspect
import json
import operator
import re
import shutil

import nbformat
from conftest import ROOT
from nbclient import NotebookClient
from test_readme import committed, committed_bytes


def outputs(notebook, kind):
    """All outputs of a kind, as text: "text/markdown", or "stream" for what was printed."""
    found = [o for cell in notebook.cells if cell.cell_type == "code" for o in cell.outputs]
    return [o["text"] for o in found if o.output_type == kind] + \
        [o["data"][kind] for o in found if kind in o.get("data", {})]


def test_it_runs_on_what_run_all_leaves(study, tmp_path):
    output, *_ = study
    for path in [*ROOT.glob("*.py"), ROOT / "comparison.ipynb"]:
        shutil.copy(path, tmp_path)
    for name in "metrics", "figures":
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("runs"))
    for name in "metrics", "figures", "checkpoints":
        shutil.copytree(output / name, tmp_path / name, dirs_exist_ok=True)
    (tmp_path / "downloads").symlink_to(ROOT / "downloads")
    notebook = nbformat.read(tmp_path / "comparison.ipynb", as_version=4)
    NotebookClient(notebook, timeout=300, kernel_name="python3",
                   resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert (output / "figures" / "summary.md").read_text() in outputs(notebook, "text/markdown")
    printed = "".join(outputs(notebook, "stream"))
    assert "You will laugh, though" in printed and "query is now a plain Linear" in printed
    assert "one and the same tensor in LoRA and adapter: True" in printed


def test_the_code_that_it_shows_is_the_code():
    notebook = nbformat.reads(committed("comparison.ipynb"), as_version=4)
    shown = [cell for cell in notebook.cells if cell.source.startswith("source(")]
    assert len(shown) == 3
    for cell in shown:
        names = cell.source.strip()[len("source("):-1].split(", ")
        things = [operator.attrgetter(name.split(".", 1)[1])(importlib.import_module(
            name.split(".")[0])) for name in names]
        assert cell.outputs[0]["data"]["text/markdown"] == \
            "```python\n" + "\n".join(map(inspect.getsource, things)) + "```"


def test_the_committed_outputs_are_those_of_the_committed_results():
    notebook = nbformat.reads(committed("comparison.ipynb"), as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not any(o.output_type == "error" or o.get("name") == "stderr"
                   for cell in cells for o in cell.outputs)
    tables = outputs(notebook, "text/markdown")
    assert committed("figures/summary.md") in tables and committed("figures/multitask.md") in tables
    last, = [text for text in tables if text.startswith("- **Quality**")]
    full = json.loads(committed("metrics/comparison.json"))["full_ft"]
    assert f"{full['f1_macro']:.4f}" in last and f"n = {full['n']}" in last
    shown = re.findall(r"figures/\w+\.png", "\n".join(cell.source for cell in cells))
    pictures = [base64.b64decode(text) for text in outputs(notebook, "image/png")]
    for name in dict.fromkeys(shown):
        assert committed_bytes(name) in pictures, name
