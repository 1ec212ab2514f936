"""
How fast, how much memory: the README's figures of speed and size come from here, for anybody to make again.

How: python bench.py                      everything except serve, figures and the profile
     python bench.py --what sizes         parameters, memory, GPU, hours, dollars and disk, by arithmetic
     python bench.py --what latency       a reply, streamed: first sound, time per unit, many at once; against
                                          a decoder that works as the official one does
     python bench.py --what stream        cost of the 50th chunk of a spoken reply against the 2nd
     python bench.py --what serve         serve.py with --ckpt: first sound in a browser, conversations at
                                          once, interruption; wants playwright and chromium for the first
     python bench.py --what data          seconds and memory that data.py takes for the released JSON
     python bench.py --what train         tokens/s, memory and MFU in training, against a trainer that pads
     python bench.py --what loss          memory of the loss over Qwen2.5's vocabulary, whole and in pieces
     python bench.py --what figures       reference/figures/*.svg: the pipeline, and a reply of --ckpt in time
     python bench.py --what profile       the most expensive operations of a few steps, and a trace of them
The last line is JSON with all figures. The trace is for ui.perfetto.dev.
"""
import asyncio
import contextlib
import json
import math
import multiprocessing
import os
import queue
import random
import resource
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
import warnings
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import numpy as np
import soxr
import torch
import torch.nn.functional as F
import websockets
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache
from whisper.model import AudioEncoder

from data import Dialogues, chat_ids, collate, deal, positions_of
from model import IGNORE, PARTS, SPEECH, STAGES, Head, Omni, expand_speech, read_write
from omni import checkpoint, costs, draw
from omni.audio import DOWNSAMPLE, SAMPLE_RATE, UNIT_VOCAB, log_mel, read_audio, speech_positions, wav_bytes
from omni.codec import load_codec, pace, stream
from omni.configure import configure, fail
from omni.corpus import load_corpus
from omni.cosyvoice import LOOKAHEAD, MEL_RATIO, CosyVoice2
from omni.engine import Engine, quicken
from omni.espeak import speak
from omni.files import replace_file
from omni.realtime import RATE, base64_of
from omni.talk import Talker

SIZES = tuple(size for size in costs.QWEN2 if size != "tiny")
BENCHES = ("sizes", "latency", "stream", "data", "train", "loss", "serve", "figures", "profile")
FIGURES, CARROT = "reference/figures", "reference/carrot/question.flac"
WARM = 2                              # training steps before the clock starts, since the first are slower


@dataclass(frozen=True)
class BenchConfig:
    what: tuple[str, ...] = BENCHES[:-3]                # which benches to run
    sizes: tuple[str, ...] = ()                         # tiny, 0.5B ..., latency: mid; none: what fits here
    codec: str = "tests/data/cosyvoice2_decoder"        # stream: a folder with flow.pt and hift.pt
    head_dim: int = 8                                   # stream: head size of that flow; 64 in the release
    chunk: int = 10                                     # stream: units in a chunk
    ckpt: str = "out/tiny_stage2"                       # serve, figures: a checkpoint of the embedded world
    turns: int = 100                                    # serve: questions in the browser
    dialogues: tuple[int, ...] = (1000, 4000, 16000)    # data: sizes of the made-up corpora
    stage: str = "stage1"                               # profile: which stage
    steps: int = 3                                      # profile: how many steps
    out: str = "out/trace.json"                         # profile: the trace

    def __post_init__(self):
        if min(self.chunk, self.head_dim, self.steps, *self.dialogues) < 1:
            raise ValueError("chunk, head_dim, steps and dialogues must be at least 1")
        for key, values, known in (("what", self.what, BENCHES), ("stage", (self.stage,), STAGES),
                                   ("sizes", self.sizes, ("tiny", "mid", *SIZES))):
            unknown = [value for value in values if value not in known]
            if unknown:
                raise ValueError(f"{key}: {', '.join(unknown)} is none of {', '.join(known)}")
        if "mid" in self.sizes and self.what != ("latency",):
            raise ValueError("size mid is for --what latency alone")


def sizes_here(cfg):
    """The sizes to train: those that were asked for, or else what fits the machine."""
    if cfg.sizes:
        return cfg.sizes
    return ("0.5B", "3B") if torch.cuda.is_available() else ("tiny",)


# ------------------------------------------------------------------------------------------------------ sizes

def bench_sizes(cfg):
    """Three tables in Markdown, by the arithmetic of omni/costs.py, which nobody has measured: parameters;
    what each stage takes, as its config file has it and at least; all three stages of a size."""
    result, sums = {}, {}
    print(f"| million parameters | {' | '.join(PARTS)} |\n|---|{'---|' * len(PARTS)}")
    for size in costs.QWEN2:
        tiny = ("tiny", "tiny/whisper.pt") if size == "tiny" else ()
        result[size] = costs.parameters(costs.model_of(size, *tiny))
        print(f"| {size} | {' | '.join(f'{n:,.1f}' for n in result[size].values())} |")
    print("\n| | state, GB | in all | fits on | at least | fits on | FLOP | hours | dollars | disk, GB |\n|"
          + "---|" * 10)
    for size, stage, usual, least in costs.rows():
        result[f"{size}, {stage}"] = usual | {"least": least}
        name = {"stage1": "stage 1", "stage1_tts": "stage 1 TTS", "stage2": "stage 2"}[stage]
        print("| {}, {} | {state_GB:.1f} | {total_GB:.1f} | {gpu} | {:.1f} | {} | {flop:.1e} | {hours:.2f} | "
              "{dollars:.1f} | {disk_GB:.1f} |".format(size, name, least["total_GB"], least["gpu"], **usual))
        sums.setdefault(size, []).append((usual, least))
    print("\n| | GPU | at least | hours | dollars | disk with corpus, GB |\n|---|---|---|---|---|---|")
    for size, stages in sums.items():
        usual, least = (max((stage[i] for stage in stages), key=lambda x: x["total_GB"]) for i in (0, 1))
        hours, dollars, disk = (sum(stage[key] for stage, _ in stages)
                                for key in ("hours", "dollars", "disk_GB"))
        print(f"| {size} | {usual['gpu']} | {least['gpu']} | {hours:.2f} | {dollars:.0f} | "
              f"{disk + usual['corpus_GB']:,.0f} |")
    return result


