-- The first resources. Times are seconds since 1970 (UTC), because they must mean the same on every node.
CREATE TABLE users (
    name     TEXT    NOT NULL PRIMARY KEY,
    password TEXT    NOT NULL, -- argon2id, PHC string
    role     TEXT    NOT NULL,
    created  INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

-- Only the SHA-256 digest of a token is kept: who reads the database cannot log in with it.
CREATE TABLE tokens (
    digest  BLOB    NOT NULL PRIMARY KEY,
    user    TEXT    NOT NULL REFERENCES users (name) ON UPDATE CASCADE ON DELETE CASCADE,
    expires INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

CREATE INDEX tokens_by_expiry ON tokens (expires);
CREATE INDEX tokens_by_user ON tokens (user);

CREATE TABLE tags (
    name        TEXT NOT NULL PRIMARY KEY,
    color       TEXT NOT NULL,
    description TEXT NOT NULL
) STRICT, WITHOUT ROWID;
