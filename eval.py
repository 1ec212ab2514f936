"""
How good is a checkpoint? Spoken questions that were never asked, in voices that were never heard.

Why: a loss says little about a conversation. As in the paper (section 4.2) there are two accuracies, of the text and
of the speech, where an answer counts if it occurs in the reply, and a word error rate between the two.
    exact        the reply's text is right to the letter
    S2T, S2S     the answer occurs in the text; in what a recogniser hears in the spoken reply
    typed        exact, when the text model that training started from reads the same questions
    WER          what the recogniser hears, against the reply's own text; beside it the same for the original
                 synthesiser's speech of the same texts, since the recogniser errs too. The excess is ours.
The recogniser is independent of all that was trained here: pocketsphinx with its own acoustic model, told only which
words there are, once with a bigram model of the corpus's replies and once with all words equally likely.

How: python eval.py --ckpt out/tiny_stage2        prints the table, writes eval.json, and the first dialogues as sound
files with gallery.md, which says what was asked, answered and heard
"""
import functools
import json
import math
import multiprocessing
import os
import re
import tempfile
from collections import Counter
from dataclasses import dataclass

import accelerate
import librosa
import numpy as np
import soundfile
import torch
from tqdm import tqdm
from transformers import Qwen2ForCausalLM, Qwen2Tokenizer

from configure import configure, fail


# ------------------------------------------------------------------------------------------------------- words

def words(text):
    """A text as lower-case words without punctuation."""
    return re.sub(r"[^a-z' ]", " ", text.lower()).split()


def word_errors(reference, hypothesis):
    """Levenshtein distance between two lists of words: substitutions, insertions and deletions."""
    row = list(range(len(hypothesis) + 1))
    for i, r in enumerate(reference, 1):
        diagonal, row[0] = row[0], i
        for j, h in enumerate(hypothesis, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (r != h))
    return row[-1]


def word_error_rate(references, hypotheses):
    """Word errors per reference word, over pairs of texts."""
    pairs = [(words(r), words(h)) for r, h in zip(references, hypotheses, strict=True)]
    return sum(word_errors(r, h) for r, h in pairs) / max(1, sum(len(r) for r, _ in pairs))


def occurs(answer, text):
    """Do the words of the answer occur in the text, in a row?"""
    return f" {' '.join(words(answer))} " in f" {' '.join(words(text))} "


# -------------------------------------------------------------------------------------------------- recogniser

def language_model(texts, bigram, discount=0.5):
    """ARPA text of a bigram model with absolute discounting, or of the uniform distribution over the words."""
    sentences = [["<s>", *words(t), "</s>"] for t in texts]
    one, two = Counter(w for s in sentences for w in s), Counter(p for s in sentences for p in zip(s, s[1:]))
    total, after, kinds = sum(one.values()), Counter(), Counter()
    for (w, _), n in two.items():
        after[w] += n
        kinds[w] += 1
    p = {w: one[w] / total if bigram else 1 / len(one) for w in one}
    known = Counter()                                 # probability of the words seen after w, which backing off must not share
    for w, v in two:
        known[w] += p[v]
    lines = ["\\data\\", f"ngram 1={len(one)}", *([f"ngram 2={len(two)}"] if bigram else []), "", "\\1-grams:"]
    for w in sorted(one):
        back = f" {math.log10(discount * kinds[w] / after[w] / max(1e-6, 1 - known[w])):.4f}" if bigram and after[w] else ""
        lines.append(f"{-99 if w == '<s>' else math.log10(p[w]):.4f} {w}{back}")
    if bigram:
        lines += ["", "\\2-grams:", *(f"{math.log10((n - discount) / after[w]):.4f} {w} {v}" for (w, v), n in sorted(two.items()))]
    return "\n".join([*lines, "", "\\end\\", ""])


@functools.cache
def recogniser(arpa):
    from pocketsphinx import Decoder, get_model_path
    with tempfile.NamedTemporaryFile("w", suffix=".arpa") as file:
        file.write(arpa)
        file.flush()
        return Decoder(hmm=get_model_path("en-us/en-us"), dict=get_model_path("en-us/cmudict-en-us.dict"), lm=file.name,
                       cmn="batch", loglevel="FATAL")         # each clip is normalised by itself, in whatever order they come


