"""
Speech units <-> waveform. `load_codec` opens either of two codecs.

Why: the speech LM does not write sound, it writes units: 25 integers a second out of 6561. A codec turns the
assistant's recorded speech into units once, for training (`encode`), and units back into sound at every reply
(`decode`, `stream`). LLaMA-Omni 2 takes CosyVoice 2's: a tokenizer that is a speech recogniser with a finite scalar
quantizer (FSQ) inside, then flow matching and a vocoder.

How: `CosyVoice2`, the second half of this file, is that one, and reads the released weights. `NanoCodec` is the same
idea at 3 MB for one voice. Its tokenizer learns to name phonemes through the FSQ bottleneck, so the same word gives
nearly the same units; its decoder predicts what HiFT, CosyVoice 2's vocoder, predicts too: a pitch, a filter for a pulse
train at that pitch, and a filter for noise.

    wav 16 kHz -> log-mel 100 Hz -> 4x convolution -> FSQ -> units 25 Hz -> frames 100 Hz -> wav 16 kHz
"""
import math
import os
from functools import lru_cache, partial
from itertools import chain

import numpy
import torch
import torch.nn as nn
import torch.nn.functional as F
import whisper

UNIT_RATE = 25                # units per second
FSQ_DIMS, FSQ_LEVELS = 8, 3   # 3 ** 8 = 6561 codes
UNIT_VOCAB = FSQ_LEVELS ** FSQ_DIMS
LOOKAHEAD = 3                 # units that the decoder must see beyond the one that it renders, as in CosyVoice 2


