-- One schema for SQLite and PostgreSQL: BYTEA and BOOLEAN are PostgreSQL's names, which SQLite takes as they are.
-- Times are nanoseconds since the Unix epoch, UTC.

-- +goose Up
CREATE TABLE meta (
    key   TEXT NOT NULL PRIMARY KEY,
    value TEXT NOT NULL
);

CREATE TABLE revisions (
    name  TEXT   NOT NULL PRIMARY KEY,
    value BIGINT NOT NULL
);
INSERT INTO revisions (name, value) VALUES ('registrations', 0);

CREATE TABLE agents (
    name      TEXT    NOT NULL PRIMARY KEY,
    spki      BYTEA   NOT NULL,
    banned    BOOLEAN NOT NULL,
    enrolled  BIGINT  NOT NULL,
    last_seen BIGINT
);

-- Of a token's secret only its SHA-256 is kept.
CREATE TABLE join_tokens (
    hash    BYTEA  NOT NULL PRIMARY KEY,
    id      TEXT   NOT NULL UNIQUE,
    agent   TEXT   NOT NULL,
    created BIGINT NOT NULL,
    expires BIGINT NOT NULL,
    used    BIGINT,
    revoked BIGINT
);

CREATE TABLE registrations (
    name      TEXT    NOT NULL PRIMARY KEY,
    spiffe_id TEXT    NOT NULL,
    ttl       BIGINT  NOT NULL, -- nanoseconds; 0 = the server's default
    priority  INTEGER NOT NULL,
    revision  BIGINT  NOT NULL
);
CREATE TABLE registration_agents (
    registration TEXT NOT NULL REFERENCES registrations (name) ON DELETE CASCADE,
    agent        TEXT NOT NULL,
    PRIMARY KEY (registration, agent)
);
CREATE TABLE registration_selectors (
    registration TEXT NOT NULL REFERENCES registrations (name) ON DELETE CASCADE,
    selector     TEXT NOT NULL,
    PRIMARY KEY (registration, selector)
);

CREATE TABLE authorities (
    id        TEXT   NOT NULL PRIMARY KEY,
    hierarchy TEXT   NOT NULL,
    state     TEXT   NOT NULL,
    key       TEXT   NOT NULL,
    csr       BYTEA,
    created   BIGINT NOT NULL
);
-- Position 0 is the authority's own certificate, then those above it.
CREATE TABLE authority_certificates (
    authority TEXT    NOT NULL REFERENCES authorities (id) ON DELETE CASCADE,
    position  INTEGER NOT NULL,
    der       BYTEA   NOT NULL,
    PRIMARY KEY (authority, position)
);

CREATE TABLE bundles (
    trust_domain TEXT   NOT NULL PRIMARY KEY,
    sequence     BIGINT NOT NULL,
    digest       BYTEA  NOT NULL
);
CREATE TABLE bundle_roots (
    trust_domain TEXT    NOT NULL REFERENCES bundles (trust_domain) ON DELETE CASCADE,
    position     INTEGER NOT NULL,
    der          BYTEA   NOT NULL,
    PRIMARY KEY (trust_domain, position)
);
