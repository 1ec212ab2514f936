"""Many replies at once are what they are alone. It protects whoever shares an engine: neither company, nor
joining, leaving, cancelling, nor what a row held before changes a token."""
from types import SimpleNamespace

import pytest
import torch
from conftest import ROWS, generate, load
from torch.utils._python_dispatch import TorchDispatchMode

from data import Dialogues
from model import SPEECH, expand_speech
from omni import engine
from omni.engine import FIRST, Engine, Packed, quicken

LIMITS = {"max_tokens": 9, "max_units": 77, "eos": -1}


@pytest.fixture(scope="module")
def prompts(tiny):
    """(ids, clips) of three dialogues of one, two and three turns."""
    omni, *tokenizers = tiny
    dialogues = Dialogues(ROWS, *tokenizers, omni.model.speech_encoder.n_mels, omni.R, omni.W)
    return [dialogues.prompt(i) for i in range(3)]


def collect(stream):
    """{reply: [(kind, x)]} of what a stream yields; bursts are put together."""
    events = {}
    for reply, kind, x in stream:
        if kind == "round":
            continue
        mine = events.setdefault(reply, [])
        if kind == "units" and mine and mine[-1][0] == "units":
            mine[-1] = kind, mine[-1][1] + x
        else:
            mine.append((kind, x))
    return events


def alone(omni, prompt, limits=LIMITS, **options):
    """The reply that an engine of its own makes."""
    maker = Engine(omni, **limits)
    reply = maker.submit(*prompt, **options)
    return collect(maker.stream())[reply]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("rows", [1, 2, 5])
def test_company_changes_no_token(tiny, prompts, rows, temperature):
    """Ten replies share a few rows, each with its own random numbers: the same events as alone."""
    maker, asked = Engine(tiny[0], rows, **LIMITS), []
    for n in range(10):
        options = {"temperature": temperature, "seed": n, "speak": n != 4}
        asked.append((maker.submit(*prompts[n % 3], **options), prompts[n % 3], options))
    events = collect(maker.stream())
    assert len(maker.free) == rows and not maker.active and not maker.waiting
    for reply, prompt, options in asked:
        assert events[reply] == alone(tiny[0], prompt, **options)
        assert reply.done and len(reply.units) == (77 if options["speak"] else 0)


@pytest.mark.parametrize("pieces, units", [(1, FIRST), (4, 30)])
def test_joining_and_cancelling_in_the_middle(tiny, prompts, pieces, units):
    """A reply joins when another has begun, one is cancelled in the middle of its first burst or after its
    third: the others go on, nothing more comes of it, and its row serves the next."""
    maker = Engine(tiny[0], 2, **LIMITS)
    first = maker.submit(*prompts[0], temperature=0.0)
    second = maker.submit(*prompts[1], temperature=0.0)
    third, events, heard = None, {}, 0
    for reply, kind, x in maker.stream():
        assert not (reply is second and second.done and kind != "done")
        events.setdefault(reply, []).append((kind, x))
        if reply is first and third is None:
            third = maker.submit(*prompts[2], temperature=0.0)
        if reply is second and kind == "units":
            heard += 1
            if heard == pieces:
                maker.cancel(second)
                assert second.row in maker.free
    for reply, prompt in ((first, prompts[0]), (third, prompts[2])):
        merged = collect((reply, *event) for event in events[reply])
        assert merged[reply] == alone(tiny[0], prompt, temperature=0.0)
    whole = alone(tiny[0], prompts[1], temperature=0.0)
    assert second.units == [unit for kind, x in whole if kind == "units" for unit in x][:units]
    assert sorted(maker.free) == [0, 1]


def test_cancelling_what_waits_and_what_nobody_listens_to(tiny, prompts):
    maker = Engine(tiny[0], 1, **LIMITS)
    waiting = maker.submit(*prompts[0])
    maker.cancel(waiting)
    assert waiting.done and not list(maker.stream())
    for _ in maker.generate(*prompts[0]):
        break                                         # the listener leaves after the first token
    assert maker.free == [0] and not maker.active


