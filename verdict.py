"""What a study says in words, made from its numbers by the rules below and nothing else: what is
lost, what is gained, which method to take, and what these runs cannot tell.

The README's answer is this text for the committed study. Imports nothing slow.
"""
import statistics
from collections import Counter
from typing import NamedTuple

import numpy as np

from spread import macro_f1, two_way_interval

CLOSE = 2  # points below the best that a method may be to be taken for its time, memory or file
NEAR = 1.05  # times the least cost; a smaller difference decides nothing
LARGEST = "always the largest class"  # the floors of sentences and of questions
RANDOM = "a random piece of the passage"
MISSED = 5  # rows; of fewer a good method may miss all
UNSEEN = 3  # of n rows: what befalls 3 in n may befall none of n tested ones (the rule of three)
LEARNED = 0.95  # of the loss of an answer that knows no more than the classes' shares


class Line(NamedTuple):
    """Hold what the verdict reads of one method."""
    name: str  # of the method, as --method takes it
    label: str
    score: float  # in percent
    vs: dict | None  # points, low, high against full fine-tuning; None for that itself
    seconds: float | None  # of an epoch
    gb: float | None  # peak memory
    mb: float | None  # of the trained file
    marks: list  # why it is not ranked


# --- floors and marks ----------------------------------------------------------------------------

def largest_class(labels):
    """Return the scores of always answering the most frequent of the labels (rows,)."""
    (largest, n), = Counter(map(int, labels)).most_common(1)
    return {"label": largest, "f1_macro": macro_f1(labels, np.full(len(labels), largest)),
            "accuracy": n / len(labels)}


def marks_of(labels, predicted, runs, folds=None):
    """Return why a method is not ranked, a list of texts. labels (rows,), predicted (trainings,
    rows) and folds as paired_interval takes them; runs: its results."""
    marks, parts = [], [0] * len(labels) if folds is None else folds
    # chance: to be right with answers of the same shares that know nothing of the texts, which is
    # what Cohen's kappa takes off
    k = 1 + max(labels.max(), predicted.max())
    chance = np.stack([np.bincount(own, minlength=k)[labels] / len(own) for own in predicted])
    if two_way_interval((predicted == labels) - chance, folds)["low"] <= 0:
        marks.append("not shown to beat chance")
    if any(len(np.unique(own[part])) == 1 and np.sum(labels[part] != own[part][0]) >= MISSED
           for own in predicted for part in (np.equal(parts, k) for k in set(parts))):
        marks.append("predicts one class only")
    from scipy.stats import entropy  # scikit-learn's own; slow, and needed here only
    # H = -sum p log p, the loss of an answer that is the classes' shares; results of earlier
    # versions do not hold how often each label was trained on
    tested = np.unique(labels, return_counts=True)[1]
    start = [entropy(run.get("label_counts", tested)) for run in runs]
    least = [min(epoch["train_loss"] for epoch in run["history"]) for run in runs]
    if sum(least) > LEARNED * sum(start):
        marks.append("the training loss has hardly left its start, so that more epochs may help")
    return marks


# --- sentences -----------------------------------------------------------------------------------

def points(vs, digits=1):
    """Write a difference to full fine-tuning, with its interval if that is known."""
    said = [f"{vs[key]:+.{digits}f}" for key in ("points", "low", "high") if key in (vs or ())]
    return f"{said[0]} [{said[1]}, {said[2]}]" if len(said) == 3 else "".join(said)


def even_rows(labels):
    """Return how many rows with as many of each class tell as much of the rarest as the labels
    (rows,) do."""
    counts = np.unique(labels, return_counts=True)[1]
    return len(counts) * int(min(counts))


def is_close(vs, rows):
    """Answer whether a method loses less than CLOSE points on so many even test rows: yes, no, or
    open if its interval holds both."""
    if vs is None:
        return ""
    if vs["high"] < -CLOSE:
        return "no"
    return "yes" if min(vs["low"], -100 * UNSEEN / rows) > -CLOSE else "open"


