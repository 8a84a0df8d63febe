"""Test that the notebook runs from top to bottom on what run_all.sh leaves, and is committed with
the outputs of such a run."""
import base64
import importlib
import inspect
import json
import operator
import re
import shutil

from conftest import ROOT, program
from test_readme import committed, committed_bytes

# Run the code cells of the notebook beside this program as a Jupyter kernel does, but without the
# time that a kernel takes to start and to import torch. Print [what was printed, the Markdown].
RUN = """
import json, os
from pathlib import Path
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output

os.chdir(Path(__file__).parent)
shell, printed, shown = InteractiveShell.instance(), "", []
for cell in json.loads(Path("comparison.ipynb").read_text())["cells"]:
    if cell["cell_type"] == "code":
        with capture_output() as said:
            shell.run_cell("".join(cell["source"])).raise_error()
        printed += said.stdout
        shown += [output.data.get("text/markdown") for output in said.outputs]
print(json.dumps([printed, shown]))
"""


def source_of(cell):
    return "".join(cell["source"])


def outputs(notebook, kind):
    """Return all outputs of a kind as text: "text/markdown", or "stream" for what was printed."""
    found = [o for cell in notebook["cells"] if cell["cell_type"] == "code"
             for o in cell["outputs"]]
    return ["".join(o["text"]) for o in found if o["output_type"] == kind] + \
        ["".join(o["data"][kind]) for o in found if kind in o.get("data", {})]


def test_it_runs_on_what_run_all_leaves(study, tmp_path):
    output, *_ = study
    for path in [*ROOT.glob("*.py"), ROOT / "comparison.ipynb"]:
        shutil.copy(path, tmp_path)
    for name in "tools", "metrics", "figures":
        shutil.copytree(ROOT / name, tmp_path / name,
                        ignore=shutil.ignore_patterns("runs", "__pycache__"))
    for name in "metrics", "figures", "checkpoints":
        shutil.copytree(output / name, tmp_path / name, dirs_exist_ok=True)
    (tmp_path / "downloads").symlink_to(ROOT / "downloads")
    (tmp_path / "run.py").write_text(RUN)
    done = program(tmp_path / "run.py")
    assert done.returncode == 0, done.stderr
    printed, shown = json.loads(done.stdout.splitlines()[-1])
    assert (output / "figures" / "summary.md").read_text() in shown
    assert "You will laugh, though" in printed and "query is now a plain Linear" in printed
    assert "one and the same tensor in LoRA and adapter: True" in printed


def test_the_code_that_it_shows_is_the_code():
    notebook = json.loads(committed("comparison.ipynb"))
    shown = [cell for cell in notebook["cells"] if source_of(cell).startswith("source(")]
    assert len(shown) == 3
    for cell in shown:
        names = source_of(cell).strip()[len("source("):-1].split(", ")
        things = [operator.attrgetter(name.split(".", 1)[1])(importlib.import_module(
            name.split(".")[0])) for name in names]
        assert "".join(cell["outputs"][0]["data"]["text/markdown"]) == \
            "```python\n" + "\n".join(map(inspect.getsource, things)) + "```"


def test_the_committed_outputs_are_those_of_the_committed_results():
    notebook = json.loads(committed("comparison.ipynb"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert not any(o["output_type"] == "error" or o.get("name") == "stderr"
                   for cell in cells for o in cell["outputs"])
    tables = outputs(notebook, "text/markdown")
    assert committed("figures/summary.md") in tables and committed("figures/multitask.md") in tables
    last, = [text for text in tables if text.startswith("- **Quality**")]
    full = json.loads(committed("metrics/comparison.json"))["entries"]["full"]
    assert f"{full['f1_macro']:.4f}" in last and f"n = {full['n']}" in last
    shown = re.findall(r"figures/\w+\.png", "\n".join(map(source_of, cells)))
    pictures = [base64.b64decode(text) for text in outputs(notebook, "image/png")]
    for name in dict.fromkeys(shown):
        assert committed_bytes(name) in pictures, name
