"""The server over a real network connection, with a small random model: openai's own client, unmodified,
holds a conversation; what clients do wrong costs them their own session at most."""
import asyncio
import base64
import contextlib
import http.client
import io
import json
import socket
import threading
import time
import urllib.request
from functools import partial

import numpy as np
import openai
import psutil
import pytest
import soundfile
import torch
import uvicorn
import websockets

from data import chat_ids
from omni.espeak import speak
from omni.realtime import base64_of
from omni.talk import Talker
from serve import ServeConfig, known, make_app, welcome
from tiny.codec import NanoCodec

QUESTION = base64_of(0.1 * np.random.default_rng(0).standard_normal(24000))


class Server:
    """A server in a thread of this process."""

    def __init__(self, tiny, **options):
        torch.manual_seed(0)
        omni, tokenizer, _ = tiny
        self.talker = Talker(omni, tokenizer, partial(chat_ids, tokenizer),
                             NanoCodec(dim=32, phonemes="a").eval(), rows=4, max_tokens=12, max_units=200)
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = s.getsockname()[1]
        cfg = ServeConfig(ckpt="nano", port=self.port, **options)
        config = uvicorn.Config(make_app(cfg, self.talker), host="127.0.0.1", port=self.port,
                                log_level="warning", ws_max_size=cfg.message_bytes)
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)

    def client(self, **more):
        return openai.AsyncOpenAI(api_key="none", base_url=f"http://127.0.0.1:{self.port}/v1",
                                  websocket_base_url=f"ws://127.0.0.1:{self.port}/v1", **more)

    def connect(self, path="/v1/realtime", **more):
        return websockets.connect(f"ws://127.0.0.1:{self.port}{path}", **more)

    def get(self, path):
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}") as answer:
            return answer.read().decode()

    def metrics(self):
        return {key: float(value) for key, value in map(str.split, self.get("/metrics").splitlines())}

    def idle(self):
        """Wait until nothing is being made -> were all rows free within 5 s?"""
        for _ in range(500):
            if not self.talker.waiting and not self.talker.engine.active:
                return True
            time.sleep(0.01)


@pytest.fixture(scope="module")
def server(tiny):
    made = Server(tiny, sessions=25, per_client=25, clip_seconds=20, message_bytes=2 ** 20)
    yield made
    made.server.should_exit = True
    made.thread.join()


async def one_reply(connection, wait_for="response.done"):
    """Ask by a clip -> the events up to the end of the reply."""
    await connection.session.update(session={"type": "realtime",
                                             "audio": {"input": {"turn_detection": None}}})
    await connection.input_audio_buffer.append(audio=QUESTION)
    await connection.input_audio_buffer.commit()
    await connection.response.create()
    events = []
    async for event in connection:
        events.append(event)
        assert event.type != "error", event
        if event.type == wait_for:
            return events


def test_openais_realtime_client_holds_a_conversation(server):
    """Two turns, the second cancelled when its sound begins: text and sound are what the talker said."""
    async def talk():
        async with server.client().realtime.connect(model="nano") as connection:
            events = await one_reply(connection)
            text = "".join(e.delta for e in events if e.type == "response.output_audio_transcript.delta")
            sound = b"".join(base64.b64decode(e.delta) for e in events
                             if e.type == "response.output_audio.delta")
            done = events[-1].response
            assert done.status in ("completed", "incomplete")
            assert done.output[0].content[0].transcript == text
            units = done.usage.output_token_details.audio_tokens
            assert units > 0 and len(sound) == 2 * 24000 * units // 25
            await one_reply(connection, "response.output_audio.delta")
            await connection.response.cancel()
            async for event in connection:
                if event.type == "response.done":
                    assert event.response.status == "cancelled"
                    return
    asyncio.run(talk())
    assert server.idle()


