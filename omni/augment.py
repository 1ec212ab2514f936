"""
What happens to a voice between a mouth and a model: rooms, noise, microphones, telephones, codecs.

Why: people differ in more than timbre, and a recognizer that only heard clean clips fails on the first
laptop microphone. A corpus passes the user's clips through `augment`; an evaluation uses fixed conditions
that share its parts (`babble`, `fan`, `room`, `telephone`).

How: everything is computed here from a random.Random, so the same state gives the same bytes. A linear
effect is one product of FFTs. `augment` takes 5 ms of one core for a clip of 2.5 s, on average.
"""
import functools
import io
import random

import librosa
import numpy as np
import soundfile
from scipy.fft import irfft, next_fast_len, rfft

from omni.audio import SAMPLE_RATE
from omni.espeak import draw_voice, speak

CLEAN = 0.15                          # how many clips stay as they are; of the others:
TEMPO, TEMPO_RANGE = 0.5, (0.9, 1.12)  # faster by this factor, with pitch and formants
PAUSES, PAUSE_SECONDS = 0.5, 0.6      # room tone before and after the speech, up to so long each
ROOM, T60_RANGE = 0.35, (0.1, 0.7)    # seconds in which the echo falls by 60 dB
NOISE = 0.6
NOISES = {                            # kind: (weight, lowest SNR, highest SNR in dB)
    "white": (1, 5, 30), "pink": (1, 3, 30), "fan": (2, 3, 30), "hum": (1, 5, 30), "babble": (2, 3, 30),
    "clicks": (1, 12, 30)}            # a click that is as strong as the whole clip would be a gunshot
EQUALIZER, EQUALIZER_DB = 0.5, 6      # a random curve over frequency, up or down by so much
BANDS = {None: 0.6, "laptop": 0.2, "telephone": 0.12, "narrow": 0.08}
NARROW_RATES = (8000, 11025, 12000)   # Hz, of cheap recorders
CLIPPING, CLIPPING_DB = 0.08, 10      # the peaks that are cut off exceed the limit by up to so much
GAIN, GAIN_DB = 0.7, (-30, 0)         # the new peak, in dB of full scale
CODECS = {None: 0.94, "opus": 0.03, "mp3": 0.03}       # rare, as they cost 60 and 15 ms
CODEC_SETTINGS = {                    # format, subtype, compression levels: 13 to 31 and 35 to 50 kbit/s
    "opus": ("OGG", "OPUS", (0.90, 0.97)), "mp3": ("MP3", "MPEG_LAYER_III", (0.5, 0.9))}
SPEED_OF_SOUND = 343                  # m/s
TALKERS = 12                          # voices of a split from which babble draws 4 to 8
CROWD_TEXT = ("The ferry was late again, so we walked along the harbor and looked at the old warehouses. "
              "My cousin wants to rent one of them and repair bicycles there, although the roof leaks. "
              "Somebody should ask the council about it before the autumn storms begin.")


def augment(wav, rng):
    """A clip as another room, microphone or line would give it.

    wav      float32 (samples,) at 16 kHz;  rng: random.Random; the same state gives the same bytes
    Returns  float32 (samples',) at 16 kHz within [-1, 1]: 0.89 to 1.11 times as long, plus up to 1.2 s
    Raises   ValueError for a clip that is empty, silent or not finite
    """
    wav = limit(wav)
    if rng.random() < CLEAN:
        return wav
    if rng.random() < TEMPO:
        wav = resample(wav, SAMPLE_RATE, round(SAMPLE_RATE / rng.uniform(*TEMPO_RANGE)))
    if rng.random() < PAUSES:
        before, after = (round(SAMPLE_RATE * rng.uniform(0, PAUSE_SECONDS)) for _ in range(2))
        wav = mix(np.pad(wav, (before, after)), "pink", rng, snr=rng.uniform(40, 60))
    if rng.random() < ROOM:
        wav = reverberate(wav, rng.choice(impulse_responses()))
    if rng.random() < NOISE:
        kind = rng.choices(list(NOISES), [weight for weight, _, _ in NOISES.values()])[0]
        _, lowest, highest = NOISES[kind]
        wav = mix(wav, kind, rng, rng.uniform(lowest, highest))
    if rng.random() < EQUALIZER:
        wav = equalize(wav, rng)
    band = rng.choices(list(BANDS), BANDS.values())[0]
    if band == "laptop":
        wav = laptop(wav, rng)
    elif band == "telephone":
        wav = telephone(wav)
    elif band == "narrow":
        rate = rng.choice(NARROW_RATES)
        wav = resample(resample(wav, SAMPLE_RATE, rate), rate, SAMPLE_RATE)
    if rng.random() < CLIPPING:
        highest = peak(wav) * decibels(-rng.uniform(0, CLIPPING_DB))
        wav = np.clip(wav, -highest, highest)
    if rng.random() < GAIN:
        wav = wav * (decibels(rng.uniform(*GAIN_DB)) / peak(wav))
    codec = rng.choices(list(CODECS), CODECS.values())[0]
    if codec:
        wav = encode_and_decode(wav, codec, rng)
    return limit(wav)


