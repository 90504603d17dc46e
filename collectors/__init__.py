"""Readers of exchanges: one folder per venue, and the connection, back-off, breaker and batcher they share. Imports schemas only."""
