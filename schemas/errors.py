"""Errors of the vocabulary.

- SchemaError                     anything wrong with data against the vocabulary
  - DecodeError                   bytes that are not what they claim to be
    - FrameTooLargeError          larger than any frame we write
    - UnknownSchemaError          a schema id this codec has not seen: ask the registry, then decode again
  - EncodeError                   columns that do not fit the topic's schema
  - VocabularyError               an unknown exchange, symbol, timeframe or topic, with the nearest known one
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class SchemaError(ValueError):
    """Data and vocabulary disagree; the message says where and what to do."""


class DecodeError(SchemaError):
    """These bytes cannot be decoded; dead-letter them, a retry gives the same answer."""


class FrameTooLargeError(DecodeError):
    """The record is larger than any frame we write; it is refused before anything is allocated for it."""

    def __init__(self, size: int, limit: int) -> None:
        self.size = size
        self.limit = limit
        super().__init__(f"The record has {size:,} bytes, a frame has at most {limit:,}: it is none of ours; dead-letter it.")


class UnknownSchemaError(DecodeError):
    """The record names a schema id this codec does not know yet."""

    def __init__(self, schema_id: int) -> None:
        self.schema_id = schema_id
        super().__init__(f"The record is written with schema id {schema_id}, which is not known here: fetch it from the schema registry.")


class EncodeError(SchemaError):
    """Columns do not fit the schema of their topic: a bug in the caller."""


class VocabularyError(SchemaError):
    """A word that is not in the vocabulary."""

    def __init__(self, kind: str, word: str, known: Iterable[str]) -> None:
        self.kind = kind
        self.word = word
        self.nearest = nearest(word, known)
        hint = f"did you mean '{self.nearest}'?" if self.nearest else f"known are: {', '.join(sorted(known))}."
        super().__init__(f"Unknown {kind} '{word}': {hint}")


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word most like ``word``, ignoring case, or None when nothing is near."""
    by_folded = {k.casefold(): k for k in known}
    found = get_close_matches(word.casefold(), list(by_folded), n=1, cutoff=0.5)
    return by_folded[found[0]] if found else None
