"""What the engine is compared with: each peer reads the same trades, one Avro record a trade, and makes the same six timeframes."""
