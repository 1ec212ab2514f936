"""The voices that espeak-ng did not make: who belongs to which split, and that rate, pitch and tract do what
they say. No test lets a voice of the test split speak. Voices that are not installed are skipped."""
import random

import librosa
import numpy as np
import pytest
import torch

from omni.audio import SAMPLE_RATE, log_mel
from omni.espeak import speak
from tiny import voices
from tiny.sounds import sound
from tiny.voices import VOICES, draw_voice, missing, read_voice, say_all, speak_all

QUESTION = "Do you know the capital of France?"
AS_IT_IS = "1.00:1.00:1.00"


def installed(name):
    """A parameter of a test: the voice, skipped where its synthesizer is missing."""
    lines = missing([name])
    return pytest.param(name, marks=pytest.mark.skipif(bool(lines), reason="; ".join(lines)))


TRAIN = [installed(name) for name in VOICES["train"]]
FREE = [installed(name) for name in VOICES["train"] if name != voices.FIXED_PITCH]


def say(name, factors=AS_IT_IS, text=QUESTION):
    return speak_all([(text, f"{name}:{factors}")])[0]


def seconds(wav):
    """How long the speech lasts, without the silence around it."""
    loud = np.flatnonzero(np.abs(wav) > 0.02 * np.abs(wav).max())
    return (loud[-1] - loud[0]) / SAMPLE_RATE


def pitch(wav):
    """The median pitch in Hz of the louder half."""
    f0 = librosa.yin(wav, fmin=60, fmax=400, sr=SAMPLE_RATE)
    level = librosa.feature.rms(y=wav)[0]
    return np.median(f0[level > np.median(level)])


def envelope(wav, warp):
    """The log-spectrum (30 mel bands) of the louder half, with all frequencies divided by warp. A window of
    10 ms is too short to resolve the harmonics, so formants remain."""
    power = np.abs(librosa.stft(wav, n_fft=512, win_length=160)) ** 2     # (257, frames)
    level = power.sum(0)
    mean = power[:, level > np.median(level)].mean(1)
    warped = np.interp(np.arange(257) * warp, np.arange(257), mean)
    bands = librosa.filters.mel(sr=SAMPLE_RATE, n_fft=512, n_mels=30, fmin=200, fmax=3200)
    return np.log(bands @ warped)


def formant_shift(plain, changed):
    """The factor by which the formants of one voice are lower than those of another: the warp that makes
    their spectra most alike, apart from the level."""
    heard = envelope(changed, 1)
    warps = np.arange(0.80, 1.26, 0.01)
    distances = [(heard - envelope(plain, warp)).std() for warp in warps]
    return warps[np.argmin(distances)]


# ---------------------------------------------------------------------------------------------- who is heard

def test_shipped_clips_are_what_the_synthesizers_say():
    """Each is of a training voice; where its synthesizer is installed, it sounds as that does. And no
    synthesizer is needed to read one."""
    clips = list(voices.shipped_clips())
    assert len(clips) == 1500 and {voice.split(":")[0] for _, voice in clips} == set(VOICES["train"])
    for name in VOICES["train"]:
        job = next((text, voice) for text, voice in clips if voice.startswith(f"{name}:"))
        shipped = say_all([job])[0]
        assert shipped.dtype == np.float32 and 0.5 < len(shipped) / SAMPLE_RATE < 10
        if not missing([name]):
            spoken = speak_all([job])[0]
            both = [log_mel(torch.from_numpy(wav), 80, False).flatten().numpy() for wav in (shipped, spoken)]
            assert len(shipped) == len(spoken) and np.corrcoef(both)[0, 1] > 0.9

def test_no_speaker_is_in_two_splits():
    """The held-out voices mean something only if no recording of their speakers trains the listener."""
    speakers = {}
    for split, names in VOICES.items():
        speakers[split] = {name.split("/")[1].removesuffix("16") for name in names}
    assert speakers["train"] == {"kal", "slt", "en-US", "en-GB"}
    assert speakers["validation"] == {"awb"}
    assert speakers["test"] == {"rms", "ked"}


