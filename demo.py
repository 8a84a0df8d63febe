"""A page to play with what was trained, in a browser on this machine and nowhere else.

    python -m pip install -r requirements-demo.txt
    python demo.py                        and open http://127.0.0.1:7860

It asks the methods of run_all.sh and of run_grid.sh, as predict.py does, and shows the committed or
your own results (metrics/). It listens on 127.0.0.1 only, and its pages may load nothing from
outside: it works without a network.
"""
import functools
import html
import io
import os
import time
from pathlib import Path

from files import read_json
from settings import Parser, number
from start import fail, start


def parse_args(argv=None):
    start()
    p = Parser(description="A page to play with the trained methods.", allow_abbrev=False)
    p.add_argument("--checkpoint", type=Path, action="append", default=[], metavar="FILE",
                   help="ask this instead, any that train.py left in checkpoints/, or a folder of "
                        "peft's; give it several times to compare (default: those of run_all.sh "
                        "and run_grid.sh)")
    p.add_argument("--output", type=Path, default=Path(__file__).parent, metavar="DIR",
                   help="train.py's --output, with metrics/ and checkpoints/ (default: beside this "
                        "file)")
    p.add_argument("--model", metavar="FOLDER",
                   help="where the base is, if it was a folder (default: as in training)")
    p.add_argument("--port", type=number(int, 1, 65535), default=7860, metavar="N",
                   help="of 127.0.0.1 (default: 7860)")
    args = p.parse_args(argv)
    if not args.checkpoint and not (args.output / "metrics").is_dir():
        fail(f"--output {args.output}: there is no folder metrics in it, which train.py makes")
    return args


ARGS = parse_args() if __name__ == "__main__" else None  # before the slow imports

os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}
try:
    import gradio
except ImportError:
    fail("gradio is not installed: .venv/bin/python -m pip install -r requirements-demo.txt")
from matplotlib import rc_context
from matplotlib.figure import Figure
from starlette.middleware import Middleware

import predict
from checkpoint import attach, check_tokenizer, read_about
from methods import is_qa as asks_questions
from plots import STYLE
from studies import entry_label, memory_key, study_of

QUESTION = "Which company does Laura Nolan work for?"
PASSAGE = ("Laura Nolan spent the early years in Zurich. She is on the staff of Atlas Pictures. "
           "The staff of Cedar Records includes Simon Lopez. He spent the early years in Porto.")
MOST = 50  # sentences at a time
CSS = """
.answers { overflow-x: auto; }
.answers table { border-collapse: collapse; width: 100%; font-size: 0.9rem; }
.answers table, .answers tr, .answers th, .answers td { border: none !important; }
.answers th, .answers td { padding: 0.35rem 0.6rem; text-align: right; white-space: nowrap; }
.answers td:first-child, .answers th:first-child { text-align: left; white-space: normal;
  min-width: 9rem; position: sticky; left: 0; background: var(--body-background-fill); }
.answers tr + tr { border-top: 1px solid color-mix(in srgb, currentColor 20%, transparent)
  !important; }
.note { overflow-wrap: anywhere; }
.answers td.differs { font-weight: 700; background: color-mix(in srgb, #E69F00 30%, transparent); }
.answers mark { background: color-mix(in srgb, #56B4E9 45%, transparent); color: inherit;
  padding: 0 0.15em; border-radius: 3px; }
.picture svg { width: 100%; height: auto; max-width: 36rem; }
.dark .picture { --indigo: #9a8cf0; --wine: #cc6699; }
"""


class ContentPolicy:
    """Every answer of the server forbids the page to load anything from elsewhere."""
    policy = (b"default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; "
              b"connect-src 'self' ws://127.0.0.1:* http://127.0.0.1:* data: blob:")

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        async def with_policy(message):
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"],
                                      (b"content-security-policy", self.policy)]
            await send(message)
        await self.app(scope, receive, with_policy)


def in_a_line(answer):
    """A function that gives fail's line where `answer` would end the program."""
    @functools.wraps(answer)
    def answer_or_line(*args):
        try:
            return answer(*args)
        except SystemExit as e:
            return note(str(e.code))
    return answer_or_line


