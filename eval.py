"""
How good is a checkpoint? It answers held-out questions, and we judge the replies.

Why: a loss says little about a conversation. As in the paper (section 4.2) we measure the accuracy of the
text, the accuracy of the speech, and the word error rate between the two; every figure with the interval in
which 95 % of repetitions with other questions of the same kind would fall.
    s2t, s2s     the reply is right by the set's own rule: its text; what a recognizer hears in its speech
    wer          what the recognizer hears against the text of the reply
    typed_before, typed_after   s2t of the text model that training started from, and of this one, both
                 reading the questions: did learning to hear cost language?
    first audio, real-time factor, stalls, limits: of replies that are made --batch at a time
The embedded world's own set, "tiny", has dialogues and more figures:
    exact        the text is exactly right, of the questions that this world can answer
    caught       of what it cannot understand (other questions, languages, sounds), how much it says so to
    refused      of the good questions, how many it says so to
    excess       the recognizer errs too, so the original synthesizer's speech of the same texts is judged as
                 well; the difference is ours. Also for the replies that no training dialogue holds
    stress       of the exact replies in which one word answers the question, how many stress that word; often
                 it is the last one, and stress_not_last is of the others
Its recognizer is told only which words exist, once with bigrams of the corpus's replies and once with all
words equally likely (the word loop).

How: python eval.py --ckpt out/tiny_stage2
     python eval.py --ckpt out/stage2 --set llama-questions --codec cosy2_decoder
     python eval.py --ckpt out/stage2 --set voicebench/openbookqa --path folder
     python eval.py --compare out/eval_a,out/eval_b
omni/sets.py lists the sets. The folder gets results.json, report.md, report.html (every reply, with its
sound, the worst first), gallery.md and pictures. Several processes share the questions (torchrun
--nproc_per_node 2 eval.py ...). What is answered is kept: the same command after a kill goes on, and gives
the same figures.
"""
import itertools
import json
import multiprocessing
import os
import shlex
import sys
from collections import Counter
from dataclasses import asdict, dataclass, replace
from time import perf_counter

import accelerate
import librosa
import numpy as np
import soundfile
import torch
from tqdm import tqdm
from transformers import Qwen2ForCausalLM, Qwen2Tokenizer

import omni.report as report
from data import chat_ids, clips
from omni import checkpoint
from omni.audio import SAMPLE_RATE, log_mel
from omni.codec import load_codec, pace, with_sound
from omni.configure import configure, fail
from omni.corpus import load_corpus
from omni.engine import Engine, quicken
from omni.espeak import speak
from omni.files import Lines, commit, read_json, replace_file, sha256
from omni.judges import by_sphinx, by_whisper, language_model, scores
from omni.score import difference, errors, interval, is_right, mean, ratio
from omni.sets import published, read_set, write_forms

JUDGES = {"bigram": True, "word_loop": False}         # the embedded world's recognizer: bigrams or not


@dataclass(frozen=True)
class EvalConfig:
    ckpt: str = "out/tiny_stage2"      # a run's folder, a checkpoint, or hf:owner/name on the hub
    set: str = "tiny"                  # which questions, see omni/sets.py
    path: str | None = None            # where they are; none: on the hub
    tts: str | None = None             # command that reads aloud questions without sound, as in data.py
    corpus: str = "corpus/tiny"        # set tiny: the corpus whose dialogues are held ...
    split: str = "test"                # ... and which split; take validation while you tune
    dialogues: int = 0                 # how many; 0: 200 of the set tiny, all of another
    topics: tuple[str, ...] = ()       # set tiny: judge only turns of these, in dialogues that have some
    codec: str = "tiny/codec.pt"       # units -> waveform: a file, or CosyVoice 2's folder
    voice: str | None = None           # CosyVoice 2: whose voice, see sample.py
    recognizer: str = ""               # pocketsphinx, whisper:NAME_OR_FILE, or nano:FOLDER of backbones of
                                       # another language; none: pocketsphinx for tiny, else whisper:large-v3
    language: str = "en"               # which Whisper hears, such as de
    llm: str | None = None             # text model that training started from; none: tiny/qwen2 for tiny
    utmos: str | None = None           # the TorchScript file of UTMOS, which rates naturalness
    judge: str | None = None           # address of an OpenAI-compatible endpoint that scores 1 to 5 ...
    judge_model: str = "gpt-4o"        # ... and its model
    out: str | None = None             # folder for all that is written; none: out/ and the names of both
    compare: tuple[str, ...] = ()      # two such folders: print how the second differs from the first
    runs: tuple[str, ...] = ()         # runs of the stages: draw their losses and a reply into demo.png
    keep: int = 6                      # how many dialogues go into the gallery
    text: bool = False                 # judge only the text, for a checkpoint of stage 1
    max_tokens: int = 128              # longest text
    max_units: int = 1024              # longest speech, in units of 40 ms
    temperature: float = 0.3           # of the units; 0 is greedy
    top_p: float = 1.0                 # of the units
    repeats: float = 0.0               # of the units, see sample.py
    batch: int = 16                    # dialogues that are held at once
    seed: int = 1337                   # of the sampling

    def __post_init__(self):
        if self.dialogues < 0 or self.batch < 1 or self.keep < 0:
            raise ValueError("dialogues and keep must be 0 or more, batch at least 1")
        if len(self.compare) not in (0, 2):
            raise ValueError("compare takes two folders, as in --compare out/a,out/b")
        if self.recognizer.partition(":")[0] not in ("", "pocketsphinx", "whisper", "nano"):
            raise ValueError(f"recognizer {self.recognizer} is neither pocketsphinx nor whisper:NAME_OR_FILE "
                             "nor nano:FOLDER")


