"""Test the page: over HTTP with gradio's client, and in headless Chromium where it is installed."""
import base64
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request

import pytest
from conftest import ROOT, one_line_exit, run
from safetensors.torch import save_file

from checkpoint import as_metadata, read_about, read_tensors

pytestmark = pytest.mark.skipif(importlib.util.find_spec("gradio") is None,
                                reason="gradio is not installed")


@pytest.fixture(scope="module", autouse=True)
def imported():
    """Import gradio when the first of these tests runs: it is slow, and all workers read this
    file."""
    global Client, demo, gradio, predict
    import gradio
    from gradio_client import Client

    from tools import demo, predict


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def served(study):
    """Serve a small study of sentences, without one of questions: (address, the page)."""
    page, port = demo.make_page(study[0]), free_port()
    demo.launch(page, port)
    yield f"http://127.0.0.1:{port}", page
    page.close()


@pytest.fixture(scope="module")
def client(served):
    return Client(served[0], verbose=False)


def test_sentences_are_answered_as_by_predict(client, study):
    asked, names = ["A good film.", "<b>A bad film."], ["lora_r8", "adapter"]
    table, note, marked = client.predict("\n\n".join(asked), names[::-1], api_name="/ask")
    files = predict.find(study[0])
    tokenizer, methods = predict.load_methods({name: files[name] for name in names})
    assert table["headers"] == ["", *names]
    for sentence, row in zip(asked, table["data"]):
        answers = [predict.classify(method, tokenizer, sentence) for method in methods]
        assert [cell.removeprefix("* ") for cell in row] == [
            sentence, *(f"{label} {p:.2f}" for label, p in answers)]
        assert ["* " in cell for cell in row[1:]] == [answers[0][0] != answers[1][0]] * 2
    numbers = table["data"][2:]
    assert [row[0] for row in numbers] == ["ms per sentence", "ms to switch to it, from its file",
                                           "its file (MB)"]
    assert all(float(cell) > 0 for row in numbers for cell in row[1:])
    assert not note and marked is None


@pytest.mark.parametrize("text, names, words, n", [
    ("", ["lora_r8"], "write a text", 0), (" \n ", ["lora_r8"], "write a text", 0),
    ("a film", [], "at least one method", 0), ("a film\n" * 51, ["lora_r8"], "", 51),
    ("word " * 3000, ["lora_r8"], "were cut", 1), ("\u200b\U0001f600 \x07", ["lora_r8"], "", 1)])
def test_strange_texts_get_an_answer_or_a_line(text, names, words, n, client):
    table, note, _ = client.predict(text, names, api_name="/ask")
    assert words in note and bool(words) is bool(note)
    assert len([row for row in table["data"] if row]) == (n and n + 3)  # times and sizes


def test_a_cut_text_is_said(client):
    for text, n in ("good\n" + "word " * 200, 1), ("good", 0):
        _, said, _ = client.predict(text, ["lora_r8", "adapter"], api_name="/ask")
        assert said.count("1 of the texts were cut at the 128 tokens that training had") == n


def test_without_trained_questions_it_is_said(client):
    _, said, _ = client.predict("Who?", "A passage.", [], api_name="/ask_passage")
    assert "grid.json is not there" in said and "run_grid.sh" in said


def test_the_answer_is_marked_where_it_stands(monkeypatch):
    passage, found = "Not <Oslo>, but<Oslo>.", {"lora": ("<Oslo>", 15), "full": ("Not", 0)}
    monkeypatch.setattr(predict, "answer", lambda method, *_: found[method.name])
    methods = [predict.Trained(name, None, {}, 0, 1.0) for name in found]
    table, _, parts = demo.ask_passage(None, methods, "where?", passage)
    assert table["headers"] == ("", "lora", "full")
    assert table["data"][0] == ("answer", "<Oslo>", "Not")
    assert parts == [("Not <Oslo>, but", None), ("<Oslo>", "lora"), (".\n\n", None),
                     ("", None), ("Not", "full"), (" <Oslo>, but<Oslo>.\n\n", None)]


