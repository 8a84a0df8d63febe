"""The verdict of a study: each of its rules, and that it is true of the committed numbers."""
import json
import re

import numpy as np
import pytest
from conftest import ROOT
from test_readme import committed

import plots
from rates import edge_mark
from tools import grid
from verdict import Line, best_line, even_rows, is_close, largest_class, marks_of, verdict


def line(name, score, points=None, seconds=10.0, gb=1.0, mb=1.0, marks=(), half=1.0):
    vs = points is not None and {"points": points, "low": points - half, "high": points + half}
    return Line(name, f"method {name}", score, vs or None, seconds, gb, mb, list(marks))


FULL = line("full", 90.0, seconds=20.0, gb=2.0, mb=90.0)


def said(*lines, n=1):
    return verdict([FULL, *lines], "macro-F1", 500, n, advice="Do this.")


def taken(text):
    """{what counts: what the table takes}."""
    rows = [row.strip("| ").split(" | ") for row in text.splitlines() if row.startswith("| ")]
    return {row[0]: row[1] for row in rows[2:]}


def test_what_is_lost_is_told_from_what_is_not_shown():
    lines = line("a", 87.0, -3.0), line("b", 89.0, -1.0), line("c", 92.0, 2.0)
    text, once = said(*lines, n=3), said(*lines)
    assert "A lower score on these test rows is shown for method a: 3.0 points." in once
    assert "A higher score on these test rows is shown for method c." in once
    assert "**Lost.** A lower score is shown for method a: 3.0 points." in text
    assert "**Better.** A higher score is shown for method c." in text
    assert "No difference is shown for method b, but up to 2.0 points may be lost." in text
    assert "often miss a difference of less than 1.0 points" in text
    assert "Do this." not in text and "Do this." in said(line("a", 87.0, -3.0, half=9.0))
    several = said(line("a", 87.0, -3.0), line("d", 80.0, -10.0), line("e", 88.0, -2.0), n=3)
    assert ("A lower score is shown for method a, method d and method e; of these, method e loses "
            "least, 2.0 points.") in several
    assert "Perhaps" not in several and "Better" not in several
    # a bullet has one number at most, so that it is read at once
    for bullet in text.split("\n\n")[0].splitlines():
        assert len(re.findall(r"\d[\d.]*", bullet)) <= 1, bullet


def test_without_an_error_in_few_rows_some_may_still_come():
    text = verdict([FULL, line("a", 90.0, 0.0, half=0.0)], "macro-F1", 100, 1)
    assert "up to 3.0 points may be lost" in text and "less than 3.0 points" in text


def test_a_loss_of_two_points_is_ruled_out_or_shown_or_open():
    text = said(line("a", 89.5, -0.5), line("b", 88.0, -2.0), line("c", 80.0, -10.0))
    assert "**Close.** A loss of 2 points or more is ruled out on these test rows for method a.\n" \
        in text and "No difference is shown for method a" not in text  # which says less
    answers = [is_close({"points": x, "low": x - 1, "high": x + 1}, rows)
               for x, rows in ((-0.5, 500), (-2.0, 500), (-10.0, 500), (0.5, 100))]
    assert answers == ["yes", "open", "no", "open"]  # 3 of 100 rows are more than 2 points
    assert is_close(None, 500) == ""


def test_which_to_take_is_the_cheapest_of_those_within_two_points():
    text = said(line("cheap", 80.0, -10.0, 1.0, 0.1, 0.1), line("near", 89.0, -1.0, 5.0, 1.5, 3.0),
                line("small", 88.5, -1.5, 15.0, 1.0, 0.5))
    assert taken(text) == {"quality": "method full",
                           "time": "method near", "memory": "method small",
                           "many tasks": "method small", "nothing in particular": "method near"}
    assert "| 5.0 instead of 20.0 s an epoch, for -1.0 points |" in text
    ahead = said(line("best", 90.4, 0.4), line("far", 88.3, -1.7, 1.0))
    assert taken(ahead)["quality"] == "method best"
    assert "the highest score, but no difference is shown" in ahead
    assert taken(ahead)["time"] == "method best"  # far is 2.1 points below the best
    assert "**Gained.** All other methods need less time an epoch, memory and disk for a" in ahead
    dear = said(line("a", 89.0, -1.0, 30.0, 3.0, 0.1), line("b", 89.0, -1.0, 30.0, 1.0),
                line("c", 89.0, -1.0, 30.0, 1.0))
    assert ("**Gained.** No other method needs less time an epoch. All but method a need less "
            "memory. All other methods need less disk for a trained file.") in dear
    # a takes more time, b and c, too
    assert "| nothing in particular | method full | none that is close to it saves" in dear
    assert " method c needs less memory." in said(
        line("c", 89.0, -1.0), line("b", 89.0, -1.0, gb=9))
    assert " method c and method d need less" in said(
        line("c", 89.0, -1.0), line("d", 89.0, -1.0), *[line("b", 89.0, -1.0, gb=9)] * 2)


