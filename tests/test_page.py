"""The page in a real Chromium. A scripted server sends what a test wants when the test wants it, so that
chunks, stalls and errors are exact.

They need Chromium (`apt-get install chromium`) and `pip install playwright`; where these are missing, the
tests are skipped and say so.
"""
import base64
import io
import json
import shutil
import time
import wave

import librosa
import numpy as np
import pytest
import soundfile
from conftest import ROOT

RATE = 24000
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
PAGE = ROOT / "omni" / "page.html"
JFK = ROOT / "tests" / "data" / "jfk.flac"
SITE = "http://localhost:8000"

try:
    from playwright.sync_api import sync_playwright
except ImportError:
    sync_playwright = None

pytestmark = pytest.mark.skipif(
    not (CHROMIUM and sync_playwright),
    reason="THE PAGE IS NOT TESTED: it needs `apt-get install chromium` and `pip install playwright`")


# ------------------------------------------------------------------------- a browser, a scripted server

@pytest.fixture(scope="module")
def playwright():
    with sync_playwright() as driver:
        yield driver


def launch(playwright, *flags):
    return playwright.chromium.launch(executable_path=CHROMIUM, args=[
        "--no-sandbox", "--autoplay-policy=no-user-gesture-required", *flags])


@pytest.fixture(scope="module")
def spoken(tmp_path_factory):
    """What the microphone hears: a speech, again and again for two minutes."""
    wav, rate = soundfile.read(JFK)
    path = tmp_path_factory.mktemp("mic") / "mic.wav"
    soundfile.write(path, np.tile(wav, 11), rate, subtype="PCM_16")
    return path


@pytest.fixture(scope="module")
def chromium(playwright, spoken):
    """Chromium whose microphone is a file, and which always lets a page have it."""
    browser = launch(playwright, "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream",
                     f"--use-file-for-fake-audio-capture={spoken}%noloop")
    yield browser
    browser.close()


class Script:
    """The other end of /v1/realtime, in the test's hand."""

    def __init__(self, page, site=SITE, **health):
        self.page, self.events, self.sockets, self.replies = page, [], [], 0
        self.health = {"status": "ok", "model": "tiny_stage2"} | health
        self.errors = []
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("console", lambda line: line.type == "error" and self.errors.append(line.text))
        page.route(f"{site}/**", self.serve)
        page.route_web_socket("**/v1/realtime*", self.open)
        page.goto(f"{site}/")

    def serve(self, route):
        if route.request.url.endswith("healthz"):
            route.fulfill(json=self.health)
        else:
            assert route.request.url.endswith("/"), f"the page asks for {route.request.url}"
            route.fulfill(body=PAGE.read_text(), content_type="text/html")

    def open(self, ws):
        self.sockets.append(ws)
        ws.on_message(lambda text: self.events.append(json.loads(text)))
        self.send("session.created", session={"type": "realtime"})

    def send(self, type, **fields):
        self.sockets[-1].send(json.dumps({"type": type, "event_id": "e", **fields}))

    def wait_for(self, type, count=1):
        """Let the page run until it has sent so many events of this type -> the last of them."""
        end = time.time() + 10
        while time.time() < end:
            found = [event for event in self.events if event["type"] == type]
            if len(found) >= count:
                return found[count - 1]
            self.page.wait_for_timeout(20)
        raise AssertionError(f"no {type} among {[event['type'] for event in self.events]}")

    def reply(self):
        """Begin a reply."""
        self.replies += 1
        self.ids = {"response_id": f"resp_{self.replies}", "item_id": f"item_{self.replies}",
                    "output_index": 0, "content_index": 0}
        self.send("response.created", response={"id": self.ids["response_id"]})
        self.send("response.output_item.added", **self.ids, item={"id": self.ids["item_id"]})

    def say(self, words="", sound=()):
        """words, then sound: int16 (samples,)."""
        if words:
            self.send("response.output_audio_transcript.delta", delta=words, **self.ids)
        if len(sound):
            delta = base64.b64encode(np.asarray(sound, "<i2").tobytes()).decode()
            self.send("response.output_audio.delta", delta=delta, **self.ids)

    def finish(self, status="completed"):
        self.send("response.output_audio.done", **self.ids)
        self.send("response.done", response={"id": self.ids["response_id"], "status": status})

    def state(self, name):
        """Wait until the page says that it is in this state: ready, recording, thinking, speaking, ..."""
        self.page.wait_for_selector(f"[data-state={name}]", timeout=15000)

    def hold(self, ms):
        """Press the talk button, wait, let go."""
        self.state("ready")
        box = self.page.locator("#talk").bounding_box()
        self.page.mouse.move(box["x"] + 40, box["y"] + 40)
        self.page.mouse.down()
        self.state("recording")
        self.page.wait_for_timeout(ms)
        self.page.mouse.up()
        self.wait_for("response.create")

    def ask(self):
        """Ask from a file, which is quicker than to speak."""
        self.state("ready")
        asked = sum(event["type"] == "response.create" for event in self.events)
        self.page.set_input_files("#file", upload("question.wav", wav_file(tone(0.5))))
        self.wait_for("response.create", asked + 1)

    def appended(self):
        """All sound that the page has sent, int16."""
        sound = [base64.b64decode(event["audio"]) for event in self.events
                 if event["type"] == "input_audio_buffer.append"]
        return np.frombuffer(b"".join(sound), "<i2")

    def samples(self, what, turn):
        """nanoOmni.played(turn) or .received(turn), as int16."""
        return np.array(self.page.evaluate(f"[...nanoOmni.{what}({turn})].map(x => 32768 * x)"), int)

    def facts(self, turn):
        """The line below a reply."""
        return self.page.locator(".facts").nth(turn - 1).inner_text().replace("\u00a0", " ")


