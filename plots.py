"""Tables and figures of the sentence study, made from comparison.json and crossvalidation.json in
metrics/ and nothing else; and what the figures of tools/ share with them.

    python plots.py [FOLDER]      reads FOLDER/metrics/, writes FOLDER/figures/
                                  (default: beside this file)
"""
import sys
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.font_manager import findfont, fontManager, get_font
from matplotlib.text import Text

from common import fail, read_json, start, write_text
from methods import CASES, label_of
from settings import is_synthetic, read_settings, short
from verdict import CLOSE, LARGEST, Line, is_close, points, verdict

plt.rcParams.update({"font.size": 11, "axes.grid": True, "grid.alpha": 0.3,
                     "axes.spines.top": False, "axes.spines.right": False,
                     "axes.axisbelow": True, "figure.constrained_layout.use": True})
FROZEN = "#DDDDDD"
ANSWER = ("method", "% trained", "macro-F1", "vs full (points)", "s per epoch", "trained file (MB)")
FAR = 8  # points of loss that a figure shows as an arrow


# --- what all figures and tables share -----------------------------------------------------------

def name_rows(ax, names):
    """Label the rows of a horizontal chart, the first on top."""
    ax.set_yticks(range(len(names)), names)
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)


def show_as_written(text):
    """Let a text of a figure be read as it is: no formula between two dollars, and a font that has
    its characters, or where none has them, their numbers."""
    words = text.get_text()
    if not words or "\\mathdefault" in words:  # the second are matplotlib's own powers of ten
        return
    text.set_parse_math(False)
    rare = {ord(c) for c in words if c.isprintable() and not c.isascii()}
    if missing := rare and rare - set(get_font(findfont(text.get_fontproperties())).get_charmap()):
        fonts = (font for font in fontManager.ttflist if not font.name.startswith("Last Resort")
                 and missing <= set(get_font(font.fname).get_charmap()))
        if other := next(fonts, None):
            text.set_fontfamily([*text.get_fontfamily(), other.name])
        else:
            text.set_text("".join(ascii(c)[1:-1] if ord(c) in missing else c for c in words))


def save_figure(fig, path):
    """Write a figure, and its folder."""
    for text in fig.findobj(Text):
        show_as_written(text)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=120)
    plt.close(fig)


def write_table(path, text):
    """Write a table beside the figures, and print it."""
    write_text(path, text)
    print(f"{text}\nfigures are in {path.parent}")


def markdown_table(header, rows):
    """Make a Markdown table of strings, its first column left-aligned."""
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "".join(f"| {' | '.join(cells)} |\n" for cells in [header, rule, *rows])


def plus_minus(entry, key, digits, scale=1):
    """Write a mean of an entry with its standard deviation, if there is one."""
    std = entry[f"{key}_std"]
    spread = "" if std is None else f" ± {scale * std:.{digits}f}"
    return f"{scale * entry[key]:.{digits}f}{spread}"


def floor_row(header, name, cells):
    """Make the row of a table for answers that need no training. cells: {column: text}."""
    return [name, *(cells.get(column, "") for column in header[1:])]


def study(runs):
    """Say in one line what was compared on what, from a list of results."""
    run = runs[0]
    s, rows = read_settings(run), run["rows"]
    what = "questions" if s.is_qa else "sentences"
    task = "SYNTHETIC questions" if is_synthetic(s) else s.task
    devices, amps = (" and ".join(sorted({r["environment"][key] for r in runs}))
                     for key in ("device", "amp"))
    seeds = sorted({r["settings"]["seed"] for r in runs})
    numbers, n = ", ".join(map(str, seeds)), len(seeds)
    size = f"{rows['train']:,} training, {rows['test']:,} test {what}"
    if s.fold:
        n_folds = int(s.fold.split("/")[1])
        about = "" if all(r["rows"] == rows for r in runs) else "about "
        numbers = f"{seeds[0]} to {seeds[-1]}" if n > 1 else numbers
        size, n = f"{n_folds} folds, each {about}{size}", f"{max(n, n_folds)} trainings"
    return (f"{s.model} on {task} ({size}), seed{'s' if len(seeds) > 1 else ''} {numbers} (n = "
            f"{n}), {devices}, amp {amps}")


