"""From sound to tensors and back: what is refused, a real recording, the embedded world, its codec."""
import collections
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import librosa
import numpy as np
import pytest
import soundfile
import torch
from conftest import CHECKPOINT, ROOT, ROWS
from safetensors.torch import load_file

from data import Dialogues, batches
from model import expand_speech
from omni import codec as codecs
from omni.audio import log_mel, read_audio, read_wav, speech_positions, wav_bytes
from omni.espeak import VARIANTS, draw_voice, plain
from tiny import unclear, world
from tiny.codec import CONTEXT, FSQ, NanoCodec
from tiny.voices import shipped_clips

JFK = Path(__file__).parent / "data" / "jfk.flac"    # 11 s of 1961, public domain; openai-whisper's test clip


# --------------------------------------------------------------------------------------------- a user's files

def tone(seconds, rate=16000):
    return (0.3 * np.sin(np.arange(round(seconds * rate)) * 440 * 2 * np.pi / rate)).astype(np.float32)


def cut(path, size, format):
    """An audio file of which only the first `size` bytes are left."""
    soundfile.write(path, tone(1), 16000, format=format)
    path.write_bytes(path.read_bytes()[:size])


def spoilt(path, value):
    """A float WAV with one sample that is not a number."""
    wav = tone(1)
    wav[5] = value
    soundfile.write(path, wav, 16000, subtype="FLOAT")


ABUSE = {  # what is wrong, how the file is made, a fragment of the error
    "missing": (lambda p: None, "no such file"),
    "empty": (lambda p: p.touch(), "cannot be read as audio"),
    "text": (lambda p: p.write_text("Dear sir or madam,\n" * 100), "cannot be read as audio"),
    "cut in the header": (lambda p: cut(p, 30, "WAV"), "cannot be read as audio"),
    "cut in the middle": (lambda p: cut(p, 5000, "FLAC"), "damaged"),
    "no frames": (lambda p: soundfile.write(p, tone(0), 16000), "0.00 s"),
    "silent": (lambda p: soundfile.write(p, 0 * tone(1), 16000), "silent"),
    "NaN": (lambda p: spoilt(p, np.nan), "no numbers"),
    "infinite": (lambda p: spoilt(p, -np.inf), "no numbers"),
    "0.05 s": (lambda p: soundfile.write(p, tone(0.05), 16000), "0.05 s"),
    "601 s": (lambda p: soundfile.write(p, tone(601, 8000), 8000), "601.00 s"),
    "1000 Hz": (lambda p: soundfile.write(p, tone(1, 1000), 1000), "1000 Hz"),
    "a directory": (lambda p: p.mkdir(), ""),
}


@pytest.mark.parametrize("what", ABUSE)
def test_read_audio_abuse(tmp_path, what):
    """A bad recording is refused with one ValueError that names the file, not with a library's own error."""
    make, fragment = ABUSE[what]
    path = tmp_path / "question.wav"
    make(path)
    with pytest.raises(ValueError) as refusal:
        read_audio(str(path))
    assert str(refusal.value).startswith(f"{path}: ") and fragment in str(refusal.value)


@pytest.mark.parametrize("seconds, rate", [(0.1, 16000), (0.1, 44100), (0.1, 22050), (30, 48000), (70, 44100),
                                           (600, 16000)])
def test_read_audio_at_its_limits(tmp_path, seconds, rate):
    """The shortest and the longest clip pass, at any sample rate, and become whole LLM positions."""
    path = str(tmp_path / "a.wav")
    soundfile.write(path, tone(seconds, rate), rate)
    wav = read_audio(path)
    assert len(wav) == round(seconds * 16000)
    assert speech_positions(log_mel(wav, 80, pad=False).shape[-1]) == 10 * seconds


# ------------------------------------------------------------------------------------------- a real recording

def test_a_real_recording():
    """11.0 s by the clock: 176,000 samples, 1100 mel frames, 550 encoder frames, 110 LLM positions; padded to
    30 s, 3000 and 300. The mel has the mean and deviation of the official front end for the same clip."""
    wav = read_audio(str(JFK))
    assert wav.shape == (176000,) and wav.dtype == torch.float32
    mel, padded = log_mel(wav, 128, pad=False), log_mel(wav, 128, pad=True)
    assert mel.shape == (128, 1100) and padded.shape == (128, 3000)
    frames = (1100, 3000, 10, 8, 9, 18, 19)                                     # ceil(n / 2) // 5 positions
    assert [speech_positions(n) for n in frames] == [110, 300, 1, 0, 1, 1, 2]
    assert expand_speech([7, -200, 8], [1100]) == [7, *[-200] * 110, 8]
    golden = load_file(CHECKPOINT / "inputs.safetensors")
    torch.testing.assert_close(wav, golden["audio0"], atol=2 ** -15, rtol=0)    # ours has 16 bits
    measured = torch.stack([padded.mean(), padded.std()])
    torch.testing.assert_close(measured, golden["mel0_padded_mean_std"], atol=1e-3, rtol=0)
    torch.testing.assert_close(mel[:, :1090], padded[:, :1090], atol=1e-4, rtol=0)      # same up to its end


