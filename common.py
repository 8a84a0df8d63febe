"""What every program needs: one line for what is wrong, a quiet start, files that are written whole
or not at all, and which files of a user's folder are read. Imports nothing slow.

Imported before anything that may import bitsandbytes.
"""
import atexit
import contextlib
import csv
import fcntl
import functools
import hashlib
import json
import logging
import os
import shlex
import signal
import sys
import tempfile
import warnings
from datetime import timedelta
from pathlib import Path

if os.environ.get("RANK", "0") != "0" or not (sys.stderr and sys.stderr.isatty()):
    os.environ["TQDM_DISABLE"] = "1"  # one of several processes shows a bar, and only to a person
# On some CPUs bitsandbytes, while it is imported, asks a hub for code through the package
# `kernels` and runs it. None is Python's way to say that there is no such package.
sys.modules.setdefault("kernels", None)
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
# where a package that torch no longer uses is installed, it says so in every process
warnings.filterwarnings("ignore", category=FutureWarning, module="torch")


# What the file of a split may be called, and of which kinds it may be.
SPLITS = {"train": ("train",), "test": ("test",),
          "validation": ("validation", "val", "valid", "dev", "eval")}
TABLES, QUESTIONS = (".tsv", ".csv", ".jsonl"), ".json"
CONFIG_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json",
                "special_tokens_map.json", "added_tokens.json", "vocab.txt")
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json",
                "pytorch_model.bin", "pytorch_model.bin.index.json")


# --- how a program begins, speaks and ends -------------------------------------------------------

def one_line(message):
    """Return a text as one line, whatever is in the names that it quotes."""
    return message.replace("\r", "\\r").replace("\n", "\\n")


def fail(message):
    """Exit with one line on stderr and status 1."""
    sys.exit(one_line(f"error: {message}"))


def warn(message):
    """Print one line on stderr about what is legal but perhaps not meant. Of several processes only
    the first speaks, and of a study's programs, which share the file $BERT_WARNED, one."""
    line, said = one_line(f"warning: {message}") + "\n", os.environ.get("BERT_WARNED", os.devnull)
    with open(said, "a+", encoding="utf-8", errors="surrogatepass") as file:
        file.seek(0)
        if os.environ.get("RANK", "0") == "0" and line not in file:
            print(line, end="", file=sys.stderr)
            file.write(line)


def mute():
    """Send what is still to be printed nowhere: its reader has closed the pipe (`| head`)."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def flush():
    """Print what is left. A closed pipe is no error; a full disk is one."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        mute()
    except OSError as e:
        mute()
        print(one_line(f"error: cannot print: {e}"), file=sys.stderr, flush=True)
        os._exit(1)  # a function that runs at exit cannot set the status in another way


def end(kind, error, traceback):
    """Take the place of sys.excepthook: a full disk, a forbidden folder or a full GPU is one
    line."""
    if kind is BrokenPipeError:
        mute()
    elif kind.__name__ in ("OutOfMemoryError", "MemoryError") or "CPUAllocator" in str(error):
        device = "GPU" if kind.__name__ == "OutOfMemoryError" else "machine"  # torch's names
        print(f"error: the {device} has no memory left; in training, --accumulation 2 computes the "
              "same batches in halves", file=sys.stderr)
    elif issubclass(kind, OSError):
        print(one_line(f"error: {error}"), file=sys.stderr)
        try:
            sys.stdout.flush()
        except OSError:
            mute()
    else:
        sys.__excepthook__(kind, error, traceback)


def start():
    """Call first in a program. Ctrl-C exits quietly, which is safe because files are written whole;
    a closed pipe is no error; characters that a terminal cannot show are escaped."""
    if sys.flags.optimize > 1:
        fail("python -OO drops the texts that transformers needs to start; run it without -OO and "
             "PYTHONOPTIMIZE=2")
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.excepthook = end
    # None where they were closed (`>&-`)
    sys.stdout = sys.stdout or open(os.devnull, "w")
    sys.stderr = sys.stderr or open(os.devnull, "w")
    atexit.register(flush)
    for stream in sys.stdout, sys.stderr:
        if hasattr(stream, "reconfigure"):  # a notebook's have no encoding
            stream.reconfigure(errors="backslashreplace")


