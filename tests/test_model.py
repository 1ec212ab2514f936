"""The network and the streaming decoder on the tiny random checkpoint: each result against a second, slower
way to it, or against a number known by hand."""
import ast
import copy
import itertools
import math
import shutil
from types import SimpleNamespace

import datasets
import pytest
import torch
import torch.nn.functional as F
from conftest import CHECKPOINT, ROOT, ROWS, dialogue, generate, load
from safetensors.torch import load_file, save_file

import model
from data import Dialogues, chat_ids, collate
from model import IGNORE, PARTS, SPEECH, STAGES, expand_speech, forward_packed
from omni import checkpoint, engine, watch
from omni.audio import SAMPLE_RATE, clip_frames, log_mel, speech_positions
from omni.packing import Rows, attention, pad_to


def noise_mel(omni, seconds, seed=0):
    wav = 0.1 * torch.randn(int(SAMPLE_RATE * seconds), generator=torch.Generator().manual_seed(seed))
    return log_mel(wav, omni.model.speech_encoder.n_mels, pad=False)


def laid_out(omni, tokenizers, rows):
    """A Dialogues of made-up rows, with the settings of the checkpoint."""
    return Dialogues(rows, *tokenizers, omni.model.speech_encoder.n_mels, omni.R, omni.W)


def texts(events):
    """The text ids among what `generate` yields."""
    return [x for kind, x in events if kind == "text"]


def units(events):
    """The units of all bursts among what `generate` yields."""
    return [unit for kind, burst in events if kind == "units" for unit in burst]


# ---------------------------------------------------------------------------------- cache and batch

@torch.no_grad()
def test_cached_decoding_equals_recomputing(tiny):
    """The two key-value caches: greedy text and units are those of a loop that runs the whole sequence at
    every step."""
    omni, tokenizer, _ = tiny
    g, N, U = omni.speech_generator, 8, 40
    clips = [noise_mel(omni, 0.7, 1), noise_mel(omni, 1.23, 2)]
    prompt = chat_ids(tokenizer, ["Two and two."])
    trace = []
    events = list(generate(omni, prompt, clips, eos=-1, max_tokens=N, max_units=U, temperature=0.0,
                                  trace=trace))

    def heard(clip):
        return omni.model.speech_projector(omni.encode_speech(clip, [clip.shape[1]]))

    def read(ids):
        return omni.model.embed_tokens(torch.tensor(ids))

    a, b = (i for i, token in enumerate(prompt) if token == SPEECH)
    x = torch.cat([read(prompt[:a]), heard(clips[0]), read(prompt[a + 1:b]), heard(clips[1]),
                   read(prompt[b + 1:])])
    text, states = [], []
    for _ in range(N):
        states.append(omni.model(inputs_embeds=x[None], use_cache=False).last_hidden_state[0, -1])
        text.append(int(omni.lm_head(states[-1]).argmax()))
        x = torch.cat([x, read(text[-1:])])
    assert texts(events) == text
    assert len(set(text)) > 4

    y, written, logits = torch.zeros(0, g.model.config.hidden_size), [], []
    for i, (token, state) in enumerate(zip(text, states), 1):
        y = torch.cat([y, g.fuse(state, torch.tensor(token))[None]])
        burst = 0
        if i == N:
            y = torch.cat([y, g.embed(torch.tensor([g.sep]))])
            burst = U - len(written)
        elif i % omni.R == 0:
            burst = omni.W
        for _ in range(burst):
            logits.append(g.model(inputs_embeds=y[None], use_cache=False).logits[0, -1])
            written.append(int(logits[-1][g.unit_offset:].argmax()))
            assert i < N or logits[-1][g.eos] < logits[-1].max()       # it does not want to end
            y = torch.cat([y, g.embed(torch.tensor([g.unit_offset + written[-1]]))])
    assert units(events) == written
    assert len(set(written)) > 4
    traced = torch.stack([row for _, row in trace])
    torch.testing.assert_close(traced[:, :-1], torch.stack(logits)[:, g.unit_offset:], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_encoder_hears_each_clip_alone(tiny):
    """Clips laid end to end, odd ones too, give what openai-whisper's own code makes of each alone, at any
    length."""
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
    """70 s take the positions of 30 + 30 + 10 s, each piece heard alone, also beside other clips."""
    omni = tiny[0]
    mels = [noise_mel(omni, s, seed) for seed, s in enumerate((70, 1.37, 30, 30.09))]
    frames = [m.shape[1] for m in mels]
    together = omni.encode_speech(torch.cat(mels, 1), frames)
    pieces = [piece for mel in mels for piece in mel.split(3000, dim=1)]
    assert [p.shape[1] for p in pieces] == [3000, 3000, 1000, 137, 3000, 3000, 9]
    alone = [omni.encode_speech(p, [p.shape[1]]) for p in pieces]
    assert [len(x) for x in alone] == [1500, 1500, 500, 65, 1500, 1500, 5]
    assert len(together) == 5 * 1314
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-5)
    assert [speech_positions(n) for n in frames] == [700, 13, 300, 301]


