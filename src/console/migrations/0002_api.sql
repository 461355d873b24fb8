-- What administrators set, one JSON value for each name.
CREATE TABLE settings (
    name  TEXT NOT NULL PRIMARY KEY,
    value TEXT NOT NULL
) STRICT, WITHOUT ROWID;

-- Who did what, good or bad. The oldest rows go when there are too many.
CREATE TABLE audits (
    id         INTEGER PRIMARY KEY,
    time       INTEGER NOT NULL,
    user       TEXT    NOT NULL, -- a name that was tried is no reference to a user
    source     TEXT    NOT NULL,
    action     TEXT    NOT NULL,
    what       TEXT    NOT NULL,
    ok         INTEGER NOT NULL,
    difference TEXT    NOT NULL  -- JSON
) STRICT;

-- For counting failed logins alone: an index of all rows would cost pages of each replicated write.
CREATE INDEX audits_that_failed ON audits (id) WHERE ok = 0;

-- When the login was from which a token descends: renewals do not extend a session for ever.
ALTER TABLE tokens ADD COLUMN began INTEGER NOT NULL DEFAULT 0;
UPDATE tokens SET began = expires - 1800;
