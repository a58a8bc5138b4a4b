"""From a user's text to the token ids the policy reads: the chat template, one BOS, no EOS, and no forged structure.

The ordinary way is to render the chat template and tokenise the rendering. Text that carries a special token's string
("</s>", "<|im_end|>") would then end a turn or open one. Such text is found by its effect: the rendering has structural
ids that the template alone has not. Only then the rendering is tokenised again with a copy of the tokenizer in which the
structural tokens have secret names: the template's parts use those names, the user's text cannot know them. Everything
else (merges across the joints, spaces, normalisation) is the tokenizer's own, so the joints are what they always are.

Strings that are plain text to the tokenizer ("[INST]" in Mistral v1 templates) are left alone: the model reads them as
text and no tokenisation could tell them from the template's own. `imitates_turn_end` finds them, so that they are counted.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from sppo_ray.errors import ConfigError
from sppo_ray.tokenizer_errors import tokenizer_errors

# Stands for the text while the template's own parts are looked up. Letters and digits only: nothing to trim or escape.
_PLACEHOLDER = "sppoPlaceholder7f3a9c"
_BATCH = 1024


@dataclass(frozen=True, slots=True)
class Skeleton:
    """What the template writes around the user's text."""

    prefix: str
    suffix: str


@dataclass(frozen=True, slots=True)
class PlainEncoder:
    """A copy of the tokenizer in which structural tokens answer only to secret names."""

    backend: Any  # tokenizers.Tokenizer
    secret_of: dict[str, str]  # structural token -> its name in the copy
    id_of: dict[int, int]  # added token's id in the copy -> its id in the policy's tokenizer

    def hide(self, template_part: str) -> str:
        """The template's part with its structural tokens under their secret names."""
        names = sorted(self.secret_of, key=len, reverse=True)  # longest first: one may begin another
        return re.sub("|".join(map(re.escape, names)), lambda found: self.secret_of[found[0]], template_part)

    def encode(self, text: str) -> list[int]:
        ids = self.backend.encode(text, add_special_tokens=False).ids
        return [self.id_of.get(i, i) for i in ids]


