"""
The nano codec: speech units <-> waveform for one voice, in 3 MB.

Why: CosyVoice 2 is a download, and the embedded world must work without downloads. omni/codec.py documents
the interface.

How: the tokenizer learns to name phonemes through a bottleneck, finite scalar quantization (FSQ), so the same
word gives nearly the same units every time. The decoder predicts what HiFT, CosyVoice 2's vocoder, predicts
too: a pitch, a filter for a pulse train at that pitch, and a filter for noise. tiny/backbones.py trains both.

    wav 16 kHz -> log-mel 100 Hz -> 4x convolution -> FSQ -> units 25 Hz -> frames 100 Hz -> wav 16 kHz
"""
import math
import os

import torch
import torch.nn as nn
import torch.nn.functional as F
import whisper

from omni.audio import MEL_RATE, SAMPLE_RATE, UNIT_RATE, UNIT_VOCAB
from omni.cosyvoice import LOOKAHEAD
from omni.files import read_tensors

FSQ_DIMS, FSQ_LEVELS = 8, 3
CONTEXT = 24          # units before a piece that can change it: 15 + 6 of the convolutions, 1 of the STFT
assert FSQ_LEVELS ** FSQ_DIMS == UNIT_VOCAB


class FSQ(nn.Module):
    """Finite scalar quantization (Mentzer et al. 2023): each dimension is rounded to -1, 0 or 1."""

    def __init__(self, dim):
        super().__init__()
        self.project = nn.Linear(dim, FSQ_DIMS)

    def forward(self, x):
        """(B, U, dim) -> codes (B, U, 8) in {-1, 0, 1}; the gradient passes straight through the rounding."""
        z = torch.tanh(self.project(x))
        if not self.training:
            return torch.round(z)
        noise = (torch.rand_like(z) - 0.5) * 0.5          # before rounding: similar sounds then share a code
        return z + (torch.round(z + noise).clamp(-1, 1) - z).detach()

    @staticmethod
    def to_units(codes):
        """(..., 8) in {-1, 0, 1} -> (...) integers in 0 .. 6560; the first dimension counts least."""
        powers = FSQ_LEVELS ** torch.arange(FSQ_DIMS, device=codes.device)
        return ((codes.round().long() + 1) * powers).sum(-1)

    @staticmethod
    def to_codes(units):
        """(...) integers in 0 .. 6560 -> (..., 8) in {-1, 0, 1}: the inverse of `to_units`."""
        powers = FSQ_LEVELS ** torch.arange(FSQ_DIMS, device=units.device)
        return (units[..., None] // powers % FSQ_LEVELS - 1).float()


class Block(nn.Module):
    """ConvNeXt block over time: depthwise convolution, then a small MLP at each position. x (B, T, dim)."""

    def __init__(self, dim, kernel=7, lookahead=0):
        super().__init__()
        self.pad = (kernel - 1 - lookahead, lookahead)    # causal except for `lookahead` positions
        self.depthwise = nn.Conv1d(dim, dim, kernel, groups=dim)
        self.norm = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.ReLU(), nn.Linear(4 * dim, dim))

    def forward(self, x):
        y = self.depthwise(F.pad(x.transpose(1, 2), self.pad)).transpose(1, 2)
        return x + self.mlp(self.norm(y))


def filter_curves(sample_rate, bands, bins):
    """Matrix (bands, bins) that turns `bands` log gains, spaced as ears space them (mel), into a curve over
    the STFT's bins: straight lines between neighbouring points."""
    points = torch.linspace(0, 2595 * math.log10(1 + sample_rate / 2 / 700), bands)
    points = 700 * (10 ** (points / 2595) - 1)            # Hz
    hz = torch.linspace(0, sample_rate / 2, bins)
    right = torch.searchsorted(points, hz).clamp(1, bands - 1)
    share = ((hz - points[right - 1]) / (points[right] - points[right - 1])).clamp(0, 1)
    curve = torch.zeros(bands, bins)
    curve[right, torch.arange(bins)] += share
    curve[right - 1, torch.arange(bins)] += 1 - share
    return curve


