"""Test that the notebook runs from top to bottom in a clone, and is committed with the outputs of
such a run."""
import base64
import importlib
import inspect
import json
import operator
import re
import shutil

from conftest import ROOT, program
from test_readme import committed, committed_bytes

import plots

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


def test_it_runs_in_a_clone_and_its_exercises_have_these_answers(tmp_path):
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    for name in "tools", "metrics", "figures", "examples":
        shutil.copytree(ROOT / name, tmp_path / name,
                        ignore=shutil.ignore_patterns("runs", "__pycache__"))
    (tmp_path / "downloads").symlink_to(ROOT / "downloads")
    text = (ROOT / "comparison.ipynb").read_text(encoding="utf-8")
    for whole, few in (("--train-rows 2000", "--train-rows 64"),  # it trains for a minute
                       ("task = load_task(s)", "task = load_task(s); task = task._replace("
                        "validation=type(task.train)(*(part[:64] for part in task.validation)))"),
                       ("predict_bytes(BertConfig()", "predict_bytes(BertConfig(num_hidden_layers"
                                                      "=1)")):
        assert text.count(whole) == 1
        text = text.replace(whole, few)
    (tmp_path / "comparison.ipynb").write_text(text, encoding="utf-8")
    (tmp_path / "run.py").write_text(RUN)
    done = program(tmp_path / "run.py")
    assert done.returncode == 0, done.stderr
    printed, shown = json.loads(done.stdout.splitlines()[-1])
    study = plots.read_study(ROOT / "metrics" / "crossvalidation.json")
    assert plots.answer_markdown(study) in shown
    assert "validation macro-F1 0." in printed and "query is now a plain Linear" in printed
    assert "one and the same tensor in both: True" in printed
    # query and value in 12 layers, A and B of 4 x 768; the head: 2 x 768 weights, 2 biases
    assert f"1. {12 * 2 * 2 * 4 * 768 + 2 * 768 + 2:,}\n" in printed
    assert f"2. {32 * 64 // 16}\n" in printed
    assert "3. By 0.0. With A = 0 and B = 0 both gradients are 0" in printed


def test_the_code_that_it_shows_is_the_code():
    notebook = json.loads(committed("comparison.ipynb"))
    shown = [cell for cell in notebook["cells"] if source_of(cell).startswith("source(")]
    assert len(shown) == 4
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
    assert committed("figures/answer.md") in tables
    shown = re.findall(r"figures/\w+\.png", "\n".join(map(source_of, cells)))
    pictures = [base64.b64decode(text) for text in outputs(notebook, "image/png")]
    for name in dict.fromkeys(shown):
        assert committed_bytes(name) in pictures, name
