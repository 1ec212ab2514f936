"""
Talk to a trained model: a page for people, and the protocol that voice clients already speak.

Why: a spoken chatbot is for talking. This serves any checkpoint, for many conversations at once.

How: python serve.py --ckpt out/tiny_stage2            then open http://127.0.0.1:8000
     any client of OpenAI's Realtime API               ws://127.0.0.1:8000/v1/realtime
     any client of its chat completions                http://127.0.0.1:8000/v1/chat/completions
     GET /healthz, GET /metrics                        for whoever watches it
It listens on this machine only; for others give --host and --token. Nothing that is said is kept, unless
--record names a folder.
The protocol is in omni/realtime.py, the thread that owns the model in omni/talk.py; here is what is between
them and the network.
"""
import asyncio
import base64
import io
import json
import os
import secrets
import statistics
import time
from collections import Counter
from dataclasses import dataclass
from functools import partial

import accelerate
import numpy as np
import soundfile
import soxr
import torch
import uvicorn
from fastapi import FastAPI, HTTPException, Request, WebSocket, WebSocketDisconnect
from fastapi.responses import FileResponse, PlainTextResponse, StreamingResponse

from data import chat_ids
from omni import checkpoint
from omni.audio import MIN_SECONDS, SAMPLE_RATE
from omni.codec import load_codec
from omni.configure import configure, fail
from omni.engine import quicken
from omni.espeak import speak
from omni.realtime import RATE, Refused, Session, base64_of, clean, merge, new_id
from omni.talk import Talker

PAGE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "omni", "page.html")
READER = "en-us+m3:160:50"             # espeak-ng's voice that reads typed questions to the model
FORMATS = {"wav": "WAV", "flac": "FLAC", "mp3": "MP3", "opus": "OGG"}     # of chat completions, beside pcm16
LOCAL = ("127.0.0.1", "localhost", "::1", "[::1]")
SLOW, BACKLOG = 10, 4 * 2 ** 20        # seconds in which a client must take an event; bytes that may wait


@dataclass(frozen=True)
class ServeConfig:
    ckpt: str = "out/tiny_stage2"      # a run's folder, a checkpoint, or hf:owner/name on the hub
    codec: str = "tiny/codec.pt"       # units -> waveform: a file, or a folder like ICTNLP/cosy2_decoder
    voice: str | None = None           # CosyVoice 2: a clip, a .npy or .pt vector, or a name in spk2info.pt
    host: str = "127.0.0.1"            # where to listen; 0.0.0.0: to everybody, which needs a token
    port: int = 8000
    token: str | None = None           # what clients must know: as API key, or ?token= in the page's address
    origins: tuple[str, ...] = ()      # other sites whose pages may connect, such as https://example.org
    rows: int = 8                      # replies that are made at once; others wait
    sessions: int = 32                 # conversations at once ...
    per_client: int = 16               # ... and of one address
    idle: float = 300.0                # seconds after which a silent client is sent away
    session_seconds: float = 3600.0    # longest conversation
    clip_seconds: int = 60             # longest question
    message_bytes: int = 8 * 2 ** 20   # largest message
    max_units: int = 1024              # longest reply, in units of 40 ms
    record: str | None = None          # keep what is said, in this folder; none: nothing is kept

    def __post_init__(self):
        if self.host not in LOCAL and not self.token:
            raise ValueError(f"host {self.host} lets other machines in; give a --token that they must know")
        if min(self.rows, self.sessions, self.per_client, self.clip_seconds, self.max_units) < 1:
            raise ValueError("rows, sessions, per_client, clip_seconds and max_units must be at least 1")
        if min(self.idle, self.session_seconds) <= 0:
            raise ValueError("idle and session_seconds must be above zero")
        if self.record and not os.access(os.path.dirname(os.path.abspath(self.record)), os.W_OK):
            raise ValueError(f"record {self.record} cannot be made; give a folder in one that can be written")


