"""A tokenizer so simple that a test can say what it must answer: one character, one token."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any


class Letters:
    """Ids are code points; with `bos` every text begins with token 1, unless special tokens are refused."""

    bos_token_id: int | None = 1

    def __init__(self, *, bos: bool) -> None:
        self.bos = bos

    def __call__(self, text: str, *, add_special_tokens: bool = True, verbose: bool = True) -> Any:
        start = [1] if self.bos and add_special_tokens else []
        return SimpleNamespace(input_ids=start + [ord(one) for one in text])


class NoSpecial(Letters):
    """The same without any BOS token."""

    bos_token_id = None
