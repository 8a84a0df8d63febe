"""Guards on what users bring: their files, models and tokenizers, and how their tables are read.
They are kept here so that they stand in nobody's way who reads how the methods work. Imports
nothing slow.

Each function exits with one line if something cannot be right, warns in one line if it is legal but
perhaps not meant, and otherwise returns what was found.
"""
import csv
import json
import math
import re
import sys
import unicodedata
from contextlib import nullcontext
from decimal import Decimal
from itertools import islice
from pathlib import Path

from common import (
    QUESTIONS,
    SPLITS,
    TABLES,
    check_ordinary,
    data_files,
    fail,
    list_folder,
    some_of,
    warn,
)

STDIN = Path("-")
SECOND = "sentence2"  # the column of the second sentence
HEADER_EDGES = '\ufeff" '  # around a name in a header that other files' rows precede

LOOKS_LIKE_TABLE = (*TABLES, QUESTIONS, ".parquet", ".arrow", ".xls", ".xlsx", ".ods")
NUMBER = "-?[0-9]+([.][0-9]+)?"  # a label that is a number
WRITTEN_NUMBER = "[+-]?([0-9]+[.]?[0-9]*|[.][0-9]+)([eE][+-]?[0-9]{1,3})?"  # in any writing


# --- folders -------------------------------------------------------------------------------------

def files_to_read(folder):
    """Return {split: path} of the user's own file or folder. Warn about tables in the folder that
    are ignored."""
    files, _ = data_files(folder)
    read = {path.name for path in files.values()}
    stems = {stem for of_split in SPLITS.values() for stem in of_split}

    def looks_like_data(name):
        path = Path(name.lower())
        is_named_like_a_split = not stems.isdisjoint({path.name.split(".")[0], path.stem})
        is_table = not set(LOOKS_LIKE_TABLE).isdisjoint(path.suffixes)  # test.csv.gz is one, too
        return is_named_like_a_split or is_table

    ignored = [name for name in (list_folder(folder) if folder.is_dir() else ())
               if name not in read and not name.startswith(".") and looks_like_data(name)]
    if ignored:
        warn(f"{folder}: not read: {some_of(ignored)}; read are " + ", ".join(sorted(read)))
    return files


# --- tables and labels ---------------------------------------------------------------------------

def check_header(path, header, needed, delimiter):
    """Exit if the first line of a file lacks a column that is `needed`, names one twice, or seems
    to have another delimiter."""
    if len(header) == 1 and (found := [c for c in "\t;,|" if c != delimiter and c in header[0]]):
        fail(f"{path}, line 1: one column, {header[0]!r}; is {found[0]!r} between the columns? A "
             f"{path.suffix} has {delimiter!r}")
    for column in needed:
        if column not in header:
            fail(f"{path} has no column {column!r}; its first line is {','.join(header)!r}")
    if twice := [name for name in header if header.count(name) > 1]:
        fail(f"{path}, line 1: the column {twice[0]!r} is there {header.count(twice[0])} times")


def check_surrogates(path, where, text):
    """Exit if a text holds half of a surrogate pair: it is no character, and no file could hold
    it."""
    if re.search("[\ud800-\udfff]", text):
        fail(f"{path}{where} holds half of a surrogate pair, which is no character")


def read_fields(file, path, needed):
    """Yield the rows of an open .csv or .tsv file, as read_table."""
    csv.field_size_limit(2**31 - 1)
    if path.suffix == ".tsv":
        style = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    else:  # some programs write a space between a comma and the quote that opens a field
        style = {"strict": True, "skipinitialspace": bool(re.search(', +"', file.read(2**16)))}
        file.seek(0)
    reader = csv.reader(file, **style)
    start = 1
    try:
        header = [name.strip() for name in next(reader, [])]
        check_header(path, header, needed, reader.dialect.delimiter)
        start = reader.line_num + 1
        for fields in reader:
            fields = fields or [""] * (len(header) == 1)  # an empty text, alone in its row
            if fields and len(fields) != len(header):
                lost = f"; no {header[len(fields)]}" if len(fields) < len(header) else ""
                fail(f"{path}, line {start}: fields found {len(fields)}, expected "
                     f"{len(header)}{lost}")
            if fields:  # a blank line between several columns has none
                yield start, dict(zip(header, fields))
            start = reader.line_num + 1
    except csv.Error as e:
        if "unexpected end" in str(e):
            fail(f"{path}, line {start}: a quote opens and never closes")
        fail(f"{path}, line {reader.line_num}, in the row that starts at line {start}: text after "
             f"a closing quote ({e})")


