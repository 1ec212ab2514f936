"""
The engine: replies as they are made, one or many at once.

Why apart from model.py: training sees a whole reply at once, talking makes it token by token. Both follow the
order of `read_write` in model.py, so the speech LM is fed row for row what it was trained on
(tests/test_layout.py). A decoder's time goes into reading its weights, once per step, so several replies cost
hardly more than one: each has a row of the caches, joins when a row is free and leaves when it is done.

How: a round gives every reply R tokens of text (fewer at its end), then a burst of W units; where few talk,
the first burst comes in two pieces.

    engine = Engine(omni, rows=8)
    for ids, clips in questions:
        engine.submit(ids, clips)
    for reply, kind, x in engine.stream():            # "text", "units", "note", "done", "round"
        ...                                           # submit and cancel as you like

What is shared is only time: each reply's choices are drawn with its own random numbers.
"""
import itertools
import os
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.benchmark import Timer
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

from model import SPEECH, expand_speech
from omni.audio import DOWNSAMPLE, speech_positions
from omni.packing import round_up

FIRST = 5                             # units of a reply's first piece, so that a codec can begin early ...
FEW = 2                               # ... if no more are talking, or its second piece would come too late


class Decoder:
    """A Qwen2Model that continues several sequences at once, each at its own length, over caches of keys and
    values that are made once."""

    def __init__(self, network, rows, length):
        """rows: how many sequences;  length: positions that each has room for; more are made as needed"""
        self.network = network
        self.used = [0] * rows                        # positions that each row's cache holds
        d = network.layers[0].self_attn.head_dim
        shape = len(network.layers), rows, network.config.num_key_value_heads, 0, d
        self.keys = self.values = network.norm.weight.new_zeros(shape)
        self.make_room(length)

    def make_room(self, length):
        """Let every row have `length` positions; what they hold stays."""
        more = length - self.keys.shape[3]
        self.keys, self.values = (F.pad(x, (0, 0, 0, more)) for x in (self.keys, self.values))
        position = torch.arange(length, device=self.keys.device)[None]
        self.cos, sin = (x[0] for x in self.network.rotary_emb(self.keys, position))             # (length, d)
        first, second = sin.chunk(2, -1)
        self.sin = torch.cat([-first, second], -1)    # as `rotate` wants it

    def step(self, x, rows, counts):
        """Append embedded positions to rows, and compute their states.

        x (B, n, D)  the next n positions of each of `rows` (B numbers, all different), of which the first
                     counts[b] are real
        Returns      states (B, n, D), of which those of real positions mean something
        """
        B, n, _ = x.shape
        starts = [self.used[row] for row in rows]
        for row, count in zip(rows, counts):
            self.used[row] += count
        T = max(starts) + n
        if T > self.keys.shape[3]:
            self.make_room(round_up(T, 1024))
        device, K, d = x.device, self.keys.shape[2], self.keys.shape[4]
        at = torch.tensor(starts, device=device)[:, None] + torch.arange(n, device=device)       # (B, n)
        mask = None
        if n > 1 or min(starts) < max(starts):
            mask = torch.arange(T, device=device) <= at[..., None]                               # (B, n, T)
        mine = torch.tensor(rows, device=device)
        if rows == list(range(rows[0], rows[0] + B)):
            mine = slice(rows[0], rows[0] + B)        # a view; otherwise the rows are copied together
        cos, sin = self.cos[at][:, :, None], self.sin[at][:, :, None]         # (B, n, 1, d)
        even = isinstance(mine, slice) and min(starts) == max(starts)         # a rectangle of the caches

        def rotate(q):
            return torch.addcmul(q * cos, q.roll(d // 2, -1), sin)

        def put(cache, x):
            """Append x (B, n, K, d) to the rows of a layer's cache."""
            if even:
                cache[mine, :, starts[0]:starts[0] + n] = x.transpose(1, 2)
            else:
                cache[torch.tensor(rows, device=device)[:, None], :, at] = x

        for layer, keys, values in zip(self.network.layers, self.keys, self.values):
            attn, norm = layer.self_attn, layer.input_layernorm
            y = F.rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)
            if hasattr(attn, "qkv_proj"):             # see `join`
                y = attn.qkv_proj(y)
            else:
                y = torch.cat([attn.q_proj(y), attn.k_proj(y), attn.v_proj(y)], -1)
            y, v = y.view(B, n, -1, d).tensor_split([-K], 2)                  # (B, n, H + K, d), (B, n, K, d)
            q, k = rotate(y).tensor_split([-K], 2)
            put(keys, k)
            put(values, v)
            y = attend(q, keys[mine, :, :T], values[mine, :, :T], mask)
            x = x + attn.o_proj(y)
            norm = layer.post_attention_layernorm
            x = x + layer.mlp(F.rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon))
        norm = self.network.norm
        return F.rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)


