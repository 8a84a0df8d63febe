"""Nothing is fetched and nothing extra is said when bitsandbytes is imported, and no terminal ends
a program."""
import os
import sys

import pytest
from conftest import ROOT, program, run

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
    # outside of it kernels is there
    done = python(packages, "import settings, bitsandbytes, kernels; kernels.get_kernel")
    assert done.returncode == 0 and not done.stderr, done.stderr
    (packages / "touched").unlink()
    done = python(packages, "import settings, bitsandbytes")
    assert (done.returncode == 0 and not done.stderr
            and not (packages / "touched").exists()), done.stderr
    # somebody else imported it before
    done = python(packages, "import kernels, settings, bitsandbytes; kernels.get_kernel")
    assert done.returncode == 0 and not done.stderr
    done = python(packages, "import bitsandbytes")  # and without us
    assert "Failed to load" in done.stderr and (packages / "touched").exists()


def test_without_kernels_it_says_nothing_either(packages):
    (packages / "kernels.py").unlink()
    done = python(packages, "import settings, bitsandbytes")
    assert done.returncode == 0 and not done.stderr, done.stderr


IMPORTS = f"""
import sys
assert not {{"bitsandbytes", "start"}} & set(sys.modules)
sys.path.insert(0, {str(ROOT)!r})
__import__(sys.argv[1])
assert "start" in sys.modules
import bitsandbytes
"""


@pytest.mark.parametrize("module", ["train", "quant", "predict", "export", "memory", "bench",
                                    "multitask", "fast", "model"])
def test_every_module_that_may_import_bitsandbytes_imports_this_first(module, tmp_path):
    (tmp_path / "imports.py").write_text(IMPORTS)
    done = program(tmp_path / "imports.py", module)
    assert done.returncode == 0 and not done.stderr, done.stderr


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_a_terminal_that_is_not_utf8_shows_what_it_can(encoding, data_dir, tmp_path):
    folder = tmp_path / "donn\u00e9es \u4e2d"
    data_dir.rename(folder)
    env = {**os.environ, "PYTHONIOENCODING": encoding}
    done = run(sys.executable, ROOT / "train.py", "--method", "lora", "--data", folder,
               "--max-steps", 1, "--epochs", 1,
               "--output", tmp_path / "out", env=env, errors="replace")
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    done = run(sys.executable, ROOT / "compare.py", "--list", "--data", folder, env=env)
    assert done.returncode == 0 and done.stdout.count(str(folder)) == 5, done.stderr


@pytest.mark.parametrize("program", ["train.py", "predict.py", "memory.py"])
def test_a_closed_pipe_is_no_error(program):
    done = run("bash", "-c", f"{sys.executable} {ROOT / program} --help | head -n 1")
    assert done.returncode == 0 and not done.stderr, done.stderr


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_a_closed_terminal_is_no_error(closed):
    done = run("bash", "-c", f"{sys.executable} {ROOT / 'train.py'} --help {closed}")
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr


def test_a_full_disk_is_one_line():
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    done = run("bash", "-c", f"{sys.executable} {ROOT / 'compare.py'} --list > /dev/full")
    line, = done.stderr.splitlines()
    assert done.returncode != 0 and line.startswith("error: ") and "No space" in line
