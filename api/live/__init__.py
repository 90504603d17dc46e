"""The live tail: filters, series, hub and WebSocket clients. Frames in, one encoded message per change out."""
