"""CosyVoice 2's decoder against numbers that the official code computed on small random weights
(tests/data/cosyvoice2_decoder, or the folder in GOLDEN_DECODER_DIR), and against itself: streamed, batched,
with other weights, from files in other spellings."""
import json
import math
import os
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import whisper
from conftest import ROOT, run
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

from omni import checkpoint
from omni import codec as codecs
from omni.codec import load_codec, load_encoder
from omni.corpus import load_corpus
from omni.cosyvoice import LOOKAHEAD, CosyVoice2, HiFT, fbank, onnx_session
from tiny.codec import NanoCodec

GOLDEN = Path(os.environ.get("GOLDEN_DECODER_DIR", Path(__file__).parent / "data" / "cosyvoice2_decoder"))
DIMS = json.loads((GOLDEN / "dims.json").read_text())
HEAD_DIM = DIMS["estimator"]["attention_head_dim"]
INPUTS = load_file(GOLDEN / "inputs.safetensors")
EXPECTED = load_file(GOLDEN / "expected.safetensors")
UNITS = INPUTS["tokens"]                                  # (1, 67)
N = UNITS.shape[1]
RATIO = DIMS["token_mel_ratio"]                           # mel frames per unit
FRAME = HiFT.frame                                        # samples per mel frame
BURSTS = {"ones": [1] * N, "sevens": [7] * N, "tens": [10] * N, "uneven": [3, 0, 50, N], "all": [N]}


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def rms(x):
    return x.square().mean().sqrt().item()


def bursts(sizes):
    """UNITS, cut into lists of these sizes."""
    units = UNITS[0].tolist()
    cuts = np.cumsum([0, *sizes])
    return [units[a:b] for a, b in zip(cuts, cuts[1:]) if a < N]


@pytest.fixture(scope="session")
def voice(tmp_path_factory):
    path = tmp_path_factory.mktemp("voice") / "voice.npy"
    np.save(path, INPUTS["speaker_embedding"].numpy())
    return str(path)


@pytest.fixture
def codec(voice):
    torch.set_num_threads(1)
    codec = CosyVoice2.load(str(GOLDEN), voice, head_dim=HEAD_DIM, chunk=10)
    codec.flow.noise = INPUTS["cfm_noise"]
    with torch.no_grad():
        yield codec


def change_weights(codec, seed):
    """Turn the golden decoder into another one: the entries of each tensor in a random order."""
    draw = torch.Generator().manual_seed(seed)
    for x in codec.parameters():
        x.copy_(x.flatten()[torch.randperm(x.numel(), generator=draw)].view_as(x))


def vary_pitch(codec):
    """Let the pitch of UNITS move from 0 to 250 Hz, so that phase can go wrong: the golden one is 150 Hz."""
    condnet, classifier = codec.hift.f0_predictor["condnet"], codec.hift.f0_predictor["classifier"]
    x = condnet(codec.flow(UNITS, codec.voice)).transpose(1, 2) @ classifier.weight.T
    scale = 250 / (x.max() - x.min())
    classifier.weight *= scale
    classifier.bias.copy_(-scale * x.min())


# ------------------------------------------------------------------------------------- the official numbers

@pytest.mark.parametrize("chunk", [0, 10, 50])
def test_mel_agrees_with_official_code(codec, chunk):
    """Names, order of operations, masks, Euler steps and guidance of the flow. A call that is not final
    encodes the units it has and drops the frames of the last 3, as the official code does at each chunk."""
    codec.flow.chunk = chunk
    close(codec.flow(UNITS, codec.voice), EXPECTED[f"mel.chunk{chunk}.final1"])
    beginnings = {f"mel.chunk{chunk}.final0": UNITS, f"mel.prefix40.chunk{chunk}": UNITS[:, :40]}
    for key, units in beginnings.items():
        mu = codec.flow.condition(units)[..., :-RATIO * LOOKAHEAD]
        close(codec.flow.integrate(mu, codec.voice), EXPECTED[key])