def test_it_is_served_on_this_machine_alone_and_loads_nothing_from_elsewhere(served):
    address, page = served
    with urllib.request.urlopen(address) as answer:
        policy = answer.headers["content-security-policy"]
    assert "default-src 'self'" in policy and "https:" not in policy
    assert page.share_url is None and not page.analytics_enabled
    port = int(address.rsplit(":", 1)[1])
    others = {info[4][0] for info in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)}
    for other in others - {"127.0.0.1"}:
        with socket.socket() as s:
            s.settimeout(2)
            assert s.connect_ex((other, port)) != 0
    one_line_exit(lambda: demo.launch(demo.make_page(ROOT / "nothing"), port),
                  f"port {port} of 127.0.0.1 cannot be used", "--port")


@pytest.mark.parametrize("path, headers", [
    ("", {"Host": "evil.example"}), ("config", {"Host": "evil.example:7860"}),
    ("gradio_api/call/ask", {"Origin": "http://evil.example"}),
    ("gradio_api/upload", {"Origin": "http://127.0.0.1"}), ("gradio_api/upload", {})])
def test_other_hosts_origins_and_uploads_are_refused(path, headers, served):
    body = (b'--x\r\nContent-Disposition: form-data; name="files"; filename="a"\r\n\r\na\r\n'
            b"--x--\r\n") if "upload" in path else None
    asked = urllib.request.Request(f"{served[0]}/{path}", body, {
        "Content-Type": "multipart/form-data; boundary=x", **headers})
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(asked)
    assert refused.value.code in (400, 403)


def test_what_is_asked_waits_for_its_turn(served):
    """Two requests at once would set the length of one tokenizer."""
    asked = urllib.request.Request(f"{served[0]}/gradio_api/run/ask", b'{"data": ["a film"]}',
                                   {"Content-Type": "application/json"})
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(asked)
    assert refused.value.code == 404


@pytest.mark.parametrize("texts", [["bad \ud83d film"], ["who?", "bad \ud83d"]])
def test_half_a_character_is_a_line(texts):
    one_line_exit(lambda: demo.check_asked(texts, ["a"]), "surrogate", "no character")


def test_a_proxy_is_not_asked_for_the_page(monkeypatch):
    for name in "http_proxy", "HTTPS_PROXY", "ALL_PROXY":
        monkeypatch.setenv(name, "socks5://127.0.0.1:9")
    page, port = demo.make_page(ROOT / "nothing"), free_port()
    demo.launch(page, port)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"http://127.0.0.1:{port}") as answer:
        assert answer.status == 200
    page.close()
    assert demo.os.environ["ALL_PROXY"] == "socks5://127.0.0.1:9"


def test_a_proxy_of_another_kind_lets_gradio_be_imported():
    done = run(sys.executable, "-c", "import tools.demo", cwd=ROOT,
               env=os.environ | {"ALL_PROXY": "socks5://127.0.0.1:9"})
    assert done.returncode == 0 and not done.stdout, done.stderr


def test_a_port_that_may_not_be_used_is_a_line(monkeypatch):
    def refuse(*args):
        raise PermissionError(13, "Permission denied")

    page = demo.make_page(ROOT / "nothing")
    monkeypatch.setattr(socket.socket, "bind", refuse)
    one_line_exit(lambda: demo.launch(page, 80), "port 80 of 127.0.0.1", "--port")


def test_a_checkpoint_that_goes_while_the_page_is_open_is_asked_on(study, tmp_path):
    path = tmp_path / "mine.safetensors"
    shutil.copy(predict.find(study[0])["lora_r8"], path)
    tokenizer, methods, _ = demo.load_asked(study[0], False, None, {"mine": path})
    path.unlink()
    table, *_ = demo.ask_sentences(tokenizer, methods, "a film")
    assert table["headers"] == ["", "mine"] and len(table["data"]) == 4


