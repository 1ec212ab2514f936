"""
Train the three backbones of the embedded world, which for the real sizes are downloads.

Why: LLaMA-Omni 2 starts from a recogniser (Whisper), a language model (Qwen2.5) and a speech codec (CosyVoice 2)
that others trained. Where nothing can be downloaded we grow small ones, in the same file formats, so that train.py
and sample.py cannot tell the difference:

    tiny/whisper.pt   openai-whisper's own classes and format: `whisper.load_model("tiny/whisper.pt")`
    tiny/qwen2/       transformers' Qwen2ForCausalLM and its tokenizer: `from_pretrained("tiny/qwen2")`
    tiny/codec.pt     codec.NanoCodec

They are shipped with the repository, as the real ones are downloads, and backbones.log is the log of the run that made
them. How: `python tiny/backbones.py` synthesises speech of the train split (tiny/world.py), trains each one for a fixed
number of steps, prints its figure of merit on held-out sentences and voices, and writes it. What is there already is
left alone. Muon updates the matrices of the blocks and AdamW everything else: it learned faster than AdamW alone.
"""
import dataclasses
import multiprocessing
import os
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import whisper
from tokenizers import pre_tokenizers
from tqdm import tqdm
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from codec import NanoCodec
from configure import configure
from eval import hear_all as recognise, language_model, word_error_rate
from model import SpeechEncoder, replace_folder
from tiny import world


@dataclass(frozen=True)
class BackbonesConfig:
    out_dir: str = "tiny"          # where the three files go
    parts: tuple[str, ...] = ("qwen2", "codec", "whisper")   # which to train
    qwen2_dialogues: int = 60000   # how many dialogues Qwen2 reads
    qwen2_steps: int = 2000        # steps of 64 dialogues
    codec_sentences: int = 3000    # how many different sentences the codec hears, all in the assistant's voice
    codec_steps: int = 2000        # steps of 32 crops of 2 s
    whisper_clips: int = 40000     # how many different clips Whisper hears
    whisper_steps: int = 5000      # steps of 32 clips
    figures: int = 400             # held-out items that each figure of merit is measured on
    seed: int = 1337               # of the sentences, the voices and the initial weights


# ------------------------------------------------------------------------------------------------- training

def optimizers(model, lr):
    """Muon for the matrices inside blocks, AdamW (at a tenth of its rate) for embeddings, heads, norms and biases."""
    inside = [p for n, p in model.named_parameters() if p.ndim == 2 and ("blocks" in n or "layers" in n or ".mlp" in n)]
    chosen = {id(p) for p in inside}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    return [torch.optim.Muon(inside, lr=lr, weight_decay=0.01, adjust_lr_fn="original"),
            torch.optim.AdamW(rest, lr=lr / 10, betas=(0.9, 0.98), weight_decay=0.01)]


def say(text):
    """Print a line, and keep it in backbones.log."""
    tqdm.write(text)
    with open(f"{cfg.out_dir}/backbones.log", "a") as f:
        f.write(text + "\n")


def fit(name, model, loss_of_batch, steps, lr=0.02):
    """Train for `steps` steps; loss_of_batch() draws a batch and returns a dict of losses, whose sum is minimised."""
    opts = optimizers(model, lr)
    model.train()
    bar = tqdm(range(steps), desc=name, unit="step", mininterval=1, dynamic_ncols=True)
    for step in bar:
        scale = min(1, (step + 1) / 50) * min(1, (steps - step) / (0.5 * steps))    # warm-up, flat, linear to zero
        with torch.autocast("cpu", torch.bfloat16):
            losses = loss_of_batch()
        loss = sum(losses.values())
        if not torch.isfinite(loss):
            raise SystemExit(f"error: {name}: loss is {loss.item()} at step {step}")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt, base in zip(opts, (lr, lr / 10)):
            opt.param_groups[0]["lr"] = base * scale
            opt.step()
            opt.zero_grad(set_to_none=True)
        if step % 100 == 0 or step == steps - 1:
            say(f"{name} step {step}/{steps} | " + " | ".join(f"{k} {v.item():.3f}" for k, v in losses.items()))
    return model.eval()


def bucketed(rng, lengths, size):
    """Endless batches of indices, each of items of similar length, so that little of a batch is padding."""
    while True:
        rows = sorted(range(len(lengths)), key=lambda i: lengths[i] * rng.uniform(0.9, 1.1))
        batches = [rows[i:i + size] for i in range(0, len(rows) - size + 1, size)]
        yield from rng.sample(batches, len(batches))


def _say(job):
    return world.speak(*job)


def say_all(jobs):
    """[(text, voice)] or [(text, voice, True)] -> what `world.speak` returns for each, on all cores."""
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        return list(tqdm(pool.imap(_say, jobs, chunksize=64), total=len(jobs), desc="speaking", unit="utterance"))