# ------------------------------------------------------------------- fixed conditions of an evaluation

def babble(wav, rng, snr, split="test"):
    """Add 4 to 8 espeak-ng voices of a split, so much quieter in dB than the clip (its mean power)."""
    return limit(mix(wav, "babble", rng, snr, split))


def fan(wav, rng, snr):
    """Add a fan, so much quieter in dB than the clip (its mean power)."""
    return limit(mix(wav, "fan", rng, snr))


def room(wav, rng, t60):
    """The clip in a random room with reverberation time t60 in s, as loud and as long as before."""
    return limit(reverberate(wav, impulse_response(rng, t60)))


def telephone(wav):
    """300 to 3400 Hz, 8 kHz, mu-law of 8 bits (ITU-T G.711, after gain control), as loud as it was."""
    top = peak(wav)
    wav = shape(wav / top, lambda hz: high_pass(hz, 300, order=10) * low_pass(hz, 3400, order=30))
    wav = np.clip(resample(wav, SAMPLE_RATE, 8000), -1, 1)
    code = np.round(127 * np.log1p(255 * np.abs(wav)) / np.log(256))            # 0 to 127, and a sign
    wav = np.sign(wav) * np.expm1(code / 127 * np.log(256)) / 255
    return limit(top * resample(wav, 8000, SAMPLE_RATE))


CONDITIONS = {                        # of an evaluation: name -> function(wav, rng)
    "babble": functools.partial(babble, snr=10), "fan": functools.partial(fan, snr=10),
    "room": functools.partial(room, t60=0.5), "telephone": lambda wav, rng: telephone(wav)}


# ------------------------------------------------------------------------------------- building blocks

def decibels(db):
    """The factor of an amplitude."""
    return 10 ** (db / 20)


def peak(wav):
    """The largest absolute sample; raises ValueError where there is none to scale by."""
    largest = float(np.abs(wav).max(initial=0))
    if not 0 < largest < np.inf:
        raise ValueError(f"a clip of {len(wav)} samples is empty, silent or not finite; leave it out")
    return largest


def level(wav):
    """The root of the mean power; raises as `peak` does."""
    peak(wav)
    return np.std(wav)


def limit(wav):
    """The clip as float32, made quieter if it leaves [-1, 1]."""
    return np.clip(wav / max(1.0, peak(wav)), -1, 1).astype(np.float32)


def resample(wav, from_rate, to_rate):
    return librosa.resample(np.asarray(wav, np.float32), orig_sr=from_rate, target_sr=to_rate)


def mix(wav, kind, rng, snr, split="train"):
    """Add noise of a kind whose mean power is `snr` dB below that of the whole clip, its pauses included."""
    loudness = level(wav)
    if kind == "babble":
        noise = crowd(rng, len(wav), split)
    else:
        noise = MAKERS[kind](rng, len(wav))
    return wav + noise * np.float32(loudness / level(noise) * decibels(-snr))


def shape(wav, response):
    """Filter without delay: response(frequencies in Hz) -> gains."""
    n = next_fast_len(len(wav) + 4096, real=True)                  # room for the filter to ring
    spectrum = rfft(wav, n)
    spectrum *= response(np.fft.rfftfreq(n, 1 / SAMPLE_RATE))
    return irfft(spectrum, n)[:len(wav)]


