-- +goose Up
-- The key that used the token, SubjectPublicKeyInfo: it may come again while the token lives.
ALTER TABLE join_tokens ADD COLUMN used_by BYTEA;

-- What the audit log is to be told: written in the transaction of the change, deleted when it is in the log.
INSERT INTO revisions (name, value) VALUES ('outbox', 0);
CREATE TABLE outbox (
    change   BIGINT  NOT NULL,
    position INTEGER NOT NULL,
    entry    BYTEA   NOT NULL,
    PRIMARY KEY (change, position)
);
