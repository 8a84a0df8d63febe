"""How the project is built: two floors without circles, one table of methods, files that stay
short, papers around the code that lead somewhere."""
import ast
import collections
import functools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import METHODS as METHOD_FLAGS
from conftest import ROOT, build, one_line_error, program, run, settings, tiny_bert

import methods
from compare import FOLD_RUNS, RUNS
from model import PUT, apply_method, count_params, trained_tensors
from tools.export import merge

TOP = {path.stem: path for path in ROOT.glob("*.py")}
TOOLS = {f"tools.{path.stem}": path for path in ROOT.glob("tools/*.py") if path.stem != "__init__"}
MODULES = TOP | TOOLS
# what `--help` and a typo may wait for
QUICK = {"common", "checks", "methods", "settings", "rates", "spread", "verdict", "compare"}
ONCE_A_PROGRAM = {"main", "parse_args", "ARGS", "redraw"}


@functools.cache
def tree_of(name):
    return ast.parse(MODULES[name].read_text(encoding="utf-8"))


@functools.cache
def imports(name):
    """The project's own modules that a module imports, also inside of functions."""
    found = set()
    for node in ast.walk(tree_of(name)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found & set(MODULES)


def reached(name, on_the_way=()):
    """All modules that a module imports, directly or not; fails on a circle."""
    assert name not in on_the_way, f"circle: {' -> '.join([*on_the_way, name])}"
    found = {name}
    for other in imports(name):
        found |= reached(other, (*on_the_way, name))
    return found


def test_both_floors_are_seen():
    assert {"train", "lora", "common"} <= set(TOP) and {"tools.predict", "tools.grid"} <= set(TOOLS)
    assert imports("tools.predict") >= {"train", "tools.export"}
    assert len(TOP) <= 19 and len(TOOLS) <= 11


@pytest.mark.parametrize("name", sorted(MODULES))
def test_no_module_imports_itself_over_others_and_nothing_at_the_top_imports_tools(name):
    below = reached(name)
    if name in TOP:
        assert not below & set(TOOLS) and "tools" not in imports(name)


@pytest.mark.parametrize("name", ["settings", "methods", "common", "rates", "verdict", "compare"])
def test_flags_and_table_import_nothing_slow(name):
    at_start = {node.module for node in tree_of(name).body if isinstance(node, ast.ImportFrom)}
    assert at_start & set(MODULES) <= QUICK
    slow = {"torch", "transformers", "matplotlib"}
    code = f"import sys, {name}; print(*({slow} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "" and done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", sorted(TOOLS))
def test_a_tool_run_as_a_file_says_how_it_is_run(name, tmp_path):
    for folder in ROOT, tmp_path:
        done = run(sys.executable, TOOLS[name], cwd=folder)
        one_line_error(done, "from the project's folder", f"python -m {name}")


def test_a_tool_is_run_as_a_module():
    done = program("tools.predict", "--help")
    assert done.returncode == 0 and "python -m tools.predict" in done.stdout, done.stderr


# --- what a reader meets -------------------------------------------------------------------------

def lines(path):
    return len(path.read_text(encoding="utf-8").splitlines())


def functions(name):
    return [node for node in ast.walk(tree_of(name)) if isinstance(node, ast.FunctionDef)]


def test_what_a_reader_meets_is_short():
    assert lines(ROOT / "train.py") <= 175 and lines(ROOT / "plots.py") <= 420
    assert lines(ROOT / "CONTRIBUTING.md") <= 40
    assert sum(map(lines, MODULES.values())) <= 8692
    for name in MODULES:
        for node in functions(name):
            if (name, node.name) != ("train", "main"):  # the loop, as one story
                assert node.end_lineno - node.lineno < 60, f"{name}: {node.name}"


def test_the_loop_speaks_of_several_processes_in_four_lines():
    loop = [node for node in functions("train") if node.name in ("step", "predict")]
    in_loop = next(node for node in ast.walk(tree_of("train")) if isinstance(node, ast.For)
                   and getattr(node.target, "id", "") == "epoch")
    words = {"own_share", "add_up", "gather", "RANK", "WORLD", "dist"}
    at = {name.lineno for part in (*loop, in_loop) for name in ast.walk(part)
          if isinstance(name, ast.Name) and name.id in words}
    assert 0 < len(at) <= 4


