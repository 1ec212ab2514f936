"""
How good is a checkpoint? It answers held-out questions in unseen voices, and we judge the replies.

Why: a loss says little about a conversation. As in the paper (section 4.2) we measure the accuracy of the
text, the accuracy of the speech, and the word error rate between the two.
    exact        the text of the reply is exactly right, of the questions that this world can answer
    caught       of what it cannot understand (other questions, languages, sounds), how much it says so to
    refused      of the good questions, how many it says so to
    S2T, S2S     the answer occurs in the text; in what a recognizer hears in the spoken reply
    exact_typed  exact, for the text model that training started from, which reads the questions instead
    WER          what the recognizer hears against the text of the reply. The recognizer makes errors too,
                 so the original synthesizer's speech of the same texts is judged as well. The difference,
                 or excess, is ours. It is also given for the replies that no training dialogue holds.
    stress       of the exact replies in which one word answers the question, how many stress that word: the
                 speech is compared with espeak-ng's in which this word, or another one, is stressed. Often it
                 is the last word; stress_not_last is of the other replies
The recognizer is independent of everything that was trained here: pocketsphinx with its own acoustic model.
It is told only which words exist, once with a bigram model of the corpus's replies and once with all words
equally likely (the word loop).

The embedded world's corpus is compared with tiny/qwen2 and espeak-ng. For any other corpus, name the text
model with --llm; the figures of the original synthesizer are left out.

How: python eval.py --ckpt out/tiny_stage2
This prints a table and writes eval.json, the first dialogues as sound files, and gallery.md, which lists
what was asked, answered and heard.
"""
import functools
import itertools
import json
import math
import multiprocessing
import os
import re
import tempfile
from collections import Counter
from dataclasses import dataclass

import accelerate
import jiwer
import librosa
import numpy as np
import soundfile
import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import Qwen2ForCausalLM, Qwen2Tokenizer
from whisper.normalizers import EnglishTextNormalizer

from data import chat_ids, clips
from omni import checkpoint
from omni.audio import MIN_SECONDS, SAMPLE_RATE, log_mel
from omni.codec import load_codec
from omni.configure import configure, fail
from omni.corpus import load_corpus
from omni.engine import Engine, quicken
from omni.espeak import speak
from omni.files import read_json, replace_file

JUDGES = {"bigram": True, "word_loop": False}         # language models of the recognizer: bigrams or not
normalize = EnglishTextNormalizer()                   # "It's twelve." -> "it is 12"


@dataclass(frozen=True)
class EvalConfig:
    ckpt: str = "out/tiny_stage2"      # a run's folder or a checkpoint
    corpus: str = "corpus/tiny"        # where the questions come from
    split: str = "test"                # which split; take validation while you tune
    dialogues: int = 200               # how many dialogues of it
    topics: tuple[str, ...] = ()       # judge only turns of these topics, in dialogues that have some
    codec: str = "tiny/codec.pt"       # units -> waveform: a file, or CosyVoice 2's folder
    voice: str | None = None           # CosyVoice 2: whose voice, see sample.py
    llm: str | None = None             # the text model that training started from; none: see above
    out: str = "out/tiny_eval"         # folder for eval.json, the gallery and the picture
    runs: tuple[str, ...] = ()         # runs of the stages: draw their losses and a reply into demo.png
    keep: int = 6                      # how many dialogues go into the gallery
    text: bool = False                 # judge only the text, for a checkpoint of stage 1
    max_units: int = 1024              # longest speech, in units of 40 ms
    temperature: float = 0.3           # of the units
    top_p: float = 1.0                 # of the units
    repeats: float = 0.0               # of the units, see sample.py
    batch: int = 16                    # dialogues that are held at once
    seed: int = 1337                   # of the sampling

    def __post_init__(self):
        if self.dialogues < 1 or self.batch < 1:
            raise ValueError("dialogues and batch must be at least 1")
        if self.keep < 0:
            raise ValueError("keep must be 0 or more")


# ------------------------------------------------------------------------------------------------------ words

def word_error_rate(references, hypotheses):
    """Word errors (substitutions, insertions, deletions) per reference word, over pairs of texts.

    Both sides pass Whisper's English normalizer, so punctuation, contractions and spelling do not count. It
    writes numbers as digits, and a row of them as one word: "ten, nine, eight" becomes "1098".
    """
    return jiwer.wer([normalize(text) for text in references], [normalize(text) for text in hypotheses])


