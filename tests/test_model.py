"""The network on the tiny random checkpoint: each result against a second, slower way to it, or a number known by hand."""
import copy
import itertools
import math
import shutil

import datasets
import pytest
import torch
import torch.nn.functional as F
from conftest import CHECKPOINT, ROWS, dialogue, load
from safetensors.torch import load_file, save_file

import model
from data import Dialogues, chat_ids, collate
from model import IGNORE, SPEECH, STAGES, Omni, Rows, clip_frames, expand_speech, hashes, log_mel, run, sample, seal, speech_positions


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
    hear = lambda clip: omni.model.speech_projector(omni.hear(clip, [clip.shape[1]]))
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
def test_encoder_hears_each_clip_alone(tiny):
    """Clips laid end to end, odd ones too, give what openai-whisper's own code makes of each alone, at any length."""
    encoder = tiny[0].model.speech_encoder
    mels = [noise_mel(tiny[0], s, seed) for seed, s in enumerate((0.5, 1.37, 2.01, 0.1))]
    together = encoder(torch.cat(mels, 1), [m.shape[1] for m in mels])
    for mel in mels:
        x = F.gelu(encoder.conv2(F.gelu(encoder.conv1(mel[None])))).transpose(1, 2)
        x = x + encoder.positional_embedding[:x.shape[1]]
        for block in encoder.blocks:
            x = block(x)
        alone = encoder.ln_post(x)[0]
        assert len(alone) == math.ceil(mel.shape[1] / 2)
        torch.testing.assert_close(together[:len(alone)], alone, atol=1e-5, rtol=1e-5)
        together = together[len(alone):]
    assert not len(together)


@torch.no_grad()
def test_long_clips_are_heard_in_windows(tiny):
    """70 s are the positions of 30 + 30 + 10 s, each piece heard alone, also beside other clips; the layout counts as many
    positions as there are, whatever a clip's length."""
    omni = tiny[0]
    mels = [noise_mel(omni, s, seed) for seed, s in enumerate((70, 1.37, 30, 30.09))]
    frames = [m.shape[1] for m in mels]
    together = omni.hear(torch.cat(mels, 1), frames)
    pieces = [piece for mel in mels for piece in mel.split(3000, dim=1)]
    assert [p.shape[1] for p in pieces] == [3000, 3000, 1000, 137, 3000, 3000, 9]
    alone = [omni.hear(p, [p.shape[1]]) for p in pieces]
    assert [len(x) for x in alone] == [1500, 1500, 500, 65, 1500, 1500, 5] and len(together) == 5 * 1314
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-5)
    assert [speech_positions(n) for n in frames] == [700, 13, 300, 301] and expand_speech([SPEECH], [7000]) == [SPEECH] * 700
    for n in (10, 2999, 3000, 3001, 3010, 5999, 6000, 6011, 60000):
        assert speech_positions(n) == sum((min(3000, n - at) + 1) // 2 // 5 for at in range(0, n, 3000))
    assert [log_mel(torch.zeros(16000 * s) + 0.1, 80, pad=True).shape[1] for s in (1, 30, 31, 70)] == [3000, 3000, 6000, 9000]
    for samples, pad in itertools.product((1600, 16001, 479999, 480000, 480001, 960159), (False, True)):
        assert clip_frames(samples, pad) == log_mel(torch.zeros(samples) + 0.1, 80, pad).shape[1]


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


# ------------------------------------------------------------------------------------------------ rows end to end

LENGTHS = [5, 1, 30, 29, 12, 2, 17, 30]


@pytest.mark.parametrize("causal", [True, False])
def test_attention_of_rows_end_to_end(causal):
    """Output and gradient are those of torch's fused attention on each row alone, with fewer key heads than query heads."""
    shapes = [(sum(LENGTHS), 4, 8), (sum(LENGTHS), 2, 8), (sum(LENGTHS), 2, 8)]
    ours = [torch.randn(*s, generator=torch.Generator().manual_seed(i)).requires_grad_() for i, s in enumerate(shapes)]
    theirs = [x.detach().clone().requires_grad_() for x in ours]
    y = Rows(LENGTHS).attend(*ours, causal)
    alone = [F.scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in qkv), is_causal=causal, enable_gqa=True)[0].transpose(0, 1)
             for qkv in zip(*(x.split(LENGTHS) for x in theirs))]
    torch.testing.assert_close(y, torch.cat(alone), atol=1e-5, rtol=1e-5)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(9))
    (y * weight).sum().backward(), (torch.cat(alone) * weight).sum().backward()
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-5, rtol=1e-5)


def test_rows_are_laid_side_by_side_and_back():
    """Each position has one place in the rectangles, and rectangles of similar rows are mostly full."""
    rows = Rows(LENGTHS)
    assert (rows.index[rows.back] == torch.arange(sum(LENGTHS))).all() and (rows.index >= 0).sum() == sum(LENGTHS)
    assert rows.position.tolist() == [p for n in LENGTHS for p in range(n)]
    assert sum(B * L for B, L in rows.shapes) == len(rows.index) and rows.shapes == [(3, 30), (1, 17), (1, 12), (1, 5), (1, 2), (1, 1)]


