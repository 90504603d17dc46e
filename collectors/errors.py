"""What can go wrong between a venue and us.

- CollectorError                  anything below; the message says what happened and what the operator does
  - WireError                     one WebSocket connection ended or could not be opened: reconnect
    - ProtocolViolationError      the peer sent bytes that are no WebSocket frames
    - SubscribeError              the venue refused or did not answer a subscription
  - VenueError                    a REST call failed; carries HTTP status and the venue's own code
    - RateLimitedError            429: wait ``retry_after_s``
    - BannedError                 418: this address is banned for ``retry_after_s``
    - BlockedError                403 or 451: the venue does not serve this address or region; a retry gives the same answer
    - RefusedError                another 4xx: the request is wrong; a retry gives the same answer
    - UnavailableError            5xx, a timeout or no connection
    - AnswerError                 200 with a body that is not what the venue documents
  - BreakerOpenError              too many failures in a row; nothing is sent until ``retry_after_s`` have passed
  - BatcherFullError              more rows than a batcher holds: the caller must stop reading first
"""

from __future__ import annotations


class CollectorError(Exception):
    """Base of everything a collector raises on purpose."""


class WireError(CollectorError):
    """A WebSocket connection ended or could not be opened."""


class ProtocolViolationError(WireError):
    """The peer sent bytes that are not WebSocket frames a server may send."""


class SubscribeError(WireError):
    """The venue refused a subscription, or did not acknowledge it in time."""


class VenueError(CollectorError):
    """A REST call failed."""

    def __init__(self, message: str, *, status: int = 0, code: int = 0, retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.retry_after_s = retry_after_s


class RateLimitedError(VenueError):
    """The venue asks to slow down; wait ``retry_after_s``."""


class BannedError(VenueError):
    """The venue banned this address for ``retry_after_s``; sending more prolongs it."""


class BlockedError(VenueError):
    """The venue does not serve this address or region."""


class RefusedError(VenueError):
    """The venue refused the request as wrong."""


class UnavailableError(VenueError):
    """The venue did not answer or failed."""


class AnswerError(VenueError):
    """The venue's answer is not what it documents."""


class BreakerOpenError(CollectorError):
    """The circuit breaker is open: the call was not made."""

    def __init__(self, name: str, retry_after_s: float) -> None:
        super().__init__(f"{name} failed too often; the next attempt is allowed in {retry_after_s:.0f} s.")
        self.retry_after_s = retry_after_s


class BatcherFullError(CollectorError):
    """The batcher holds all the rows it may hold; stop reading until frames were taken."""

    def __init__(self, rows: int, limit: int) -> None:
        super().__init__(f"{rows:,} rows would wait, the limit is {limit:,}: take frames before adding more.")
        self.rows = rows
        self.limit = limit
