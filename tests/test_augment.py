"""Augmentation does what its numbers say: levels, bands and echoes are measured with other tools than those
that made them. It protects training, which would not notice that a noise is 10 dB off, and the evaluation,
which states its conditions in dB and seconds."""
import random

import numpy as np
import pytest
import soundfile
from conftest import ROOT
from scipy.signal import correlate, welch

from omni import augment as augmentation
from omni.audio import SAMPLE_RATE
from omni.augment import augment, babble, encode_and_decode, fan, room, telephone
from omni.espeak import VARIANTS


@pytest.fixture(scope="module")
def voice():
    """2.5 s of a recording, quiet enough that 30 dB of noise more does not leave [-1, 1]."""
    wav, rate = soundfile.read(ROOT / "tests" / "data" / "jfk.flac", dtype="float32")
    assert rate == SAMPLE_RATE
    return 0.05 * wav[:40000] / np.abs(wav[:40000]).max()


def power_db(wav):
    """By Parseval's theorem, from the spectrum."""
    return 10 * np.log10(np.sum(np.abs(np.fft.fft(wav.astype(np.float64))) ** 2) / len(wav) ** 2)


def lag(one, other):
    """By how many samples `other` is late."""
    return np.argmax(correlate(other, one, "full")) - (len(one) - 1)


@pytest.mark.parametrize("condition", [babble, fan])
@pytest.mark.parametrize("snr", [0, 10, 25])
def test_noise_has_the_level_that_was_asked_for(voice, condition, snr):
    noise = condition(voice, random.Random(snr), snr) - voice
    assert abs(power_db(voice) - power_db(noise) - snr) < 0.5


def test_loud_noise_keeps_its_ratio():
    """A sum that leaves [-1, 1] is scaled as a whole and not clipped."""
    tone = np.sin(np.arange(40000, dtype=np.float32) * 0.3)
    both = fan(tone, random.Random(1), 0).astype(np.float64)
    scale = both @ tone / (tone @ tone)
    assert np.abs(both).max() <= 1 and scale < 0.7
    assert abs(power_db(scale * tone) - power_db(both - scale * tone)) < 0.5


@pytest.mark.parametrize("split", VARIANTS)
def test_babble_keeps_to_its_split(voice, split, monkeypatch):
    """Nobody who talks in the background of a test was heard in training."""
    voices = []

    def listen(text, voice):
        voices.append(voice)
        return np.random.default_rng(len(voices)).standard_normal(16000).astype(np.float32)

    monkeypatch.setattr(augmentation, "speak", listen)
    augmentation.talkers.cache_clear()
    babble(voice, random.Random(0), 10, split)
    augmentation.talkers.cache_clear()
    assert len(voices) >= 8
    assert {v.split("+")[1].split(":")[0] for v in voices} <= set(VARIANTS[split])


def test_telephone_band():
    """White noise through the line: flat from 400 to 3000 Hz, 30 dB down below 200 and above 4000."""
    noise = 0.1 * np.random.default_rng(0).standard_normal(160000).astype(np.float32)
    hz, before = welch(noise, SAMPLE_RATE, nperseg=1024, detrend=False)
    _, after = welch(telephone(noise), SAMPLE_RATE, nperseg=1024, detrend=False)
    gains = 10 * np.log10(after / before)
    assert np.abs(gains[(hz > 400) & (hz < 3000)]).max() < 1.5
    assert gains[(hz < 200) | (hz > 4000)].max() < -30


def test_mu_law_noise():
    """Eight bits of mu-law have a signal-to-noise ratio of 38 dB, whatever the level of the clip."""
    t = np.arange(40000, dtype=np.float32) / SAMPLE_RATE
    for level in (0.003, 0.9):
        tone = level * np.sin(2 * np.pi * 1017 * t)
        error = (telephone(tone) - tone)[2000:-2000]
        assert abs(power_db(tone) - power_db(error) - 38) < 2.5