def test_any_checkpoints_can_be_asked(study, tmp_path, monkeypatch, capsys):
    paths = [predict.find(study[0])[name] for name in ("lora_r8", "adapter")]
    given = [arg for path in paths for arg in ("--checkpoint", str(path))]
    port, pages = free_port(), []
    # the program would wait here for as long as the page is served
    monkeypatch.setattr(gradio.Blocks, "block_thread", lambda page: pages.append(page))
    demo.main(demo.parse_args(["--port", str(port), "--output", str(tmp_path), *given]))
    address = f"http://127.0.0.1:{port}"
    assert address in capsys.readouterr().out
    try:
        client = Client(address, verbose=False)
        names = [path.stem for path in paths]
        table, *_ = client.predict("A good film.", names, api_name="/ask")
        assert table["headers"] == ["", *names]
        _, said, _ = client.predict("Who?", "A passage.", [], api_name="/ask_passage")
        assert "no --checkpoint was trained on questions" in said
    finally:
        pages[0].close()


def test_a_checkpoint_that_does_not_fit_is_said_at_the_start(study, tmp_path):
    good = predict.find(study[0])["lora_r8"]
    bad = tmp_path / "half.safetensors"
    bad.write_bytes(good.read_bytes()[:1000])
    one_line_exit(lambda: demo.make_page(tmp_path, None, [good, bad]), "half.safetensors")
    about = read_about(good)
    save_file(read_tensors(good), bad, as_metadata(about | {"base": "another"}))
    _, methods, said = demo.load_asked(study[0], False, None, {"a": good, "b": bad})
    assert not methods and "half.safetensors was trained on another base" in said


def test_a_fresh_clone_shows_the_answer_and_its_examples_can_be_asked(tmp_path, monkeypatch):
    for name in "metrics", "figures", "examples":
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("runs"))
    monkeypatch.setattr(demo, "EXAMPLES", tmp_path / "examples")
    page, port = demo.make_page(tmp_path), free_port()
    demo.launch(page, port)
    table, *_ = Client(f"http://127.0.0.1:{port}", verbose=False).predict(
        "A wonderful film.\nA waste of time.", ["lora_r8", "bitfit"], api_name="/ask")
    labels = [[cell.split()[0] for cell in row[1:]] for row in table["data"][:2]]
    assert labels == [["positive"] * 2, ["negative"] * 2]
    config = str(page.config)
    page.close()
    assert "**Lost.**" in config and "data:image/png;base64" in config
    with pytest.raises(SystemExit):  # another folder's study is not answered by them
        demo.files_to_ask(tmp_path / "metrics", False)


def shown_results(figures):
    """What stands below Compare: the values of its components by their names."""
    with gradio.Blocks() as page:
        demo.show_results(figures)
    return {block.elem_id: block.value for block in page.blocks.values()
            if hasattr(block, "value")}


def test_the_page_shows_what_the_study_wrote(study, tmp_path):
    for figures, table, picture in ((ROOT / "figures", "answer.md", "glance.png"),
                                    (study[0] / "figures", "summary.md", "summary.png")):
        shown = shown_results(figures)
        assert list(shown) == ["glance", "verdict", "table"]
        text = (figures / table).read_text()
        assert shown["verdict"].startswith("- **") and shown["verdict"].strip() in text
        assert shown["table"].startswith("| method |") and shown["table"].strip() in text
        png = base64.b64encode((figures / picture).read_bytes()).decode()
        assert png in shown["glance"]
    said, = shown_results(tmp_path).values()
    assert "bash run_all.sh" in said


def test_an_output_without_results_ends_in_one_line(tmp_path):
    one_line_exit(lambda: demo.parse_args(["--output", str(tmp_path)]), "--output", "no folder")


def test_without_gradio_one_line_says_how_to_install_it(tmp_path):
    (tmp_path / "gradio.py").write_text("import nothing_of_this_name")
    done = run(sys.executable, "-c", f"import sys; sys.path[:0] = [{str(tmp_path)!r}, "
               f"{str(ROOT)!r}]; import tools.demo")
    line, = done.stderr.splitlines()
    assert done.returncode == 1 and "pip install -r requirements-demo.txt" in line


# --- in a browser ---------------------------------------------------------------------------------