# -------------------------------------------------------------------------------------------------- questions

def read_questions(cfg):
    """(rows in the form of a corpus, the rule by which a reply is right). Raises ValueError."""
    if cfg.set != "tiny":
        return read_set(cfg.set, cfg.path, cfg.dialogues, cfg.tts)
    rows = load_corpus(cfg.corpus, cfg.split, hear=True)
    if cfg.topics:
        wanted = set(cfg.topics)
        rows = rows.select([i for i, topics in enumerate(rows["topics"]) if wanted & set(topics)])
        if not len(rows):
            raise ValueError(f"--topics {','.join(cfg.topics)}: no dialogue of {cfg.corpus} has such a turn")
    return list(rows.select(range(min(cfg.dialogues or 200, len(rows))))), "world"


def turn_of(row, d, t):
    """What is known of a turn before it is answered."""
    answer = row["answers"][t]
    return {"id": row["id"], "dialogue": d, "turn": t, "category": row["topics"][t] or "all",
            "question": row["users"][t], "reference": row["replies"][t],
            "spoken": (row.get("spoken") or row["replies"])[t],            # older corpora have none
            "references": row.get("references") or ([answer] if answer else []), "text": "", "units": [],
            "notes": [], "error": row.get("error"), "sound": None}


def answer_all(omni, tokenizer, codec, rows, numbers, cfg):
    """Hold dialogues with the model, several at once: it hears the user's turns and remembers its own
    replies. A reply does not depend on the others that are made beside it.

    numbers  which of the rows;  codec: None for text only
    Yields   as dialogues end (number, [turn, ...], what the fusion gate did since: how many values, their
             sum, the sum of their squares); a turn's "wav" (samples,) has the codec's rate
    """
    engine = Engine(omni, cfg.batch, cfg.max_tokens, cfg.max_units, top_p=cfg.top_p, repeats=cfg.repeats)
    n_mels, gate = omni.model.speech_encoder.n_mels, torch.zeros(3, dtype=torch.float64)
    asked, held, broken = {}, {}, []

    def keep_gate(module, inputs, values):
        values = values.double().cpu()
        gate.add_(torch.stack([torch.tensor(values.numel()).double(), values.sum(), (values ** 2).sum()]))

    def ask(d):
        """The next turn of dialogue d -> was it asked?"""
        row, t = rows[d], len(held[d])
        turn = turn_of(row, d, t)
        held[d].append(turn)
        try:
            if turn["error"]:
                return False
            mels = [log_mel(clip, n_mels, omni.pad_audio) for clip in clips(row)[:t + 1]]
            replies = [turn["text"] for turn in held[d][:-1]]
            reply = engine.submit(chat_ids(tokenizer, replies), mels, speak=codec is not None,
                                  temperature=cfg.temperature, seed=100000 * cfg.seed + 100 * d + t)
        except (OSError, ValueError, RuntimeError) as e:
            turn["error"] = str(e).splitlines()[0]
            return False
        asked[reply] = turn, [], perf_counter()
        return True

    def begin():
        """Ask the first question of the next dialogue that can be asked."""
        for d in left:
            held[d] = []
            if ask(d):
                return
            broken.append(d)

    def over(d):
        """What is to be said of a dialogue that ends here. Turns that were not reached are there, too."""
        for t in range(len(held[d]), len(rows[d]["users"])):
            held[d].append(turn_of(rows[d], d, t) | {"error": "an earlier turn could not be asked"})
        said = gate.tolist()
        gate.zero_()
        return d, held.pop(d), said

    left = iter(tqdm(numbers, desc="answering", unit="dialogue"))
    for _ in range(cfg.batch):
        begin()
    hook = omni.speech_generator.gate.register_forward_hook(keep_gate)
    for reply, kind, x in with_sound(engine.stream(), codec):
        turn, pieces, start = asked[reply]
        if kind == "note":
            turn["notes"].append(x)
        if kind == "audio":
            pieces.append((x.cpu().numpy(), perf_counter() - start))
        if kind != "done":
            continue
        del asked[reply]
        d = turn["dialogue"]
        turn |= {"text": tokenizer.decode(reply.text), "units": reply.units,
                 "seconds": perf_counter() - start,
                 "wav": np.concatenate([piece for piece, _ in pieces] or [np.zeros(0, np.float32)])}
        if len(turn["wav"]):
            turn |= pace([(len(wav) / codec.sample_rate, came) for wav, came in pieces])
            turn["duration"] = len(turn["wav"]) / codec.sample_rate       # a sum of pieces rounds otherwise
        if len(held[d]) < len(rows[d]["users"]) and ask(d):
            continue
        yield over(d)
        begin()
    hook.remove()
    yield from map(over, broken)


