"""eval.py judges what it can and says what it leaves out. It protects the figures: word error rates, answers
that occur, the judge's language model; silent replies and other corpora neither stop nor distort them."""
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch

import eval as evaluation
from eval import EvalConfig, find_originals, judge_speech, judge_text, language_model, occurs, word_error_rate
from omni.audio import wav_bytes


def turn(**more):
    """A turn that was answered right, aloud and heard well."""
    return {"id": "a", "dialogue": 0, "turn": 0, "topic": "capitals", "question": "Capital of France?",
            "reference": "It is Paris.", "answer": "Paris", "text": "It is Paris.", "notes": [],
            "wav": np.full(16000, 0.1, np.float32), "heard_bigram": "it is paris",
            "heard_word_loop": "its perished", "first_text": 0.1, "first_audio": 0.2, "seconds": 0.5} | more


def row(seconds=1.0):
    wav = 0.1 * np.random.default_rng(0).standard_normal(int(16000 * seconds))
    speech = [{"bytes": wav_bytes(wav), "path": None}]
    return {"id": "a", "users": ["Capital of France?"], "speech": speech, "topics": ["capitals"],
            "replies": ["It is Paris."], "answers": ["Paris"]}


@pytest.mark.parametrize("reference,hypothesis,errors,length", [
    ("The cat sat down.", "the cat sat", 1, 4),
    ("It's red.", "it is red", 0, 3),                          # contractions and punctuation do not count
    ("Seven and five is twelve.", "7 and 5 is 12", 0, 5),      # nor do digits
    ("red", "a red hat", 2, 1),
    ("", "", 0, 1),
], ids=str)
def test_word_error_rate(reference, hypothesis, errors, length):
    assert word_error_rate([reference], [hypothesis]) == pytest.approx(errors / length)


def test_word_error_rate_is_over_all_words():
    """Errors are summed before they are divided: a mean over sentences would be 1/3. Silence is no error."""
    references, hypotheses = ["no", "one red cat sat down", ""], ["yes", "one red cat sat down", ""]
    assert word_error_rate(references, hypotheses) == pytest.approx(1 / 6)


@pytest.mark.parametrize("answer,text,expected", [
    ("Paris", "It is PARIS.", True), ("New York", "In new york!", True), ("York New", "In New York", False),
    ("car", "A carpet", False), ("", "", False),
    ("twelve", "one two", False), ("nine", "ten, nine, eight", True)])     # the normalizer joins numbers
def test_occurs(answer, text, expected):
    assert occurs(answer, text) is expected


def test_language_model_is_a_distribution():
    """After each word, the bigrams that were seen and those by backing off have probability 1 together."""
    lines = language_model(["The red cat.", "The red dog sat.", "A cat sat."], True).splitlines()
    bigrams = [line.split() for line in lines[lines.index("\\2-grams:") + 1:lines.index("\\end\\") - 1]]
    unigrams = [line.split() for line in lines[lines.index("\\1-grams:") + 1:lines.index("\\2-grams:") - 1]]
    p = {word: 10 ** float(log_p) for log_p, word, *_ in unigrams}
    p["<s>"] = 1 - sum(p.values())                             # never predicted: written as -99
    for _, word, *back_off in unigrams:
        if word != "</s>":
            seen = {second: 10 ** float(log_p) for log_p, first, second in bigrams if first == word}
            rest = sum(p[other] for other in p if other not in seen)
            assert sum(seen.values()) + 10 ** float(back_off[0]) * rest == pytest.approx(1, abs=1e-3)
    loop = language_model(["The red cat.", "A cat sat."], False).splitlines()
    assert loop[1] == "ngram 1=7" and f"{math.log10(1 / 7):.4f} cat" in loop and "\\2-grams:" not in loop


def test_an_original_is_compared_only_where_there_is_one():
    original = {"heard_bigram_original": "it is paris", "heard_word_loop_original": "it is parish"}
    alone, compared = judge_speech([turn()], []), judge_speech([turn(**original)], [])
    assert alone == {"new_replies": 1, "wer_bigram": 0, "s2s_bigram": 100, "s2s_word_loop": 0,
                     "wer_word_loop": pytest.approx(100)}
    assert compared["wer_bigram_excess"] == 0 and compared["s2s_word_loop_original"] == 0
    assert compared["wer_word_loop_excess"] == compared["wer_word_loop"] - compared["wer_word_loop_original"]


