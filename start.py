"""How every program begins and ends: quiet libraries, a terminal that takes any text, and one line
for what is wrong.

Imported before anything slow, and before anything that may import bitsandbytes."""
import atexit
import importlib.abc
import importlib.machinery
import logging
import os
import shlex
import signal
import sys

OPS = "bitsandbytes.backends.cpu.ops"


class WithoutKernels(importlib.abc.MetaPathFinder):
    """On CPUs with AVX512-BF16 bitsandbytes, while it is imported, asks a hub for code through the
    optional package `kernels` and runs it; where that fails, it warns. For as long as that one
    module runs, there is no such package."""

    def find_spec(self, name, path, target=None):
        if name != OPS:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        run = spec.loader.exec_module

        def run_without_kernels(module):
            kernels = {name: sys.modules.pop(name) for name in list(sys.modules)
                       if name.split(".")[0] == "kernels"}
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
    """Let what is still to be printed go nowhere: its reader has closed the pipe (`| head`)."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def flush():
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        mute()
    except OSError as e:  # a full disk
        mute()
        print(one_line(f"error: cannot print: {e}"), file=sys.stderr, flush=True)
        os._exit(1)  # what runs at exit has no other way to say so


def end(kind, error, traceback):
    if kind is BrokenPipeError:
        mute()
    elif issubclass(kind, OSError):  # a full disk, a forbidden folder, a path that is too long
        print(one_line(f"error: {error}"), file=sys.stderr)
        try:
            sys.stdout.flush()
        except OSError:
            mute()
    else:
        sys.__excepthook__(kind, error, traceback)


def start():
    """Of a program, not of an import. Ctrl-C ends it at once and quietly, as kill does, which all
    that writes files allows (files.write_whole); a closed pipe is no error; what a terminal
    cannot show is escaped."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.excepthook = end
    # None where they were closed (`>&-`)
    sys.stdout = sys.stdout or open(os.devnull, "w")
    sys.stderr = sys.stderr or open(os.devnull, "w")
    atexit.register(flush)
    for stream in sys.stdout, sys.stderr:
        if hasattr(stream, "reconfigure"):  # a notebook's have no encoding
            stream.reconfigure(errors="backslashreplace")


def command():
    """The command line of this program, for the file that it writes."""
    return shlex.join(["python", os.path.basename(sys.argv[0]), *sys.argv[1:]])


def one_line(message):
    """A text as one line, whatever is in the names that it quotes."""
    return message.replace("\r", "\\r").replace("\n", "\\n")


def fail(message):
    """End with one line on stderr and exit status 1."""
    sys.exit(one_line(f"error: {message}"))


def warn(message):
    """Say on stderr, in one line, what is legal but perhaps not meant. Of several processes one
    speaks."""
    if os.environ.get("RANK", "0") == "0":
        print(one_line(f"warning: {message}"), file=sys.stderr)
