"""Small tokenizers made on the spot, one of each kind that the Llama family uses.

`write_checkpoint(folder, kind)` writes tokenizer.json, tokenizer_config.json and a chat template.
"""

import json
from pathlib import Path
from typing import Literal

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

Kind = Literal["byte_level", "sentencepiece"]
KINDS: tuple[Kind, ...] = ("byte_level", "sentencepiece")

# older checkpoints write their special tokens like this
BOS_AS_OBJECT = {
    "__type": "AddedToken",
    "content": "<s>",
    "lstrip": False,
    "normalized": False,
    "rstrip": False,
    "single_word": False,
    "special": True,
}
CORPUS = [
    "the quick brown fox jumps over the lazy dog and says hello world to everyone in the street",
    "def answer(question): return 42  # the answer to everything",
    "größe und straße, naïve café, 日本語のテキスト, 你好世界, 🙂🙃👍",
    "stop here. User: what is the end? Assistant: the end is near.",
] * 8

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}[INST] {{ message['content'] | trim }} [/INST]"
    "{% elif message['role'] == 'system' %}{{ raise_exception('system is not taken') }}"
    "{% else %} {{ message['content'] | trim }} {{ eos_token }}{% endif %}"
    "{% endfor %}"
)


def byte_level() -> Tokenizer:
    """As SmolLM2 and Llama 3 write it: bytes as printable characters, specials in front, no BOS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    return tokenizer


def sentencepiece() -> Tokenizer:
    """As Llama 2 and Mistral: `▁` for spaces, `<0xNN>` for bytes outside the vocabulary, BOS in front."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))],
        limit_alphabet=60,
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    fields = json.loads(tokenizer.to_str())
    # only the first three are control tokens; the bytes are ordinary words of the vocabulary
    fields["added_tokens"] = [token for token in fields["added_tokens"] if token["id"] < 3]
    tokenizer = Tokenizer.from_str(json.dumps(fields))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return tokenizer


def write_checkpoint(folder: Path, kind: Kind, template: str | None = None) -> Path:
    """The text half of a checkpoint -> `folder`."""
    if kind == "byte_level":
        tokenizer, template = byte_level(), CHATML if template is None else template
        config = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "bos_token": None}
    else:
        tokenizer, template = sentencepiece(), LLAMA if template is None else template
        config = {"bos_token": BOS_AS_OBJECT, "eos_token": "</s>", "unk_token": "<unk>"}
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    fields = {"tokenizer_class": "PreTrainedTokenizerFast", **config, "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(fields))
    (folder / "config.json").write_text(
        json.dumps({"vocab_size": tokenizer.get_vocab_size() + 8, "eos_token_id": 2})
    )
    return folder


def write_bare_model(folder: Path) -> Path:
    """A byte-level tokenizer without merges, and as much of a config as the fake engine reads."""
    folder.mkdir()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({character: id for id, character in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({"vocab_size": 256, "eos_token_id": 0}))
    return folder
