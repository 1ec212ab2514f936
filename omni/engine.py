"""
The streaming decoder: a reply is spoken while it is still being written.

Why apart from model.py: training sees a whole reply at once, talking makes it token by token, with caches.
Both walk the same order, `read_write`, so the speech LM is fed row for row what it was trained on
(tests/test_layout.py).

How: `generate` yields text and units as they are made. After every R tokens of text it yields a burst of W
units, which a codec can play while the LLM writes on.
"""
import torch
from transformers import DynamicCache

from model import expand_speech, read_write


def sample(logits, temperature=1.0, top_p=1.0, top_k=0, recent=(), limit=0.0):
    """Draw one id from logits (V,).

    temperature  0 takes the likeliest
    top_p, top_k draw from the smallest set whose mass reaches top_p, and from the top_k likeliest (0: no
    limit)
    recent, limit  if the id occurs more than `limit` times in `recent`, draw again from the whole
                   distribution
                 (repetition-aware sampling, VALL-E 2)
    """
    if temperature == 0:
        return int(logits.argmax())
    whole = torch.softmax(logits / temperature, -1)
    p, order = whole.sort(descending=True)
    keep = p.cumsum(-1) - p < top_p
    if top_k:
        keep[top_k:] = False
    token = int(order[torch.multinomial(p * keep, 1)])
    if recent and list(recent).count(token) > limit:
        token = int(torch.multinomial(whole, 1))
    return token


def write_text(omni, x, limit, temperature, top_p, eos):
    """Continue a prompt x (1, L, H): yields (id, state (H,) that predicted it, is_last), one token at a
    time."""
    cache = DynamicCache()
    for i in range(limit):
        state = omni.model(inputs_embeds=x, past_key_values=cache, use_cache=True).last_hidden_state[:, -1]
        token = sample(omni.lm_head(state)[0].float(), temperature, top_p)
        last = token == eos or i == limit - 1
        yield token, state[0], last
        if last:
            return
        x = omni.model.embed_tokens(torch.tensor([[token]], device=x.device))


def fused_rows(omni, ids, clips, reply, eos, speak, **text):
    """The rows of a reply as the LLM writes it: yields ((id, row (D,) or None), is_last).

    With `reply`, a list of text ids, the LLM is not asked: rows are embeddings alone, what stage 1 TTS learns
    from. Without `speak` rows are None.
    """
    generator, device = omni.speech_generator, omni.lm_head.weight.device
    if reply is not None:
        for i, token in enumerate([*reply, eos]):
            yield (token, generator.embed(torch.tensor(token, device=device))), i == len(reply)
        return
    frames = [clip.shape[-1] for clip in clips]
    encoded = omni.encode_speech(torch.cat(list(clips), 1).to(device), frames) if frames else None
    prompt = torch.tensor(expand_speech(ids, frames), device=device)
    for token, state, last in write_text(omni, omni.embed_prompt(prompt, encoded)[None], eos=eos, **text):
        row = generator.fuse(state, torch.tensor(token, device=device)) if speak else None
        yield (token, row), last


class SpeechWriter:
    """The speech LM at work on one reply: what it has read and written so far, in its cache."""

    def __init__(self, generator, draw, window, constrain, trace):
        """draw(logits (V,), ids of the last `window` units) -> id;  constrain, trace: see `generate`."""
        self.generator, self.draw, self.window, self.trace = generator, draw, window, trace
        self.cache, self.pending, self.units = DynamicCache(), [], []
        self.ended = False                                    # has EOS ended the last burst?
        weight = generator.model.lm_head.weight
        self.allowed = torch.full((len(weight),), not constrain, device=weight.device)
        self.allowed[generator.unit_offset:] = True           # EOS only after `<sep>`

    def read(self, row):
        """Take in a fused row (D,); it is computed with the next burst."""
        self.pending.append(row)

    def read_sep(self):
        """The text is complete: from now on the speech may end."""
        device = self.allowed.device
        self.pending.append(self.generator.embed(torch.tensor(self.generator.sep, device=device)))
        self.allowed[self.generator.eos] = True

    def write(self, limit):
        """Write up to `limit` units, or up to EOS -> list of units."""
        generator, burst, self.ended = self.generator, [], False
        while not self.ended and len(burst) < limit:
            inputs = torch.stack(self.pending)
            output = generator.model.model(inputs_embeds=inputs[None], past_key_values=self.cache,
                                           use_cache=True)
            logits = generator.model.lm_head(output.last_hidden_state[0, -1]).float()
            if self.trace is not None:
                self.trace.append((inputs, logits))
            recent = [unit + generator.unit_offset for unit in self.units[-self.window:]]
            token = self.draw(logits.masked_fill(~self.allowed, -torch.inf), recent)
            self.pending = [generator.embed(torch.tensor(token, device=logits.device))]
            if token == generator.eos:
                self.ended = True
            else:
                burst.append(token - generator.unit_offset)
                self.units.append(burst[-1])
        return burst


@torch.inference_mode()
def generate(omni, ids, clips=(), eos=None, speak=True, max_tokens=128, max_units=1024, text_temperature=0.0,
             text_top_p=1.0, temperature=1.0, top_p=1.0, top_k=0, window=10, repeats=0.0, constrain=True,
             trace=None, reply=None):
    """Answer, streaming.

    ids          list of prompt ids, with one SPEECH for each of `clips`, log-mels (n_mels, frames)
    max_tokens, max_units   limits on the reply's text and units, so that every reply ends
    temperature  0 is greedy; top_p, top_k (0: off) narrow the choice of units
    repeats      repetition-aware sampling (VALL-E 2): a unit that makes up more than this share of the last
                 `window` units is drawn again from the whole distribution; 0 turns it off
    constrain    mask what cannot follow: in a burst everything but units, at the end everything but units and
                 EOS
    reply        ids of a text to be said as it is, without the LLM: what stage 1 TTS learns
    trace        a list that receives the speech LM's inputs and logits, for tests
    Yields ("text", id), ("units", [unit, ...]) and, if a limit was hit, ("note", why).
    """
    def draw(logits, recent):
        return sample(logits, temperature, top_p, top_k, recent if repeats else [], repeats * window)

    eos = omni.config["eos_token_id"] if eos is None else eos
    writer = SpeechWriter(omni.speech_generator, draw, window, constrain, trace)
    rows = fused_rows(omni, ids, clips, reply, eos, speak, limit=max_tokens, temperature=text_temperature,
                      top_p=text_top_p)
    for action, x in read_write(rows, omni.R, omni.W):
        if action == "read":
            token, row = x
            if token != eos:
                yield "text", token
            if speak:
                writer.read(row)
        elif not speak:
            continue
        elif action == "sep":
            writer.read_sep()
            if token != eos:
                yield "note", f"the text was cut at {max_tokens} tokens"
        else:                                                 # a burst of x units, or all that are left
            room = max_units - len(writer.units)
            burst = writer.write(room if x is None else min(x, room))
            if burst:
                yield "units", burst
            if x is None and not writer.ended:
                yield "note", f"the speech was cut at {max_units} units"
