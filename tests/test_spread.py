"""The intervals against slow ones, the cases whose answer is known, and how often they are
right."""
import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import f1_score, log_loss

from spread import (
    best_temperature,
    corrected_interval,
    ece,
    f1_shares,
    macro_f1,
    mean_std,
    nll,
    paired_bootstrap,
    paired_interval,
    resampled_f1,
    scaled,
    two_way_interval,
)


@pytest.fixture
def task():
    """Labels of 3 classes (120,), predictions of a better and of a worse method (3 seeds, 120)."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 120)
    noisy = lambda right: np.where(rng.random((3, 120)) < right, labels,
                                   rng.integers(0, 3, (3, 120)))
    return labels, noisy(0.9), noisy(0.6)


def test_mean_and_sample_standard_deviation():
    assert mean_std([1.0, 3.0]) == (2.0, pytest.approx(2 ** 0.5)) and mean_std([5.0]) == (5.0, None)


def test_macro_f1_of_a_resample_is_scikit_learns(task):
    labels, good, _ = task
    rng = np.random.default_rng(1)
    for drawn in [np.arange(120), *(rng.integers(0, 120, 120) for _ in range(5)),
                  np.flatnonzero(labels < 2)]:
        weights = np.bincount(drawn, minlength=120)[None].astype(float)
        expected = f1_score(labels[drawn], good[0][drawn], average="macro")
        assert resampled_f1(labels, good[0], weights) == pytest.approx(expected)


@pytest.mark.parametrize("labels, predictions", [
    ([0, 1, 2, 1, 0], [0, 1, 2, 2, 0]),
    ([0, 1, 2, 1, 0], [0, 1, 1, 1, 0]),  # 2 is never predicted
    ([0, 1, 1, 1, 0], [0, 1, 2, 2, 0]),  # 2 never occurs
    ([0, 2, 2, 0], [0, 2, 0, 0]),  # 1 neither occurs nor is predicted
    ([0, 3, 3, 0], [3, 0, 1, 1]),  # nothing is right
    ([0, 0, 0], [0, 0, 0]), ([0, 0, 0], [1, 1, 1])])
def test_macro_f1_is_scikit_learns(labels, predictions):
    expected = f1_score(labels, predictions, average="macro", zero_division=0)
    assert macro_f1(labels, predictions) == pytest.approx(expected)
    assert isinstance(macro_f1(np.array(labels), np.array(predictions)), float)


def f1(truth, answer):
    """Macro-F1 from the confusion matrix: scikit-learn's takes 1.5 ms, and 27,000 are needed."""
    matrix = np.bincount(3 * truth + answer, minlength=9).reshape(3, 3)
    return (2 * matrix.diagonal() / (matrix.sum(0) + matrix.sum(1))).mean()


def test_interval_is_that_of_a_bootstrap_written_out(task):
    labels, (good, *_), (bad, *_) = task
    rng, differences = np.random.default_rng(5), []
    assert f1(labels, bad) == pytest.approx(f1_score(labels, bad, average="macro"))
    for _ in range(1500):
        drawn = rng.integers(120, size=120)
        differences.append(100 * (f1(labels[drawn], bad[drawn]) - f1(labels[drawn], good[drawn])))
    got = paired_bootstrap(labels, bad, good)
    exact = 100 * (f1(labels, bad) - f1(labels, good))
    assert got["points"] == pytest.approx(exact) and got["low"] < exact < got["high"] < 0
    # points, of a width of 17
    assert [got["low"], got["high"]] == pytest.approx(np.percentile(differences, [2.5, 97.5]),
                                                      abs=1)
    five = paired_bootstrap(labels, bad, good, comparisons=5)
    assert [five["low"], five["high"]] == pytest.approx(np.percentile(differences, [0.5, 99.5]),
                                                        abs=2)
    # unpaired it would spread
    assert paired_bootstrap(labels, good, good) == {"points": 0.0, "low": 0.0, "high": 0.0}