def words(text):
    """A text as lower-case words without punctuation, as pocketsphinx's dictionary spells them."""
    return re.sub(r"[^a-z' ]", " ", text.lower()).split()


def occurs(answer, text):
    """Do the words of the answer occur in the text, in a row?

    Whisper's normalizer would find "twelve" in "one, two", and would not find "nine" in "ten, nine, eight".
    """
    answer, text = words(answer), words(text)
    return bool(answer) and f" {' '.join(answer)} " in f" {' '.join(text)} "


# ------------------------------------------------------------------------------------------------- recognizer

def language_model(texts, bigram, discount=0.5):
    """The words of some texts as a language model for pocketsphinx, in ARPA format.

    bigram   True: bigrams with absolute discounting; False: all words equally likely
    """
    sentences = [["<s>", *words(text), "</s>"] for text in texts]
    count = Counter(word for sentence in sentences for word in sentence)
    pairs = Counter(pair for sentence in sentences for pair in zip(sentence, sentence[1:]))
    total = sum(count.values())
    p = {word: n / total if bigram else 1 / len(count) for word, n in count.items()}
    followed = Counter()                              # how often each word has a successor,
    kinds = Counter()                                 # how many different ones,
    known = Counter()                                 # and the mass of those: backing off gets the rest
    for (first, second), n in pairs.items():
        followed[first] += n
        kinds[first] += 1
        known[first] += p[second]

    counts, unigrams, bigrams = [f"ngram 1={len(count)}"], [], []
    for word in sorted(count):
        log_p = -99 if word == "<s>" else math.log10(p[word])
        line = f"{log_p:.4f} {word}"
        if bigram and followed[word]:
            freed = discount * kinds[word] / followed[word]
            line += f" {math.log10(freed / max(1e-6, 1 - known[word])):.4f}"
        unigrams.append(line)
    if bigram:
        counts.append(f"ngram 2={len(pairs)}")
        bigrams += ["", "\\2-grams:"]
        for (first, second), n in sorted(pairs.items()):
            bigrams.append(f"{math.log10((n - discount) / followed[first]):.4f} {first} {second}")
    return "\n".join(["\\data\\", *counts, "", "\\1-grams:", *unigrams, *bigrams, "", "\\end\\", ""])


@functools.cache
def recognizer(arpa):
    """A pocketsphinx decoder. It normalizes each clip by itself, so their order does not matter."""
    from pocketsphinx import Decoder, get_model_path
    with tempfile.NamedTemporaryFile("w", suffix=".arpa") as file:
        file.write(arpa)
        file.flush()
        return Decoder(hmm=get_model_path("en-us/en-us"), dict=get_model_path("en-us/cmudict-en-us.dict"),
                       lm=file.name, cmn="batch", loglevel="FATAL")


def transcribe(job):
    """(wav (samples,) at 16 kHz, ARPA language model) -> the text that pocketsphinx hears.

    The clip gets noise at -60 dB, a quiet room: the digital silence of a synthesizer doubles the errors.
    """
    wav, arpa = job
    decoder = recognizer(arpa)
    room = np.random.default_rng(0).normal(0, 1e-3, len(wav) + 6400)       # 0.2 s before and after the clip
    room[3200:-3200] += wav
    pcm = (np.clip(room, -1, 1) * 32767).astype(np.int16)
    decoder.start_utt()
    decoder.process_raw(pcm.tobytes(), full_utt=True)
    decoder.end_utt()
    heard = decoder.hyp()
    return heard.hypstr if heard else ""


def transcribe_all(pool, wavs, arpa):
    """Clips (samples,) at 16 kHz -> the texts that pocketsphinx hears, on all processes of the pool."""
    texts = pool.imap(transcribe, [(wav, arpa) for wav in wavs], chunksize=8)
    return list(tqdm(texts, total=len(wavs), desc="transcribing", leave=False))


def synthesize(text, voice):
    """espeak-ng's speech of a text, (samples,) at 16 kHz; no samples if the text holds nothing to say."""
    if not any(character.isalnum() for character in text):
        return np.zeros(0, np.float32)
    return speak(text, voice)


