"""sample.py at work: what it prints while the text arrives, what it plays, and how it prepares a question.
The model's choices are made up here; tests/test_model.py and tests/test_pipeline.py run real ones."""
import sys
import types

import numpy as np
import pytest
import soundfile
import torch
from conftest import load

import sample
from omni import checkpoint
from omni.audio import SAMPLE_RATE
from omni.configure import configure

HALF = "\ufffd"                       # what decoding gives for bytes that are not yet, or never, a letter


class Codec:
    """A codec whose sound is a tenth of the unit, 4 samples a unit."""
    sample_rate = 100

    def to(self, device):
        return self

    def next_pieces(self, states, bursts, finals):
        return [torch.tensor(burst).repeat_interleave(4) / 10 for burst in bursts]


def answer(monkeypatch, tokenizer, ids, codec):
    """Let sample.answer print a reply of these ids, with a burst of two units after each.

    Returns (what `answer` returned, the pieces of text that it printed, how many of them were there before
    each token and at the end of the stream, the pieces of sound).
    """
    pieces, sound, printed = [], [], []

    def generate(*args, **more):
        for i, token in enumerate(ids):
            printed.append(len(pieces))
            yield "text", token
            if codec:
                yield "units", [i % 7, i % 5]
        printed.append(len(pieces))
        yield "note", "made up"

    result = sample.answer(types.SimpleNamespace(generate=generate), tokenizer, codec, [], [], 0.3,
                           pieces.append, sound.append)
    return result, pieces, printed, sound


# -------------------------------------------------------------------------------- letters, as they come

TEXTS = ["Say \u4f60\u597d \U0001f600 now.", "\U0001f600", "caf\u00e9 \u20ac", "Plain."]


@pytest.mark.parametrize("codec", [None, Codec()], ids=["text", "speech"])
@pytest.mark.parametrize("text", TEXTS)
def test_a_letter_is_printed_when_it_is_complete(tiny, monkeypatch, text, codec):
    """The tokenizer works on bytes, and a letter may be two to four of them: no half of one is printed, and
    the whole one at once. What should be on the screen is counted in bytes here, without the tokenizer's
    decoder."""
    tokenizer = tiny[1]
    ids = tokenizer(text)["input_ids"]
    sizes = [len(token) for token in tokenizer.convert_ids_to_tokens(ids)]       # one character for each byte
    assert sum(sizes) == len(text.encode())
    result, pieces, printed, _ = answer(monkeypatch, tokenizer, ids, codec)
    assert not [piece for piece in pieces if HALF in piece]
    for i, shown in enumerate(printed):
        complete = text.encode()[:sum(sizes[:i])].decode(errors="ignore")
        assert "".join(pieces[:shown]) == complete
    assert "".join(pieces) == result[0] == text


def test_the_letters_here_are_spread_over_tokens(tiny):
    """Otherwise the test above would test nothing."""
    counts = [len(tiny[1](letter)["input_ids"]) for letter in "\u4f60\U0001f600\u00e9"]
    assert counts == [3, 4, 2]


@pytest.mark.parametrize("codec", [None, Codec()], ids=["text", "speech"])
@pytest.mark.parametrize("missing", [1, 2, 3])
def test_a_reply_that_ends_in_half_a_letter(tiny, monkeypatch, missing, codec):
    """It was cut, and no more bytes come: what decoding gives is printed once, at the end."""
    tokenizer = tiny[1]
    ids = tokenizer("Hi \U0001f600")["input_ids"][:-missing]
    result, pieces, printed, _ = answer(monkeypatch, tokenizer, ids, codec)
    assert "".join(pieces) == result[0] == tokenizer.decode(ids) == "Hi " + HALF
    assert pieces[-1] == HALF
    assert printed[-1] == len(pieces) - 1             # after the last token, not before


def test_what_is_played_is_what_is_returned(tiny, monkeypatch):
    """The pieces of sound in order, the notes, and times that follow each other."""
    ids = tiny[1]("Paris is nice.")["input_ids"]
    result, _, _, sound = answer(monkeypatch, tiny[1], ids, Codec())
    text, wav, notes, (first_text, first_audio, total) = result
    units = [unit for i in range(len(ids)) for unit in (i % 7, i % 5)]
    assert np.array_equal(wav, np.repeat(np.array(units, np.float32) / np.float32(10), 4))
    assert np.array_equal(wav, np.concatenate(sound))
    assert 1 < len(sound) <= len(ids)                 # who has enough to play waits for more
    assert text == "Paris is nice."
    assert notes == ["made up"]
    assert 0 <= first_text <= first_audio <= total


# -------------------------------------------------------------------------------------- the command

@pytest.fixture
def command(monkeypatch, tmp_path):
    """A function that runs sample.py. The question is a noise of 1.5 s, the reply two bursts of units. It
    returns the frames of the log-mels that the model was asked with."""
    rng = np.random.default_rng(0)
    soundfile.write(tmp_path / "question.wav", 0.1 * rng.standard_normal(SAMPLE_RATE * 3 // 2), SAMPLE_RATE)
    asked = []

    def generate(engine, ids, mels, **more):
        asked.append([mel.shape[1] for mel in mels])
        yield "text", 50
        yield "units", [1, 2]
        yield "units", [3]

    def run(*arguments, pad_audio=None):
        omni, *tokenizers = load()
        if pad_audio is not None:
            omni.config["pad_audio"] = pad_audio
        monkeypatch.setattr(checkpoint, "load", lambda name: (omni, *tokenizers))
        monkeypatch.setattr(sample.Engine, "generate", generate)
        monkeypatch.setattr(sample, "load_codec", lambda path, voice: Codec())
        monkeypatch.setattr(sys, "argv", ["sample.py", "--wav", str(tmp_path / "question.wav"),
                                          "--out", str(tmp_path / "reply.wav"), *arguments])
        sample.main()
        return asked

    return run


class Player:
    """A sounddevice.OutputStream that writes down what is done to it."""
    calls = []

    def __init__(self, samplerate, channels, dtype):
        assert (samplerate, channels, dtype) == (Codec.sample_rate, 1, "float32")

    def start(self):
        self.calls.append("start")

    def write(self, samples):
        self.calls.append(samples.shape)

    def stop(self):
        self.calls.append("stop")

    def close(self):
        self.calls.append("close")


def test_play_waits_until_everything_was_played(command, monkeypatch):
    """stop() plays what the device still holds; without it the end of the reply is lost when Python exits."""
    monkeypatch.setattr(Player, "calls", [])
    fake = types.SimpleNamespace(OutputStream=Player, PortAudioError=RuntimeError)
    monkeypatch.setitem(sys.modules, "sounddevice", fake)
    command("--play")
    assert Player.calls == ["start", (8, 1), (4, 1), "stop", "close"]


@pytest.mark.parametrize("pad_audio, frames", [(None, 3000), (True, 3000), (False, 150)],
                         ids=["released", "padded", "not padded"])
def test_a_question_is_padded_as_in_training(command, pad_audio, frames):
    """The checkpoint says how; the released ones, which do not say, were trained on clips of 30 s."""
    assert command(pad_audio=pad_audio) == [[frames]]


def test_no_flag_contradicts_the_checkpoint(capsys):
    """How clips were padded is a fact about the checkpoint, not a choice."""
    with pytest.raises(SystemExit) as stop:
        configure(sample.SampleConfig, ["--pad_audio"])
    assert stop.value.code == 2
    assert "there is no key 'pad_audio'" in capsys.readouterr().err
