"""Which learning rates a study tries, and which one it takes: the rules of run_all.sh, run_grid.sh
and tools.sweep. Validation rows alone decide.

A rate that suits one method, model or data set can leave another untrained, and then a comparison
is one of rates, not of methods. So each method tries three rates, a factor of two apart. While the
best is the highest or the lowest, one beyond it is tried: first two, then four times as far, up to
MOST in all.
"""
import json
import math
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

from common import fail, own_path, warned
from methods import label_of
from settings import (
    asked_settings,
    given,
    make_parser,
    read_flags,
    read_result,
    read_settings,
    short,
)

TRAIN = Path(__file__).with_name("train.py")

FACTOR = 2  # between neighbouring rates
MOST = 6  # rates that a method may try
USUAL_STEPS = 663  # of the runs that found the rates of methods.py: three epochs of 221
LEAST_STEPS = 200  # of a training; with fewer, LoRA has hardly left its start
START_SECONDS = 8  # for a run to import, load and save
EVALUATION = 1.15  # a run's time, with evaluation, to that of its training steps


def first_rates(flags, steps):
    """Return the three learning rates to try first for a run with these flags of train.py, without
    --lr, and so many optimizer steps.

    Fewer steps need larger rates, if not by much: from 1,000 to 58,112 sentences of SST-2 full
    fine-tuning's best rate was between 2e-4 and 5e-5, LoRA's hardly moved (docs/how-much-data.md).
    """
    # lr = default (663 / steps)^(1/4), rounded to a power of FACTOR, so that runs can be reused
    power = round(math.log((USUAL_STEPS / steps) ** 0.25, FACTOR))
    default = asked_settings(make_parser().parse_args(flags)).lr
    centre = default * FACTOR ** power
    return [centre / FACTOR, centre, centre * FACTOR]


def best_rate(tried):
    """Return the entry of `tried` with the best validation score; of equal scores one with
    neighbours on both sides, and then the one with the lower loss. None if no run worked. tried: a
    list of {lr, validation, loss}; a run that failed has a score of None."""
    rates = [entry["lr"] for entry in tried]
    done = [entry for entry in tried if entry["validation"] is not None]
    return max(done, key=lambda e: (e["validation"], min(rates) < e["lr"] < max(rates),
                                    -e.get("loss", 0)), default=None)


def beyond(tried):
    """Return the next rate, beyond the best one, if that is the highest or the lowest that was
    tried; None if it has neighbours on both sides."""
    rates, best = [entry["lr"] for entry in tried], best_rate(tried)
    if best is None or best["lr"] not in (min(rates), max(rates)):
        return None
    factor = FACTOR if len(tried) <= 3 else FACTOR ** 2
    return best["lr"] * factor if best["lr"] == max(rates) else best["lr"] / factor


def next_rate(tried, first):
    """Return the learning rate to try next, or None if the search is over. first: first_rates'."""
    if len(tried) < len(first):
        return first[len(tried)]
    return beyond(tried) if len(tried) < MOST else None


def said_rates(tried):
    """Write what a search tried: 5e-4: 0.8339, 1e-3: 0.8489."""
    ordered = sorted(tried, key=lambda entry: entry["lr"])
    return ", ".join(f"{short(e['lr'])}: " + ("failed" if e["validation"] is None else
                                              f"{e['validation']:.4g}") for e in ordered)


def edge_mark(tried):
    """Return a list with the mark of a best rate that is the highest or lowest of those tried, or
    an empty list."""
    if not tried or (further := beyond(tried)) is None:
        return []
    best = best_rate(tried)["lr"]
    end = "highest" if further > best else "lowest"
    return [f"the best learning rate, {short(best)}, is the {end} that was tried"]


# --- trainings -----------------------------------------------------------------------------------

class Progress:
    """Count the trainings of a study, and say how long the rest will take.

    n: how many are planned; seconds: of one, as expected, until some were timed; at_once: how many
    train side by side."""

    def __init__(self, n, seconds, at_once=1):
        self.n, self.expected, self.at_once = n, seconds, at_once
        self.begun, self.times = set(), []  # results, and seconds

    def __str__(self):
        each = sum(self.times) / len(self.times) / self.at_once if self.times else self.expected
        left = each * (self.n - len(self.begun) + 1)
        return f"{len(self.begun)} of {self.n}, {said_time(left)} left"


def run_program(program, flags, stdout=None):
    """Run a program of a study, a list of Python's arguments, with these flags of train.py, and
    return the finished process. It prints where this program does, also under redirect_stdout. All
    of them share the file of what was warned of."""
    return subprocess.run(
        [sys.executable, *program, *flags], stdin=subprocess.DEVNULL, stdout=stdout or sys.stdout,
        text=True, env={"BERT_WARNED": warned().name, **os.environ, "PYTHONPATH": own_path()})