def test_folds_that_differ_spread_further_than_their_sentences(task):
    labels, (good, *_), (bad, *_) = task
    fold, width = np.repeat(np.arange(4), 30), lambda result: result["high"] - result["low"]
    # worse in one fold of four alone
    uneven = np.where(fold == 2, bad, good)
    flat, cut = (paired_bootstrap(labels, uneven, good, folds) for folds in (None, fold))
    assert flat["points"] == cut["points"] and width(cut) > 1.5 * width(flat)
    # (3 / 4)^4 = 32 % of the draws are without that fold
    assert cut["high"] == 0
    alike = paired_bootstrap(labels, bad, good, np.zeros(120, int))
    assert width(alike) == pytest.approx(width(paired_bootstrap(labels, bad, good)), rel=.1)


def test_interval_over_folds_is_that_of_a_bootstrap_written_out(task):
    labels, (good, *_), (bad, *_) = task
    rng, differences = np.random.default_rng(6), []
    fold = rng.integers(0, 4, 120)  # of unequal sizes
    bad = np.where(fold >= 2, bad, good)  # and unlike each other
    own = [np.flatnonzero(fold == k) for k in range(4)]
    for _ in range(3000):
        drawn = np.concatenate([own[k][rng.integers(len(own[k]), size=len(own[k]))]
                                for k in rng.integers(4, size=4)])
        differences.append(100 * (f1(labels[drawn], bad[drawn]) - f1(labels[drawn], good[drawn])))
    low, high = np.percentile(differences, [2.5, 97.5])
    got, flat = paired_bootstrap(labels, bad, good, fold), paired_bootstrap(labels, bad, good)
    assert got["low"] == pytest.approx(low, abs=1) and got["high"] == pytest.approx(high, abs=1)
    # without folds it would not pass
    assert flat["low"] - low > 3 and high - flat["high"] > 0.5


def test_the_correction_for_shared_training_rows():
    differences = [-1.0, 0.5, -2.0, 0.0, -0.5]
    got = corrected_interval(differences, 2014, 7056)
    mean, s = np.mean(differences), np.std(differences, ddof=1)
    half = stats.t.ppf(0.975, 4) * s * np.sqrt(1 / 5 + 2014 / 7056)
    assert (got["low"], got["high"]) == (pytest.approx(mean - half), pytest.approx(mean + half))
    plain = corrected_interval(differences, 0, 7056)  # nothing shared: the usual t interval
    usual = stats.t.interval(0.95, 4, mean, stats.sem(differences))
    assert (plain["low"], plain["high"]) == pytest.approx(usual)
    ratio = (got["high"] - got["low"]) / (plain["high"] - plain["low"])
    assert ratio == pytest.approx(1.56, abs=0.005)


def test_likelihood_and_calibration():
    rng = np.random.default_rng(2)
    probabilities = rng.dirichlet([1, 1, 1], 500)
    labels = rng.integers(0, 3, 500)
    assert nll(labels, probabilities) == pytest.approx(log_loss(labels, probabilities))
    sure, right = probabilities.max(1), probabilities.argmax(1) == labels
    expected = 0
    for b in range(15):
        own = (sure > b / 15) & (sure <= (b + 1) / 15)
        if own.any():
            expected += own.mean() * abs(right[own].mean() - sure[own].mean())
    assert ece(labels, probabilities) == pytest.approx(expected) and expected > 0.1
    # nine of ten right, and always 0.9 sure; always sure, half right; exactly on a bin's edge
    assert ece([0] * 9 + [1], [[0.9, 0.1]] * 10) == pytest.approx(0)
    assert ece([0, 1], [[1.0, 0.0]] * 2) == pytest.approx(0.5)
    assert ece([0, 1, 1], [[1 / 3, 1 / 3, 1 / 3]] * 3) == pytest.approx(0, abs=1e-9)
    assert np.isnan(ece([0, 1], [[0.9, 0.1], [np.nan, np.nan]]))


def test_temperature():
    rng = np.random.default_rng(3)
    logits = rng.normal(size=(4000, 3))
    softmax = lambda z: np.exp(z) / np.exp(z).sum(1, keepdims=True)
    right = softmax(logits)
    labels = np.array([rng.choice(3, p=p) for p in right])
    sure = softmax(3 * logits)  # three times too sure
    assert best_temperature(labels, sure) == pytest.approx(3, rel=0.1)
    assert scaled(sure, 3) == pytest.approx(right) and scaled(sure, 1) == pytest.approx(sure)
    # a probability of 0 for what is right, as fp32 rounds it
    assert 1 < best_temperature([0, 0, 1], [[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]]) <= 20
    # where nothing is wrong, the lower the better, without end
    assert best_temperature([0, 1], [[0.9, 0.1], [0.2, 0.8]]) == 1


