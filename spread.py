"""How far to trust a number: macro-F1, mean and standard deviation, and the interval of a
difference over trainings and test rows. And how far to trust a probability: its log-likelihood, its
calibration, and both at the best temperature."""
import math
import statistics

import numpy as np

REPLICATES = 10_000
CHUNK = 500  # replicates at a time, to bound the memory
BINS = 15
TINY = 1e-38  # the least probability that counts as one
FEW = 5  # folds; the bootstrap of fewer holds the truth in 80 % of studies
ERROR = 0.05  # an interval of 95 % misses in so many studies


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


def scaled(probabilities, temperature):
    """Return what probabilities (rows, classes) are when the logits behind them are divided by a
    temperature."""
    # softmax(z / T) = p^(1 / T) / sum p^(1 / T)
    powers = np.maximum(np.asarray(probabilities, dtype=np.float64), TINY) ** (1 / temperature)
    return powers / powers.sum(1, keepdims=True)


def best_temperature(labels, probabilities):
    """Find the temperature in [1/4, 20] with the lowest NLL, on validation rows (Guo et al. 2017,
    section 4.2); labels (rows,), probabilities (rows, classes). 1 if none of them is wrong."""
    if (np.argmax(probabilities, 1) == labels).all():
        return 1.0  # the lowest NLL would be at 0
    from scipy.optimize import minimize_scalar  # slow, and needed here only
    return math.exp(minimize_scalar(lambda t: nll(labels, scaled(probabilities, math.exp(t))),
                                    bounds=(-math.log(4), math.log(20)), method="bounded").x)


def calibrated(run):
    """Add to a result the NLL and ECE of its test rows at the temperature that suits its validation
    rows best. Runs of earlier versions have kept none."""
    if not (found := run.get("validation")):
        return run
    labels = np.array(run["test_predictions"])[:, 0]
    temperature = best_temperature(np.array(found["predictions"])[:, 0], found["probabilities"])
    probabilities = scaled(run["test_probabilities"], temperature)
    return run | {"temperature": temperature, "nll_scaled": nll(labels, probabilities),
                  "ece_scaled": ece(labels, probabilities)}


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