@pytest.mark.parametrize("split", VOICES)
def test_drawn_voices(split):
    """Every drawn voice exists, all of the split's are drawn, and only those of train are changed."""
    rng = random.Random(0)
    drawn = [draw_voice(rng, split) for _ in range(500)]
    assert {read_voice(voice)[0] for voice in drawn} == set(VOICES[split])
    factors = np.array([read_voice(voice)[1:] for voice in drawn])
    if split == "train":
        low, high = factors.min(0), factors.max(0)
        assert (low < [0.82, 0.82, 0.87]).all() and (high > [1.23, 1.20, 1.16]).all()
        assert (low >= [0.80, 0.80, 0.85]).all() and (high <= [1.25, 1.25, 1.18]).all()
    else:
        assert (factors == 1).all()


# --------------------------------------------------------------------------------------------- how it sounds

@pytest.mark.parametrize("name", TRAIN)
def test_rate(name):
    """At 1.25 times the rate, speech lasts 1 / 1.25 as long and keeps its pitch."""
    plain, fast = say(name), say(name, "1.25:1.00:1.00")
    assert seconds(fast) / seconds(plain) == pytest.approx(1 / 1.25, rel=0.05)
    assert pitch(fast) / pitch(plain) == pytest.approx(1, rel=0.05)


@pytest.mark.parametrize("name", FREE)
def test_pitch(name):
    """A quarter higher by an independent measure (yin), in the same time."""
    plain, high = say(name), say(name, "1.00:1.25:1.00")
    assert pitch(high) / pitch(plain) == pytest.approx(1.25, rel=0.05)
    assert len(high) / len(plain) == pytest.approx(1, rel=0.02)


@pytest.mark.parametrize("name", TRAIN)
@pytest.mark.parametrize("tract", [0.9, 1.15])
def test_tract(name, tract):
    """The formants move by the factor, by an independent measure; rate and pitch are what was asked."""
    asked = f"{1 / tract:.2f}" if name == voices.FIXED_PITCH else "1.00"
    plain, changed = say(name), say(name, f"1.00:{asked}:{tract:.2f}")
    assert seconds(changed) / seconds(plain) == pytest.approx(1, rel=0.04)
    assert pitch(changed) / pitch(plain) == pytest.approx(float(asked), rel=0.06)
    assert formant_shift(plain, changed) == pytest.approx(tract, abs=0.03)


@pytest.mark.parametrize("name", TRAIN)
def test_a_voice_forgets_the_one_before(name):
    """The engines keep a global state; a sentence must not depend on what was said before it. What quotes
    mean to festival's script must not reach it either."""
    other = f"{name}:0.90:{1 / 1.1:.2f}:1.10"
    job = (QUESTION, f"{name}:{AS_IT_IS}")
    first, _, _, again = speak_all([job, ("Say \"it's\" \\ now (please).", other), ("Hello.", other), job])
    np.testing.assert_array_equal(first, again)
    assert first.dtype == np.float32 and 0.1 < np.abs(first).max() <= 1


@pytest.mark.skipif(bool(missing(VOICES["train"])), reason="; ".join(missing(VOICES["train"])))
def test_engines_in_one_list():
    """Sentences come back in the order of the jobs, whichever engine says them."""
    jobs = []
    for text in ("Hello.", QUESTION):
        jobs += [(text, f"{name}:{AS_IT_IS}") for name in VOICES["train"]]
    for job, wav in zip(jobs, speak_all(jobs)):
        np.testing.assert_array_equal(wav, speak_all([job])[0])


