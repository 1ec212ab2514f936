"""
Speech units <-> waveform: what a codec is, and how to open one.

Why: the speech LM does not write sound. It writes units: 25 integers a second, each one of 6561. A codec
turns the assistant's recorded speech into units once, for training, and units back into sound in every reply.

A codec is an nn.Module, moved to a device with `.to`, with

    sample_rate                 Hz, of the sound it makes, which may differ from the 16 kHz that it encodes
    encode(wav)                 wav (samples,) at 16 kHz -> units (U,), U = ceil(seconds * 25)
    decode(units, final=True)   units (U,) or (B, U) -> wav (samples,) or (B, samples). With final=False the
                                units are the beginning of a longer reply, and only the samples that no later
                                unit can change are returned
    next_pieces(states, bursts, finals)   the next units (lists) of several replies -> for each the samples
                                (m,) that are now certain. A state is a dict, first empty, that holds what the
                                reply's next piece needs

There are two. A file is the nano codec (tiny/codec.py), a folder is CosyVoice 2 (omni/cosyvoice.py). `stream`
and `with_sound` use either while units are being written.
"""
import math
import os
import time
from dataclasses import dataclass, field
from functools import partial

from omni.cosyvoice import CosyVoice2, onnx_session, tokenize

LARGEST = 50                  # units that a piece of sound waits for at most
SPARE = 0.25                  # seconds of sound below which nobody waits: newcomers may be heard in between


def pace(pieces):
    """How a reply comes: [(seconds of sound, when it came, seconds after the question)] -> first_audio in s,
    stalls (how often playback waits for a piece if it begins with the first), duration in s."""
    pieces = [piece for piece in pieces if piece[0]]
    until, stalls = pieces[0][1], 0                   # until: when what has come will have been played
    for seconds, came in pieces:
        stalls += came > until
        until = max(until, came) + seconds
    return {"first_audio": pieces[0][1], "stalls": stalls, "duration": sum(seconds for seconds, _ in pieces)}


@dataclass
class Voiced:
    """What has become of a reply's units."""
    state: dict = field(default_factory=dict)         # the codec's
    units: list = field(default_factory=list)         # not yet rendered
    until: float = -math.inf                          # when all sound that has come will have been played


def with_sound(events, codec):
    """The events (reply, kind, x) of `Engine.stream`, and (reply, "audio", samples (m,)) between them; the
    "done" of a reply comes after its last sound.

    This is also the schedule of language models and codec, which share the cores. It wants the first sound of
    each reply early, then no reply to pause, then little work. So after a round, first pieces are rendered
    first. Of the other replies, those wait that have more sound to play than a round and two renderings may
    take (the longest of late) and than SPARE, until they have LARGEST units: a piece renders some of the past
    again, so larger ones cost less. The rest are rendered together.
    """
    voiced, over, asked = {}, [], time.monotonic()
    took = rendering = 0.0                            # the longest of late
    for reply, kind, x in events:
        if kind == "done":
            over.append(reply)
        elif kind != "round":
            yield reply, kind, x
        if kind == "units":
            voiced.setdefault(reply, Voiced()).units.extend(x)
        if kind != "round":
            continue
        voiced = {reply: sound for reply, sound in voiced.items() if reply in over or not reply.done}
        now = time.monotonic()
        took = max(now - asked, 0.9 * took)
        patience = max(SPARE, took + 2 * rendering)
        first, later = [], []
        for reply, sound in voiced.items():
            urgent = sound.until - now <= patience or len(sound.units) >= LARGEST
            if reply in over or sound.units and urgent:
                (later if sound.state else first).append(reply)
        for replies in filter(None, (first, later)):
            began, sounds = time.monotonic(), [voiced[reply] for reply in replies]
            pieces = codec.next_pieces([sound.state for sound in sounds], [sound.units for sound in sounds],
                                       [reply in over for reply in replies])
            now = time.monotonic()
            if any(map(len, pieces)):
                rendering = max(now - began, 0.9 * rendering)
            for reply, sound, piece in zip(replies, sounds, pieces):
                sound.units = []
                if len(piece):
                    sound.until = max(sound.until, now) + len(piece) / codec.sample_rate
                    yield reply, "audio", piece
        for reply in over:
            voiced.pop(reply, None)
            yield reply, "done", None
        over, asked = [], time.monotonic()


def stream(codec, bursts):
    """Iterable of lists of units, as the speech LM writes them -> yields pieces of waveform (samples,), see
    `with_sound`. Together they are `decode` of all the units; CosyVoice 2 fades where they meet."""
    class Reply:
        done = False

    def events():
        for burst in bursts:
            yield Reply, "units", burst
            yield None, "round", None
        yield Reply, "done", None
        yield None, "round", None
    for _, kind, x in with_sound(events(), codec):
        if kind == "audio":
            yield x


def load_codec(path, voice=None):
    """Open a codec: a file that NanoCodec.save wrote, or a folder with CosyVoice 2's flow.pt and hift.pt.

    voice    whose voice CosyVoice 2 speaks in, see `cosyvoice.read_voice`
    Raises FileNotFoundError, ValueError, or RuntimeError that names the tensor that does not fit.
    """
    if os.path.isdir(path):
        return CosyVoice2.load(path, voice)
    if not os.path.exists(path):
        raise FileNotFoundError(f"there is no codec {path}; `git checkout tiny` restores the nano codec, "
                                "`hf download ICTNLP/cosy2_decoder --local-dir DIR` gets CosyVoice 2")
    if voice:
        raise ValueError(f"--voice {voice} is for CosyVoice 2, and {path} has one voice; leave it out")
    from tiny.codec import NanoCodec  # here, so that nothing at real size imports the embedded world

    return NanoCodec.load(path)


def load_encoder(path):
    """Open what building a corpus needs of a codec: a function wav (samples,) at 16 kHz -> units (U,).

    From CosyVoice 2's folder this opens only the tokenizer, neither the decoder nor a voice. Raises as
    `load_codec`.
    """
    if not os.path.isdir(path):
        return load_codec(path).encode
    onnx_session(os.path.join(path, "speech_tokenizer_v2.onnx"))      # fail now, not at the first row
    return partial(tokenize, path)