def paired_bootstrap(labels, method, baseline, folds=None, comparisons=1):
    """Subtract the macro-F1 of `baseline` from that of `method`, in points, over the same test
    sentences.

    labels, method, baseline: (sentences,), ints; folds: (sentences,), which fold of a
    cross-validation tested each, or None. Returns {points, low, high}: the difference, and its 95 %
    interval, the percentiles over replicates that draw folds and sentences with replacement, the
    same ones for both methods (Efron & Tibshirani 1993, chapter 13); all of so many `comparisons`
    are right at once in 95 % of studies (Bonferroni). Without folds the interval says nothing of
    other trainings.

    A fold brings a training of its own, and drawing folds lets that count. Folds already differ by
    their sentences, which are then drawn once more: where trainings differ little, that makes the
    interval up to sqrt(1.8) = 1.34 times too wide with five folds. Where they differ much, it is
    too narrow, since five resampled folds vary only 4 / 5 times as much as new ones would. And any
    two of five folds share about two thirds of their training rows: see corrected_interval.
    """
    rng = np.random.default_rng(0)
    folds = np.zeros_like(labels) if folds is None else folds
    # Sentences with one label, fold and answers are a cell. How many a resample has of each is all
    # that matters, and there are far fewer cells than sentences.
    (folds, labels, method, baseline), counts = np.unique(
        np.vstack([folds, labels, method, baseline]), axis=1, return_counts=True)

    def differences(weights):  # (replicates, cells) -> (replicates,), in points
        return 100 * (resampled_f1(labels, method, weights)
                      - resampled_f1(labels, baseline, weights))

    drawn = [differences(draw_cells(rng, CHUNK, counts, folds)) for _ in range(REPLICATES // CHUNK)]
    low, high = np.quantile(drawn, [ERROR / 2 / comparisons, 1 - ERROR / 2 / comparisons])
    return {"points": float(differences(counts[None])[0]), "low": float(low), "high": float(high)}


def t_interval(mean, variance, df, comparisons=1):
    """Return {points, low, high}: a mean with its 95 % interval by Student's t; all of so many
    `comparisons` are right at once in 95 % of studies (Bonferroni)."""
    from scipy import stats  # scikit-learn's own; slow, and needed here only
    # mean +- t(1 - 0.05 / 2m, df) sqrt(v)
    half = float(stats.t.ppf(1 - ERROR / 2 / comparisons, df)) * math.sqrt(variance)
    return {"points": float(mean), "low": float(mean - half), "high": float(mean + half)}


def two_way_interval(differences, folds=None, groups=None, comparisons=1):
    """Return {points, low, high} of differences (trainings, rows), for other trainings and other
    rows. A single training's interval is about other rows alone.

    folds (rows,): each fold, of about the same size, has been tested by trainings of its own. Or
    groups (rows,): rows that were drawn together, such as the questions about one passage.

    Trainings and rows are both drawn at random, as readers and cases in Hillis 2007,
    https://doi.org/10.1002/sim.2532; the trainings of a fold are readers of its own cases. From the
    mean squares of trainings, rows and what is left, of R trainings and N rows:

        v = (MS_T + max(MS_C - MS_E, 0)) / (R N)
        df = (R N v)^2 / (MS_T^2 / df_T), at most df_C
    """
    differences = np.atleast_2d(differences)
    if groups is not None and len(set(groups)) > 1:  # of a single one the rows are all there is
        differences = group_shares(differences, groups)
    R, N = differences.shape
    names, parts = np.unique(np.zeros(N) if folds is None else folds, return_inverse=True)
    ss_t = ss_c = ss_e = 0
    for k in range(len(names)):
        own = differences[:, parts == k]  # (R, rows of the fold)
        mean, training, row = own.mean(), own.mean(1, keepdims=True), own.mean(0)
        ss_t += own.shape[1] * np.sum((training - mean) ** 2)
        ss_c += R * np.sum((row - mean) ** 2)
        ss_e += np.sum((own - training - row + mean) ** 2)
    df_t, df_c = len(names) * (R - 1), max(1, N - len(names))
    ms_t, ms_c, ms_e = ss_t / max(1, df_t), ss_c / df_c, ss_e / max(1, (R - 1) * df_c)
    if df_t and ms_t < ms_e:  # by chance: trainings differ at least as much as what is left
        ms_t, df_t = ms_e, (R - 1) * df_c
    # v = (MS_T + max(MS_C - MS_E, 0)) / (R N)
    total = ms_t + max(ms_c - ms_e, 0)
    # df = (R N v)^2 / (MS_T^2 / df_T) <= df_C
    df = min(df_c, total ** 2 * df_t / ms_t ** 2) if ms_t else df_c
    return t_interval(differences.mean(), total / (R * N), df, comparisons)


def group_shares(values, groups):
    """Return what each group of rows adds to the mean of values (trainings, rows): (trainings,
    groups), whose mean is the same. Groups may differ in size (a ratio of means, to first order:
    Cochran 1977, chapter 6)."""
    _, parts, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    mean = values.mean(1, keepdims=True)
    # share_g = mean + sum over its rows (value - mean) / mean size
    sums = np.stack([np.bincount(parts, own) for own in values - mean])  # (trainings, groups)
    return mean + sums / sizes.mean()


def f1_shares(labels, predictions):
    """Return what each sentence adds to the macro-F1, (sentences,): their mean is the macro-F1, and
    they differ as it does, to first order, when sentences are drawn anew."""
    hits, sizes = f1_parts(labels, predictions)  # (classes, sentences)
    hits, sizes = (part[sizes.any(1)] for part in (hits, sizes))
    f1 = 2 * hits.sum(1, keepdims=True) / sizes.sum(1, keepdims=True)  # (classes, 1)
    # share_i = F1 + (2 hit_i - F1 size_i) / mean size, mean over the classes
    return (f1 + (2 * hits - f1 * sizes) / sizes.mean(1, keepdims=True)).mean(0)


def paired_interval(labels, method, baseline, folds=None, comparisons=1):
    """Subtract the macro-F1 of `baseline` from that of `method`, in points: {points, low, high}.
    labels, folds: (sentences,); method, baseline: (trainings, sentences), ints. With one training
    that tests each sentence the interval is a bootstrap, of fewer than FEW folds Student's t over
    them; with several trainings it is an analysis of variance."""
    labels, method, baseline = map(np.asarray, (labels, method, baseline))
    names = [] if folds is None else np.unique(folds)
    if len(method) > 1:
        shares = [100 * np.stack([f1_shares(labels, own) for own in answers])
                  for answers in (method, baseline)]
        found = two_way_interval(shares[0] - shares[1], folds, comparisons=comparisons)
    elif 1 < len(names) < FEW:
        parts = [np.equal(folds, name) for name in names]
        each = [100 * (macro_f1(labels[part], method[0, part])
                       - macro_f1(labels[part], baseline[0, part])) for part in parts]
        # around the difference of all rows together, which is what the scores beside it are
        pooled = 100 * (macro_f1(labels, method[0]) - macro_f1(labels, baseline[0]))
        found = t_interval(pooled, statistics.variance(each) / len(each), len(each) - 1,
                           comparisons)
    else:
        found = paired_bootstrap(labels, method[0], baseline[0], folds, comparisons)
    return found | {"low": max(found["low"], -100.0), "high": min(found["high"], 100.0)}


def corrected_interval(differences, n_test, n_train, comparisons=1):
    """Return {points, low, high} of one difference per fold (folds,): the mean and its 95 %
    interval, had each fold been trained on rows of its own. With n_test 0 it is Student's t over
    the folds; comparisons: as in t_interval.

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
    return t_interval(mean, v, k - 1, comparisons)
