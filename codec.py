"""
Speech units <-> waveform.

Why: the speech LM does not write sound, it writes units: 25 integers a second out of 6561. A codec turns the
assistant's recorded speech into units once, for training (`encode`), and units back into sound at every reply
(`decode`, `stream`). LLaMA-Omni 2 takes CosyVoice 2's: a tokenizer that is a speech recogniser with a finite scalar
quantizer (FSQ) inside, then flow matching and a vocoder.

How: `NanoCodec` is the same idea at 3 MB for one voice. Its tokenizer learns to name phonemes through the FSQ
bottleneck, so the same word gives nearly the same units; its decoder predicts what HiFT, CosyVoice 2's vocoder,
predicts too: a pitch, a filter for a pulse train at that pitch, and a filter for noise.

    wav 16 kHz -> log-mel 100 Hz -> 4x convolution -> FSQ -> units 25 Hz -> frames 100 Hz -> wav 16 kHz
"""
import math
import os

import torch
import torch.nn as nn
import torch.nn.functional as F
import whisper

UNIT_RATE = 25                # units per second
FSQ_DIMS, FSQ_LEVELS = 8, 3   # 3 ** 8 = 6561 codes
UNIT_VOCAB = FSQ_LEVELS ** FSQ_DIMS
LOOKAHEAD = 3                 # units that the decoder must see beyond the one that it renders, as in CosyVoice 2


class FSQ(nn.Module):
    """Finite scalar quantization (Mentzer et al. 2023): each dimension is rounded to -1, 0 or 1."""

    def __init__(self, dim):
        super().__init__()
        self.project = nn.Linear(dim, FSQ_DIMS)

    def forward(self, x):
        """(B, U, dim) -> codes (B, U, 8) in {-1, 0, 1}, with the gradient passed straight through the rounding."""
        z = torch.tanh(self.project(x))
        if self.training:                             # noise before rounding: sounds that differ little share a code
            return z + (torch.round(z + (torch.rand_like(z) - 0.5) * 0.5).clamp(-1, 1) - z).detach()
        return torch.round(z)

    @staticmethod
    def to_units(codes):
        """(..., 8) in {-1, 0, 1} -> (...) integers in 0 .. 6560, the first dimension counting least."""
        powers = FSQ_LEVELS ** torch.arange(FSQ_DIMS, device=codes.device)
        return ((codes.round().long() + 1) * powers).sum(-1)

    @staticmethod
    def to_codes(units):
        powers = FSQ_LEVELS ** torch.arange(FSQ_DIMS, device=units.device)
        return (units[..., None] // powers % FSQ_LEVELS - 1).float()


class Block(nn.Module):
    """ConvNeXt block over time: depthwise convolution, then a small MLP at each position. x (B, T, dim)."""

    def __init__(self, dim, kernel=7, lookahead=0):
        super().__init__()
        self.pad = (kernel - 1 - lookahead, lookahead)   # causal but for `lookahead` positions
        self.depthwise = nn.Conv1d(dim, dim, kernel, groups=dim)
        self.norm = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.ReLU(), nn.Linear(4 * dim, dim))

    def forward(self, x):
        y = self.depthwise(F.pad(x.transpose(1, 2), self.pad)).transpose(1, 2)
        return x + self.mlp(self.norm(y))


