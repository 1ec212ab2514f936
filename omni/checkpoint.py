"""
Checkpoints: the released layout, and the folder of a run.

Why the released layout: what the authors published loads here, and what is trained here loads in their code.
The attribute names in model.py are the released key names, so nothing is translated.

Why a run's folder has checkpoints of its own kind: a run saves every few minutes, and most of the model is
frozen. So step-N/ holds what was trained, with all that it takes to continue, and names the folder that holds
the rest: base/, written once, or the checkpoint that the run started from. final/ is the whole model in the
released layout. A checkpoint is written aside, flushed and renamed; meta.json lists size and sha256 of its
files.
"""
import json
import os
import re
import sys

import torch
import torch.nn as nn
import whisper
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen2ForCausalLM, Qwen2Tokenizer

from model import Omni, SpeechEncoder
from omni.audio import DOWNSAMPLE, UNIT_VOCAB
from omni.files import flush, read_json, read_tensors, replace_folder, sha256

HUB = "hf:"                           # prefix of a name on the Hugging Face hub
SPEECH_FIELDS = ("bos_token_id", "eos_token_id", "hidden_size", "intermediate_size",
                 "max_position_embeddings", "num_attention_heads", "num_hidden_layers", "num_key_value_heads",
                 "rms_norm_eps", "rope_theta", "tie_word_embeddings", "vocab_size")


# ------------------------------------------------------------------------------ the released layout

def local_or_hub(name):
    """Where a Qwen2 or a checkpoint lies: a local folder, or after `hf:` a name on the hub, which is returned
    bare.

    Raises FileNotFoundError: a folder that is missing is never looked for on the hub, where a stranger may
    own it.
    """
    if name.startswith(HUB):
        return name.removeprefix(HUB)
    if not os.path.isdir(name):
        raise FileNotFoundError(f"there is no folder {name}; for the Hugging Face hub write {HUB}owner/name")
    return name


class Draws(TorchDispatchMode):
    """Random numbers for parameters without memory (`init_empty_weights`): drawn and dropped, since nearly
    all are about to be loaded. What is drawn later stays what it is, and `fill` draws those of a parameter
    that nothing was loaded into: a seed means the same weights, whether the rest had memory or not."""

    def __init__(self):
        super().__init__()
        self.drawn = {}                               # parameter: (the generator's state before, how)
        self.space = torch.empty(0)                   # one for all: freed ones would leave holes, not memory

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten.uniform_.default, torch.ops.aten.normal_.default) and args[0].is_meta:
            self.drawn[args[0]] = torch.get_rng_state(), function, args[1:]
            n = args[0].numel()
            if n > len(self.space):
                self.space = torch.empty(n)
            function(self.space[:n], *args[1:])
        return function(*args, **kwargs or {})

    def fill(self, module):
        """Give memory and their numbers to the parameters below `module` that have none."""
        after = torch.get_rng_state()
        for part in module.modules():
            for name, p in part._parameters.items():
                if p is not None and p.is_meta:
                    state, function, how = self.drawn[p]
                    torch.set_rng_state(state)
                    part._parameters[name] = nn.Parameter(function(torch.empty(p.shape), *how))
        torch.set_rng_state(after)


def load_whisper(name):
    """The encoder of an openai-whisper file, or of one of its models ("large-v3", downloaded once). The file
    is mapped, so of the decoder nothing is read."""
    try:
        path = name
        if name in whisper._MODELS:
            cache = os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache"))
            path = whisper._download(whisper._MODELS[name], os.path.join(cache, "whisper"), False)
        elif not os.path.isfile(name):
            raise FileNotFoundError(f"no such file, and no model of that name: {whisper.available_models()}")
        file = read_tensors(path)
        d = whisper.model.ModelDimensions(**file["dims"])
        weights = {key.removeprefix("encoder."): w.float() for key, w in file["model_state_dict"].items()
                   if key.startswith("encoder.")}
    except (OSError, RuntimeError, KeyError, TypeError) as e:
        raise OSError(f"Whisper {name} cannot be loaded or downloaded ({e}); give its file") from e
    with init_empty_weights(), Draws():
        whisper.model.Whisper(d)                      # for its random numbers: see Draws
        encoder = SpeechEncoder(d.n_mels, d.n_audio_ctx, d.n_audio_state, d.n_audio_head, d.n_audio_layer)
    encoder.load_state_dict(weights, assign=True)
    return encoder