def read_objects(file, path, needed):
    """Yield the rows of an open .jsonl file, as read_table."""
    for n, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as e:
            fail(f"{path}, line {n}: not JSON ({e})")
        if not isinstance(row, dict):
            fail(f"{path}, line {n}: not an object {{...}}")
        if lost := [column for column in needed if column not in row]:
            fail(f"{path}, line {n}: no {lost[0]!r}")
        if re.search(r"\\ud[89a-f]", line, flags=re.I):
            check_surrogates(path, f", line {n}:", json.dumps(row, ensure_ascii=False))
        yield n, row


def read_table(path, needed=()):
    """Yield (line where it starts, {column: value}) of every row of a table: .csv, .tsv (GLUE's
    layout: no quoting), .jsonl (one object per line), .txt (one text per line), or stdin. Exit with
    the line of a row that does not fit, and if a column that is `needed` is not there."""
    if path != STDIN:
        check_ordinary(path)
    try:
        if path == STDIN and sys.stdin is None:
            fail("stdin is closed")
        if path == STDIN and hasattr(sys.stdin, "reconfigure"):
            # some locales let through what is not UTF-8
            sys.stdin.reconfigure(encoding="utf-8-sig", errors="strict")
        with (nullcontext(sys.stdin) if path == STDIN else
              open(path, encoding="utf-8-sig", newline="")) as file:
            if path == STDIN or path.suffix == ".txt":
                yield from ((n, {"text": line.rstrip("\r\n")}) for n, line in enumerate(file, 1))
            else:
                yield from (read_objects if path.suffix == ".jsonl" else read_fields)(
                    file, path, needed)
    except UnicodeDecodeError as e:
        name, advice = ("stdin", "") if path == STDIN else (path, "; save it as UTF-8")
        fail(f"{name} is not UTF-8: byte {e.object[e.start]:#04x} ({e.reason}){advice}")
    except OSError as e:
        fail(f"cannot read {path}: {e.strerror}")


def kind_of_column(values):
    """Tell what the values of a column seem to be: "texts", of more than three words on average,
    "labels", each on ten rows on average, or None of the two (ids, dates, prices)."""
    full = [str(v).strip() for v in values if isinstance(v, (str, int, float)) and str(v).strip()]
    kinds = set(full)
    if len(full) < 0.9 * len(values):
        return None
    if len(full) < 10 * len(kinds):
        # dates are of digits, and have no words; each Chinese or Japanese character is one
        words = [re.sub("([\u3040-\u9fff])", r" \1 ", text[:200]).split() for text in full]
        n_words = sum(any(map(str.isalpha, word)) for own in words for word in own)
        return "texts" if n_words > 3 * len(full) else None
    numbers = {kind for kind in kinds if re.fullmatch("[+-]?[0-9]+([.]0*)?", kind)}
    has_years = any(re.search(r"\b(19|20)[0-9]{2}\b", kind) for kind in kinds)
    is_words = all(any(map(str.isalpha, kind)) for kind in kinds - numbers)
    is_few = len(kinds) > 1 and len(numbers) <= 20  # more numbers are ids, or ages
    return "labels" if is_few and is_words and not has_years else None


def find_columns(path, text, label):
    """Return the names of a table's columns with the texts and the labels: what the flags `text`
    and `label` say, else sentence and label, else the only one of its kind in the first 1,000 rows.
    Exit if there are none or several."""
    table = read_table(path, [name for name in (text, label) if name])
    rows = [row for _, row in islice(table, 1000)]
    columns = list(rows[0]) if rows else ["sentence", "label"]

    def look(kind):
        return [name for name in columns if name not in (text, label, "sentence", "label", SECOND)
                and kind_of_column([row.get(name) for row in rows]) == kind]

    texts = [text or "sentence"] if text or "sentence" in columns else look("texts")
    labels = [label or "label"] if label or "label" in columns else look("labels")
    if len(texts) != 1 or len(labels) != 1:
        own, other = (" or ".join(names) or "none looks like it" for names in (texts, labels))
        fail(f"{path}: which columns hold the texts ({own}) and the labels ({other})? --text-column"
             f" and --label-column say it; there are {', '.join(columns)}")
    if texts == ["sentence"] and not text and SECOND not in columns and (more := look("texts")):
        warn(f"{path}: {some_of(more)} may hold texts, too, and is not read; the second text of "
             f"a pair stands in {SECOND}")
    elsewhere = {str(row.get(labels[0])).strip() for row in rows  # in no header that comes again
                 if str(row.get(texts[0])).strip(HEADER_EDGES) != texts[0]}
    if labels[0] in elsewhere - {label, "label"}:
        fail(f"{path}, line 1: {labels[0]!r} is a label in other rows, too; are the columns' names "
             f"missing? Write them above it; if it is a name, say --label-column {labels[0]}")
    return texts[0], labels[0]


