"""Figures and tables from comparison.json, crossvalidation.json, grid.json, memory.json,
multitask.json and sweep_*.json in metrics/, nothing else.

    python plots.py [FOLDER]      reads FOLDER/metrics/, writes FOLDER/figures/
                                  (default: beside this file)
"""
import sys
import textwrap
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np

from files import read_json
from methods import CASES, label_of
from settings import case_label, short
from start import fail, start
from studies import (
    GRID_METHODS,
    PARTS,
    bytes_of,
    entry_label,
    fold_markdown,
    grid_markdown,
    is_synthetic,
    ledger_caption,
    markdown,
    memory_key,
    multitask_caption,
    multitask_markdown,
    rows_of,
    study,
    study_of,
    sweep_caption,
    sweep_markdown,
)
from synthetic import CHANCE

# What a method is called in a study's JSON, for its colour and marker
STYLE = CASES | {"full_ft": CASES["full"], "lora": CASES["lora_r16"]}
plt.rcParams.update({"font.size": 11, "axes.grid": True, "grid.alpha": 0.3,
                     "axes.spines.top": False, "axes.spines.right": False,
                     "axes.axisbelow": True, "figure.constrained_layout.use": True})


def name_rows(ax, names):
    """Label the rows of a horizontal chart, the first on top."""
    ax.set_yticks(range(len(names)), names)
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)


def save(fig, path):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=120)
    plt.close(fig)


def curves(entries, path):
    keys = "train_loss", "validation_loss", "validation_f1_macro"
    titles = "training loss (nats)", "validation loss (nats)", "validation macro-F1"
    fig, axes = plt.subplots(1, 3, figsize=(12, 4))
    for ax, key, title in zip(axes, keys, titles):
        for name, entry in entries.items():
            _, color, marker = STYLE[name]
            # (seeds, epochs)
            values = np.array([[h[key] for h in run["history"]] for run in entry["runs"]])
            epochs, mean = np.arange(1, values.shape[1] + 1), values.mean(0)
            ax.plot(epochs, mean, color=color, marker=marker, label=entry_label(entry))
            ax.fill_between(epochs, values.min(0), values.max(0), color=color, alpha=0.12,
                            linewidth=0)
        ax.set(title=title, xlabel="epoch", xticks=epochs)

    axes[0].legend(fontsize=9)
    band = ("; mean over the seeds, band from the lowest to the highest"
            if entries["full_ft"]["n"] > 1 else "")
    fig.suptitle(study_of(entries) + band, fontsize=9)
    save(fig, path)


def bars(entries, values, errors, digits, xlabel, path):
    """One horizontal bar a method: values and errors (None: no error bar) in the unit that xlabel
    names."""
    fig, ax = plt.subplots(figsize=(8, 3.2))
    names, errors = list(entries), [error or 0 for error in errors]
    ax.barh(range(len(names)), values, xerr=errors if any(errors) else None,
            color=[STYLE[n].color for n in names], ecolor="#888888", capsize=4, height=0.65)
    for y, (value, error) in enumerate(zip(values, errors)):
        ax.annotate(f"{value:.{digits}f}", (value + error, y), xytext=(6, 0),
                    textcoords="offset points", va="center")
    name_rows(ax, [entry_label(entries[n]) for n in names])
    ax.margins(x=0.12)
    ax.set_xlabel(xlabel)
    fig.suptitle(study_of(entries), fontsize=8)
    save(fig, path)


def loss_against_full(entries, names, what, path):
    """Macro-F1 of some methods minus that of full fine-tuning: the mean, its 95 % interval, and the
    difference of every run, which is of one `what`."""
    fig, ax = plt.subplots(figsize=(8, 0.5 * len(names) + 1))
    full = [run["f1_macro"] for run in entries["full_ft"]["runs"]]

    ax.axvline(0, color=STYLE["full_ft"].color, linewidth=1)
    for y, name in enumerate(names):
        _, color, marker = STYLE[name]
        vs = entries[name]["vs_full"]
        ax.plot([vs["low"], vs["high"]], [y, y], color=color, linewidth=2)
        ax.plot(vs["points"], y, marker, color=color, markersize=9)
        for run, baseline in zip(entries[name]["runs"], full):
            ax.plot(100 * (run["f1_macro"] - baseline), y + 0.25, "|", color=color, markersize=8)

    name_rows(ax, [entry_label(entries[name]) for name in names])
    ax.margins(y=0.15)
    ax.set_xlabel(f"test macro-F1 against full fine-tuning (points), 95 % interval; |: one {what}")
    fig.suptitle(study_of(entries), fontsize=8)
    save(fig, path)