def test_encoder_agrees_with_official_code(codec):
    flow = codec.flow
    at_25_hz = flow.attention_mask(1, N, None, None)
    at_50_hz = flow.attention_mask(RATIO, N, None, None)
    hidden = flow.encoder(flow.input_embedding(UNITS), N, None, at_25_hz, at_50_hz, None)
    close(hidden, EXPECTED["encoder.chunk10.hidden"])
    close(flow.condition(UNITS).transpose(1, 2), EXPECTED["encoder.chunk10.mu"])


def test_vocoder_agrees_with_official_code(codec):
    mel = EXPECTED["mel.chunk50.final1"]
    close(codec.hift.pitch(mel), EXPECTED["hift.f0"])
    close(codec.hift.pitch(mel).repeat_interleave(FRAME, -1)[:, None], EXPECTED["hift.f0_upsampled"])
    close(codec.hift(mel, EXPECTED["hift.source"]), EXPECTED["hift.wav"])


def test_source_agrees_up_to_its_random_draw(codec):
    """The official source draws a phase per overtone and noise. Least squares recovers the phases; given
    those, our sines are the official ones, and what is left is white and as loud as the noise must be."""
    hift, harmonics = codec.hift, DIMS["hift"]["nb_harmonics"] + 1
    linear = hift.m_source["l_linear"]
    weight, bias = linear.weight[0].double(), linear.bias.double()
    theirs = torch.atanh(EXPECTED["hift.source"][0, 0].double()) - bias
    angle = 2 * np.pi * torch.cumsum(EXPECTED["hift.f0_upsampled"][0, 0].double() / DIMS["sample_rate"], 0)
    angle = angle[:, None] * torch.arange(1, harmonics + 1)
    found = torch.linalg.lstsq(torch.cat([angle.sin(), angle.cos()], 1), theirs[:, None]).solution[:, 0]
    a, b = found[:harmonics] / weight, found[harmonics:] / weight
    amplitude, phase = torch.hypot(a, b), torch.atan2(b, a)
    torch.testing.assert_close(amplitude, torch.full_like(a, 0.1), atol=0, rtol=5e-3)
    assert phase[0].abs() < 5e-3                          # the fundamental starts at phase 0
    hift.phases = (phase / (2 * np.pi) % 1)[:, None]
    hift.phases[0] = 0
    hift.noise = torch.zeros_like(hift.noise)
    ours = torch.atanh(hift.source(EXPECTED["hift.f0"])[0, 0].double()) - bias
    left = theirs - ours
    assert left.std().item() == pytest.approx(0.003 * weight.norm().item(), rel=0.02)
    assert (left[1:] * left[:-1]).mean().abs() < 0.02 * left.var()
    assert left[:FRAME].std() < 1.2 * left.std()


def test_source_where_unvoiced(codec):
    """Below 10 Hz there is only noise, a third as loud as the sines."""
    linear = codec.hift.m_source["l_linear"]
    x = torch.atanh(codec.hift.source(torch.full((1, 100), 9.9))) - linear.bias
    assert x.std().item() == pytest.approx(0.1 / 3 * linear.weight.norm().item(), rel=0.02)


# ------------------------------------------------------------------------------------------------- streaming

@pytest.mark.parametrize("chunk", [10, 50])
@pytest.mark.parametrize("name", BURSTS)
def test_streamed_mel_is_the_whole_mel(codec, chunk, name):
    """Every cache: keys, values, convolutions, the place in the noise. The official code renders the reply at
    once."""
    codec.flow.chunk, state, mels = chunk, {}, []
    for burst in bursts(BURSTS[name]):
        mels.append(codec.next_mel(state, burst, final=False))
    mels.append(codec.next_mel(state, [], final=True))
    close(torch.cat(mels, -1), EXPECTED[f"mel.chunk{chunk}.final1"])


def test_a_short_past_streams_too(codec):
    """A window of 2 chunks: the caches forget what the mask hides, no more and no less."""
    codec.flow.past, state = 20, {}
    whole = codec.flow(UNITS, codec.voice)
    assert (whole - EXPECTED["mel.chunk10.final1"]).abs().max() > 1e-2
    mels = [codec.next_mel(state, burst, final=False) for burst in bursts([10] * N)]
    mels.append(codec.next_mel(state, [], final=True))
    close(torch.cat(mels, -1), whole)


