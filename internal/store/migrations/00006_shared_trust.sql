-- +goose Up
-- What the clusters have decided about their roots, as far as this one knows (server/shared). One row.
CREATE TABLE shared_trust (
    trust_domain TEXT  NOT NULL PRIMARY KEY,
    roots        BYTEA NOT NULL,
    checksum     BYTEA
);
CREATE INDEX shared_trust_unsealed ON shared_trust (trust_domain) WHERE checksum IS NULL;
-- +goose StatementBegin
CREATE TRIGGER shared_trust_changed AFTER UPDATE ON shared_trust WHEN NEW.checksum IS NOT NULL AND NEW.checksum IS OLD.checksum
BEGIN UPDATE shared_trust SET checksum = NULL WHERE rowid = NEW.rowid; END;
-- +goose StatementEnd
