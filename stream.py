"""A file of texts or of questions, answered by trained methods: predict.py's --input and --to.

It is read twice: once to find what is wrong with it before anything is answered, and once in chunks
of CHUNK rows, so that a million rows need no more memory than a thousand. After each chunk its rows
lie in TO.part, and TO.progress says how many there are and of what; the same command then goes on
there. TO itself is there when all of it is.
"""
import csv
import json
import os
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from data import Rows, Sentences
from files import check_writable, fingerprint, read_json, write_json
from qa import Question, Windows, question_scores, read_squad
from start import fail, warn

CHUNK = 2048  # rows, or questions, that are sorted by length together
BATCH = 32  # rows, of one length or nearly so
STDIO = Path("-")


# --- files ---------------------------------------------------------------------------------------

def parse_json(line, where):
    try:
        row = json.loads(line)
    except ValueError as e:
        fail(f"{where}: not JSON ({e})")
    if not isinstance(row, dict):
        fail(f"{where}: not an object {{...}}")
    return row


def rows_of_table(file, path):
    is_tsv = path.suffix == ".tsv"  # GLUE's layout: no quoting
    style = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if is_tsv else {"strict": True}
    csv.field_size_limit(2**31 - 1)
    reader = csv.DictReader(file, restkey=0, **style)
    header = reader.fieldnames or []
    if twice := [name for name in header if header.count(name) > 1]:
        fail(f"{path}, line 1: the column {twice[0]!r} is there {header.count(twice[0])} times")
    for row in reader:
        if 0 in row or None in row.values():
            what = "more" if 0 in row else "fewer"
            fail(f"{path}, line {reader.line_num}: {what} fields than the header's {len(header)}")
        yield row


def read_rows(path):
    """The rows of a file, or of stdin, as dicts; ends with its line where one does not fit."""
    try:
        if path == STDIO:
            yield from ({"text": line.rstrip("\r\n")} for line in sys.stdin)
            return
        with open(path, encoding="utf-8-sig", newline="") as file:
            if path.suffix == ".txt":
                yield from ({"text": line.rstrip("\r\n")} for line in file)
            elif path.suffix == ".jsonl":
                yield from (parse_json(line, f"{path}, line {n}") for n, line in enumerate(file, 1)
                            if line.strip())
            else:
                yield from rows_of_table(file, path)
    except UnicodeDecodeError as e:
        fail(f"{path} is not UTF-8: byte {e.object[e.start]:#04x} ({e.reason}); save it as UTF-8")
    except csv.Error as e:
        fail(f"{path}: {e}")
    except OSError as e:
        fail(f"cannot read {path}: {e.strerror}")


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


def check(path, asked):
    """(columns, the one with the texts, number of rows) of an input file, all of it read."""
    columns, n = {}, 0
    for row in read_rows(path):
        columns |= dict.fromkeys(row)
        n += 1
    if not n:
        fail(f"{path} has no rows")
    column = find_column(path, list(columns), asked)
    for i, row in enumerate(read_rows(path), 1):
        if not isinstance(row.get(column), str):
            fail(f"{path}, row {i}: no text in {column!r}")
    return list(columns), column, n


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
    """The rows of an output that are there so far, in a file beside it. identity: what they are
    of."""

    def __init__(self, to, identity):
        self.to, self.identity, self.rows = to, identity, 0
        self.path, self.progress = (to.with_name(to.name + end) for end in (".part", ".progress"))
        before = read_json(self.progress) if self.progress.exists() else {}
        size = self.path.stat().st_size if self.path.exists() else -1
        if identity and before.get("of") == identity and size >= before["bytes"]:
            self.rows = before["rows"]
            os.truncate(self.path, before["bytes"])  # what was half-written
            print(f"going on after {self.rows:,} rows", file=sys.stderr)
        self.file = open(self.path, "a" if self.rows else "w", encoding="utf-8", newline="")

    def keep(self, n):
        """n more rows have been written."""
        self.rows += n
        self.file.flush()
        os.fsync(self.file.fileno())
        if self.identity:
            write_json(self.progress, {"of": self.identity, "rows": self.rows,
                                       "bytes": self.path.stat().st_size})

    def finish(self, make=None):
        """Put the part in the place of the output; make(part file): what is put there instead."""
        self.file.close()
        if make:
            make(self.path)
            self.path.unlink()
        else:
            os.replace(self.path, self.to)
        self.progress.unlink(missing_ok=True)


class Pipe:
    """The same for stdout, which keeps nothing."""

    def __init__(self):
        self.rows, self.file = 0, sys.stdout

    def keep(self, n):
        self.file.flush()

    def finish(self):
        pass


# --- answers -------------------------------------------------------------------------------------

