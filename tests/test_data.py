"""The splits, the user's own files with all that can be wrong with them, and the batches."""
import dataclasses
import re
import shutil

import numpy as np
import pytest
from conftest import (
    default_tokenizer,
    lengths,
    load_folder,
    one_line_exit,
    save_small_bert,
    settings,
)

import checks
import data
import qa
import tools.predict as predict
import train


def folder(path, **files):
    path.mkdir(exist_ok=True)
    for name, text in files.items():
        (path / name.replace("__", ".").replace("_", ".")).write_bytes(
            text if isinstance(text, bytes) else text.encode())
    return path


def tsv(*rows):
    return "sentence\tlabel\n" + "".join(f"{s}\t{y}\n" for s, y in rows)


TRAIN = tsv(*[(f"sentence {i}", ["no", "yes"][i % 2]) for i in range(60)])


@pytest.mark.parametrize("text", [
    'sentence, label\n"a film, a good one", "yes"\n"he said ""no""", "no"\n',
    'label, sentence\n"yes", "a film, a good one"\n"no", "he said ""no"""\n'])
def test_a_space_before_a_quote_is_no_text(text, tmp_path):
    (tmp_path / "train.csv").write_text(text)
    rows = data.read_file(tmp_path / "train.csv")
    assert rows.sentences == ["a film, a good one", 'he said "no"'] and rows.labels == ["yes", "no"]


def test_json_lines_called_json_are_said_to_be_lines(tmp_path):
    (tmp_path / "train.json").write_text('{"sentence": "a", "label": "b"}\n' * 3)
    one_line_exit(lambda: qa.read_squad(tmp_path / "train.json"), "call it train.jsonl")


def test_movies_splits_are_fixed_stratified_and_disjoint():
    task = data.load_rated("movies")
    assert [len(rows.sentences) for rows in task[1:4]] == [8070, 1000, 1000]
    sentences = [s for rows in task[1:4] for s in rows.sentences]
    assert len(set(sentences)) == len(sentences) == 10_070
    assert task.label_names == ["negative", "positive"]
    shares = [np.mean(rows.labels) for rows in task[1:4]]
    assert max(shares) - min(shares) < 0.001
    again = data.load_rated("movies")
    assert again.test == task.test and again.train == task.train
    lookup = dict(zip(task.train.sentences, task.train.labels))  # ratings 2.27 and -0.6 in the file
    lookup |= dict(zip(task.validation.sentences + task.test.sentences,
                       task.validation.labels + task.test.labels))
    assert lookup["Effective but too tepid biopic"] == 0
    assert [y for s, y in lookup.items()
            if s.startswith("The Rock is destined to be the 21st Century's")] == [1]


@pytest.mark.parametrize("name, sizes, positive", [("products", [2383, 297, 297], 0.586),
                                                   ("tweets", [2746, 343, 343], 0.683),
                                                   ("editorials", [2345, 293, 293], 0.401)])
def test_the_other_rated_sentences(name, sizes, positive):
    task = data.load_rated(name)
    assert [len(rows.sentences) for rows in task[1:4]] == sizes
    assert all(np.mean(rows.labels) == pytest.approx(positive, abs=0.003) for rows in task[1:4])


def test_all_three_files_are_taken_as_given(tmp_path):
    task = load_folder(folder(tmp_path / "d", train_tsv=TRAIN, validation_tsv=tsv(("v", "no")),
                              test_tsv=tsv(("t", "yes"))))
    assert task.label_names == ["no", "yes"] and len(task.train.labels) == 60
    assert task.validation == (["v"], [0]) and task.test == (["t"], [1])


def test_without_test_the_labelled_dev_rows_are_the_test_and_train_gives_the_validation(tmp_path):
    task = load_folder(folder(tmp_path / "d", train_tsv=TRAIN,
                              dev_tsv=tsv(("a", "no"), ("b", "yes"))))
    assert (task.test.sentences == ["a", "b"] and len(task.validation.labels) == 6
            and len(task.train.labels) == 54)
    assert not set(task.validation.sentences) & set(task.train.sentences)
    assert ("2 labelled validation rows are the test" in task.note
            and "6 of train validate" in task.note)


def test_train_alone_is_split_three_ways(tmp_path):
    task = load_folder(folder(tmp_path / "d", train_tsv=TRAIN))
    assert [len(rows.labels) for rows in task[1:4]] == [48, 6, 6]
    assert sorted(s for rows in task[1:4] for s in rows.sentences) == sorted(
        f"sentence {i}" for i in range(60))
    assert sum(task.test.labels) == sum(task.validation.labels) == 3