def several(items, last="and"):
    """Join texts as a list in a sentence."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} {last} {items[-1]}"


def quality(others, rows, n):
    """Say what is lost on so many even test rows by n trainings of each method, and whether that is
    shown."""
    lost = [o for o in others if o.vs["high"] < 0]
    gained = [o for o in others if o.vs["low"] > 0]
    close = [o for o in others if is_close(o.vs, rows) == "yes"]
    unclear = [o for o in others if o.vs["low"] <= 0 <= o.vs["high"] and o not in close]
    where = "" if n > 1 else " on these test rows"
    said = []
    if lost:
        least = max(lost, key=lambda o: o.vs["points"])
        size = f"{-least.vs['points']:.1f} points"
        said.append(f"- **Lost.** A lower score{where} is shown for "
                    + several([o.label for o in lost])
                    + (f": {size}." if len(lost) == 1 else
                       f"; of these, {least.label} loses least, {size}."))
    if close:
        said.append(f"- **Close.** A loss of {CLOSE} points or more is ruled out{where} for "
                    f"{several([o.label for o in close])}.")
    if unclear:
        most = min(100, max(100 * UNSEEN / rows, *(-o.vs["low"] for o in unclear)))
        said.append("- **Perhaps lost.** No difference is shown for "
                    f"{several([o.label for o in unclear])}, but up to {most:.1f} points may be "
                    "lost.")
    if gained:
        said.append(f"- **Better.** A higher score{where} is shown for "
                    f"{several([o.label for o in gained])}.")
    return said


def saved(full, others, costs, ranked=""):
    """Say which methods need less than full fine-tuning of what `costs` names, {field: name}, and
    nothing of what is not known. ranked: the word to add if others are not ranked."""
    saving = {}  # (who needs less, how what they need less of is joined): of what
    for key, what in costs.items():
        if None in [getattr(line, key) for line in (full, *others)]:
            continue
        less, not_less = ([o.label for o in others
                           if (NEAR * getattr(o, key) < getattr(full, key)) is is_less]
                          for is_less in (True, False))
        if not less:
            who = f"No other {ranked}method needs", "or"
        elif len(less) > len(not_less):
            who = (f"All {ranked}but {several(not_less)} need" if not_less else
                   f"All other {ranked}methods need"), "and"
        else:
            who = f"{several(less)} need{'s' * (len(less) == 1)}", "and"
        saving.setdefault(who, []).append(what)
    return [f"{who} less {several(what, last)}." for (who, last), what in saving.items()]


def choices(full, others, memory):
    """Return the rows (what counts, what to take, why) of the verdict's table."""
    ranked = sorted([full, *others], key=lambda line: -line.score)
    best = ranked[0]
    if best is full:
        why = f"{ranked[1].label} comes nearest, {points(ranked[1].vs)} points"
    else:
        shown = "" if best.vs["low"] > 0 else ": the highest score, but no difference is shown"
        why = f"{points(best.vs)} points{shown}"
    rows = [["quality", best.label, why]]
    close = [line for line in ranked if line.score >= best.score - CLOSE]
    for what, key, unit, write in (
            ("time", "seconds", "s an epoch", "{:.1f}".format),
            (memory, "gb", "GB", "{:.2f}".format),
            ("many tasks", "mb", "MB a task",
             lambda v: f"{v:.2g}" if v < 1 else f"{v:.1f}")):
        if None in [getattr(line, key) for line in ranked]:
            continue
        least = min(getattr(line, key) for line in close)
        # the best score of those whose cost is hardly higher
        take = next(line for line in close if getattr(line, key) <= NEAR * least)
        why = f"{write(getattr(take, key))} {unit}"
        if take is not full:
            why = (f"{write(getattr(take, key))} instead of {write(getattr(full, key))} {unit}, "
                   f"for {take.vs['points']:+.1f} points")
        rows.append([what, take.label, why])
    costs = "seconds", "gb", "mb"
    if None not in [getattr(line, key) for line in ranked for key in costs]:
        saving = [line for line in close
                  if all(NEAR * getattr(line, key) < getattr(full, key) for key in costs)]
        rows.append(["nothing in particular", *(
            (saving[0].label, "scores best of those that save time, memory and disk") if saving
            else (best.label, "none that is close to it saves time, memory and disk"))])
    return rows


def verdict(lines, unit, rows, n, what_varies="seed", memory="memory", advice=""):
    """Write the verdict on a study, as Markdown.

    lines: one Line per method; unit: the score's name; rows: how many were tested (even_rows); n:
    trainings of each method; what_varies between the trainings of a method; memory: what that is
    of; advice: what would tell more.
    """
    full = next((line for line in lines if line.name == "full"), None)
    marked = [line for line in lines if line.marks]
    others = [line for line in lines if line is not full and not line.marks]
    ranks = full and not full.marks and others
    out = []
    if ranks:
        costs = {"seconds": "time an epoch", "gb": memory, "mb": "disk for a trained file"}
        gains = saved(full, others, costs, "ranked " * bool(marked))
        out = quality(others, rows, n) + [f"- **Gained.** {' '.join(gains)}"] * bool(gains)
    elif not full:
        out.append("- **No answer.** No run of full fine-tuning is finished, so that there is "
                   "nothing to compare the other methods with.")
    elif full.marks:
        out.append("- **No answer.** Full fine-tuning itself is not ranked, so that these runs do "
                   "not say what the other methods lose.")
    else:
        out.append(f"- **Take full fine-tuning.** It reaches a {unit} of {full.score:.1f} %; no "
                   "other method can be ranked.")
    if marked:
        why = {mark: [o.label for o in marked if mark in o.marks]
               for one in marked for mark in one.marks}
        out.append("- **Not ranked (†).** " + " ".join(
            f"{several(labels)}: {mark}." for mark, labels in why.items()))
    unknown = []
    if ranks:
        half = statistics.median((o.vs["high"] - o.vs["low"]) / 2 for o in others)
        half = min(100, max(half, 100 * UNSEEN / rows))
        unknown.append(f"Runs like these often miss a difference of less than {half:.1f} points.")
        if half > CLOSE and advice:
            unknown.append(advice)
    if n == 1:
        unknown.append("Each method was trained once: the intervals are over test rows alone, and "
                       "another seed may change the order, another hour the times.")
    other = "Other" if n == 1 else f"Other {what_varies}s, other"
    unknown.append(f"{other} data, another model or more rows may give another order.")
    out.append(f"- **Not told.** {' '.join(unknown)}")
    text = "\n".join(out) + "\n"
    if ranks:
        take = f"take (the best of the cheapest, within {CLOSE} points of the top score)"
        table = [["If what counts is", take, "because"], ["---"] * 3,
                 *choices(full, others, memory)]
        text += "\n" + "".join(f"| {' | '.join(cells)} |\n" for cells in table)
    return text


def best_line(lines):
    """Return the Line with the best score of those that are ranked; if none is, of all."""
    ranked = [line for line in lines if not line.marks]
    return max(ranked or lines, key=lambda line: line.score)
