"""
The thread that owns the model, and everybody who talks to it.

Why: a model is used by one thread at a time, and its time goes into reading its weights, so the replies of
all sessions are made together, in the rows of one engine. Whoever asks gets events back as they come; who
does not listen, or leaves, holds up nobody.

How:
    talker = Talker(omni, tokenizer, prompt, codec, rows=8)
    question = talker.ask(clips, replies, temperature, listen)        # from any thread
    talker.cancel(question)

`listen(kind, x)` is called in the talker's thread, so it must return at once:
    "text", str            a piece of the reply's text
    "audio", array (n,)    a piece of its sound, float32 at talker.rate
    "note", str            a limit was hit
    "done", dict           prompt, text, units: how many positions, tokens and units it was
    "failed", str          why there is no reply
"""
import queue
import threading
import time
import traceback

import numpy as np
import soxr
import torch

from omni.audio import log_mel
from omni.codec import with_sound
from omni.engine import Engine

FORGOTTEN = 4                         # turns that a conversation which is too long forgets at once


class Question:
    """A reply that was asked for, and what the talker knows of it."""

    def __init__(self, clips, replies, temperature, speak, listen):
        self.clips, self.replies, self.temperature = clips, replies, temperature
        self.speak, self.listen = speak, listen
        self.reply = None              # the engine's
        self.tokens, self.shown = [], ""
        self.resampler = None
        self.asked, self.first, self.samples = time.monotonic(), None, 0
        self.cancelled = False


class Talker(threading.Thread):
    """See above. It is a daemon: it ends with the program."""

    rate = 24000                       # Hz, of the sound that comes out

    def __init__(self, omni, tokenizer, prompt, codec, rows, max_tokens=128, max_units=1024, threads=None):
        """
        prompt    a function, the replies so far -> the ids of a prompt, one SPEECH for each user's turn
        threads   of the CPU that compute; none: torch's default. Every thread of Python that computes keeps
                  so many of its own, and as soon as these are more than cores, all wait for each other: so
                  whoever makes a Talker first does torch.set_num_threads(1) for itself
        """
        super().__init__(daemon=True, name="talker")
        self.omni, self.tokenizer, self.prompt, self.codec = omni, tokenizer, prompt, codec
        self.engine = Engine(omni, rows, max_tokens=max_tokens, max_units=max_units)
        self.threads, self.closed = threads or torch.get_num_threads(), False
        self.orders, self.questions = queue.SimpleQueue(), {}
        self.first_audio, self.factors = [], []       # of the last replies: seconds, real-time factors
        self.start()

    def hear(self, wav):
        """A clip of the user, an array (n,) at 16 kHz -> its log-mel (n_mels, T)."""
        return log_mel(torch.from_numpy(wav), self.omni.model.speech_encoder.n_mels, self.omni.pad_audio)

    def ask(self, clips, replies, temperature, listen, speak=True):
        """Ask for the next reply of a conversation.

        clips    log-mels of all the user's turns;  replies: the texts of the assistant's, one fewer
        listen   see above
        Returns  a Question, for `cancel`
        """
        question = Question(clips, replies, temperature, speak, listen)
        self.orders.put(question)
        return question

    def cancel(self, question):
        """Nothing more comes of it, and its row is free after the next step."""
        question.cancelled = True
        self.orders.put(question)

    def close(self):
        """End the thread, once nobody asks any more."""
        self.orders.put(None)
        self.join()

    @property
    def waiting(self):
        """Replies that are being made, or wait for a row."""
        return len(self.questions) + self.orders.qsize()

    # ------------------------------------------------------------------------------------- in the thread

    def run(self):
        torch.set_num_threads(self.threads)           # of this thread
        while not self.closed:
            self.obey(self.orders.get())              # sleep until somebody asks
            try:
                for reply, kind, x in with_sound(self.engine.stream(), self.codec):
                    self.tell(reply, kind, x)
                    while not self.orders.empty():
                        self.obey(self.orders.get())
            except Exception as e:                    # the model failed: say so, and be there for the next
                traceback.print_exc()
                for question in list(self.questions.values()):
                    self.engine.cancel(question.reply)
                    question.listen("failed", f"{type(e).__name__}: {e}")
                self.questions.clear()
                self.engine.cached = [[] for _ in self.engine.cached]         # half of it may not be there

    def obey(self, question):
        if question is None:
            self.closed = True
            return
        if question.cancelled:
            if question.reply in self.questions:
                del self.questions[question.reply]
                self.engine.cancel(question.reply)
            return
        start, last = 0, len(question.clips) - 1
        while question.reply is None:
            try:
                question.reply = self.engine.submit(
                    self.prompt(question.replies[start:]), question.clips[start:], speak=question.speak,
                    temperature=question.temperature)
            except ValueError as e:                   # longer than the model's room: forget the oldest turns,
                if start == last:                     # several, so that the cache serves the next few
                    question.listen("failed", str(e))
                    return
                start = min(start + FORGOTTEN, last)
            except Exception as e:                    # whatever a client sent, the thread serves the others
                traceback.print_exc()
                question.listen("failed", f"{type(e).__name__}: {e}")
                return
        self.questions[question.reply] = question

    def tell(self, reply, kind, x):
        question = self.questions.get(reply)
        if not question:                              # cancelled meanwhile
            return
        if kind == "text":
            question.tokens.append(x)
            whole = self.tokenizer.decode(question.tokens)
            if not whole.endswith("\ufffd"):          # else a letter's other bytes come with the next token
                question.listen("text", whole[len(question.shown):])
                question.shown = whole
        elif kind == "audio":
            self.play(question, x.cpu().numpy(), last=False)
        elif kind == "note":
            question.listen("note", x)
        elif kind == "done":
            if question.resampler:
                self.play(question, np.zeros(0, np.float32), last=True)
            if question.samples:
                seconds = time.monotonic() - question.asked
                self.factors = [*self.factors[-999:], seconds * self.rate / question.samples]
            del self.questions[reply]
            question.listen("done", {"prompt": len(reply.ids), "text": len(reply.text),
                                     "units": len(reply.units)})

    def play(self, question, wav, last):
        """The next piece of sound (n,), at the codec's rate, is on its way at once."""
        if self.codec.sample_rate != self.rate:
            if question.resampler is None:
                question.resampler = soxr.ResampleStream(self.codec.sample_rate, self.rate, 1, "float32")
            wav = question.resampler.resample_chunk(wav, last)
        if not len(wav):
            return
        if question.first is None:
            question.first = time.monotonic() - question.asked
            self.first_audio = [*self.first_audio[-999:], question.first]
        question.samples += len(wav)
        question.listen("audio", wav)