# --- trainings and rows --------------------------------------------------------------------------

def ends(interval):
    return [interval["low"], interval["high"]]


def test_what_sentences_add_to_macro_f1(task):
    labels, good, bad = task
    for predictions in good[0], bad[0], np.where(labels == 2, 4, labels):
        shares = f1_shares(labels, predictions)
        assert shares.mean() == pytest.approx(f1_score(labels, predictions, average="macro",
                                                       zero_division=0))
    # they differ as macro-F1 does between samples of sentences
    drawn = np.random.default_rng(4).integers(120, size=(3000, 120))
    drawn = [f1(labels[own], bad[0][own]) for own in drawn]
    assert f1_shares(labels, bad[0]).std() / 120 ** 0.5 == pytest.approx(np.std(drawn), rel=0.05)


def test_one_training_has_the_t_interval_of_its_rows():
    one = np.random.default_rng(0).normal(3, 10, 900)
    expected = stats.t.interval(0.95, 899, one.mean(), stats.sem(one))
    assert ends(two_way_interval(one)) == pytest.approx(expected)
    # and so have three trainings that say the same
    assert ends(two_way_interval(np.stack([one] * 3))) == pytest.approx(expected)
    five = stats.t.interval(0.99, 899, one.mean(), stats.sem(one))
    assert ends(two_way_interval(one, comparisons=5)) == pytest.approx(five)


def test_trainings_and_rows_are_both_drawn():
    rng = np.random.default_rng(1)
    trainings, rows = rng.normal(0, 2, (4, 1)), rng.normal(0, 5, 300)
    values = trainings + rows + rng.normal(0, 3, (4, 300))
    # the usual analysis of variance, without an interaction to be had
    ms_t = 300 * values.mean(1).var(ddof=1)
    ms_c = 4 * values.mean(0).var(ddof=1)
    rest = values - values.mean(1, keepdims=True) - values.mean(0) + values.mean()
    ms_e = (rest ** 2).sum() / (3 * 299)
    half = stats.t.ppf(0.975, min(299, 3 * ((ms_t + ms_c - ms_e) / ms_t) ** 2))
    half *= ((ms_t + ms_c - ms_e) / 1200) ** 0.5
    got = two_way_interval(values)
    assert ends(got) == pytest.approx([values.mean() - half, values.mean() + half])
    # rows that are alike in all trainings add no spread between them: Student's t of the trainings
    flat = trainings + np.zeros(300)
    expected = stats.t.interval(0.95, 3, trainings.mean(), stats.sem(trainings[:, 0]))
    assert ends(two_way_interval(flat)) == pytest.approx(expected)
    # trainings of folds of their own: what the folds differ by is no spread of trainings
    folds = np.repeat([0, 1, 2], 100)
    apart = two_way_interval(np.stack([rows + 50 * folds] * 2), folds)
    assert ends(apart) == pytest.approx(ends(two_way_interval(rows + 50 * folds, folds)))
    assert apart["high"] - apart["low"] < 2  # without folds it is 9


def test_trainings_that_differ_less_than_chance_count_as_chance():
    rest = np.random.default_rng(5).normal(0, 3, (2, 300))
    values = rest - rest.mean(1, keepdims=True)  # the trainings' means are the same
    got = two_way_interval(values)
    mean_squares = [300 * values.mean(1).var(ddof=1), (values[0] - values[1]).var(ddof=1) / 2]
    assert mean_squares[0] < 1e-9
    larger = max(mean_squares[1], 2 * values.mean(0).var(ddof=1))
    half = stats.t.ppf(0.975, 299) * (larger / 600) ** 0.5
    assert ends(got) == pytest.approx([-half, half], abs=1e-9)


