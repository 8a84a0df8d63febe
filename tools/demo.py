"""Show a page on which the trained methods answer, in a browser on this machine.

    python -m pip install -r requirements-demo.txt
    python -m tools.demo                  then open http://127.0.0.1:7860

The page asks the methods of run_all.sh and run_grid.sh, as tools.predict does, or where none are
trained yet the small ones of examples/. It shows table and verdict from figures/. The server
listens on 127.0.0.1 only. The page loads nothing from elsewhere, so it works without a network.
"""
if not __package__:
    raise SystemExit("error: run this from the project's folder: python -m tools.demo")

import base64
import os
from pathlib import Path
from unittest.mock import patch
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
# gradio would ask the environment's proxy for its own page; a base on the hub is loaded through it
NO_PROXY = {"NO_PROXY": "*", "no_proxy": "*"}

try:
    with patch.dict(os.environ, NO_PROXY):
        import gradio
except ModuleNotFoundError as e:
    fail(f"{e.name} is not installed: .venv/bin/python -m pip install -r requirements-demo.txt")
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import PlainTextResponse

from checkpoint import read_about
from checks import check_surrogates
from tools import predict
from tools.export import name_files

EXAMPLES = Path(__file__).parents[1] / "examples"
QUESTION = "Which company does Laura Nolan work for?"
PASSAGE = ("Laura Nolan spent the early years in Zurich. She is on the staff of Atlas Pictures. "
           "The staff of Cedar Records includes Simon Lopez. He spent the early years in Porto.")
HOSTS = ["127.0.0.1", "localhost"]  # the names of the server that it answers to
# what the page may load: nothing from elsewhere
POLICY = ("default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; "
          "connect-src 'self' ws://127.0.0.1:* http://127.0.0.1:* data: blob:")
# in a narrow window the verdict's tables scroll and keep their words whole
CSS = ("#table { overflow-x: auto; } "
       "#table table { overflow-wrap: normal; word-break: normal; }")


# --- the methods that answer ---------------------------------------------------------------------

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


def load_asked(output, is_qa, model, given):
    """Return (tokenizer, predict.Trained methods, ""): those of the `given` {name: checkpoint} that
    are of this kind or, if none at all are given, of the study in `output`. Where there are none to
    ask, return (None, [], why). Exit if a given file cannot be read."""
    files = {name: path for name, path in given.items()
             if read_about(path)["settings"].is_qa is is_qa}
    try:
        if not given:
            files = files_to_ask(output, is_qa)
        if not files:
            fail(f"no --checkpoint was trained on {'questions' if is_qa else 'sentences'}")
        predict.check_kinds(files, is_qa, False)
        return *predict.load_methods(files, model), ""
    except SystemExit as e:
        return None, [], line_of(e)


def line_of(error):
    """Return the line with which a program would have ended, for the page."""
    return str(error.code).removeprefix("error: ")


def check_asked(texts, ticked):
    """Exit if no method is ticked, or a text is empty or holds what is no character."""
    if not ticked:
        fail("Tick at least one method.")
    if not all((text or "").strip() for text in texts):
        fail("There is nothing to read: write a text first.")
    for text in texts:
        check_surrogates("The text", "", text)


def ask_sentences(tokenizer, methods, text):
    """Return (a table of what every method says of every sentence of a text, one per line; a note;
    None)."""
    sentences = [line.strip() for line in text.splitlines() if line.strip()]
    (header, *rows), note = predict.sentence_rows(methods, tokenizer, sentences)
    return {"headers": header, "data": rows}, note, None


def ask_passage(tokenizer, methods, question, passage):
    """Return (a table of every method's answer; no note; the parts of the passage, once per method,
    of which the answer has the method's name)."""
    rows, starts = predict.answer_rows(methods, tokenizer, question.strip(), passage)
    header, answers, *numbers = zip(*rows)  # one column per method, as above
    parts = []
    for name, answer, at in zip(header[1:], answers[1:], starts):
        after = passage[at + len(answer):]
        parts += [(passage[:at], None), (answer, name), (f"{after}\n\n", None)]
    return {"headers": header, "data": [answers, *numbers]}, "", parts


# --- the page and its server ---------------------------------------------------------------------

