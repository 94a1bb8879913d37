-- +goose Up
-- Roots are authorities too: those have no key here, so theirs is ''. kind is root, intermediate or control. since, leaving,
-- tainted and leaves_until are times; NULL = never.
ALTER TABLE authorities ADD COLUMN kind TEXT;
ALTER TABLE authorities ADD COLUMN root TEXT;
ALTER TABLE authorities ADD COLUMN since BIGINT;
ALTER TABLE authorities ADD COLUMN wanted BIGINT;
ALTER TABLE authorities ADD COLUMN leaving BIGINT;
ALTER TABLE authorities ADD COLUMN tainted BIGINT;
ALTER TABLE authorities ADD COLUMN taint_reason TEXT;
ALTER TABLE authorities ADD COLUMN leaves_until BIGINT;
ALTER TABLE authorities DROP COLUMN hierarchy;
INSERT INTO revisions (name, value) VALUES ('authorities', 0);

-- Which roots the bundles of the past held: agents acknowledge by sequence and digest.
CREATE TABLE bundle_history (
    sequence BIGINT NOT NULL,
    digest   BYTEA  NOT NULL,
    root     TEXT   NOT NULL,
    checksum BYTEA,
    PRIMARY KEY (sequence, root)
);
CREATE INDEX bundle_history_unsealed ON bundle_history (sequence) WHERE checksum IS NULL;
-- +goose StatementBegin
CREATE TRIGGER bundle_history_changed AFTER UPDATE ON bundle_history WHEN NEW.checksum IS NOT NULL AND NEW.checksum IS OLD.checksum
BEGIN UPDATE bundle_history SET checksum = NULL WHERE rowid = NEW.rowid; END;
-- +goose StatementEnd

-- The newest report of each peer, as it was signed.
CREATE TABLE peer_reports (
    cluster  TEXT  NOT NULL PRIMARY KEY,
    note     BYTEA NOT NULL,
    checksum BYTEA
);
CREATE INDEX peer_reports_unsealed ON peer_reports (cluster) WHERE checksum IS NULL;
-- +goose StatementBegin
CREATE TRIGGER peer_reports_changed AFTER UPDATE ON peer_reports WHEN NEW.checksum IS NOT NULL AND NEW.checksum IS OLD.checksum
BEGIN UPDATE peer_reports SET checksum = NULL WHERE rowid = NEW.rowid; END;
-- +goose StatementEnd

CREATE TABLE banned_identities (
    spiffe_id TEXT   NOT NULL PRIMARY KEY,
    since     BIGINT NOT NULL,
    reason    TEXT   NOT NULL,
    checksum  BYTEA
);
CREATE INDEX banned_identities_unsealed ON banned_identities (spiffe_id) WHERE checksum IS NULL;
-- +goose StatementBegin
CREATE TRIGGER banned_identities_changed AFTER UPDATE ON banned_identities WHEN NEW.checksum IS NOT NULL AND NEW.checksum IS OLD.checksum
BEGIN UPDATE banned_identities SET checksum = NULL WHERE rowid = NEW.rowid; END;
-- +goose StatementEnd
