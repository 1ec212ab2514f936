"""eval.py judges what it can and says what it leaves out. It protects the figures: word error rates, answers
that occur, the judge's language model; silent replies and other corpora neither stop nor distort them."""
import json
import math
from multiprocessing.pool import ThreadPool
from types import SimpleNamespace

import librosa
import numpy as np
import pytest
import soundfile
import torch
from conftest import load
from datasets import Dataset

import eval as evaluation
from eval import EvalConfig, find_originals, judge_speech, judge_text, language_model, occurs, word_error_rate
from omni.audio import wav_bytes
from omni.espeak import ASSISTANT, plain, speak


def turn(**more):
    """A turn that was answered right, aloud and heard well."""
    return {"id": "a", "dialogue": 0, "turn": 0, "topic": "capitals", "question": "Capital of France?",
            "reference": "It is Paris.", "spoken": "It is <stress>Paris</stress>.", "answer": "Paris",
            "text": "It is Paris.", "notes": [],
            "wav": np.full(16000, 0.1, np.float32), "heard_bigram": "it is paris",
            "heard_word_loop": "its perished"} | more


def row(seconds=1.0):
    wav = 0.1 * np.random.default_rng(0).standard_normal(int(16000 * seconds))
    speech = [{"bytes": wav_bytes(wav), "path": None}]
    return {"id": "a", "users": ["Capital of France?"], "speech": speech, "topics": ["capitals"],
            "replies": ["It is Paris."], "spoken": ["It is <stress>Paris</stress>."], "answers": ["Paris"]}


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


def test_what_is_not_understood_is_counted_by_itself():
    """Two good questions, one answered; three unclear ones, two of them caught; one good question refused."""
    refusal = "I did not understand that."
    unclear = {"topic": "unclear", "reference": refusal, "answer": "understand"}
    turns = [turn(), turn(text=refusal), turn(text=refusal, **unclear), turn(text=refusal, **unclear),
             turn(text="It is Paris.", **unclear)]
    assert judge_text(turns, None) == {
        "turns": 5, "exact": 50, "unclear": 3, "caught": pytest.approx(200 / 3), "refused": 50, "s2t": 60}
    assert "caught" not in judge_text(turns[:2], None)


def test_memory_is_counted_by_itself():
    turns = [turn(), turn(topic="recalling"), turn(topic="recalling", text="It is Rome.")]
    result = judge_text(turns, None)
    assert result["needing_history"] == 2 and result["exact_needing_history"] == 50


@pytest.mark.parametrize("more", [["--topics", "colors"], ["--topics", "colors,counting"], []], ids=str)
def test_topics_keep_only_their_turns(tmp_path, monkeypatch, more):
    """The whole dialogue is held, as its earlier turns may matter, but only these turns are judged."""
    talks = [["capitals", "colors"], ["capitals"], ["counting", "colors"], ["telling"]]
    rows = [row() | {"id": f"d{d}", "topics": topics} for d, topics in enumerate(talks)]

    def answer_all(omni, tokenizer, codec, rows, sampling):
        answered = [turn(dialogue=d, turn=t, topic=topic, id=row["id"])
                    for d, row in enumerate(rows) for t, topic in enumerate(row["topics"])]
        return answered, torch.zeros(0)
    network = torch.nn.Identity()
    monkeypatch.setattr(evaluation, "load_corpus", lambda corpus, split: Dataset.from_list(rows))
    monkeypatch.setattr(evaluation, "answer_all", answer_all)
    monkeypatch.setattr(evaluation.checkpoint, "load", lambda ckpt: (network, None, None))
    monkeypatch.setattr(evaluation, "quicken", lambda omni, precisions: omni)
    arguments = ["--text", "true", "--keep", "0", "--corpus", str(tmp_path), "--out", str(tmp_path), *more]
    monkeypatch.setattr("sys.argv", ["eval.py", *arguments])
    evaluation.main()
    figures = json.loads((tmp_path / "eval.json").read_text())
    wanted = set(more[1].split(",")) if more else {topic for topics in talks for topic in topics}
    expected = [(f"d{d}", topic) for d, topics in enumerate(talks) for topic in topics if topic in wanted]
    assert [(reply["id"], reply["topic"]) for reply in figures["replies"]] == expected
    assert figures["dialogues"] == len({name for name, _ in expected}) and figures["turns"] == len(expected)


# --------------------------------------------------------------------------------------------------- stress