# ---------------------------------------------------------------------------------------------------- answers

def answer_all(omni, tokenizer, codec, rows, cfg):
    """Hold each dialogue with the model, several at once: it hears the user's turns and remembers its own
    replies. A reply does not depend on the others that are made beside it.

    rows     dialogues of a corpus;  codec: None for text only
    Returns  a dict for each turn, whose "wav" (samples,) has the codec's rate; and the values of the fusion
             gate, 0 to 1: how much of each row comes from the LLM. Without speech there are none.
    """
    engine = Engine(omni, cfg.batch, max_units=cfg.max_units, top_p=cfg.top_p, repeats=cfg.repeats)
    n_mels = omni.model.speech_encoder.n_mels
    turns, gates = [], [torch.zeros(0)]

    def keep_gate(module, inputs, gate):
        gates.append(gate.float().flatten().cpu())

    def ask(d, replies):
        """The next turn of dialogue d, in which the model has said `replies`."""
        t = len(replies)
        mels = [log_mel(clip, n_mels, omni.pad_audio) for clip in clips(rows[d])[:t + 1]]
        reply = engine.submit(chat_ids(tokenizer, replies), mels, speak=codec is not None,
                              temperature=cfg.temperature, seed=100000 * cfg.seed + 100 * d + t)
        asked[reply] = d, replies, []

    asked, left = {}, iter(tqdm(range(len(rows)), desc="answering", unit="dialogue"))
    for d in itertools.islice(left, cfg.batch):
        ask(d, [])
    hook = omni.speech_generator.gate.register_forward_hook(keep_gate)
    for reply, kind, x in engine.stream():
        d, replies, notes = asked[reply]
        if kind == "note":
            notes.append(x)
        if kind != "done":
            continue
        del asked[reply]
        row, t, text = rows[d], len(replies), tokenizer.decode(reply.text)
        wav = np.zeros(0, np.float32)
        if reply.units:
            wav = codec.decode(torch.tensor(reply.units)).cpu().numpy()
        turns.append({"id": row["id"], "dialogue": d, "turn": t, "topic": row["topics"][t],
                      "question": row["users"][t], "reference": row["replies"][t],
                      "spoken": row.get("spoken", row["replies"])[t],        # older corpora have none
                      "answer": row["answers"][t], "text": text, "notes": notes, "wav": wav})
        if t + 1 < len(row["users"]):
            ask(d, [*replies, text])
        else:
            for other in itertools.islice(left, 1):
                ask(other, [])
    hook.remove()
    return sorted(turns, key=lambda turn: (turn["dialogue"], turn["turn"])), torch.cat(gates)


@torch.inference_mode()
def exact_typed(model, tokenizer, rows, batch=64):
    """For each turn of some dialogues: does a text model that reads the question reply exactly right? It
    remembers its own replies."""
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    chats, right = [[] for _ in rows], [[] for _ in rows]
    tokenizer.padding_side = "left"
    for t in tqdm(range(max(len(row["users"]) for row in rows)), desc="typing", unit="turn", leave=False):
        asked = [d for d, row in enumerate(rows) if t < len(row["users"])]
        for i in range(0, len(asked), batch):
            some = asked[i:i + batch]
            for d in some:
                chats[d].append({"role": "user", "content": rows[d]["users"][t]})
            prompts = tokenizer.apply_chat_template([chats[d] for d in some], tokenize=False,
                                                    add_generation_prompt=True)
            x = tokenizer(prompts, return_tensors="pt", padding=True)
            output = model.generate(input_ids=x["input_ids"], attention_mask=x["attention_mask"],
                                    max_new_tokens=60, do_sample=False, eos_token_id=end, pad_token_id=end)
            replies = tokenizer.batch_decode(output[:, x["input_ids"].shape[1]:], skip_special_tokens=True)
            for d, reply in zip(some, replies):
                chats[d].append({"role": "assistant", "content": reply})
                right[d].append(reply == rows[d]["replies"][t])
    return list(itertools.chain.from_iterable(right))


