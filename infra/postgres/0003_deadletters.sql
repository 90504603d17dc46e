-- What people decided on dead letters. A letter is named by its offset in topic `deadletter`; one without a row here is open.
CREATE TABLE deadletter_decisions (
    topic_prefix text        NOT NULL DEFAULT '',      -- whose topics: several stacks may share one database
    letter       bigint      NOT NULL,
    state        text        NOT NULL CHECK (state IN ('retrying', 'retried', 'dropped')),
    decided_by   text        NOT NULL,                 -- user@host of the command
    decided_at   timestamptz NOT NULL DEFAULT now(),
    outcome      text        NOT NULL DEFAULT '',      -- one sentence: what the retry sent and where
    new_letter   bigint,                               -- the letter that the retry made as it failed again
    repairs      bigint[]    NOT NULL DEFAULT '{}',    -- jobs in `repairs`; once all are done the letter is repaired
    PRIMARY KEY (topic_prefix, letter)
);
