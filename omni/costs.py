"""
What a stage of training takes, by arithmetic from its config file: memory, FLOPs, hours, dollars, disk.

Why: whoever rents a GPU wants to know which one before, and we had none to measure on. So everything here is
computed; only activations and FLOPs were held against what torch counts (tests/test_costs.py).

    state          16 bytes for a trained parameter (weight, gradient, AdamW's two moments, all fp32), 4 for a
                   frozen one
    bf16 copies    2 bytes for each weight that autocast copies and the backward pass needs: of what is
                   trained, and with LoRA of the LLM's head and, unless they are recomputed, its layers
    activations    `activations` bytes for each position of a full micro-batch (micro_tokens) that gets a
                   gradient. Left out: adapter and gate fusion, 2 % of it, and the frozen encoder, which is
                   done before the rest is there
    logits         16 bytes for each of the LOGITS (model.py) that exist at once: bf16, fp32, softmax, and
                   the gradient
    GPU            the smallest that is filled to at most 90 %. Over several of 80 GB (FSDP 2) state is
                   divided; in place of the bf16 copies each holds all weights in bf16, as validation does
    FLOPs          `flops` on dialogues of average length, once for each number of turns; where --recompute is
                   on, the forward pass of what is trained counts twice
    hours          of one H100 at 30 % of its 989 TFLOP/s (bf16), for 2.50 dollars an hour: share and price
                   are assumptions. n GPUs take 1/n of the hours at best, and as many dollars. The embedded
                   world: of two cores, at 20 % of the 0.84 TFLOP/s that a matrix product reaches there
                   (reference/measurements.md)
    disk           the run's folder: `keep` = 2 checkpoints, the best, and the one being written, 12 bytes
                   for a trained parameter each; base/ in stage 1, and final/, 4 for each of the model's
"""
import re
from dataclasses import dataclass

import torch

from model import IGNORE, LOGITS, PARTS, STAGES, Omni, SpeechEncoder
from omni.audio import DOWNSAMPLE, UNIT_RATE, UNIT_VOCAB, speech_positions
from omni.configure import read_file

# Qwen2.5: width, layers, heads, key-value heads, MLP, vocabulary, are head and table one tensor?
QWEN2 = {"tiny": (192, 4, 3, 1, 512, 960, True),
         "0.5B": (896, 24, 14, 2, 4864, 151936, True), "1.5B": (1536, 28, 12, 2, 8960, 151936, True),
         "3B": (2048, 36, 16, 2, 11008, 151936, True), "7B": (3584, 28, 28, 4, 18944, 152064, False),
         "14B": (5120, 48, 40, 8, 13824, 152064, False)}
QWEN2_FIELDS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
                "intermediate_size", "vocab_size", "tie_word_embeddings")
WORDS = {"tiny": 960}                                 # of the speech LM, `<sep>` included
WHISPER = {"tiny/whisper.pt": (80, 192, 3, 6), "base.en": (80, 512, 8, 6), "small.en": (80, 768, 12, 12),
           "large-v3": (128, 1280, 20, 32)}           # mel bins, width, heads, layers
H100, DOLLARS = 0.3 * 989e12, 2.5                     # FLOP/s in bf16, assumed; per hour
CORES = 0.2 * 0.84e12                                 # two of them: FLOP/s
CARDS = 16, 24, 40, 80                                # GiB of memory


@dataclass(frozen=True)
class Corpus:
    dialogues: int
    turns: tuple[float, ...]                          # share of dialogues with 1, 2 ... turns
    question: float                                   # seconds
    reply: float                                      # seconds
    tokens: float                                     # of a reply, `<|im_end|>` included
    template: tuple[int, int]                         # tokens of the chat template, first turn and later
    gigabytes: float                                  # with what was downloaded for it


CORPORA = {                           # reference/training.md; counted on the embedded corpus; assumed
    "corpus/instructs2s": Corpus(200000, (0.406, 0.271, 0.18, 0.09, 0.053), 7.5, 19.0, 40.5, (29, 9), 690),
    "corpus/tiny": Corpus(20000, (0.36, 0.294, 0.198, 0.093, 0.055), 2.34, 1.60, 7.9, (15, 16), 3.4),
    "corpus/small": Corpus(5000, (1.0,), 4.0, 5.0, 17.0, (29, 9), 1.0)}


# --------------------------------------------------------------------------------------------- the model

def model_of(llm, speech_lm="0.5B", whisper="large-v3", device="meta"):
    """The Omni of backbones named as in QWEN2 and WHISPER. On the meta device it has shapes and no memory."""
    common = {"rope_theta": 1e6, "rms_norm_eps": 1e-6, "max_position_embeddings": 32768}
    speech = common | dict(zip(QWEN2_FIELDS, QWEN2[speech_lm]))
    speech |= {"vocab_size": WORDS.get(speech_lm, 151666) + UNIT_VOCAB, "eos_token_id": 151643}
    n_mels, width, heads, layers = WHISPER[whisper]
    config = common | dict(zip(QWEN2_FIELDS, QWEN2[llm])) | {
        "eos_token_id": 151645, "speech_encoder_hidden_size": width, "speech_generator": speech,
        "stream_params": "(3,10)"}
    with torch.device(device):
        return Omni(config, SpeechEncoder(n_mels, 1500, width, heads, layers))