def test_rows_of_a_group_count_once():
    rng = np.random.default_rng(2)
    means = rng.normal(0, 5, (3, 40))
    groups = rng.permutation(np.repeat(np.arange(40), 25))
    values = means[:, groups]  # the rows of a group are the same
    assert two_way_interval(values, groups=groups) == pytest.approx(two_way_interval(means))
    one = two_way_interval(values, groups=np.zeros(1000))  # all about one passage
    assert one == two_way_interval(values)
    uneven = np.repeat(np.arange(40), rng.integers(1, 50, 40))
    got = two_way_interval(means[:, uneven], groups=uneven)
    assert got["points"] == pytest.approx(means[:, uneven].mean())
    assert got["low"] < got["points"] < got["high"]


def test_one_training_is_resampled_and_of_several_the_spread_is_known(task):
    labels, good, bad = task
    assert paired_interval(labels, bad[:1], good[:1], comparisons=3) == paired_bootstrap(
        labels, bad[0], good[0], comparisons=3)
    got = paired_interval(labels, bad, good)
    assert got["points"] == pytest.approx(100 * np.mean(
        [f1(labels, b) - f1(labels, g) for b, g in zip(bad, good)]))
    assert got["low"] < got["points"] < got["high"]
    # of two folds the interval is around what all rows show, whatever each fold does
    folds = np.arange(120) < 90
    assert paired_interval(labels, bad[:1], good[:1], folds)["points"] == pytest.approx(
        100 * (f1(labels, bad[0]) - f1(labels, good[0])))
    wide = paired_interval(labels, bad, good, comparisons=10)
    assert wide["low"] < got["low"] and wide["high"] > got["high"]


def test_no_interval_is_longer_than_the_score():
    labels = np.arange(300) % 2
    right, half = labels.copy(), labels.copy()
    half[:100] = 0
    far = paired_interval(labels, np.stack([right, half]), np.stack([right, right]), comparisons=4)
    assert far["low"] == -100 and -20 < far["points"] < 0 < far["high"] <= 100


def drawn_study(rng, folds, repeats, rows=400):
    """Draw (labels, two methods that are equally good, (repeats, sentences) each, folds): sentences
    differ in how hard they are for all and for each method, trainings in how well they went."""
    n = folds * rows
    labels, hard = rng.integers(0, 2, n), rng.normal(1.8, 1.5, n)
    answers = []
    for _ in range(2):
        own = hard + rng.normal(0, 0.7, n)
        luck = np.repeat(rng.normal(0, 0.25, (repeats, folds)), rows, axis=1)
        is_right = rng.random((repeats, n)) < 1 / (1 + np.exp(-own - luck))
        answers.append(np.where(is_right, labels, 1 - labels))
    return labels, *answers, np.repeat(np.arange(folds), rows)


def test_intervals_hold_what_they_should_as_often_as_they_say(monkeypatch):
    monkeypatch.setattr("spread.REPLICATES", 2000)  # of 10,000 the same ones hold it
    rng, covered = np.random.default_rng(7), {}

    def count(name, studies, interval, folds, repeats):
        drawn = [interval(*drawn_study(rng, folds, repeats)) for _ in range(studies)]
        half = np.median([(own["high"] - own["low"]) / 2 for own in drawn])
        covered[name] = np.mean([own["low"] <= 0 <= own["high"] for own in drawn])
        print(f"{name}: {covered[name]:.1%} of {studies} hold it, half a width of {half:.2f}")

    def by_fold(labels, a, b, fold):
        return [100 * np.mean([macro_f1(labels[fold == k], x[fold == k])
                               - macro_f1(labels[fold == k], y[fold == k]) for x, y in zip(a, b)])
                for k in np.unique(fold)]

    count("5 folds, 3 trainings each", 200, paired_interval, 5, 3)
    count("the same, t over the folds", 200,
          lambda *study: corrected_interval(by_fold(*study), 0, 1), 5, 3)
    count("the same, Nadeau and Bengio", 200,
          lambda *study: corrected_interval(by_fold(*study), 1, 4), 5, 3)
    count("5 folds, 2 trainings each", 200, paired_interval, 5, 2)
    count("3 seeds", 200, lambda *study: paired_interval(*study[:3]), 1, 3)
    count("2 folds, 1 training each", 200, paired_interval, 2, 1)
    count("5 folds, 1 training each", 40, paired_interval, 5, 1)
    count("1 training, test rows alone", 60, lambda *study: paired_interval(*study[:3]), 1, 1)
    *right, alone = covered.values()
    assert min(right) > 0.9 and alone < 0.9
