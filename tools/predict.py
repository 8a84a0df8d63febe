"""Ask the trained methods: all those of a comparison on one shared base, side by side.

    python -m tools.predict                           five ambiguous sentences, by every method of
                                                      run_all.sh
    python -m tools.predict "your sentence" "another"     your own; or one per line on stdin
    python -m tools.predict --question "Who?" --context "A passage."
                                                      the best run of every method of run_grid.sh
    python -m tools.predict --input reviews.csv --to labelled.csv
                                                      every row of a .csv, .tsv, .jsonl or .txt (or
                                                      of stdin: -), with labels and probabilities
    python -m tools.predict --input dev.json --to answers.json --method lora
                                                      every question of a SQuAD file

A table is read twice: first to find errors, then in chunks to answer it, so that a million rows
need no more memory than a thousand. Stdin is read once. A file that --to names is written whole or
not at all.
"""
if not __package__:
    raise SystemExit("error: run this from the project's folder: python -m tools.predict")

import argparse
import sys
from pathlib import Path

from common import check_writable, fail, start
from settings import Parser

SENTENCES = ["It is hard to dislike.",
             "You will laugh, though perhaps not where the director hoped.",
             "An honest failure is worth more than this polished success.",
             "Only the dog can act, but what a dog!",
             "The jokes are older than the actors, and just as much fun."]
STDOUT = Path("-")


def check_files(args):
    """Exit if --input, --to and the rest do not go together."""
    if not args.input or not args.to:
        fail("--input and --to go together")
    if args.sentences or args.question is not None or args.context is not None:
        fail("give sentences, a question, or --input")
    kind, is_stdin = args.input.suffix, str(args.input) == "-"
    if not is_stdin and kind not in (".txt", ".tsv", ".csv", ".jsonl", ".json"):
        fail(f"--input {args.input}: .txt, .tsv, .csv and .jsonl are read, .json with questions, "
             "and - for stdin")
    if kind == ".json" and args.to.suffix != ".json":
        fail(f"--to {args.to}: it must end in .json")
    if kind != ".json" and args.to != STDOUT and args.to.suffix not in (".csv", ".jsonl"):
        fail(f"--to {args.to}: it must end in .csv or .jsonl, or be - for stdout")
    if args.column and (is_stdin or kind in (".txt", ".json")):
        fail("--column is for .csv, .tsv and .jsonl")
    if args.to != STDOUT:
        if args.to.exists():
            fail(f"{args.to} already exists; choose another --to")
        check_writable(args.to.resolve().parent, "--to")


def check_texts(args):
    """Exit if the texts on the command line cannot be asked; take them from stdin, or SENTENCES, if
    there are none."""
    if (args.question is None) != (args.context is None):
        fail("--question and --context go together")
    if args.question is not None and args.sentences:
        fail("give sentences, or --question and --context")
    for name, text in [("--question", args.question), ("--context", args.context)]:
        if text is not None and not text.strip():
            fail(f"{name} is empty")
    try:
        if args.question is None and not args.sentences and sys.stdin and not sys.stdin.isatty():
            args.sentences = [line.strip() for line in sys.stdin if line.strip()]
        for text in (*args.sentences, args.question or "", args.context or ""):
            text.encode()  # in some locales Python lets through what is not UTF-8
    except UnicodeError as e:
        fail(f"a text is not UTF-8 ({e.reason})")
    if not all(sentence.strip() for sentence in args.sentences):
        fail("a sentence is empty")
    args.sentences = args.sentences or SENTENCES