@pytest.mark.parametrize("network", ["LLM", "speech LM"])
@torch.no_grad()
def test_rows_end_to_end_equal_rows_alone(tiny, network):
    """What a network makes of rows end to end is what transformers' own path makes of each: no row sees another."""
    net = tiny[0].model if network == "LLM" else tiny[0].speech_generator.model.model
    x = torch.randn(sum(LENGTHS), net.config.hidden_size, generator=torch.Generator().manual_seed(0))
    alone = [net(inputs_embeds=row[None], use_cache=False).last_hidden_state[0] for row in x.split(LENGTHS)]
    torch.testing.assert_close(run(net, x, LENGTHS), torch.cat(alone), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("stage", STAGES)
def test_logits_in_pieces(items, stage, monkeypatch):
    """Loss and gradients are the same when no more than some logits exist at a time."""
    results, whole = [], F.cross_entropy
    for rows in (10 ** 4, 7):
        omni, seen = load()[0], []
        omni.freeze_for(stage)
        head = omni.lm_head if stage == "stage1" else omni.speech_generator.model.lm_head
        monkeypatch.setattr(model, "LOGITS", rows * len(head.weight))
        monkeypatch.setattr(F, "cross_entropy", lambda logits, *args, **how: seen.append(len(logits)) or whole(logits, *args, **how))
        loss, n, right = omni(collate(items), stage)
        loss.backward()
        results.append((loss.detach(), n, right, {k: p.grad for k, p in omni.named_parameters() if p.grad is not None}))
        assert max(seen) <= rows and (len(seen) == 1) == (rows == 10 ** 4)
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
@torch.no_grad()
def test_what_is_frozen_can_be_kept(tiny, items, stage, tmp_path):
    """A batch with the frozen networks' output in the place of its sound gives the loss, and through a file in bfloat16 the
    loss to its rounding. (With autocast, which rounds alike, it is the same to the bit: tests/test_faults.py.)"""
    omni, *tokenizers = tiny
    rows = Dialogues(ROWS, *tokenizers, omni.model.speech_encoder.n_mels, omni.R, omni.W)
    frozen = [omni.frozen(collate([item]), stage) for item in items]
    with open(tmp_path / "kept", "wb") as file:
        for x in frozen:
            file.write(x.bfloat16().view(torch.int16).numpy().tobytes())
    rows.keep(str(tmp_path / "kept"), [len(x) for x in frozen], frozen[0].shape[1])
    kept = collate([rows[i] for i in (2, 0, 1)])
    assert "mel" not in kept and torch.equal(kept["frozen"], torch.cat([frozen[i] for i in (2, 0, 1)]).bfloat16())
    batch = collate([items[i] for i in (2, 0, 1)])
    exact = omni(batch | {"frozen": torch.cat([frozen[i] for i in (2, 0, 1)])}, stage)
    torch.testing.assert_close(exact, omni(batch, stage), rtol=1e-5, atol=0)
    torch.testing.assert_close(omni(kept | {"frozen": kept["frozen"].float()}, stage)[0], exact[0], rtol=1e-2, atol=0)


@torch.no_grad()
def test_lengths_are_those_of_the_rows(tiny, items):
    """What is counted from the corpus's columns is what the rows become."""
    omni, *tokenizers = tiny
    rows = Dialogues(datasets.Dataset.from_list(ROWS), *tokenizers, omni.model.speech_encoder.n_mels, omni.R, omni.W)
    expected = [(item["ids"].count(SPEECH), sum(x != IGNORE for x in item["labels"]), len(item["ids"]), sum(len(s) for s, _, _ in item["turns"]))
                for item in items]
    assert list(rows.lengths()) == expected


@pytest.mark.parametrize("stage", STAGES)
@torch.no_grad()
def test_loss_of_a_batch_is_the_sum_of_its_dialogues(tiny, items, stage):
    """No dialogue sees another, and the loss is a sum over a counted set of targets."""
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
    mel, frames = noise_mel(omni, 1.0), [100]
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


def test_lora(items, tmp_path):
    """It begins as the model without it, trains two small matrices beside each of the LLM's and the adapter, survives a
    checkpoint that holds these alone, and merged gives the same loss from the released layout's keys."""
    omni, *tokenizers = load()
    keys, batch, before = list(omni.state_dict()), collate(items), omni(collate(items), "stage1")[0].item()
    omni.save_pretrained(str(tmp_path / "base"), *tokenizers)
    omni.add_lora(4)
    omni.freeze_for("stage1")
    assert omni(batch, "stage1")[0].item() == before
    trained = {n: p for n, p in omni.named_parameters() if p.requires_grad}
    assert {part_of(n) for n in trained} == {"adapter", "LLM"} and all("lora_" in n or "projector" in n for n in trained)
    assert sum("lora_" in n for n in trained) == 2 * 7 * omni.config["num_hidden_layers"]
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    for _ in range(3):
        omni(batch, "stage1")[0].backward()
        optimizer.step(), optimizer.zero_grad()
    after = omni(batch, "stage1")[0].item()
    assert after < 0.99 * before
    omni.save_pretrained(str(tmp_path / "step.part"), *tokenizers, {k: v for k, v in omni.state_dict().items() if k in trained})
    seal(str(tmp_path / "step.part"), str(tmp_path / "step"), {"base": {"folder": "../base", "sha256": hashes(tmp_path / "base")}})
    again = Omni.from_pretrained(str(tmp_path / "step"), str(CHECKPOINT / "whisper-tiny-random.pt"))[0]
    assert again(batch, "stage1")[0].item() == after
    again.merge_lora()
    assert list(again.state_dict()) == keys and "lora_rank" not in again.config
    assert again(batch, "stage1")[0].item() == pytest.approx(after, rel=1e-5)


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
    start, at = len(items[0]["ids"]), batch["speech_lengths"][0]
    assert batch["speech_rows"][at:at + 3].tolist() == [start + second - 1, start + second, start + second + 1]
    assert batch["labels"][start + second - 1] == ids[second] and batch["labels"][start - 1] == batch["labels"][-1] == IGNORE


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
