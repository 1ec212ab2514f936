"""
A session of the OpenAI Realtime protocol (the general release of 2025), without any network.

Why: clients, pages and frameworks for voice speak this protocol already. It is a conversation of JSON events;
this file knows which may come, what each does, and in which order the answers go out. serve.py carries them
over a WebSocket, and tests hand them over as they are.

How: `Session.receive(event)` takes what a client sends; `send(event)` is called with what it is to hear.
    the client says                     and hears
    session.update                      session.updated
    input_audio_buffer.append           (with server_vad: .speech_started, .speech_stopped, .committed ...)
    input_audio_buffer.commit, .clear   .committed, conversation.item.added, .done; .cleared
    conversation.item.create            conversation.item.added, .done
    conversation.item.retrieve, .truncate, .delete    .retrieved, .truncated, .deleted
    response.create                     response.created, response.output_item.added, conversation.item.added,
                                        response.content_part.added, deltas of transcript and sound, and
                                        for each of these the .done, in turn; at last response.done
    response.cancel                     the same end, earlier, with the status "cancelled"
Anything else is answered with an error event, and the session goes on. Sound is PCM16, mono, 24 kHz, base64.
"""
import base64
import binascii
import math
import secrets
import time

import numpy as np
import soxr
import torch

from omni.audio import MIN_SECONDS, SAMPLE_RATE

RATE = 24000                           # Hz, of all sound in events
PCM = {"type": "audio/pcm", "rate": RATE}
LETTERS = 16                           # of a text in a second of speech, mean of the embedded corpus
LONGEST_TEXT = 1000                    # letters that a client may type: a minute of speech
KEPT = 256                             # items that a conversation remembers; then the older half is forgotten
FRAME = 512                            # samples at 16 kHz that silero-vad looks at at once
VAD = {"type": "server_vad", "threshold": 0.5, "prefix_padding_ms": 300, "silence_duration_ms": 500,
       "create_response": True, "interrupt_response": True}


PARTS = {"user": ("input_text", "input_audio"), "assistant": ("output_text", "output_audio"),
         "system": ("input_text",)}    # what a message of each role consists of


class Refused(Exception):
    """An event that cannot be followed: (code, message)."""


def new_id(kind):
    return f"{kind}_{secrets.token_hex(10)}"


def pcm_of(text, limit):
    """base64 of PCM16 -> float32 (n,). Raises Refused. limit: samples"""
    try:
        data = base64.b64decode(text, validate=True)
    except (TypeError, ValueError, binascii.Error):
        raise Refused("invalid_audio", "audio must be base64 of PCM16, mono, 24 kHz") from None
    if len(data) % 2:
        raise Refused("invalid_audio", "PCM16 has two bytes a sample; this has an odd number")
    if len(data) // 2 > limit:
        raise Refused("audio_too_long", f"the clip is longer than {limit // RATE} s")
    return np.frombuffer(data, "<i2").astype(np.float32) / 32768


def base64_of(wav):
    """float32 (n,) -> base64 of PCM16."""
    return base64.b64encode((np.clip(wav, -1, 1) * 32767).astype("<i2").tobytes()).decode()


def clean(text):
    """A text of a client, without halves of letters: JSON allows those, a tokenizer stops at them. Raises
    Refused."""
    if len(text) > LONGEST_TEXT:
        raise Refused("text_too_long", f"a text has at most {LONGEST_TEXT} letters")
    return text.encode("utf-8", "replace").decode()


def merge(turns):
    """[("user", log-mel (n_mels, T)) or ("assistant", text)] in the order of a conversation -> (clips,
    texts): user and assistant by turns, the user first and last. What has no partner is joined with its
    neighbor.

    Raises Refused if the user does not have the last word.
    """
    clips, texts = [], []
    for role, x in turns:
        if role == "user" and len(clips) > len(texts):
            clips[-1] = torch.cat([clips[-1], x], -1)
        elif role == "user":
            clips.append(x)
        elif len(clips) > len(texts):
            texts.append(x)
        elif texts:
            texts[-1] += " " + x
    if len(clips) == len(texts):
        raise Refused("no_question", "there is nothing to answer: commit audio, or create an item, first")
    return clips, texts