@pytest.mark.parametrize("t60", [0.15, 0.3, 0.6])
def test_room_decays_as_asked(t60):
    """A click in a room, integrated backwards (Schroeder 1965): the slope from -5 to -25 dB gives T60."""
    click = np.zeros(16000, np.float32)
    click[100] = 0.5
    for seed in range(8):
        answer = room(click, random.Random(seed), t60)
        assert np.argmax(np.abs(answer) > 1e-4) == 100             # the direct sound is not late
        energy = np.cumsum(answer[101:][::-1].astype(np.float64) ** 2)[::-1]
        decay = 10 * np.log10(energy / energy[0] + 1e-12)
        first, last = np.argmax(decay < -5), np.argmax(decay < -25)
        slope = np.polyfit(np.arange(first, last) / SAMPLE_RATE, decay[first:last], 1)[0]
        assert abs(-60 / slope / t60 - 1) < 0.2


@pytest.mark.parametrize("codec", ["opus", "mp3"])
@pytest.mark.parametrize("samples", [1600, 16001, 40000])
def test_codecs_keep_time_and_length(voice, codec, samples):
    for seed in range(3):                             # other bit rates
        wav = voice[-samples:]
        decoded = encode_and_decode(wav, codec, random.Random(seed))
        assert len(decoded) == samples
        assert lag(wav, decoded) == 0
        assert not np.array_equal(wav, decoded)


@pytest.mark.parametrize("effect", [telephone, lambda wav: augmentation.laptop(wav, random.Random(3)),
                                    lambda wav: augmentation.equalize(wav, random.Random(4))])
def test_filters_keep_time_and_length(voice, effect):
    """No filter delays the speech."""
    out = effect(voice)
    assert len(out) == len(voice)
    assert lag(voice, out) == 0


def test_augment_gives_clips(voice):
    """Whatever was drawn: finite, within [-1, 1], not empty, of the documented length. 15 % stay as they are,
    and the same seed gives the same bytes."""
    kept, short = 0, voice[-8000:]
    for seed in range(400):
        out = augment(short, random.Random(seed))
        assert out.dtype == np.float32 and out.ndim == 1
        assert 1e-4 < np.abs(out).max() <= 1          # NaN fails this too
        assert len(short) / 1.13 < len(out) < len(short) / 0.89 + 1.2 * SAMPLE_RATE
        kept += np.array_equal(out, short)
        if seed < 40:
            assert out.tobytes() == augment(short, random.Random(seed)).tobytes()
    assert 0.10 < kept / 400 < 0.20


def test_pauses_are_not_digital_silence(voice, monkeypatch):
    """Only pauses: room tone 40 to 60 dB below the clip stands where nobody speaks."""
    for name in ("CLEAN", "TEMPO", "ROOM", "NOISE", "EQUALIZER", "CLIPPING", "GAIN"):
        monkeypatch.setattr(augmentation, name, 0)
    monkeypatch.setattr(augmentation, "PAUSES", 1)
    monkeypatch.setattr(augmentation, "BANDS", {None: 1})
    monkeypatch.setattr(augmentation, "CODECS", {None: 1})
    for seed in range(5):
        out = augment(voice, random.Random(seed))
        pause = out[:lag(voice, out)]
        assert len(out) > len(voice) and np.all(pause != 0)
        assert -63 < power_db(pause) - power_db(out) < -37


@pytest.mark.parametrize("wav", [np.zeros(0, np.float32), np.zeros(16000, np.float32),
                                 np.full(16000, np.nan, np.float32)])
def test_what_is_no_sound_is_refused(wav):
    """A clip without a level cannot have a signal-to-noise ratio."""
    for call in (lambda: augment(wav, random.Random(0)), lambda: telephone(wav),
                 lambda: fan(wav, random.Random(0), 10), lambda: room(wav, random.Random(0), 0.3)):
        with pytest.raises(ValueError, match="empty, silent or not finite"):
            call()