def released_fields(config):
    """A transformers 5 Qwen2Config -> the fields that the releases write (transformers 4: a flat
    rope_theta)."""
    names = ("attention_dropout", "hidden_act", "hidden_size", "initializer_range", "intermediate_size",
             "max_position_embeddings", "max_window_layers", "num_attention_heads", "num_hidden_layers",
             "num_key_value_heads", "rms_norm_eps", "sliding_window", "tie_word_embeddings", "use_cache",
             "use_sliding_window", "vocab_size", "bos_token_id", "eos_token_id")
    fields = {name: getattr(config, name) for name in names}
    return fields | {"rope_theta": config.rope_parameters["rope_theta"], "transformers_version": "4.43.4"}


def new_tokenizers(llm, speech_lm):
    """The tokenizers of a new model -> (tokenizer with `<speech>`, tts_tokenizer with `<sep>` and the units).

    llm, speech_lm  folders, or hub names after `hf:`. Raises OSError, or ValueError that says what does not
                    fit.
    """
    tokenizer = Qwen2Tokenizer.from_pretrained(local_or_hub(llm))
    tts_tokenizer = Qwen2Tokenizer.from_pretrained(local_or_hub(speech_lm))
    if not tokenizer.chat_template:
        raise ValueError(f"{llm} has no chat template: it was not made for dialogues; take an Instruct model")
    tokenizer.add_tokens(["<speech>"], special_tokens=True)
    tts_tokenizer.add_tokens(["<sep>"], special_tokens=True)   # must take the id that `<speech>` has above
    tts_tokenizer.add_tokens([f"<{unit}>" for unit in range(UNIT_VOCAB)])
    tts_tokenizer.eos_token = tts_tokenizer.pad_token = "<|endoftext|>"
    if tokenizer.convert_tokens_to_ids("<speech>") != tts_tokenizer.convert_tokens_to_ids("<sep>"):
        raise ValueError(f"{llm} and {speech_lm} have different tokenizers; the ids must be the same")
    return tokenizer, tts_tokenizer


def from_backbones(llm, whisper_name, speech_lm, R=3, W=10, pad_audio=False):
    """A model before training: a Qwen2, a Whisper, and a second Qwen2 that becomes the speech LM.

    llm, speech_lm  see `new_tokenizers`;  whisper_name: see `load_whisper`
    Returns (omni, tokenizer, tts_tokenizer). Raises OSError, or ValueError that says what does not fit.
    """
    tokenizer, tts_tokenizer = new_tokenizers(llm, speech_lm)
    encoder = load_whisper(whisper_name)
    if encoder.conv2.out_channels != 64 * encoder.blocks[0].attn.n_head:
        raise ValueError(f"the heads of Whisper {whisper_name} are not 64 wide, which a checkpoint cannot "
                         "say; take a released Whisper")
    speech_qwen2 = Qwen2ForCausalLM.from_pretrained(local_or_hub(speech_lm), dtype=torch.float32)
    speech_qwen2.resize_token_embeddings(len(tts_tokenizer), mean_resizing=False)
    speech_qwen2.config.eos_token_id = speech_qwen2.config.bos_token_id = tts_tokenizer.eos_token_id
    qwen2 = Qwen2ForCausalLM.from_pretrained(local_or_hub(llm), dtype=torch.float32)
    if qwen2.config.vocab_size < len(tokenizer):
        qwen2.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    speech_fields = released_fields(speech_qwen2.config)
    whisper_file = os.path.basename(whisper._MODELS.get(whisper_name, whisper_name))   # of its URL or path
    config = released_fields(qwen2.config) | {
        "architectures": ["Omni2Speech2SQwen2ForCausalLM"], "model_type": "omni2_speech2s_qwen2",
        "eos_token_id": end, "bos_token_id": end, "pad_token_id": tokenizer.pad_token_id,
        "speech_encoder": f"models/speech_encoder/{whisper_file}", "speech_encoder_type": "whisper",
        "speech_encoder_ds_rate": DOWNSAMPLE, "speech_encoder_hidden_size": encoder.ln_post.weight.shape[0],
        "speech_generator": {key: speech_fields[key] for key in SPEECH_FIELDS},
        "speech_projector_type": "linear", "stream_params": f"({R},{W})", "torch_dtype": "float32",
        "tts_tokenizer": "tts_tokenizer", "unit_vocab_size": UNIT_VOCAB, "pad_audio": pad_audio}
    with init_empty_weights(), Draws() as draws:
        omni = Omni(config, encoder)
    for name, part in qwen2.model.named_children():   # omni.model has an encoder and an adapter, too
        omni.model.get_submodule(name).load_state_dict(part.state_dict(), assign=True)
    omni.lm_head.load_state_dict(qwen2.lm_head.state_dict(), assign=True)
    omni.speech_generator.model.load_state_dict(speech_qwen2.state_dict(), assign=True)
    omni.tie()
    draws.fill(omni)
    # g = 0.05 at first: stage 2 begins where stage 1 TTS ended
    nn.init.constant_(omni.speech_generator.gate[0].bias, -3.0)
    omni.source = None
    return omni, tokenizer, tts_tokenizer