def typed_replies(rows, tokenizer, reply):
    """What is replied to the dialogues' questions if they are read, not heard; whoever replies remembers its
    own replies. reply: prompts -> texts. Returns a text for each turn."""
    chats, texts = [[] for _ in rows], [[] for _ in rows]
    for t in range(max(len(row["users"]) for row in rows)):
        asked = [d for d, row in enumerate(rows) if t < len(row["users"])]
        for d in asked:
            chats[d].append({"role": "user", "content": rows[d]["users"][t]})
        prompts = [tokenizer.apply_chat_template(chats[d], tokenize=False, add_generation_prompt=True)
                   for d in asked]
        for d, text in zip(asked, reply(prompts)):
            chats[d].append({"role": "assistant", "content": text})
            texts[d].append(text)
    return list(itertools.chain.from_iterable(texts))


def by_transformers(model, tokenizer, max_tokens, batch=64):
    """The text model that training started from, as `typed_replies` wants it."""
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    tokenizer.padding_side = "left"

    def reply(prompts):
        for i in tqdm(range(0, len(prompts), batch), desc="typing", leave=False):
            x = tokenizer(prompts[i:i + batch], return_tensors="pt", padding=True).to(model.device)
            output = model.generate(input_ids=x["input_ids"], attention_mask=x["attention_mask"],
                                    max_new_tokens=max_tokens, do_sample=False, eos_token_id=end,
                                    pad_token_id=end)
            yield from tokenizer.batch_decode(output[:, x["input_ids"].shape[1]:], skip_special_tokens=True)
    return reply


def by_engine(omni, tokenizer, max_tokens, batch=64):
    """The LLM of a checkpoint, the same."""
    engine = Engine(omni, batch, max_tokens)

    def reply(prompts):
        asked = []
        for prompt in prompts:
            try:
                asked.append(engine.submit(tokenizer(prompt)["input_ids"], speak=False))
            except ValueError:                        # longer than the model's room
                asked.append(None)
        for _ in engine.stream():
            pass
        return [tokenizer.decode(answer.text) if answer else "" for answer in asked]
    return reply


# ---------------------------------------------------------------------------------------------------- hearing

def sound_of(cfg, turn):
    """A turn's speech (samples,) at 16 kHz; empty if it is silent."""
    if not turn["sound"]:
        return np.zeros(0, np.float32)
    wav, rate = soundfile.read(f"{cfg.out}/{turn['sound']}", dtype="float32")
    return librosa.resample(wav, orig_sr=rate, target_sr=SAMPLE_RATE)


