"""The protocol of serve.py, without a network: which event follows which, whatever a client sends and
whenever the model answers. It protects clients, which end their session at an event they do not expect."""
import base64
import itertools
import random
import typing

import numpy as np
import pytest
import soxr
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types.realtime import RealtimeServerEvent

from omni.audio import SAMPLE_RATE
from omni.espeak import speak
from omni.realtime import KEPT, RATE, Refused, Session, base64_of, merge
from serve import silero

# The events as openai's own client reads them: its name -> its class.
SERVER_EVENTS = {typing.get_args(kind.model_fields["type"].annotation)[0]: kind
                 for kind in typing.get_args(typing.get_args(RealtimeServerEvent)[0])
                 if typing.get_args(kind.model_fields["type"].annotation)}
BEGIN = ["response.created", "response.output_item.added", "conversation.item.added",
         "response.content_part.added"]
END = ["response.output_audio.done", "response.output_audio_transcript.done", "response.content_part.done",
       "response.output_item.done", "conversation.item.done", "response.done"]
COMMITTED = ["input_audio_buffer.committed", "conversation.item.added", "conversation.item.done"]


class Client:
    """A session, what it has sent, and a model that says what the test wants it to say."""

    def __init__(self, vad=None, read_aloud=None):
        self.events, self.asked, self.cancelled, self.now = [], [], [], 0.0
        self.session = Session(self.events.append, torch.from_numpy, self.ask, self.cancelled.append, "nano",
                               read_aloud, vad, max_seconds=2, clock=lambda: self.now)

    def ask(self, *question):
        self.asked.append(question)
        return len(self.asked)                        # the number of the question

    def reply(self, kind, x):
        self.asked[-1][3](kind, x)

    def send(self, kind, **fields):
        """-> the types of the events that come back"""
        before = len(self.events)
        self.session.receive({"type": kind, **fields})
        return [event["type"] for event in self.events[before:]]

    def say(self, seconds=0.5):
        sound = base64_of(0.1 * np.random.default_rng(0).standard_normal(round(RATE * seconds)))
        return self.send("input_audio_buffer.append", audio=sound)

    def new(self, before):
        return [event["type"] for event in self.events[before:]]


def test_push_to_talk_in_order():
    """A question, its reply, and the counts at its end: the events of the protocol, in its order, each as
    openai's client wants it."""
    client = Client()
    assert client.new(0) == ["session.created"]
    turns = {"audio": {"input": {"turn_detection": None}}}
    assert client.send("session.update", session=turns | {"temperature": 0.7}) == ["session.updated"]
    assert client.say() == [] and client.send("input_audio_buffer.commit") == COMMITTED
    assert client.send("response.create") == BEGIN
    clips, texts, temperature, _, speak = client.asked[0]
    assert len(clips[0]) == SAMPLE_RATE // 2 and texts == [] and temperature == 0.7 and speak
    before = len(client.events)
    for kind, x in (("text", "Par"), ("audio", np.full(2400, 0.5)), ("text", "is."), ("audio", np.zeros(240)),
                    ("done", {"prompt": 20, "text": 3, "units": 10})):
        client.reply(kind, x)
    delta = ["response.output_audio_transcript.delta", "response.output_audio.delta"]
    assert client.new(before) == [*delta, *delta, *END]
    sound = base64.b64decode(client.events[before + 1]["delta"])
    assert np.frombuffer(sound, "<i2").tolist() == [16383] * 2400
    done = client.events[-1]["response"]
    assert done["status"] == "completed" and done["output"][0]["content"][0]["transcript"] == "Paris."
    assert (done["usage"]["input_tokens"], done["usage"]["output_tokens"]) == (20, 13)
    client.say()
    client.send("input_audio_buffer.commit")
    client.send("response.create")
    assert client.asked[1][1] == ["Paris."] and len(client.asked[1][0]) == 2
    for event in client.events:
        SERVER_EVENTS[event["type"]].model_validate(event)