def transcribe_turns(turns, rate, replies, voice):
    """Note in the turns what each judge hears: "heard_bigram" and "heard_word_loop", and with a voice the
    same of the original synthesizer, "heard_bigram_original" and "heard_word_loop_original".

    rate     Hz, of the turns' sound
    replies  the replies of the training split: the language models hold their words
    voice    espeak-ng's voice of the original speech; None if there is no original
    """
    spoken = []
    for turn in turns:
        wav = turn["wav"]
        if len(wav):
            wav = librosa.resample(wav, orig_sr=rate, target_sr=SAMPLE_RATE)
        spoken.append(wav)
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        sources = {"": spoken}
        if voice:
            jobs = [(turn["text"], voice) for turn in turns]
            sources["_original"] = pool.starmap(synthesize, jobs, chunksize=32)
        for judge, bigram in JUDGES.items():
            arpa = language_model(replies, bigram)
            for suffix, wavs in sources.items():
                for turn, heard in zip(turns, transcribe_all(pool, wavs, arpa)):
                    turn[f"heard_{judge}{suffix}"] = heard


# ---------------------------------------------------------------------------------------------------- figures

def percent(hits):
    """How many percent of a list of booleans are true; 0 if it is empty."""
    return 100 * sum(hits) / max(1, len(hits))


def is_exact(turn):
    return turn["text"] == turn["reference"]


def judge_text(turns, typed):
    """Figures of the texts, in percent of the turns. typed: what `exact_typed` returns, or None."""
    asked = [turn for turn in turns if turn["topic"] != "unclear"]
    unclear = [turn for turn in turns if turn["topic"] == "unclear"]
    result = {"turns": len(turns)}
    if asked:
        result["exact"] = percent([is_exact(turn) for turn in asked])
    if asked and typed is not None:
        answerable = [turn["topic"] != "unclear" for turn in turns]
        result["exact_typed"] = percent(list(itertools.compress(typed, answerable)))
    if unclear:
        refusal = unclear[0]["reference"]
        result["unclear"] = len(unclear)
        result["caught"] = percent([is_exact(turn) for turn in unclear])
    if unclear and asked:
        result["refused"] = percent([turn["text"] == refusal for turn in asked])
    answered = [turn for turn in turns if turn["answer"]]           # other corpora than tiny have none
    if answered:
        result["s2t"] = percent([occurs(turn["answer"], turn["text"]) for turn in answered])
    recalling = [turn for turn in turns if turn["topic"] == "recalling"]
    if recalling:
        result["needing_history"] = len(recalling)
        result["exact_needing_history"] = percent([is_exact(turn) for turn in recalling])
    return result


def wer(turns, key):
    """Word error rate in percent of what was heard, turn[key], against the texts."""
    return 100 * word_error_rate([turn["text"] for turn in turns], [turn[key] for turn in turns])


def judge_speech(turns, replies):
    """Figures of the speech after `transcribe_turns`, in percent. replies: those of the training split."""
    known = set(replies)
    new = [turn for turn in turns if turn["text"] not in known]
    answered = [turn for turn in turns if turn["answer"]]
    result = {"new_replies": len(new)}
    for judge in JUDGES:
        ours, original = f"heard_{judge}", f"heard_{judge}_original"
        compared = original in turns[0]
        result[f"wer_{judge}"] = wer(turns, ours)
        if compared:
            result[f"wer_{judge}_original"] = wer(turns, original)
            result[f"wer_{judge}_excess"] = result[f"wer_{judge}"] - result[f"wer_{judge}_original"]
        if answered:
            result[f"s2s_{judge}"] = percent([occurs(turn["answer"], turn[ours]) for turn in answered])
        if answered and compared:
            hits = [occurs(turn["answer"], turn[original]) for turn in answered]
            result[f"s2s_{judge}_original"] = percent(hits)
        if new and compared:
            result[f"wer_{judge}_excess_new_replies"] = wer(new, ours) - wer(new, original)
    return result


def autocorrelation(x):
    """(samples, frames) -> (320, frames), for lags of 0 to 319 samples."""
    return np.fft.irfft(np.abs(np.fft.rfft(x, 1024, axis=0)) ** 2, axis=0)[:320]


