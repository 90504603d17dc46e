"""Errors of the processors.

- ProcessorError                  input, settings or state that cannot be used; a ValueError
  - BarConfigError                settings that contradict each other or exceed a bound
  - QualityConfigError            settings of the quality checks outside their range
  - TradeInputError               trades with a missing column, a wrong dtype or an impossible value
  - SnapshotError                 bytes that are no state of this version
    - SnapshotConfigError         the state was made with other settings
"""

from __future__ import annotations


class ProcessorError(ValueError):
    """Input, settings or state that a processor cannot use; the message says where and what to do."""


class BarConfigError(ProcessorError):
    """Bar settings that contradict each other or exceed a bound."""


class QualityConfigError(ProcessorError):
    """Settings of the quality checks outside their range."""


class TradeInputError(ProcessorError):
    """Trades with a missing column, a wrong dtype or an impossible value."""


class SnapshotError(ProcessorError):
    """Bytes that are no state this version can continue from. Operator action: start from an empty state and replay the topic."""


class SnapshotConfigError(SnapshotError):
    """The state was made with other settings. Operator action: restore the old settings, or start empty and replay the topic."""