@pytest.mark.parametrize("chunk, seed", [(1, None), (7, None), (10, None), (7, 1), (7, 2), (7, 3)])
def test_no_click_where_pieces_join(codec, monkeypatch, chunk, seed):
    """The streamed sound is the unbroken one, and steps at no join, with the golden weights and with others.

    The error of pieces that are rendered alone, without what is kept from piece to piece, depends on the
    weights, so it is the yardstick. Streaming, with an overlap of 8 frames, must leave less than 5 % of it;
    if pieces wait for all 14 frames that the vocoder looks ahead, only rounding may be left.
    """
    if seed is not None:
        change_weights(codec, seed)
    codec.flow.chunk = chunk
    monkeypatch.setattr(codecs, "LARGEST", 0)      # as many pieces as there can be
    vary_pitch(codec)
    whole = codec.decode(UNITS[0])
    mel = codec.flow(UNITS, codec.voice)
    alone = torch.cat([codec.next_wav({}, piece, final=True) for piece in mel.split(20, -1)])
    lost = rms(alone - whole)
    assert lost > 0.01 * rms(whole)

    pieces = list(codecs.stream(codec, bursts([10] * N)))
    error = torch.cat(pieces) - whole
    assert len(whole) == N * RATIO * FRAME and len(pieces) > 4
    assert rms(error) < 0.05 * lost
    joins = torch.tensor([len(piece) for piece in pieces]).cumsum(0)[:-1]
    steps = error[joins] - error[joins - 1]
    assert steps.abs().max() < 0.01 * whole.diff().abs().max()

    codec.overlap, state = HiFT.reach, {}
    pieces = [codec.next_wav(state, piece, final=False) for piece in mel.split(20, -1)]
    pieces.append(codec.next_wav(state, mel[..., :0], final=True))
    assert rms(torch.cat(pieces) - whole) < 1e-3 * lost


def test_two_renderings_are_faded(codec):
    """If the first rendering of the overlap is off by 0.1, the sound glides back over 60 ms, without a
    step."""
    mel, off, pieces = EXPECTED["mel.chunk10.final1"], 0.1, []
    for error in (0, off):
        state = {}
        codec.next_wav(state, mel[..., :40], final=False)
        state["held"] = state["held"] + error
        pieces.append(codec.next_wav(state, mel[..., 40:80], final=False))
    glide = pieces[1] - pieces[0]
    assert glide[0].item() == pytest.approx(off, rel=1e-3)
    assert not glide[codec.fade * FRAME:].any()
    assert glide.diff().abs().max() < 1.01 * off * np.pi / 2 / (codec.fade * FRAME)


@pytest.mark.parametrize("name, first",
                         [("ones", 10), ("sevens", 14), ("tens", 10), ("uneven", 53), ("all", N)])
def test_bursts_do_not_matter(codec, name, first):
    """Units that come one by one, in tens or all at once sound alike; the first piece comes as soon as the
    first chunk and its look-ahead are there."""
    codec.flow.chunk = 7
    taken = []

    def take():
        for burst in bursts(BURSTS[name]):
            taken.extend(burst)
            yield burst
    stream = codecs.stream(codec, take())
    pieces = [next(stream)]
    assert len(taken) == first
    wav = torch.cat([*pieces, *stream])
    whole = codec.decode(UNITS[0])
    assert len(wav) == len(whole) and (wav - whole).abs().max() < 0.01 * whole.abs().max()


@pytest.mark.parametrize("gap, rendering, sizes", [
    (0.05, 0.02, [1, 1, 5, 5]), (0.1, 0.05, [1, 1, 3, 5]), (0.35, 0.04, [1, 1, 1, 1]),
    (1.0, 0.1, [1, 1, 1, 1])])
