"""The tokenizer of a checkpoint folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import tokenizers

from core.errors import CheckpointError, InvalidRequestError
from text.chat_template import Chat, ChatTemplate, template_source
from text.detokenizer import Detokenizer
from text.pieces import Pieces

_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
    """Text to token ids and back, and chats to prompts.

    Safe to share between threads; `encode` lets other threads run meanwhile.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        config: Mapping[str, Any],
        chat_template: ChatTemplate | None = None,
    ) -> None:
        """`config` is what tokenizer_config.json holds. `CheckpointError` where the two do not fit."""
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._chat_template = chat_template
        decoder = None if backend.decoder is None else json.loads(backend.decoder.__getstate__())
        added = backend.get_added_tokens_decoder()
        special = [token_id for token_id, token in added.items() if token.special]
        self._pieces = Pieces(backend.id_to_token, decoder, special)
        self._all_pieces = Pieces(backend.id_to_token, decoder, ())
        self._special_ids = frozenset(special)
        # Where the config says what to add, that replaces what tokenizer.json would add.
        self._config_decides = "add_bos_token" in config or "add_eos_token" in config
        named = special_tokens(config)
        self._prefix = self._token_ids(named, "bos_token") if config.get("add_bos_token") else []
        self._suffix = self._token_ids(named, "eos_token") if config.get("add_eos_token") else []

    @classmethod
    def from_folder(cls, folder: Path, *, now: Callable[[], datetime] = datetime.now) -> Tokenizer:
        """Reads tokenizer.json, tokenizer_config.json and chat_template.jinja; only the first must be there.

        `now` is the clock of chat templates that write today's date. Raises `CheckpointError`.
        """
        backend = _read_backend(folder / "tokenizer.json")
        config_path = folder / "tokenizer_config.json"
        config = _read_config(config_path)
        source, origin = template_source(config, str(config_path)), config_path
        template_path = folder / "chat_template.jinja"
        if template_path.exists():
            source, origin = _read_text(template_path), template_path
        template = None
        if source is not None:
            template = ChatTemplate(source, origin=str(origin), special_tokens=special_tokens(config), now=now)
        return cls(backend, config, template)

    @property
    def vocab_size(self) -> int:
        """Tokens it knows, added ones included; a model's own `vocab_size` may be larger."""
        return self._backend.get_vocab_size()

    def to_json(self) -> str:
        """The tokenizer.json that it is made of."""
        return self._backend.to_str()

    @property
    def has_chat_template(self) -> bool:
        return self._chat_template is not None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`, which must be valid Unicode (no lone surrogates)."""
        by_library = add_special_tokens and not self._config_decides
        ids = self._backend.encode_batch_fast([text], add_special_tokens=by_library)[0].ids
        return [*self._prefix, *ids, *self._suffix] if add_special_tokens and self._config_decides else ids

    @property
    def chat_template(self) -> ChatTemplate | None:
        return self._chat_template

    def chat_prompt(self, chat: Chat) -> str:
        """The prompt of a chat; it holds its special tokens already. `InvalidRequestError` where there is no way."""
        if self._chat_template is None:
            raise InvalidRequestError(
                "messages", f"{len(chat.messages)} messages", "this model has no chat template: send a prompt instead"
            )
        return self._chat_template.render(chat)

    def detokenizer(self, prompt_token_ids: Iterable[int] = (), *, skip_special_tokens: bool = True) -> Detokenizer:
        """For tokens that go on after a prompt, or for a whole text where there is none."""
        strip = self._pieces.leading_space and all(token_id in self._special_ids for token_id in prompt_token_ids)
        return Detokenizer(self._pieces if skip_special_tokens else self._all_pieces, strip_leading_space=strip)

    def is_token(self, text: str) -> bool:
        """Whether there is a token for all of `text`."""
        return self._backend.token_to_id(text) is not None

    def token_text(self, token_id: int) -> str:
        """The token as the vocabulary has it; empty for an id that it has not."""
        return self._backend.id_to_token(token_id) or ""

    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 of one token, or part of a character's; a special token's name."""
        return self._all_pieces[token_id]

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of a whole sequence; special tokens have none, unless they are not to be skipped."""
        detokenizer = self.detokenizer(skip_special_tokens=skip_special_tokens)
        return detokenizer.push(token_ids) + detokenizer.flush()

    def _token_ids(self, named: Mapping[str, str], name: str) -> list[int]:
        token_id = self._backend.token_to_id(named[name]) if name in named else None
        if token_id is None:
            raise CheckpointError(f"tokenizer_config.json: add_{name} is set, but {name} names no token")
        return [token_id]


def special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """The special tokens that a tokenizer_config.json names: as a string, or an object with `content`."""
    found: dict[str, str] = {}
    for name in _SPECIAL_TOKENS:
        match config.get(name):
            case str(token) | {"content": str(token)}:
                found[name] = token
    return found


def _read_backend(path: Path) -> tokenizers.Tokenizer:
    content = _read_text(path)
    try:
        return tokenizers.Tokenizer.from_str(content)
    except Exception as error:  # the library raises nothing narrower
        raise CheckpointError(f"{path}: no readable tokenizer: {error}") from error


def _read_config(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        config = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path}: no valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: must hold a JSON object")
    return config


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: can't be read: {error}") from error
