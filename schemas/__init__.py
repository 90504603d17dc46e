"""The vocabulary: record types, units, Avro schemas, frame codec, topics. Imports nothing of ours."""