@pytest.mark.parametrize("ending, error", [("wav", 0.01), ("ogg", 0.1)])
def test_other_formats_give_the_same_sound(tmp_path, ending, error):
    """44.1 kHz stereo is mixed and resampled to the samples it was made from: exactly in time, and to 1 % of
    their energy (10 % after a lossy format)."""
    wav = read_audio(str(JFK)).numpy()
    high = librosa.resample(wav, orig_sr=16000, target_sr=44100)
    path = str(tmp_path / f"jfk.{ending}")
    soundfile.write(path, np.stack([1.2 * high, 0.8 * high], 1), 44100)
    again = read_audio(path).numpy()
    assert again.shape == wav.shape
    assert np.linalg.norm(again - wav) / np.linalg.norm(wav) < error


# ------------------------------------------------------------------------------------------------- the corpus

def test_wav_bytes_round_trip():
    """A row's audio survives the corpus to half a step of 16 bits; loud samples are clipped, not wrapped."""
    wav = np.random.default_rng(0).uniform(-0.999, 0.999, 5000).astype(np.float32)
    again = read_wav({"bytes": wav_bytes(wav), "path": None})
    assert again.shape == wav.shape and again.dtype == np.float32
    assert np.abs(again - wav).max() <= 1.01 / 32768
    loud = read_wav({"bytes": wav_bytes(np.array([1.5, -1.5]))})
    assert loud[0] > 0.999 and loud[1] == -1


def turns_of(split, dialogues):
    rng = random.Random(split)
    return [turn for _ in range(dialogues) for turn in world.dialogue(rng, split)]


@pytest.fixture(scope="module")
def drawn():
    """{split: the turns of a thousand dialogues or more}."""
    return {"train": turns_of("train", 3000), "validation": turns_of("validation", 1000),
            "test": turns_of("test", 2000)}


PAIRS = (("train", "test"), ("train", "validation"), ("validation", "test"))


def test_splits_share_no_question_and_no_voice(drawn):
    """Held out means held out: neither a test sentence nor a test voice occurs in training. Validation asks
    unclear questions in the words of the training split."""
    said, voices = {}, {}
    for split, turns in drawn.items():
        said[split] = {t["user"] for t in turns if t["topic"] not in ("recalling", "manners")}
        rng = random.Random(split)
        names = [draw_voice(rng, split) for _ in range(400)]
        voices[split] = {voice.split("+")[1].split(":")[0].lower() for voice in names}
    unclear = {t["user"] for turns in drawn.values() for t in turns if t["topic"] == "unclear"}
    for a, b in PAIRS:
        shared = said[a] & said[b]
        assert len(said[a]) > 300 and shared <= (set() if "test" in (a, b) else unclear)
        assert len(voices[a]) >= 4 and not voices[a] & voices[b]
    assert not any("edward" in variants for variants in voices.values())        # the assistant's own


def test_replies_of_the_test_are_unheard_of(drawn):
    """A speech LM that recites whole replies fails on some: no training or validation dialogue holds them."""
    taught = {t["assistant"] for split in ("train", "validation") for t in drawn[split]}
    composed = {topic.__name__ for topic in world.COMPOSED}
    new = [t for t in drawn["test"] if t["assistant"] not in taught and t["topic"] in composed]
    held_out = [t for t in new if world.share(f"reply {t['assistant']}") < 0.2]
    assert len(held_out) > 0.1 * len(drawn["test"]) and {t["topic"] for t in held_out} == composed
    for t in drawn["train"] + drawn["validation"]:
        assert t["topic"] not in composed or world.share(f"reply {t['assistant']}") >= 0.2, t