def draw(output):
    """Draw everything that output/metrics/comparison.json holds into output/figures/, and print the
    table."""
    figures = output / "figures"
    entries = read_json(output / "metrics" / "comparison.json")
    if any("checkpoint_mb" not in entry for entry in entries.values()):
        fail(f"{output / 'metrics' / 'comparison.json'} is of an earlier version; bash run_all.sh "
             "makes it anew")

    curves(entries, figures / "curves.png")
    loss_against_full(entries, [name for name in entries if name != "full_ft"], "seed",
                      figures / "loss_against_full.png")
    for key, xlabel, digits, file in (
            (*memory_key(entries), 2, "memory.png"),
            ("epoch_time_s", "training time per epoch (s)", 1, "epoch_time.png")):
        means, stds = zip(*((entry[key], entry[f"{key}_std"]) for entry in entries.values()))
        over = "epochs" if "time" in key else "seeds"
        spread = f", ± standard deviation over the {over}" if any(stds) else ""
        bars(entries, means, stds, digits, xlabel + spread, figures / file)

    text = markdown(entries)
    (figures / "summary.md").write_text(text, encoding="utf-8")
    print(text + f"figures are in {figures}")


def frontier(costs, scores):
    """[(cost, score)] of the points that no other beats in both: the Pareto frontier, from cheap to
    dear."""
    best = []
    for cost, score in sorted(zip(costs, scores), key=lambda point: (point[0], -point[1])):
        if not best or score > best[-1][1]:
            best.append((cost, score))
    return best


def pareto(entries, path):
    """Macro-F1 against three costs. The axis of macro-F1 is cut between the floor, which trains the
    head alone, and the rest."""
    memory, memory_label = memory_key(entries)
    costs = {"trainable_params": "trained parameters", memory: memory_label,
             "epoch_time_s": "training time per epoch (s)"}
    full, floor = entries["full_ft"]["f1_macro"], entries["head"]["f1_macro"]
    ends = {name: [full + entry["vs_full"][end] / 100 for end in ("low", "high")]
            if entry["vs_full"] else [full, full] for name, entry in entries.items()}
    above = [y for name, pair in ends.items() if name != "head" for y in pair]
    fig, axes = plt.subplots(2, 3, figsize=(13, 5.6), sharex="col", sharey="row",
                             height_ratios=[4, 1])

    for (cost, label), top, bottom in zip(costs.items(), *axes):
        for ax in top, bottom:
            ax.axhline(full, color=STYLE["full_ft"].color, linewidth=1, linestyle="--")
            ax.axhline(floor, color=STYLE["head"].color, linewidth=1, linestyle="--")
            x, y = zip(*frontier([e[cost] for e in entries.values()],
                                 [e["f1_macro"] for e in entries.values()]))
            dearest = max(e[cost] for e in entries.values())
            ax.step([x[0], *x, dearest], [0, *y, y[-1]], where="post", color="#BBBBBB",
                    linewidth=3, zorder=1)
            for name, entry in entries.items():
                _, color, marker = STYLE[name]
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
    save(fig, path)


def draw_folds(output):
    """Draw what output/metrics/crossvalidation.json holds into output/figures/, and print the
    table."""
    figures = output / "figures"
    entries = read_json(output / "metrics" / "crossvalidation.json")
    pareto(entries, figures / "pareto.png")
    # of the floor the interval is far to the left of all others
    names = [name for name in entries if name not in ("full_ft", "head")]
    loss_against_full(entries, names, "fold", figures / "crossvalidation.png")
    text = fold_markdown(entries)
    (figures / "crossvalidation.md").write_text(text, encoding="utf-8")
    print(text + f"figures are in {figures}")


