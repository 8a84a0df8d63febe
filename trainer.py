"""Runs that Hugging Face's Trainer left, read as those of the question-answering grid.

    python grid.py --trainer FOLDER

Every folder in FOLDER is a run, told by its name, however it is written, if it names a method, a
number of epochs and a learning rate: 2_epochs_base_qa_2e-4 (base is full fine-tuning),
lora-epoch-3_lr_4.25e-05, qdora_epoch-2_lr_2e-4. Scores are the eval_f1 and eval_exact_match of its
trainer_state.json, or of that in its last checkpoint-N: the evaluation with the best F1, and the
last one. The time is Trainer's train_runtime, of a resumed training its last part; where that is
not written, the one from the first to the last event in tensorboard's files, if tensorboard is
installed; never that of file dates. Evaluation is among both.
"""
import json
import re

from settings import short
from start import fail, warn
from studies import GRID_METHODS

# methods that are not the grid's
UNKNOWN = "adapter|ia3|loraplus|lora[-_+]plus|adalora|loha|lokr|vera|bitfit|prefix|prompt"
METHODS = {"base": "full", "full": "full", "lora": "lora", "qlora": "qlora", "dora": "dora",
           "qdora": "qdora"}


def parse_name(name):
    """(method, epochs, learning rate) of a run's folder, or None if its name does not say each of
    them once. Words are taken whole, so that lora is not found in qlora; numbers are compared as
    numbers."""
    name = re.sub(r"q[-_]?(lora|dora)", r"q\1", re.sub("bert[-_]base", "bert", name.lower()))
    number = r"(?:\d+\.?\d*|\.\d+)(?:e-?\d+)?"
    # lr_2e-4, lr-0.0002; without lr the one number with an exponent
    rates = (re.findall(rf"(?<![a-z])lr[-_=]?({number})(?![a-z\d]|\.\d)", name)
             or re.findall(r"(?<![a-z\d.-])\d+(?:\.\d+)?e-\d+(?![a-z\d])", name))
    epochs = (re.findall(r"(?<![a-z])epochs?[-_=]?(\d+)(?![a-z\d.])", name)
              or re.findall(r"(?<![a-z\d.-])(\d+)[-_]?epochs?(?![a-z\d])", name))
    methods = {METHODS[word] for word in re.findall("[a-z]+", name) if word in METHODS}
    if ({len(rates), len(epochs), len(methods)} != {1} or not float(rates[0])
            or re.search(UNKNOWN, name)):
        return None
    return methods.pop(), int(epochs[0]), float(rates[0])


def find_state(folder):
    """The trainer_state.json of a run: its own, or that of its numerically last checkpoint; or
    None."""
    if (own := folder / "trainer_state.json").exists():
        return own
    checkpoints = {int(path.parent.name.removeprefix("checkpoint-")): path
                   for path in folder.glob("checkpoint-*/trainer_state.json")
                   if path.parent.name.removeprefix("checkpoint-").isdecimal()}
    return checkpoints[max(checkpoints)] if checkpoints else None


def seconds_of_events(folder):
    """Seconds between the first and the last scalar of each of tensorboard's files in a run's
    folder, added up, since a training that was resumed has several; evaluation is among them. None
    where there are no files, or tensorboard is not installed."""
    files = sorted(folder.rglob("events.out.tfevents.*"))
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    except ImportError:
        return None
    seconds = 0.0
    for file in files:
        events = EventAccumulator(str(file)).Reload()
        times = [event.wall_time for tag in events.Tags()["scalars"]
                 for event in events.Scalars(tag)]
        seconds += max(times) - min(times) if times else 0.0
    return seconds or None


def read_run(folder):
    """A result as grid.py knows them, from a run's folder; None if there is no evaluation yet."""
    path = find_state(folder)
    if not path:
        return None
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        log = state["log_history"]
        evaluations = [entry for entry in log if "eval_f1" in entry]
        runtimes = [entry["train_runtime"] for entry in log if "train_runtime" in entry]
        if not evaluations:
            return None
        best, last = max(evaluations, key=lambda e: e["eval_f1"]), evaluations[-1]
        result = {"f1": best["eval_f1"], "exact_match": best.get("eval_exact_match"),
                  "f1_last": last["eval_f1"], "exact_match_last": last.get("eval_exact_match"),
                  "best_epoch": round(best["epoch"], 2),
                  "history": [{"validation_f1": e["eval_f1"]} for e in evaluations]}
        if state.get("global_step", 0) < state.get("max_steps", 0):
            warn(f"{path} ends at step {state['global_step']:,} of {state['max_steps']:,}: what "
                 "came later, if anything did, is not in its scores")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        fail(f"{path} is damaged ({type(e).__name__}: {e})")
    if result["exact_match"] is None:
        fail(f"{path} has eval_f1 but no eval_exact_match")
    seconds = runtimes[-1] if runtimes else seconds_of_events(folder)
    return result | {"train_time_s": seconds, "trainable_params": None, "peak_vram_gb": None,
                     "peak_rss_gb": None}


def read_runs(folder):
    """({run: result}, [names of missing runs]) of a folder of Trainer's runs. A run is missing if
    its method, epochs and rate are there in others, but not together."""
    if not folder.is_dir():
        fail(f"--trainer {folder}: no such folder")
    found, unfinished = {}, set()
    for path in sorted(path for path in folder.iterdir() if path.is_dir()):
        if not (parsed := parse_name(path.name)):
            warn(f"{path} is left out: its name does not say method, epochs and learning rate")
        elif parsed in found:
            fail(f"{found[parsed][0]} and {path} are both {' '.join(map(str, parsed))}")
        elif result := read_run(path):
            method, epochs, lr = parsed
            settings = {"method": method, "epochs": epochs, "lr": lr, "r": None,
                        "task": folder.resolve().name, "data_sha256": None}
            found[parsed] = path, result | {"settings": settings, "trainer": str(folder)}
        else:
            unfinished.add(parsed)
    if not found:
        fail(f"{folder} holds no run of Trainer with an eval_f1 in its trainer_state.json")

    methods, epochs, rates = map(set, zip(*found, *unfinished))
    results, missing = {}, []
    for method in GRID_METHODS:
        for n in sorted(epochs):
            for lr in sorted(rates, reverse=True):
                name = f"{method}_epoch-{n}_lr_{short(lr)}"
                if (method, n, lr) in found:
                    results[name] = found[method, n, lr][1]
                elif method in methods:
                    missing.append(name)
    return results, missing