def meet_processes(gpu=None):
    """Let torchrun's processes meet, if they have not, over NCCL between GPUs and Gloo between
    CPUs. gpu: the torch.device of this one's. They may wait for hours, while one downloads."""
    import torch.distributed as dist  # slow
    if not dist.is_initialized():
        # with device_id the first barrier opens no context on another GPU (torch's documentation)
        dist.init_process_group("nccl" if gpu else "gloo", timeout=timedelta(hours=4),
                                device_id=gpu)


def own_path():
    """Return $PYTHONPATH with this folder, which PYTHONSAFEPATH=1 hides, before what is in it."""
    given = os.environ.get("PYTHONPATH")
    return os.pathsep.join([str(Path(__file__).parent), *filter(None, [given])])


def command():
    """Return the command line of this program, for the file that it writes."""
    file = Path(sys.argv[0])
    is_tool = file.parent.name == "tools"
    program = ["-m", f"tools.{file.stem}"] if is_tool else [file.name]
    return shlex.join(["python", *program, *sys.argv[1:]])


# --- files that are written ----------------------------------------------------------------------

def usual_mode(path):
    """Let others read a file or folder as they may read every new one: tempfile and safetensors
    make theirs for their owner alone. Some network and cloud mounts have no modes to set."""
    mask = os.umask(0)
    os.umask(mask)
    with contextlib.suppress(OSError):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


def write_whole(path, write):
    """Let write(part) fill a temporary file beside `path`, then rename it to `path`. So `path`
    never exists half-written, whoever else writes it."""
    part = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, part = tempfile.mkstemp(".part", f"{path.name[:100]}.", path.parent)
        os.close(handle)
        part = Path(part)
        write(part)
        usual_mode(part)
        with open(part, "rb") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except Exception as e:  # OSError, or safetensors' own for the same causes
        fail(f"cannot write {path}: {e}")
    finally:  # also where write() itself exits
        if part:
            Path(part).unlink(missing_ok=True)


def write_text(path, text):
    """Write a text as UTF-8."""
    write_whole(path, lambda part: part.write_text(text, encoding="utf-8"))


def write_json(path, value):
    """Write a value as JSON."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_csv(path, rows):
    """Write dicts that have the same keys as a CSV file with a header."""
    def write(part):
        with open(part, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    write_whole(path, write)


def write_columns(path, columns):
    """Write {column: values} as a CSV file with a header."""
    write_csv(path, [dict(zip(columns, row)) for row in zip(*columns.values())])


def read_columns(path):
    """Read what write_csv wrote, as {column: texts}. Raises OSError or ValueError."""
    with open(path, newline="", encoding="utf-8") as file:
        head, *rows = csv.reader(file)
    return dict(zip(head, zip(*rows)))


@contextlib.contextmanager
def alone(folder):
    """Let one program at a time read and rewrite the files of a folder. Where the file system has
    no locks it waits for nobody."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            lock = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, lock)  # closing is unlocking
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def as_written(path):
    """Exit with one line if a file is not as this project writes it."""
    try:
        yield
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as e:
        fail(f"{path} is damaged or of an earlier version ({type(e).__name__}: {e}); delete it, "
             "and what made it makes it anew")


def read_json(path, *keys):
    """Read a JSON object that this project wrote, which has these keys."""
    check_ordinary(path)
    with as_written(path):
        content = json.loads(path.read_text(encoding="utf-8"))
        if missing := set(keys) - content.keys():
            raise LookupError(f"no {min(missing)}")
    return content


