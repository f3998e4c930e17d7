-- The only run whose events a webhook delivers; empty: all runs.
ALTER TABLE webhooks ADD COLUMN run_id TEXT NOT NULL DEFAULT '';

CREATE INDEX webhooks_of_run ON webhooks (tenant, run_id, webhook_no);