def test_what_was_read_is_not_read_again(tiny, prompts, monkeypatch):
    """The third turn of a conversation: the engine that held the first two reads the new positions only, and
    says what an engine says that reads everything."""
    omni, (ids, clips) = tiny[0], prompts[2]
    step, read = engine.Decoder.step, []

    def count(self, x, rows, counts):
        if self.network is omni.model:
            read.append(max(counts))
        return step(self, x, rows, counts)

    monkeypatch.setattr(engine.Decoder, "step", count)
    maker = Engine(omni, 2, **LIMITS)
    speech = [i for i, token in enumerate(ids) if token < 0]
    two_turns = ids[:speech[2]]                       # up to the third clip
    list(maker.generate(two_turns, clips[:2], temperature=0.0))
    list(maker.generate(*prompts[0], temperature=0.0))         # another conversation takes the other row
    read.clear()
    again = list(maker.generate(ids, clips, temperature=0.0))
    reread = read[0]
    read.clear()
    assert again == list(generate(omni, ids, clips, temperature=0.0, **LIMITS))
    assert reread == read[0] - len(expand_speech(two_turns, [clip.shape[1] for clip in clips[:2]]))


def test_another_clip_of_the_same_length_is_read(tiny, prompts):
    """Positions of speech look alike: a row that read another clip must read this one."""
    ids, clips = prompts[0]
    other = [clip.flip(1) for clip in clips]
    maker = Engine(tiny[0], 1, **LIMITS)
    replies = [list(maker.generate(ids, some, temperature=0.0)) for some in (clips, other, clips)]
    assert replies[0] == replies[2] == list(generate(tiny[0], ids, clips, temperature=0.0, **LIMITS))
    assert replies[1] == list(generate(tiny[0], ids, other, temperature=0.0, **LIMITS))


def test_given_texts_beside_questions(tiny, prompts):
    """Stage 1 TTS's samples: texts that are said as they are, longer than max_tokens, beside a question."""
    limits = {"max_tokens": 9, "max_units": 77}       # a given text ends with the checkpoint's own end
    maker = Engine(tiny[0], 3, **limits)
    texts = [[5, 6, 7, 8], [9] * 14]
    given = [maker.submit([1, SPEECH], reply=text, temperature=0.0) for text in texts]
    asked = maker.submit(*prompts[0], temperature=0.0)
    events = collect(maker.stream())
    assert [reply.text for reply in given] == texts
    for reply, text in zip(given, texts):
        assert events[reply] == alone(tiny[0], [[]], limits, reply=text, temperature=0.0)
    assert events[asked] == alone(tiny[0], prompts[0], limits, temperature=0.0)


def test_caches_grow_where_a_conversation_is_long(tiny, prompts):
    """A clip of 130 s is 1,300 positions, beside a short question whose row holds something already."""
    omni = tiny[0]
    long = prompts[0][0], [prompts[0][1][0].repeat(1, 130)]
    maker = Engine(omni, 2, **LIMITS)
    list(maker.generate(*prompts[2], temperature=0.0))
    before = maker.llm.keys.shape[3]
    asked = [maker.submit(*prompt, temperature=0.0) for prompt in (prompts[2], long)]
    events = collect(maker.stream())
    assert before == 1024 and maker.llm.keys.shape[3] == 2048
    for reply, prompt in zip(asked, (prompts[2], long)):
        assert events[reply] == alone(omni, prompt, temperature=0.0)


def test_a_conversation_that_does_not_fit_is_refused():
    omni = load()[0].eval()
    omni.config["max_position_embeddings"] = 40
    maker = Engine(omni, max_tokens=10)
    with pytest.raises(ValueError, match="has 31 positions, and the LLM has room for 30"):
        maker.submit([1] * 31)
    assert not maker.waiting


def test_thousand_replies_keep_memory_flat(tiny):
    """The caches are made once, and a finished reply leaves nothing behind but what its row has read."""
    maker = Engine(tiny[0], 4, max_tokens=4, max_units=12, eos=-1)
    size = maker.llm.keys.numel(), maker.speech_lm.keys.numel()
    for n in range(1000):
        maker.submit([1 + n % 200, 2, 3], temperature=0.0)
    assert sum(kind == "done" for _, kind, _ in maker.stream()) == 1000
    assert (maker.llm.keys.numel(), maker.speech_lm.keys.numel()) == size
    assert all(len(keys) < 10 for keys in maker.cached) and not maker.active


@pytest.mark.parametrize("packed", [False, True])
def test_a_quickened_model_says_the_same(prompts, monkeypatch, capsys, packed):
    """In fp32, whether packing wins or loses when it is timed. What hears is packed in either case."""
    omni, *_ = load()
    omni.eval()
    expected = [alone(omni, prompt, temperature=0.0) for prompt in prompts]
    medians = iter([5, 9, 1] if packed else [5, 1, 9])         # hearing, plain, packed

    def time_it(timer, min_run_time):
        timer.timeit(2)
        return SimpleNamespace(median=next(medians))
    monkeypatch.setattr(engine.Timer, "blocked_autorange", time_it)
    quicken(omni, [torch.float32])
    assert ("decoding in float32, weights packed" in capsys.readouterr().out) == packed
    assert isinstance(omni.speech_generator.model.model.layers[0].mlp.down_proj, Packed) == packed
    assert isinstance(omni.model.speech_encoder.blocks[0].mlp[0], Packed)
    for prompt, said in zip(prompts, expected):
        assert alone(omni, prompt, temperature=0.0) == said


