-- +goose Up
-- Since when a root leaves, or stays, because a rotation was aborted by its name; NULL = it is not for that.
ALTER TABLE authorities ADD COLUMN aborted BIGINT;