def rows_as_html(rows, kinds=None):
    """A table of strings, the first row its header; kinds: {(row, column): CSS class}."""
    lines = []
    for i, row in enumerate(rows):
        cell = "th" if i == 0 else "td"
        lines.append("".join(
            f"<{cell}{classes(kinds, i, j)}>{html.escape(text)}</{cell}>"
            for j, text in enumerate(row)))
    return ('<div class="answers"><table>' + "".join(f"<tr>{line}</tr>" for line in lines)
            + "</table></div>")


def classes(kinds, i, j):
    kind = (kinds or {}).get((i, j))
    return f' class="{kind}"' if kind else ""


def note(text):
    return f'<p class="note">{html.escape(text)}</p>'


class Study:
    """The trained methods of one study on their base, or why there are none (`missing`). files:
    these, {name: checkpoint}, instead of those that `output` has."""

    def __init__(self, output, is_qa, model=None, files=None):
        self.files, self.missing = {}, ""
        try:
            self.files = predict.find(output, is_qa) if files is None else files
            if not files and files is not None:
                fail(f"no --checkpoint was trained on {'questions' if is_qa else 'sentences'}")
            predict.check_kinds(self.files, is_qa, False)
            first = next(iter(self.files.values()))
            self.tokenizer, self.base, self.base_hash = predict.load_base(first, model)
            for name, path in self.files.items():  # what does not fit is said now
                check_tokenizer(path, self.switch(name)[0].about, self.tokenizer)
        except SystemExit as e:
            self.files, self.missing = {}, str(e.code).removeprefix("error: ")

    def switch(self, name):
        """(predict.Method, milliseconds from its file to a model that answers); SystemExit if the
        file is not what it was at the start."""
        begin = time.perf_counter()
        model, about = attach(self.base, self.base_hash, self.files[name])
        ms = 1000 * (time.perf_counter() - begin)
        return predict.Method(name, model, about, 0, ms), ms


def refuse(study, names, *texts):
    """A line that says why nothing can be answered, or None."""
    if study.missing:
        return study.missing
    if not names or set(names) - set(study.files):
        return "Tick at least one method."
    if not all((text or "").strip() for text in texts):
        return "There is nothing to read: write a text first."
    return None


@in_a_line
def ask(study, text, names):
    """Every sentence of a text (one a line) by every ticked method, as a table."""
    if why := refuse(study, names, text):
        return note(why)
    sentences = [line.strip() for line in text.splitlines() if line.strip()]
    if len(sentences) > MOST:
        return note(f"{len(sentences):,} sentences are too many for this page, which takes {MOST}; "
                    "predict.py --input reads files of any length.")
    columns, times = [], []
    for name in names:
        method, switch_ms = study.switch(name)
        predict.classify(method, study.tokenizer, sentences[0])  # to warm up
        begin = time.perf_counter()
        columns.append([predict.classify(method, study.tokenizer, s) for s in sentences])
        times.append((1000 * (time.perf_counter() - begin) / len(sentences), switch_ms))

    rows, kinds = [["", *names]], {}
    for i, sentence in enumerate(sentences):
        labels = [column[i][0] for column in columns]
        usual = predict.most_say(labels)
        rows.append([sentence if len(sentence) <= 300 else sentence[:299] + "…",
                     *(f"{label} {p:.2f}" for label, p in (column[i] for column in columns))])
        kinds |= {(len(rows) - 1, j): "differs" for j, label in enumerate(labels, 1)
                  if label != usual}
    rows.append(["ms per sentence", *(f"{ms:.1f}" for ms, _ in times)])
    rows.append(["ms to switch to it, from its file", *(f"{ms:.0f}" for _, ms in times)])
    said = note("Marked: not what most of the ticked methods say.") if kinds else ""
    return rows_as_html(rows, kinds) + said