# --- tables of the sentence study ----------------------------------------------------------------

def entry_label(entry):
    """Return what the method of an entry of comparison.json is called, † if it is not ranked."""
    return label_of(read_settings(entry["runs"][0])) + (" †" if entry["marks"] else "")


def study_of(entries):
    """Say in one line what the entries of comparison.json compare."""
    return study([run for entry in entries.values() for run in entry["runs"]])


def memory_key(entries):
    """Choose the GPU's peak where there was a GPU, else that of the whole process: (key, label)."""
    if all(entry["peak_vram_gb"] is not None for entry in entries.values()):
        return "peak_vram_gb", "peak GPU memory (GB)"
    return "peak_rss_gb", "peak resident memory (GB)"


def lines_of(entries):
    """Return what the verdict reads of each entry, a list of Lines."""
    key, _ = memory_key(entries)
    return [Line(name, label_of(read_settings(e["runs"][0])), 100 * e["f1_macro"], e["vs_full"],
                 e["epoch_time_s"], e[key], e["checkpoint_mb"], e["marks"])
            for name, e in entries.items()]


def study_verdict(study, what_varies):
    """Write the verdict on a comparison.json or crossvalidation.json, as Markdown. what_varies
    between the runs of a method: the seed, the fold."""
    full = study["entries"]["full"]
    rows = full.get("test_rows") or full["runs"][0]["rows"]["test"]
    return verdict(lines_of(study["entries"]), "macro-F1", rows, full["n"], what_varies)


def captioned(study, header, rows, caption):
    """Make table and caption of a study, as Markdown."""
    f1, accuracy = (f"{study['floor'][key]:.4f}" for key in ("f1_macro", "accuracy"))
    cells = {"trainable": "0", "macro-F1": f1, "test macro-F1": f1, "accuracy": accuracy}
    return (markdown_table(header, [*rows, floor_row(header, LARGEST, cells)])
            + f"\n{caption}.\n")


def said_search(entries):
    """Say how the learning rates were chosen, if they were searched."""
    tried = [entry["tried"] for entry in entries.values() if entry["tried"]]
    n = " or ".join(map(str, sorted(set(map(len, tried)))))
    return f"each learning rate is the best of {n} by validation; " if tried else ""


def said_interval(entries, n, drawn):
    """Say what the interval of a study with n trainings of each row is about."""
    how = f"over {drawn}" if n > 1 else f"over {drawn} alone, by a paired bootstrap"
    return (f"[ ] is the 95 % interval of the difference, {how}, with an allowance for "
            f"{len(entries) - 1} comparisons at once")


def caption(study):
    """Say what the table of a comparison.json shows."""
    entries = study["entries"]
    n = entries["full"]["n"]
    spread, drawn = ("seeds, for the time over all epochs", "seeds and test sentences") if n > 1 \
        else ("epochs", "test sentences")
    return (f"{study_of(entries)}; {said_search(entries)}± is the standard deviation over the "
            f"{spread}; {said_interval(entries, n, drawn)}; made by `{study['command']}`")


def table(entries):
    """Make (header, rows) of the comparison, as strings."""
    key, what = memory_key(entries)
    header = ["method", "lr", "trainable", "of which method / LayerNorm / head", "% trained", "n",
              "test macro-F1", "vs full (points)", "accuracy", "best epochs", "s per epoch",
              what, "trained file (MB)"]

    rows = []
    for name, entry in entries.items():
        kinds, mb = entry["trainable_by_kind"], entry["checkpoint_mb"]
        parts = "/".join(f" {kinds[kind]:,} " for kind in ("method", "layer_norm", "head")).strip()
        rows.append([
            entry_label(entry), short(entry["runs"][0]["settings"]["lr"]),
            f"{entry['trainable_params']:,}", parts if name != "full" else "everything",
            f"{entry['trainable_pct']:.2f}", f"{entry['n']}", plus_minus(entry, "f1_macro", 4),
            points(entry["vs_full"]), plus_minus(entry, "accuracy", 4),
            ", ".join(map(str, entry["best_epoch"])), plus_minus(entry, "epoch_time_s", 1),
            plus_minus(entry, key, 2), "–" if mb is None else f"{mb:.2f}"])
    return header, rows


