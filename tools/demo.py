"""Show a page on which the trained methods answer, in a browser on this machine.

    python -m pip install -r requirements-demo.txt
    python -m tools.demo                  then open http://127.0.0.1:7860

The page asks the methods of run_all.sh and run_grid.sh, as tools.predict does, or where none are
trained yet the small ones of examples/. It shows the results in metrics/. The server listens on
127.0.0.1 only. The page loads nothing from elsewhere, so it works without a network.
"""
if not __package__:
    raise SystemExit("error: run this from the project's folder: python -m tools.demo")

import base64
import contextlib
import html
import os
import socket
import time
from pathlib import Path
from urllib.parse import urlsplit

from common import fail, start
from settings import Parser, number


def parse_args(argv=None):
    start()
    p = Parser(description="Show a page on which the trained methods answer.", allow_abbrev=False)
    p.add_argument("--checkpoint", type=Path, action="append", default=[], metavar="FILE",
                   help="ask this checkpoint or peft folder instead; repeat it to compare several "
                        "(default: those of run_all.sh and run_grid.sh)")
    p.add_argument("--output", type=Path, default=Path(__file__).parents[1], metavar="DIR",
                   help="train.py's --output (default: the project's folder)")
    p.add_argument("--model", metavar="FOLDER",
                   help="where the base is, if it was a folder (default: as in training)")
    p.add_argument("--port", type=number(int, 1, 65535), default=7860, metavar="N",
                   help="port of 127.0.0.1 (default: 7860)")
    args = p.parse_args(argv)
    if not args.checkpoint and not (args.output / "metrics").is_dir():
        fail(f"--output {args.output}: there is no folder metrics in it, which train.py makes")
    return args


ARGS = parse_args() if __name__ == "__main__" else None  # before the slow imports

os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}


@contextlib.contextmanager
def without_proxies():
    """Hide the environment's proxies: gradio would ask one for its own page on 127.0.0.1. A base on
    the hub is loaded through them."""
    hidden = {name: os.environ.pop(name) for name in list(os.environ)
              if name.lower().endswith("_proxy")}
    try:
        yield
    finally:
        os.environ.update(hidden)


try:
    with without_proxies():
        import gradio
except ModuleNotFoundError as e:
    fail(f"{e.name} is not installed: .venv/bin/python -m pip install -r requirements-demo.txt")
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import PlainTextResponse

from checkpoint import attach, check_tokenizer, read_about
from checks import check_surrogates
from plots import entry_label, memory_key, read_study, study_of, study_verdict
from tools import predict
from tools.export import load_base, name_files

EXAMPLES = Path(__file__).parents[1] / "examples"
QUESTION = "Which company does Laura Nolan work for?"
PASSAGE = ("Laura Nolan spent the early years in Zurich. She is on the staff of Atlas Pictures. "
           "The staff of Cedar Records includes Simon Lopez. He spent the early years in Porto.")
MAX_SENTENCES, MAX_CHARACTERS = 50, 20_000  # that the page takes at a time
HOSTS = ["127.0.0.1", "localhost"]  # the names of the server that it answers to
# what the page may load: nothing from elsewhere
POLICY = ("default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; "
          "connect-src 'self' ws://127.0.0.1:* http://127.0.0.1:* data: blob:")
CSS = """
.answers { overflow-x: auto; }
.answers table { border-collapse: collapse; width: 100%; font-size: 0.9rem; }
.answers table, .answers tr, .answers th, .answers td { border: none !important; }
.answers th, .answers td { padding: 0.35rem 0.6rem; text-align: right; white-space: nowrap; }
.answers td:first-child, .answers th:first-child { text-align: left; white-space: normal;
  min-width: 9rem; position: sticky; left: 0; background: var(--body-background-fill); }
.answers tr + tr { border-top: 1px solid #88888866 !important; }
.note { overflow-wrap: anywhere; }
.answers td.differs { font-weight: 700; background: #E69F004D; }
.answers mark { background: #56B4E973; color: inherit; padding: 0 0.15em; border-radius: 3px; }
"""


