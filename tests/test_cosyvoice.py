"""CosyVoice 2's decoder against numbers that the official code computed on small random weights
(tests/data/cosyvoice2_decoder, or the folder in GOLDEN_DECODER_DIR), and against itself: streamed, batched, respelled."""
import json
import math
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import whisper
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

from codec import LOOKAHEAD, CosyVoice2, HiFT, NanoCodec, fbank, load_codec, load_encoder, onnx_session
from model import Omni

ROOT = Path(__file__).parent.parent
GOLDEN = Path(os.environ.get("GOLDEN_DECODER_DIR", Path(__file__).parent / "data" / "cosyvoice2_decoder"))
DIMS = json.loads((GOLDEN / "dims.json").read_text())
INPUTS, EXPECTED = load_file(GOLDEN / "inputs.safetensors"), load_file(GOLDEN / "expected.safetensors")
UNITS = INPUTS["tokens"]                                  # (1, 67)
N, RATIO, FRAME = UNITS.shape[1], DIMS["token_mel_ratio"], HiFT.frame     # units; mel frames per unit; samples per frame
BURSTS = {"ones": [1] * N, "sevens": [7] * N, "tens": [10] * N, "uneven": [3, 0, 50, N], "all": [N]}


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def bursts(sizes):
    """UNITS, cut into lists of so many."""
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
    codec = CosyVoice2.load(str(GOLDEN), voice, head_dim=DIMS["estimator"]["attention_head_dim"], chunk=10)
    codec.flow.noise = INPUTS["cfm_noise"]
    with torch.no_grad():
        yield codec


@pytest.fixture
def lively(codec):
    """The same with a pitch that moves from 0 to 250 Hz (the golden one stays at 150), so that phase can go wrong."""
    head, mel = codec.hift.f0_predictor["classifier"], EXPECTED["mel.chunk50.final1"]
    head.weight /= (codec.hift.f0_predictor["condnet"](mel).transpose(1, 2) @ head.weight.T).std() / 60
    head.bias += 90 - (codec.hift.f0_predictor["condnet"](mel).transpose(1, 2) @ head.weight.T + head.bias).mean()
    pitch = codec.hift.pitch(mel)
    assert pitch.min() < 10 and pitch.max() > 200
    return codec


# ------------------------------------------------------------------------------------------- the official numbers

@pytest.mark.parametrize("chunk", [0, 10, 50])
def test_mel_agrees_with_official_code(codec, chunk):
    """Names, order of operations, masks, Euler steps and guidance of the flow. A call that is not final encodes the units
    it has and drops the frames of the last 3, as the official code does at each chunk."""
    codec.flow.chunk, drop = chunk, RATIO * LOOKAHEAD
    close(codec.flow(UNITS, codec.voice), EXPECTED[f"mel.chunk{chunk}.final1"])
    for key, units in (("final0", UNITS), ("prefix40", UNITS[:, :40])):
        key = f"mel.chunk{chunk}.final0" if key == "final0" else f"mel.prefix40.chunk{chunk}"
        close(codec.flow.integrate(codec.flow.condition(units)[..., :-drop], codec.voice), EXPECTED[key])


def test_encoder_agrees_with_official_code(codec):
    flow = codec.flow
    sights = [flow.sight(rate, N, None, None) for rate in (1, RATIO)]
    close(flow.encoder(flow.input_embedding(UNITS), N, None, *sights, None), EXPECTED["encoder.chunk10.hidden"])
    close(flow.condition(UNITS).transpose(1, 2), EXPECTED["encoder.chunk10.mu"])


def test_vocoder_agrees_with_official_code(codec):
    mel = EXPECTED["mel.chunk50.final1"]
    close(codec.hift.pitch(mel), EXPECTED["hift.f0"])
    close(codec.hift.pitch(mel).repeat_interleave(FRAME, -1)[:, None], EXPECTED["hift.f0_upsampled"])
    close(codec.hift(mel, EXPECTED["hift.source"]), EXPECTED["hift.wav"])