def markdown(study):
    """Make table, caption and verdict of a comparison.json, as Markdown."""
    return (captioned(study, *table(study["entries"]), caption(study))
            + "\n" + study_verdict(study, "seed"))


def fold_caption(study):
    """Say what the table of a crossvalidation.json shows."""
    entries = study["entries"]
    n, n_folds = (entries["full"][key] for key in ("n", "folds"))
    how_often = "once" if n == n_folds else f"{n // n_folds} times"
    return (f"{study_of(entries)}; every one of the {entries['full']['test_rows']:,} sentences is "
            f"tested {how_often}, and macro-F1 is of all of them together; {said_search(entries)}"
            "± is the standard deviation over the trainings, for the time over all epochs; "
            f"{said_interval(entries, n, 'trainings and sentences')}, and, for one comparison and "
            "trainings on new rows, Nadeau and Bengio's around the mean of the folds; made by "
            f"`{study['command']}`")


def fold_table(entries):
    """Make (header, rows) of a cross-validation, as strings."""
    key, what = memory_key(entries)
    header = ["method", "lr", "trainable", "% trained", "n", "macro-F1", "vs full (points)",
              f"less than {CLOSE} points lost?", "for new rows", "s per epoch", what,
              "trained file (MB)"]
    rows = []
    for entry in entries.values():
        mb = entry["checkpoint_mb"]
        rows.append([
            entry_label(entry), short(entry["runs"][0]["settings"]["lr"]),
            f"{entry['trainable_params']:,}", f"{entry['trainable_pct']:.2g}"
            if entry["trainable_pct"] < 1 else f"{entry['trainable_pct']:.1f}", f"{entry['n']}",
            plus_minus(entry, "f1_macro", 4), points(entry["vs_full"]), is_close(entry["vs_full"], entry["test_rows"]),
            points(entry["vs_full_new_rows"]),
            plus_minus(entry, "epoch_time_s", 1), plus_minus(entry, key, 2),
            "–" if mb is None else f"{mb:.2f}" if mb >= 0.01 else f"{mb:.2g}"])
    return header, rows


def calibration_markdown(study):
    """Make the table of the probabilities of a crossvalidation.json, as Markdown."""
    kinds = {"nll": ("NLL", 1, 3), "ece": ("ECE (%)", 100, 1),
             "nll_scaled": ("NLL, scaled", 1, 3), "ece_scaled": ("ECE (%), scaled", 100, 1)}
    kinds = {key: kind for key, kind in kinds.items()
             if all(key in entry["calibration"] for entry in study["entries"].values())}
    header, rows = ["method"], []
    for what, _, _ in kinds.values():
        header += [what, "vs full"]
    for entry in study["entries"].values():
        cells = [entry_label(entry)]
        for key, (_, scale, digits) in kinds.items():
            own = entry["calibration"][key]
            cells.append(f"{scale * own['mean']:.{digits}f} ± {scale * own['std']:.{digits}f}")
            low, middle, high = (f"{scale * own['vs_full'][end]:+.{digits}f}" for end in
                                 ("low", "points", "high")) if own["vs_full"] else ("",) * 3
            cells.append(f"{middle} [{low}, {high}]" if middle else "")
        rows.append(cells)
    scaled = ("scaled: at the temperature with the best NLL on the validation rows; "
              if "nll_scaled" in kinds else "")
    return (f"{markdown_table(header, rows)}\nNLL in nats, ECE with 15 bins: means over the "
            f"{study['entries']['full']['n']} trainings ± their standard deviation; [ ] is the 95 % "
            f"t interval of the difference over the folds; {scaled}made by "
            f"`{study['command']}`.\n")


