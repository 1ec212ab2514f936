"""The network on the tiny random checkpoint: each result against a second, slower way to it, or a number known by hand."""
import copy
import math
import shutil

import pytest
import torch
from conftest import CHECKPOINT, ROWS, dialogue, load
from safetensors.torch import load_file, save_file

import model
from data import Dialogues, chat_ids, collate
from model import IGNORE, SPEECH, STAGES, Omni, expand_speech, log_mel, sample, speech_positions


def noise_mel(omni, seconds, seed=0):
    wav = 0.1 * torch.randn(int(16000 * seconds), generator=torch.Generator().manual_seed(seed))
    return log_mel(wav, omni.model.speech_encoder.n_mels)


# ---------------------------------------------------------------------------------------------- cache and batch

@torch.no_grad()
def test_cached_decoding_equals_recomputing(tiny):
    """The two key-value caches: greedy text and units are those of a loop that runs the whole sequence at every step."""
    omni, tokenizer, _ = tiny
    g, N, U = omni.speech_generator, 8, 40
    clips = [noise_mel(omni, 0.7, 1), noise_mel(omni, 1.23, 2)]
    prompt = chat_ids(tokenizer, ["Two and two."])
    trace = []
    events = list(omni.generate(prompt, clips, eos=-1, max_tokens=N, max_units=U, temperature=0.0, trace=trace))

    a, b = (i for i, token in enumerate(prompt) if token == SPEECH)
    hear = lambda clip: omni.model.speech_projector(omni.model.speech_encoder(clip[None], torch.tensor([clip.shape[1]])))[0]
    read = lambda ids: omni.model.embed_tokens(torch.tensor(ids))
    x = torch.cat([read(prompt[:a]), hear(clips[0]), read(prompt[a + 1:b]), hear(clips[1]), read(prompt[b + 1:])])
    text, states = [], []
    for _ in range(N):
        states.append(omni.model(inputs_embeds=x[None], use_cache=False).last_hidden_state[0, -1])
        text.append(int(omni.lm_head(states[-1]).argmax()))
        x = torch.cat([x, read(text[-1:])])
    assert [t for what, t in events if what == "text"] == text and len(set(text)) > 4

    y, units, logits = torch.zeros(0, g.model.config.hidden_size), [], []
    for i, (token, state) in enumerate(zip(text, states), 1):
        y = torch.cat([y, g.fuse(state, torch.tensor(token))[None]])
        if i == N:
            y = torch.cat([y, g.embed(torch.tensor([g.sep]))])
        for _ in range(U - len(units) if i == N else omni.W if i % omni.R == 0 else 0):
            logits.append(g.model(inputs_embeds=y[None], use_cache=False).logits[0, -1])
            units.append(int(logits[-1][g.unit_offset:].argmax()))
            assert i < N or logits[-1][g.eos] < logits[-1].max()                            # it does not want to end
            y = torch.cat([y, g.embed(torch.tensor([g.unit_offset + units[-1]]))])
    assert [u for what, burst in events if what == "units" for u in burst] == units and len(set(units)) > 4
    torch.testing.assert_close(torch.stack([l for _, l in trace]), torch.stack(logits), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_encoder_ignores_the_padding_of_a_batch(tiny):
    """Clips of several lengths, odd ones too, give in a batch what each gives alone."""
    encoder = tiny[0].model.speech_encoder
    mels = [noise_mel(tiny[0], s, seed) for seed, s in enumerate((0.5, 1.37, 2.01, 0.1))]
    frames = torch.tensor([m.shape[1] for m in mels])
    batch = torch.nn.utils.rnn.pad_sequence([m.T for m in mels], batch_first=True).transpose(1, 2)
    together = encoder(batch, frames)
    for i, mel in enumerate(mels):
        alone = encoder(mel[None], frames[i:i + 1])[0]
        assert len(alone) == math.ceil(mel.shape[1] / 2)
        torch.testing.assert_close(together[i, :len(alone)], alone, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_long_clips_are_heard_in_windows(tiny):
    """70 s are the positions of 30 + 30 + 10 s, each piece heard alone, also beside other clips; the layout counts as many
    positions as there are, whatever a clip's length."""
    omni = tiny[0]
    mels = [noise_mel(omni, s, seed) for seed, s in enumerate((70, 1.37, 30, 30.09))]
    frames = torch.tensor([m.shape[1] for m in mels])
    together = omni.embed_speech(torch.nn.utils.rnn.pad_sequence([m.T for m in mels], batch_first=True).transpose(1, 2), frames)
    pieces = [piece for mel in mels for piece in mel.split(3000, dim=1)]
    assert [p.shape[1] for p in pieces] == [3000, 3000, 1000, 137, 3000, 3000, 9]
    alone = [omni.embed_speech(p[None], torch.tensor([p.shape[1]])) for p in pieces]
    assert [len(x) for x in alone] == [300, 300, 100, 13, 300, 300, 1] and len(together) == 1314
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-5)
    assert speech_positions(frames).tolist() == [700, 13, 300, 301] and expand_speech([SPEECH], [7000]) == [SPEECH] * 700
    for n in (10, 2999, 3000, 3001, 3010, 5999, 6000, 6011, 60000):
        assert speech_positions(n) == sum((min(3000, n - at) + 1) // 2 // 5 for at in range(0, n, 3000))
    assert [log_mel(torch.zeros(16000 * s) + 0.1, 80, pad=True).shape[1] for s in (1, 30, 31, 70)] == [3000, 3000, 6000, 9000]


@torch.no_grad()
def test_training_and_streaming_hear_a_long_clip_alike(tiny):
    """The LLM is fed the same embeddings, position for position, by forward() and by generate()."""
    omni, tokenizer, tts_tokenizer = tiny
    row = dialogue([65.3, 0.9], ["Yes.", "Two."], [20, 12])
    item = Dialogues([row], tokenizer, tts_tokenizer, omni.model.speech_encoder.n_mels, omni.R, omni.W)[0]
    fed = []
    hook = omni.model.register_forward_pre_hook(lambda _, args, kwargs: fed.append(kwargs["inputs_embeds"]), with_kwargs=True)
    omni(collate([item]), "stage1")
    list(omni.generate(chat_ids(tokenizer, row["replies"][:1]), item["mels"], speak=False, max_tokens=1))
    hook.remove()
    trained, streamed = fed
    assert item["ids"].count(SPEECH) == 300 + 300 + 53 + 9 and streamed.shape[1] > 662
    torch.testing.assert_close(streamed, trained[:, :streamed.shape[1]], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("stage", STAGES)
@torch.no_grad()
def test_loss_of_a_batch_is_the_sum_of_its_dialogues(tiny, items, stage):
    """No dialogue sees another's padding, and the loss is a sum over a counted set of targets."""
    omni = tiny[0]
    loss, targets, right = omni(collate(items), stage)
    alone = [omni(collate([item]), stage) for item in items]
    torch.testing.assert_close(loss, sum(a[0] for a in alone), rtol=1e-5, atol=0)
    assert targets == sum(a[1] for a in alone) and right == sum(a[2] for a in alone)
    replies, units = [r for row in ROWS for r in row["replies"]], [u for row in ROWS for u in row["units"]]
    words = [len(tiny[1](r)["input_ids"]) + 1 for r in replies]                             # + <|im_end|>
    assert targets == (sum(words) if stage == "stage1" else sum(len(u) + 1 for u in units))  # + EOS


@torch.no_grad()
def test_encoder_in_bf16(tiny):
    """The encoder runs in bf16, which openai-whisper's own cannot, and stays close to fp32."""
    omni = tiny[0]
    mel = noise_mel(omni, 1.0)[None]
    frames = torch.tensor([mel.shape[-1]])
    exact = omni.model.speech_encoder(mel, frames)
    rough = copy.deepcopy(omni).bfloat16().model.speech_encoder(mel, frames)
    assert rough.dtype == torch.bfloat16
    error = (rough.float() - exact).norm() / exact.norm()
    assert 1e-4 < error < 2e-2                        # bf16 keeps 8 bits: 0.4 % a rounding


# ----------------------------------------------------------------------------------------------------- training

PART = {"speech_encoder": "ears", "speech_projector": "adapter", "input_proj": "fusion", "gate": "fusion",
        "speech_generator": "speech LM", "model": "LLM", "lm_head": "LLM"}         # the first name that matches


def part_of(name):
    return next(part for word, part in PART.items() if word in name.split("."))


@pytest.mark.parametrize("stage, parts", [("stage1", {"adapter", "LLM"}), ("stage1_tts", {"speech LM"}),
                                          ("stage2", {"fusion", "speech LM"})])
def test_a_stage_changes_its_own_parts_alone(items, stage, parts):
    """One step of AdamW over all parameters, with weight decay: every tensor of the stage's parts moves, no other."""
    omni = load()[0]
    before = {k: v.clone() for k, v in omni.state_dict().items()}
    omni.freeze_for(stage)
    assert {part_of(k) for k, p in omni.named_parameters() if p.requires_grad} == parts
    optimizer = torch.optim.AdamW(omni.parameters(), lr=1e-3, weight_decay=0.1)
    omni(collate(items), stage)[0].backward()
    optimizer.step()
    changed = {k for k, v in omni.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {k for k in before if part_of(k) in parts}
    assert all(any(k.startswith(prefix) for k in changed) for prefix in STAGES[stage])


@torch.no_grad()
def test_ablations_of_the_gate(tiny, items):
    """Fusion without hidden states is stage 1 TTS to the last digit; with hidden states alone the text ids do not
    matter; neither trains what it leaves out."""
    omni, *_ = load()
    g, batch = omni.speech_generator, collate(items)
    gated = omni(batch, "stage2")[0]
    g.fusion = "text"
    assert omni(batch, "stage2")[0] == omni(batch, "stage1_tts")[0] != gated
    g.fusion = "hidden"
    hidden = torch.randn(5, omni.config["hidden_size"])
    torch.testing.assert_close(g.fuse(hidden, torch.arange(5)), g.fuse(hidden, torch.arange(5, 10)), atol=0, rtol=0)
    for fusion, trained in (("gate", {"model", "input_proj", "gate"}), ("hidden", {"model", "input_proj"}), ("text", {"model"})):
        g.fusion = fusion
        omni.freeze_for("stage2")
        assert {n.split(".")[1] for n, p in omni.named_parameters() if p.requires_grad} == trained


def test_masks_and_labels_by_hand(tiny, items):
    """A two-turn dialogue, position by position: where speech goes, what is learned, which state each row reads."""
    _, tokenizer, _ = tiny
    item = items[1]                                   # clips of 0.79 s and 1.33 s, "Hi there." and "It is five, I think."
    ids, labels = item["ids"], item["labels"]
    # 67 tokens of system prompt and "<|im_start|>user\n"; 79 frames -> 40 -> 8; 11 tokens of "<|im_end|>\n<|im_start|>
    # assistant\n"; "Hi there.<|im_end|>" 6; "\n<|im_start|>user\n" 7; 133 frames -> 67 -> 13; 11; the last reply
    first, second, third, fourth = 67, 67 + 8 + 11, 86 + 6 + 7, 99 + 13 + 11
    assert [p for p, i in enumerate(ids) if i == SPEECH] == [*range(67, 75), *range(99, 112)]
    assert [p for p, x in enumerate(labels) if x != IGNORE] == [*range(second, second + 6), *range(fourth, len(ids))]
    assert all(x in (IGNORE, i) for i, x in zip(ids, labels))          # the shift by one is forward's business
    assert tokenizer.decode(ids[:first]).endswith("<|im_end|>\n<|im_start|>user\n")
    assert tokenizer.decode(ids[75:second]) == "<|im_end|>\n<|im_start|>assistant\n" == tokenizer.decode(ids[112:fourth])
    assert tokenizer.decode(ids[second:second + 6]) == "Hi there.<|im_end|>"
    assert tokenizer.decode(ids[second + 6:third]) == "\n<|im_start|>user\n"
    assert tokenizer.decode(ids[fourth:]) == "It is five, I think.<|im_end|>"
    for (speech, rows, _), start, end in zip(item["turns"], (second, fourth), (second + 6, len(ids))):
        assert [r for r in rows if r >= 0] == list(range(start - 1, end - 1))
        assert all(speech[p] == ids[r + 1] for p, r in enumerate(rows) if r >= 0)
    batch = collate(items)                            # in a batch, rows count through the dialogues before
    width = batch["ids"].shape[1]
    assert batch["speech_rows"][1][:3].tolist() == [width + second - 1, width + second, width + second + 1]


def test_learn_by_heart_then_say_it():
    """The three stages, one after the other, learn three dialogues by heart; greedy streaming then gives their last
    turns, text and units, to the letter: loss, masks, layout and decoding speak of the same thing."""
    omni, *tokenizers = load()
    items = list(Dialogues(ROWS, *tokenizers, omni.model.speech_encoder.n_mels, omni.R, omni.W))
    batch = collate(items)
    for stage, bound in (("stage1", 0.02), ("stage1_tts", 0.05), ("stage2", 0.02)):
        omni.freeze_for(stage)
        optimizer = torch.optim.AdamW([p for p in omni.parameters() if p.requires_grad], lr=1e-2)
        for step in range(50):
            loss, targets, right = omni(batch, stage)
            if step == 0:
                assert loss / targets > 1
            (loss / targets).backward()
            optimizer.step(), optimizer.zero_grad()
        assert loss / targets < bound and right == targets, stage
    for row, item in zip(ROWS, items):
        events = list(omni.generate(chat_ids(tokenizers[0], row["replies"][:-1]), item["mels"], temperature=0.0))
        assert tokenizers[0].decode([t for what, t in events if what == "text"]) == row["replies"][-1]
        assert [u for what, burst in events if what == "units" for u in burst] == row["units"][-1]
        assert not [x for what, x in events if what == "note"]


# ----------------------------------------------------------------------------------------------------- sampling

P = [0.15, 0.5, 0.05, 0.3]
DRAWS = [  # arguments of sample, the distribution that they must give
    ({}, P),
    ({"temperature": 0}, [0, 1, 0, 0]),
    ({"temperature": 0.5}, [p * p / 0.365 for p in P]),
    ({"top_k": 2}, [0, 0.625, 0, 0.375]),
    ({"top_p": 0.7}, [0, 0.625, 0, 0.375]),           # 0.5 does not reach 0.7, 0.5 + 0.3 does
    ({"top_p": 0.45}, [0, 1, 0, 0]),                  # the first alone reaches it
    ({"top_p": 0.9, "top_k": 3}, [0.15 / 0.95, 0.5 / 0.95, 0, 0.3 / 0.95]),
    ({"top_k": 1, "recent": [1, 1, 3], "limit": 2}, [0, 1, 0, 0]),       # twice is not more than 2
    ({"top_k": 1, "recent": [1, 1, 1], "limit": 2}, P),                  # drawn again, from the whole distribution
    ({"recent": [1, 1, 1], "limit": 2}, [0.15 + 0.5 * 0.15, 0.5 * 0.5, 0.05 + 0.5 * 0.05, 0.3 + 0.5 * 0.3]),
]


@pytest.mark.parametrize("options, expected", DRAWS, ids=[str(options) for options, _ in DRAWS])
def test_sample_draws_from_the_distribution_asked_for(options, expected):
    """Temperature, top-p, top-k and the repetition-aware redraw, within 4 standard deviations of 4000 draws."""
    torch.manual_seed(0)
    logits, n = torch.tensor(P).log() + 3, 4000
    counts = torch.bincount(torch.tensor([sample(logits, **options) for _ in range(n)]), minlength=4)
    for count, p in zip(counts.tolist(), expected):
        assert abs(count - n * p) <= 4 * math.sqrt(n * p * (1 - p))


def test_masked_ids_are_never_drawn():
    """Not by the first draw, and not by the redraw."""
    torch.manual_seed(0)
    logits = torch.tensor([-torch.inf, 0.0, -torch.inf, 0.0])
    for options in ({}, {"temperature": 0}, {"recent": [1, 3], "limit": 0}, {"top_k": 3, "top_p": 0.9}, {"temperature": 9.0}):
        assert {sample(logits, **options) for _ in range(300)} <= {1, 3}


@pytest.mark.parametrize("max_tokens, max_units, expected", [
    (5, 24, ["text"] * 3 + [10] + ["text"] * 2 + ["the text was cut at 5 tokens", 14, "the speech was cut at 24 units"]),
    (7, 13, ["text"] * 3 + [10] + ["text"] * 3 + [3, "text", "the text was cut at 7 tokens", "the speech was cut at 13 units"]),
    (1, 1, ["text", "the text was cut at 1 tokens", 1, "the speech was cut at 1 units"])])
def test_generate_ends_and_says_why(tiny, monkeypatch, max_tokens, max_units, expected):
    """A model that would never stop is cut at exactly the limits, also in the middle of a burst, with a note for each."""
    omni, tokenizer, _ = tiny
    monkeypatch.setattr(model, "sample", lambda logits, *_: len(logits) - 1)        # never `<|im_end|>`, never EOS
    events = omni.generate(tokenizer("Hello")["input_ids"], max_tokens=max_tokens, max_units=max_units)
    assert [{"text": what, "units": len(x) if what == "units" else 0, "note": x}[what] for what, x in events] == expected


def test_text_alone(tiny):
    """speak=False gives the same text, no units, and does not run the speech LM."""
    omni, tokenizer, _ = tiny
    options = dict(eos=-1, max_tokens=6, max_units=5, temperature=0.0)
    prompt, trace = tokenizer("Hello")["input_ids"], []
    text = [x for what, x in omni.generate(prompt, **options) if what == "text"]
    alone = list(omni.generate(prompt, speak=False, trace=trace, **options))
    assert [x for what, x in alone if what == "text"] == text and len(text) == 6
    assert "units" not in dict(alone) and not trace


# -------------------------------------------------------------------------------------------------- checkpoints

REFUSED = [  # what is done to the tensor, its name
    ("missing", "model.layers.1.mlp.up_proj.weight"), ("missing", "model.speech_projector.linear2.bias"),
    ("missing", "speech_generator.gate.0.weight"), ("missing", "lm_head.weight"),
    ("missing", "speech_generator.model.model.embed_tokens.weight"),      # also the head: the two are tied
    ("missing", "model.speech_encoder.conv1.weight"), ("missing", "model.speech_encoder.blocks.0.attn.key.weight"),
    ("missing", "model.speech_encoder.positional_embedding"),
    ("extra", "model.layers.9.mlp.up_proj.weight"), ("extra", "speech_generator.gate.2.weight"),
    ("shape", "model.norm.weight"), ("shape", "speech_generator.model.model.embed_tokens.weight"),
    ("shape", "model.speech_encoder.conv1.weight")]


@pytest.mark.parametrize("what, name", REFUSED, ids=map(" ".join, REFUSED))
def test_a_damaged_checkpoint_is_refused(tmp_path, what, name):
    """Weights load completely or not at all, and the refusal names the tensor."""
    weights = load_file(CHECKPOINT / "checkpoint" / "model.safetensors")
    if what == "missing":
        del weights[name]
    else:
        weights[name] = torch.zeros(7) if what == "extra" else weights[name][..., :-1].contiguous()
    folder = shutil.copytree(CHECKPOINT / "checkpoint", tmp_path / "checkpoint")
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ValueError, match=name.replace("model.embed_tokens", ".*")):       # of two tied tensors, either
        Omni.from_pretrained(str(folder)) if "speech_encoder" in name else load(folder)    # the encoder's sizes come from the file


def test_a_truncated_checkpoint_is_refused(tmp_path):
    """A file that was not copied to its end is named."""
    folder = shutil.copytree(CHECKPOINT / "checkpoint", tmp_path / "checkpoint")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="model.safetensors cannot be read"):
        load(folder)