class Session:
    """One client's conversation. All methods are called by one thread."""

    def __init__(self, send, hear, ask, cancel, model, read_aloud=None, vad=None, max_seconds=60,
                 clock=time.monotonic):
        """
        send(event)          delivers an event (a dict) to the client
        hear(wav)            a clip of the user (n,) at 16 kHz -> its log-mel (n_mels, T)
        ask(clips, texts, temperature, listen, speak)   begins a reply: log-mels of the user's turns, and the
                             assistant's texts. `listen` gets what omni/talk.py says, later and in the thread
                             of the session. Returns what `cancel` takes
        read_aloud(text)     a typed question -> its sound (n,) at 16 kHz; None: typed questions are refused
        vad(threshold, silence_ms)   makes a voice detector: frames (512,) at 16 kHz -> {"start": n} or
                             {"end": n} where speech starts or ends, else None. None: push to talk only
        max_seconds          longest clip
        clock                seconds
        """
        self.send_event, self.hear, self.ask, self.cancel_question = send, hear, ask, cancel
        self.read_aloud, self.make_vad, self.max_seconds = read_aloud, vad, max_seconds
        self.clock, self.last_seen = clock, clock()   # when the client last did more than send silence
        self.items, self.response = [], None          # items: (item, what was said: a log-mel, or a text)
        self.playing = None, 0.0                      # the reply that is heard last, and when it began
        self.milliseconds = {}                        # id of an item -> how long its sound is
        self.settings = {
            "type": "realtime", "object": "realtime.session", "id": new_id("sess"), "model": model,
            "output_modalities": ["audio"], "instructions": "", "tools": [], "tool_choice": "auto",
            "max_output_tokens": "inf", "tracing": None, "truncation": "auto", "temperature": 0.3,
            "audio": {"input": {"format": PCM, "transcription": None, "noise_reduction": None,
                                "turn_detection": dict(VAD) if vad else None},
                      "output": {"format": PCM, "voice": "nano", "speed": 1.0}}}
        self.handlers = {
            "session.update": self.update_session,
            "input_audio_buffer.append": self.append, "input_audio_buffer.commit": self.commit,
            "input_audio_buffer.clear": self.clear, "conversation.item.create": self.create_item,
            "conversation.item.retrieve": self.retrieve_item,
            "conversation.item.truncate": self.truncate_item,
            "conversation.item.delete": self.delete_item, "response.create": self.create_response,
            "response.cancel": self.cancel_response}
        self.forget_audio()
        self.start_vad()
        self.send("session.created", session=self.settings)

    def send(self, kind, **fields):
        self.send_event({"type": kind, "event_id": new_id("event"), **fields})

    def receive(self, event):
        """Follow what a client sends. Whatever is wrong with it becomes an error event."""
        name = event.get("event_id") if isinstance(event, dict) else None
        try:
            if not isinstance(event, dict) or not isinstance(event.get("type"), str):
                raise Refused("invalid_event", "an event is a JSON object with a type")
            if event["type"] not in self.handlers:
                known = ", ".join(self.handlers)
                raise Refused("unknown_event", f"there is no event {event['type']!r}; known are {known}")
            if event["type"] != "input_audio_buffer.append" or self.speaking or not self.vad:
                self.last_seen = self.clock()
            self.handlers[event["type"]](event)
        except Refused as e:
            self.error(*e.args, name if isinstance(name, str) else None)

    def error(self, code, message, event_id=None, kind="invalid_request_error"):
        self.send("error", error={"type": kind, "code": code, "message": message, "param": None,
                                  "event_id": event_id})

    def close(self):
        """The client has left."""
        if self.response:
            self.cancel_question(self.response["question"])
            self.response = None

    # ----------------------------------------------------------------------------------------- settings

    def update_session(self, event):
        new = event.get("session")
        if not isinstance(new, dict):
            raise Refused("invalid_session", "session.update needs a session, an object")
        audio = self.part(new, "audio")
        heard, said = self.part(audio, "input"), self.part(audio, "output")
        for side in (heard, said):
            form = side.get("format") or PCM
            if form != PCM:
                raise Refused("invalid_format", f"sound is {PCM} in both directions, not {form}")
        modalities = self.modalities(new, self.settings["output_modalities"])
        temperature = self.temperature(new, self.settings["temperature"])
        detection = self.settings["audio"]["input"]["turn_detection"]
        if "turn_detection" in heard:
            detection = heard["turn_detection"]
            if detection is not None:
                detection = self.detection(detection)
        known = {key: new[key] for key in ("instructions", "tools", "tool_choice", "max_output_tokens",
                                           "tracing", "truncation") if key in new}
        self.settings |= known | {"output_modalities": modalities, "temperature": temperature}
        inputs = self.settings["audio"]["input"]
        changed = detection != inputs["turn_detection"]
        inputs |= {key: heard[key] for key in ("transcription", "noise_reduction") if key in heard}
        inputs["turn_detection"] = detection
        if isinstance(said.get("voice"), str):
            self.settings["audio"]["output"]["voice"] = said["voice"]
        if changed:
            self.start_vad()
        self.send("session.updated", session=self.settings)

    @staticmethod
    def part(settings, key):
        value = settings.get(key) or {}
        if not isinstance(value, dict):
            raise Refused("invalid_session", f"{key} must be an object")
        return value

    @staticmethod
    def modalities(settings, default):
        value = settings.get("output_modalities") or default
        if value not in (["audio"], ["text"]):
            raise Refused("invalid_modalities", 'output_modalities is ["audio"] or ["text"]')
        return value

    @staticmethod
    def temperature(settings, default):
        value = settings.get("temperature")
        value = default if value is None else value   # clients write null for what they leave open
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 2:
            raise Refused("invalid_temperature", "temperature is a number from 0 to 2")
        return value

    def detection(self, wanted):
        """Settings of the voice detection, complete."""
        if self.make_vad is None:
            raise Refused("no_voice_detection", "this server has push to talk only: turn_detection is null")
        if not isinstance(wanted, dict) or wanted.get("type", "server_vad") not in ("server_vad",
                                                                                     "semantic_vad"):
            raise Refused("invalid_turn_detection", "turn_detection is null or of the type server_vad")
        wanted = VAD | {key: value for key, value in wanted.items() if key in VAD and value is not None}
        for key, low, high in (("threshold", 0, 1), ("prefix_padding_ms", 0, 5000),
                               ("silence_duration_ms", 50, 10000)):
            value = wanted[key]
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
                raise Refused("invalid_turn_detection", f"{key} is a number from {low} to {high}")
        return wanted | {"type": "server_vad"}

    # ------------------------------------------------------------------------------------ what is heard

    def forget_audio(self):
        """Empty the buffer of sound (16 kHz)."""
        self.pieces, self.held = [], 0                # arrays (n,), and how many samples they are
        self.resampler = soxr.ResampleStream(RATE, SAMPLE_RATE, 1, "float32")

    def start_vad(self):
        """Begin to look for speech, or stop."""
        self.vad, self.frames, self.looked_at = None, np.zeros(0, np.float32), 0  # samples
        self.speaking = None                          # the id of the item that is being said
        detection = self.settings["audio"]["input"]["turn_detection"]
        if detection:
            self.vad = self.make_vad(detection["threshold"], detection["silence_duration_ms"])

    def append(self, event):
        wav = pcm_of(event.get("audio"), self.max_seconds * RATE)
        if not len(wav):
            return
        wav = self.resampler.resample_chunk(wav)
        if not self.vad and self.held + len(wav) > self.max_seconds * SAMPLE_RATE:
            raise Refused("audio_too_long", f"a clip lasts at most {self.max_seconds} s; commit or clear it")
        self.pieces.append(wav)
        self.held += len(wav)
        if self.vad:
            self.detect(wav)

    def detect(self, wav):
        """Look for the start and the end of speech in what has just come."""
        settings = self.settings["audio"]["input"]["turn_detection"]
        self.frames = np.concatenate([self.frames, wav])
        while len(self.frames) >= FRAME and self.vad:
            found = self.vad(self.frames[:FRAME]) or {}
            self.frames, self.looked_at = self.frames[FRAME:], self.looked_at + FRAME
            padding = round(settings["prefix_padding_ms"] * SAMPLE_RATE / 1000)
            too_long = self.speaking and self.held > self.max_seconds * SAMPLE_RATE
            if "start" in found and not self.speaking:
                self.speaking = new_id("item")
                start = max(0, found["start"] - padding)
                self.send("input_audio_buffer.speech_started", item_id=self.speaking,
                          audio_start_ms=1000 * start // SAMPLE_RATE)
                if settings["interrupt_response"]:
                    self.interrupt()
            elif ("end" in found or too_long) and self.speaking:
                item, self.speaking = self.speaking, None
                self.send("input_audio_buffer.speech_stopped", item_id=item,
                          audio_end_ms=1000 * self.looked_at // SAMPLE_RATE)
                self.commit({}, item)
                if settings["create_response"] and not self.response:
                    self.create_response({})
            elif self.pieces and not self.speaking:   # keep only what may turn out to be its beginning
                keep = padding + FRAME + len(self.frames) + SAMPLE_RATE // 4
                whole = np.concatenate(self.pieces)[-keep:]
                self.pieces, self.held = [whole], len(whole)

    def interrupt(self):
        """The user speaks. What the client cannot have played yet of a reply was not said; replies come
        faster than they are played, so it may be complete."""
        if self.response:
            self.end_response("cancelled", "turn_detected")
        name, began = self.playing
        end = round(1000 * (self.clock() - began))
        if end < self.milliseconds.get(name, 0) and any(item["id"] == name for item, _ in self.items):
            self.truncate_item({"item_id": name, "audio_end_ms": end})

    def commit(self, event, item_id=None):
        self.pieces.append(self.resampler.resample_chunk(np.zeros(0, np.float32), last=True))
        wav = np.concatenate(self.pieces)
        self.forget_audio()
        if len(wav) < MIN_SECONDS * SAMPLE_RATE:
            raise Refused("input_audio_buffer_commit_empty",
                          f"the buffer holds {1000 * len(wav) // SAMPLE_RATE} ms of sound; a clip has at "
                          f"least {round(1000 * MIN_SECONDS)} ms")
        item = {"id": item_id or new_id("item"), "object": "realtime.item", "type": "message",
                "status": "completed", "role": "user",
                "content": [{"type": "input_audio", "transcript": None}]}
        self.send("input_audio_buffer.committed", item_id=item["id"], previous_item_id=self.last_id())
        self.add(item, self.hear(wav))

    def clear(self, event):
        self.forget_audio()
        self.start_vad()
        self.send("input_audio_buffer.cleared")

    # ------------------------------------------------------------------------------- the conversation

    def last_id(self):
        return self.items[-1][0]["id"] if self.items else None

    def find(self, event):
        """The number of the item that an event names."""
        for i, (item, _) in enumerate(self.items):
            if item["id"] == event.get("item_id"):
                return i
        raise Refused("item_not_found", f"there is no item {event.get('item_id')!r}")

    def add(self, item, said, at=None):
        """Insert an item whose content is complete. said: the log-mel of a user's, else the text."""
        at = len(self.items) if at is None else at
        before = self.items[at - 1][0]["id"] if at else None
        self.items.insert(at, (item, said))
        for kind in ("added", "done"):
            self.send(f"conversation.item.{kind}", item=item, previous_item_id=before)
        if len(self.items) > KEPT:                    # clips are large, and a session may be long
            active = self.response and self.response["item"]["id"]
            old = [entry for entry in self.items[:KEPT // 2] if entry[0]["id"] == active]
            self.items = old + self.items[KEPT // 2:]
            kept = {item["id"] for item, _ in self.items}
            self.milliseconds = {id: ms for id, ms in self.milliseconds.items() if id in kept}

    def create_item(self, event):
        item = event.get("item")
        if not isinstance(item, dict) or item.get("type", "message") != "message":
            raise Refused("invalid_item", "only items of the type message are known")
        role, parts = item.get("role"), item.get("content")
        if role not in ("user", "assistant", "system") or not isinstance(parts, list) or not parts:
            raise Refused("invalid_item", "a message has a role (user, assistant, system) and a content list")
        if not all(isinstance(part, dict) and part.get("type") in PARTS[role] for part in parts):
            raise Refused("invalid_item", f"a {role}'s parts are objects of type {' or '.join(PARTS[role])}")
        sounds, texts = [], []
        for part in parts:
            if part["type"] == "input_audio":
                wav = pcm_of(part.get("audio"), self.max_seconds * RATE)
                sounds.append(soxr.resample(wav, RATE, SAMPLE_RATE))
            else:
                text = part.get("text") or part.get("transcript")
                if not isinstance(text, str) or not text.strip():
                    raise Refused("invalid_item", f"a part of the type {part['type']} has no text")
                texts.append(clean(text))
        said = " ".join(texts)
        if role == "user":
            if texts:
                sounds.append(self.say(said))
            said = np.concatenate(sounds)
            if len(said) < MIN_SECONDS * SAMPLE_RATE:
                raise Refused("invalid_item", f"a clip has at least {round(1000 * MIN_SECONDS)} ms of sound")
            said = self.hear(said)
        at, before = None, event.get("previous_item_id")
        if before == "root":
            at = 0
        elif before is not None:
            at = 1 + self.find({"item_id": before})
        name = item.get("id") or new_id("item")
        if not isinstance(name, str) or any(name == other["id"] for other, _ in self.items):
            raise Refused("invalid_item", f"the id {name!r} is taken, or not a text")
        content = [{key: value for key, value in part.items() if key != "audio"} for part in parts]
        self.add({"id": name, "object": "realtime.item", "type": "message", "status": "completed",
                  "role": role, "content": content}, said, at)

    def say(self, text):
        """A typed question as sound, since the model has ears only."""
        if self.read_aloud is None:
            raise Refused("text_not_heard", "this model understands sound only; send input_audio")
        try:
            return self.read_aloud(text)
        except ValueError as e:
            raise Refused("text_not_heard", str(e)) from None

    def retrieve_item(self, event):
        self.send("conversation.item.retrieved", item=self.items[self.find(event)][0])

    def truncate_item(self, event):
        """The client has played only the beginning of a reply: only that was said."""
        i, end = self.find(event), event.get("audio_end_ms")
        item, text = self.items[i]
        if item["role"] != "assistant":
            raise Refused("invalid_item", "only what the assistant said can be truncated")
        if isinstance(end, bool) or not isinstance(end, (int, float)) or not math.isfinite(end) or end < 0:
            raise Refused("invalid_audio_end", "audio_end_ms is a number of milliseconds")
        if self.response and self.response["item"]["id"] == item["id"]:
            self.end_response("cancelled", "client_cancelled")
            item, text = self.items[i]
        whole = self.milliseconds.get(item["id"], 0)
        if end < whole:
            words = text.split()
            self.items[i] = item, " ".join(words[:round(len(words) * end / whole)])
            self.milliseconds[item["id"]] = end
        self.send("conversation.item.truncated", item_id=item["id"], audio_end_ms=end,
                  content_index=event.get("content_index", 0))

    def delete_item(self, event):
        i = self.find(event)
        if self.response and self.response["item"]["id"] == event["item_id"]:
            self.end_response("cancelled", "client_cancelled")
        del self.items[i]
        self.send("conversation.item.deleted", item_id=event["item_id"])

    # -------------------------------------------------------------------------------------- a response

    def create_response(self, event):
        if self.response:
            raise Refused("conversation_already_has_active_response",
                          f"{self.response['id']} is active; cancel it first")
        wanted = event.get("response") or {}
        if not isinstance(wanted, dict):
            raise Refused("invalid_response", "response must be an object")
        modalities = self.modalities(wanted, self.settings["output_modalities"])
        temperature = self.temperature(wanted, self.settings["temperature"])
        turns = [(item["role"], said) for item, said in self.items if item["role"] != "system"]
        clips, texts = merge(turns)
        speak = modalities == ["audio"]
        item = {"id": new_id("item"), "object": "realtime.item", "type": "message", "status": "in_progress",
                "role": "assistant", "content": []}
        self.response = {"id": new_id("resp"), "item": item, "speak": speak, "modalities": modalities,
                         "text": "", "samples": 0, "counts": {}, "notes": []}
        where = {"response_id": self.response["id"], "output_index": 0}
        before = self.last_id()
        self.items.append((item, ""))
        self.send("response.created", response=self.summary("in_progress"))
        self.send("response.output_item.added", **where, item=item)
        self.send("conversation.item.added", item=item, previous_item_id=before)
        self.send("response.content_part.added", **self.place(), part=self.part_said())
        response = self.response

        def listen(kind, x):
            if self.response is response:             # else it has been cancelled
                self.hear_reply(kind, x)
        response["question"] = self.ask(clips, texts, temperature, listen, speak)

    def place(self):
        """The fields by which a client finds what a delta belongs to."""
        return {"response_id": self.response["id"], "item_id": self.response["item"]["id"],
                "output_index": 0, "content_index": 0}

    def content(self):
        """What has been said so far, as a content part."""
        if self.response["speak"]:
            return {"type": "output_audio", "transcript": self.response["text"]}
        return {"type": "output_text", "text": self.response["text"]}

    def part_said(self):
        """The same as the events of content parts hold it: its type has another name there."""
        part = self.content()
        return part | {"type": part["type"].removeprefix("output_")}

    def summary(self, status, reason=None, message=None):
        """A response, as events hold it."""
        counts, done = self.response["counts"], status != "in_progress"
        details = usage = None
        if reason:
            details = {"type": status, "reason": reason}
        if message:
            details = {"type": status, "error": {"type": "server_error", "code": None, "message": message}}
        if done:
            heard, text, units = (counts.get(key, 0) for key in ("prompt", "text", "units"))
            usage = {"total_tokens": heard + text + units, "input_tokens": heard,
                     "output_tokens": text + units,
                     "input_token_details": {"text_tokens": 0, "audio_tokens": heard, "cached_tokens": 0,
                                             "image_tokens": 0},
                     "output_token_details": {"text_tokens": text, "audio_tokens": units}}
        return {"id": self.response["id"], "object": "realtime.response", "status": status,
                "status_details": details, "output": [self.response["item"]] if done else [],
                "conversation_id": self.settings["id"], "output_modalities": self.response["modalities"],
                "max_output_tokens": "inf", "metadata": None, "usage": usage,
                "audio": {"output": {"format": PCM, "voice": self.settings["audio"]["output"]["voice"]}}}

    def hear_reply(self, kind, x):
        """What the talker says about the active response."""
        spoken = "output_audio_transcript" if self.response["speak"] else "output_text"
        if kind == "text":
            self.response["text"] += x
            self.send(f"response.{spoken}.delta", **self.place(), delta=x)
        elif kind == "audio":
            if not self.response["samples"]:
                self.playing = self.response["item"]["id"], self.clock()
            self.response["samples"] += len(x)
            self.send("response.output_audio.delta", **self.place(), delta=base64_of(x))
        elif kind == "note":
            self.response["notes"].append(x)
        elif kind == "failed":
            self.end_response("failed", message=x)
        else:
            self.response["counts"] = x
            cut = bool(self.response["notes"])
            self.end_response("incomplete" if cut else "completed", "max_output_tokens" if cut else None)

    def end_response(self, status, reason=None, message=None):
        """All the .done events; with it the item has its text, and the next response may begin."""
        response, place, text = self.response, self.place(), self.response["text"]
        if status == "cancelled":
            self.cancel_question(response["question"])
        del response["question"]                      # it holds clips, and by its listener this response
        if response["speak"]:
            self.send("response.output_audio.done", **place)
            self.send("response.output_audio_transcript.done", **place, transcript=text)
        else:
            self.send("response.output_text.done", **place, text=text)
        self.send("response.content_part.done", **place, part=self.part_said())
        item = response["item"]
        item |= {"status": "completed" if status == "completed" else "incomplete",
                 "content": [self.content()]}
        at = next(i for i, (other, _) in enumerate(self.items) if other is item)
        self.items[at] = item, text
        before = self.items[at - 1][0]["id"] if at else None
        self.send("response.output_item.done", response_id=response["id"], output_index=0, item=item)
        self.send("conversation.item.done", item=item, previous_item_id=before)
        self.send("response.done", response=self.summary(status, reason, message))
        spoken = 1000 * response["samples"] // RATE
        if status != "completed":                     # the text was ahead of the sound
            spoken = max(spoken, 1000 * len(text) // LETTERS)
        self.milliseconds[item["id"]] = spoken
        self.response = None

    def cancel_response(self, event):
        wanted = event.get("response_id")
        if not self.response or wanted not in (None, self.response["id"]):
            raise Refused("response_cancel_not_active", "there is no active response to cancel")
        self.end_response("cancelled", "client_cancelled")