class NanoCodec(nn.Module):
    """The codec of the embedded world: one voice, trained by tiny/backbones.py in minutes."""

    sample_rate = 16000                               # Hz
    hop, n_fft, mels, bands = 160, 512, 80, 64        # samples per 10 ms frame, STFT window, log-mel bins, filter bands
    frames = 4                                        # frames per unit: 100 Hz / 25 Hz
    f0_range = (60.0, 500.0)                          # Hz

    def __init__(self, dim=128, phonemes=()):
        super().__init__()
        self.dim, self.phonemes = dim, list(phonemes)
        # tokenizer
        self.stem = nn.Sequential(nn.Conv1d(self.mels, dim, 3, padding=1), nn.GELU(),
                                  nn.Conv1d(dim, dim, self.frames, stride=self.frames))
        self.encoder = nn.Sequential(*[Block(dim, lookahead=3) for _ in range(3)])
        self.fsq = FSQ(dim)
        self.recognise = nn.Sequential(nn.Linear(FSQ_DIMS, dim), nn.ReLU(),
                                       nn.Linear(dim, self.frames * len(self.phonemes)))   # for training alone
        # decoder
        self.embed = nn.Linear(FSQ_DIMS, dim)
        self.slow = nn.Sequential(Block(dim, lookahead=LOOKAHEAD), Block(dim), Block(dim))       # 25 Hz
        self.upsample = nn.Linear(dim, 2 * dim)
        self.fast = nn.Sequential(*[Block(dim) for _ in range(2)])                               # 50 Hz
        self.head = nn.Linear(dim, 2 * (1 + 2 * self.bands))                                     # 2 frames of 100 Hz
        # each filter is a curve through `bands` points, spaced as ears space them (mel), over the STFT's bins
        points = torch.linspace(0, 2595 * math.log10(1 + self.sample_rate / 2 / 700), self.bands)
        points = 700 * (10 ** (points / 2595) - 1)
        hz = torch.linspace(0, self.sample_rate / 2, self.n_fft // 2 + 1)
        right = torch.searchsorted(points, hz).clamp(1, self.bands - 1)
        share = ((hz - points[right - 1]) / (points[right] - points[right - 1])).clamp(0, 1)
        curve = torch.zeros(self.bands, len(hz))
        curve[right, torch.arange(len(hz))] += share
        curve[right - 1, torch.arange(len(hz))] += 1 - share
        self.register_buffer("curve", curve, persistent=False)                                   # (bands, 257)
        self.register_buffer("window", torch.hann_window(self.n_fft), persistent=False)
        noise = torch.randn(1 << 16, generator=torch.Generator().manual_seed(0))
        self.register_buffer("noise", noise, persistent=False)                                   # 4 s, repeated

    def log_mel(self, wav):
        """wav (B, 640 U) -> (B, 80, 4 U), by openai-whisper's front end."""
        return whisper.log_mel_spectrogram(wav, self.mels)

    def tokenize(self, mel):
        """log-mel (B, 80, 4 U) -> FSQ codes (B, U, 8)."""
        return self.fsq(self.encoder(self.stem(mel).transpose(1, 2)))

    @torch.no_grad()
    def encode(self, wav):
        """wav (samples,) at 16 kHz -> units (U,), U = ceil(seconds * 25)."""
        step = self.hop * self.frames
        wav = F.pad(wav, (0, -len(wav) % step))
        return FSQ.to_units(self.tokenize(self.log_mel(wav[None])))[0]

    def render(self, codes):
        """FSQ codes (B, U, 8) -> pitch in Hz (B, 4 U), log gains of the pulse filter and of the noise filter, each
        (B, 4 U, 257)."""
        x = self.slow(self.embed(codes))
        x = self.fast(self.upsample(x).unflatten(-1, (2, self.dim)).flatten(1, 2))
        f0, pulse, noise = self.head(x).unflatten(-1, (2, -1)).flatten(1, 2).split([1, self.bands, self.bands], -1)
        low, high = self.f0_range
        f0 = low * (high / low) ** torch.sigmoid(f0[..., 0].float())
        return f0, pulse.float() @ self.curve, noise.float() @ self.curve

    def pulses(self, f0):
        """Pulse train at pitch f0 (B, T) Hz -> (B, 160 T): all harmonics below 7.6 kHz, of equal strength, in closed
        form: sum_k cos(k phi) = sin((K + 1/2) phi) / (2 sin(phi / 2)) - 1/2."""
        f0 = f0.repeat_interleave(self.hop, dim=-1)
        phase = torch.cumsum(f0.double() / self.sample_rate, -1).frac() * 2 * math.pi
        count = torch.floor(7600 / f0)
        half = torch.sin(phase / 2)
        at_pulse = half.abs() < 1e-6                           # there the quotient tends to K + 1/2
        ratio = torch.where(at_pulse, count + 0.5, torch.sin((count + 0.5) * phase) / torch.where(at_pulse, 1.0, 2 * half))
        return ((ratio - 0.5) / torch.sqrt(count / 2)).float()

    def stft(self, wav):
        """(B, 160 T) -> complex (B, T, 257), frame t centred on sample 160 t."""
        return torch.stft(wav, self.n_fft, self.hop, window=self.window, return_complex=True).transpose(1, 2)[:, :-1]

    @torch.no_grad()
    def decode(self, units, final=True):
        """units (U,) or (B, U) -> wav (640 U,) or (B, 640 U). With final=False the units are the beginning of a
        longer reply: only the samples that no later unit can change are returned (as many as `len` says)."""
        if units.dim() == 1:
            return self.decode(units[None], final)[0]
        f0, pulse, noise = self.render(FSQ.to_codes(units).to(self.curve.device))
        length = f0.shape[1] * self.hop
        excitation = self.noise.repeat(length // len(self.noise) + 1)[:length].expand(len(units), -1)
        spectrum = self.stft(self.pulses(f0)) * pulse.exp() + self.stft(excitation) * noise.exp()
        wav = torch.istft(F.pad(spectrum.transpose(1, 2), (0, 1)), self.n_fft, self.hop, window=self.window)
        if not final:                                 # units in sight of the end, then half an STFT window
            wav = wav[:, :max(0, length - LOOKAHEAD * self.frames * self.hop - self.n_fft)]
        return wav

    def stream(self, bursts):
        """Bursts of units, as they are written -> pieces of waveform; together they are `decode` of all the units.
        (Short replies: decoding the whole beginning again at each burst costs a few milliseconds.)"""
        units, sent = [], 0
        for burst in bursts:
            units += burst
            wav = self.decode(torch.tensor(units, dtype=torch.long), final=False) if units else torch.zeros(0)
            if len(wav) > sent:
                yield wav[sent:]
                sent = len(wav)
        if units:
            yield self.decode(torch.tensor(units, dtype=torch.long))[sent:]

    def save(self, path):
        torch.save({"dim": self.dim, "phonemes": self.phonemes,
                    "weights": {k: v.half() for k, v in self.state_dict().items()}}, f"{path}.tmp")
        os.replace(f"{path}.tmp", path)

    @classmethod
    def load(cls, path):
        """Read what `save` wrote. Raises FileNotFoundError, or RuntimeError that names the tensor that is amiss."""
        file = torch.load(path, map_location="cpu", weights_only=True)
        codec = cls(file["dim"], file["phonemes"])
        codec.load_state_dict(file["weights"])
        return codec.eval()