@in_a_line
def ask_passage(study, question, passage, names):
    """The passage with the answer marked, once for every ticked method."""
    if why := refuse(study, names, question, passage):
        return note(why)
    if len(passage) > 20_000:
        return note(f"{len(passage):,} characters are too many for this page, which takes 20,000.")
    parts = []
    for name in names:
        method, _ = study.switch(name)
        begin = time.perf_counter()
        text, at = predict.answer(method, study.tokenizer, question.strip(), passage)
        ms = 1000 * (time.perf_counter() - begin)
        marked = (html.escape(passage[:at]) + f"<mark>{html.escape(text)}</mark>"
                  + html.escape(passage[at + len(text):]))
        parts.append(f"<tr><td><b>{html.escape(name)}</b>: {html.escape(text)} "
                     f"<small>({ms:.0f} ms)</small><br>{marked}</td></tr>")
    return f'<div class="answers"><table>{"".join(parts)}</table></div>'


def load_results(output):
    """The entries of the cross-validation, or else of the comparison, or {}."""
    for name in "crossvalidation.json", "comparison.json":
        path = output / "metrics" / name
        if path.exists() and "full_ft" in (entries := read_json(path)):
            return entries
    return {}


HEADER = ["method", "lr", "trainable", "n", "macro-F1", "vs full (points)", "at least (95 %)",
          "at most (95 %)", "NLL", "ECE (%)", "s per epoch", "memory (GB)", "file (MB)"]


def numbers_of(entries):
    """(header, rows): the table of HEADER with numbers, so that it can be sorted by any of them;
    without the columns that no result has."""
    rows = []
    for entry in entries.values():
        vs = entry["vs_full"]
        points = [vs and round(vs[key], 1) for key in ("points", "low", "high")]
        values = [entry["runs"][0]["settings"]["lr"], entry["trainable_params"], entry["n"],
                  entry["f1_macro"], *points, entry.get("nll"),
                  entry.get("ece") and 100 * entry["ece"], entry["epoch_time_s"],
                  entry[memory_key({"": entry})[0]], entry["checkpoint_mb"]]
        rows.append([entry_label(entry), *(value if value is None else float(f"{value:.4g}")
                                           if isinstance(value, float) else value
                                           for value in values)])
    kept = [j for j in range(len(HEADER)) if not rows or any(row[j] is not None for row in rows)]
    return [HEADER[j] for j in kept], [[row[j] for j in kept] for row in rows]


COSTS = {"trainable parameters": lambda e: e["trainable_params"],
         "memory (GB)": lambda e: e[memory_key({"": e})[0]],
         "seconds per epoch": lambda e: e["epoch_time_s"],
         "trained file (MB)": lambda e: e["checkpoint_mb"]}


def draw(entries, cost):
    """Macro-F1 against a cost, as SVG: bars are the 95 % interval of the difference to full
    fine-tuning. What is black takes the colour of the page's text, in light and dark."""
    if not entries:
        return note("no results: bash run_all.sh makes them")
    figure = Figure(figsize=(5, 5), layout="constrained")
    figure.patch.set_alpha(0)
    ax = figure.add_subplot(facecolor="none")
    full = entries["full_ft"]["f1_macro"]
    for name, entry in entries.items():
        x, y, vs = COSTS[cost](entry), entry["f1_macro"], entry["vs_full"]
        if x is None:
            continue
        _, color, marker = STYLE[name]
        bar = [[0], [0]] if vs is None else [[max(y - full - vs["low"] / 100, 0)],
                                             [max(full + vs["high"] / 100 - y, 0)]]
        ax.errorbar([x], [y], bar, fmt=marker, color=color, markersize=8, capsize=3,
                    label=entry_label(entry))
    ax.set(xlabel=cost, ylabel="macro-F1")
    if cost in ("trainable parameters", "trained file (MB)"):
        ax.set_xscale("log")
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    ax.spines[["top", "right"]].set_visible(False)
    file = io.StringIO()
    with rc_context({"svg.fonttype": "none"}):
        figure.savefig(file, format="svg")
    svg = file.getvalue()[file.getvalue().index("<svg"):]
    svg = svg.replace("#000000", "currentColor").replace("<text ", '<text fill="currentColor" ')
    # two colours are too dark on a dark page
    for color, name in ("#332288", "indigo"), ("#882255", "wine"):
        svg = svg.replace(color, f"var(--{name}, {color})")
    return f'<div class="picture">{svg}</div>'


