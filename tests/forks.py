"""A Python that is quick to start, for tests of whole programs: to import torch and transformers
takes longer than what most of them do then.

pytest's process imports both, and before its first test a fork of it begins to wait here. It runs
each program that is asked for in a fork of itself. ask() is how a test asks. make_python() makes
what a shell script calls as python; that is this file, which asks the same.
"""
import atexit
import contextlib
import gc
import json
import os
import runpy
import select
import shutil
import signal
import socket
import sys
import tempfile
import warnings
from pathlib import Path

ROOT = Path(__file__).parent.parent
ADDRESS = "BERT_TEST_FORKS"  # the environment variable that says where it waits


def ask(command, env, cwd, streams):
    """Run a command, [python, flags and program and its flags], on three files, its stdin, stdout
    and stderr, and return its exit status, negative for a signal."""
    with socket.socket(socket.AF_UNIX) as waiting:
        waiting.connect(os.environ[ADDRESS])
        socket.send_fds(waiting, [b"\n"], streams)
        waiting.sendall(json.dumps([command, dict(env), str(cwd)]).encode() + b"\n")
        return int(waiting.makefile().readline())


def make_python(path):
    """Make a program that takes the place of python in this environment."""
    path.write_text(f'#!/bin/sh\nexec "{sys.executable}" -IS "{__file__}" "$0" "$@"\n')
    path.chmod(0o755)
    return path


def start():
    """Import what is slow, and begin to wait in a fork. It ends with this process."""
    warnings.resetwarnings()  # to what Python begins with; pytest shows more, and sets it anew
    for kind in DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning:
        warnings.simplefilter("ignore", kind)
    sys.path.insert(0, str(ROOT))
    import common  # noqa: F401 - before bitsandbytes

    # isort: split
    import bitsandbytes  # noqa: F401
    import matplotlib.pyplot  # noqa: F401
    import safetensors.torch  # noqa: F401
    import sklearn.model_selection  # noqa: F401
    import tqdm  # noqa: F401
    from transformers import (  # noqa: F401
        AutoConfig,
        AutoTokenizer,
        BertForQuestionAnswering,
        BertForSequenceClassification,
    )
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    get_checkpoint_conversion_mapping("bert")  # compiles a thousand patterns, once
    folder = Path(tempfile.mkdtemp())
    os.environ[ADDRESS] = str(folder / "socket")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(os.environ[ADDRESS])
    listener.listen(100)
    ended, alive = os.pipe()
    if os.fork():
        listener.close()
        os.close(ended)  # `alive` stays open as long as this process
        return
    try:
        os.close(alive)
        wait(listener, ended)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os._exit(0)


def wait(listener, ended):
    """Answer until the other end of the pipe `ended` is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends pytest, and that ends this
    woken, wakes = socket.socketpair()
    wakes.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wakes.fileno())  # a program that ends wakes select
    # the project's own modules are each program's own, and found only if it finds them itself
    ours = ROOT, ROOT / "tools", ROOT / "tests"
    for name, module in list(sys.modules.items()):
        if name != "__main__" and Path(getattr(module, "__file__", None) or "/").parent in ours:
            del sys.modules[name]
    sys.path[:] = [path for path in sys.path if path and Path(path).resolve() not in ours]
    gc.freeze()
    running = {}
    while ended not in (ready := select.select([listener, woken, ended], [], [])[0]):
        if woken in ready:
            woken.recv(1000)
            while running and (found := os.waitpid(-1, os.WNOHANG))[0]:
                # whoever asked may have been killed meanwhile
                with running.pop(found[0]) as asking, contextlib.suppress(OSError):
                    asking.sendall(b"%d\n" % os.waitstatus_to_exitcode(found[1]))
        if listener in ready:
            asking, _ = listener.accept()
            if not (child := os.fork()):
                signal.set_wakeup_fd(-1)
                for other in (listener, woken, wakes, *running.values()):
                    other.close()
                answer(asking)
            running[child] = asking


def answer(asking):
    """Run what is asked for in this process."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.alarm(300)  # ends one that hangs
    _, streams, *_ = socket.recv_fds(asking, 1, 3)
    command, env, cwd = json.loads(asking.makefile().readline())
    for i, stream in enumerate(streams):
        os.dup2(stream, i)
        os.close(stream)
    asking.close()
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    run(command)


def run(command):
    """Run a command as python does, and end. Taking torch down would take longer than most
    programs; what was registered to run at exit runs before."""
    sys.stdin, sys.stdout = open(0, closefd=False), open(1, "w", closefd=False)
    sys.stderr = open(2, "w", 1, errors="backslashreplace", closefd=False)
    sys.executable, *words = command
    flags = set()
    while words[0] in ("-P", "-u"):
        flags.add(words.pop(0))
    is_module = words[0] == "-m"
    sys.argv[:] = words[is_module:]
    sys.path[:0] = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    if "-P" not in flags:
        sys.path.insert(0, os.getcwd() if is_module else os.path.dirname(sys.argv[0]))
    status = 0
    try:
        if is_module:
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as e:
        status = e.code if isinstance(e.code, int) else 0 if e.code is None else 1
        if isinstance(e.code, str):
            print(e.code, file=sys.stderr)
    except BaseException:
        status = 1
        sys.excepthook(*sys.exc_info())
    atexit._run_exitfuncs()
    for stream in sys.stdout, sys.stderr:
        stream.flush()
    os._exit(status)


def echo(files, model_name, label_names, needs_base, pipe):
    """Take the place of tools.multitask.hold, in a module that is quick to import in a new
    process."""
    pipe.send([os.getpid(), files, needs_base])


if __name__ == "__main__":
    sys.exit(ask(sys.argv[1:], os.environ, os.getcwd(), [0, 1, 2]))
