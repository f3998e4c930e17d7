"""The way in: what is encrypted, who is let in, and what happens where one of these is missing."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Never

import structlog

from runlane.targets import is_local
from runlane_server.access.access_file import AccessFile
from runlane_server.access.control import AccessControl
from runlane_server.access.quotas import QuotaBook
from runlane_server.cluster.peers import Peers
from runlane_server.config import Config
from runlane_server.core.errors import SettingsError, StartError
from runlane_server.rpc.tls import ServerTls

log = structlog.get_logger()

LOOK_SECONDS = 1.0
"""How often it is looked whether files have changed, and whether somebody's time is up."""


def check(config: Config) -> None:
    """Raises SettingsError if the settings do not go together, or let anybody in by mistake."""
    if (config.tls_cert is None) != (config.tls_key is None):
        raise SettingsError("--tls-cert and --tls-key belong together")
    for name in ("tls_client_ca", "node_tls_ca"):
        if getattr(config, name) is not None and config.tls_cert is None:
            raise SettingsError(f"--{name.replace('_', '-')} needs --tls-cert and --tls-key")
    if config.harness:
        _check_harness(config)
    if not (is_local(config.listen) or _knows_callers(config) or config.insecure_anywhere):
        raise SettingsError(
            f"on {config.listen} anybody in the network could call: name the callers by --access "
            "FILE or --tls-client-ca FILE, listen on 127.0.0.1 or unix:PATH, or let everybody in "
            "by --insecure-anywhere"
        )


def _check_harness(config: Config) -> None:
    if not is_local(config.listen) or not is_local(config.node_address or config.listen):
        raise SettingsError(
            "--harness lets anybody who comes in hold runs and end the server: listen on 127.0.0.1 "
            "or unix:PATH"
        )
    if config.workers > 1:
        raise SettingsError("--harness goes with one process: --workers 1")
    if config.event_loop == "uvloop":
        raise SettingsError("--harness moves the event loop's clock: --event-loop asyncio")


class Entrance:
    """What the settings say of the way in. Raises StartError; `check` comes before it.

    `now` tells the seconds since 1970.
    """

    def __init__(self, config: Config, now: Callable[[], float] = time.time) -> None:
        self._config = config
        self._due = False
        self.tls: ServerTls | None = None
        if config.tls_cert is not None and config.tls_key is not None:
            ca = None if config.tls_client_ca is None else Path(config.tls_client_ca)
            self.tls = ServerTls(Path(config.tls_cert), Path(config.tls_key), ca)
        self._access = None if config.access is None else AccessFile(Path(config.access), now)
        self.quotas = QuotaBook(None if self._access is None else self._access.quotas)
        self._ca = None if config.node_tls_ca is None else Path(config.node_tls_ca)
        if self._ca is not None and not self._ca.is_file():
            raise StartError(f"--node-tls-ca {self._ca}: is no file")

    def door(self, peer_key: str) -> AccessControl:
        """Lets in who may come in. `peer_key` is what only the nodes of one store know."""
        return AccessControl(self._access, peer_key=peer_key, quotas=self.quotas)

    def peers(self, peer_key: str) -> Peers:
        """The other nodes, reached as this one is."""
        tls, ca = self.tls, self._ca
        return Peers(
            peer_key,
            credentials=None if tls is None else lambda: tls.channel_credentials(ca),
            plaintext=self._config.insecure_anywhere,
        )

    def warn(self, node_address: str, *, shared: bool) -> None:
        """Tells the log what is off. `node_address` is where the others find this node, if the
        store is `shared`."""
        config, away = self._config, not is_local(self._config.listen)
        if away and not _knows_callers(config):
            log.warning("anybody who reaches this server may do everything", listen=config.listen)
        if config.harness:
            log.warning("the harness is served: callers can hold runs and end this server")
        if away and self.tls is None:
            log.warning("calls are not encrypted", listen=config.listen)
            if self._access is not None:
                log.warning("tokens go over the network unencrypted; see --tls-cert")
        if self._access is not None and self._access.has_certificates and not config.tls_client_ca:
            log.warning("no certificate is asked for, though some are known; see --tls-client-ca")
        if shared and self.tls is None and not is_local(node_address):
            if config.insecure_anywhere:
                log.warning("nodes prove themselves to each other unencrypted; see --tls-cert")
            else:
                log.warning("without TLS nodes do not ask each other; live events come later")

    async def watch(self, door: AccessControl) -> Never:
        """Takes up what changes in the files, and ends the calls of those who may not stay."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            try:
                self.look(door)
            except Exception:
                # Else nobody would be shut out any more; it is tried again.
                log.exception("those who are in could not be looked at again")

    def look(self, door: AccessControl) -> None:
        """Does so once."""
        if self.tls is not None:
            self.tls.refresh()
        if self._access is None:
            return
        self._due |= self._access.refresh()
        if self._due:
            self.quotas.replace(self._access.quotas)
            door.recheck()
            self._due = False


def _knows_callers(config: Config) -> bool:
    return config.access is not None or config.tls_client_ca is not None
