"""The order of text rows and units: by hand, by equation 5, and in training as in streaming. It protects the
one thing that no loss curve shows: that the speech LM is trained on what it will read when it talks."""
import math

import pytest
import torch
from conftest import generate

from model import IGNORE, speech_sequence
from omni import engine
from omni.audio import UNIT_VOCAB
from omni.engine import FIRST

SEP, UNIT_0, EOS = 900, 1000, 800                     # made-up ids: text below 800, units from 1000
_ = IGNORE


def unit_ids(first, last):
    """u_first .. u_last, counted from 1 as in the paper; here unit u_i has the id 1000 + i."""
    return list(range(1000 + first, 1001 + last))


def layout(n_text, n_units, R=3, W=10):
    """The sequence for text ids 0, 1, 2, ... and units 1, 2, 3, ..."""
    return speech_sequence(list(range(n_text)), list(range(1, n_units + 1)), SEP, UNIT_0, EOS, R, W)


def test_worked_example():
    """The layout of reference/architecture.md, position by position: 7 rows, 35 units, R = 3, W = 10."""
    ids, rows, labels = layout(7, 35)
    assert ids == [0, 1, 2, *unit_ids(1, 10), 3, 4, 5, *unit_ids(11, 20), 6, SEP, *unit_ids(21, 35)]
    assert rows == [0, 1, 2, *[-1] * 10, 3, 4, 5, *[-1] * 10, 6, -1, *[-1] * 15]
    assert labels == [_, _, *unit_ids(1, 10), _, _, _, *unit_ids(11, 20), _, _, *unit_ids(21, 35), EOS]
    assert len(ids) == 43
    assert sum(x != IGNORE for x in labels) == 36


def test_units_run_out_before_the_text():
    """A last burst that is short, bursts that are empty, and EOS only after `<sep>`."""
    assert layout(7, 12) == ([0, 1, 2, *unit_ids(1, 10), 3, 4, 5, 1011, 1012, 6, SEP],
                             [0, 1, 2, *[-1] * 10, 3, 4, 5, -1, -1, 6, -1],
                             [_, _, *unit_ids(1, 10), _, _, _, 1011, 1012, _, _, EOS])
    assert layout(7, 8) == ([0, 1, 2, *unit_ids(1, 8), 3, 4, 5, 6, SEP],
                            [0, 1, 2, *[-1] * 8, 3, 4, 5, 6, -1],
                            [_, _, *unit_ids(1, 8), _, _, _, _, _, EOS])
    assert layout(3, 2) == ([0, 1, 2, SEP, 1001, 1002],
                            [0, 1, 2, -1, -1, -1],
                            [_, _, _, 1001, 1002, EOS])


@pytest.mark.parametrize("R, W", [(3, 10), (1, 5), (2, 4)])
def test_equation_5(R, W):
    """Unit i is predicted once, right before it is read, from exactly the rows that equation 5 allows; then
    one EOS."""
    for N in range(1, 21):
        for U in range(0, 121, 1 if N < 5 else 7):
            ids, rows, labels = layout(N, U, R, W)
            assert len(ids) == len(rows) == len(labels) == N + 1 + U
            place = {ids[p]: p for p in range(len(ids)) if ids[p] > UNIT_0}
            assert list(place) == unit_ids(1, U)
            for i in range(1, U + 1):
                seen = sum(r >= 0 for r in rows[:place[1000 + i]])
                assert seen == min(math.floor((i - 1) / W + 1) * R, N), (N, U, i)
            targets = {p: label for p, label in enumerate(labels) if label != IGNORE}
            assert targets == {p - 1: unit for unit, p in place.items()} | {len(ids) - 1: EOS}
            assert ids.count(SEP) == 1
            assert [r for r in rows if r >= 0] == list(range(N))
            assert [i for i in ids if i < EOS] == list(range(N))


