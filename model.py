"""
The network of LLaMA-Omni 2 (arXiv 2505.02625), for training and for streaming.

Why one file: a spoken chatbot is five parts in a row, and the row is the idea. With rates and, in brackets, the
sizes of the 0.5B release:

    wav 16 kHz
     -> log-mel 100 Hz (128)           openai-whisper's front end
     -> SpeechEncoder 50 Hz (1280)     Whisper's encoder, frozen
     -> SpeechAdapter 10 Hz (896)      5 frames in 1
     -> LLM (896)                      Qwen2, reads the frames in the place of `<speech>`: text tokens y_i, states h_i
     -> GateFusion (896)               mixes h_i with the speech LM's own embedding of y_i
     -> SpeechLM 25 Hz (6561 units)    Qwen2, reads R = 3 fused rows, writes W = 10 units, reads 3, writes 10, ...
     -> wav                            codec.py

How it is trained: `Omni.forward(batch, stage)` returns the summed loss of a stage and the number of its targets.
How it talks: `Omni.generate()` yields text and units as they are made. Both lay out the speech LM's sequence with
`read_write()`. The attribute names are those of the released checkpoints, so the state dict is theirs, key for key.
"""
import hashlib
import json
import os
import re
import shutil
import sys

import torch
import torch.nn as nn
import torch.nn.functional as F
import whisper
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, Qwen2Config, Qwen2ForCausalLM, Qwen2Model, Qwen2Tokenizer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from whisper.model import AudioEncoder, LayerNorm

SAMPLE_RATE = 16000           # Hz, of the speech that goes in
UNIT_VOCAB = 6561             # speech units: 3 ** 8 codes
DOWNSAMPLE = 5                # encoder frames in one LLM position: 50 Hz -> 10 Hz
WINDOW = 3000                 # log-mel frames that Whisper hears at once: 30 s, 300 LLM positions
MIN_SECONDS, MAX_SECONDS = 0.1, 600.0  # a clip gives from 1 to 6,000 LLM positions, of which Qwen2.5 has 32,768
SPEECH = -200                 # input id at a position that holds speech instead of a token
IGNORE = -100                 # label of a position without loss
LOGITS = 2 ** 26              # logits that exist at once: 0.27 GB in fp32; 16,000 targets of Qwen2.5's vocabulary would be 10
STAGES = {                    # what each stage trains, by prefix of the parameter's name
    "stage1": ("model.embed_tokens", "model.layers", "model.norm", "lm_head", "model.speech_projector"),
    "stage1_tts": ("speech_generator.model",),
    "stage2": ("speech_generator",),
}
UNUSED = {                    # what a kind of fusion leaves out
    "gate": (),
    "text": ("speech_generator.input_proj", "speech_generator.gate"),
    "hidden": ("speech_generator.gate",),
}


# ------------------------------------------------------------------------------------------------ the layout

def read_write(rows, R, W):
    """The read-R / write-W order of equation 5, for training and for streaming alike.

    rows     iterable of (row, is_last): the fused rows of a reply, as they become known
    Yields   ("read", row)    the speech LM reads this row
             ("write", W)     it writes W units; after every R rows, but for the block that ends the text
             ("sep", None)    it reads `<sep>`: the text is complete
             ("write", None)  it writes all the units that are left, then EOS
    """
    for i, (row, last) in enumerate(rows, 1):
        yield "read", row
        if last:
            yield "sep", None
            yield "write", None
        elif i % R == 0:
            yield "write", W


def speech_sequence(tokens, units, sep, unit_offset, eos, R, W):
    """Lay out one reply for teacher forcing.

    tokens   list of N text ids of the reply, `<|im_end|>` included;  units: list of U integers in 0 .. 6560
    Returns  three lists of length N + 1 + U: input ids in the speech LM's vocabulary; for each position the text row
             i that it reads, or -1; labels, IGNORE where the next position is not a unit (or EOS) to be written.
    If the units run out before the text, the remaining bursts are empty.
    """
    ids, rows, labels, written = [], [], [], 0
    for what, x in read_write(((i, i == len(tokens) - 1) for i in range(len(tokens))), R, W):
        if what == "write":
            burst = [unit_offset + u for u in units[written:None if x is None else written + x]]
            targets = burst + [eos] if x is None else burst
            written += len(burst)
            if targets:
                labels[-1] = targets[0]               # the last row read predicts the burst's first unit
                labels += targets[1:] + [IGNORE] * (len(burst) - len(targets) + 1)
            ids, rows = ids + burst, rows + [-1] * len(burst)
        else:
            ids.append(tokens[x] if what == "read" else sep)
            rows.append(x if what == "read" else -1)
            labels.append(IGNORE)
    return ids, rows, labels


# ------------------------------------------------------------------------------------------------- the parts

