"""How a program begins, speaks and ends: nothing is fetched when bitsandbytes is imported, no
terminal, disk or GPU ends it in more than one line, and files are written whole."""
import json
import os
import re
import sys

import pytest
import torch
from conftest import ROOT, one_line_exit, program, run, save_small_bert

import checkpoint
import checks
import common
import plots
import qa
from settings import read_result

OPS = """
import logging
try:
    from kernels import get_kernel
    get_kernel("somebody/some-code")
except Exception as error:
    logging.getLogger(__name__).warning("Failed to load: %s", error)
"""
KERNELS = ("from pathlib import Path\nPath(__file__).with_name('touched').touch()\n"
           "def get_kernel(name):\n    raise OSError('no hub')\n")


# --- bitsandbytes --------------------------------------------------------------------------------

@pytest.fixture
def packages(tmp_path):
    """A stand-in for bitsandbytes that does on any CPU what the real one does on some, and
    `kernels` beside it."""
    cpu = tmp_path / "bitsandbytes" / "backends" / "cpu"
    cpu.mkdir(parents=True)
    for folder in cpu.parent.parent, cpu.parent, cpu:
        (folder / "__init__.py").touch()
    (cpu / "__init__.py").write_text("from . import ops")
    (cpu.parent.parent / "__init__.py").write_text("from .backends import cpu")
    (cpu / "ops.py").write_text(OPS)
    (tmp_path / "kernels.py").write_text(KERNELS)
    return tmp_path


def python(packages, code):
    return run(sys.executable, "-c", code, env={**os.environ, "PYTHONPATH": f"{packages}:{ROOT}"})


def test_bitsandbytes_fetches_nothing_and_says_nothing(packages):
    without_us = python(packages, "import bitsandbytes")
    assert "Failed to load" in without_us.stderr and (packages / "touched").exists()
    (packages / "touched").unlink()
    done = python(packages, "import settings, bitsandbytes")
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert not (packages / "touched").exists()
    # nor does anything else that runs in our processes get code through it
    assert "ModuleNotFoundError" in python(packages, "import settings, kernels").stderr
    # somebody else imported it before: it stays theirs, and nothing is said
    done = python(packages, "import kernels, settings, bitsandbytes; kernels.get_kernel")
    assert done.returncode == 0 and not done.stderr, done.stderr


def test_without_kernels_it_says_nothing_either(packages):
    (packages / "kernels.py").unlink()
    done = python(packages, "import settings, bitsandbytes")
    assert done.returncode == 0 and not done.stderr, done.stderr


# Each module is imported in a fork, as far as to the first package that may import bitsandbytes.
FIRST = """
import os, sys, numpy
sys.path.insert(0, os.getcwd())

class Watch:
    def find_spec(self, name, path, target=None):
        if name in ("torch", "transformers", "peft", "bitsandbytes", "gradio"):
            os._exit(0 if "common" in sys.modules else 1)

sys.meta_path.insert(0, Watch())
for module in sys.argv[1:]:
    if not os.fork():
        __import__(module)
        __import__("bitsandbytes")
    if os.waitstatus_to_exitcode(os.wait()[1]):
        print(module)
"""


def test_every_program_and_every_user_of_bitsandbytes_imports_this_first():
    tools = sorted(f"tools.{path.stem}" for path in (ROOT / "tools").glob("[a-z]*.py"))
    assert len(tools) >= 9
    modules = [*tools, "train", "compare", "plots", "fetch", "quant", "fast"]
    done = run(sys.executable, "-c", FIRST, *modules, cwd=ROOT)
    assert done.returncode == 0 and not done.stdout + done.stderr, done.stdout + done.stderr


def test_the_model_s_module_imports_this_and_not_bitsandbytes(tmp_path):
    (tmp_path / "imports.py").write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "sys.modules.pop('bitsandbytes', None)  # the fork has it from its parent\n"
        "import model; print({'common', 'bitsandbytes'} & set(sys.modules))")
    done = program(tmp_path / "imports.py")
    assert (done.stdout, done.stderr) == ("{'common'}\n", "")


# --- terminals, disks and GPUs -------------------------------------------------------------------