# ---------------------------------------------------------------------------------------------------- latency

def talker(size):
    """A model that never ends its speech: "tiny" (the backbones), "mid" (LLM and speech LM of 8 layers, 512
    wide, random), or a released size (random)."""
    torch.manual_seed(0)
    if size == "mid":
        omni = mid()
    else:
        omni = build(size, "stage1")[0]
    generator = omni.speech_generator
    generator.model.lm_head.weight.data[generator.eos] = 0            # 6,561 random logits: one is above zero
    return omni.eval()


def mid():
    """Between tiny and 0.5B: what two cores can just speak in real time."""
    encoder = checkpoint.load_whisper("tiny/whisper.pt")
    network = {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 2,
               "intermediate_size": 2816, "rope_theta": 1e6, "rms_norm_eps": 1e-6, "vocab_size": 959,
               "max_position_embeddings": 8192, "tie_word_embeddings": True, "eos_token_id": 2}
    speech = network | {"vocab_size": 960 + UNIT_VOCAB}
    width = encoder.ln_post.weight.numel()
    return Omni(network | {"speech_encoder_hidden_size": width, "speech_generator": speech,
                           "stream_params": "(3,10)"}, encoder)


def question(omni, seconds):
    """(ids, clips) of a question that lasts so long: noise, which takes as long to hear as speech."""
    wav = 0.1 * torch.randn(int(seconds * SAMPLE_RATE), generator=torch.Generator().manual_seed(0))
    return [1, 30, 31, 32, SPEECH, 2, 33, 34, 35], [log_mel(wav, omni.model.speech_encoder.n_mels, False)]


@torch.inference_mode()
def official(omni, ids, clips, tokens, units):
    """A reply as the official decoder makes it, greedy: yields ("text", id) and ("units", [unit, ...]).

    Clips last 30 s, and Whisper's own encoder hears them. The LLM has a cache, but the speech LM begins each
    burst with an empty one: it reads again all that it has read and written. Both compute the logits of their
    whole vocabulary.
    """
    generator, device = omni.speech_generator, omni.lm_head.weight.device

    def states():
        """The LLM's tokens and the states that predict them."""
        frames = [clip.shape[1] for clip in clips]
        encoded = AudioEncoder.forward(omni.model.speech_encoder, torch.stack(clips).to(device)).flatten(0, 1)
        x = omni.embed_prompt(torch.tensor(expand_speech(ids, frames), device=device), encoded)[None]
        cache = DynamicCache()
        for i in range(tokens):
            state = omni.model(inputs_embeds=x, past_key_values=cache).last_hidden_state[0, -1]
            token = omni.lm_head(state).argmax()
            yield (int(token), generator.fuse(state, token)), i == tokens - 1
            x = omni.model.embed_tokens(token)[None, None]

    read, written = [], 0
    for action, x in read_write(states(), omni.R, omni.W):
        if action == "read":
            yield "text", x[0]
            read.append(x[1])
        elif action == "sep":
            read.append(generator.embed(torch.tensor(generator.sep, device=device)))
        else:
            burst, cache, inputs = [], DynamicCache(), torch.stack(read)[None]
            for _ in range(min(x or units, units - written)):
                state = generator.model.model(inputs_embeds=inputs, past_key_values=cache).last_hidden_state
                logits = generator.model.lm_head(state[0, -1])
                unit = logits[generator.unit_offset:].argmax()
                burst.append(int(unit))
                read.append(generator.embed(unit + generator.unit_offset))
                inputs = read[-1][None, None]
            written += len(burst)
            yield "units", burst


def timed(events):
    """Run a reply -> ([(kind, x)], seconds at each event)."""
    clock, seen, times = time.perf_counter(), [], []
    for event in events:
        seen.append(event)
        times.append(time.perf_counter() - clock)
    return seen, times


def flat(events):
    """The text ids, and the units, of a reply."""
    text = [x for kind, x in events if kind == "text"]
    return text, [unit for kind, x in events if kind == "units" for unit in x]


def read_bandwidth(device):
    """Bytes per second at which the machine reads memory: the sum of 1 GB."""
    x, times = torch.ones(2 ** 28, device=device), []
    for _ in range(5):
        synchronize()
        clock = time.perf_counter()
        x.sum().item()
        times.append(time.perf_counter() - clock)
    return x.numel() * 4 / min(times)


def bench_reply(size, units, repeats):
    """One long reply, ours and the official way, by turns, on the same weights; both must say the same. First
    text as `quicken` has it, everything else in fp32."""
    omni = talker(size)
    device, tokens = omni.lm_head.weight.device, units * 3 // 10 // 2
    ids, clips = question(omni, 30)
    engine = Engine(quicken(deepcopy(omni), [torch.float32]), max_tokens=tokens, max_units=units, eos=-1)
    generator = omni.speech_generator
    head = UNIT_VOCAB * generator.model.lm_head.in_features
    weights = 4 * (costs.matrix_weights(generator.model.model.layers) + head)            # bytes
    ours, theirs, texts, floors = [], [], [], []
    for _ in range(repeats):
        said, times = timed(engine.generate(ids, clips, temperature=0.0))
        floors.append(weights / read_bandwidth(device))                   # it changes from minute to minute
        expected, slow = timed(official(omni, ids, clips, tokens, units))
        if flat(said) != flat(expected):
            fail(f"latency: {size}: the two decoders do not say the same")
        ours.append(times)
        theirs.append(slow)
        engine.cached[0].clear()                      # or the clip would not be heard again
    engine = Engine(quicken(omni), max_tokens=1, eos=-1)
    for _ in range(repeats):
        texts.append(timed(engine.generate(ids, clips, speak=False))[1][0])
        engine.cached[0].clear()
    bursts = [i for i, (kind, _) in enumerate(said) if kind == "units"]

    def per_unit(times):
        return [(times[i] - times[i - 1]) / len(said[i][1]) for i in bursts]
    early = [statistics.median(per_unit(times)[2:7]) for times in ours]
    late = [statistics.median(per_unit(times)[-6:-1]) for times in ours]
    result = {"units": units, "ours_s": statistics.median(times[-1] for times in ours),
              "official_s": statistics.median(times[-1] for times in theirs),
              "first_text_ms": 1000 * statistics.median(texts),
              "official_first_text_ms": 1000 * statistics.median(times[0] for times in theirs),
              "first_burst_ms": 1000 * statistics.median(times[bursts[0]] for times in ours),
              "unit_ms_early": 1000 * statistics.median(early),
              "unit_ms_late": 1000 * statistics.median(late),
              "floor_ms": 1000 * statistics.median(floors),
              "share_of_floor": statistics.median(floor / unit for floor, unit in zip(floors, late))}
    result["ratio"] = result["official_s"] / result["ours_s"]
    result["first_text_ratio"] = result["official_first_text_ms"] / result["first_text_ms"]
    return result