def hear(kept, jobs, recognize):
    """Transcribe what is not in `kept` yet. jobs: {key: function that gives the sound};  recognize: an
    iterator of sounds -> yields texts."""
    missing = [key for key in jobs if key not in kept]
    with tqdm(total=len(missing), desc="transcribing", leave=False) as bar:
        for key, text in zip(missing, recognize(jobs[key]() for key in missing)):
            kept.add(key, text)
            bar.update()


def original(text, voice):
    """espeak-ng's speech of a text, (samples,) at 16 kHz; no samples if the text holds nothing to say."""
    if not any(character.isalnum() for character in text):
        return np.zeros(0, np.float32)
    return speak(text, voice)


def hear_all(cfg, turns, kept, pool, device, replies=None, voice=None):
    """Note in the turns what is heard: "heard", and in the embedded world "heard_bigram", "heard_word_loop",
    and with a voice the same of the original synthesizer, "heard_bigram_original" ...

    kept     Lines: what has been heard before;  pool: of processes, for pocketsphinx
    replies  set tiny: those of the training split, whose words the judges know
    """
    name = cfg.recognizer or ("pocketsphinx" if replies else "whisper:large-v3")
    names = {f"{turn['dialogue']}-{turn['turn']}": turn for turn in turns}
    texts = dict.fromkeys(turn["text"] for turn in turns) if voice else ()
    originals = {text: original(text, voice) for text in texts}       # in order: what espeak-ng says depends
    if name.startswith("whisper"):
        size = name.partition(":")[2] or "large-v3"
        judges = {"heard": (name, lambda wavs: by_whisper(wavs, size, device, cfg.language))}
    elif name.startswith("nano:"):
        from tiny.judge import by_nano
        judges = {"heard": (name, lambda wavs: by_nano(wavs, name.removeprefix("nano:")))}
    elif replies:
        judges = {}
        for judge, bigram in JUDGES.items():
            arpa = language_model(replies, bigram)
            judges[f"heard_{judge}"] = judge, lambda wavs, arpa=arpa: by_sphinx(pool, wavs, arpa)
    else:
        judges = {"heard": (name, lambda wavs: by_sphinx(pool, wavs))}
    for column, (judge, recognize) in judges.items():
        jobs = {f"{key}/{judge}": lambda turn=turn: sound_of(cfg, turn) for key, turn in names.items()}
        jobs |= {f"{text}/{judge}": lambda wav=wav: wav for text, wav in originals.items()}
        hear(kept, jobs, recognize)
        for key, turn in names.items():
            turn[column] = kept[f"{key}/{judge}"]
            if voice:
                turn[f"{column}_original"] = kept[f"{turn['text']}/{judge}"]
    for turn in turns:
        turn.setdefault("heard", turn.get("heard_bigram"))


# ---------------------------------------------------------------------------------------------------- figures

def share(turns, hits):
    """A figure: how many percent of these turns hit. hits: booleans; None counts for nothing."""
    pairs = [(turn["dialogue"], hit) for turn, hit in zip(turns, hits) if hit is not None]
    return interval([d for d, _ in pairs], [(hit, 1) for _, hit in pairs]) if pairs else None


def wer(turns, key):
    """Word error rate of what was heard, turn[key], against the texts."""
    return interval([turn["dialogue"] for turn in turns], [errors(turn["text"], turn[key]) for turn in turns])


def excess(turns, key):
    """The same less that of the original synthesizer."""
    values = [errors(turn["text"], turn[key]) + errors(turn["text"], turn[f"{key}_original"])
              for turn in turns]
    return interval([turn["dialogue"] for turn in turns], values, difference)


def is_exact(turn):
    return turn["text"] == turn["reference"]


def judge_text(turns, rule):
    """Figures of the texts, and turn["right"] in each turn. Turns that could not be asked count as wrong."""
    for turn in turns:
        known = turn["references"] or rule in ("refusal", "instructions")
        turn["right"] = False if turn["error"] else is_right(
            rule, turn["references"], turn["text"], turn.get("about")) if known else None
    return {"turns": (len(turns),), "not answered": (sum(bool(turn["error"]) for turn in turns),),
            "s2t": share(turns, [turn["right"] for turn in turns])}


