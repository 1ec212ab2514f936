"""Sounds without speech are clips that the rest accepts, and those of the test are new to a model: only then
does "I did not understand that." to a siren say something."""
import random

import numpy as np
import pytest
from scipy.signal import welch

from omni.audio import SAMPLE_RATE, read_audio, wav_bytes
from omni.augment import NOISES
from tiny.sounds import SOUNDS, sound


@pytest.mark.parametrize("kind", SOUNDS["train"] + SOUNDS["test"])
def test_sounds_are_clips(kind, tmp_path):
    """Every kind of sound is a clip that users could send, and the same seed gives the same bytes."""
    for seed in range(4):
        wav = sound(kind, random.Random(seed), 0.7)
        assert wav.dtype == np.float32 and wav.shape == (11200,) and np.abs(wav).max() <= 1
        assert wav.tobytes() == sound(kind, random.Random(seed), 0.7).tobytes()
        (tmp_path / "clip.wav").write_bytes(wav_bytes(wav))
        read_audio(tmp_path / "clip.wav")             # refuses what is silent
        level = 20 * np.log10(np.abs(wav).max())
        assert abs(level + 60) < 0.1 if kind == "silence" else -30.1 < level < -0.9


def test_sounds_of_the_test_are_new():
    """Training hears none of them, also not as noise behind speech."""
    assert not set(SOUNDS["test"]) & (set(SOUNDS["train"]) | set(NOISES))
    with pytest.raises(ValueError, match="no sound 'whale'"):
        sound("whale", random.Random(0), 1)
    with pytest.raises(ValueError, match="at least 0.1 s"):
        sound("white", random.Random(0), 0)


@pytest.mark.parametrize("kind,slope", [("white", 0), ("pink", -3.01)])
def test_color_of_noise(kind, slope):
    """White noise is flat, pink noise loses 3 dB in an octave."""
    hz, density = welch(sound(kind, random.Random(0), 20), SAMPLE_RATE, nperseg=2048)
    band = (hz > 100) & (hz < 7000)
    measured = np.polyfit(np.log2(hz[band]), 10 * np.log10(density[band]), 1)[0]
    assert abs(measured - slope) < 0.2