def bench_turns(size, turns=5, repeats=5):
    """Milliseconds from a question of 2.5 s to the first burst, for each turn of a conversation."""
    omni, times = quicken(talker(size)), []
    for _ in range(repeats):
        engine = Engine(omni, max_tokens=12, max_units=40, eos=-1)
        ids, clips, row = [], [], []
        for _ in range(turns):
            more, clip = question(omni, 2.5)
            ids, clips = ids + more, clips + clip
            clock, first = time.perf_counter(), None
            for kind, x in engine.generate(ids, clips, temperature=0.0):
                if kind == "text":
                    ids = [*ids, x]
                first = first or kind == "units" and time.perf_counter() - clock
            row.append(first)
        times.append(row)
    return [1000 * statistics.median(row[t] for row in times) for t in range(turns)]


def bench_voice(W, repeats=20):
    """A tiny reply of 3 s to a question of 2.5 s, with the nano codec, reading 3 and writing W, as a client
    hears it: (first text, first audio, start-up buffer) in milliseconds, each (median, 95th percentile), and
    the real-time factor. The buffer is how much later than the first piece playback has to begin so that it
    never waits for a piece."""
    omni, codec = quicken(talker("tiny")), load_codec("tiny/codec.pt")
    omni.W = W
    engine = Engine(omni, max_tokens=12, max_units=75, eos=-1)
    ids, clips = question(omni, 2.5)
    rows = []
    for i in range(repeats + 3):                      # three to warm up
        engine.cached[0].clear()
        clock, first, heard, buffer = time.perf_counter(), None, 0.0, 0.0
        text = []

        def bursts():
            for kind, x in engine.generate(ids, clips, temperature=0.3, seed=i):
                if kind == "units":
                    yield x
                elif kind == "text":
                    text.append(time.perf_counter() - clock)
        for piece in stream(codec, bursts()):
            now = time.perf_counter() - clock
            first = first or now
            buffer = max(buffer, now - first - heard)
            heard += len(piece) / codec.sample_rate
        rows.append([1000 * text[0], 1000 * first, 1000 * buffer, now / heard])
    *times, factor = np.array(rows[3:]).T
    return [np.quantile(x, [0.5, 0.95]).round(1).tolist() for x in times], float(np.median(factor))