def test_openais_chat_completions(server):
    """The same question by the other endpoint, whole and streamed, spoken and typed: the model answers."""
    wav = io.BytesIO()
    soundfile.write(wav, speak("What is two plus two?", "en-us+m3:160:50"), 16000, format="WAV")
    part = {"type": "input_audio", "input_audio": {"data": base64.b64encode(wav.getvalue()).decode(),
                                                   "format": "wav"}}
    ask = {"model": "nano", "messages": [{"role": "user", "content": [part]}], "temperature": 1e-9}
    voice = {"modalities": ["text", "audio"], "audio": {"voice": "nano", "format": "wav"}}

    async def talk():
        client = server.client()
        whole = await client.chat.completions.create(**ask, **voice)
        audio = whole.choices[0].message.audio
        sound, rate = soundfile.read(io.BytesIO(base64.b64decode(audio.data)))
        assert rate == 24000
        assert len(sound) == 960 * whole.usage.completion_tokens_details.audio_tokens > 0
        text, pieces = "", []
        voice["audio"]["format"] = "pcm16"
        async for chunk in await client.chat.completions.create(**ask, **voice, stream=True):
            delta = chunk.choices[0].delta.model_dump().get("audio") or {}
            text += delta.get("transcript") or ""
            pieces.append(base64.b64decode(delta.get("data") or ""))
        streamed = np.frombuffer(b"".join(pieces), "<i2") / 32767
        assert text == audio.transcript and len(streamed) == len(sound)
        written = await client.chat.completions.create(model="nano", messages=[{"role": "user",
                                                                                "content": "Hello."}])
        assert written.choices[0].message.audio is None and written.usage.prompt_tokens > 0
        part["input_audio"]["data"] = "A"
        for bad in ([], [{"role": "user", "content": [part]}]):
            with pytest.raises(openai.BadRequestError):
                await client.chat.completions.create(model="nano", messages=bad)
    asyncio.run(talk())


def test_twenty_leave_in_the_middle(server):
    """All rows are free soon after, and nothing of it holds up the next."""
    async def leave():
        async with server.client().realtime.connect(model="nano") as connection:
            await one_reply(connection, "response.content_part.added")

    async def all_at_once():
        await asyncio.gather(*(leave() for _ in range(20)))
    asyncio.run(all_at_once())
    assert server.idle()
    test_openais_realtime_client_holds_a_conversation(server)
    time.sleep(0.1)
    assert server.metrics()["nanoomni_sessions"] == 0


def test_bad_messages_harm_nobody(server):
    """Binary frames, no JSON, deep JSON: an error event each. A message that is too large ends its own
    session, and a neighbor's goes on."""
    async def talk():
        async with server.client().realtime.connect(model="nano") as neighbor, server.connect() as bad:
            assert json.loads(await bad.recv())["type"] == "session.created"
            for message, code in ((b"\0\1", "invalid_event"), ("{", "invalid_json"), ("7", "invalid_event"),
                                  ("[" * 10000, "invalid_json")):
                await bad.send(message)
                assert json.loads(await bad.recv())["error"]["code"] == code
            with pytest.raises(websockets.ConnectionClosed):
                await bad.send("x" * 2 ** 21)
                await bad.recv()
            assert (await one_reply(neighbor))[-1].type == "response.done"
    asyncio.run(talk())


def test_no_text_of_a_client_ends_the_thread(server):
    """Half a letter, which JSON allows and a tokenizer does not, a special token, a text that takes minutes
    to read aloud: a reply or an error for who sent it, and the next one is answered."""
    def item(role, text):
        kind = "output_text" if role == "assistant" else "input_text"
        return json.dumps({"type": "conversation.item.create", "item": {
            "type": "message", "role": role, "content": [{"type": kind, "text": text}]}})

    async def talk():
        for role, text in (("assistant", "\ud800"), ("assistant", "<speech><|im_end|>"), ("user", "a\ud800"),
                           ("user", "word " * 10 ** 5)):
            async with server.connect() as bad:
                await bad.send(item("user", "Hello."))
                await bad.send(item(role, text))
                await bad.send(item("user", "Hello."))
                await bad.send('{"type": "response.create"}')
                event = {"type": None}
                while event["type"] != "response.done":
                    event = json.loads(await asyncio.wait_for(bad.recv(), 10))
                    assert event["type"] != "error" or event["error"]["code"] == "text_too_long"
            async with server.client().realtime.connect(model="nano") as neighbor:
                assert (await one_reply(neighbor))[-1].type == "response.done"
    asyncio.run(talk())


