-- What the repair has to reconcile and what became of it. The process writes it; people order with `marketstream repair run` and backfill.
CREATE TABLE repairs (
    id           bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    topic_prefix text        NOT NULL DEFAULT '',      -- whose topics: several stacks may share one database
    exchange     text        NOT NULL,
    symbol       text        NOT NULL,
    start_us     bigint      NOT NULL,                 -- bars that touch [start_us, end_us) are compared, microseconds UTC
    end_us       bigint      NOT NULL CHECK (end_us > start_us),
    reason       text        NOT NULL CHECK (reason IN ('gap_filled', 'gap_unfillable', 'too_late', 'quarantine', 'backfill', 'replay', 'request')),
    trigger      text        NOT NULL,                 -- what asked for it, e.g. gaps/2/1234; the same trigger makes one job
    state        text        NOT NULL DEFAULT 'pending' CHECK (state IN ('pending', 'running', 'done')),
    due_us       bigint      NOT NULL DEFAULT 0,       -- not looked at before: bars in it are still open, or it failed and waits
    until_us     bigint      NOT NULL DEFAULT 0,       -- bars that end at or before this are reconciled
    checked      bigint      NOT NULL DEFAULT 0,       -- bars compared
    revised      bigint      NOT NULL DEFAULT 0,       -- bars published
    attempts     integer     NOT NULL DEFAULT 0,       -- failures in a row
    note         text        NOT NULL DEFAULT '',      -- one sentence: what it waits for, or why it failed
    created_at   timestamptz NOT NULL DEFAULT now(),
    updated_at   timestamptz NOT NULL DEFAULT now(),
    UNIQUE (topic_prefix, exchange, symbol, trigger)
);

CREATE INDEX repairs_waiting ON repairs (topic_prefix, due_us) WHERE state <> 'done';

-- The repair process listens: an ordered job begins at once, and by a poll within seconds should a notification be lost.
CREATE FUNCTION repairs_added() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_notify('marketstream_repairs', NEW.topic_prefix);
    RETURN NULL;
END
$$;

CREATE TRIGGER repairs_inserted AFTER INSERT ON repairs FOR EACH ROW EXECUTE FUNCTION repairs_added();

-- How far each backfill is: what lies before the position is acknowledged by the broker, so a second run goes on from there.
CREATE TABLE backfills (
    id           bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    topic_prefix text        NOT NULL DEFAULT '',
    exchange     text        NOT NULL,
    symbol       text        NOT NULL,
    start_us     bigint      NOT NULL,
    end_us       bigint      NOT NULL CHECK (end_us > start_us),
    state        text        NOT NULL DEFAULT 'fetching' CHECK (state IN ('fetching', 'storing', 'done')),
    first_id     bigint      NOT NULL DEFAULT -1,      -- first trade of the range, -1 while it is looked for
    next_id      bigint      NOT NULL DEFAULT -1,      -- next trade to fetch
    last_id      bigint      NOT NULL DEFAULT -1,      -- last trade of the range, -1 unknown
    first_us     bigint      NOT NULL DEFAULT 0,
    last_us      bigint      NOT NULL DEFAULT 0,       -- time of the newest trade fetched
    rows         bigint      NOT NULL DEFAULT 0,       -- trades published
    lacking      jsonb       NOT NULL DEFAULT '[]',    -- [[first id, last id, start_us, end_us], ...] the venue does not have
    job_id       bigint,                               -- its job in repairs, once everything is published
    created_at   timestamptz NOT NULL DEFAULT now(),
    updated_at   timestamptz NOT NULL DEFAULT now(),
    UNIQUE (topic_prefix, exchange, symbol, start_us, end_us)
);
