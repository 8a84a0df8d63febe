"""How far to trust a number: macro-F1, mean and standard deviation over seeds, a paired bootstrap
over seeds and sentences, or over folds. And how far to trust a probability: its log-likelihood and
its calibration."""
import math
import statistics

import numpy as np

REPLICATES = 10_000
CHUNK = 500  # replicates at a time, to bound the memory
BINS = 15


def mean_std(values):
    """Return (mean, sample standard deviation, or None for a single value)."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None


def nll(labels, probabilities):
    """Compute the mean negative log-likelihood in nats; labels (rows,) ints, probabilities (rows,
    classes)."""
    # NLL = -1/n sum log p(label)
    rows = np.arange(len(labels))
    return float(-np.log(np.asarray(probabilities)[rows, labels]).mean())


def ece(labels, probabilities):
    """Compute the expected calibration error in [0, 1], of BINS bins of equal width (Guo et al.
    2017, https://arxiv.org/abs/1706.04599, equation 3): labels (rows,) ints, probabilities (rows,
    classes). NaN if one of them is no number."""
    probabilities = np.asarray(probabilities)
    if not np.isfinite(probabilities).all():
        return math.nan  # as a bin's number it would be any
    confidence = probabilities.max(1)  # (rows,)
    is_right = probabilities.argmax(1) == labels
    # ECE = sum over bins |B| / n |accuracy(B) - confidence(B)|, B of confidences in (b / 15,
    # (b + 1) / 15]; |B| is in both means, too
    bins = np.ceil(confidence * BINS).astype(int) - 1
    gaps = np.bincount(bins, weights=is_right - confidence)  # (bins,)
    return float(np.abs(gaps).sum() / len(confidence))


def f1_parts(labels, predictions):
    """Return per sentence what the F1 of each class adds up: (hits, sizes), (classes, sentences)
    each.

    labels, predictions: (sentences,) int arrays. F1 of a class = 2 hits / sizes, summed over the
    sentences.
    """
    classes = np.arange(max(labels.max(), predictions.max()) + 1)[:, None]
    is_label, is_prediction = labels == classes, predictions == classes  # (classes, sentences)
    hits = (is_label & is_prediction).astype(np.float64)
    return hits, is_label.astype(np.float64) + is_prediction


def resampled_f1(labels, predictions, weights):
    """Compute the macro-F1 in [0, 1] of every resample, (replicates,): weights (replicates,
    sentences), how often it drew each sentence."""
    # (replicates, classes)
    hits, sizes = (weights @ part.T for part in f1_parts(labels, predictions))
    # F1 = 2 TP / (2 TP + FP + FN), mean over the classes that occur
    with np.errstate(invalid="ignore"):
        return np.nanmean(2 * hits / sizes, axis=1)  # (replicates,)


def macro_f1(labels, predictions):
    """Compute macro-F1 in [0, 1]; labels, predictions: (sentences,) ints."""
    labels, predictions = np.asarray(labels), np.asarray(predictions)
    return float(resampled_f1(labels, predictions, np.ones((1, len(labels))))[0])


def draw_cells(rng, size, counts, folds):
    """Draw `size` resamples of sentences: how many each has of every cell, (size, cells). counts,
    folds (cells,): how many sentences a cell has, and their fold.

    A resample is as many folds as there are, and of each as many sentences as it has.
    """
    names = np.unique(folds)
    times = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size)  # (size, folds)
    drawn = np.empty((size, len(counts)))
    for i, name in enumerate(names):
        own = counts[folds == name]
        # a fold drawn twice: twice as many of its sentences
        drawn[:, folds == name] = rng.multinomial(times[:, i] * own.sum(), own / own.sum())
    return drawn


def paired_bootstrap(labels, method, baseline, folds=None):
    """Subtract the macro-F1 of `baseline` from that of `method`, in points, over the same test
    sentences, the same seeds and the same folds.

    labels: (sentences,), method, baseline: (seeds, sentences), ints; folds: (sentences,), which
    fold of a cross-validation tested each, or None. Returns {points, low, high}: the difference of
    the means over the seeds, and the 2.5 and 97.5 % percentiles over replicates that draw seeds,
    folds and sentences with replacement, the same ones for both methods (Efron & Tibshirani 1993,
    chapter 13). With a single seed the interval is over sentences (and folds) only; with few seeds
    it is too narrow, since n resampled seeds vary (n - 1) / n times as much as new ones would.

    The interval of a cross-validation is about trainings on these rows. A fold brings a training of
    its own, and drawing folds lets that count. Folds already differ by their sentences, which are
    then drawn once more: where trainings differ little, that makes the interval up to sqrt(1.8) =
    1.34 times too wide with five folds, on the safe side. On the other side, any two of five folds
    share about two thirds of their training rows, so that they differ less than trainings on new
    rows would: see corrected_interval.
    """
    n_seeds, rng = len(method), np.random.default_rng(0)
    folds = np.zeros_like(labels) if folds is None else folds
    # Sentences with one label, fold and answers are a cell. How many a resample has of each is all
    # that matters, and there are far fewer cells than sentences.
    cells, counts = np.unique(np.vstack([folds, labels, method, baseline]), axis=1,
                              return_counts=True)
    folds, labels = cells[:2]
    method, baseline = cells[2:2 + n_seeds], cells[2 + n_seeds:]

    def differences(weights):  # (replicates, cells) -> (replicates, seeds), in points
        return 100 * np.stack([resampled_f1(labels, m, weights) - resampled_f1(labels, b, weights)
                               for m, b in zip(method, baseline)], axis=1)

    drawn = []
    for start in range(0, REPLICATES, CHUNK):
        size = min(CHUNK, REPLICATES - start)
        seeds = rng.integers(n_seeds, size=(size, n_seeds))
        each = differences(draw_cells(rng, size, counts, folds))  # (size, seeds)
        drawn.append(np.take_along_axis(each, seeds, axis=1).mean(1))
    low, high = np.percentile(np.concatenate(drawn), [2.5, 97.5])
    return {"points": float(differences(counts[None]).mean()), "low": float(low),
            "high": float(high)}


def mean_interval(differences):
    """Return {points, low, high} of differences (seeds, questions), or (questions,) of one seed:
    the mean, and the 2.5 and 97.5 % percentiles of the means of resamples that draw seeds and
    questions with replacement (Efron & Tibshirani 1993, chapter 13). With a single seed the
    interval does not speak of other seeds; with few it is too narrow, as in paired_bootstrap."""
    differences, rng = np.atleast_2d(differences), np.random.default_rng(0)
    (n_seeds, n), means = differences.shape, []
    cells, counts = np.unique(differences, axis=1, return_counts=True)  # as in paired_bootstrap
    for start in range(0, REPLICATES, CHUNK):
        size = min(CHUNK, REPLICATES - start)
        seeds = rng.multinomial(n_seeds, np.full(n_seeds, 1 / n_seeds), size)  # (size, seeds)
        questions = rng.multinomial(n, counts / n, size)  # (size, cells)
        means.append((seeds @ cells * questions).sum(1) / n_seeds / n)
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    return {"points": float(differences.mean()), "low": float(low), "high": float(high)}


def corrected_interval(differences, n_test, n_train):
    """Return {points, low, high} of one difference per fold (folds,): the mean and its 95 %
    interval, had each fold been trained on rows of its own.

    Trainings that share rows are correlated, so that s^2 / k is too small a variance for the mean
    of k folds, and no unbiased one can be had from one cross-validation (Bengio & Grandvalet 2004).
    Nadeau & Bengio 2003 (https://doi.org/10.1023/A:1024068626366) estimate the correlation as
    n_test / (n_test + n_train), for splits drawn anew each time; as is usual it is taken for folds,
    too:

        v = (1 / k + n_test / n_train) s^2        and mean +- t(k - 1) sqrt(v)

    On five folds of `movies` that is 1.56 times the uncorrected standard error, and t of 4 degrees
    of freedom makes it wide: 2.78 instead of 1.96.
    """
    k, mean = len(differences), statistics.mean(differences)
    # v = (1 / k + n_test / n_train) s^2
    v = (1 / k + n_test / n_train) * statistics.variance(differences)
    from scipy import stats  # scikit-learn's own; slow, and needed here only
    half = float(stats.t.ppf(0.975, k - 1)) * math.sqrt(v)
    return {"points": mean, "low": mean - half, "high": mean + half}