def answer_markdown(study):
    """Make the answer of a crossvalidation.json, as Markdown: six columns of its table, and the
    verdict."""
    header, rows = fold_table(study["entries"])
    kept = [header.index(column) for column in ANSWER]
    entries = study["entries"]
    short = (f"{study_of(entries)}; ± is the standard deviation over the trainings (of times: over "
             "all epochs); "
             + said_interval(entries, entries["full"]["n"], "trainings and sentences"))
    header, *rows = ([cells[i] for i in kept] for cells in (header, *rows))
    return captioned(study, header, rows, short) + "\n" + study_verdict(study, "fold")


# --- figures of the sentence study ---------------------------------------------------------------

def curves(entries, path):
    """Draw losses and macro-F1 against the epochs."""
    keys = "train_loss", "validation_loss", "validation_f1_macro"
    titles = "training loss (nats)", "validation loss (nats)", "validation macro-F1"
    fig, axes = plt.subplots(1, 3, figsize=(12, 4))
    for ax, key, title in zip(axes, keys, titles):
        for name, entry in entries.items():
            _, color, marker = CASES[name]
            # (seeds, epochs)
            values = np.array([[h[key] for h in run["history"]] for run in entry["runs"]])
            epochs, mean = np.arange(1, values.shape[1] + 1), values.mean(0)
            ax.plot(epochs, mean, color=color, marker=marker, label=entry_label(entry))
            ax.fill_between(epochs, values.min(0), values.max(0), color=color, alpha=0.12,
                            linewidth=0)
        ax.set(title=title, xlabel="epoch")
        ax.xaxis.get_major_locator().set_params(integer=True)

    axes[0].legend(fontsize=9)
    band = ("; mean over the seeds, band from the lowest to the highest"
            if entries["full"]["n"] > 1 else "")
    fig.suptitle(study_of(entries) + band, fontsize=9)
    save_figure(fig, path)


def read_study(path):
    """Read a comparison.json or crossvalidation.json."""
    return read_json(path, "entries", "floor")


def draw_comparison(output):
    """Draw everything that output/metrics/comparison.json holds into output/figures/, and print the
    table."""
    figures = output / "figures"
    study = read_study(output / "metrics" / "comparison.json")
    entries = study["entries"]
    curves(entries, figures / "curves.png")
    glance(entries, "seed", output, "summary.png")
    write_table(figures / "summary.md", markdown(study))


def peaks_of(entries, output):
    """Return ({method: GB}, of what): the peaks that tools.memory predicted for a model in
    output/metrics/memory.json, if it did so for all methods of the entries, else the measured
    ones."""
    path, key = output / "metrics" / "memory.json", memory_key(entries)[0]
    predicted = read_json(path, "methods", "model") if path.exists() else {"methods": {}}
    if entries.keys() <= predicted["methods"].keys():
        peaks = {name: predicted["methods"][name]["peak"] / 1e9 for name in entries}
        return peaks, f"peak, {Path(predicted['model']).name.removesuffix('-uncased')}"
    return {name: entry[key] for name, entry in entries.items()}, "peak memory"


