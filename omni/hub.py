"""
Share a checkpoint: a model card, and an upload to the Hugging Face hub.

Why: weights do not say what they learned from, how good they are, or who may use them. The card does, from
what the runs and the evaluation recorded; it calls unknown what they did not.

How: python -m omni.hub out/tiny_stage2 owner/name                   uploads final/ with its card
     python -m omni.hub out/tiny_stage2 owner/name --folder look     writes that into look/, uploads nothing
     ... --onnx                                                      adds encoder and adapter as ONNX
A model opens with these files alone: Whisper's encoder is in the weights. From meta.json, which goes along,
absolute paths and the command of a synthesizer are removed. A new repository is public; to keep it private,
make it on the hub first.
"""
import itertools
import json
import os
import re
import shlex
import shutil
import sys
import tempfile
import warnings
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
import whisper
from huggingface_hub import HfApi, ModelCardData, get_token
from huggingface_hub.utils import validate_repo_id

from model import PARTS, STAGES
from omni import checkpoint, report
from omni.audio import DOWNSAMPLE, MAX_SECONDS, WINDOW
from omni.configure import configure, fail
from omni.corpus import WITH_UNITS
from omni.cosyvoice import onnx_session
from omni.files import read_json, replace_file, sha256

NAMES = {"stage1": "stage 1", "stage1_tts": "stage 1 TTS", "stage2": "stage 2"}
STRICTER = "mit", "apache-2.0", "cc-by-nc-4.0", "other"       # a model has the last of its parts' licences
ORIGINS = (                            # what runs and corpora call a part; its licence; in words
    (r"(.*/)?tiny/(qwen2|whisper\.pt|codec\.pt)", "mit", "nanoOmni's embedded world, MIT"),
    ("corpus tiny", "mit", "nanoOmni's embedded world, MIT; its tiny/voices.py lists those of the voices"),
    ("corpus instructs2s", "cc-by-nc-4.0", "InstructS2S-200K, CC BY-NC 4.0"),
    (r"hf:Qwen/Qwen2\.5-3B(-Instruct)?", "other", "Qwen2.5-3B, for research only"),
    (r"hf:Qwen/Qwen2\.5-(0\.5|1\.5|7|14)B(-Instruct)?", "apache-2.0", "Qwen2.5, Apache-2.0"),
    ("|".join(map(re.escape, whisper._MODELS)), "mit", "Whisper, MIT"),
    ("hf:ICTNLP/LLaMA-Omni2-.*", "other", "the authors' weights, for academic research only"),
    ("CosyVoice 2|(.*/)?cosy2_decoder/?", "apache-2.0", "CosyVoice 2, Apache-2.0"),
    (".*", "other", "unknown"),
)
CARD = """---
{front}
---
# {title}
A spoken chatbot in the layout of LLaMA-Omni 2 (arXiv 2505.02625), trained with nanoOmni: Whisper's encoder,
an adapter that makes 1 position of 5 frames, a Qwen2 that writes text, gate fusion, and a second Qwen2 that
reads {R} tokens and writes {W} speech units in turn. Fusion: {fusion}.

| part | parameters |
|---|---|
{sizes}

## Training
{began}

| stage | trained | dialogues | corpus | steps | epochs | batch | lr | validation loss | commit |
|---|---|---|---|---|---|---|---|---|---|
{stages}

The rest was frozen in each stage. meta.json has every setting of the last one, and its losses.

## Data
{data}

## Figures
{figures}

## Licences
What it was made from; the licence above is the strictest of these, or "other" if one has terms of its own or
is unknown.

| part | from | licence |
|---|---|---|
{origins}

## Talk to it
In a clone of nanoOmni; the units need the codec that made them (see Licences).

```bash
{talk}
```
{onnx}
## Limits
{limits}
"""
ONNX = """
onnx/speech.onnx is the half that hears. Its input "mel" is float32 (n_mels, frames) at 100 Hz, at most 3,000
frames, as `log_mel` in omni/audio.py makes it; longer clips go in pieces of 3,000. Its output "positions" is
(frames / 10, H), what the LLM reads in place of `<speech>`. In onnxruntime it differed from torch by at most
{:.0e} of the largest value, on noise of 1, 3.7 and 30 s.
"""


