"""Small BPE tokenizers in the manner of four families, with chat templates written by hand after the published ones.

What differs between the families is what the templating must get right: who writes BOS (template, tokenizer, both, nobody),
whether the user's text is trimmed, which token ends a turn, and how spaces become tokens.
"""

from __future__ import annotations

import json

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = (
    "What is the capital of France? The capital of France is Paris.",
    "Write a short story about a cat, please. Once upon a time there was a cat who said None at all.",
    "user assistant model system begin end turn header INST hello world, how are you today?",
    "def add(a, b):\n    return a + b\n\nprint(add(1, 2))\n",
)

MISTRAL_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
LLAMA3_TEMPLATE = (
    "{% for m in messages %}{% set content = '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' "
    "+ m['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
    "{{ content }}{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
CHATML_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def _trained(backend: Tokenizer, special: list[str], byte_level: bool) -> Tokenizer:
    alphabet = pre_tokenizers.ByteLevel.alphabet() if byte_level else [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=480,
        special_tokens=special + ([] if byte_level else alphabet),
        initial_alphabet=alphabet if byte_level else [],
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS * 3, trainer)
    return backend


def _byte_level(special: list[str]) -> Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return _trained(backend, special, byte_level=True)


def _sentencepiece_like(special: list[str], prepend: bool) -> Tokenizer:
    """Spaces become "\u2581" and there is no pre-tokenizer in use, so merges may cross the joints of a template."""
    to_blocks = normalizers.Replace(" ", "\u2581")
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    # Trained on words that begin with a block, as sentencepiece does, then used without the pre-tokenizer.
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    _trained(backend, special, byte_level=False)
    alphabet = {f"<0x{i:02X}>" for i in range(256)}
    # The trainer makes its byte pieces special; in a real vocabulary they are ordinary pieces.
    description = json.loads(backend.to_str())
    description["added_tokens"] = [t for t in description["added_tokens"] if t["content"] not in alphabet]
    description["pre_tokenizer"] = None
    backend = Tokenizer.from_str(json.dumps(description))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), to_blocks]) if prepend else to_blocks
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    return backend


def _adds_bos(backend: Tokenizer, bos: str) -> None:
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, backend.token_to_id(bos))]
    )


def mistral(template: str = MISTRAL_TEMPLATE, adds_bos: bool = True) -> PreTrainedTokenizerFast:
    """Template and tokenizer both write BOS; [INST] is plain text; the turn ends with EOS."""
    backend = _sentencepiece_like(["<unk>", "<s>", "</s>"], prepend=True)
    if adds_bos:
        _adds_bos(backend, "<s>")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )
    tokenizer.chat_template = template
    return tokenizer


def mistral_without_template_bos() -> PreTrainedTokenizerFast:
    """Only the tokenizer writes BOS."""
    return mistral(MISTRAL_TEMPLATE.replace("{{ bos_token }}", ""))


def llama3() -> PreTrainedTokenizerFast:
    """Template and tokenizer both write BOS; text is trimmed; the turn ends with <|eot_id|>, which is EOS."""
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    backend = _byte_level(special)
    _adds_bos(backend, "<|begin_of_text|>")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>", pad_token="<|end_of_text|>"
    )
    tokenizer.chat_template = LLAMA3_TEMPLATE
    return tokenizer


def gemma2() -> PreTrainedTokenizerFast:
    """Only the template writes BOS; text is trimmed; the turn ends with <end_of_turn>, EOS is <eos>; newlines are tokens."""
    backend = _sentencepiece_like(
        ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"], prepend=False
    )
    backend.add_tokens([AddedToken("\n", normalized=False, special=False)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>", pad_token="<pad>"
    )
    tokenizer.chat_template = GEMMA_TEMPLATE
    return tokenizer


def chatml() -> PreTrainedTokenizerFast:
    """Nobody writes BOS and there is none; the turn ends with <|im_end|>, which is EOS."""
    backend = _byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>", bos_token=None
    )
    tokenizer.chat_template = CHATML_TEMPLATE
    return tokenizer


FAMILIES = {
    "mistral": mistral,
    "mistral-no-template-bos": mistral_without_template_bos,
    "llama3": llama3,
    "gemma2": gemma2,
    "chatml": chatml,
}