def test_cancel_and_truncate():
    """A reply that is cancelled ends as such; what the user did not hear is not part of the conversation."""
    client = Client()
    client.say()
    client.send("input_audio_buffer.commit")
    client.send("response.create")
    item = client.events[-1]["item_id"]
    client.reply("text", "one two three four")
    client.reply("audio", np.zeros(RATE))
    assert client.send("response.create") == ["error"]
    assert client.events[-1]["error"]["code"] == "conversation_already_has_active_response"
    assert client.send("response.cancel") == END and client.cancelled == [1]
    assert client.events[-1]["response"]["status"] == "cancelled"
    assert client.events[-1]["response"]["output"][0]["status"] == "incomplete"
    before = len(client.events)
    client.reply("text", " five")                     # it was on its way already
    assert client.new(before) == []
    assert client.send("response.cancel") == ["error"]
    assert client.events[-1]["error"]["code"] == "response_cancel_not_active"
    truncate = {"item_id": item, "content_index": 0, "audio_end_ms": 500}
    assert client.send("conversation.item.truncate", **truncate) == ["conversation.item.truncated"]
    client.say()
    client.send("input_audio_buffer.commit")
    client.send("response.create")
    assert client.asked[1][1] == ["one two"]


def test_half_a_reply_is_remembered_by_the_rate_of_speech():
    """The text is ahead of the sound: of a reply that was cancelled after a second of sound, a second's
    letters were heard, however much text had come."""
    client = Client()
    client.say()
    client.send("input_audio_buffer.commit")
    client.send("response.create")
    item = client.events[-1]["item_id"]
    client.reply("text", "one two six " * 8)          # 96 letters, 6 s
    client.reply("audio", np.zeros(RATE))
    client.send("response.cancel")
    client.send("conversation.item.truncate", item_id=item, content_index=0, audio_end_ms=1000)
    client.say()
    client.send("input_audio_buffer.commit")
    client.send("response.create")
    assert client.asked[1][1] == ["one two six one"]


def test_a_long_session_keeps_no_more_than_it_must():
    """Clips are large: the older half is forgotten, and the rest answered."""
    client = Client()
    for _ in range(KEPT):
        client.say(0.2)
        client.send("input_audio_buffer.commit")
        client.send("response.create")
        client.reply("text", "Yes.")
        client.reply("done", {"prompt": 1, "text": 1, "units": 0})
    assert len(client.session.items) <= KEPT + 1 and len(client.session.milliseconds) <= KEPT + 1
    assert len(client.asked[-1][0]) > KEPT // 4
    check_order(client.events)


def test_a_spoken_question_is_found_and_interrupts():
    """silero-vad finds a question by espeak-ng between two silences: it is committed and answered. A second
    one interrupts the reply. Sound comes in pieces of 20 ms."""
    client = Client(vad=silero)
    wav = soxr.resample(speak("What is the capital of France?", "en-us+m3:160:50"), SAMPLE_RATE, RATE)
    for turn in range(2):
        before = len(client.events)
        sound = np.concatenate([np.zeros(RATE), wav, np.zeros(RATE)]).astype(np.float32)
        for piece in np.split(sound, range(480, len(sound), 480)):
            client.send("input_audio_buffer.append", audio=base64_of(piece))
        interrupted = END if turn else []
        assert client.new(before) == ["input_audio_buffer.speech_started", *interrupted,
                                      "input_audio_buffer.speech_stopped", *COMMITTED, *BEGIN]
        heard = client.asked[turn][0][-1]
        assert 0.9 < len(heard) / SAMPLE_RATE / (len(wav) / RATE) < 1.8       # with 0.3 s before, 0.5 s after
        assert abs(client.events[before]["audio_start_ms"] - (700 + turn * (2000 + len(wav) / 24))) < 200
    assert client.cancelled == [1]
    for event in client.events:
        SERVER_EVENTS[event["type"]].model_validate(event)


@pytest.mark.parametrize("complete", [True, False])
@pytest.mark.parametrize("seconds, remembered", [(1.0, "one two"), (3.0, "one two three four")])
def test_who_interrupts_has_heard_the_beginning(seconds, remembered, complete):
    """Two seconds of sound are there at once; the user speaks `seconds` later. The conversation remembers
    what can have been played till then, whether the reply was complete or is cancelled."""
    found = []
    client = Client(vad=lambda threshold, silence_ms: lambda frame: found.pop() if found else None)
    client.say()
    client.send("input_audio_buffer.commit")
    client.send("response.create")
    client.reply("text", "one two three four")
    client.reply("audio", np.zeros(2 * RATE))
    if complete:
        client.reply("done", {"prompt": 1, "text": 4, "units": 50})
    client.now += seconds
    found.append({"start": 0})
    before = len(client.events)
    client.say()
    ended = [] if complete else END
    truncated = ["conversation.item.truncated"] if seconds < 2 else []
    assert client.new(before) == ["input_audio_buffer.speech_started", *ended, *truncated]
    assert not truncated or client.events[-1]["audio_end_ms"] == 1000
    found.append({"end": 0})
    client.say()
    assert client.asked[1][1] == [remembered]
    for event in client.events:
        SERVER_EVENTS[event["type"]].model_validate(event)