def test_source_agrees_up_to_its_random_draw(codec):
    """The official source draws a phase per overtone and noise. The phases are recovered by least squares; given those, our
    sines are the official ones, and what is left is white and as loud as the noise must be."""
    hift, harmonics = codec.hift, DIMS["hift"]["nb_harmonics"] + 1
    linear = hift.m_source["l_linear"]
    theirs = torch.atanh(EXPECTED["hift.source"][0, 0].double()) - linear.bias.double()
    angle = 2 * np.pi * torch.cumsum(EXPECTED["hift.f0_upsampled"][0, 0].double() / DIMS["sample_rate"], 0)
    angle = angle[:, None] * torch.arange(1, harmonics + 1)
    found = torch.linalg.lstsq(torch.cat([angle.sin(), angle.cos()], 1), theirs[:, None]).solution[:, 0]
    weight = linear.weight[0].double()
    a, b = found[:harmonics] / weight, found[harmonics:] / weight
    torch.testing.assert_close(torch.hypot(a, b), torch.full_like(a, 0.1), atol=0, rtol=5e-3)      # amplitude
    assert torch.atan2(b, a)[0].abs() < 5e-3                                                       # fundamental: from phase 0
    hift.phases = (torch.atan2(b, a) / (2 * np.pi) % 1)[:, None]
    hift.phases[0], hift.noise = 0, torch.zeros_like(hift.noise)
    ours = torch.atanh(hift.source(EXPECTED["hift.f0"])[0, 0].double()) - linear.bias.double()
    left = theirs - ours
    assert left.std().item() == pytest.approx(0.003 * weight.norm().item(), rel=0.02)
    assert (left[1:] * left[:-1]).mean().abs() < 0.02 * left.var() and left[:FRAME].std() < 1.2 * left.std()


def test_source_where_unvoiced(codec):
    """Below 10 Hz there is noise alone, a third of the sines' amplitude."""
    linear = codec.hift.m_source["l_linear"]
    x = torch.atanh(codec.hift.source(torch.full((1, 100), 9.9))) - linear.bias
    assert x.std().item() == pytest.approx(0.1 / 3 * linear.weight.norm().item(), rel=0.02)


# ------------------------------------------------------------------------------------------- streaming

@pytest.mark.parametrize("chunk", [10, 50])
@pytest.mark.parametrize("name", BURSTS)
def test_streamed_mel_is_the_whole_mel(codec, chunk, name):
    """Every cache: keys, values, convolutions, the noise's place. The official code runs over the whole reply at once."""
    codec.flow.chunk, state, mels = chunk, {}, []
    for burst in bursts(BURSTS[name]):
        mels.append(codec.advance(state, burst, final=False))
    mels.append(codec.advance(state, [], final=True))
    close(torch.cat(mels, -1), EXPECTED[f"mel.chunk{chunk}.final1"])


def test_a_short_past_streams_too(codec):
    """A window of 2 chunks: the caches forget what the mask hides, no more and no less."""
    codec.flow.past, state = 20, {}
    whole = codec.flow(UNITS, codec.voice)
    assert (whole - EXPECTED["mel.chunk10.final1"]).abs().max() > 1e-2
    mels = [codec.advance(state, b, False) for b in bursts([10] * N)] + [codec.advance(state, [], True)]
    close(torch.cat(mels, -1), whole)


@pytest.mark.parametrize("chunk", [1, 7, 10])
def test_no_click_where_pieces_join(lively, chunk):
    """The streamed sound against the unbroken one: as long, the same to 0.1 % of its loudness (measured: 0.03 %), no jump
    at a join (0.1 %). The same pieces rendered alone, without what is kept from piece to piece, jump by half of it."""
    lively.flow.chunk = chunk
    whole = lively.decode(UNITS[0])
    pieces = list(lively.stream(bursts([10] * N)))
    streamed = torch.cat(pieces)
    assert len(streamed) == len(whole) == N * RATIO * FRAME and len(pieces) > 4
    joins = torch.tensor([len(p) for p in pieces]).cumsum(0)[:-1]
    jump = lambda wav, at: ((wav[at] - wav[at - 1]) - (whole[at] - whole[at - 1])).abs().max()
    loud = whole.square().mean().sqrt()
    assert (streamed - whole).square().mean().sqrt() < 0.001 * loud and (streamed - whole).abs().max() < 0.01 * loud
    assert jump(streamed, joins) < 0.005 * loud
    mel = lively.flow(UNITS, lively.voice)
    cuts = torch.arange(0, N * RATIO, 20)
    alone = torch.cat([lively.sound({}, mel[..., i:i + 20], True) for i in cuts])
    assert jump(alone, cuts[1:] * FRAME) > 0.5 * loud


