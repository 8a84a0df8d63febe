"""Synthetic questions and answers, made here so that nothing has to be fetched.

A passage states four facts about four invented people, two facts of one kind and two of another, in
any order and in several wordings:

    Ada Fischer works for Carlton Motors. 41 books were written by Omar Reed. Royal Bank has hired
    Rosa Lind. Hugo Vega wrote 36 books.            Who employs Rosa Lind? -> Royal Bank

So there is always a wrong answer of the right type: to pick one of the four facts at random is
right one time in four, to pick one of the right type one time in two.

Train, validation and test share no name, place, company, year, number or date, and no wording: a
model that learned the training sentences by heart knows nothing of the test. `python synthetic.py`
prints some.
"""
import random

from settings import SPLIT_SEED

SIZES = {"train": 1000, "validation": 200, "test": 300}  # questions, each with a passage of its own

# (statements, questions) of every relation, x being a person and y the answer. Of the statements
# the last two wordings are for the test, the two before them for validation, the others for
# training; of the questions the last one and the one before it.
RELATIONS = {
    "town": (["{x} was born in {y}.", "{x} comes from {y}.", "{y} is the home town of {x}.",
              "{x} grew up in {y}.", "{y} is the place where {x} grew up.",
              "The early years of {x} were spent in {y}.", "{x} spent the early years in {y}."],
             ["Where was {x} born?", "Where does {x} come from?",
              "Which town did {x} grow up in?", "In which place did {x} spend the early years?"]),
    "company": (["{x} works for {y}.", "{x} is employed by {y}.", "{y} has hired {x}.",
                 "{x} has a job at {y}.", "{y} has given a job to {x}.",
                 "{x} is on the staff of {y}.", "The staff of {y} includes {x}."],
                ["Which company does {x} work for?", "Who employs {x}?",
                 "At which company does {x} have a job?", "Whose staff does {x} belong to?"]),
    "year": (["{x} graduated in {y}.", "In {y}, {x} finished university.",
              "{x} took a degree in {y}.", "{y} was the year of the graduation of {x}.",
              "{x} got a degree in {y}.",
              "{x} left university with a diploma in {y}.", "In {y}, {x} left university."],
             ["When did {x} graduate?", "In which year did {x} finish university?",
              "In what year did {x} get a degree?", "When did {x} leave university?"]),
    "number": (["{x} has written {y} books.", "{y} books were written by {x}.",
                "{x} wrote {y} books.", "{x} is the author of {y} books.",
                "There are {y} books of which {x} is the author.",
                "There are {y} books that {x} has published.", "{x} has published {y} books."],
               ["How many books has {x} written?", "How many books did {x} write?",
                "How many books is {x} the author of?", "What number of books has {x} published?"]),
    "date": (["{x} gets married on {y}.", "The wedding of {x} is on {y}.",
              "On {y}, {x} will get married.", "{x} has planned a wedding for {y}.",
              "For {y}, {x} has planned a wedding.",
              "{y} is the day on which {x} will marry.", "{x} will marry on {y}."],
             ["When does {x} get married?", "What day is the wedding of {x}?",
              "For when has {x} planned a wedding?", "On which day will {x} marry?"]),
    "person": (["{x} was taught by {y}.", "{y} was the teacher of {x}.",
                "{x} took lessons from {y}.", "{y} gave lessons to {x}.",
                "{x} was given lessons by {y}.", "{x} was a pupil of {y}.",
                "{y} had {x} as a pupil."],
               ["Who taught {x}?", "Who was the teacher of {x}?",
                "Who gave lessons to {x}?", "Of whom was {x} a pupil?"]),
}
FIRST = {"train": ("Ada Omar Lena Victor Nina Hugo Clara Felix Irene Samuel Rosa Martin Julia "
                   "Peter Emma David").split(),
         "validation": "Alice Bruno Diana Edgar Fiona George Helen Ivan".split(),
         "test": "Laura Simon Teresa Oscar Paula Walter Monica Adrian".split()}
