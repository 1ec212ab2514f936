"""
Voices that espeak-ng did not make: flite, festival and SVOX Pico, which are built from recordings of people.

Why: a listener who has only heard espeak-ng understands only espeak-ng. These synthesizers speak with other
sounds, other rhythms and other melodies, and we change their rate, pitch and vocal tract to get many speakers
from a few.

How: `draw_voice` draws a voice of a split, `speak_all` says sentences, `missing` lists what is not installed.
`python -m tiny.voices` prints that list. `say_all` speaks in any voice of the embedded world, espeak-ng's
included. tiny/people.parquet holds clips of the voices of train, which tiny/backbones.py made, so that a
corpus can hear them where no synthesizer is installed: columns text, voice, speech (an Opus file).
A voice is "engine/name:rate:pitch:tract", such as "flite/slt:1.10:0.95:1.05". The three factors are
relative to how the synthesizer speaks by itself:
    rate   1.10: 10 % more words per minute
    pitch  0.95: the melody is 5 % lower
    tract  1.05: the vocal tract is 5 % longer, so all formants are 5 % lower, as in a taller speaker
We ask the synthesizer for rate * tract and pitch * tract, and then stretch its waveform by the factor tract.
This lowers everything by it, so that rate and pitch come out as asked and only the formants have moved.

    voice          recordings of                                         licence
    flite/kal      Kevin Lenzo: diphones, at 8 kHz                       CMU (permissive)
    flite/kal16    the same at 16 kHz                                    CMU
    flite/slt      "slt", a US woman: statistical                        CMU
    flite/awb      "awb", a Scottish man: statistical                    CMU
    flite/rms      "rms", a US man: statistical                          CMU
    festival/kal   Kevin Lenzo: diphones (Black and Lenzo, 1998)         Edinburgh (permissive)
    festival/slt   "slt" of CMU ARCTIC: statistical (HTS), at 32 kHz     CMU, parts of it 3-clause BSD
    festival/ked   a US man: diphones (CSTR, 1997)                       Edinburgh
    pico/en-US     SVOX AG (2009) does not name the speaker: statistical Apache 2.0
    pico/en-GB     the same in British English                           Apache 2.0

The sources are /usr/share/doc/{flite,libflite1,festvox-*} of Debian 12 and the NOTICE of ttspico 0.3.2. So
training hears four people, and the names kal and slt occur in no other split.
"""
import ctypes
import functools
import importlib.util
import io
import os
import random
import re
import shutil
import subprocess
import tempfile

import librosa
import numpy as np
import pyarrow.parquet
import soundfile

from omni.audio import SAMPLE_RATE
from omni.configure import fail
from omni.espeak import plain, speak
from tiny.sounds import sound

VOICES = {
    "train": ("flite/kal", "flite/kal16", "flite/slt", "festival/kal", "festival/slt", "pico/en-US",
              "pico/en-GB"),
    "validation": ("flite/awb",),
    "test": ("flite/rms", "festival/ked"),
}
CLIPS = f"{os.path.dirname(__file__)}/people.parquet"
NAMES = [name for names in VOICES.values() for name in names]
RATES, PITCHES = (0.80, 1.25), (0.80, 1.25)           # of the people in train
LOW_TRACTS, HIGH_TRACTS = (0.85, 1.08), (0.92, 1.18)  # of voices below and above 140 Hz: what people have,
LOW = ("flite/kal", "flite/kal16", "festival/kal")    # and what pocketsphinx still understands
SMALLEST, LARGEST = 0.75, 1.35                        # factors that every synthesizer can follow
FORM = re.compile(r"([a-z]+/[\w-]+):(\d\.\d\d):(\d\.\d\d):(\d\.\d\d)")
FESTIVAL = {                                          # name -> (what festival calls it, Debian package)
    "kal": ("kal_diphone", "festvox-kallpc16k"),
    "slt": ("cmu_us_slt_arctic_hts", "festvox-us-slt-hts"),
    "ked": ("ked_diphone", "festvox-kdlpc16k"),
}
FIXED_PITCH = "festival/slt"                          # festival's HTS module has no setting for the pitch
PICO_VOLUME = 50                                      # percent; at 100 many samples are clipped, at 60 none


