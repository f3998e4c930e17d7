-- The only run whose events a webhook delivers; empty: all runs.
ALTER TABLE webhooks ADD COLUMN run_id text COLLATE "C" NOT NULL DEFAULT '';

CREATE INDEX webhooks_of_run ON webhooks (tenant, run_id, webhook_no);

-- Creates a webhook unless its tenant, or its run, has as many as it may; webhooks of runs count
-- among themselves. It may be repeated, but does not replace the webhook of a run. The lock is held
-- until the commit, so that the count of the next statement includes those that other nodes created.
-- Nodes of the version before call create_webhook during a rolling upgrade.
CREATE FUNCTION insert_webhook(
    new_tenant text, new_id text, is_enabled boolean, first_revision bigint, first_fence bigint,
    created bigint, updated bigint, new_settings text, new_secrets text, new_progress text,
    new_run text, most_of_tenant bigint, most_of_run bigint
) RETURNS boolean LANGUAGE plpgsql AS $$
DECLARE
    stored text;
BEGIN
    PERFORM pg_advisory_xact_lock(hashtext('webhooks'), hashtext(new_tenant));
    SELECT secrets INTO stored FROM webhooks WHERE tenant = new_tenant AND webhook_id = new_id;
    IF FOUND THEN
        RETURN stored = new_secrets;
    END IF;
    IF (
        SELECT count(*) FROM webhooks
        WHERE tenant = new_tenant AND (run_id = '') = (new_run = '')
    ) >= most_of_tenant THEN
        RETURN false;
    END IF;
    IF new_run <> '' AND (
        SELECT count(*) FROM webhooks WHERE tenant = new_tenant AND run_id = new_run
    ) >= most_of_run THEN
        RETURN false;
    END IF;
    INSERT INTO webhooks (
        tenant, webhook_id, enabled, revision, fence, created_at, updated_at, settings, secrets,
        progress, run_id
    ) VALUES (
        new_tenant, new_id, is_enabled, first_revision, first_fence, created, updated, new_settings,
        new_secrets, new_progress, new_run
    );
    RETURN true;
END $$;