def stream(omni, prompt, text, units, monkeypatch):
    """Run the streaming code and force every choice that it makes.

    Returns (the speech LM's inputs (M, D), the positions at which it chose, what it yielded, {size of a
    vocabulary: the choices that it did not make}).
    """
    forced = {len(omni.lm_head.weight): list(text), UNIT_VOCAB + 1: [*units, UNIT_VOCAB]}    # the last: EOS
    monkeypatch.setattr(engine, "sample", lambda logits, *_: torch.tensor([forced[logits.shape[1]].pop(0)]))
    trace = []
    events = list(generate(omni, prompt, trace=trace))
    inputs = [x for x, _ in trace]
    ends = torch.tensor([len(x) for x in inputs]).cumsum(0)
    return torch.cat(inputs), (ends - 1).tolist(), events, forced


CASES = [(3, 10, N, extra) for N in range(1, 21) for extra in [*range(11), 60]]
CASES += [(R, W, N, extra) for R, W in ((1, 5), (2, 4)) for N in range(1, 8) for extra in (0, 1, W)]


@torch.no_grad()
def test_streaming_reads_what_training_laid_out(tiny, monkeypatch):
    """THE parity test: the inputs of the cached, streaming speech LM are the training sequence, row for row,
    and it chooses exactly where training has a label. The states come from one uncached pass over prompt and
    text.

    Cases start at as many units as the bursts before `<sep>` hold. With fewer, the training layout has short
    bursts; streaming never makes them, since EOS is masked inside a burst and was never trained there.
    """
    omni, tokenizer, _ = tiny
    generator, end = omni.speech_generator, omni.config["eos_token_id"]
    prompt = tokenizer("What is five plus two?")["input_ids"]
    whole = [(37 * i + 11) % 350 for i in range(19)]
    for R, W, N, extra in CASES:
        monkeypatch.setattr(omni, "R", R)
        monkeypatch.setattr(omni, "W", W)
        text = whole[:N - 1] + [end]
        units = [(811 * i + 5) % 6561 for i in range(W * (math.ceil(N / R) - 1) + extra)]
        inputs, chosen, events, left = stream(omni, prompt, text, units, monkeypatch)
        ids, rows, labels = speech_sequence(text, units, generator.sep, generator.unit_offset, generator.eos,
                                            R, W)
        hidden = omni.model(input_ids=torch.tensor([prompt + text]), use_cache=False).last_hidden_state[0]
        expected = generator.embed(torch.tensor(ids))
        at = [p for p, r in enumerate(rows) if r >= 0]
        expected[at] = generator.fuse(hidden[len(prompt) - 1:-1], torch.tensor(text))      # h_i predicted y_i
        case = f"R {R}, W {W}, {N} rows, {len(units)} units"
        assert inputs.shape == expected.shape == (N + 1 + len(units), 32), case
        torch.testing.assert_close(inputs, expected, atol=1e-5, rtol=1e-5, msg=lambda m: f"{case}: {m}")
        assert chosen == [p for p, label in enumerate(labels) if label != IGNORE], case
        assert [x for kind, x in events if kind == "text"] == text[:-1], case
        assert [unit for kind, burst in events if kind == "units" for unit in burst] == units, case
        assert "note" not in dict(events), case
        assert not any(left.values()), case


@torch.no_grad()
def test_no_eos_inside_a_burst(tiny, monkeypatch):
    """EOS cannot be drawn inside a burst: it is masked there, and only there."""
    omni, tokenizer, _ = tiny
    seen, text = [], iter([5, 6, 7, 8, omni.config["eos_token_id"]])

    def sample(logits, *_):
        if logits.shape[1] == len(omni.lm_head.weight):
            return torch.tensor([next(text)])
        allowed = logits[0] > -torch.inf
        seen.append((int(allowed[:UNIT_VOCAB].sum()), bool(allowed[UNIT_VOCAB])))
        return torch.tensor([UNIT_VOCAB if allowed[UNIT_VOCAB] else 0])                     # EOS, or unit 0

    monkeypatch.setattr(engine, "sample", sample)
    events = list(generate(omni, tokenizer("Hello")["input_ids"]))
    assert seen == [(6561, False)] * 10 + [(6561, True)]               # 5 rows: one burst, then EOS at once
    assert [x for kind, x in events if kind == "units"] == [[0] * FIRST, [0] * (10 - FIRST)]
