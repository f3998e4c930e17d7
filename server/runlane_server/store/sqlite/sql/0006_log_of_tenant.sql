-- A page of one tenant's events reads no event of another.

CREATE INDEX events_by_tenant ON events (tenant, position);