def silero(threshold, silence_ms):
    """silero-vad for one stream, as omni/realtime.py wants it."""
    import silero_vad  # here, because it sets torch to one thread

    model = silero_vad.load_silero_vad(onnx=True)
    found = silero_vad.VADIterator(model, threshold, SAMPLE_RATE, silence_ms)
    return lambda frame: found(torch.from_numpy(frame))


def read_aloud(text):
    return speak(text, READER).astype(np.float32)


# ------------------------------------------------------------------------------------------- who may come in

def known(cfg, headers, query):
    """Does a client know the token? It comes as an API key, as browsers' subprotocol, or in the address."""
    if not cfg.token:
        return True
    offered = [query.get("token", ""), headers.get("authorization", "").removeprefix("Bearer ")]
    for protocol in headers.get("sec-websocket-protocol", "").split(","):
        offered.append(protocol.strip().removeprefix("openai-insecure-api-key."))
    return any(secrets.compare_digest(word.encode(), cfg.token.encode()) for word in offered)


def welcome(cfg, headers):
    """May the page that connects do so? Only ours, and those of `origins`: browsers say whose page it is.
    Without a token ours is at a name of this machine, or a stranger's site could give itself our address."""
    origin, host = headers.get("origin"), headers.get("host", "").rpartition(":")
    name = host[0] if host[2].isdecimal() else "".join(host)
    if origin is not None and origin not in cfg.origins and not cfg.token and name not in LOCAL:
        return False
    return origin is None or origin in cfg.origins or origin.split("//")[-1] == headers.get("host")


# ------------------------------------------------------------------------------------------------ the server