def test_pieces_grow_while_sound_waits_to_be_played(codec, monkeypatch, gap, rendering, sizes):
    """By a clock that stands still except while a burst of 10 units is written (gap, in seconds) and a piece
    rendered: the first piece is one chunk, later ones as many as fit into what is still to be played, up to
    50 units. Playback stalls no more often than if each chunk were rendered at once."""
    codec.flow.chunk, now, render = 10, [0.0], codec.next_piece
    monkeypatch.setattr(codecs.time, "monotonic", lambda: now[0])

    def next_piece(*args, **more):
        now[0] += rendering
        return render(*args, **more)
    monkeypatch.setattr(codec, "next_piece", next_piece)

    def take():
        for n in range(30):
            now[0] += gap
            yield list(range(10 * n, 10 * n + 10))

    def play():
        """Chunks in each piece, and how often the next one came too late."""
        pieces, plays_until, stalls = [], math.inf, 0
        for piece in codecs.stream(codec, take()):
            stalls += now[0] > plays_until
            plays_until = now[0] if math.isinf(plays_until) else max(plays_until, now[0])
            plays_until += len(piece) / codec.sample_rate
            pieces.append(round(len(piece) / FRAME / RATIO / 10))
        return pieces, stalls
    pieces, stalls = play()
    assert pieces[:4] == sizes and max(pieces) <= 5 and sum(pieces) == 30
    monkeypatch.setattr(codecs, "LARGEST", 0)
    at_once, unavoidable = play()
    assert len(at_once) >= 29 and stalls <= unavoidable


def numbers_in(x):
    """How many numbers a nest of dicts, tuples, tensors and numbers holds."""
    if torch.is_tensor(x):
        return x.numel()
    if isinstance(x, (int, float)):
        return 1
    return sum(numbers_in(y) for y in (x.values() if isinstance(x, dict) else x))


def test_chunk_50_costs_what_chunk_2_does(codec):
    """At most 1.2 times as many floating point operations. And what a stream remembers stops growing."""
    draw = torch.Generator().manual_seed(0)
    units = torch.randint(0, DIMS["vocab_size"], (50, 7), generator=draw).tolist()
    codec.flow.chunk, state, flops, held = 7, {}, {}, []
    codec.next_mel(state, units[0][:LOOKAHEAD], final=False)
    for i, burst in enumerate(units):
        counter = FlopCounterMode(display=False) if i in (1, 49) else None
        with counter or nullcontext():
            codec.next_piece(state, burst, final=False)
        if counter:
            flops[i] = counter.get_total_flops()
        held.append(numbers_in(state))
    assert 0 < flops[49] <= 1.2 * flops[1]
    assert held[49] == held[20]


def test_beginning_of_a_reply(codec):
    """decode(final=False) returns the part that the rest of the reply does not change."""
    whole, part = codec.decode(UNITS[0]), codec.decode(UNITS[0, :40], final=False)
    assert len(part) == (30 * RATIO - codec.overlap) * FRAME      # 3 chunks of 10, except the overlap
    close(part, whole[:len(part)])
    assert len(codec.decode(UNITS[0, :5], final=False)) == 0
    assert len(codec.decode(UNITS[0, :0])) == 0
    assert list(codecs.stream(codec, [[], []])) == []


# ------------------------------------------------------------------------------------------- several at once

@pytest.mark.parametrize("chunk", [0, 10])
def test_batch_is_single(codec, chunk):
    """Padding is neither heard nor seen: replies of 1 to 67 units, rendered together and one by one."""
    codec.flow.chunk, codec.flow.past = chunk, 20
    rows = [UNITS[0, :n] for n in (40, 67, 1, 23)]
    for together, row in zip(codec.decode(rows), rows):
        close(together, codec.decode(row))
    pair = torch.stack([UNITS[0, :30], UNITS[0, 30:60]])
    assert codec.decode(pair).shape == (2, 30 * RATIO * FRAME)
    close(codec.decode(pair)[1], codec.decode(pair[1]))


# ----------------------------------------------------------------------------------------------------- files

