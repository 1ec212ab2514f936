"""A saved checkpoint loads in the official code: files, config fields and tokenizers match the golden one."""
import json
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import Qwen2Tokenizer

from omni.checkpoint import from_backbones, save, save_tokenizer

ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / "tests/data/llama_omni2/checkpoint"     # written by the official code, transformers 4.43
TEXTS = ["What is five plus two?", "  I'll   say it ,twice !\n\n\tOK? ", "3.14 at 12:45\r\n", "", " ", "\n",
         "caf\u00e9 and cafe\u0301, \u4f60\u597d \U0001f600 \u00a0\ufb01",
         "<|im_start|>user\n<speech><|im_end|>\n<|im_start|>assistant\n", "one<sep>two<|endoftext|> three",
         "<0><12> <6560>", "<6561><-1><sep"]


def read(path):
    return json.loads(path.read_text())


def files(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(folder, tokenizers before they were saved) of a model made from tiny/."""
    folder = tmp_path_factory.mktemp("official") / "saved"
    qwen2, whisper = str(ROOT / "tiny/qwen2"), str(ROOT / "tiny/whisper.pt")
    omni, *tokenizers = from_backbones(qwen2, whisper, qwen2)
    save(omni, str(folder), *tokenizers)
    return folder, tokenizers


def test_files_and_config_fields_are_the_golden_ones(saved):
    """One field is ours: pad_audio. The official code ignores it."""
    folder, _ = saved
    assert files(folder) == files(GOLDEN)
    ours, golden = read(folder / "config.json"), read(GOLDEN / "config.json")
    assert ours.keys() == golden.keys() | {"pad_audio"}
    assert ours["speech_generator"].keys() == golden["speech_generator"].keys()
    for key in ("architectures", "model_type", "speech_encoder_type", "stream_params", "tts_tokenizer"):
        assert ours[key] == golden[key]
    ids = read(folder / "generation_config.json")
    assert ids.keys() == read(GOLDEN / "generation_config.json").keys()
    assert all(ours[key] == ids[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id"))


def test_speech_encoder_names_the_file_as_the_releases_do(saved):
    """The official code opens this path from its own folder when it builds the model."""
    assert read(saved[0] / "config.json")["speech_encoder"] == "models/speech_encoder/whisper.pt"


def test_the_head_of_the_speech_lm_is_a_tensor_of_its_own(saved):
    """The official code ties only the LLM's head. Without this tensor it would speak with a random one."""
    weights = load_file(saved[0] / "model.safetensors")
    head = weights["speech_generator.model.lm_head.weight"]
    table = weights["speech_generator.model.model.embed_tokens.weight"]
    assert head.equal(table) and "lm_head.weight" not in weights


@pytest.mark.parametrize("name", [".", "tts_tokenizer"])
def test_the_golden_tokenizers_are_written_as_the_official_code_wrote_them(tmp_path, name):
    save_tokenizer(Qwen2Tokenizer.from_pretrained(GOLDEN / name), str(tmp_path))
    for file in ("vocab.json", "added_tokens.json", "tokenizer_config.json"):
        assert read(tmp_path / file) == read(GOLDEN / name / file)
    assert (tmp_path / "merges.txt").read_text().strip() == (GOLDEN / name / "merges.txt").read_text().strip()
    ours, golden = read(tmp_path / "special_tokens_map.json"), read(GOLDEN / name / "special_tokens_map.json")

    def content(token):
        return token["content"] if isinstance(token, dict) else token

    extra = "additional_special_tokens"
    assert ours.pop(extra) == [content(token) for token in golden.pop(extra)]
    assert ours == {key: content(token) for key, token in golden.items()}


@pytest.mark.parametrize("which", [0, 1])
def test_both_kinds_of_file_give_the_same_ids(saved, tmp_path, which):
    """tokenizer.json, which transformers 5 writes, against vocab.json, merges.txt and the added tokens."""
    folder, tokenizers = saved
    tokenizers[which].save_pretrained(tmp_path)
    expected = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    tokenizer = Qwen2Tokenizer.from_pretrained(folder / ["", "tts_tokenizer"][which])
    assert len(tokenizer) == expected.get_vocab_size()
    assert tokenizer.get_vocab() == expected.get_vocab()
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        assert ids == expected.encode(text).ids
        assert tokenizer.decode(ids) == expected.decode(ids, skip_special_tokens=False)
    for what in ("chat_template", "eos_token", "pad_token", "unk_token", "bos_token", "added_tokens_decoder"):
        assert str(getattr(tokenizer, what)) == str(getattr(tokenizers[which], what))


def test_units_survive_where_special_tokens_are_dropped(saved):
    """The official code reads the units from the decoded text, without special tokens."""
    tokenizer = Qwen2Tokenizer.from_pretrained(saved[0] / "tts_tokenizer")
    ids = tokenizer.convert_tokens_to_ids(["<sep>", "<0>", "<6560>", "<|endoftext|>"])
    assert ids == [959, 960, 7520, 0]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<0><6560>"