class NanoCodec(nn.Module):
    """The codec of the embedded world: one voice, trained by tiny/backbones.py in minutes."""

    sample_rate = SAMPLE_RATE                             # Hz
    hop = SAMPLE_RATE // MEL_RATE                         # 160 samples in a frame of 10 ms
    frames = MEL_RATE // UNIT_RATE                        # 4 frames in a unit
    n_fft, mels = 512, 80                                 # STFT window in samples, log-mel bins
    bands = 64                                            # points of a filter curve
    f0_range = (60.0, 500.0)                              # Hz
    unsure = LOOKAHEAD * frames * hop + n_fft             # samples that later units can change

    def __init__(self, dim=128, phonemes=()):
        super().__init__()
        self.dim = dim
        self.phonemes = list(phonemes)
        # tokenizer
        self.stem = nn.Sequential(nn.Conv1d(self.mels, dim, 3, padding=1), nn.GELU(),
                                  nn.Conv1d(dim, dim, self.frames, stride=self.frames))
        self.encoder = nn.Sequential(*[Block(dim, lookahead=3) for _ in range(3)])
        self.fsq = FSQ(dim)
        self.recognise = nn.Sequential(nn.Linear(FSQ_DIMS, dim), nn.ReLU(),       # used in training only
                                       nn.Linear(dim, self.frames * len(self.phonemes)))
        # decoder
        self.embed = nn.Linear(FSQ_DIMS, dim)
        self.slow = nn.Sequential(Block(dim, lookahead=LOOKAHEAD), Block(dim), Block(dim))    # 25 Hz
        self.upsample = nn.Linear(dim, 2 * dim)
        self.fast = nn.Sequential(Block(dim), Block(dim))                         # 50 Hz
        self.head = nn.Linear(dim, 2 * (1 + 2 * self.bands))                      # 2 frames of 100 Hz
        curve = filter_curves(self.sample_rate, self.bands, self.n_fft // 2 + 1)  # (64, 257)
        self.register_buffer("curve", curve, persistent=False)
        self.register_buffer("window", torch.hann_window(self.n_fft), persistent=False)
        noise = torch.randn(1 << 16, generator=torch.Generator().manual_seed(0))  # 4 s, repeated
        self.register_buffer("noise", noise, persistent=False)

    def log_mel(self, wav):
        """wav (B, 640 U) -> (B, 80, 4 U), by openai-whisper's front end."""
        return whisper.log_mel_spectrogram(wav, self.mels)

    def tokenize(self, mel):
        """log-mel (B, 80, 4 U) -> FSQ codes (B, U, 8)."""
        return self.fsq(self.encoder(self.stem(mel).transpose(1, 2)))

    @torch.no_grad()
    def encode(self, wav):
        """wav (samples,) at 16 kHz -> units (U,), U = ceil(seconds * 25)."""
        wav = F.pad(wav, (0, -len(wav) % (self.hop * self.frames)))
        return FSQ.to_units(self.tokenize(self.log_mel(wav[None])))[0]

    def render(self, codes):
        """FSQ codes (B, U, 8) -> pitch in Hz (B, 4 U), and the log gains of the pulse filter and of the noise
        filter, (B, 4 U, 257) each."""
        x = self.slow(self.embed(codes))                              # (B, U, dim)
        x = self.upsample(x).unflatten(-1, (2, self.dim)).flatten(1, 2)
        x = self.head(self.fast(x))                                   # (B, 2 U, 2 * 129): 50 Hz
        x = x.unflatten(-1, (2, -1)).flatten(1, 2)                    # (B, 4 U, 129): 100 Hz
        f0, pulse, noise = x.split([1, self.bands, self.bands], -1)
        low, high = self.f0_range
        f0 = low * (high / low) ** torch.sigmoid(f0[..., 0].float())
        return f0, pulse.float() @ self.curve, noise.float() @ self.curve

    def pulses(self, f0, cycles=0.0):
        """Pitch (B, T) in Hz -> pulse train (B, 160 T): the K harmonics below 7.6 kHz, of equal strength,
        summed in closed form: sum_k cos(k phi) = sin((K + 1/2) phi) / (2 sin(phi / 2)) - 1/2. cycles: of the
        pitch, before the first frame."""
        f0 = f0.repeat_interleave(self.hop, dim=-1)
        phase = (cycles + torch.cumsum(f0.double() / self.sample_rate, -1)).frac() * 2 * math.pi
        count = torch.floor(7600 / f0)
        half = torch.sin(phase / 2)
        at_pulse = half.abs() < 1e-6                                  # there the quotient tends to K + 1/2
        quotient = torch.sin((count + 0.5) * phase) / torch.where(at_pulse, 1.0, 2 * half)
        ratio = torch.where(at_pulse, count + 0.5, quotient)
        return ((ratio - 0.5) / torch.sqrt(count / 2)).float()

    def stft(self, wav):
        """(B, 160 T) -> complex (B, T, 257), frame t centred on sample 160 t."""
        spectrum = torch.stft(wav, self.n_fft, self.hop, window=self.window, return_complex=True)
        return spectrum.transpose(1, 2)[:, :-1]

    def sound(self, units, start=0, cycles=0.0, known=None):
        """Units (B, U) -> wav (B, 640 U), pitch in Hz (B, 4 U). Of replies in the middle: the first unit is
        number `start` (B, 1), behind so many cycles (B, 1) of the pitch, which is known of the first frames
        (B, n)."""
        f0, pulse, noise = self.render(FSQ.to_codes(units).to(self.curve.device))
        if known is not None:
            f0 = torch.cat([known, f0[:, known.shape[1]:]], 1)
        at = torch.arange(f0.shape[1] * self.hop, device=f0.device) + start * self.frames * self.hop
        excitation = self.noise[at % len(self.noise)].expand(len(units), -1)
        spectrum = self.stft(self.pulses(f0, cycles)) * pulse.exp() + self.stft(excitation) * noise.exp()
        spectrum = F.pad(spectrum.transpose(1, 2), (0, 1))
        return torch.istft(spectrum, self.n_fft, self.hop, window=self.window), f0

    @torch.no_grad()
    def decode(self, units, final=True):
        """units (U,) or (B, U) -> wav (640 U,) or (B, 640 U).

        With final=False the units are the beginning of a longer reply, and the result is shorter: it ends
        before the first sample that a later unit can change.
        """
        if units.dim() == 1:
            return self.decode(units[None], final)[0]
        wav, _ = self.sound(units)
        return wav if final else wav[:, :max(0, wav.shape[1] - self.unsure)]

    @torch.no_grad()
    def next_pieces(self, states, bursts, finals):
        """The next units (lists) of several replies -> the samples (m,) of each that are now certain; states:
        dicts, first empty. Only the last CONTEXT units are rendered again, so a piece of a long reply costs
        no more, and replies whose windows are equally long are rendered together."""
        hop, together = self.frames * self.hop, {}        # hop: samples in a unit
        pieces = [self.curve.new_zeros(0) for _ in states]
        for i, (state, burst, final) in enumerate(zip(states, bursts, finals)):
            if not state:
                state |= {"units": [], "start": 0, "sent": 0, "cycles": 0.0, "f0": self.curve.new_zeros(0)}
            state["units"] = state["units"] + list(burst)             # from number `start` on
            stop = (state["start"] + len(state["units"])) * hop - (0 if final else self.unsure)
            if stop > state["sent"]:
                together.setdefault((len(state["units"]), len(state["f0"])), []).append((i, stop))
        for rows in together.values():
            group = [states[i] for i, _ in rows]
            start, cycles = (torch.tensor([state[key] for state in group], device=self.curve.device)[:, None]
                             for key in ("start", "cycles"))
            known = torch.stack([state["f0"] for state in group])
            wavs, f0 = self.sound(torch.tensor([state["units"] for state in group]), start, cycles, known)
            for (i, stop), state, wav, hz in zip(rows, group, wavs, f0):
                first = state["start"]
                pieces[i] = wav[state["sent"] - first * hop:stop - first * hop]
                past = max(0, stop // hop - CONTEXT - first)          # units that are not needed any more
                passed = hz[:past * self.frames].double().sum().item() * self.hop / self.sample_rate
                state["f0"] = hz[past * self.frames:(stop - first * hop) // self.hop]
                state["cycles"] = (state["cycles"] + passed) % 1
                state |= {"units": state["units"][past:], "start": first + past, "sent": stop}
        return pieces

    def save(self, path):
        """Write the weights, as float16, and what `load` needs to know, whole or not at all."""
        weights = {name: x.half() for name, x in self.state_dict().items()}
        torch.save({"dim": self.dim, "phonemes": self.phonemes, "weights": weights}, f"{path}.tmp")
        os.replace(f"{path}.tmp", path)

    @classmethod
    def load(cls, path):
        """Read what `save` wrote. Raises FileNotFoundError, or RuntimeError that names what does not fit."""
        file = read_tensors(path)
        if not isinstance(file, dict) or not {"dim", "phonemes", "weights"} <= file.keys():
            raise RuntimeError(f"{path} is not a nano codec; for CosyVoice 2 give its folder")
        codec = cls(file["dim"], file["phonemes"])
        codec.load_state_dict(file["weights"])
        return codec.eval()