def make_app(cfg, talker):
    """The web server. talker: None if there is no model yet, and then it says so."""
    app = FastAPI(title="nanoOmni", docs_url=None, redoc_url=None, openapi_url=None)
    sessions, counts = Counter(), Counter()           # by address; what has happened
    name = os.path.basename(os.path.normpath(cfg.ckpt))
    missing = f"there is no model in {cfg.ckpt}; train one with `bash runs/demo.sh`"

    @app.get("/")
    def page():
        return FileResponse(PAGE) if os.path.exists(PAGE) else PlainTextResponse("omni/page.html is missing")

    @app.get("/healthz")
    def health():
        return {"status": "ok" if talker else "no model", "model": name, "hint": None if talker else missing}

    @app.get("/metrics")
    def metrics():
        lines = {"sessions": sum(sessions.values()), "sessions_total": counts["sessions"],
                 "refusals_total": counts["refused"], "cut_off_total": counts["cut off"]}
        if talker:
            lines |= {"rows_in_use": len(talker.engine.active), "replies_waiting": talker.waiting,
                      "replies_total": counts["replies"]}
            for key, values in (("first_audio_seconds", talker.first_audio),
                                ("real_time_factor", talker.factors)):
                if values:
                    lines[f"{key}_median"] = statistics.median(values)
                    lines[f"{key}_95"] = float(np.quantile(values, 0.95))
        return PlainTextResponse("".join(f"nanoomni_{key} {value}\n" for key, value in lines.items()))

    @app.websocket("/v1/realtime")
    async def realtime(socket: WebSocket):
        address = socket.client.host if socket.client else ""
        refusal = None
        if not known(cfg, socket.headers, socket.query_params):
            refusal = "invalid_api_key", "this server wants a token, as API key"
        elif not welcome(cfg, socket.headers):
            refusal = "origin", "pages of other sites may not connect; the server's --origins allows some"
        elif not talker:
            refusal = "no_model", missing
        elif sum(sessions.values()) >= cfg.sessions or sessions[address] >= cfg.per_client:
            refusal = "session_limit", "too many conversations at once; try again in a few seconds"
        protocols = [p.strip() for p in socket.headers.get("sec-websocket-protocol", "").split(",")]
        await socket.accept(subprotocol="realtime" if "realtime" in protocols else None)
        if refusal:
            counts["refused"] += 1
            error = {"type": "server_error", "code": refusal[0], "message": refusal[1], "param": None,
                     "event_id": None}
            await socket.send_text(json.dumps({"type": "error", "event_id": new_id("event"), "error": error}))
            await socket.close(1013 if refusal[0] == "session_limit" else 1008, refusal[1])
            return
        counts["sessions"] += 1
        sessions[address] += 1
        try:
            await converse(socket)
        finally:
            sessions[address] -= 1
            if not sessions[address]:
                del sessions[address]

    async def converse(socket):
        """One session: what the client sends goes in, what it is to hear goes out through a queue."""
        loop, waiting, late, size = asyncio.get_running_loop(), asyncio.Queue(), asyncio.Event(), 0

        def send(event):
            nonlocal size
            text = json.dumps(event)
            size += len(text)
            waiting.put_nowait(text)
            if record:
                record.sent(event)
            if size > BACKLOG:                        # the client does not keep up
                late.set()

        def ask(clips, texts, temperature, listen, speak):
            counts["replies"] += 1
            return talker.ask(clips, texts, temperature,
                              lambda *event: loop.call_soon_threadsafe(listen, *event), speak)

        async def deliver():
            nonlocal size
            while True:
                text = await waiting.get()
                await asyncio.wait_for(socket.send_text(text), SLOW)
                size -= len(text)

        async def receive():
            while True:
                rest = cfg.idle - (time.monotonic() - session.last_seen)      # an open microphone is no sign
                message = await asyncio.wait_for(socket.receive(), rest)
                if message["type"] == "websocket.disconnect":
                    return
                if message.get("text") is None:
                    session.error("invalid_event", "events are JSON texts, not binary frames")
                    continue
                try:
                    event = json.loads(message["text"])
                except (ValueError, RecursionError):
                    session.error("invalid_json", "this is not JSON")
                    continue
                session.receive(event)

        def hear(wav):
            if record:
                record.heard(wav)
            return talker.hear(wav)

        record = Record(cfg.record) if cfg.record else None
        session = Session(send, hear, ask, talker.cancel, name, read_aloud, silero, cfg.clip_seconds)
        tasks = [asyncio.create_task(part) for part in (receive(), deliver(), late.wait())]
        try:
            done, _ = await asyncio.wait(tasks, timeout=cfg.session_seconds,
                                         return_when=asyncio.FIRST_COMPLETED)
            if tasks[0] not in done or isinstance(tasks[0].exception(), TimeoutError):
                counts["cut off"] += 1
                await asyncio.wait_for(socket.close(1008, "too slow, silent for too long, or at its end"), 1)
        except (RuntimeError, TimeoutError, WebSocketDisconnect):
            pass                                      # it has gone already
        finally:
            session.close()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    @app.post("/v1/chat/completions")
    async def complete(request: Request):
        if not known(cfg, request.headers, request.query_params) or not welcome(cfg, request.headers):
            raise HTTPException(401, "this server wants its token as API key, and pages of its own only")
        if not talker:
            raise HTTPException(503, missing)
        if talker.waiting >= cfg.sessions:
            counts["refused"] += 1
            raise HTTPException(429, "too many replies at once; try again in a second", {"Retry-After": "1"})
        data = b""
        async for piece in request.stream():          # not every client says how long its request is
            data += piece
            if len(data) > cfg.message_bytes:
                raise HTTPException(413, f"a request has at most {cfg.message_bytes} bytes")
        try:
            body = json.loads(data)
            clips, texts = merge(read_messages(cfg, talker, body))
            form = wanted_format(body)
            temperature = Session.temperature(body, 0.3)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as e:
            raise HTTPException(400, f"not a request that this server knows: {e}") from None
        except Refused as e:
            raise HTTPException(400, e.args[1]) from None
        loop, events = asyncio.get_running_loop(), asyncio.Queue()
        question = talker.ask(clips, texts, temperature,
                              lambda *event: loop.call_soon_threadsafe(events.put_nowait, event), bool(form))
        counts["replies"] += 1
        reply = Completion(body.get("model") or name, form)
        if body.get("stream"):
            return StreamingResponse(reply.stream(talker, question, events), media_type="text/event-stream")
        answer = asyncio.ensure_future(reply.whole(talker, question, events))
        gone = asyncio.ensure_future(left(request))
        await asyncio.wait([answer, gone], return_when=asyncio.FIRST_COMPLETED)
        gone.cancel()
        if not answer.done():                         # nobody waits for it: its row is for others
            answer.cancel()
            raise HTTPException(499, "the client has left")
        return answer.result()

    return app


