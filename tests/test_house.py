"""How the project is built: no circles, one table of methods, files that stay short, papers around
the code that lead somewhere."""
import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import METHODS as METHOD_FLAGS
from conftest import ROOT, build, settings, tiny_bert

import methods
from export import merge
from model import apply_method, count_params, trained_tensors
from studies import SENTENCE_RUNS

MODULES = {path.stem for path in ROOT.glob("*.py")}
# what `--help`, a typo and a finished run may wait for
QUICK = {"start", "files", "methods", "settings", "spread", "studies"}


def imports(name):
    """The project's own modules that a module imports, also inside of functions."""
    tree = ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8"))
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            found.add(node.module)
    return found & MODULES


def reached(name, on_the_way=()):
    """All modules that a module imports, directly or not; fails on a circle."""
    assert name not in on_the_way, f"circle: {' -> '.join([*on_the_way, name])}"
    found = {name}
    for other in imports(name):
        found |= reached(other, (*on_the_way, name))
    return found


@pytest.mark.parametrize("name", sorted(MODULES))
def test_no_module_imports_itself_over_others(name):
    reached(name)


@pytest.mark.parametrize("name", ["settings", "methods", "files", "start"])
def test_flags_and_table_import_nothing_slow(name):
    assert reached(name) <= QUICK
    slow = {"torch", "transformers", "matplotlib"}
    code = f"import sys, {name}; print(*({slow} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "" and done.returncode == 0, done.stderr


def functions(path):
    return [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.FunctionDef)]


def test_what_a_reader_meets_is_short():
    def lines(name):
        return len((ROOT / name).read_text(encoding="utf-8").splitlines())

    assert lines("train.py") <= 200 and lines("plots.py") <= 480 and lines("README.md") <= 180
    assert lines("CONTRIBUTING.md") <= 40
    for path in ROOT.glob("*.py"):
        for node in functions(path):
            if (path.name, node.name) != ("train.py", "main"):  # the loop, as one story
                assert node.end_lineno - node.lineno < 60, f"{path.name}: {node.name}"


# --- the table of methods ------------------------------------------------------------------------

@pytest.mark.parametrize("name", METHOD_FLAGS)
def test_every_row_trains_what_it_says_and_kinds_sum_to_the_total(name):
    model, row = build(name), methods.METHODS[name]
    names = set(trained_tensors(model))
    assert names == {n for n, _ in model.named_parameters() if methods.trains(row, n)}
    plain = {n for n, _ in build("full").named_parameters()}
    added = {n for n in names if n.replace(".base.", ".") not in plain}
    assert {n for n in names if methods.kind_of(n) == "method"} == added
    params = count_params(model)
    assert sum(params["trainable_by_kind"].values()) == params["trainable_params"]
    assert params["trainable_params"] == sum(p.numel() for p in trained_tensors(model).values())


def test_every_row_is_tested_and_measured():
    assert set(METHOD_FLAGS) == set(methods.METHODS)
    rows = {methods.row_of(settings(*case.flags.split())) for case in methods.CASES.values()}
    assert rows == set(methods.METHODS.values())
    assert list(SENTENCE_RUNS) == ["full_ft", "lora_r8", "lora_r16", "qlora", "adapter"]


def test_a_row_that_nothing_measures_is_an_error_at_import(monkeypatch):
    monkeypatch.setitem(methods.METHODS, "new", methods.METHODS["lora"])
    with pytest.raises(AssertionError, match="new"):
        methods.check_table()


@pytest.mark.parametrize("method", ["bitfit", "head"])
def test_what_trains_stays_in_fp32_and_nothing_else_does(method):
    row, model = methods.METHODS[method], tiny_bert()
    apply_method(model, settings(*METHOD_FLAGS[method]), torch.bfloat16)
    for name, p in model.named_parameters():
        assert p.requires_grad is methods.trains(row, name), name
        is_linear = "encoder" in name and "LayerNorm" not in name
        assert p.dtype is (torch.bfloat16 if is_linear and not p.requires_grad else torch.float32)
    kinds = count_params(model)["trainable_by_kind"]
    assert sum(kinds.values()) == sum(p.numel() for p in trained_tensors(model).values())
    assert kinds["head"] == 3 * 64 + 3 and bool(kinds["base"]) is (method == "bitfit")


def test_a_wrapper_that_is_left_is_never_exported(monkeypatch):
    monkeypatch.setitem(methods.METHODS, "houlsby",
                        methods.METHODS["houlsby"]._replace(merges=True))
    with pytest.raises(SystemExit, match="not merged: .*adapter"):
        merge(build("houlsby"), settings(*METHOD_FLAGS["houlsby"]))


# --- papers --------------------------------------------------------------------------------------

PAPERS = ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{p.name}" for p in ROOT.glob("docs/*.md"))]


def anchors(path):
    titles = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("paper", PAPERS)
def test_every_link_leads_somewhere(paper):
    path = ROOT / paper
    links = re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8"))
    assert len(links) > (10 if paper == "README.md" else 0)
    for link in links:
        if not link.startswith("http"):
            file, _, anchor = link.partition("#")
            target = (path.parent / file).resolve() if file else path
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


def test_every_result_names_the_command_that_makes_it():
    in_captions = {"comparison.json": "summary.md", "crossvalidation.json": "crossvalidation.md",
                   "grid.json": "grid.md"}
    for path in sorted((ROOT / "metrics").glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        if path.name in in_captions:
            said = (ROOT / "figures" / in_captions[path.name]).read_text(encoding="utf-8")
        else:
            first = content[0] if isinstance(content, list) else content
            said = f"{first.get('command')} {first.get('caption')}"
        assert re.search(r"(python \w+\.py|bash run_\w+\.sh)", said), path.name


def test_the_citation_is_whole():
    text = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    for key in "cff-version", "message", "title", "authors", "license":
        assert re.search(rf"^{key}:", text, flags=re.M)
    assert "Apache License" in (Path(ROOT) / "LICENSE").read_text(encoding="utf-8")
