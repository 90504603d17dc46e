CREATE DATABASE IF NOT EXISTS `{database}`;

CREATE TABLE IF NOT EXISTS `{database}`.`trades` (
    `exchange` LowCardinality(String),
    `symbol` LowCardinality(String),
    `trade_id` Int64 CODEC(Delta, ZSTD(1)),
    `price` Float64 CODEC(ZSTD(1)),
    `size` Float64 CODEC(ZSTD(1)),
    `side` Int8,
    `exchange_time_us` Int64 CODEC(Delta, ZSTD(1)),
    `receive_time_us` Int64 CODEC(Delta, ZSTD(1)),
    `kafka_partition` UInt16,
    `kafka_offset` UInt64 CODEC(Delta, ZSTD(1)),
    INDEX by_offset kafka_offset TYPE minmax GRANULARITY 4,
    PROJECTION applied (SELECT kafka_partition, max(kafka_offset) GROUP BY kafka_partition),
    INDEX by_time exchange_time_us TYPE minmax GRANULARITY 1,
    PROJECTION extent (SELECT exchange, symbol, min(trade_id), max(trade_id), min(exchange_time_us), max(exchange_time_us), count() GROUP BY exchange, symbol)
) ENGINE = MergeTree
PARTITION BY toYYYYMM(fromUnixTimestamp64Micro(exchange_time_us, 'UTC'))
ORDER BY (exchange, symbol, trade_id)
SETTINGS non_replicated_deduplication_window = 1000;

CREATE TABLE IF NOT EXISTS `{database}`.`quotes` (
    `exchange` LowCardinality(String),
    `symbol` LowCardinality(String),
    `bid_price` Float64 CODEC(ZSTD(1)),
    `bid_size` Float64 CODEC(ZSTD(1)),
    `ask_price` Float64 CODEC(ZSTD(1)),
    `ask_size` Float64 CODEC(ZSTD(1)),
    `update_id` Int64 CODEC(Delta, ZSTD(1)),
    `exchange_time_us` Int64 CODEC(Delta, ZSTD(1)),
    `receive_time_us` Int64 CODEC(Delta, ZSTD(1)),
    `kafka_partition` UInt16,
    `kafka_offset` UInt64 CODEC(Delta, ZSTD(1)),
    INDEX by_offset kafka_offset TYPE minmax GRANULARITY 4
) ENGINE = MergeTree
PARTITION BY toYYYYMM(fromUnixTimestamp64Micro(exchange_time_us, 'UTC'))
ORDER BY (exchange, symbol, exchange_time_us)
SETTINGS non_replicated_deduplication_window = 1000;

CREATE TABLE IF NOT EXISTS `{database}`.`funding` (
    `exchange` LowCardinality(String),
    `symbol` LowCardinality(String),
    `funding_rate` Float64 CODEC(ZSTD(1)),
    `mark_price` Float64 CODEC(ZSTD(1)),
    `index_price` Float64 CODEC(ZSTD(1)),
    `next_funding_time_us` Int64 CODEC(Delta, ZSTD(1)),
    `exchange_time_us` Int64 CODEC(Delta, ZSTD(1)),
    `receive_time_us` Int64 CODEC(Delta, ZSTD(1)),
    `kafka_partition` UInt16,
    `kafka_offset` UInt64 CODEC(Delta, ZSTD(1)),
    INDEX by_offset kafka_offset TYPE minmax GRANULARITY 4
) ENGINE = MergeTree
PARTITION BY toYYYYMM(fromUnixTimestamp64Micro(exchange_time_us, 'UTC'))
ORDER BY (exchange, symbol, exchange_time_us)
SETTINGS non_replicated_deduplication_window = 1000;

CREATE TABLE IF NOT EXISTS `{database}`.`open_interest` (
    `exchange` LowCardinality(String),
    `symbol` LowCardinality(String),
    `open_interest` Float64 CODEC(ZSTD(1)),
    `open_interest_value` Float64 CODEC(ZSTD(1)),
    `exchange_time_us` Int64 CODEC(Delta, ZSTD(1)),
    `receive_time_us` Int64 CODEC(Delta, ZSTD(1)),
    `kafka_partition` UInt16,
    `kafka_offset` UInt64 CODEC(Delta, ZSTD(1)),
    INDEX by_offset kafka_offset TYPE minmax GRANULARITY 4
) ENGINE = MergeTree
PARTITION BY toYYYYMM(fromUnixTimestamp64Micro(exchange_time_us, 'UTC'))
ORDER BY (exchange, symbol, exchange_time_us)
SETTINGS non_replicated_deduplication_window = 1000;

CREATE TABLE IF NOT EXISTS `{database}`.`onchain` (
    `chain` String,
    `kind` String,
    `transaction_id` String,
    `asset` String,
    `amount` Float64 CODEC(ZSTD(1)),
    `amount_usd` Nullable(Float64),
    `from_label` String,
    `to_label` String,
    `exchange_time_us` Int64 CODEC(Delta, ZSTD(1)),
    `receive_time_us` Int64 CODEC(Delta, ZSTD(1)),
    `kafka_partition` UInt16,
    `kafka_offset` UInt64 CODEC(Delta, ZSTD(1)),
    INDEX by_offset kafka_offset TYPE minmax GRANULARITY 4
) ENGINE = MergeTree
PARTITION BY toYYYYMM(fromUnixTimestamp64Micro(exchange_time_us, 'UTC'))
ORDER BY (chain, exchange_time_us)
SETTINGS non_replicated_deduplication_window = 1000;