def spell(spelling, name, g, v):
    """A weight under weight norm, as one of the three kinds of released files hold it."""
    if spelling == "plain":
        return {f"{name}.weight": g * v / v.norm(dim=(1, 2), keepdim=True)}
    if spelling == "old":
        return {f"{name}.weight_g": g, f"{name}.weight_v": v}
    return {f"{name}.parametrizations.weight.original0": g, f"{name}.parametrizations.weight.original1": v}


def write_decoder(folder, spelling="old", prefix="", change=lambda tensors: tensors):
    """The golden files in `folder`, hift.pt with another spelling of weight norm, both changed."""
    for file, start in (("flow.pt", ""), ("hift.pt", prefix)):
        tensors = torch.load(GOLDEN / file, weights_only=True)
        for name in [n.removesuffix(".weight_g") for n in tensors if n.endswith(".weight_g")]:
            g, v = tensors.pop(f"{name}.weight_g"), tensors.pop(f"{name}.weight_v")
            tensors |= spell(spelling, name, g, v)
        torch.save(change({start + n: x for n, x in tensors.items()}), folder / file)
    return str(folder)


def widen(tensors):
    """The estimator's attention in heads of 64, as released: a folder is then opened by its name alone."""
    times = 64 // math.gcd(64, HEAD_DIM * DIMS["estimator"]["num_heads"])
    result = dict(tensors)
    for name, x in tensors.items():
        if ".attn1.to_" in name and name.endswith(".weight"):
            result[name] = torch.cat([x] * times, 1 if ".to_out." in name else 0)
    return result


@pytest.mark.parametrize("spelling, prefix",
                         [("plain", ""), ("old", "generator."), ("new", ""), ("new", "generator.")])
def test_spellings_of_weight_norm(voice, tmp_path, spelling, prefix):
    codec = CosyVoice2.load(write_decoder(tmp_path, spelling, prefix), voice, head_dim=HEAD_DIM)
    with torch.no_grad():
        close(codec.hift(EXPECTED["mel.chunk50.final1"], EXPECTED["hift.source"]), EXPECTED["hift.wav"])


@pytest.mark.parametrize("name", [
    "input_embedding.weight", "encoder.encoders.1.norm_ff.weight", "encoder_proj.bias",
    "decoder.estimator.mid_blocks.0.1.1.attn1.to_q.weight", "ups.1.bias", "conv_pre.weight_g",
    "conv_post.weight_v", "resblocks.8.activations2.2.alpha", "m_source.l_linear.weight"])
def test_an_incomplete_file_is_refused(voice, tmp_path, name):
    """Weights load completely, or one line names the file and the tensor: missing, unknown, or of another
    size."""
    def without(tensors):
        return {n: x for n, x in tensors.items() if n != name}

    def renamed(tensors):
        return {n + "s" if n == name else n: x for n, x in tensors.items()}

    def longer(tensors):
        return {n: torch.cat([x, x]) if n == name else x for n, x in tensors.items()}

    for change in (without, renamed, longer):
        if (change, name) == (longer, "input_embedding.weight"):
            continue                                      # a larger vocabulary is no mistake
        message = rf"^{tmp_path}/(flow|hift)\.pt.*{name.split('.weight_')[0]}.*$"
        with pytest.raises(RuntimeError, match=message):
            CosyVoice2.load(write_decoder(tmp_path, change=change), voice, head_dim=HEAD_DIM)


def test_an_unknown_tensor_is_refused(voice, tmp_path):
    folder = write_decoder(tmp_path, change=lambda tensors: tensors | {"more.weight": torch.zeros(3)})
    with pytest.raises(RuntimeError, match=r"flow\.pt: tensor more.weight is unknown"):
        CosyVoice2.load(folder, voice, head_dim=HEAD_DIM)