def bench_company(rows):
    """Several people ask the tiny model at once, and each hears a reply of 6 s by the nano codec, through the
    thread that serve.py has -> first audio in ms, median and slowest; stalls; the slowest's real-time
    factor."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)                          # see Talker
    tokenizer = SimpleNamespace(decode=lambda ids: "")
    made = Talker(quicken(talker("tiny")), tokenizer, lambda replies: [1, 30, 31, SPEECH, 2, 33],
                  load_codec("tiny/codec.pt"), rows, max_tokens=45, max_units=150, threads=threads)
    made.engine.eos = -1                              # no text ends early
    clips, over = question(made.omni, 2.5)[1], queue.SimpleQueue()

    def listen(asked, pieces, kind, x):
        if kind == "audio":
            pieces.append((len(x) / made.rate, time.perf_counter() - asked))
        elif kind in ("done", "failed"):
            over.put(kind)
    for _ in range(2):                                # once to warm up
        made.engine.cached = [[] for _ in range(rows)]
        heard, asked = [[] for _ in range(rows)], time.perf_counter()
        for pieces in heard:
            made.ask(clips, [], 1.0, partial(listen, asked, pieces))
        if [over.get() for _ in heard] != rows * ["done"]:
            fail("latency: a reply failed")
    made.close()
    paces = [pace(pieces) for pieces in heard]
    first = [1000 * reply["first_audio"] for reply in paces]
    factors = [pieces[-1][1] / reply["duration"] for pieces, reply in zip(heard, paces)]
    return statistics.median(first), max(first), sum(reply["stalls"] for reply in paces), max(factors)


def bench_batch(size, units, sizes):
    """Units per second of several replies at once."""
    omni, result = quicken(talker(size)), {}
    ids, clips = question(omni, 2.5)
    for rows in sizes:
        engine = Engine(omni, rows, max_tokens=units // 4, max_units=units, eos=-1)
        times = []
        for _ in range(3):
            for n in range(rows):
                engine.submit(ids, clips, temperature=1.0, seed=n)
            times.append(timed(engine.stream())[1][-1])
        result[rows] = rows * units / min(times)
    return result


def bench_latency(cfg):
    """See the docstring of this file. Random weights, so nobody listens; times do not depend on them."""
    result = {}
    sizes = sizes_here(cfg) if cfg.sizes or torch.cuda.is_available() else ("tiny", "mid")
    for W in (5, 10, 15) if "tiny" in sizes else ():
        times, factor = result[f"tiny, W = {W}"] = alone(bench_voice, W)
        print(f"latency: tiny, R = 3, W = {W}, median and 95 %: first text, first audio, buffer that "
              f"playback needs, ms: {times}; real-time factor {factor:.2f}")
    for rows in (1, 8, 16, 32) if "tiny" in sizes else ():
        first, last, stalls, factor = result[f"tiny, {rows} at once"] = alone(bench_company, rows)
        print(f"latency: tiny, {rows} at once: first audio {first:.0f} ms, of the slowest {last:.0f} ms; "
              f"{stalls} stalls; real-time factor {factor:.2f}")
    for size in sizes:
        figures = alone(bench_reply, size, 800, 5)
        batch = figures["units_per_s"] = alone(bench_batch, size, 200, (1, 8, 16))
        turns = figures["first_burst_by_turn_ms"] = alone(bench_turns, size)
        result[size] = figures
        many = ", ".join(f"{rows}: {rate:.0f} ({rate / batch[1]:.1f} x)" for rows, rate in batch.items())
        print("latency: {size}: 800 units in {ours_s:.2f} s, the official way {ratio:.2f} times that\n"
              "    after a clip of 30 s: first text {first_text_ms:.0f} ms, the official way "
              "{first_text_ratio:.2f} times that; first burst {first_burst_ms:.0f} ms\n"
              "    after 2.5 s: first burst {turns[0]:.0f} ms, in turn 5 {turns[4]:.0f} ms\n"
              "    a unit {unit_ms_early:.2f} ms early, {unit_ms_late:.2f} ms late; its weights are read in "
              "{floor_ms:.2f} ms ({share_of_floor:.0%})\n"
              "    units/s by replies at once: {many}".format(size=size, many=many, turns=turns, **figures))
    return result


# ----------------------------------------------------------------------------------------------------- stream

def bench_stream(cfg, chunks=50, repeats=3):
    """Milliseconds for chunks of one long reply, the median of several. Thanks to caches all should cost the
    same. Against the official way, which has no cache for the flow: that renders all units again for each
    chunk, and the vocoder renders what is new."""
    try:
        with tempfile.NamedTemporaryFile(suffix=".pt") as voice:
            torch.save(torch.zeros(1, 192), voice.name)
            codec = CosyVoice2.load(cfg.codec, voice.name, head_dim=cfg.head_dim, chunk=cfg.chunk)
    except (OSError, ValueError, RuntimeError) as e:
        fail(e)
    codec.to("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator().manual_seed(0)
    units = torch.randint(0, UNIT_VOCAB, (cfg.chunk * chunks + LOOKAHEAD,), generator=generator).tolist()
    first = cfg.chunk + LOOKAHEAD                     # units that the first chunk needs
    bursts = [units[:first]] + [units[i:i + cfg.chunk] for i in range(first, len(units), cfg.chunk)]
    times, whole, official = [], [], []

    @torch.no_grad()
    def without_cache():
        state, row = {}, torch.tensor([units], device=codec.voice.device)
        for n in range(cfg.chunk, len(units) - LOOKAHEAD + 1, cfg.chunk):
            mel = codec.flow(row[:, :n], codec.voice, {}, row[:, n:n + LOOKAHEAD])
            codec.next_wav(state, mel[..., (n - cfg.chunk) * MEL_RATIO:], final=False).cpu()
    for _ in range(repeats):
        clock = time.perf_counter()
        without_cache()
        official.append(time.perf_counter() - clock)
        state, row = {}, []
        for burst in bursts:
            clock = time.perf_counter()
            codec.next_piece(state, burst, final=False).cpu()
            row.append(time.perf_counter() - clock)
        times.append(row)
        whole.append(timed((None, piece.cpu()) for piece in stream(codec, iter(bursts)))[1][-1])
    median = [1000 * statistics.median(row[i] for row in times) for i in range(chunks)]
    result = {"chunk_2_ms": statistics.median(median[1:4]), "chunk_50_ms": statistics.median(median[-3:])}
    result["ratio"] = result["chunk_50_ms"] / result["chunk_2_ms"]
    result["growing"] = sum(median) / (1000 * statistics.median(whole))
    result["official_s"], result["s"] = statistics.median(official), statistics.median(whole)
    result["official_to_ours"] = result["official_s"] / result["s"]
    print(f"stream: {cfg.codec}, {cfg.chunk} units a chunk: chunk 2 {result['chunk_2_ms']:.1f} ms, "
          f"chunk 50 {result['chunk_50_ms']:.1f} ms, ratio {result['ratio']:.2f}; in pieces that grow the "
          f"reply takes 1 / {result['growing']:.1f} of the time, {result['s']:.2f} s; the official way "
          f"{result['official_s']:.2f} s, {result['official_to_ours']:.1f} times that")
    return result


# ------------------------------------------------------------------------------------------------------- data

def write_instructs2s(path, n):
    """The released JSON with n made-up dialogues of two turns, without their audio."""
    rng = random.Random(0)
    with open(path, "w") as f:
        for i in range(n):
            turns = []
            for t in range(2):
                units = [rng.randrange(UNIT_VOCAB) for _ in range(475)]
                turns += [{"from": "human", "text": f"Question {t} of {i}?", "speech": f"{i}-{t}-user.wav"},
                          {"from": "gpt", "text": "An answer of a few words.", "unit": units}]
            f.write("," if i else "[")
            f.write(json.dumps({"id": f"d{i}", "conversation": turns}, indent=1) + "\n")
        f.write("]")


def peak_memory(pid):
    """The most memory that a running process has held, in kB; 0 if it has just ended."""
    with open(f"/proc/{pid}/status") as f:
        for line in f:
            if line.startswith("VmHWM"):
                return int(line.split()[1])
    return 0


def bench_data(cfg):
    """Build a corpus from the released JSON in one process of data.py."""
    result, here = {}, os.path.dirname(os.path.abspath(__file__))
    for n in cfg.dialogues:
        with tempfile.TemporaryDirectory() as folder:
            write_instructs2s(f"{folder}/made_up.json", n)
            command = [sys.executable, "data.py", "config/data_instructs2s.py", "--processes", "1",
                       "--path", f"{folder}/made_up.json", "--out_dir", f"{folder}/corpus"]
            before, start, peak = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter(), 0
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=here)
            while process.poll() is None:             # getrusage would count what we held when we forked
                peak = max(peak, peak_memory(process.pid))
                time.sleep(0.02)
            seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
        if process.returncode:
            fail(f"data.py ended with exit code {process.returncode}")
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        result[n] = {"seconds": seconds, "cpu_seconds": cpu, "peak_GB": peak / 1e6}
        print(f"data: {n} dialogues without audio, one process: {seconds:.1f} s, {cpu:.1f} s of CPU time, "
              f"{peak / 1e6:.2f} GB at most")
    return result


# --------------------------------------------------------------------------------------------- training: rows

class Plain(list):
    """Rows in memory that can be read by number and by column, as Dialogues wants."""
    def __getitem__(self, key):
        if isinstance(key, str):
            return [row[key] for row in self]
        return super().__getitem__(key)


def mixed(n):
    """n rows of the embedded corpus, mixed with long ones: every eighth is eight dialogues in one."""
    rows = load_corpus("corpus/tiny", "train")
    lists = [key for key, value in rows[0].items() if isinstance(value, list)]
    result, at = [], 0
    while len(result) < n:
        size = 8 if len(result) % 8 == 7 else 1
        parts = [rows[at + i] for i in range(size)]
        at += size
        result.append(parts[0] | {key: [x for part in parts for x in part[key]] for key in lists})
    return result


def made_up(n):
    """n rows with the ragged lengths of InstructS2S-200K: two turns, 7.5 s a question, 19 s a reply."""
    rng, rows = random.Random(0), []
    for i in range(n):
        samples = [int(SAMPLE_RATE * rng.lognormvariate(math.log(7), 0.4)) for _ in range(2)]
        replies = ["word " * int(rng.lognormvariate(math.log(45), 0.5)) for _ in range(2)]
        wavs = [np.random.default_rng(i).normal(0, 0.1, size) for size in samples]
        speech = [{"bytes": wav_bytes(wav), "path": None} for wav in wavs]
        units = []
        for _ in range(2):
            length = int(rng.lognormvariate(math.log(450), 0.5))
            units.append([rng.randrange(UNIT_VOCAB) for _ in range(length)])
        rows.append({"id": str(i), "replies": replies, "samples": samples, "speech": speech, "units": units})
    return rows


# ------------------------------------------------------------------------------------- training: the baseline

def pad(rows, value):
    """Lists or arrays (length, ...) -> (B, longest, ...)."""
    return pad_sequence([torch.as_tensor(row) for row in rows], batch_first=True, padding_value=value)


def padded(items):
    """The baseline's batch: every sequence is as long as the longest."""
    longest = max(len(item["ids"]) for item in items)
    turns, speech_rows = [], []
    for i, item in enumerate(items):
        for turn in item["turns"]:
            rows = torch.tensor(turn[1])
            turns.append(turn)
            speech_rows.append(torch.where(rows >= 0, rows + i * longest, -1))
    batch = {"ids": pad([item["ids"] for item in items], 0),
             "labels": pad([item["labels"][1:] + [IGNORE] for item in items], IGNORE),
             "real": pad([[1] * len(item["ids"]) for item in items], 0),
             "speech_ids": pad([ids for ids, _, _ in turns], 0), "speech_rows": pad(speech_rows, -1),
             "speech_labels": pad([labels for _, _, labels in turns], IGNORE),
             "speech_real": pad([[1] * len(ids) for ids, _, _ in turns], 0)}
    mels = [mel for item in items for mel in item["mels"]]
    if mels:
        batch["frames"] = torch.tensor([mel.shape[1] for mel in mels])
        batch["mel"] = pad([mel.T for mel in mels], 0.0).transpose(1, 2)      # (clips, n_mels, longest)
    return batch


