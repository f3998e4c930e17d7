"""The network between nodes, their database and their clients, with links to cut and mend.

It uses network namespaces if this process has the permission: each node in its own, with one link
to the clients and the other nodes, and another to the database. Otherwise connections go through
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
"""The port of a node that has its own address."""


class Side(StrEnum):
    """A side that a node can be cut off from. The other nodes are on the side of the clients."""

    CLIENTS = "clients"
    STORE = "store"


class Network(Protocol):
    """The links of the nodes, which are numbered from 0."""

    def prefix(self, node: int) -> tuple[str, ...]:
        """The prefix of the command that starts a node."""

    def listen(self, node: int) -> str:
        """The value of `--listen` for a node."""

    def address(self, node: int) -> str:
        """The address at which clients and other nodes reach a node."""

    def address_for(self, worker: int, node: int) -> str:
        """The address at which a worker reaches a node. Workers are numbered after the nodes, and
        have one link, to the side of the clients."""

    def store(self, node: int, url: str) -> str:
        """The URL by which a node reaches a database, from its URL in this process."""

    def serving(self, node: int, address: str) -> None:
        """Records the address at which a node listens."""

    async def cut(self, node: int, side: Side, *, reset: bool) -> None:
        """Cuts a link. With `reset` its connections break; otherwise they fall silent."""

    async def mend(self, node: int, side: Side) -> None:
        """Restores a link. Broken connections have to be opened again."""


# --- Namespaces ----------------------------------------------------------------------------------

_NETS = {Side.CLIENTS: "198.18", Side.STORE: "198.19"}
"""Addresses reserved for benchmarks (RFC 2544), which no real network uses."""

_FIRST = 10
"""The host number of the first node; this process has 1."""


class Namespaces:
    """A namespace for each node, and one for the switches between them and this process."""

    def __init__(self) -> None:
        self.name = f"rl{secrets.token_hex(3)}"
        self._net = secrets.randbelow(250) + 2
        self._hub = f"{self.name}-hub"

    @property
    def host(self) -> str:
        """The address at which nodes reach a database on this machine."""
        return self._ip(Side.STORE, 1)

    @property
    def subnet(self) -> str:
        """The addresses from which nodes connect to the database."""
        return f"{self._ip(Side.STORE, 0)}/24"

    def prefix(self, node: int) -> tuple[str, ...]:
        """The prefix of the command that starts a node."""
        return ("ip", "netns", "exec", self._space(node))

    def listen(self, node: int) -> str:
        """The value of `--listen` for a node."""
        return f"{self._ip(Side.CLIENTS, _FIRST + node)}:{PORT}"

    def address(self, node: int) -> str:
        """The address at which clients and other nodes reach a node."""
        return self.listen(node)

    def address_for(self, worker: int, node: int) -> str:
        """The address at which a worker reaches a node."""
        del worker
        return self.listen(node)

    def store(self, node: int, url: str) -> str:
        """The URL by which a node reaches the database, which also listens at `host`."""
        del node
        return reached_at(url, self.host, 5432)

    def serving(self, node: int, address: str) -> None:
        """Records the address at which a node listens."""
        assert address == self.listen(node)

    async def cut(self, node: int, side: Side, *, reset: bool) -> None:
        """Unplugs the link from its switch; with `reset`, breaks the connections first."""
        if reset:
            far = f"{self._ip(side, 0)}/24"
            await _run(*self.prefix(node), "ss", "-K", "-tn", "dst", far)
        await _run("ip", "-n", self._hub, "link", "set", f"{side}{node}", "down")

    async def mend(self, node: int, side: Side) -> None:
        """Plugs the link in again."""
        await _run("ip", "-n", self._hub, "link", "set", f"{side}{node}", "up")

    def build(self, nodes: int) -> None:
        """Creates everything. Raises CalledProcessError without the permission."""
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
        """Removes everything. A link disappears with the namespace of either end."""
        for space in (self._hub, *(self._space(node) for node in range(nodes))):
            with suppress(subprocess.CalledProcessError):
                _ip("netns", "del", space)

    def _plug(self, side: Side, port: str, link: str, space: str | None, number: int) -> None:
        """Creates a link from the switch of a side into a namespace, or to this process."""
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
    """The reason why this process cannot create linked namespaces; empty if it can."""
    if shutil.which("ip") is None or shutil.which("ss") is None:
        return "iproute2 is not installed"
    if os.geteuid() != 0:
        return "only root makes network namespaces"
    trial = Namespaces()
    try:
        trial.build(0)
    except subprocess.CalledProcessError as error:
        return f"cannot create network namespaces: {error.stderr.decode().strip()}"
    finally:
        trial.remove(0)
    return ""


@contextmanager
def namespaces(nodes: int) -> Iterator[Namespaces]:
    """A network of namespaces; it is removed at the end."""
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
    """All links on the loopback interface, each through a proxy."""

    def __init__(
        self, proxies: dict[tuple[int, Side], Proxy], dialled: dict[tuple[int, int], Proxy]
    ) -> None:
        self._proxies = proxies
        self._dialled = dialled
        for (_, node), proxy in dialled.items():
            # A node that is cut off from clients is cut off from workers.
            proxy.target = ("127.0.0.1", proxies[node, Side.CLIENTS].port)

    def prefix(self, node: int) -> tuple[str, ...]:
        """The prefix of the command that starts a node."""
        del node
        return ()

    def listen(self, node: int) -> str:
        """The value of `--listen` for a node."""
        del node
        return "127.0.0.1:0"

    def address(self, node: int) -> str:
        """The address at which clients and other nodes reach a node."""
        return f"127.0.0.1:{self._proxies[node, Side.CLIENTS].port}"

    def address_for(self, worker: int, node: int) -> str:
        """The address at which a worker reaches a node."""
        return f"127.0.0.1:{self._dialled[worker, node].port}"

    def store(self, node: int, url: str) -> str:
        """The URL by which a node reaches the database."""
        proxy = self._proxies[node, Side.STORE]
        proxy.target = target_of(url)
        return reached_at(url, "127.0.0.1", proxy.port)

    def serving(self, node: int, address: str) -> None:
        """Records the address at which a node listens."""
        host, _, port = address.rpartition(":")
        self._proxies[node, Side.CLIENTS].target = (host, int(port))

    async def cut(self, node: int, side: Side, *, reset: bool) -> None:
        """Holds back all data; with `reset`, breaks the connections."""
        for proxy in self._links(node, side):
            proxy.cut(reset=reset)

    async def mend(self, node: int, side: Side) -> None:
        """Lets all data through."""
        for proxy in self._links(node, side):
            proxy.mend()

    def _links(self, member: int, side: Side) -> list[Proxy]:
        if (member, side) in self._proxies:
            return [self._proxies[member, side]]
        return [proxy for (worker, _), proxy in self._dialled.items() if worker == member]


@asynccontextmanager
async def proxies(nodes: int, workers: int = 0) -> AsyncIterator[Proxies]:
    """A network of proxies in this process."""
    async with AsyncExitStack() as stack:
        links = {
            (node, side): await stack.enter_async_context(Proxy())
            for node in range(nodes)
            for side in Side
        }
        dialled = {
            (nodes + worker, node): await stack.enter_async_context(Proxy())
            for worker in range(workers)
            for node in range(nodes)
        }
        yield Proxies(links, dialled)


# --- The database --------------------------------------------------------------------------------


def open_to(server: OwnPostgres, network: Namespaces) -> None:
    """Configures a PostgreSQL of the tests, before its start, to accept the nodes."""
    server.settings["listen_addresses"] = network.host
    with (server.folder / "data" / "pg_hba.conf").open("a") as rules:
        rules.write(f"host all all {network.subnet} trust\n")


def reached_at(url: str, host: str, port: int) -> str:
    """The URL of a store, with another host and port."""
    parts = urlsplit(url)
    user, at, _ = parts.netloc.rpartition("@")
    rest = [(k, v) for k, v in parse_qsl(parts.query) if k not in {"host", "port"}]
    return parts._replace(netloc=f"{user}{at}{host}:{port}", query=urlencode(rest)).geturl()


def target_of(url: str) -> Target:
    """The address of the database in a URL."""
    parts = urlsplit(url)
    options = dict(parse_qsl(parts.query))
    port = parts.port or int(options.get("port", "5432"))
    host = parts.hostname or options.get("host", "127.0.0.1")
    return f"{host}/.s.PGSQL.{port}" if host.startswith("/") else (host, port)