def test_two_renderings_are_faded(codec):
    """Had the first rendering of the overlap been off by 0.1, the sound would glide back over 60 ms, without a step."""
    mel, off, pieces = EXPECTED["mel.chunk10.final1"], 0.1, []
    for error in (0, off):
        state = {}
        codec.sound(state, mel[..., :40], False)
        state["held"] = state["held"] + error
        pieces.append(codec.sound(state, mel[..., 40:80], False))
    glide = pieces[1] - pieces[0]
    assert glide[0].item() == pytest.approx(off, rel=1e-3) and not glide[codec.fade * FRAME:].any()
    assert glide.diff().abs().max() < 1.01 * off * np.pi / 2 / (codec.fade * FRAME)


@pytest.mark.parametrize("name", BURSTS)
def test_bursts_do_not_matter(codec, name):
    """Units that come one by one, in tens or all at once sound alike; the first piece comes with the first look-ahead."""
    codec.flow.chunk, taken, first = 7, 0, None
    def count():
        nonlocal taken
        for burst in bursts(BURSTS[name]):
            taken += len(burst)
            yield burst
    pieces = []
    for piece in codec.stream(count()):
        first = first or taken
        pieces.append(piece)
    wav, whole = torch.cat(pieces), codec.decode(UNITS[0])
    assert len(wav) == len(whole) and (wav - whole).abs().max() < 0.01 * whole.abs().max()
    assert first == {"ones": 10, "sevens": 14, "tens": 10, "uneven": 53, "all": N}[name]


def test_chunk_50_costs_what_chunk_2_does(codec):
    """Counted in floating point operations: at most 1.2 times as many. And what a stream remembers stops growing."""
    def size(x):
        x = x.values() if isinstance(x, dict) else x
        return x.numel() if torch.is_tensor(x) else sum(map(size, x)) if not isinstance(x, (int, float)) else 0
    units = torch.randint(0, DIMS["vocab_size"], (50, 7), generator=torch.Generator().manual_seed(0)).tolist()
    codec.flow.chunk, state, flops, held = 7, {}, [], []
    codec.advance(state, units[0][:LOOKAHEAD], False)
    for burst in units:
        with FlopCounterMode(display=False) if len(held) in (1, 49) else nullcontext() as counter:
            codec.sound(state, codec.advance(state, burst, False), False)
        flops.append(counter and counter.get_total_flops())
        held.append(size(state))
    assert 0 < flops[49] <= 1.2 * flops[1]
    assert held[49] == held[20]


def test_beginning_of_a_reply(codec):
    """decode(final=False) returns the part that the rest of the reply leaves as it is."""
    whole, part = codec.decode(UNITS[0]), codec.decode(UNITS[0, :40], final=False)
    assert len(part) == (30 * RATIO - codec.overlap) * FRAME           # 3 chunks of 10, less what waits to be faded
    close(part, whole[:len(part)])
    assert len(codec.decode(UNITS[0, :5], final=False)) == len(codec.decode(UNITS[0, :0])) == 0
    assert list(codec.stream([[], []])) == []


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


# ------------------------------------------------------------------------------------------- files

SPELLINGS = {"plain": lambda n, g, v: {f"{n}.weight": g * v / v.norm(dim=(1, 2), keepdim=True)},
             "old": lambda n, g, v: {f"{n}.weight_g": g, f"{n}.weight_v": v},
             "new": lambda n, g, v: {f"{n}.parametrizations.weight.original0": g, f"{n}.parametrizations.weight.original1": v}}


def respell(folder, spelling="old", prefix="", change=lambda tensors: tensors):
    """The golden files in `folder`, hift.pt written in another spelling of weight norm."""
    for file, start in (("flow.pt", ""), ("hift.pt", prefix)):
        tensors = torch.load(GOLDEN / file, weights_only=True)
        for name in [n.removesuffix(".weight_g") for n in tensors if n.endswith(".weight_g")]:
            tensors |= SPELLINGS[spelling](name, tensors.pop(f"{name}.weight_g"), tensors.pop(f"{name}.weight_v"))
        torch.save(change({start + n: x for n, x in tensors.items()}), folder / file)
    return str(folder)


