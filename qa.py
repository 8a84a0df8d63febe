"""Extractive question answering: SQuAD-style data, windows over long passages, the best span, F1
and exact match.

The task is that of SQuAD v1.1 (Rajpurkar et al. 2016, https://arxiv.org/abs/1606.05250), the model
BERT's (Devlin et al. 2019, section 4.2): the answer is the span i..j of the passage with the
largest start_i + end_j.
"""
import functools
import json
import random
import re
import string
import unicodedata
from collections import Counter
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from checks import check_surrogates, files_to_read, warn_repeats
from common import check_ordinary, fail
from data import Encoded, Task, from_hub, load_sentences
from fetch import synthetic_folder
from settings import SPLIT_SEED, is_synthetic

GENERATED = "synthetic-"  # how their ids begin
MAX_QUESTION = 64  # tokens of a question that are read, as in BERT's own SQuAD code
JOINERS = "\u200c\u200d"  # invisible themselves, they shape the letter before them


class Question(NamedTuple):
    context: str
    question: str
    answers: list  # of str: any of them is right
    # where the first answer that is aligned stands in the context, in characters; None: none is
    start: int | None
    end: int | None  # one past its last character
    level: str | None = None  # how hard it is, where the data says so
    group: str | None = None  # of questions that are much alike


def group_of(q):
    """Name the group of a question, whose answers are right or wrong together: its passage, or of
    generated questions, which have levels, those that differ in names and numbers alone."""
    if q.get("level") is None:
        return q["context"]
    return f"{q['level']}: {re.sub(r'[A-Z0-9][a-z0-9]*', '', q['question'])}"


def make_question(q):
    """Make the Question of a dict as the hub has it: id, context, question, answers {text: [],
    answer_start: []}."""
    if not q["question"].strip():
        fail(f"question {q['id']!r} is empty")
    if not q["answers"]["text"]:
        fail(f"question {q['id']!r} has no answer; SQuAD 2.0's unanswerable questions are not "
             "supported")
    question = Question(q["context"], q["question"].strip(), q["answers"]["text"], None, None,
                        q.get("level"), group_of(q))
    for text, start in zip(q["answers"]["text"], q["answers"]["answer_start"]):
        if start >= 0 and q["context"][start:start + len(text)] == text:
            # no token stands on what is not seen
            seen = [start + i for i, c in enumerate(text)
                    if not c.isspace() and unicodedata.category(c) not in ("Cc", "Cf")]
            if seen:
                return question._replace(start=seen[0], end=seen[-1] + 1)
    return question