def test_what_is_marked_is_not_ranked_and_why_is_said():
    one = line("one", 95.0, 5.0, 1.0, marks=["predicts one class only"])
    text = said(one, line("b", 89.5, -0.5))
    assert "method one" not in "".join(taken(text).values())
    assert "**Not ranked (†).** method one: predicts one class only." in text
    assert "Take full fine-tuning" in said(one) and not taken(said(one))
    nothing = verdict([FULL._replace(marks=["m"]), line("b", 89.5, -0.5)], "F1", 9, 1)
    assert "No answer" in nothing and not taken(nothing) and "Lost" not in nothing
    assert best_line([one, FULL]).name == "full" and best_line([one]).name == "one"


def test_without_full_fine_tuning_there_is_no_answer():
    text = verdict([line("lora", 60.0), line("qlora", 50.0)], "F1", 500, 1)
    assert "No run of full fine-tuning is finished" in text and not taken(text)


def test_a_single_training_says_so_and_unknown_costs_are_left_out():
    assert "trained once" in said(line("a", 89.0, -1.0)) and "Other seeds, other data" in said(
        line("a", 89.0, -1.0), n=3)
    text = verdict([FULL._replace(gb=None), line("a", 89.0, -1.0)], "F1", 500, 1)
    assert "memory" not in taken(text) and "less memory" not in text and "time" in taken(text)
    bare = FULL._replace(seconds=None, gb=None, mb=None)
    assert "Gained" not in verdict([bare, bare._replace(name="a", vs=line("a", 89, -1).vs)], "F1",
                                   500, 1)


def test_a_cost_that_is_hardly_lower_is_none_that_is_saved():
    text = said(line("a", 89.0, -1.0, 19.9, 1.99, 90.0))
    assert "No other method needs less time an epoch, memory or disk for a trained file" in text
    assert taken(text)["nothing in particular"] == "method full"


def test_no_more_is_lost_than_there_is():
    text = verdict([FULL, line("a", 89.0, -1.0)], "F1", 2, 1)
    assert "up to 100.0 points" in text and "less than 100.0 points" in text


@pytest.mark.parametrize("wrong, loss, words", [
    (range(0), 0.1, None), (range(80, 100), 0.1, "one class"), (range(80, 100), 0.1, "beat"),
    (range(75, 97), 0.1, "beat"), (range(0), 0.49, "hardly left its start")])
def test_what_has_not_learned_is_marked(wrong, loss, words):
    """80 rows of one class, 20 of another: the loss of knowing the shares alone is 0.50."""
    labels = np.array([0] * 80 + [1] * 20)
    predicted = labels.copy()
    predicted[list(wrong)] = 1 - predicted[list(wrong)]
    marks = marks_of(labels, predicted[None], [{"history": [{"train_loss": loss}]}])
    assert words in " ".join(marks) if words else not marks


def test_a_rare_class_that_is_missed_in_one_fold_is_no_single_answer():
    labels, folds = np.array([0] * 95 + [1] * 5), np.arange(100) % 5
    predicted = labels.copy()
    predicted[99] = 0
    runs = [{"history": [{"train_loss": 0.05}]}]
    assert not marks_of(labels, predicted[None], runs, folds)
    assert marks_of(labels, 0 * labels[None], runs, folds)
    folds[95:] = 0
    assert "predicts one class only" in marks_of(labels, 0 * labels[None], runs, folds)


def test_a_loss_that_left_its_start_and_came_back_is_no_mark():
    labels = np.array([0] * 80 + [1] * 20)
    history = [{"train_loss": 0.2}, {"train_loss": 0.7}]
    assert not marks_of(labels, labels[None], [{"history": history}])


def test_the_loss_is_held_against_what_was_trained_on_and_not_against_the_test_rows():
    """Knowing the shares alone is a loss of 0.69 on even classes, of 0.06 on 99 of 100 rows."""
    labels = np.array([0] * 99 + [1])
    run = {"history": [{"train_loss": 0.3}], "label_counts": [50, 50]}
    words = "hardly left its start"
    assert words not in " ".join(marks_of(labels, labels[None], [run]))
    assert words in " ".join(marks_of(labels, labels[None], [run | {"label_counts": [99, 1]}]))


def test_a_fold_that_predicts_one_class_is_marked():
    labels = np.array([0, 1] * 50)
    predicted, folds = labels.copy(), np.array([1] * 50 + [2] * 50)
    predicted[50:] = 0
    runs = [{"history": [{"train_loss": 0.1}]}]
    marks = marks_of(labels, predicted[None], runs, folds)
    assert marks == ["predicts one class only"]
    assert not marks_of(labels, predicted[None], runs)