class Record:
    """What was said in a session, on disk: WAV files, and turns.jsonl with a line for each reply. Names are
    made here; none comes from a client."""

    def __init__(self, folder):
        self.folder = os.path.join(folder, time.strftime("%Y%m%d-%H%M%S-") + secrets.token_hex(4))
        os.makedirs(self.folder)
        self.clips, self.replies, self.questions, self.sound = 0, 0, [], b""

    def heard(self, wav):
        """A clip of the user (n,) at 16 kHz."""
        self.clips += 1
        self.questions.append(f"{self.clips}-question.wav")
        soundfile.write(os.path.join(self.folder, self.questions[-1]), np.clip(wav, -1, 1), SAMPLE_RATE)

    def sent(self, event):
        if event["type"] == "response.output_audio.delta":
            self.sound += base64.b64decode(event["delta"])
        if event["type"] != "response.done":
            return
        self.replies += 1
        line = {"questions": self.questions, "status": event["response"]["status"], "text": "", "reply": None}
        for item in event["response"]["output"]:
            line["text"] = item["content"][0].get("transcript") or item["content"][0].get("text", "")
        if self.sound:
            line["reply"] = f"{self.replies}-reply.wav"
            pcm = np.frombuffer(self.sound, "<i2")
            soundfile.write(os.path.join(self.folder, line["reply"]), pcm, RATE)
        with open(os.path.join(self.folder, "turns.jsonl"), "a") as file:
            file.write(json.dumps(line) + "\n")
        self.questions, self.sound = [], b""


# ------------------------------------------------------------------------------------------ chat completions

