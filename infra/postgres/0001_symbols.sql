-- Which markets are collected. People edit `active`; collectors write `state`, `state_detail` and `state_at`.
CREATE TABLE symbols (
    id           bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    exchange     text        NOT NULL CHECK (exchange = lower(exchange) AND exchange <> ''),
    symbol       text        NOT NULL CHECK (symbol = upper(symbol) AND symbol <> ''),
    asset_type   text        NOT NULL DEFAULT 'crypto' CHECK (asset_type IN ('crypto', 'stock', 'etf', 'forex', 'index')),
    active       boolean     NOT NULL DEFAULT true,
    state        text        NOT NULL DEFAULT 'new',   -- new, collecting, unknown, inactive
    state_detail text        NOT NULL DEFAULT '',      -- one sentence for a person
    state_at     timestamptz NOT NULL DEFAULT now(),
    created_at   timestamptz NOT NULL DEFAULT now(),
    updated_at   timestamptz NOT NULL DEFAULT now(),
    UNIQUE (exchange, symbol)
);

CREATE INDEX symbols_active ON symbols (exchange) WHERE active;

-- Collectors listen: a change is seen at once, and by a poll within seconds should a notification be lost.
CREATE FUNCTION symbols_changed() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_notify('marketstream_symbols', COALESCE(NEW.exchange, OLD.exchange));
    RETURN NULL;
END
$$;

CREATE TRIGGER symbols_inserted_or_deleted AFTER INSERT OR DELETE ON symbols
    FOR EACH ROW EXECUTE FUNCTION symbols_changed();

-- Not on `state`: what a collector writes must not wake it up.
CREATE TRIGGER symbols_edited AFTER UPDATE OF exchange, symbol, active ON symbols
    FOR EACH ROW WHEN ((OLD.exchange, OLD.symbol, OLD.active) IS DISTINCT FROM (NEW.exchange, NEW.symbol, NEW.active))
    EXECUTE FUNCTION symbols_changed();

CREATE FUNCTION symbols_touch() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    NEW.updated_at := now();
    RETURN NEW;
END
$$;

CREATE TRIGGER symbols_touched BEFORE UPDATE OF exchange, symbol, asset_type, active ON symbols
    FOR EACH ROW EXECUTE FUNCTION symbols_touch();
