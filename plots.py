"""Tables and figures of the sentence study, made from comparison.json and crossvalidation.json in
metrics/ and nothing else; and what the figures of tools/ share with them.

    python plots.py [FOLDER]      reads FOLDER/metrics/, writes FOLDER/figures/
                                  (default: beside this file)
"""
import sys; sys.path.insert(0, __file__.rpartition("/")[0])  # isort: skip (for PYTHONSAFEPATH=1)
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
from matplotlib.font_manager import findfont, fontManager, get_font
from matplotlib.text import Text

from common import fail, read_json, start, write_text
from methods import CASES, label_of
from settings import Parser, has_searched_rates, is_synthetic, read_settings, short
from verdict import CLOSE, LARGEST, Line, is_close, points, verdict

plt.rcParams.update({"font.size": 11, "axes.grid": True, "grid.alpha": 0.3,
                     "axes.spines.top": False, "axes.spines.right": False,
                     "axes.axisbelow": True, "figure.constrained_layout.use": True})
FROZEN = "#DDDDDD"
# columns of the tables
KINDS, NEW_ROWS = "of which method / LayerNorm / head", "for new rows"
UNDER = f"less than {CLOSE} points lost?"
ANSWER = ("method", "% trained", "macro-F1", "vs full (points)", "s per epoch", "trained file (MB)")
SUMMARY = ("method", "lr", "trainable", KINDS, "% trained", "n", "macro-F1", "vs full (points)",
           UNDER, "accuracy", "best epochs", "s per epoch", "memory", "trained file (MB)")
FOLDS = ("method", "lr", "trainable", "% trained", "n", "macro-F1", "vs full (points)", UNDER,
         NEW_ROWS, "s per epoch", "memory", "trained file (MB)")
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


def plus_minus(entry, key, digits):
    """Write a mean of an entry, if there is one, with its standard deviation, if there is one."""
    mean, std = entry[key], entry[f"{key}_std"]
    return "–" if mean is None else f"{mean:.{digits}f}" + (
        "" if std is None else f" ± {std:.{digits}f}")


def floor_row(header, name, cells):
    """Make the row of a table for answers that need no training. cells: {column: text}."""
    return [name, *(cells.get(column, "") for column in header[1:])]


def study(runs):
    """Say in one line what was compared on what, from a list of results."""
    run = runs[0]
    s, rows = read_settings(run), run["rows"]
    what = "questions" if s.is_qa else "sentences"
    task = "SYNTHETIC questions" if is_synthetic(s) else s.task
    devices, amps = (sorted({r["environment"][key] for r in runs}) for key in ("device", "amp"))
    where = " and ".join(devices) + " (times and memory do not compare)" * (len(devices) > 1)
    seeds = sorted({r["settings"]["seed"] for r in runs})
    numbers, n = ", ".join(map(str, seeds)), len(seeds)
    size = f"{rows['train']:,} training, {rows['test']:,} test {what}"
    if s.fold:
        n_folds = int(s.fold.split("/")[1])
        about = "" if all(r["rows"] == rows for r in runs) else "about "
        numbers = f"{seeds[0]} to {seeds[-1]}" if n > 1 else numbers
        size, n = f"{n_folds} folds, each {about}{size}", f"{max(n, n_folds)} trainings"
    return (f"{s.model} on {task} ({size}), seed{'s' if len(seeds) > 1 else ''} {numbers} (n = "
            f"{n}), {where}, amp {' and '.join(amps)}")


# --- tables of the sentence study ----------------------------------------------------------------

def entry_label(entry):
    """Return what the method of an entry of comparison.json is called, † if it is not ranked."""
    return label_of(read_settings(entry["runs"][0])) + (" †" if entry["marks"] else "")


def study_of(entries):
    """Say in one line what the entries of comparison.json compare."""
    return study([run for entry in entries.values() for run in entry["runs"]])


def tested_rows(entry):
    """Return verdict.even_rows of the tested sentences; earlier versions' are of even classes."""
    return entry.get("even_rows") or entry.get("test_rows") or entry["runs"][0]["rows"]["test"]


def memory_key(entries):
    """Choose the GPU's peak where there was a GPU, else that of the whole process: (key, label)."""
    if all(entry["peak_vram_gb"] is not None for entry in entries.values()):
        return "peak_vram_gb", "peak GPU memory (GB)"
    return "peak_rss_gb", "peak resident memory (GB)"


def peaks_of(study):
    """Return ({method: GB}, "" or the model that they are of): of the project's own study on a CPU
    the peaks that tools.memory predicted for bert-base, else the measured ones."""
    entries, predicted = study["entries"], study.get("memory")
    first = entries["full"]["runs"][0] if "full" in entries else None
    is_own = first and has_searched_rates(read_settings(first)) and first["peak_vram_gb"] is None
    if is_own and predicted and entries.keys() <= predicted["methods"].keys():
        model = Path(predicted["model"]).name.removesuffix("-uncased")
        return {name: predicted["methods"][name]["peak"] / 1e9 for name in entries}, model
    key, _ = memory_key(entries)
    return {name: entry[key] for name, entry in entries.items()}, ""


