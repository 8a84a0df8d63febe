"""Sentences and labels: tables of texts, the tasks, and batches of similar length.

qa.py is the same for questions and passages.
"""
import json
import re
from collections import Counter
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from checks import (
    HEADER_EDGES,
    NUMBER,
    SECOND,
    check_words,
    files_to_read,
    looks_quoted,
    read_table,
    rows_inside,
    warn_labels,
    warn_quoting,
    warn_repeats,
    warn_untested,
)
from common import fail, one_line
from fetch import ratings_file
from settings import RATED_TASKS, SPLIT_SEED
from spread import ece, macro_f1, nll

MOST_WORDS = 200  # in a row for --whole-sentences: n words have n (n + 1) / 2 parts
FOLD_SEED = 2003  # the folds' own: the same for every method, --seed and machine


class Rows(NamedTuple):
    sentences: list  # of str, or of (str, str): pairs
    # of int, positions in Task.label_names; of whatever the file said before make_task
    labels: list


class Task(NamedTuple):
    label_names: list | None  # of str; None for question answering
    train: Rows  # or, for question answering, a list of questions
    validation: Rows
    test: Rows
    note: str  # how the splits came about
    encode: type  # the kind of Encoded that makes batches of a split

    @property
    def has_pairs(self):
        """Tell whether the sentences are pairs."""
        return isinstance(self.train, Rows) and isinstance(self.train.sentences[0], tuple)


# --- tables of texts -----------------------------------------------------------------------------

def read_text(path, line, row, column):
    """Return the text in a column of a row, or None if it is empty."""
    if not isinstance(row[column], str):
        fail(f"{path}, line {line}: {column!r} is {str(row[column])[:40]!r}, not a text")
    return row[column].strip() or None


def label_name(path, line, value, column):
    """Return the label in a column as a text, "" if there is none. A .jsonl's may be a number."""
    if isinstance(value, (list, dict)):
        fail(f"{path}, line {line}: {column!r} is {str(value)[:40]!r}, not a label; a row has one")
    if value is None or value != value:  # not a number
        return ""
    return value.strip() if isinstance(value, str) else json.dumps(value)


def read_file(path, text="sentence", label="label"):
    """Read the Rows of a table with the columns `text` and `label`; with a column `sentence2`, each
    sentence is a pair."""
    rows, breaks, quoted = Rows([], []), [], []  # the last two: see warn_quoting
    for start, row in read_table(path, (text, label)):
        sentence = read_text(path, start, row, text)
        has_pair = SECOND in row and text != SECOND
        pair = (sentence, read_text(path, start, row, SECOND)) if has_pair else None
        if rows.sentences and isinstance(rows.sentences[0], tuple) != bool(pair):
            fail(f"{path}, line {start}: {'a' if pair else 'no'} {SECOND}, unlike the first row")
        name = label_name(path, start, row[label], label)
        if not sentence or not name or pair and not pair[1]:
            lost = text if not sentence else SECOND if pair and not pair[1] else label
            fail(f"{path}, line {start}: no {lost}")
        if (sentence.strip(HEADER_EDGES), name.strip(HEADER_EDGES)) == (text, label):
            fail(f"{path}, line {start}: the header again; delete that line")
        rows.sentences.append(pair or sentence)
        rows.labels.append(name)
        if path.suffix == ".tsv" and (looks_quoted(sentence) or name[0] == '"'):
            quoted.append(start)
        if path.suffix == ".csv":
            breaks += rows_inside(start, row, label)

    if not rows.sentences:
        fail(f"{path} has no rows")
    warn_quoting(path, quoted, breaks, set(rows.labels))
    return rows


# --- splits --------------------------------------------------------------------------------------

def carve(rows, n, seed=SPLIT_SEED):
    """Split off n rows, drawn with a seed and the same share of every label in both: (rest, n
    rows)."""
    from sklearn.model_selection import train_test_split  # slow, and needed to split only
    try:
        rest_x, out_x, rest_y, out_y = train_test_split(
            rows.sentences, rows.labels, test_size=n, stratify=rows.labels, random_state=seed)
    except ValueError as e:
        fail(f"cannot split {len(rows.sentences)} training rows: {e}. Give more rows of each "
             "label, or validation and test files of your own.")
    return Rows(rest_x, rest_y), Rows(out_x, out_y)