@pytest.fixture
def script(chromium):
    page = chromium.new_page(viewport={"width": 1280, "height": 800})
    talk = Script(page)
    yield talk
    page.close()
    assert not talk.errors


def tone(seconds, pitch=200, loud=0.5):
    """int16 (samples,): neighboring samples differ by at most 2 pi pitch loud / 24000 of full scale."""
    t = np.arange(int(RATE * seconds)) / RATE
    return np.round(32767 * loud * np.cos(2 * np.pi * pitch * t)).astype(np.int16)


def wav_file(sound, subtype="PCM_16"):
    file = io.BytesIO()
    soundfile.write(file, sound, RATE, format="WAV", subtype=subtype)
    return file.getvalue()


def upload(name, content):
    return {"name": name, "mimeType": "audio/wav", "buffer": content}


RECORDER = """async () => {             // a second listener at the player's output
  const node = await nanoOmni.player();
  const code = `registerProcessor("tap", class extends AudioWorkletProcessor {
    process([[x]]) { if (x) this.port.postMessage(x.slice()); return true; } });`;
  await node.context.audioWorklet.addModule(URL.createObjectURL(new Blob([code], {type: "text/javascript"})));
  const tap = new AudioWorkletNode(node.context, "tap", {numberOfOutputs: 0});
  window.taped = [];
  tap.port.onmessage = ({data}) => taped.push(...data);
  node.connect(tap);
}"""


def taped(page):
    """float (samples,): everything that the loudspeaker got since RECORDER ran."""
    page.wait_for_timeout(100)
    return np.array(page.evaluate("taped"))


def position(whole, part):
    """Where `part` begins in `whole`, both int; -1 if it is nowhere."""
    return whole.astype("<i2").tobytes().find(part.astype("<i2").tobytes()) // 2