def test_load_codec_and_voices(voice, tmp_path):
    """A file is a NanoCodec, a folder CosyVoice 2; a voice comes from .npy, .pt or spk2info.pt, and a wrong
    one is named."""
    NanoCodec(dim=8, phonemes=["a"]).save(tmp_path / "codec.pt")
    assert isinstance(load_codec(str(tmp_path / "codec.pt")), NanoCodec)
    folder, vector = write_decoder(tmp_path, change=widen), INPUTS["speaker_embedding"]
    with pytest.raises(ValueError, match="no voice: .*spk2info.pt has none; give --voice"):
        load_codec(folder)
    torch.save({"anna": {"embedding": vector}, "ben": {"embedding": -vector}}, tmp_path / "spk2info.pt")
    torch.save(2 * vector, tmp_path / "voice.pt")
    expected = {None: vector, "ben": -vector, str(tmp_path / "voice.pt"): 2 * vector, voice: vector}
    for given, want in expected.items():
        codec = load_codec(folder, given)
        assert codec.sample_rate == DIMS["sample_rate"] and torch.equal(codec.voice, want)
    with pytest.raises(ValueError, match="carl.*anna, ben"):
        load_codec(folder, "carl")


def test_files_of_another_kind_are_named(voice, tmp_path):
    """Text instead of tensors, a pickle that would run code, another codec, sizes that do not fit: each is
    one error with the file's name."""
    class Code:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)
    NanoCodec(dim=8, phonemes=["a"]).save(tmp_path / "nano.pt")
    torch.save(Code(), tmp_path / "code.pt")
    torch.save(INPUTS["speaker_embedding"], tmp_path / "tensor.pt")
    np.save(tmp_path / "short.npy", np.zeros(3))
    for name in ("text.pt", "text.npy", "text.wav"):
        (tmp_path / name).write_text("Dear sir or madam")
    (tmp_path / "golden").mkdir()
    folder = write_decoder(tmp_path / "golden", change=widen)
    with pytest.raises(FileNotFoundError, match="there is no codec .*nowhere"):
        load_codec(str(tmp_path / "nowhere"))
    for name in ("text.pt", "code.pt", "tensor.pt"):
        with pytest.raises(RuntimeError, match=name):
            load_codec(str(tmp_path / name))
    with pytest.raises(ValueError, match="nano.pt has one voice"):
        load_codec(str(tmp_path / "nano.pt"), "anna")
    for name in ("text.pt", "code.pt", "nano.pt", "text.npy", "short.npy", "text.wav"):
        with pytest.raises((RuntimeError, ValueError), match=name):
            load_codec(folder, str(tmp_path / name))
    (tmp_path / "golden/speech_tokenizer_v2.onnx").write_text("Dear sir or madam")
    with pytest.raises(RuntimeError, match="speech_tokenizer_v2.onnx cannot be read"):
        load_encoder(folder)
    with pytest.raises(RuntimeError, match="flow.pt: the estimator's attention"):
        CosyVoice2.load(folder, voice, head_dim=7)
    (tmp_path / "golden/hift.pt").write_bytes((tmp_path / "golden/hift.pt").read_bytes()[:1000])
    with pytest.raises(RuntimeError, match="hift.pt is not a file of tensors"):
        load_codec(folder, voice)
    assert not (tmp_path / "ran").exists()


# ------------------------------------------------------------------------------------ ONNX: encode and voice

FLOAT, INT32 = 1, 6                                       # onnx's numbers of the types


def write_onnx(path, inputs, outputs, nodes, constants):
    """A tiny network with the names of inputs and outputs of the released one.

    inputs, outputs   (name, type, shape)
    nodes             (operator, inputs, output, attributes)
    """
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    from onnx import helper
    nodes = [helper.make_node(operator, names, [output], **more) for operator, names, output, more in nodes]
    inputs = [helper.make_tensor_value_info(*x) for x in inputs]
    outputs = [helper.make_tensor_value_info(*x) for x in outputs]
    constants = [onnx.numpy_helper.from_array(np.array(x), name) for name, x in constants.items()]
    graph = helper.make_graph(nodes, "tiny", inputs, outputs, constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)