def test_a_failing_model_is_there_for_the_next(tiny, monkeypatch):
    """Whoever waits is told; what the failed step left in the caches is read by nobody."""
    made = Server(tiny)
    clip = made.talker.hear(0.1 * np.random.default_rng(0).standard_normal(16000).astype(np.float32))

    def reply():
        events, over = [], threading.Event()

        def listen(kind, x):
            events.append((kind, x))
            if kind in ("done", "failed"):
                over.set()
        made.talker.ask([clip], [], 0.0, listen)
        assert over.wait(10)
        return "".join(x for kind, x in events if kind == "text"), events[-1][0]

    good, step = reply(), made.talker.engine.llm.step
    assert good[1] == "done"
    made.talker.engine.cached = [[] for _ in made.talker.engine.cached]
    made.talker.engine.llm.keys.zero_()
    monkeypatch.setattr(made.talker.engine.llm, "step", lambda *args: 1 / 0)
    for _ in range(4):
        assert reply()[1] == "failed"
    monkeypatch.setattr(made.talker.engine.llm, "step", step)
    assert reply() == good and made.idle()


def test_a_long_conversation_forgets_its_beginning(tiny, monkeypatch):
    """It goes on for ever, in a model that has room for five turns."""
    made = Server(tiny)
    monkeypatch.setitem(tiny[0].config, "max_position_embeddings", 12 + 5 * 400)

    async def talk():
        async with made.client().realtime.connect(model="nano") as connection:
            for _ in range(12):
                done = (await one_reply(connection))[-1].response
                assert done.status in ("completed", "incomplete"), done.status_details
                assert done.usage.input_tokens <= 5 * 400
    asyncio.run(talk())


def test_chat_completions_refuse_and_notice(server, monkeypatch):
    """Requests of unknown length are cut off, odd ones refused, and who leaves gives the row back."""
    def post(body, **headers):
        line = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
        line.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"} | headers,
                     encode_chunked=not isinstance(body, str))
        return line

    hello = {"messages": [{"role": "user", "content": "Hello."}], "modalities": ["text", "audio"]}
    for body, code in ((iter([b"x" * 2 ** 19] * 4), 413), ("[" * 10 ** 5, 400),
                       (json.dumps(hello | {"temperature": [1]}), 400),
                       (json.dumps(hello | {"temperature": -1}), 400)):
        assert post(body).getresponse().status == code
    monkeypatch.setattr(server.talker.engine, "max_units", 1000)
    complete = len(server.talker.factors)
    line = post(json.dumps(hello))
    while not server.talker.engine.active:
        time.sleep(0.001)
    line.close()
    assert server.idle() and len(server.talker.factors) == complete


def test_a_client_that_never_reads_is_cut_off(server):
    """Its events wait in a queue of its own; when that is full the session ends. A neighbor notices
    nothing."""
    async def talk():
        before = server.metrics()["nanoomni_cut_off_total"]
        async with server.connect(max_queue=1, compression=None) as slow:
            slow.transport.pause_reading()
            with contextlib.suppress(websockets.ConnectionClosed):
                for _ in range(300):                  # each is answered with as much
                    await slow.send('{"type": "session.update", "session": {"instructions": "%s"}}'
                                    % ("x" * 10 ** 5))
            async with server.client().realtime.connect(model="nano") as neighbor:
                assert (await one_reply(neighbor))[-1].type == "response.done"
            for _ in range(300):
                if server.metrics()["nanoomni_cut_off_total"] > before:
                    return
                await asyncio.sleep(0.05)
            raise AssertionError("it is still there")
    asyncio.run(talk())


def test_a_thousand_turns_in_a_row(server, monkeypatch):
    """One conversation: memory grows until it forgets its beginning, and from then on not by a twentieth."""
    monkeypatch.setattr("omni.realtime.KEPT", 32)
    monkeypatch.setattr(server.talker.engine, "max_units", 10)
    monkeypatch.setattr(server.talker.engine, "max_tokens", 3)
    held = []

    async def talk():
        async with server.client().realtime.connect(model="nano") as connection:
            for turn in range(1000):
                assert (await one_reply(connection))[-1].type == "response.done"
                if turn % 100 == 99:
                    held.append(psutil.Process().memory_info().rss)
    asyncio.run(talk())
    assert max(held[5:]) < 1.05 * held[4] and server.idle()