def test_positions_are_counted_for_every_length_of_clip():
    """The layout counts as many positions and frames as the networks make, padded or not."""
    assert expand_speech([SPEECH], [7000]) == [SPEECH] * 700
    for n in (10, 2999, 3000, 3001, 3010, 5999, 6000, 6011, 60000):
        windows = [min(3000, n - at) for at in range(0, n, 3000)]
        assert speech_positions(n) == sum((window + 1) // 2 // 5 for window in windows)
    padded = [log_mel(torch.zeros(SAMPLE_RATE * s) + 0.1, 80, pad=True).shape[1] for s in (1, 30, 31, 70)]
    assert padded == [3000, 3000, 6000, 9000]
    lengths = (1600, 16001, 479999, 480000, 480001, 960159)
    for samples, pad in itertools.product(lengths, (False, True)):
        assert clip_frames(samples, pad) == log_mel(torch.zeros(samples) + 0.1, 80, pad).shape[1]


@torch.no_grad()
def test_training_and_streaming_hear_a_long_clip_alike(tiny, monkeypatch):
    """The LLM is fed the same embeddings, position for position, by forward() and by generate()."""
    omni, *tokenizers = tiny
    row = dialogue([65.3, 0.9], ["Yes.", "Two."], [20, 12])
    item = laid_out(omni, tokenizers, [row])[0]
    fed, prompt = [], chat_ids(tokenizers[0], row["replies"][:1])
    hook = omni.model.layers[0].input_layernorm.register_forward_pre_hook(lambda _, x: fed.append(x[0]))
    omni(collate([item]), "stage1")
    hook.remove()
    step = engine.Decoder.step
    monkeypatch.setattr(engine.Decoder, "step", lambda self, x, *more: fed.append(x) or step(self, x, *more))
    list(generate(omni, prompt, item["mels"], speak=False, max_tokens=1))
    trained, streamed = fed
    assert item["ids"].count(SPEECH) == 300 + 300 + 53 + 9
    assert streamed.shape[1] > 662
    torch.testing.assert_close(streamed, trained[:, :streamed.shape[1]], atol=1e-5, rtol=1e-5)


# --------------------------------------------------------------------------------- rows end to end

LENGTHS = [5, 1, 30, 29, 12, 2, 17, 30]


@pytest.mark.parametrize("causal", [True, False])
def test_attention_of_rows_end_to_end(causal):
    """Output and gradient are those of torch's fused attention on each row alone, with fewer key heads than
    query heads."""
    shapes = [(sum(LENGTHS), 4, 8), (sum(LENGTHS), 2, 8), (sum(LENGTHS), 2, 8)]
    ours = []
    for seed, shape in enumerate(shapes):
        ours.append(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).requires_grad_())
    theirs = [x.detach().clone().requires_grad_() for x in ours]
    rows = Rows(LENGTHS)
    y = rows.attend(*(pad_to(x, rows.total) for x in ours), causal)[:sum(LENGTHS)]
    alone = []
    for q, k, v in zip(*(x.split(LENGTHS) for x in theirs)):
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))         # (1, H, L, d)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
        alone.append(attended[0].transpose(0, 1))
    alone = torch.cat(alone)
    torch.testing.assert_close(y, alone, atol=1e-5, rtol=1e-5)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(9))
    (y * weight).sum().backward()
    (alone * weight).sum().backward()
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_attention_of_what_hears_in_bf16():
    """On a CPU it is by products, 512 queries at a time: the fused kernel's to bf16's digits, also where a
    row is shorter."""
    q, k, v = torch.randn(3, 2, 3, 700, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    mask = torch.ones(2, 1, 1, 700, dtype=torch.bool)
    mask[1, ..., 600:] = False
    for mask in (None, mask):
        expected = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), mask)
        torch.testing.assert_close(attention(q, k, v, mask, False).float(), expected, atol=4e-3, rtol=2e-2)