CREATE TABLE IF NOT EXISTS `{database}`.`gaps` (
    `exchange` LowCardinality(String),
    `symbol` LowCardinality(String),
    `first_missing_id` Int64 CODEC(Delta, ZSTD(1)),
    `last_missing_id` Int64 CODEC(Delta, ZSTD(1)),
    `start_time_us` Int64 CODEC(Delta, ZSTD(1)),
    `end_time_us` Int64 CODEC(Delta, ZSTD(1)),
    `evidence` Int8,
    `state` Int8,
    `exchange_time_us` Int64 CODEC(Delta, ZSTD(1)),
    `receive_time_us` Int64 CODEC(Delta, ZSTD(1)),
    `kafka_partition` UInt16,
    `kafka_offset` UInt64 CODEC(Delta, ZSTD(1)),
    INDEX by_offset kafka_offset TYPE minmax GRANULARITY 4
) ENGINE = MergeTree
PARTITION BY toYYYYMM(fromUnixTimestamp64Micro(start_time_us, 'UTC'))
ORDER BY (exchange, symbol, start_time_us)
SETTINGS non_replicated_deduplication_window = 1000;

CREATE TABLE IF NOT EXISTS `{database}`.`quality` (
    `exchange` LowCardinality(String),
    `symbol` LowCardinality(String),
    `score` Float64 CODEC(ZSTD(1)),
    `checks_passed` Int64 CODEC(Delta, ZSTD(1)),
    `checks_failed` Int64 CODEC(Delta, ZSTD(1)),
    `exchange_time_us` Int64 CODEC(Delta, ZSTD(1)),
    `receive_time_us` Int64 CODEC(Delta, ZSTD(1)),
    `kafka_partition` UInt16,
    `kafka_offset` UInt64 CODEC(Delta, ZSTD(1)),
    INDEX by_offset kafka_offset TYPE minmax GRANULARITY 4
) ENGINE = MergeTree
PARTITION BY toYYYYMM(fromUnixTimestamp64Micro(exchange_time_us, 'UTC'))
ORDER BY (exchange, symbol, exchange_time_us)
SETTINGS non_replicated_deduplication_window = 1000;

CREATE TABLE IF NOT EXISTS `{database}`.`bars` (
    `exchange` LowCardinality(String),
    `symbol` LowCardinality(String),
    `timeframe_s` Int32,
    `open_time_us` Int64 CODEC(Delta, ZSTD(1)),
    `close_time_us` Int64 CODEC(Delta, ZSTD(1)),
    `open` Float64 CODEC(ZSTD(1)),
    `high` Float64 CODEC(ZSTD(1)),
    `low` Float64 CODEC(ZSTD(1)),
    `close` Float64 CODEC(ZSTD(1)),
    `volume` Float64 CODEC(ZSTD(1)),
    `quote_volume` Float64 CODEC(ZSTD(1)),
    `buy_volume` Float64 CODEC(ZSTD(1)),
    `trade_count` Int64 CODEC(Delta, ZSTD(1)),
    `vwap` Float64 CODEC(ZSTD(1)),
    `first_trade_id` Int64 CODEC(Delta, ZSTD(1)),
    `last_trade_id` Int64 CODEC(Delta, ZSTD(1)),
    `revision` Int32,
    `is_final` Int8,
    `complete` Int8,
    `last_receive_time_us` Int64 CODEC(Delta, ZSTD(1)),
    `input_offset` Int64 CODEC(Delta, ZSTD(1)),
    `kafka_partition` UInt16,
    `kafka_offset` UInt64 CODEC(Delta, ZSTD(1)),
    INDEX by_offset kafka_offset TYPE minmax GRANULARITY 4,
    PROJECTION applied (SELECT kafka_partition, max(kafka_offset) GROUP BY kafka_partition)
) ENGINE = MergeTree
PARTITION BY toYYYYMM(fromUnixTimestamp64Micro(open_time_us, 'UTC'))
ORDER BY (exchange, symbol, timeframe_s, open_time_us, revision)
SETTINGS non_replicated_deduplication_window = 1000;

CREATE TABLE IF NOT EXISTS `{database}`.`deadletter` (
    `reason` String,
    `detail` String,
    `component` String,
    `exchange` String,
    `symbol` String,
    `topic` String,
    `partition` Int32,
    `offset` Int64 CODEC(Delta, ZSTD(1)),
    `place` String,
    `time_us` Int64 CODEC(Delta, ZSTD(1)),
    `raw_size` Int64 CODEC(Delta, ZSTD(1)),
    `raw` String,
    `kafka_partition` UInt16,
    `kafka_offset` UInt64 CODEC(Delta, ZSTD(1)),
    INDEX by_offset kafka_offset TYPE minmax GRANULARITY 4
) ENGINE = MergeTree
PARTITION BY toYYYYMM(fromUnixTimestamp64Micro(time_us, 'UTC'))
ORDER BY (time_us)
SETTINGS non_replicated_deduplication_window = 1000;