def contour(wav):
    """wav (samples,) at 16 kHz -> what carries stress, (81, frames) at 100 Hz: the log-mel, and the pitch in
    semitones around its median, times 0.3; straight lines bridge what is not voiced.

    The pitch, from 64 to 320 Hz, is the peak of the autocorrelation, divided by the window's, with a small
    preference for the highest pitch, as two periods are periodic too (Boersma 1993).
    """
    mel = log_mel(torch.from_numpy(wav), 80, pad=False).numpy()
    window = np.hanning(640)[:, None]                 # 40 ms
    frames = librosa.util.frame(np.pad(wav, 320), frame_length=640, hop_length=160)[:, :mel.shape[1]]
    r = autocorrelation(window * frames) / autocorrelation(window)
    power, lags = r[0], np.arange(50, 251)
    periodic = r[lags] - 0.02 * np.log2(lags / 50)[:, None] * power
    semitones = 12 * np.log2(SAMPLE_RATE / lags[periodic.argmax(0)])
    voiced = (periodic.max(0) > 0.5 * power) & (power > 0.01 * np.quantile(power, 0.9))
    if not voiced.any():
        return np.vstack([mel, 0 * power])
    pitch = np.interp(np.arange(len(power)), np.flatnonzero(voiced), semitones[voiced])
    return np.vstack([mel, 0.3 * (pitch - np.median(pitch))])


def stressed_word(job):
    """(wav (samples,) at 16 kHz, text, espeak-ng's voice) -> which word of the text is stressed, from 0: the
    one whose stressed rendering by espeak-ng is the nearest. None if there is less sound than 0.1 s.

    The tempo is removed first. Then dynamic time warping compares sound and pitch; as stress also takes time,
    each step that warps it costs 3 more. Of 40 replies by espeak-ng itself, with 20 dB of noise and 5 %
    faster or slower, all are recognized; of unstressed ones 2 % seem to be, less than by chance (21 %),
    because without stress the shortest word's rendering is the nearest.
    """
    wav, text, voice = job
    if len(wav) < MIN_SECONDS * SAMPLE_RATE:
        return None
    ours, tokens, distances = torch.from_numpy(contour(wav)), text.split(), []
    for i, token in enumerate(tokens):
        word = token.rstrip(".,?!")
        marked = f"<stress>{word}</stress>{token[len(word):]}"
        theirs = contour(speak(" ".join([*tokens[:i], marked, *tokens[i + 1:]]), voice))
        same_tempo = F.interpolate(ours[None], theirs.shape[1], mode="linear")[0].numpy()
        costs = librosa.sequence.dtw(same_tempo, theirs, weights_add=np.array([0, 3, 3]), backtrack=False)
        distances.append(costs[-1, -1])
    return int(np.argmin(distances))


def judge_stress(turns, rate, voice):
    """How many percent of the exact replies stress the word that answers the question, of those where that is
    one word, and how many replies these are; and the same where it is not the last word. rate: Hz, of the
    turns' sound."""
    jobs, right = [], []
    for turn in turns:
        before, _, rest = turn["spoken"].partition("<stress>")
        word = rest.partition("</stress>")[0]
        if len(word.split()) == 1 and is_exact(turn):
            wav = turn["wav"]
            if len(wav):
                wav = librosa.resample(wav, orig_sr=rate, target_sr=SAMPLE_RATE)
            jobs.append((wav, turn["text"], voice))
            right.append(len(before.split()))
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        found = pool.map(stressed_word, jobs, chunksize=8)
    result = {}
    hits = [a == b for a, b in zip(found, right)]
    early = [i < len(text.split()) - 1 for i, (_, text, _) in zip(right, jobs)]
    for key, counted in (("", hits), ("_not_last", list(itertools.compress(hits, early)))):
        if counted:
            result |= {f"stressed{key}_replies": len(counted), f"stress{key}": percent(counted)}
    return result


# ----------------------------------------------------------------------------------------------------- output

def report(turns, result, split):
    """Print the share of exact replies by topic, then all figures."""
    print(f"\n{'topic':14}{'turns':>7}{'exact %':>9}")
    for topic, n in Counter(turn["topic"] for turn in turns).most_common():
        share = percent([is_exact(turn) for turn in turns if turn["topic"] == topic])
        print(f"{topic:14}{n:7}{share:9.1f}")
    print(f"\n{'figure on ' + split:40}{'value':>9}")
    for key, value in result.items():
        if isinstance(value, int):
            print(f"{key:40}{value:9}")
        elif abs(value) < 1:
            print(f"{key:40}{value:9.3f}")
        else:
            print(f"{key:40}{value:9.1f}")