def hear(job):
    """(wav (samples,) at 16 kHz, ARPA language model) -> the text that pocketsphinx hears. The clip is put into a quiet
    room, noise at -60 dB: the digital silence of a synthesiser doubles its errors."""
    wav, arpa = job
    decoder, room = recogniser(arpa), np.random.default_rng(0).normal(0, 1e-3, len(wav) + 6400)
    room[3200:-3200] += wav
    pcm = (np.clip(room, -1, 1) * 32767).astype(np.int16)
    decoder.start_utt()
    decoder.process_raw(pcm.tobytes(), full_utt=True)
    decoder.end_utt()
    return decoder.hyp().hypstr if decoder.hyp() else ""


def hear_all(pool, wavs, arpa):
    """Many clips, on all cores."""
    return list(tqdm(pool.imap(hear, [(w, arpa) for w in wavs], chunksize=8), total=len(wavs), desc="recognising", leave=False))


def speak_all(pool, texts):
    from tiny import world
    return pool.starmap(world.speak, [(t, world.ASSISTANT) for t in texts], chunksize=32)


# ------------------------------------------------------------------------------------------------------- table

@dataclass(frozen=True)
class EvalConfig:
    ckpt: str = "out/tiny_stage2"      # a run's folder or a checkpoint
    corpus: str = "corpus/tiny"        # its test split is asked
    split: str = "test"                # or validation, while something is still being tuned
    dialogues: int = 200               # how many
    codec: str = "tiny/codec.pt"       # units -> waveform: a file, or CosyVoice 2's folder
    voice: str | None = None           # CosyVoice 2: whose voice, see sample.py
    llm: str = "tiny/qwen2"            # the text model that training started from
    out: str = "out/tiny_eval"         # folder for eval.json, the gallery and the picture
    runs: tuple[str, ...] = ()         # the runs of the three stages: draw their losses and a reply into demo.png
    keep: int = 6                      # how many dialogues are kept in the gallery
    text: bool = False                 # text alone: exact and S2T, for a checkpoint of stage 1
    max_units: int = 1024              # longest speech, in units of 40 ms
    temperature: float = 0.3           # of the units
    top_p: float = 1.0                 # of the units
    repeats: float = 0.0               # of the units, see sample.py
    seed: int = 1337                   # of the sampling

    def __post_init__(self):
        if self.dialogues < 1:
            raise ValueError("dialogues must be at least 1")


def picture(path, runs, turn, question, reply, rate):
    """One PNG: the losses of the runs, and the log-mels of a question and of its reply with the texts under them."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from model import newest_checkpoint
    fig = plt.figure(figsize=(12, 7))
    grid = fig.add_gridspec(2, 1)
    upper, lower = grid[0].subgridspec(1, len(runs)), grid[1].subgridspec(1, 2)
    for i, run in enumerate(runs):
        with open(os.path.join(newest_checkpoint(run), "meta.json")) as f:
            log = json.load(f)["log"]
        ax = fig.add_subplot(upper[i])
        for key, style in (("loss", "-"), ("val_loss", "o-")):
            ax.plot([x["step"] for x in log if key in x], [x[key] for x in log if key in x], style, label=key, markersize=3)
        ax.set(title=os.path.basename(run), xlabel="step", ylabel="nats per target", yscale="log")
        ax.legend()
    for i, (wav, sr, title, text) in enumerate(((question, 16000, "question", turn["question"]), (reply, rate, "reply", turn["text"]))):
        ax = fig.add_subplot(lower[i])
        mel = librosa.feature.melspectrogram(y=np.asarray(wav, np.float32), sr=sr, hop_length=sr // 100, n_mels=80, fmax=8000)
        ax.imshow(librosa.power_to_db(mel, ref=np.max, top_db=70), origin="lower", aspect="auto", extent=(0, len(wav) / sr, 0, 80))
        ax.set(title=title, xlabel=f"seconds\n{text}", ylabel="mel bin")
    fig.tight_layout()
    fig.savefig(path, dpi=100)


@torch.inference_mode()
def typed(model, tokenizer, rows):
    """For each turn of the rows: is the answer of the text model right to the letter, the user's words typed?"""
    end, right = tokenizer.convert_tokens_to_ids("<|im_end|>"), []
    for row in tqdm(rows, desc="typing", unit="dialogue", leave=False):
        messages = []
        for user, reply in zip(row["users"], row["replies"]):
            messages.append({"role": "user", "content": user})
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            ids = tokenizer(text, return_tensors="pt")["input_ids"]
            out = model.generate(ids, max_new_tokens=60, do_sample=False, eos_token_id=end, pad_token_id=end)[0, ids.shape[1]:]
            messages.append({"role": "assistant", "content": tokenizer.decode(out, skip_special_tokens=True)})
            right.append(messages[-1]["content"] == reply)
    return right


