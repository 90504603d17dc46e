-- Runs of the stack: what `marketstream up` started, with which settings, and from where to where in the topics. `marketstream parity` replays one.
CREATE TABLE runs (
    id               text        PRIMARY KEY,               -- speakable: amber-otter-42
    started_at       timestamptz NOT NULL,
    ended_at         timestamptz,                           -- NULL: running, or killed and not looked at since
    end_reason       text        NOT NULL DEFAULT '',       -- '' none yet, down, killed
    topic_prefix     text        NOT NULL,
    source           text        NOT NULL,                  -- live, sim, none
    supervisor_pid   integer     NOT NULL DEFAULT 0,
    supervisor_ticks bigint      NOT NULL DEFAULT 0,        -- with the pid names the process for good
    settings         jsonb       NOT NULL,                  -- dotted key -> text, no secrets
    start_offsets    jsonb       NOT NULL,                  -- {"trades": {"0": first offset, ...}, "bars": {...}}
    end_offsets      jsonb                                  -- the same, offset after the last record; NULL until it is known
);

CREATE INDEX runs_by_time ON runs (topic_prefix, started_at);

-- Sessions of the time machine: a moment, a pace and what the session may see. Rows are never changed but for `stopped_at`.
CREATE TABLE sessions (
    id           text             PRIMARY KEY,              -- speakable: s-calm-heron-07
    created_at   timestamptz      NOT NULL DEFAULT now(),
    stopped_at   timestamptz,
    topic_prefix text             NOT NULL,
    clock        text             NOT NULL CHECK (clock IN ('known', 'market')),
    as_of_us     bigint           NOT NULL,                 -- virtual now when it began
    until_us     bigint           NOT NULL,                 -- virtual now never passes this
    started_us   bigint           NOT NULL,                 -- wall clock when it was made
    pinned_us    bigint           NOT NULL,                 -- what was published after this is no part of it
    speed        double precision NOT NULL CHECK (speed >= 0), -- virtual seconds a second; 0: as fast as it is read
    CHECK (as_of_us <= until_us)
);

CREATE INDEX sessions_by_time ON sessions (created_at);