def test_integer_labels_sort_as_numbers_and_csv_quotes_are_read(tmp_path):
    rows = "label,sentence\n" + "".join(f'{i % 3 + 8},"film ""{i}"", good"\n' for i in range(60))
    task = load_folder(folder(tmp_path / "d", train_csv=rows))
    assert task.label_names == ["8", "9", "10"]
    assert ('film "0", good' in task.train.sentences + task.validation.sentences
            + task.test.sentences)


BAD = {
    "column": (dict(train_tsv="text\tlabel\na\t1\n"), 
               ["train.tsv", "--text-column", "--label-column", "there are text, label"]),
    "empty": (dict(train_tsv=""), ["train.tsv"]),
    "no rows": (dict(train_tsv=tsv()), ["train.tsv has no rows"]),
    "unseen label": (dict(train_tsv=TRAIN, test_tsv=tsv(("t", "maybe"))), ["test", "'maybe'"]),
    "broken utf-8": (dict(train_tsv=TRAIN.encode() + b"caf\xe9\tno\n"),
                     ["train.tsv is not UTF-8", "0xe9"]),
    "the header again": (dict(train_tsv=TRAIN + TRAIN), ["train.tsv, line 62: the header again"]),
    # as cat *.csv leaves it of files that a spreadsheet saved
    "the header again with its mark": (dict(train_csv=2 * ("\ufeff" + TRAIN.replace("\t", ","))),
                                       ["train.csv, line 62: the header again"]),
    "no header": (dict(train_tsv="".join(f"{'ham spam'.split()[i % 2]}\tgo {i} to the bank now\n"
                                         for i in range(60))),
                  ["train.tsv, line 1: 'ham' is a label in other rows", "--label-column ham"]),
    "short row": (dict(train_tsv=TRAIN + "no tab here\n"), ["train.tsv, line 62", "no label"]),
    "one label": (dict(train_tsv=tsv(*[("a", 1)] * 60)), ["only one label"]),
    "too few": (dict(train_tsv=tsv(("a", 0), ("b", 1))), ["cannot split 2 training rows"]),
    "no train": (dict(dev_tsv=TRAIN), ["no train file", "dev.tsv"]),
    "two of one": (dict(train_tsv=TRAIN, dev_tsv=TRAIN, validation_csv=TRAIN),
                   ["both validation.csv and dev.tsv"]),
}