def test_no_clipping():
    """A peak that resampling lifts above full scale comes back at full scale; others keep their level."""
    square = np.tile(np.repeat(np.array([32767, -32767], np.int16), 20), 50)
    assert np.abs(voices.resample(square, 16000, 1.1)).max() == 1
    quiet = np.abs(voices.resample(square // 4, 16000, 1.1)).max()
    assert 0.25 < quiet < 0.35


def test_any_voice_of_the_world():
    """`say_all` gives each job to its maker: espeak-ng, also in another language, or a sound of its seconds
    and its seed. A sound has no text to say."""
    jobs = [("Hello there.", "en-us+f3:150:40"), ("(hum)", "sound/hum:0.8:17"),
            ("Wie komme ich zum Bahnhof?", "de+m3:150:40"), ("", "sound/music:1.2:5")]
    english, hum, german, music = say_all(jobs)
    np.testing.assert_array_equal(hum, sound("hum", random.Random("17"), 0.8))
    np.testing.assert_array_equal(music, sound("music", random.Random("5"), 1.2))

    def difference(job, wav):
        """Of the mean log-mels, in which 0.1 is 4 dB. espeak-ng keeps a state, so samples differ anyway."""
        means = [log_mel(torch.from_numpy(x), 80, pad=False).mean(1) for x in (speak(*job), wav)]
        return (means[0] - means[1]).abs().max()

    assert difference(jobs[0], english) < 0.1 and difference(jobs[2], german) < 0.1
    assert difference((jobs[2][0], "en-us+m3:150:40"), german) > 0.1


@pytest.mark.parametrize("name", [installed("flite/slt"), installed("festival/kal")])
def test_people_do_not_read_marks(name):
    """A voice without marks says what is between them."""
    voice = f"{name}:{AS_IT_IS}"
    one, other = say_all([("It is <stress>cold</stress>.", voice), ("It is cold.", voice)])
    np.testing.assert_array_equal(one, other)


# ------------------------------------------------------------------------------------------------- complaints

@pytest.mark.parametrize("voice, complaint", [
    ("flite/kal", "not of the form"),
    ("flite/kal:1:1:1", "not of the form"),
    ("flite/bob:1.00:1.00:1.00", "there is no 'flite/bob'"),
    ("flite/kal:1.00:2.00:1.00", "must be from 0.75 to 1.35"),
    ("festival/slt:1.00:1.10:1.10", "1 / tract, here 0.91"),
])
def test_a_bad_voice(voice, complaint):
    for speaker in (speak_all, say_all):
        with pytest.raises(ValueError, match=complaint):
            speaker([(QUESTION, voice)])


@pytest.mark.parametrize("name", TRAIN)
@pytest.mark.parametrize("text", ["", "?"])
def test_nothing_to_say(name, text):
    """The error names the voice and the text, also where the synthesizer would hiss a little."""
    with pytest.raises(ValueError, match=f"{name}.*nothing to say in {text!r}".replace("?", r"\?")):
        say(name, text=text)


@pytest.mark.skipif(bool(missing(["festival/kal"])), reason="; ".join(missing(["festival/kal"])))
def test_festival_stops(monkeypatch):
    """A script that fails at the second sentence: the error names that one, not the first or the third."""
    good = voices.scheme
    monkeypatch.setattr(voices, "scheme", lambda text, *more: "(error)" if text == "b" else good(text, *more))
    with pytest.raises(ValueError, match="no sound of 'b' in voice 'festival/kal"):
        speak_all([(text, f"festival/kal:{AS_IT_IS}") for text in "abc"])


def test_missing(monkeypatch):
    """What is not there is listed once, with the command that installs it, and nothing is said without it."""
    def no_library(speaker):
        raise OSError
    monkeypatch.setattr(voices, "flite_library", no_library)
    monkeypatch.setattr(voices, "festival_voices", lambda: ["kal_diphone"])
    monkeypatch.setattr(voices.importlib.util, "find_spec", lambda name: None)
    assert missing(VOICES["train"]) == ["flite: apt install flite",
                                        "festival/slt: apt install festvox-us-slt-hts",
                                        "pico: pip install ttspico"]
    monkeypatch.setattr(voices, "festival_voices", lambda: None)
    assert missing(["festival/kal"]) == ["festival: apt install festival",
                                         "festival/kal: apt install festvox-kallpc16k"]
    with pytest.raises(ValueError, match="apt install flite"):
        say("flite/kal")