@torch.no_grad()
def classify(method, tokenizer, texts):
    """(probabilities of each text, one list of (labels) a text; how many texts were cut)."""
    split = Sentences(Rows(texts, [0] * len(texts)), tokenizer, method.about["settings"])
    device, answers = next(method.model.parameters()).device, {}
    for rows in split.batches(BATCH):
        inputs = {name: x.to(device) for name, x in split.collate(rows).items() if name != "labels"}
        answers.update(zip(rows.tolist(), split.predict(method.model(**inputs), rows)))
    return [answers[i] for i in range(len(texts))], split.n_cut


@torch.no_grad()
def answer(method, tokenizer, questions):
    """The best span for each Question, as texts."""
    windows = Windows(questions, tokenizer, method.about["settings"])
    device, answers = next(method.model.parameters()).device, {}
    for rows in windows.batches(BATCH):
        inputs = {name: x.to(device) for name, x in windows.collate(rows).items()}
        out = windows.forward(method.model, inputs)
        answers.update(zip(rows.tolist(), windows.predict(out, rows)))
    outcome = windows.outcome([answers[window] for window in range(len(windows.ids))])
    return [text for _, text in outcome["predictions"]]


def label_columns(methods):
    """The columns that are added: each method's label, called as the method, and the probabilities
    of all labels."""
    return [column for method in methods
            for column in (method.name, *(f"{method.name} {label}"
                                          for label in method.about["label_names"]))]


def answered(methods, tokenizer, texts):
    """(a dict of label_columns a text, how many texts were cut). An empty text has no label."""
    rows, most_cut = [{} for _ in texts], 0
    for method in methods:
        labels = method.about["label_names"]
        probabilities, n_cut = classify(method, tokenizer, texts)
        most_cut = max(most_cut, n_cut)
        for row, text, own in zip(rows, texts, probabilities):
            best = labels[max(range(len(own)), key=own.__getitem__)]
            row |= {method.name: best} | {f"{method.name} {label}": round(p, 6)
                                          for label, p in zip(labels, own)}
            if not text.strip():
                row |= dict.fromkeys(row, "")
    return rows, most_cut


# --- the two kinds of input ----------------------------------------------------------------------

def open_output(to, identity):
    if to == STDIO:
        return Pipe()
    if to.exists():
        fail(f"{to} is there already; choose another --to")
    check_writable(to.resolve().parent, "--to")
    return Part(to, identity)


def predict_rows(methods, tokenizer, files, args):
    """Every row of args.input with labels and probabilities, as CSV or JSONL, in args.to."""
    is_stdin, is_json = args.input == STDIO, args.to.suffix == ".jsonl"
    columns, column, n = (["text"], "text", None) if is_stdin else check(args.input, args.column)
    added = label_columns(methods)
    if both := [name for name in added if name in columns]:
        fail(f"{args.input} has a column {both[0]!r} already, which a method is called")
    identity = None if is_stdin else {
        "input": fingerprint([args.input]), "column": column,
        "methods": {name: fingerprint([path]) for name, path in files.items()}}
    out = open_output(args.to, identity)
    writer = csv.DictWriter(out.file, [*columns, *added], lineterminator="\n")
    if not out.rows and not is_json:
        writer.writeheader()

    n_empty = n_cut = 0
    with tqdm(total=n, initial=out.rows, unit="row", disable=None) as bar:
        for chunk in chunks_of(read_rows(args.input), out.rows):
            texts = [row[column] for row in chunk]
            labels, cut = answered(methods, tokenizer, texts)
            n_cut, n_empty = n_cut + cut, n_empty + sum(not text.strip() for text in texts)
            for row, own in zip(chunk, labels):
                if is_json:
                    out.file.write(json.dumps(row | own, ensure_ascii=False) + "\n")
                else:
                    writer.writerow({name: json.dumps(value, ensure_ascii=False)
                                     if isinstance(value, (dict, list)) else value
                                     for name, value in (row | own).items()})
            out.keep(len(chunk))
            bar.update(len(chunk))
    out.finish()
    if n_empty:
        warn(f"{n_empty:,} texts are empty and have no label")
    if n_cut:
        warn(f"{n_cut:,} texts were cut at the {methods[0].about['settings']['max_length']} tokens "
             "that training had")


def predict_questions(methods, tokenizer, files, args):
    """{id: answer}, as SQuAD's script takes it, for a SQuAD JSON; and the scores, if the answers
    are known."""
    if len(methods) > 1:
        fail(f"an answer file is of one method; --method NAME chooses among "
             f"{', '.join(method.name for method in methods)}")
    asked = read_squad(args.input)
    questions = [Question(q["context"], q["question"].strip(), q["answers"]["text"] or [""],
                          None, None) for q in asked]
    identity = {"input": fingerprint([args.input]), "methods": fingerprint(files.values())}
    out = open_output(args.to, identity)
    with tqdm(total=len(asked), initial=out.rows, unit="question", disable=None) as bar:
        for chunk in chunks_of(questions, out.rows):
            for text in answer(methods[0], tokenizer, chunk):
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
    out.finish(make)
