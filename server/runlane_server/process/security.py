"""The security of a server: what is encrypted, who may call, and what happens without either.

The settings allow

    calls without TLS          always, with a warning if the server listens in a network
    callers without identity   on this machine; in a network only with --insecure-anywhere
    nodes without TLS          always, with a warning if they call each other in a network
    the harness                on this machine

`--access` (tokens, JWTs, certificates) and `--tls-client-ca` identify callers. Nodes sign their
calls to each other and send no secret, with or without TLS.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Never

import structlog

from runlane.targets import is_local
from runlane_server.access.access_file import AccessFile
from runlane_server.access.control import AccessControl
from runlane_server.access.grants import GrantBook
from runlane_server.access.node_keys import NodeKeys
from runlane_server.access.quotas import QuotaBook
from runlane_server.cluster.peers import Peers
from runlane_server.config import Config
from runlane_server.core.errors import SettingsError
from runlane_server.net.addresses import Address
from runlane_server.rpc.tls import ServerTls

log = structlog.get_logger()

RECHECK_INTERVAL = 1.0
"""Seconds between two checks for changed files and expired tokens."""


def check_security(config: Config) -> None:
    """Raises SettingsError if the settings contradict each other or expose the server by mistake.

    A server is exposed if any caller in the network could use it.
    """
    for problem in security_problems(config):
        raise SettingsError(problem)


def security_problems(config: Config) -> Iterator[str]:
    """All reasons for which `check_security` refuses these settings."""
    if (config.tls_cert is None) != (config.tls_key is None):
        yield "--tls-cert and --tls-key must be set together"
    for name in ("tls_client_ca", "node_tls_ca"):
        if getattr(config, name) is not None and config.tls_cert is None:
            yield f"--{name.replace('_', '-')} needs --tls-cert and --tls-key"
    if config.harness:
        yield from _harness_problems(config)
    if not (_is_local(config.listen) or _identifies_callers(config) or config.insecure_anywhere):
        yield (
            f"--listen {config.listen}: every caller in the network would have full access; "
            "identify callers with --access FILE or --tls-client-ca FILE, listen on 127.0.0.1 or "
            "unix:PATH, or allow this with --insecure-anywhere"
        )


def _harness_problems(config: Config) -> Iterator[str]:
    if not _is_local(config.listen) or not _is_local(config.node_address or config.listen):
        yield (
            "--harness lets every caller hold runs and end the server; listen on 127.0.0.1 or "
            "unix:PATH"
        )
    if config.processes > 1:
        yield "--harness controls a single process; use --processes 1"
    if config.event_loop == "uvloop":
        yield "--harness moves the event loop's clock; use --event-loop asyncio"


def server_tls(config: Config) -> ServerTls | None:
    """The certificate of the server, if there is one. Raises StartError for an unusable file."""
    if config.tls_cert is None or config.tls_key is None:
        return None
    ca = None if config.tls_client_ca is None else Path(config.tls_client_ca)
    return ServerTls(Path(config.tls_cert), Path(config.tls_key), ca)


def access_file(config: Config, now: Callable[[], float] = time.time) -> AccessFile | None:
    """The access file, if there is one. Raises StartError if it is unusable."""
    return None if config.access is None else AccessFile(Path(config.access), now)


def node_ca(config: Config) -> Path | None:
    """The certificates that sign those of other nodes. Raises SettingsError if not a file."""
    path = None if config.node_tls_ca is None else Path(config.node_tls_ca)
    if path is not None and not path.is_file():
        raise SettingsError(f"--node-tls-ca {path}: is not a file")
    return path


class Security:
    """TLS, access control and peer credentials of one node, as the settings define them.

    Raises StartError for a file that cannot be used. `check_security` comes before. `now` returns
    seconds since 1970.
    """

    def __init__(self, config: Config, now: Callable[[], float] = time.time) -> None:
        self._config = config
        self._needs_recheck = False
        self.tls = server_tls(config)
        self._access = access_file(config, now)
        self.quotas = QuotaBook(None if self._access is None else self._access.quotas)
        self.grants = GrantBook(() if self._access is None else self._access.grants)
        self._node_ca = node_ca(config)

    def access_control(self, node_keys: NodeKeys) -> AccessControl:
        """The access control of this node."""
        return AccessControl(self._access, node_keys=node_keys, quotas=self.quotas)

    def peers(self, node_keys: NodeKeys) -> Peers:
        """The calls to other nodes, with TLS if this node has it."""
        tls, ca = self.tls, self._node_ca
        return Peers(
            node_keys,
            credentials=None if tls is None else lambda: tls.channel_credentials(ca),
        )

    def log_warnings(self, node_address: Address, *, shared: bool) -> None:
        """Logs a warning for every protection that is off.

        `node_address` is where other nodes reach this one, if the store is `shared`.
        """
        config = self._config
        in_network = not _is_local(config.listen)
        listen = str(config.listen)
        if in_network and not _identifies_callers(config):
            log.warning("every caller in the network has full access", listen=listen)
        if config.harness:
            log.warning("the harness is enabled: callers can hold runs and end this server")
        if in_network and self.tls is None:
            log.warning("calls are not encrypted", listen=listen)
            if self._access is not None:
                log.warning("tokens are sent unencrypted; see --tls-cert")
        if self._access is not None and self._access.has_certificates and not config.tls_client_ca:
            log.warning("the certificates of the access file have no effect; see --tls-client-ca")
        if shared and self.tls is None and not _is_local(node_address):
            log.warning("live events between nodes are not encrypted; see --tls-cert")

    async def keep_current(self, access_control: AccessControl) -> Never:
        """Applies changes of the files, and ends calls whose callers are no longer authorized."""
        while True:
            await asyncio.sleep(RECHECK_INTERVAL)
            self.refresh_safely(access_control)

    def refresh_safely(self, access_control: AccessControl) -> None:
        """Does so once, and logs an unexpected error."""
        try:
            self.refresh(access_control)
        except Exception:
            # Without a retry, revoked callers would keep their access from now on.
            log.exception("recheck of callers failed")

    def refresh(self, access_control: AccessControl) -> None:
        """Does so once. Revoked callers come first, even if the certificate cannot be loaded."""
        if self._access is not None:
            self._refresh_access(self._access, access_control)
        if self.tls is not None:
            self.tls.refresh()

    def _refresh_access(self, access: AccessFile, access_control: AccessControl) -> None:
        self._needs_recheck |= access.refresh()
        if self._needs_recheck:
            self.quotas.replace(access.quotas)
            self.grants.replace(access.grants)
            access_control.recheck()
            self._needs_recheck = False


def _identifies_callers(config: Config) -> bool:
    return config.access is not None or config.tls_client_ca is not None


def _is_local(address: Address) -> bool:
    return is_local(str(address))