def lines_of(study):
    """Return what the verdict reads of each method of a study, a list of Lines."""
    peaks, _ = peaks_of(study)
    return [Line(name, label_of(read_settings(e["runs"][0])), 100 * e["f1_macro"], e["vs_full"],
                 e["epoch_time_s"], peaks[name], e["checkpoint_mb"], e["marks"])
            for name, e in study["entries"].items()]


def study_verdict(study):
    """Write the verdict on a comparison.json or crossvalidation.json, as Markdown."""
    full, (_, model) = study["entries"]["full"], peaks_of(study)
    measured = memory_key(study["entries"])[1].removesuffix(" (GB)")
    splits, advice = full["runs"][0]["splits"], ""
    if full["n"] == 2 and "folds" not in full:
        advice = "Three trainings or more (--seeds 42 43 44) tell far more than two."
    elif "folds" not in full and "whole sentences" not in splits and (
            "of train are the test" in splits or "stratified" in splits):
        advice = "With `--folds 5` every row is tested, which tells more."
    return verdict(lines_of(study), "macro-F1", tested_rows(full), full["n"],
                   "fold" if "folds" in full else "seed",
                   f"memory on {model} (predicted)" if model else measured, advice)


def caption(study, columns):
    """Say what a table with these columns shows of a study."""
    entries = study["entries"]
    n, n_folds = (entries["full"].get(key) for key in ("n", "folds"))
    what = "trainings" if n_folds else "seeds" if n > 1 else "epochs"
    times = (f", for the time over {study['timed']}" if "timed" in study else
             ", for the time over all epochs" if n > 1 else "")
    how_often = "once" if n == n_folds else f"{n // (n_folds or 1)} times"
    over = f"{what} and test sentences" if n > 1 or n_folds else "test sentences alone"
    tried = sorted({len(entry["tried"]) for entry in entries.values() if entry["tried"]})
    said = [study_of(entries)]
    if n_folds and "n" in columns:
        said.append(f"every one of the {entries['full']['test_rows']:,} sentences is tested "
                    f"{how_often}, and macro-F1 is of all of them together")
    if "lr" in columns and tried:
        said.append(f"each learning rate is the best of {' or '.join(map(str, tried))} by "
                    "validation")
    said += [f"± is the standard deviation over the {what}{times}",
             f"[ ] is the 95 % interval of the difference, over {over}, widened because "
             f"{len(entries) - 1} methods are compared at once"]
    if NEW_ROWS in columns:
        said.append(f"{NEW_ROWS}: Nadeau and Bengio's interval around the mean of the folds, for "
                    "one comparison")
    if "n" in columns:
        said.append(f"made by `{study['command']}`")
    return "; ".join(said)


def table(entries, columns):
    """Make (header, rows) of a study, as strings."""
    key, memory = memory_key(entries)
    rows = []
    for name, entry in entries.items():
        kinds, mb, pct = (entry[key] for key in
                          ("trainable_by_kind", "checkpoint_mb", "trainable_pct"))
        parts = "/".join(f" {kinds.get(kind, 0):,} " for kind in ("method", "layer_norm", "head"))
        cells = {
            "method": entry_label(entry), "lr": short(entry["runs"][0]["settings"]["lr"]),
            "trainable": f"{entry['trainable_params']:,}",
            KINDS: "everything" if name == "full" else parts.strip(),
            "% trained": f"{pct:.2g}" if pct < 1 else f"{pct:.1f}", "n": f"{entry['n']}",
            "macro-F1": plus_minus(entry, "f1_macro", 4),
            "vs full (points)": points(entry["vs_full"]),
            UNDER: is_close(entry["vs_full"], tested_rows(entry)),
            NEW_ROWS: points(entry.get("vs_full_new_rows")),
            "accuracy": plus_minus(entry, "accuracy", 4),
            "best epochs": ", ".join(map(str, entry["best_epoch"])),
            "s per epoch": plus_minus(entry, "epoch_time_s", 1),
            "memory": plus_minus(entry, key, 2),
            "trained file (MB)": "–" if mb is None else f"{mb:.2f}" if mb >= 0.01 else f"{mb:.2g}"}
        rows.append([cells[column] for column in columns])
    return [memory if column == "memory" else column for column in columns], rows


def markdown(study, columns):
    """Make the table of a study with these columns and its caption, as Markdown."""
    header, rows = table(study["entries"], columns)
    f1, accuracy = (f"{study['floor'][key]:.4f}" for key in ("f1_macro", "accuracy"))
    floor = floor_row(header, LARGEST, {"trainable": "0", "macro-F1": f1, "accuracy": accuracy})
    return f"{markdown_table(header, [*rows, floor])}\n{caption(study, columns)}.\n"