GOOD_CSV = "sentence,label\n" + "".join(f"film {i},{['no', 'yes'][i % 2]}\n" for i in range(60))
BAD |= {
    "commas without quotes": (dict(train_csv=GOOD_CSV + "good, really good,yes\n"),
                              ["train.csv, line 62", "found 3, expected 2"]),
    "a tab too many": (dict(train_tsv=TRAIN + "good\t\tyes\n"),
                       ["train.tsv, line 62", "found 3, expected 2"]),
    "a field too few": (dict(train_csv="id," + GOOD_CSV.replace("\nfilm", "\n1,film") + "2,yes\n"),
                        ["train.csv, line 62", "found 2, expected 3"]),
    "a column twice": (dict(train_csv="sentence,label,label\n" + "good,yes,a\n" * 60),
                       ["train.csv, line 1", "'label'", "2 times"]),
    "another separator": (dict(train_csv=GOOD_CSV.replace(",", ";")),
                          ["train.csv, line 1", "';' between the columns", "','"]),
    "another column twice": (dict(train_csv="id,id,sentence,label\n" + "1,1,good,yes\n" * 60),
                             ["train.csv, line 1", "'id'"]),
    "a quote that never closes": (dict(train_csv=GOOD_CSV + '"good,yes\n' + GOOD_CSV),
                                  ["train.csv, line 62", "never closes"]),
    "text after a quote": (dict(train_csv=GOOD_CSV + '"good" film,yes\n'),
                           ["train.csv, line 62", "after a closing quote"]),
    "line numbers after line breaks": (dict(train_csv=GOOD_CSV + '"a\nb\r\nc",yes\ngood\n'),
                                       ["train.csv, line 65", "found 1, expected 2"]),
    "sentences and questions": (dict(train_tsv=TRAIN, train_json="{}"),
                                ["train.tsv", "train.json", "one of the two"]),
    "sentences and questions of two splits": (dict(train_tsv=TRAIN, dev_json="{}"),
                                              ["train.tsv", "dev.json"]),
    "two validation files": (dict(train_tsv=TRAIN, val_tsv=TRAIN, eval_csv=TRAIN),
                             ["both val.tsv and eval.csv"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_folder_gives_one_line(tmp_path, case):
    files, words = BAD[case]
    with pytest.raises(SystemExit) as e:
        load_folder(folder(tmp_path / "d", **files))
    assert e.value.code.startswith("error: ") and "\n" not in e.value.code
    assert all(word in e.value.code for word in words), e.value.code


@pytest.fixture
def warned(tmp_path, capsys):
    """A function that loads a folder of these files: (the Task, what was said on stderr)."""
    def load(**files):
        shutil.rmtree(tmp_path / "d", ignore_errors=True)
        task = load_folder(folder(tmp_path / "d", **files))
        return task, capsys.readouterr().err.splitlines()
    return load


def texts(task):
    return [sentence for rows in task[1:4] for sentence in rows.sentences]


def test_good_files_warn_of_nothing(warned):
    assert warned(train_tsv=TRAIN, README_md="notes", __DS_Store="x")[1] == []
    assert warned(train_csv=GOOD_CSV + '\n"a ""quoted"", film",yes\n\n')[1] == []


def test_blanks_after_the_commas_of_a_header_belong_to_no_name(warned):
    rows = "".join(f"film {i} was, the film, {['no', 'yes'][i % 2]}\n" for i in range(60))
    task, said = warned(train_csv="sentence, sentence2, label\n" + rows)
    assert not said and task.label_names == ["no", "yes"]
    assert {second for _, second in texts(task)} == {"the film"}


def test_a_second_text_that_is_not_read_is_said(warned):
    rows = "".join(f"{i}\twho plays role {i} in it\tTom plays it {i} times\t{i % 2}\n"
                   for i in range(60))
    _, (line,) = warned(train_tsv="index\tquestion\tsentence\tlabel\n" + rows)  # QNLI's
    assert "question may hold texts, too, and is not read" in line and "sentence2" in line


def test_a_class_that_is_not_tested_is_said(warned):
    _, (line,) = warned(train_tsv=TRAIN, test_tsv=tsv(("t", "yes")))
    assert "no test row has the label no: in macro-F1" in line


def test_an_empty_line_of_a_single_column_is_a_row(tmp_path):
    for name in "a.tsv", "a.csv":
        (tmp_path / name).write_text("text\na good film\n\na bad film\n")
        assert [row["text"] for _, row in checks.read_table(tmp_path / name)] == [
            "a good film", "", "a bad film"]


def letter(i):
    return f'"Hi, I pay {i} times.\n\nPlease stop, soon.\r\nThanks, Ann, bye\nRegards,\nTom",no\n'


def test_line_breaks_in_a_field_are_no_warning_unless_they_hold_rows(warned):
    task, said = warned(train_csv=GOOD_CSV + "".join(map(letter, range(20))))
    assert said == [] and sum("Regards" in text for text in texts(task)) == 20
    lines = GOOD_CSV.splitlines()
    lines[20], lines[40] = '"' + lines[20], lines[40].replace(",", '",')  # 21 rows become one
    task, (line,) = warned(train_csv="\n".join(lines) + "\n" + letter(1))
    assert len(texts(task)) == 60 - 20 + 1
    assert line.startswith("warning: ") and "opens at line 21 and closes at line 41" in line


def test_a_long_field_is_read_whole(warned):
    task, said = warned(train_csv=GOOD_CSV + "lovely " * 30_000 + ",yes\n")
    assert max(map(len, texts(task))) == 30_000 * 7 - 1 and said == []


@pytest.mark.parametrize("labels, names, words", [
    (["01", "007"], ["01", "007"], []),
    (["2", "01", "1"], ["01", "1", "2"], ["'01' and '1'"]),
    ([str(i) for i in range(11)], [str(i) for i in range(11)], []),
    (["10", "9", "x"], ["10", "9", "x"], []),
    (["0.0", "1.0"], ["0.0", "1.0"], []),
    (["9.5", "10.0", "-1.0"], ["-1.0", "9.5", "10.0"],
     ["3 labels are numbers with fractions", "-1.0 to 10.0"]),
    (["caf\u00e9", "cafe\u0301", "tea"], ["cafe\u0301", "caf\u00e9", "tea"],
     ["'caf\u00e9'", "'cafe\u0301'", "two classes"]),
    (["1", "+1.0", "2"], ["+1.0", "1", "2"], ["'+1.0' and '1'"]),
    (["good", "good\u200b", "bad"], ["bad", "good", "good\u200b"], ["good\\u200b", "two classes"]),
    (["Yes", "yes", "no"], ["Yes", "no", "yes"], ["'Yes' and 'yes'"]),
])
def test_labels_are_the_text_of_the_file(labels, names, words, warned):
    task, said = warned(train_tsv=tsv(*[(f"film {i}", labels[i % len(labels)])
                                        for i in range(120)]))
    assert task.label_names == names
    lookup = {sentence: task.label_names[label]
              for rows in task[1:4] for sentence, label in zip(*rows)}
    assert all(lookup[f"film {i}"] == labels[i % len(labels)] for i in range(120))
    assert len(said) == bool(words) and all(word in said[0] for word in words), said


def test_quotes_that_a_tsv_does_not_know_are_named(warned):
    rows = TRAIN + '"a ""good"" film"\tyes\n' + '"good" is good\tyes\n'
    task, (line,) = warned(train_tsv=rows)
    assert '"a ""good"" film"' in texts(task) and "1 rows, line 62 first" in line


@pytest.mark.parametrize("name", ["validation", "val", "valid", "dev", "eval"])
def test_names_of_the_validation_file(name, warned):
    task, said = warned(**{"train_tsv": TRAIN, f"{name}_tsv": tsv(("v", "no"), ("w", "yes")),
                           "test_csv": "label,sentence\nyes,t\nno,u\n"})
    assert task.validation.sentences == ["v", "w"] and task.test.sentences == ["t", "u"]
    assert said == []


def test_tables_that_are_not_read_are_named(warned):
    _, (line,) = warned(train_tsv=TRAIN, train2_tsv=TRAIN, test_parquet="{}", Dev_TSV=TRAIN,
                        test_txt="x", notes_txt="x", dev_csv_gz="x")
    unread = "train2.tsv", "test.parquet", "Dev.TSV", "test.txt", "dev.csv.gz"
    assert all(name in line for name in unread) and "notes" not in line
    assert line.endswith("read are train.tsv")


class Characters:
    """A tokenizer stand-in: a token a character."""
    pad_token_id = 0

    def __call__(self, sentences, truncation=False, max_length=None):
        return {"input_ids": [[ord(c) for c in s][:max_length] for s in sentences]}


@pytest.fixture
def encoded():
    rng = np.random.default_rng(0)
    sentences = ["x" * n for n in rng.integers(1, 40, size=333)]
    rows = data.Rows(sentences, [len(s) % 2 for s in sentences])
    return data.Sentences(rows, Characters(), lengths(30))


def test_batches_cover_every_row_once_with_little_padding(encoded):
    for rng in None, np.random.default_rng(1):
        batches = encoded.batches(32, rng)
        assert sorted(np.concatenate(batches)) == list(range(333)) and max(map(len, batches)) == 32
        padded = sum(len(b) * encoded.lengths[b].max() for b in batches)
        assert padded < 1.15 * encoded.lengths.sum()


def test_batches_without_length_groups_are_random(encoded):
    batches = encoded.batches(32, np.random.default_rng(1), by_length=False)
    assert sorted(np.concatenate(batches)) == list(range(333))
    assert sum(len(b) * encoded.lengths[b].max() for b in batches) > 1.3 * encoded.lengths.sum()


def test_order_comes_from_the_seed_and_changes_with_the_epoch(encoded):
    flat = lambda rng: np.concatenate(encoded.batches(32, rng)).tolist()
    rng = np.random.default_rng(1)
    first, second = flat(rng), flat(rng)
    assert first == flat(np.random.default_rng(1)) and first != second


def test_how_many_sentences_are_cut_is_said(encoded):
    n = 333 - sum(len(row) < 30 for row in encoded.ids)
    exactly = sum(len(s) == 30
                  for s in ("x" * k for k in np.random.default_rng(0).integers(1, 40, size=333)))
    assert (encoded.note == f"{n - exactly} of 333 sentences are cut at 30 tokens (--max-length)"
            and exactly > 0)
    assert not data.Sentences(data.Rows(["x"], [0]), Characters(), lengths(30)).note


def test_collate_pads_masks_and_cuts(encoded):
    long, short = int(encoded.lengths.argmax()), int(encoded.lengths.argmin())
    x = encoded.collate(np.array([long, short]))
    n = encoded.lengths[short]
    assert encoded.lengths[long] == 30 and x["input_ids"].shape == (2, 30)
    assert (x["attention_mask"][0].all()
            and x["attention_mask"][1].tolist() == [1] * n + [0] * (30 - n))
    assert x["input_ids"][1, n:].sum() == 0 and x["labels"].tolist() == [0, n % 2]


def test_hub_tasks_take_the_labelled_rows(monkeypatch):
    """The hub's own layout, without the hub: SST-2's test labels are hidden (-1), AG News has no
    validation."""
    import datasets

    def fake(name, config, revision=None):
        names, column, hidden = {"nyu-mll/glue": (["negative", "positive"], "sentence", [-1] * 9),
                                 "fancyzhx/ag_news": (["World", "Sports", "Business", "Sci/Tech"],
                                                      "text", None)}[name]
        features = datasets.Features({column: datasets.Value("string"),
                                      "label": datasets.ClassLabel(names=names)})
        labels = {"train": [i % len(names) for i in range(400)], "test": hidden or [3, 1]}
        labels |= {"validation": [1, 0]} if hidden else {}
        return datasets.DatasetDict({split: datasets.Dataset.from_dict(
            {column: [f"{split} {i} " for i in range(len(y))], "label": y}, features=features)
                                     for split, y in labels.items()})

    monkeypatch.setattr(datasets, "load_dataset", fake)
    sst2, ag_news = data.load_hub("sst2"), data.load_hub("ag_news")
    assert (sst2.test == (["validation 0", "validation 1"], [1, 0])
            and sst2.label_names == ["negative", "positive"])
    assert ag_news.test == (["test 0", "test 1"], [3, 1]) and ag_news.label_names[3] == "Sci/Tech"
    for task in sst2, ag_news:
        assert (len(task.validation.labels) == 40 and len(task.train.labels) == 360
                and "40 of train validate" in task.note)


# --- .jsonl, other names of columns, pairs of sentences -------------------------------------------

def test_json_lines_have_labels_of_any_kind(tmp_path):
    lines = "".join(f'{{"sentence": "film {i} é", "label": {["true", "3"][i % 2]}}}\n\n'
                    for i in range(60))
    task = load_folder(folder(tmp_path / "d", train_jsonl=lines))
    assert task.label_names == ["3", "true"] and "film 7 é" in texts(task)


def test_rows_that_are_trained_on_and_scored_are_named(tmp_path, capsys):
    rows = "".join(f"film {i},{i % 2}\n" for i in range(60))
    trained = "sentence,label\n" + rows
    load_folder(folder(tmp_path / "alone", train_csv=trained))
    assert capsys.readouterr().err == ""
    dev = "sentence,label\nfilm 100,1\n" + rows
    load_folder(folder(tmp_path / "d", train_csv=trained, dev_csv=dev))
    # six of the sixty validate
    assert "54 of 61 test rows stand in the training rows, too" in capsys.readouterr().err
    load_folder(folder(tmp_path / "twice", train_csv=trained + rows), "--fold", "1/5")
    assert "test rows stand in" in (err := capsys.readouterr().err) and "validation rows" in err


@pytest.mark.parametrize("line, words", [
    ('{"sentence": "a"}', ["line 61", "'label'"]), ('["a", "b"]', ["line 61", "not an object"]),
    *[(f'{{"sentence": "a", "label": {label}}}', ["line 61", "no label"])
      for label in ("null", "NaN", '" "')], ("{", ["line 61", "not JSON"]),
    *[(f'{{"sentence": "a", "label": {label}}}', ["line 61", "'label' is", "not a label"])
      for label in ('["1"]', "[]", '{"a": 1}')],
    ('{"sentence": 3, "label": "a"}', ["line 61", "'sentence' is '3'"]),
    ('{"sentence": " ", "label": "a"}', ["line 61", "no sentence"]),
    ('{"sentence": "\\ud800", "label": "a"}', ["line 61", "surrogate"])])
def test_bad_json_lines(line, words, tmp_path):
    good = "".join(f'{{"sentence": "film {i}", "label": "{i % 2}"}}\n' for i in range(60))
    d = folder(tmp_path / "d", train_jsonl=good + line)
    one_line_exit(lambda: load_folder(d), "train.jsonl", *words)


def test_columns_of_other_names(tmp_path):
    rows = "id,body,stars\n" + "".join(f"{i},film {i},{i % 2}\n" for i in range(60))
    d = folder(tmp_path / "d", train_csv=rows)
    flags = ["--method", "lora", "--data", d]
    s = settings(*flags, "--text-column", "body", "--label-column", "stars")
    task = data.load_sentences(s, d)
    assert task.label_names == ["0", "1"] and "film 5" in texts(task)
    one_line_exit(lambda: settings(*flags), "texts (none looks like it)", "id, body, stars")
    one_line_exit(lambda: settings(*flags, "--text-column", "bdy"), "'bdy'", "id,body,stars")
    # the second sentence alone, if it is asked for
    second = folder(tmp_path / "second", train_csv=PAIRS)
    s = settings("--method", "lora", "--data", second, "--text-column", "sentence2")
    assert not data.load_sentences(s, second).has_pairs
    # the usual names change nothing, and another column is another run
    flags[-1] = second
    assert settings(*flags, "--text-column", "sentence") == settings(*flags) != s
    one_line_exit(lambda: settings("--method", "lora", "--text-column", "body"), "--text-column")


# --- one file, and columns that are found ---------------------------------------------------------

def body(i):
    return f"order {i} is still not here, and nobody answers"


def table(**columns):
    """A .csv of sixty rows; of each column a function of the row's number."""
    rows = "".join(",".join(f'"{of(i)}"' for of in columns.values()) + "\n" for i in range(60))
    return ",".join(columns) + "\n" + rows


def cat(i):
    return ["billing", "technical issue", "account & access"][i % 3]


@pytest.mark.parametrize("name, text", [("my.tickets.csv", GOOD_CSV), ("tickets.tsv", TRAIN), (
    "t.jsonl", "".join(f'{{"sentence": "film {i}", "label": {i % 2}}}\n' for i in range(60)))])
def test_a_file_is_read_as_a_folder_with_train_alone(name, text, tmp_path, capsys):
    file = tmp_path / name
    file.write_text(text)
    (tmp_path / "notes.md").write_text("x")
    s = settings("--method", "full", "--data", file)
    assert s.task == file.stem and settings("--method", "full", "--data", tmp_path) == (
        dataclasses.replace(s, task=tmp_path.name))  # the only table of its folder
    task = data.load_sentences(s, file)
    train_alone = folder(tmp_path / "d", **{f"train{file.suffix}".replace(".", "_"): text})
    assert task == load_folder(tmp_path) == load_folder(train_alone)
    assert len(load_folder(file, "--fold", "1/5").test.labels) == 12
    (tmp_path / "b.csv").write_text(text)
    one_line_exit(lambda: load_folder(tmp_path), "no train file", "b.csv", name, "--data")
    assert settings("--method", "full", "--data", file) == s
    (tmp_path / "train.csv").write_text(GOOD_CSV)
    assert len(texts(load_folder(tmp_path))) == 60
    assert f"not read: {', '.join(sorted(['b.csv', name]))}" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["tickets.xlsx", "TICKETS.CSV", "tickets"])
def test_files_that_are_no_table(name, tmp_path):
    (tmp_path / name).write_text(GOOD_CSV)
    one_line_exit(lambda: load_folder(tmp_path / name), name, ".csv", ".jsonl")
    one_line_exit(lambda: load_folder(tmp_path), "no train file", "none")


@pytest.mark.parametrize("columns, found", [
    (dict(body=body, category=cat), ("body", "category")),
    (dict(category=cat, body=body), ("body", "category")),
    (dict(body=body, code=lambda i: f"c{i % 3:02d}"), ("body", "code")),
    (dict(id=lambda i: 1000 + i, created=lambda i: f"2026-02-{i % 3 + 10}",
          sent=lambda i: "Tue Feb 17 10:33:21 UTC 2026"[i % 2:], price=lambda i: f"${i % 2}9.99",
          cost=lambda i: f"{i % 2}9.99", name=lambda i: f"Ann van Dyk{i}", plan=lambda i: "basic",
          year=lambda i: 2024 + i % 2, note=lambda i: "" if i else body(i), body=body,
          stars=lambda i: i % 5 + 1), ("body", "stars")),
    (dict(sentence1=body, sentence2=body, gold=lambda i: i % 2), ("sentence1", "gold")),
    (dict(text=body, label=lambda i: f"{i % 2}.0"), ("text", None)),
    (dict(sentence=lambda i: i, other=body, y=lambda i: i % 2), (None, "y")),
    (dict(sentence=body, label=cat, text=body, category=cat), (None, None)),
    (dict(text=lambda i: f"我被收费两次{i}", y=cat), ("text", "y"))])
def test_columns_are_found_and_make_the_run_that_the_flags_make(columns, found, tmp_path, capsys):
    (tmp_path / "t.csv").write_text(table(**columns))
    flags = ["--method", "lora", "--data", tmp_path / "t.csv"]
    s = settings(*flags)
    text, label = found
    assert (s.text_column, s.label_column) == found
    assert s == settings(*flags, "--text-column", text or "sentence",
                         "--label-column", label or "label")
    assert s == settings(*flags, "--text-column", text or "sentence")
    task = data.load_sentences(s, tmp_path / "t.csv")
    assert task.has_pairs is ("sentence2" in columns)
    said = capsys.readouterr().out.splitlines()
    assert said == ([] if found == (None, None) else [
        f"texts are in the column {text or 'sentence'!r}, labels in {label or 'label'!r}; "
        "--text-column and --label-column take others"])


@pytest.mark.parametrize("columns, words", [
    (dict(id=lambda i: i, subject=body, body=body, category=cat),
     ["texts (subject or body)", "labels (category)", "id, subject, body, category"]),
    (dict(body=body, category=cat, agent=lambda i: ["Ann", "Bo"][i % 2]),
     ["texts (body)", "labels (category or agent)"]),
    (dict(body=body, name=lambda i: f"name{i}"), ["labels (none looks like it)"]),
    (dict(body=body, age=lambda i: i // 2), ["labels (none looks like it)"]),
    (dict(body=lambda i: "yes it is so", y=cat), ["texts (none looks like it)"])])
def test_columns_that_are_not_obvious(columns, words, tmp_path):
    (tmp_path / "t.csv").write_text(table(**columns))
    flags = ["--method", "lora", "--data", tmp_path / "t.csv"]
    one_line_exit(lambda: settings(*flags), "--text-column", "--label-column", *words)
    if "subject" in columns:  # one of the two is enough
        assert settings(*flags, "--text-column", "body").label_column == "category"
        assert settings(*flags, "--label-column", "subject").text_column == "body"


def test_found_columns_must_be_in_the_other_files(tmp_path):
    d = folder(tmp_path / "d", train_csv=table(body=body, y=cat), dev_csv="text,y\na,billing\n")
    one_line_exit(lambda: load_folder(d), "dev.csv has no column 'body'")


def test_a_file_is_trained_on_and_its_columns_are_those_of_predict(tmp_path, capsys):
    (tmp_path / "tickets.csv").write_text(table(body=body, kind=cat))
    model = save_small_bert(tmp_path / "model")
    train.main(["--method", "head", "--data", str(tmp_path / "tickets.csv"), "--model", str(model),
                "--max-steps", "1", "--train-rows", "31", "--output", str(tmp_path / "out")])
    said, warned = capsys.readouterr()
    assert warned.count("warning: the warm-up covers every step (1)") == 1
    said = said.splitlines()
    line, = [line for line in said if line.startswith("3 classes: ")]
    assert line.endswith(" (training rows)") and all(f"{cat(i)} 1" in line for i in range(3))
    assert sorted(int(n) for n in re.findall(r"\d\d", line)) == [10, 10, 11]
    assert sum(line.startswith("texts are in the column 'body', labels") for line in said) == 1
    path, = (tmp_path / "out" / "checkpoints").glob("tickets_head_*")
    (tmp_path / "new.csv").write_text("text,body\nx,where is it\n")
    predict.main(predict.parse_args([
        "--checkpoint", str(path), "--model", str(model), "--input", str(tmp_path / "new.csv"),
        "--to", str(tmp_path / "labelled.csv")]))
    assert predict.find_column(path, ["sentence", "body"], None, [None, "body"]) == "body"
    assert predict.find_column(path, ["text", "sentence"], None, ["body"]) == "sentence"
    assert predict.find_column(path, ["text", "body"], "text", ["body"]) == "text"
    assert (tmp_path / "labelled.csv").read_text().startswith("text,body,tickets_head_")


def test_of_many_classes_the_largest_and_the_smallest_are_said():
    names = [f"class {i}" for i in range(21)]
    rows = data.Rows(["x"] * 231, [i for i in range(21) for _ in range(i + 1)])
    task = data.Task(names, rows, rows, rows, "", data.Sentences)
    assert data.count_classes(task) == (
        "21 classes: " + ", ".join(f"class {i} {i + 1}" for i in range(20, 10, -1))
        + ", ..., the smallest class 0 1 (training rows)")


PAIRS = "sentence,sentence2,label\n" + "".join(
    f"film {i} is {'good ' * (i % 9)},so is {i},{i % 2}\n" for i in range(60))


def test_pairs_are_read_split_and_tokenised_as_pairs(tmp_path):
    task = load_folder(folder(tmp_path / "d", train_csv=PAIRS))
    assert task.has_pairs and ("film 10 is good", "so is 10") in texts(task)
    assert not data.load_rated("products").has_pairs
    tokenizer, rows = default_tokenizer(), task.train
    split = data.Sentences(rows, tokenizer, lengths(14))
    x = split.collate([0, 1, 2])
    for i in range(3):
        a, b = (tokenizer(text)["input_ids"] for text in rows.sentences[i])
        n = int(x["attention_mask"][i].sum())
        ids, types = x["input_ids"][i, :n].tolist(), x["token_type_ids"][i, :n].tolist()
        if len(a) + len(b) - 1 <= 14:
            assert ids == a + b[1:] and types == [0] * len(a) + [1] * (len(b) - 1)
        else:  # the longer one is cut, and the shorter one is whole
            assert n == 14 and ids == a[:14 - len(b)] + a[-1:] + b[1:]
            assert types == [0] * (15 - len(b)) + [1] * (len(b) - 1)
        assert not x["token_type_ids"][i, n:].any()
    assert 0 < split.n_cut < split.n and "cut at 14" in split.note
    assert "token_type_ids" not in data.Sentences(
        data.Rows(["a"], [0]), tokenizer, lengths(14)).collate([0])


@pytest.mark.parametrize("files, words", [
    (dict(train_csv=PAIRS, dev_csv=GOOD_CSV), ["only train", "sentence2"]),
    (dict(train_csv=PAIRS + "a,,1\n"), ["line 62", "no sentence2"]),
    (dict(train_jsonl='{"sentence": "a", "sentence2": "b", "label": 1}\n'
                      '{"sentence": "xyz", "label": 0}\n'), ["line 2", "no sentence2"]),
    (dict(train_jsonl='{"sentence": "xyz", "label": 0}\n'
                      '{"sentence": "a", "sentence2": "b", "label": 1}\n'), ["line 2", "unlike"])])
def test_bad_pairs(files, words, tmp_path):
    d = folder(tmp_path / "d", **files)
    one_line_exit(lambda: load_folder(d), *words)


def test_pairs_are_trained_on_and_a_file_of_pairs_is_answered(tmp_path):
    d = folder(tmp_path / "d", train_csv=PAIRS)
    model = save_small_bert(tmp_path / "model")
    train.main(["--method", "lora", "--data", str(d), "--model", str(model), "--epochs", "3",
                "--batch-size", "8", "--lr", "0.1", "--output", str(tmp_path / "out")])
    path, = (tmp_path / "out" / "checkpoints").iterdir()
    ask = lambda *flags: predict.main(predict.parse_args(
        ["--checkpoint", str(path), "--model", str(model), *map(str, flags)]))
    # the second sentence counts: the first row once more, the other way round
    (tmp_path / "ask.csv").write_text(PAIRS + "so is 0,film 0 is,0\n")
    ask("--input", tmp_path / "ask.csv", "--to", tmp_path / "answers.csv")
    rows = (tmp_path / "answers.csv").read_text().splitlines()
    assert len(rows) == 62 and rows[0].startswith("sentence,sentence2,label,")
    assert rows[1].startswith("film 0 is ,so is 0,0,")
    assert rows[1].split(",")[-1] != rows[61].split(",")[-1]
    (tmp_path / "single.csv").write_text("sentence\na film\n")
    one_line_exit(lambda: ask("--input", tmp_path / "single.csv", "--to", tmp_path / "o.csv"),
                  "'sentence2'", "pairs")
    one_line_exit(lambda: ask("a film"), "trained on pairs")