def gallery(folder, turns):
    """folder/gallery.md: a table of the turns that were kept, right or wrong."""
    lines = ["| | asked | answered | heard by pocketsphinx | |", "|---|---|---|---|---|"]
    for t in turns:
        mark = "right" if t["text"] == t["reference"] else f"wrong: {t['reference']}"
        link = lambda key: f"[▶]({os.path.basename(t[key])})"
        lines.append(f"| {t['dialogue']}.{t['turn'] + 1} | {link('question_file')} {t['question']} | "
                     f"{link('reply_file')} {t['text']} | {t['heard_bigram']} | {mark} |")
    with open(f"{folder}/gallery.md", "w") as f:
        f.write("\n".join(lines) + "\n")


def main():
    cfg = configure(EvalConfig)
    from codec import load_codec
    from data import clips, load_corpus
    from model import Omni, log_mel, newest_checkpoint
    from sample import SampleConfig, answer
    torch.manual_seed(cfg.seed)
    device = accelerate.PartialState().device
    rows = load_corpus(cfg.corpus, cfg.split)
    rows = rows.select(range(min(cfg.dialogues, len(rows))))
    for run in cfg.runs:
        if not newest_checkpoint(run):
            fail(f"--runs: there is no checkpoint in {run}")
    try:                                              # whatever is missing is said now, not after the answers
        how = SampleConfig(max_units=cfg.max_units, temperature=cfg.temperature, top_p=cfg.top_p, repeats=cfg.repeats)
        codec = None if cfg.text else load_codec(cfg.codec, cfg.voice).to(device)
        text_model = Qwen2ForCausalLM.from_pretrained(cfg.llm, dtype=torch.float32), Qwen2Tokenizer.from_pretrained(cfg.llm)
        omni, tokenizer, _ = Omni.from_pretrained(cfg.ckpt)
        os.makedirs(cfg.out, exist_ok=True)
    except (OSError, ValueError, RuntimeError) as e:
        fail(e)
    omni.eval().to(device)
    gate = []                                         # how much of each row comes from the LLM's state, 0 to 1
    omni.speech_generator.gate.register_forward_hook(lambda module, inputs, g: gate.append(g))
    turns = []
    for d, row in enumerate(tqdm(rows, desc="answering", unit="dialogue")):
        questions = clips(row)
        mels = [log_mel(c, omni.model.speech_encoder.n_mels) for c in questions]
        said = []                                     # the conversation goes on from what the model said itself
        for t in range(len(mels)):
            text, wav, notes, (first_text, first_audio, seconds) = answer(omni, tokenizer, codec, mels[:t + 1], said, how)
            said.append(text)
            turns.append({"id": row["id"], "dialogue": d, "turn": t, "topic": row["topics"][t], "question": row["users"][t],
                          "reference": row["replies"][t], "answer": row["answers"][t], "text": text, "notes": notes,
                          "wav": wav, "first_text": first_text, "first_audio": first_audio, "seconds": seconds})
            if d < cfg.keep:
                turns[-1]["question_file"], turns[-1]["reply_file"] = (f"{cfg.out}/{d}-{t + 1}-{n}.ogg" for n in ("question", "reply"))
                soundfile.write(turns[-1]["question_file"], questions[t].numpy(), 16000, subtype="OPUS")
                if codec:
                    soundfile.write(turns[-1]["reply_file"], np.clip(wav, -1, 1), codec.sample_rate, subtype="OPUS")
    share = lambda hits: 100 * sum(hits) / max(1, len(hits))
    result = {"dialogues": len(rows), "turns": len(turns),
              "exact": share([t["text"] == t["reference"] for t in turns]),
              "exact_typed": share(typed(*text_model, rows))}
    answers = any(t["answer"] for t in turns)         # the embedded world's corpus alone has them
    if answers:
        result |= {"s2t": share([occurs(t["answer"], t["text"]) for t in turns]),
                   "exact_needing_history": share([t["text"] == t["reference"] for t in turns if t["topic"] == "recalling"])}
    print(f"\n{'topic':14}{'turns':>7}{'exact %':>9}")
    for topic, n in Counter(t["topic"] for t in turns).most_common():
        print(f"{topic:14}{n:7}{share([t['text'] == t['reference'] for t in turns if t['topic'] == topic]):9.1f}")
    if codec:
        texts = [t["text"] for t in turns]
        spoken = [librosa.resample(t["wav"], orig_sr=codec.sample_rate, target_sr=16000) for t in turns]
        replies = [r for row in load_corpus(cfg.corpus, "train")["replies"] for r in row]
        known = set(replies)
        result["new_replies"] = sum(t not in known for t in texts)      # said in no dialogue of training
        arpas = {"bigram": language_model(replies, True), "word_loop": language_model(replies, False)}
        with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
            original = speak_all(pool, [t if t.strip() else "no" for t in texts])
            judged = {name: (hear_all(pool, spoken, arpa), hear_all(pool, original, arpa)) for name, arpa in arpas.items()}
        for name, (heard, heard_original) in judged.items():
            result[f"wer_{name}"] = 100 * word_error_rate(texts, heard)
            result[f"wer_{name}_original"] = 100 * word_error_rate(texts, heard_original)
            result[f"wer_{name}_excess"] = result[f"wer_{name}"] - result[f"wer_{name}_original"]
            if answers:
                result[f"s2s_{name}"] = share([occurs(t["answer"], h) for t, h in zip(turns, heard)])
                result[f"s2s_{name}_original"] = share([occurs(t["answer"], h) for t, h in zip(turns, heard_original)])
            fresh = [(t, o, h) for t, o, h in zip(texts, heard_original, heard) if t not in known]
            if fresh:
                said, o, h = zip(*fresh)
                result[f"wer_{name}_excess_new_replies"] = 100 * (word_error_rate(said, h) - word_error_rate(said, o))
            for t, h in zip(turns, heard):
                t[f"heard_{name}"] = h
        sounding = [t["first_audio"] for t in turns if t["first_audio"]]
        if sounding:                                  # an early checkpoint may be silent throughout
            result["rtf"] = sum(t["seconds"] for t in turns) / (sum(map(len, spoken)) / 16000)
            result["first_audio_ms"] = 1000 * float(np.median(sounding))
        if gate:
            g = torch.stack(gate).float()
            result |= {"gate_mean": float(g.mean()), "gate_spread": float(g.std())}
        result["cut"] = sum(bool(t["notes"]) for t in turns)
    print(f"\n{'figure on ' + cfg.split:40}{'value':>9}")
    for key, value in result.items():
        print(f"{key:40}{value:9.{3 if value < 1 else 1}f}" if isinstance(value, float) else f"{key:40}{value:9}")
    with open(f"{cfg.out}/eval.json.tmp", "w") as f:
        json.dump({"ckpt": cfg.ckpt, **result, "replies": [{k: v for k, v in t.items() if k != "wav"} for t in turns]}, f, indent=1)
    os.replace(f"{cfg.out}/eval.json.tmp", f"{cfg.out}/eval.json")
    if cfg.runs and codec:
        spoken_turns = [t for t in turns if "reply_file" in t and len(t["wav"])]
        shown = max(spoken_turns, key=lambda t: t["text"] == t["reference"])      # the first right one, or the first
        picture(f"{cfg.out}/demo.png", cfg.runs, shown, soundfile.read(shown["question_file"])[0], shown["wav"], codec.sample_rate)
        print(f"{cfg.out}/demo.png: the losses of {', '.join(cfg.runs)}, and a question with its reply")
    if codec:
        kept = [t for t in turns if "reply_file" in t]
        gallery(cfg.out, kept)
        for t in kept:
            print(f"{t['reply_file']}\n    asked {t['question']!r}, said {t['text']!r}, heard {t['heard_bigram']!r}")


if __name__ == "__main__":
    main()