def calibration_markdown(study):
    """Make the table of the probabilities of a crossvalidation.json, as Markdown."""
    kinds = {"nll": ("NLL", 1, 3), "ece": ("ECE (%)", 100, 1),
             "nll_scaled": ("NLL, scaled", 1, 3), "ece_scaled": ("ECE (%), scaled", 100, 1)}
    kinds = {key: kind for key, kind in kinds.items()
             if all(key in entry.get("calibration", {}) for entry in study["entries"].values())}
    header, rows = ["method"], []
    for what, _, _ in kinds.values():
        header += [what, "vs full"]
    for entry in study["entries"].values():
        cells = [entry_label(entry)]
        for key, (_, scale, digits) in kinds.items():
            own = entry["calibration"][key]
            cells.append(f"{scale * own['mean']:.{digits}f} ± {scale * own['std']:.{digits}f}")
            vs = own["vs_full"] and {end: scale * x for end, x in own["vs_full"].items()}
            cells.append(points(vs, digits))
        rows.append(cells)
    scaled = ("scaled: at the temperature with the best NLL on the validation rows; "
              if "nll_scaled" in kinds else "")
    return (f"{markdown_table(header, rows)}\nNLL in nats, ECE with 15 bins: means over the "
            f"{study['entries']['full']['n']} trainings ± their standard deviation; [ ] is the "
            f"95 % t interval of one difference over the folds; {scaled}made by "
            f"`{study['command']}`.\n")


def answer_markdown(study, columns=ANSWER):
    """Make a table of a study and its verdict, as Markdown."""
    return f"{markdown(study, columns)}\n{study_verdict(study)}"


# --- figures of the sentence study ---------------------------------------------------------------

def read_study(path):
    """Read a comparison.json or crossvalidation.json, and what tools.memory has left beside it.
    Times and memory that were measured on several devices are left out."""
    beside, study = path.with_name("memory.json"), read_json(path, "entries", "floor")
    entries = study["entries"].values()
    places = [run["environment"] for entry in entries for run in entry["runs"]]
    if any(len({p.get(key) for p in places} - {None}) > 1 for key in ("device", "cpu")):
        for entry in entries:
            entry |= dict.fromkeys(("peak_rss_gb", "peak_vram_gb"))
            entry["epoch_time_s"] = entry["epoch_time_s"] if "timed" in study else None
    return study | {"memory": read_json(beside, "methods", "model") if beside.exists() else None}


def draw_study(output, name):
    """Draw everything that output/metrics/NAME.json holds into output/figures/, and print its
    tables. name: comparison or crossvalidation."""
    figures, study = output / "figures", read_study(output / "metrics" / f"{name}.json")
    if name == "comparison":
        glance(study, "seed", figures / "summary.png")
        write_table(figures / "summary.md", answer_markdown(study, SUMMARY))
        return
    glance(study, "training", figures / "glance.png")
    write_table(figures / "crossvalidation.md", markdown(study, FOLDS))
    write_table(figures / "calibration.md", calibration_markdown(study))
    write_table(figures / "answer.md", answer_markdown(study, ANSWER))


def glance(study, what, path):
    """Draw what each method loses and what it gains, full fine-tuning on top, then the least loss
    first. A loss of more than FAR points is an arrow. what: of which each method has a run, a seed
    or a training."""
    entries, (peaks, model) = study["entries"], peaks_of(study)
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
            bar = ax.barh(y, value or 0, color=color, height=0.6)
            ax.bar_label(bar, fmt="–" if value is None else form, padding=4)
        mb = entry["checkpoint_mb"]
        disk.text(0, y, "–" if mb is None else f"{mb:.1f} MB" if mb >= 0.1 else
                  f"{1000 * mb:.0f} kB", va="center")

    name_rows(lost, [entry_label(entries[name]) for name in names])
    lost.set(title="LOST: points of macro-F1", xlim=(left - 0.5, right + 0.2 * (right - left) + 1),
             xlabel=f"bar: 95 % interval; if it contains 0, no loss is shown; |: one {what}")
    memory_title = f"memory, {model}" if model else "peak memory"
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
    parser = Parser(description="Draw the sentence study again.")
    parser.add_argument("folder", nargs="?", type=Path, default=Path(__file__).parent,
                        help="with metrics/ and figures/ (default: beside this file)")
    folder = parser.parse_args().folder
    found = [name for name in ("comparison", "crossvalidation")
             if (folder / "metrics" / f"{name}.json").exists()]
    if not found:
        fail(f"{folder / 'metrics'} holds neither comparison.json nor crossvalidation.json; python "
             "-m tools.NAME --redraw draws those of grid, sweep, memory, multitask, bench")
    for name in found:
        draw_study(folder, name)
    draw_layers(folder / "figures" / "layers.png")
