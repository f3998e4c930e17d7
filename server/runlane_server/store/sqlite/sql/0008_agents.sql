-- The agent of a run, and that of a session's runs that name none. '' stands for the server's
-- default, and for runs from before agents had names.

ALTER TABLE sessions ADD COLUMN agent TEXT NOT NULL DEFAULT '';

ALTER TABLE runs ADD COLUMN agent TEXT NOT NULL DEFAULT '';