def widened(tensors):
    """The estimator's attention in heads of 64, as in the release: that is how a folder is opened by its name alone."""
    times = 64 // math.gcd(64, DIMS["estimator"]["attention_head_dim"] * DIMS["estimator"]["num_heads"])
    return {n: torch.cat([x] * times, int(".to_out." in n)) if ".attn1.to_" in n and n.endswith(".weight") else x
            for n, x in tensors.items()}


@pytest.mark.parametrize("spelling, prefix", [("plain", ""), ("old", "generator."), ("new", ""), ("new", "generator.")])
def test_spellings_of_weight_norm(voice, tmp_path, spelling, prefix):
    codec = CosyVoice2.load(respell(tmp_path, spelling, prefix), voice, head_dim=DIMS["estimator"]["attention_head_dim"])
    with torch.no_grad():
        close(codec.hift(EXPECTED["mel.chunk50.final1"], EXPECTED["hift.source"]), EXPECTED["hift.wav"])


@pytest.mark.parametrize("name", ["input_embedding.weight", "encoder.encoders.1.norm_ff.weight", "encoder_proj.bias",
                                  "decoder.estimator.mid_blocks.0.1.1.attn1.to_q.weight", "ups.1.bias", "conv_pre.weight_g",
                                  "conv_post.weight_v", "resblocks.8.activations2.2.alpha", "m_source.l_linear.weight"])
def test_an_incomplete_file_is_refused(voice, tmp_path, name):
    """Weights load completely, or one line names the file and the tensor: missing, not known, or of another size."""
    def without(tensors):
        return {n: x for n, x in tensors.items() if n != name}
    def renamed(tensors):
        return {n + "s" if n == name else n: x for n, x in tensors.items()}
    def longer(tensors):
        return {n: torch.cat([x, x]) if n == name else x for n, x in tensors.items()}
    for change in (without, renamed, longer):
        if (change, name) == (longer, "input_embedding.weight"):
            continue                                      # a larger vocabulary is no mistake
        with pytest.raises(RuntimeError, match=rf"^{tmp_path}/(flow|hift)\.pt.*{name.split('.weight_')[0]}.*$"):
            CosyVoice2.load(respell(tmp_path, change=change), voice, head_dim=DIMS["estimator"]["attention_head_dim"])


def test_load_codec_and_voices(voice, tmp_path):
    """A file is a NanoCodec, a folder CosyVoice 2; a voice comes from .npy, .pt or spk2info.pt, and a wrong one is named."""
    NanoCodec(dim=8, phonemes=["a"]).save(tmp_path / "codec.pt")
    assert isinstance(load_codec(str(tmp_path / "codec.pt")), NanoCodec)
    folder, vector = respell(tmp_path, change=widened), INPUTS["speaker_embedding"]
    with pytest.raises(ValueError, match="no voice: .*spk2info.pt has none; give --voice"):
        load_codec(folder)
    torch.save({"anna": {"embedding": vector}, "ben": {"embedding": -vector}}, tmp_path / "spk2info.pt")
    torch.save(2 * vector, tmp_path / "voice.pt")
    for given, want in ((None, vector), ("ben", -vector), (str(tmp_path / "voice.pt"), 2 * vector), (voice, vector)):
        codec = load_codec(folder, given)
        assert codec.sample_rate == DIMS["sample_rate"] and torch.equal(codec.voice, want)
    with pytest.raises(ValueError, match="carl.*anna, ben"):
        load_codec(folder, "carl")


def test_files_of_another_kind_are_named(voice, tmp_path):
    """Text in the place of tensors, a pickle that would run code, another codec, sizes that do not fit: one error each, with
    the file's name."""
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
    folder = respell(tmp_path / "golden", change=widened)
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
    with pytest.raises(RuntimeError, match="hift.pt is no file of tensors"):
        load_codec(folder, voice)
    assert not (tmp_path / "ran").exists()


# ------------------------------------------------------------------------------------------- ONNX: encode and voice

