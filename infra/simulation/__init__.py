"""A seeded world in one process: virtual time, a network, a broker and a store that fail, and the real components between them."""