class Packed(torch.nn.Module):
    """A linear layer for decoding on a CPU: oneDNN has laid its weight out for products with few rows.

    `F.linear` does so anew in every product, or leaves a single row to a matrix-vector product, which on some
    CPUs takes several times as long. torch uses the same layout, and this operator, when it compiles
    a model with frozen weights.
    """

    def __init__(self, weight, bias=None, rows=16):
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows)
        self.bias = bias

    def forward(self, x):
        """(..., in) -> (..., out)"""
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


def pack(module, leave=None):
    """Put `Packed` in place of every linear layer but `leave`. What is packed can be neither trained nor
    saved."""
    for name, layer in list(module.named_modules()):
        if isinstance(layer, torch.nn.Linear) and layer is not leave:
            module.set_submodule(name, Packed(layer.weight, layer.bias))


class JoinedMLP(torch.nn.Module):
    """Qwen2's MLP with one product where it has two."""

    def __init__(self, mlp):
        super().__init__()
        self.gate_up_proj, self.down_proj = join(mlp.gate_proj, mlp.up_proj), mlp.down_proj
        self.act_fn = mlp.act_fn

    def forward(self, x):
        gate, up = self.gate_up_proj(x).chunk(2, -1)
        return self.down_proj(self.act_fn(gate) * up)


def join_layers(layers):
    """Let Qwen2's layers make queries, keys and values in one product, and the halves of the MLP in one."""
    for layer in layers:
        attn, layer.mlp = layer.self_attn, JoinedMLP(layer.mlp)
        attn.qkv_proj = join(attn.q_proj, attn.k_proj, attn.v_proj)
        del attn.q_proj, attn.k_proj, attn.v_proj


def join(*layers):
    """Linear layers with the same input -> one that puts their outputs side by side: a larger product reads
    memory faster, and is one call."""
    joined = torch.nn.Linear(1, 1, device="meta", dtype=layers[0].weight.dtype)
    joined.weight = torch.nn.Parameter(torch.cat([layer.weight for layer in layers]), False)
    joined.bias = None
    if layers[0].bias is not None:
        joined.bias = torch.nn.Parameter(torch.cat([layer.bias for layer in layers]), False)
    return joined


def named(dtype, packed):
    return str(dtype).removeprefix("torch.") + (", weights packed" if packed else "")


def decoding_work(network, dtype, packed):
    """One step through a Qwen2Model's first four layers, in copies; six of each if they are so small that a
    cache would hold them."""
    layers = network.layers[:4]
    small = sum(p.numel() for p in layers.parameters()) < 2 ** 23
    layers = torch.nn.ModuleList(deepcopy(layer) for _ in range(6 if small else 1) for layer in layers)
    norm = deepcopy(network.norm).to(dtype)
    join_layers(layers.to(dtype))
    if packed:
        pack(layers)
    some = SimpleNamespace(layers=layers, norm=norm, config=network.config, rotary_emb=network.rotary_emb)
    decoder, x = Decoder(some, 1, 64), torch.ones(1, 1, len(norm.weight), dtype=dtype)
    return partial(decoder.step, x, [0], [1])


def hearing_work(omni, dtype, packed):
    """The MLPs of four of the encoder's blocks, in copies, on a clip of 2.5 s."""
    blocks = deepcopy(omni.model.speech_encoder.blocks[:4]).to(dtype)
    if packed:
        pack(blocks)
    x = torch.ones(128, len(blocks[0].mlp_ln.weight), dtype=dtype)
    return lambda: [block.mlp(x) for block in blocks]


def fastest(what, make, precisions, ways):
    """Time make(dtype, packed)() for each of precisions and, if True is among `ways`, packed -> the (dtype,
    packed) that takes the least time. bf16 must be worth its rounding."""
    times = {}
    for way in itertools.product(precisions, ways):
        timer = Timer("work()", globals={"work": make(*way)}, num_threads=torch.get_num_threads())
        times[way] = timer.blocked_autorange(min_run_time=0.05).median
    best = min(times, key=lambda way: times[way] * (1 if way[0] == torch.float32 else 1.25))
    timed = "; ".join(f"{named(*way)} {1000 * seconds:.2f} ms" for way, seconds in times.items())
    print(f"{what} in {named(*best)} (some layers: {timed})")
    return best


