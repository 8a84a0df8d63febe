"""A file of texts or of questions, answered by trained methods: predict.py's --input and --to.

It is read to find what is wrong with it before anything is answered, and again in chunks of CHUNK
rows, so that a million rows need no more memory than a thousand. After each chunk its rows
lie in TO.part, and TO.progress says how many there are and of what; the same command then goes on
there. TO itself is there when all of it is.
"""
import csv
import fcntl
import json
import os
import sys
from collections import Counter
from pathlib import Path

import torch
from tqdm import tqdm

from checkpoint import files_of
from data import SECOND, Rows, Sentences
from files import fingerprint, read_json, write_json
from model import amp_dtype, autocast
from qa import Question, Windows, question_scores, read_squad
from start import fail, warn
from tables import STDIN, read_table

CHUNK = 2048  # rows, or questions, that are sorted by length together
BATCH = 32  # rows, of one length or nearly so
STDOUT = Path("-")


# --- files ---------------------------------------------------------------------------------------

def find_column(path, columns, asked):
    """The name of the column with the texts: as asked, else sentence, else text, else the only
    one."""
    if asked and asked not in columns:
        fail(f"{path} has no column {asked!r}; it has {', '.join(columns)}")
    for name in (asked, "sentence", "text"):
        if name in columns:
            return name
    if len(columns) == 1:
        return columns[0]
    fail(f"{path} has the columns {', '.join(columns)}; --column says which holds the texts")


def check(path, asked, has_pairs):
    """(columns, those with the texts, number of rows) of an input file, all of it read."""
    columns, n = {}, 0
    for _, row in read_table(path):
        columns |= dict.fromkeys(row)
        n += 1
    if not n:
        fail(f"{path} has no rows")
    texts = [find_column(path, list(columns), asked)] + [SECOND] * has_pairs
    if SECOND in columns and SECOND not in texts:
        warn(f"{path}: {SECOND} is not read; as far as is known these methods were trained on "
             "single sentences")
    if SECOND in texts and SECOND not in columns:
        fail(f"{path} has no column {SECOND!r}, and these methods were trained on pairs")
    for line, row in read_table(path, texts):
        for column in texts:
            if not isinstance(row[column], str):
                fail(f"{path}, line {line}: no text in {column!r}")
    return list(columns), texts, n


def chunks_of(rows, skip):
    """Lists of CHUNK rows, without the first `skip`."""
    chunk = []
    for i, row in enumerate(rows):
        if i >= skip:
            chunk.append(row)
        if len(chunk) == CHUNK:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


class Part:
    """The rows of an output that are there so far, in a file beside it. identity: what they are of;
    rows: how many there are; counts: what else is counted."""

    def __init__(self, to, identity):
        self.to, self.identity, self.rows, self.counts = to, identity, 0, Counter()
        self.path, self.progress = (to.with_name(to.name + end) for end in (".part", ".progress"))
        self.file = open(self.path, "a", encoding="utf-8", newline="")
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fail(f"another process is writing {self.path}")
        before = read_json(self.progress) if self.progress.exists() else {}
        is_whole = before and self.path.stat().st_size >= before["bytes"]
        if is_whole and identity and before["of"] == identity:
            self.rows, self.counts = before["rows"], Counter(before["counts"])
            self.file.truncate(before["bytes"])  # what was half-written
            print(f"going on after {self.rows:,} rows", file=sys.stderr)
        elif is_whole:
            self.file.close()  # and with it the lock
            fail(f"{self.path} holds {before['rows']:,} answers to another input, or of other "
                 "methods; the command that began it goes on, or delete it, or choose another --to")
        else:
            self.progress.unlink(missing_ok=True)  # what it speaks of is gone
            self.file.truncate(0)

    def keep(self, n):
        """n more rows have been written."""
        self.rows += n
        self.file.flush()
        os.fsync(self.file.fileno())
        if self.identity:
            write_json(self.progress, {"of": self.identity, "rows": self.rows,
                                       "counts": self.counts, "bytes": self.path.stat().st_size})

    def finish(self, what, make=None):
        """Put the part in the place of the output and say so; what: its rows are called that;
        make(part file): puts something else there."""
        self.file.flush()
        if make:
            make(self.path)
            self.path.unlink()
        else:
            os.replace(self.path, self.to)
        self.progress.unlink(missing_ok=True)
        self.file.close()  # and lets others write
        print(f"wrote {self.to}: {self.rows:,} {what}")