def parameters(omni, trained=None):
    """{part: millions of parameters}; with `trained` only those with gradients (True) or without (False)."""
    counts = dict.fromkeys(PARTS, 0)
    for name, p in omni.named_parameters():
        if trained in (None, p.requires_grad):
            part = next(part for part, prefixes in PARTS.items() if name.startswith(prefixes))
            counts[part] += p.numel()
    return {part: n / 1e6 for part, n in counts.items()}


def matrix_weights(module):
    """How many weights of a module each position is multiplied with."""
    return sum(p.numel() for name, p in module.named_parameters() if p.ndim > 1 and "embed" not in name)


# ------------------------------------------------------------------------------------------------ FLOPs

def network_flops(network, lengths):
    """The forward pass of a Qwen2Model without its embedding: 2 for each weight and position, and attention's
    two products over the half that is seen."""
    config = network.config
    attention = 2 * config.hidden_size * config.num_hidden_layers * sum(n * n for n in lengths)
    return 2 * matrix_weights(network.layers) * sum(lengths) + attention


def flops(omni, stage, batch, recompute=False):
    """Floating-point operations of a step on a batch that `collate` made, by arithmetic. The gradients of the
    weights and those of the inputs each cost as much as the forward pass; with LoRA the first are small."""
    generator, total = omni.speech_generator, 0
    frozen_llm = "lora_rank" in omni.config
    if stage != "stage1_tts":
        encoder, frames = omni.model.speech_encoder, [(n + 1) // 2 for n in batch["frames"]]
        width, layers = encoder.ln_post.weight.numel(), len(encoder.blocks)
        total += 2 * matrix_weights(encoder) * sum(frames) + 4 * width * layers * sum(n * n for n in frames)
        llm = network_flops(omni.model, batch["lengths"])
        adapter = 2 * matrix_weights(omni.model.speech_projector) * sum(frames) / DOWNSAMPLE
        if stage == "stage1":
            llm, adapter = (3 - frozen_llm + recompute) * llm, 3 * adapter
        total += llm + adapter
    if stage == "stage1":
        targets = int((batch["labels"] != IGNORE).sum())
        return total + 2 * (3 - frozen_llm) * omni.lm_head.weight.numel() * targets
    if stage == "stage2":
        fusion = matrix_weights(generator.input_proj) + matrix_weights(generator.gate)
        total += 6 * fusion * int((batch["speech_rows"] >= 0).sum())
    total += (3 + recompute) * network_flops(generator.model.model, batch["speech_lengths"])
    return total + 6 * generator.model.lm_head.weight.numel() * int((batch["speech_labels"] != IGNORE).sum())


def average(corpus, turns):
    """A dialogue of average lengths, as far as `flops` looks at its batch."""
    frames = round(100 * corpus.question)
    prompts = corpus.template[0] + (turns - 1) * corpus.template[1]
    text, units = round(turns * corpus.tokens), round(turns * corpus.reply * UNIT_RATE)
    one = round(corpus.tokens + 1 + corpus.reply * UNIT_RATE)     # a reply, with `<sep>`
    return {"frames": [frames] * turns, "lengths": [prompts + turns * speech_positions(frames) + text],
            "labels": torch.zeros(text), "speech_lengths": [one] * turns, "speech_rows": torch.zeros(text),
            "speech_labels": torch.zeros(units + turns)}          # the last unit predicts the end


# ----------------------------------------------------------------------------------------------- memory

def activations(config, recompute=False, lora_rank=0):
    """Bytes that the backward pass of a Qwen2Model needs for each position, under bf16 autocast on a GPU.

    A layer of width H, with an MLP of width I and keys of width K, keeps: the inputs of both norms and what
    they make of them (16 H, fp32; with LoRA 8 H, since their weights are frozen), bf16 copies of that for
    three and for two matrices (10 H), the queries, and what attention makes of them, before and after it is
    put in order (6 H), keys and values (4 K), the MLP's two halves, silu and product (8 I), and an fp32
    number for each head and norm. With `recompute` it keeps its input (4 H), and one layer the rest.
    """
    H, heads = config.hidden_size, config.num_attention_heads
    head = H // heads
    layer = 32 * H + 8 * config.intermediate_size + 4 * config.num_key_value_heads * head + 4 * heads + 8
    last = 8 * H + 8 * head + 20                      # the last norm, sines and cosines, numbers of rows
    if lora_rank:
        layer += 7 * 2 * lora_rank - 8 * H
        last -= 4 * H
    layers = config.num_hidden_layers
    return last + layer + layers * 4 * H if recompute else last + layers * layer


def gpu(fits):
    """The smallest GPUs that a stage fits on. fits(n, bytes of each) -> bool."""
    for size in CARDS:
        if fits(1, 0.9 * size * 2 ** 30):
            return f"{size} GB"
    for n in (2, 4, 8, 16):
        if fits(n, 0.9 * CARDS[-1] * 2 ** 30):
            return f"{n} x {CARDS[-1]} GB"
    return "more"


def memory(omni, corpus, stage, micro_tokens, recompute=False, lora_rank=0):
    """(bytes of state, bytes of everything on one GPU, the smallest GPUs). omni: frozen for the stage."""
    generator = omni.speech_generator.model
    trained = 1e6 * sum(parameters(omni, True).values())
    frozen = 1e6 * sum(parameters(omni, False).values())
    state, copies = 16 * trained + 4 * frozen, 2 * trained
    if lora_rank:
        copies += 2 * omni.lm_head.weight.numel()
    if lora_rank and not recompute:
        copies += 2 * matrix_weights(omni.model.layers)
    if stage == "stage1":
        network, words, share = omni.model, omni.lm_head.out_features, 1
    else:
        network, words, share = generator.model, generator.lm_head.out_features, 1
        if stage == "stage2":                         # micro_tokens counts the LLM's positions, too
            both = [average(corpus, t + 1) for t in range(len(corpus.turns))]
            speech = sum(p * sum(x["speech_lengths"]) for p, x in zip(corpus.turns, both))
            share = speech / (speech + sum(p * x["lengths"][0] for p, x in zip(corpus.turns, both)))
    work = share * micro_tokens * activations(network.config, recompute, lora_rank)
    work += 16 * min(LOGITS, micro_tokens * words)

    def fits(n, size):
        needed = state + copies if n == 1 else state / n + 2 * (trained + frozen)
        return needed + work <= size
    return state, state + copies + work, gpu(fits)


# ------------------------------------------------------------------------------------------- the table

def fields_of(*paths):
    """{key: value} of config files, the later ones first."""
    return {key: value for path in paths for key, value, _ in read_file(path)}


def backbone(name):
    """The key in QWEN2 of a backbone: "hf:Qwen/Qwen2.5-3B-Instruct" -> "3B"."""
    found = re.search(r"Qwen2\.5-([\d.]+B)", name)
    return found[1] if found else "tiny"


def cost(first, file, size=None, **options):
    """What a stage costs. first: stage 1's config file, which names the backbones; file: the stage's; size:
    that of a size, or None; options: keys that are given on the command line."""
    names = fields_of(*filter(None, [first, size]))
    fields = fields_of(*filter(None, [file, size])) | options
    stage, recompute, rank = fields["stage"], fields.get("recompute", False), fields.get("lora_rank", 0)
    corpus = CORPORA[fields.get("corpus", "corpus/tiny").removesuffix("_heard")]
    omni = model_of(backbone(names.get("llm", "")), backbone(names.get("speech_lm", "")),
                    names.get("whisper", "tiny/whisper.pt"))
    if rank:
        with torch.device("meta"):
            omni.add_lora(rank)
    omni.freeze_for(stage)
    trained, frozen = (1e6 * sum(parameters(omni, which).values()) for which in (True, False))
    state, total, card = memory(omni, corpus, stage, fields["micro_tokens"], recompute, rank)
    dialogue = sum(share * flops(omni, stage, average(corpus, t + 1), recompute)
                   for t, share in enumerate(corpus.turns))
    whole = dialogue * corpus.dialogues * fields["epochs"]
    whole_models = 2 if stage == "stage1" else 1
    result = {"state_GB": state / 1e9, "total_GB": total / 1e9, "gpu": card, "flop": whole,
              "disk_GB": (4 * 12 * trained + whole_models * 4 * (trained + frozen)) / 1e9,
              "corpus_GB": corpus.gigabytes}
    if corpus is CORPORA["corpus/tiny"]:
        return result | {"gpu": "two cores", "hours": whole / CORES / 3600, "dollars": 0.0}
    hours = whole / H100 / 3600
    return result | {"hours": hours, "dollars": DOLLARS * hours}


def rows():
    """Yield (size, stage, what it costs, what it costs at least) for each size and stage that has config
    files. At least: with --recompute, and in stage 1 with --lora_rank 16."""
    worlds = [("embedded world", "tiny_", None), ("small", "small_", None), ("0.5B", "", None)]
    worlds += [(size, "", f"config/{size.lower()}.py") for size in ("1.5B", "3B", "7B", "14B")]
    for world, kind, size in worlds:
        for stage in STAGES:
            paths = f"config/{kind}stage1.py", f"config/{kind}{stage}.py", size
            least = {"recompute": True} | ({"lora_rank": 16} if stage == "stage1" else {})
            yield world, stage, cost(*paths), cost(*paths, **least)