async def left(request):
    """Wait until the client has closed its connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def read_messages(cfg, talker, body):
    """The messages of a request -> [("user", log-mel) or ("assistant", text)]."""
    turns = []
    for message in body["messages"]:
        parts = message.get("content") or ""
        if isinstance(parts, str):
            parts = [{"type": "text", "text": parts}]
        if message["role"] == "assistant":
            turns.append(("assistant", clean(" ".join(part["text"] for part in parts))))
        elif message["role"] == "user":
            for part in parts:
                if part["type"] == "input_audio":
                    data = base64.b64decode(part["input_audio"]["data"], validate=True)
                    wav, rate = read_sound(data)
                    wav = soxr.resample(wav, rate, SAMPLE_RATE)
                else:
                    wav = read_aloud(clean(part["text"]))
                if not MIN_SECONDS <= len(wav) / SAMPLE_RATE <= cfg.clip_seconds:
                    raise ValueError(f"a clip lasts {MIN_SECONDS} to {cfg.clip_seconds} s")
                turns.append(("user", talker.hear(wav)))
    return turns


def read_sound(data):
    """The bytes of a sound file -> (float32 (n,), Hz). Raises ValueError."""
    try:
        wav, rate = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)
    except (OSError, RuntimeError) as e:
        raise ValueError(f"input_audio cannot be read as sound ({e})") from e
    if not 8000 <= rate <= 192000 or not np.isfinite(wav).all():
        raise ValueError("input_audio has an odd sample rate, or holds no numbers")
    return wav.mean(1), rate


def wanted_format(body):
    """The format of the sound that a request asks for; None: text only. Raises ValueError."""
    if "audio" not in (body.get("modalities") or ["text"]):
        return None
    form = (body.get("audio") or {}).get("format", "wav")
    if form not in (*FORMATS, "pcm16") or body.get("stream") and form != "pcm16":
        raise ValueError(f"audio.format is one of {', '.join(FORMATS)}; of a stream, pcm16")
    return form


class Completion:
    """A reply in the form of chat completions."""

    def __init__(self, model, form):
        self.id, self.audio_id, self.form = new_id("chatcmpl"), new_id("audio"), form
        self.about = {"id": self.id, "created": int(time.time()), "model": model}

    async def events(self, talker, question, events):
        """What the talker says, until the end. Raises HTTPException if the model cannot reply; a client that
        leaves cancels its reply."""
        over = False
        try:
            while not over:
                kind, x = await events.get()
                over = kind in ("done", "failed")
                if kind == "failed":
                    raise HTTPException(400, x)
                yield kind, x
        finally:
            if not over:
                talker.cancel(question)

    @staticmethod
    def usage(x):
        total = x["text"] + x["units"]
        return {"prompt_tokens": x["prompt"], "completion_tokens": total, "total_tokens": x["prompt"] + total,
                "completion_tokens_details": {"audio_tokens": x["units"], "text_tokens": x["text"]}}

    async def whole(self, talker, question, events):
        text, pieces, cut = "", [np.zeros(0, np.float32)], False
        async for kind, x in self.events(talker, question, events):
            if kind == "text":
                text += x
            elif kind == "audio":
                pieces.append(x)
            elif kind == "note":
                cut = True
            else:
                usage = self.usage(x)
        message = {"role": "assistant", "content": text}
        if self.form:
            wav, file = np.concatenate(pieces), io.BytesIO()
            if self.form == "pcm16":
                data = base64_of(wav)
            else:
                soundfile.write(file, np.clip(wav, -1, 1), RATE, format=FORMATS[self.form],
                                subtype="OPUS" if self.form == "opus" else None)
                data = base64.b64encode(file.getvalue()).decode()
            message = {"role": "assistant", "content": None, "refusal": None,
                       "audio": {"id": self.audio_id, "data": data, "transcript": text,
                                 "expires_at": self.about["created"]}}
        choice = {"index": 0, "message": message, "finish_reason": "length" if cut else "stop"}
        return self.about | {"object": "chat.completion", "choices": [choice], "usage": usage}

    async def stream(self, talker, question, events):
        """Server-sent events: a line for each piece of text and sound."""
        def line(delta, finish=None, **more):
            choice = {"index": 0, "delta": delta, "finish_reason": finish}
            chunk = self.about | {"object": "chat.completion.chunk", "choices": [choice]} | more
            return f"data: {json.dumps(chunk)}\n\n"

        yield line({"role": "assistant", "content": None if self.form else ""})
        finish = "stop"
        async for kind, x in self.events(talker, question, events):
            if kind == "text" and self.form:
                yield line({"audio": {"id": self.audio_id, "transcript": x}})
            elif kind == "text":
                yield line({"content": x})
            elif kind == "audio":
                yield line({"audio": {"id": self.audio_id, "data": base64_of(x)}})
            elif kind == "note":
                finish = "length"
            else:
                yield line({}, finish, usage=self.usage(x))
        yield "data: [DONE]\n\n"


def main():
    cfg = configure(ServeConfig)
    talker, threads = None, torch.get_num_threads()
    torch.set_num_threads(1)                          # of this thread; see Talker
    try:
        if cfg.ckpt.startswith("hf:") or os.path.exists(cfg.ckpt):
            device = accelerate.PartialState().device
            codec = load_codec(cfg.codec, cfg.voice).to(device)
            omni, tokenizer, _ = checkpoint.load(cfg.ckpt)
            quicken(omni.eval(), device=device)
            talker = Talker(omni, tokenizer, partial(chat_ids, tokenizer), codec, cfg.rows,
                            max_units=cfg.max_units, threads=threads)
    except (OSError, ValueError, RuntimeError) as e:
        fail(e)
    if talker:                                        # a first reply takes a second longer than others
        talker.ask([talker.hear(read_aloud("Hello."))], [], 0.0, lambda kind, x: None)
        silero(0.5, 500)
    print(f"open http://{cfg.host}:{cfg.port}" + (f"/?token={cfg.token}" if cfg.token else ""))
    uvicorn.run(make_app(cfg, talker), host=cfg.host, port=cfg.port, ws_max_size=cfg.message_bytes,
                log_level="warning")


if __name__ == "__main__":
    main()