def carve_whole(rows, n):
    """Hold out n full sentences of rows that are parts of one another, such as SST-2's phrases;
    drop phrases that occur only in them: (rest, n rows)."""
    if isinstance(rows.sentences[0], tuple):
        fail("--whole-sentences is for sentences, not for pairs")
    texts = [" ".join(sentence.split()) for sentence in rows.sentences]
    if (longest := max(len(text.split()) for text in texts)) > MOST_WORDS:
        fail(f"--whole-sentences is for sentences; one row has {longest:,} words, more than "
             f"{MOST_WORDS}")
    known, wholes = set(texts), {}  # wholes: of each text the whole sentences that it stands in
    for text in sorted(known, key=len, reverse=True):
        if text not in wholes:
            words = text.split()
            pieces = {" ".join(words[i:j + 1]) for i in range(len(words))
                      for j in range(i, len(words))}
            for piece in pieces & known:
                wholes.setdefault(piece, set()).add(text)

    at = [i for i, text in enumerate(texts) if wholes[text] == {text}]
    whole = Rows([rows.sentences[i] for i in at], [rows.labels[i] for i in at])
    _, out = carve(whole, n)
    held = {" ".join(sentence.split()) for sentence in out.sentences}
    rest = [i for i, text in enumerate(texts) if not wholes[text] <= held]
    return Rows([rows.sentences[i] for i in rest], [rows.labels[i] for i in rest]), out