# --- the methods that answer ---------------------------------------------------------------------

class Answerers:
    """Hold the trained methods of one study on their shared base: `files` is {name: checkpoint}.
    Where they cannot be asked it is empty, and `missing` says why."""

    def __init__(self, output, is_qa, model=None, given=None):
        """Use the `given` checkpoints of this kind or, if none at all are given, those of the study
        in `output`. Exit if a given file cannot be read."""
        self.files = {name: path for name, path in (given or {}).items()
                      if read_about(path)["settings"].is_qa is is_qa}
        self.missing = ""
        try:
            if not given:
                self.files = files_to_ask(output, is_qa)
            if not self.files:
                fail(f"no --checkpoint was trained on {'questions' if is_qa else 'sentences'}")
            predict.check_kinds(self.files, is_qa, False)
            first = next(iter(self.files.values()))
            self.tokenizer, self.base, self.base_hash = load_base(first, model)
            for name, path in self.files.items():  # a file that does not fit is found now
                check_tokenizer(path, self.switch(name).about, self.tokenizer)
        except SystemExit as e:
            self.files, self.missing = {}, str(e.code).removeprefix("error: ")

    def switch(self, name):
        """Load a method from its file, as a predict.Trained. Exit if the file has changed since the
        start and no longer fits."""
        begin = time.perf_counter()
        model, about = attach(self.base, self.base_hash, self.files[name])
        return predict.Trained(name, model, about, 0, 1000 * (time.perf_counter() - begin))


def files_to_ask(output, is_qa):
    """Return {name: checkpoint} of the study in `output`; of the project's own folder, without
    trained methods, those of examples/, which answer about sentences."""
    try:
        return predict.find(output, is_qa)
    except SystemExit:
        examples = sorted(EXAMPLES.glob("*.safetensors"))
        if is_qa or not examples or output.resolve() != EXAMPLES.parent:
            raise
        return name_files(examples)


def check_asked(answerers, texts, names):
    """Exit if nothing can be answered: there is no method, none is ticked, or a text is empty or
    holds what is no character."""
    if answerers.missing:
        fail(answerers.missing)
    if not names or set(names) - set(answerers.files):
        fail("Tick at least one method.")
    if not all((text or "").strip() for text in texts):
        fail("There is nothing to read: write a text first.")
    for text in texts:
        check_surrogates("The text", "", text)


def note(text):
    """Return a text as a paragraph of HTML."""
    return f'<p class="note">{html.escape(text)}</p>'


def html_table(rows, differs):
    """Return rows of strings as HTML. The first row is the header; `differs` has the (row, column)
    of the cells to mark."""
    table = ""
    for i, row in enumerate(rows):
        tag = "td" if i else "th"
        marks = [' class="differs"' if (i, j) in differs else "" for j in range(len(row))]
        cells = (f"<{tag}{mark}>{html.escape(text)}</{tag}>" for text, mark in zip(row, marks))
        table += f"<tr>{''.join(cells)}</tr>"
    return f'<div class="answers"><table>{table}</table></div>'


def ask_sentences(answerers, text, names):
    """Return a table of what every ticked method says of every sentence of a text, one per line."""
    sentences = [line.strip() for line in text.splitlines() if line.strip()]
    if len(sentences) > MAX_SENTENCES:
        fail(f"{len(sentences):,} sentences are too many for this page, which takes "
             f"{MAX_SENTENCES}; tools.predict --input reads files of any length.")
    columns, speeds, switches = [], ["ms per sentence"], ["ms to switch to it, from its file"]
    abouts, n_cut = [], 0
    for name in names:
        method = answerers.switch(name)
        abouts.append(method.about)
        n_cut = max(n_cut, predict.encode(method, answerers.tokenizer, sentences).n_cut)
        predict.classify(method, answerers.tokenizer, sentences[0])  # to warm up
        begin = time.perf_counter()
        columns.append([predict.classify(method, answerers.tokenizer, s) for s in sentences])
        ms = 1000 * (time.perf_counter() - begin) / len(sentences)
        speeds.append(f"{ms:.1f}")
        switches.append(f"{method.switch_ms:.0f}")

    rows, differs = [["", *names]], set()
    for i, (sentence, answers) in enumerate(zip(sentences, zip(*columns)), 1):
        usual = predict.most_say([label for label, _ in answers])
        rows.append([sentence if len(sentence) <= 300 else sentence[:299] + "…",
                     *(f"{label} {p:.2f}" for label, p in answers)])
        differs |= {(i, j) for j, (label, _) in enumerate(answers, 1) if label != usual}
    notes = ["Marked: not what most of the ticked methods say."] if differs else []
    notes += [predict.say_cut(abouts, n_cut)] if n_cut else []
    return html_table([*rows, speeds, switches], differs) + "".join(map(note, notes))