def judge_world(turns, typed):
    """Figures that only the embedded world has. typed: {"typed_before": texts, ...}."""
    asked = [turn for turn in turns if turn["category"] != "unclear"]
    unclear = [turn for turn in turns if turn["category"] == "unclear"]
    recalling = [turn for turn in turns if turn["category"] == "recalling"]
    result = {"exact": share(asked, map(is_exact, asked))}
    for name, texts in typed.items():
        right = [(turn, text == turn["reference"]) for turn, text in zip(turns, texts)
                 if turn["category"] != "unclear"]
        result[f"exact_{name}"] = share([turn for turn, _ in right], [hit for _, hit in right])
    if unclear:
        refusal = unclear[0]["reference"]
        result |= {"unclear": (len(unclear),), "caught": share(unclear, map(is_exact, unclear)),
                   "refused": share(asked, [turn["text"] == refusal for turn in asked])}
    if recalling:
        result |= {"needing_history": (len(recalling),),
                   "exact_needing_history": share(recalling, map(is_exact, recalling))}
    return result


def judge_speech(turns, rule, known=None):
    """Figures of the speech after `hear_all`, and turn["heard_right"]. known: the replies of the training
    split, if they are to be told from new ones."""
    result = {}
    columns = [key for key in ("heard_bigram", "heard_word_loop") if key in turns[0]] or ["heard"]
    new = [turn for turn in turns if turn["text"] not in known] if known else []
    if known:
        result["new_replies"] = (len(new),)
    for column in columns:
        name = column.removeprefix("heard").lstrip("_")
        ending = f"_{name}" if name else ""
        result[f"wer{ending}"] = wer(turns, column)
        heard = [None if turn["right"] is None else bool(not turn["error"] and is_right(
            rule, turn["references"], turn[column] or "", turn.get("about"))) for turn in turns]
        result[f"s2s{ending}"] = share(turns, heard)
        for turn, hit in zip(turns, heard):
            if column == columns[0]:
                turn["heard_right"] = hit
                turn["errors"] = errors(turn["text"], turn[column])
        if f"{column}_original" in turns[0]:
            result[f"wer{ending}_original"] = wer(turns, f"{column}_original")
            result[f"wer{ending}_excess"] = excess(turns, column)
            answered = [turn for turn in turns if turn["references"]]
            if answered:
                result[f"s2s{ending}_original"] = share(answered, [
                    is_right(rule, turn["references"], turn[f"{column}_original"]) for turn in answered])
            if new:
                result[f"wer{ending}_excess_new_replies"] = excess(new, column)
    return result


def judge_pace(turns):
    """How fast: of replies that were made several at a time."""
    spoken = [turn for turn in turns if turn.get("first_audio")]
    if not spoken:
        return {}
    first = [1000 * turn["first_audio"] for turn in spoken]
    factors = [turn["seconds"] / turn["duration"] for turn in spoken]
    return {"first_audio_ms": (float(np.median(first)),),
            "first_audio_ms_95": (float(np.quantile(first, 0.95)),),
            "real_time_factor": (float(np.median(factors)),), "stalls": (sum(t["stalls"] for t in spoken),),
            "cut": share(turns, [bool(turn["notes"]) for turn in turns])}


def judge_stress(cfg, turns, voice, pool):
    """See the top of this file."""
    from tiny.judge import stress
    exact = [turn for turn in turns if is_exact(turn)]
    found = stress(pool, [(sound_of(cfg, turn), turn["text"], turn["spoken"]) for turn in exact], voice)
    result = {}
    for name, last in (("stress", None), ("stress_not_last", False)):
        counted = [(turn, hit[0]) for turn, hit in zip(exact, found) if hit and last in (None, hit[1])]
        if counted:
            result[name] = share([turn for turn, _ in counted], [hit for _, hit in counted])
            result[f"{name}_replies"] = (len(counted),)
    return result


def judge_naturalness(cfg, turns, device):
    """UTMOS of each reply, 1 to 5, from its TorchScript file: called with (1, samples) and the rate."""
    model, values = torch.jit.load(cfg.utmos, map_location=device).eval(), []
    spoken = [turn for turn in turns if turn["sound"]]
    for turn in tqdm(spoken, desc="utmos", leave=False):
        with torch.inference_mode():
            turn["utmos"] = float(model(torch.from_numpy(sound_of(cfg, turn))[None].to(device), SAMPLE_RATE))
        values.append((turn["utmos"], 1))
    return {"utmos": interval([turn["dialogue"] for turn in spoken], values, mean)} if spoken else {}