def padded_speech(omni, mel, frames):
    """What LLM positions hear: mel (clips, n_mels, T) and the clips' frames -> (sum of positions, H)."""
    encoder = omni.model.speech_encoder
    with torch.no_grad():
        x = F.gelu(encoder.conv2(F.gelu(encoder.conv1(mel)))).transpose(1, 2)
        x = x + encoder.positional_embedding[:x.shape[1]].to(x.dtype)
        for block in encoder.blocks:
            x = block(x)
        x = encoder.ln_post(x)                            # (clips, T / 2, n_state)
    positions = x.shape[1] // DOWNSAMPLE
    x = x[:, :positions * DOWNSAMPLE].flatten(0, 1)
    x = omni.model.speech_projector(x).view(len(frames), positions, -1)
    return torch.cat([row[:speech_positions(n)] for row, n in zip(x, frames.tolist())])


def padded_loss(omni, batch, stage):
    """The loss as a trainer that pads computes it: a rectangle of positions with a mask, a logit for each."""
    generator = omni.speech_generator
    if stage != "stage1_tts":
        with torch.set_grad_enabled(stage == "stage1"):
            heard = padded_speech(omni, batch["mel"], batch["frames"])
            speech = batch["ids"] == SPEECH
            x = omni.model.embed_tokens(batch["ids"].masked_fill(speech, 0))
            x = x.masked_scatter(speech[..., None], heard.float())
            states = omni.model(inputs_embeds=x, attention_mask=batch["real"], use_cache=False)
            states = states.last_hidden_state                                         # (B, longest, H)
    if stage == "stage1":
        logits, labels = omni.lm_head(states).float(), batch["labels"]
    else:
        x = generator.embed(batch["speech_ids"])
        if stage == "stage2":
            at = batch["speech_rows"] >= 0
            fused = generator.fuse(states.flatten(0, 1)[batch["speech_rows"][at]], batch["speech_ids"][at])
            x = x.masked_scatter(at[..., None], fused.float())
        states = generator.model.model(inputs_embeds=x, attention_mask=batch["speech_real"], use_cache=False)
        logits, labels = generator.model.lm_head(states.last_hidden_state).float(), batch["speech_labels"]
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")


# -------------------------------------------------------------------------------------- training: the machine

def matmul_flops(device, n):
    """What a plain bf16 matrix product reaches here, floating-point operations per second."""
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16)
    b = torch.randn(n, n, device=device, dtype=torch.bfloat16)
    times = []
    for _ in range(10):
        clock = time.perf_counter()
        c = a @ b
        c[0, 0].item()
        times.append(time.perf_counter() - clock)
    return 2 * n ** 3 / statistics.median(times)


def synchronize():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def memory_peak():
    """The most memory that this process has held, in bytes: the GPU's if there is one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


# -------------------------------------------------------------------------------------------- training: steps

def build(size, stage):
    """A model ("tiny", or a released size with random weights), frozen for a stage, and its tokenizers."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    omni, *tokenizers = checkpoint.from_backbones("tiny/qwen2", "tiny/whisper.pt", "tiny/qwen2")
    if size != "tiny":
        omni = costs.model_of(size).to_empty(device=device)
        omni.tie()                                    # to_empty has parted what was one tensor
        omni.speech_generator.model.tie_weights()
        for p in (*omni.parameters(), *omni.buffers()):
            torch.nn.init.normal_(p, std=0.02)
        for network in (omni.model, omni.speech_generator.model.model):
            network.rotary_emb = type(network.rotary_emb)(network.config).to(device)
    omni.to(device).freeze_for(stage)
    return omni, tokenizers


