"""TLS: the certificate of the server, taken up anew when its files change."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import cast

import grpc
import structlog

from runlane_server.access.file_stamp import Stamp, stamp
from runlane_server.core.errors import StartError

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Material:
    """What the files hold, as PEM. With a client CA callers have to show a certificate, too."""

    chain: bytes
    key: bytes
    client_ca: bytes | None = None

    def configuration(self) -> grpc.ServerCertificateConfiguration:
        """The same for gRPC, which takes each away."""
        return grpc.ssl_server_certificate_configuration([(self.key, self.chain)], self.client_ca)


class Unusable(Exception):
    """The files cannot be used; the message says why."""


class ServerTls:
    """The certificate with which a server shows who it is. Raises StartError.

    Connections that are open stay open when another one is taken up.
    """

    def __init__(self, certificate: Path, key: Path, client_ca: Path | None = None) -> None:
        self._certificate = certificate
        self._key = key
        self._client_ca = client_ca
        self._files = [path for path in (certificate, key, client_ca) if path is not None]
        self._looking = Lock()
        self._seen = stamp(self._files)
        try:
            self._material = self._read()
        except Unusable as error:
            raise StartError(str(error)) from None

    @property
    def names_callers(self) -> bool:
        """Whether callers have to show a certificate."""
        return self._client_ca is not None

    def credentials(self) -> grpc.ServerCredentials:
        """For one port. It is served with what is in the files when a connection is made."""
        given = self._material

        def fetch() -> grpc.ServerCertificateConfiguration | None:
            # gRPC asks at each handshake, in a thread of its own.
            nonlocal given
            self.refresh()
            if self._material is given:
                return None
            given = self._material
            return given.configuration()

        return grpc.dynamic_ssl_server_credentials(
            given.configuration(),
            cast("Callable[[], grpc.ServerCertificateConfiguration]", fetch),  # None: no other
            require_client_authentication=self.names_callers,
        )

    def channel_credentials(self, ca: Path | None) -> grpc.ChannelCredentials:
        """For calls to other nodes, which have to be vouched for by `ca`.

        Where callers have to show a certificate, this one is shown. Raises OSError.
        """
        material = self._material
        shown = (material.key, material.chain) if self.names_callers else (None, None)
        roots = None if ca is None else ca.read_bytes()
        return grpc.ssl_channel_credentials(roots, *shown)

    def refresh(self) -> None:
        """Takes up what changed in the files. What cannot be used changes nothing, and the log is
        told once."""
        with self._looking:
            seen = stamp(self._files)
            if seen == self._seen:
                return
            try:
                material = self._read()
            except Unusable as error:
                self._settle(seen)
                log.error("the new certificate is not used", why=str(error))  # noqa: TRY400
                return
            if self._settle(seen):
                self._material = material
                log.info("the certificate was read again")

    def _settle(self, seen: Stamp) -> bool:
        """Whether the files stayed as they were while they were read; else they are read again at
        the next look."""
        if stamp(self._files) != seen:
            return False
        self._seen = seen
        return True

    def _read(self) -> Material:
        try:
            parts = [path.read_bytes() for path in self._files]
        except OSError as error:
            raise Unusable(f"{error.filename}: {error.strerror}") from None
        self._check()
        return Material(*parts)

    def _check(self) -> None:
        """gRPC would take anything, and then have no handshake succeed."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            # With a password it would ask at the terminal for one.
            context.load_cert_chain(self._certificate, self._key, password=lambda: "")
        except (OSError, ValueError) as error:
            raise Unusable(
                f"--tls-cert {self._certificate}, --tls-key {self._key}: {_said(error)}"
            ) from None
        try:
            if self._client_ca is not None:
                context.load_verify_locations(self._client_ca)
        except (OSError, ValueError) as error:
            raise Unusable(f"--tls-client-ca {self._client_ca}: {_said(error)}") from None


def _said(error: Exception) -> str:
    if isinstance(error, ssl.SSLError) and error.reason:
        return error.reason.lower().replace("_", " ")
    return getattr(error, "strerror", None) or str(error) or "cannot be used"