@dataclass(frozen=True)
class HubConfig:
    ckpt: str = "out/tiny_stage2"      # a run that is complete, or its final/
    name: str | None = None            # owner/name on the hub; not needed with folder
    folder: str | None = None          # a new folder for what would be uploaded; nothing is uploaded
    eval: str | None = None            # folder of its evaluation; none: where eval.py puts it
    onnx: bool = False                 # add encoder and adapter, log-mel -> LLM positions, as ONNX

    def __post_init__(self):
        if self.name is not None:
            validate_repo_id(self.name)
        if "/" not in (self.name or "") and (self.name or not self.folder):
            raise ValueError(f"name is {self.name!r}; it must be owner/name, or left out with --folder DIR")
        if self.folder and os.path.exists(self.folder):
            raise ValueError(f"there is a {self.folder} already; delete it or choose another --folder")


def history(folder):
    """The runs that led to a checkpoint -> ([their meta.json, the first run first], start).

    start    what the first one started from: None for backbones, else the name of a checkpoint of which no
             more is known here
    A run's step-N/ says where the checkpoint lies that it started from, and the hashes of its weights: what
    lies there now may be another.
    """
    metas, start = [], None
    while "config" in (meta := read_json(folder, "meta.json")):
        metas.insert(0, meta)
        start = meta["config"]["init_from"]
        step = start and checkpoint.newest_checkpoint(os.path.dirname(os.path.abspath(folder)))
        if not step:
            break
        base = read_json(step, "meta.json")["base"]
        folder = os.path.normpath(os.path.join(step, base["folder"]))
        if not os.path.isdir(folder) or checkpoint.hashes(folder) != base["sha256"]:
            break
    return metas, start


def public(x):
    """A meta.json, or a text, without what is nobody's business: of an absolute path only its last name is
    left, and of the synthesizer's command, which may hold a password, nothing."""
    if isinstance(x, dict):
        return {key: "a command" if key == "tts" and value else public(value) for key, value in x.items()}
    if isinstance(x, list):
        return [public(value) for value in x]
    if not isinstance(x, str):
        return x
    pieces = re.split("([=,])", x)                    # --runs=/home/me/a,/home/me/b
    return "".join(os.path.basename(os.path.normpath(p)) if os.path.isabs(p) else p for p in pieces)


def origins(metas, start):
    """What a model was made from: [(part, name, licence, licence in words)]."""
    config, parts = metas[0]["config"], [("start", start)]
    if start is None:
        parts = [("LLM", config["llm"]), ("encoder", config["whisper"]), ("speech LM", config["speech_lm"])]
    for meta in metas:
        settings = meta["corpus"]["settings"]         # empty for a corpus that data.py did not build
        source = settings.get("source")
        parts.append(("data", f"corpus {settings['path'] if source == 'hub' else source or 'unknown'}"))
        if settings.get("tts"):
            parts.append(("synthesizer", "a command"))
        codec = "CosyVoice 2" if source in WITH_UNITS else settings.get("codec", "unknown")
        if meta["config"]["stage"] != "stage1":
            parts.append(("units", codec))
    rows = []
    for part, name in dict.fromkeys(parts):
        licence, words = next(found for pattern, *found in ORIGINS if re.fullmatch(pattern, name))
        rows.append((part, public(name), licence, words))
    return rows


def stage_row(meta):
    """What a run did, as a tuple of cells."""
    config, validations = meta["config"], [line["val_loss"] for line in meta["log"] if "val_loss" in line]
    frozen = {"LLM": config["freeze_llm"], "gate fusion": config["fusion"] == "text"}
    trained = ", ".join(part for part in STAGES[config["stage"]] if not frozen.get(part))
    if config["lora_rank"]:
        trained += f" (by LoRA of rank {config['lora_rank']})"
    return (NAMES[config["stage"]], trained, f"{meta['corpus']['dialogues']:,}", meta["corpus"]["sha256"][:8],
            meta["step"], f"{meta['epoch']:.2f}", config["batch_size"], config["lr"],
            f"{validations[-1]:.3f}" if validations else "unknown", meta["git"][:7] or "unknown")


def figures(cfg, folder):
    """The card's figures: of an evaluation of these very weights. fail() if the one that was named has
    none."""
    at = cfg.eval or f"out/{os.path.basename(os.path.normpath(cfg.ckpt))}_eval"       # eval.py's own choice
    results, settings = read_json(at, "results.json"), read_json(at, "settings.json")
    if cfg.eval and not results:
        fail(f"--eval {at} holds no results.json; run `python eval.py --ckpt {cfg.ckpt} --out {at}`")
    if results and settings["weights"] != sha256(os.path.join(folder, "model.safetensors")):
        print(f"{at} is left out, it judged other weights: run `python eval.py --ckpt {cfg.ckpt}` again")
        results = {}
    if not results:
        return "No evaluation of these weights is recorded."
    command = shlex.join(public(shlex.split(results.get("command", ""))))
    about = [f"Command: `python {command}`" if command else "Command: unknown",
             f"Commit: {results.get('git') or 'unknown'}. Set: {settings['set']}.",
             "Shares are in percent. s2t: the text is right; s2s: what a recognizer hears in the speech is; "
             "wer: its word errors. eval.py explains the others."]
    return "  \n".join(about) + "\n\n" + report.table(results["figures"], results["categories"], [])