def read_tensors(path):
    """A file that torch.save wrote -> what it holds; nothing in it is executed. Raises FileNotFoundError, or RuntimeError."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as e:                                # of another file: any error at all, with advice that is not ours
        raise RuntimeError(f"{path} is no file of tensors, or damaged ({type(e).__name__}); copy or download it again") from e


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
        file = read_tensors(path)
        if not isinstance(file, dict) or not {"dim", "phonemes", "weights"} <= file.keys():
            raise RuntimeError(f"{path} is no nano codec; of CosyVoice 2 give the folder")
        codec = cls(file["dim"], file["phonemes"])
        codec.load_state_dict(file["weights"])
        return codec.eval()


# ----------------------------------------------------------------------------------------------------- CosyVoice 2
# units 25 Hz -> conformer, twice as many positions -> 50 Hz -> flow matching: noise becomes an 80-bin log-mel in 10
# Euler steps -> mel 50 Hz -> HiFT: pitch, a source of sines at that pitch, inverse STFT -> wav 24 kHz.
# Module names are those of the released tensors. A `state` holds what a reply's next chunk must know of the chunks
# before: keys and values of each attention (per Euler step), the last frames of each convolution. None: nothing follows.

EULER_STEPS, GUIDANCE = 10, 0.7     # of the flow: steps on a cosine schedule, strength of classifier-free guidance
MEL_RATIO = 2                       # mel frames per unit: 50 Hz / 25 Hz


class Weights(dict):
    """name -> float32 tensor of a released file, weight norm folded in: w = g v / |v|, |v| per row. The three spellings:
    `weight_g` and `weight_v`, `parametrizations.weight.original0` and `original1`, or plain `weight`."""

    def __init__(self, path):
        self.path, tensors = path, read_tensors(path)
        if not isinstance(tensors, dict) or not all(map(torch.is_tensor, tensors.values())):
            raise RuntimeError(f"{path} is no state dict: it must hold tensors by name")
        super().__init__((name.removeprefix("generator."), x.float()) for name, x in tensors.items())
        for g, v in ((".weight_g", ".weight_v"), (".parametrizations.weight.original0", ".parametrizations.weight.original1")):
            for name in [n.removesuffix(v) for n in self if n.endswith(v)]:
                x, scale = self.pop(name + v), self[name + g]
                if scale.shape != (len(x), 1, 1):
                    raise RuntimeError(f"{path}: tensor {name}{g} has shape {tuple(scale.shape)}, due is {(len(x), 1, 1)}")
                self[name + ".weight"] = self.pop(name + g) * x / x.norm(dim=(1, 2), keepdim=True)

    def __missing__(self, name):
        raise RuntimeError(f"{self.path} lacks the tensor {name}")

    def count(self, prefix):
        """How many blocks `prefix`0, `prefix`1, ... there are."""
        return 1 + max((int(n.removeprefix(prefix).split(".")[0]) for n in self if n.startswith(prefix)), default=-1)

    def into(self, module):
        """Load completely, or raise a RuntimeError that names the first tensor that is amiss."""
        have, due = ({name: tuple(x.shape) for name, x in tensors.items()} for tensors in (self, module.state_dict()))
        for name in due | have:
            if have.get(name) != due.get(name):
                raise RuntimeError(f"{self.path}: tensor {name} has shape {have.get(name)}, due is {due.get(name)}")
        module.load_state_dict(self)
        return module.requires_grad_(False)


class CausalConv(nn.Conv1d):
    """Convolution that sees the past alone, zeros before the first frame. x (B, C, T) -> (B, C', T)."""

    def forward(self, x, state):
        pad = self.kernel_size[0] - 1
        x = torch.cat([state[self], x], -1) if state and self in state else F.pad(x, (pad, 0))
        if state is not None:
            state[self] = x[..., x.shape[-1] - pad:]
        return super().forward(x)


def remember(state, module, k, v, keep):
    """Keys and values (B, H, n, d) of this chunk -> those of the remembered positions and of this chunk."""
    if state is None:
        return k, v
    if module in state:
        k, v = (torch.cat([old, new], 2) for old, new in zip(state[module], (k, v)))
    state[module] = [x[:, :, max(0, x.shape[2] - keep):] for x in (k, v)]
    return k, v


class EncoderLayer(nn.Module):
    """Pre-norm transformer layer with relative positions (Transformer-XL, Dai et al. 2019, section 3.3). x (B, n, D)."""

    def __init__(self, dim, heads, ffn):
        super().__init__()
        self.heads = heads
        self.norm_mha, self.norm_ff = nn.LayerNorm(dim, eps=1e-12), nn.LayerNorm(dim, eps=1e-12)
        self.self_attn = nn.ModuleDict({f"linear_{n}": nn.Linear(dim, dim) for n in ("q", "k", "v", "out")})
        self.self_attn["linear_pos"] = nn.Linear(dim, dim, bias=False)
        self.self_attn.pos_bias_u, self.self_attn.pos_bias_v = (nn.Parameter(torch.zeros(heads, dim // heads)) for _ in "uv")
        self.feed_forward = nn.ModuleDict({"w_1": nn.Linear(dim, ffn), "w_2": nn.Linear(ffn, dim)})

    def forward(self, x, mask, keep, state):
        att, y, n, K = self.self_attn, self.norm_mha(x), x.shape[1], mask.shape[-1]
        q, k, v = (att[f"linear_{name}"](y).unflatten(-1, (self.heads, -1)) for name in "qkv")   # (B, n, H, d)
        k, v = remember(state, self, k.transpose(1, 2), v.transpose(1, 2), keep)                 # (B, H, K, d)
        angle = torch.arange(1 - n, K, device=x.device)[:, None] * torch.exp(                    # by distance back
            torch.arange(0, x.shape[2], 2, device=x.device) * (-math.log(10000) / x.shape[2]))
        table = att["linear_pos"](torch.stack([angle.sin(), angle.cos()], -1).flatten(1)).unflatten(-1, (self.heads, -1))
        place = (q + att.pos_bias_v).transpose(1, 2) @ table.permute(1, 2, 0)                    # (B, H, n, n + K - 1)
        i, j = torch.arange(n, device=x.device)[:, None], torch.arange(K, device=x.device)       # query i is key K - n + i
        place = place.gather(-1, (K - 1 + i - j).expand(*place.shape[:3], K))                    # (B, H, n, K)
        y = F.scaled_dot_product_attention((q + att.pos_bias_u).transpose(1, 2), k, v, place / math.sqrt(q.shape[-1]) + mask)
        x = x + att["linear_out"](y.transpose(1, 2).flatten(2))
        return x + self.feed_forward["w_2"](F.silu(self.feed_forward["w_1"](self.norm_ff(x))))


class UpsampleEncoder(nn.Module):
    """Embedded units (B, n, D) at 25 Hz, with 3 units of look-ahead -> (B, 2n, D) at 50 Hz."""

    def __init__(self, w):
        super().__init__()
        dim, size = w["encoder.embed.out.0.weight"].shape
        heads, ffn = (w[f"encoder.encoders.0.{n}"].shape[0] for n in ("self_attn.pos_bias_u", "feed_forward.w_1.weight"))
        embed = lambda size: nn.ModuleDict({"out": nn.Sequential(nn.Linear(size, dim), nn.LayerNorm(dim))})
        self.embed, self.up_embed = embed(size), embed(dim)
        self.pre_lookahead_layer = nn.ModuleDict({"conv1": nn.Conv1d(dim, dim, LOOKAHEAD + 1), "conv2": CausalConv(dim, dim, 3)})
        self.encoders = nn.ModuleList(EncoderLayer(dim, heads, ffn) for _ in range(w.count("encoder.encoders.")))
        self.up_layer = nn.ModuleDict({"conv": CausalConv(dim, dim, 2 * MEL_RATIO + 1)})
        self.up_encoders = nn.ModuleList(EncoderLayer(dim, heads, ffn) for _ in range(w.count("encoder.up_encoders.")))
        self.after_norm = nn.LayerNorm(dim)
        self.scale = math.sqrt(dim)

    def forward(self, x, n, lengths, units, frames, state):
        """x (B, n + a, D): n units and a <= 3 that follow, a = 0 at the end of the reply. units, frames: from Flow.sight."""
        x = self.embed["out"](x) * self.scale
        if lengths is not None:                           # past its end a reply is silence, whatever the padding
            x = x * (torch.arange(n, device=x.device) < lengths[:, None])[..., None]
        y = F.pad(x.transpose(1, 2), (0, n + LOOKAHEAD - x.shape[1]))
        look = self.pre_lookahead_layer
        x = x[:, :n] + look["conv2"](F.leaky_relu(look["conv1"](y)), state).transpose(1, 2)
        for layer in self.encoders:
            x = layer(x, *units, state)
        x = self.up_layer["conv"](x.repeat_interleave(MEL_RATIO, 1).transpose(1, 2), state).transpose(1, 2)
        x = self.up_embed["out"](x) * self.scale
        for layer in self.up_encoders:
            x = layer(x, *frames, state)
        return self.after_norm(x)


class CausalBlock(nn.Module):
    """Convolution, layer norm over channels, Mish. x (B, C, T) -> (B, C', T)."""

    def __init__(self, dim, out):
        super().__init__()
        self.block = nn.ModuleList([CausalConv(dim, out, 3), nn.Identity(), nn.LayerNorm(out)])

    def forward(self, x, state):
        conv, _, norm = self.block
        return F.mish(norm(conv(x, state).transpose(1, 2)).transpose(1, 2))


class ResnetBlock(nn.Module):
    """Two causal blocks, told the Euler step's time t (B, 4 C') between them. x (B, C, T) -> (B, C', T)."""

    def __init__(self, dim, out, time):
        super().__init__()
        self.mlp = nn.Sequential(nn.Mish(), nn.Linear(time, out))
        self.block1, self.block2 = CausalBlock(dim, out), CausalBlock(out, out)
        self.res_conv = nn.Conv1d(dim, out, 1)

    def forward(self, x, t, state):
        return self.block2(self.block1(x, state) + self.mlp(t)[..., None], state) + self.res_conv(x)


class TransformerBlock(nn.Module):
    """Pre-norm attention, no positions, and MLP. x (B, n, C)."""

    def __init__(self, dim, inner, ffn, head_dim):
        super().__init__()
        self.head_dim = head_dim
        self.norm1, self.norm3 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn1 = nn.ModuleDict({f"to_{n}": nn.Linear(dim, inner, bias=False) for n in "qkv"})
        self.attn1["to_out"] = nn.ModuleList([nn.Linear(inner, dim)])
        proj = nn.ModuleDict({"proj": nn.Linear(dim, ffn)})
        self.ff = nn.ModuleDict({"net": nn.ModuleList([proj, nn.Identity(), nn.Linear(ffn, dim)])})

    def forward(self, x, mask, keep, state):
        y = self.norm1(x)
        q, k, v = (self.attn1[f"to_{n}"](y).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for n in "qkv")
        k, v = remember(state, self, k, v, keep)
        x = x + self.attn1["to_out"][0](F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2))
        return x + self.ff["net"][2](F.gelu(self.ff["net"][0]["proj"](self.norm3(x))))


class Estimator(nn.Module):
    """The velocity field of the flow: a 1-D U-Net (of one resolution) of causal convolutions and transformer blocks."""

    def __init__(self, w, head_dim):
        super().__init__()
        name = "decoder.estimator."
        time, size = w[name + "time_mlp.linear_1.weight"].shape
        mels, dim, _ = w[name + "final_proj.weight"].shape
        inner, ffn = (w[name + f"down_blocks.0.1.0.{n}.weight"].shape[0] for n in ("attn1.to_q", "ff.net.0.proj"))
        if inner % head_dim:
            raise RuntimeError(f"{w.path}: the estimator's attention is {inner} wide, which heads of {head_dim} do not divide")
        n_blocks = w.count(name + "down_blocks.0.1.")

        def stage(size, *conv):
            return nn.ModuleList([ResnetBlock(size, dim, time),
                                  nn.ModuleList(TransformerBlock(dim, inner, ffn, head_dim) for _ in range(n_blocks)), *conv])
        self.time_mlp = nn.ModuleDict({"linear_1": nn.Linear(size, time), "linear_2": nn.Linear(time, time)})
        self.down_blocks = nn.ModuleList([stage(size, CausalConv(dim, dim, 3))])
        self.mid_blocks = nn.ModuleList(stage(dim) for _ in range(w.count(name + "mid_blocks.")))
        self.up_blocks = nn.ModuleList([stage(2 * dim, CausalConv(dim, dim, 3))])
        self.final_block, self.final_proj = CausalBlock(dim, dim), nn.Conv1d(dim, mels, 1)

    def forward(self, x, t, mask, keep, state):
        """x (B, 320, T): noisy mel, encoder, speaker, zeros in the place of a prompt's mel; t in 0..1 -> (B, 80, T)."""
        half = self.time_mlp["linear_1"].in_features // 2
        angle = 1000 * t * torch.exp(torch.arange(half, device=x.device) * (-math.log(10000) / (half - 1)))
        t = self.time_mlp["linear_2"](F.silu(self.time_mlp["linear_1"](torch.cat([angle.sin(), angle.cos()])[None])))

        def run(stage, x):
            x = stage[0](x, t, state).transpose(1, 2)
            for block in stage[1]:
                x = block(x, mask, keep, state)
            return x.transpose(1, 2)
        skip = run(self.down_blocks[0], x)
        x = self.down_blocks[0][2](skip, state)
        for stage in self.mid_blocks:
            x = run(stage, x)
        x = run(self.up_blocks[0], torch.cat([x, skip], 1))
        return self.final_proj(self.final_block(self.up_blocks[0][2](x, state), state))


class Flow(nn.Module):
    """Units -> mel by conditional flow matching (CosyVoice 2, arXiv 2412.10117, section 2.4).

    chunk  units that see each other and the past only; 0: every unit sees the whole reply, which cannot stream. By default
           the first burst of 10 units, less the look-ahead, is the first chunk
    past   units before its chunk that a unit sees, in whole chunks; in the official code all. At the released sizes a stream
           holds 230 MB of keys and values per second of it; with 80 units chunk 50 takes 1.15 times as long as chunk 2"""

    def __init__(self, w, head_dim=64, chunk=7, past=80):
        super().__init__()
        self.chunk, self.past = chunk, past
        self.input_embedding = nn.Embedding(*w["input_embedding.weight"].shape)
        mels, speaker = w["spk_embed_affine_layer.weight"].shape
        self.spk_embed_affine_layer = nn.Linear(speaker, mels)
        self.encoder = UpsampleEncoder(w)
        self.encoder_proj = nn.Linear(w["encoder_proj.weight"].shape[1], mels)
        self.decoder = nn.ModuleDict({"estimator": Estimator(w, head_dim)})
        noise = torch.randn(1, mels, 300 * 50, generator=torch.Generator().manual_seed(0))     # 5 minutes, as theirs
        self.register_buffer("noise", noise, persistent=False)          # one draw for every reply: chunks agree

    def sight(self, rate, n, state, lengths):
        """For n units, `rate` positions per unit -> what attention sees (B or 1, 1, queries, keys), 0 where seen and -1e10
        where not; and how many positions the cache keeps. Seen are the own chunk and the past, whole chunks; no padding."""
        done = state.get("units", 0) if state else 0
        chunk, left, device = rate * self.chunk, self.past // self.chunk if self.chunk else 0, self.noise.device
        k = torch.arange(rate * n + min(rate * done, left * chunk), device=device)
        q, seen = k[len(k) - rate * n:, None], torch.ones(1, rate * n, len(k), dtype=torch.bool, device=device)
        if chunk:                                         # what is remembered is whole chunks, so k counts from a chunk's start
            back = q // chunk - k // chunk
            seen = seen & (back >= 0) & (back <= left)
        if lengths is not None:
            seen = seen & (k < rate * lengths[:, None, None])
        return torch.where(seen, 0.0, -1e10)[:, None], left * chunk

    def condition(self, units, state=None, ahead=None, lengths=None):
        """units (B, n) -> what the flow is told of them, mu (B, 80, 2n) at 50 Hz. For the arguments see `forward`."""
        n = units.shape[1]
        x = self.input_embedding(units if ahead is None else torch.cat([units, ahead], 1))
        sights = [self.sight(rate, n, state, lengths) for rate in (1, MEL_RATIO)]
        return self.encoder_proj(self.encoder(x, n, lengths, *sights, state)).transpose(1, 2)

    def integrate(self, mu, speaker, state=None, lengths=None):
        """mu (B, 80, 2n), the speaker's vector (1, 192) -> mel (B, 80, 2n): from noise along the estimated velocity, in 10
        Euler steps that are short at the start; the velocity is pushed away from the one without any condition."""
        n, done = mu.shape[-1] // MEL_RATIO, state.get("units", 0) if state else 0
        voice = self.spk_embed_affine_layer(F.normalize(speaker, dim=1))[..., None].expand_as(mu)
        told = torch.cat([mu, voice, torch.zeros_like(mu)], 1)            # the zeros: no prompt's mel
        told = torch.cat([told, torch.zeros_like(told)])                  # (2B, 240, 2n), with and without condition
        place = torch.arange(MEL_RATIO * done, MEL_RATIO * (done + n), device=mu.device) % self.noise.shape[-1]
        x = self.noise[..., place].expand_as(mu)
        mask, keep = self.sight(MEL_RATIO, n, state, lengths)
        if lengths is not None:
            mask = torch.cat([mask, mask])
        t = 1 - torch.cos(torch.linspace(0, 1, EULER_STEPS + 1, device=mu.device) * math.pi / 2)
        for i in range(EULER_STEPS):
            step = state.setdefault(i, {}) if state is not None else None
            v, free = self.decoder["estimator"](torch.cat([torch.cat([x, x]), told], 1), t[i], mask, keep, step).chunk(2)
            x = x + (t[i + 1] - t[i]) * ((1 + GUIDANCE) * v - GUIDANCE * free)
        if state is not None:
            state["units"] = done + n
        return x

    def forward(self, units, speaker, state=None, ahead=None, lengths=None):
        """units (B, n), the speaker's vector (1, 192) -> mel (B, 80, 2n).

        state    what earlier chunks of the same reply left, {} for the first; n must be whole chunks but for the last
        ahead    (B, 3) units that follow: look-ahead alone; None at the end of the reply
        lengths  (B,) units of each reply, where they differ; not with a state"""
        return self.integrate(self.condition(units, state, ahead, lengths), speaker, state, lengths)


class Snake(nn.Module):
    """x + sin^2(a x) / a, one a per channel (Ziyin et al. 2020)."""

    def __init__(self, dim):
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        alpha = self.alpha[:, None]
        return x + torch.sin(alpha * x) ** 2 / (alpha + 1e-9)


class ResBlock(nn.Module):
    """HiFi-GAN's residual block, with Snake: dilations 1, 3 and 5. x (B, C, T)."""

    def __init__(self, dim, kernel):
        super().__init__()
        conv = lambda d: nn.Conv1d(dim, dim, kernel, dilation=d, padding=d * (kernel // 2))
        self.convs1, self.convs2 = nn.ModuleList(conv(d) for d in (1, 3, 5)), nn.ModuleList(conv(1) for _ in range(3))
        self.activations1, self.activations2 = (nn.ModuleList(Snake(dim) for _ in range(3)) for _ in "12")

    def forward(self, x):
        for conv1, conv2, act1, act2 in zip(self.convs1, self.convs2, self.activations1, self.activations2):
            x = x + conv2(act2(conv1(act1(x))))
        return x


class HiFT(nn.Module):
    """mel (B, 80, T) at 50 Hz -> wav 24 kHz: a pitch, a source of sines at that pitch (neural source filter), a
    HiFi-GAN that shapes it, the inverse STFT (HiFTNet, Li et al. 2023)."""

    rate, n_fft, hop, frame = 24000, 16, 4, 480           # Hz; STFT window and hop, samples; samples per mel frame
    reach = 14                                            # mel frames to either side that a sample depends on (13.2)

    def __init__(self, w):
        super().__init__()
        conv = lambda name, **more: nn.Conv1d(*w[f"{name}.weight"].shape[1::-1], w[f"{name}.weight"].shape[2], **more)
        self.f0_predictor = nn.ModuleDict({
            "condnet": nn.Sequential(*[m for i in range(0, w.count("f0_predictor.condnet."), 2)
                                       for m in (conv(f"f0_predictor.condnet.{i}", padding=1), nn.ELU())]),
            "classifier": nn.Linear(w["f0_predictor.classifier.weight"].shape[1], 1)})
        harmonics = w["m_source.l_linear.weight"].shape[1]                                # the fundamental among them
        self.m_source = nn.ModuleDict({"l_linear": nn.Linear(harmonics, 1)})
        self.conv_pre, self.conv_post = conv("conv_pre", padding=3), conv("conv_post", padding=3)
        self.ups, self.source_downs = nn.ModuleList(), nn.ModuleList()
        for i in range(w.count("ups.")):
            size, out, kernel = w[f"ups.{i}.weight"].shape
            self.ups.append(nn.ConvTranspose1d(size, out, kernel, kernel // 2, (kernel - kernel // 2) // 2))   # x 8, 5, 3
            stride = max(1, w[f"source_downs.{i}.weight"].shape[2] // 2)                                       # / 15, 3, 1
            self.source_downs.append(conv(f"source_downs.{i}", stride=stride, padding=stride // 2))
        blocks = lambda name: nn.ModuleList(ResBlock(*w[f"{name}.{i}.convs1.0.weight"].shape[1:])
                                            for i in range(w.count(f"{name}.")))
        self.source_resblocks, self.resblocks = blocks("source_resblocks"), blocks("resblocks")
        self.register_buffer("window", torch.hann_window(self.n_fft), persistent=False)
        # the source's random draw, the same for every reply: harmonics' phases in cycles, 2.7 s of noise, repeated
        draw = torch.Generator().manual_seed(0)
        phases = torch.rand(harmonics, 1, generator=draw)
        phases[0] = 0                                     # the fundamental starts at 0
        self.register_buffer("phases", phases, persistent=False)
        self.register_buffer("noise", torch.randn(harmonics, 1 << 16, generator=draw), persistent=False)

    def pitch(self, mel):
        """(B, 80, T) -> Hz (B, T)."""
        return self.f0_predictor["classifier"](self.f0_predictor["condnet"](mel).transpose(1, 2))[..., 0].abs()

    def source(self, f0, cycles=0.0, start=0):
        """Pitch (B, T) Hz, cycles of the fundamental before it, its first frame's number -> excitation (B, 1, 480 T):
        9 harmonics of amplitude 0.1 with a little noise where voiced (above 10 Hz), noise alone elsewhere."""
        f0 = f0.repeat_interleave(self.frame, -1)[:, None]                                              # (B, 1, 480 T)
        cycles = cycles + torch.cumsum(f0.double() / self.rate, -1)
        cycles = cycles * torch.arange(1, len(self.phases) + 1, device=f0.device)[:, None] + self.phases   # (B, 9, 480 T)
        sines = 0.1 * torch.sin(2 * math.pi * (cycles % 1).float())
        place = torch.arange(start * self.frame, start * self.frame + f0.shape[-1], device=f0.device) % self.noise.shape[-1]
        voiced = (f0 > 10).float()
        x = sines * voiced + self.noise[:, place] * (0.003 * voiced + 0.1 / 3 * (1 - voiced))           # (B, 9, 480 T)
        return torch.tanh(self.m_source["l_linear"](x.transpose(1, 2))).transpose(1, 2)

    def forward(self, mel, source):
        """mel (B, 80, T), source (B, 1, 480 T) -> wav (B, 480 T) in -0.99..0.99."""
        spectrum = torch.stft(source[:, 0], self.n_fft, self.hop, window=self.window, return_complex=True)
        spectrum = torch.cat([spectrum.real, spectrum.imag], 1)                                         # (B, 18, 120 T + 1)
        x, kinds = self.conv_pre(mel), len(self.resblocks) // len(self.ups)
        for i, up in enumerate(self.ups):                                                               # 8 T, 40 T, 120 T
            x = up(F.leaky_relu(x, 0.1))
            if i == len(self.ups) - 1:
                x = F.pad(x, (1, 0), mode="reflect")                                                    # 120 T + 1
            x = x + self.source_resblocks[i](self.source_downs[i](spectrum))
            x = sum(block(x) for block in self.resblocks[i * kinds:(i + 1) * kinds]) / kinds
        size, angle = self.conv_post(F.leaky_relu(x)).chunk(2, 1)                                       # (B, 9, 120 T + 1) each
        spectrum = torch.polar(size.exp().clamp(max=100), torch.sin(angle))
        return torch.istft(spectrum, self.n_fft, self.hop, window=self.window).clamp(-0.99, 0.99)


@lru_cache
def onnx_session(path):
    """A network that the released folder holds as ONNX. Raises FileNotFoundError, or RuntimeError that says what is amiss."""
    if not os.path.exists(path):
        raise FileNotFoundError(f"there is no {path}; download the whole folder")
    try:
        import onnxruntime
    except ImportError:
        raise RuntimeError(f"{path} needs onnxruntime: pip install onnxruntime") from None
    use = [p for p in ("CUDAExecutionProvider", "CPUExecutionProvider") if p in onnxruntime.get_available_providers()]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()        # data.py's processes have one each
    try:
        return onnxruntime.InferenceSession(path, options, providers=use)
    except Exception as e:                                # its own classes
        raise RuntimeError(f"{path} cannot be read ({type(e).__name__}); download it again") from e


def fbank(wav):
    """wav (samples,) at 16 kHz -> kaldi's 80 log-mel bins at 100 Hz, less their mean over time (T, 80): CAM++'s input."""
    try:
        import kaldi_native_fbank
    except ImportError:
        raise RuntimeError("a voice from a clip needs kaldi-native-fbank: pip install kaldi-native-fbank") from None
    options = kaldi_native_fbank.FbankOptions()
    options.frame_opts.dither, options.mel_opts.num_bins = 0, 80
    computer = kaldi_native_fbank.OnlineFbank(options)
    computer.accept_waveform(16000, wav.tolist())
    computer.input_finished()
    x = torch.stack([torch.from_numpy(computer.get_frame(i)) for i in range(computer.num_frames_ready)])
    return x - x.mean(0)


def read_voice(folder, voice=None):
    """The speaker's vector (1, 192) that the flow is told. voice: a .npy or .pt file of it, an audio file (campplus.onnx then
    computes it), the name of a voice in the folder's spk2info.pt, or None: the first there.
    Raises FileNotFoundError, ValueError or RuntimeError, which say what was found instead."""
    if voice is None or not os.path.isfile(voice):
        table = os.path.join(folder, "spk2info.pt")       # name -> {"embedding": (1, 192), ...}; often missing or empty
        voices = read_tensors(table) if os.path.exists(table) else {}
        name = next(iter(voices), None) if voice is None else voice
        if name not in voices:
            raise ValueError(f"no voice{f' {voice!r}' * bool(voice)}: {table} has {', '.join(voices) or 'none'}; give --voice, "
                             "a clip of the speaker or a .npy or .pt of his vector")
        voice, x = f"{table}, {name}", voices[name]["embedding"]
    elif voice.endswith(".npy"):
        try:
            x = torch.from_numpy(numpy.load(voice))
        except (ValueError, TypeError, EOFError) as e:
            raise ValueError(f"{voice} holds no array of numbers; write it with numpy.save") from e
    elif voice.endswith(".pt"):
        x = read_tensors(voice)
    else:
        from data import read_audio                       # here, because data.py imports this file
        wav = read_audio(voice)
        session = onnx_session(os.path.join(folder, "campplus.onnx"))
        x = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: fbank(wav)[None].numpy()})[0])
    if not torch.is_tensor(x) or x.numel() != 192:
        raise ValueError(f"{voice}: a speaker's vector has 192 numbers, here are {x.numel() if torch.is_tensor(x) else 'none'}")
    return x.reshape(1, 192).float()


def tokenize(folder, wav):
    """wav (samples,) at 16 kHz -> units (U,), one for each 40 ms begun, by the folder's speech_tokenizer_v2.onnx. Clips over
    30 s, its limit, are cut into pieces of 30 s that share 4 s with the next; of those, each piece gives 2 s."""
    session = onnx_session(os.path.join(folder, "speech_tokenizer_v2.onnx"))
    feats, length = (x.name for x in session.get_inputs())
    mel = whisper.log_mel_spectrogram(wav.cpu().float(), 128)                              # (128, T) 100 Hz
    window, shared, half, units = 3000, 400, 50, []                                        # 100 Hz, 100 Hz, 25 Hz
    for start in range(0, max(1, mel.shape[1] - shared), window - shared):
        piece = mel[None, :, start:start + window].contiguous()
        got = session.run(None, {feats: piece.numpy(), length: numpy.array([piece.shape[2]], numpy.int32)})[0].reshape(-1)
        more = start + window < mel.shape[1]
        units.append(torch.from_numpy(got)[half * (start > 0):len(got) - half * more].long())
    return torch.cat(units)


class CosyVoice2(nn.Module):
    """The codec of LLaMA-Omni 2: CosyVoice 2's tokenizer, flow and vocoder (arXiv 2412.10117), from the released weights,
    never trained here. The interface is NanoCodec's; its sound has another rate."""

    sample_rate = HiFT.rate                               # Hz
    overlap = 8                                           # mel frames (20 ms) that wait for what follows, as in the official code
    fade = 3                                              # of those fade: pitch looks 5 ahead, in these it is final

    def __init__(self, folder, flow, hift, voice):
        super().__init__()
        self.folder, self.flow, self.hift = folder, flow, hift
        self.register_buffer("voice", voice, persistent=False)                             # (1, 192)

    @classmethod
    def load(cls, folder, voice=None, **sizes):
        """A folder like ICTNLP/cosy2_decoder: flow.pt, hift.pt; speech_tokenizer_v2.onnx to encode; a voice, see
        `read_voice`. All sizes are read from the weights but the estimator's head size; `sizes` are Flow's arguments.
        Raises FileNotFoundError, or RuntimeError that names the tensor that is amiss."""
        flow, hift = Weights(os.path.join(folder, "flow.pt")), Weights(os.path.join(folder, "hift.pt"))
        return cls(folder, flow.into(Flow(flow, **sizes)), hift.into(HiFT(hift)), read_voice(folder, voice)).eval()

    def encode(self, wav):
        """wav (samples,) at 16 kHz -> units (U,)."""
        return tokenize(self.folder, wav)

    def advance(self, state, units, final):
        """One reply's next units (a list) -> the mel frames (1, 80, n >= 0) that are now certain: those of whole chunks
        whose look-ahead is known, or of all units if `final`."""
        state["units"] = waiting = state.get("units", []) + list(units)
        chunk = self.flow.chunk
        n = len(waiting) if final else max(0, len(waiting) - LOOKAHEAD) // chunk * chunk if chunk else 0
        if n == 0:
            return self.voice.new_zeros(1, self.flow.noise.shape[1], 0)
        state["units"] = waiting[n:]
        row = torch.tensor([waiting[:n + LOOKAHEAD]], dtype=torch.long, device=self.voice.device)
        return self.flow(row[:, :n], self.voice, state.setdefault("flow", {}), None if final else row[:, n:])

    def sound(self, state, mel, final):
        """One reply's next mel frames (1, 80, n >= 0) -> the samples (m,) that are now certain. HiFT looks both ways: it
        runs again over `reach` frames of the past, and the last `overlap` frames wait for what follows: the first `fade` of
        them pass from this rendering to the next. Pitch and phase go on where they were."""
        start, sent, cycles, f0 = state.get("sound", (0, 0, 0.0, mel.new_zeros(1, 0)))     # frames `start` .. are in `mel`
        mel = torch.cat([state["mel"], mel], -1) if "mel" in state else mel
        end = start + mel.shape[-1]
        stop = end if final else max(sent, end - self.overlap)
        state["mel"] = mel
        if stop == sent:
            return mel.new_zeros(0)
        f0 = torch.cat([f0, self.hift.pitch(mel)[:, sent - start:]], -1)
        wav = self.hift(mel, self.hift.source(f0, cycles, start))[0, (sent - start) * HiFT.frame:]
        held = state.get("held", wav[:0])
        fade = torch.sin((torch.arange(len(held), device=wav.device) + 0.5) / max(1, len(held)) * math.pi / 2) ** 2   # 0 .. 1
        wav[:len(held)] = held * (1 - fade) + wav[:len(held)] * fade                       # (their Hamming halves sum to 1.08)
        again = max(0, stop - self.hift.reach)
        cycles = (cycles + f0[0, :again - start].double().sum().item() * HiFT.frame / HiFT.rate) % 1
        state["sound"] = again, stop, cycles, f0[:, again - start:stop - start]
        state["mel"], state["held"] = mel[..., again - start:], wav[(stop - sent) * HiFT.frame:][:self.fade * HiFT.frame]
        return wav[:(stop - sent) * HiFT.frame]

    @torch.no_grad()
    def decode(self, units, final=True):
        """units (U,) or (B, U) -> wav (960 U,) or (B, 960 U); a list of replies (U_i,), which the flow renders together ->
        a list. With final=False the units are the beginning of a longer reply: only what `stream` would have sent."""
        if torch.is_tensor(units):
            wavs = self.decode(list(units) if units.dim() == 2 else [units], final)
            return torch.stack(wavs) if units.dim() == 2 else wavs[0]
        if not final:
            return [self.sound(s := {}, self.advance(s, row.tolist(), False), False) for row in units]
        lengths = torch.tensor([len(row) for row in units], device=self.voice.device)
        if not lengths.any():
            return [self.voice.new_zeros(0) for _ in units]
        rows = nn.utils.rnn.pad_sequence([row.to(self.voice.device).long() for row in units], batch_first=True)
        mels = self.flow(rows, self.voice, lengths=lengths if len(units) > 1 else None)
        return [self.sound({}, mel[None, :, :MEL_RATIO * len(row)], True) for mel, row in zip(mels, units)]

    def stream(self, bursts):
        """Bursts of units, as they are written -> pieces of waveform; together they are `decode` of all the units, but for
        the fades. The first piece comes with the first chunk's look-ahead, chunk + 3 units; each later one costs the same."""
        state = {}
        for burst, final in chain(((b, False) for b in bursts), [((), True)]):
            with torch.no_grad():                         # not around the yield: it would hold for the consumer as well
                wav = self.sound(state, self.advance(state, burst, final), final)
            if len(wav):
                yield wav


def load_codec(path, voice=None):
    """A file that NanoCodec.save wrote, or a folder with CosyVoice 2's flow.pt and hift.pt -> the codec. voice: see
    `read_voice`. Raises FileNotFoundError, ValueError, or RuntimeError that names the tensor that is amiss."""
    if os.path.isdir(path):
        return CosyVoice2.load(path, voice)
    if not os.path.exists(path):
        raise FileNotFoundError(f"there is no codec {path}; `git checkout tiny` brings back the nano codec, `hf download "
                                "ICTNLP/cosy2_decoder --local-dir ...` gets CosyVoice 2's folder")
    if voice:
        raise ValueError(f"--voice {voice} is for CosyVoice 2; the nano codec {path} has one voice")
    return NanoCodec.load(path)


def load_encoder(path):
    """What data.py needs of a codec: a function wav (samples,) at 16 kHz -> units (U,). Of CosyVoice 2's folder it opens the
    tokenizer alone, neither decoder nor voice. Raises as `load_codec`."""
    if not os.path.isdir(path):
        return load_codec(path).encode
    onnx_session(os.path.join(path, "speech_tokenizer_v2.onnx"))      # rather now than at the first row
    return partial(tokenize, path)