def glance(entries, what, output, name):
    """Draw into output/figures/ what each method loses and what it gains, full fine-tuning on top,
    then the least loss first. A loss of more than FAR points is an arrow. what: of which each
    method has a run, a seed or a training; name: of the file."""
    path, (peaks, memory_title) = output / "figures" / name, peaks_of(entries, output)
    others = sorted((name for name in entries if name != "full"),
                    key=lambda name: -entries[name]["vs_full"]["points"])
    names = ["full", *others]
    fig, (lost, seconds, memory, disk) = plt.subplots(
        1, 4, figsize=(11, 0.42 * len(names) + 1.1), sharey=True, width_ratios=[9, 4, 4, 2])
    full = [run["f1_macro"] for run in entries["full"]["runs"]]
    each = {name: [100 * (run["f1_macro"] - f1) for run, f1 in zip(entries[name]["runs"], full)]
            for name in others if entries[name]["vs_full"]["points"] >= -FAR}
    shown = [x for name, own in each.items()
             for x in (*own, *(entries[name]["vs_full"][end] for end in ("low", "high")))]
    left, right = min([-2, *shown]), max([1, *shown])

    lost.axvline(0, color=CASES["full"].color, linewidth=1)
    for y, name in enumerate(names):
        entry, (_, color, marker) = entries[name], CASES[name]
        vs, said = entry["vs_full"], f"F1 {entry['f1_macro']:.3f}"
        if name in each:
            lost.plot([vs["low"], vs["high"]], [y, y], color=color, linewidth=4, alpha=0.5,
                      solid_capstyle="butt")
            lost.plot(each[name], [y + 0.3] * len(each[name]), "|", color=color, zorder=3)
        elif vs:
            lost.annotate("", (left - 0.3, y), (left + 0.7, y),
                          arrowprops={"arrowstyle": "->", "color": color, "linewidth": 2})
        if not vs or name in each:
            lost.plot(vs["points"] if vs else 0, y, marker, color=color, markersize=8)
        if vs:
            said = f"{vs['points']:+.1f}"
        lost.text(right + 0.2, y, said, va="center")
        for ax, value, form in ((seconds, entry["epoch_time_s"], "{:.0f} s"),
                                (memory, peaks[name], "{:.2f} GB")):
            ax.barh(y, value, color=color, height=0.6)
            ax.annotate(form.format(value), (value, y), xytext=(4, 0),
                        textcoords="offset points", va="center")
        mb = entry["checkpoint_mb"]
        disk.text(0, y, "–" if mb is None else f"{mb:.1f} MB" if mb >= 0.1 else
                  f"{1000 * mb:.0f} kB", va="center")

    name_rows(lost, [entry_label(entries[name]) for name in names])
    lost.set(title="LOST: points of macro-F1", xlim=(left - 0.5, right + 0.2 * (right - left) + 1),
             xlabel=f"bar: 95 % interval; if it contains 0, no loss is shown; |: one {what}")
    for ax, title in ((seconds, "COST: epoch time"), (memory, memory_title),
                      (disk, "trained file")):
        ax.set(title=title, xticks=[])
        ax.margins(x=0.35)
        ax.grid(visible=False)
        ax.spines[["left", "bottom"]].set_visible(False)
        ax.tick_params(left=False)
    for ax in lost, seconds, memory, disk:
        ax.title.set(fontsize=11, ha="left", x=0)
    disk.set_xlim(0, 1)
    fig.suptitle(study_of(entries), fontsize=10)
    save_figure(fig, path)


def draw_folds(output):
    """Draw what output/metrics/crossvalidation.json holds into output/figures/, and print the
    table."""
    figures = output / "figures"
    study = read_study(output / "metrics" / "crossvalidation.json")
    entries = study["entries"]
    glance(entries, "training", output, "glance.png")
    write_table(figures / "crossvalidation.md",
                captioned(study, *fold_table(entries), fold_caption(study)))
    write_table(figures / "calibration.md", calibration_markdown(study))
    write_table(figures / "answer.md", answer_markdown(study))