def check_writable(folder, flag="--output"):
    """Exit now, not after the training, if no file can be made, written to the disk and renamed in
    `folder`, which `flag` named."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as made:
            Path(made, "part").write_text("as write_whole does it")
            with open(Path(made, "part"), "rb") as file:
                os.fsync(file.fileno())
            os.replace(Path(made, "part"), Path(made, "whole"))
    except OSError as e:
        fail(f"cannot write into {folder}: {e.strerror}; choose another {flag}")


def check_name(path):
    """Exit now, not after the training, if no file can have the name `path`."""
    check_writable(path.parent)
    try:
        str(path).encode()  # safetensors takes no other names
        if path.is_dir():
            fail(f"cannot write {path}: it is a folder")
    except UnicodeEncodeError:
        fail(f"cannot write {ascii(str(path))}: the name is not UTF-8; rename that folder")
    except OSError as e:
        fail(f"cannot write {path}: {e.strerror}; a shorter folder name makes a shorter file name")


@functools.cache
def warned():
    """Make the file of what the programs of a study have warned of. It goes with this program."""
    return tempfile.NamedTemporaryFile()


# --- files that are read --------------------------------------------------------------------------

def list_folder(folder):
    """Return the names in a folder, sorted."""
    try:
        return sorted(os.listdir(folder))
    except OSError as e:
        fail(f"cannot read {folder}: {e.strerror}")


def check_ordinary(path):
    """Exit if a path is a named pipe or a device: it can be read once or never ends, and here files
    are read more than once."""
    if path.exists() and not (path.is_file() or path.is_dir()):
        fail(f"{path} is no ordinary file; write what it gives to one")


def some_of(names):
    """Write some names as a text, the first five of many."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if names[5:] else "")


def data_files(path):
    """Find the user's own train, validation and test files: ({split: path}, whether they hold
    questions). path: the file to train on, a folder with `train`, or one with a single table."""
    if os.path.isfile(path):
        if path.suffix not in (*TABLES, QUESTIONS):
            fail(f"--data {path}: {', '.join(TABLES)} are read, and {QUESTIONS} with questions")
        return {"train": path}, path.suffix == QUESTIONS
    names = list_folder(path)
    found = {split: [path / (stem + suffix) for stem in stems for suffix in (*TABLES, QUESTIONS)
                     if stem + suffix in names]
             for split, stems in SPLITS.items()}
    if not found["train"]:
        tables, questions = ([name for name in names if name.endswith(end) and name[0] != "."]
                             for end in (TABLES, QUESTIONS))
        own = tables or questions
        if len(own) != 1 or any(found.values()):
            fail(f"{path} has no train file; its tables ({', '.join(TABLES)}, or {QUESTIONS} with "
                 f"questions): {some_of(own) or 'none'}; call one of them train, or give --data "
                 "the one file to train on")
        found["train"] = [path / own[0]]
    kinds = {file.suffix == QUESTIONS: file.name for files in found.values() for file in files}
    if len(kinds) > 1:
        fail(f"{path} has sentences ({kinds[False]}) and questions ({kinds[True]}); a folder is "
             "for one of the two")
    for files in found.values():
        if len(files) > 1:
            fail(f"{path} has both {files[0].name} and {files[1].name}; keep one")
    return {split: files[0] for split, files in found.items() if files}, True in kinds


def model_files(folder):
    """Return the files of a model's folder that are read: configuration, tokenizer and one set of
    weights, of several the one that transformers takes."""
    names = list_folder(folder)
    weights = next((name for name in WEIGHT_FILES if name in names), None)
    shards = weights.split(".")[0] + "-" if weights and weights.endswith(".index.json") else None
    return [folder / name for name in names
            if name in (*CONFIG_FILES, weights)
            or shards and name.startswith(shards) and name.endswith((".safetensors", ".bin"))]


def fingerprint(files):
    """Return the SHA-256 (first 16 hex digits) of the names and bytes of some files, to tell
    changed data or weights."""
    digest = hashlib.sha256()
    try:
        for path in sorted(files):
            check_ordinary(path)
            digest.update(os.fsencode(path.name) + b"\0")  # some names are not UTF-8
            with open(path, "rb") as file:  # in pieces: it may be larger than the memory
                while piece := file.read(2**20):
                    digest.update(piece)
    except OSError as e:
        fail(f"cannot read {path}: {e.strerror}")
    return digest.hexdigest()[:16]
