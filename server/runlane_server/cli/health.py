"""`runlane-server health`: asks a server whether it serves, for the health check of a container."""

from __future__ import annotations

from pathlib import Path

import click
import grpc

from runlane_server.core.errors import StartError


@click.command("health")
@click.option("--service", default="", help="Service to ask for; by default the whole server.")
@click.option(
    "--tls-ca",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="PEM file of the CAs that sign the server's certificate; implies TLS.",
)
@click.option("--timeout", default=5.0, show_default=True, help="Seconds to wait for an answer.")
@click.argument("address", default="127.0.0.1:50051")
def health(address: str, service: str, tls_ca: Path | None, timeout: float) -> int:
    """Prints the health of the server at ADDRESS; exits with 0 if it is SERVING, else with 1.

    ADDRESS is HOST:PORT or unix:PATH, by default 127.0.0.1:50051.
    """
    # An extra of the server; the commands above it work without.
    from grpc_health.v1 import (  # type: ignore[import-untyped]  # noqa: PLC0415
        health_pb2,
        health_pb2_grpc,
    )

    if tls_ca is None:
        channel = grpc.insecure_channel(address)
    else:
        channel = grpc.secure_channel(
            address, grpc.ssl_channel_credentials(root_certificates=tls_ca.read_bytes())
        )
    with channel:
        request = health_pb2.HealthCheckRequest(service=service)
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(request, timeout=timeout)
        except grpc.RpcError as error:
            raise StartError(f"health {address}: {_describe(error)}") from error
    status = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
    click.echo(status)
    return 0 if status == "SERVING" else 1


def _describe(error: grpc.RpcError) -> str:
    # An error of a call has both; the class alone does not say so.
    return f"{error.code().name}: {error.details()}"