def write_onnx(path, inputs, outputs, nodes, constants):
    """A tiny network with the released one's input and output names."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    value = lambda name, kind, shape: onnx.helper.make_tensor_value_info(name, kind, shape)
    graph = onnx.helper.make_graph([onnx.helper.make_node(op, i, o, **more) for op, i, o, more in nodes], "tiny",
                                   [value(*i) for i in inputs], [value(*o) for o in outputs],
                                   [onnx.numpy_helper.from_array(np.array(x), name) for name, x in constants.items()])
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=9), path)


def write_tokenizer(folder):
    """A tokenizer whose unit tells the frame's place in its piece, and how loud the 20th mel bin is there (0..5)."""
    float32, int32 = 1, 6                                 # onnx's numbers of the types
    write_onnx(folder / "speech_tokenizer_v2.onnx", [("feats", float32, [1, 128, "T"]), ("feats_length", int32, [1])],
               [("indices", int32, [1, "U"])],
               [("Gather", ["feats", "bin"], ["row"], {"axis": 1}),
                ("Slice", ["row", "zero", "end", "one", "four"], ["fourth"], {}),
                ("Mul", ["fourth", "steps"], ["loud"], {}), ("Floor", ["loud"], ["level"], {}),
                ("Cast", ["level"], ["levels"], {"to": int32}), ("Mul", ["levels", "thousand"], ["high"], {}),
                ("Add", ["feats_length", "round"], ["more"], {}), ("Div", ["more", "by4"], ["count"], {}),
                ("Squeeze", ["count"], ["limit"], {}), ("Range", ["from", "limit", "by"], ["place"], {}),
                ("Add", ["high", "place"], ["indices"], {})],
               {"bin": np.int64(20), "zero": [0], "end": [1 << 30], "one": [1], "four": [4], "steps": np.float32(3),
                "thousand": np.int32(1000), "round": np.int32([3]), "by4": np.int32([4]), "from": np.int32(0), "by": np.int32(1)})


@pytest.mark.parametrize("seconds, places", [(1.01, [(0, 26)]), (30, [(0, 750)]), (30.01, [(0, 700), (50, 101)]),
                                             (70, [(0, 700), (50, 700), (50, 450)])])
