"""The TLS certificate of the server, reloaded when its files change."""

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
from runlane_server.core.errors import start_error

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class KeyMaterial:
    """The content of the files, as PEM. A client CA makes certificates of callers mandatory."""

    chain: bytes
    key: bytes
    client_ca: bytes | None = None

    def configuration(self) -> grpc.ServerCertificateConfiguration:
        """A new configuration for gRPC, which consumes each."""
        return grpc.ssl_server_certificate_configuration([(self.key, self.chain)], self.client_ca)


class InvalidFiles(Exception):
    """The files are invalid; the message says why."""


class UnreadableFiles(InvalidFiles):
    """The files could not be read this time, for example because descriptors ran out."""


class ServerTls:
    """The certificate of the server. Raises StartError for invalid files.

    Open connections survive a reload.
    """

    def __init__(self, certificate: Path, key: Path, client_ca: Path | None = None) -> None:
        self._certificate = certificate
        self._key = key
        self._client_ca = client_ca
        self._files = [path for path in (certificate, key, client_ca) if path is not None]
        self._lock = Lock()
        self._reported = ""
        self._seen = stamp(self._files)
        try:
            self._material = self._read()
        except InvalidFiles as error:
            raise start_error(str(error), error.__cause__) from None

    @property
    def requires_client_certificates(self) -> bool:
        """Whether callers must present a certificate."""
        return self._client_ca is not None

    def credentials(self) -> grpc.ServerCredentials:
        """Credentials for one port, with the content that the files have at each handshake."""
        current = self._material

        def fetch() -> grpc.ServerCertificateConfiguration | None:
            # gRPC calls this at each handshake, in its own thread.
            nonlocal current
            self.refresh()
            if self._material is current:
                return None
            current = self._material
            return current.configuration()

        return grpc.dynamic_ssl_server_credentials(
            current.configuration(),
            cast("Callable[[], grpc.ServerCertificateConfiguration]", fetch),  # None: unchanged
            require_client_authentication=self.requires_client_certificates,
        )

    def channel_credentials(self, ca: Path | None) -> grpc.ChannelCredentials:
        """Credentials for calls to other nodes, whose certificates `ca` must have signed.

        Presents this certificate if callers must present one. Raises OSError.
        """
        material = self._material
        own = (material.key, material.chain) if self.requires_client_certificates else (None, None)
        roots = None if ca is None else ca.read_bytes()
        return grpc.ssl_channel_credentials(roots, *own)

    def refresh(self) -> None:
        """Reloads changed files. Invalid files change nothing and are logged once.

        Files that could not be read are read again by each refresh until they are.
        """
        with self._lock:
            seen = stamp(self._files)
            if seen == self._seen:
                return
            try:
                material = self._read()
            except InvalidFiles as error:
                if not isinstance(error, UnreadableFiles):
                    self._confirm(seen)
                if str(error) != self._reported:
                    self._reported = str(error)
                    log.error("invalid certificate ignored", error=str(error))  # noqa: TRY400
                return
            if self._confirm(seen):
                self._material = material
                self._reported = ""
                log.info("certificate reloaded")

    def _confirm(self, seen: Stamp) -> bool:
        """Whether the files stayed unchanged during the read; else the next refresh reads again."""
        if stamp(self._files) != seen:
            return False
        self._seen = seen
        return True

    def _read(self) -> KeyMaterial:
        try:
            parts = [path.read_bytes() for path in self._files]
        except OSError as error:
            raise UnreadableFiles(f"{error.filename}: {error.strerror}") from error
        self._check()
        return KeyMaterial(*parts)

    def _check(self) -> None:
        """Validates the files, since gRPC accepts anything and then fails every handshake."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            # Without a password callback it would prompt at the terminal for one.
            context.load_cert_chain(self._certificate, self._key, password=lambda: "")
        except (OSError, ValueError) as error:
            raise _kind(error)(
                f"--tls-cert {self._certificate}, --tls-key {self._key}: {_reason(error)}"
            ) from None
        try:
            if self._client_ca is not None:
                context.load_verify_locations(self._client_ca)
        except (OSError, ValueError) as error:
            raise _kind(error)(f"--tls-client-ca {self._client_ca}: {_reason(error)}") from None


def _kind(error: Exception) -> type[InvalidFiles]:
    # An SSLError, which is about the content, is an OSError too.
    of_content = isinstance(error, ssl.SSLError) or not isinstance(error, OSError)
    return InvalidFiles if of_content else UnreadableFiles


def _reason(error: Exception) -> str:
    if isinstance(error, ssl.SSLError) and error.reason:
        return error.reason.lower().replace("_", " ")
    return getattr(error, "strerror", None) or str(error) or "invalid"