def test_the_unclear_test_is_new(drawn):
    """Frames, languages and kinds of sound of the test do not occur in training; only the words of the frames
    may. Nor is any of them a question that this world answers."""
    for parts in (unclear.FRAMES, unclear.SOUNDS, unclear.LANGUAGES):
        assert parts.keys() == {"train", "test"} and not set(parts["train"]) & set(parts["test"])
    foreign = [set().union(*unclear.LANGUAGES[split].values()) for split in ("train", "test")]
    assert not foreign[0] & foreign[1]
    holes = {name: f"(?:{'|'.join(map(re.escape, words))})" for name, words in unclear.WORDS.items()}
    patterns = [re.sub(r"\\{(\w+)\\}", lambda hole: holes[hole[1]], re.escape(frame))
                for frame in unclear.FRAMES["train"]]
    for t in drawn["test"]:
        assert t["topic"] != "unclear" or not any(re.fullmatch(p, t["user"]) for p in patterns), t
    for t in drawn["train"]:                          # the patterns find what they are for
        if t["topic"] == "unclear" and t["user"][0] != "(" and t["user"] not in foreign[0]:
            assert any(re.fullmatch(p, t["user"]) for p in patterns), t
    known = {word for words in (*world.KINDS.values(), world.COLORS, world.OPPOSITE) for word in words}
    assert not known & {word for words in unclear.WORDS.values() for word in words}


def test_unclear_turns_have_the_voice_of_their_text():
    """Within one dialogue: the user's voice for English, the language's for other languages, and a sound."""
    rng, kinds = random.Random(0), set()
    for row in world.dialogues(0, {"train": 400, "test": 100}, people=False):
        for text, topic, voice in zip(row["users"], row["topics"], row["voices"]):
            if text.startswith("("):
                kind, seconds, seed = voice.removeprefix("sound/").split(":")
                assert topic == "unclear" and text == f"({kind})" and 0.8 <= float(seconds) <= 4
                kinds.add("sound")
            elif text in unclear.LANGUAGE_OF:
                language, variant = voice.split("+")
                assert topic == "unclear" and language == unclear.LANGUAGE_OF[text]
                assert variant.split(":")[0] in VARIANTS[row["split"]]
                kinds.add("foreign")
            else:
                assert voice == row["voice"] and unclear.voice_of(rng, text, row["split"]) is None
    assert kinds == {"sound", "foreign"}


def test_shipped_clips_ask_training_questions_only():
    """Four in five of the training questions of which there is a clip are asked by it, whatever the seed. The
    dialogues are the same without them, and the other splits never hear them, nor ask what they ask, but for
    the sentences that every split may hold."""
    counts, clips = {"train": 1500, "validation": 100, "test": 100}, shipped_clips()
    told, asked = {text for text, _ in clips}, []
    shared = {topic.__name__ for topic in world.SHARED}
    for a, b in zip(world.dialogues(1, counts), world.dialogues(1, counts, people=False)):
        for text, topic, voice, other in zip(a["users"], a["topics"], a["voices"], b["voices"]):
            if a["split"] == "train" and text in told:
                asked.append(voice != other)
                assert voice == other or (text, voice) in clips
            else:
                assert voice == other and (text not in told or topic in shared)
        assert {**a, "voices": ()} == {**b, "voices": ()}
    assert len(asked) > 300 and 0.7 < np.mean(asked) < 0.9


def test_topics_ask_in_many_ways():
    """Where training held 80 sentences of a topic, stage 1 learned them by heart: it repeated the words of
    new ones and gave the reply of another. So a corpus has many sentences of each topic."""
    asked = collections.defaultdict(list)
    for row in world.dialogues(0, {"train": 4000}):
        for topic, question in zip(row["topics"], row["users"]):
            asked[topic].append(question)
    for topic in world.SHARED:
        asked.pop(topic.__name__)
    assert {t: len(q) / len(set(q)) for t, q in asked.items() if len(q) > 4.5 * len(set(q))} == {}


def test_nothing_to_remember_is_unheard_of():
    """Every name, pet, city ... is told in some sentence of the train split; others may be held out."""
    for values, ways, *_ in world.MEMORY.values():
        assert [v for v in values if all(world.split_of(w.format(v)) != "train" for w in ways)] == []


@pytest.fixture(scope="module")
def taught():
    """The (question, reply) that training can draw: of each topic of knowledge, nearly all."""
    found, rng = set(), random.Random(0)
    for name in ("arithmetic", "capitals", "cities", "colors", "opposites", "calendar", "kinds"):
        topic = getattr(world, name)
        for _ in range(10000):
            question, spoken, _ = topic(rng, {})
            reply = plain(spoken)
            if world.split_of(question, reply if topic in world.COMPOSED else None) == "train":
                found.add((question.lower(), reply.lower()))
    return found