def show_asking(loaded, inputs, label, is_qa):
    """Put boxes to tick methods, a button and places for the answers below some inputs. The button
    shows what ask_sentences or ask_passage returns, or as the note the line with which it exits."""
    tokenizer, methods, missing = loaded
    ask, name, legend = ((ask_passage, "ask_passage", "Answers") if is_qa else
                         (ask_sentences, "ask", "* the methods disagree, and most do not say this"))

    def answer(*values):
        *texts, ticked = values
        try:
            if missing:
                fail(missing)
            check_asked(texts, ticked)
            return ask(tokenizer, [method for method in methods if method.name in ticked], *texts)
        except SystemExit as e:
            return None, line_of(e), None

    names, can_ask = [method.name for method in methods], not missing
    ticked = gradio.CheckboxGroup(names, value=names, label="Methods", visible=can_ask,
                                  elem_id=f"{name}_methods")
    button = gradio.Button(label, variant="primary", interactive=can_ask, elem_id=name)
    note = gradio.Markdown(missing, elem_id=f"{name}_note")
    table = gradio.Dataframe(label=legend, headers=[""], column_widths=["45%"],
                             pinned_columns=1, wrap=True, max_chars=300, interactive=False,
                             visible=can_ask, elem_id=f"{name}_answers")
    marked = gradio.HighlightedText(label="Where they stand", visible=can_ask and is_qa,
                                    elem_id=f"{name}_marked")
    button.click(answer, [*inputs, ticked], [table, note, marked], api_name=name)


def show_results(figures):
    """Put what the study has written on the page: its picture, its verdict and its table."""
    for table, picture in (("answer.md", "glance.png"), ("summary.md", "summary.png")):
        if (figures / table).exists():
            if (figures / picture).exists():
                png = base64.b64encode((figures / picture).read_bytes()).decode()
                gradio.HTML(f'<img src="data:image/png;base64,{png}" style="max-width: 100%" '
                            'alt="What each method loses and gains">', elem_id="glance")
            # as plots.answer_markdown joins them
            numbers, bullet, said = (figures / table).read_text(encoding="utf-8").partition(
                "\n- **")
            gradio.Markdown(bullet + said, elem_id="verdict")
            gradio.Markdown(numbers, elem_id="table")
            return
    gradio.Markdown("no results: `bash run_all.sh` makes them")


def make_page(output, model=None, checkpoints=()):
    """Make the gradio.Blocks of the page. checkpoints: ask these, not those of `output`."""
    given = name_files(checkpoints)
    sentences, questions = (load_asked(output, is_qa, model, given) for is_qa in (False, True))
    with gradio.Blocks(title="What do I lose if I don't fine-tune all of BERT?",
                       analytics_enabled=False) as page:
        gradio.Markdown("# What do I lose, and what do I gain, if I don't fine-tune all of BERT?")
        with gradio.Tab("Ask"):
            text = gradio.Textbox("\n".join(predict.SENTENCES), lines=5, max_lines=12,
                                  label="Sentences, one per line", elem_id="sentences")
            show_asking(sentences, [text], "Ask", is_qa=False)
        with gradio.Tab("Ask a passage"):
            question = gradio.Textbox(QUESTION, label="Question", elem_id="question")
            passage = gradio.Textbox(PASSAGE, lines=4, max_lines=16, label="Passage",
                                     elem_id="passage")
            show_asking(questions, [question, passage], "Find the answer", is_qa=True)
        with gradio.Tab("Compare"):
            show_results(output / "figures")
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
        with patch.dict(os.environ, NO_PROXY):
            page.queue(api_open=False)  # calls beside the queue would share a tokenizer at once
            page.launch(
                server_name=HOSTS[0], server_port=port, share=False, quiet=True, footer_links=[],
                css=CSS, ssr_mode=False, prevent_thread_lock=True,
                theme=gradio.themes.Base(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
                app_kwargs={"middleware": [Middleware(TrustedHostMiddleware, allowed_hosts=HOSTS),
                                           Middleware(BaseHTTPMiddleware, dispatch=with_policy)]})
    except OSError:  # gradio does not say what is wrong with a port
        fail(f"port {port} of 127.0.0.1 cannot be used; --port N chooses another")


def main(args):
    page = make_page(args.output, args.model, args.checkpoint)
    launch(page, args.port)
    print(f"http://127.0.0.1:{args.port}   (Ctrl-C ends it)", flush=True)
    page.block_thread()


if __name__ == "__main__":
    main(ARGS)