def read_weights(folder):
    """{name: tensor} of all safetensors files in a folder, mapped: what nobody touches takes no memory.
    Raises ValueError that names the file."""
    weights = {}
    for name in sorted(n for n in os.listdir(folder) if n.endswith(".safetensors")):
        try:
            with safe_open(os.path.join(folder, name), "pt") as file:
                weights |= {key: file.get_tensor(key) for key in file.keys()}
        except Exception as e:                        # safetensors raises its own, undocumented class
            raise ValueError(f"{folder}/{name} cannot be read ({e}); copy or train it again") from e
    return weights


def hashes(folder):
    """{name: sha256} of all safetensors files in a folder."""
    names = sorted(n for n in os.listdir(folder) if n.endswith(".safetensors"))
    return {name: sha256(os.path.join(folder, name)) for name in names}


def recorded_hashes(folder):
    """The same, from the list that `seal` wrote there a while ago, if it did."""
    files = read_json(folder, "meta.json").get("files")
    if files is None:
        return hashes(folder)
    return {name: about["sha256"] for name, about in files.items() if name.endswith(".safetensors")}


def find(name):
    """The checkpoint folder that `name` means: of a run final/, or else its newest whole step-N/;
    `hf:owner/name` is downloaded. Raises FileNotFoundError."""
    final = os.path.join(name, "final")
    if os.path.isdir(final):
        return final
    newest = newest_checkpoint(name)
    if newest:
        return newest
    folder = local_or_hub(name)
    if name.startswith(HUB):
        from huggingface_hub import snapshot_download
        try:
            return snapshot_download(folder)
        except Exception as e:                                 # a network and a hub can fail in many ways
            raise FileNotFoundError(f"{name} cannot be downloaded ({type(e).__name__}); try "
                                    f"`hf download {folder}`, or give a folder") from e
    return folder