def missing(taught, facts):
    """Which of the facts, each a list of texts that all say it, training never says."""
    said = "\n".join(reply for _, reply in taught)
    return [ways for ways in facts if not any(way.lower() in said for way in ways)]


def test_every_fact_is_taught(taught):
    """Questions and replies are held out, but never all that state a fact: the model could not know it."""
    n = world.NUMBERS
    pairs = [(x, y) for x in range(10) for y in range(10)]
    assert missing(taught, [[f"{n[x]} plus {n[y]} is {n[x + y]}."] for x, y in pairs]) == []
    assert missing(taught, [[f"{n[x]} minus {n[y]} is {n[x - y]}."] for x, y in pairs if x >= y]) == []
    assert missing(taught, [[f"capital of {country} is {city}.", f"{city} is the capital of {country}."]
                            for country, city in world.CAPITALS.items()]) == []
    assert missing(taught, [[f"The opposite of {word} is {other}.", f"{other} is the opposite of {word}."]
                            for word, other in world.OPPOSITE.items()]) == []
    assert missing(taught, [[f"{world.a(x)} is {color}."] for x, color in world.COLORS.items()]) == []
    for names in (world.DAYS, world.MONTHS):
        neighbors = zip(names, names[1:] + names[:1])
        assert missing(taught, [[f"{second} comes after {first}.", f"{first} comes before {second}."]
                                for first, second in neighbors]) == []


def test_every_kind_is_taught(taught):
    """What each thing is."""
    for kind, things in world.KINDS.items():
        named = [world.a(x) if kind in ("animal", "fruit", "vegetable") else x for x in things]
        assert missing(taught, [[f"{name} is {world.a(kind)}."] for name in named]) == []


def test_every_answer_is_in_its_reply(drawn):
    """eval.py looks for the answer in the reply; it would count all replies of the corpus as right."""
    def letters(text):
        return "".join(c for c in text.lower() if c.isalnum() or c == " ")

    assert {t["topic"] for t in drawn["train"]} == {topic.__name__ for topic in world.TOPICS} | {"recalling"}
    for turns in drawn.values():
        assert [t for t in turns if letters(t["answer"]) not in letters(t["assistant"])] == []


def test_marks_are_only_spoken(drawn):
    """The text that is learned has no marks; every reply that answers with a word stresses that word."""
    for t in drawn["train"] + drawn["test"]:
        assert "<" not in t["assistant"] + t["user"] and plain(t["spoken"]) == t["assistant"]
        marked = re.findall(r"<stress>(.*?)</stress>", t["spoken"])
        assert len(marked) <= 1
        if t["topic"] in ("arithmetic", "capitals", "opposites", "calendar"):
            assert marked and marked[0].lower() == t["answer"].lower()


@pytest.mark.parametrize("split, least", [("train", 50), ("test", 20)])
def test_the_same_words_are_said_in_two_ways(drawn, split, least):
    """Only the question tells which word is stressed, so a speech LM that sees the text alone cannot know."""
    ways = {}
    for t in drawn[split]:
        ways.setdefault(t["assistant"], {}).setdefault(t["spoken"], set()).add(t["user"])
    twice = [spoken for spoken in ways.values() if len(spoken) > 1]
    assert len(twice) >= least
    for first, second in (list(spoken.values())[:2] for spoken in twice):
        assert not first & second                     # a question has one right stress


# -------------------------------------------------------------------------------------------------- the codec

def test_units_are_codes():
    """The 6561 units and their codes are one to one; the first dimension counts least."""
    units = torch.arange(6561)
    codes = FSQ.to_codes(units)
    assert set(codes.unique().tolist()) == {-1, 0, 1} and len(codes.unique(dim=0)) == 6561
    assert torch.equal(FSQ.to_units(codes), units)
    assert codes[1].tolist() == [0, *[-1] * 7] and codes[6560].tolist() == [1] * 8


