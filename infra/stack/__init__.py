"""The local stack: Kafka, PostgreSQL, the ClickHouse engine and a schema registry as a tree of processes on loopback."""