def trained(flags, progress=None):
    """Return the result of train.py with these flags, trained if it is not there; None if that
    failed."""
    run = read_flags(flags)
    if progress:
        progress.begun.add(run.result)
    if not run.result.exists():
        said, begin = f"[{progress}] " if progress else "", time.perf_counter()
        print(f"== {said}python train.py {shlex.join(flags)}", flush=True)
        if (code := run_program([TRAIN], flags).returncode) < 0:
            fail(f"a training was killed by signal {-code}, perhaps for its memory; the same "
                 "command goes on")
        if code:
            return None  # it has said why
        if progress:
            progress.times.append(time.perf_counter() - begin)
    return read_result(run.result)


def score_name(s):
    """Return the score by which the settings `s` compare."""
    return "f1" if s.is_qa else "f1_macro"


def validation_of(result):
    """Return {validation, loss}: the score of the best epoch, which is the one that is tested, and
    its validation loss; None for both if the run failed."""
    if not result:
        return {"validation": None, "loss": None}
    key = f"validation_{score_name(read_settings(result))}"
    best = max(result["history"], key=lambda epoch: epoch[key])
    return {"validation": best[key], "loss": best["validation_loss"]}


def search(flags, steps, progress=None):
    """Find the learning rate of a method by validation: [{lr, validation, loss}] of all rates that
    were tried. flags: of train.py, without --lr; steps: optimizer steps of a run."""
    first, tried = first_rates(flags, steps), []
    label = label_of(asked_settings(make_parser().parse_args(flags)))
    while lr := next_rate(tried, first):
        if lr not in first and progress:
            progress.n += 1
        own = [*flags, "--lr", f"{lr:g}"]
        is_new = not read_flags(own).result.exists()
        tried.append({"lr": lr, **validation_of(trained(own, progress))})
        if is_new:
            print(f"{label}, validation so far: {said_rates(tried)}", flush=True)
    if not best_rate(tried):
        fail(f"no learning rate worked for {shlex.join(flags)}; see above")
    print(f"== {label}: {short(best_rate(tried)['lr'])} validates best ({said_rates(tried)})",
          flush=True)
    return tried


# --- how much there is to train on ----------------------------------------------------------------

def steps_of(s, examples, epochs=None):
    """Return the number of optimizer steps of a run with the settings `s` on so many examples."""
    steps = (epochs or s.epochs) * math.ceil(examples / s.batch_size)
    return min(steps, s.max_steps or steps)


def said_time(seconds):
    """Write a duration: 40 s, 12 min, 3.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def probe(flags):
    """Return {examples: training examples, seconds: of one step of full fine-tuning} for the flags
    of train.py, as tools.probe measures them. What it says of the data is printed."""
    done = run_program(["-P", "-m", "tools.probe"], flags, subprocess.PIPE)
    if done.returncode:
        sys.exit(1)  # it has said why
    *said, last = done.stdout.splitlines()
    print(*said, sep="\n", flush=True)
    return json.loads(last)


def plan(flags, parts, study, s, searches, more=0, at_once=1):
    """Say what a study will train and how long that will take: (the flags, with --epochs, if those
    of the settings `s` are too few; optimizer steps of a run; Progress). searches: whether learning
    rates are searched first; more: trainings beyond those of its parts; at_once: Progress'."""
    size, epochs = probe([*flags, *parts[0], *study["full"].split()]), s.epochs
    if searches and not s.max_steps and not given("--epochs", flags):
        epochs = max(epochs, math.ceil(LEAST_STEPS / steps_of(s, size["examples"], 1)))
    steps = steps_of(s, size["examples"], epochs)
    if epochs > s.epochs:
        flags = [*flags, "--epochs", str(epochs)]
        print(f"{s.epochs} epochs would be {steps_of(s, size['examples'])} steps, too few to learn "
              f"from: {epochs} epochs, {steps} steps (--epochs takes another number)")
    seconds = START_SECONDS + EVALUATION * steps * size["seconds"]
    least = most = len(parts) * len(study) + more
    if searches:
        least, most = least + 2 * len(study), most + (MOST - 1) * len(study)
        print(f"No learning rate is known for these data: each of {len(study)} methods tries 3 to "
              f"{MOST}, and takes the one that validates best (--lr X takes one for all).")
    how_many, how_long = (" to ".join(dict.fromkeys(map(write, (least, most)))) for write in
                          (str, lambda n: said_time(n * seconds)))
    print(f"{how_many} trainings, those that are finished included, {how_long} in all, if each "
          "takes as long as full fine-tuning", flush=True)
    return flags, steps, Progress(least, seconds, at_once)
