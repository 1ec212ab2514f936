"""
What only the embedded world can be judged by: which word of a reply is stressed, and what a nano Whisper of
another language hears.

Why: which word of a reply answers the question, only the LLM's states tell the speech LM. A recognizer writes
down words, not stress, so here the speech is compared with espeak-ng's own, in which this word, or another
one, is stressed.
"""
import functools

import librosa
import numpy as np
import torch
import torch.nn.functional as F
import whisper
from transformers import Qwen2Tokenizer

from omni.audio import MIN_SECONDS, SAMPLE_RATE, log_mel
from omni.checkpoint import load_whisper
from omni.espeak import speak


def by_nano(wavs, folder):
    """Clips (samples,) at 16 kHz -> yields what a nano Whisper hears in them. folder: of backbones, with its
    whisper.pt and its words' tokenizer in qwen2/. Raises OSError or RuntimeError."""
    from tiny.backbones import log_mel as half_mel  # here, because English is judged without
    from tiny.backbones import whisper_transcribe
    model = whisper.load_model(f"{folder}/whisper.pt", device="cpu")
    model.encoder = load_whisper(f"{folder}/whisper.pt")
    tokenizer = Qwen2Tokenizer.from_pretrained(f"{folder}/qwen2")
    for wav in wavs:
        long_enough = len(wav) >= MIN_SECONDS * SAMPLE_RATE
        yield whisper_transcribe(model, tokenizer, [half_mel(wav)])[0] if long_enough else ""


def autocorrelation(x):
    """(samples, frames) -> (320, frames), for lags of 0 to 319 samples."""
    return np.fft.irfft(np.abs(np.fft.rfft(x, 1024, axis=0)) ** 2, axis=0)[:320]


def contour(wav):
    """wav (samples,) at 16 kHz -> what carries stress, (81, frames) at 100 Hz: the log-mel, and the pitch in
    semitones around its median, times 0.3; straight lines bridge what is not voiced.

    The pitch, from 64 to 320 Hz, is the peak of the autocorrelation, divided by the window's, with a small
    preference for the highest pitch, as two periods are periodic too (Boersma 1993).
    """
    mel = log_mel(torch.from_numpy(wav), 80, pad=False).numpy()
    window = np.hanning(640)[:, None]                 # 40 ms
    frames = librosa.util.frame(np.pad(wav, 320), frame_length=640, hop_length=160)[:, :mel.shape[1]]
    r = autocorrelation(window * frames) / autocorrelation(window)
    power, lags = r[0], np.arange(50, 251)
    periodic = r[lags] - 0.02 * np.log2(lags / 50)[:, None] * power
    semitones = 12 * np.log2(SAMPLE_RATE / lags[periodic.argmax(0)])
    voiced = (periodic.max(0) > 0.5 * power) & (power > 0.01 * np.quantile(power, 0.9))
    if not voiced.any():
        return np.vstack([mel, 0 * power])
    pitch = np.interp(np.arange(len(power)), np.flatnonzero(voiced), semitones[voiced])
    return np.vstack([mel, 0.3 * (pitch - np.median(pitch))])


@functools.cache
def spoken_contour(text, voice):
    """The contour of espeak-ng's speech. Many replies have the same text."""
    return contour(speak(text, voice))


def stressed_word(job):
    """(wav (samples,) at 16 kHz, text, espeak-ng's voice) -> which word of the text is stressed, from 0: the
    one whose stressed rendering by espeak-ng is the nearest. None if there is less sound than 0.1 s.

    The tempo is removed first. Then dynamic time warping compares sound and pitch; as stress also takes time,
    each step that warps it costs 3 more. Of 40 replies by espeak-ng itself, with 20 dB of noise and 5 %
    faster or slower, all are recognized; of unstressed ones 2 % seem to be, less than by chance (21 %),
    because without stress the shortest word's rendering is the nearest.
    """
    wav, text, voice = job
    if len(wav) < MIN_SECONDS * SAMPLE_RATE:
        return None
    ours, tokens, distances = torch.from_numpy(contour(wav)), text.split(), []
    for i, token in enumerate(tokens):
        word = token.rstrip(".,?!")
        marked = f"<stress>{word}</stress>{token[len(word):]}"
        theirs = spoken_contour(" ".join([*tokens[:i], marked, *tokens[i + 1:]]), voice)
        same_tempo = F.interpolate(ours[None], theirs.shape[1], mode="linear")[0].numpy()
        costs = librosa.sequence.dtw(same_tempo, theirs, weights_add=np.array([0, 3, 3]), backtrack=False)
        distances.append(costs[-1, -1])
    return int(np.argmin(distances))


def stress(pool, replies, voice):
    """Do replies stress the word that answers the question?

    replies  [(wav (samples,) at 16 kHz, text, what the corpus says with `<stress>` around that word)]
    Returns  for each (is it stressed, is it the last word), or None where it is not one word
    """
    jobs, marked = [], []
    for wav, text, spoken in replies:
        before, _, rest = spoken.partition("<stress>")
        one = len(rest.partition("</stress>")[0].split()) == 1
        marked.append(len(before.split()) if one else None)
        if one:
            jobs.append((wav, text, voice))
    found = iter(pool.map(stressed_word, jobs, chunksize=8))
    return [None if right is None else (next(found) == right, right == len(text.split()) - 1)
            for right, (_, text, _) in zip(marked, replies)]
