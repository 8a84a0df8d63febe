"""Files: which of a folder are read, how they are told apart, and how results are written whole or
not at all."""
import contextlib
import csv
import glob
import hashlib
import json
import os
import tempfile
from pathlib import Path

from start import fail, warn

# The user's own files: what the file of a split may be called, and of which kinds it may be.
SPLITS = {"train": ("train",), "test": ("test",),
          "validation": ("validation", "val", "valid", "dev", "eval")}
TABLES, QUESTIONS = (".tsv", ".csv", ".jsonl"), ".json"
LOOKS_LIKE_TABLE = (*TABLES, QUESTIONS, ".parquet", ".arrow", ".xls", ".xlsx", ".ods")
MODEL_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json",
               "special_tokens_map.json", "added_tokens.json", "vocab.txt")
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json",
                "pytorch_model.bin", "pytorch_model.bin.index.json")


def list_folder(folder):
    """The names in a folder, sorted."""
    try:
        return sorted(os.listdir(folder))
    except OSError as e:
        fail(f"cannot read {folder}: {e.strerror}")


def data_files(folder):
    """({split: path} of the train, validation and test files in the user's own folder, whether they
    hold questions)."""
    names = list_folder(folder)
    found = {split: [folder / (stem + suffix) for stem in stems for suffix in (*TABLES, QUESTIONS)
                     if stem + suffix in names]
             for split, stems in SPLITS.items()}
    kinds = {path.suffix == QUESTIONS: path.name for paths in found.values() for path in paths}
    if len(kinds) > 1:
        fail(f"{folder} has sentences ({kinds[False]}) and questions ({kinds[True]}); a folder is "
             "for one of the two")
    for paths in found.values():
        if len(paths) > 1:
            fail(f"{folder} has both {paths[0].name} and {paths[1].name}; keep one")
    return {split: paths[0] for split, paths in found.items() if paths}, True in kinds


def files_to_read(folder):
    """{split: path} of the user's own folder, to be read now. Ends without training rows; names
    what looks like a table or a split and is not read."""
    files, has_questions = data_files(folder)
    if "train" not in files:
        fail(f"{folder} has no train.json" if has_questions else
             f"{folder} has neither train.tsv nor train.csv nor train.jsonl, nor train.json with "
             "questions")
    read = {path.name for path in files.values()}
    stems = {stem for of_split in SPLITS.values() for stem in of_split}

    def is_suspect(name):
        stem, *_ = name.lower().split(".")
        return not stems.isdisjoint({stem, Path(name.lower()).stem}) \
            or not set(LOOKS_LIKE_TABLE).isdisjoint(Path(name.lower()).suffixes)  # test.csv.gz

    left = [name for name in list_folder(folder)
            if name not in read and not name.startswith(".") and is_suspect(name)]
    if left:
        fewer = ", ".join(left[:5]) + (f" and {len(left) - 5} more" if len(left) > 5 else "")
        warn(f"{folder}: not read: {fewer}; read are " + ", ".join(sorted(read)))
    return files


def model_files(folder):
    """The files of a model's folder that are read: configuration, tokenizer and one set of weights,
    of several the one that transformers takes."""
    names = list_folder(folder)
    weights = next((name for name in WEIGHT_FILES if name in names), None)
    shards = weights.split(".")[0] + "-" if weights and weights.endswith(".index.json") else None
    return [folder / name for name in names
            if name in (*MODEL_FILES, weights)
            or shards and name.startswith(shards) and name.endswith((".safetensors", ".bin"))]


def fingerprint(files):
    """SHA-256 (first 16 hex digits) of the names and bytes of some files, to tell changed data or
    weights."""
    digest = hashlib.sha256()
    try:
        for path in sorted(files):
            digest.update(os.fsencode(path.name) + b"\0")  # some are not UTF-8
            with open(path, "rb") as file:  # in pieces: it may be larger than the memory
                while piece := file.read(2**20):
                    digest.update(piece)
    except OSError as e:
        fail(f"cannot read {path}: {e.strerror}")
    return digest.hexdigest()[:16]


def part_of(path):
    """A neighbour of `path` that is this process's own, to be written first and then renamed
    (put_in_place)."""
    return path.with_name(f"{path.name}.{os.uname().nodename}-{os.getpid()}.part")


def usual_mode(path):
    """Let others read a file or a folder as they may read every new one (safetensors and tempfile
    make theirs for their owner alone)."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


def put_in_place(part, path):
    """Rename a written file to `path`, which so never exists half-written, whoever else writes
    it."""
    try:
        usual_mode(part)
        with open(part, "rb") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as e:
        fail(f"cannot write {path}: {e.strerror}")


def clear_parts(path):
    """Remove what killed processes of this machine had begun to write for `path`."""
    start = glob.escape(f"{path.name}.{os.uname().nodename}-")
    for part in path.parent.glob(f"{start}*.part"):
        try:
            os.kill(int(part.stem.rsplit("-", 1)[1]), 0)
        except ProcessLookupError:
            with contextlib.suppress(OSError):
                part.unlink()
        except (OSError, ValueError, OverflowError):
            pass  # another user's process, which lives, or no file of ours


def write_whole(path, write):
    """Let `write(part)` make a neighbour file and rename it to `path`."""
    part = part_of(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        clear_parts(path)
        write(part)
    except Exception as e:  # OSError, or safetensors' own for the same causes
        fail(f"cannot write {path}: {e}")
    put_in_place(part, path)


def write_json(path, value):
    text = json.dumps(value, indent=1) + "\n"
    write_whole(path, lambda part: part.write_text(text, encoding="utf-8"))


def write_csv(path, rows):
    """Write dicts of the same keys as a CSV file with a header."""
    def write(part):
        with open(part, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    write_whole(path, write)


def read_json(path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        fail(f"{path} is damaged ({e}); delete it")


def check_writable(folder, flag="--output"):
    """End now, not after the training, if no file can be made in `folder`, which `flag` named."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as e:
        fail(f"cannot write into {folder}: {e.strerror}; choose another {flag}")


def check_name(path):
    """The same if no file can be made that is called `path`."""
    check_writable(path.parent)
    try:
        str(path).encode()  # safetensors takes no other names
        longest = part_of(part_of(path))  # of the best epoch's file
        longest.touch()
        longest.unlink()
        if path.is_dir():
            fail(f"cannot write {path}: it is a folder")
    except UnicodeEncodeError:
        fail(f"cannot write {ascii(str(path))}: the name is not UTF-8; rename that folder")
    except OSError as e:
        fail(f"cannot write {path}: {e.strerror}; a shorter folder name makes a shorter file name")