def ask_passage(answerers, question, passage, names):
    """Return the passage once per ticked method, with the method's answer marked in it."""
    if len(passage) > MAX_CHARACTERS:
        fail(f"{len(passage):,} characters are too many; the page takes {MAX_CHARACTERS:,}.")
    rows = []
    for name in names:
        method = answerers.switch(name)
        begin = time.perf_counter()
        text, at = predict.answer(method, answerers.tokenizer, question.strip(), passage)
        ms = 1000 * (time.perf_counter() - begin)
        before, answer, after = map(html.escape, (passage[:at], text, passage[at + len(text):]))
        rows.append(f"<tr><td><b>{html.escape(name)}</b>: {answer} <small>({ms:.0f} ms)</small>"
                    f"<br>{before}<mark>{answer}</mark>{after}</td></tr>")
    return f'<div class="answers"><table>{"".join(rows)}</table></div>'


# --- the results ---------------------------------------------------------------------------------

def load_study(output):
    """Return (what is there of the cross-validation, else of the comparison, its picture and what
    varies between the runs of a method); None if there is neither."""
    for name, picture, varies in (("crossvalidation", "glance", "fold"),
                                  ("comparison", "summary", "seed")):
        path = output / "metrics" / f"{name}.json"
        if path.exists():
            return read_study(path), output / "figures" / f"{picture}.png", varies
    return None


def numbers_of(entry):
    """Return what the table shows of an entry: {column: value}, None where nothing was measured."""
    vs, ece = entry["vs_full"], entry.get("ece")
    numbers = {"lr": entry["runs"][0]["settings"]["lr"],
               "trainable parameters": entry["trainable_params"],
               "n": entry["n"],
               "macro-F1": entry["f1_macro"],
               "vs full (points)": vs and round(vs["points"], 1),
               "at least (95 %)": vs and round(vs["low"], 1),
               "at most (95 %)": vs and round(vs["high"], 1),
               "NLL": entry.get("nll"),
               "ECE (%)": ece and 100 * ece,
               "seconds per epoch": entry["epoch_time_s"],
               "memory (GB)": entry[memory_key({"": entry})[0]],
               "trained file (MB)": entry["checkpoint_mb"]}
    return {"method": entry_label(entry)} | {
        name: float(f"{value:.4g}") if isinstance(value, float) else value
        for name, value in numbers.items()}


def table_of(entries):
    """Return (header, rows) of the results as numbers, so that the page can sort them by any
    column. A column in which no method has a number is left out."""
    rows = [numbers_of(entry) for entry in entries.values()]
    header = [name for name in rows[0] if any(row[name] is not None for row in rows)]
    return header, [[row[name] for name in header] for row in rows]


# --- the page and its server ---------------------------------------------------------------------

