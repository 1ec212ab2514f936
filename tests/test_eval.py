"""eval.py judges what it can and says what it leaves out. It protects the figures of the embedded world, what
happens to rows that cannot be asked, going on after a kill, and the report."""
import http.server
import json
import math
import re
import threading
from multiprocessing.pool import ThreadPool

import librosa
import numpy as np
import pytest
import soundfile
import torch
from conftest import CHECKPOINT, load
from datasets import Dataset

import eval as evaluation
from eval import EvalConfig, find_originals, judge_speech, judge_text, judge_world
from omni import judges, report
from omni.audio import wav_bytes
from omni.codec import pace
from omni.espeak import ASSISTANT, plain, speak
from omni.files import Lines, read_json, sha256
from tiny.codec import NanoCodec
from tiny.judge import contour, stress, stressed_word


def turn(**more):
    """A turn that was answered right, aloud and heard well."""
    return {"id": "a", "dialogue": 0, "turn": 0, "category": "capitals", "question": "Capital of France?",
            "reference": "It is Paris.", "spoken": "It is <stress>Paris</stress>.", "references": ["Paris"],
            "text": "It is Paris.", "notes": [], "error": None, "units": [1, 2], "sound": None,
            "heard_bigram": "it is paris", "heard_word_loop": "its perished"} | more


def row(seconds=1.0):
    wav = 0.1 * np.random.default_rng(0).standard_normal(int(16000 * seconds))
    speech = [{"bytes": wav_bytes(wav), "path": None}]
    return {"id": "a", "users": ["Capital of France?"], "speech": speech, "topics": ["capitals"],
            "replies": ["It is Paris."], "spoken": ["It is <stress>Paris</stress>."], "answers": ["Paris"]}


def values(figures):
    """Figures without their intervals."""
    return {name: value[0] for name, value in figures.items() if value is not None}


def judged(turns):
    return values(judge_text(turns, "world") | judge_world(turns, {}))


def test_an_original_is_compared_only_where_there_is_one():
    original = {"heard_bigram_original": "it is paris", "heard_word_loop_original": "it is parish"}
    results = []
    for turns in ([turn()], [turn(**original)]):
        judge_text(turns, "world")
        results.append(values(judge_speech(turns, "world", {"No."})))
    alone, compared = results
    assert alone == {"new_replies": 1, "wer_bigram": 0, "s2s_bigram": 100, "s2s_word_loop": 0,
                     "wer_word_loop": pytest.approx(100)}
    assert compared["wer_bigram_excess"] == 0 and compared["s2s_word_loop_original"] == 0
    assert compared["wer_word_loop_excess"] == compared["wer_word_loop"] - compared["wer_word_loop_original"]


def test_a_corpus_without_answers_has_no_figures_of_them():
    assert judged([turn(references=[])]) == {"turns": 1, "not answered": 0, "exact": 100}
    assert judged([turn()]) == {"turns": 1, "not answered": 0, "s2t": 100, "exact": 100}
    compared = judge_world([turn()], {"typed_before": ["It is Rome."]})
    assert values(compared) == {"exact": 100, "exact_typed_before": 0}


def test_what_is_not_understood_is_counted_by_itself():
    """Two good questions, one answered; three unclear ones, two of them caught; one good question refused."""
    refusal = "I did not understand that."
    unclear = {"category": "unclear", "reference": refusal, "references": ["understand"]}
    turns = [turn(), turn(text=refusal), turn(text=refusal, **unclear), turn(text=refusal, **unclear),
             turn(text="It is Paris.", **unclear)]
    assert judged(turns) == {"turns": 5, "not answered": 0, "exact": 50, "unclear": 3,
                             "caught": pytest.approx(200 / 3), "refused": 50, "s2t": 60}
    assert "caught" not in judged(turns[:2])


def test_memory_is_counted_by_itself():
    result = judged([turn(), turn(category="recalling"), turn(category="recalling", text="It is Rome.")])
    assert result["needing_history"] == 2 and result["exact_needing_history"] == 50


def test_what_could_not_be_asked_is_wrong():
    """In the text and in the speech, and it is counted."""
    turns = [turn(), turn(error="it is silent", text="", heard_bigram="", heard_word_loop="")]
    assert judged(turns)["not answered"] == 1 and judged(turns)["s2t"] == 50
    assert values(judge_speech(turns, "world"))["s2s_bigram"] == 50
    assert [report.verdict(t) for t in turns] == ["right", "not answered"]