def table(rows):
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows)


def card(cfg, folder, omni, onnx=None):
    """The text of README.md for a checkpoint's folder. onnx: the largest difference from torch, if there is
    one. fail() if nothing is recorded."""
    metas, start = history(folder)
    if not metas:
        fail(f"{folder} has no meta.json that says how it was trained, so there is nothing to say in a card")
    parts, stages = origins(metas, start), {meta["config"]["stage"] for meta in metas}
    corpora = {meta["corpus"]["sha256"]: public(meta["corpus"]["settings"]) for meta in metas}
    sources = {settings.get("source") for settings in corpora.values()}
    speaks = start or stages - {"stage1"}
    data = []
    for mark, settings in corpora.items():
        known = ", ".join(f"{key} `{x}`" for key, x in settings.items() if x not in (None, [], "", 0))
        data.append(f"- corpus {mark[:8]}: {known or 'its settings are unknown'}")
    flags = ""
    if not speaks:
        flags = " --text"
    elif "CosyVoice 2" in parts[-1][-1]:              # the units come last
        flags = " --codec downloads/cosy2_decoder --voice speaker.wav"
    limits = ["It may be wrong or harmful: nothing but the figures above was checked.",
              f"Questions last up to {MAX_SECONDS:.0f} s. In training they were "
              f"{'padded to a multiple of 30 s' if omni.pad_audio else 'not padded'} (`pad_audio` in "
              "config.json); asked in another way, it may not understand."]
    if sources == {"tiny"} and not start:
        limits.append("It lives in nanoOmni's embedded world of some 280 English words, and synthesizers "
                      "asked its questions. It shows how a spoken chatbot is trained; it has no other use.")
    if not start and "stage1" not in stages:
        limits.append("It had no stage 1: it does not understand speech.")
    if not speaks:
        limits.append("It had no stage 1 TTS: it writes, and its speech means nothing.")
    names = [name for _, name, _, _ in parts if name.startswith(checkpoint.HUB)]
    front = ModelCardData(
        license=max((licence for _, _, licence, _ in parts), key=STRICTER.index),
        base_model=[name.removeprefix(checkpoint.HUB) for name in dict.fromkeys(names)] or None,
        language="en" if sources <= {"tiny", "instructs2s"} and not start else None,
        pipeline_tag="any-to-any" if speaks else "audio-text-to-text",
        tags=["speech", "spoken-dialogue", "llama-omni2", "nanoomni"])
    sizes = [(part, f"{sum(p.numel() for name, p in omni.named_parameters() if name.startswith(prefixes)):,}")
             for part, prefixes in PARTS.items()]
    ckpt = checkpoint.HUB + cfg.name if cfg.name else cfg.folder
    talk = f"python sample.py --ckpt {ckpt} --wav question.wav{flags}"
    if speaks:
        talk += f"\npython serve.py --ckpt {ckpt}{flags}"
    began = "The runs, from backbones to this model:"
    if start:
        began = f"The first of these runs started from `{public(start)}`; what came before is not recorded."
    return CARD.format(
        title=cfg.name or os.path.basename(os.path.normpath(cfg.ckpt)), front=front.to_yaml().strip(),
        R=omni.R, W=omni.W, fusion=omni.speech_generator.fusion, sizes=table(sizes), began=began,
        stages=table(map(stage_row, metas)), data="\n".join(data), figures=figures(cfg, folder),
        origins=table((part, f"`{name}`", words) for part, name, _, words in parts), talk=talk,
        onnx="" if onnx is None else ONNX.format(onnx), limits="\n".join(f"- {limit}" for limit in limits))


class Ears(nn.Module):
    """Whisper's encoder and the adapter for one clip, in plain operations that ONNX has."""

    def __init__(self, omni):
        super().__init__()
        self.encoder, self.adapter = omni.model.speech_encoder, omni.model.speech_projector

    def forward(self, mel):
        """mel (n_mels, frames) at 100 Hz, at most 30 s -> (frames / 10, H), rounded as `speech_positions`
        does."""
        encoder, adapter = self.encoder, self.adapter
        x = F.gelu(encoder.conv2(F.gelu(encoder.conv1(mel[None])))).transpose(1, 2)   # (1, frames / 2, D)
        x = x + encoder.positional_embedding[:x.shape[1]]
        for block in encoder.blocks:
            x = block(x)
        n = x.shape[1] // DOWNSAMPLE
        x = encoder.ln_post(x)[0, :n * DOWNSAMPLE].reshape(n, -1)                     # (frames / 10, 5 D)
        return adapter.linear2(F.relu(adapter.linear1(x)))


