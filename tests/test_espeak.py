"""What espeak-ng makes of marks: the marked word is said otherwise, and only that word. It protects the
stress that a speech LM learns from these replies: no loss would tell that marks were lost, or read aloud."""
from xml.etree import ElementTree

import librosa
import numpy as np
import pytest

from omni.audio import SAMPLE_RATE
from omni.espeak import ASSISTANT, MARK, STYLES, plain, speak, ssml

WORDS = ["Paris", "is", "the", "capital", "of", "Norway."]


def stressed(i):
    """The sentence with its i-th word marked."""
    return " ".join([*WORDS[:i], f"<stress>{WORDS[i]}</stress>", *WORDS[i + 1:]])


def sounds(events):
    """[(second, phoneme)] without the pauses, "_", "_:" and "_|"."""
    return [(second, name) for second, name in events if name.strip("_:|")]


def phonemes(text):
    return [name for _, name in sounds(speak(text, ASSISTANT, phonemes=True)[1])]


def seconds_of_words(text):
    """How long each of WORDS lasts, and its median pitch in Hz by librosa's yin: two arrays."""
    counts = [len(phonemes(word)) for word in WORDS]
    wav, events = speak(text, ASSISTANT, phonemes=True)
    starts = [second for second, _ in sounds(events)]
    assert len(starts) == sum(counts)
    end = min(second for second, _ in events if second > starts[-1])
    borders = [*(starts[n] for n in np.cumsum([0, *counts[:-1]])), end]
    f0 = librosa.yin(wav, fmin=60, fmax=300, sr=SAMPLE_RATE, hop_length=160)
    pitch = [np.median(f0[round(100 * a):round(100 * b)]) for a, b in zip(borders, borders[1:])]
    return np.diff(borders), np.array(pitch)


@pytest.mark.parametrize("text, expected", [
    ("<stress>Rome</stress> is in Italy.", "Rome is in Italy."),
    ("<merry>Hello.</merry> <calm>Good <stress>night</stress>.</calm>", "Hello. Good night."),
    ("1 < 2 & <b>3</b>", "1 < 2 & <b>3</b>"),          # no marks
    ("", "")])
def test_plain(text, expected):
    assert plain(text) == expected


@pytest.mark.parametrize("text", ["a & b < c <stress>d > e</stress> \"f\"", "<calm>x</calm>", "&lt;", "<b>"])
def test_ssml_is_xml_that_says_the_same(text):
    """An XML parser finds the plain text again, and a prosody for each mark."""
    tree = ElementTree.fromstring(f"<speak>{ssml(text)}</speak>")
    assert "".join(tree.itertext()) == plain(text)
    assert [node.tag for node in tree] == ["prosody"] * len(MARK.findall(text)[::2])


@pytest.mark.parametrize("text", ["Five & <stress>six</stress> < seven.", "<merry>Tom's cat</merry> & dog."])
def test_marks_change_no_phoneme(text):
    """Signs that mean something in XML are said as they are without marks, and no mark is read aloud."""
    assert phonemes(text) == phonemes(plain(text)) and len(phonemes(text)) > 5


@pytest.mark.parametrize("i", [0, 3, 5])
def test_the_stressed_word_is_longer_and_higher(i):
    """By more than a fifth and a tenth. All other words stay as they are, except that a closed mouth before
    "capital" counts for the word before it."""
    seconds, pitch = seconds_of_words(" ".join(WORDS))
    longer, higher = (a / b for a, b in zip(seconds_of_words(stressed(i)), (seconds, pitch)))
    others = np.arange(len(WORDS)) != i
    assert longer[i] > 1.2 and np.abs(longer[others] - 1).max() < 0.15, longer
    assert higher[i] > 1.1 and np.abs(higher[others] - 1).max() < 0.1, higher


def test_styles():
    """Merry is faster and higher than plain speech, calm is slower and lower."""
    text = " ".join(WORDS)
    figures = {}
    for mark in ("merry", "calm"):
        wav, usual = speak(f"<{mark}>{text}</{mark}>", ASSISTANT), speak(text, ASSISTANT)
        pitches = [np.median(librosa.yin(x, fmin=60, fmax=300, sr=SAMPLE_RATE)) for x in (wav, usual)]
        figures[mark] = len(wav) / len(usual), pitches[0] / pitches[1]
    assert figures["merry"][0] < 0.95 and figures["merry"][1] > 1.05
    assert figures["calm"][0] > 1.05 and figures["calm"][1] < 0.95
    assert STYLES.keys() == {"stress", "merry", "calm"}
