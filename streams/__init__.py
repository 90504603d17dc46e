"""The Faust application, its agents, checkpoints and the ClickHouse sink. Imports processors and schemas."""
