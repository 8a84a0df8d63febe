"""Generate questions and answers of five levels, so that nothing has to be fetched.

    python -m tools.synthetic       writes downloads/synthetic/, and prints some

train.py --task synthetic does the first of the two when it needs the files.

Every passage holds four facts, so that one of them taken blindly is right one time in four
(CHANCE). What else is needed to find the right one is the question's level:

    match       four people, four kinds of fact: the kind is enough
    distractor  two kinds of fact about four people: also the name
    pronoun     two people, two facts each, the second of "she" or "he": also the sentence before
    join        the same four facts in any order, but the question has no name: it tells the
                person by one fact and asks for the other
    number      two people, two numbers each in one sentence: also what was counted

    Ada Fischer comes from Lisbon. She works for Carlton Motors. Omar Reed was born in Oslo. He is
    employed by Royal Bank.       Which company does Omar Reed work for? -> Royal Bank   (pronoun)

Train, validation and test share no name, place, company, year, number or date, and no wording: a
model that learned the training sentences by heart knows nothing of the test.
"""
if not __package__:
    raise SystemExit("error: run this from the project's folder: python -m tools.synthetic")

import json
import random

from common import start, write_text
from fetch import DOWNLOADS
from settings import SPLIT_SEED

SIZES = {"train": 1800, "validation": 250, "test": 1600}  # questions, each with its own passage
LEVELS = ("match", "distractor", "pronoun", "join", "number")  # as many questions of each, but
TRAINED = (*LEVELS, "number")  # in training twice as many of the one that is learned last
CHANCE = 25.4  # F1 in percent of one of the four answers at random, on the test questions

# Of every relation the statements, the questions and what tells a person by the fact; x is a
# person, y the answer. The last two statements are for the test, the two before them for
# validation, the others for training; of questions and descriptions the last one and the one
# before it. Each split has a statement that starts with x, for the pronouns.
RELATIONS = {
    "town": (["{x} was born in {y}.", "{x} comes from {y}.", "{y} is the home town of {x}.",
              "{x} lived in {y} as a child.", "As a child, {x} lived in {y}.",
              "{y} was the first home of {x}.",
              "{x} grew up in {y}.", "{y} is the place where {x} grew up.",
              "The early years of {x} were spent in {y}.", "{x} spent the early years in {y}."],
             ["Where was {x} born?", "Where does {x} come from?",
              "What is the home town of {x}?", "In which city did {x} live as a child?",
              "Which town did {x} grow up in?", "In which place did {x} spend the early years?"],
             ["the person from {y}", "the one who was born in {y}",
              "the person who lived in {y} as a child",
              "whoever grew up in {y}", "a certain child of {y}"]),
    "company": (["{x} works for {y}.", "{x} is employed by {y}.", "{y} has hired {x}.",
                 "{x} earns a living at {y}.", "{y} pays {x} a salary.",
                 "At {y}, {x} is a manager.",
                 "{x} has a job at {y}.", "{y} has given a job to {x}.",
                 "{x} is on the staff of {y}.", "The staff of {y} includes {x}."],
                ["Which company does {x} work for?", "Who employs {x}?",
                 "Where does {x} earn a living?", "Which firm pays {x} a salary?",
                 "At which company does {x} have a job?", "Whose staff does {x} belong to?"],
                ["the person hired by {y}", "the one who works for {y}",
                 "the person who is a manager at {y}",
                 "whoever has a job at {y}", "a certain member of the staff of {y}"]),
    "year": (["{x} graduated in {y}.", "In {y}, {x} finished university.",
              "{x} took a degree in {y}.", "{x} passed the last examination in {y}.",
              "The studies of {x} ended in {y}.", "{x} was a student until {y}.",
              "{y} was the year of the graduation of {x}.",
              "{x} got a degree in {y}.",
              "{x} left university with a diploma in {y}.", "In {y}, {x} left university."],
             ["When did {x} graduate?", "In which year did {x} finish university?",
              "When did the studies of {x} end?", "Until what year was {x} a student?",
              "In what year did {x} get a degree?", "When did {x} leave university?"],
             ["the graduate of {y}", "the one who graduated in {y}",
              "the person whose studies ended in {y}",
              "whoever got a degree in {y}", "a certain student who left university in {y}"]),
    "date": (["{x} gets married on {y}.", "The wedding of {x} is on {y}.",
              "On {y}, {x} will get married.", "{x} celebrates a wedding on {y}.",
              "{y} is the wedding day of {x}.", "{x} becomes a spouse on {y}.",
              "{x} has planned a wedding for {y}.",
              "For {y}, {x} has planned a wedding.",
              "{y} is the day on which {x} will marry.", "{x} will marry on {y}."],
             ["When does {x} get married?", "What day is the wedding of {x}?",
              "When is the wedding day of {x}?", "What date did {x} choose to become a spouse?",
              "For when has {x} planned a wedding?", "On which day will {x} marry?"],
             ["the person with a wedding on {y}", "the one who gets married on {y}",
              "the person who becomes a spouse on {y}",
              "whoever has planned a wedding for {y}", "a certain guest who will marry on {y}"]),
    "person": (["{x} was taught by {y}.", "{y} was the teacher of {x}.",
                "{x} took lessons from {y}.", "{x} learned everything from {y}.",
                "{y} instructed {x}.", "{x} studied under {y}.", "{y} gave lessons to {x}.",
                "{x} was given lessons by {y}.", "{x} was a pupil of {y}.",
                "{y} had {x} as a pupil."],
               ["Who taught {x}?", "Who was the teacher of {x}?",
                "Who instructed {x}?", "Under whom did {x} study?",
                "Who gave lessons to {x}?", "Of whom was {x} a pupil?"],
               ["the person taught by {y}", "the one who took lessons from {y}",
                "the person who studied under {y}",
                "whoever was given lessons by {y}", "a certain pupil of {y}"]),
}
# The same for numbers of things: y of them, and z of another kind.
COUNTS = (["{x} has written {y} {a} and {z} {b}.", "{y} {a} and {z} {b} were written by {x}.",
           "{x} wrote {y} {a} and {z} {b}.", "{x} is known for {y} {a} and {z} {b}.",
           "{y} {a} and {z} {b} come from {x}.", "The works of {x} are {y} {a} and {z} {b}.",
           "{x} is the author of {y} {a} and {z} {b}.",
           "There are {y} {a} and {z} {b} of which {x} is the author.",
           "There are {y} {a} and {z} {b} that {x} has published.",
           "{x} has published {y} {a} and {z} {b}."],
          ["How many {a} has {x} written?", "How many {a} did {x} write?",
           "How many {a} is {x} known for?", "How many {a} come from {x}?",
           "How many {a} is {x} the author of?", "What number of {a} has {x} published?"])