@pytest.mark.parametrize("share", [0.5, 0.9])
def test_answers_that_know_nothing_of_the_texts_are_marked(share):
    """A coin has a macro-F1 of 0.50 on even classes, the largest class one of 0.33."""
    rng, run = np.random.default_rng(0), {"history": [{"train_loss": 0.01}]}
    labels, *answers = (rng.random((4, 1000)) < share).astype(int)
    assert marks_of(labels, np.stack(answers), 3 * [run]) == ["not shown to beat chance"]
    assert marks_of(labels, answers[0][None], [run]) == ["not shown to beat chance"]
    answers[0][:300] = labels[:300]  # something is known
    assert not marks_of(labels, answers[0][None], [run])


def test_a_rare_class_tells_less_than_its_rows():
    """Of 10 rows of one class 3 might be missed, whatever the 990 others say."""
    labels = np.array([0] * 990 + [1] * 10)
    assert even_rows(labels) == 20 and even_rows(labels[980:]) == 20
    vs = {"points": 0.0, "low": 0.0, "high": 0.0}
    assert is_close(vs, even_rows(labels)) == "open" and is_close(vs, 1000) == "yes"


@pytest.mark.parametrize("n, splits, words", [
    (1, "no test rows: 50 of train are the test (seed 42); 50 of train validate", "--folds 5"),
    (1, "splits as given", None), (2, "splits as given", "Three trainings"),
    (1, "no test rows: 50 whole sentences of train are the test (seed 42)", None),
    (3, "no test rows: the 9 labelled validation rows are the test", None)])
def test_what_would_tell_more_can_be_done(n, splits, words):
    entries = json.loads(committed("metrics/comparison.json"))["entries"]
    for entry in entries.values():
        entry["n"], entry["runs"][0]["splits"] = n, splits
    said = plots.study_verdict({"entries": entries})
    assert float(re.search("a difference of less than ([0-9.]+)", said)[1]) > 2
    assert words in said if words else "`--folds" not in said and "Three" not in said


def test_a_best_rate_at_an_edge_is_marked():
    tried = [{"lr": lr, "validation": lr, "loss": 0.1} for lr in (1e-3, 2e-3, 4e-3)]
    assert edge_mark(tried) == ["the best learning rate, 4e-3, is the highest that was tried"]
    lowest = [entry | {"validation": -entry["lr"]} for entry in tried]
    assert "1e-3, is the lowest" in edge_mark(lowest)[0]
    assert not edge_mark(None) and not edge_mark([*tried, {"lr": 8e-3, "validation": 0}])


def test_the_floor_is_the_largest_class():
    floor = largest_class([2] * 6 + [0] * 4)
    assert floor["label"] == 2 and floor["accuracy"] == 0.6
    # F1 = 2 * 6 / (6 + 10) for the one class, 0 for the other
    assert floor["f1_macro"] == pytest.approx(0.75 / 2)


def test_the_committed_verdicts_are_true_of_the_committed_numbers():
    for name in "comparison", "crossvalidation":
        study = json.loads(committed(f"metrics/{name}.json"))
        study["memory"] = json.loads(committed("metrics/memory.json"))
        lines = plots.lines_of(study)
        text = plots.study_verdict(study)
        losers = [o.label for o in lines[1:] if o.vs["high"] < 0]
        shown = re.split(" is shown for |; |: ", text)[1] if losers else ""
        assert set(shown.replace(" and ", ", ").split(", ")) - {""} == set(losers)
        close = [o for o in lines if o.score >= max(o.score for o in lines) - 2]

        def least(cost):  # the best of those within 5 % of it
            return max((o for o in close if cost(o) <= 1.05 * min(map(cost, close))),
                       key=lambda o: o.score).label

        assert taken(text) == {
            "quality": max(lines, key=lambda o: o.score).label,
            "time": least(lambda o: o.seconds),
            "memory on bert-base (predicted)": least(lambda o: o.gb),
            "many tasks": min(close, key=lambda o: o.mb).label,
            "nothing in particular": next(o.label for o in sorted(close, key=lambda o: -o.score) if
                                          1.05 * o.seconds < lines[0].seconds
                                          and 1.05 * o.gb < lines[0].gb)}
    content = json.loads(committed("metrics/grid.json"))
    # its answers were not kept, so that it has no intervals, and nothing can be said to be lost
    assert not re.search(r"\[|\*\*Lost", grid.grid_markdown(content))
    for run in content["runs"].values():
        run["grouped"] = True
        if vs := run.get("vs_full"):
            vs |= {"low": vs["points"] - 1, "high": vs["points"] + 1}
    assert "**Lost.**" in grid.grid_markdown(content)
    assert "**Lost.**" in (ROOT / "README.md").read_text(encoding="utf-8")
