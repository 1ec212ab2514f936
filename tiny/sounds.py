"""
Sounds without speech: what a microphone picks up when nobody speaks to the model.

Why: a model that has only heard questions hears one in a cough, too. In the embedded world it hears music,
knocks and noise as well, and learns to say that it did not understand. The test has kinds of sound that
training does not hold.

How: `sound` makes a clip of a kind from a random.Random, so the same state gives the same bytes. The noises
are those of omni/augment.py; here they are alone.
"""
import numpy as np

from omni import augment
from omni.audio import MIN_SECONDS, SAMPLE_RATE
from omni.augment import colored, crowd, decibels, gaussian, peak, taps

SOUNDS = {
    "train": ["white", "pink", "fan", "hum", "silence", "clicks", "knocks", "beeps", "music", "babble"],
    "test": ["rumble", "strings", "siren", "typing"]}


def typing(rng, n):
    """Each key makes two strokes: down, and up again a tenth of a second later."""
    down = taps(rng, n, rng.uniform(4, 10), 1500, 5000, 0.004)
    up = np.roll(down, rng.randint(1200, 2200))
    return down + 0.4 * up


def tone(hz, seconds, fade):
    """A note of six harmonics. The k-th one fades k times as fast as the first, at `fade` per second."""
    t = np.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    waves = [np.sin(2 * np.pi * k * hz * t) * np.exp(-fade * k * t) / k for k in range(1, 7) if k * hz < 7500]
    edges = np.minimum(1, np.minimum(t, seconds - t) / 0.01)       # 10 ms each, against clicks
    return np.sum(waves, 0) * edges


def melody(rng, n, fade):
    """A note or a triad on each beat, in a random key and at 60 to 180 beats a minute."""
    total, at, root = np.zeros(n + 2 * SAMPLE_RATE, np.float32), 0, rng.uniform(110, 330)
    beat = 60 / rng.uniform(60, 180)
    while at < n:
        degree = rng.choice((0, 2, 4, 5, 7, 9, 11, 12))
        chord = (0, 4, 7) if rng.random() < 0.4 else (0,)
        for semitones in chord:
            note = tone(root * 2 ** ((degree + semitones) / 12), beat * rng.choice((1, 1, 2)), fade)
            total[at:at + len(note)] += note
        at += round(beat * SAMPLE_RATE)
    return total[:n]


def beeps(rng, n):
    """The same pure tone again and again, as machines do it."""
    seconds, period, hz = rng.uniform(0.06, 0.4), rng.uniform(0.5, 1.2), rng.uniform(400, 3000)
    t = np.arange(n) / SAMPLE_RATE
    return np.sin(2 * np.pi * hz * t) * (t % period < seconds)


def siren(rng, n):
    """A tone that wanders between two frequencies."""
    turns = np.arange(n) / SAMPLE_RATE * rng.uniform(0.2, 3)
    hz = rng.uniform(700, 1200) + rng.uniform(100, 500) * np.sin(2 * np.pi * turns)
    return np.sin(2 * np.pi * np.cumsum(hz) / SAMPLE_RATE)


MAKERS = augment.MAKERS | {            # kind -> function(rng, samples)
    "silence": lambda rng, n: colored(rng, n, 1), "rumble": lambda rng, n: colored(rng, n, 2, 500),
    "babble": crowd, "beeps": beeps, "siren": siren, "typing": typing,
    "knocks": lambda rng, n: taps(rng, n, rng.uniform(1, 4), 80, 400, 0.03),
    "music": lambda rng, n: melody(rng, n, fade=0), "strings": lambda rng, n: melody(rng, n, fade=3)}


def sound(kind, rng, seconds):
    """A clip in which nobody speaks to the model -> float32 (samples,) at 16 kHz, its peak -30 to -1 dBFS.

    kind     a name in SOUNDS; "silence" is room tone at -60 dBFS, ten times what `read_audio` refuses
    Raises   ValueError for another kind, or a clip shorter than 0.1 s
    """
    if kind not in MAKERS:
        raise ValueError(f"no sound {kind!r}; there are {', '.join(MAKERS)}")
    if seconds < MIN_SECONDS:
        raise ValueError(f"a sound of {seconds:.2f} s; it must last at least {MIN_SECONDS} s")
    n = round(seconds * SAMPLE_RATE)
    wav = MAKERS[kind](rng, n)
    wav = wav / peak(wav) + 0.001 * gaussian(rng, n)               # no digital zero between knocks
    db = -60 if kind == "silence" else rng.uniform(-30, -1)
    return (wav * (decibels(db) / peak(wav))).astype(np.float32)
