"""The bootstrap against scikit-learn and against a slow one, and the cases whose answer is
known."""
import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import f1_score, log_loss

from spread import (
    corrected_interval,
    ece,
    macro_f1,
    mean_interval,
    mean_std,
    nll,
    paired_bootstrap,
    resampled_f1,
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
    labels, good, bad = task
    rng, differences = np.random.default_rng(5), []
    assert f1(labels, bad[0]) == pytest.approx(f1_score(labels, bad[0], average="macro"))
    for _ in range(1500):
        seeds, drawn = rng.integers(3, size=3), rng.integers(120, size=120)
        score = lambda p: np.mean([f1(labels[drawn], p[s][drawn]) for s in seeds])
        differences.append(100 * (score(bad) - score(good)))
    low, high = np.percentile(differences, [2.5, 97.5])
    got = paired_bootstrap(labels, bad, good)
    exact = 100 * np.mean([f1_score(labels, b, average="macro")
                           - f1_score(labels, g, average="macro") for b, g in zip(bad, good)])
    assert got["points"] == pytest.approx(exact) and got["low"] < exact < got["high"] < 0
    # points, of a width of 14
    assert got["low"] == pytest.approx(low, abs=0.8) and got["high"] == pytest.approx(high, abs=0.8)


def test_pairing_and_both_sources_of_spread(task):
    labels, good, bad = task
    width = lambda result: result["high"] - result["low"]
    # unpaired it would spread
    assert paired_bootstrap(labels, good, good) == {"points": 0.0, "low": 0.0, "high": 0.0}
    same_seed_thrice = paired_bootstrap(labels, np.stack([bad[0]] * 3), np.stack([good[0]] * 3))
    one_seed = paired_bootstrap(labels, bad[:1], good[:1])
    assert (same_seed_thrice["points"] == one_seed["points"]
            and width(same_seed_thrice) == pytest.approx(width(one_seed), rel=0.1))
    # One seed of three much worse: drawing sentences alone would spread this mean a third as far as
    # that one seed.
    uneven = paired_bootstrap(labels, np.stack([bad[0], good[0], good[0]]), np.stack([good[0]] * 3))
    # 30 % of the draws are without that seed
    assert width(uneven) > 1.5 * width(one_seed) / 3 and uneven["high"] == 0


def test_folds_that_differ_spread_further_than_their_sentences(task):
    labels, good, bad = task
    fold, width = np.repeat(np.arange(4), 30), lambda result: result["high"] - result["low"]
    # worse in one fold of four alone
    uneven = np.where(fold == 2, bad[:1], good[:1])
    flat, cut = (paired_bootstrap(labels, uneven, good[:1], folds) for folds in (None, fold))
    assert flat["points"] == cut["points"] and width(cut) > 1.5 * width(flat)
    # (3 / 4)^4 = 32 % of the draws are without that fold
    assert cut["high"] == 0
    alike = paired_bootstrap(labels, bad[:1], good[:1], np.zeros(120, int))
    assert width(alike) == pytest.approx(width(paired_bootstrap(labels, bad[:1], good[:1])), rel=.1)


def test_interval_over_folds_is_that_of_a_bootstrap_written_out(task):
    labels, good, bad = task
    rng, differences = np.random.default_rng(6), []
    fold = rng.integers(0, 4, 120)  # of unequal sizes
    bad = np.where(fold >= 2, bad, good)  # and unlike each other
    own = [np.flatnonzero(fold == k) for k in range(4)]
    for _ in range(3000):
        drawn = np.concatenate([own[k][rng.integers(len(own[k]), size=len(own[k]))]
                                for k in rng.integers(4, size=4)])
        seeds = rng.integers(3, size=3)
        score = lambda p: np.mean([f1(labels[drawn], p[s][drawn]) for s in seeds])
        differences.append(100 * (score(bad) - score(good)))
    low, high = np.percentile(differences, [2.5, 97.5])
    got, flat = paired_bootstrap(labels, bad, good, fold), paired_bootstrap(labels, bad, good)
    assert got["low"] == pytest.approx(low, abs=1) and got["high"] == pytest.approx(high, abs=1)
    # without folds it would not pass
    assert flat["low"] - low > 3 and high - flat["high"] > 1


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


def test_mean_interval_is_over_questions_and_seeds():
    rng = np.random.default_rng(0)
    one = rng.normal(3, 10, 900)
    vs = mean_interval(one)
    assert vs == mean_interval(one[None])
    assert vs["points"] == pytest.approx(one.mean())
    # 1.96 standard errors each way
    assert vs["high"] - vs["low"] == pytest.approx(2 * 1.96 * one.std() / 30, rel=0.05)
    # seeds that differ by 8 points: two of them are drawn as (0, 0), (0, 8), (8, 0) or (8, 8)
    two = np.stack([one - 4, one + 4])
    wide = mean_interval(two)
    assert wide["points"] == pytest.approx(vs["points"])
    assert wide["low"] == pytest.approx(one.mean() - 4 - 1.64 * one.std() / 30, abs=0.15)
    assert wide["high"] - wide["points"] > 4