# ---------------------------------------------------------------------------------------------------- codec

def pitch(wav, hop=NanoCodec.hop, low=65, high=300):
    """Pitch of a clean voice by normalised autocorrelation: wav (samples,) 16 kHz -> (f0 Hz, strength 0..1), 100 Hz."""
    size = 800                                        # 50 ms window
    frames = F.pad(wav, (size // 2, size // 2)).unfold(0, size, hop)[: len(wav) // hop] * torch.hann_window(size)
    auto = torch.fft.irfft(torch.fft.rfft(frames, 2 * size).abs() ** 2)[:, :size]
    window = torch.fft.irfft(torch.fft.rfft(torch.hann_window(size), 2 * size).abs() ** 2)[:size]
    auto = auto / (auto[:, :1] + 1e-4) / (window / window[0]).clamp(min=0.05)
    lags = auto[:, world.SAMPLE_RATE // high: world.SAMPLE_RATE // low]
    strength = lags.max(-1).values
    peak = (lags > lags[:, :1]) & (lags >= 0.92 * strength[:, None])     # the first peak, not its multiples
    peak[:, 1:-1] &= (lags[:, 1:-1] >= lags[:, :-2]) & (lags[:, 1:-1] >= lags[:, 2:])
    lag = torch.where(peak.any(-1), peak.float().argmax(-1), lags.argmax(-1)) + world.SAMPLE_RATE // high
    return world.SAMPLE_RATE / lag, strength.clamp(0, 1)


def train_codec(cfg, rng):
    texts = set()
    while len(texts) < cfg.codec_sentences:
        texts |= {t[who] for t in world.dialogue(rng, "train") for who in ("user", "assistant")}
    spoken = say_all([(t, world.ASSISTANT, True) for t in sorted(texts)])
    names = sorted({p for _, events in spoken for _, p in events})
    clips = []
    for wav, events in spoken:
        wav = torch.from_numpy(np.pad(wav, (0, -len(wav) % 640 + 640 * (50 - min(50, -(-len(wav) // 640))))))
        frame = torch.arange(len(wav) // 160) / 100 + 0.005
        starts = torch.tensor([s for s, _ in events])
        label = torch.tensor([names.index(p) for _, p in events])[(torch.searchsorted(starts, frame) - 1).clamp(0)]
        clips.append((wav, label, *pitch(wav)))
    torch.manual_seed(cfg.seed)
    codec = NanoCodec(phonemes=names)

    def loss():
        wavs, labels, f0s, voiced = [], [], [], []
        for _ in range(32):
            wav, label, f0, strength = clips[rng.randrange(len(clips))]
            u = rng.randint(0, len(wav) // 640 - 50)
            wavs.append(wav[u * 640:(u + 50) * 640]), labels.append(label[u * 4:(u + 50) * 4])
            f0s.append(f0[u * 4:(u + 50) * 4]), voiced.append(strength[u * 4:(u + 50) * 4] > 0.6)
        wav, label, f0, voiced = map(torch.stack, (wavs, labels, f0s, voiced))
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            mel = codec.log_mel(wav)
            target = codec.stft(wav).abs()
            pulse_in = codec.stft(codec.pulses(f0)).abs()
            noise_in = codec.window.square().sum().sqrt()
        codes = codec.tokenize(mel)
        phoneme = codec.recognise(codes).unflatten(-1, (4, -1)).flatten(1, 2)
        f0_hat, pulse, noise = codec.render(codes.detach())    # the units serve the recogniser alone: see project.md
        power = (pulse_in * pulse.exp()) ** 2 + (noise_in * noise.exp()) ** 2
        log = lambda p: torch.log(p + 1e-5)
        bands = codec.curve.T                         # (257, bands)
        return {"phoneme": F.cross_entropy(phoneme.float().transpose(1, 2), label),
                "spectrum": (log(power) - log(target ** 2)).abs().mean() * 0.5,
                "envelope": (log(power @ bands) - log(target ** 2 @ bands)).abs().mean(),
                "pitch": ((f0_hat.log() - f0.log()).abs() * voiced).sum() / voiced.sum().clamp(1) * 3}
    fit("codec", codec, loss, cfg.codec_steps)
    codec.save(f"{cfg.out_dir}/codec.pt")
    unseen = [t["assistant"] for _ in range(cfg.figures) for t in world.dialogue(rng, "test")][:cfg.figures]
    original = say_all([(t, world.ASSISTANT) for t in unseen])
    decoded = [codec.decode(codec.encode(torch.from_numpy(w))).numpy() for w in original]
    for judge, bigram in (("bigram", True), ("word loop", False)):
        arpa = language_model([t["assistant"] for _ in range(2000) for t in world.dialogue(rng, "train")], bigram)
        there, back = (100 * word_error_rate(unseen, recognise(wavs, arpa)) for wavs in (original, decoded))
        say(f"codec: {judge} judge, WER on unseen replies {back:.1f} %, on the original speech {there:.1f} %: excess {back - there:.1f}")


# -------------------------------------------------------------------------------------------------- whisper

def _mel(job):
    torch.set_num_threads(1)
    return whisper.log_mel_spectrogram(torch.from_numpy(world.speak(*job)), 80).half().numpy()


def hear_all(jobs):
    """[(text, voice)] -> their log-mels, float16 arrays (80, frames)."""
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        return list(tqdm(pool.imap(_mel, jobs, chunksize=64), total=len(jobs), desc="speaking", unit="utterance"))


def hear_batch(model, mels):
    """Log-mels (80, frames) -> what the encoder makes of them, (B, L, 128), zero beyond each clip's own length, and those
    lengths (B,)."""
    frames = [m.shape[1] for m in mels]
    lengths = [(n + 1) // 2 for n in frames]
    states = model.encoder(torch.cat([torch.from_numpy(m).float() for m in mels], 1), frames)
    return torch.nn.utils.rnn.pad_sequence(states.split(lengths), batch_first=True), torch.tensor(lengths)


@torch.no_grad()
def transcribe(model, tokenizer, mels, limit=40):
    """Greedy decoding of a batch of log-mels -> texts."""
    end = tokenizer.eos_token_id
    audio, _ = hear_batch(model, mels)
    tokens = torch.full((len(mels), 1), end)
    for _ in range(limit):
        token = model.decoder(tokens, audio)[:, -1].argmax(-1)
        tokens = torch.cat([tokens, token[:, None]], 1)
        if (tokens[:, 1:] == end).any(1).all():
            break
    return [tokenizer.decode(row[1:].tolist() + [end]).split(tokenizer.eos_token)[0] for row in tokens]


def train_whisper(cfg, rng, tokenizer):
    """Whisper's loss, the next token given the sound, and beside it CTC on letters from the encoder, which tells the
    encoder directly what was said where: without it the cross-attention takes minutes to find the words."""
    def draw(split, n, accents=world.ACCENTS):
        texts = []
        while len(texts) < n:
            texts += [t["user"] for t in world.dialogue(rng, split)]
        return [(t, world.draw_voice(rng, split, accents)) for t in texts[:n]]
    jobs = draw("train", cfg.whisper_clips)
    mels = hear_all(jobs)
    end = tokenizer.eos_token_id
    tokens = [[end] + tokenizer(t)["input_ids"] + [end] for t, _ in jobs]
    letters = [[1 + ord(c) - ord("a") if c != " " else 27 for c in t.lower() if c.isalpha() or c == " "] for t, _ in jobs]
    torch.manual_seed(cfg.seed)
    dims = whisper.model.ModelDimensions(n_mels=80, n_audio_ctx=1500, n_audio_state=128, n_audio_head=2, n_audio_layer=6,
                                         n_vocab=len(tokenizer), n_text_ctx=64, n_text_state=128, n_text_head=2, n_text_layer=1)
    model = whisper.model.Whisper(dims)
    nn.init.normal_(model.decoder.positional_embedding, std=0.02)
    nn.init.normal_(model.decoder.token_embedding.weight, std=0.02)
    model.encoder = SpeechEncoder(80, 1500, 128, 2, 6)
    model.ctc = nn.Linear(128, 28)
    batches = bucketed(rng, [m.shape[1] for m in mels], 32)

    def loss():
        rows = next(batches)
        states, lengths = hear_batch(model, [mels[i] for i in rows])
        text = torch.nn.utils.rnn.pad_sequence([torch.tensor(tokens[i]) for i in rows], True, padding_value=-100)
        logits = model.decoder(text[:, :-1].clamp(min=0), states)
        spelled = torch.tensor([c for i in rows for c in letters[i]])
        ctc = F.ctc_loss(model.ctc(states).float().log_softmax(-1).transpose(0, 1), spelled, lengths,
                         torch.tensor([len(letters[i]) for i in rows]), zero_infinity=True)
        return {"text": F.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten()), "ctc": ctc}

    whisper.model.MultiHeadAttention.use_sdpa = False             # on CPU its backward is slower than two products
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        fit("whisper", model, loss, cfg.whisper_steps)
    for name, split, accents in (("unseen sentences and voices", "test", world.ACCENTS),
                                 ("... in an unseen accent", "test", [world.UNSEEN_ACCENT])):
        test = draw(split, cfg.figures, accents)
        heard = hear_all(test)
        texts = [t for i in range(0, len(test), 50) for t in transcribe(model, tokenizer, heard[i:i + 50])]
        say(f"whisper: WER on {name}: {100 * word_error_rate([t for t, _ in test], texts):.1f} %")
    weights = {k: v.half() for k, v in model.state_dict().items() if not k.startswith("ctc.")}
    torch.save({"dims": dataclasses.asdict(dims), "model_state_dict": weights}, f"{cfg.out_dir}/whisper.pt.tmp")
    os.replace(f"{cfg.out_dir}/whisper.pt.tmp", f"{cfg.out_dir}/whisper.pt")


# ---------------------------------------------------------------------------------------------------- qwen2

CHAT = ("{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")


def make_tokenizer(texts):
    """Qwen2's own tokenizer (byte-level BPE), trained on the world's texts: nearly every word is one token."""
    letters = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Qwen2Tokenizer(vocab=letters, merges=[]).train_new_from_iterator(
        texts + ["system user assistant"] * 100, vocab_size=256 + 700 + len(special), new_special_tokens=special)
    tokenizer.chat_template = CHAT
    return tokenizer


def train_qwen2(cfg, rng):
    def chat(turns):
        return [m for t in turns for m in ({"role": "user", "content": t["user"]}, {"role": "assistant", "content": t["assistant"]})]

    def labelled(turns):                              # ids, and labels for what the assistant says
        ids, labels = [], []
        for t in turns:
            asked = tokenizer(tokenizer.apply_chat_template(chat([t])[:1], tokenize=False, add_generation_prompt=True))["input_ids"]
            said = tokenizer(t["assistant"])["input_ids"] + [end]
            ids += asked + said + newline
            labels += [-100] * len(asked) + said + [-100] * len(newline)
        return torch.tensor([ids, labels]).T
    pool = [world.dialogue(rng, "train") for _ in range(cfg.qwen2_dialogues)]
    tokenizer = make_tokenizer([t[who] for d in pool for t in d for who in ("user", "assistant")])
    end, newline = tokenizer.convert_tokens_to_ids("<|im_end|>"), tokenizer("\n")["input_ids"]
    data = [labelled(d) for d in pool]
    torch.manual_seed(cfg.seed)
    model = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=192, intermediate_size=512, num_hidden_layers=4, num_attention_heads=3,
        num_key_value_heads=1, max_position_embeddings=2048, tie_word_embeddings=True, rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        bos_token_id=None, eos_token_id=end, pad_token_id=tokenizer.pad_token_id, use_cache=True, attn_implementation="eager"))

    batches = bucketed(rng, [len(x) for x in data], 64)

    def loss():
        ids, labels = torch.nn.utils.rnn.pad_sequence([data[i] for i in next(batches)], True, padding_value=-100).unbind(-1)
        hidden = model.model(input_ids=ids.clamp(min=0), use_cache=False).last_hidden_state[:, :-1]
        at = labels[:, 1:] != -100
        return {"text": F.cross_entropy(model.lm_head(hidden[at]).float(), labels[:, 1:][at])}
    fit("qwen2", model, loss, cfg.qwen2_steps)
    right, count = Counter(), Counter()
    for _ in range(cfg.figures):
        turns = world.dialogue(rng, "test")
        prompt = tokenizer.apply_chat_template(chat(turns)[:-1], tokenize=False, add_generation_prompt=True)
        x = tokenizer(prompt, return_tensors="pt")["input_ids"]
        out = model.generate(x, max_new_tokens=40, do_sample=False, eos_token_id=end, pad_token_id=end)[0, x.shape[1]:]
        count[turns[-1]["topic"]] += 1
        right[turns[-1]["topic"]] += tokenizer.decode(out, skip_special_tokens=True) == turns[-1]["assistant"]
    say(f"qwen2: exact answers to unseen typed questions: {100 * right.total() / count.total():.1f} %  ("
          + ", ".join(f"{t} {100 * right[t] / n:.0f}" for t, n in count.items()) + ")")
    model.half().save_pretrained(f"{cfg.out_dir}/qwen2.tmp")
    tokenizer.save_pretrained(f"{cfg.out_dir}/qwen2.tmp")
    replace_folder(f"{cfg.out_dir}/qwen2.tmp", f"{cfg.out_dir}/qwen2")


if __name__ == "__main__":
    cfg = configure(BackbonesConfig)
    os.makedirs(cfg.out_dir, exist_ok=True)
    for part, file, train in (("qwen2", "qwen2", train_qwen2), ("codec", "codec.pt", train_codec),
                              ("whisper", "whisper.pt", train_whisper)):
        if part not in cfg.parts:
            continue
        if os.path.exists(f"{cfg.out_dir}/{file}"):
            say(f"{part}: {cfg.out_dir}/{file} is there already")
            continue
        start, rng = time.time(), random.Random(f"{cfg.seed} {part}")
        if part == "whisper":
            train(cfg, rng, Qwen2Tokenizer.from_pretrained(f"{cfg.out_dir}/qwen2"))
        else:
            train(cfg, rng)
        say(f"{part}: {time.time() - start:.0f} s")
