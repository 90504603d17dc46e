"""A simulated exchange: a seeded market spoken over Binance's own REST and WebSocket wire format, on loopback.

Read in this order: ``universe`` (what is listed) -> ``market`` (who trades what, when, at which price) -> ``history`` (what is kept)
-> ``wire`` (how it reads on the wire) -> ``limits``, ``faults`` (how an exchange misbehaves) -> ``rest``, ``streams`` -> ``server``.
"""
