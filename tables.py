"""Tables of texts, row by row, so that a large one needs no more memory than a small one: .csv,
.tsv (GLUE's layout: no quoting), .jsonl (an object a line), .txt (a text a line), or stdin.
"""
import csv
import json
import re
import sys
from pathlib import Path

from start import fail

STDIN = Path("-")


def check_header(path, header, needed, delimiter):
    """End if the first line of a file does not name the columns that are `needed`, or one twice, or
    seems to have another delimiter, with which all of a row would be one text."""
    if len(header) == 1 and (found := [c for c in "\t;,|" if c != delimiter and c in header[0]]):
        fail(f"{path}, line 1: one column, {header[0]!r}; is {found[0]!r} between the columns? A "
             f"{path.suffix} has {delimiter!r}")
    for column in needed:
        if column not in header:
            fail(f"{path} has no column {column!r}; its first line is {','.join(header)!r}")
    if twice := [name for name in header if header.count(name) > 1]:
        fail(f"{path}, line 1: the column {twice[0]!r} is there {header.count(twice[0])} times")


def read_fields(file, path, needed):
    """read_table of an open .csv or .tsv file."""
    csv.field_size_limit(2**31 - 1)
    style = {"strict": True}
    if path.suffix == ".tsv":
        style = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    reader = csv.reader(file, **style)
    start = 1
    try:
        header = next(reader, [])
        check_header(path, header, needed, reader.dialect.delimiter)
        start = reader.line_num + 1
        for fields in reader:
            if fields and len(fields) != len(header):
                lost = f"; no {header[len(fields)]}" if len(fields) < len(header) else ""
                fail(f"{path}, line {start}: fields found {len(fields)}, expected "
                     f"{len(header)}{lost}")
            if fields:  # a blank line has none
                yield start, dict(zip(header, fields))
            start = reader.line_num + 1
    except csv.Error as e:
        if "unexpected end" in str(e):
            fail(f"{path}, line {start}: a quote opens and never closes")
        fail(f"{path}, line {reader.line_num}, in the row that starts at line {start}: text after "
             f"a closing quote ({e})")


def read_objects(file, path, needed):
    """read_table of an open .jsonl file."""
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
        # half of a surrogate pair is no character, and no file could hold it
        if re.search(r"\\ud[89a-f]", line, flags=re.I) and re.search(
                "[\ud800-\udfff]", json.dumps(row, ensure_ascii=False)):
            fail(f"{path}, line {n}: half of a surrogate pair, which is no character")
        yield n, row


def read_table(path, needed=()):
    """(line, {column: value}) of every row of a table, line being the one where it starts. Ends
    with the line of a row that does not fit, and where a column that is `needed` is not there."""
    try:
        if path == STDIN:
            if sys.stdin is None:
                fail("stdin is closed")
            if hasattr(sys.stdin, "reconfigure"):  # some locales let through what is not UTF-8
                sys.stdin.reconfigure(encoding="utf-8-sig", errors="strict")
            for n, line in enumerate(sys.stdin, 1):
                yield n, {"text": line.rstrip("\r\n")}
            return
        with open(path, encoding="utf-8-sig", newline="") as file:
            if path.suffix == ".txt":
                for n, line in enumerate(file, 1):
                    yield n, {"text": line.rstrip("\r\n")}
            else:
                yield from (read_objects if path.suffix == ".jsonl" else read_fields)(
                    file, path, needed)
    except UnicodeDecodeError as e:
        name, advice = ("stdin", "") if path == STDIN else (path, "; save it as UTF-8")
        fail(f"{name} is not UTF-8: byte {e.object[e.start]:#04x} ({e.reason}){advice}")
    except OSError as e:
        fail(f"cannot read {path}: {e.strerror}")