def export_onnx(omni, folder):
    """Write `Ears` into a new folder, as speech.onnx, for clips of any length -> the largest difference from
    `Omni.encode_speech` and the adapter, as a share of the largest value. fail() above 1e-4."""
    os.makedirs(folder)
    path = os.path.join(folder, "speech.onnx")        # weights of more than 2 GB lie in files beside it
    n_mels = omni.model.speech_encoder.n_mels
    with warnings.catch_warnings():                   # torch's newer exporter needs onnxscript
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.onnx.export(Ears(omni), (torch.zeros(n_mels, 100),), path, dynamo=False, opset_version=17,
                          input_names=["mel"], output_names=["positions"],
                          dynamic_axes={"mel": {1: "frames"}, "positions": {0: "positions"}})
    session, worst = onnx_session(path), 0.0
    for frames in (100, 371, WINDOW):
        mel = torch.randn(n_mels, frames)
        expected = omni.model.speech_projector(omni.encode_speech(mel, [frames]))
        found = torch.from_numpy(session.run(None, {"mel": mel.numpy()})[0])
        worst = max(worst, ((found - expected).abs().max() / expected.abs().max()).item())
    if not worst < 1e-4:
        fail(f"--onnx: the export differs from torch by {worst:.0e} of the largest value; leave --onnx out")
    return worst


def write(cfg, folder, target, copy):
    """Make the new folder `target`: a checkpoint's files, each put there by copy(file, new), with a card."""
    shutil.copytree(os.path.abspath(folder), target, copy_function=copy)
    omni = checkpoint.load(cfg.ckpt)[0].eval()
    onnx = export_onnx(omni, os.path.join(target, "onnx")) if cfg.onnx else None
    replace_file(os.path.join(target, "README.md"), card(cfg, folder, omni, onnx))
    meta = public(read_json(folder, "meta.json"))
    replace_file(os.path.join(target, "meta.json"), json.dumps(meta, indent=1))


def upload(cfg, folder):
    """Make cfg.name what `folder` holds, in one commit. fail() if that cannot be done."""
    api = HfApi()
    try:
        api.create_repo(cfg.name, exist_ok=True)
        # a reader loads all weights that it finds, so those of an earlier upload must go
        api.upload_folder(repo_id=cfg.name, folder_path=folder, commit_message="Upload from nanoOmni",
                          delete_patterns=["*.safetensors", "onnx/*"])
    except Exception as e:                            # a network and a hub can fail in many ways
        fail(f"{cfg.name} cannot be uploaded ({e}); check the network and `hf auth whoami`, or write it with "
             "--folder DIR")


def main():
    argv = sys.argv[1:]
    # out/tiny_stage2 owner/name: the first two go without their keys
    words = list(itertools.takewhile(lambda word: not word.startswith("-"), argv))
    keys = [word for pair in zip(("--ckpt", "--name"), words) for word in pair]
    cfg = configure(HubConfig, keys + argv[len(keys) // 2:])
    if cfg.ckpt.startswith(checkpoint.HUB):
        fail(f"{cfg.ckpt} is on the hub; give the folder of a run")
    if not cfg.folder and not get_token():
        fail("nobody is logged in to the hub; run `hf auth login`, or write to a folder with --folder DIR")
    try:
        folder = checkpoint.find(cfg.ckpt)
        if "base" in read_json(folder, "meta.json"):
            fail(f"{folder} is not the whole model; let train.py finish {cfg.ckpt}, which makes its final/")
        beside = os.path.dirname(os.path.abspath(cfg.folder)) if cfg.folder else None
        with tempfile.TemporaryDirectory(dir=beside) as at:
            target = os.path.join(at, "model")
            write(cfg, folder, target, shutil.copy2 if cfg.folder else os.symlink)
            if cfg.folder:
                os.replace(target, cfg.folder)
            else:
                upload(cfg, target)
    except (OSError, ValueError, RuntimeError) as e:
        fail(e)
    print(f"wrote {cfg.folder}" if cfg.folder else f"uploaded to https://huggingface.co/{cfg.name}")


if __name__ == "__main__":
    main()