def test_contour_follows_the_pitch():
    """Half a second of 100 Hz, silence, then 150 Hz: seven semitones higher, times 0.3; bridged between."""
    hz = np.repeat([100, 150], 8000)
    wav = sum(np.sin(2 * np.pi * k * np.cumsum(hz) / 16000) for k in range(1, 9)).astype(np.float32) / 8
    wav[6400:9600] = 0
    pitch = evaluation.contour(wav)[80]
    assert pitch.shape == (100,)
    low, high = pitch[5:35], pitch[65:95]
    assert high.mean() - low.mean() == pytest.approx(0.3 * 12 * math.log2(1.5), abs=0.02)
    assert low.std() < 0.02 and high.std() < 0.02 and low.mean() < pitch[50] < high.mean()
    assert not evaluation.contour(np.zeros(16000, np.float32))[80].any()


REPLIES = ["Three plus four is <stress>seven</stress>.", "<stress>Hard</stress> is the opposite of soft.",
           "Hard is the opposite of <stress>soft</stress>.", "<stress>Monday</stress> comes before Tuesday.",
           "Monday comes before <stress>Tuesday</stress>.", "The capital of Italy is <stress>Rome</stress>.",
           "<stress>Rome</stress> is the capital of Italy.", "No, a frog is <stress>green</stress>."]


@pytest.mark.parametrize("spoken", REPLIES)
def test_the_stressed_word_is_found(spoken):
    """In espeak-ng's own speech with 20 dB of noise, 5 % faster: any guess is right for one word in five. In
    the same voice, but unstressed, it is not found."""
    before = spoken.partition("<stress>")[0]
    right, found = len(before.split()), []
    for text in (spoken, plain(spoken)):
        wav = librosa.resample(speak(text, ASSISTANT), orig_sr=16000, target_sr=round(16000 / 1.05))
        noise = np.random.default_rng(0).standard_normal(len(wav), np.float32)
        noisy = wav + 0.1 * wav.std() * noise
        found.append(evaluation.stressed_word((noisy, plain(spoken), ASSISTANT)))
    assert found[0] == right and found[1] != right


def test_stress_is_judged_where_one_word_answers(monkeypatch):
    """Of the exact replies; silent ones stress nothing, and other replies do not count."""
    pool = SimpleNamespace(Pool=lambda processes: ThreadPool(1))        # without the seconds to start one
    monkeypatch.setattr(evaluation.multiprocessing, "get_context", lambda method: pool)

    def said(spoken, aloud, **more):
        wav = librosa.resample(speak(aloud, ASSISTANT), orig_sr=16000, target_sr=24000)
        return turn(reference=plain(spoken), text=plain(spoken), spoken=spoken, wav=wav) | more
    last, first = REPLIES[5], REPLIES[6]
    turns = [said(last, last), said(first, first),
             said(first, "Rome is the capital of <stress>Italy</stress>."),
             said(last, last, wav=np.zeros(0, np.float32)),
             said(first, first, text="Athens is the capital of Italy."),          # not exact
             said("<stress>A frog</stress> is green.", "A frog is green."),       # two words
             said("I am fine, thank you.", "I am fine, thank you.")]
    assert evaluation.judge_stress(turns, 24000, ASSISTANT) == {
        "stressed_replies": 4, "stress": 50, "stressed_not_last_replies": 2, "stress_not_last": 50}
    assert evaluation.judge_stress(turns[-1:], 24000, ASSISTANT) == {}


# ------------------------------------------------------------------------------------------ other corpora

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
    omni, tokenizer, _ = load()
    omni.config["pad_audio"], seen, submit = pad_audio, [], evaluation.Engine.submit

    def remember(engine, ids, clips, **more):
        seen.extend(clip.shape[1] for clip in clips)
        return submit(engine, ids, clips, **more)
    monkeypatch.setattr(evaluation.Engine, "submit", remember)
    turns, _ = evaluation.answer_all(omni, tokenizer, None, [row()], EvalConfig())
    assert seen == [frames] and len(turns) == 1


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
    said = turn() if spoken else turn(wav=np.zeros(0, np.float32), heard_bigram="")
    evaluation.write(cfg, [row()], [said], judge_text([said], None), 16000)
    assert {path.name for path in out.iterdir()} == files | {"eval.json", "gallery.md", "demo.png"}
    for name in files:
        assert len(soundfile.read(out / name)[0]) > 8000
    assert (out / "demo.png").stat().st_size > 5000
    assert ("a question with its reply" in capsys.readouterr().out) == (keep > 0 and spoken)
    figures = json.loads((out / "eval.json").read_text())
    assert figures["exact"] == 100 and "wav" not in figures["replies"][0]
