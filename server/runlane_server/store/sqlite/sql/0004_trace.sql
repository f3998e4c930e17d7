-- Where in a trace the caller of a run was; NULL without one.

ALTER TABLE runs ADD COLUMN trace TEXT;