def make_page(output, model=None, checkpoints=()):
    """The gradio.Blocks of the page. checkpoints: to ask instead of those that `output` has."""
    given = {is_qa: {name: path for name, path in predict.name_files(checkpoints).items()
                     if asks_questions(read_about(path)["settings"]) is is_qa}
             if checkpoints else None for is_qa in (False, True)}
    sentences, questions = (Study(output, is_qa, model, files) for is_qa, files in given.items())
    entries = load_results(output)
    with gradio.Blocks(title="What do I lose if I don't fine-tune all of BERT?",
                       analytics_enabled=False) as page:
        gradio.Markdown("# What do I lose, and what do I gain, if I don't fine-tune all of BERT?")
        with gradio.Tab("Ask"):
            text = gradio.Textbox("\n".join(predict.SENTENCES), lines=5, max_lines=12,
                                  label="Sentences, one a line", elem_id="sentences")
            ticked = gradio.CheckboxGroup(list(sentences.files), value=list(sentences.files),
                                          label="Methods", elem_id="methods",
                                          visible=not sentences.missing)
            button = gradio.Button("Ask", variant="primary", elem_id="ask",
                                   interactive=not sentences.missing)
            answers = gradio.HTML(note(sentences.missing) if sentences.missing else "",
                                  elem_id="answers")
            button.click(lambda text, names: ask(sentences, text, names), [text, ticked], answers,
                         api_name="ask")
        with gradio.Tab("Ask a passage"):
            question = gradio.Textbox(QUESTION, label="Question", elem_id="question")
            passage = gradio.Textbox(PASSAGE, lines=4, max_lines=16, label="Passage",
                                     elem_id="passage")
            found_by = gradio.CheckboxGroup(list(questions.files), value=list(questions.files),
                                            label="Methods", elem_id="passage_methods",
                                            visible=not questions.missing)
            find = gradio.Button("Find the answer", variant="primary", elem_id="find",
                                 interactive=not questions.missing)
            marked = gradio.HTML(note(questions.missing) if questions.missing else "",
                                 elem_id="marked")
            find.click(lambda question, passage, names: ask_passage(questions, question, passage,
                                                                    names),
                       [question, passage, found_by], marked, api_name="ask_passage")
        with gradio.Tab("Compare"):
            if entries:
                gradio.HTML(note(study_of(entries)))
            header, rows = numbers_of(entries)
            gradio.Dataframe(rows, headers=header, interactive=False, wrap=True,
                             datatype=["str"] + ["number"] * (len(header) - 1), elem_id="results")
            cost = gradio.Radio(list(COSTS), value="seconds per epoch", label="Cost",
                                elem_id="cost")
            picture = gradio.HTML(draw(entries, "seconds per epoch"), elem_id="picture")
            if entries:
                gradio.HTML(note("Bars: the 95 % interval of the difference to full fine-tuning, "
                                 "which has none."))
            cost.change(lambda cost: draw(entries, cost), cost, picture, api_name="draw")
    return page


def launch(page, port):
    """Serve the page on 127.0.0.1, in threads of its own."""
    try:
        return page.launch(
            server_name="127.0.0.1", server_port=port, share=False, quiet=True, footer_links=[],
            css=CSS, ssr_mode=False, prevent_thread_lock=True,
            theme=gradio.themes.Base(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
            app_kwargs={"middleware": [Middleware(ContentPolicy)]})
    except OSError:
        fail(f"port {port} of 127.0.0.1 is taken; --port N chooses another")


def main(args):
    page = make_page(args.output, args.model, args.checkpoint)
    launch(page, args.port)
    print(f"http://127.0.0.1:{args.port}   (Ctrl-C ends it)", flush=True)
    page.block_thread()


if __name__ == "__main__":
    main(ARGS)
