"""What can go wrong with the simulated exchange.

* SimulationError
    * SimulationConfigError: a setting that cannot be used; the sentence names it and the range.
    * UnknownFaultError: a fault request that names no known fault, or lacks what it needs.
    * ApiError: what a REST client asked is refused with Binance's ``{"code", "msg"}`` body; never fatal to the server.
    * HttpSyntaxError: bytes that are no HTTP/1.1 request; the connection is answered 400 (or 413, 414) and closed.
"""

from __future__ import annotations


class SimulationError(Exception):
    """Any failure of the simulated exchange."""


class SimulationConfigError(SimulationError, ValueError):
    """A setting is out of range; the message names it, its value and what is allowed."""


class UnknownFaultError(SimulationError, ValueError):
    """A fault request cannot be understood; the message lists what is known."""


class ApiError(SimulationError):
    """A request is refused the way Binance refuses it.

    Args:
        code: Binance's error code, e.g. -1121.
        msg: Binance's sentence.
        status: the HTTP status.
    """

    def __init__(self, code: int, msg: str, *, status: int = 400) -> None:
        super().__init__(msg)
        self.code = code
        self.msg = msg
        self.status = status

    def __str__(self) -> str:
        return f"{self.status}: {self.code} {self.msg}"


class HttpSyntaxError(SimulationError):
    """Bytes that are no acceptable HTTP request; ``status`` is what the peer is told."""

    def __init__(self, reason: str, *, status: int = 400) -> None:
        super().__init__(reason)
        self.status = status