LAST = {"train": ("Fischer Reed Silva Novak Grant Moreau Keller Santos Burke Lind Harper Costa "
                  "Weber Dunn Ross Vega").split(),
        "validation": "Abbott Blake Castro Duncan Evans Foster Garcia Holt".split(),
        "test": "Jensen Kramer Lopez Mason Nolan Ortega Palmer Quinn".split()}
TOWNS = {"train": ("Lisbon Vienna Oslo Boston Cairo Dublin Madrid Kiev Denver Milan Athens Bergen "
                   "Seoul Leeds").split(),
         "validation": "Prague Toronto Geneva Austin Naples Cardiff Warsaw Lima".split(),
         "test": "Zurich Chicago Porto Helsinki Turin Glasgow Havana Bristol".split()}
BRANDS = {"train": ("Carlton Bright Union Delta Royal Summit Crown Harbor Eagle Pioneer Liberty "
                    "Granite").split(),
          "validation": "Orion Regent Silver Beacon Anchor Phoenix".split(),
          "test": "Atlas Cedar Falcon Victoria Apex Sterling".split()}
TRADES = {"train": "Motors Foods Bank Press Mills Airways".split(),
          "validation": "Steel Media Hotels Tools".split(),
          "test": "Energy Pictures Shipping Records".split()}
MONTHS = {"train": "January March May July September November".split(),
          "validation": "February June October".split(),
          "test": "April August December".split()}


def share(split, numbers):
    """A split's own part of some numbers: those that leave 0, 1 or 2 (train), 3 (validation) or 4
    (test) mod 5."""
    own = {"train": (0, 1, 2), "validation": (3,), "test": (4,)}[split]
    return [n for n in numbers if n % 5 in own]


def wordings(split, texts, held_out):
    """A split's own wordings out of a list of RELATIONS: validation and test have `held_out`
    each."""
    return {"train": texts[:-2 * held_out], "validation": texts[-2 * held_out:-held_out],
            "test": texts[-held_out:]}[split]


def two(kind, people, split, rng):
    """Two different answers of one kind; if the kind is "person", `people`."""
    if kind == "person":
        return people
    if kind == "company":
        brands, trades = rng.sample(BRANDS[split], 2), rng.sample(TRADES[split], 2)
        return [f"{a} {b}" for a, b in zip(brands, trades)]
    if kind == "date":
        days, months = rng.sample(share(split, range(1, 29)), 2), rng.choices(MONTHS[split], k=2)
        return [f"{a} {b}" for a, b in zip(days, months)]
    if kind == "town":
        return rng.sample(TOWNS[split], 2)
    numbers = range(1950, 2020) if kind == "year" else range(11, 100)
    return [str(n) for n in rng.sample(share(split, numbers), 2)]


def make_question(split, number, rng):
    """One SQuAD-style dict: id, context, question, answers {text: [str], answer_start: [int]}."""
    people = [f"{a} {b}" for a, b in zip(rng.sample(FIRST[split], 6), rng.sample(LAST[split], 6))]
    facts = []  # (relation, x, y, sentence)
    for kind in rng.sample(list(RELATIONS), 2):
        for y in two(kind, people[:2], split, rng):
            x = people.pop()
            statement = rng.choice(wordings(split, RELATIONS[kind][0], 2))
            facts.append((kind, x, y, statement.format(x=x, y=y)))
    rng.shuffle(facts)

    asked = rng.randrange(len(facts))
    kind, x, y, sentence = facts[asked]
    question = rng.choice(wordings(split, RELATIONS[kind][1], 1)).format(x=x)
    start = sum(len(fact[3]) + 1 for fact in facts[:asked]) + sentence.index(y)
    return {"id": f"synthetic-{split}-{number}", "context": " ".join(fact[3] for fact in facts),
            "question": question, "answers": {"text": [y], "answer_start": [start]}}


def make_questions(split):
    """The SIZES[split] questions of one split; always the same ones."""
    rng = random.Random(f"{SPLIT_SEED} {split}")
    return [make_question(split, number, rng) for number in range(SIZES[split])]


if __name__ == "__main__":
    for split in SIZES:
        for q in make_questions(split)[:3]:
            print(f"{split}: {q['context']}\n  {q['question']} -> {q['answers']['text'][0]}")