class Training:
    """A model, an optimizer and so many steps of data: `step()` takes the next one.

    how      "padded", "ours", "ours, compiled" or "ours, recomputed"
    spent    sums over the steps since `start()`: real positions, computed positions (more if there is
             padding), flops, and seconds spent waiting for data
    """

    def __init__(self, size, stage, how, steps):
        self.stage, self.ours, self.spent = stage, how != "padded", Counter()
        self.omni, tokenizers = build(size, stage)
        self.device = self.omni.lm_head.weight.device
        networks = self.omni.model, self.omni.speech_generator.model.model
        if how == "ours, recomputed":
            warnings.filterwarnings("ignore", message=".*gradient_checkpointing_enable")
            for network in networks:
                network.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if how == "ours, compiled":
            for network in networks:
                for layer in network.layers:
                    layer.compile(dynamic=True)
        trained = [p for p in self.omni.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)

        batch_size = 32 if size == "tiny" else 16     # dialogues in a step
        rows = Plain(mixed(batch_size * steps) if size == "tiny" else made_up(batch_size * steps))
        n_mels = self.omni.model.speech_encoder.n_mels
        dialogues = Dialogues(rows, *tokenizers, n_mels, 3, 10, pad_audio=False, hear=stage != "stage1_tts")
        self.positions = positions_of(list(dialogues.lengths()), stage)
        order = random.Random(0).sample(range(len(rows)), len(rows))
        plan = []                                     # for each step its micro-batches, lists of row numbers
        for i in range(0, len(order), batch_size):
            chosen = order[i:i + batch_size]
            if self.ours:
                plan.append(deal(chosen, self.positions, 16384)[0])
            else:
                plan.append([chosen[j:j + 8] for j in range(0, batch_size, 8)])
        self.plan = iter(plan)
        self.batches = iter(torch.utils.data.DataLoader(
            dialogues, batch_sampler=[rows for groups in plan for rows in groups], prefetch_factor=4,
            num_workers=8 if self.device.type == "cuda" else 1, multiprocessing_context="fork",
            collate_fn=collate if self.ours else padded, worker_init_fn=lambda _: torch.set_num_threads(1)))

    def start(self):
        """Take the first steps, which are not like the others, then start counting."""
        for _ in range(WARM):
            self.step()
        synchronize()
        self.spent.clear()

    def step(self):
        """One optimizer step."""
        for rows in next(self.plan):
            clock = time.perf_counter()
            batch = next(self.batches)
            self.spent["waiting"] += time.perf_counter() - clock
            batch = {key: x.to(self.device) if torch.is_tensor(x) else x for key, x in batch.items()}
            with torch.autocast(self.device.type, dtype=torch.bfloat16):
                if self.ours:
                    loss = self.omni(batch, self.stage)[0]
                else:
                    loss = padded_loss(self.omni, batch, self.stage)
            loss.backward()
            self.spent["real"] += sum(self.positions[row] for row in rows)
            if self.ours:
                self.spent["flops"] += costs.flops(self.omni, self.stage, batch)
            if self.stage != "stage1_tts":
                self.spent["computed"] += batch["ids"].numel()
            if self.stage != "stage1":
                self.spent["computed"] += batch["speech_ids"].numel()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def alone(function, *arguments):
    """Call a function in a process of its own, whose peak of memory is then the function's."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def train_case(size, stage, how, steps=8):
    """One way of training -> its figures."""
    training = Training(size, stage, how, WARM + steps)
    training.start()
    start = time.perf_counter()
    for _ in range(steps):
        training.step()
    synchronize()
    seconds, spent = time.perf_counter() - start, training.spent
    result = {"tokens_per_s": spent["real"] / seconds, "peak_GB": memory_peak() / 1e9,
              "data_share": spent["waiting"] / seconds}
    if training.ours:
        result["flops_per_s"] = spent["flops"] / seconds
    else:
        result["real_share"] = spent["real"] / spent["computed"]
    return result


def check_corpus(sizes):
    if "tiny" in sizes and not os.path.isdir("corpus/tiny"):
        fail("size tiny trains on the embedded corpus, which is not there; run `python data.py` first")


def bench_train(cfg):
    """Tokens a second against a trainer that pads, on the same rows and with the same optimizer."""
    sizes, cuda = sizes_here(cfg), torch.cuda.is_available()
    check_corpus(sizes)
    peak = alone(matmul_flops, "cuda" if cuda else "cpu", 8192 if cuda else 2048)
    result = {"matmul_flops_per_s": peak}
    print(f"train: a plain bf16 matrix product makes {peak / 1e12:.2f} TFLOP/s; real: positions that are not "
          "padding")
    print(f"{'':32}{'tokens/s':>10}{'real':>8}{'peak GB':>9}{'MFU':>8}{'data':>7}{'gain':>7}")
    for size in sizes:
        for stage in STAGES if size != "3B" else ("stage1",):
            baseline = None
            for how in ("padded", "ours", "ours, compiled", "ours, recomputed"):
                if stage != "stage1" and how not in ("padded", "ours"):
                    continue
                name = f"{size} {stage}, {how}"
                try:
                    figures = alone(train_case, size, stage, how)
                except RuntimeError as e:             # the padded one may not fit at all
                    print(f"{name:32}{str(e).splitlines()[0][:80]}")
                    continue
                result[name] = figures
                real = mfu = gain = ""
                if how == "padded":
                    baseline = figures["tokens_per_s"]
                    real = f"{100 * figures['real_share']:.1f}%"
                else:
                    figures["mfu"] = figures.pop("flops_per_s") / peak
                    mfu = f"{100 * figures['mfu']:.1f}%"
                if baseline:
                    figures["gain"] = figures["tokens_per_s"] / baseline
                    gain = f"{figures['gain']:.2f}"
                print(f"{name:32}{figures['tokens_per_s']:10,.0f}{real:>8}{figures['peak_GB']:9.2f}"
                      f"{mfu:>8}{100 * figures['data_share']:6.0f}%{gain:>7}")
    return result


# ------------------------------------------------------------------------------------------------------- loss

def loss_case(pieces, targets=2048, width=896, vocabulary=151936):
    """The loss over the 0.5B's vocabulary, forward and backward -> (bytes at the peak above what its inputs
    take, seconds)."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    head = Head(width, vocabulary, bias=False).to(device)
    head.weight.grad = torch.zeros_like(head.weight)
    hidden = torch.randn(targets, width, device=device, requires_grad=True)
    labels = torch.randint(vocabulary, (targets,), device=device)
    before, clock = memory_peak(), time.perf_counter()
    if pieces:
        loss = head(hidden, labels)[0]
    else:
        loss = F.cross_entropy(head(hidden).float(), labels, reduction="sum")
    loss.backward()
    synchronize()
    return memory_peak() - before, time.perf_counter() - clock