@pytest.mark.parametrize("hz", [160.0, 173.3, None])
def test_pulses_are_a_sum_of_cosines(hz):
    """The closed form equals the sum of harmonics it stands for; at 160 Hz every pulse falls on a sample."""
    rng = torch.Generator().manual_seed(0)
    f0 = torch.full((1, 200), hz) if hz else 120 + 60 * torch.rand(1, 200, generator=rng)
    hz = f0.repeat_interleave(160, -1).double()
    phase, count = 2 * math.pi * (hz / 16000).cumsum(-1), (7600 / hz).floor()
    expected = sum(torch.cos(k * phase) * (k <= count) for k in range(1, 64)) / (count / 2).sqrt()
    pulses = NanoCodec(dim=32, phonemes="a").pulses(f0).double()
    torch.testing.assert_close(pulses, expected, atol=1e-4, rtol=0)


BURSTS = [[10] * 6, [10, 10, 4], [1, 1, 2, 0, 7, 23, 1, 30], [3], [1], [95]]


@pytest.mark.parametrize("bursts", BURSTS, ids=str)
def test_streamed_sound_equals_decoded_sound(bursts):
    """Sound made while units arrive is the sound of all units together: no click between bursts, 640 samples
    a unit."""
    torch.manual_seed(0)
    codec = NanoCodec(dim=32, phonemes="a").eval()
    units = torch.randint(6561, (sum(bursts),))
    pieces = list(codecs.stream(codec, [burst.tolist() for burst in units.split(bursts)]))
    whole = codec.decode(units)
    assert len(whole) == 640 * len(units) and whole.std() > 0.01
    # a rounding error in the pitch moves every later pulse a little: we have seen 4e-5 of the peak
    torch.testing.assert_close(torch.cat(pieces), whole, atol=2e-4 * whole.abs().max().item(), rtol=0)
    assert len(bursts) < 5 or len(pieces) > 2          # sound came before the last burst


def test_a_piece_of_a_long_reply_costs_what_an_early_one_does():
    """What a stream remembers, and so what it renders again, stops growing."""
    codec, state, held = NanoCodec(dim=32, phonemes="a").eval(), {}, []
    for burst in torch.randint(6561, (300,)).split(10):
        codec.next_pieces([state], [burst.tolist()], [False])
        held.append((len(state["units"]), len(state["f0"]), state["start"] > 0))
    assert held[5:] == held[4:-1] and held[-1][2] and held[-1][0] < CONTEXT + 10


def tell(script):
    """Events as an engine yields them. script: rounds, each a list of (reply, units or None at its end)."""
    for told in script:
        for reply, units in told:
            if not reply.done:
                yield reply, "done" if units is None else "units", units
        yield None, "round", None


class Asked:
    """A reply, as far as `with_sound` knows it."""
    done = False


def test_company_changes_no_sound(monkeypatch):
    """Replies that begin and end at different times are rendered together where their windows are equally
    long, and each sounds as it does alone. Of one that is cancelled nothing more comes."""
    torch.manual_seed(0)
    monkeypatch.setattr(codecs, "LARGEST", 0)         # as many pieces as there can be
    codec = NanoCodec(dim=32, phonemes="a").eval()
    replies, units = [Asked() for _ in range(4)], torch.randint(6561, (4, 130)).tolist()
    ends, script = [130, 70, 130, 93], [[] for _ in range(18)]
    for i, (reply, row, end) in enumerate(zip(replies, units, ends)):
        for n, at in enumerate(range(0, end, 10)):
            script[n + i].append((reply, row[at:min(at + 10, end)]))
        script[n + i].append((reply, None))
    sizes, sound = [], codec.sound

    def count(units, *more):
        sizes.append(len(units))
        return sound(units, *more)
    monkeypatch.setattr(codec, "sound", count)
    heard = {reply: [] for reply in replies}
    for reply, kind, x in codecs.with_sound(tell(script), codec):
        if kind == "audio":
            heard[reply].append(x)
            assert reply is not replies[2] or not reply.done
            replies[2].done |= len(heard[replies[2]]) == 3
        if kind == "done":
            whole = codec.decode(torch.tensor(units[replies.index(reply)][:ends[replies.index(reply)]]))
            peak = whole.abs().max().item()
            torch.testing.assert_close(torch.cat(heard[reply]), whole, atol=2e-4 * peak, rtol=0)
            heard[reply] = None
    assert [heard[reply] is None for reply in replies] == [True, True, False, True]
    assert max(sizes) >= 3                            # decode counts, too, with one row each