def test_a_quickened_model_keeps_what_lora_learned(prompts):
    """A checkpoint in the middle of a LoRA run answers as it does in training."""
    omni, *_ = load()
    plain = alone(omni.eval(), prompts[0], temperature=0.0)
    omni.add_lora(2)
    for name, p in omni.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, generator=torch.Generator().manual_seed(len(name)))
    expected = alone(omni, prompts[0], temperature=0.0)
    assert expected != plain
    assert alone(quicken(omni, [torch.float32]), prompts[0], temperature=0.0) == expected


def test_what_is_moved_to_a_gpu_arrives_in_bf16():
    """No parameter is on the device in fp32 first, which would take twice the memory. (The meta device stands
    in for a GPU: it times nothing and has no memory.)"""
    omni, seen = load()[0], []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **kwargs or {})
            if torch.is_tensor(result) and result.is_meta and result.dtype != torch.bfloat16:
                seen.append(result.numel())
            return result

    with Watch():
        quicken(omni.eval(), device="meta")
    assert {(p.device.type, p.dtype) for p in omni.parameters()} == {("meta", torch.bfloat16)}
    networks = omni.model, omni.speech_generator.model.model
    assert seen == [len(network.rotary_emb.inv_freq) for network in networks]


def test_bf16_leaves_rotations_in_fp32():
    """A frequency of RoPE that is rounded to bf16 is off by up to 0.2 %, so positions a thousand apart would
    be turned by a radian. Cosines at position 2,000 are those of the model in fp32."""
    tables = []
    for precision in (torch.float32, torch.bfloat16):
        omni, *_ = load()
        quicken(omni.eval(), [precision])
        x = torch.zeros(1, dtype=torch.float32)
        tables.append(omni.model.rotary_emb(x, torch.tensor([[2000]])))
    torch.testing.assert_close(*tables, rtol=0, atol=0)


def test_a_quickened_model_in_bf16(prompts):
    """The first logits of the speech LM are those in fp32 to bf16's three digits, but not the very same."""
    logits = []
    for precision in (torch.float32, torch.bfloat16):
        omni, *_ = load()
        quicken(omni.eval(), [precision])
        assert omni.lm_head.weight.dtype == precision
        trace = []
        list(Engine(omni, trace=trace, **LIMITS).generate(*prompts[0], temperature=0.0))
        logits.append(trace[0][1][torch.isfinite(trace[0][1])])
    difference = (logits[0] - logits[1]).abs().max() / logits[0].abs().max()
    assert 0 < difference < 0.03


def test_hearing_has_a_precision_of_its_own(prompts, monkeypatch):
    """A model that hears in bf16 and decodes in fp32, which is how CPUs with bf16 have the tiny one: its
    first logits are those in fp32, but for what hearing rounds."""
    logits = []
    for hearing in (torch.float32, torch.bfloat16):
        omni, *_ = load()
        monkeypatch.setattr(engine, "fastest", lambda what, *_: (
            hearing if what == "hearing" else torch.float32, False))
        quicken(omni.eval())
        precisions = {p.dtype for p in omni.model.speech_encoder.parameters() if p.ndim == 1}
        assert precisions == {hearing} and omni.lm_head.weight.dtype == torch.float32
        trace = []
        list(Engine(omni, trace=trace, **LIMITS).generate(*prompts[0], temperature=0.0))
        logits.append(trace[0][1][torch.isfinite(trace[0][1])])
    difference = (logits[0] - logits[1]).abs().max() / logits[0].abs().max()
    assert 0 < difference < 0.03


def test_the_first_burst_is_whole_where_many_talk(tiny, prompts):
    """One or two hear a short piece first; of three, the others' pieces would be made before the second."""
    for rows in (2, 3):
        maker, first = Engine(tiny[0], rows, **LIMITS), {}
        asked = [maker.submit(*prompts[n % 3], temperature=0.0) for n in range(rows)]
        for reply, kind, x in maker.stream():
            if kind == "units":
                first.setdefault(reply, len(x))
        assert [first[reply] for reply in asked] == rows * [FIRST if rows == 2 else tiny[0].W]