def scored(runs):
    """What the scores of a grid are of: test questions, or what Trainer evaluated on."""
    return "evaluation" if any("trainer" in run for run in runs.values()) else "test"


def grid_bars(runs, path):
    rows = rows_of(runs)
    fig, ax = plt.subplots(figsize=(9, 0.32 * len(rows) + 1.2))
    ax.barh(range(len(rows)), [row["f1"] for row in rows],
            color=[STYLE[row["method"]].color for row in rows], height=0.7)
    if is_synthetic(next(iter(runs.values()))["settings"]):
        ax.axvline(CHANCE, color="#AA3377", linestyle="--", label="one of four at random")
        ax.legend(fontsize=9, loc="lower right")
    for y, row in enumerate(rows):
        ax.annotate(f"{row['f1']:.1f}", (row["f1"], y), xytext=(4, 0),
                    textcoords="offset points", va="center")
    name_rows(ax, [row["run"] for row in rows])
    ax.margins(x=0.08, y=0.02)
    ax.set_xlabel(f"{scored(runs)} F1 (%)")
    fig.suptitle(study(list(runs.values())), fontsize=9)
    save(fig, path)


def grid_boxes(runs, path):
    """F1 and exact match by method: a box from quartile to quartile, its median, and every run as a
    marker."""
    rows = rows_of(runs)
    methods = [m for m in GRID_METHODS if any(row["method"] == m for row in rows)]
    fig, axes = plt.subplots(1, 2, figsize=(10, 4))
    for ax, key, title in zip(axes, ("f1", "exact_match"), ("F1 (%)", "exact match (%)")):
        values = [[row[key] for row in rows if row["method"] == m] for m in methods]
        ax.boxplot(values, widths=0.6, showfliers=False, medianprops={"color": "#555555"})
        for x, (method, own) in enumerate(zip(methods, values), 1):
            ax.plot([x] * len(own), own, STYLE[method].marker, color=STYLE[method].color, alpha=0.8)
        ax.set_xticks(range(1, len(methods) + 1), methods)
        ax.set(title=f"{scored(runs)} {title}")
    fig.suptitle(study(list(runs.values()))
                 + "\none marker a run (epochs and learning rates differ)", fontsize=9)
    save(fig, path)


def grid_time(runs, path):
    rows = rows_of(runs)
    fig, ax = plt.subplots(figsize=(8, 4.5))
    for method in GRID_METHODS:
        of_method = [row for row in rows if row["method"] == method]
        rates = sorted({row["lr"] for row in of_method})
        for lr in rates:
            own = [row for row in of_method if row["lr"] == lr and row["minutes"] is not None]
            if not own:
                continue
            _, color, marker = STYLE[method]
            s = runs[own[0]["run"]]["settings"]
            name = method if "trainer" in runs[own[0]["run"]] else label_of(s)
            ax.plot([row["minutes"] for row in own], [row["f1"] for row in own], marker,
                    color=color, markersize=8, fillstyle="full" if lr == rates[-1] else "none",
                    label=f"{name}, {short(lr)}")
    kind = scored(runs)
    ax.set(xlabel=f"training time (min, evaluation {'ex' if kind == 'test' else 'in'}cluded)",
           ylabel=f"{kind} F1 (%)", xlim=(0, None))
    ax.legend(fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5), title="method, learning rate")
    fig.suptitle(textwrap.fill(study(list(runs.values())), 110), fontsize=9)
    save(fig, path)


def draw_grid(output):
    """Draw everything that output/metrics/grid.json holds into output/figures/, and print the
    tables."""
    figures = output / "figures"
    runs = read_json(output / "metrics" / "grid.json")
    grid_bars(runs, figures / "grid_f1.png")
    grid_boxes(runs, figures / "grid_boxes.png")
    (figures / "grid_time.png").unlink(missing_ok=True)
    if any(run["train_time_s"] for run in runs.values()):  # Trainer's may not say
        grid_time(runs, figures / "grid_time.png")
    text = grid_markdown(runs)
    (figures / "grid.md").write_text(text, encoding="utf-8")
    print(text + f"\nfigures are in {figures}")


