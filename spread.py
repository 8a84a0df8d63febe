"""How far to trust a number: mean and standard deviation over seeds, a paired bootstrap over seeds
and sentences, or over folds; and how far a probability: its log-likelihood and its calibration."""
import statistics

import numpy as np

REPLICATES = 10_000
CHUNK = 500  # replicates at a time, to bound the memory
BINS = 15


def mean_std(values):
    """(mean, sample standard deviation, or None for a single value)."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None


def nll(labels, probabilities):
    """Mean negative log-likelihood in nats; labels (rows,) ints, probabilities (rows, classes)."""
    # NLL = -1/n sum log p(label)
    rows = np.arange(len(labels))
    return float(-np.log(np.asarray(probabilities)[rows, labels]).mean())


def ece(labels, probabilities):
    """Expected calibration error in [0, 1], of BINS bins of equal width (Guo et al. 2017,
    https://arxiv.org/abs/1706.04599, equation 3): labels (rows,) ints, probabilities (rows,
    classes)."""
    probabilities = np.asarray(probabilities)
    confidence = probabilities.max(1)  # (rows,)
    is_right = probabilities.argmax(1) == labels
    # ECE = sum over bins |B| / n |accuracy(B) - confidence(B)|, B of confidences in (b / 15,
    # (b + 1) / 15]; |B| is in both means, too
    bins = np.ceil(confidence * BINS).astype(int) - 1
    gaps = np.bincount(bins, weights=is_right - confidence)  # (bins,)
    return float(np.abs(gaps).sum() / len(confidence))


def f1_parts(labels, predictions):
    """Per sentence what the F1 of each class adds up: (hits, sizes), (classes, sentences) each.

    labels, predictions: (sentences,) int arrays. F1 of a class = 2 hits / sizes, summed over the
    sentences.
    """
    classes = np.arange(max(labels.max(), predictions.max()) + 1)[:, None]
    is_label, is_prediction = labels == classes, predictions == classes  # (classes, sentences)
    hits = (is_label & is_prediction).astype(np.float64)
    return hits, is_label.astype(np.float64) + is_prediction


def macro_f1(labels, predictions, weights):
    """Macro-F1 in [0, 1] of every resample: weights (replicates, sentences), how often it drew each
    sentence."""
    # (replicates, classes)
    hits, sizes = (weights @ part.T for part in f1_parts(labels, predictions))
    # F1 = 2 TP / (2 TP + FP + FN), mean over the classes that occur
    with np.errstate(invalid="ignore"):
        return np.nanmean(2 * hits / sizes, axis=1)  # (replicates,)


def paired_bootstrap(labels, method, baseline, replicates=REPLICATES, seed=0):
    """Macro-F1 of `method` minus that of `baseline`, in points, over the same test sentences and
    the same seeds.

    labels: (sentences,), method, baseline: (seeds, sentences), ints. Returns {points, low, high}:
    the difference of the means over the seeds, and the 2.5 and 97.5 % percentiles over replicates
    that draw both seeds and sentences with replacement, the same ones for both methods (Efron &
    Tibshirani 1993, chapter 13). With a single seed the interval is over sentences only; with few
    seeds it is too narrow, since n resampled seeds vary (n - 1) / n times as much as new ones
    would.
    """
    labels, method, baseline = (np.asarray(x) for x in (labels, method, baseline))
    n_seeds, n = method.shape
    rng = np.random.default_rng(seed)

    def differences(weights):  # (replicates, sentences) -> (replicates, seeds), in points
        return 100 * np.stack([macro_f1(labels, m, weights) - macro_f1(labels, b, weights)
                               for m, b in zip(method, baseline)], axis=1)

    drawn = []
    for start in range(0, replicates, CHUNK):
        size = min(CHUNK, replicates - start)
        # (size, sentences)
        sentences = rng.multinomial(n, np.full(n, 1 / n), size).astype(np.float64)
        seeds = rng.integers(n_seeds, size=(size, n_seeds))
        drawn.append(np.take_along_axis(differences(sentences), seeds, axis=1).mean(1))
    low, high = np.percentile(np.concatenate(drawn), [2.5, 97.5])
    return {"points": float(differences(np.ones((1, n))).mean()), "low": float(low),
            "high": float(high)}