def draw_layers(path):
    """Draw one BERT layer, its input on top, and what each method adds to it or trains."""
    lora, dora, qlora, houlsby, pfeiffer, bitfit, head = (CASES[name].color for name in (
        "lora_r8", "dora", "qlora", "adapter", "pfeiffer", "bitfit", "head"))
    fig, ax = plt.subplots(figsize=(8, 7.2))

    def box(x, y, width, height, text, color=FROZEN, edge="#555555", **look):
        ax.add_patch(plt.Rectangle((x - width / 2, y - height / 2), width, height, zorder=2,
                                   facecolor=color, edgecolor=edge, **look))
        ax.text(x, y, text, ha="center", va="center", color="white" if color == bitfit else "black")

    def arrow(*points):  # what of it is behind a box is not seen
        look = {"arrowstyle": "->", "color": "#555555", "shrinkA": 0, "shrinkB": 0}
        ax.plot(*zip(*points[:-1]), color="#555555", linewidth=1, zorder=1)
        ax.annotate("", points[-1], points[-2], arrowprops=look, zorder=1)

    for x, y, w, h, text in (
            (3.8, 1.8, 0.9, 0.9, "query"), (5, 1.8, 0.9, 0.9, "key"), (6.2, 1.8, 0.9, 0.9, "value"),
            (5, 3.65, 3.4, 0.55, "output"), (5, 5.65, 3.4, 0.55, "FFN up"),
            (5, 7.1, 3.4, 0.55, "FFN down"), (5, 4.85, 3.4, 0.55, "add & LayerNorm"),
            (5, 8.3, 3.4, 0.55, "add & LayerNorm")):
        edge = (houlsby, "-") if "Norm" in text else (qlora, "--")
        box(x, y, w, h, text, edge=edge[0], linestyle=edge[1], linewidth=2.5)
        box(x + w / 2 - 0.18, y + h / 2 - 0.16, 0.28, 0.28, "b", bitfit)
    for x, side in (3.8, -1), (6.2, 1):
        box(x, 1.17, 0.9, 0.26, "A", lora)
        box(x + 0.63 * side, 1.8, 0.26, 0.9, "B", lora)
        box(x + 0.95 * side, 1.8, 0.26, 0.9, "m", dora)
        arrow((5, 0.7), (x, 0.7), (x, 2.62))
    for x, y, text, color in (
            (5, 0.3, "a vector for every token", "white"), (5, 2.85, "attention", "white"),
            (5, 6.4, "GELU", "white"), (8.4, 4.25, "Houlsby: adapter", houlsby),
            (8.4, 7.7, "Houlsby: adapter", houlsby),
            (8.4, 8.95, "Pfeiffer: adapter,\nthen LayerNorm", pfeiffer),
            (5, 9.55, "after all layers: head,\ntrains with every method", head),
            (1.1, 1.1, "LoRA: A, B", lora), (1.1, 1.65, "DoRA: A, B, m", dora),
            (1.1, 2.35, "QLoRA: A, B,\ndashed in 4 bits", qlora),
            (1.1, 4.85, "Houlsby:\nLayerNorms", houlsby), (1.1, 5.65, "BitFit: every b", bitfit)):
        box(x, y, {5: 3.4, 8.4: 2.4, 1.1: 2}[x], 0.72 if "\n" in text else 0.45, text, color)
    for tip in 1.35, 2.62, 3.37, 4.57, 5.37, 6.17, 6.82, 8.02, 9.19:
        arrow((5, tip - 1), (5, tip))
    for top, end in (0.7, 4.85), (5.24, 8.3):  # what is added
        arrow((5, top), (2.4, top), (2.4, end), (3.3, end))
    for y, end in (4.25, 4.85), (7.7, 8.2), (8.95, 8.4):
        arrow((5, y), (8.4, y), (8.4, end), (6.7, end))
    ax.text(5, 10.3, "LoRA: h = W0 x + b + s B A dropout(x), with s = alpha / r", ha="center")
    ax.set(xlim=(0, 9.7), ylim=(10.3, 0), title="A BERT layer: grey is frozen, colours train")
    ax.axis("off")
    save_figure(fig, path)


if __name__ == "__main__":
    start()
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
    drawings = {"comparison.json": draw_comparison, "crossvalidation.json": draw_folds}
    found = [draw for name, draw in drawings.items() if (folder / "metrics" / name).exists()]
    if not found:
        fail(f"{folder / 'metrics'} holds none of {', '.join(drawings)}, which run_all.sh makes; "
             "python -m tools.NAME --redraw draws those of grid, sweep, memory, multitask, bench")
    for draw in found:
        draw(folder)
    draw_layers(folder / "figures" / "layers.png")