def low_pass(hz, cutoff, order):
    """Gains of a Butterworth filter: -3 dB at the cutoff, then -6 dB times the order per octave."""
    return 1 / np.sqrt(1 + (hz / cutoff) ** (2 * order))


def high_pass(hz, cutoff, order):
    return 1 / np.sqrt(1 + (cutoff / np.maximum(hz, 1)) ** (2 * order))


def equalize(wav, rng):
    """A curve through random points at 60, 200, 600, 1800 and 5400 Hz."""
    log_hz = np.log(60 * 3.0 ** np.arange(5))
    points = [rng.uniform(-EQUALIZER_DB, EQUALIZER_DB) for _ in log_hz]
    return shape(wav, lambda hz: decibels(np.interp(np.log(np.maximum(hz, 1)), log_hz, points)))


def laptop(wav, rng):
    """A small microphone in a case: no bass, a resonance of up to 8 dB, and an early end of the treble."""
    center, gain, top = rng.uniform(800, 4000), rng.uniform(0, 8), rng.uniform(6000, 7500)

    def response(hz):
        octaves = np.log2(np.maximum(hz, 1) / center)
        resonance = decibels(gain * np.exp(-(octaves / 0.4) ** 2))
        return high_pass(hz, 150, order=2) * resonance * low_pass(hz, top, order=8)

    return shape(wav, response)


def encode_and_decode(wav, codec, rng):
    """Through a lossy file in memory; libsndfile removes the codec's delay and padding."""
    name, subtype, levels = CODEC_SETTINGS[codec]
    file = io.BytesIO()
    level = rng.uniform(*levels)
    soundfile.write(file, limit(wav), SAMPLE_RATE, subtype, format=name, compression_level=level)
    file.seek(0)
    return soundfile.read(file, dtype="float32")[0]


def impulse_response(rng, t60):
    """What a click becomes in a random shoebox room -> (samples,), t60 s long; the direct sound comes first.

    The first 30 ms are image sources (Allen and Berkley 1979) with Eyring's absorption. Then comes noise that
    has the images' mean energy: 4 pi c r^2 / volume per second for a direct sound of 1, at distance r.
    """
    size = np.array([rng.uniform(2.5, 6), rng.uniform(2.5, 5), rng.uniform(2.3, 3.2)])         # m
    mouth = np.array([rng.uniform(0.3, length - 0.3) for length in size])
    direction = np.array([rng.gauss(0, 1) for _ in size])
    ear = mouth + rng.uniform(0.3, 2) * direction / np.linalg.norm(direction)
    ear = np.clip(ear, 0.2, size - 0.2)
    distance, volume, surface = np.linalg.norm(ear - mouth), size.prod(), 2 * size.prod() * (1 / size).sum()
    reflection = np.exp(-0.161 * volume / (surface * t60) / 2)     # of amplitudes, by a wall

    n, mirrored = (grid.ravel() for grid in np.meshgrid(range(-2, 3), (0, 1)))       # 10 images an axis
    offsets = [(1 - 2 * mirrored) * mouth[i] + 2 * n * size[i] - ear[i] for i in range(3)]
    distances = np.sqrt(functools.reduce(np.add.outer, [offset ** 2 for offset in offsets])).ravel()
    bounces = functools.reduce(np.add.outer, [np.abs(n - mirrored) + np.abs(n)] * 3).ravel()
    at = np.round((distances - distance) / SPEED_OF_SOUND * SAMPLE_RATE).astype(int)
    early = at < 0.03 * SAMPLE_RATE
    strength = distance / distances[early] * reflection ** bounces[early]

    seconds = np.arange(round(t60 * SAMPLE_RATE)) / SAMPLE_RATE
    density = 4 * np.pi * SPEED_OF_SOUND * distance ** 2 / (volume * SAMPLE_RATE)    # energy per sample
    response = np.sqrt(density) * 10 ** (-3 * seconds / t60) * gaussian(rng, len(seconds))
    response[:round(0.03 * SAMPLE_RATE)] = np.bincount(at[early], strength, round(0.03 * SAMPLE_RATE))
    return response.astype(np.float32)