def test_rows_are_laid_side_by_side_and_back():
    """Each position has one place in the rectangles, and rectangles of similar rows are mostly full."""
    rows = Rows(LENGTHS)
    n = sum(LENGTHS)
    assert rows.total == 256 and (rows.back[n:] == -1).all()
    assert (rows.index[rows.back[:n]] == torch.arange(n)).all()
    assert (rows.index >= 0).sum() == n
    assert rows.position[:n].tolist() == [p for n in LENGTHS for p in range(n)]
    assert rows.shapes == [(3, 32), (1, 32), (1, 16), (1, 16), (1, 16), (1, 16)]
    assert Rows([9] * 5).shapes == [(8, 16)]          # few shapes
    assert Rows([1500]).shapes == [(1, 1504)]         # a clip alone
    assert sum(B * L for B, L in rows.shapes) == len(rows.index)


@pytest.mark.parametrize("network", ["LLM", "speech LM"])
@torch.no_grad()
def test_rows_end_to_end_equal_rows_alone(tiny, network):
    """What a network makes of rows end to end is what transformers' own path makes of each: no row sees
    another."""
    net = tiny[0].model if network == "LLM" else tiny[0].speech_generator.model.model
    x = torch.randn(sum(LENGTHS), net.config.hidden_size, generator=torch.Generator().manual_seed(0))
    alone = []
    for row in x.split(LENGTHS):
        alone.append(net(inputs_embeds=row[None], use_cache=False).last_hidden_state[0])
    torch.testing.assert_close(forward_packed(net, x, LENGTHS), torch.cat(alone), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("stage", STAGES)
def test_logits_in_pieces(items, stage, monkeypatch):
    """Loss and gradients are the same when only a few rows of logits exist at a time."""
    results, whole = [], F.cross_entropy
    for rows in (10 ** 4, 7):
        omni, seen = load()[0], []
        omni.freeze_for(stage)
        head = omni.lm_head if stage == "stage1" else omni.speech_generator.model.lm_head

        def counted(logits, *args, **more):
            seen.append(len(logits))
            return whole(logits, *args, **more)

        monkeypatch.setattr(model, "LOGITS", rows * len(head.weight))
        monkeypatch.setattr(F, "cross_entropy", counted)
        loss, n, right = omni(collate(items), stage)
        loss.backward()
        gradients = {name: p.grad for name, p in omni.named_parameters() if p.grad is not None}
        results.append((loss.detach(), n, right, gradients))
        assert max(seen) <= rows
        assert (len(seen) == 1) == (rows == 10 ** 4)
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_lengths_are_those_of_the_rows(tiny, items):
    """What is counted from the corpus's columns is what the rows become, also where a piece of 1,000 ends."""
    omni, *tokenizers = tiny
    rows = laid_out(omni, tokenizers, datasets.Dataset.from_list(ROWS * 334))
    expected = [(len(item["ids"]), sum(len(ids) for ids, _, _ in item["turns"])) for item in items]
    assert list(rows.lengths()) == expected * 334


def test_the_tokenizer_gets_pieces(tiny, monkeypatch):
    """Of a large corpus only a thousand dialogues' replies are in memory at once."""
    omni, *tokenizers = tiny
    rows, seen = laid_out(omni, tokenizers, datasets.Dataset.from_list(ROWS * 700)), []

    def counted(texts, **more):
        seen.append(len(texts))
        return tokenizers[0](texts, **more)

    monkeypatch.setattr(rows, "tokenizer", counted)
    assert len(list(rows.lengths())) == 2100 and max(seen) <= 2001


@pytest.mark.parametrize("stage", STAGES)
@torch.no_grad()
def test_loss_of_a_batch_is_the_sum_of_its_dialogues(tiny, items, stage):
    """No dialogue sees another, and the loss is a sum over a counted set of targets."""
    omni, tokenizer, _ = tiny
    loss, targets, right = omni(collate(items), stage)
    alone = [omni(collate([item]), stage) for item in items]
    torch.testing.assert_close(loss, sum(a[0] for a in alone), rtol=1e-5, atol=0)
    assert targets == sum(a[1] for a in alone)
    assert right == sum(a[2] for a in alone)
    if stage == "stage1":                             # with `<|im_end|>`; below with EOS
        counts = [len(tokenizer(reply)["input_ids"]) + 1 for row in ROWS for reply in row["replies"]]
    else:
        counts = [len(reply) + 1 for row in ROWS for reply in row["units"]]
    assert targets == sum(counts)


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


# ----------------------------------------------------------------------------------------- training

PART = {"speech_encoder": "speech encoder", "speech_projector": "speech adapter", "input_proj": "gate fusion",
        "gate": "gate fusion", "speech_generator": "speech LM", "model": "LLM", "lm_head": "LLM"}


def part_of(name):
    """The part that a parameter belongs to: the first word of PART that its name has."""
    return next(part for word, part in PART.items() if word in name.split("."))


def trained(omni):
    """{name: parameter} of what has gradients."""
    return {name: p for name, p in omni.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("stage, parts", [
    ("stage1", {"speech adapter", "LLM"}),
    ("stage1_tts", {"speech LM"}),
    ("stage2", {"gate fusion", "speech LM"})])
def test_a_stage_changes_only_its_own_parts(items, stage, parts):
    """One step of AdamW over all parameters, with weight decay: every tensor of the stage's parts moves, no
    other."""
    omni = load()[0]
    before = {name: w.clone() for name, w in omni.state_dict().items()}
    omni.freeze_for(stage)
    assert {part_of(name) for name in trained(omni)} == parts
    optimizer = torch.optim.AdamW(omni.parameters(), lr=1e-3, weight_decay=0.1)
    omni(collate(items), stage)[0].backward()
    optimizer.step()
    changed = {name for name, w in omni.state_dict().items() if not torch.equal(w, before[name])}
    assert changed == {name for name in before if part_of(name) in parts}
    assert set(STAGES[stage]) == parts


def test_every_parameter_is_of_one_part(tiny):
    """PARTS, which train.py and bench.py count by, says what PART above says."""
    for name, _ in tiny[0].named_parameters():
        assert [part for part, prefixes in PARTS.items() if name.startswith(prefixes)] == [part_of(name)]


@torch.no_grad()
def test_ablations_of_the_gate(tiny, items):
    """Fusion without hidden states is stage 1 TTS to the last digit; with only hidden states the text ids do
    not matter; neither trains what it leaves out."""
    omni, *_ = load()
    g, batch = omni.speech_generator, collate(items)
    gated = omni(batch, "stage2")[0]
    g.fusion = "text"
    assert omni(batch, "stage2")[0] == omni(batch, "stage1_tts")[0] != gated
    g.fusion = "hidden"
    hidden = torch.randn(5, omni.config["hidden_size"])
    one, other = g.fuse(hidden, torch.arange(5)), g.fuse(hidden, torch.arange(5, 10))
    assert torch.equal(one, other)
    expected = {"gate": {"model", "input_proj", "gate"}, "hidden": {"model", "input_proj"}, "text": {"model"}}
    for fusion, modules in expected.items():
        g.fusion = fusion
        omni.freeze_for("stage2")
        assert {name.split(".")[1] for name in trained(omni)} == modules


def test_lora(items, tmp_path):
    """It begins as the model without it, trains the adapter and two small matrices beside each of the LLM's,
    survives a checkpoint that holds only these, and merged gives the same loss with the released keys."""
    omni, *tokenizers = load()
    keys, batch = list(omni.state_dict()), collate(items)
    before = omni(batch, "stage1")[0].item()
    checkpoint.save(omni, str(tmp_path / "base"), *tokenizers)
    omni.add_lora(4)
    omni.freeze_for("stage1")
    assert omni(batch, "stage1")[0].item() == before
    added = trained(omni)
    assert {part_of(name) for name in added} == {"speech adapter", "LLM"}
    assert all("lora_" in name or "projector" in name for name in added)
    assert sum("lora_" in name for name in added) == 2 * 7 * omni.config["num_hidden_layers"]
    optimizer = torch.optim.AdamW(added.values(), lr=1e-2)
    for _ in range(3):
        omni(batch, "stage1")[0].backward()
        optimizer.step()
        optimizer.zero_grad()
    after = omni(batch, "stage1")[0].item()
    assert after < 0.99 * before
    weights = {name: w for name, w in omni.state_dict().items() if name in added}
    checkpoint.save(omni, str(tmp_path / "step.part"), *tokenizers, weights)
    meta = {"base": {"folder": "../base", "sha256": checkpoint.hashes(tmp_path / "base")}}
    checkpoint.seal(str(tmp_path / "step.part"), str(tmp_path / "step"), meta)
    again = load(tmp_path / "step")[0]
    assert again(batch, "stage1")[0].item() == after
    again.merge_lora()
    assert list(again.state_dict()) == keys
    assert "lora_rank" not in again.config
    assert again(batch, "stage1")[0].item() == pytest.approx(after, rel=1e-5)


def test_masks_and_labels_by_hand(tiny, items):
    """A two-turn dialogue, position by position: where speech goes, what is learned, which state each row
    reads."""
    _, tokenizer, _ = tiny
    item = items[1]                   # clips of 0.79 s and 1.33 s, "Hi there." and "It is five, I think."
    ids, labels = item["ids"], item["labels"]
    # 67 tokens of system prompt and "<|im_start|>user\n"; 79 frames -> 40 -> 8 positions; 11 tokens of
    # "<|im_end|>\n<|im_start|>assistant\n"; 6 of "Hi there.<|im_end|>"; 7 of "\n<|im_start|>user\n";
    # 133 frames -> 67 -> 13 positions; 11 tokens as above; the last reply
    first, second, third, fourth = 67, 67 + 8 + 11, 86 + 6 + 7, 99 + 13 + 11
    assert [p for p, i in enumerate(ids) if i == SPEECH] == [*range(67, 75), *range(99, 112)]
    learned = [*range(second, second + 6), *range(fourth, len(ids))]
    assert [p for p, x in enumerate(labels) if x != IGNORE] == learned
    assert all(x in (IGNORE, i) for i, x in zip(ids, labels))          # collate shifts them by one
    assert tokenizer.decode(ids[:first]).endswith("<|im_end|>\n<|im_start|>user\n")
    assert tokenizer.decode(ids[75:second]) == "<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(ids[112:fourth]) == "<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(ids[second:second + 6]) == "Hi there.<|im_end|>"
    assert tokenizer.decode(ids[second + 6:third]) == "\n<|im_start|>user\n"
    assert tokenizer.decode(ids[fourth:]) == "It is five, I think.<|im_end|>"
    replies = zip(item["turns"], (second, fourth), (second + 6, len(ids)))
    for (speech, rows, _), start, end in replies:
        assert [r for r in rows if r >= 0] == list(range(start - 1, end - 1))
        assert all(speech[p] == ids[r + 1] for p, r in enumerate(rows) if r >= 0)
    batch = collate(items)                            # in a batch, rows count through the dialogues before
    start, at = len(items[0]["ids"]), batch["speech_lengths"][0]
    assert batch["speech_rows"][at:at + 3].tolist() == [start + second + n for n in (-1, 0, 1)]
    assert batch["labels"][start + second - 1] == ids[second]
    assert batch["labels"][start - 1] == batch["labels"][-1] == IGNORE


def test_learn_by_heart_then_say_it():
    """The three stages, one after the other, learn three dialogues by heart; greedy streaming then gives
    exactly their last turns, text and units: loss, masks, layout and decoding speak of the same thing."""
    omni, *tokenizers = load()
    items = list(laid_out(omni, tokenizers, ROWS))
    batch = collate(items)
    for stage, bound in (("stage1", 0.02), ("stage1_tts", 0.05), ("stage2", 0.02)):
        omni.freeze_for(stage)
        optimizer = torch.optim.AdamW(trained(omni).values(), lr=1e-2)
        for step in range(50):
            loss, targets, right = omni(batch, stage)
            if step == 0:
                assert loss / targets > 1
            (loss / targets).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert loss / targets < bound, stage
        assert right == targets, stage
    for row, item in zip(ROWS, items):
        prompt = chat_ids(tokenizers[0], row["replies"][:-1])
        events = list(generate(omni, prompt, item["mels"], temperature=0.0))
        assert tokenizers[0].decode(texts(events)) == row["replies"][-1]
        assert units(events) == row["units"][-1]
        assert "note" not in dict(events)


# ----------------------------------------------------------------------------------------- sampling

P = [0.15, 0.5, 0.05, 0.3]
REDRAWN = [0.15 + 0.5 * 0.15, 0.5 * 0.5, 0.05 + 0.5 * 0.05, 0.3 + 0.5 * 0.3]
DRAWS = [                             # arguments of sample, the distribution that they must give
    ({}, P),
    ({"temperature": 0}, [0, 1, 0, 0]),
    ({"temperature": 0.5}, [p * p / 0.365 for p in P]),
    ({"top_k": 2}, [0, 0.625, 0, 0.375]),
    ({"top_p": 0.7}, [0, 0.625, 0, 0.375]),           # 0.5 does not reach 0.7, 0.5 + 0.3 does
    ({"top_p": 0.45}, [0, 1, 0, 0]),                  # the first alone reaches it
    ({"top_p": 0.9, "top_k": 3}, [0.15 / 0.95, 0.5 / 0.95, 0, 0.3 / 0.95]),
    ({"top_k": 1, "recent": [1, 1, 3], "limit": 2}, [0, 1, 0, 0]),       # twice is not more than 2
    ({"top_k": 1, "recent": [1, 1, 1], "limit": 2}, P),                  # redrawn from the whole distribution
    ({"recent": [1, 1, 1], "limit": 2}, REDRAWN)]


def draws(logits, n, temperature=1.0, recent=None, **options):
    """n draws of engine.sample from the same logits (V,)."""
    if recent is not None:
        recent = torch.tensor([recent] * n)
    return engine.sample(logits.expand(n, -1), torch.full((n,), float(temperature)), torch.rand(n, 2),
                         recent=recent, **options)


@pytest.mark.parametrize("options, expected", DRAWS, ids=[str(options) for options, _ in DRAWS])
def test_sample_draws_from_the_distribution_asked_for(options, expected):
    """Temperature, top-p, top-k and the repetition-aware redraw, within 4 standard deviations of 4000
    draws."""
    torch.manual_seed(0)
    logits, n = torch.tensor(P).log() + 3, 4000
    counts = torch.bincount(draws(logits, n, **options), minlength=4)
    for count, p in zip(counts.tolist(), expected):
        assert abs(count - n * p) <= 4 * math.sqrt(n * p * (1 - p))


def test_masked_ids_are_never_drawn():
    """Not by the first draw, and not by the redraw."""
    torch.manual_seed(0)
    logits = torch.tensor([-torch.inf, 0.0, -torch.inf, 0.0])
    for options in ({}, {"temperature": 0}, {"recent": [1, 3], "limit": 0}, {"top_k": 3, "top_p": 0.9},
                    {"temperature": 9.0}):
        assert set(draws(logits, 300, **options).tolist()) <= {1, 3}


@pytest.mark.parametrize("max_tokens, max_units, expected", [
    (5, 24, ["text", "text", "text", 5, 5, "text", "text", "the text was cut at 5 tokens", 10, 4,
             "the speech was cut at 24 units"]),
    (7, 13, ["text", "text", "text", 5, 5, "text", "text", "text", 3, "text", "the text was cut at 7 tokens",
             "the speech was cut at 13 units"]),
    (1, 1, ["text", "the text was cut at 1 tokens", 1, "the speech was cut at 1 units"])])
def test_generate_ends_and_says_why(tiny, monkeypatch, max_tokens, max_units, expected):
    """A model that would never stop is cut at exactly the limits, also in the middle of a burst, with a note
    for each."""
    omni, tokenizer, _ = tiny
    monkeypatch.setattr(engine, "sample", lambda logits, *_: torch.tensor([100]))    # no end
    prompt, seen = tokenizer("Hello")["input_ids"], []
    for kind, x in generate(omni, prompt, max_tokens=max_tokens, max_units=max_units):
        if kind == "text":
            seen.append("text")
        elif kind == "units":
            seen.append(len(x))
        else:
            seen.append(x)
    assert seen == expected


def test_only_text(tiny):
    """speak=False gives the same text, no units, and does not run the speech LM."""
    omni, tokenizer, _ = tiny
    options = {"eos": -1, "max_tokens": 6, "max_units": 5, "temperature": 0.0}
    prompt, trace = tokenizer("Hello")["input_ids"], []
    text = texts(generate(omni, prompt, **options))
    silent = list(generate(omni, prompt, speak=False, trace=trace, **options))
    assert texts(silent) == text
    assert len(text) == 6
    assert "units" not in dict(silent)
    assert not trace


@pytest.mark.parametrize("limit, said", [(60, 60), (61, 60), (40, 40)])
def test_a_validation_reply_is_as_long_as_its_limit_allows(tiny, monkeypatch, limit, said):
    """A reply of 60 tokens comes whole, so a validation can count it as exactly right."""
    omni, *tokenizers = tiny
    reply = [7 + n % 200 for n in range(60)]
    forced = [*reply, omni.config["eos_token_id"]]
    monkeypatch.setattr(engine, "sample", lambda *_: torch.tensor([forced.pop(0)]))
    dialogues = laid_out(omni, tokenizers, ROWS)
    [(text, spoken)] = watch.answers(omni, dialogues, [0], "stage1", max_tokens=limit)
    assert text == tokenizers[0].decode(reply[:said])
    assert not spoken


def function_of_train(name, names):
    """A function of train.py, which runs when it is imported. names: {what it reads of the script: value}."""
    body = ast.parse((ROOT / "train.py").read_text()).body
    wanted = [node for node in body if isinstance(node, (ast.Import, ast.ImportFrom, ast.FunctionDef))]
    names = dict(names)
    exec(compile(ast.Module(wanted, []), "train.py", "exec"), names)
    return names[name]


@pytest.mark.parametrize("wrong, exact", [(None, 1.0), (3, 0.0), (70, 0.0)])
def test_a_validation_counts_long_replies_that_are_exactly_right(tiny, monkeypatch, wrong, exact):
    """A reply of more than 40 tokens can be exactly right; one wrong token at the beginning or the end, and
    it is not."""
    omni, *tokenizers = tiny
    reply = "One and two and three are six, and so on. " * 5
    forced = [*tokenizers[0](reply)["input_ids"], omni.config["eos_token_id"]]
    assert len(forced) > 72
    if wrong is not None:
        forced[wrong] = 100
    monkeypatch.setattr(engine, "sample", lambda *_: torch.tensor([forced.pop(0)]))
    rows = datasets.Dataset.from_list([dialogue([0.5], [reply], [20])])
    cfg = SimpleNamespace(eval_dialogues=1, micro_tokens=8192, workers=0, stage="stage1")
    evaluate = function_of_train("evaluate", {
        "cfg": cfg, "omni": omni, "tokenizers": tokenizers, "device": "cpu", "rank": 0, "world": 1,
        "validation_set": laid_out(omni, tokenizers, rows), "validation_positions": [200],
        "accelerator": SimpleNamespace(reduce=lambda x: x)})
    assert evaluate()["val_exact"] == exact


# -------------------------------------------------------------------------------------- checkpoints

REFUSED = [                           # what is done to the tensor, its name
    ("missing", "model.layers.1.mlp.up_proj.weight"),
    ("missing", "model.speech_projector.linear2.bias"),
    ("missing", "speech_generator.gate.0.weight"),
    ("missing", "lm_head.weight"),
    ("missing", "speech_generator.model.model.embed_tokens.weight"),   # also the head: the two are tied
    ("missing", "model.speech_encoder.conv1.weight"),
    ("missing", "model.speech_encoder.blocks.0.attn.key.weight"),
    ("missing", "model.speech_encoder.positional_embedding"),
    ("extra", "model.layers.9.mlp.up_proj.weight"),
    ("extra", "speech_generator.gate.2.weight"),
    ("shape", "model.norm.weight"),
    ("shape", "speech_generator.model.model.embed_tokens.weight"),
    ("shape", "model.speech_encoder.conv1.weight")]


@pytest.fixture(scope="module")
def sixty_four(tmp_path_factory):
    """A checkpoint whose Whisper has heads of 64, as the released ones: it loads without a Whisper file."""
    folder = tmp_path_factory.mktemp("tiny") / "checkpoint"
    omni, *tokenizers = checkpoint.from_backbones("tiny/qwen2", "tiny/whisper.pt", "tiny/qwen2")
    checkpoint.save(omni, str(folder), *tokenizers)
    return folder


@pytest.mark.parametrize("what, name", REFUSED, ids=map(" ".join, REFUSED))
def test_a_damaged_checkpoint_is_refused(sixty_four, tmp_path, what, name):
    """Weights load completely or not at all, and the refusal names the tensor."""
    of_encoder = "speech_encoder" in name
    original = sixty_four if of_encoder else CHECKPOINT / "checkpoint"
    weights = load_file(original / "model.safetensors")
    if what == "missing":
        del weights[name]
    elif what == "extra":
        weights[name] = torch.zeros(7)
    else:
        weights[name] = weights[name][..., :-1].contiguous()
    folder = shutil.copytree(original, tmp_path / "checkpoint")
    save_file(weights, folder / "model.safetensors")
    either = name.replace("model.embed_tokens", ".*")                  # of two tied tensors
    with pytest.raises(ValueError, match=either):
        if of_encoder:                                # without a Whisper file its sizes come from the weights
            checkpoint.load(str(folder))
        else:
            load(folder)


def test_an_encoder_of_narrow_heads_needs_its_whisper_file():
    """A checkpoint does not say how wide they are; the released ones have 64."""
    with pytest.raises(ValueError, match="are not 64 wide; give its Whisper file too"):
        checkpoint.load(str(CHECKPOINT / "checkpoint"))


def test_a_truncated_checkpoint_is_refused(tmp_path):
    """A file that was not copied to its end is named."""
    folder = shutil.copytree(CHECKPOINT / "checkpoint", tmp_path / "checkpoint")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="model.safetensors cannot be read"):
        load(folder)