def test_pace():
    """Two seconds of sound after 0.5 s; the next piece comes when that has been played for a second."""
    pieces = [(2.0, 0.5), (0.0, 0.6), (1.0, 3.5), (1.0, 3.6)]
    assert pace(pieces) == {"first_audio": 0.5, "stalls": 1, "duration": 4.0}


# ------------------------------------------------------------------------------------------------ the command

@pytest.fixture(scope="module")
def nano(tmp_path_factory):
    """A folder with the tiny random checkpoint's path, a codec, and sets in JSONL."""
    at = tmp_path_factory.mktemp("eval")
    torch.manual_seed(0)
    NanoCodec(dim=32, phonemes="a").save(at / "codec.pt")
    for i in range(4):
        soundfile.write(at / f"{i}.wav", 0.1 * np.random.default_rng(i).standard_normal(8000), 16000)
    (at / "text.wav").write_text("no sound")
    rows = [{"id": f"q{i}", "audio": f"{i}.wav", "question": f"What is {i}?", "answers": ["e", "a"],
             "category": "even" if i % 2 == 0 else "odd"} for i in range(4)]
    rows += [{"id": "bad", "audio": "text.wav", "question": "?", "answers": ["a"]},
             {"id": "read", "question": "Hello there.", "answer": "a"}, {"id": "none", "audio": "0.wav"}]
    (at / "set.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return at


def evaluate(monkeypatch, nano, out, *more, code=None):
    """Run eval.py on the made-up set, with what the test's recognizer hears -> results.json."""
    made = LOAD(str(CHECKPOINT / "checkpoint"), str(CHECKPOINT / "whisper-tiny-random.pt"))
    monkeypatch.setattr(evaluation.checkpoint, "load", lambda ckpt: made)
    monkeypatch.setattr(evaluation, "by_sphinx", lambda pool, wavs: (f"{len(wav)} a" for wav in wavs))
    options = {"--set": "jsonl", "--path": nano / "set.jsonl", "--ckpt": CHECKPOINT / "checkpoint",
               "--out": out, "--codec": nano / "codec.pt", "--recognizer": "pocketsphinx", "--max_tokens": 6,
               "--max_units": 30, "--temperature": 0} | dict(zip(more[::2], more[1::2]))
    monkeypatch.setattr("sys.argv", ["eval.py", *(str(x) for pair in options.items() for x in pair)])
    if code:
        with pytest.raises(SystemExit) as exit:
            evaluation.main()
        assert exit.value.code == code
    else:
        evaluation.main()
        return json.loads((out / "results.json").read_text())


LOAD = evaluation.checkpoint.load
TIMES = ("first_audio", "seconds", "stalls")


def told(results):
    """The turns of a result without what the clock said."""
    return [{key: x for key, x in turn.items() if key not in TIMES} for turn in results["turns"]]


def test_a_kill_in_the_middle_and_company_change_nothing(monkeypatch, nano, tmp_path, capsys):
    """The same answers one by one, four at a time, by two processes, and after a kill in a line."""
    whole = evaluate(monkeypatch, nano, tmp_path / "a", "--batch", 4)
    assert told(evaluate(monkeypatch, nano, tmp_path / "b", "--batch", 1)) == told(whole)
    answers = (tmp_path / "a" / "answers-0.jsonl").read_bytes()
    lines = answers.splitlines(keepends=True)
    (tmp_path / "a" / "answers-0.jsonl").write_bytes(b"".join(lines[:3]) + lines[3][:50])
    (tmp_path / "a" / "heard.jsonl").unlink()
    asked, submit = [], evaluation.Engine.submit
    monkeypatch.setattr(evaluation.Engine, "submit", lambda self, *args, **more:
                        asked.append(more.get("speak")) or submit(self, *args, **more))
    assert told(evaluate(monkeypatch, nano, tmp_path / "a", "--batch", 4)) == told(whole)
    kept = [json.loads(line)[0] for line in lines[:3]]
    assert asked.count(True) == 5 - sum(whole["turns"][int(d)]["error"] is None for d in kept)
    (tmp_path / "c").mkdir()
    for n, some in enumerate((lines[::2], lines[1::2])):  # as two processes leave it
        (tmp_path / "c" / f"answers-{n}.jsonl").write_bytes(b"".join(some))
    (tmp_path / "c" / "sound").symlink_to(tmp_path / "a" / "sound")
    asked.clear()
    assert told(evaluate(monkeypatch, nano, tmp_path / "c", "--batch", 4)) == told(whole)
    assert asked.count(True) == 0
    evaluate(monkeypatch, nano, tmp_path / "a", "--temperature", 1, code=2)
    assert "other settings (temperature)" in capsys.readouterr().err


def test_every_row_is_counted_and_reported(monkeypatch, nano, tmp_path, capsys):
    """Rows that cannot be asked are named and wrong; a row without sound is read aloud; the report has them
    all, and its sounds."""
    results = evaluate(monkeypatch, nano, tmp_path)
    figures, turns = results["figures"], results["turns"]
    assert figures["turns"] == [7] and figures["not answered"] == [2]
    assert results["command"].startswith("eval.py --set jsonl") and len(results["git"]) in (0, 40)
    weights = CHECKPOINT / "checkpoint/model.safetensors"
    assert read_json(tmp_path, "settings.json")["weights"] == sha256(weights)
    right = [turn["right"] for turn in turns]
    assert figures["s2t"][0] == pytest.approx(100 * sum(right) / 7) and right[4] is right[6] is False
    assert "text.wav" in turns[4]["error"] and "no reference" in turns[6]["error"]
    assert "text.wav" in capsys.readouterr().out
    page = (tmp_path / "report.html").read_text()
    rows = json.loads(re.search(r'id="rows">(.*?)</script>', page, re.S)[1])
    assert len(rows) == 7 and rows[0]["verdict"] == "not answered" and "src=\"http" not in page
    assert sum("said" in row for row in rows) == sum(bool(turn["sound"]) for turn in turns) > 0
    sounds = [soundfile.info(tmp_path / turn["sound"]) for turn in turns if turn["sound"]]
    assert {sound.samplerate for sound in sounds} == {16000}
    assert "| s2t |" in (tmp_path / "report.md").read_text()
    assert {"figures.png", "replies.png", "gallery.md"} <= {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize("name, columns, rows", [
    ("llama-questions", {"question": ["a", "b"], "Answer": ["x", "y"]}, 2),
    ("web-questions", {"question": ["a"], "answers": [["x", "y"]]}, 1),
    ("triviaqa", {"question": ["a"], "answer": ['{"value": "x", "aliases": []}']}, 1),
    ("voicebench/openbookqa", {"prompt": ["a"], "reference": ["B"]}, 1),
    ("voicebench/bbh", {"prompt": ["a"], "reference": ["yes"], "id": ["navigate_1"]}, 1),
    ("voicebench/ifeval", {"prompt": ["a"], "instruction_id_list": [["punctuation:no_comma"]],
                           "kwargs": ["[{}]"]}, 1),
    ("voicebench/advbench", {"prompt": ["a"]}, 1), ("voicebench/alpacaeval", {"prompt": ["a"]}, 1),
    ("uro", {"source_text": ["a"], "target_text": ["x"]}, 1)])
def test_sets_of_every_form(monkeypatch, nano, tmp_path, name, columns, rows):
    """From a folder to the report and the forms of the set's own scripts; published figures beside ours."""
    made = [dict(zip(columns, row)) for row in zip(*columns.values())]
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    results = evaluate(monkeypatch, nano, tmp_path / "out", "--set", name, "--path", tmp_path / "set")
    assert results["figures"]["turns"] == [rows] and results["figures"]["not answered"] == [0]
    judged = [turn["right"] for turn in results["turns"]]
    assert judged == [None] if name.endswith("alpacaeval") else None not in judged
    written = {path.name for path in (tmp_path / "out").iterdir()}
    if name.startswith("voicebench"):
        assert f"checkpoint-{name.split('/')[1]}-test-audio.jsonl" in written
    if name == "uro":
        assert {"pred_text.jsonl", "question_text.jsonl", "gt_text.jsonl", "audio"} <= written
    text = (tmp_path / "out" / "report.md").read_text()
    assert ("LLaMA-Omni2-14B" in text) == (name in ("llama-questions", "web-questions"))


def test_another_synthesizer_reads_aloud(monkeypatch, nano, tmp_path):
    """The command of --tts, as data.py takes it: what it wrote is what is asked."""
    (tmp_path / "set.jsonl").write_text('{"question": "Who?", "answer": "a"}\n')
    soundfile.write(tmp_path / "said.wav", np.full(8000, 0.25), 16000)
    rows, _ = evaluation.read_questions(EvalConfig(set="jsonl", path=str(tmp_path / "set.jsonl"),
                                                   tts=f"cp {tmp_path / 'said.wav'} {{wav}}"))
    assert evaluation.clips(rows[0])[0].numpy() == pytest.approx(0.25, abs=1e-4) and rows[0]["error"] is None
    rows, _ = evaluation.read_questions(EvalConfig(set="jsonl", path=str(tmp_path / "set.jsonl"),
                                                   tts="false {wav}"))
    assert rows[0]["error"]


def test_compare(monkeypatch, nano, tmp_path, capsys):
    """A pair that differs in one reply: its difference, and which reply it is."""
    results = evaluate(monkeypatch, nano, tmp_path / "a")
    other = json.loads(json.dumps(results))
    for found, right in ((results, False), (other, True)):
        found["turns"][1] |= {"right": right, "heard_right": right, "text": f"{right}"}
    for name, found in (("a", results), ("b", other)):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "results.json").write_text(json.dumps(found))
    capsys.readouterr()
    monkeypatch.setattr("sys.argv", ["eval.py", "--compare", f"{tmp_path}/a,{tmp_path}/b"])
    evaluation.main()
    printed = capsys.readouterr().out
    assert f"s2t     {100 / 7:.1f} (0.0 to" in printed and printed.count("->") == 1 and "q1.1" in printed
    monkeypatch.setattr("sys.argv", ["eval.py", "--compare", f"{tmp_path}/a,{tmp_path}/none"])
    with pytest.raises(SystemExit):
        evaluation.main()
    assert "must be folders of finished evaluations" in capsys.readouterr().err


class Judge(http.server.BaseHTTPRequestHandler):
    """An endpoint that scores the first answer, talks nonsense about the second, and fails at the others."""
    asked = []

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        question = re.search("Question: (.*)", body["messages"][0]["content"])[1]
        self.asked.append(question)
        said = {"one": '{"score": 4}', "two": "It is quite good."}.get(question)
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": said}}
        data = json.dumps({"id": "x", "object": "chat.completion", "created": 0, "model": "j",
                           "choices": [choice]}).encode()
        self.send_response(200 if said else 500)
        self.send_header("content-type", "application/json")
        self.end_headers()
        self.wfile.write(data if said else b"{}")

    def log_message(self, *args):
        pass


def test_a_judge_that_fails_costs_its_scores_alone(tmp_path):
    """Its answers are kept: what was scored is not asked again, what failed is."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    cfg = EvalConfig(judge=f"http://127.0.0.1:{server.server_port}/v1", judge_model="j")
    turns = [turn(question=question, dialogue=d, heard="it is") for d, question in
             enumerate(("one", "two", "three"))]
    result = evaluation.judge_answers(cfg, turns, Lines(tmp_path / "judged.jsonl"))
    assert result["score_s2t"] == (4, 4, 4) and result["score_s2t_failed"] == (2,)
    kept = Lines(tmp_path / "judged.jsonl")
    assert kept["1-0/score_s2t"] == [None, "It is quite good."] and "Error" in kept["2-0/score_s2t"][1]
    Judge.asked.clear()
    assert evaluation.judge_answers(cfg, turns, kept)["score_s2t"] == (4, 4, 4)
    assert "one" not in Judge.asked and "two" in Judge.asked
    server.shutdown()
    assert judges.score_of('{"score": 7}') is None and judges.score_of('```{"score": "3"}```') == 3


def test_utmos_from_a_file(tmp_path):
    """The mean over replies, and what cannot be loaded is said in a line."""
    class Mean(torch.nn.Module):
        def forward(self, wav, rate: int):
            return 1 + wav.mean() + rate / 16000
    torch.jit.script(Mean()).save(tmp_path / "utmos.pt")
    soundfile.write(tmp_path / "a.flac", np.full(16000, 0.5), 16000)
    cfg = EvalConfig(utmos=str(tmp_path / "utmos.pt"), out=str(tmp_path))
    result = evaluation.judge_naturalness(cfg, [turn(sound="a.flac"), turn()], "cpu")
    assert result["utmos"][0] == pytest.approx(2.5, abs=1e-3)


@pytest.mark.parametrize("more, line", [
    (["--set", "llamaquestions"], "known are tiny, llama-questions"),
    (["--path", "nowhere"], "there is nothing"), (["--set", "uro", "--path", "tests"], "cannot be read"),
    (["--recognizer", "whisper:nowhere"], "nowhere"),
    (["--utmos", "nowhere.pt"], "--utmos nowhere.pt"), (["--recognizer", "siri"], "neither pocketsphinx"),
    (["--compare", "a"], "two folders")])
def test_bad_input_is_one_line(monkeypatch, nano, tmp_path, capsys, more, line):
    evaluate(monkeypatch, nano, tmp_path / "out", *more, code=2)
    printed = capsys.readouterr().err
    errors = [text for text in printed.splitlines() if text.startswith("error: ")]
    assert len(errors) == 1 and line in errors[0]


@pytest.mark.parametrize("more", [["--topics", "colors"], ["--topics", "colors,counting"], []], ids=str)
def test_topics_keep_only_their_turns(tmp_path, monkeypatch, more):
    """The whole dialogue is held, as its earlier turns may matter, but only these turns are judged."""
    talks = [["capitals", "colors"], ["capitals"], ["counting", "colors"], ["telling"]]
    rows = [row() | {"id": f"d{d}", "topics": topics, "users": ["?"] * len(topics),
                     "speech": row()["speech"] * len(topics), "replies": ["a"] * len(topics),
                     "spoken": ["a"] * len(topics), "answers": ["a"] * len(topics)}
            for d, topics in enumerate(talks)]
    omni, tokenizer, tts = load()
    monkeypatch.setattr(evaluation, "load_corpus", lambda corpus, split, hear: Dataset.from_list(rows))
    monkeypatch.setattr(evaluation.checkpoint, "load", lambda ckpt: (omni, tokenizer, tts))
    monkeypatch.setattr(evaluation.checkpoint, "find", lambda ckpt: ckpt)
    arguments = ["--text", "true", "--keep", "0", "--corpus", str(tmp_path), "--out", str(tmp_path / "out"),
                 "--max_tokens", "5", *more]
    monkeypatch.setattr("sys.argv", ["eval.py", *arguments])
    evaluation.main()
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    wanted = set(more[1].split(",")) if more else {topic for topics in talks for topic in topics}
    expected = [(f"d{d}", topic) for d, topics in enumerate(talks) for topic in topics if topic in wanted]
    assert [(turn["id"], turn["category"]) for turn in results["turns"]] == expected
    assert results["figures"]["dialogues"] == [len({name for name, _ in expected})]


def test_typed_questions_are_asked_of_both_models_alike():
    """Before any stage the LLM of the checkpoint is the text model: their replies are the same."""
    from transformers import Qwen2ForCausalLM, Qwen2Tokenizer

    omni, tokenizer, _ = evaluation.checkpoint.from_backbones("tiny/qwen2", "tiny/whisper.pt", "tiny/qwen2")
    rows = [row() | {"users": ["What is two plus five?", "What is three minus one?"]},
            row() | {"users": ["What is the capital of France?"]}]
    model = Qwen2ForCausalLM.from_pretrained("tiny/qwen2", dtype=torch.float32)
    reader = Qwen2Tokenizer.from_pretrained("tiny/qwen2")
    typed = evaluation.typed_replies(rows, reader, evaluation.by_transformers(model, reader, 60))
    ours = evaluation.by_engine(omni.eval(), tokenizer, 60)
    assert typed == evaluation.typed_replies(rows, tokenizer, ours)
    assert typed[0] == "Two plus five is seven."


# --------------------------------------------------------------------------------------------------- stress

def test_contour_follows_the_pitch():
    """Half a second of 100 Hz, silence, then 150 Hz: seven semitones higher, times 0.3; bridged between."""
    hz = np.repeat([100, 150], 8000)
    wav = sum(np.sin(2 * np.pi * k * np.cumsum(hz) / 16000) for k in range(1, 9)).astype(np.float32) / 8
    wav[6400:9600] = 0
    pitch = contour(wav)[80]
    assert pitch.shape == (100,)
    low, high = pitch[5:35], pitch[65:95]
    assert high.mean() - low.mean() == pytest.approx(0.3 * 12 * math.log2(1.5), abs=0.02)
    assert low.std() < 0.02 and high.std() < 0.02 and low.mean() < pitch[50] < high.mean()
    assert not contour(np.zeros(16000, np.float32))[80].any()


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
        found.append(stressed_word((noisy, plain(spoken), ASSISTANT)))
    assert found[0] == right and found[1] != right


def test_stress_is_judged_where_one_word_answers():
    """Silent replies stress nothing; where two words answer, or none, nothing is judged."""
    def said(spoken, aloud):
        return speak(aloud, ASSISTANT), plain(spoken), spoken
    last, first = REPLIES[5], REPLIES[6]
    replies = [said(last, last), said(first, first),
               said(first, "Rome is the capital of <stress>Italy</stress>."),
               (np.zeros(0, np.float32), plain(last), last),
               said("<stress>A frog</stress> is green.", "A frog is green."),
               said("I am fine, thank you.", "I am fine, thank you.")]
    assert stress(ThreadPool(1), replies, ASSISTANT) == [
        (True, True), (True, False), (False, False), (False, True), None, None]


# ------------------------------------------------------------------------------------------ other corpora

@pytest.mark.parametrize("meta,llm,expected,left_out", [
    ({"source": "tiny", "tts": None, "assistant": "v"}, None, ("tiny/qwen2", "v"), ""),
    ({"source": "tiny", "tts": "say {wav}", "assistant": "v"}, None, ("tiny/qwen2", None), "synthesizer"),
    ({"source": "text", "tts": None, "assistant": "v"}, "tiny/qwen2", ("tiny/qwen2", "v"), ""),
    ({"source": "text", "tts": "say {wav}", "assistant": "v"}, None, (None, None), "synthesizer"),
    ({"source": "folder", "tts": None, "assistant": "v"}, None, (None, None), "typed_before is left out"),
    (None, None, (None, None), "typed_before is left out"),     # a datasets folder of the same columns
], ids=str)
def test_only_the_embedded_corpus_says_what_to_compare_with(tmp_path, capsys, meta, llm, expected, left_out):
    """Another corpus must not be judged with the embedded world's Qwen2, nor silently with a synthesizer that
    did not speak its replies."""
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
    (answered,) = evaluation.answer_all(omni, tokenizer, None, [row()], [0], EvalConfig())
    assert seen == [frames] and len(answered[1]) == 1


def test_a_dialogue_that_breaks_off_keeps_its_turns(monkeypatch):
    """What cannot be asked after the first turn, and what would have come after it: there, wrong, named."""
    omni, tokenizer, _ = load()
    broken = {key: 3 * value if isinstance(value, list) else value for key, value in row().items()}
    good, submit, asked = broken | {"id": "good"}, evaluation.Engine.submit, []

    class Once(evaluation.Engine):
        def submit(self, ids, clips, **more):
            asked.append(ids)
            if len(asked) == 3:                       # the second turn of the first dialogue
                raise ValueError("the conversation is too long")
            return submit(self, ids, clips, **more)
    monkeypatch.setattr(evaluation, "Engine", Once)
    answered = {d: turns for d, turns, _ in evaluation.answer_all(
        omni.eval(), tokenizer, None, [broken, good], [0, 1], EvalConfig(max_tokens=4))}
    errors = [[turn["error"] for turn in answered[d]] for d in (0, 1)]
    broken_off = [None, "the conversation is too long", "an earlier turn could not be asked"]
    assert errors in ([[None] * 3, broken_off], [broken_off, [None] * 3])


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
    said = turn(sound="a.flac" if spoken else None)
    soundfile.write(out / "a.flac", np.full(16000, 0.1), 16000)
    evaluation.write(cfg, [row()], [said], judge_text([said], "world") | {"s2t": (1.0, 0.0, 1.0)})
    written = {"results.json", "report.md", "report.html", "figures.png", "gallery.md", "demo.png", "a.flac"}
    assert {path.name for path in out.iterdir()} == files | written | ({"replies.png"} if spoken else set())
    for name in files:
        assert len(soundfile.read(out / name)[0]) > 8000
    assert (out / "demo.png").stat().st_size > 5000
    assert ("a question with its reply" in capsys.readouterr().out) == (keep > 0 and spoken)
    assert read_json(out, "results.json")["turns"][0]["text"] == "It is Paris."