@torch.no_grad()
def quicken(omni, precisions=(torch.float32, torch.bfloat16), device=None):
    """Move a model to a device (none: where it is) and make it answer as fast as that allows, in place, and
    print how. It cannot be trained or saved any more.

    A decoder reads all its weights for every unit, and bf16 is half the bytes: on a GPU it wins. On a CPU it
    depends on its instructions and on the size, as does packing (see `Packed`), so a step through some of the
    speech LM's layers is timed. What hears has many rows: it is always packed, and its precision is timed
    too.
    """
    omni.merge_lora()
    generator, device = omni.speech_generator, torch.device(device or omni.lm_head.weight.device)
    hears = torch.nn.ModuleList([omni.model.speech_encoder, omni.model.speech_projector])
    layers = [*omni.model.layers, *generator.model.model.layers]
    dtype, packed, hearing, ways = precisions[-1], False, precisions[-1], (False,)
    if device.type == "cpu":
        if torch.backends.mkldnn.is_available():
            ways = False, True
        hearing, _ = fastest("hearing", partial(hearing_work, omni), precisions, ways[-1:])
        dtype, packed = fastest("decoding", partial(decoding_work, generator.model.model), precisions, ways)
    else:
        print(f"decoding in {named(dtype, packed)}")
    rotary = {m: m.inv_freq for m in omni.modules() if isinstance(m, Qwen2RotaryEmbedding)}
    omni.model.speech_encoder = omni.model.speech_projector = None
    omni.to(device, dtype)                            # tensor by tensor: a GPU never holds the model in fp32
    omni.model.speech_encoder, omni.model.speech_projector = hears.to(device, hearing)
    for module, inv_freq in rotary.items():           # 0.2 % of a frequency is a radian after 1,000 positions
        module.inv_freq = inv_freq.to(device)
    join_layers(layers)
    if packed:
        pack(omni, leave=generator.model.lm_head)
    elif True in ways:
        pack(hears)
    return omni