# A program whose terminal has another encoding than this one's.
TERMINAL = """
import os, runpy, sys
encoding, *sys.argv = sys.argv[1:]
sys.stdout, sys.stderr = (open(stream, "w", encoding=encoding) for stream in (1, 2))
sys.path[0] = os.path.dirname(sys.argv[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_terminal_that_is_not_utf8_shows_what_it_can(data_dir, tmp_path):
    folder = tmp_path / "donn\u00e9es \u4e2d"
    data_dir.rename(folder)
    (tmp_path / "terminal.py").write_text(TERMINAL)
    flags = ["--method", "lora", "--model", save_small_bert(tmp_path / "model"), "--data", folder,
             "--amp", "off", "--max-steps", 1, "--output", tmp_path / "out"]
    done = program(tmp_path / "terminal.py", "ascii", ROOT / "train.py", *flags)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert "donn\\xe9es \\u4e2d: splits as given" in done.stdout
    listed = ["--list", "--amp", "off", "--lr", "1e-3", "--data", folder]
    for encoding in "ascii", "latin-1", "cp1252":
        done = program(tmp_path / "terminal.py", encoding, ROOT / "train.py", *flags)
        assert done.returncode == 0 and done.stdout.startswith("finished already"), done.stderr
        done = program(tmp_path / "terminal.py", encoding, ROOT / "compare.py", *listed)
        assert done.returncode == 0 and done.stdout.count(str(folder)) == 5, done.stderr
    # a real process and the environment's own word
    done = run(sys.executable, ROOT / "compare.py", *listed,
               env=os.environ | {"PYTHONIOENCODING": "cp1252"})
    assert done.returncode == 0 and done.stdout.count(str(folder)) == 5, done.stderr


@pytest.mark.parametrize("name", ["train.py", "-m tools.predict", "-m tools.memory"])
def test_a_closed_pipe_is_no_error(name):
    done = run("bash", "-c", f"{sys.executable} {name} --help | head -n 1", cwd=ROOT)
    assert done.returncode == 0 and not done.stderr, done.stderr


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_a_closed_terminal_is_no_error(closed):
    done = run("bash", "-c", f"{sys.executable} {ROOT / 'train.py'} --help {closed}")
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr


def test_a_full_disk_is_one_line():
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    done = run("bash", "-c", f"{sys.executable} {ROOT / 'compare.py'} --list --amp off > /dev/full")
    line, = done.stderr.splitlines()
    assert done.returncode != 0 and line.startswith("error: ") and "No space" in line


@pytest.mark.parametrize("error, words", [
    ("torch.OutOfMemoryError('CUDA out of memory.\\nTried to allocate')",
     ["GPU", "--accumulation 2"]),
    ("RuntimeError('alloc_cpu.cpp:1 DefaultCPUAllocator: can\\'t allocate memory: you tried')",
     ["machine has no memory", "--accumulation 2"]), ("MemoryError()", ["machine has no memory"]),
    ("PermissionError(13, 'Permission denied', '/a\\nb')", ["Permission denied", "/a\\nb"])])
def test_what_a_machine_lacks_is_one_line(error, words, tmp_path):
    (tmp_path / "ends.py").write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
                                      f"import common, torch\ncommon.start()\nraise {error}")
    done = program(tmp_path / "ends.py")
    line, = done.stderr.splitlines()
    assert done.returncode == 1 and line.startswith("error: "), done.stderr
    assert all(word in line for word in words), line


def test_a_fault_of_ours_shows_where_it_is(capsys):
    common.end(ZeroDivisionError, ZeroDivisionError("no"), None)
    assert "ZeroDivisionError" in capsys.readouterr().err
    assert issubclass(torch.OutOfMemoryError, RuntimeError)  # it needs a case of its own


# --- files ---------------------------------------------------------------------------------------

def test_a_writer_that_dies_leaves_the_old_file(tmp_path):
    path = tmp_path / "result.json"
    path.write_text("old")

    def dies(part):
        part.write_text("half a res")
        os._exit(9)

    if (child := os.fork()) == 0:
        common.write_whole(path, dies)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9 and path.read_text() == "old"
    for left in tmp_path.glob("*.part"):
        left.unlink()
    common.write_whole(path, lambda part: part.write_text("new"))
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_a_writer_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "result.json"
    path.write_text("old")

    def fails(part):
        part.write_text("half a res")
        raise OSError("no space")

    with pytest.raises(SystemExit, match="cannot write .*no space"):
        common.write_whole(path, fails)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(SystemExit, match="cannot write"):
        common.write_whole(path / "x", lambda part: part.write_text("new"))


def test_two_writers_of_one_file_do_not_meet(tmp_path):
    """As two processes of one number do, in containers of one host name."""
    path = tmp_path / "result.json"

    def writes_while_another_does(part):
        part.write_text("first")
        common.write_whole(path, lambda own: own.write_text("second"))
        assert part.read_text() == "first" and path.read_text() == "second"

    common.write_whole(path, writes_while_another_does)
    assert path.read_text() == "first" and list(tmp_path.iterdir()) == [path]


def test_a_written_file_is_as_readable_as_any_new_one(tmp_path):
    (tmp_path / "usual").touch()
    common.write_text(tmp_path / "written", "text")
    assert (tmp_path / "written").stat().st_mode == (tmp_path / "usual").stat().st_mode


# --- file systems and files of other kinds -------------------------------------------------------

def refuse(*args, **settings):
    raise PermissionError(1, "Operation not permitted")


def test_a_mount_without_modes_or_locks_holds_results(tmp_path, monkeypatch):
    monkeypatch.setattr(common.Path, "chmod", refuse)
    monkeypatch.setattr(common.fcntl, "flock", refuse)
    with common.alone(tmp_path), common.alone(tmp_path / "not there"):
        common.write_json(tmp_path / "a.json", {"a": 1})
    assert common.read_json(tmp_path / "a.json", "a") == {"a": 1}


@pytest.mark.parametrize("needed", ["replace", "fsync"])
def test_a_folder_in_which_nothing_can_be_written_whole_is_refused_at_once(needed, tmp_path,
                                                                           monkeypatch):
    common.check_writable(tmp_path)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(common.os, needed, refuse)
    one_line_exit(lambda: common.check_writable(tmp_path), "cannot write into", "--output")


def test_two_programs_that_rewrite_a_file_lose_nothing(tmp_path):
    file = tmp_path / "n"
    file.write_text("0")
    children = []
    for _ in range(2):
        if not (child := os.fork()):
            try:
                for _ in range(200):
                    with common.alone(tmp_path):
                        file.write_text(str(int(file.read_text()) + 1))
                os._exit(0)
            finally:  # no second pytest goes on from here
                os._exit(1)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    assert file.read_text() == "400"


@pytest.mark.parametrize("settings, environment", [
    ([], {"device": "", "amp": ""}), ({"colour": 1}, {"device": "", "amp": ""}), ({}, {})])
def test_a_result_with_other_json_in_it_is_one_line(settings, environment, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(
        {"settings": settings, "environment": environment, "history": []}))
    one_line_exit(lambda: read_result(tmp_path / "a.json"), "a.json is damaged", "delete")


@pytest.mark.parametrize("content", ["3", "[]", "{", '{"b": 1}'])
def test_a_file_with_other_json_in_it_is_one_line(content, tmp_path):
    (tmp_path / "a.json").write_text(content)
    one_line_exit(lambda: common.read_json(tmp_path / "a.json", "a"), "a.json is damaged", "delete")


@pytest.mark.parametrize("read", [
    lambda path: list(checks.read_table(path)), qa.read_squad, checkpoint.read_about,
    common.read_json,
    lambda path: common.fingerprint([path])])
def test_a_named_pipe_is_refused_and_not_waited_for(read, tmp_path):
    os.mkfifo(tmp_path / "train.csv")
    one_line_exit(lambda: read(tmp_path / "train.csv"), "no ordinary file")


def test_what_torch_warns_of_for_the_future_is_not_repeated_by_every_process():
    warn = ("import warnings; "
            "warnings.warn_explicit('a', FutureWarning, 'f', 1, module='torch.cuda')")
    assert "FutureWarning" in run(sys.executable, "-c", warn).stderr
    done = run(sys.executable, "-c", f"import sys; sys.path[:0] = [{str(ROOT)!r}]; import common; "
               + warn)
    assert done.returncode == 0 and not done.stderr


@pytest.mark.parametrize("command", [
    ["env", "PYTHONSAFEPATH=1", "PYTHONOPTIMIZE=2", "bash", "run_all.sh"],
    *(["env", "-C", "/", "PYTHONSAFEPATH=1", sys.executable, ROOT / name]
      for name in ("train.py", "compare.py", "plots.py", "fetch.py"))])
def test_unusual_ways_to_start_python(command):
    done = run(*command, "--help", cwd=ROOT)
    said = r"train\.py|metrics/|GroundTruth"  # the last by fetch.py, which takes no flags
    assert done.returncode == 0 and re.search(said, done.stdout), done.stderr


def test_a_figure_shows_names_as_they_are_written(tmp_path, monkeypatch):
    usual = [font for font in plots.fontManager.ttflist if "DejaVu" in font.name]
    monkeypatch.setattr(plots.fontManager, "ttflist", usual)  # they have no Chinese characters
    figure, ax = plots.plt.subplots()
    ax.set(xscale="log", xlim=(1, 1000), title=r"$\foo$")  # as a formula it is an error
    title = figure.suptitle("prices $5 to $10, \u4e2d")
    plots.save_figure(figure, tmp_path / "a.png")
    assert title.get_text() == "prices $5 to $10, \\u4e2d" and not title.get_parse_math()
    assert "$\\mathdefault{10^{2}}$" in [tick.get_text() for tick in ax.get_xticklabels()]
    assert all(tick.get_parse_math() for tick in ax.get_xticklabels())