# ----------------------------------------------------------------------------------------------------- voices

def draw_voice(rng, split):
    """Draw a voice "engine/name:rate:pitch:tract" of a split.

    In train the factors vary, as people do; in validation and test every voice speaks as it is. festival/slt
    cannot change its pitch alone: its pitch moves with its tract.
    """
    name = rng.choice(VOICES[split])
    if split != "train":
        return f"{name}:1.00:1.00:1.00"
    rate, pitch = rng.uniform(*RATES), rng.uniform(*PITCHES)
    tract = round(rng.uniform(*(LOW_TRACTS if name in LOW else HIGH_TRACTS)), 2)
    if name == FIXED_PITCH:
        pitch = 1 / tract
    return f"{name}:{rate:.2f}:{pitch:.2f}:{tract:.2f}"


def read_voice(voice):
    """A voice -> ("engine/name", rate, pitch, tract). Raises ValueError for one that does not exist."""
    match = FORM.fullmatch(voice)
    if not match:
        raise ValueError(f"voice {voice!r} is not of the form engine/name:rate:pitch:tract, such as "
                         "flite/slt:1.10:0.95:1.05")
    name = match[1]
    rate, pitch, tract = (float(factor) for factor in match.groups()[1:])
    if name not in NAMES:
        raise ValueError(f"voice {voice!r}: there is no {name!r}; choose from {', '.join(NAMES)}")
    if not all(SMALLEST <= factor <= LARGEST for factor in (rate, pitch, tract)):
        raise ValueError(f"voice {voice!r}: rate, pitch and tract must be from {SMALLEST} to {LARGEST}")
    if name == FIXED_PITCH and abs(pitch - 1 / tract) > 0.0051:       # half of the last digit
        raise ValueError(f"voice {voice!r}: the pitch of {name} is 1 / tract, here {1 / tract:.2f}")
    return name, rate, pitch, tract


