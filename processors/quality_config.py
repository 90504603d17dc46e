"""Settings of the data quality checks, each with its reason; what the kernel reads of them."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

from processors import _quality_kernel as k
from processors.errors import QualityConfigError
from schemas.timeframes import US_PER_SECOND


@dataclass(frozen=True, kw_only=True, slots=True)
class QualityConfig:
    """Settings of the checks."""

    share: float = 0.01
    """Half the band around the last price, at least: recorded markets never jump a hundredth between two trades a moment apart."""
    moves: float = 20.0
    """... plus this many typical moves: t-distributed moves with 3 degrees of freedom exceed it once in 5,000."""
    memory: float = 1 / 64
    """Share of the newest move in the typical one."""
    clip: float = 8.0
    """A move (and a size) counts at most this many times the typical one, so that no single trade opens the band."""
    spike: float = 100.0
    """A trade this many times the typical size is flagged; it is in the bars."""
    size_memory: float = 1 / 128
    """Share of the newest size in the typical one."""
    stretch_us: float = 30.0 * US_PER_SECOND
    """Silence after which the band is 1.4 times as wide; an hour makes it eleven times."""
    widest: float = 0.75
    """``share`` never grows beyond this in a silence."""
    first_share: float = 0.5
    """The band of a new symbol: this share of the price over the number of trades seen, until ``share`` is more."""
    witnesses: int = 3
    """Suspects that agree on a level, of more than one instant, show that the market is there."""
    most_witnesses: int = 12
    """As many do so even in one instant (venues whose times are whole seconds)."""
    run: int = 8
    """Suspects one after the other, whether they agree or not, show that the market has become wilder."""
    forget: int = 64
    """Trades inside the band after which a suspect is not confirmed any more."""
    ahead_us: float = 600.0 * US_PER_SECOND
    """A trade further ahead of its source's watermark is suspect. Above the five minutes that venues' clocks have been seen to be off."""
    late_run: int = 256
    """Trades in a row behind the last one's time after which the symbol's clock is taken to have gone back."""
    max_future_us: int = 86_400 * US_PER_SECOND
    """As ``BarConfig.max_future_us``: what the bar engine refuses."""
    max_slots: int = 65_536
    """Symbols of all sources that are checked, 256 bytes each; trades of further ones pass unchecked."""
    max_sources: int = 1024
    """Sources remembered; beyond it the one that has been silent longest is forgotten."""
    score_memory: float = 0.1
    """Share of the newest ten seconds in the score: it forgets half in about a minute."""

    def __post_init__(self) -> None:
        for entry in fields(self):
            if not getattr(self, entry.name) > 0:
                raise QualityConfigError(f"{entry.name} is {getattr(self, entry.name)}: it must be above 0.")
        if self.widest >= 1 or self.memory > 1 or self.size_memory > 1 or self.score_memory > 1:
            raise QualityConfigError("widest must be below 1, and memory, size_memory and score_memory at most 1.")

    def parameters(self) -> npt.NDArray[np.float64]:
        """What the kernel reads, see ``P_`` there."""
        par = np.zeros(k.PARAMS, np.float64)
        par[k.P_SHARE], par[k.P_MOVES], par[k.P_MEMORY], par[k.P_CLIP] = self.share, self.moves, self.memory, self.clip
        par[k.P_SPIKE], par[k.P_SIZE_MEMORY], par[k.P_STRETCH_US] = self.spike, self.size_memory, self.stretch_us
        par[k.P_WIDEST], par[k.P_FIRST_SHARE] = self.widest, self.first_share
        par[k.P_WITNESSES], par[k.P_MOST_WITNESSES], par[k.P_RUN] = self.witnesses, self.most_witnesses, self.run
        par[k.P_FORGET], par[k.P_AHEAD_US], par[k.P_LATE_RUN] = self.forget, self.ahead_us, self.late_run
        par[k.P_WARM] = max(self.first_share / self.share, 16.0)
        return par
