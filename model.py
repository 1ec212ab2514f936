"""
The network of LLaMA-Omni 2 (arXiv 2505.02625): five parts, the layout of their sequences, and the losses.

Why one file: a spoken chatbot is five parts in a row, and the row is the idea. With rates and, in brackets,
the sizes of the 0.5B release:

    wav 16 kHz
     -> log-mel 100 Hz (128)           omni/audio.py: openai-whisper's front end
     -> SpeechEncoder 50 Hz (1280)     Whisper's encoder, frozen
     -> SpeechAdapter 10 Hz (896)      5 frames become 1
     -> LLM (896)                      Qwen2, reads them in place of `<speech>`: text tokens y_i, states h_i
     -> gate fusion (896)              mixes h_i with the speech LM's own embedding of y_i
     -> speech LM 25 Hz (6561 units)   Qwen2, reads R = 3 fused rows, writes W = 10 units, and so on
     -> wav                            omni/codec.py

How it is trained: `Omni.forward(batch, stage)` returns the summed loss of a stage and the number of its
targets. How it talks: omni/engine.py. Both order the speech LM's sequence with `read_write()`. The attribute
names are those of the released checkpoints, so the state dict is theirs, key for key.

This file knows no files, no sampling and no devices.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Model
from whisper.model import AudioEncoder, LayerNorm

from omni.audio import DOWNSAMPLE, UNIT_VOCAB, WINDOW, speech_positions
from omni.packing import Rows, pad_to, round_up

SPEECH = -200                 # input id at a position that holds speech instead of a token
IGNORE = -100                 # label of a position without loss
LOGITS = 2 ** 26              # logits that exist at once: 0.27 GB in fp32. Of 16,000 targets it would be 10

PARTS = {                     # the five parts, by prefix of the parameter's name
    "speech encoder": ("model.speech_encoder",),
    "speech adapter": ("model.speech_projector",),
    "LLM": ("model.embed_tokens", "model.layers", "model.norm", "lm_head"),
    "gate fusion": ("speech_generator.input_proj", "speech_generator.gate"),
    "speech LM": ("speech_generator.model",),
}
STAGES = {                    # the parts that each stage trains; the others are frozen
    "stage1": ("speech adapter", "LLM"),
    "stage1_tts": ("speech LM",),
    "stage2": ("gate fusion", "speech LM"),
}
FUSIONS = {                   # kinds of fusion, and the parameters that each leaves unused
    "gate": (),
    "text": ("speech_generator.input_proj", "speech_generator.gate"),
    "hidden": ("speech_generator.gate",),
}


# --------------------------------------------------------------------------------------- the layout

def read_write(rows, R, W):
    """The read-R / write-W order of equation 5, for training and for streaming alike.

    rows     iterable of (row, is_last): the fused rows of a reply, as they become known
    Yields   ("read", row)    the speech LM reads this row
             ("write", W)     it writes W units: after every R rows, except for the block that ends the text
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
    """Lay out one reply for teacher forcing: the speech LM reads what it should have written.

    tokens   list of N text ids of the reply, `<|im_end|>` included
    units    list of U integers in 0 .. 6560
    Returns  three lists of length N + 1 + U: input ids in the speech LM's vocabulary; for each position the
             text row that it reads, or -1; labels, IGNORE where the next position is not a unit (or EOS) to
             be written.
    If the units run out before the text, the remaining bursts are empty.
    """
    ids, rows, labels, written = [], [], [], 0
    text = ((i, i == len(tokens) - 1) for i in range(len(tokens)))
    for action, x in read_write(text, R, W):
        if action == "read":
            ids.append(tokens[x])
            rows.append(x)
            labels.append(IGNORE)
        elif action == "sep":
            ids.append(sep)
            rows.append(-1)
            labels.append(IGNORE)
        else:
            stop = len(units) if x is None else written + x
            burst = [unit_offset + unit for unit in units[written:stop]]
            written += len(burst)
            targets = burst + [eos] if x is None else burst
            if targets:
                labels[-1] = targets[0]               # the last row read predicts the burst's first unit
                labels += targets[1:]
            ids += burst
            rows += [-1] * len(burst)
            labels += [IGNORE] * (len(ids) - len(labels))     # the burst's last unit predicts no unit
    return ids, rows, labels