class Browser:
    """Drive headless Chromium through chromedriver's HTTP interface (W3C WebDriver)."""

    def __init__(self):
        port = free_port()
        self.profile = tempfile.mkdtemp()
        self.driver = subprocess.Popen(["chromedriver", f"--port={port}"],
                                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.address = f"http://127.0.0.1:{port}/session"
        options = {"args": ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic",
                            "--no-first-run", "--disable-background-networking",
                            "--disable-component-update", "--disable-sync",
                            f"--user-data-dir={self.profile}"]}
        wanted = {"capabilities": {"alwaysMatch": {
            "goog:chromeOptions": options, "goog:loggingPrefs": {"performance": "ALL"}}}}
        end = time.time() + 30
        while True:
            try:
                self.address += "/" + self.send("", wanted)["sessionId"]
                return
            except OSError:
                if time.time() > end:
                    raise
                time.sleep(0.1)

    def send(self, path, body=None, method=None):
        request = urllib.request.Request(
            self.address + path, None if body is None else json.dumps(body).encode(),
            {"Content-Type": "application/json"}, method=method)
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)["value"]

    def js(self, script):
        return self.send("/execute/sync", {"script": script, "args": []})

    def wait(self, script):
        end = time.time() + 60
        while not (value := self.js(f"return {script}")):
            assert time.time() < end, script
            time.sleep(0.1)
        return value

    def cdp(self, command, **parameters):
        self.send("/goog/cdp/execute", {"cmd": command, "params": parameters})

    def quit(self):
        self.send("", method="DELETE")  # ends Chromium
        self.driver.kill()
        shutil.rmtree(self.profile, ignore_errors=True)


@pytest.fixture(scope="module")
def browser():
    if not shutil.which("chromedriver") or not shutil.which("chromium"):
        pytest.skip("Chromium is not installed")
    browser = Browser()
    yield browser
    browser.quit()


@pytest.mark.parametrize("width", [1280, 400])
def test_typing_ticking_and_reading_in_a_browser(width, browser, served, tmp_path):
    browser.cdp("Emulation.setDeviceMetricsOverride", width=width, height=900,
                deviceScaleFactor=1, mobile=width < 500)
    browser.send("/url", {"url": served[0]})
    browser.wait("!!document.querySelector('#sentences textarea')")
    text = browser.send("/element", {"using": "css selector", "value": "#sentences textarea"})
    element = f"/element/{next(iter(text.values()))}"
    browser.send(f"{element}/clear", {})
    browser.send(f"{element}/value", {"text": "A <b>typed</b> film."})
    # without the last method
    browser.js("[...document.querySelectorAll('#ask_methods input')].at(-1).click()")
    browser.js("document.querySelector('#ask').click()")
    rows = browser.wait("document.querySelector('#ask_answers').innerText.includes('ms per') && "
                        "[...document.querySelectorAll('#ask_answers [role=row]')]"
                        ".map(row => row.innerText)")
    assert "lora_r8" in rows[0] and "adapter" not in rows[0]
    assert rows[1].startswith("A <b>typed</b> film.") and "ms per sentence" in rows[2]
    # nothing is wider than the window
    assert browser.js("return document.documentElement.scrollWidth") <= width
    browser.js("[...document.querySelectorAll('button[role=tab]')].at(-1).click()")
    browser.wait("!!document.querySelector('#glance img') && "
                 "document.querySelector('#verdict').innerText.includes('LoRA r=8')")
    assert browser.js("return document.documentElement.scrollWidth") <= width
    # nor squeezed into it
    assert browser.js("return document.querySelector('#table table').offsetWidth") > 700
    asked = [json.loads(entry["message"])["message"] for entry in
             browser.send("/se/log", {"type": "performance"})]
    urls = {m["params"]["request"]["url"] for m in asked
            if m["method"] == "Network.requestWillBeSent"}
    assert urls and all(url.startswith((served[0], "data:", "blob:", "chrome")) for url in urls)
    (tmp_path / "page.png").write_bytes(base64.b64decode(browser.send("/screenshot")))