@pytest.mark.parametrize("event, code", [
    ({"type": "hello"}, "unknown_event"), ({}, "invalid_event"), (["session.update"], "invalid_event"),
    ({"type": "response.create"}, "no_question"),
    ({"type": "input_audio_buffer.commit"}, "input_audio_buffer_commit_empty"),
    ({"type": "input_audio_buffer.append", "audio": "§"}, "invalid_audio"),
    ({"type": "input_audio_buffer.append", "audio": "AAA="}, None),
    ({"type": "input_audio_buffer.append", "audio": "AAAA"}, "invalid_audio"),
    ({"type": "input_audio_buffer.append"}, "invalid_audio"),
    ({"type": "input_audio_buffer.append", "audio": "AAAA" * 2 ** 16}, "audio_too_long"),
    ({"type": "session.update"}, "invalid_session"),
    ({"type": "session.update", "session": {"audio": 5}}, "invalid_session"),
    ({"type": "session.update", "session": {"audio": {"input": {"format": {"type": "audio/pcmu"}}}}},
     "invalid_format"),
    ({"type": "session.update", "session": {"temperature": float("nan")}}, "invalid_temperature"),
    ({"type": "session.update", "session": {"output_modalities": ["video"]}}, "invalid_modalities"),
    ({"type": "session.update", "session": {"audio": {"input": {"turn_detection": {"type": "server_vad"}}}}},
     "no_voice_detection"),
    ({"type": "conversation.item.create", "item": {"role": "user", "content": []}}, "invalid_item"),
    ({"type": "conversation.item.create",
      "item": {"role": "user", "content": [{"type": "input_text", "text": "Hi"}]}}, "text_not_heard"),
    ({"type": "conversation.item.delete", "item_id": {}}, "item_not_found"),
    ({"type": "conversation.item.truncate", "item_id": "x", "audio_end_ms": 1}, "item_not_found")])
def test_what_is_wrong_is_an_error_event(event, code):
    """One error that names the event; then the session goes on as if nothing had been."""
    client = Client()
    if isinstance(event, dict):
        event = event | {"event_id": "mine"}
    client.session.receive(event)
    errors = [e["error"] for e in client.events[1:]]
    assert [error["code"] for error in errors] == ([code] if code else [])
    assert not code or not isinstance(event, dict) or errors[0]["event_id"] == "mine"
    client.say()
    assert client.send("input_audio_buffer.commit") == COMMITTED
    for e in client.events:
        SERVER_EVENTS[e["type"]].model_validate(e)


def test_typed_questions_are_read_aloud():
    """A typed question reaches the model as sound, beside what was spoken."""
    client = Client(read_aloud=lambda text: np.zeros(len(text) * 1600, np.float32))
    parts = [{"type": "input_audio", "audio": base64_of(np.zeros(RATE))},
             {"type": "input_text", "text": "Hey"}]
    item = {"type": "message", "role": "user", "content": parts, "id": "first"}
    assert client.send("conversation.item.create", item=item) == COMMITTED[1:]
    assert "audio" not in client.events[-1]["item"]["content"][0]
    client.send("response.create", response={"output_modalities": ["text"]})
    (clip,), *_, speak = client.asked[0]
    assert len(clip) == SAMPLE_RATE + 4800 and not speak
    client.reply("text", "Yes.")
    client.reply("done", {"prompt": 1, "text": 1, "units": 0})
    kinds = [event["type"] for event in client.events]
    assert "response.output_text.delta" in kinds and "response.output_text.done" in kinds
    assert not any("audio" in kind for kind in kinds)
    for event in client.events:
        SERVER_EVENTS[event["type"]].model_validate(event)


def test_merged_turns():
    """User and assistant by turns, whatever clients create; the user has the last word."""
    u, v = torch.ones(2, 3), torch.zeros(2, 4)
    clips, texts = merge([("assistant", "early"), ("user", u), ("user", v), ("assistant", "a"),
                          ("assistant", "b"), ("user", u)])
    assert [clip.shape[1] for clip in clips] == [7, 3] and texts == ["a b"]
    for turns in ([], [("user", u), ("assistant", "a")]):
        with pytest.raises(Refused):
            merge(turns)


# --------------------------------------------------------------------------------- any sequence of events