def alike(heard, source):
    """The best correlation of `heard` with `source`, shifted by anything -> up to 1."""
    n = len(heard) + len(source)
    match = np.fft.irfft(np.fft.rfft(heard, n) * np.conj(np.fft.rfft(source, n)), n)
    lag = int(match.argmax())
    if lag > len(heard):
        lag -= n                      # heard begins inside of source
    heard, source = heard[max(lag, 0):], source[max(-lag, 0):]
    both = min(len(heard), len(source))
    return match.max() / np.linalg.norm(heard[:both]) / np.linalg.norm(source[:both])


# ------------------------------------------------------------------------------------- ask and hear

def test_press_ask_hear(script):
    """Hold the button: the server gets what the microphone heard. The reply is heard and shown from its first
    piece on, and every sample of it leaves the player once, in order, with nothing in between."""
    script.page.evaluate(RECORDER)
    script.hold(2500)
    script.wait_for("input_audio_buffer.commit")
    heard = script.appended() / 32768
    assert 2.3 < len(heard) / RATE < 3.5
    source = librosa.resample(soundfile.read(JFK)[0][:5 * 16000], orig_sr=16000, target_sr=RATE)
    likeness = alike(heard, source)
    assert likeness > 0.7, f"the server got something else: {likeness:.2f}"

    sound = tone(2)
    script.reply()
    script.say("Three minus one", sound[:9600])
    script.state("speaking")
    script.page.wait_for_timeout(150)
    assert 0 < len(script.samples("played", 1)) < 9600    # heard, and the reply is far from complete
    script.say(" is two.", sound[9600:20000])
    script.say("", sound[20000:])
    script.finish()
    script.state("ready")
    assert script.page.locator(".reply .text").inner_text() == "Three minus one is two."
    assert (script.samples("played", 1) == sound).all()
    whole = np.round(32768 * taped(script.page))
    start = position(whole, sound)
    assert start >= 0, "the loudspeaker got something else than the server sent"
    assert abs(whole[start + len(sound) + 500:]).max() == 0
    assert "no stalls" in script.facts(1) and "2.00 s of speech" in script.facts(1)
    for fact in ("first text", "first audio", "real-time factor", "buffer"):
        assert fact in script.facts(1)


def test_a_stall_neither_clicks_nor_comes_twice(script):
    """A reply whose second piece is 0.6 s late, in the middle of a wave: the sound fades, goes on with no
    sample lost, and the next reply waits so long that the server does not make it stall again."""
    script.page.evaluate(RECORDER)
    sound, waits = tone(1.0), []
    for turn, late in [(1, 900), (2, 800)]:
        script.ask()
        script.reply()
        script.say("Hm.", sound[:7000])
        script.page.wait_for_timeout(late)
        script.say("", sound[7000:])
        script.finish()
        script.state("ready")
        assert (script.samples("played", turn) == sound).all()
        waits.append(script.page.evaluate(f"nanoOmni.turns()[{turn - 1}].buffer"))
    assert "1 stall ·" in script.facts(1)
    assert "no stalls" in script.facts(2)
    assert waits[0] == 40 and 500 < waits[1] < 900        # 0.9 s late, of which 0.29 s were covered by sound
    whole = taped(script.page)
    assert abs(np.diff(whole)).max() < 1.05 * 2 * np.pi * 200 * 0.5 / RATE
    script.page.click("[popovertarget=settings]")
    assert "start-up buffer\n" in script.page.locator("#facts").inner_text()