def draw_sweep(output, name):
    """Draw output/metrics/NAME.json into output/figures/: scores, and differences to full
    fine-tuning with their intervals, against the number of training rows; and print the table."""
    sweep = read_json(output / "metrics" / f"{name}.json")
    entries, style = sweep["entries"].values(), {case_label(key): STYLE[key] for key in CASES}
    fig, (scores, differences) = plt.subplots(1, 2, figsize=(12, 4.5))
    labels = list(dict.fromkeys(e["label"] for e in entries))

    for i, label in enumerate(labels):
        own = sorted((e for e in entries if e["label"] == label), key=lambda e: e["rows"]["train"])
        _, color, marker = style.get(label, ("", "#777777", "*"))
        # beside one another, not on one another
        x = np.array([e["rows"]["train"] for e in own]) * 1.04 ** (i - (len(labels) - 1) / 2)
        look = {"color": color, "marker": marker, "capsize": 3, "linewidth": 1.2, "label": label}
        scores.errorbar(x, [e["test"] for e in own], [e["test_std"] or 0 for e in own], **look)
        if vs := [(at, e["vs_full"]) for at, e in zip(x, own) if e["vs_full"]]:
            y = np.array([[v["points"], v["low"], v["high"]] for _, v in vs]).T
            differences.errorbar([at for at, _ in vs], y[0], [y[0] - y[1], y[2] - y[0]], **look)

    differences.axhline(0, color=STYLE["full"].color, linewidth=1)
    sizes = sorted({e["rows"]["train"] for e in entries})
    for ax in scores, differences:
        ax.set_xscale("log")
        ax.set_xlim(sizes[0] / 1.3, sizes[-1] * 1.3)  # of one size, the tick stands in the middle
        ax.set_xticks(sizes, [f"{n:,}" for n in sizes])
        ax.minorticks_off()
        ax.set_xlabel("training rows")
    scores.set_ylabel("test F1, ± standard deviation over seeds")
    differences.set_ylabel("against full fine-tuning (points), 95 % interval")
    scores.legend(fontsize=9)
    fig.suptitle(textwrap.fill(sweep_caption(sweep), 150), fontsize=9)
    save(fig, output / "figures" / f"{name}.png")
    text = sweep_markdown(sweep)
    (output / "figures" / f"{name}.md").write_text(text, encoding="utf-8")
    print(text + f"\nfigures are in {output / 'figures'}")


# Tol's muted colours, for the parts of a ledger
PART_COLORS = dict(zip(PARTS, ("#332288", "#88CCEE", "#44AA99", "#DDCC77")))


def draw_ledger(output):
    """Draw the stacked bars of output/metrics/memory.json into output/figures/."""
    ledger = read_json(output / "metrics" / "memory.json")
    rows = ledger["methods"].values()
    fig, ax = plt.subplots(figsize=(9, 4))
    left = np.zeros(len(rows))

    for part, name in PARTS.items():
        gb = np.array([row[part] for row in rows]) / 1e9
        ax.barh(range(len(rows)), gb, left=left, color=PART_COLORS[part], label=name, height=0.65)
        left += gb
    for y, total in enumerate(left):
        ax.annotate(f"{total:.2f}", (total, y), xytext=(6, 0), textcoords="offset points",
                    va="center")

    name_rows(ax, [row["label"] for row in rows])
    ax.margins(x=0.08)
    ax.set_xlabel("memory in training (GB)")
    ax.legend(fontsize=9, loc="center right")
    fig.suptitle(ledger_caption(ledger), fontsize=9)
    save(fig, output / "figures" / "ledger.png")


