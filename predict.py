"""Ask the trained methods: all those of a comparison on one shared base, side by side.

    python predict.py                                 five ambiguous sentences, by every method of
                                                      run_all.sh
    python predict.py "your sentence" "another"       your own; or one a line on stdin
    python predict.py --question "Who?" --context "A passage."
                                                      the best run of every method of run_grid.sh
    python predict.py --input reviews.csv --to labelled.csv
                                                      every row of a .csv, .tsv, .jsonl or .txt (or
                                                      of stdin: -), with labels and probabilities
    python predict.py --input dev.json --to answers.json --method lora
                                                      every question of a SQuAD file
"""
import argparse
import sys
from pathlib import Path

from files import check_writable, read_json
from methods import is_qa as asks_questions
from settings import Parser, checkpoint_path, result_path
from start import fail, start

SENTENCES = ["It is hard to dislike.",
             "You will laugh, though perhaps not where the director hoped.",
             "An honest failure is worth more than this polished success.",
             "Only the dog can act, but what a dog!",
             "The jokes are older than the actors, and just as much fun."]


def check_files(args):
    """End if --input, --to and the rest do not go together."""
    if not args.input or not args.to:
        fail("--input and --to go together")
    if args.sentences or args.question is not None or args.context is not None:
        fail("give sentences, a question, or --input")
    has_questions = args.input.suffix == ".json"
    if str(args.input) != "-" and args.input.suffix not in (".txt", ".tsv", ".csv", ".jsonl",
                                                            ".json"):
        fail(f"--input {args.input}: .txt, .tsv, .csv and .jsonl are read, .json with questions, "
             "and - for stdin")
    endings = (".json",) if has_questions else (".csv", ".jsonl")
    if args.to.suffix not in endings and (has_questions or str(args.to) != "-"):
        fail(f"--to {args.to}: it must end in {' or '.join(endings)}"
             + ("" if has_questions else ", or be - for stdout"))
    if args.column and (has_questions or str(args.input) == "-" or args.input.suffix == ".txt"):
        fail("--column is for .csv, .tsv and .jsonl")
    if str(args.to) != "-":
        if args.to.exists():
            fail(f"{args.to} is there already; choose another --to")
        check_writable(args.to.resolve().parent, "--to")