@pytest.mark.parametrize("how", ["press", "escape", "speech"])
def test_interruption(script, how):
    """Pressing, Escape and (hands-free) speech end a reply: silence within 200 ms, the reply is cancelled,
    and the server is told exactly how much was heard. What still arrives of it is not played."""
    if how == "speech":
        script.page.click("#free")
        script.state("listening")
        script.send("input_audio_buffer.speech_started", audio_start_ms=0, item_id="u1")
        script.state("recording")
        script.page.wait_for_timeout(300)
        script.send("input_audio_buffer.speech_stopped", audio_end_ms=250, item_id="u1")
        script.state("thinking")
    else:
        script.ask()
    script.page.evaluate(RECORDER)
    script.reply()
    sound = tone(5)
    script.say("A long story", sound[:96000])
    script.state("speaking")
    script.page.wait_for_timeout(500)
    script.page.evaluate("""() => {                        // samples on tape when the order to stop comes
      for (const what of ["pointerdown", "keydown"])
        addEventListener(what, () => window.order ??= taped.length, true);
      window.order = undefined;
    }""")
    if how == "press":
        box = script.page.locator("#talk").bounding_box()
        script.page.mouse.move(box["x"] + 40, box["y"] + 40)
        script.page.mouse.down()
    elif how == "escape":
        script.page.keyboard.press("Escape")
    else:
        script.page.evaluate("window.order = taped.length")
        script.send("input_audio_buffer.speech_started", audio_start_ms=900, item_id="u2")
    event = script.wait_for("conversation.item.truncate")
    script.say(" that nobody hears", sound[96000:])
    script.finish("cancelled")
    script.page.wait_for_timeout(300)
    played = script.samples("played", 1)
    assert len(played) < len(sound) / 2 and (played == sound[:len(played)]).all()
    assert event["item_id"] == "item_1" and event["audio_end_ms"] == round(len(played) / 24)
    cancelled = [e["type"] for e in script.events].count("response.cancel")
    assert cancelled == (how != "speech")                 # the server hears speech first and cancels itself
    whole, order = taped(script.page), script.page.evaluate("window.order")
    last = np.nonzero(abs(whole) > 1e-3)[0].max()
    assert last - order < 0.2 * RATE
    assert abs(np.diff(whole)).max() < 1.05 * 2 * np.pi * 200 * 0.5 / RATE       # no click
    assert script.page.locator(".text").first.inner_text() == "A long story"
    assert "interrupted at" in script.facts(1)
    if how == "press":
        script.state("recording")
        script.page.mouse.up()


def test_hands_free(script):
    """The switch tells the server to listen for speech; the page shows what it sent then,
    from half a second before the server heard it."""
    script.page.click("#free")
    script.state("listening")
    detection = script.wait_for("session.update", 2)["session"]["audio"]["input"]["turn_detection"]
    assert detection["type"] == "server_vad"
    while len(script.appended()) < RATE:
        script.page.wait_for_timeout(50)
    script.send("input_audio_buffer.speech_started", audio_start_ms=200, item_id="u")
    script.state("recording")
    script.page.wait_for_timeout(500)
    script.send("input_audio_buffer.speech_stopped", audio_end_ms=900, item_id="u")
    script.state("thinking")
    script.reply()
    script.say("Yes.", tone(0.3))
    script.finish()
    script.state("listening")
    question = np.array(script.page.evaluate("[...nanoOmni.turns()[0].question.pieces[0]]"))
    question = np.floor(32768 * question + 0.5).clip(-32768, 32767)      # as Math.round does
    assert len(question) > 0.8 * RATE and position(script.appended(), question) >= 0
    types = [event["type"] for event in script.events]
    assert "input_audio_buffer.commit" not in types and "response.create" not in types
    script.page.click("#free")
    script.state("ready")
    assert script.wait_for("session.update", 3)["session"]["audio"]["input"]["turn_detection"] is None
    sent = len(script.appended())
    script.page.wait_for_timeout(300)
    assert len(script.appended()) == sent                 # the microphone is heard no longer


def test_a_typed_question(script):
    """Where there is no microphone at hand: the server reads it to the model."""
    script.state("ready")
    script.page.fill("#typed", "What is <b>two</b> plus two?")
    script.page.keyboard.press("Enter")
    item = script.wait_for("conversation.item.create")["item"]
    assert item["content"] == [{"type": "input_text", "text": "What is <b>two</b> plus two?"}]
    script.wait_for("response.create")
    script.reply()
    script.say("Four.", tone(0.3))
    script.finish()
    script.state("ready")
    assert script.page.locator(".question").inner_text().strip() == "What is <b>two</b> plus two?"
    assert script.samples("played", 1).size == 7200 and not len(script.appended())


