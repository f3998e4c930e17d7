"""Takes over the keys of the nodes from the store while the node runs."""

from __future__ import annotations

import asyncio

import structlog

from runlane_server.access.control import AccessControl
from runlane_server.core.errors import StoreUnavailable
from runlane_server.store.base import Cluster

log = structlog.get_logger()

REFRESH_SECONDS = 5.0
"""Interval between two reads of the keys; `node_keys.SETTLE_SECONDS` allows for three."""


async def keep_node_keys(cluster: Cluster | None, access_control: AccessControl) -> None:
    """Reads the keys regularly, and ends the calls of nodes whose key is no longer valid.

    Returns at once if the store is not shared.
    """
    while cluster is not None:
        await asyncio.sleep(REFRESH_SECONDS)
        try:
            await refresh(cluster, access_control)
        except StoreUnavailable as error:
            log.debug("store unavailable", error=error.message)
        except Exception:
            log.exception("refresh of node keys failed")


async def refresh(cluster: Cluster, access_control: AccessControl) -> None:
    """Does so once. Raises StoreUnavailable."""
    await cluster.refresh_node_keys()
    if access_control.node_keys.replace(cluster.node_keys):
        log.info("node keys changed")
        access_control.recheck()