def test_first_sounds_are_made_first(monkeypatch):
    """By a clock that only rendering and writing move: who has heard nothing yet is served before who waits
    for more, and who has enough to play waits until it is needed or the reply ends."""
    now, order = [0.0], []

    class Codec:
        sample_rate = 25                              # a sample a unit

        def next_pieces(self, states, bursts, finals):
            now[0] += 0.05
            order.append([(state.setdefault("name", len(burst)), len(burst)) for state, burst
                          in zip(states, bursts)])
            return [torch.zeros(len(burst)) for burst in bursts]
    monkeypatch.setattr(codecs.time, "monotonic", lambda: now[0])
    old, new = Asked(), Asked()

    def events():
        script = [[(old, [0] * 10)]] + [[(old, [0] * 10), (new, [0] * 9)]] * 3 + [[(old, None), (new, None)]]
        for told in script:
            now[0] += 0.1
            yield from tell([told])
    kinds = [(reply is new, kind) for reply, kind, _ in codecs.with_sound(events(), Codec())]
    # a round and two renderings take 0.2 s. At 0.25 the old one has 0.3 to play, at 0.4 the new one 0.26, at
    # 0.55 the old one 0.8: they wait
    assert order == [[(10, 10)], [(9, 9)], [(10, 20)], [(9, 18)], [(10, 10), (9, 0)]]
    assert kinds[-2:] == [(False, "done"), (True, "done")]


def test_encode_counts_units():
    """25 units a second, the last one rounded up."""
    torch.manual_seed(0)
    codec, wav = NanoCodec(dim=32, phonemes="a").eval(), read_audio(str(JFK))
    samples = (176000, 3 * 640, 3 * 640 + 1, 4 * 640)
    assert [len(codec.encode(wav[:n])) for n in samples] == [275, 3, 4, 4]


def test_a_codec_survives_its_file(tmp_path):
    """What is saved comes back, rounded to fp16 and ready to speak."""
    torch.manual_seed(0)
    codec = NanoCodec(dim=32, phonemes=["a", "b"])
    codec.save(tmp_path / "codec.pt")
    again = NanoCodec.load(tmp_path / "codec.pt")
    assert again.phonemes == ["a", "b"] and not again.training
    assert all(torch.equal(again.state_dict()[k], v.half().float()) for k, v in codec.state_dict().items())


# ------------------------------------------------------------------------------------------- workers

SHARED = "unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)"
READ = """
import sys
import torch
from data import batches
class Dialogues:
    def __getitem__(self, i):
        turns = [([1], [0], [1])]
        return {"id": "a", "mels": [torch.ones(80, 10000)], "ids": [1], "labels": [1], "turns": turns}
try:
    print(len(list(batches(Dialogues(), [[i] for i in range(9)], int(sys.argv[1])))), "batches")
except ValueError as e:
    print(e)
"""


def small_shared_memory(size, workers):
    """What reading nine batches of 3.2 MB prints where /dev/shm has this size; None if we may not mount."""
    mount = f"mount -t tmpfs -o size={size} tmpfs /dev/shm"
    if not shutil.which("unshare") or subprocess.run(["unshare", "-m", "sh", "-c", mount]).returncode:
        return None
    command = "unshare", "-m", "sh", "-c", f'{mount} && exec "$@"', "sh", sys.executable, "-c", READ, workers
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60).stdout


def test_a_small_dev_shm():
    """Docker gives 64 MB. A worker that finds no room for its batch says so, with the remedy; the main
    process does not wait for a batch that never comes. Without workers none is needed."""
    found = small_shared_memory("4m", "1")
    if found is None:
        pytest.skip("needs root, to mount a small /dev/shm")
    assert "No space left on device" in found and "or --workers 0" in found and len(found.splitlines()) == 1
    assert small_shared_memory("4m", "0") == small_shared_memory("64m", "2") == "9 batches\n"


def test_workers_share_where_an_error_is_raised(tiny, monkeypatch):
    """The same without root: sharing is what fails, and it fails where the loader hands errors on."""
    def full(tensor):
        raise RuntimeError(SHARED)

    omni, *tokenizers = tiny
    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    rows = Dialogues(ROWS, *tokenizers, 128, omni.R, omni.W)
    with pytest.raises(ValueError, match="shm-size 1g"):
        next(batches(rows, [[0]], 1))
    assert len(list(batches(rows, [[0], [1]], 0))) == 2


def test_a_killed_worker(tiny):
    """The kernel may kill one, for want of memory: an error, no endless wait."""
    class Deadly(Dialogues):
        def __getitem__(self, i):
            os.kill(os.getpid(), signal.SIGKILL)

    omni, *tokenizers = tiny
    with pytest.raises(ValueError, match="worker"):
        next(batches(Deadly(ROWS, *tokenizers, 128, omni.R, omni.W), [[0]], 1))
