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
from verdict import LARGEST, Line, points, verdict

plt.rcParams.update({"font.size": 11, "axes.grid": True, "grid.alpha": 0.3,
                     "axes.spines.top": False, "axes.spines.right": False,
                     "axes.axisbelow": True, "figure.constrained_layout.use": True})
FROZEN = "#DDDDDD"


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
    usual = get_font(findfont(text.get_fontproperties())).get_charmap()
    if missing := {ord(c) for c in words if c.isprintable()} - set(usual):
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
        size, n = f"{n_folds} folds, each {about}{size}", n * n_folds
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
    return verdict(lines_of(study["entries"]), "macro-F1", rows, full["n"],
                   (LARGEST, 100 * study["floor"]["f1_macro"]), what_varies=what_varies)


def page(study, header, rows, caption, what_varies):
    """Make table, caption and verdict of a study, as Markdown."""
    f1, accuracy = (f"{study['floor'][key]:.4f}" for key in ("f1_macro", "accuracy"))
    cells = {"trainable": "0", "macro-F1": f1, "test macro-F1": f1, "accuracy": accuracy}
    return (markdown_table(header, [*rows, floor_row(header, LARGEST, cells)])
            + f"\n{caption}.\n\n" + study_verdict(study, what_varies))


def said_search(entries):
    """Say how the learning rates were chosen, if they were searched."""
    tried = [entry["tried"] for entry in entries.values() if entry["tried"]]
    n = " or ".join(map(str, sorted(set(map(len, tried)))))
    return f"each learning rate is the best of {n} by validation; " if tried else ""


def caption(study):
    """Say what the table of a comparison.json shows."""
    entries = study["entries"]
    n = entries["full"]["n"]
    spread, drawn = ("seeds, for the time over all epochs", "seeds and test sentences") if n > 1 \
        else ("epochs", "test sentences")
    return (f"{study_of(entries)}; {said_search(entries)}± is the standard deviation over the "
            f"{spread}; [ ] is a 95 % "
            f"interval, by a paired bootstrap over {drawn}; made by `{study['command']}`")