THINGS = {"train": ("books plays songs poems reports operas novels sketches hymns lectures recipes "
                    "columns sonnets memoirs ballads fables dramas manuals prayers riddles "
                    "speeches diaries guides tales").split(),
          "validation": "letters essays".split(), "test": "stories articles".split()}

# (women, men)
FIRST = {"train": (("Ada Lena Nina Clara Irene Rosa Julia Emma Sarah Maria Eva Olga Ruth Vera "
                    "Anna Laila").split(),
                   ("Omar Victor Hugo Felix Samuel Martin Peter David Karim Tomas Erik Jonas "
                    "Paul Luca Henry Noah").split()),
         "validation": ("Alice Diana Fiona Helen".split(), "Bruno Edgar George Ivan".split()),
         "test": ("Laura Teresa Paula Monica".split(), "Simon Oscar Walter Adrian".split())}
LAST = {"train": ("Fischer Reed Silva Novak Grant Moreau Keller Santos Burke Lind Harper Costa "
                  "Weber Dunn Ross Vega Brandt Cole Hansen Ivers Jones Kovac Larsen Meyer "
                   "Nash Olsen Price Rossi Stone Thorn Ulrich Young").split(),
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


def own_numbers(split, numbers):
    """Return a split's own part of some numbers: those that leave 0, 1 or 2 (train), 3 (validation)
    or 4 (test) mod 5."""
    own = {"train": (0, 1, 2), "validation": (3,), "test": (4,)}[split]
    return [n for n in numbers if n % 5 in own]


def wordings(split, texts, held_out):
    """Return a split's own wordings out of a list: validation and test have `held_out` each."""
    return {"train": texts[:-2 * held_out], "validation": texts[-2 * held_out:-held_out],
            "test": texts[-held_out:]}[split]


def draw_people(split, rng):
    """Draw six people, (name, pronoun) each, of whom no two share a first or last name."""
    women, men = FIRST[split]
    return [(f"{first} {last}", "She" if first in women else "He")
            for first, last in zip(rng.sample(women + men, 6), rng.sample(LAST[split], 6))]


def two_answers(kind, people, split, rng):
    """Draw two different answers of one kind; if the kind is "person", the first two `people`."""
    if kind == "person":
        return [name for name, _ in people[:2]]
    if kind == "company":
        brands, trades = rng.sample(BRANDS[split], 2), rng.sample(TRADES[split], 2)
        return [f"{a} {b}" for a, b in zip(brands, trades)]
    if kind == "date":
        days = rng.sample(own_numbers(split, range(1, 29)), 2)
        months = rng.choices(MONTHS[split], k=2)
        return [f"{a} {b}" for a, b in zip(days, months)]
    numbers = own_numbers(split, range(1950, 2020) if kind == "year" else range(11, 100))
    return rng.sample(TOWNS[split], 2) if kind == "town" else list(map(str, rng.sample(numbers, 2)))


def draw_facts(level, split, rng):
    """Draw four facts (kind, person, pronoun, answer), in the order in which the level states
    them."""
    people = draw_people(split, rng)
    kinds = rng.sample(list(RELATIONS), 4 if level == "match" else 2)
    pairs = {kind: two_answers(kind, people, split, rng) for kind in kinds}
    people = people[2:]
    if level == "match":
        return [(kind, *person, pairs[kind][0]) for kind, person in zip(kinds, people)]
    if level == "distractor":
        facts = [(kind, *people.pop(), answer) for kind in kinds for answer in pairs[kind]]
        return rng.sample(facts, 4)
    facts = []
    for i in range(2):
        facts += [(kind, *people[i], pairs[kind][i]) for kind in rng.sample(kinds, 2)]
    return facts if level == "pronoun" else rng.sample(facts, 4)


def state(kind, x, y, split, rng, start=""):
    """Say in a sentence what is the y of x, in a wording that starts with `start`."""
    own = [text for text in wordings(split, RELATIONS[kind][0], 2) if text.startswith(start)]
    return rng.choice(own).format(x=x, y=y)


def make_passage(level, split, rng):
    """Make (sentences, question, answers, which of them is right): the four answers in the order of
    the passage."""
    if level == "number":
        return make_counts(split, rng)
    facts = draw_facts(level, split, rng)  # (kind, person, pronoun, answer)
    sentences = [state(kind, x, y, split, rng) for kind, x, _, y in facts]
    asked = rng.randrange(4)
    if level == "pronoun":
        for i in 1, 3:
            kind, _, pronoun, y = facts[i]
            sentences[i] = state(kind, pronoun, y, split, rng, "{x}")
        asked = rng.choice((1, 3))
    kind, person, _, _ = facts[asked]
    if level == "join":
        other, y = next((k, y) for k, x, _, y in facts if x == person and k != kind)
        person = rng.choice(wordings(split, RELATIONS[other][2], 1)).format(y=y)
    question = rng.choice(wordings(split, RELATIONS[kind][1], 1)).format(x=person)
    return sentences, question, [fact[3] for fact in facts], asked


def make_counts(split, rng):
    """Make the passage of the level of numbers: two sentences."""
    people, things = draw_people(split, rng)[:2], rng.sample(THINGS[split], 2)
    numbers = [str(n) for n in rng.sample(own_numbers(split, range(11, 100)), 4)]
    sentences, counted = [], []
    for i, (x, _) in enumerate(people):
        a, b = rng.sample(things, 2)
        y, z = numbers[2 * i:2 * i + 2]
        text = rng.choice(wordings(split, COUNTS[0], 2))
        sentences.append(text.format(x=x, y=y, a=a, z=z, b=b))
        counted += [a, b]
    asked = rng.randrange(4)
    question = rng.choice(wordings(split, COUNTS[1], 1))
    return sentences, question.format(a=counted[asked], x=people[asked // 2][0]), numbers, asked


def generate(split, number, rng):
    """Make one question as a dict: id, context, question, answers {text: [str], answer_start:
    [int]}, and level and choices, the four answers of the passage."""
    levels = TRAINED if split == "train" else LEVELS
    level = levels[number % len(levels)]
    sentences, question, choices, asked = make_passage(level, split, rng)
    own, answer = asked * len(sentences) // 4, choices[asked]  # its sentence: of 2 or of 4
    start = sum(len(s) + 1 for s in sentences[:own]) + sentences[own].index(answer)
    return {"id": f"synthetic-{split}-{number}", "level": level, "context": " ".join(sentences),
            "question": question, "choices": choices,
            "answers": {"text": [answer], "answer_start": [start]}}


def make_questions(split):
    """Make the SIZES[split] questions of one split; always the same ones."""
    rng = random.Random(f"{SPLIT_SEED} {split}")
    return [generate(split, number, rng) for number in range(SIZES[split])]


def as_squad(questions):
    """Return questions in the form of a SQuAD v1.1 file, each with its own passage and level."""
    paragraphs = [{"context": q["context"], "qas": [
        {"id": q["id"], "question": q["question"], "level": q["level"],
         "answers": [{"text": text, "answer_start": start}
                     for text, start in zip(*q["answers"].values())]}]} for q in questions]
    return {"data": [{"title": "generated", "paragraphs": paragraphs}]}


def main():
    start()
    for split in SIZES:
        questions = make_questions(split)
        path = DOWNLOADS / "synthetic" / f"{split}.json"
        write_text(path, json.dumps(as_squad(questions), indent=1) + "\n")
        print(f"wrote {path}")
        for q in questions[:len(LEVELS)]:
            print(f"{split}, {q['level']}: {q['context']}\n  {q['question']} -> "
                  f"{q['answers']['text'][0]}")


if __name__ == "__main__":
    main()