def read_squad(path):
    """Read the questions of a SQuAD v1.1 JSON file, as dicts of the hub's form."""
    def get(owner, key, kind, where):
        if not isinstance(owner, dict) or key not in owner:
            fail(f"{path} is not SQuAD-shaped: no key {key!r} in {where}")
        if not isinstance(owner[key], kind) or isinstance(owner[key], bool):
            fail(f"{path} is not SQuAD-shaped: {key!r} in {where} is {str(owner[key])[:40]!r}, not "
                 f"a {kind.__name__}")
        if kind is str:
            check_surrogates(path, f": {key!r} in {where}", owner[key])
        return owner[key]

    check_ordinary(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
        root = json.loads(text)
    except UnicodeDecodeError as e:
        fail(f"{path} is not UTF-8: byte {e.object[e.start]:#04x} ({e.reason}); save it as UTF-8")
    except OSError as e:
        fail(f"cannot read {path}: {e.strerror}")
    except (ValueError, RecursionError) as e:
        if len(lines := text.split("\n", 1)) == 2 and lines[0].strip().endswith("}"):
            fail(f"{path} holds a JSON object in every line; call it {path.stem}.jsonl")
        fail(f"cannot read {path}: {e}")

    questions = []
    for i, article in enumerate(get(root, "data", list, "the whole")):
        for j, paragraph in enumerate(get(article, "paragraphs", list, f"data[{i}]")):
            where = f"data[{i}].paragraphs[{j}]"
            context = get(paragraph, "context", str, where)
            for k, qa in enumerate(get(paragraph, "qas", list, where)):
                here = f"{where}.qas[{k}]"
                question = get(qa, "question", str, here)
                answers = [(get(a, "text", str, f"{here}.answers"),
                            get(a, "answer_start", int, f"{here}.answers"))
                           for a in (get(qa, "answers", list, here) if "answers" in qa else [])]
                answers = [answer for answer in answers if answer[0].strip()]
                columns = dict(zip(("text", "answer_start"), map(list, zip(*answers))))
                name = str(qa.get("id", here))
                questions.append({"id": name, "context": context, "question": question,
                                  # other data sets have levels of their own
                                  "level": qa.get("level") if name.startswith(GENERATED) else None,
                                  "answers": columns or {"text": [], "answer_start": []}})
    if not questions:
        fail(f"{path} has no questions")
    return questions


def hub_questions(task):
    """Load {split: questions as dicts} of SQuAD v1.1 or of a machine translation of it into
    Portuguese, train and validation. Empty questions and those without an answer are left out, and
    counted."""
    # the parquet files of squad_pt, since its script no longer runs
    name, revision = {"squad": ("rajpurkar/squad", None),
                      "squad_pt": ("nunorc/squad_v1_pt", "refs/convert/parquet")}[task]
    splits = from_hub(name, None, revision, "synthetic")
    questions = {split: list(splits[split]) for split in ("train", "validation")}
    whole = {split: [q for q in part if q["question"].strip() and q["answers"]["text"]]
             for split, part in questions.items()}
    if n := sum(map(len, questions.values())) - sum(map(len, whole.values())):
        print(f"{name}: {n:,} questions left out, which are empty or have no answer")
    return whole


def shuffled_passages(questions):
    """Draw an order of the passages of some questions, with SPLIT_SEED."""
    passages = sorted({q.context for q in questions})
    np.random.default_rng(SPLIT_SEED).shuffle(passages)
    return passages


def carve_passages(questions):
    """Split off whole passages, drawn with SPLIT_SEED, until they hold a tenth of the questions, or
    1,000: (rest, slice)."""
    size, by_passage = min(1000, len(questions) // 10), Counter(q.context for q in questions)
    chosen, n = set(), 0
    for passage in shuffled_passages(questions):
        if n >= size:
            break
        chosen.add(passage)
        n += by_passage[passage]
    rest, out = ([q for q in questions if (q.context in chosen) is is_out]
                 for is_out in (False, True))
    if not rest or not out:
        fail(f"cannot split {len(questions)} questions on {len(by_passage)} passages; give "
             "validation and test files")
    return rest, out


def train_on_passages(task, n):
    """Keep n of the training questions of a Task, by passages drawn with SPLIT_SEED: as few
    passages as hold n, so that a small n's questions are among a larger n's."""
    if n > len(task.train):
        fail(f"--train-rows {n}: there are {len(task.train):,} training questions")
    place = {passage: i for i, passage in enumerate(shuffled_passages(task.train))}
    train = sorted(task.train, key=lambda q: place[q.context])[:n]
    note = (f"{task.note}; trained on {n:,} of {len(task.train):,} training questions, on "
            f"{len({q.context for q in train}):,} of {len(place):,} passages (seed {SPLIT_SEED})")
    return task._replace(train=train, note=note)


def load_questions(s, folder=None):
    """Load the question-answering Task of the settings `s`; folder: the user's own, or the one
    file. What is missing is filled in as for sentences (data.make_task).

    Answers that do not stand where the data says (answer_start) cannot be trained on: those
    questions are left out of train and validation, counted and said. In test they stay, because
    scoring compares texts.
    """
    is_generated = is_synthetic(s) and not folder
    if folder or is_generated:
        files = files_to_read(folder or synthetic_folder(s.data_sha256))
        raw = {split: read_squad(path) for split, path in files.items()}
    else:
        raw = hub_questions(s.task)
    splits = {split: [make_question(q) for q in questions] for split, questions in raw.items()}
    notes, n_misaligned = [], 0
    if "test" not in splits and "validation" in splits:
        splits["test"] = splits.pop("validation")
        notes.append("no test file: the validation questions are the test")

    for split in {"train", "validation"} & splits.keys():
        aligned = [q for q in splits[split] if q.start is not None]
        n_misaligned += len(splits[split]) - len(aligned)
        if not aligned:
            fail(f"no answer of the {len(splits[split])} {split} questions stands at its "
                 "answer_start in its context")
        splits[split] = aligned
    for split in "test", "validation":
        if split not in splits:
            splits["train"], splits[split] = carve_passages(splits["train"])
            notes.append(f"{len(splits[split]):,} questions of train, on passages of their own, "
                         f"are the {split} (seed {SPLIT_SEED})")

    if is_generated:
        notes.append(f"SYNTHETIC passages and questions, seed {SPLIT_SEED}")
    if n_misaligned:
        notes.append(f"{n_misaligned:,} questions left out of train and validation, their answers "
                     "do not stand at answer_start")
    if folder:
        asked = {split: [(q.context, q.question) for q in own] for split, own in splits.items()}
        warn_repeats(asked.pop("train"), asked)
    note = "; ".join(notes) or "splits as given"
    task = Task(None, splits["train"], splits["validation"], splits["test"], note, Windows)
    return train_on_passages(task, s.train_rows) if s.train_rows else task


def load_task(s, folder=None):
    """Load the Task of the settings `s`, of questions or of sentences, as these two."""
    return load_questions(s, folder) if s.is_qa else load_sentences(s, folder)


def normalize(text):
    """Return a text in lower case, without punctuation, English articles and extra white space, as
    the official SQuAD v1.1 script does."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact_match(answer, reference):
    """Return 1.0 if two texts are the same after normalising, else 0.0."""
    return float(normalize(answer) == normalize(reference))


def f1(answer, reference):
    """Compute the harmonic mean of precision and recall over the words that answer and reference
    share, in [0, 1]."""
    a, b = normalize(answer).split(), normalize(reference).split()
    shared = sum((Counter(a) & Counter(b)).values())
    # F1 = 2 P R / (P + R), with P = shared / |a| and R = shared / |b|
    return 2 * shared / (len(a) + len(b)) if shared else 0.0


def question_scores(predictions):
    """Score [(references, answer)], in percent: {f1: [one per question], exact_match: [...]}. The
    reference that fits best counts."""
    return {name: [100 * max(measure(answer, reference) for reference in references)
                   for references, answer in predictions]
            for name, measure in (("f1", f1), ("exact_match", exact_match))}


def random_f1(questions, draws=5):
    """Return the mean F1 of random pieces of each question's passage, in percent, one per question:
    a piece has as many words as the first reference. It is what no training reaches."""
    rng, scores = random.Random(SPLIT_SEED), []
    for q in questions:
        words, size = q.context.split(), max(1, len(q.answers[0].split()))
        starts = [rng.randrange(max(1, len(words) - size + 1)) for _ in range(draws)]
        pieces = [(q.answers, " ".join(words[start:start + size])) for start in starts]
        scores.append(float(np.mean(question_scores(pieces)["f1"])))
    return scores


def past_marks(context, end):
    """Return where the word ends whose last token ends at `end`, a character of the context.

    The normaliser drops combining marks and joiners, so that no token covers them, though they
    belong to the letter before. Other invisible characters (zero-width space, soft hyphen,
    direction marks) behind a word belong to nothing.
    """
    while end < len(context) and (context[end] in JOINERS
                                  or unicodedata.category(context[end]) == "Mn"):
        end += 1
    return end


class Windows(Encoded):
    """The questions of one split as windows: [CLS] question [SEP] a piece of the passage [SEP], at
    most max_length tokens. Neighbouring windows of a long passage share `stride` tokens. A window
    that does not hold the whole answer has [CLS] for its start and end ("null window"); if no
    window holds it, none is used for training."""
    metric = "f1"

    def __init__(self, questions, tokenizer, s):
        self.questions, self.n, self.pad_id = questions, len(questions), tokenizer.pad_token_id
        texts = [q.question for q in questions]
        short = tokenizer(texts, add_special_tokens=False,
                          return_offsets_mapping=True)["offset_mapping"]
        texts = [text[:o[:MAX_QUESTION][-1][1]] if o else text for text, o in zip(texts, short)]
        out = tokenizer(texts, [q.context for q in questions], truncation="only_second",
                        max_length=s.max_length, stride=s.stride,
                        return_overflowing_tokens=True, return_offsets_mapping=True)

        self.ids = [torch.tensor(ids) for ids in out["input_ids"]]
        self.lengths = np.array([len(ids) for ids in self.ids])
        self.question = out["overflow_to_sample_mapping"]  # of every window
        # of every window: first and one past the last token of the passage
        self.passage = [(parts.index(1), len(parts) - parts[::-1].index(1)) if 1 in parts
                        else (len(parts), len(parts))
                        for parts in map(out.sequence_ids, range(len(self.ids)))]
        # of every window: first and one past the last character of each token, (tokens, 2)
        self.offsets = [np.array(offsets, np.int32) for offsets in out["offset_mapping"]]
        self.has_types = "token_type_ids" in tokenizer.model_input_names
        self.max_answer = s.max_answer_length  # tokens

        self.find_answers()
        held = {self.question[window] for window in range(len(self.ids))
                if self.spans[window].any()}
        self.usable = np.array([window for window, question in enumerate(self.question)
                                if question in held])
        self.note = self.count_long(tokenizer)

    def find_answers(self):
        """Set `spans`, (windows, 2): first and last token of the answer, (0, 0) in a window that
        does not hold all of it."""
        self.spans = torch.zeros(len(self.ids), 2, dtype=torch.int64)
        for window, question in enumerate(self.question):
            q, (first, stop) = self.questions[question], self.passage[window]
            if q.start is None or first == stop:
                continue
            piece = self.offsets[window][first:stop]  # (tokens, 2)
            holds_all = piece[0, 0] <= q.start and q.end <= past_marks(q.context, piece[-1, 1])
            # tokens that share a character with the answer
            at = np.flatnonzero((piece[:, 0] < q.end) & (piece[:, 1] > q.start))
            if holds_all and len(at):
                self.spans[window] = first + torch.from_numpy(at[[0, -1]])

    def count_long(self, tokenizer):
        """Say how many questions have no answer that could be predicted; "" if there are none."""
        texts = [text for q in self.questions for text in q.answers]
        ids_of_texts = tokenizer(texts, add_special_tokens=False)["input_ids"]
        lengths = iter([len(ids) for ids in ids_of_texts])
        n = sum(min(next(lengths) for _ in q.answers) > self.max_answer for q in self.questions)
        return (f"{n:,} of {self.n:,} questions have only answers of more than {self.max_answer} "
                "tokens, which are never predicted whole (--max-answer-length)") if n else ""

    def collate(self, rows):
        """Make input_ids, attention_mask, token_type_ids (1: passage), (batch, tokens); start_,
        end_positions (batch,)."""
        ids, mask = self.pad(rows)
        first = torch.tensor([self.passage[i][0] for i in rows])
        starts, ends = self.spans[rows].unbind(1)
        in_passage = (torch.arange(ids.shape[1]) >= first[:, None]).long() * mask
        types = {"token_type_ids": in_passage} if self.has_types else {}
        return {"input_ids": ids, "attention_mask": mask, **types,
                "start_positions": starts, "end_positions": ends}

    def forward(self, model, inputs):
        """Run the model on what collate() gave; the output has `loss`, the mean over the rows.
        Padding scores -inf."""
        inputs = dict(inputs)
        starts, ends = inputs.pop("start_positions"), inputs.pop("end_positions")
        out, padding = model(**inputs), inputs["attention_mask"] == 0
        # a softmax over padding, too, would make the loss depend on the longest row of the batch
        out.start_logits = out.start_logits.masked_fill(padding, -torch.inf)  # (batch, tokens)
        out.end_logits = out.end_logits.masked_fill(padding, -torch.inf)
        # loss = (CE(start) + CE(end)) / 2
        out.loss = (F.cross_entropy(out.start_logits, starts)
                    + F.cross_entropy(out.end_logits, ends)) / 2
        return out

    def predict(self, out, rows):
        """Return [(score, answer, its first character)] of the best valid span of each window:
        inside the passage, 1 to max_answer tokens."""
        start, end = out.start_logits, out.end_logits  # (batch, tokens)
        tokens = start.shape[1]
        position = torch.arange(tokens, device=start.device)
        passages = torch.tensor([self.passage[i] for i in rows], device=start.device)
        first, stop = passages[:, :, None].unbind(1)  # (batch, 1) each
        start = start.masked_fill((position < first) | (position >= stop), -torch.inf)
        valid = torch.ones(tokens, tokens, dtype=torch.bool, device=start.device)
        valid = valid.triu().tril(self.max_answer - 1)
        valid = valid & (position < stop)[:, None, :]  # (batch, start, end)

        # score(i, j) = start_i + end_j
        scores = (start[:, :, None] + end[:, None, :]).masked_fill(~valid, -torch.inf)
        best, where = scores.flatten(1).max(1)
        answers = []
        for row, score, at in zip(rows, best.tolist(), where.tolist()):
            offsets, context = self.offsets[row], self.questions[self.question[row]].context
            i, j = divmod(at, tokens)
            begin, past = int(offsets[i][0]), past_marks(context, int(offsets[j][1]))
            answers.append((score, context[begin:past], begin) if score > -np.inf
                           else (score, "", 0))
        return answers

    def best(self, predictions):
        """Return the best window's prediction for each question, from one per window."""
        best = {}
        for question, prediction in zip(self.question, predictions):
            best[question] = max(best.get(question, prediction), prediction)
        return [best[i] for i in range(self.n)]

    @functools.cached_property
    def random(self):
        """Return random_f1 of the questions. It is kept: every epoch has an outcome."""
        return random_f1(self.questions)

    def outcome(self, predictions):
        """Return predictions: [(references, answer)], one per question, from predict()'s of the
        windows; random: the F1 of random answers; the questions' groups, as numbers; and their
        levels, where the data says them."""
        best = self.best(predictions)
        groups = {name: i for i, name in enumerate(dict.fromkeys(q.group for q in self.questions))}
        levels = [q.level for q in self.questions]
        return {"predictions": [(q.answers, best[i][1]) for i, q in enumerate(self.questions)],
                "random": self.random, "groups": [groups[q.group] for q in self.questions],
                **({"levels": levels} if any(levels) else {})}

    def score(self, outcome):
        """Return {f1, exact_match} in percent, means over the questions."""
        scores = question_scores(outcome["predictions"])
        return {name: float(np.mean(values)) for name, values in scores.items()}