class Pipe:
    """The same for stdout, which keeps nothing."""

    def __init__(self):
        self.rows, self.file, self.counts = 0, sys.stdout, Counter()
        if hasattr(sys.stdout, "reconfigure"):  # as files are, whatever the locale
            sys.stdout.reconfigure(encoding="utf-8")

    def keep(self, n):
        self.file.flush()

    def finish(self, what):
        pass


# --- answers -------------------------------------------------------------------------------------

def precision(method):
    """The context of a forward pass: autocast in what this machine computes fast, unless the run
    that is asked had --amp off."""
    device = next(method.model.parameters()).device
    is_off = method.about["settings"].get("amp") == "off"  # peft's folders do not say
    return autocast(device, amp_dtype("off" if is_off else "auto", device))


@torch.no_grad()
def classify(method, tokenizer, texts):
    """(probabilities of each text, one list of (labels) a text; how many texts were cut)."""
    split = Sentences(Rows(texts, [0] * len(texts)), tokenizer, method.about["settings"])
    device, answers = next(method.model.parameters()).device, {}
    for rows in split.batches(BATCH):
        inputs = {name: x.to(device) for name, x in split.collate(rows).items() if name != "labels"}
        with precision(method):
            out = method.model(**inputs)
        answers.update(zip(rows.tolist(), split.predict(out, rows)))
    return [answers[i] for i in range(len(texts))], split.n_cut


@torch.no_grad()
def answer(method, tokenizer, questions):
    """(text, its first character in the passage) of the best span for each Question."""
    windows = Windows(questions, tokenizer, method.about["settings"])
    device, answers = next(method.model.parameters()).device, {}
    for rows in windows.batches(BATCH):
        inputs = {name: x.to(device) for name, x in windows.collate(rows).items()}
        with precision(method):
            out = windows.forward(method.model, inputs)
        answers.update(zip(rows.tolist(), windows.predict(out, rows)))
    best = windows.best([answers[window] for window in range(len(windows.ids))])
    return [(text, start) for _, text, start in best]


def label_columns(methods):
    """The columns that are added: each method's label, called as the method, and the probabilities
    of all labels."""
    return [column for method in methods
            for column in (method.name, *(f"{method.name} {label}"
                                          for label in method.about["label_names"]))]


def is_empty(text):
    return not all(part.strip() for part in ([text] if isinstance(text, str) else text))


def answered(methods, tokenizer, texts):
    """(a dict of label_columns a text, how many texts were cut, at most). An empty text has no
    label."""
    rows, most_cut = [{} for _ in texts], 0
    for method in methods:
        labels = method.about["label_names"]
        probabilities, n_cut = classify(method, tokenizer, texts)
        most_cut = max(most_cut, n_cut)
        for row, text, own in zip(rows, texts, probabilities):
            best = labels[max(range(len(own)), key=own.__getitem__)]
            row |= {method.name: best} | {f"{method.name} {label}": round(p, 6)
                                          for label, p in zip(labels, own)}
            if is_empty(text):
                row |= dict.fromkeys(row, "")
    return rows, most_cut


# --- the two kinds of input ----------------------------------------------------------------------

def identity_of(files, args):
    """What decides the answers of {name: checkpoint} to args.input, as a dict for JSON."""
    return {"input": fingerprint([args.input]),
            "model": args.model and str(Path(args.model).resolve()),
            "methods": [fingerprint(files_of(path)) for path in files.values()]}


