"""The bootstrap against scikit-learn and against a slow one, and the cases whose answer is
known."""
import numpy as np
import pytest
from sklearn.metrics import f1_score

from spread import macro_f1, mean_std, paired_bootstrap


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
        assert macro_f1(labels, good[0], weights) == pytest.approx(expected)


def test_interval_is_that_of_a_bootstrap_written_out(task):
    labels, good, bad = task
    rng, differences = np.random.default_rng(5), []

    def f1(truth, answer):  # scikit-learn's takes 1.5 ms, 9,000 times
        classes = [(truth == c, answer == c) for c in range(3)]
        return np.mean([2 * (t & a).sum() / (t.sum() + a.sum()) for t, a in classes])

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
