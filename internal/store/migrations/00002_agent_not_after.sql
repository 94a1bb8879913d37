-- +goose Up
-- The end of the newest certificate that the agent was given; null while none was noted.
ALTER TABLE agents ADD COLUMN not_after BIGINT;