@functools.cache
def impulse_responses():
    """64 rooms, made once in a process."""
    rng = random.Random("rooms")
    return [impulse_response(rng, rng.uniform(*T60_RANGE)) for _ in range(64)]


def reverberate(wav, response):
    """Convolve; the clip stays as loud and as long as it was."""
    n = next_fast_len(len(wav) + len(response), real=True)
    wet = irfft(rfft(wav, n) * rfft(response, n), n)[:len(wav)]
    return wet * np.float32(level(wav) / level(wet))


# --------------------------------------------------------------------- noise, (rng, samples) -> (samples,)

def gaussian(rng, n):
    return np.random.default_rng(rng.getrandbits(64)).standard_normal(n, np.float32)


def colored(rng, n, slope, cutoff=SAMPLE_RATE):
    """Noise whose power falls as frequency ** -slope from 30 Hz on: 0 white, 1 pink, 2 brown."""
    size = next_fast_len(max(n, SAMPLE_RATE), real=True)
    hz = np.fft.rfftfreq(size, 1 / SAMPLE_RATE)
    gains = np.maximum(hz, 30) ** (-slope / 2) * low_pass(hz, cutoff, order=2) * (hz >= 30)
    return irfft(gaussian(rng, 2 * len(hz)).view(np.complex64) * gains.astype(np.float32), size)[:n]


def fan_noise(rng, n):
    """Low noise that swells slowly."""
    turns = np.arange(n) * (rng.uniform(0.3, 4) / SAMPLE_RATE) + rng.random()
    swell = 1 + rng.uniform(0, 0.5) * np.sin(2 * np.pi * turns)
    return colored(rng, n, rng.uniform(0.5, 1.5), rng.uniform(300, 2000)) * swell.astype(np.float32)


def hum(rng, n):
    """50 or 60 Hz with harmonics. It repeats each second, so we compute one."""
    spectrum = np.zeros(SAMPLE_RATE // 2 + 1, np.complex64)
    base = rng.choice((50, 60))
    for k in range(1, 16):
        spectrum[k * base] = rng.uniform(0.2, 1) / k * np.exp(2j * np.pi * rng.random())
    return np.resize(irfft(spectrum), n)


@functools.cache
def talkers(split):
    """TALKERS clips of CROWD_TEXT, in voices of one split, made once in a process (2 s).

    What espeak-ng says depends, inaudibly, on what it said before in the same process, so two processes agree
    on the babble to the byte only if they spoke the same until then.
    """
    rng = random.Random(f"talkers {split}")
    clips = [speak(CROWD_TEXT, draw_voice(rng, split)) for _ in range(TALKERS)]
    return [clip / np.std(clip) + 0.01 * gaussian(rng, len(clip)) for clip in clips]     # pauses are not zero


def crowd(rng, n, split="train"):
    """4 to 8 people who talk at once, each from another word on."""
    total = np.zeros(n, np.float32)
    for clip in rng.sample(talkers(split), rng.randint(4, 8)):
        start = rng.randrange(len(clip))
        total += rng.uniform(0.4, 1) * np.resize(np.concatenate([clip[start:], clip[:start]]), n)
    return total


def taps(rng, n, per_second, low, high, decay):
    """Strokes at random times: a resonance between low and high Hz with noise, dying away in `decay` s."""
    total = np.zeros(n + SAMPLE_RATE, np.float32)
    t = np.arange(round(8 * decay * SAMPLE_RATE)) / SAMPLE_RATE
    for _ in range(max(1, round(per_second * n / SAMPLE_RATE))):
        stroke = np.sin(2 * np.pi * rng.uniform(low, high) * t)
        stroke += rng.uniform(0.1, 0.5) * gaussian(rng, len(t))
        at = rng.randrange(n)
        total[at:at + len(t)] += rng.uniform(0.2, 1) * np.exp(-t / decay) * stroke
    return total[:n]


MAKERS = {                            # of all NOISES but babble
    "white": lambda rng, n: colored(rng, n, 0), "pink": lambda rng, n: colored(rng, n, 1),
    "fan": fan_noise, "hum": hum,
    "clicks": lambda rng, n: taps(rng, n, rng.uniform(3, 15), 1000, 5000, 0.003)}