def test_encode(tmp_path, seconds, places):
    """The tokenizer gets the log-mel and its length, at most 30 s at a time; overlaps are halved between the pieces."""
    samples = round(16000 * seconds)
    wav = torch.randn(samples, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.1, 1, samples) ** 2
    write_tokenizer(tmp_path)
    units = load_encoder(str(tmp_path))(wav)            # the tokenizer alone: neither decoder nor voice is there
    level = torch.floor(whisper.log_mel_spectrogram(wav, 128)[20, ::4] * 3).long()
    assert units.dtype == torch.long and len(level.unique()) > 2
    assert (units % 1000).tolist() == [p for a, b in places for p in range(a, b)]
    assert (units // 1000).tolist() == level.tolist()


def kaldi_fbank(wav):
    """Kaldi's fbank from its definition: 25 ms frames each 10 ms, no mean, pre-emphasis 0.97, Povey's window, 512-point
    power spectrum, 80 triangles from 20 to 8000 Hz on mel = 1127 ln(1 + f / 700)."""
    x = wav.double().unfold(0, 400, 160)
    x = x - x.mean(1, keepdim=True)
    x = x - 0.97 * torch.cat([x[:, :1], x[:, :-1]], 1)
    power = torch.fft.rfft(x * torch.hann_window(400, periodic=False, dtype=torch.double) ** 0.85, 512).abs()[:, :256] ** 2
    mel = lambda f: 1127 * np.log(1 + f / 700)
    at, edges = torch.tensor(mel(np.arange(256) * 16000 / 512)), torch.linspace(mel(20), mel(8000), 82, dtype=torch.double)
    left, centre, right = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    bank = torch.minimum((at - left) / (centre - left), (right - at) / (right - centre)).clamp(min=0)
    return (power @ bank.T).clamp(min=torch.finfo(torch.float32).eps).log()


def test_voice_from_a_clip(tmp_path):
    """CAM++ gets kaldi's fbank less its mean, and its answer is the voice: a real clip, a network of one layer."""
    pytest.importorskip("kaldi_native_fbank")
    clip = ROOT / "tests/data/jfk.flac"
    wav = torch.from_numpy(soundfile.read(clip, dtype="float32")[0])
    want = kaldi_fbank(wav)
    want = want - want.mean(0)
    torch.testing.assert_close(fbank(wav).double(), want, atol=2e-3, rtol=1e-3)
    weight = torch.randn(80, 192, generator=torch.Generator().manual_seed(0)).numpy()
    write_onnx(tmp_path / "campplus.onnx", [("input", 1, [1, "T", 80])], [("output", 1, [1, 192])],
               [("Abs", ["input"], ["size"], {}), ("ReduceMean", ["size"], ["mean"], {"axes": [1], "keepdims": 0}),
                ("MatMul", ["mean", "weight"], ["output"], {})], {"weight": weight})
    codec = CosyVoice2.load(respell(tmp_path), str(clip), head_dim=DIMS["estimator"]["attention_head_dim"])
    want = want.abs().mean(0) @ torch.from_numpy(weight).double()
    torch.testing.assert_close(codec.voice[0].double(), want, atol=1e-2, rtol=1e-3)


def test_what_is_missing_is_named(codec, tmp_path, monkeypatch):
    """No tokenizer in the folder, no onnxruntime, no kaldi-native-fbank: one line each that names the mend."""
    with pytest.raises(FileNotFoundError, match="speech_tokenizer_v2.onnx"):
        codec.encode(torch.zeros(16000))
    (tmp_path / "x.onnx").touch()
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(RuntimeError, match="pip install onnxruntime"):
        onnx_session(str(tmp_path / "x.onnx"))
    monkeypatch.setitem(sys.modules, "kaldi_native_fbank", None)
    with pytest.raises(RuntimeError, match="pip install kaldi-native-fbank"):
        fbank(torch.zeros(16000))


# ------------------------------------------------------------------------------------------- the real commands

def run(*words, code=0):
    done = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == code, f"{words}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stderr if code else done.stdout


def test_the_real_commands_with_a_folder(voice, tmp_path):
    """data.py needs the folder's tokenizer alone, sample.py and eval.py need a voice and say so; a corpus of one's own has no
    answers to look for, and any text as the name of a dialogue."""
    (tmp_path / "cosy").mkdir()
    folder, corpus, checkpoint = respell(tmp_path / "cosy", change=widened), tmp_path / "corpus", str(tmp_path / "checkpoint")
    write_tokenizer(tmp_path / "cosy")
    wav = np.random.default_rng(0).normal(0, 0.1, 24000)
    soundfile.write(tmp_path / "q.wav", wav, 16000)
    rows = [{"id": f"../{i}", "speech": "q.wav", "replies": "It is a question.", "reply_speech": "q.wav"} for i in range(12)]
    (tmp_path / "dialogues.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run("data.py", "config/data_folder.py", "--path", tmp_path / "dialogues.jsonl", "--audio_root", tmp_path, "--codec", folder,
        "--held_out", 0.3, "--processes", 1, "--out_dir", corpus)
    from data import load_corpus
    assert [u % 1000 for u in load_corpus(str(corpus), "train")[0]["units"][0]] == [*range(38)]

    omni, *tokenizers = Omni.from_backbones("tiny/qwen2", "tiny/whisper.pt", "tiny/qwen2")
    omni.save_pretrained(checkpoint, *tokenizers)
    common = ["--ckpt", checkpoint, "--codec", folder, "--max_units", 30]
    sample = ["sample.py", *common, "--wav", tmp_path / "q.wav", "--out", tmp_path / "reply.wav"]
    assert "give --voice" in run(*sample, code=2).strip().splitlines()[-1] and not (tmp_path / "reply.wav").exists()
    printed = run(*sample, "--voice", voice)
    reply, rate = soundfile.read(tmp_path / "reply.wav")
    assert rate == 24000 and len(reply) == 30 * RATIO * FRAME and "the speech was cut at 30 units" in printed
    run("eval.py", *common, "--voice", voice, "--corpus", corpus, "--dialogues", 1, "--out", tmp_path / "eval")
    figures = json.loads((tmp_path / "eval/eval.json").read_text())
    assert figures["turns"] == figures["cut"] == 1 and "wer_bigram" in figures and "s2t" not in figures
    assert {p.name for p in (tmp_path / "eval").iterdir()} == {"eval.json", "gallery.md", "0-1-question.ogg", "0-1-reply.ogg"}