def expand_speech(ids, frames):
    """Prompt ids with one SPEECH per clip -> ids with as many SPEECH as each clip has LLM positions.

    frames   list of the clips' log-mel frames (100 Hz). Raises ValueError if there is not one clip per
             SPEECH.
    """
    if ids.count(SPEECH) != len(frames):
        raise ValueError(f"the prompt has {ids.count(SPEECH)} places for speech, not {len(frames)}")
    counts = iter(frames)
    expanded = []
    for token in ids:
        if token == SPEECH:
            expanded += [SPEECH] * speech_positions(next(counts))
        else:
            expanded.append(token)
    return expanded


# ---------------------------------------------------------------------------------------- the parts

def qwen2_config(fields):
    """A dict of the fields that the releases write (transformers 4: a flat rope_theta) -> Qwen2Config."""
    keys = Qwen2Config().to_dict().keys() - {"transformers_version", "model_type", "architectures"}
    rope = {"rope_type": "default", "rope_theta": fields["rope_theta"]}
    known = {key: value for key, value in fields.items() if key in keys}
    return Qwen2Config(**known, rope_parameters=rope, attn_implementation="rows")


def forward_packed(network, x, lengths):
    """A Qwen2Model on embedded rows laid end to end: x (T, D), list of lengths -> states (T, D)."""
    rows = Rows(lengths, x.device)
    mask = {"full_attention": None}                   # `rows` says who sees whom
    padded = pad_to(x, rows.total)[None]
    output = network(inputs_embeds=padded, position_ids=rows.position[None], attention_mask=mask,
                     use_cache=False, rows=rows)
    return output.last_hidden_state[0, :len(x)]


