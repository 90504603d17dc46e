"""ClickHouse: tables, the client and the writer."""
