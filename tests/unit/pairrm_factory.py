"""Random tiny PairRM checkpoints in every layout, for tests: real architecture and tokenizers, meaningless weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import DebertaV2Config, DebertaV2Tokenizer, PreTrainedTokenizerFast

from sppo_ray.llm_blender_compat import pairrm_class

PREFIXES = ["<|source|>", "<|candidate1|>", "<|candidate2|>", "<|candidate|>"]
CONTROL = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
SOURCE_MAX, CANDIDATE_MAX = 48, 24
CORPUS = [
    "the capital of France is Paris",
    "what is the capital of France",
    "a candidate answers",
    "naïve café 日本語",
] * 4


def bpe_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE, [CLS] $A [SEP], without the prefix tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=list(CONTROL.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **CONTROL)


def unigram_tokenizer(add_prefix_space: bool = True) -> DebertaV2Tokenizer:
    """SentencePiece Unigram as DeBERTa-v3's, whose vocabulary holds [SEP] itself as a piece."""
    characters = sorted({character for text in CORPUS for character in text if character != " "} | set("[]<>|12SEPCL."))
    pieces = [("[PAD]", 0.0), ("[CLS]", 0.0), ("[SEP]", 0.0), ("[UNK]", 0.0), ("▁", -3.0)]
    pieces += [(character, -6.0) for character in characters] + [("▁the", -4.0), ("▁capital", -5.0), ("Par", -4.5)]
    return DebertaV2Tokenizer(vocab=pieces, unk_id=3, add_prefix_space=add_prefix_space)


def build_pairrm(folder: Path, tokenizer: Any | None = None, seed: int = 0) -> Path:
    """One folder that serves llm-blender's two loaders (`hf` for ours)."""
    tokenizer = tokenizer or bpe_tokenizer()
    tokenizer.add_tokens(PREFIXES)
    tokenizer.save_pretrained(folder)
    network = random_network(tokenizer, seed)
    network.save_pretrained(folder)
    edit_config(
        folder,
        ranker_type="pairranker",
        model_name=None,
        source_maxlength=SOURCE_MAX,
        candidate_maxlength=CANDIDATE_MAX,
        fp16=False,
        device=None,
    )
    return folder


def build_blender_pairrm(folder: Path, tokenizer: Any | None = None, seed: int = 0) -> Path:
    """The layout of llm-blender/PairRM: a RankerConfig that names a backbone in another folder, `<folder>-backbone`."""
    from safetensors.torch import save_file

    backbone = folder.with_name(folder.name + "-backbone")
    tokenizer = tokenizer or bpe_tokenizer()
    tokenizer.save_pretrained(backbone)
    tokenizer.add_tokens(PREFIXES)
    network = random_network(tokenizer, seed)
    network.pretrained_model.save_pretrained(backbone)
    edit_config(backbone, vocab_size=network.config.vocab_size + 20)  # as DeBERTa-v3: more rows than tokens
    rows = network.pretrained_model.embeddings.word_embeddings.weight
    padded = {"embeddings.word_embeddings.weight": torch.cat([rows.detach(), torch.zeros(20, rows.shape[1])])}
    others = {key: value for key, value in network.pretrained_model.state_dict().items() if key not in padded}
    save_file({**others, **padded}, backbone / "model.safetensors", metadata={"format": "pt"})
    folder.mkdir()
    save_file(network.state_dict(), folder / "model.safetensors")
    config = {"ranker_type": "pairranker", "model_type": "deberta", "model_name": str(backbone), "n_tasks": 1}
    limits = {"source_maxlength": SOURCE_MAX, "candidate_maxlength": CANDIDATE_MAX, "fp16": False, "device": None}
    (folder / "config.json").write_text(json.dumps({**config, **limits}))
    return folder


def random_network(tokenizer: Any, seed: int) -> Any:
    torch.manual_seed(seed)
    ids = [tokenizer.convert_tokens_to_ids(token) for token in PREFIXES]
    config = DebertaV2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=512,
        type_vocab_size=0,
        relative_attention=True,
        position_buckets=8,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        pos_att_type="p2c|c2p",
        position_biased_input=False,
        initializer_range=0.3,  # logits of order one, so that 1e-5 means something
        pad_token_id=tokenizer.pad_token_id,
    )
    config.n_tasks, config.drop_out, config.sep_token_id = 1, 0.05, tokenizer.sep_token_id
    config.source_prefix_id, config.cand1_prefix_id, config.cand2_prefix_id, config.cand_prefix_id = ids
    return pairrm_class()(config).eval()


def edit_config(folder: Path, **fields: Any) -> None:
    """Sets config.json's fields; a value of `...` removes the field."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **fields}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))