def predict_rows(methods, tokenizer, files, args):
    """Every row of args.input with labels and probabilities, as CSV or JSONL, in args.to."""
    is_stdin, is_json = args.input == STDIN, args.to.suffix == ".jsonl"
    has_pairs = methods[0].about["pairs"]
    if len({method.about["pairs"] for method in methods}) > 1 or has_pairs and is_stdin:
        fail("methods trained on pairs of sentences answer files alone, and not beside others")
    columns, texts, n = ((["text"], ["text"], None) if is_stdin else
                         check(args.input, args.column, has_pairs))
    added = label_columns(methods)
    if both := [name for name in added if name in columns]:
        fail(f"{args.input} has a column {both[0]!r} already, which a method is called")
    identity = None if is_stdin else identity_of(files, args) | {
        "texts": texts, "columns": [*columns, *added]}
    out = Pipe() if args.to == STDOUT else Part(args.to, identity)
    writer, careful = (csv.writer(out.file, lineterminator="\n", quoting=quoting)
                       for quoting in (csv.QUOTE_MINIMAL, csv.QUOTE_ALL))

    def write(cells):
        # csv leaves a lone carriage return unquoted, which ends a row when it is read
        has_return = any("\r" in cell for cell in cells if isinstance(cell, str))
        (careful if has_return else writer).writerow(cells)

    if not out.rows and not is_json:
        write([*columns, *added])

    with tqdm(total=n, initial=out.rows, unit="row", disable=None) as bar:
        for chunk in chunks_of((row for _, row in read_table(args.input)), out.rows):
            asked = [tuple(row[name] for name in texts) if has_pairs else row[texts[0]]
                     for row in chunk]
            labels, cut = answered(methods, tokenizer, asked)
            out.counts.update(cut=cut, empty=sum(map(is_empty, asked)))
            for row, own in zip(chunk, labels):
                if is_json:
                    out.file.write(json.dumps(row | own, ensure_ascii=False) + "\n")
                else:
                    write([json.dumps(value, ensure_ascii=False)
                           if isinstance(value, (dict, list)) else value
                           for value in map((row | own).get, [*columns, *added])])
            out.keep(len(chunk))
            bar.update(len(chunk))
    out.finish("rows")
    if out.counts["empty"]:
        warn(f"{out.counts['empty']:,} of the texts are empty and have no label")
    if out.counts["cut"]:
        lengths = sorted({method.about["settings"]["max_length"] for method in methods})
        warn(f"{out.counts['cut']:,} of the texts were cut at the "
             f"{' or '.join(map(str, lengths))} tokens that training had")


def predict_questions(methods, tokenizer, files, args):
    """{id: answer}, as SQuAD's script takes it, for a SQuAD JSON; and the scores, if the answers
    are known."""
    if len(methods) > 1:
        fail(f"an answer file is of one method; --method NAME chooses among "
             f"{', '.join(method.name for method in methods)}")
    asked = read_squad(args.input)
    name, n = Counter(q["id"] for q in asked).most_common(1)[0]
    if n > 1:
        fail(f"{args.input}: {n} questions have the id {name!r}, and an answer file tells them by "
             "it")
    questions = [Question(q["context"], q["question"].strip(), q["answers"]["text"] or [""],
                          None, None) for q in asked]
    out = Part(args.to, identity_of(files, args))
    with tqdm(total=len(asked), initial=out.rows, unit="question", disable=None) as bar:
        for chunk in chunks_of(questions, out.rows):
            for text, _ in answer(methods[0], tokenizer, chunk):
                out.file.write(json.dumps(text) + "\n")
            out.keep(len(chunk))
            bar.update(len(chunk))

    def make(part):
        answers = [json.loads(line) for line in part.read_text(encoding="utf-8").splitlines()]
        write_json(args.to, {q["id"]: text for q, text in zip(asked, answers)})
        known = [(q["answers"]["text"], text) for q, text in zip(asked, answers)
                 if q["answers"]["text"]]
        if known:
            scores = {name: sum(own) / len(own) for name, own in question_scores(known).items()}
            print(f"F1 {scores['f1']:.2f}, exact match {scores['exact_match']:.2f} "
                  f"({len(known):,} questions)")
    out.finish("answers", make)