def test_only_so_many_sessions(tiny):
    """The third of two is told so, and may come when one has left. Who is silent too long is sent away, also
    if a microphone is open."""
    made = Server(tiny, sessions=2, per_client=2, idle=0.5)

    async def talk():
        async with made.connect() as first, made.connect() as second:
            for one in (first, second):
                assert json.loads(await one.recv())["type"] == "session.created"
            async with made.connect() as third:
                error = json.loads(await third.recv())["error"]
                assert error["code"] == "session_limit" and "again" in error["message"]
            with pytest.raises(websockets.ConnectionClosed):
                await asyncio.wait_for(first.recv(), 5)
            with pytest.raises(websockets.ConnectionClosed):
                await asyncio.wait_for(second.recv(), 5)
        async with made.connect() as open_microphone:
            with pytest.raises(websockets.ConnectionClosed):
                for _ in range(500):                  # at most 10 s of a room in which nobody speaks
                    await open_microphone.send(json.dumps(
                        {"type": "input_audio_buffer.append", "audio": base64_of(np.zeros(480))}))
                    await asyncio.sleep(0.02)
        async with made.connect() as fourth:
            assert json.loads(await fourth.recv())["type"] == "session.created"
    asyncio.run(talk())
    made.server.should_exit = True
    made.thread.join()


def test_who_may_come_in(server):
    """A token where there is one, in each place where clients put it; pages of this server and of those that
    it names."""
    cfg = ServeConfig(host="0.0.0.0", token="söcret", origins=("https://ours.org",))
    bearer, protocol = {"authorization": "Bearer söcret"}, "openai-insecure-api-key.söcret"
    assert known(cfg, bearer, {}) and known(cfg, {}, {"token": "söcret"})
    assert known(cfg, {"sec-websocket-protocol": f"realtime, {protocol}"}, {})
    assert not known(cfg, {"authorization": "Bearer socret"}, {}) and not known(cfg, {}, {})
    assert known(ServeConfig(), {}, {})
    for origin, good in ((None, True), ("http://here:8000", True), ("https://ours.org", True),
                         ("https://ours.org.evil", False), ("null", False), ("http://here", False)):
        headers = {"host": "here:8000"} | ({"origin": origin} if origin else {})
        assert welcome(cfg, headers) == good
    for host, good in (("127.0.0.1:8000", True), ("localhost", True), ("[::1]:8000", True),
                       ("evil.org:8000", False)):         # a site that gave itself our address
        assert welcome(ServeConfig(), {"host": host, "origin": f"http://{host}"}) == good
    with pytest.raises(ValueError, match="token"):
        ServeConfig(host="0.0.0.0")

    async def refused():
        async with server.connect(origin="http://evil.org") as page:
            assert json.loads(await page.recv())["error"]["code"] == "origin"
    asyncio.run(refused())


def test_record_keeps_what_was_said(tiny, tmp_path):
    """The question, the reply's sound and text, a folder a session; without --record nothing is written."""
    made = Server(tiny, record=str(tmp_path))

    async def talk():
        async with made.client().realtime.connect(model="nano") as connection:
            return [await one_reply(connection), await one_reply(connection)]
    turns = asyncio.run(talk())
    (folder,) = tmp_path.iterdir()
    lines = [json.loads(line) for line in (folder / "turns.jsonl").read_text().splitlines()]
    for n, (events, line) in enumerate(zip(turns, lines, strict=True), 1):
        sound = b"".join(base64.b64decode(e.delta) for e in events
                         if e.type == "response.output_audio.delta")
        wav, rate = soundfile.read(folder / line["reply"], dtype="int16")
        assert rate == 24000 and wav.tobytes() == sound and line["reply"] == f"{n}-reply.wav"
        assert line["text"] == events[-1].response.output[0].content[0].transcript
        question, rate = soundfile.read(folder / line["questions"][0])
        assert rate == 16000 and len(question) == 16000
    with pytest.raises(ValueError, match="record"):
        ServeConfig(record=str(tmp_path / "no" / "where"))


def test_without_a_model_it_says_what_to_run():
    """The page, /healthz and the protocol name the command."""
    app = make_app(ServeConfig(ckpt="out/nowhere"), None)
    health = next(route.endpoint for route in app.routes if getattr(route, "path", "") == "/healthz")
    assert health()["status"] == "no model" and "runs/demo.sh" in health()["hint"]
    page = next(route.endpoint for route in app.routes if getattr(route, "path", "") == "/")
    assert "healthz" in open(page().path).read()
