"""
Sound in and out: the rates of everything that has one, the limits of a clip, and the log-mel front end.

Why one file: the input has 16,000 samples a second, the log-mel 100 frames, Whisper 50, the LLM 10, the units
25. A rate that is written down twice will differ one day. Sound of users enters the project here and nowhere
else, so every bad recording is refused with one line, before it reaches a network.
"""
import io
import os
import tempfile

import librosa
import numpy as np
import soundfile
import torch
import torch.nn.functional as F
import whisper

SAMPLE_RATE = 16000                   # Hz, of the speech that goes in
MEL_RATE = 100                        # Hz, log-mel frames
WINDOW = 30 * MEL_RATE                # log-mel frames that Whisper hears at once: 30 s, 300 LLM positions
DOWNSAMPLE = 5                        # encoder frames in one LLM position: 50 Hz -> 10 Hz
UNIT_RATE = 25                        # Hz, speech units
UNIT_VOCAB = 3 ** 8                   # 6561 speech units: 8 dimensions of 3 levels (FSQ)
MIN_SECONDS, MAX_SECONDS = 0.1, 600.0  # a clip gives 1 to 6,000 LLM positions; Qwen2.5 has 32,768


def read_audio(path):
    """Read any file that soundfile reads -> float32 tensor (samples,), mono, 16 kHz.

    Raises ValueError that names the file if it is missing, not audio, empty, silent, not finite, of an absurd
    rate, or shorter or longer than a clip may be.
    """
    if not os.path.isfile(path):
        raise ValueError(f"{path}: there is no such file")
    try:
        info = soundfile.info(path)
    except (OSError, RuntimeError) as e:              # soundfile's own error is a RuntimeError
        raise ValueError(f"{path}: cannot be read as audio; give a WAV, FLAC, OGG or MP3 file") from e
    if not 8000 <= info.samplerate <= 192000:
        raise ValueError(f"{path}: its sample rate is {info.samplerate} Hz; it must be from 8000 to 192000")
    if info.channels > 16:                            # a small file may declare 1,024 and fill the memory
        raise ValueError(f"{path}: it has {info.channels} channels; it must have at most 16")
    seconds = info.frames / info.samplerate
    if not MIN_SECONDS <= seconds <= MAX_SECONDS:
        raise ValueError(f"{path}: it lasts {seconds:.2f} s, not {MIN_SECONDS} to {MAX_SECONDS:.0f} s")
    try:
        wav, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except RuntimeError as e:
        raise ValueError(f"{path}: it is damaged ({e}); record or export it again") from e
    wav = wav.mean(1)
    if not 1e-4 < np.abs(wav).max(initial=0) < 1e4:   # NaN and infinity fail this too
        raise ValueError(f"{path}: it is silent or holds no numbers; record again, closer to the microphone")
    return torch.from_numpy(librosa.resample(wav, orig_sr=rate, target_sr=SAMPLE_RATE))


def read_audio_bytes(data, name):
    """The same for the bytes of a file, which errors call `name`."""
    with tempfile.NamedTemporaryFile(suffix=os.path.splitext(name)[1]) as file:
        file.write(data)
        file.flush()
        try:
            return read_audio(file.name)
        except ValueError as e:
            raise ValueError(str(e).replace(file.name, name)) from e


def wav_bytes(wav):
    """float array (samples,) at 16 kHz -> the bytes of a 16-bit WAV file, so that a corpus plays in any
    tool."""
    file = io.BytesIO()
    soundfile.write(file, np.clip(wav, -1, 1), SAMPLE_RATE, format="WAV", subtype="PCM_16")
    return file.getvalue()


def read_wav(audio):
    """A corpus row's {"bytes", "path"}, one of which is None -> float32 array (samples,) at 16 kHz."""
    if audio["bytes"] is None:
        return read_audio(audio["path"]).numpy()
    wav, rate = soundfile.read(io.BytesIO(audio["bytes"]), dtype="float32")
    if rate != SAMPLE_RATE:
        raise ValueError(f"the corpus holds a clip of {rate} Hz, not {SAMPLE_RATE}; build it with data.py")
    return wav


def log_mel(wav, n_mels, pad):
    """wav (samples,) at 16 kHz -> log-mel (n_mels, frames) at 100 Hz, by openai-whisper's front end.

    pad      pad with silence to a multiple of 30 s first, as the official front end does
    Raises ValueError for a clip that is shorter than 0.1 s or longer than 10 minutes.
    """
    seconds = len(wav) / SAMPLE_RATE
    if not MIN_SECONDS <= seconds <= MAX_SECONDS:
        raise ValueError(f"a clip of {seconds:.2f} s; it must last {MIN_SECONDS} to {MAX_SECONDS:.0f} s")
    if pad:
        wav = F.pad(wav, (0, -len(wav) % (WINDOW * SAMPLE_RATE // MEL_RATE)))
    return whisper.log_mel_spectrogram(wav, n_mels)


def clip_frames(samples, pad):
    """How many frames `log_mel` makes of so many samples."""
    if pad:
        return -(-samples // (WINDOW * SAMPLE_RATE // MEL_RATE)) * WINDOW
    return samples // (SAMPLE_RATE // MEL_RATE)


def speech_positions(frames):
    """How many LLM positions a clip of log-mel frames takes: 100 Hz -> 50 Hz -> 10 Hz, each 30 s window by
    itself."""
    windows, rest = divmod(frames, WINDOW)
    return windows * (WINDOW // 2 // DOWNSAMPLE) + (rest + 1) // 2 // DOWNSAMPLE