def fold_task(rows, fold):
    """Make the Task of one fold of a pool of rows. fold: "K/N", the K-th of N folds tests.

    Folds are drawn with FOLD_SEED, each with the same share of every label. Every row is a test row
    in exactly one fold. Of the other rows 1,000 are for validation, or a tenth of a small pool. The
    rest are for training.
    """
    k, n = map(int, fold.split("/"))
    label, least = min(Counter(rows.labels).items(), key=lambda item: item[1])
    # one in each fold, and two beside it, of which the split into train and validation makes sure
    if least < (needed := max(n + 1, 4)):
        fail(f"{n} folds need {needed} rows of every label; {label!r} has {least}")
    from sklearn.model_selection import StratifiedKFold  # slow, and needed here only
    parts = StratifiedKFold(n, shuffle=True, random_state=FOLD_SEED)
    others, own = list(parts.split(rows.labels, rows.labels))[k - 1]
    others, test = (Rows([rows.sentences[i] for i in part], [rows.labels[i] for i in part])
                    for part in (others, own))
    train, validation = carve(others, min(1000, len(rows.labels) // 10), FOLD_SEED + k)
    note = f"fold {k} of {n} tests (seed {FOLD_SEED})"
    return make_task(train, validation, test)._replace(note=note)


def make_task(train, validation=None, test=None, whole=False):
    """Make a Task, and fill in the splits that are missing. Labels become positions.

    Without test rows the labelled validation rows are the test. Slices of train (1,000 rows, or a
    tenth of a small set) take the places that are still empty, by whole sentences if asked. The
    task's note says all that.
    """
    names = sorted(set(train.labels), key=str)
    if all(re.fullmatch(NUMBER, str(name)) for name in names):
        names.sort(key=float)  # 10 comes after 9
    if len(names) < 2:
        fail(f"the training rows have only one label, {names[0]!r}; a classifier needs two")
    for split, rows in ("validation", validation), ("test", test):
        if unknown := set(rows.labels if rows else ()) - set(names):
            fail(f"the {split} rows have the label {min(unknown)!r}, which no training row has")
    train, validation, test = (
        rows and Rows(rows.sentences, [names.index(label) for label in rows.labels])
        for rows in (train, validation, test))

    n, notes, n_given = min(1000, len(train.sentences) // 10), [], len(train.sentences)
    if whole and None not in (validation, test):
        fail("--whole-sentences cuts training rows for validation, and here all splits are given")
    cut, what = (carve_whole, " whole sentences") if whole else (carve, "")
    if test is None and validation is not None:
        test, validation = validation, None
        notes.append(f"no test rows: the {len(test.sentences):,} labelled validation rows are the "
                     "test")
    if test is None:
        train, test = cut(train, n)
        notes.append(f"no test rows: {n:,}{what} of train are the test (seed {SPLIT_SEED})")
    if validation is None:
        train, validation = cut(train, n)
        notes.append(f"{n:,}{what} of train validate (seed {SPLIT_SEED})")
    if whole and len(train.sentences) < n_given:
        notes.append(f"{len(train.sentences):,} of {n_given:,} rows are left to train on, the "
                     "parts of these sentences being left out")
    note = "; ".join(notes) or "splits as given"
    return Task([str(name) for name in names], train, validation, test, note, Sentences)


def spread_order(labels):
    """Draw an order of all row numbers, (rows,) ints, whose first n have the labels' shares,
    whatever n is."""
    rng, place = np.random.default_rng(SPLIT_SEED), np.empty(len(labels))
    for label in sorted(set(labels)):
        own = rng.permutation(np.flatnonzero(np.asarray(labels) == label))
        # the k-th row of a label with m rows stands at (k - 1/2) / m of the way
        place[own] = (np.arange(len(own)) + 0.5) / len(own)
    return np.argsort(place, kind="stable")


def train_on(task, n):
    """Keep n of the training rows of a Task. The rows of a small n are among those of a larger."""
    if n > (n_all := len(task.train.labels)):
        fail(f"--train-rows {n}: there are {n_all:,} training rows")
    chosen = np.sort(spread_order(task.train.labels)[:n])
    train = Rows(*([column[i] for i in chosen] for column in task.train))
    if lost := set(task.train.labels) - set(train.labels):
        fail(f"--train-rows {n} leaves no row of the label {task.label_names[min(lost)]!r}")
    note = f"{task.note}; trained on {n:,} of {n_all:,} training rows (seed {SPLIT_SEED})"
    return task._replace(train=train, note=note)


# --- tasks ---------------------------------------------------------------------------------------

def load_rated(name, fold=None):
    """Load rated sentences, label 1 where the mean rating is above zero.

    Ratings within 0.5 of zero are neutral and dropped, as SST-2 drops neutral sentences; so is the
    second of two equal sentences. Of `movies` 8,070 / 1,000 / 1,000 are left, of `products` 2,383 /
    297 / 297, of `tweets` 2,746 / 343 / 343, of `editorials` 2,345 / 293 / 293.
    """
    ratings = {}
    for line in ratings_file(name).read_text(encoding="utf-8").splitlines():
        _, rating, sentence = line.split("\t")
        if abs(float(rating)) >= 0.5:
            ratings.setdefault(sentence.strip(), float(rating))
    labels = ["positive" if r > 0 else "negative" for r in ratings.values()]
    rows, note = Rows(list(ratings), labels), f"stratified with seed {SPLIT_SEED}"
    return fold_task(rows, fold) if fold else make_task(rows)._replace(note=note)


def from_hub(name, config, revision, offline_task):
    """Load the splits of a data set on the Hugging Face hub, a datasets.DatasetDict."""
    import datasets  # slow, and needed here only
    try:
        return datasets.load_dataset(name, config, revision=revision)
    except Exception as e:  # no network shows as any of a dozen exception types
        fail(f"cannot load {name} from the Hugging Face hub ({type(e).__name__}); what works "
             f"offline: --task {offline_task}, or your own files with --data PATH")


# (name on the hub, configuration, column with the text)
HUB = {"sst2": ("nyu-mll/glue", "sst2", "sentence"),
       "ag_news": ("fancyzhx/ag_news", "default", "text")}


def load_hub(task, whole=False):
    """Load a task of HUB.

    GLUE hides its test labels, so sst2's 872 labelled validation rows are the test and 1,000 rows
    of train validate. ag_news has 7,600 test rows, and 1,000 of its 120,000 training rows validate.
    """
    name, config, column = HUB[task]
    splits = from_hub(name, config, None, "movies")
    rows = {split: Rows([text.strip() for text in part[column]], list(part["label"]))
            for split, part in splits.items()}
    labelled = {split: r for split, r in rows.items() if -1 not in r.labels}
    names = splits["train"].features["label"].names
    return make_task(**labelled, whole=whole)._replace(label_names=names)


def load_folder(folder, s):
    """Load the user's own train, validation and test files, or the one file to train on. A label is
    the text in the file."""
    text, label = s.text_column or "sentence", s.label_column or "label"
    if s.text_column or s.label_column:
        print(one_line(f"texts are in the column {text!r}, labels in {label!r}; --text-column and "
                       "--label-column take others"))
    splits = {split: read_file(path, text, label) for split, path in files_to_read(folder).items()}
    kinds = {split: isinstance(rows.sentences[0], tuple) for split, rows in splits.items()}
    if len(set(kinds.values())) > 1:
        with_pairs = sorted(split for split, has_pairs in kinds.items() if has_pairs)
        fail(f"{folder}: only {', '.join(with_pairs)} has a column {SECOND!r}")
    # with a fold, settings.py has seen to it that there are training rows alone
    task = (fold_task(splits["train"], s.fold) if s.fold else
            make_task(**splits, whole=s.whole_sentences))
    warn_labels(task.label_names)
    warn_untested(task.label_names, task.test.labels)
    warn_repeats(task.train.sentences, {"validation": task.validation.sentences,
                                        "test": task.test.sentences})
    return task


def load_sentences(s, folder=None):
    """Load the Task of the settings `s`; folder: the user's own, or the one file."""
    if folder:
        task = load_folder(folder, s)
    elif s.task in RATED_TASKS:
        task = load_rated(s.task, s.fold)
    else:
        task = load_hub(s.task, s.whole_sentences)
    return train_on(task, s.train_rows) if s.train_rows else task


# --- batches -------------------------------------------------------------------------------------

class Encoded:
    """The tokenised rows of one split, for train.py's loop. Sentences and qa.Windows are the two
    kinds. Both have

    n          rows or questions in the split
    metric     the score that picks the best epoch
    ids        list of 1-D int64 tensors, one a row; lengths: their lengths
    usable     the row numbers that may be trained on
    counts     of sentences: the number of rows of each label that occurs; None of questions
    note       what a user should know of these rows, or ""
    collate    row numbers -> the model's inputs, and what the loss needs
    forward    a model and these inputs -> its output, with `loss`, the mean over the rows
    predict    the model's output for some rows -> a list of one prediction a row
    outcome    the predictions for all rows -> {"predictions": [(truth, answer)], one a sentence or
               question, and for sentences "probabilities": [[of each label]]}
    score      this outcome -> {measure: value}
    """
    counts = None

    def batches(self, batch_size, rng=None, by_length=True):
        """Make batches: arrays of row numbers, each row in exactly one, rows of one length
        together.

        So 0.5 % of the tokens are padding instead of the 48 % of random batches (movies, batch 32).
        With `rng` (numpy Generator), for training: only usable rows, rows of equal length shuffled
        before batching, and the batches after it.
        """
        order = np.arange(len(self.ids)) if rng is None else rng.permutation(self.usable)
        if by_length:
            order = order[np.argsort(self.lengths[order], kind="stable")]
        batches = [order[i:i + batch_size] for i in range(0, len(order), batch_size)]
        if rng is not None:
            rng.shuffle(batches)
        return batches

    def pad(self, rows):
        """Pad some rows: input_ids and attention_mask, (batch, tokens) each."""
        ids = pad_sequence([self.ids[i] for i in rows], batch_first=True, padding_value=self.pad_id)
        lengths = torch.from_numpy(self.lengths[rows])
        return ids, (torch.arange(ids.shape[1]) < lengths[:, None]).long()

    def forward(self, model, inputs):
        """Run the model on what collate() gave; the output has `loss`, the mean over the rows."""
        return model(**inputs)

    @staticmethod
    def show(scores):
        """Write scores as a text."""
        return ", ".join(f"{name} {value:.4f}" for name, value in scores.items())


class Sentences(Encoded):
    """Sentences, or pairs of them, as tokens."""
    metric = "f1_macro"

    def __init__(self, rows, tokenizer, s):
        # of a pair that is too long, the longer sentence is cut, token by token
        out = tokenizer(*self.columns(rows.sentences), truncation=True, max_length=s.max_length)
        self.ids = [torch.tensor(i) for i in out["input_ids"]]
        # 1 for the second sentence and its [SEP]; a single sentence needs none
        self.types = ([torch.tensor(t) for t in out["token_type_ids"]]
                      if isinstance(rows.sentences[0], tuple) and "token_type_ids" in out else None)
        self.lengths = np.array([len(i) for i in self.ids])
        self.labels, self.counts = torch.tensor(rows.labels), [*Counter(rows.labels).values()]
        self.n, self.pad_id = len(self.ids), tokenizer.pad_token_id
        self.usable = np.arange(self.n)
        full = [rows.sentences[i] for i in np.flatnonzero(self.lengths == s.max_length)]
        self.n_cut = (sum(len(i) > s.max_length
                          for i in tokenizer(*self.columns(full))["input_ids"]) if full else 0)
        self.note = (f"{self.n_cut:,} of {self.n:,} sentences are cut at {s.max_length} tokens "
                     "(--max-length)") if self.n_cut else ""

    @staticmethod
    def columns(sentences):
        """Return what a tokenizer takes: the list of texts or, of pairs, the list of the first and
        the list of the second."""
        return map(list, zip(*sentences)) if isinstance(sentences[0], tuple) else [sentences]

    def collate(self, rows):
        """Make input_ids, attention_mask, of pairs token_type_ids, (batch, tokens), and labels
        (batch,)."""
        ids, mask = self.pad(rows)
        types = {} if self.types is None else {
            "token_type_ids": pad_sequence([self.types[i] for i in rows], batch_first=True)}
        return {"input_ids": ids, "attention_mask": mask, **types, "labels": self.labels[rows]}

    def predict(self, out, rows):
        """Return the probabilities of the labels, one list per row."""
        return out.logits.double().softmax(-1).tolist()  # in fp32 a small one could become 0

    def outcome(self, probabilities):
        """Return the labels with those predicted, and the probabilities, one per row."""
        predicted = np.argmax(probabilities, axis=1).tolist()
        return {"predictions": list(zip(self.labels.tolist(), predicted)),
                "probabilities": probabilities}

    def score(self, outcome):
        """Return {f1_macro, accuracy, ece}, in [0, 1], and nll in nats."""
        labels, predicted = np.array(outcome["predictions"]).T
        return {"f1_macro": macro_f1(labels, predicted),
                "accuracy": float(np.mean(labels == predicted)),
                "nll": nll(labels, outcome["probabilities"]),
                "ece": ece(labels, outcome["probabilities"])}


def count_classes(task):
    """Say how many training rows each class has; of more than twenty the ten largest and the
    smallest."""
    counts = Counter(task.train.labels).most_common()
    said = [f"{task.label_names[label]} {n:,}" for label, n in counts]
    said[10:] = said[10:] if len(said) <= 20 else [f"..., the smallest {said[-1]}"]
    return one_line(f"{len(counts)} classes: {', '.join(said)} (training rows)")


def encode_splits(task, tokenizer, s):
    """Encode the splits of a Task: ({train, validation, test: Encoded}, what one should know of
    them)."""
    splits = {name: task.encode(getattr(task, name), tokenizer, s)
              for name in ("train", "validation", "test")}
    train = splits["train"]
    check_words(s.model, train.ids, tokenizer)
    if not len(train.usable):
        fail("no window holds the whole of its question's answer; try a larger --max-length or "
             "--stride")
    notes = [task.note, *(f"{name}: {split.note}" for name, split in splits.items() if split.note)]
    print(f"{s.task}:", "\n".join(notes))
    if task.label_names:
        print(count_classes(task))
    print(", ".join(f"{split.n:,} {name}" for name, split in splits.items()) +
          f" rows; training examples: {len(train.usable):,} of {len(train.ids):,}")
    return splits, "; ".join(notes)