def test_the_real_server(chromium, tiny):
    """serve.py with a small random model: its sound comes in pieces, all of it is played, a new question
    interrupts, and it is told so in words that it accepts."""
    from test_serve import Server

    server, frames, errors = Server(tiny), [], []
    page = chromium.new_page()
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("websocket", lambda ws: ws.on("framereceived", lambda text: frames.append(json.loads(text))))
    page.goto(f"http://127.0.0.1:{server.port}/")
    page.wait_for_selector("[data-state=ready]")
    for turn in (1, 2):
        if turn == 1:
            page.hover("#talk")
            page.mouse.down()
            page.wait_for_selector("[data-state=recording]")
            page.wait_for_timeout(1000)
            page.mouse.up()
        else:
            page.set_input_files("#file", upload("question.wav", wav_file(tone(1))))
        page.wait_for_selector(".waits")
        page.wait_for_selector("[data-state=ready]", timeout=30000)
        types = [frame["type"] for frame in frames]
        assert types.count("response.done") == turn and "error" not in types
        deltas = [base64.b64decode(frame["delta"]) for frame in frames
                  if frame["type"] == "response.output_audio.delta"]
        assert len(deltas) >= 2
        sound = np.frombuffer(b"".join(deltas), "<i2")
        played = np.array(page.evaluate("[...nanoOmni.played(%d)].map(x => 32768 * x)" % turn), int)
        assert len(played) > RATE / 10 and (played == sound).all()
        text = "".join(frame["delta"] for frame in frames
                       if frame["type"] == "response.output_audio_transcript.delta")
        assert page.evaluate("nanoOmni.turns()[%d].text" % (turn - 1)) == text
        frames.clear()
        frames += [{"type": "response.done"}] * turn
    page.set_input_files("#file", upload("question.wav", wav_file(tone(1))))
    page.wait_for_selector("[data-state=speaking]")
    page.keyboard.press("Escape")
    page.wait_for_selector("[data-state=ready]")
    page.wait_for_timeout(300)
    types = [frame["type"] for frame in frames]
    assert "conversation.item.truncated" in types and not page.locator("#notice").is_visible()
    page.click("#free")                                   # voice detection is understood, too
    page.wait_for_selector("[data-state=listening]")
    page.wait_for_timeout(500)
    assert not page.locator("#notice").is_visible()
    page.close()
    server.server.should_exit = True
    server.thread.join()
    assert not errors


# ------------------------------------------------------------------------------------- what goes wrong

def header(wav, at, value):
    """A WAV file with another number in its header."""
    return wav[:at] + value.to_bytes(4, "little") + wav[at + 4:]