def test_no_name_is_defined_in_two_files():
    places = collections.defaultdict(list)
    for module in MODULES:
        for node in tree_of(module).body:
            targets = getattr(node, "targets", [node])
            for target in targets if isinstance(node, ast.Assign) else []:
                for name in ast.walk(target):
                    if isinstance(name, ast.Name):
                        places[name.id].append(module)
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                places[node.name].append(module)
    assert not {name: modules for name, modules in places.items()
                if len(set(modules)) > 1 and name not in ONCE_A_PROGRAM}


# how a docstring begins that says what something is and not what it does
NOUNS = {"A", "An", "The", "All", "Whether", "What", "Where", "How", "Which", "When", "One", "As",
         "Of", "In", "If", "Every", "Each", "Number", "Names", "Bytes", "End"}


def test_docstrings_of_functions_begin_with_a_verb():
    wrong = []
    for module in MODULES:
        for node in functions(module):
            text = ast.get_docstring(node)
            if text and (not re.match(r"[A-Z][a-z]+\b", text) or text.split()[0] in NOUNS):
                wrong.append(f"{module}.{node.name}: {text.splitlines()[0]}")
    assert not wrong


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
    assert list(RUNS) == ["full", "lora_r8", "lora_r16", "qlora", "adapter"]
    assert list(FOLD_RUNS)[:5] == list(RUNS)
    # what adds tensors has a function that does so
    assert set(PUT) == {name for name, row in methods.METHODS.items() if row.adds}


def test_no_two_cases_have_the_same_flags_colour_or_marker():
    for values in zip(*methods.CASES.values()):
        assert len(set(values)) == len(methods.CASES)


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
    for path in sorted((ROOT / "metrics").glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        first = content[0] if isinstance(content, list) else content
        said = f"{first.get('command')} {first.get('caption')}"
        named = re.findall(r"python (\w+\.py)|python -m (tools\.\w+)|bash (run_\w+\.sh)", said)
        assert named, path.name
        for program_, tool, script in named:
            assert (tool in TOOLS) if tool else (ROOT / (program_ or script)).exists(), path.name


def test_papers_name_programs_that_exist():
    for paper in PAPERS:
        text = (ROOT / paper).read_text(encoding="utf-8")
        for tool in re.findall(r"(?<![\w/])tools\.([a-z]+)", text):
            assert f"tools.{tool}" in TOOLS, f"{paper}: {tool}"
        for file in re.findall(r"(?:python3?|bash) ((?:tests/)?\w+\.(?:py|sh))", text):
            assert (ROOT / file).exists(), f"{paper}: {file}"


@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
def test_scripts_are_right_bash():
    for path in [*ROOT.glob("*.sh"), *ROOT.glob("tests/*.sh")]:
        assert run("bash", "-n", path).returncode == 0, path


@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
def test_scripts_find_their_folder_where_cd_prints_it(tmp_path):
    (tmp_path / "installed.txt").write_bytes((ROOT / "requirements.txt").read_bytes())
    env = {"PATH": os.environ["PATH"], "BERT_VENV": str(tmp_path), "CDPATH": str(ROOT)}
    done = run("bash", "-c", 'source tests/../setup.sh; echo "$here"', cwd=ROOT, env=env)
    assert done.stdout == f"{ROOT}\n", done


@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
def test_an_installation_that_fails_does_not_look_finished(tmp_path):
    stub, venv = tmp_path / "python3", tmp_path / "venv"
    stub.write_text('#!/bin/sh\n'  # the environments that it makes can install nothing
                    'case "$*" in "-m venv "*) mkdir -p "$3/bin"\n'
                    'printf "exit 1" > "$3/bin/python"; chmod +x "$3/bin/python";; esac\n')
    stub.chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "BERT_VENV": str(venv)}
    done = run("bash", "setup.sh", cwd=ROOT, env=env)
    assert done.returncode and (venv / "bin").exists() and not (venv / "installed.txt").exists()


def test_the_citation_is_whole():
    text = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert yaml.safe_load(text)["authors"][0].keys() == {"name"}
    for key, value in (("cff-version", r"1\.2\.0"), ("message", ".+"), ("title", ".+"),
                       ("type", "software"), ("license", r"Apache-2\.0"),
                       ("version", r"\d+\.\d+\.\d+"), ("date-released", r"20\d\d-\d\d-\d\d"),
                       ("authors", r"\n  - name: .+")):
        assert re.search(rf"^{key}: ?{value}$", text, flags=re.M), key
    assert "(CITATION.cff)" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert "Apache License" in (Path(ROOT) / "LICENSE").read_text(encoding="utf-8")
