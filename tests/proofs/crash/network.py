"""The network between nodes, their database and their clients, to be cut and mended.

Where this process may, it is one of the kernel: each node in a namespace of its own, with one link
to the clients and the other nodes, and another to the database. Elsewhere connections go through
small proxies in this process.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from enum import StrEnum
from typing import Protocol
from urllib.parse import parse_qsl, urlencode, urlsplit

from proofs.crash.proxy import Proxy, Target
from support.postgres import OwnPostgres

PORT = 50051
"""Where a node listens that has an address to itself."""


class Side(StrEnum):
    """What a node can be cut off from. The other nodes are with the clients."""

    CLIENTS = "clients"
    STORE = "store"


class Network(Protocol):
    """The ways to and from the nodes, which are numbered from 0."""

    def prefix(self, node: int) -> tuple[str, ...]:
        """What stands before the command that starts a node."""

    def listen(self, node: int) -> str:
        """Where a node is to listen."""

    def address(self, node: int) -> str:
        """Where clients and the other nodes reach it."""

    def store(self, node: int, url: str) -> str:
        """The URL by which a node reaches the database of a URL that is good in this process."""

    def serving(self, node: int, address: str) -> None:
        """A node listens at that address."""

    async def cut(self, node: int, side: Side, *, reset: bool) -> None:
        """Nothing gets through any more. With `reset` connections break, else they fall silent."""

    async def mend(self, node: int, side: Side) -> None:
        """Everything gets through again; what was broken has to be made anew."""


# --- Namespaces ----------------------------------------------------------------------------------

_NETS = {Side.CLIENTS: "198.18", Side.STORE: "198.19"}
"""Networks for measurements (RFC 2544), which no real network uses."""

_FIRST = 10
"""The number of the first node in its networks; this process has 1."""


class Namespaces:
    """A namespace for each node, and one with the switches between them and this process."""

    def __init__(self) -> None:
        self.name = f"rl{secrets.token_hex(3)}"
        self._net = secrets.randbelow(250) + 2
        self._hub = f"{self.name}-hub"

    @property
    def host(self) -> str:
        """The address that a database of this machine has for the nodes."""
        return self._ip(Side.STORE, 1)

    @property
    def subnet(self) -> str:
        """Where nodes come from that want the database."""
        return f"{self._ip(Side.STORE, 0)}/24"

    def prefix(self, node: int) -> tuple[str, ...]:
        """What stands before the command that starts a node."""
        return ("ip", "netns", "exec", self._space(node))

    def listen(self, node: int) -> str:
        """Where a node is to listen."""
        return f"{self._ip(Side.CLIENTS, _FIRST + node)}:{PORT}"

    def address(self, node: int) -> str:
        """Where clients and the other nodes reach it."""
        return self.listen(node)

    def store(self, node: int, url: str) -> str:
        """The URL by which a node reaches the database, which listens at `host` too."""
        del node
        return reached_at(url, self.host, 5432)

    def serving(self, node: int, address: str) -> None:
        """A node listens at that address."""
        assert address == self.listen(node)

    async def cut(self, node: int, side: Side, *, reset: bool) -> None:
        """Takes the plug out of the switch, after the connections were broken if that is wanted."""
        if reset:
            far = f"{self._ip(side, 0)}/24"
            await _run(*self.prefix(node), "ss", "-K", "-tn", "dst", far)
        await _run("ip", "-n", self._hub, "link", "set", f"{side}{node}", "down")

    async def mend(self, node: int, side: Side) -> None:
        """Puts the plug back."""
        await _run("ip", "-n", self._hub, "link", "set", f"{side}{node}", "up")

    def build(self, nodes: int) -> None:
        """Makes everything. Raises CalledProcessError where that is not allowed."""
        _ip("netns", "add", self._hub)
        for side in Side:
            _ip("-n", self._hub, "link", "add", str(side), "type", "bridge")
            _ip("-n", self._hub, "link", "set", str(side), "up")
            self._plug(side, f"{side}-host", f"{self.name}-{side[0]}", None, 1)
        for node in range(nodes):
            _ip("netns", "add", self._space(node))
            _ip("-n", self._space(node), "link", "set", "lo", "up")
            for side in Side:
                self._plug(side, f"{side}{node}", str(side), self._space(node), _FIRST + node)

    def remove(self, nodes: int) -> None:
        """Removes everything; links go with the namespace of one of their ends."""
        for space in (self._hub, *(self._space(node) for node in range(nodes))):
            with suppress(subprocess.CalledProcessError):
                _ip("netns", "del", space)

    def _plug(self, side: Side, port: str, link: str, space: str | None, number: int) -> None:
        """A link from the switch of a side into a namespace, or to this process."""
        there = () if space is None else ("-n", space)
        far = ("peer", "name", port, "netns", self._hub)
        _ip(*there, "link", "add", link, "type", "veth", *far)
        _ip(*there, "addr", "add", f"{self._ip(side, number)}/24", "dev", link)
        _ip(*there, "link", "set", link, "up")
        _ip("-n", self._hub, "link", "set", port, "master", str(side), "up")

    def _space(self, node: int) -> str:
        return f"{self.name}-n{node}"

    def _ip(self, side: Side, number: int) -> str:
        return f"{_NETS[side]}.{self._net}.{number}"


def why_no_namespaces() -> str:
    """Why this process cannot make namespaces with links between them; empty if it can."""
    if shutil.which("ip") is None or shutil.which("ss") is None:
        return "iproute2 is not installed"
    if os.geteuid() != 0:
        return "only root makes network namespaces"
    trial = Namespaces()
    try:
        trial.build(0)
    except subprocess.CalledProcessError as error:
        return f"network namespaces cannot be made: {error.stderr.decode().strip()}"
    finally:
        trial.remove(0)
    return ""


@contextmanager
def namespaces(nodes: int) -> Iterator[Namespaces]:
    """A network of namespaces; removed whatever happens."""
    network = Namespaces()
    try:
        network.build(nodes)
        yield network
    finally:
        network.remove(nodes)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


async def _run(*command: str) -> None:
    process = await asyncio.create_subprocess_exec(
        *command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    _, said = await process.communicate()
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)}: {said.decode().strip()}")


# --- Proxies -------------------------------------------------------------------------------------


class Proxies:
    """Everything on the loopback, each way of each node through a proxy."""

    def __init__(self, proxies: dict[tuple[int, Side], Proxy]) -> None:
        self._proxies = proxies

    def prefix(self, node: int) -> tuple[str, ...]:
        """What stands before the command that starts a node."""
        del node
        return ()

    def listen(self, node: int) -> str:
        """Where a node is to listen."""
        del node
        return "127.0.0.1:0"

    def address(self, node: int) -> str:
        """Where clients and the other nodes reach it."""
        return f"127.0.0.1:{self._proxies[node, Side.CLIENTS].port}"

    def store(self, node: int, url: str) -> str:
        """The URL by which a node reaches the database."""
        proxy = self._proxies[node, Side.STORE]
        proxy.target = target_of(url)
        return reached_at(url, "127.0.0.1", proxy.port)

    def serving(self, node: int, address: str) -> None:
        """A node listens at that address."""
        host, _, port = address.rpartition(":")
        self._proxies[node, Side.CLIENTS].target = (host, int(port))

    async def cut(self, node: int, side: Side, *, reset: bool) -> None:
        """Holds back what comes, or breaks the connections."""
        self._proxies[node, side].cut(reset=reset)

    async def mend(self, node: int, side: Side) -> None:
        """Lets everything through."""
        self._proxies[node, side].mend()


@asynccontextmanager
async def proxies(nodes: int) -> AsyncIterator[Proxies]:
    """A network of proxies in this process."""
    async with AsyncExitStack() as stack:
        yield Proxies(
            {
                (node, side): await stack.enter_async_context(Proxy())
                for node in range(nodes)
                for side in Side
            }
        )


# --- The database --------------------------------------------------------------------------------


def open_to(server: OwnPostgres, network: Namespaces) -> None:
    """Has a PostgreSQL of ours, before it is started, listen to the nodes as well."""
    server.settings["listen_addresses"] = network.host
    with (server.folder / "data" / "pg_hba.conf").open("a") as rules:
        rules.write(f"host all all {network.subnet} trust\n")


def reached_at(url: str, host: str, port: int) -> str:
    """The URL of a store, with another way to it."""
    parts = urlsplit(url)
    user, at, _ = parts.netloc.rpartition("@")
    rest = [(k, v) for k, v in parse_qsl(parts.query) if k not in {"host", "port"}]
    return parts._replace(netloc=f"{user}{at}{host}:{port}", query=urlencode(rest)).geturl()


def target_of(url: str) -> Target:
    """Where the database of a URL listens."""
    parts = urlsplit(url)
    options = dict(parse_qsl(parts.query))
    port = parts.port or int(options.get("port", "5432"))
    host = parts.hostname or options.get("host", "127.0.0.1")
    return f"{host}/.s.PGSQL.{port}" if host.startswith("/") else (host, port)