def looks_quoted(text):
    """Tell whether csv.writer, or a spreadsheet, may have put the quotes around and inside a
    text."""
    inner = text[1:-1]
    return text == f'"{inner}"' and '""' in inner and '"' not in inner.replace('""', "")


def rows_inside(start, row, column):
    """Return what looks like rows inside the fields of a .csv's row that starts at line `start`: of
    each field with any, where it opens and closes, and what they have in `column`."""
    at, found = list(row).index(column), []
    for field in row.values():
        *lines, _ = re.split("\r\n|\r|\n", field)
        inside = [own[at] for line in lines if len(own := line.split(",")) == len(row)]
        found += [(start, start + len(lines), inside)] if inside else []
        start += len(lines)
    return found


def warn_quoting(path, quoted, breaks, labels=None):
    """Warn about rows of a .tsv that look quoted, whose lines are `quoted`, and fields of a .csv of
    whose lines half are rows (`breaks`, rows_inside's) with one of the table's `labels`, if any."""
    if quoted:
        warn(f"{path}: {len(quoted):,} rows, line {quoted[0]} first, look quoted as in a .csv; a "
             ".tsv has no quoting, so the quotes stay in the text")
    stray = [(closes - opens, opens, closes) for opens, closes, found in breaks
             if 2 * sum(labels is None or name in labels for name in found) >= closes - opens]
    if stray:
        _, opens, closes = max(stray)
        warn(f"{path}: the quoted field that opens at line {opens} and closes at line {closes} "
             "holds what look like rows; a stray quote swallows rows like that")


def warn_labels(names):
    """Warn about labels that may not be meant as classes: ratings, and labels that differ in
    writing only."""
    if all(re.fullmatch(NUMBER, name) for name in names) and any(float(name) % 1 for name in names):
        warn(f"{len(names)} labels are numbers with fractions ({names[0]} to {names[-1]}); each "
             "counts as a class")
    written = {}
    for name in names:
        seen = "".join(c for c in unicodedata.normalize("NFKC", name)
                       if unicodedata.category(c) != "Cf")  # U+200B is invisible
        is_number = re.fullmatch(WRITTEN_NUMBER, seen)
        key = Decimal(seen) if is_number else " ".join(seen.casefold().split())
        if (other := written.setdefault(key, name)) != name:
            warn(f"the labels {other!r} and {name!r} ({ascii(other)} and {ascii(name)}) count as "
                 "two classes")
            break


def warn_untested(names, tested):
    """Warn about labels that no test row has. tested: the test rows' labels, as positions."""
    if untested := set(range(len(names))) - set(tested):
        warn(f"no test row has the label {some_of([names[i] for i in sorted(untested)])}: in "
             "macro-F1 a class that is only predicted counts as 0")


def warn_repeats(trained, scored):
    """Warn about sentences that are scored and trained on, too. scored: {split: sentences}."""
    trained = set(trained)
    for split, sentences in scored.items():
        if n := sum(sentence in trained for sentence in sentences):
            warn(f"{n:,} of {len(sentences):,} {split} rows stand in the training rows, too, so "
                 "that their scores are too good; leave out the repeats")


# --- models and tokenizers -----------------------------------------------------------------------

def check_config(name, config):
    """Exit if this project cannot fine-tune the model `name`."""
    if config.model_type != "bert":
        fail(f"{name} is a {config.model_type!r} model; this project fine-tunes BERT (model_type "
             "'bert')")
    positions = getattr(config, "position_embedding_type", "absolute")
    if positions != "absolute":
        fail(f"{name} has {positions!r} position embeddings; only absolute ones are supported")
    if config.is_decoder:
        fail(f"{name} is a decoder (is_decoder), whose tokens do not see what follows; this "
             "project fine-tunes encoders")