def show_asking(answerers, inputs, label, ask, name):
    """Put boxes to tick methods, a button and a place for the answers below some inputs. The button
    shows what ask(answerers, *inputs, ticked methods) returns, or the line with which it exits."""
    def answer(*values):
        *texts, ticked = values
        try:
            check_asked(answerers, texts, ticked)
            return ask(answerers, *texts, ticked)
        except SystemExit as e:
            return note(str(e.code).removeprefix("error: "))

    methods, can_ask = list(answerers.files), not answerers.missing
    ticked = gradio.CheckboxGroup(methods, value=methods, label="Methods", visible=can_ask,
                                  elem_id=f"{name}_methods")
    button = gradio.Button(label, variant="primary", interactive=can_ask, elem_id=name)
    answers = gradio.HTML("" if can_ask else note(answerers.missing), elem_id=f"{name}_answers")
    button.click(answer, [*inputs, ticked], answers, api_name=name)


def show_results(found):
    """Put load_study's results on the page: the picture, the verdict and the table."""
    if not found:
        gradio.HTML(note("no results: bash run_all.sh makes them"))
        return
    study, picture, what_varies = found
    entries = study["entries"]
    if picture.exists():
        png = base64.b64encode(picture.read_bytes()).decode()
        gradio.HTML(f'<img src="data:image/png;base64,{png}" alt="What each method loses and gains"'
                    ' style="max-width: 100%">', elem_id="glance")
    gradio.Markdown(study_verdict(study, what_varies), elem_id="verdict")
    gradio.HTML(note(study_of(entries)))
    header, rows = table_of(entries)
    gradio.Dataframe(rows, headers=header, interactive=False, wrap=True,
                     datatype=["str"] + ["number"] * (len(header) - 1), elem_id="results")


def make_page(output, model=None, checkpoints=()):
    """Make the gradio.Blocks of the page. checkpoints: ask these, not those of `output`."""
    given = name_files(checkpoints)
    sentences, questions = (Answerers(output, is_qa, model, given) for is_qa in (False, True))
    found = load_study(output)
    with gradio.Blocks(title="What do I lose if I don't fine-tune all of BERT?",
                       analytics_enabled=False) as page:
        gradio.Markdown("# What do I lose, and what do I gain, if I don't fine-tune all of BERT?")
        with gradio.Tab("Ask"):
            text = gradio.Textbox("\n".join(predict.SENTENCES), lines=5, max_lines=12,
                                  label="Sentences, one per line", elem_id="sentences")
            show_asking(sentences, [text], "Ask", ask_sentences, "ask")
        with gradio.Tab("Ask a passage"):
            question = gradio.Textbox(QUESTION, label="Question", elem_id="question")
            passage = gradio.Textbox(PASSAGE, lines=4, max_lines=16, label="Passage",
                                     elem_id="passage")
            show_asking(questions, [question, passage], "Find the answer", ask_passage,
                        "ask_passage")
        with gradio.Tab("Compare"):
            show_results(found)
    return page


async def with_policy(request, answer):
    """Answer to this machine's own pages alone, and take no files; send the POLICY with every
    answer of the server."""
    origin = urlsplit(request.headers.get("origin", "//localhost")).hostname
    if origin not in HOSTS or "upload" in request.url.path:
        return PlainTextResponse("not allowed", 403)
    response = await answer(request)
    response.headers["content-security-policy"] = POLICY
    return response


def launch(page, port):
    """Serve the page on 127.0.0.1, in threads of its own."""
    try:
        with socket.socket() as tried:  # gradio does not say what is wrong with a port
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            tried.bind((HOSTS[0], port))
    except OSError as e:
        fail(f"port {port} of 127.0.0.1: {e.strerror}; --port N chooses another")
    with without_proxies():
        return page.launch(
            server_name=HOSTS[0], server_port=port, share=False, quiet=True, footer_links=[],
            css=CSS, ssr_mode=False, prevent_thread_lock=True,
            theme=gradio.themes.Base(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
            app_kwargs={"middleware": [Middleware(TrustedHostMiddleware, allowed_hosts=HOSTS),
                                       Middleware(BaseHTTPMiddleware, dispatch=with_policy)]})


def main(args):
    page = make_page(args.output, args.model, args.checkpoint)
    launch(page, args.port)
    print(f"http://127.0.0.1:{args.port}   (Ctrl-C ends it)", flush=True)
    page.block_thread()


if __name__ == "__main__":
    main(ARGS)