def check_order(events):
    """What holds of everything that a session sends."""
    active, expected, spoken, added, done = None, [], "", [], []
    for event in events:
        SERVER_EVENTS[event["type"]].model_validate(event)
        kind = event["type"]
        if kind == "response.created":
            assert active is None
            active, expected, spoken = event["response"]["id"], BEGIN[1:], ""
        elif kind.endswith(".delta"):
            assert active == event["response_id"] and not expected
            if "audio.delta" not in kind:
                spoken += event["delta"]
        elif kind.startswith("response.") or expected:
            assert active == event.get("response_id", active)
            if not expected:                          # the end may begin
                expected = ["response.output_text.done", *END[2:]] if "text" in kind else list(END)
            assert kind == expected[0]
            expected = expected[1:]
            if kind in ("response.output_audio_transcript.done", "response.output_text.done"):
                assert event.get("transcript", event.get("text")) == spoken
            if kind == "response.done":
                assert event["response"]["id"] == active
                active = None
        if kind == "conversation.item.added":
            added.append(event["item"]["id"])
        if kind == "conversation.item.done":
            done.append(event["item"]["id"])
    assert len(set(added)) == len(added) and len(set(done)) == len(done) and set(done) <= set(added)
    assert not expected


def random_event(rng, client):
    """An event that a client might send, right or wrong."""
    ids = [event["item"]["id"] for event in client.events if event["type"] == "conversation.item.added"]
    item = rng.choice([*ids, "none"])
    return rng.choice([
        {"type": "input_audio_buffer.append", "audio": base64_of(np.zeros(rng.choice([0, 1, 2400, 9600])))},
        {"type": "input_audio_buffer.append", "audio": rng.choice([None, "x", 5])},
        {"type": "input_audio_buffer.commit"}, {"type": "input_audio_buffer.clear"},
        {"type": "response.create"}, {"type": "response.create"},
        {"type": "response.create", "response": {"output_modalities": [rng.choice(["text", "audio", "x"])]}},
        {"type": "response.cancel"},
        {"type": "conversation.item.truncate", "item_id": item, "audio_end_ms": rng.choice([0, 99, -1, "x"])},
        {"type": "conversation.item.delete", "item_id": item},
        {"type": "conversation.item.retrieve", "item_id": item},
        {"type": "conversation.item.create", "previous_item_id": rng.choice([None, "root", item]),
         "item": {"type": "message", "role": rng.choice(["user", "assistant", "system", None]),
                  "content": [{"type": rng.choice(["input_text", "output_text", "input_text", None]),
                               "text": rng.choice(["Hi", "", None])}]}},
        {"type": "session.update", "session": {"temperature": rng.choice([0, 1, 9])}},
        {"type": rng.choice(["", "nothing", "response.done"])}, rng.choice([None, [], 7, {}])])


@settings(max_examples=10000, deadline=None, database=None, derandomize=True)
@given(st.integers(0, 2 ** 32), st.integers(1, 40))
def test_the_order_holds_whatever_happens(seed, length):
    """Ten thousand sequences of up to forty events from a client that does anything, while the model answers,
    fails, or says more of what was cancelled."""
    rng = random.Random(seed)
    client = Client(read_aloud=lambda text: np.zeros(1600 * len(text), np.float32))
    for _ in range(length):
        if client.asked and rng.random() < 0.5:
            kind, x = rng.choice([("text", "a "), ("text", "b"), ("audio", np.zeros(48)), ("note", "cut"),
                                  ("done", {"prompt": 9, "text": 2, "units": 3}), ("failed", "no room")])
            rng.choice(client.asked)[3](kind, x)
        else:
            client.session.receive(random_event(rng, client))
    client.session.close()
    check_order(client.events)
    assert len(client.cancelled) == len(set(client.cancelled)) <= len(client.asked)


def test_the_order_is_checked():
    """The check above fails where an event is left out, doubled or swapped."""
    client = Client()
    client.say()
    client.send("input_audio_buffer.commit")
    client.send("response.create")
    client.reply("text", "a")
    client.send("response.cancel")
    events, inside = client.events, range(4, len(client.events))
    check_order(events)
    wrong = [events[:i] + events[i + 1:] for i in inside[:-1] if not events[i]["type"].startswith("conv")]
    wrong += [events[:i] + [events[i]] + events[i:] for i in inside if "delta" not in events[i]["type"]]
    for broken in itertools.chain(wrong, [events[:5] + [events[6], events[5]] + events[7:]]):
        with pytest.raises(AssertionError):
            check_order(broken)