def fit_tokenizer(name, tokenizer, config):
    """Exit if the tokenizer of the model `name` cannot be right for it; correct what can be
    corrected."""
    vocabulary = tokenizer.get_vocab()
    if set(vocabulary) <= set(tokenizer.all_special_tokens):
        fail(f"{name} has no tokenizer (tokenizer.json or vocab.txt): every word would be unknown")
    largest = max(vocabulary.values())
    if largest >= config.vocab_size:
        fail(f"{name}: its tokenizer gives ids up to {largest:,}, its embeddings have "
             f"{config.vocab_size:,} rows; they were not made for each other, or tokens were added "
             "and the embeddings not resized")
    if tokenizer.pad_token is None:
        if "[PAD]" not in vocabulary:
            fail(f"{name}: its tokenizer has no padding token")
        tokenizer.pad_token = "[PAD]"

    if config.vocab_size - largest > 1000:  # fewer only fill up a matrix
        warn(f"{name}: its embeddings have {config.vocab_size:,} rows, but its tokenizer gives ids "
             f"up to {largest:,} only; perhaps it is another model's")

    cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id
    one, two = tokenizer("a")["input_ids"], tokenizer("a", "a")["input_ids"]
    is_wrapped = (one[0], one[-1]) == (two[0], two[-1]) == (cls, sep) and two.count(sep) == 2
    if None in (cls, sep) or not is_wrapped:
        fail(f"{name}: its tokenizer does not put [CLS] before a text and [SEP] after it, which "
             "BERT was trained with")

    tokenizer.padding_side = tokenizer.truncation_side = "right"
    tokenizer.model_max_length = min(tokenizer.model_max_length, config.max_position_embeddings)
    types = ["token_type_ids"] if config.type_vocab_size > 1 else []
    tokenizer.model_input_names = ["input_ids", *types, "attention_mask"]


def check_loading(name, model, loading, is_head):
    """Exit if the file and BERT do not have the same tensors, heads left out, or if one is not
    finite. loading: what from_pretrained says of it; is_head(name): whether a parameter is new in
    every method."""
    untrained = {*loading["missing_keys"], *(key for key, *_ in loading["mismatched_keys"])}
    if missing := sorted(key for key in untrained if not is_head(key)):
        fail(f"{name} lacks {len(missing)} of BERT's tensors ({missing[0]} first); they would stay "
             "random")
    foreign = [key for key in sorted(loading["unexpected_keys"])
               if {"encoder", "embeddings"} & set(key.split("."))
               and not key.endswith(("position_ids", "token_type_ids"))]  # older versions' buffers
    if foreign:
        fail(f"{name} has {len(foreign)} tensors that BERT does not ({foreign[0]} first); without "
             "them it is another model")
    if bad := [key for key, p in model.named_parameters()
               if not is_head(key) and not p.isfinite().all()]:
        fail(f"{name} has {len(bad)} tensors with NaN or infinity ({bad[0]} first)")


def check_length(s, config):
    """Exit if the model does not read as many tokens as the settings `s` ask for."""
    if s.max_length > (longest := config.max_position_embeddings):
        fail(f"--max-length {s.max_length}: {s.model} reads {longest} tokens at most")


def warmup_steps(share, total):
    """Return how many of `total` steps are a warm-up of this share. Warn if none comes after it."""
    if (warmup := math.ceil(share * total)) == total:
        warn(f"the warm-up covers every step ({total}), the first at rate 0; take more steps or a "
             "smaller --warmup")
    return warmup


def check_words(name, rows, tokenizer):
    """Warn if the tokenizer of the model `name` does not know more than a tenth of the words in the
    training rows; exit if it knows none. rows: token ids, a list of 1-D tensors. A word is a token
    that neither continues another nor is special."""
    import numpy as np  # needed here only, and settings.py imports this file
    tokens = tokenizer.convert_ids_to_tokens(range(max(tokenizer.get_vocab().values()) + 1))
    special = set(tokenizer.all_special_tokens) - {tokenizer.unk_token}
    is_word = np.array([token is not None and token not in special
                        and not token.startswith("##") for token in tokens])
    ids = np.concatenate([row.numpy() for row in rows])
    n_words, n_unknown = is_word[ids].sum(), (ids == tokenizer.unk_token_id).sum()
    if not n_words:
        fail(f"the training rows hold no word that the tokenizer of {name} could read")
    said = (f"{n_unknown / n_words:.0%} of the training rows' words are unknown to the "
            f"tokenizer of {name} and become {tokenizer.unk_token}")
    if n_unknown == n_words:
        fail(said)
    if n_unknown > n_words / 10:
        warn(f"{said}; perhaps its vocabulary is of another language, or cased where the "
             "tokenizer lower-cases")
        return
    capitals = np.mean([word != word.lower() for word in tokenizer.get_vocab()])
    if capitals > 0.02 and tokenizer("A")["input_ids"] == tokenizer("a")["input_ids"]:
        warn(f"the tokenizer of {name} lower-cases, so that {capitals:.0%} of its vocabulary never "
             "come; a cased model needs \"do_lower_case\": false in tokenizer_config.json")