def bench_loss(cfg):
    """The 152k-word logits, whole and in pieces."""
    whole, whole_s = alone(loss_case, False)
    pieces, pieces_s = alone(loss_case, True)
    print(f"loss: 2,048 targets of 151,936 words: whole {whole / 1e9:.2f} GB, {whole_s:.1f} s; in pieces "
          f"{pieces / 1e9:.2f} GB, {pieces_s:.1f} s")
    return {"whole_GB": whole / 1e9, "pieces_GB": pieces / 1e9, "whole_s": whole_s, "pieces_s": pieces_s}


# ------------------------------------------------------------------------------------------------------ serve

def spoken_question():
    """A question of the embedded world, (samples,) at 16 kHz."""
    return speak("What is the capital of France?", "en-us+m3:160:50").astype(np.float32)


def bench_browser(address, turns):
    """(turns, 2): milliseconds from letting go of the button to the first text, and to the first sound that
    leaves the player, in a real chromium whose microphone is a file. Each question interrupts the reply
    before it; every tenth begins a new conversation."""
    from playwright.sync_api import sync_playwright
    with tempfile.NamedTemporaryFile(suffix=".wav") as file, sync_playwright() as driver:
        file.write(wav_bytes(np.tile(spoken_question(), 200)))
        file.flush()
        flags = ["--no-sandbox", "--autoplay-policy=no-user-gesture-required",
                 "--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream",
                 f"--use-file-for-fake-audio-capture={file.name}"]
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=flags)
        page = browser.new_page()
        page.goto(address)
        page.wait_for_selector("[data-state=ready]")
        times = []
        for turn in range(turns + 1):
            if turn % 10 == 1:
                page.click("#new")
                page.wait_for_selector("[data-state=ready]")
            page.hover("#talk")
            page.mouse.down()
            page.wait_for_selector("[data-state=recording]")
            page.wait_for_timeout(1000)
            page.mouse.up()
            last = "nanoOmni.turns().at(-1)?.times"
            page.wait_for_function(f"{last}?.first_audio_ms != null")
            times.append(page.evaluate(f"[{last}.first_text_ms, {last}.first_audio_ms]"))
        browser.close()
    return np.array(times, float)[1:]                 # the first opens the microphone


async def hold(address, wav, turns):
    """A conversation over the network: for each reply its first audio in ms, and all stalls."""
    first, stalls = [], 0
    async with websockets.connect(address, max_size=None) as socket:
        async def send(kind, **fields):
            await socket.send(json.dumps({"type": kind, **fields}))
        await send("session.update", session={"audio": {"input": {"turn_detection": None}}})
        for _ in range(turns):
            await send("input_audio_buffer.append", audio=base64_of(wav))
            await send("input_audio_buffer.commit")
            await send("response.create")
            asked, pieces, event = time.perf_counter(), [], {"type": ""}
            while event["type"] != "response.done":
                event = json.loads(await socket.recv())
                if event["type"] == "response.output_audio.delta":
                    seconds = len(event["delta"]) * 3 / 8 / RATE             # base64 of two bytes a sample
                    pieces.append((seconds, time.perf_counter() - asked))
            reply = pace(pieces)
            first.append(1000 * reply["first_audio"])
            stalls += reply["stalls"]
            over = asked + reply["first_audio"] + reply["duration"]
            await asyncio.sleep(max(0, over - time.perf_counter()))          # it is played
    return first, stalls