GOOD = wav_file(tone(0.5))
BAD = {                               # a file, and words that its message must hold
    "empty.wav": (b"", "is empty"),
    "text.wav": (b"Dear diary, today I spoke to a machine. " * 50, "not a sound"),
    "cut.wav": (GOOD[:len(GOOD) // 2], "cut off"),
    "head.wav": (GOOD[:30], "cut off"),
    "nothing.wav": (wav_file(tone(0)), "not a sound|0.00 s"),
    "huge-header.wav": (header(GOOD, 40, 0x7fffffff), "cut off"),
    "absurd-rate.wav": (header(GOOD, 24, 1), "not a sound"),
    "silent.wav": (wav_file(0 * tone(1)), "silent"),
    "short.wav": (wav_file(tone(0.05)), "0.05 s"),
    "not-numbers.wav": (wav_file(np.full(9000, np.nan, np.float32), "FLOAT"), "no sound"),
    "noise.mp3": (np.random.default_rng(0).bytes(5000), "not a sound"),
    "picture.flac": (b"\x89PNG\r\n\x1a\n" + bytes(500), "not a sound"),
    "long.wav": (wav_file(np.tile(tone(1), 61)), "61.00 s"),
}


def test_bad_files(script):
    """Each gets a message that names it and says why; the page goes on, and nothing is sent to the server."""
    for name, (content, why) in BAD.items():
        script.page.set_input_files("#file", upload(name, content))
        script.page.wait_for_function(f"document.querySelector('#notice p').textContent.startsWith('{name}')")
        message = script.page.locator("#notice p").inner_text()
        assert any(words in message for words in why.split("|")), message
    assert script.wait_for("session.update") and len(script.events) == 1
    script.ask()                                          # a good one clears the message
    assert script.page.locator("#notice").is_hidden()
    assert len(script.appended()) == 12000


def test_no_microphone(playwright):
    """Refused, missing, or a page that may not have one: words that say what to do, and files still work."""
    for flags, words in [(["--use-fake-device-for-media-stream", "--deny-permission-prompts"], "is blocked"),
                         (["--use-fake-ui-for-media-stream"], "No microphone was found")]:
        browser = launch(playwright, *flags)
        script = Script(browser.new_page())
        script.state("ready")
        script.page.click("#talk")
        script.page.wait_for_function(f"document.querySelector('#notice').textContent.includes('{words}')")
        script.ask()
        script.reply()
        script.say("Yes.", tone(0.2))
        script.finish()
        script.state("ready")
        assert script.samples("played", 1).size == 4800
        if words == "is blocked":
            script = Script(browser.new_page(), site="http://chat.example")
            script.page.wait_for_selector("text=localhost or https only")
            assert script.page.locator("#talk").is_disabled()
        browser.close()


def test_no_model(chromium):
    """Without a checkpoint the page says what to run."""
    script = Script(chromium.new_page(), status="no model", hint="there is no model in out/tiny_stage2")
    script.page.wait_for_selector("text=python serve.py --ckpt out/tiny_stage2")
    assert script.page.locator("#talk").is_disabled()
    assert not script.sockets
    script.page.close()


def test_errors_of_the_server(script):
    """An error is shown and ends the turn that it belongs to; a failed reply says why; a lost connection is
    opened again, and says that the model has forgotten."""
    script.ask()
    error = {"code": "busy", "message": "All 8 sessions are taken.", "event_id": "turn-1"}
    script.send("error", error=error)
    script.page.wait_for_selector("text=All 8 sessions are taken.")
    script.ask()
    script.send("error", error={"code": "response_cancel_not_active", "message": "of no interest"})
    script.reply()
    script.send("response.done", response={"id": script.ids["response_id"], "status": "failed",
                                           "status_details": {"error": {"message": "It broke."}}})
    script.page.wait_for_selector("text=It broke.")
    script.ask()
    script.reply()
    script.say("It", tone(3))
    script.state("speaking")
    script.sockets[-1].close()
    script.page.wait_for_selector("text=No connection to the server")
    script.state("ready")
    assert len(script.sockets) == 2
    assert script.page.locator("text=has forgotten").count() == 1
    script.ask()
    script.reply()
    script.say("Here.", tone(0.2))
    script.finish()
    script.state("ready")
    assert script.samples("played", 4).size == 4800


# ------------------------------------------------------------------------------------- the page itself

def test_the_server_says_goodbye(script):
    """Closed for a reason, which is shown; only New connects again."""
    script.state("ready")
    script.sockets[-1].close(code=1008, reason="silent for too long")
    script.page.wait_for_selector("text=silent for too long")
    script.page.wait_for_timeout(1500)
    assert len(script.sockets) == 1
    script.page.click("#new")
    script.state("ready")
    assert script.page.locator("#notice").is_hidden() and len(script.sockets) == 2


def test_keyboard_and_screen_reader(script):
    """Space holds, Enter begins and ends, each control has a name, and the reply is announced."""
    page = script.page
    script.state("ready")
    page.keyboard.down("Space")
    script.state("recording")
    page.wait_for_timeout(600)
    page.keyboard.up("Space")
    script.wait_for("response.create")
    script.reply()
    script.say("One.", tone(0.2))
    script.finish()
    script.state("ready")
    page.focus("#talk")
    page.keyboard.press("Enter")
    script.state("recording")
    page.wait_for_timeout(600)
    assert "Tap again" in page.locator("#hint").inner_text()
    page.keyboard.press("Enter")
    script.wait_for("response.create", 2)
    script.reply()
    script.say("Two.", tone(0.2))
    script.finish()
    script.state("ready")
    nameless = page.evaluate("""() => [...document.querySelectorAll("button, input")].filter(e =>
      !(e.getAttribute("aria-label") || e.textContent.trim() || e.labels?.length)).map(e => e.outerHTML)""")
    assert nameless == []
    assert page.locator(".text[aria-live=polite]").count() == 2
    page.focus("[aria-label='Play reply 2']")
    page.keyboard.press("Space")                          # another button keeps its space bar
    page.wait_for_selector("[aria-label='Pause reply 2']")
    page.wait_for_selector("[aria-label='Play reply 2']")
    assert page.locator("article").count() == 2


@pytest.mark.parametrize("width", [390, 768, 1280])
def test_fits(chromium, width):
    """Nothing is wider than the window, neither in a conversation nor with a message."""
    page = chromium.new_page(viewport={"width": width, "height": 844})
    script = Script(page)
    for _ in range(3):
        script.ask()
        script.reply()
        script.say("A reply of some length, as they come, with honorificabilitudinitatibus.", tone(0.2))
        script.finish()
    script.state("ready")
    page.set_input_files("#file", upload("w" * 90 + ".wav", b"x"))
    page.wait_for_selector("#notice:not([hidden])")
    wide = page.evaluate("""() => [...document.querySelectorAll("body *:not(.unseen)")].filter(e => {
      const box = e.getBoundingClientRect();
      return box.width && !e.closest("svg") && (box.right > innerWidth + 1 || box.left < -1);
    }).map(e => e.outerHTML.slice(0, 200))""")
    assert wide == []
    assert page.evaluate("$('log').scrollWidth <= $('log').clientWidth")
    page.close()


def test_save_and_start_again(script):
    """The dialogue as a WAV file and as JSON; a new conversation is a new session with an empty page."""
    page = script.page
    script.ask()
    script.reply()
    script.say("Two.", tone(0.4))
    script.finish()
    script.state("ready")
    page.click("[popovertarget=saving]")
    with page.expect_download() as download:
        page.click("#wav")
    with wave.open(download.value.path().open("rb")) as file:
        assert file.getparams()[:3] == (1, 2, RATE)
        sound = np.frombuffer(file.readframes(10 ** 9), "<i2")
    gap = np.zeros(12000, np.int16)
    assert abs(sound - np.concatenate([tone(0.5), gap, tone(0.4), gap]).astype(int)).max() <= 1
    with page.expect_download() as download:
        page.click("#json")
    saved = json.loads(download.value.path().read_text())
    assert saved["server"]["model"] == "tiny_stage2"
    assert saved["turns"][0]["reply"] == "Two." and saved["turns"][0]["reply_seconds"] == 0.4
    assert 0 <= saved["turns"][0]["first_text_ms"] <= saved["turns"][0]["first_audio_ms"]
    page.keyboard.press("Escape")
    page.click("#new")
    page.wait_for_selector("#welcome:not([hidden])")
    script.state("ready")
    assert len(script.sockets) == 2 and page.locator("article").count() == 0
    page.click("[popovertarget=settings]")
    page.fill("#temperature", "0.8")
    page.dispatch_event("#temperature", "change")
    while script.events[-1]["session"]["temperature"] != 0.8:
        page.wait_for_timeout(50)