def write_sound(path, wav, rate):
    """An Opus file, whole or not at all."""
    soundfile.write(path + ".tmp", np.clip(wav, -1, 1), rate, format="OGG", subtype="OPUS")
    os.replace(path + ".tmp", path)


def write_sounds(folder, rows, turns, rate):
    """Write the questions and replies of some turns as sound files and note their names in the turns, as
    "question_file" and "reply_file". A silent reply has no file."""
    for turn in turns:
        name = f"{folder}/{turn['dialogue']}-{turn['turn'] + 1}"
        question = clips(rows[turn["dialogue"]])[turn["turn"]]
        turn["question_file"] = f"{name}-question.ogg"
        write_sound(turn["question_file"], question.numpy(), SAMPLE_RATE)
        if len(turn["wav"]):
            turn["reply_file"] = f"{name}-reply.ogg"
            write_sound(turn["reply_file"], turn["wav"], rate)


def write_gallery(path, turns):
    """Turns with sound files as a table in Markdown, right or wrong."""
    lines = ["| | asked | answered | heard by pocketsphinx | |", "|---|---|---|---|---|"]
    for turn in turns:
        question = f"[▶]({os.path.basename(turn['question_file'])})"
        reply = "(silent)"
        if "reply_file" in turn:
            reply = f"[▶]({os.path.basename(turn['reply_file'])})"
        mark = "right" if is_exact(turn) else f"wrong: {turn['reference']}"
        lines.append(f"| {turn['dialogue']}.{turn['turn'] + 1} | {question} {turn['question']} | "
                     f"{reply} {turn['text']} | {turn['heard_bigram']} | {mark} |")
    replace_file(path, "\n".join(lines) + "\n")


def write_picture(path, runs, turn):
    """One PNG: the losses of the runs and, unless the turn is None, the log-mels of its question and its
    reply with the texts below them."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure = plt.figure(figsize=(12, 7 if turn else 3.5))
    grid = figure.add_gridspec(2 if turn else 1, 1)
    upper = grid[0].subgridspec(1, len(runs))
    for i, run in enumerate(runs):
        log = read_json(checkpoint.newest_checkpoint(run), "meta.json")["log"]
        axes = figure.add_subplot(upper[i])
        for key, style in (("loss", "-"), ("val_loss", "o-")):
            steps = [line["step"] for line in log if key in line]
            axes.plot(steps, [line[key] for line in log if key in line], style, label=key, markersize=3)
        axes.set(title=os.path.basename(run), xlabel="step", yscale="log")
        axes.set_ylabel("" if i else "nats per target")
        axes.legend()
    if turn:
        lower = grid[1].subgridspec(1, 2)
        for i, (side, text) in enumerate((("question", turn["question"]), ("reply", turn["text"]))):
            wav, rate = soundfile.read(turn[f"{side}_file"], dtype="float32")
            mel = librosa.feature.melspectrogram(y=wav, sr=rate, hop_length=rate // 100, n_mels=80,
                                                 fmax=8000)
            mel = librosa.power_to_db(mel, ref=np.max, top_db=70)
            axes = figure.add_subplot(lower[i])
            axes.imshow(mel, origin="lower", aspect="auto", extent=(0, len(wav) / rate, 0, 80))
            axes.set(title=side, xlabel=f"seconds\n{text}", ylabel="mel bin")
    figure.tight_layout()
    figure.savefig(path + ".tmp", dpi=100, format="png")
    plt.close(figure)
    os.replace(path + ".tmp", path)


def write(cfg, rows, turns, result, rate):
    """Write eval.json; with a codec's rate (Hz) the gallery, with cfg.runs the picture."""
    kept = [turn for turn in turns if turn["dialogue"] < cfg.keep]
    if rate:
        write_sounds(cfg.out, rows, kept, rate)
        write_gallery(f"{cfg.out}/gallery.md", kept)
    replies = [{key: value for key, value in turn.items() if key != "wav"} for turn in turns]
    figures = {"ckpt": cfg.ckpt, **result, "replies": replies}
    replace_file(f"{cfg.out}/eval.json", json.dumps(figures, indent=1))
    spoken = [turn for turn in kept if "reply_file" in turn]
    if cfg.runs:
        shown = max(spoken, key=is_exact, default=None)             # the first right one, or the first
        write_picture(f"{cfg.out}/demo.png", cfg.runs, shown)
        content = "and a question with its reply" if shown else "only: the gallery has no spoken reply"
        print(f"{cfg.out}/demo.png shows the losses of {', '.join(cfg.runs)} {content}")
    for turn in spoken:
        print(f"{turn['reply_file']}\n    asked {turn['question']!r}, said {turn['text']!r}, "
              f"heard {turn['heard_bigram']!r}")


