"""Tokenizers and architectures of the tiny policy and judge, and how they are written to disk.

Both are ordinary Hugging Face folders, so the code that runs the 7B models runs these, unchanged.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import (
    DebertaV2Config,
    DebertaV2Model,
    DebertaV2PreTrainedModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

PAD, BOS, EOS, USER, ASSISTANT = "<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '<|user|>' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}{{ '<|assistant|>' + message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant turns are supported') }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

CLS, SEP, UNK, JUDGE_PAD = "[CLS]", "[SEP]", "[UNK]", "[PAD]"
SOURCE, CAND1, CAND2, CAND = "<|source|>", "<|candidate1|>", "<|candidate2|>", "<|candidate|>"

POLICY_VOCAB = 896
JUDGE_VOCAB = 1280  # large enough that nearly every word of the toy world is one token
MAX_TOKENS = 4096
# PairRM's own limits, so that the tiny judge truncates where the real one does.
SOURCE_MAX_TOKENS = 1224
CANDIDATE_MAX_TOKENS = 412


def _byte_level_bpe(texts: Iterable[str], vocab_size: int, special_tokens: list[str]) -> Tokenizer:
    """A BPE whose alphabet is all 256 bytes: any UTF-8 text encodes and decodes back to itself."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special_tokens,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def build_policy_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    tokenizer = _byte_level_bpe(texts, POLICY_VOCAB, [PAD, BOS, EOS, USER, ASSISTANT])
    # Like Llama's: adds BOS by default. The chat template emits BOS too, so templated text must be
    # encoded with add_special_tokens=False; with the tiny model as with the real ones.
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=[USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_TOKENS,
        clean_up_tokenization_spaces=False,
    )


def build_judge_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    prefixes = [SOURCE, CAND1, CAND2, CAND]
    tokenizer = _byte_level_bpe(texts, JUDGE_VOCAB, [JUDGE_PAD, CLS, SEP, UNK, *prefixes])
    ids = [(token, tokenizer.token_to_id(token)) for token in (CLS, SEP)]
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single=f"{CLS} $A {SEP}", special_tokens=ids),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        cls_token=CLS,
        sep_token=SEP,
        pad_token=JUDGE_PAD,
        unk_token=UNK,
        additional_special_tokens=prefixes,
        model_max_length=MAX_TOKENS,
        clean_up_tokenization_spaces=False,
    )


def build_policy(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=MAX_TOKENS,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    return LlamaForCausalLM(config)


class TinyPairRM(DebertaV2PreTrainedModel):  # type: ignore[misc]
    """PairRM's architecture, with the parameter names of llm-blender's `DebertaV2PairRM`.

    Written here so that training the assets needs no llm-blender; the saved folder loads with llm-blender's classes.
    """

    def __init__(self, config: DebertaV2Config) -> None:
        super().__init__(config)
        self.pretrained_model = DebertaV2Model(config)
        hidden = config.hidden_size
        self.head_layer = nn.Sequential(
            nn.Dropout(config.drop_out),
            nn.Linear(2 * hidden, hidden),
            nn.Tanh(),
            nn.Dropout(config.drop_out),
            nn.Linear(hidden, config.n_tasks),
        )
        self.post_init()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Scores of the left and the right candidate, each [pairs]. PairRM's logit is their difference."""
        states = self.pretrained_model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        source, left, right = (
            states[input_ids == prefix_id]  # each prefix occurs once a row: [pairs, hidden]
            for prefix_id in (self.config.source_prefix_id, self.config.cand1_prefix_id, self.config.cand2_prefix_id)
        )
        scores = [self.head_layer(torch.cat([source, candidate], dim=-1)).mean(dim=-1) for candidate in (left, right)]
        return scores[0], scores[1]


def build_judge(tokenizer: PreTrainedTokenizerFast) -> TinyPairRM:
    config = DebertaV2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        initializer_range=0.08,  # about 1/sqrt(hidden); with the usual 0.02 attention starts uniform and hardly moves
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        max_position_embeddings=MAX_TOKENS,
        type_vocab_size=0,
        relative_attention=True,
        position_buckets=32,
        max_relative_positions=256,
        pos_att_type=["p2c", "c2p"],
        share_att_key=True,
        norm_rel_ebd="layer_norm",
        position_biased_input=False,
        pad_token_id=tokenizer.pad_token_id,
        # PairRM's own fields, read by DebertaV2PairRM ...
        n_tasks=1,
        drop_out=0.0,
        sep_token_id=tokenizer.sep_token_id,
        source_prefix_id=tokenizer.convert_tokens_to_ids(SOURCE),
        cand_prefix_id=tokenizer.convert_tokens_to_ids(CAND),
        cand1_prefix_id=tokenizer.convert_tokens_to_ids(CAND1),
        cand2_prefix_id=tokenizer.convert_tokens_to_ids(CAND2),
        dtype="float32",
    )
    return TinyPairRM(config)


# ... and those read by llm-blender's Blender from the same config.json. A null model_name means "this folder".
_BLENDER_FIELDS = {
    "architectures": ["DebertaV2PairRM"],
    "ranker_type": "pairranker",
    "model_type": "deberta-v2",
    "model_name": None,
    "source_maxlength": SOURCE_MAX_TOKENS,
    "candidate_maxlength": CANDIDATE_MAX_TOKENS,
    "fp16": False,
    "device": None,
}


def padded(rows: Sequence[list[int]], value: int) -> Tensor:
    """Rows of differing length, filled up on the right: [rows, longest]."""
    width = max(map(len, rows))
    return torch.tensor([row + [value] * (width - len(row)) for row in rows])


def encode_pairs(tokenizer: PreTrainedTokenizerFast, pairs: Sequence[tuple[str, str, str]]) -> tuple[Tensor, Tensor]:
    """(prompt, left, right) -> input ids and mask, each [pairs, tokens], in PairRM's three-segment layout.

    Short texts only: nothing is truncated.
    """
    segments = [SOURCE + prompt for prompt, _, _ in pairs]
    segments += [CAND1 + left for _, left, _ in pairs]
    segments += [CAND2 + right for _, _, right in pairs]
    encoded = tokenizer(segments)["input_ids"]
    n = len(pairs)
    rows = [encoded[i] + encoded[n + i] + encoded[2 * n + i] for i in range(n)]
    return padded(rows, tokenizer.pad_token_id), padded([[1] * len(row) for row in rows], 0)


def load_judge(folder: Path) -> tuple[TinyPairRM, PreTrainedTokenizerFast]:
    """The tiny judge for checks of the assets; the system's judge workers have their own, general loader."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    return TinyPairRM.from_pretrained(folder, dtype=torch.float32).eval(), tokenizer


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Two files: tokenizer.json and tokenizer_config.json, which holds the chat template too."""
    tokenizer.save_pretrained(folder, save_jinja_files=False)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    # transformers 5 writes names that older releases refuse; with these, every release loads the folder.
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config["additional_special_tokens"] = config.pop("extra_special_tokens")
    del config["backend"]
    _write_json(path, config)


def save_policy(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    _save_model(model, folder)
    save_tokenizer(tokenizer, folder)


def save_judge(model: TinyPairRM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    _save_model(model, folder)
    path = folder / "config.json"
    _write_json(path, json.loads(path.read_text(encoding="utf-8")) | _BLENDER_FIELDS)
    save_tokenizer(tokenizer, folder)


def _save_model(model: PreTrainedModel, folder: Path) -> None:
    model.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # written owner-only, but these files are shipped


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