def table(entries):
    """Make (header, rows) of the comparison, as strings."""
    key, what = memory_key(entries)
    header = ["method", "lr", "trainable", "of which method / LayerNorm / head", "% of all", "n",
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
    return page(study, *table(study["entries"]), caption(study), "seed")


def fold_caption(study):
    """Say what the table of a crossvalidation.json shows."""
    entries = study["entries"]
    full = entries["full"]
    return (f"{study_of(entries)}; every one of the {full['test_rows']:,} sentences is tested once "
            "a seed, and macro-F1, NLL (negative log-likelihood, nats) and ECE (expected "
            "calibration error, 15 bins) are of all of them together; "
            f"{said_search(entries)}± is the standard deviation "
            "over the folds, for the time over all epochs; [ ] is a 95 % interval, by a paired "
            "bootstrap over folds and sentences, and, for trainings on new rows, Nadeau and "
            f"Bengio's, around the mean of the folds; made by `{study['command']}`")


def fold_table(entries):
    """Make (header, rows) of a cross-validation, as strings."""
    key, what = memory_key(entries)
    header = ["method", "lr", "trainable", "% of all", "n", "macro-F1", "vs full (points)",
              "for new rows", "NLL", "ECE (%)", "s per epoch", what, "trained file (MB)"]
    rows = []
    for entry in entries.values():
        new, mb = entry["vs_full_new_rows"], entry["checkpoint_mb"]
        rows.append([
            entry_label(entry), short(entry["runs"][0]["settings"]["lr"]),
            f"{entry['trainable_params']:,}", f"{entry['trainable_pct']:.2g}"
            if entry["trainable_pct"] < 1 else f"{entry['trainable_pct']:.1f}", f"{entry['n']}",
            plus_minus(entry, "f1_macro", 4), points(entry["vs_full"]),
            f"[{new['low']:+.1f}, {new['high']:+.1f}]" if new else "",
            plus_minus(entry, "nll", 3), plus_minus(entry, "ece", 1, 100),
            plus_minus(entry, "epoch_time_s", 1), plus_minus(entry, key, 2),
            "–" if mb is None else f"{mb:.2f}" if mb >= 0.01 else f"{mb:.2g}"])
    return header, rows


def fold_markdown(study):
    """Make table, caption and verdict of a crossvalidation.json, as Markdown."""
    return page(study, *fold_table(study["entries"]), fold_caption(study), "fold")


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
        ax.set(title=title, xlabel="epoch", xticks=epochs)

    axes[0].legend(fontsize=9)
    band = ("; mean over the seeds, band from the lowest to the highest"
            if entries["full"]["n"] > 1 else "")
    fig.suptitle(study_of(entries) + band, fontsize=9)
    save_figure(fig, path)


def bars(entries, values, errors, digits, xlabel, path):
    """Draw one horizontal bar per method: values and errors (None: no error bar) in the unit that
    xlabel names."""
    fig, ax = plt.subplots(figsize=(8, 3.2))
    names, errors = list(entries), [error or 0 for error in errors]
    ax.barh(range(len(names)), values, xerr=errors if any(errors) else None,
            color=[CASES[n].color for n in names], ecolor="#888888", capsize=4, height=0.65)
    for y, (value, error) in enumerate(zip(values, errors)):
        ax.annotate(f"{value:.{digits}f}", (value + error, y), xytext=(6, 0),
                    textcoords="offset points", va="center")
    name_rows(ax, [entry_label(entries[n]) for n in names])
    ax.margins(x=0.12)
    ax.set_xlabel(xlabel)
    fig.suptitle(study_of(entries), fontsize=8)
    save_figure(fig, path)


def loss_against_full(entries, names, what, path):
    """Draw the macro-F1 of some methods minus that of full fine-tuning: the mean, its 95 %
    interval, and the difference of every run, which is of one `what` (a seed, a fold)."""
    fig, ax = plt.subplots(figsize=(8, 0.5 * len(names) + 1))
    full = [run["f1_macro"] for run in entries["full"]["runs"]]

    ax.axvline(0, color=CASES["full"].color, linewidth=1)
    for y, name in enumerate(names):
        _, color, marker = CASES[name]
        vs = entries[name]["vs_full"]
        ax.plot([vs["low"], vs["high"]], [y, y], color=color, linewidth=2)
        ax.plot(vs["points"], y, marker, color=color, markersize=9)
        for run, baseline in zip(entries[name]["runs"], full):
            ax.plot(100 * (run["f1_macro"] - baseline), y + 0.25, "|", color=color, markersize=8)

    name_rows(ax, [entry_label(entries[name]) for name in names])
    ax.margins(y=0.15)
    ax.set_xlabel(f"test macro-F1 against full fine-tuning (points), 95 % interval; |: one {what}")
    fig.suptitle(study_of(entries), fontsize=8)
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
    loss_against_full(entries, [name for name in entries if name != "full"], "seed",
                      figures / "loss_against_full.png")
    for key, xlabel, digits, file in (
            (*memory_key(entries), 2, "memory.png"),
            ("epoch_time_s", "training time per epoch (s)", 1, "epoch_time.png")):
        means, stds = zip(*((entry[key], entry[f"{key}_std"]) for entry in entries.values()))
        over = "epochs" if "time" in key else "seeds"
        spread = f", ± standard deviation over the {over}" if any(stds) else ""
        bars(entries, means, stds, digits, xlabel + spread, figures / file)

    write_table(figures / "summary.md", markdown(study))


def frontier(costs, scores):
    """Return the Pareto frontier: [(cost, score)] of the points that no other beats in both, from
    cheap to dear."""
    best = []
    for cost, score in sorted(zip(costs, scores), key=lambda point: (point[0], -point[1])):
        if not best or score > best[-1][1]:
            best.append((cost, score))
    return best


def pareto(entries, path):
    """Draw macro-F1 against three costs. The axis of macro-F1 is cut between the floor, which
    trains the head alone, and the rest."""
    memory, memory_label = memory_key(entries)
    costs = {"trainable_params": "trained parameters", memory: memory_label,
             "epoch_time_s": "training time per epoch (s)"}
    full, floor = entries["full"]["f1_macro"], entries["head"]["f1_macro"]
    ends = {name: [full + entry["vs_full"][end] / 100 for end in ("low", "high")]
            if entry["vs_full"] else [full, full] for name, entry in entries.items()}
    above = [y for name, pair in ends.items() if name != "head" for y in pair]
    fig, axes = plt.subplots(2, 3, figsize=(13, 5.6), sharex="col", sharey="row",
                             height_ratios=[4, 1])

    for (cost, label), top, bottom in zip(costs.items(), *axes):
        for ax in top, bottom:
            ax.axhline(full, color=CASES["full"].color, linewidth=1, linestyle="--")
            ax.axhline(floor, color=CASES["head"].color, linewidth=1, linestyle="--")
            x, y = zip(*frontier([e[cost] for e in entries.values()],
                                 [e["f1_macro"] for e in entries.values()]))
            dearest = max(e[cost] for e in entries.values())
            ax.step([x[0], *x, dearest], [0, *y, y[-1]], where="post", color="#BBBBBB",
                    linewidth=3, zorder=1)
            for name, entry in entries.items():
                _, color, marker = CASES[name]
                ax.plot([entry[cost]] * 2, ends[name], color=color, linewidth=1.5)
                ax.plot(entry[cost], entry["f1_macro"], marker, color=color, markersize=9,
                        label=entry_label(entry))
            ax.set(xscale="log" if cost == "trainable_params" else "linear")
        top.spines["bottom"].set_visible(False)
        top.tick_params(axis="x", which="both", length=0)
        bottom.set_xlabel(label)

    room = max(0.1 * (max(above) - min(above)), 0.002)
    axes[0, 0].set(ylim=(min(above) - room, max(above) + room), ylabel="macro-F1")
    low, high = ends["head"]
    axes[1, 0].set(ylim=(min(low, floor - 0.02) - 0.005, max(high, floor + 0.02) + 0.005),
                   yticks=[round(floor, 3)])
    handles, labels = axes[0, 0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside lower center", ncols=len(entries), fontsize=9,
               columnspacing=1.2, handletextpad=0.3)
    fig.suptitle(f"{study_of(entries)}\nbars: 95 % interval of the difference to full fine-tuning; "
                 "grey: what nothing beats in both; dashed: full fine-tuning, and the head alone",
                 fontsize=9)
    save_figure(fig, path)


def draw_folds(output):
    """Draw what output/metrics/crossvalidation.json holds into output/figures/, and print the
    table."""
    figures = output / "figures"
    study = read_study(output / "metrics" / "crossvalidation.json")
    entries = study["entries"]
    pareto(entries, figures / "pareto.png")
    # the interval of "head", the floor, lies far to the left of all others
    names = [name for name in entries if name not in ("full", "head")]
    loss_against_full(entries, names, "fold", figures / "crossvalidation.png")
    write_table(figures / "crossvalidation.md", fold_markdown(study))


def draw_layers(path):
    """Draw where the methods sit: grey boxes are frozen, coloured ones train. Boxes are (name, x,
    y, text, colour)."""
    lora_color, adapter_color = CASES["lora_r8"].color, CASES["adapter"].color
    low_rank = [("x", 0, 2, "x", "white"), ("A", 2.6, 1, "A\n(r, in)", lora_color),
                ("B", 4, 1, "s B\n(out, r)", lora_color), ("+", 5, 2, "+", "white")]

    pictures = [
        ("LoRA: query and value\nh = W0 x + b + s B A dropout(x)",
         [*low_rank, ("W0", 2, 3, "W0 x + b", FROZEN), ("drop", 1.2, 1, "dropout", "white"),
          ("h", 6, 2, "h", "white")],
         [("x", "W0"), ("x", "drop"), ("drop", "A"), ("A", "B"), ("W0", "+"), ("B", "+"),
          ("+", "h")]),
        ("DoRA, without dropout: query and value\nh = m (W0 + s B A) x / ||W0 + s B A|| + b",
         [*low_rank, ("W0", 2, 3, "W0 x", FROZEN), ("m", 6.1, 2, "m / ||.||", CASES["dora"].color),
          ("b", 7.3, 2, "+ b", FROZEN), ("h", 8.1, 2, "h", "white")],
         [("x", "W0"), ("x", "A"), ("A", "B"), ("W0", "+"), ("B", "+"), ("+", "m"), ("m", "b"),
          ("b", "h")]),
        ("Houlsby adapter: after attention and FFN\n"
         "y = LN(h + Adapter(h) + a),  h = dropout(dense(.))",
         [("h", 0, 2, "h", "white"), ("down", 1.3, 1, "W_down\n+ b_down", adapter_color),
          ("gelu", 2.8, 1, "GELU", "white"), ("up", 4.1, 1, "W_up\n+ b_up", adapter_color),
          ("a", 4.1, 3, "a: what came in", "white"), ("+", 5.1, 2, "+", "white"),
          ("LN", 6, 2, "LN", adapter_color), ("y", 6.9, 2, "y", "white")],
         [("h", "+"), ("h", "down"), ("down", "gelu"), ("gelu", "up"), ("up", "+"), ("a", "+"),
          ("+", "LN"), ("LN", "y")]),
    ]

    fig, axes = plt.subplots(1, 3, figsize=(14, 3))
    for ax, (title, boxes, arrows) in zip(axes, pictures):
        drawn = {name: ax.text(x, y, text, ha="center", va="center", fontsize=10, zorder=3,
                               bbox={"boxstyle": "round,pad=0.35", "facecolor": color,
                                     "edgecolor": "#555555"})
                 for name, x, y, text, color in boxes}
        at = {name: (x, y) for name, x, y, *_ in boxes}
        for tail, head in arrows:
            ax.annotate("", at[head], at[tail], arrowprops={
                "arrowstyle": "->", "color": "#555555", "patchA": drawn[tail].get_bbox_patch(),
                "patchB": drawn[head].get_bbox_patch()})
        ax.set(title=title, xlim=(-0.5, 8.5), ylim=(0.3, 3.6))
        ax.title.set_fontsize(10)
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
