"""
CosyVoice 2 (arXiv 2412.10117), LLaMA-Omni 2's codec, run from the released weights.

Why: released checkpoints speak in CosyVoice 2's units, so it takes CosyVoice 2's decoder to hear them, and
its tokenizer to train on the same units. omni/codec.py documents the interface.

How: the tokenizer, a speech recognizer with a quantizer inside, is run as the released ONNX file
(`tokenize`). The decoder is written out here, with module names as in the released tensors, and is never
trained:

    units 25 Hz -> conformer, which doubles the positions -> 50 Hz
    -> flow matching: noise becomes an 80-bin log-mel in 10 Euler steps -> mel 50 Hz
    -> HiFT, the vocoder: a pitch, a source of sines at that pitch, an inverse STFT -> wav 24 kHz

A reply is rendered chunk by chunk. A `state` dict holds what its next chunk must know of the chunks before:
the keys and values of each attention (for every Euler step) and the last frames of each convolution. It is
None for a reply that is rendered whole.
"""
import math
import os
from functools import lru_cache

import numpy
import torch
import torch.nn as nn
import torch.nn.functional as F
import whisper

from omni.audio import MEL_RATE, SAMPLE_RATE, UNIT_RATE, read_audio
from omni.files import read_tensors

LOOKAHEAD = 3                 # units that the decoder must see beyond the one that it renders
MEL_RATIO = 50 // UNIT_RATE   # mel frames per unit: 50 Hz / 25 Hz
EULER_STEPS = 10              # of the flow, on a cosine schedule
GUIDANCE = 0.7                # strength of classifier-free guidance
VOICE_SIZE = 192              # numbers in a speaker's vector

# Released files spell weight norm as a plain `weight` or as one of these: suffixes of norm g and direction v.
WEIGHT_NORM = ((".weight_g", ".weight_v"),
               (".parametrizations.weight.original0", ".parametrizations.weight.original1"))


class Weights(dict):
    """{name: float32 tensor} of a released file, with weight norm folded in: w = g v / |v|, |v| of each row.

    Raises FileNotFoundError, or RuntimeError that names the file and the tensor that does not fit.
    """

    def __init__(self, path):
        super().__init__()
        self.path = path
        tensors = read_tensors(path)
        if not isinstance(tensors, dict) or not all(torch.is_tensor(x) for x in tensors.values()):
            raise RuntimeError(f"{path} is not a state dict; it must hold tensors by name")
        for name, x in tensors.items():
            self[name.removeprefix("generator.")] = x.float()
        for g, v in WEIGHT_NORM:
            for name in [n.removesuffix(v) for n in self if n.endswith(v)]:
                self.fold(name, name + g, name + v)

    def fold(self, name, g, v):
        """Replace the two tensors of a weight norm by the weight they stand for."""
        norm, x = self[g], self[v]
        if norm.shape != (len(x), 1, 1):
            raise RuntimeError(f"{self.path}: tensor {g} has shape {tuple(norm.shape)}, "
                               f"expected {(len(x), 1, 1)}")
        del self[g], self[v]
        self[name + ".weight"] = norm * x / x.norm(dim=(1, 2), keepdim=True)

    def __missing__(self, name):
        raise RuntimeError(f"{self.path} lacks the tensor {name}")

    def count(self, prefix):
        """How many blocks `prefix`0, `prefix`1, ... there are."""
        numbers = [int(name.removeprefix(prefix).split(".")[0]) for name in self if name.startswith(prefix)]
        return 1 + max(numbers, default=-1)

    def load_into(self, module):
        """Load all tensors into a module and freeze it. RuntimeError names the first that does not fit."""
        expected = module.state_dict()
        for name, x in expected.items():
            if self[name].shape != x.shape:
                raise RuntimeError(f"{self.path}: tensor {name} has shape {tuple(self[name].shape)}, "
                                   f"expected {tuple(x.shape)}")
        for name in self:
            if name not in expected:
                raise RuntimeError(f"{self.path}: tensor {name} is unknown; is this a file of CosyVoice 2?")
        module.load_state_dict(self)
        return module.requires_grad_(False)


# ------------------------------------------------------------------------------------- units -> mel

class CausalConv(nn.Conv1d):
    """Convolution that sees only the past, zeros before the first frame. x (B, C, T) -> (B, C', T)."""

    def forward(self, x, state):
        pad = self.kernel_size[0] - 1
        if state and self in state:
            x = torch.cat([state[self], x], -1)
        else:
            x = F.pad(x, (pad, 0))
        if state is not None:
            state[self] = x[..., x.shape[-1] - pad:]
        return super().forward(x)