# ------------------------------------------------------------------------------------------------------- main

def find_originals(cfg):
    """What the checkpoint is compared with: (the text model that training started from, espeak-ng's voice in
    the replies that it learned from). An unknown one is None, and what is left out is printed."""
    llm, voice = cfg.llm, None
    made = read_json(cfg.corpus, "meta.json")
    if made.get("source") == "tiny":
        llm = llm or "tiny/qwen2"
        if made["tts"] is None:
            voice = made["assistant"]
    if llm is None:
        print(f"exact_typed is left out: {cfg.corpus} is not the embedded corpus; name the text model that "
              "training started from with --llm")
    if voice is None and not cfg.text:
        print(f"the original synthesizer's WER and S2S are left out: the replies of {cfg.corpus} are not "
              "espeak-ng's in the embedded world")
    return llm and checkpoint.local_or_hub(llm), voice


def main():
    cfg = configure(EvalConfig)
    torch.manual_seed(cfg.seed)
    device = accelerate.PartialState().device
    for run in cfg.runs:
        if not checkpoint.newest_checkpoint(run):
            fail(f"--runs: there is no checkpoint in {run}")
    try:                                              # report what is missing before the long part
        rows = load_corpus(cfg.corpus, cfg.split)
        if cfg.topics:
            wanted = set(cfg.topics)
            rows = rows.select([i for i, topics in enumerate(rows["topics"]) if wanted & set(topics)])
            if not len(rows):
                fail(f"--topics {','.join(cfg.topics)}: no dialogue of {cfg.corpus} has such a turn")
        rows = rows.select(range(min(cfg.dialogues, len(rows))))
        llm, voice = find_originals(cfg)
        codec = None if cfg.text else load_codec(cfg.codec, cfg.voice).to(device)
        if llm:
            text_model = Qwen2ForCausalLM.from_pretrained(llm, dtype=torch.float32)
            text_tokenizer = Qwen2Tokenizer.from_pretrained(llm)
        omni, tokenizer, _ = checkpoint.load(cfg.ckpt)
        os.makedirs(cfg.out, exist_ok=True)
    except (OSError, ValueError, RuntimeError) as e:
        fail(e)
    # bf16 on a GPU as the official code; on a CPU figures shall not depend on how fast it is
    quicken(omni.eval().to(device), [torch.bfloat16 if device.type == "cuda" else torch.float32])

    turns, gate = answer_all(omni, tokenizer, codec, rows, cfg)
    typed = exact_typed(text_model, text_tokenizer, rows) if llm else None
    if cfg.topics:
        judged = [turn["topic"] in cfg.topics for turn in turns]
        turns = list(itertools.compress(turns, judged))
        typed = typed and list(itertools.compress(typed, judged))
    result = {"dialogues": len(rows)} | judge_text(turns, typed)
    if codec:
        replies = [reply for row in load_corpus(cfg.corpus, "train")["replies"] for reply in row]
        transcribe_turns(turns, codec.sample_rate, replies, voice)
        result |= judge_speech(turns, replies) | {"cut": sum(bool(turn["notes"]) for turn in turns)}
        if voice:
            result |= judge_stress(turns, codec.sample_rate, voice)
        if len(gate):
            result |= {"gate_mean": float(gate.mean()), "gate_spread": float(gate.std())}
    report(turns, result, cfg.split)
    write(cfg, rows, turns, result, codec.sample_rate if codec else None)


if __name__ == "__main__":
    main()