class PromptEncoder:
    """The chat template and tokenizer of one policy, as a function from text to prompt ids.

    Raises ConfigError where the tokenizer cannot be used: no chat template, a template that fails, none that ends in an
    open assistant turn, or a tokenizer without a fast backend.
    """

    def __init__(self, tokenizer: Any) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise ConfigError(
                f"The tokenizer {_name(tokenizer)} has no chat template, so a prompt cannot be put to the policy as a "
                "user's "
                "turn: use an instruction-tuned policy, or save a chat_template.jinja beside its tokenizer."
            )
        if not tokenizer.is_fast:
            raise ConfigError(
                f"The tokenizer {_name(tokenizer)} has no fast (Rust) backend, which is needed to keep special tokens "
                "in "
                "prompts apart from structure: save it once with tokenizer.json, as transformers' AutoTokenizer does."
            )
        self.tokenizer = tokenizer
        self._refuse_closed_prompt()

    def encode(self, text: str) -> tuple[str, np.ndarray]:
        """(rendered template, int32 ids [P]): at most one BOS, no EOS of the tokenizer's, the last turn open."""
        return self.encode_all([text])[0]

    def encode_all(self, texts: Sequence[str]) -> list[tuple[str, np.ndarray]]:
        """`encode` of many texts, in batches: several times faster on tens of thousands of prompts."""
        encoded: list[tuple[str, np.ndarray]] = []
        for start in range(0, len(texts), _BATCH):
            rendered = [self.render(text) for text in texts[start : start + _BATCH]]
            ids_of_batch = self._tokenise(rendered)
            for templated, ids in zip(rendered, ids_of_batch, strict=True):
                if self._is_forged(ids):
                    ids = self._encode_guarded(templated)
                encoded.append((templated, self._with_one_bos(ids)))
        return encoded

    def last_tokens(self, ids: np.ndarray, count: int) -> np.ndarray:
        """The last `count` of a prompt's ids, int32 [count]; BOS stays first, since models are lost without it."""
        if self.bos_id is None or ids.size <= count:
            return ids[-count:]
        return np.concatenate([ids[:1], ids[ids.size - count + 1 :]])

    def render(self, text: str, answer: str | None = None, open_turn: bool = True) -> str:
        """The chat template's rendering of one user turn (and an assistant turn)."""
        messages = [{"role": "user", "content": text}]
        if answer is not None:
            messages.append({"role": "assistant", "content": answer})
        try:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=open_turn))
        except Exception as error:  # a template is a program: it may fail like one
            raise ConfigError(
                f"The chat template of {_name(self.tokenizer)} does not render a single user turn ({error}): "
                "repair chat_template in the policy's tokenizer folder."
            ) from error

    @cached_property
    def skeleton(self) -> Skeleton:
        """The template's parts before and after the user's text, up to the open assistant turn."""
        return self._skeleton_of(self.render(_PLACEHOLDER))

    @cached_property
    def bos_id(self) -> int | None:
        """The BOS this policy wants first: written by the template, or added by the tokenizer; None if neither does."""
        bos = self.tokenizer.bos_token_id
        if bos is None:
            return None
        by_template = self._tokenise([self.skeleton.prefix])[0][:1]
        with self._refusing():
            by_tokenizer = list(self.tokenizer("a").input_ids)[:1]
        return bos if [bos] in (by_template, by_tokenizer) else None

    @cached_property
    def bare_ids(self) -> np.ndarray:
        """Of a text that the tokenizer knows nothing of, int32: the template alone."""
        return self._with_one_bos(self._tokenise([self.skeleton.prefix + self.skeleton.suffix])[0])

    @cached_property
    def turn_end_id(self) -> int:
        """The token with which the policy ends its turn: what the template writes after an answer, else EOS.

        They differ where a chat model keeps its base model's EOS (Gemma 2: <end_of_turn> and <eos>).
        """
        after = self._skeleton_of(self.render("a", answer=_PLACEHOLDER, open_turn=False)).suffix
        ends = self._structure(self._tokenise([after])[0])
        if not ends and self.tokenizer.eos_token_id is None:
            raise ConfigError(
                f"The tokenizer {_name(self.tokenizer)} has no EOS token and its chat template closes the assistant's "
                "turn "
                "with no special token, so the policy could never end a response: set eos_token in "
                "tokenizer_config.json."
            )
        return ends[0] if ends else self.tokenizer.eos_token_id

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end a response: the end of the turn, and EOS."""
        return tuple(sorted({self.turn_end_id} | {i for i in [self.tokenizer.eos_token_id] if i is not None}))

    # ------------------------------------------------------------ structure

    @cached_property
    def _structural_ids(self) -> frozenset[int]:
        """Special tokens, and other added tokens the template uses; not white space (newlines are tokens in Gemma)."""
        added = self.tokenizer.added_tokens_decoder
        special = {i for i, token in added.items() if token.special} | set(self.tokenizer.all_special_ids)
        chat = self.render(_PLACEHOLDER) + self.render(_PLACEHOLDER, answer="a", open_turn=False)
        return frozenset(special | {i for i in self._tokenise([chat])[0] if i in added and added[i].content.strip()})

    def holds_special_string(self, text: str) -> bool:
        """Whether a text holds the string of a structural token, which is then encoded as plain text."""
        return self._special_strings.search(text) is not None

    def imitates_turn_end(self, text: str) -> bool:
        """Whether a text holds what ends the user's turn, where the template writes that in plain text."""
        return self.plain_turn_end is not None and self.plain_turn_end in text

    @cached_property
    def plain_turn_end(self) -> str | None:
        """E.g. "[/INST]" in Mistral v1 and "ASSISTANT:" in Vicuna templates; None where a token ends the user's turn."""
        suffix = self.skeleton.suffix
        return None if self._structure(self._tokenise([suffix])[0]) else suffix.strip() or None

    @cached_property
    def _special_strings(self) -> re.Pattern[str]:
        added = self.tokenizer.added_tokens_decoder
        names = [added[i].content for i in self._structural_ids if i in added and added[i].content]
        return re.compile("|".join(map(re.escape, names)) or r"(?!)")  # (?!): never

    @cached_property
    def _own_structure(self) -> list[int]:
        return self._structure(self._tokenise([self.render(_PLACEHOLDER)])[0])

    def _structure(self, ids: Sequence[int]) -> list[int]:
        return [i for i in ids if i in self._structural_ids]

    def _is_forged(self, ids: Sequence[int]) -> bool:
        """Whether the user's text added or hid structural tokens."""
        return self._structure(ids) != self._own_structure

    def _skeleton_of(self, rendered: str) -> Skeleton:
        parts = rendered.split(_PLACEHOLDER)
        if len(parts) != 2:
            raise ConfigError(
                f"The chat template of {_name(self.tokenizer)} writes a turn's text {len(parts) - 1} times instead of "
                "once: "
                "it is not a chat template this project can use; repair it in the policy's tokenizer folder."
            )
        return Skeleton(*parts)

    def _refuse_closed_prompt(self) -> None:
        """A prompt that ends with EOS asks for nothing: the policy has been told that the conversation is over."""
        eos = self.tokenizer.eos_token_id
        ignores_flag = self.render(_PLACEHOLDER) == self.render(_PLACEHOLDER, open_turn=False)
        if ignores_flag and eos in self._tokenise([self.skeleton.suffix])[0]:
            raise ConfigError(
                f"The chat template of {_name(self.tokenizer)} ends a user's turn with EOS and opens no assistant "
                "turn: "
                "it ignores add_generation_prompt; repair chat_template in the policy's tokenizer folder."
            )

    # ------------------------------------------------------------ ids

    def _tokenise(self, rendered: list[str]) -> list[list[int]]:
        """Special tokens recognised, none added."""
        with self._refusing():
            ids: list[list[int]] = self.tokenizer(
                rendered,
                add_special_tokens=False,
                return_attention_mask=False,
                verbose=False,
                split_special_tokens=False,
            ).input_ids
        return ids

    def _refusing(self) -> AbstractContextManager[None]:
        """E.g. of a vocabulary without its unknown token."""
        name = _name(self.tokenizer)
        return tokenizer_errors(
            lambda why: ConfigError(f"The tokenizer {name} cannot encode the prompts ({why}): repair its files.")
        )

    def _with_one_bos(self, ids: Sequence[int]) -> np.ndarray:
        if self.bos_id is not None:
            first = next((i for i, token in enumerate(ids) if token != self.bos_id), len(ids))
            ids = [self.bos_id, *ids[first:]]
        return np.asarray(ids, dtype=np.int32)

    def _encode_guarded(self, rendered: str) -> list[int]:
        """Tokenise with the user's text as plain text. Raises ConfigError if the structure is still not the template's."""
        prefix, suffix = self.skeleton.prefix, self.skeleton.suffix
        user_text = rendered[len(prefix) : len(rendered) - len(suffix)]
        with self._refusing():
            plain = self._plain_encoder
            ids = plain.encode(plain.hide(prefix) + user_text + plain.hide(suffix))
        if rendered != prefix + user_text + suffix or self._is_forged(ids):
            raise ConfigError(
                "A prompt contains the string of a special token, and with the chat template of "
                f"{_name(self.tokenizer)} it "
                "cannot be kept apart from the template's own: remove it from the prompt that begins "
                f"{user_text[:80]!r}."
            )
        return ids

    @cached_property
    def _plain_encoder(self) -> PlainEncoder:
        """Made at the first forged prompt only: copying a large tokenizer takes about a second."""
        from tokenizers import Tokenizer

        description = json.loads(self.tokenizer.backend_tokenizer.to_str())
        description["post_processor"] = description["truncation"] = description["padding"] = None
        nonce = secrets.token_hex(16)
        secret_of: dict[str, str] = {}
        original: dict[str, int] = {}
        for token in description["added_tokens"]:
            if token["id"] in self._structural_ids:
                secret_of[token["content"]] = token["content"] = f"\ue000{nonce}.{token['id']}\ue000"
                token["normalized"] = False
            original[token["content"]] = token["id"]
        backend = Tokenizer.from_str(json.dumps(description))
        # Renamed tokens are new to the copy's vocabulary, so added tokens get other ids there.
        vocabulary = backend.get_vocab(with_added_tokens=True)
        return PlainEncoder(backend, secret_of, {vocabulary[name]: i for name, i in original.items()})


@lru_cache(maxsize=4)
def _encoder(tokenizer: Any, chat_template: str) -> PromptEncoder:
    return PromptEncoder(tokenizer)


def encoder_of(tokenizer: Any) -> PromptEncoder:
    """The encoder of a tokenizer with its present chat template; made once."""
    return _encoder(tokenizer, str(getattr(tokenizer, "chat_template", None)))


def _name(tokenizer: Any) -> str:
    return repr(str(getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__))