def write_tokenizer(folder):
    """A tokenizer whose unit is 1000 times how loud the 20th mel bin is there (0..5), plus the place in the
    piece."""
    nodes = [
        # how loud: each fourth frame of the bin
        ("Gather", ["feats", "bin"], "row", {"axis": 1}),
        ("Slice", ["row", "zero", "end", "one", "four"], "fourth", {}),
        ("Mul", ["fourth", "steps"], "loud", {}),
        ("Floor", ["loud"], "level", {}),
        ("Cast", ["level"], "levels", {"to": INT32}),
        ("Mul", ["levels", "thousand"], "high", {}),
        # the place: 0, 1, ..., a fourth of the length, rounded up
        ("Add", ["feats_length", "round"], "more", {}),
        ("Div", ["more", "by4"], "count", {}),
        ("Squeeze", ["count"], "limit", {}),
        ("Range", ["from", "limit", "by"], "place", {}),
        ("Add", ["high", "place"], "indices", {})]
    constants = {
        "bin": np.int64(20), "zero": [0], "end": [1 << 30], "one": [1], "four": [4], "steps": np.float32(3),
        "thousand": np.int32(1000), "round": np.int32([3]), "by4": np.int32([4]), "from": np.int32(0),
        "by": np.int32(1)}
    inputs = [("feats", FLOAT, [1, 128, "T"]), ("feats_length", INT32, [1])]
    outputs = [("indices", INT32, [1, "U"])]
    write_onnx(folder / "speech_tokenizer_v2.onnx", inputs, outputs, nodes, constants)


@pytest.mark.parametrize("seconds, places", [
    (1.01, [(0, 26)]), (30, [(0, 750)]), (30.01, [(0, 700), (50, 101)]),
    (70, [(0, 700), (50, 700), (50, 450)])])