def parse_args(argv=None):
    start()
    p = Parser(description=__doc__, allow_abbrev=False,
               formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("sentences", nargs="*", metavar="SENTENCE",
                   help="what to classify (default: stdin, if there is any, else five sentences)")
    p.add_argument("--question", metavar="TEXT", help="what to answer from --context")
    p.add_argument("--context", metavar="TEXT", help="the passage that holds the answer")
    p.add_argument("--input", type=Path, metavar="FILE",
                   help="a file of texts or questions; - is stdin, one text per line")
    p.add_argument("--to", type=Path, metavar="FILE",
                   help="its answers: .csv, .jsonl, for questions .json; - is stdout, as CSV")
    p.add_argument("--column", metavar="NAME", help="the column of --input with the texts "
                   "(default: that of training, or sentence, or text, or the only one)")
    which = p.add_mutually_exclusive_group()
    which.add_argument("--method", metavar="NAME",
                       help="only this one, as the table names it (default: all)")
    which.add_argument("--checkpoint", type=Path, action="append", metavar="FILE",
                       help="ask this instead, any that train.py left in checkpoints/, or a peft "
                            "folder; give it several times to compare")
    p.add_argument("--model", metavar="FOLDER",
                   help="where the base is, if it was a folder (default: as in training)")
    p.add_argument("--output", type=Path, default=Path(__file__).parents[1], metavar="DIR",
                   help="where metrics/ and checkpoints/ are (default: the project's folder)")
    args = p.parse_args(argv)
    if args.input or args.to or args.column:
        check_files(args)
    else:
        check_texts(args)
    return args


ARGS = parse_args() if __name__ == "__main__" else None  # before the slow imports

import csv
import functools
import json
import os
import statistics
import time
from collections import Counter
from itertools import islice
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import train
from checkpoint import attach, check_tokenizer, read_about
from checks import SECOND, STDIN, looks_quoted, read_table, rows_inside, warn_quoting
from common import warn, write_json, write_whole
from data import Rows, Sentences
from model import amp_dtype, place
from qa import Question, Windows, question_scores, read_squad
from settings import chosen_amp
from tools.export import find, load_base, name_files

CHUNK_ROWS = 2048  # rows, or questions, that are sorted by length together


# --- trained methods -----------------------------------------------------------------------------

class Trained(NamedTuple):
    name: str
    model: torch.nn.Module
    about: dict  # the checkpoint's metadata
    megabytes: float  # of the checkpoint
    switch_ms: float  # from the file to a model on the shared base


def check_kinds(files, is_qa, has_input):
    """Exit if one of {name: checkpoint} cannot be asked what is asked."""
    for name, path in files.items():
        about = read_about(path)
        if is_qa is not about["settings"].is_qa:
            fail(f"{name} was trained on "
                 + ("sentences, not on questions" if is_qa else
                    "questions; it needs --question and --context, or a .json"))
        if about["pairs"] and not has_input:
            fail(f"{name} was trained on pairs of sentences; --input FILE with the columns "
                 "sentence and sentence2 asks it")


def milliseconds(act, n=1):
    """Return (what act() returns, the median of n times that it takes, after one that warms up)."""
    result, times = act(), []
    for _ in range(n):
        begin = time.perf_counter()
        act()
        times.append(1000 * (time.perf_counter() - begin))
    return result, statistics.median(times)


def load_methods(files, model_name=None):
    """Load {name: checkpoint} onto one base: (tokenizer, [Trained])."""
    first, *_ = files.values()
    trained_on = read_about(first)["settings"].model
    tokenizer, base, base_hash = load_base(first, model_name)
    methods = []
    for name, path in files.items():
        (model, about), switch_ms = milliseconds(lambda: attach(base, base_hash, path))
        check_tokenizer(path, about, tokenizer)
        own = about["settings"].model
        if about["base"] is None and own != trained_on and not model_name:
            fail(f"{path} is for the base {own}, and {first} for {trained_on}; if they are the "
                 "same, --model FOLDER says where it is")
        methods.append(Trained(name, model, about, path.stat().st_size / 1e6, switch_ms))
    return tokenizer, methods


# --- answers -------------------------------------------------------------------------------------

def outputs(method, split, is_file):
    """Return one prediction per row of an Encoded split. A single text is asked in fp32; a file in
    what this machine computes fast, unless the run had --amp off."""
    is_fast = is_file and method.about["settings"].amp != "off"
    device = next(method.model.parameters()).device
    dtype = amp_dtype(chosen_amp("auto" if is_fast else "off"))
    amp = torch.autocast(device.type, dtype, enabled=dtype is not None)
    return train.predict(method.model, split, device, amp)[1]


def encode(method, tokenizer, texts):
    """Encode texts as a method read those of its training; n_cut says how many were cut."""
    return Sentences(Rows(texts, [0] * len(texts)), tokenizer, method.about["settings"])


def probabilities(method, tokenizer, texts, is_file=True):
    """Return (the probabilities of the labels, one list per text; how many texts were cut)."""
    split = encode(method, tokenizer, texts)
    return outputs(method, split, is_file), split.n_cut


def spans(method, tokenizer, questions, is_file=True):
    """Return (text, its first character in the passage) of the best span for each Question."""
    windows = Windows(questions, tokenizer, method.about["settings"])
    return [best[1:] for best in windows.best(outputs(method, windows, is_file))]


def classify(method, tokenizer, sentence):
    """Return (label, its probability) of one sentence, in fp32."""
    (own,), _ = probabilities(method, tokenizer, [sentence], is_file=False)
    best = np.argmax(own)
    return method.about["label_names"][best], own[best]


def answer(method, tokenizer, question, context):
    """Return (the best span of the passage as text, where it starts), in fp32."""
    asked = [Question(context, question, [""], None, None)]
    return spans(method, tokenizer, asked, is_file=False)[0]


def say_cut(methods, n):
    """Say that n texts were cut, if there are any."""
    if not n:
        return ""
    lengths = sorted({method.about["settings"].max_length for method in methods})
    return (f"{n:,} of the texts were cut at the {' or '.join(map(str, lengths))} tokens that "
            "training had")


# --- single texts --------------------------------------------------------------------------------

def most_say(labels):
    """Return the label that most methods give, or None where no single one has the most."""
    (first, n), *others = Counter(labels).most_common(2)
    return None if others and others[0][1] == n else first


def print_table(rows):
    """Print rows of strings in columns, the first one left-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    for first, *cells in rows:
        cells = [cell.rjust(width) for cell, width in zip(cells, widths[1:])]
        print("  ".join([first.ljust(widths[0]), *cells]).rstrip())


def sentence_rows(methods, tokenizer, sentences):
    """Return (rows of strings: a header, one row per sentence, times and sizes; what say_cut says).
    A * marks a label that is not the one of most methods."""
    columns, speeds, n_cut = [], [], 0
    for method in methods:
        n_cut = max(n_cut, encode(method, tokenizer, sentences).n_cut)
        classify(method, tokenizer, sentences[0])  # to warm up
        begin = time.perf_counter()
        columns.append([classify(method, tokenizer, sentence) for sentence in sentences])
        ms = 1000 * (time.perf_counter() - begin) / len(sentences)
        speeds.append(f"{ms:.1f}")

    rows = [["", *(method.name for method in methods)]]
    for sentence, *answers in zip(sentences, *columns):
        usual = most_say(label for label, _ in answers)
        rows.append([sentence, *(f"{'' if label == usual else '* '}{label} {probability:.2f}"
                                 for label, probability in answers)])
    rows.append(["ms per sentence", *speeds])
    rows.append(["ms to switch to it, from its file",
                 *(f"{method.switch_ms:.0f}" for method in methods)])
    rows.append(["its file (MB)", *(f"{method.megabytes:.2f}" for method in methods)])
    return rows, say_cut(methods, n_cut)


def compare_sentences(methods, tokenizer, sentences):
    """Print the table, with the beginnings of the sentences."""
    rows, cut = sentence_rows(methods, tokenizer, sentences)
    if cut:
        warn(cut)
    print_table([[first if len(first) <= 60 else first[:59] + "…", *cells]
                 for first, *cells in rows])
    if any(cell.startswith("* ") for _, *cells in rows for cell in cells):
        print("* the methods disagree, and most do not say this")


def answer_rows(methods, tokenizer, question, context):
    """Return (rows of strings: a header, one row per method; where each answer starts)."""
    rows, starts = [["", "answer", "ms", "ms to switch to it, from its file", "its file (MB)"]], []
    for method in methods:
        (text, at), ms = milliseconds(lambda: answer(method, tokenizer, question, context))
        starts.append(at)
        rows.append([method.name, text, f"{ms:.1f}", f"{method.switch_ms:.0f}",
                     f"{method.megabytes:.2f}"])
    return rows, starts


# --- a file of texts -----------------------------------------------------------------------------

def find_column(path, columns, asked, trained):
    """Return the name of the column with the texts: as asked, else one of `trained`, those of the
    methods' runs, else sentence, else text, else the only one."""
    if asked and asked not in columns:
        fail(f"{path} has no column {asked!r}; it has {', '.join(columns)}")
    for name in (asked, *trained, "sentence", "text"):
        if name in columns:
            return name
    if len(columns) == 1:
        warn(f"{path}: the first line, {columns[0]!r}, is taken for the column's name and gets no "
             "label; if it is a text, write text above it, or call the file .txt, and if it is a "
             "name, say --column")
        return columns[0]
    fail(f"{path} has the columns {', '.join(columns)}; --column says which holds the texts")


def check_input(path, asked, trained, has_pairs):
    """Read all of an input file: (columns, those with the texts, number of rows)."""
    if path == STDIN:
        return ["text"], ["text"], None
    columns, n = {}, 0
    for _, row in read_table(path):
        columns |= dict.fromkeys(row)
        n += 1
    if not n:
        fail(f"{path} has no rows")
    texts = [find_column(path, list(columns), asked, trained)]
    if has_pairs:
        texts.append(SECOND)
    elif SECOND in columns and SECOND not in texts:
        warn(f"{path}: {SECOND} is not read; as far as is known these methods were trained on "
             "single sentences")
    if has_pairs and SECOND not in columns:
        fail(f"{path} has no column {SECOND!r}, and these methods were trained on pairs")
    quoted, breaks = [], []  # see warn_quoting
    for line, row in read_table(path, texts):
        for column in texts:
            if not isinstance(row[column], str):
                fail(f"{path}, line {line}: no text in {column!r}")
        if path.suffix == ".tsv" and looks_quoted(row[texts[0]].strip()):
            quoted.append(line)
        if path.suffix == ".csv":
            breaks += rows_inside(line, row, texts[0])
    least = 2 if len(columns) > 1 else 10  # a text alone in its row may well have a few lines
    warn_quoting(path, quoted, [found for found in breaks if found[1] - found[0] >= least])
    return list(columns), texts, n


def label_columns(methods):
    """Return the columns that are added: each method's label, called as the method, and the
    probabilities of all labels."""
    return [column for method in methods
            for column in (method.name, *(f"{method.name} {label}"
                                          for label in method.about["label_names"]))]


def is_empty(text):
    """Tell whether a text, or one of a pair, is empty."""
    return not all(part.strip() for part in ([text] if isinstance(text, str) else text))


def label_texts(methods, tokenizer, texts):
    """Return (one dict of label_columns per text; how many texts were cut, at most). An empty text
    has no label."""
    rows, most_cut = [{} for _ in texts], 0
    for method in methods:
        columns, labels = label_columns([method]), method.about["label_names"]
        found, n_cut = probabilities(method, tokenizer, texts)
        most_cut = max(most_cut, n_cut)
        for row, text, own in zip(rows, texts, found):
            cells = [labels[np.argmax(own)], *(round(p, 6) for p in own)]
            row |= dict.fromkeys(columns, "") if is_empty(text) else dict(zip(columns, cells))
    return rows, most_cut


def row_writer(file, columns, is_json):
    """Return a function that writes a dict as a line of JSON, or as a row of CSV under a header."""
    as_json = functools.partial(json.dumps, ensure_ascii=False)
    if is_json:
        return lambda row: file.write(as_json(row) + "\n")
    # csv quotes a lone carriage return, which would end a row, only if it ends its own rows so
    lines = SimpleNamespace(write=lambda line: file.write(line.removesuffix("\r\n") + "\n"))
    writer = csv.DictWriter(lines, columns)
    writer.writeheader()
    return lambda row: writer.writerow({
        name: as_json(value) if isinstance(value, (dict, list)) else value
        for name, value in row.items()})


def predict_rows(methods, tokenizer, args):
    """Write every row of args.input with labels and probabilities to args.to, as CSV or JSONL."""
    has_pairs = methods[0].about["pairs"]
    is_mixed = len({method.about["pairs"] for method in methods}) > 1
    if is_mixed or has_pairs and args.input == STDIN:
        fail("methods trained on pairs of sentences answer files alone, and not beside others")
    trained = [method.about["settings"].text_column for method in methods]
    columns, texts, n_rows = check_input(args.input, args.column, trained, has_pairs)
    added, counts = label_columns(methods), Counter()
    if twice := [name for name in added if added.count(name) > 1]:
        fail(f"two columns would be called {twice[0]!r}; ask these methods one at a time")
    if both := [name for name in added if name in columns]:
        fail(f"{args.input} has a column {both[0]!r} already, which a method is called")

    def write(path):
        rows = (row for _, row in read_table(args.input))
        with (open(path, "w", encoding="utf-8", newline="") as file,
              tqdm(total=n_rows, unit="row", disable=None) as bar):
            write_row = row_writer(file, [*columns, *added], args.to.suffix == ".jsonl")
            while chunk := list(islice(rows, CHUNK_ROWS)):
                asked = [tuple(row[name] for name in texts) if has_pairs else row[texts[0]]
                         for row in chunk]
                labels, n_cut = label_texts(methods, tokenizer, asked)
                counts.update(rows=len(chunk), cut=n_cut, empty=sum(map(is_empty, asked)),
                              broken=sum("\n" in "".join(text).strip() for text in asked))
                for row, own in zip(chunk, labels):
                    write_row(row | own)
                file.flush()
                bar.update(len(chunk))

    if args.to == STDOUT:
        write(os.dup(sys.stdout.fileno()))  # opened as UTF-8, whatever the locale
    else:
        write_whole(args.to, write)
        # such as a stray quote puts into one
        broken = f", {n} of them with line breaks" if (n := counts["broken"]) else ""
        print(f"wrote {args.to}: {counts['rows']:,} rows{broken}")
    if counts["empty"]:
        warn(f"{counts['empty']:,} of the texts are empty and have no label")
    if counts["cut"]:
        warn(say_cut(methods, counts["cut"]))


# --- a file of questions -------------------------------------------------------------------------

def predict_questions(methods, tokenizer, args):
    """Write {id: answer}, as SQuAD's script takes it, for a SQuAD JSON. Print the scores if the
    right answers are known."""
    if len(methods) > 1:
        fail(f"an answer file is of one method; --method NAME chooses among "
             f"{', '.join(method.name for method in methods)}")
    asked, answers = read_squad(args.input), []
    name, n = Counter(q["id"] for q in asked).most_common(1)[0]
    if n > 1:
        fail(f"{args.input}: {n} questions have the id {name!r}, and an answer file tells them by "
             "it")
    questions = [Question(q["context"], q["question"].strip(), q["answers"]["text"] or [""],
                          None, None) for q in asked]
    with tqdm(total=len(questions), unit="question", disable=None) as bar:
        for i in range(0, len(questions), CHUNK_ROWS):
            found = spans(methods[0], tokenizer, questions[i:i + CHUNK_ROWS])
            answers += [text for text, _ in found]
            bar.update(len(found))

    write_json(args.to, {q["id"]: text for q, text in zip(asked, answers)})
    known = [(q["answers"]["text"], text) for q, text in zip(asked, answers)
             if q["answers"]["text"]]
    if known:
        scores = {name: np.mean(values) for name, values in question_scores(known).items()}
        print(f"F1 {scores['f1']:.2f}, exact match {scores['exact_match']:.2f} "
              f"({len(known):,} questions)")
    print(f"wrote {args.to}: {len(answers):,} answers")


def main(args):
    is_qa = args.question is not None or bool(args.input) and args.input.suffix == ".json"
    files = (name_files(args.checkpoint) if args.checkpoint else
             find(args.output, is_qa, args.method))
    check_kinds(files, is_qa, bool(args.input))
    tokenizer, methods = load_methods(files, args.model)
    if args.input:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        methods = [method._replace(model=place(method.model, device)) for method in methods]
        (predict_questions if is_qa else predict_rows)(methods, tokenizer, args)
    elif is_qa:
        print_table(answer_rows(methods, tokenizer, args.question.strip(), args.context)[0])
    else:
        compare_sentences(methods, tokenizer, args.sentences)


if __name__ == "__main__":
    main(ARGS)
