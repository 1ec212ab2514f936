"""The page in a real browser (Debian's chromium, driven by playwright), with a sound file as its microphone:
what a person does, what is heard, and what the page says when something is wrong. Skipped, and says so, where
playwright or chromium is not installed."""
import shutil

import numpy as np
import pytest
import soundfile
from test_serve import Server

from omni.espeak import speak

sync_api = pytest.importorskip("playwright.sync_api", reason="the page is not tested: pip install playwright")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="the page is not tested: apt install chromium")
FLAGS = ["--no-sandbox", "--autoplay-policy=no-user-gesture-required", "--use-fake-device-for-media-stream"]
SOUNDS = "nanoOmni.turns.map(turn => turn.sound.reduce((n, piece) => n + piece.length, 0))"


@pytest.fixture(scope="module")
def server(tiny):
    made = Server(tiny)
    yield made
    made.server.should_exit = True
    made.thread.join()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    question = tmp_path_factory.mktemp("page") / "question.wav"
    wav = speak("What is the capital of France?", "en-us+m3:160:50")
    soundfile.write(question, np.concatenate([np.zeros(4000), wav, np.zeros(16000)]), 16000)
    with sync_api.sync_playwright() as playwright:
        flags = [*FLAGS, f"--use-file-for-fake-audio-capture={question}"]
        with playwright.chromium.launch(executable_path=CHROMIUM, args=flags) as chromium:
            yield chromium


@pytest.fixture
def page(server, browser):
    """The page, ready; a test fails if its script does."""
    context, errors = browser.new_context(permissions=["microphone"]), []
    page = context.new_page()
    page.on("pageerror", lambda e: errors.append(str(e)))
    page.goto(f"http://127.0.0.1:{server.port}/")
    ready(page)
    yield page
    context.close()
    assert not errors


def ready(page, turns=0):
    page.wait_for_function(f"nanoOmni.state() == 'ready' && nanoOmni.turns.length >= {turns}", timeout=30000)


def press(page, milliseconds):
    """Hold the button."""
    box = page.locator("#talk").bounding_box()
    page.mouse.move(box["x"] + 20, box["y"] + 10)
    page.mouse.down()
    page.wait_for_timeout(milliseconds)
    page.mouse.up()


def test_hold_to_talk(page):
    """What was held is sent, and all of the reply is played, from several pieces, as it came."""
    press(page, 1500)
    ready(page, 2)
    asked, answered = page.evaluate(SOUNDS)
    assert 1.0 < asked / 24000 < 2.0 and answered > 0
    assert page.evaluate("nanoOmni.turns[1].sound.length") > 1
    played = np.array(page.evaluate("nanoOmni.played()"))
    came = np.array(page.evaluate("nanoOmni.turns[1].sound.flatMap(piece => Array.from(piece))"))
    assert len(played) == answered and np.abs(played - came).max() < 1e-6
    assert "first sound" in page.inner_text("li.assistant small")
    assert page.locator("audio").count() == 2


def test_an_interruption_silences_at_once(page):
    """A press during a reply: nothing more is played, and the turn says that it was interrupted."""
    page.fill("#text", "Count to eleven.")
    page.click("#typed button")
    page.wait_for_function("nanoOmni.state() == 'speaking'", timeout=30000)
    press(page, 700)
    page.wait_for_function("nanoOmni.turns.length >= 4", timeout=30000)
    assert "interrupted" in page.inner_text("li.assistant small")
    ready(page, 4)
    first, second = page.evaluate(SOUNDS)[1::2]
    assert page.evaluate("nanoOmni.played().length") < first + second


def test_hands_free(page):
    """The server finds the question in what the microphone hears, and the page plays the answer."""
    page.click("#free")
    page.wait_for_function("nanoOmni.turns.length >= 2 && nanoOmni.played().length > 0", timeout=40000)
    assert page.evaluate("nanoOmni.turns[0].who") == "user"
    page.click("#free")


@pytest.mark.parametrize("name, content, words", [
    ("empty.wav", b"", "not a sound file"), ("text.wav", b"hello, this is no sound", "not a sound file"),
    ("cut.wav", b"RIFF\xff\xff\xff\x7fWAVEfmt ", "not a sound file"),
    ("a.png", b"\x89PNG", "not a sound file"), ("short.wav", 0.01, "lasts"), ("silent.wav", 0.0, "silent")])
def test_bad_files_are_named(page, tmp_path, name, content, words):
    """One clear line each, and the page goes on."""
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        wav = np.zeros(24000) if content == 0 else np.full(int(24000 * content), 0.5)
        soundfile.write(path, wav, 24000)
    page.set_input_files("#file", path)
    page.wait_for_function("document.querySelector('#hint').className == 'bad'", timeout=10000)
    assert name in page.inner_text("#hint") and words in page.inner_text("#hint")
    page.fill("#text", "Hello.")
    page.click("#typed button")
    ready(page, 2)
    assert page.inner_text("#hint") == ""


def test_a_refused_microphone_is_explained(server, browser):
    context = browser.new_context(permissions=[])
    page = context.new_page()
    page.add_init_script("navigator.mediaDevices.getUserMedia = () => "
                         "Promise.reject(new DOMException('no', 'NotAllowedError'))")
    page.goto(f"http://127.0.0.1:{server.port}/")
    ready(page)
    press(page, 300)
    page.wait_for_function("document.querySelector('#hint').className == 'bad'", timeout=10000)
    assert "microphone was refused" in page.inner_text("#hint")
    context.close()
