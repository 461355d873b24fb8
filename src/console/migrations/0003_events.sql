-- The history of the cluster, written by each PRIMARY. `time` in milliseconds since 1970 (UTC), `event` the whole event as JSON.
CREATE TABLE events (
    id    TEXT    NOT NULL PRIMARY KEY,
    time  INTEGER NOT NULL,
    kind  TEXT    NOT NULL,
    event TEXT    NOT NULL
) STRICT, WITHOUT ROWID;

CREATE INDEX events_by_time ON events (time, id);