def parse_args(argv=None):
    start()
    p = Parser(description=__doc__, allow_abbrev=False,
               formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("sentences", nargs="*", metavar="SENTENCE",
                   help="what to classify (default: stdin, if there is any, else five sentences)")
    p.add_argument("--question", metavar="TEXT",
                   help="a question to answer from --context (default: none)")
    p.add_argument("--context", metavar="TEXT",
                   help="the passage that holds the answer (default: none)")
    p.add_argument("--input", type=Path, metavar="FILE",
                   help="a file of texts or of questions instead; - is stdin, a text a line "
                        "(default: none)")
    p.add_argument("--to", type=Path, metavar="FILE",
                   help="where its answers go: .csv or .jsonl, for questions .json; - is stdout, "
                        "as CSV (default: none)")
    p.add_argument("--column", metavar="NAME",
                   help="the column of --input with the texts (default: sentence, or text, or the "
                        "only one)")
    which = p.add_mutually_exclusive_group()
    which.add_argument("--method", metavar="NAME",
                       help="only this one, as the table names it (default: all)")
    which.add_argument("--checkpoint", type=Path, action="append", metavar="FILE",
                       help="this instead, any that train.py left in checkpoints/, or a folder of "
                            "peft's; give it several times to compare (default: those of the "
                            "comparison)")
    p.add_argument("--model", metavar="FOLDER",
                   help="where the base is, if it was a folder (default: as in training)")
    p.add_argument("--output", type=Path, default=Path(__file__).parent, metavar="DIR",
                   help="train.py's --output, with metrics/ and checkpoints/ (default: beside this "
                        "file)")

    args = p.parse_args(argv)
    if args.input or args.to or args.column:
        check_files(args)
        return args
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
    return args


ARGS = parse_args() if __name__ == "__main__" else None  # before the slow imports

import statistics
import time
from collections import Counter
from typing import NamedTuple

import torch

import stream
from checkpoint import attach, check_tokenizer, file_of, hash_base, read_about
from model import load_pretrained, place
from qa import Question
from studies import best_of, rows_of


class Method(NamedTuple):
    name: str
    model: torch.nn.Module
    about: dict  # the checkpoint's metadata
    megabytes: float  # of the checkpoint
    switch_ms: float  # from the file to a model on the shared base


def find(output, is_qa=False, only=None):
    """{name: checkpoint} of what run_all.sh, or for questions run_grid.sh, left: every method's
    run, of several seeds the first, or the best of every method by validation F1."""
    script, file = ("run_grid.sh", "grid.json") if is_qa else ("run_all.sh", "comparison.json")
    path = output / "metrics" / file
    if not path.exists():
        fail(f"{path} is not there; bash {script} makes it (and --output says where)")
    results = read_json(path)

    try:
        if is_qa:
            if any(result.get("trainer") for result in results.values()):
                fail(f"{path} is of Trainer's runs, whose checkpoints are not here")
            runs = {row["method"]: results[row["run"]]["settings"]
                    for row in best_of(rows_of(results))}
        else:
            runs = {name: entry["runs"][0]["settings"] for name, entry in results.items()}
        files = {name: checkpoint_path(output, s) for name, s in runs.items()}
    except (KeyError, TypeError, AttributeError):
        files = {}

    if not files:
        fail(f"{path} is damaged or of an earlier version; bash {script} makes it anew")
    if only is not None and only not in files:
        fail(f"--method {only}: {path} has {', '.join(files)}")
    files = {name: file for name, file in files.items() if only in (None, name)}
    for name, file in files.items():
        if not file.exists():
            result = result_path(output, runs[name])
            delete = f"delete {result}, and " if result.exists() else ""
            fail(f"{file}, the checkpoint of {name} in {path}, is not there (checkpoints are not "
                 f"part of a clone); {delete}bash {script}, with the flags that it was made with, "
                 "trains it, and --checkpoint FILE asks any other")
    return files


def name_files(paths):
    """{name: checkpoint}, each called as its file, or where two files are called the same, as its
    path."""
    names = [path.resolve().name if path.is_dir() else path.stem for path in paths]
    return dict(zip(names if len({*names}) == len(paths) else map(str, paths), paths))


def load_base(path, model_name=None):
    """(tokenizer, base, its hash) for the checkpoint `path`; model_name: instead of the one it was
    trained on."""
    about = read_about(path)
    s = about["settings"]
    if s["model_sha256"] and not model_name:
        fail(f"{path} was trained on a model in the folder {s['model']}; --model FOLDER says where "
             "that is")
    tokenizer, base = load_pretrained(model_name or s["model"], about["label_names"])
    check_tokenizer(path, about, tokenizer)
    return tokenizer, base.eval(), hash_base(base)


def load_methods(files, model_name=None):
    """(tokenizer, [Method]) of {name: checkpoint}, all on one base."""
    first, *_ = files.values()
    trained_on = read_about(first)["settings"]["model"]
    tokenizer, base, base_hash = load_base(first, model_name)
    methods = []
    for name, path in files.items():
        (model, about), switch_ms = milliseconds(lambda: attach(base, base_hash, path))
        check_tokenizer(path, about, tokenizer)
        own = about["settings"]["model"]
        if about["base"] is None and own != trained_on and not model_name:
            fail(f"{path} is for the base {own}, and {first} for {trained_on}; if they are the "
                 "same, --model FOLDER says where it is")
        methods.append(Method(name, model, about, file_of(path).stat().st_size / 1e6, switch_ms))
    return tokenizer, methods


@torch.no_grad()
def classify(method, tokenizer, sentence):
    """(label, its probability) of one sentence, in fp32."""
    max_length = method.about["settings"]["max_length"]
    tokens = tokenizer(sentence, truncation=True, max_length=max_length, return_tensors="pt")
    probabilities = method.model(input_ids=tokens["input_ids"]).logits[0].softmax(-1)  # (labels)
    best = int(probabilities.argmax())
    return method.about["label_names"][best], float(probabilities[best])


def answer(method, tokenizer, question, context):
    """(the best span of the passage, as text, where it starts)."""
    return stream.answer(method, tokenizer, [Question(context, question, [""], None, None)])[0]


def milliseconds(ask, n=3):
    """(what ask() returns, the median of n times it takes)."""
    result, times = ask(), []
    for _ in range(n):
        start = time.perf_counter()
        ask()
        times.append(1000 * (time.perf_counter() - start))
    return result, statistics.median(times)


def most_say(labels):
    """The label that most methods give, or None where no single one has the most."""
    (first, n), *others = Counter(labels).most_common(2)
    return None if others and others[0][1] == n else first


def print_table(rows):
    """Rows of strings, the first left-aligned, in columns."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        cells = [row[0].ljust(widths[0]),
                 *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))]
        print("  ".join(cells).rstrip())


def compare_sentences(methods, tokenizer, sentences):
    """Print the table: sentences down, methods across. A * marks a label that is not the one of
    most methods."""
    for method in methods:
        classify(method, tokenizer, sentences[0])  # to warm up

    rows, times = [["", *(method.name for method in methods)]], [[] for _ in methods]
    for sentence in sentences:
        asked = [milliseconds(lambda: classify(method, tokenizer, sentence)) for method in methods]
        for own, (_, ms) in zip(times, asked):
            own.append(ms)
        usual = most_say(label for (label, _), _ in asked)
        short = sentence if len(sentence) <= 60 else sentence[:59] + "…"
        rows.append([short, *(f"{'' if label == usual else '* '}{label} {probability:.2f}"
                              for (label, probability), _ in asked)])

    rows.append(["ms per sentence", *(f"{statistics.median(own):.1f}" for own in times)])
    rows.append(["ms to switch to it, from its file",
                 *(f"{method.switch_ms:.0f}" for method in methods)])
    rows.append(["its file (MB)", *(f"{method.megabytes:.2f}" for method in methods)])
    print_table(rows)
    if any("* " in cell for row in rows for cell in row[1:]):
        print("* not what most methods say")


def compare_answers(methods, tokenizer, question, context):
    rows = [["", "answer", "ms", "ms to switch to it, from its file", "its file (MB)"]]
    for method in methods:
        (text, _), ms = milliseconds(lambda: answer(method, tokenizer, question, context))
        rows.append([method.name, text, f"{ms:.1f}", f"{method.switch_ms:.0f}",
                     f"{method.megabytes:.2f}"])
    print_table(rows)


def check_kinds(files, is_qa, has_input):
    """End if one of {name: checkpoint} cannot be asked what is asked."""
    for name, path in files.items():
        about = read_about(path)
        if is_qa is not asks_questions(about["settings"]):
            fail(f"{name} was trained on "
                 + ("sentences, not on questions" if is_qa else
                    "questions; it needs --question and --context, or a .json"))
        if about["pairs"] and not has_input:
            fail(f"{name} was trained on pairs of sentences; --input FILE with the columns "
                 "sentence and sentence2 asks it")


def main(args):
    is_qa = args.question is not None or bool(args.input) and args.input.suffix == ".json"
    files = (name_files(args.checkpoint) if args.checkpoint else
             find(args.output, is_qa, args.method))

    check_kinds(files, is_qa, bool(args.input))
    tokenizer, methods = load_methods(files, args.model)
    if args.input:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        methods = [method._replace(model=place(method.model, device)) for method in methods]
        ask = stream.predict_questions if is_qa else stream.predict_rows
        ask(methods, tokenizer, files, args)
    elif is_qa:
        compare_answers(methods, tokenizer, args.question.strip(), args.context)
    else:
        compare_sentences(methods, tokenizer, args.sentences)


if __name__ == "__main__":
    main(ARGS)