def test_encode(tmp_path, seconds, places):
    """The tokenizer gets the log-mel and its length, at most 30 s at a time; overlaps are halved between
    pieces."""
    samples = round(16000 * seconds)
    noise = torch.randn(samples, generator=torch.Generator().manual_seed(0))
    wav = noise * torch.linspace(0.1, 1, samples) ** 2
    write_tokenizer(tmp_path)
    units = load_encoder(str(tmp_path))(wav)         # opens only the tokenizer: there is no decoder, no voice
    level = torch.floor(whisper.log_mel_spectrogram(wav, 128)[20, ::4] * 3).long()
    assert units.dtype == torch.long and len(level.unique()) > 2
    assert (units % 1000).tolist() == [p for a, b in places for p in range(a, b)]
    assert (units // 1000).tolist() == level.tolist()


def kaldi_fbank(wav):
    """Kaldi's fbank from its definition: 25 ms frames each 10 ms, no mean, pre-emphasis 0.97, Povey's window,
    512-point power spectrum, 80 triangles from 20 to 8000 Hz on mel = 1127 ln(1 + f / 700)."""
    def mel(hz):
        return 1127 * np.log(1 + hz / 700)
    x = wav.double().unfold(0, 400, 160)
    x = x - x.mean(1, keepdim=True)
    x = x - 0.97 * torch.cat([x[:, :1], x[:, :-1]], 1)
    povey = torch.hann_window(400, periodic=False, dtype=torch.double) ** 0.85
    power = torch.fft.rfft(x * povey, 512).abs()[:, :256] ** 2
    at = torch.tensor(mel(np.arange(256) * 16000 / 512))
    edges = torch.linspace(mel(20), mel(8000), 82, dtype=torch.double)
    left, centre, right = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    bank = torch.minimum((at - left) / (centre - left), (right - at) / (right - centre)).clamp(min=0)
    return (power @ bank.T).clamp(min=torch.finfo(torch.float32).eps).log()


def test_voice_from_a_clip(tmp_path):
    """CAM++ gets kaldi's fbank minus its mean, and its answer is the voice: a real clip, a network of one
    layer."""
    pytest.importorskip("kaldi_native_fbank")
    clip = ROOT / "tests/data/jfk.flac"
    wav = torch.from_numpy(soundfile.read(clip, dtype="float32")[0])
    want = kaldi_fbank(wav)
    want = want - want.mean(0)
    torch.testing.assert_close(fbank(wav).double(), want, atol=2e-3, rtol=1e-3)
    weight = torch.randn(80, 192, generator=torch.Generator().manual_seed(0))
    nodes = [("Abs", ["input"], "size", {}),
             ("ReduceMean", ["size"], "mean", {"axes": [1], "keepdims": 0}),
             ("MatMul", ["mean", "weight"], "output", {})]
    write_onnx(tmp_path / "campplus.onnx", [("input", FLOAT, [1, "T", 80])], [("output", FLOAT, [1, 192])],
               nodes, {"weight": weight.numpy()})
    codec = CosyVoice2.load(write_decoder(tmp_path), str(clip), head_dim=HEAD_DIM)
    want = want.abs().mean(0) @ weight.double()
    torch.testing.assert_close(codec.voice[0].double(), want, atol=1e-2, rtol=1e-3)


def test_what_is_missing_is_named(codec, tmp_path, monkeypatch):
    """No tokenizer in the folder, no onnxruntime, no kaldi-native-fbank: one line each that names the fix."""
    with pytest.raises(FileNotFoundError, match="speech_tokenizer_v2.onnx"):
        codec.encode(torch.zeros(16000))
    (tmp_path / "x.onnx").touch()
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(RuntimeError, match="pip install onnxruntime"):
        onnx_session(str(tmp_path / "x.onnx"))
    monkeypatch.setitem(sys.modules, "kaldi_native_fbank", None)
    with pytest.raises(RuntimeError, match="pip install kaldi-native-fbank"):
        fbank(torch.zeros(16000))


# ----------------------------------------------------------------------------------------- the real commands

def test_the_real_commands_with_a_folder(voice, tmp_path):
    """data.py needs only the folder's tokenizer; sample.py and eval.py need a voice and say so. A corpus of
    one's own has no answers to look for, and any text may name a dialogue."""
    (tmp_path / "cosy").mkdir()
    folder, corpus = write_decoder(tmp_path / "cosy", change=widen), tmp_path / "corpus"
    write_tokenizer(tmp_path / "cosy")
    wav = np.random.default_rng(0).normal(0, 0.1, 24000)
    soundfile.write(tmp_path / "q.wav", wav, 16000)
    row = {"speech": "q.wav", "replies": "It is a question.", "reply_speech": "q.wav"}
    rows = [json.dumps({"id": f"../{i}"} | row) for i in range(12)]
    (tmp_path / "dialogues.jsonl").write_text("\n".join(rows))
    run(sys.executable, "data.py", "config/data_folder.py", "--path", tmp_path / "dialogues.jsonl",
        "--audio_root", tmp_path, "--codec", folder, "--held_out", 0.3, "--processes", 1, "--out_dir", corpus)
    assert [u % 1000 for u in load_corpus(str(corpus), "train")[0]["units"][0]] == [*range(38)]

    omni, *tokenizers = checkpoint.from_backbones("tiny/qwen2", "tiny/whisper.pt", "tiny/qwen2")
    checkpoint.save(omni, str(tmp_path / "checkpoint"), *tokenizers)
    common = ["--ckpt", tmp_path / "checkpoint", "--codec", folder, "--max_units", 30]
    sample = [sys.executable, "sample.py", *common, "--wav", tmp_path / "q.wav",
              "--out", tmp_path / "reply.wav"]
    assert "give --voice" in run(*sample, code=2).strip().splitlines()[-1]
    assert not (tmp_path / "reply.wav").exists()
    printed = run(*sample, "--voice", voice)
    reply, rate = soundfile.read(tmp_path / "reply.wav")
    assert rate == 24000 and len(reply) == 30 * RATIO * FRAME
    assert "the speech was cut at 30 units" in printed
    run(sys.executable, "eval.py", *common, "--voice", voice, "--corpus", corpus, "--dialogues", 1,
        "--out", tmp_path / "eval")
    figures = json.loads((tmp_path / "eval/results.json").read_text())["figures"]
    assert figures["turns"] == [1] and figures["cut"][0] == 100
    assert "wer_bigram" in figures and "s2t" not in figures
    written = {p.name for p in (tmp_path / "eval").iterdir()}
    assert {"results.json", "report.html", "gallery.md", "0-1-question.ogg", "0-1-reply.ogg"} <= written
