"""
The synthesizer: espeak-ng, called through ctypes, and its voices.

Why: the embedded world has no recordings, and users who bring only texts may have none either. espeak-ng
comes as the wheel `espeakng-loader`, so nothing has to be installed as root.

How: `speak(text, voice)` says a sentence; marks in it, such as <stress>, change how a part is said. A voice
is "accent+variant:rate:pitch", and `draw_voice` draws one. Every voice belongs to one split, so a test
dialogue is asked in a voice that was never heard in training.
"""
import ctypes
import functools
import re
from xml.sax.saxutils import escape

import librosa
import numpy as np

from omni.audio import SAMPLE_RATE

ACCENTS = ["en-us", "en", "en-gb-scotland", "en-gb-x-rp", "en-gb-x-gbclan", "en-029", "en-us-nyc"]
UNSEEN_ACCENT = "en-gb-x-gbcwmd"                      # in no split: only for testing the recognizer
VARIANTS = {
    "train": "Alex Alicia Andy Annie Denis Diogo Henrique Hugo Jacky Lee Marco Mario Michael Mike Nguyen "
             "Reed aunty belinda benjamin boris caleb david ed f1 f3 f5 grandma grandpa gustave ian iven "
             "iven3 john kaukovalta klatt klatt3 klatt6 m1 m2 m3 m4 m5 m6 m8 marcelo max michel miguel "
             "norbert pablo pedro quincy rob robert sandro shelby steph2 travis victor zac".split(),
    "validation": "Andrea edward2 iven2 mike2".split(),
    "test": "adam linda Gene steph paul f4 m7 antonio anika klatt4".split(),
}
ASSISTANT = "en-us+edward:165:50"                     # of every reply: accent+variant:words/min:pitch

STYLES = {                                            # mark -> SSML's prosody
    "stress": 'pitch="+40%" rate="80%"',              # of the word that answers a question
    "merry": 'pitch="+30%" rate="110%"',
    "calm": 'pitch="-15%" rate="85%"',
}
MARK = re.compile(f"<(/?)({'|'.join(STYLES)})>")


def plain(text):
    """A text without its marks: "<stress>Rome</stress> is in Italy." -> "Rome is in Italy."."""
    return MARK.sub("", text)


def ssml(text):
    """A text with marks -> the same in SSML, which espeak-ng reads."""
    pieces = MARK.split(text)                         # text, "" or "/", mark, text ...
    out = escape(pieces[0])
    for slash, mark, rest in zip(pieces[1::3], pieces[2::3], pieces[3::3]):
        out += "</prosody>" if slash else f"<prosody {STYLES[mark]}>"
        out += escape(rest)
    return out


def draw_voice(rng, split, accents=ACCENTS):
    """Draw a voice "accent+variant:rate:pitch" of a split: 130 to 190 words/min, pitch 25 to 75 of 99."""
    accent, variant = rng.choice(accents), rng.choice(VARIANTS[split])
    return f"{accent}+{variant}:{rng.randint(130, 190)}:{rng.randint(25, 75)}"


class Event(ctypes.Structure):                        # espeak_EVENT of speak_lib.h
    _fields_ = [("type", ctypes.c_int), ("unique_identifier", ctypes.c_uint), ("text_position", ctypes.c_int),
                ("length", ctypes.c_int), ("audio_position", ctypes.c_int), ("sample", ctypes.c_int),
                ("user_data", ctypes.c_void_p), ("id", ctypes.c_char * 8)]


SYNCHRONOUS, PHONEME_EVENTS, UTF8, SSML, RATE, PITCH, PHONEME = 2, 1, 1, 16, 1, 3, 7     # of speak_lib.h
Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(Event))
chunks, phoneme_times = [], []                        # what espeak-ng has said since `speak` was called


@Callback
def collect(samples, count, events):
    """espeak-ng calls this with each piece of sound, and with the events that fall into it."""
    if samples and count:
        chunks.append(np.ctypeslib.as_array(samples, (count,)).copy())
    i = 0
    while events[i].type:
        if events[i].type == PHONEME:
            phoneme_times.append((events[i].sample, events[i].id.decode("utf-8", "replace")))
        i += 1
    return 0


@functools.cache
def start_espeak():
    """Load and start espeak-ng -> (library, sample rate in Hz)."""
    import espeakng_loader  # here, because a corpus with recordings does not need it
    library = ctypes.CDLL(espeakng_loader.get_library_path())
    data = espeakng_loader.get_data_path().encode()
    rate = library.espeak_Initialize(SYNCHRONOUS, 0, data, PHONEME_EVENTS)
    if rate <= 0:
        raise RuntimeError("espeak-ng did not start; reinstall the package espeakng-loader")
    library.espeak_SetSynthCallback(collect)
    return library, rate


def speak(text, voice, phonemes=False):
    """Say `text`, which may hold marks (STYLES), with espeak-ng. Not thread-safe (espeak-ng has one global
    state): use processes.

    voice    "accent+variant:rate:pitch", such as ASSISTANT
    Returns  float32 (samples,) at 16 kHz, within [-1, 1]; with phonemes=True also [(second, phoneme), ...]
    Raises   ValueError for a voice that espeak-ng does not know, or a text that makes no sound
    """
    library, rate = start_espeak()
    name, *numbers = voice.split(":")
    if len(numbers) != 2 or not all(n.isdecimal() for n in numbers):
        raise ValueError(f"voice {voice!r} is not of the form accent+variant:rate:pitch, such as {ASSISTANT}")
    words_per_minute, pitch = map(int, numbers)
    if library.espeak_SetVoiceByName(name.encode()) != 0:
        raise ValueError(f"espeak-ng has no voice {name!r}")
    library.espeak_SetParameter(RATE, words_per_minute, 0)     # every time, as espeak-ng keeps its state
    library.espeak_SetParameter(PITCH, pitch, 0)
    chunks.clear()
    phoneme_times.clear()
    flags = UTF8
    if MARK.search(text):
        text, flags = ssml(text), UTF8 | SSML
    data = text.encode()
    library.espeak_Synth(data, len(data) + 1, 0, 1, 0, flags, None, None)
    if not chunks:
        raise ValueError(f"espeak-ng made no sound of {text!r}")
    wav = np.concatenate(chunks).astype(np.float32) / 32768
    wav = librosa.resample(wav, orig_sr=rate, target_sr=SAMPLE_RATE)
    if not phonemes:
        return wav
    return wav, [(sample / rate, name) for sample, name in phoneme_times]