def judge_answers(cfg, turns, kept):
    """Scores of 1 to 5 by a language model, of the texts and of what was heard; `kept` keeps its answers."""
    result = {}
    for name, column in (("score_s2t", "text"), ("score_s2s", "heard")):
        asked = [turn for turn in turns if not turn["error"] and turn.get(column) is not None]
        keys = {f"{turn['dialogue']}-{turn['turn']}/{name}": turn for turn in asked}
        missing = [key for key in keys if kept.get(key, [None])[0] is None]   # who failed is asked again
        pairs = [(keys[key]["question"], keys[key][column]) for key in missing]
        for key, found in zip(missing, scores(pairs, cfg.judge, cfg.judge_model)):
            kept.add(key, found)
        for key, turn in keys.items():
            turn[name] = kept[key][0]
        scored = [turn for turn in asked if turn[name] is not None]
        if scored:
            result[name] = interval([turn["dialogue"] for turn in scored],
                                    [(turn[name], 1) for turn in scored], mean)
        result[f"{name}_failed"] = (len(asked) - len(scored),)
    return result


# ------------------------------------------------------------------------------------------------- comparison

def compare(first, second):
    """Print how the second evaluation differs from the first, over the turns that both have."""
    try:
        loaded = [read_json(folder, "results.json") for folder in (first, second)]
        found = [{(turn["id"], turn["turn"]): turn for turn in results["turns"]} for results in loaded]
    except (OSError, ValueError, KeyError) as e:
        fail(f"--compare: {first} and {second} must be folders of finished evaluations ({e!r})")
    both = [key for key in found[0] if key in found[1]]
    if not both:
        fail(f"--compare: {first} and {second} have no question in common")
    pairs = [(found[0][key], found[1][key]) for key in both]
    print(f"{second} less {first}, {len(both)} turns, 95 % interval")

    def hit(key):
        return lambda turn: None if turn.get(key) is None else (turn[key], 1)
    for name, values in (("s2t", hit("right")), ("s2s", hit("heard_right")),
                         ("wer", lambda turn: turn.get("errors")),
                         ("exact", lambda turn: (is_exact(turn), 1) if turn["reference"] else None)):
        counted = [(a["dialogue"], (*values(b), *values(a))) for a, b in pairs if values(a) and values(b)]
        if counted:
            print(f"{name:8}{report.show(*interval(*zip(*counted), difference))}")
    for a, b in pairs:
        if (a["right"], a.get("heard_right")) != (b["right"], b.get("heard_right")):
            print(f"{a['id']}.{a['turn'] + 1} {a['question']!r}: {report.verdict(a)}, {a['text']!r} -> "
                  f"{report.verdict(b)}, {b['text']!r}")


# ------------------------------------------------------------------------------------------------------- main

def find_originals(cfg):
    """What the checkpoint is compared with: (the text model that training started from, espeak-ng's voice in
    the replies that it learned from). An unknown one is None, and what is left out is printed."""
    llm, voice = cfg.llm, None
    made = read_json(cfg.corpus, "meta.json") if cfg.set == "tiny" else {}
    if made.get("source") == "tiny":
        llm = llm or "tiny/qwen2"
    if made.get("source") in ("tiny", "text") and made["tts"] is None:
        voice = made["assistant"]
    if llm is None:
        print("typed_before is left out: name the text model that training started from with --llm")
    if voice is None and cfg.set == "tiny" and not cfg.text:
        print(f"the original synthesizer's WER and S2S are left out: the replies of {cfg.corpus} are not "
              "espeak-ng's")
    return llm and checkpoint.local_or_hub(llm), voice


def settings_of(cfg, rows):
    """What decides the answers: no others may be mixed with them."""
    keys = ("ckpt", "set", "path", "tts", "corpus", "split", "dialogues", "codec", "voice", "text",
            "max_tokens", "max_units", "temperature", "top_p", "repeats", "seed")
    folder = checkpoint.find(cfg.ckpt)
    weights = os.path.join(folder, "model.safetensors")
    mark = sha256(weights) if os.path.exists(weights) else folder
    return {key: asdict(cfg)[key] for key in keys} | {"questions": len(rows), "weights": mark}


def open_folder(cfg, rows, state):
    """Make cfg.out, or go on there if it holds answers of the very same settings."""
    settings = settings_of(cfg, rows)
    kept = read_json(cfg.out, "settings.json")
    if kept and kept != settings:
        different = ", ".join(key for key in settings if kept.get(key) != settings[key])
        fail(f"--out {cfg.out} holds an evaluation with other settings ({different}); give another folder, "
             "or delete this one")
    if state.is_main_process:
        os.makedirs(f"{cfg.out}/sound", exist_ok=True)
        replace_file(f"{cfg.out}/settings.json", json.dumps(settings, indent=1))
    state.wait_for_everyone()