def log_mel(wav, n_mels, pad=False):
    """wav (samples,) 16 kHz -> (n_mels, frames) at 100 Hz. `pad`: to a multiple of 30 s first; the official front
    end pads to 30 s.

    Raises ValueError for a clip that is shorter than 0.1 s or longer than 10 minutes.
    """
    seconds = len(wav) / SAMPLE_RATE
    if not MIN_SECONDS <= seconds <= MAX_SECONDS:
        raise ValueError(f"a clip of {seconds:.2f} s; it must last from {MIN_SECONDS} to {MAX_SECONDS:.0f} s")
    return whisper.log_mel_spectrogram(F.pad(wav, (0, -len(wav) % (WINDOW * SAMPLE_RATE // 100))) if pad else wav, n_mels)


def clip_frames(samples, pad=False):
    """How many frames `log_mel` makes of so many samples."""
    return -(-samples // (WINDOW * SAMPLE_RATE // 100)) * WINDOW if pad else samples // (SAMPLE_RATE // 100)


def speech_positions(frames):
    """How many LLM positions a clip of log-mel frames takes: 100 Hz -> 50 Hz -> 10 Hz, window by window, as `embed_speech`
    hears it."""
    return frames // WINDOW * (WINDOW // 2 // DOWNSAMPLE) + (frames % WINDOW + 1) // 2 // DOWNSAMPLE


class Gather(torch.autograd.Function):
    """x[index], with zeros where the index is -1. `back` undoes `index`, so that the gradient is gathered too and never
    added up: quick, and the same bits each time."""

    @staticmethod
    def forward(ctx, x, index, back):
        ctx.save_for_backward(index, back)
        return torch.cat([x, x.new_zeros(1, *x.shape[1:])])[index]

    @staticmethod
    def backward(ctx, grad):
        index, back = ctx.saved_tensors
        return torch.cat([grad, grad.new_zeros(1, *grad.shape[1:])])[back], None, None


def attention(q, k, v, mask, causal):
    """q (B, H, L, d), k and v (B, H or fewer, L, d), mask of the keys (B, 1, 1, L) or None -> (B, H, L, d). Rows are padded at
    the right, so that causal attention needs no mask."""
    if q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v, None if causal else mask, is_causal=causal, enable_gqa=True)
    # on CPU the backward of torch's fused attention is slower than plain products (348 against 300 ms a step, project.md)
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    weights = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5
    if causal:
        mask = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        weights = weights.masked_fill(~mask, -torch.inf)
    return weights.float().softmax(-1).to(v.dtype) @ v


class Rows:
    """Rows of several lengths laid end to end, (T, ...) with T the sum of the lengths: what the networks compute on, so
    that no position is padding. Attention alone wants rows side by side: those of similar length in one rectangle."""

    def __init__(self, lengths, device="cpu", tolerance=0.8):
        """lengths: list of the rows' lengths; tolerance: the shortest row of a rectangle, as a share of its longest."""
        ends = torch.tensor(lengths).cumsum(0).tolist()
        groups = []
        for i in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
            if not groups or lengths[i] < tolerance * lengths[groups[-1][0]]:
                groups.append([])
            groups[-1].append(i)
        self.shapes = [(len(group), lengths[group[0]]) for group in groups]
        index = [torch.stack([torch.arange(L).add(ends[i] - lengths[i]).where(torch.arange(L) < lengths[i], -1) for i in group])
                 for group, (_, L) in zip(groups, self.shapes)]
        self.masks = [(at >= 0)[:, None, None].to(device) if (at < 0).any() else None for at in index]   # keys, (B, 1, 1, L)
        index = torch.cat([at.flatten() for at in index])                                                # (sum of B L,)
        back = torch.empty(ends[-1], dtype=torch.long)
        back[index[index >= 0]] = torch.arange(len(index))[index >= 0]
        self.index, self.back = index.to(device), back.to(device)
        self.position = torch.cat([torch.arange(n) for n in lengths]).to(device)                         # (T,) in its row

    @torch.compiler.disable
    def attend(self, q, k, v, causal):
        """q (T, H, d), k and v (T, H or fewer, d) -> (T, H, d): each position looks at its own row, `causal` at its past."""
        q, k, v = ([part.view(*shape, *x.shape[1:]).transpose(1, 2)                                      # (B, H, L, d)
                    for part, shape in zip(Gather.apply(x, self.index, self.back).split([B * L for B, L in self.shapes]), self.shapes)]
                   for x in (q, k, v))
        y = [attention(*qkv, mask, causal) for *qkv, mask in zip(q, k, v, self.masks)]
        return Gather.apply(torch.cat([x.transpose(1, 2).flatten(0, 1) for x in y]), self.back, self.index)


def qwen2_attention(module, q, k, v, mask, rows=None, **more):
    """Attention as Qwen2 calls it, q (B, H, L, d): with `rows`, B is 1 and L holds rows end to end; without, it streams."""
    if rows is None:
        return sdpa_attention_forward(module, q, k, v, mask, **more)
    return rows.attend(*(x[0].transpose(0, 1) for x in (q, k, v)), causal=True)[None], None

AttentionInterface.register("rows", qwen2_attention)
AttentionMaskInterface.register("rows", sdpa_mask)


def run(network, x, lengths):
    """A Qwen2Model on embedded rows laid end to end: x (T, D), list of lengths -> states (T, D)."""
    rows = Rows(lengths, x.device)
    return network(inputs_embeds=x[None], position_ids=rows.position[None], attention_mask={"full_attention": None},
                   use_cache=False, rows=rows).last_hidden_state[0]


class SpeechEncoder(AudioEncoder):
    """Whisper's encoder, run at each clip's own length, on clips laid end to end."""

    def __init__(self, n_mels, n_ctx, n_state, n_head, n_layer):
        super().__init__(n_mels, n_ctx, n_state, n_head, n_layer)
        self.n_mels = n_mels
        for module in self.modules():                 # whisper's own computes in fp32 and then fails on bf16 weights
            if isinstance(module, LayerNorm):
                module.__class__ = nn.LayerNorm

    @classmethod
    def from_whisper(cls, path):
        """From an openai-whisper file or the name of one of its models ("large-v3", downloaded once)."""
        try:
            model = whisper.load_model(path, device="cpu")
        except OSError as e:
            raise OSError(f"Whisper {path} cannot be loaded or downloaded ({e}); give its file") from e
        d = model.dims
        encoder = cls(d.n_mels, d.n_audio_ctx, d.n_audio_state, d.n_audio_head, d.n_audio_layer)
        encoder.load_state_dict(model.encoder.state_dict())
        return encoder

    def forward(self, mel, frames):
        """Clips of at most 30 s laid end to end, mel (n_mels, T) and a list of their frames -> (sum of ceil(frames / 2),
        n_state) at 50 Hz."""
        # the two convolutions look one frame beyond a clip and must see silence there: a gap of one or two frames, so that
        # each clip begins at an even frame
        starts = [0, *torch.tensor([n + 2 - n % 2 for n in frames]).cumsum(0).tolist()]
        at = torch.cat([torch.arange(start, start + n) for start, n in zip(starts, frames)]).to(mel.device)
        halves = torch.cat([torch.arange(start // 2, start // 2 + (n + 1) // 2) for start, n in zip(starts, frames)]).to(mel.device)
        x = mel.new_zeros(len(mel), starts[-1], dtype=self.conv1.weight.dtype)
        x[:, at] = mel.to(x.dtype)
        clip = torch.zeros(starts[-1], dtype=torch.bool, device=mel.device)
        clip[at] = True
        x = F.gelu(self.conv1(x[None])) * clip
        x = F.gelu(self.conv2(x))[0].T[halves]                                              # (T / 2, n_state): 100 Hz -> 50 Hz
        rows = Rows([(n + 1) // 2 for n in frames], mel.device)
        x = x + self.positional_embedding[rows.position].to(x.dtype)
        for block in self.blocks:
            attn = block.attn
            heads = lambda y: y.unflatten(-1, (attn.n_head, -1))                            # (T / 2, H, 64)
            y = block.attn_ln(x)
            y = rows.attend(heads(attn.query(y)), heads(attn.key(y)), heads(attn.value(y)), causal=False)
            x = x + attn.out(y.flatten(1))
            x = x + block.mlp(block.mlp_ln(x))
        return self.ln_post(x)


class SpeechAdapter(nn.Module):
    """Section 2.1: five frames side by side, then two linear layers."""

    def __init__(self, encoder_size, hidden_size):
        super().__init__()
        self.linear1 = nn.Linear(DOWNSAMPLE * encoder_size, 2048)
        self.linear2 = nn.Linear(2048, hidden_size)

    def forward(self, x):
        """(T, D) at 50 Hz, T a multiple of 5 -> (T / 5, H) at 10 Hz."""
        return self.linear2(F.relu(self.linear1(x.reshape(-1, DOWNSAMPLE * x.shape[-1]))))


class Head(nn.Linear):
    """The last layer; given labels, with the loss."""

    def forward(self, hidden, labels=None):
        """hidden (..., H) -> logits (..., vocabulary). With labels (T,), what each position of hidden (T, H) is to predict:
        (cross-entropy, summed; number of targets; number right).

        Logits are made only where there is a target, since most positions are prompt or speech, and LOGITS of them at a time, since
        the vocabulary is large; the way back makes them once more. All in one call, at which ZeRO-3 gathers the weights: every
        process must make as many."""
        if labels is None:
            return super().forward(hidden)
        hidden, labels = hidden[labels != IGNORE], labels[labels != IGNORE]

        def part(hidden, labels):
            logits = F.linear(hidden, self.weight).float()                                  # (targets, vocabulary)
            return F.cross_entropy(logits, labels, reduction="sum"), (logits.argmax(-1) == labels).sum()
        parts = list(zip(*(x.split(max(1, LOGITS // self.out_features)) for x in (hidden, labels))))
        parts = [checkpoint(part, *x, use_reentrant=False) if len(parts) > 1 else part(*x) for x in parts]
        return sum(loss for loss, _ in parts), torch.tensor(len(labels), device=hidden.device), sum(right for _, right in parts)


class SpeechGenerator(nn.Module):
    """Gate fusion (equations 1 to 4) and the speech LM, a Qwen2 whose vocabulary is text, `<sep>`, units.

    h, the state of the LLM that predicted a token, and e, the speech LM's embedding of that token, become one row:
        z = W2 relu(W1 h + b1) + b2;   g = sigmoid(Wg [z ; e] + bg);   row = g * z + (1 - g) * e
    For the ablation of section 4.4 `fusion` may also be "text" (row = e) or "hidden" (row = z).
    """

    def __init__(self, config, hidden_size, fusion="gate"):
        super().__init__()
        self.fusion = fusion
        self.model, D = Qwen2ForCausalLM(config), config.hidden_size
        self.model.lm_head = nn.utils.skip_init(Head, D, config.vocab_size, bias=False)
        self.model.lm_head.weight = self.model.model.embed_tokens.weight               # tied, always
        self.input_proj = nn.Sequential(nn.Linear(hidden_size, 2 * hidden_size), nn.ReLU(), nn.Linear(2 * hidden_size, D))
        self.gate = nn.Sequential(nn.Linear(2 * D, D), nn.Sigmoid())
        self.eos = config.eos_token_id
        self.unit_offset = config.vocab_size - UNIT_VOCAB      # the id of unit 0
        self.sep = self.unit_offset - 1

    def embed(self, ids):
        return self.model.model.embed_tokens(ids)

    def fuse(self, hidden, ids):
        """LLM states (..., H) and the ids (...) that they predicted -> fused rows (..., D)."""
        e = self.embed(ids)
        if self.fusion == "text":
            return e
        z = self.input_proj(hidden)
        if self.fusion == "hidden":
            return z
        g = self.gate(torch.cat([z, e], dim=-1))
        return g * z + (1 - g) * e


# ------------------------------------------------------------------------------------------------- the whole

class Omni(nn.Module):
    """The five parts. `config` is a dict: the fields of the release's config.json (reference/architecture.md)."""

    def __init__(self, config, encoder):
        super().__init__()
        self.config, self.folder = config, None               # folder: see from_pretrained
        H = config["hidden_size"]
        self.model = Qwen2Model(qwen2_config(config))
        self.lm_head = Head(H, config["vocab_size"], bias=False)
        self.model.speech_encoder = encoder                    # where the release keeps them
        self.model.speech_projector = SpeechAdapter(config["speech_encoder_hidden_size"], H)
        self.speech_generator = SpeechGenerator(qwen2_config(config["speech_generator"]), H, config.get("fusion", "gate"))
        self.tie()
        words = config["stream_params"].strip("() ").split(",")
        if len(words) != 2 or not all(w.strip().isdigit() and int(w) > 0 for w in words):
            raise ValueError(f'stream_params is {config["stream_params"]!r}; it must be two whole numbers, "(3,10)"')
        self.R, self.W = map(int, words)

    def tie(self):
        if self.config["tie_word_embeddings"]:
            self.lm_head.weight = self.model.embed_tokens.weight

    def freeze_for(self, stage, llm=True):
        """Only what `stage` trains (STAGES) gets gradients; of an LLM with LoRA the two small matrices, without `llm` nothing."""
        lora = self.config.get("lora_rank")
        for name, p in self.named_parameters():
            p.requires_grad = name.startswith(STAGES[stage]) and not name.startswith(UNUSED[self.speech_generator.fusion])
            if name.startswith(STAGES["stage1"]) and "speech_projector" not in name and not (llm and (not lora or "lora_" in name)):
                p.requires_grad = False

    def add_lora(self, rank):
        """Beside each matrix of the LLM's layers two small ones whose product is added to it (LoRA, arXiv 2106.09685); the
        second begins at zero. A field of ours in the config, until `merge_lora`."""
        import peft
        self.config["lora_rank"] = rank
        linear = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        peft.inject_adapter_in_model(peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=linear), self.model)

    def merge_lora(self):
        """Add the products to their matrices, if there are any: the layout is the released one again."""
        if self.config.pop("lora_rank", None):
            from peft.tuners.lora import LoraLayer
            for name, module in list(self.model.named_modules()):
                if isinstance(module, LoraLayer):
                    module.merge()
                    self.model.set_submodule(name, module.get_base_layer())

    # ---- training

    def hear(self, mel, frames):
        """Clips laid end to end, mel (n_mels, T) and a list of their frames -> what Whisper makes of them, at 50 Hz and as far
        as it fills groups of five: (5 x sum of positions, n_state).

        Whisper hears 30 s at once: a longer clip is cut into windows, and the last one keeps its own length."""
        windows = [min(WINDOW, n - at) for n in frames for at in range(0, n, WINDOW)]
        with torch.no_grad():                                  # frozen in every stage
            x = self.model.speech_encoder(mel, windows)
        return torch.cat([w[:speech_positions(n) * DOWNSAMPLE] for w, n in zip(x.split([(n + 1) // 2 for n in windows]), windows)])

    def embed_prompt(self, ids, heard=None):
        """ids (L,), SPEECH at every position that a clip fills, clips in reading order as `hear` gives them -> (L, H)."""
        speech = ids == SPEECH
        x = self.model.embed_tokens(ids.masked_fill(speech, 0))
        return x if heard is None else x.masked_scatter(speech[:, None], self.model.speech_projector(heard).to(x.dtype))

    def frozen(self, batch, stage):
        """What the frozen networks make of a batch, always the same, so that train.py may keep it on disk: in stage 1
        what Whisper hears (5 x positions, n_state), in stage 2 the LLM's state for each token of each reply (N, H)."""
        heard = self.hear(batch["mel"], batch["frames"])
        if stage == "stage1":
            return heard
        with torch.no_grad():
            states = run(self.model, self.embed_prompt(batch["ids"], heard), batch["lengths"])
            return states[batch["speech_rows"][batch["speech_rows"] >= 0]]

    def forward(self, batch, stage):
        """batch: what data.collate makes. Returns (sum of the loss over the targets, their number, how many were
        guessed right), of which the first carries the gradient."""
        if "frozen" in batch:                                  # kept in bf16, and trained in fp32 perhaps
            frozen = batch["frozen"].to(self.lm_head.weight.dtype)
        else:
            frozen = None if stage == "stage1_tts" else self.frozen(batch, stage)
        if stage == "stage1":
            states = run(self.model, self.embed_prompt(batch["ids"], frozen), batch["lengths"])
            return self.lm_head(states, batch["labels"])
        generator = self.speech_generator
        x = generator.embed(batch["speech_ids"])                                             # (S, D)
        if stage == "stage2":
            at = batch["speech_rows"] >= 0
            x = x.masked_scatter(at[:, None], generator.fuse(frozen, batch["speech_ids"][at]).to(x.dtype))
        return generator.model.lm_head(run(generator.model.model, x, batch["speech_lengths"]), batch["speech_labels"])

    # ---- streaming

    def write_text(self, x, limit, temperature, top_p, eos):
        """Prompt x (1, L, H) -> yields (id, state (H,) that predicted it, is_last), one token at a time."""
        cache = DynamicCache()
        for i in range(limit):
            state = self.model(inputs_embeds=x, past_key_values=cache, use_cache=True).last_hidden_state[:, -1]
            token = sample(self.lm_head(state)[0].float(), temperature, top_p)
            last = token == eos or i == limit - 1
            yield token, state[0], last
            if last:
                return
            x = self.model.embed_tokens(torch.tensor([[token]], device=x.device))

    @torch.inference_mode()
    def generate(self, ids, clips=(), eos=None, speak=True, max_tokens=128, max_units=1024, text_temperature=0.0,
                 text_top_p=1.0, temperature=1.0, top_p=1.0, top_k=0, window=10, repeats=0.0, constrain=True, trace=None, reply=None):
        """Answer, streaming.

        ids          list of prompt ids, with one SPEECH for each of `clips`, log-mels (n_mels, frames)
        max_tokens, max_units   limits on the reply's text and units, so that every reply ends
        temperature  0 is greedy; top_p, top_k (0: off) narrow the choice of units
        repeats      repetition-aware sampling (VALL-E 2): a unit that makes up more than this share of the last
                     `window` units is drawn again from the whole distribution; 0 turns it off
        constrain    mask what cannot follow: in a burst everything but units, at the end all but units and EOS
        reply        ids of a text to be said as it is, without the LLM: what stage 1 TTS learns
        trace        a list that receives the speech LM's inputs and logits, for tests
        Yields ("text", id), ("units", [unit, ...]) and, if a limit was hit, ("note", why).
        """
        device, generator = self.lm_head.weight.device, self.speech_generator
        eos = self.config["eos_token_id"] if eos is None else eos
        cache, pending, units = DynamicCache(), [], []
        allowed = torch.zeros(generator.model.config.vocab_size, dtype=torch.bool, device=device)
        allowed[generator.unit_offset:] = True

        def rows():
            if reply is not None:
                yield from (((token, None), i == len(reply)) for i, token in enumerate([*reply, eos]))
                return
            frames = [clip.shape[-1] for clip in clips]
            heard = self.hear(torch.cat(list(clips), 1).to(device), frames) if frames else None
            x = self.embed_prompt(torch.tensor(expand_speech(ids, frames), device=device), heard)[None]
            for token, state, last in self.write_text(x, max_tokens, text_temperature, text_top_p, eos):
                yield (token, state), last

        for what, item in read_write(rows(), self.R, self.W):
            if what == "read":
                token, state = item
                if token != eos:
                    yield "text", token
                if speak:
                    y = torch.tensor(token, device=device)
                    pending.append(generator.embed(y) if state is None else generator.fuse(state, y))
            elif not speak:
                continue
            elif what == "sep":
                pending.append(generator.embed(torch.tensor(generator.sep, device=device)))
                if token != eos:
                    yield "note", f"the text was cut at {max_tokens} tokens"
                allowed[generator.eos] = True
            else:                                              # write up to `item` units, or up to EOS
                burst, ended = [], False
                room = max_units - len(units)
                while not ended and len(burst) < (room if item is None else min(item, room)):
                    inputs = torch.stack(pending)
                    state = generator.model.model(inputs_embeds=inputs[None], past_key_values=cache,
                                                  use_cache=True).last_hidden_state[0, -1]
                    logits = generator.model.lm_head(state).float()
                    if trace is not None:
                        trace.append((inputs, logits))
                    if constrain:
                        logits = logits.masked_fill(~allowed, -torch.inf)
                    recent = [u + generator.unit_offset for u in units[-window:]] if repeats else []
                    token = sample(logits, temperature, top_p, top_k, recent, repeats * window)
                    pending = [generator.embed(torch.tensor(token, device=device))]
                    ended = token == generator.eos
                    if not ended:
                        burst.append(token - generator.unit_offset)
                        units.append(burst[-1])
                if burst:
                    yield "units", burst
                if item is None and not ended:
                    yield "note", f"the speech was cut at {max_units} units"

    # ---- checkpoints

    @classmethod
    def from_backbones(cls, llm, whisper, speech_lm, R=3, W=10):
        """Before training: a Qwen2, a Whisper, and a second Qwen2 that becomes the speech LM (folders, files or hub
        names). Returns (model, tokenizer, tts_tokenizer)."""
        tokenizer, tts_tokenizer = Qwen2Tokenizer.from_pretrained(llm), Qwen2Tokenizer.from_pretrained(speech_lm)
        if not tokenizer.chat_template:
            raise ValueError(f"{llm} has no chat template: it was not made for conversations; take an Instruct model")
        tokenizer.add_tokens(["<speech>"], special_tokens=True)
        tts_tokenizer.add_tokens(["<sep>"], special_tokens=True)          # must take the id that `<speech>` has above
        tts_tokenizer.add_tokens([f"<{u}>" for u in range(UNIT_VOCAB)])
        tts_tokenizer.eos_token = tts_tokenizer.pad_token = "<|endoftext|>"
        if tokenizer.convert_tokens_to_ids("<speech>") != tts_tokenizer.convert_tokens_to_ids("<sep>"):
            raise ValueError(f"{llm} and {speech_lm} have different tokenizers; the speech LM must know the LLM's ids")
        encoder = SpeechEncoder.from_whisper(whisper)
        if encoder.conv2.out_channels != 64 * encoder.blocks[0].attn.n_head:
            raise ValueError(f"the heads of Whisper {whisper} are not 64 wide as those of every released one; a checkpoint would not say so")
        mouth = Qwen2ForCausalLM.from_pretrained(speech_lm, dtype=torch.float32)
        mouth.resize_token_embeddings(len(tts_tokenizer), mean_resizing=False)
        mouth.config.eos_token_id = mouth.config.bos_token_id = tts_tokenizer.eos_token_id
        brain = Qwen2ForCausalLM.from_pretrained(llm, dtype=torch.float32)
        if brain.config.vocab_size < len(tokenizer):
            brain.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        config = released_fields(brain.config) | {
            "architectures": ["Omni2Speech2SQwen2ForCausalLM"], "model_type": "omni2_speech2s_qwen2",
            "eos_token_id": tokenizer.convert_tokens_to_ids("<|im_end|>"),
            "bos_token_id": tokenizer.convert_tokens_to_ids("<|im_end|>"), "pad_token_id": tokenizer.pad_token_id,
            "speech_encoder": os.path.basename(whisper), "speech_encoder_type": "whisper",
            "speech_encoder_ds_rate": DOWNSAMPLE, "speech_encoder_hidden_size": encoder.ln_post.weight.shape[0],
            "speech_generator": {k: v for k, v in released_fields(mouth.config).items() if k in SPEECH_FIELDS},
            "speech_projector_type": "linear", "stream_params": f"({R},{W})", "torch_dtype": "float32",
            "tts_tokenizer": "tts_tokenizer", "unit_vocab_size": UNIT_VOCAB}
        omni = cls(config, encoder)
        omni.model.load_state_dict(omni.model.state_dict() | brain.model.state_dict())
        omni.lm_head.load_state_dict(brain.lm_head.state_dict())
        omni.speech_generator.model.load_state_dict(mouth.state_dict())
        nn.init.constant_(omni.speech_generator.gate[0].bias, -3.0)       # g = 0.05: stage 2 begins where stage 1 TTS ended
        return omni, tokenizer, tts_tokenizer

    @classmethod
    def from_pretrained(cls, folder, whisper=None):
        """Load a checkpoint in the released layout: a local folder or the id of a repository on the hub. Of a run it takes
        final/, or else the newest step-N/, which holds what was trained and says where the rest is.

        whisper  file or name of the Whisper, wanted only where the checkpoint does not hold the encoder's weights or
                 its heads are not 64 wide
        Returns (model, tokenizer, tts_tokenizer); model.folder is where all of its tensors lie, None if they do not lie in
        one folder. Raises FileNotFoundError, or ValueError that names the tensor.
        """
        final = os.path.join(folder, "final")
        folder = final if os.path.isdir(final) else newest_checkpoint(folder) or folder
        if not os.path.isdir(folder):
            if folder.count("/") != 1 or folder.startswith((".", "/")):
                raise FileNotFoundError(f"there is no checkpoint folder {folder}")
            from huggingface_hub import snapshot_download
            try:
                folder = snapshot_download(folder)
            except Exception as e:                             # a network's and a hub's many ways to fail
                raise FileNotFoundError(f"there is no folder {folder}, and it cannot be downloaded ({type(e).__name__}); "
                                        f"try `hf download {folder}`, or give a folder") from e
        for name in ("config.json", "tokenizer_config.json", "tts_tokenizer"):
            if not os.path.exists(os.path.join(folder, name)):
                raise FileNotFoundError(f"{folder} is not a checkpoint: it has no {name}")
        if folder == final and (reason := damage(folder)):
            raise ValueError(f"{folder} is damaged: {reason}; delete it, and train.py makes it again from the run's last step")
        config, base = read_json(folder, "config.json"), read_json(folder, "meta.json").get("base")
        weights = {}
        if base:                                               # what was frozen lies in another checkpoint
            frozen = os.path.normpath(os.path.join(folder, base["folder"]))
            if not os.path.isdir(frozen) or hashes(frozen) != base["sha256"]:
                raise ValueError(f"what {folder} did not train is in {frozen}, which has changed or is gone; bring it back")
            weights |= read_weights(frozen)
        weights |= read_weights(folder)
        prefix = "model.speech_encoder."
        own = {k[len(prefix):]: w for k, w in weights.items() if k.startswith(prefix)}
        if whisper or not own:
            encoder = SpeechEncoder.from_whisper(whisper or config["speech_encoder"])
        else:
            for name in ("conv1.weight", "positional_embedding"):
                if name not in own:
                    raise ValueError(f"{folder} lacks tensor {prefix}{name}; it is of another model or damaged")
            size, n_mels, _ = own["conv1.weight"].shape
            layers = 1 + max(int(k.split(".")[1]) for k in own if k.startswith("blocks."))
            encoder = SpeechEncoder(n_mels, len(own["positional_embedding"]), size, size // 64, layers)
        omni = cls(config, encoder)
        omni.folder = folder if own and not base else None
        if rank := config.get("lora_rank"):
            omni.add_lora(rank)
        expected = omni.state_dict()
        if rank:
            weights = {k if k in expected else ".base_layer.".join(k.rsplit(".", 1)): w for k, w in weights.items()}
        if not own:
            weights |= {prefix + k: w for k, w in encoder.state_dict().items()}
        for head, tied in (("lm_head", config["tie_word_embeddings"]), ("speech_generator.model.lm_head", True)):
            table = f"{head.replace('lm_head', 'model.')}embed_tokens.weight"
            if tied and table in weights:                      # a tied head is one tensor, whether the file repeats it
                weights[f"{head}.weight"] = weights[table]
        missing, extra = sorted(expected.keys() - weights.keys()), sorted(weights.keys() - expected.keys())
        wrong = [k for k in sorted(expected.keys() & weights.keys()) if expected[k].shape != weights[k].shape]
        for what, names in (("lacks", missing), ("has an unknown", extra), ("has another shape of", wrong)):
            if names:
                raise ValueError(f"{folder} {what} tensor {names[0]} ({len(names)} such); it is of another model or damaged")
        if encoder.blocks[0].attn.n_head == 0:
            raise ValueError(f"the heads of the encoder in {folder} are not 64 wide; give its Whisper file too")
        omni.load_state_dict(weights)
        return omni, *load_tokenizers(folder)

    def save_pretrained(self, folder, tokenizer, tts_tokenizer, weights=None):
        """Write the released layout: config.json, model.safetensors (all of the model, or `weights`), the tokenizer,
        tts_tokenizer/. The folder must not be there; see `seal` for how a checkpoint gets its name."""
        os.makedirs(folder)
        with open(os.path.join(folder, "config.json"), "w") as f:
            json.dump(self.config, f, indent=2, sort_keys=True)
        tied = {"speech_generator.model.lm_head.weight"} | ({"lm_head.weight"} if self.config["tie_word_embeddings"] else set())
        weights = self.state_dict() if weights is None else weights
        try:
            save_file({k: v.contiguous() for k, v in weights.items() if k not in tied},
                      os.path.join(folder, "model.safetensors"), metadata={"format": "pt"})
        except SafetensorError as e:                           # a full disk, in a class of its own
            raise OSError(str(e)) from e
        tokenizer.save_pretrained(folder)
        tts_tokenizer.save_pretrained(os.path.join(folder, "tts_tokenizer"))


def read_json(folder, name):
    """The dict in a JSON file; empty if there is none."""
    path = os.path.join(folder, name)
    if not os.path.exists(path):
        return {}
    with open(path) as f:
        return json.load(f)


def read_weights(folder):
    """{name: tensor} of all safetensors files. Raises ValueError that names the file."""
    weights = {}
    for name in sorted(n for n in os.listdir(folder) if n.endswith(".safetensors")):
        try:
            with safe_open(os.path.join(folder, name), "pt") as file:
                weights |= {key: file.get_tensor(key) for key in file.keys()}
        except Exception as e:                                 # safetensors raises its own, undocumented class
            raise ValueError(f"{folder}/{name} cannot be read ({e}); copy or train it again")
    return weights


def sha256(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def hashes(folder):
    """{name: sha256} of all safetensors files."""
    return {n: sha256(os.path.join(folder, n)) for n in sorted(os.listdir(folder)) if n.endswith(".safetensors")}


def flush(path):
    """Onto the disk, so that a power cut after this line finds it there."""
    file = os.open(path, os.O_RDONLY)
    os.fsync(file)
    os.close(file)


def seal(tmp, folder, meta):
    """Make the folder `tmp` the checkpoint `folder`: meta.json, which lists size and hash of every file, is written last,
    all is flushed to the disk, then the folder is renamed. What stood there goes only after the new one is in place."""
    paths = [os.path.join(at, name) for at, _, names in os.walk(tmp) for name in names]
    files = {os.path.relpath(p, tmp): {"bytes": os.path.getsize(p), "sha256": sha256(p)} for p in sorted(paths)}
    with open(os.path.join(tmp, "meta.json"), "w") as f:
        json.dump(meta | {"files": files}, f, indent=1)
    for path in (*paths, os.path.join(tmp, "meta.json"), *(at for at, _, _ in os.walk(tmp))):
        flush(path)
    replace_folder(tmp, folder)
    flush(os.path.dirname(os.path.abspath(folder)))


def damage(folder):
    """What is wrong with a checkpoint that `seal` made, or None."""
    try:
        files = read_json(folder, "meta.json")["files"]
    except (ValueError, KeyError, TypeError):
        return "its meta.json is missing or damaged"
    for name, expected in files.items():
        path = os.path.join(folder, name)
        if not os.path.exists(path):
            return f"{name} is missing"
        if os.path.getsize(path) != expected["bytes"]:
            return f"{name} has {os.path.getsize(path)} bytes instead of {expected['bytes']}"
        if sha256(path) != expected["sha256"]:
            return f"{name} is not what was written (another sha256)"


def newest_checkpoint(folder):
    """The step-N of a run's folder with the most steps that is whole, or None. Those that are not are named on stderr."""
    for name in sorted((n for n in os.listdir(folder) if re.fullmatch(r"step-\d+", n)), reverse=True) if os.path.isdir(folder) else ():
        reason = damage(os.path.join(folder, name))
        if reason is None:
            return os.path.join(folder, name)
        print(f"passing over {os.path.join(folder, name)}: {reason}", file=sys.stderr)


def replace_folder(tmp, folder):
    """Rename folder `tmp` to `folder`; what stood there goes only after the new one is in place."""
    old = folder.rstrip("/") + ".old"
    shutil.rmtree(old, ignore_errors=True)
    if os.path.isdir(folder):
        os.replace(folder, old)
    os.replace(tmp, folder)
    shutil.rmtree(old, ignore_errors=True)


def load_tokenizers(folder):
    return Qwen2Tokenizer.from_pretrained(folder), Qwen2Tokenizer.from_pretrained(os.path.join(folder, "tts_tokenizer"))


SPEECH_FIELDS = ("bos_token_id", "eos_token_id", "hidden_size", "intermediate_size", "max_position_embeddings",
                 "num_attention_heads", "num_hidden_layers", "num_key_value_heads", "rms_norm_eps", "rope_theta",
                 "tie_word_embeddings", "vocab_size")


def released_fields(config):
    """A transformers 5 Qwen2Config -> the fields that the releases write (transformers 4: a flat rope_theta)."""
    names = ("attention_dropout", "hidden_act", "hidden_size", "initializer_range", "intermediate_size",
             "max_position_embeddings", "max_window_layers", "num_attention_heads", "num_hidden_layers",
             "num_key_value_heads", "rms_norm_eps", "sliding_window", "tie_word_embeddings", "use_cache",
             "use_sliding_window", "vocab_size", "bos_token_id", "eos_token_id")
    return {n: getattr(config, n) for n in names} | {
        "rope_theta": config.rope_parameters["rope_theta"], "transformers_version": "4.43.4"}


def qwen2_config(fields):
    """The other way round: a dict of released fields -> Qwen2Config."""
    keys = Qwen2Config().to_dict().keys() - {"transformers_version", "model_type", "architectures"}
    rope = {"rope_type": "default", "rope_theta": fields["rope_theta"]}
    return Qwen2Config(**{k: v for k, v in fields.items() if k in keys}, rope_parameters=rope, attn_implementation="rows")


# -------------------------------------------------------------------------------------------------- sampling

def expand_speech(ids, frames):
    """Prompt ids with one SPEECH per clip -> ids with as many SPEECH as the clip has LLM positions."""
    if ids.count(SPEECH) != len(frames):
        raise ValueError(f"the prompt has {ids.count(SPEECH)} places for speech and there are {len(frames)} clips")
    counts = iter(frames)
    return [i for token in ids for i in ([SPEECH] * speech_positions(next(counts)) if token == SPEECH else [token])]


def sample(logits, temperature=1.0, top_p=1.0, top_k=0, recent=(), limit=0.0):
    """Draw one id from logits (V,). temperature 0: the best one. If the id drawn occurs more than `limit` times in
    `recent`, draw again from the whole distribution (repetition-aware sampling, VALL-E 2)."""
    if temperature == 0:
        return int(logits.argmax())
    whole = torch.softmax(logits / temperature, -1)
    p, order = whole.sort(descending=True)
    keep = p.cumsum(-1) - p < top_p                   # the smallest set whose mass reaches top_p
    if top_k:
        keep[top_k:] = False
    token = int(order[torch.multinomial(p * keep, 1)])
    if recent and list(recent).count(token) > limit:
        token = int(torch.multinomial(whole, 1))
    return token