def encoder_of(folder, weights):
    """The SpeechEncoder that fits a checkpoint's weights (without the prefix). Raises ValueError that names a
    tensor."""
    for name in ("conv1.weight", "positional_embedding"):
        if name not in weights:
            raise ValueError(f"{folder} lacks tensor model.speech_encoder.{name}; it is not complete")
    size, n_mels, _ = weights["conv1.weight"].shape
    layers = 1 + max(int(key.split(".")[1]) for key in weights if key.startswith("blocks."))
    with init_empty_weights():
        return SpeechEncoder(n_mels, len(weights["positional_embedding"]), size, size // 64, layers)


def load(name, whisper_name=None, mapped=False):
    """Load a checkpoint in the released layout, or a run's: see `find`.

    whisper_name  only needed where the checkpoint does not hold the encoder's weights or its heads are not 64
                  wide
    mapped        leave the weights in their files instead of reading them: to be saved, not to compute with,
                  since nothing aligns them, and on memory of another alignment CPUs may round differently
    Returns (omni, tokenizer, tts_tokenizer); omni.source is the folder that holds all of its tensors, or None
    if there is not one. Raises FileNotFoundError, or ValueError that names the tensor.
    """
    folder = find(name)
    for required in ("config.json", "tokenizer_config.json", "tts_tokenizer"):
        if not os.path.exists(os.path.join(folder, required)):
            raise FileNotFoundError(f"{folder} is not a checkpoint: it has no {required}")
    if folder == os.path.join(name, "final") and (reason := damage(folder)):
        raise ValueError(f"{folder} is damaged: {reason}; delete it, and train.py makes it again")
    config, base = read_json(folder, "config.json"), read_json(folder, "meta.json").get("base")
    weights = {}
    if base:                                                   # what was frozen lies in another checkpoint
        frozen = os.path.normpath(os.path.join(folder, base["folder"]))
        if not os.path.isdir(frozen) or hashes(frozen) != base["sha256"]:
            raise ValueError(f"what {folder} did not train is in {frozen}, which has changed or is gone; "
                             "bring it back")
        weights |= read_weights(frozen)
    weights |= read_weights(folder)
    weights = {key: w.to(torch.float32, copy=not mapped) for key, w in weights.items()}
    prefix = "model.speech_encoder."
    own = {key.removeprefix(prefix): w for key, w in weights.items() if key.startswith(prefix)}
    if whisper_name or not own:
        encoder = load_whisper(whisper_name or config["speech_encoder"])
    else:
        encoder = encoder_of(folder, own)
    if not own:
        weights |= {prefix + key: w for key, w in encoder.state_dict().items()}
    lora = config.get("lora_rank")
    with init_empty_weights():                                 # else 2/3 of the time goes into random weights
        omni = Omni(config, encoder)
        if lora:
            omni.add_lora(lora)
    omni.source = folder if own and not base and not lora else None
    expected = omni.state_dict()
    if lora:                                          # peft puts the matrices of base/ one level deeper
        deeper = {key: ".base_layer.".join(key.rsplit(".", 1)) for key in weights if key not in expected}
        weights = {deeper.get(key, key): w for key, w in weights.items()}
    if config["tie_word_embeddings"] and "model.embed_tokens.weight" in weights:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    table = "speech_generator.model.model.embed_tokens.weight"
    if table in weights:
        weights["speech_generator.model.lm_head.weight"] = weights[table]
    both = expected.keys() & weights.keys()
    wrong = {"lacks": expected.keys() - weights.keys(), "has an unknown": weights.keys() - expected.keys(),
             "has another shape of": {key for key in both if expected[key].shape != weights[key].shape}}
    for what, names in wrong.items():
        if names:
            raise ValueError(f"{folder} {what} tensor {min(names)} ({len(names)} such); it is another model "
                             "or damaged")
    if encoder.blocks[0].attn.n_head == 0:
        raise ValueError(f"the heads of the encoder in {folder} are not 64 wide; give its Whisper file too")
    omni.load_state_dict(weights, assign=True)
    omni.tie()
    return omni, *load_tokenizers(folder)


def load_tokenizers(folder):
    """(tokenizer, tts_tokenizer) of a checkpoint."""
    tts_folder = os.path.join(folder, "tts_tokenizer")
    return Qwen2Tokenizer.from_pretrained(folder), Qwen2Tokenizer.from_pretrained(tts_folder)


def write_json(folder, name, content):
    with open(os.path.join(folder, name), "w") as f:
        json.dump(content, f, indent=2, sort_keys=True)


def save_tokenizer(tokenizer, folder):
    """Write a Qwen2Tokenizer as transformers 4 does, the form of the released checkpoints: the official code
    cannot read the tokenizer.json of transformers 5. Both versions read these files, and give the same
    ids."""
    os.makedirs(folder, exist_ok=True)
    tokenizer.backend_tokenizer.model.save(folder)    # vocab.json and merges.txt
    added = {i: token.__getstate__() for i, token in tokenizer.added_tokens_decoder.items()}
    special = [token["content"] for token in added.values() if token["special"]]
    names = {"additional_special_tokens": [token for token in special if token != tokenizer.pad_token],
             "eos_token": tokenizer.eos_token, "pad_token": tokenizer.pad_token,
             "unk_token": tokenizer.unk_token}
    config = names | {"added_tokens_decoder": added, "bos_token": None, "clean_up_tokenization_spaces": False,
                      "errors": "replace", "model_max_length": tokenizer.model_max_length,
                      "split_special_tokens": False, "tokenizer_class": "Qwen2Tokenizer"}
    if tokenizer.chat_template:
        config["chat_template"] = tokenizer.chat_template
    write_json(folder, "added_tokens.json", {token["content"]: i for i, token in added.items()})
    write_json(folder, "special_tokens_map.json", names)
    write_json(folder, "tokenizer_config.json", config)


def save(omni, folder, tokenizer, tts_tokenizer, weights=None):
    """Write the released layout into a new folder: config.json, model.safetensors (all of the model, or
    `weights`), the tokenizer, tts_tokenizer/. See `seal` for how a checkpoint gets its name."""
    os.makedirs(folder)
    write_json(folder, "config.json", omni.config)
    ids = {key: omni.config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    ids |= {"_from_model_config": True, "transformers_version": omni.config["transformers_version"]}
    write_json(folder, "generation_config.json", ids)
    weights = omni.state_dict() if weights is None else weights
    if omni.config["tie_word_embeddings"]:
        weights = {key: w for key, w in weights.items() if key != "lm_head.weight"}
    head = "speech_generator.model.lm_head.weight"    # tied, yet the official code wants a tensor of its own
    weights = {key: w.clone() if key == head else w.contiguous() for key, w in weights.items()}
    try:
        save_file(weights, os.path.join(folder, "model.safetensors"), metadata={"format": "pt"})
    except SafetensorError as e:                               # a full disk, in a class of its own
        raise OSError(str(e)) from e
    save_tokenizer(tokenizer, folder)
    save_tokenizer(tts_tokenizer, os.path.join(folder, "tts_tokenizer"))


# ------------------------------------------------------------------------------ whole or not at all

def seal(tmp, folder, meta):
    """Make the folder `tmp` the checkpoint `folder`: write meta.json, which lists size and sha256 of every
    file, flush everything to the disk, then rename. What stood there is deleted only after the new one is in
    place."""
    paths = [os.path.join(at, name) for at, _, names in os.walk(tmp) for name in names]
    files = {}
    for path in sorted(paths):
        files[os.path.relpath(path, tmp)] = {"bytes": os.path.getsize(path), "sha256": sha256(path)}
    with open(os.path.join(tmp, "meta.json"), "w") as f:
        json.dump(meta | {"files": files}, f, indent=1)
    for path in (*paths, os.path.join(tmp, "meta.json"), *(at for at, _, _ in os.walk(tmp))):
        flush(path)
    replace_folder(tmp, folder)
    flush(os.path.dirname(os.path.abspath(folder)))


def damage(folder):
    """What is wrong with a checkpoint that `seal` made, or None."""
    try:
        files = read_json(folder, "meta.json")["files"]
    except (ValueError, KeyError, TypeError):
        return "its meta.json is missing or damaged"
    for name, expected in files.items():
        path = os.path.join(folder, name)
        if not os.path.exists(path):
            return f"{name} is missing"
        if os.path.getsize(path) != expected["bytes"]:
            return f"{name} has {os.path.getsize(path)} bytes instead of {expected['bytes']}"
        if sha256(path) != expected["sha256"]:
            return f"{name} is not what was written (another sha256)"


def steps_in(folder):
    """The names step-N in a run's folder, oldest first."""
    if not os.path.isdir(folder):
        return []
    return sorted(name for name in os.listdir(folder) if re.fullmatch(r"step-\d+", name))


def newest_checkpoint(folder):
    """The newest step-N of a run's folder that is whole, or None. Damaged ones are named on stderr."""
    for name in reversed(steps_in(folder)):
        path = os.path.join(folder, name)
        reason = damage(path)
        if reason is None:
            return path
        print(f"passing over {path}: {reason}", file=sys.stderr)