def test_a_corpus_without_answers_has_no_figures_of_them():
    assert judge_text([turn(answer="")], None) == {"turns": 1, "exact": 100}
    assert judge_text([turn()], [True]) == {"turns": 1, "exact": 100, "exact_typed": 100, "s2t": 100}
    assert "s2s_bigram" not in judge_speech([turn(answer="")], [])


@pytest.mark.parametrize("meta,llm,expected,left_out", [
    ({"source": "tiny", "tts": None, "assistant": "v"}, None, ("tiny/qwen2", "v"), ""),
    ({"source": "tiny", "tts": "say {wav}", "assistant": "v"}, None, ("tiny/qwen2", None), "synthesizer"),
    ({"source": "text", "tts": None, "assistant": "v"}, "tiny/qwen2", ("tiny/qwen2", None), "synthesizer"),
    ({"source": "folder", "tts": None, "assistant": "v"}, None, (None, None), "exact_typed is left out"),
    (None, None, (None, None), "exact_typed is left out"),     # a datasets folder of the same columns
], ids=str)
def test_only_the_embedded_corpus_says_what_to_compare_with(tmp_path, capsys, meta, llm, expected, left_out):
    """Another corpus must not be judged with the embedded world's Qwen2 and synthesizer silently."""
    if meta:
        (tmp_path / "meta.json").write_text(json.dumps(meta))
    assert find_originals(EvalConfig(corpus=str(tmp_path), llm=llm)) == expected
    assert left_out in capsys.readouterr().out


def test_a_missing_text_model_is_not_looked_for_on_the_hub(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder"):
        find_originals(EvalConfig(corpus=str(tmp_path), llm="nobody/nothing"))


@pytest.mark.parametrize("pad_audio,frames", [(False, 100), (True, 3000)])
def test_questions_are_padded_as_in_training(monkeypatch, pad_audio, frames):
    seen = []

    def answer(omni, tokenizer, codec, mels, replies, sampling):
        seen.extend(mel.shape[1] for mel in mels)
        return "It is Paris.", np.zeros(0, np.float32), [], (0.1, None, 0.2)
    monkeypatch.setattr(evaluation, "answer", answer)
    encoder = SimpleNamespace(n_mels=80)
    omni = SimpleNamespace(model=SimpleNamespace(speech_encoder=encoder), pad_audio=pad_audio,
                           speech_generator=SimpleNamespace(gate=torch.nn.Identity()))
    turns, gate = evaluation.answer_all(omni, None, None, [row()], None)
    assert seen == [frames] and len(turns) == 1 and len(gate) == 0


@pytest.mark.parametrize("keep,spoken,files", [
    (6, True, {"0-1-question.ogg", "0-1-reply.ogg"}),
    (6, False, {"0-1-question.ogg"}),                          # an early checkpoint: no kept reply has sound
    (0, True, set()),
], ids=("spoken", "silent", "none kept"))                     # a set's own text differs between processes
def test_the_picture_needs_no_spoken_reply(tmp_path, monkeypatch, capsys, keep, spoken, files):
    """With --runs the losses are drawn, whether or not there is a reply to draw."""
    run, out = tmp_path / "run", tmp_path / "out"
    run.mkdir(), out.mkdir()
    log = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}, {"step": 2, "val_loss": 1.5}]
    (run / "meta.json").write_text(json.dumps({"log": log}))
    monkeypatch.setattr(evaluation.checkpoint, "newest_checkpoint", str)
    cfg = EvalConfig(out=str(out), runs=(str(run),), keep=keep)
    said = turn() if spoken else turn(wav=np.zeros(0, np.float32), heard_bigram="", first_audio=None)
    evaluation.write(cfg, [row()], [said], judge_text([said], None), 16000)
    assert {path.name for path in out.iterdir()} == files | {"eval.json", "gallery.md", "demo.png"}
    for name in files:
        assert len(soundfile.read(out / name)[0]) > 8000
    assert (out / "demo.png").stat().st_size > 5000
    assert ("a question with its reply" in capsys.readouterr().out) == (keep > 0 and spoken)
    figures = json.loads((out / "eval.json").read_text())
    assert figures["exact"] == 100 and "wav" not in figures["replies"][0]