def attend(q, k, v, mask):
    """q (B, n, H, d), k and v (B, K, T, d), mask (B, n, T) or None -> (B, n, H d).

    The H / K queries that share a key are laid side by side as if they were positions: no key is copied.
    """
    B, n, H, d = q.shape
    K = k.shape[1]
    q = q.view(B, n, K, H // K, d).permute(0, 2, 3, 1, 4).reshape(B, K, H // K * n, d)
    if mask is not None:
        mask = mask[:, None].repeat(1, 1, H // K, 1)                          # (B, 1, H / K n, T)
    y = F.scaled_dot_product_attention(q, k, v, mask)
    return y.view(B, K, H // K, n, d).permute(0, 3, 1, 2, 4).reshape(B, n, H * d)


def sample(logits, temperature, uniform, top_p=1.0, top_k=0, recent=None, limit=0):
    """Draw an id for each row of logits (B, V) -> (B,).

    temperature    (B,); 0 takes the likeliest
    uniform        (B, 2) random numbers below 1, a row's own
    top_p, top_k   draw from the smallest set whose mass reaches top_p, and from the top_k likeliest (0: no
                   limit)
    recent, limit  if the id occurs more than `limit` times in recent (B, n), draw again from the whole
                   distribution (repetition-aware sampling, VALL-E 2)
    """
    likeliest = logits.argmax(-1)
    greedy = temperature == 0
    whole = torch.softmax(logits.double() / temperature.masked_fill(greedy, 1)[:, None], -1)
    kept = whole
    if top_p < 1 or top_k:
        p, order = whole.sort(descending=True)
        keep = p.cumsum(-1) - p < top_p
        if top_k:
            keep[:, top_k:] = False
        kept = torch.zeros_like(whole).scatter(-1, order, p * keep)

    def at(p, u):
        """The id at which the summed probabilities pass u of their whole."""
        mass = p.cumsum(-1)
        return (mass <= u[:, None] * mass[:, -1:]).sum(-1).clamp(max=p.shape[-1] - 1)

    ids = at(kept, uniform[:, 0])
    if recent is not None:
        often = (recent == ids[:, None]).sum(-1) > limit
        ids = torch.where(often, at(whole, uniform[:, 1]), ids)
    return torch.where(greedy, likeliest, ids)


@dataclass(eq=False)
class Reply:
    """A reply in the making, see `Engine.submit`."""
    ids: list                          # the prompt, SPEECH at every position that a clip fills
    clips: list                        # log-mels (n_mels, frames)
    given: list | None                 # ids of a text to be said as it is
    speaks: bool
    temperature: float                 # of the units
    random: torch.Generator            # its own
    row: int | None = None             # of the caches, once it has one
    state: torch.Tensor | None = None  # the LLM's last state (H,)
    text: list = field(default_factory=list)         # ids
    text_done: bool = False
    unread: list = field(default_factory=list)       # rows (D,) that the speech LM reads with its next burst
    units: list = field(default_factory=list)
    ended: bool = False                # has EOS ended the speech?
    done: bool = False                 # complete or cancelled


class Engine:
    """Replies in rows of two caches, the LLM's and the speech LM's. `stream` does the work; between two of
    its events anything may be submitted or cancelled, by the same thread."""

    def __init__(self, omni, rows=1, max_tokens=128, max_units=1024, text_temperature=0.0, text_top_p=1.0,
                 top_p=1.0, top_k=0, window=10, repeats=0.0, eos=None, constrain=True, trace=None):
        """
        rows         replies that are made at once; others wait
        max_tokens, max_units   limits on a reply's text and units, so that every reply ends
        text_temperature, text_top_p   of the text; 0 is greedy
        top_p, top_k (0: off)   narrow the choice of units
        repeats      repetition-aware sampling (VALL-E 2): a unit that makes up more than this share of the
                     last `window` units is drawn again from the whole distribution; 0 turns it off
        eos          the id that ends a text; none: the checkpoint's
        constrain    mask what cannot follow: in a burst everything but units, at the end everything but units
                     and EOS
        trace        a list that receives the speech LM's inputs and logits of the first reply, for tests
        """
        generator = omni.speech_generator
        self.omni, self.max_tokens, self.max_units = omni, max_tokens, max_units
        self.text_temperature, self.text_top_p = text_temperature, text_top_p
        self.top_p, self.top_k, self.window, self.limit = top_p, top_k, window, repeats * window
        self.eos = omni.config["eos_token_id"] if eos is None else eos
        self.constrain, self.trace = constrain, trace
        self.llm = Decoder(omni.model, rows, 1024)
        self.speech_lm = Decoder(generator.model.model, rows, max_tokens + max_units + 2 * omni.W)
        self.cached = [[] for _ in range(rows)]       # what the LLM has read in each row, as keys
        self.free, self.waiting, self.active = list(range(rows)), [], []
        head = generator.model.lm_head.weight
        self.device, self.choices = head.device, torch.arange(len(head), device=head.device)
        if constrain:                                 # units and EOS: a twentieth of a real vocabulary
            self.choices = torch.cat([self.choices[generator.unit_offset:], self.choices[[generator.eos]]])
            head = head[self.choices]
        self.head = Packed(head) if isinstance(omni.lm_head, Packed) else partial(F.linear, weight=head)

    def submit(self, ids, clips=(), reply=None, speak=True, temperature=1.0, seed=None):
        """Ask for a reply -> a Reply; it begins when a row is free.

        ids          list of prompt ids, with one SPEECH for each of `clips`, log-mels (n_mels, frames)
        reply        ids of a text to be said as it is: what stage 1 TTS learns. The LLM is asked nothing
        temperature  of the units; 0 is greedy
        seed         of this reply's random numbers; none: drawn from torch's
        Raises ValueError if the prompt has not one SPEECH per clip, or is longer than the LLM was made for.
        """
        if reply is not None:
            ids, clips = [], ()
        ids = expand_speech(ids, [clip.shape[-1] for clip in clips])
        room = self.omni.config["max_position_embeddings"] - self.max_tokens
        if len(ids) > room:
            raise ValueError(f"the conversation has {len(ids)} positions, and the LLM has room for {room}; "
                             "begin a new one")
        seed = int(torch.randint(2 ** 62, ())) if seed is None else seed
        given = None if reply is None else [*reply, self.eos]
        random = torch.Generator().manual_seed(seed)
        self.waiting.append(Reply(ids, list(clips), given, speak, temperature, random))
        return self.waiting[-1]

    def cancel(self, reply):
        """Forget a reply; its row is free for another."""
        reply.done = True
        if reply in self.waiting:
            self.waiting.remove(reply)
        if reply in self.active:
            self.active.remove(reply)
            self.free.append(reply.row)

    def generate(self, ids, clips=(), **options):
        """One reply, see `submit`: yields (kind, x). Whoever stops listening cancels it."""
        reply = self.submit(ids, clips, **options)
        try:
            for other, kind, x in self.stream():
                if other is reply and kind != "done":
                    yield kind, x
        finally:
            self.cancel(reply)

    @torch.inference_mode()
    def stream(self):
        """Make all replies: yields (reply, kind, x) and ends when there is nothing left to do.

        ("text", id), ("units", [unit, ...]), if a limit was hit ("note", why), and at the end of a reply
        ("done", None), when its row is free already. (None, "round", None) says that every reply has had its
        turn, and what came since the last one may be rendered together
        """
        while self.waiting or self.active:
            self.hear()
            yield from self.think()
            yield from self.speak()
            for reply in list(self.active):
                cut = reply.speaks and not reply.ended and len(reply.units) >= self.max_units
                if reply.text_done and cut:
                    yield reply, "note", f"the speech was cut at {self.max_units} units"
                if reply.text_done and (cut or reply.ended or not reply.speaks):
                    self.cancel(reply)
                    yield reply, "done", None
            yield None, "round", None

    # ---------------------------------------------------------------------------- the parts of a round

    def hear(self):
        """Give rows to replies that wait, and let the LLM read their prompts, all at once. What a row has
        read before, as in the earlier turns of a conversation, it does not read again."""
        new = []
        while self.waiting and self.free:
            reply = self.waiting.pop(0)
            keys = keys_of(reply)
            same = {row: len(os.path.commonprefix([keys, self.cached[row]])) for row in self.free}
            # a row that has read the beginning of this and nothing else; or the one that was free the longest
            begun = [row for row in self.free if same[row] == len(self.cached[row])]
            reply.row = max(begun, key=same.get, default=self.free[0])
            self.free.remove(reply.row)
            self.active.append(reply)
            self.speech_lm.used[reply.row] = 0
            if reply.given is not None:
                continue
            known = min(same[reply.row], len(keys) - 1)           # the last position tells the state
            self.llm.used[reply.row], self.cached[reply.row] = known, keys
            new.append((reply, known))
        if not new:
            return
        device, clips = self.device, []
        for reply, known in new:
            positions = reply.ids[:known].count(SPEECH)
            for clip in reply.clips:
                if positions == 0:
                    clips.append(clip)
                else:
                    positions -= speech_positions(clip.shape[-1])
        encoded = [None] * len(new)
        if clips:
            mel = torch.cat(clips, 1).to(device)
            encoded = self.omni.encode_speech(mel, [clip.shape[-1] for clip in clips])
            encoded = encoded.split([DOWNSAMPLE * reply.ids[known:].count(SPEECH) for reply, known in new])
        prompts = []                                  # (n, H) each
        for (reply, known), part in zip(new, encoded):
            ids = torch.tensor(reply.ids[known:], device=device)
            prompts.append(self.omni.embed_prompt(ids, part if SPEECH in reply.ids[known:] else None))
        counts = [len(x) for x in prompts]
        states = self.llm.step(pad_sequence(prompts, True), [reply.row for reply, _ in new], counts)
        for (reply, _), state, count in zip(new, states, counts):
            reply.state = state[count - 1]

    def think(self):
        """Up to R more tokens of text for each reply."""
        omni, device = self.omni, self.device
        for _ in range(omni.R):
            writing = [reply for reply in self.active if not reply.text_done]
            asked = [reply for reply in writing if reply.given is None]
            self.read_own([reply for reply in asked if reply.text])
            if asked:
                states = torch.stack([reply.state for reply in asked])                           # (B, H)
                temperature = torch.full((len(asked),), self.text_temperature, device=device)
                tokens = sample(omni.lm_head(states).float(), temperature, self.draw(asked), self.text_top_p)
                rows = omni.speech_generator.fuse(states, tokens)                                # (B, D)
                for reply, token, row in zip(asked, tokens.tolist(), rows):
                    yield from self.add(reply, token, row)
            for reply in writing:
                if reply.given is not None:           # its rows are embeddings alone
                    token = reply.given[len(reply.text)]
                    row = omni.speech_generator.embed(torch.tensor(token, device=device))
                    yield from self.add(reply, token, row)

    def read_own(self, replies):
        """Let the LLM read the last token that it wrote in each reply."""
        if not replies:
            return
        tokens = [reply.text[-1] for reply in replies]
        x = self.omni.model.embed_tokens(torch.tensor(tokens, device=self.device))[:, None]
        states = self.llm.step(x, [reply.row for reply in replies], [1] * len(replies))
        for reply, token, state in zip(replies, tokens, states):
            self.cached[reply.row].append(token)
            reply.state = state[0]

    def add(self, reply, token, row):
        """The next token of a text is known, and with it a row (D,) of the speech LM."""
        generator = self.omni.speech_generator
        reply.unread.append(row)
        if token != self.eos:
            reply.text.append(token)
        limit = self.max_tokens if reply.given is None else len(reply.given)
        reply.text_done = token == self.eos or len(reply.text) == limit
        if reply.done:                                # cancelled meanwhile
            return
        if token != self.eos:
            yield reply, "text", token
        if reply.text_done:                           # the text is complete: from now on the speech may end
            reply.unread.append(generator.embed(torch.tensor(generator.sep, device=row.device)))
            if token != self.eos:
                yield reply, "note", f"the text was cut at {limit} tokens"

    def speak(self):
        """A burst of up to W units for each reply that speaks; behind `<sep>` EOS may end it."""
        W, generator, device = self.omni.W, self.omni.speech_generator, self.device
        talking = [reply for reply in self.active if reply.speaks and len(reply.units) < self.max_units]
        if not talking:
            return
        rows, counts = [reply.row for reply in talking], [len(reply.unread) for reply in talking]
        x = pad_sequence([torch.stack(reply.unread) for reply in talking], True)                 # (B, n, D)
        last = torch.tensor(counts, device=device) - 1
        may_end = torch.tensor([reply.text_done for reply in talking], device=device)
        temperature = torch.tensor([reply.temperature for reply in talking], device=device)
        uniform = [self.draw(talking) for _ in range(W)]
        recent = None
        if self.limit:
            units = [([-1] * self.window + reply.units)[-self.window:] for reply in talking]
            recent = torch.tensor(units, device=device)
        room = min(W, max(self.max_units - len(reply.units) for reply in talking))
        begin = len(talking) <= FEW and any(not reply.units for reply in talking)
        first = min(FIRST, room) if begin else room
        burst, said, ended = [], 0, torch.zeros_like(may_end)
        for i in range(room):
            states = self.speech_lm.step(x, rows, counts)
            logits = self.head(states[torch.arange(len(rows), device=device), last]).float()
            if self.trace is not None:
                self.trace.append((x[0, :counts[0]], logits[0].clone()))
            if self.constrain:
                logits[~may_end, -1] = -torch.inf
            chosen = sample(logits, temperature, uniform[i], self.top_p, self.top_k, recent, self.limit)
            ids = self.choices[chosen]                                                           # (B,)
            burst.append(ids)
            if self.limit:
                recent = torch.cat([recent[:, 1:], ids[:, None] - generator.unit_offset], 1)
            x, counts, last = generator.embed(ids)[:, None], [1] * len(rows), torch.zeros_like(last)
            ended |= ids == generator.eos
            over = i + 1 == room or device.type == "cpu" and ended.all()      # a GPU would have to wait
            if over or i + 1 == first:
                for reply, ids in zip(talking, torch.stack(burst, 1).tolist()):
                    yield from self.say(reply, ids, said)
                said = i + 1
            if over:
                break
            if said == i + 1:
                yield None, "round", None             # the first piece of a first burst
        for reply, row in zip(talking, x):
            reply.unread = [row[0]]

    def say(self, reply, ids, said):
        """Units from number `said` of a burst on. ids: the burst so far; EOS ends it."""
        generator = self.omni.speech_generator
        if generator.eos in ids:
            ids, reply.ended = ids[:ids.index(generator.eos)], reply.text_done
        ids = ids[said:][:self.max_units - len(reply.units)]
        units = [id - generator.unit_offset for id in ids]
        if units and not reply.done:
            reply.units += units
            yield reply, "units", units

    def draw(self, replies):
        """Two random numbers below 1 for each reply, of its own generator (B, 2)."""
        return torch.stack([torch.rand(2, generator=reply.random) for reply in replies]).to(self.device)


def keys_of(reply):
    """What tells the positions of a prompt apart: an id, or for speech the hash of its clip."""
    keys, at = list(reply.ids), 0
    for clip in reply.clips:
        at = keys.index(SPEECH, at)
        n = speech_positions(clip.shape[-1])
        keys[at:at + n] = [hash(clip.cpu().numpy().tobytes())] * n
    return keys
