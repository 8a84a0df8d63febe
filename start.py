"""What every program does first: settings.py imports it before anything slow. Quiet libraries, and a terminal that takes
any text."""
import atexit
import importlib.abc
import importlib.machinery
import logging
import os
import signal
import sys

OPS = "bitsandbytes.backends.cpu.ops"


class WithoutKernels(importlib.abc.MetaPathFinder):
    """On CPUs with AVX512-BF16 bitsandbytes, while it is imported, asks a hub for code through the optional package
    `kernels` and runs it; where that fails, it warns. For as long as that one module runs, there is no such package."""

    def find_spec(self, name, path, target=None):
        if name != OPS:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        run = spec.loader.exec_module

        def run_without_kernels(module):
            kernels = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "kernels"}
            sys.modules["kernels"] = None  # Python's way to say that there is none
            try:
                run(module)
            finally:
                del sys.modules["kernels"]
                sys.modules.update(kernels)
        spec.loader.exec_module = run_without_kernels
        return spec


sys.meta_path.insert(0, WithoutKernels())
logging.getLogger(OPS).setLevel(logging.ERROR)


def mute():
    """Let what is still to be printed go nowhere: whoever read it has closed the pipe (`| head`)."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def flush():
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        mute()


def end(kind, error, traceback):
    if kind is BrokenPipeError:
        mute()
    else:
        sys.__excepthook__(kind, error, traceback)


def start():
    """Of a program, not of an import. Ctrl-C ends it at once and quietly, as kill does, which all that writes files allows
    (settings.write_whole); a closed pipe is no error; what a terminal cannot show is escaped."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.excepthook = end
    atexit.register(flush)
    for stream in sys.stdout, sys.stderr:
        if hasattr(stream, "reconfigure"):  # a notebook's have no encoding
            stream.reconfigure(errors="backslashreplace")
