"""
Who judges a reply: recognizers, which turn speech into text, and a language model, which gives a score.

Why: the paper judges speech by what Whisper-large-v3 hears (section 4.2). A recognizer errs too, and one that
knows the language well guesses what was not said; so which one it was belongs to every figure. Whether an
answer to an open question is good, no rule can say. The paper asks GPT-4o for a score of 1 to 5. Such scores
depend on the judge and its prompt; ours is in our own words, so they compare with each other, not with the
paper's.

    pocketsphinx            with a language model of given texts, bigrams or all words equally likely: the
                            judge of the embedded world; without texts its own, of general English
    whisper:NAME_OR_FILE    a Whisper of any size ("large-v3" is downloaded), or a file
    scores                  any endpoint that speaks OpenAI's chat completions
"""
import functools
import math
import os
import re
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import whisper

from omni.score import words

PROMPT = """You judge the answer of a voice assistant. It was spoken, and you read what was said.

Question: {question}
Answer: {answer}

Give a whole number from 1 to 5 for how good the answer is as a spoken one: 5 is correct, to the point and
easy to follow by ear; 3 is usable with flaws; 1 is wrong, empty, off the question or impossible to listen to.
Reply with JSON alone: {{"score": number}}"""


# ------------------------------------------------------------------------------------------------ recognizers

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
def sphinx(arpa):
    """A pocketsphinx decoder; arpa None: its own language model."""
    from pocketsphinx import Decoder, get_model_path
    options = {"hmm": get_model_path("en-us/en-us"), "dict": get_model_path("en-us/cmudict-en-us.dict"),
               "cmn": "batch", "loglevel": "FATAL"}
    if arpa is None:
        return Decoder(lm=get_model_path("en-us/en-us.lm.bin"), **options)
    with tempfile.NamedTemporaryFile("w", suffix=".arpa") as file:
        file.write(arpa)
        file.flush()
        return Decoder(lm=file.name, **options)


def transcribe(job):
    """(wav (samples,) at 16 kHz, ARPA language model or None) -> the text that pocketsphinx hears.

    The clip gets noise at -60 dB, a quiet room: the digital silence of a synthesizer doubles the errors.
    """
    wav, arpa = job
    decoder = sphinx(arpa)
    room = np.random.default_rng(0).normal(0, 1e-3, len(wav) + 6400)       # 0.2 s before and after the clip
    room[3200:-3200] += wav
    pcm = (np.clip(room, -1, 1) * 32767).astype(np.int16)
    decoder.reinit_feat()                             # or what it hears depends on the clips before
    decoder.start_utt()
    decoder.process_raw(pcm.tobytes(), full_utt=True)
    decoder.end_utt()
    heard = decoder.hyp()
    return re.sub(r"\(\d+\)", "", heard.hypstr) if heard else ""


def by_sphinx(pool, wavs, arpa=None):
    """Clips (samples,) at 16 kHz -> yields the texts that pocketsphinx hears, in order."""
    yield from pool.imap(transcribe, ((wav, arpa) for wav in wavs), chunksize=8)


def by_whisper(wavs, name, device, language="en"):
    """The same by Whisper, greedy. name: a size, or a file. Raises RuntimeError or OSError."""
    model = whisper.load_model(name, device)
    for wav in wavs:
        if len(wav):
            options = {"language": language, "temperature": 0.0, "fp16": str(device) != "cpu"}
            yield model.transcribe(np.asarray(wav, np.float32), **options)["text"].strip()
        else:
            yield ""


# ------------------------------------------------------------------------------------------- a language model

def score_of(answer):
    """The score in a judge's answer, 1 to 5, or None."""
    found = re.search(r'"score"\s*:\s*"?([1-5])(?:\.0)?\b', answer or "")
    return found and int(found[1])


def scores(pairs, address, model, timeout=60):
    """[(question, answer)] -> yields (score 1 to 5 or None, what the judge said or why it did not), in order.
    A judge that times out or answers nonsense costs one score, nothing else. The key is OPENAI_API_KEY."""
    import openai
    client = openai.OpenAI(base_url=address, api_key=os.environ.get("OPENAI_API_KEY", "none"),
                           timeout=timeout, max_retries=2)

    def ask(pair):
        prompt = PROMPT.format(question=pair[0], answer=pair[1])
        try:
            reply = client.chat.completions.create(model=model, temperature=0, max_tokens=200,
                                                   messages=[{"role": "user", "content": prompt}])
            said = reply.choices[0].message.content or ""
        except (openai.OpenAIError, IndexError) as e:
            return None, f"{type(e).__name__}: {e}"
        return score_of(said), said
    with ThreadPoolExecutor(8) as pool:
        yield from pool.map(ask, pairs)
