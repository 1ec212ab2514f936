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
    next_piece(state, units, final)   the next units (a list) of a reply -> the samples (m,) that are now
                                certain; state is a dict, first empty, that holds what the next piece needs
    stream(bursts)              an iterable of lists of units, as the speech LM writes them -> yields pieces
                                of waveform (samples,), each as early as possible; together they are the reply

There are two. A file is the nano codec (tiny/codec.py), a folder is CosyVoice 2 (omni/cosyvoice.py).
"""
import os
from functools import partial

from omni.cosyvoice import CosyVoice2, onnx_session, tokenize


def pace(pieces):
    """How a reply comes: [(seconds of sound, when it came, seconds after the question)] -> first_audio in s,
    stalls (how often playback waits for a piece if it begins with the first), duration in s."""
    pieces = [piece for piece in pieces if piece[0]]
    until, stalls = pieces[0][1], 0                   # until: when what has come will have been played
    for seconds, came in pieces:
        stalls += came > until
        until = max(until, came) + seconds
    return {"first_audio": pieces[0][1], "stalls": stalls, "duration": sum(seconds for seconds, _ in pieces)}


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