async def interrupt(address, wav):
    """Milliseconds from the first sample of speech during a reply to the event that silences it. Sound comes
    as fast as a microphone brings it."""
    async with websockets.connect(address, max_size=None) as socket:
        async def hear(kind):
            while json.loads(await socket.recv())["type"] != kind:
                pass

        async def say(wav):
            start = time.perf_counter()
            for at in range(0, len(wav), RATE // 50):
                event = {"type": "input_audio_buffer.append", "audio": base64_of(wav[at:at + RATE // 50])}
                await asyncio.sleep(start + (at + RATE // 50) / RATE - time.perf_counter())
                await socket.send(json.dumps(event))
        waiting = asyncio.create_task(hear("response.output_audio.delta"))
        await say(np.concatenate([np.zeros(RATE // 2, np.float32), wav, np.zeros(RATE, np.float32)]))
        await waiting
        start, waiting = time.perf_counter(), asyncio.create_task(hear("input_audio_buffer.speech_started"))
        talking = asyncio.create_task(say(wav))
        await waiting
        silent = 1000 * (time.perf_counter() - start)
        await talking
        return silent


def bench_serve(cfg):
    """serve.py as its clients see it."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, "serve.py", "--ckpt", cfg.ckpt, "--port", str(port), "--rows", "16"]
    server, result = subprocess.Popen(command, stdout=subprocess.DEVNULL), {}
    page, address = f"http://127.0.0.1:{port}/", f"ws://127.0.0.1:{port}/v1/realtime"
    try:
        for _ in range(600):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(page + "healthz").close()
                break
            if server.poll() is not None:
                fail(f"serve: serve.py --ckpt {cfg.ckpt} does not start")
            time.sleep(0.1)
        wav = soxr.resample(spoken_question(), SAMPLE_RATE, RATE)

        async def many(count):
            return await asyncio.gather(*(hold(address, wav, 5) for _ in range(count)))
        for count in (1, 8, 16):
            held = asyncio.run(many(count))
            first, stalls = np.concatenate([first for first, _ in held]), sum(stalls for _, stalls in held)
            median, late = np.quantile(first, [0.5, 0.95])
            result[f"{count} conversations"] = [median, late, stalls]
            print(f"serve: {count} conversations of 5 turns: first audio {median:.0f} ms, "
                  f"95 % {late:.0f} ms; {stalls} stalls")
        silent = [asyncio.run(interrupt(address, wav)) for _ in range(10)]
        result["interruption_ms"] = np.quantile(silent, [0.5, 0.95]).tolist()
        print("serve: from the first sample of speech to the reply's end: {:.0f} ms, 95 % {:.0f} ms".format(
            *result["interruption_ms"]))
        try:
            times = bench_browser(page, cfg.turns)
        except ImportError:
            print("serve: no browser: pip install playwright, apt install chromium")
        else:
            for name, column in zip(("first text", "first sound"), times.T):
                median, late = result[f"browser, {name}"] = np.quantile(column, [0.5, 0.95]).tolist()
                print(f"serve: {len(times)} turns in a browser, from letting go to the {name}: "
                      f"{median:.0f} ms, 95 % {late:.0f} ms")
    finally:
        server.terminate()
        server.wait()
    return result


# ---------------------------------------------------------------------------------------------------- figures

def record(engine, tokenizer, codec, wav):
    """Answer a question wav (samples,) at 16 kHz and note when what happens -> a record, see omni/draw.py.
    The clock starts before the log-mel."""
    kept = {"text": [], "reads": [], "units": [], "sound": [], "R": engine.omni.R, "W": engine.omni.W}
    step, clock = engine.speech_lm.step, time.perf_counter()

    def now():
        return round(1000 * (time.perf_counter() - clock), 1)

    def timed_step(x, rows, counts):
        begin, states = now(), step(x, rows, counts)
        new = counts[0] - bool(kept["units"])         # a burst's last unit is read with the rows behind it
        if new and counts[0] > 1:
            kept["reads"].append([begin, now(), new])
        return states

    def bursts():
        for kind, x in engine.generate(chat_ids(tokenizer, []), [mel], temperature=0.3, seed=1):
            if kind == "text":
                kept["text"].append([now(), tokenizer.decode([x])])
            elif kind == "units":
                kept["units"].append([now(), len(x)])
                yield x
    engine.speech_lm.step = timed_step
    mel = log_mel(wav, engine.omni.model.speech_encoder.n_mels, engine.omni.pad_audio)
    for piece in stream(codec, bursts()):
        kept["sound"].append([now(), len(piece) / codec.sample_rate])
    engine.speech_lm.step = step
    engine.cached[0].clear()                          # or the clip would not be heard again
    kept["reply"] = "".join(token for _, token in kept["text"])
    kept["text"].append([kept["reads"][-1][0], draw.END])                     # it is read, but not shown
    return kept


def bench_figures(cfg, repeats=25):
    """reference/figures/*.svg. Of so many times the same reply, the one with the median first sound."""
    try:
        omni, tokenizer, _ = checkpoint.load(cfg.ckpt)
        codec = load_codec("tiny/codec.pt")
    except (OSError, ValueError, RuntimeError) as e:
        fail(f"figures: {e}")
    tiny = draw.sizes(omni, codec.sample_rate)
    real = draw.sizes(costs.model_of("0.5B"), CosyVoice2.sample_rate)
    engine, wav, load = Engine(quicken(omni.eval())), read_audio(CARROT), os.getloadavg()[0]
    replies = [record(engine, tokenizer, codec, wav) for _ in range(repeats)]
    kept = sorted(replies, key=lambda reply: reply["sound"][0][0])[repeats // 2]
    if not kept["units"]:
        fail(f"figures: {cfg.ckpt} says nothing; take a checkpoint of stage 2")
    with open("/proc/cpuinfo") as file:
        name = next((row.split(": ")[1].strip() for row in file if row.startswith("model name")), "a CPU")
    machine = f"{name}, {os.cpu_count()} cores; threads: {torch.get_num_threads()}; load before: {load:.1f}"
    kept |= {"question": "What color is a carrot?", "machine": machine}
    os.makedirs(FIGURES, exist_ok=True)
    for name, text in (("pipeline", draw.pipeline(tiny, real)), ("reply", draw.reply(kept)),
                       ("layout", draw.layout(kept))):
        replace_file(f"{FIGURES}/{name}.svg", text)
        print(f"figures: {FIGURES}/{name}.svg")
    return {"first_text_ms": kept["text"][0][0], "first_audio_ms": kept["sound"][0][0],
            "made_ms": kept["sound"][-1][0], "seconds": sum(seconds for _, seconds in kept["sound"])}


# ---------------------------------------------------------------------------------------------------- profile

def bench_profile(cfg):
    """A trace of a few steps of our training, and a table of the most expensive operations."""
    size = sizes_here(cfg)[0]
    check_corpus([size])
    training = Training(size, cfg.stage, "ours", WARM + cfg.steps)
    training.start()
    start = time.perf_counter()
    with torch.profiler.profile() as profiler:
        for _ in range(cfg.steps):
            training.step()
        synchronize()
    seconds = (time.perf_counter() - start) / cfg.steps
    os.makedirs(os.path.dirname(cfg.out) or ".", exist_ok=True)
    profiler.export_chrome_trace(cfg.out + ".tmp")
    os.replace(cfg.out + ".tmp", cfg.out)
    by = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    print(profiler.key_averages().table(sort_by=by, row_limit=15, max_name_column_width=50))
    print(f"profile: {size} {cfg.stage}, {cfg.steps} steps of {seconds:.2f} s; see {cfg.out}")
    return {"size": size, "stage": cfg.stage, "s_per_step": seconds, "trace": cfg.out}


def main():
    cfg = configure(BenchConfig)
    functions = (bench_sizes, bench_latency, bench_stream, bench_data, bench_train, bench_loss, bench_serve,
                 bench_figures, bench_profile)
    benches = dict(zip(BENCHES, functions))
    print(json.dumps({what: benches[what](cfg) for what in cfg.what}))


if __name__ == "__main__":
    main()
