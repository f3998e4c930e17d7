-- Creates a webhook unless its tenant has `most` already. It may be repeated. The lock is held until
-- the commit, so that the count of the next statement includes those that other nodes created.
CREATE FUNCTION create_webhook(
    most bigint, new_tenant text, new_id text, is_enabled boolean, first_revision bigint,
    first_fence bigint, created bigint, updated bigint, new_settings text, new_secrets text,
    new_progress text
) RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_advisory_xact_lock(hashtext('webhooks'), hashtext(new_tenant));
    IF (SELECT count(*) FROM webhooks WHERE tenant = new_tenant AND webhook_id <> new_id) >= most THEN
        RETURN false;
    END IF;
    INSERT INTO webhooks (
        tenant, webhook_id, enabled, revision, fence, created_at, updated_at, settings, secrets,
        progress
    ) VALUES (
        new_tenant, new_id, is_enabled, first_revision, first_fence, created, updated, new_settings,
        new_secrets, new_progress
    ) ON CONFLICT DO NOTHING;
    RETURN true;
END $$;