class SpeechEncoder(AudioEncoder):
    """Whisper's encoder, run at each clip's own length, on clips laid end to end."""

    def __init__(self, n_mels, n_ctx, n_state, n_head, n_layer):
        super().__init__(n_mels, n_ctx, n_state, n_head, n_layer)
        self.n_mels = n_mels
        for module in self.modules():                 # whisper's own fails on bf16 weights
            if isinstance(module, LayerNorm):
                module.__class__ = nn.LayerNorm

    def forward(self, mel, frames):
        """Clips of at most 30 s laid end to end -> (sum of ceil(frames / 2), n_state) at 50 Hz.

        mel      (n_mels, T) at 100 Hz;  frames: list of each clip's share of T
        """
        # The two convolutions look one frame beyond a clip and must see silence there. So clips get a gap of
        # one or two frames, such that each begins at an even frame.
        starts = [0, *torch.tensor([n + 2 - n % 2 for n in frames]).cumsum(0).tolist()]
        lengths = [(n + 1) // 2 for n in frames]      # at 50 Hz
        at = torch.cat([torch.arange(start, start + n) for start, n in zip(starts, frames)]).to(mel.device)
        at_half = [torch.arange(start // 2, start // 2 + n) for start, n in zip(starts, lengths)]
        at_half = torch.cat(at_half).to(mel.device)
        x = mel.new_zeros(len(mel), round_up(starts[-1]), dtype=self.conv1.weight.dtype)
        x[:, at] = mel.to(x.dtype)
        clip = torch.zeros(x.shape[1], dtype=torch.bool, device=mel.device)
        clip[at] = True
        x = F.gelu(self.conv1(x[None])) * clip
        rows = Rows(lengths, mel.device)
        x = pad_to(F.gelu(self.conv2(x))[0].T[at_half], rows.total)   # (T / 2, n_state): 100 Hz -> 50 Hz
        x = x + self.positional_embedding[rows.position].to(x.dtype)
        for block in self.blocks:
            attn, y = block.attn, block.attn_ln(x)
            heads = attn.n_head, -1
            q = attn.query(y).unflatten(-1, heads)    # (T / 2, H, 64)
            k = attn.key(y).unflatten(-1, heads)
            v = attn.value(y).unflatten(-1, heads)
            x = x + attn.out(rows.attend(q, k, v, causal=False).flatten(1))
            x = x + block.mlp(block.mlp_ln(x))
        return self.ln_post(x[:len(at_half)])


class SpeechAdapter(nn.Module):
    """Section 2.1: five frames side by side, then two linear layers."""

    def __init__(self, encoder_size, hidden_size):
        super().__init__()
        self.linear1 = nn.Linear(DOWNSAMPLE * encoder_size, 2048)
        self.linear2 = nn.Linear(2048, hidden_size)

    def forward(self, x):
        """(T, D) at 50 Hz, T a multiple of 5 -> (T / 5, H) at 10 Hz."""
        n = len(x) // DOWNSAMPLE
        x = pad_to(x.reshape(n, -1), round_up(n))
        return self.linear2(F.relu(self.linear1(x)))[:n]


class Head(nn.Linear):
    """The last layer; given labels, with the loss."""

    def forward(self, hidden, labels=None):
        """hidden (..., H) -> logits (..., vocabulary). With labels (T,), what each position of hidden (T, H)
        is to predict: (cross-entropy, summed; number of targets; number predicted right).

        Logits exist only where there is a target, since most positions are prompt or speech, and LOGITS of
        them at a time, since the vocabulary is large: the backward pass recomputes them.
        """
        if labels is None:
            return super().forward(hidden)
        hidden, labels = hidden[labels != IGNORE], labels[labels != IGNORE]
        n, size = len(labels), max(1, LOGITS // self.out_features)
        hidden = pad_to(hidden, round_up(n))
        labels = F.pad(labels, (0, len(hidden) - n), value=IGNORE)
        if len(labels) <= size:
            loss, right = self.loss(hidden, labels)
        else:
            chunks = zip(hidden.split(size), labels.split(size))
            losses = [checkpoint(self.loss, *chunk, use_reentrant=False) for chunk in chunks]
            loss, right = sum(loss for loss, _ in losses), sum(right for _, right in losses)
        return loss, torch.tensor(n, device=hidden.device), right

    def loss(self, hidden, labels):
        """hidden (targets, H), labels (targets,) -> (summed cross-entropy, number predicted right)."""
        logits = F.linear(hidden, self.weight).float()                                # (targets, vocabulary)
        return F.cross_entropy(logits, labels, reduction="sum"), (logits.argmax(-1) == labels).sum()


class SpeechGenerator(nn.Module):
    """Gate fusion (equations 1 to 4) and the speech LM, a Qwen2 whose vocabulary is text, `<sep>`, units.

    h, the state of the LLM that predicted a token, and e, the speech LM's embedding of that token, become one
    row:
        z = W2 relu(W1 h + b1) + b2;   g = sigmoid(Wg [z ; e] + bg);   row = g * z + (1 - g) * e
    For the ablation of section 4.4 `fusion` may also be "text" (row = e) or "hidden" (row = z).
    """

    def __init__(self, config, hidden_size, fusion="gate"):
        super().__init__()
        self.fusion = fusion
        D = config.hidden_size
        self.model = Qwen2ForCausalLM(config)
        self.model.lm_head.__class__ = Head           # the same layer, with the loss
        self.input_proj = nn.Sequential(nn.Linear(hidden_size, 2 * hidden_size), nn.ReLU(),
                                        nn.Linear(2 * hidden_size, D))
        self.gate = nn.Sequential(nn.Linear(2 * D, D), nn.Sigmoid())
        self.eos = config.eos_token_id
        self.unit_offset = config.vocab_size - UNIT_VOCAB                             # the id of unit 0
        self.sep = self.unit_offset - 1
        self.tie()

    def tie(self):
        """Make the head and the embedding one tensor, always."""
        self.model.lm_head.weight = self.model.model.embed_tokens.weight

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


# ---------------------------------------------------------------------------------------- the whole

class Omni(nn.Module):
    """The five parts. `config` is a dict: the fields of the release's config.json
    (reference/architecture.md), and up to three of ours: pad_audio, fusion, lora_rank."""

    def __init__(self, config, encoder):
        super().__init__()
        self.config = config
        H = config["hidden_size"]
        self.model = Qwen2Model(qwen2_config(config))
        self.lm_head = Head(H, config["vocab_size"], bias=False)
        self.model.speech_encoder = encoder                    # where the release keeps them
        self.model.speech_projector = SpeechAdapter(config["speech_encoder_hidden_size"], H)
        speech_config = qwen2_config(config["speech_generator"])
        self.speech_generator = SpeechGenerator(speech_config, H, config.get("fusion", "gate"))
        self.tie()
        words = config["stream_params"].strip("() ").split(",")
        if len(words) != 2 or not all(w.strip().isdigit() and int(w) > 0 for w in words):
            given = config["stream_params"]
            raise ValueError(f'stream_params is {given!r}; it must be two whole numbers like "(3,10)"')
        self.R, self.W = map(int, words)

    @property
    def pad_audio(self):
        """Were clips padded to a multiple of 30 s in training? A released checkpoint has no such field: they
        were."""
        return self.config.get("pad_audio", True)

    def tie(self):
        """Make heads and embeddings one tensor each: the speech LM's, and the LLM's if the config says so."""
        self.speech_generator.tie()
        if self.config["tie_word_embeddings"]:
            self.lm_head.weight = self.model.embed_tokens.weight

    def freeze_for(self, stage, llm=True):
        """Give gradients only to what `stage` trains (STAGES): of an LLM with LoRA the added matrices,
        without `llm` nothing of the LLM."""
        trained = [prefix for part in STAGES[stage] for prefix in PARTS[part]]
        unused = FUSIONS[self.speech_generator.fusion]
        for name, p in self.named_parameters():
            p.requires_grad = name.startswith(tuple(trained)) and not name.startswith(unused)
            if name.startswith(PARTS["LLM"]):
                if not llm or "lora_rank" in self.config and "lora_" not in name:
                    p.requires_grad = False

    def add_lora(self, rank):
        """Give each matrix of the LLM's layers two small ones whose product is added to it (LoRA, arXiv
        2106.09685); the second begins at zero."""
        import peft
        self.config["lora_rank"] = rank
        linear = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        lora = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=linear)
        peft.inject_adapter_in_model(lora, self.model)

    def merge_lora(self):
        """Add the products to their matrices, if there are any: the layout is the released one again."""
        if self.config.pop("lora_rank", None):
            from peft.tuners.lora import LoraLayer
            for name, module in list(self.model.named_modules()):
                if isinstance(module, LoraLayer):
                    module.merge()
                    self.model.set_submodule(name, module.get_base_layer())

    @torch.no_grad()                                           # frozen in every stage
    def encode_speech(self, mel, frames):
        """Clips laid end to end -> what Whisper makes of them, (5 x sum of LLM positions, n_state) at 50 Hz.

        mel      (n_mels, T) at 100 Hz;  frames: list of each clip's share of T
        Whisper hears 30 s at once: a longer clip is cut into windows, the last one at its own length. The
        frames of a window that do not fill a group of five are dropped.
        """
        windows = []
        for n in frames:
            windows += [min(WINDOW, n - at) for at in range(0, n, WINDOW)]
        encoded = self.model.speech_encoder(mel, windows).split([(n + 1) // 2 for n in windows])
        return torch.cat([x[:speech_positions(n) * DOWNSAMPLE] for x, n in zip(encoded, windows)])

    def embed_prompt(self, ids, encoded=None):
        """ids (L,) with SPEECH at every position that a clip fills, clips in reading order as `encode_speech`
        gives them -> (L, H)."""
        speech = ids == SPEECH
        x = self.model.embed_tokens(ids.masked_fill(speech, 0))
        if encoded is None:
            return x
        return x.masked_scatter(speech[:, None], self.model.speech_projector(encoded).to(x.dtype))

    def llm_states(self, batch):
        """batch: what data.collate makes -> the LLM's state at every position (L, H)."""
        x = self.embed_prompt(batch["ids"], self.encode_speech(batch["mel"], batch["frames"]))
        return forward_packed(self.model, x, batch["lengths"])

    def forward(self, batch, stage):
        """The loss of a stage on what data.collate makes.

        Returns (sum of the loss over the targets, their number, how many were predicted right); the first
        carries the gradient.
        """
        if stage == "stage1":                                  # speech -> text
            return self.lm_head(self.llm_states(batch), batch["labels"])
        generator = self.speech_generator
        x = generator.embed(batch["speech_ids"])                                      # (S, D)
        if stage == "stage2":                                  # speech -> units; stage 1 TTS: text -> units
            at = batch["speech_rows"] >= 0
            with torch.no_grad():
                states = self.llm_states(batch)[batch["speech_rows"][at]]             # (N, H)
            x = x.masked_scatter(at[:, None], generator.fuse(states, batch["speech_ids"][at]).to(x.dtype))
        states = forward_packed(generator.model.model, x, batch["speech_lengths"])
        return generator.model.lm_head(states, batch["speech_labels"])
