"""The options of the way in: TLS, and who may call."""

from __future__ import annotations

import click

_FILE = click.Path(dir_okay=False)

ACCESS = click.option(
    "--access",
    type=_FILE,
    metavar="FILE",
    help="Who may do what, as TOML; `token new` adds to it. It is read again when it changes.",
    show_default="everybody everything",
)

ENTRANCE = (
    ACCESS,
    click.option(
        "--tls-cert",
        type=_FILE,
        metavar="FILE",
        help="The server's certificate with its chain, as PEM. It is read again when it changes.",
        show_default="no TLS",
    ),
    click.option("--tls-key", type=_FILE, metavar="FILE", help="Its private key, as PEM."),
    click.option(
        "--tls-client-ca",
        type=_FILE,
        metavar="FILE",
        help="Callers have to show a certificate that is signed by one of these, as PEM.",
    ),
    click.option(
        "--node-tls-ca",
        type=_FILE,
        metavar="FILE",
        help="Who vouches for the other nodes of a shared store, as PEM.",
        show_default="those that gRPC trusts",
    ),
    click.option(
        "--insecure-anywhere",
        is_flag=True,
        help="Lets unknown callers in from the network, and nodes talk to each other without TLS.",
    ),
)