@functools.cache
def festival_voices():
    """What festival calls its installed voices; None if festival is not installed."""
    if not shutil.which("festival"):
        return None
    command = ["festival", "-b", "(print (voice.list))"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip("()\n").split()


def missing(names):
    """What has to be installed before the voices `names` ("engine/name") can speak: lines such as
    "flite: apt install flite". None are missing: an empty list."""
    lines = []
    for name in names:
        engine, _, speaker = name.partition("/")
        if engine == "flite":
            try:
                flite_library(speaker)
            except OSError:                           # ctypes found no such library
                lines.append("flite: apt install flite")
        elif engine == "festival":
            called, package = FESTIVAL[speaker]
            if festival_voices() is None:
                lines.append("festival: apt install festival")
            if called not in (festival_voices() or ()):
                lines.append(f"{name}: apt install {package}")
        elif not importlib.util.find_spec("ttspico"):
            lines.append("pico: pip install ttspico")
    return list(dict.fromkeys(lines))


# ---------------------------------------------------------------------------------------------------- engines
# Each says [(text, name, rate, pitch)] and yields (int16 samples, their rate in Hz), in order.

class FliteVoice(ctypes.Structure):                   # the first fields of cst_voice
    _fields_ = [("name", ctypes.c_char_p), ("features", ctypes.c_void_p)]


class FliteWave(ctypes.Structure):                    # cst_wave
    _fields_ = [("type", ctypes.c_char_p), ("sample_rate", ctypes.c_int), ("num_samples", ctypes.c_int),
                ("num_channels", ctypes.c_int), ("samples", ctypes.POINTER(ctypes.c_short))]


# flite keeps a pointer to the name of a feature, not a copy: these two must outlive every call.
STRETCH, F0_SHIFT = b"duration_stretch", b"f0_shift"


@functools.cache
def flite_core():
    """flite itself, without a voice."""
    library = ctypes.CDLL("libflite.so.1")
    library.get_param_float.argtypes = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_float
    library.get_param_float.restype = ctypes.c_float
    library.feat_set_float.argtypes = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_float
    library.flite_text_to_wave.argtypes = ctypes.c_char_p, ctypes.POINTER(FliteVoice)
    library.flite_text_to_wave.restype = ctypes.POINTER(FliteWave)
    library.delete_wave.argtypes = [ctypes.POINTER(FliteWave)]
    library.flite_init()
    return library


def flite_library(speaker):
    """The library with the voice of a speaker; OSError if it is not installed."""
    return ctypes.CDLL(f"libflite_cmu_us_{speaker}.so.1")


@functools.cache
def flite_voice(speaker):
    """-> (voice, how much it stretches durations by itself)."""
    register = getattr(flite_library(speaker), f"register_cmu_us_{speaker}")
    register.argtypes = [ctypes.c_char_p]
    register.restype = ctypes.POINTER(FliteVoice)
    voice = register(None)
    return voice, flite_core().get_param_float(voice.contents.features, STRETCH, 1.0)


def speak_flite(jobs):
    """flite, through its shared libraries."""
    flite = flite_core()
    for text, name, rate, pitch in jobs:
        voice, stretch = flite_voice(name.removeprefix("flite/"))
        flite.feat_set_float(voice.contents.features, STRETCH, stretch / rate)
        flite.feat_set_float(voice.contents.features, F0_SHIFT, pitch)
        flite.srand(1)                                # C's, for its noise: the same text sounds the same
        wave = flite.flite_text_to_wave(text.encode(), voice)
        if not wave:
            yield np.zeros(0, np.int16), SAMPLE_RATE
            continue
        samples = np.ctypeslib.as_array(wave.contents.samples, (wave.contents.num_samples,)).copy()
        sample_rate = wave.contents.sample_rate
        flite.delete_wave(wave)
        yield samples, sample_rate


# The pitch of a diphone voice: the mean and the spread (Hz) of its melody, both times a factor.
SCHEME = """
(define (shift_pitch factor)
  (set! int_lr_params
    (mapcar (lambda (pair)
              (if (member (car pair) '(target_f0_mean target_f0_std))
                  (list (car pair) (* factor (cadr pair)))
                  pair))
            int_lr_params)))
"""


def scheme(text, name, rate, pitch, path):
    """The lines of a festival script that say one sentence and save it as a WAV file."""
    lines = [f"(voice_{FESTIVAL[name.removeprefix('festival/')][0]})"]    # also resets what we set below
    if name == FIXED_PITCH:
        lines.append(f"(set! hts_engine_params (cons '(\"-r\" {rate:.4f}) hts_engine_params))")
    else:
        lines.append(f"(Parameter.set 'Duration_Stretch {1 / rate:.4f})")
        lines.append(f"(shift_pitch {pitch:.4f})")
    quoted = text.replace("\\", "\\\\").replace('"', '\\"')
    lines.append(f"(utt.save.wave (utt.synth (Utterance Text \"{quoted}\")) \"{path}\" 'riff)")
    return "\n".join(lines)


def speak_festival(jobs):
    """festival: one process says all sentences. It stops at the first that it cannot say."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [f"{folder}/{i}.wav" for i in range(len(jobs))]
        script = f"{folder}/say.scm"
        with open(script, "w", encoding="utf-8") as f:
            print(SCHEME, *(scheme(*job, path) for job, path in zip(jobs, paths)), sep="\n", file=f)
        subprocess.run(["festival", "-b", script], env=os.environ | {"TMPDIR": folder},
                       stdin=subprocess.DEVNULL, capture_output=True)
        for path in paths:
            if os.path.exists(path):
                yield soundfile.read(path, dtype="int16")
            else:
                yield np.zeros(0, np.int16), SAMPLE_RATE


def speak_pico(jobs):
    """SVOX Pico. It takes rate and pitch in whole percent, and its own pauses keep their length.

    ttspico 0.3.2 never frees the sound that it returns, about 80 kB a sentence; a pool frees it when its
    workers end, see multiprocessing's maxtasksperchild.
    """
    import ttspico  # here, because only these two voices need it
    for text, name, rate, pitch in jobs:
        engine = ttspico.TtsEngine(name.removeprefix("pico/"))        # new, or its noise would go on
        engine.volume = PICO_VOLUME
        engine.rate = round(100 * rate)
        engine.pitch = round(100 * pitch)
        yield np.frombuffer(engine.speak(text) or b"", np.int16), 16000


ENGINES = {"flite": speak_flite, "festival": speak_festival, "pico": speak_pico}


# ----------------------------------------------------------------------------------------------------- speech

def resample(samples, sample_rate, tract):
    """int16 samples at sample_rate Hz -> float32 at 16 kHz, stretched by the factor tract.

    A peak that resampling lifts above 1 scales the clip down; otherwise the level stays as it is.
    """
    wav = samples.astype(np.float32) / 32768
    wav = librosa.resample(wav, orig_sr=sample_rate, target_sr=SAMPLE_RATE * tract)
    return wav / max(1, np.abs(wav).max())


def speak_all(jobs):
    """Say sentences. Each engine keeps a global state: use processes, not threads. A job of festival costs
    least in a long list, which one process says.

    jobs     [(text, voice)]
    Returns  [float32 (samples,) at 16 kHz, within [-1, 1]], in the order of jobs
    Raises   ValueError for a voice that does not exist or is not installed, or a text that makes no sound
    """
    voices = [read_voice(voice) for _, voice in jobs]
    lines = missing(sorted({name for name, *_ in voices}))
    if lines:
        raise ValueError(f"synthesizers are missing: {'; '.join(lines)}")
    for text, voice in jobs:
        if not any(character.isalnum() for character in text):
            raise ValueError(f"voice {voice!r} has nothing to say in {text!r}")
    wavs = [None] * len(jobs)
    for engine, synthesize in ENGINES.items():
        mine = [i for i, (name, *_) in enumerate(voices) if name.startswith(f"{engine}/")]
        asked = []
        for i in mine:
            name, rate, pitch, tract = voices[i]
            asked.append((jobs[i][0], name, rate * tract, pitch * tract))
        for i, (samples, sample_rate) in zip(mine, synthesize(asked)):
            text, voice = jobs[i]
            if not samples.any():
                raise ValueError(f"{engine} made no sound of {text!r} in voice {voice!r}")
            wavs[i] = resample(samples, sample_rate, voices[i][-1])
    return wavs


@functools.cache
def shipped_clips():
    """{(text, voice): the bytes of an Opus file}, the clips of tiny/people.parquet; {} if it is not there."""
    if not os.path.exists(CLIPS):
        return {}
    table = pyarrow.parquet.read_table(CLIPS).to_pydict()
    return {(text, voice): speech for text, voice, speech in zip(*table.values())}


def say_all(jobs):
    """Say [(text, voice)] in any voices of the embedded world -> [float32 (samples,) at 16 kHz].

    Only espeak-ng follows the marks of omni/espeak.py; the others say what is between them.
    voice    one of this file, one of omni/espeak.py, or "sound/kind:seconds:seed" of tiny/sounds.py
    Raises   ValueError for a voice that does not exist or is not installed, or a text that makes no sound.
             A clip that is shipped needs no synthesizer.
    """
    clips = shipped_clips()
    people = [(plain(text), voice) for text, voice in jobs if voice.split("/")[0] in ENGINES]
    spoken = iter(speak_all([job for job in people if job not in clips]))     # at once, as festival wants it
    wavs = []
    for text, voice in jobs:
        if voice.split("/")[0] in ENGINES:
            clip = clips.get((plain(text), voice))
            wavs.append(soundfile.read(io.BytesIO(clip), dtype="float32")[0] if clip else next(spoken))
        elif voice.startswith("sound/"):
            kind, seconds, seed = voice.removeprefix("sound/").split(":")
            wavs.append(sound(kind, random.Random(seed), float(seconds)))
        else:
            wavs.append(speak(text, voice))
    return wavs


if __name__ == "__main__":
    lines = missing(VOICES["train"])
    if lines:
        fail(f"synthesizers that Whisper is to hear are not installed: {'; '.join(lines)}")
    print("all synthesizers that Whisper is to hear are installed")