def answered(cfg):
    """{dialogue: what answers-*.jsonl hold of it}, of all processes."""
    lines = {}
    for name in sorted(os.listdir(cfg.out)):
        if name.startswith("answers-"):
            lines |= {int(d): line for d, line in Lines(f"{cfg.out}/{name}").items()}
    return lines


def answer_missing(cfg, rows, omni, tokenizer, codec, state):
    """Answer what this process has to, and what no earlier run did."""
    known = answered(cfg)
    mine = [d for d in range(state.process_index, len(rows), state.num_processes) if d not in known]
    kept = Lines(f"{cfg.out}/answers-{state.process_index}.jsonl")
    for d, turns, gate in answer_all(omni, tokenizer, codec, rows, mine, cfg):
        for turn in turns:
            wav = turn.pop("wav", ())
            if len(wav):
                turn["sound"] = f"sound/{d}-{turn['turn'] + 1}.flac"
                soundfile.write(f"{cfg.out}/{turn['sound']}", np.clip(wav, -1, 1), codec.sample_rate)
        kept.add(str(d), {"turns": turns, "gate": gate})


def main():
    cfg = configure(EvalConfig)
    if cfg.compare:
        return compare(*cfg.compare)
    if cfg.out is None:
        names = os.path.basename(os.path.normpath(cfg.ckpt)), *cfg.set.removeprefix("tiny").split("/")
        cfg = replace(cfg, out=f"out/{'_'.join(filter(None, names))}_eval")
    torch.manual_seed(cfg.seed)
    no_gpu = not (torch.cuda.is_available() or torch.backends.mps.is_available())
    state = accelerate.PartialState(cpu=no_gpu)       # said aloud, or it ignores torchrun on CPU
    if no_gpu:
        torch.set_num_threads(max(1, os.cpu_count() // state.num_processes))
    device = state.device
    # bf16 on a GPU as the official code; on a CPU figures shall not depend on how fast it is
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    for run in cfg.runs:
        if not checkpoint.newest_checkpoint(run):
            fail(f"--runs: there is no checkpoint in {run}")
    try:                                              # report what is missing before the long part
        rows, rule = read_questions(cfg)
        llm, voice = find_originals(cfg)
        codec = None if cfg.text else load_codec(cfg.codec, cfg.voice).to(device)
        text_model = None
        if llm and state.is_main_process:             # it alone types
            text_model = Qwen2ForCausalLM.from_pretrained(llm, dtype=dtype)
        omni, tokenizer, _ = checkpoint.load(cfg.ckpt)
        open_folder(cfg, rows, state)
    except (OSError, ValueError, RuntimeError) as e:
        fail(e)
    quicken(omni.eval(), [dtype], device)
    answer_missing(cfg, rows, omni, tokenizer, codec, state)
    state.wait_for_everyone()
    if not state.is_main_process:
        return
    pool = multiprocessing.get_context("spawn").Pool(os.cpu_count()) if codec else None
    lines = answered(cfg)
    turns = list(itertools.chain.from_iterable(lines[d]["turns"] for d in range(len(rows))))
    for turn in turns:
        turn["about"] = rows[turn["dialogue"]].get("about")
    typed = {}
    if text_model:
        reader = Qwen2Tokenizer.from_pretrained(llm)
        before = by_transformers(text_model.to(device), reader, cfg.max_tokens)
        typed = {"typed_before": typed_replies(rows, reader, before)}
    if any(row["users"][0] for row in rows):
        typed["typed_after"] = typed_replies(rows, tokenizer, by_engine(omni, tokenizer, cfg.max_tokens))
    if cfg.topics:
        judged = [turn["category"] in cfg.topics for turn in turns]
        turns = list(itertools.compress(turns, judged))
        typed = {name: list(itertools.compress(texts, judged)) for name, texts in typed.items()}
    result = {"dialogues": (len(rows),)} | judge_text(turns, rule)
    if cfg.set == "tiny":
        result |= judge_world(turns, typed)
    else:
        for name, texts in typed.items():
            hits = [None if t["right"] is None or t["error"] else
                    is_right(rule, t["references"], text, t["about"]) for t, text in zip(turns, texts)]
            result[name] = share(turns, hits)
    if codec:
        replies = None
        if cfg.set == "tiny":
            replies = [reply for row in load_corpus(cfg.corpus, "train")["replies"] for reply in row]
        try:
            hear_all(cfg, turns, Lines(f"{cfg.out}/heard.jsonl"), pool, device, replies, voice)
        except (OSError, RuntimeError) as e:
            fail(f"--recognizer {cfg.recognizer or 'whisper:large-v3'}: it cannot be used ({e})")
        result |= judge_speech(turns, rule, replies and set(replies)) | judge_pace(turns)
        if voice:
            result |= judge_stress(cfg, turns, voice, pool)
        gate = np.sum([line["gate"] for line in lines.values()], 0)
        if gate[0]:
            mean = gate[1] / gate[0]
            spread = max(0.0, gate[2] / gate[0] - mean ** 2) ** 0.5
            result |= {"gate_mean": (float(mean),), "gate_spread": (float(spread),)}
    try:
        if cfg.utmos and codec:
            result |= judge_naturalness(cfg, turns, device)
    except (OSError, RuntimeError, ValueError) as e:
        fail(f"--utmos {cfg.utmos}: it cannot be used ({str(e).splitlines()[0]})")
    if cfg.judge:
        result |= judge_answers(cfg, turns, Lines(f"{cfg.out}/judged.jsonl"))
    write(cfg, rows, turns, {name: value for name, value in result.items() if value is not None})


def write(cfg, rows, turns, result):
    """All that the folder gets, and what is printed."""
    def question(turn):
        try:
            return clips(rows[turn["dialogue"]])[turn["turn"]].numpy()
        except (OSError, ValueError, RuntimeError, TypeError):
            return None                               # it could not be asked, and the report says why

    categories, others = report.by_category(turns), published(cfg.set)
    markdown = report.table(result, categories, others)
    model = os.path.basename(os.path.normpath(cfg.ckpt))
    title = f"{model} on {cfg.set}"
    about = (f"{len(turns)} replies, {cfg.batch} dialogues at a time. s2t: the text is right; s2s: what "
             f"{cfg.recognizer or 'the recognizer'} hears is; in percent.")
    print("\n" + markdown)
    listed = [{key: x for key, x in turn.items() if key not in ("about", "units")} for turn in turns]
    made = {"figures": result, "categories": categories, "turns": listed, "git": commit(),
            "command": shlex.join(sys.argv)}
    replace_file(f"{cfg.out}/results.json", json.dumps(made, indent=1))
    replace_file(f"{cfg.out}/report.md", f"# {title}\n\n{about}\n\n{markdown}")
    order = sorted(turns, key=lambda turn: (report.VERDICTS.index(report.verdict(turn)),
                                            -ratio(np.array(turn.get("errors") or (0, 1)))))
    spoken = [turn for turn in order if turn["sound"]]
    report.draw_figures(f"{cfg.out}/figures.png", categories, turns)
    if spoken:
        report.draw_replies(f"{cfg.out}/replies.png", cfg.out, spoken[:3] + spoken[3:][-3:])
    kept = [turn for turn in turns if turn["dialogue"] < cfg.keep]
    report.write_gallery(cfg.out, kept, question)
    report.write_page(cfg.out, title, about, markdown, order, question)
    for path in write_forms(cfg.set, cfg.out, model, turns, rows):
        print(f"for the set's own scripts: {path}")
    if cfg.runs:
        shown = max((turn for turn in kept if turn["sound"]), key=is_exact, default=None)
        report.draw_demo(f"{cfg.out}/demo.png", cfg.runs, cfg.out, shown)
        content = "and a question with its reply" if shown else "only: the gallery has no spoken reply"
        print(f"{cfg.out}/demo.png shows the losses of {', '.join(cfg.runs)} {content}")
    for why, n in Counter(turn["error"] for turn in turns if turn["error"]).most_common(5):
        print(f"not answered, and so wrong: {n}, {why}")
    for turn in kept:
        print(f"{turn['id']}.{turn['turn'] + 1} asked {turn['question']!r}, said {turn['text']!r}, "
              f"heard {turn.get('heard')!r}")
    print(f"every reply: {cfg.out}/report.html")


if __name__ == "__main__":
    main()