def extend_cache(state, module, k, v, keep):
    """Keys and values (B, H, n, d) of this chunk -> those of the cached positions and of this chunk. The last
    `keep` positions stay in the state for the next chunk."""
    if state is None:
        return k, v
    if module in state:
        old_k, old_v = state[module]
        k = torch.cat([old_k, k], 2)
        v = torch.cat([old_v, v], 2)
    start = max(0, k.shape[2] - keep)
    state[module] = k[:, :, start:], v[:, :, start:]
    return k, v


class EncoderLayer(nn.Module):
    """Pre-norm transformer layer with relative positions (Transformer-XL, Dai et al. 2019, section 3.3)."""

    def __init__(self, dim, heads, ffn):
        super().__init__()
        self.heads = heads
        self.norm_mha = nn.LayerNorm(dim, eps=1e-12)
        self.norm_ff = nn.LayerNorm(dim, eps=1e-12)
        self.self_attn = nn.ModuleDict({f"linear_{n}": nn.Linear(dim, dim) for n in ("q", "k", "v", "out")})
        self.self_attn["linear_pos"] = nn.Linear(dim, dim, bias=False)
        self.self_attn.pos_bias_u = nn.Parameter(torch.zeros(heads, dim // heads))
        self.self_attn.pos_bias_v = nn.Parameter(torch.zeros(heads, dim // heads))
        self.feed_forward = nn.ModuleDict({"w_1": nn.Linear(dim, ffn), "w_2": nn.Linear(ffn, dim)})

    def forward(self, x, mask, keep, state):
        """x (B, n, D) -> (B, n, D); mask (B or 1, 1, n, K) and keep, see Flow.attention_mask."""
        att, y = self.self_attn, self.norm_mha(x)
        n, K, D = x.shape[1], mask.shape[-1], x.shape[2]
        q = att["linear_q"](y).unflatten(-1, (self.heads, -1))                    # (B, n, H, d)
        k = att["linear_k"](y).unflatten(-1, (self.heads, -1)).transpose(1, 2)    # (B, H, n, d)
        v = att["linear_v"](y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = extend_cache(state, self, k, v, keep)                              # (B, H, K, d)
        back = torch.arange(1 - n, K, device=x.device)                            # from query back to key
        rates = torch.exp(torch.arange(0, D, 2, device=x.device) * (-math.log(10000) / D))
        angle = back[:, None] * rates
        table = att["linear_pos"](torch.stack([angle.sin(), angle.cos()], -1).flatten(1))
        table = table.unflatten(-1, (self.heads, -1)).permute(1, 2, 0)            # (H, d, n + K - 1)
        place = (q + att.pos_bias_v).transpose(1, 2) @ table                      # (B, H, n, n + K - 1)
        i = torch.arange(n, device=x.device)[:, None]                             # query i is key K - n + i
        j = torch.arange(K, device=x.device)
        place = place.gather(-1, (K - 1 + i - j).expand(*place.shape[:3], K))     # (B, H, n, K)
        bias = place / math.sqrt(q.shape[-1]) + mask
        y = F.scaled_dot_product_attention((q + att.pos_bias_u).transpose(1, 2), k, v, bias)
        x = x + att["linear_out"](y.transpose(1, 2).flatten(2))
        return x + self.feed_forward["w_2"](F.silu(self.feed_forward["w_1"](self.norm_ff(x))))


class UpsampleEncoder(nn.Module):
    """Embedded units (B, n, D) at 25 Hz, with 3 units of look-ahead -> (B, 2n, D) at 50 Hz."""

    def __init__(self, w):
        super().__init__()
        dim, size = w["encoder.embed.out.0.weight"].shape
        heads = w["encoder.encoders.0.self_attn.pos_bias_u"].shape[0]
        ffn = w["encoder.encoders.0.feed_forward.w_1.weight"].shape[0]

        def layers(n):
            return nn.ModuleList(EncoderLayer(dim, heads, ffn) for _ in range(n))
        self.embed = nn.ModuleDict({"out": nn.Sequential(nn.Linear(size, dim), nn.LayerNorm(dim))})
        self.up_embed = nn.ModuleDict({"out": nn.Sequential(nn.Linear(dim, dim), nn.LayerNorm(dim))})
        self.pre_lookahead_layer = nn.ModuleDict({"conv1": nn.Conv1d(dim, dim, LOOKAHEAD + 1),
                                                  "conv2": CausalConv(dim, dim, 3)})
        self.encoders = layers(w.count("encoder.encoders."))
        self.up_layer = nn.ModuleDict({"conv": CausalConv(dim, dim, 2 * MEL_RATIO + 1)})
        self.up_encoders = layers(w.count("encoder.up_encoders."))
        self.after_norm = nn.LayerNorm(dim)
        self.scale = math.sqrt(dim)

    def forward(self, x, n, lengths, units, frames, state):
        """x (B, n + a, D): n units and the a <= 3 that follow; a = 0 at the end of the reply.

        units, frames    (mask, keep) of Flow.attention_mask, for positions at 25 and at 50 Hz
        """
        x = self.embed["out"](x) * self.scale
        if lengths is not None:                           # padding becomes the zeros past a reply's end
            x = x * (torch.arange(n, device=x.device) < lengths[:, None])[..., None]
        y = F.pad(x.transpose(1, 2), (0, n + LOOKAHEAD - x.shape[1]))
        y = F.leaky_relu(self.pre_lookahead_layer["conv1"](y))
        x = x[:, :n] + self.pre_lookahead_layer["conv2"](y, state).transpose(1, 2)
        for layer in self.encoders:
            x = layer(x, *units, state)
        x = x.repeat_interleave(MEL_RATIO, 1)                         # (B, 2n, D): 25 Hz -> 50 Hz
        x = self.up_layer["conv"](x.transpose(1, 2), state).transpose(1, 2)
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
    """Two causal blocks, with the Euler step's time t (B, 4 C') added between. x (B, C, T) -> (B, C', T)."""

    def __init__(self, dim, out, time):
        super().__init__()
        self.mlp = nn.Sequential(nn.Mish(), nn.Linear(time, out))
        self.block1 = CausalBlock(dim, out)
        self.block2 = CausalBlock(out, out)
        self.res_conv = nn.Conv1d(dim, out, 1)

    def forward(self, x, t, state):
        y = self.block1(x, state) + self.mlp(t)[..., None]
        return self.block2(y, state) + self.res_conv(x)


class TransformerBlock(nn.Module):
    """Pre-norm attention, without positions, and MLP. x (B, n, C)."""

    def __init__(self, dim, inner, ffn, head_dim):
        super().__init__()
        self.head_dim = head_dim
        self.norm1 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)
        self.attn1 = nn.ModuleDict({f"to_{n}": nn.Linear(dim, inner, bias=False) for n in "qkv"})
        self.attn1["to_out"] = nn.ModuleList([nn.Linear(inner, dim)])
        proj = nn.ModuleDict({"proj": nn.Linear(dim, ffn)})
        self.ff = nn.ModuleDict({"net": nn.ModuleList([proj, nn.Identity(), nn.Linear(ffn, dim)])})

    def forward(self, x, mask, keep, state):
        y = self.norm1(x)
        q = self.attn1["to_q"](y).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)      # (B, H, n, d)
        k = self.attn1["to_k"](y).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        v = self.attn1["to_v"](y).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        k, v = extend_cache(state, self, k, v, keep)                                      # (B, H, K, d)
        y = F.scaled_dot_product_attention(q, k, v, mask)                                 # (B, H, n, d)
        x = x + self.attn1["to_out"][0](y.transpose(1, 2).flatten(2))
        wide, _, narrow = self.ff["net"]
        return x + narrow(F.gelu(wide["proj"](self.norm3(x))))


class Estimator(nn.Module):
    """The velocity field of the flow: a 1-D U-Net of causal convolutions and transformer blocks, which keeps
    one resolution."""

    def __init__(self, w, head_dim):
        super().__init__()
        name = "decoder.estimator."
        time, size = w[name + "time_mlp.linear_1.weight"].shape
        mels, dim, _ = w[name + "final_proj.weight"].shape
        inner = w[name + "down_blocks.0.1.0.attn1.to_q.weight"].shape[0]
        ffn = w[name + "down_blocks.0.1.0.ff.net.0.proj.weight"].shape[0]
        if inner % head_dim:
            raise RuntimeError(f"{w.path}: the estimator's attention is {inner} wide, "
                               f"which is not a multiple of the head size, {head_dim}")
        n_blocks = w.count(name + "down_blocks.0.1.")

        def stage(size, *conv):
            blocks = nn.ModuleList(TransformerBlock(dim, inner, ffn, head_dim) for _ in range(n_blocks))
            return nn.ModuleList([ResnetBlock(size, dim, time), blocks, *conv])
        self.time_mlp = nn.ModuleDict({"linear_1": nn.Linear(size, time), "linear_2": nn.Linear(time, time)})
        self.down_blocks = nn.ModuleList([stage(size, CausalConv(dim, dim, 3))])
        self.mid_blocks = nn.ModuleList(stage(dim) for _ in range(w.count(name + "mid_blocks.")))
        self.up_blocks = nn.ModuleList([stage(2 * dim, CausalConv(dim, dim, 3))])
        self.final_block = CausalBlock(dim, dim)
        self.final_proj = nn.Conv1d(dim, mels, 1)

    def forward(self, x, t, mask, keep, state):
        """x (B, 320, T): noisy mel, encoder, speaker, zeros in place of a prompt's mel; t in 0..1 -> (B, 80,
        T)."""
        half = self.time_mlp["linear_1"].in_features // 2
        angle = 1000 * t * torch.exp(torch.arange(half, device=x.device) * (-math.log(10000) / (half - 1)))
        t = self.time_mlp["linear_1"](torch.cat([angle.sin(), angle.cos()])[None])
        t = self.time_mlp["linear_2"](F.silu(t))

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
        x = self.up_blocks[0][2](x, state)
        return self.final_proj(self.final_block(x, state))


class Flow(nn.Module):
    """Units -> mel by conditional flow matching (CosyVoice 2, arXiv 2412.10117, section 2.4).

    chunk  units that see only each other and the past; 0: every unit sees the whole reply, so nothing can be
           streamed. The default is the first burst of 10 units, less the look-ahead
    past   units before its chunk that a unit sees, in whole chunks; the official code has no limit. At the
           released sizes a stream holds 230 MB of keys and values per second of past; with 80 units chunk 50
           takes 1.15 times as long as chunk 2
    """

    def __init__(self, w, head_dim=64, chunk=7, past=80):
        super().__init__()
        self.chunk, self.past = chunk, past
        self.input_embedding = nn.Embedding(*w["input_embedding.weight"].shape)
        mels, speaker = w["spk_embed_affine_layer.weight"].shape
        self.spk_embed_affine_layer = nn.Linear(speaker, mels)
        self.encoder = UpsampleEncoder(w)
        self.encoder_proj = nn.Linear(w["encoder_proj.weight"].shape[1], mels)
        self.decoder = nn.ModuleDict({"estimator": Estimator(w, head_dim)})
        # one draw for every reply, so that chunks agree: 5 minutes, as in the official code
        noise = torch.randn(1, mels, 300 * 50, generator=torch.Generator().manual_seed(0))
        self.register_buffer("noise", noise, persistent=False)

    def attention_mask(self, rate, n, state, lengths):
        """What n units see, at `rate` positions per unit: their own chunk and `past`, in whole chunks, but no
        padding.

        Returns the mask (B or 1, 1, queries, keys), 0 where seen and -1e10 where not, and how many positions
        the cache keeps for the next chunk.
        """
        device = self.noise.device
        done = state.get("units", 0) if state else 0
        chunk = rate * self.chunk                         # positions in a chunk
        left = self.past // self.chunk if self.chunk else 0           # chunks of the past that it sees
        cached = min(rate * done, left * chunk)           # whole chunks, so k starts where a chunk starts
        k = torch.arange(cached + rate * n, device=device)
        q = k[cached:, None]
        seen = torch.ones(1, len(q), len(k), dtype=torch.bool, device=device)
        if chunk:
            back = q // chunk - k // chunk                # how many chunks back from query to key
            seen = seen & (back >= 0) & (back <= left)
        if lengths is not None:
            seen = seen & (k < rate * lengths[:, None, None])
        return torch.where(seen, 0.0, -1e10)[:, None], left * chunk

    def condition(self, units, state=None, ahead=None, lengths=None):
        """units (B, n) -> the flow's condition mu (B, 80, 2n) at 50 Hz. Other arguments: see `forward`."""
        n = units.shape[1]
        if ahead is not None:
            units = torch.cat([units, ahead], 1)
        at_25_hz = self.attention_mask(1, n, state, lengths)
        at_50_hz = self.attention_mask(MEL_RATIO, n, state, lengths)
        x = self.encoder(self.input_embedding(units), n, lengths, at_25_hz, at_50_hz, state)
        return self.encoder_proj(x).transpose(1, 2)

    def integrate(self, mu, speaker, state=None, lengths=None):
        """mu (B, 80, 2n), the speaker's vector (1, 192) -> mel (B, 80, 2n).

        Follows the estimated velocity from noise to mel, in 10 Euler steps that are short at the start. The
        velocity is pushed away from the unconditional one (classifier-free guidance).
        """
        n = mu.shape[-1] // MEL_RATIO
        done = state.get("units", 0) if state else 0
        voice = self.spk_embed_affine_layer(F.normalize(speaker, dim=1))[..., None].expand_as(mu)
        given = torch.cat([mu, voice, torch.zeros_like(mu)], 1)       # the zeros: no prompt's mel
        given = torch.cat([given, torch.zeros_like(given)])           # (2B, 240, 2n), conditional and not
        place = torch.arange(MEL_RATIO * done, MEL_RATIO * (done + n), device=mu.device)
        x = self.noise[..., place % self.noise.shape[-1]].expand_as(mu)
        mask, keep = self.attention_mask(MEL_RATIO, n, state, lengths)
        if lengths is not None:
            mask = torch.cat([mask, mask])
        t = 1 - torch.cos(torch.linspace(0, 1, EULER_STEPS + 1, device=mu.device) * math.pi / 2)
        for i in range(EULER_STEPS):
            cache = None
            if state is not None:
                cache = state.setdefault(i, {})
            both = torch.cat([torch.cat([x, x]), given], 1)           # (2B, 320, 2n)
            v, free = self.decoder["estimator"](both, t[i], mask, keep, cache).chunk(2)
            x = x + (t[i + 1] - t[i]) * ((1 + GUIDANCE) * v - GUIDANCE * free)
        if state is not None:
            state["units"] = done + n
        return x

    def forward(self, units, speaker, state=None, ahead=None, lengths=None):
        """units (B, n), the speaker's vector (1, 192) -> mel (B, 80, 2n).

        state    what earlier chunks of the same reply left, {} for the first; n must be whole chunks, except
                 at the end
        ahead    (B, 3) units that follow, as look-ahead only; None at the end of the reply
        lengths  (B,) units of each reply, where they differ; not together with a state
        """
        return self.integrate(self.condition(units, state, ahead, lengths), speaker, state, lengths)


# ------------------------------------------------------------------------------------- mel -> sound

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

        def conv(dilation):
            return nn.Conv1d(dim, dim, kernel, dilation=dilation, padding=dilation * (kernel // 2))
        self.convs1 = nn.ModuleList([conv(1), conv(3), conv(5)])
        self.convs2 = nn.ModuleList([conv(1), conv(1), conv(1)])
        self.activations1 = nn.ModuleList(Snake(dim) for _ in range(3))
        self.activations2 = nn.ModuleList(Snake(dim) for _ in range(3))

    def forward(self, x):
        for conv1, conv2, act1, act2 in zip(self.convs1, self.convs2, self.activations1, self.activations2):
            x = x + conv2(act2(conv1(act1(x))))
        return x


class HiFT(nn.Module):
    """mel (B, 80, T) at 50 Hz -> wav 24 kHz: a pitch, a source of sines at that pitch (neural source filter),
    a HiFi-GAN that shapes it, the inverse STFT (HiFTNet, Li et al. 2023)."""

    rate = 24000            # Hz
    n_fft, hop = 16, 4      # STFT window and hop, samples
    frame = 480             # samples per mel frame
    reach = 14              # mel frames to either side that a sample depends on (13.2)

    def __init__(self, w):
        super().__init__()

        def conv(name, **more):
            out, size, kernel = w[f"{name}.weight"].shape
            return nn.Conv1d(size, out, kernel, **more)

        def resblocks(name):
            shapes = [w[f"{name}.{i}.convs1.0.weight"].shape for i in range(w.count(f"{name}."))]
            return nn.ModuleList(ResBlock(size, kernel) for _, size, kernel in shapes)
        layers = []
        for i in range(0, w.count("f0_predictor.condnet."), 2):
            layers += [conv(f"f0_predictor.condnet.{i}", padding=1), nn.ELU()]
        classifier = nn.Linear(w["f0_predictor.classifier.weight"].shape[1], 1)
        self.f0_predictor = nn.ModuleDict({"condnet": nn.Sequential(*layers), "classifier": classifier})
        harmonics = w["m_source.l_linear.weight"].shape[1]            # including the fundamental
        self.m_source = nn.ModuleDict({"l_linear": nn.Linear(harmonics, 1)})
        self.conv_pre = conv("conv_pre", padding=3)
        self.conv_post = conv("conv_post", padding=3)
        self.ups, self.source_downs = nn.ModuleList(), nn.ModuleList()
        for i in range(w.count("ups.")):
            size, out, kernel = w[f"ups.{i}.weight"].shape
            factor = kernel // 2                                              # x 8, 5, 3
            self.ups.append(nn.ConvTranspose1d(size, out, kernel, factor, (kernel - factor) // 2))
            stride = max(1, w[f"source_downs.{i}.weight"].shape[2] // 2)      # / 15, 3, 1
            self.source_downs.append(conv(f"source_downs.{i}", stride=stride, padding=stride // 2))
        self.source_resblocks = resblocks("source_resblocks")
        self.resblocks = resblocks("resblocks")
        self.register_buffer("window", torch.hann_window(self.n_fft), persistent=False)
        # the source's random draws, the same for every reply: phases in cycles, and 2.7 s of noise, repeated
        draw = torch.Generator().manual_seed(0)
        phases = torch.rand(harmonics, 1, generator=draw)
        phases[0] = 0                                                 # the fundamental starts at 0
        self.register_buffer("phases", phases, persistent=False)
        self.register_buffer("noise", torch.randn(harmonics, 1 << 16, generator=draw), persistent=False)

    def pitch(self, mel):
        """(B, 80, T) -> Hz (B, T)."""
        x = self.f0_predictor["condnet"](mel).transpose(1, 2)
        return self.f0_predictor["classifier"](x)[..., 0].abs()

    def source(self, f0, cycles=0.0, start=0):
        """Pitch (B, T) in Hz -> excitation (B, 1, 480 T): 9 harmonics of amplitude 0.1 with a little noise
        where voiced (above 10 Hz), only noise elsewhere.

        cycles   how many cycles the fundamental went through before these frames
        start    the number of the first frame
        """
        f0 = f0.repeat_interleave(self.frame, -1)[:, None]                          # (B, 1, 480 T)
        samples = f0.shape[-1]
        cycles = cycles + torch.cumsum(f0.double() / self.rate, -1)
        harmonic = torch.arange(1, len(self.phases) + 1, device=f0.device)[:, None]
        cycles = cycles * harmonic + self.phases                                    # (B, 9, 480 T)
        sines = 0.1 * torch.sin(2 * math.pi * (cycles % 1).float())
        place = torch.arange(start * self.frame, start * self.frame + samples, device=f0.device)
        noise = self.noise[:, place % self.noise.shape[-1]]
        voiced = (f0 > 10).float()
        x = sines * voiced + noise * (0.003 * voiced + 0.1 / 3 * (1 - voiced))      # (B, 9, 480 T)
        return torch.tanh(self.m_source["l_linear"](x.transpose(1, 2))).transpose(1, 2)

    def forward(self, mel, source):
        """mel (B, 80, T), source (B, 1, 480 T) -> wav (B, 480 T) in -0.99..0.99."""
        spectrum = torch.stft(source[:, 0], self.n_fft, self.hop, window=self.window, return_complex=True)
        spectrum = torch.cat([spectrum.real, spectrum.imag], 1)                     # (B, 18, 120 T + 1)
        kernels = len(self.resblocks) // len(self.ups)                              # residual blocks per rate
        x = self.conv_pre(mel)
        for i, up in enumerate(self.ups):                                           # T -> 8 T, 40 T, 120 T
            x = up(F.leaky_relu(x, 0.1))
            if i == len(self.ups) - 1:
                x = F.pad(x, (1, 0), mode="reflect")                                # 120 T + 1
            x = x + self.source_resblocks[i](self.source_downs[i](spectrum))
            blocks = self.resblocks[i * kernels:(i + 1) * kernels]
            x = sum(block(x) for block in blocks) / kernels
        size, angle = self.conv_post(F.leaky_relu(x)).chunk(2, 1)                   # (B, 9, 120 T + 1) each
        spectrum = torch.polar(size.exp().clamp(max=100), torch.sin(angle))
        return torch.istft(spectrum, self.n_fft, self.hop, window=self.window).clamp(-0.99, 0.99)


# ----------------------------------------------------------------------------- tokenizer and voices

@lru_cache
def onnx_session(path):
    """Open a network that the released folder holds as ONNX. Raises FileNotFoundError or RuntimeError."""
    if not os.path.exists(path):
        raise FileNotFoundError(f"there is no {path}; download the whole folder")
    try:
        import onnxruntime
    except ImportError:
        raise RuntimeError(f"{path} needs onnxruntime: pip install onnxruntime") from None
    available = onnxruntime.get_available_providers()
    providers = [p for p in ("CUDAExecutionProvider", "CPUExecutionProvider") if p in available]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()            # data.py's processes have one each
    try:
        return onnxruntime.InferenceSession(path, options, providers=providers)
    except Exception as e:                                            # onnxruntime raises classes of its own
        raise RuntimeError(f"{path} cannot be read ({type(e).__name__}); download it again") from e


def tokenize(folder, wav):
    """wav (samples,) at 16 kHz -> units (U,), one for every 40 ms, by the folder's speech_tokenizer_v2.onnx.

    The tokenizer takes at most 30 s. Longer clips are cut into pieces of 30 s that overlap by 4 s; in an
    overlap, the first 2 s of units come from the earlier piece and the other 2 s from the later one.
    """
    session = onnx_session(os.path.join(folder, "speech_tokenizer_v2.onnx"))
    feats, length = (x.name for x in session.get_inputs())
    mel = whisper.log_mel_spectrogram(wav.cpu().float(), 128)         # (128, T) at 100 Hz
    window, shared = 30 * MEL_RATE, 4 * MEL_RATE                      # frames
    half = 2 * UNIT_RATE                                              # units
    units = []
    for start in range(0, max(1, mel.shape[1] - shared), window - shared):
        piece = mel[None, :, start:start + window].contiguous()
        frames = numpy.array([piece.shape[2]], numpy.int32)
        found = session.run(None, {feats: piece.numpy(), length: frames})[0].reshape(-1)
        if start + window < mel.shape[1]:
            found = found[:len(found) - half]
        if start > 0:
            found = found[half:]
        units.append(torch.from_numpy(found).long())
    return torch.cat(units)


def fbank(wav):
    """wav (samples,) at 16 kHz -> kaldi's 80 log-mel bins at 100 Hz, minus their mean over time (T, 80): the
    input of CAM++, the speaker encoder."""
    try:
        import kaldi_native_fbank
    except ImportError:
        raise RuntimeError("a voice from a clip needs kaldi-native-fbank: "
                           "pip install kaldi-native-fbank") from None
    options = kaldi_native_fbank.FbankOptions()
    options.frame_opts.dither = 0
    options.mel_opts.num_bins = 80
    computer = kaldi_native_fbank.OnlineFbank(options)
    computer.accept_waveform(SAMPLE_RATE, wav.tolist())
    computer.input_finished()
    x = torch.stack([torch.from_numpy(computer.get_frame(i)) for i in range(computer.num_frames_ready)])
    return x - x.mean(0)


def read_voice(folder, voice=None):
    """The speaker's vector (1, 192), which conditions the flow.

    voice    a .npy or .pt file that holds it; an audio file, from which the folder's campplus.onnx computes
             it; the name of a voice in the folder's spk2info.pt; or None: the first voice there
    Raises FileNotFoundError, ValueError or RuntimeError, which say what was found instead.
    """
    if voice is None or not os.path.isfile(voice):
        x = named_voice(os.path.join(folder, "spk2info.pt"), voice)
    elif voice.endswith(".npy"):
        try:
            x = torch.from_numpy(numpy.load(voice))
        except (ValueError, TypeError, EOFError) as e:
            raise ValueError(f"{voice} does not hold an array of numbers; write it with numpy.save") from e
    elif voice.endswith(".pt"):
        x = read_tensors(voice)
    else:
        clip = fbank(read_audio(voice))[None].numpy()
        session = onnx_session(os.path.join(folder, "campplus.onnx"))
        x = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: clip})[0])
    if not torch.is_tensor(x):
        raise ValueError(f"{voice or folder}: expected a speaker's vector, a tensor of {VOICE_SIZE} numbers")
    if x.numel() != VOICE_SIZE:
        raise ValueError(f"{voice or folder}: the speaker's vector has {x.numel()} numbers, "
                         f"expected {VOICE_SIZE}")
    return x.reshape(1, VOICE_SIZE).float()


def named_voice(table, name):
    """The vector of a voice in spk2info.pt, {name: {"embedding": (1, 192), ...}}; None: the first voice."""
    voices = {}
    if os.path.exists(table):                             # released folders often lack it, or it is empty
        voices = read_tensors(table)
    if name is None:
        name = next(iter(voices), None)
    if name not in voices:
        wanted = "no voice" if name is None else f"no voice {name!r}"
        found = ", ".join(voices) or "none"
        raise ValueError(f"{wanted}: {table} has {found}; give --voice, a clip of the speaker or "
                         "a .npy or .pt file of the speaker's vector")
    return voices[name]["embedding"]


# ---------------------------------------------------------------------------------------- the codec

class CosyVoice2(nn.Module):
    """CosyVoice 2's tokenizer, flow and vocoder. omni/codec.py documents the interface."""

    sample_rate = HiFT.rate     # Hz
    overlap = 8                 # mel frames of 20 ms held back until more follow, as in the official code
    fade = 3                    # how many of those are faded: the pitch looks 5 frames ahead, theirs is final

    def __init__(self, folder, flow, hift, voice):
        super().__init__()
        self.folder, self.flow, self.hift = folder, flow, hift
        self.register_buffer("voice", voice, persistent=False)        # (1, 192)

    @classmethod
    def load(cls, folder, voice=None, **sizes):
        """Open a folder like ICTNLP/cosy2_decoder: flow.pt, hift.pt; and speech_tokenizer_v2.onnx to encode.

        voice    see `read_voice`
        sizes    arguments of Flow; all other sizes are read from the weights, only the head size cannot be
        Raises FileNotFoundError, ValueError, or RuntimeError that names the tensor that does not fit.
        """
        flow = Weights(os.path.join(folder, "flow.pt"))
        hift = Weights(os.path.join(folder, "hift.pt"))
        flow = flow.load_into(Flow(flow, **sizes))
        hift = hift.load_into(HiFT(hift))
        return cls(folder, flow, hift, read_voice(folder, voice)).eval()

    def encode(self, wav):
        """wav (samples,) at 16 kHz -> units (U,)."""
        return tokenize(self.folder, wav)

    def next_mel(self, state, units, final):
        """The next units (a list) of a reply -> the mel frames (1, 80, n >= 0) that are now certain: those of
        whole chunks whose look-ahead is known, or of all units if `final`."""
        waiting = state.get("units", []) + list(units)
        chunk = self.flow.chunk
        if final:
            n = len(waiting)
        elif chunk:
            n = max(0, len(waiting) - LOOKAHEAD) // chunk * chunk
        else:
            n = 0
        state["units"] = waiting[n:]
        if n == 0:
            return self.voice.new_zeros(1, self.flow.noise.shape[1], 0)
        row = torch.tensor([waiting[:n + LOOKAHEAD]], dtype=torch.long, device=self.voice.device)
        ahead = None if final else row[:, n:]
        return self.flow(row[:, :n], self.voice, state.setdefault("flow", {}), ahead)

    def next_wav(self, state, mel, final):
        """The next mel frames (1, 80, n >= 0) of a reply -> the samples (m,) that are now certain.

        HiFT looks both ways. So it runs again over `reach` frames of the past, and the last `overlap` frames
        are held back until more follow. The first `fade` of those are then faded from the old rendering to
        the new one. Pitch and phase continue where they were.
        """
        start = state.get("start", 0)                     # number of the first frame in `mel`
        sent = state.get("sent", 0)                       # frames that are out
        if "mel" in state:
            mel = torch.cat([state["mel"], mel], -1)
        end = start + mel.shape[-1]
        stop = end if final else max(sent, end - self.overlap)
        if stop == sent:
            state["mel"] = mel
            return mel.new_zeros(0)
        f0 = torch.cat([state.get("f0", mel.new_zeros(1, 0)), self.hift.pitch(mel)[:, sent - start:]], -1)
        cycles = state.get("cycles", 0.0)                 # of the fundamental, before `start`
        wav = self.hift(mel, self.hift.source(f0, cycles, start))[0, (sent - start) * HiFT.frame:]
        held = state.get("held", wav[:0])                 # the old rendering of the frames after `sent`
        x = (torch.arange(len(held), device=wav.device) + 0.5) / max(1, len(held))
        fade = torch.sin(x * math.pi / 2) ** 2            # 0 .. 1 (the official Hamming halves sum to 1.08)
        wav[:len(held)] = held * (1 - fade) + wav[:len(held)] * fade
        now = (stop - sent) * HiFT.frame                  # samples that go out
        again = max(0, stop - self.hift.reach)            # the next call renders again from here
        passed = f0[0, :again - start].double().sum().item() * HiFT.frame / HiFT.rate
        state["start"], state["sent"] = again, stop
        state["cycles"] = (cycles + passed) % 1
        state["f0"] = f0[:, again - start:stop - start]
        state["mel"] = mel[..., again - start:]
        state["held"] = wav[now:][:self.fade * HiFT.frame]
        return wav[:now]

    @torch.no_grad()
    def next_piece(self, state, units, final):
        """The next units (a list) of a reply -> the samples (m,) that are now certain."""
        return self.next_wav(state, self.next_mel(state, units, final), final)

    def next_pieces(self, states, bursts, finals):
        """`next_piece` of several replies, one after the other."""
        return [self.next_piece(*row) for row in zip(states, bursts, finals)]

    @torch.no_grad()
    def decode(self, units, final=True):
        """units (U,) or (B, U) -> wav (960 U,) or (B, 960 U); a list of replies (U_i,), which the flow
        renders together -> a list.

        With final=False the units are the beginning of a longer reply: only what `stream` would have sent
        comes back.
        """
        if torch.is_tensor(units):
            if units.dim() == 1:
                return self.decode([units], final)[0]
            return torch.stack(self.decode(list(units), final))
        if not final:
            return [self.next_piece({}, row.tolist(), False) for row in units]
        lengths = torch.tensor([len(row) for row in units], device=self.voice.device)
        if not lengths.any():
            return [self.voice.new_zeros(0) for _ in units]
        rows = [row.to(self.voice.device).long() for row in units]
        rows = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        mels = self.flow(rows, self.voice, lengths=lengths if len(units) > 1 else None)
        wavs = []
        for mel, row in zip(mels, units):
            wavs.append(self.next_wav({}, mel[None, :, :MEL_RATIO * len(row)], final=True))
        return wavs