def draw_multitask(output):
    """Draw output/metrics/multitask.json into output/figures/, and print its tables."""
    study = read_json(output / "metrics" / "multitask.json")
    fig, (scores, memory, disk) = plt.subplots(1, 3, figsize=(13, 4.2))
    names, tasks = list(study["methods"]), list(study["tasks"])

    for i, name in enumerate(names):
        method, (_, color, marker) = study["methods"][name], STYLE[name]
        f1 = [study["tasks"][task][name]["f1_macro"] for task in tasks]
        at = np.arange(len(tasks)) + 0.54 / len(names) * (i - (len(names) - 1) / 2)
        scores.plot(at, f1, marker, color=color, markersize=8,
                    label=method["label"])
        counts, measured = np.array(method["memory"]).T
        every = np.arange(1, 51)
        memory.plot(every, bytes_of(study, name, every, "trained_bytes") / 1e9, "--", color=color,
                    linewidth=1)
        memory.plot(counts, measured / 1e9, marker, color=color, label=method["label"])
        disk.plot(every, bytes_of(study, name, every, "file_bytes") / 1e9, "--", color=color)

    scores.set(title="test macro-F1", xticks=range(len(tasks)), xticklabels=tasks)
    scores.margins(x=0.1)
    scores.legend(fontsize=9, loc="upper left")
    memory.set(title="resident memory (GB)", xlabel="tasks held at once", yscale="log")
    disk.set(title="on disk, computed, the base included (GB)", xlabel="tasks", yscale="log")
    for ax in memory, disk:
        ax.set_yticks([0.1, 0.2, 0.5, 1, 2, 5], ["0.1", "0.2", "0.5", "1", "2", "5"])
        ax.minorticks_off()
    fig.suptitle(f"{multitask_caption(study)}; markers: measured, dashed: computed from the sizes "
                 "of the tensors and files", fontsize=9)

    figures = output / "figures"
    save(fig, figures / "multitask.png")
    text = multitask_markdown(study)
    (figures / "multitask.md").write_text(text, encoding="utf-8")
    print(text + f"\nfigures are in {figures}")


FROZEN = "#DDDDDD"


def draw_layers(path):
    """Draw where the methods sit: grey boxes are frozen, coloured ones train. Boxes are (name, x,
    y, text, colour)."""
    lora_color, adapter_color = STYLE["lora_r8"].color, STYLE["adapter"].color
    low_rank = [("x", 0, 2, "x", "white"), ("A", 2.6, 1, "A\n(r, in)", lora_color),
                ("B", 4, 1, "s B\n(out, r)", lora_color), ("+", 5, 2, "+", "white")]

    pictures = [
        ("LoRA: query and value\nh = W0 x + b + s B A dropout(x)",
         [*low_rank, ("W0", 2, 3, "W0 x + b", FROZEN), ("drop", 1.2, 1, "dropout", "white"),
          ("h", 6, 2, "h", "white")],
         [("x", "W0"), ("x", "drop"), ("drop", "A"), ("A", "B"), ("W0", "+"), ("B", "+"),
          ("+", "h")]),
        ("DoRA, without dropout: query and value\nh = m (W0 + s B A) x / ||W0 + s B A|| + b",
         [*low_rank, ("W0", 2, 3, "W0 x", FROZEN), ("m", 6.1, 2, "m / ||.||", STYLE["dora"].color),
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
    save(fig, path)


if __name__ == "__main__":
    start()
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
    drawings = {"comparison.json": draw, "crossvalidation.json": draw_folds,
                "grid.json": draw_grid, "memory.json": draw_ledger,
                "multitask.json": draw_multitask}
    found = [drawing for name, drawing in drawings.items() if (folder / "metrics" / name).exists()]
    sweeps = sorted(path.stem for path in folder.glob("metrics/sweep_*.json"))
    if not found and not sweeps:
        fail(f"{folder / 'metrics'} holds none of {', '.join(drawings)}; run_all.sh, run_grid.sh, "
             "memory.py and multitask.py make them")
    for drawing in found:
        drawing(folder)
    for name in sweeps:
        draw_sweep(folder, name)
    draw_layers(folder / "figures" / "layers.png")
