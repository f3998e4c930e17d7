"""Builds the image with buildah, and runs the server in it.

Base images come from a registry of images. Without one, packages make the base:
Debian 12 has the Python that the Dockerfile names. `make test-image` runs this, as root; without
buildah and debootstrap it is skipped, and `image_steps.py` runs the steps alone.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from deploy.test_image import ROOT, argument_of
from runlane import Client, RunState
from support.server import ListeningProcess

BASE = "localhost/python-of-debian:12"
IMAGE = "localhost/runlane-server:test"
PACKAGES = "ca-certificates,python-is-python3,python3,python3-venv"
BUILD_SECONDS = 900.0

OF_THE_MACHINE = ("/etc/ssl/certs", "/etc/pip.conf")
"""How pip reaches its index from here; mounted while the image is built, and not in it."""


@dataclass(frozen=True)
class Builder:
    """buildah, with its images and containers in a folder; without privileges of a daemon."""

    folder: Path

    def command(self, *arguments: str) -> tuple[str, ...]:
        root, state = str(self.folder / "images"), str(self.folder / "state")
        return ("buildah", "--root", root, "--runroot", state, "--storage-driver=vfs", *arguments)

    def done(self, *arguments: str) -> str:
        """Runs buildah to its end; returns what it printed."""
        ended = subprocess.run(
            self.command(*arguments),
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=BUILD_SECONDS,
            check=False,
        )
        assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-2000:]
        return ended.stdout.strip()

    @contextmanager
    def container(self, image: str) -> Iterator[str]:
        name = self.done("from", "--pull-never", image)
        try:
            yield name
        finally:
            self.done("rm", name)


@pytest.fixture(scope="module")
def builder(tmp_path_factory: pytest.TempPathFactory) -> Builder:
    for program in ("buildah", "debootstrap"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed: apt-get install buildah debootstrap")
    folder = tmp_path_factory.mktemp("image")
    base = folder / "base"
    options = ("--variant=minbase", f"--include={PACKAGES}", "bookworm")
    subprocess.run(("debootstrap", *options, str(base), _mirror()), check=True, timeout=300)
    for name in ("sources.list.d", "apt.conf.d"):
        shutil.copytree(Path("/etc/apt", name), base / "etc/apt" / name, dirs_exist_ok=True)
    made = Builder(folder)
    container = made.done("from", "scratch")
    made.done("copy", "--quiet", container, str(base), "/")
    made.done("commit", "--quiet", "--rm", container, BASE)
    shutil.rmtree(base)
    volumes = [f"--volume={path}:{path}:ro" for path in OF_THE_MACHINE if Path(path).exists()]
    made.done(
        *("bud", "--isolation=chroot", "--pull-never", f"--build-arg=BASE={BASE}", *volumes),
        *("--file=deploy/Dockerfile", "--ignorefile=deploy/Dockerfile.dockerignore"),
        *(f"--tag={IMAGE}", "."),
    )
    return made


def _mirror() -> str:
    """The sources from which this machine gets its packages."""
    printed = subprocess.run(
        ("apt-get", "indextargets", "--format", "$(SITE)", "Codename: bookworm"),
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    if not printed:
        pytest.skip("the packages of this machine are not those of Debian 12")
    return printed[0]


pytestmark = pytest.mark.timeout(BUILD_SECONDS + 300)


def test_the_image_has_the_settings_of_the_dockerfile(builder: Builder) -> None:
    described: dict[str, Any] = json.loads(builder.done("inspect", "--type=image", IMAGE))
    config = described["OCIv1"]["config"]
    assert config["User"] == argument_of("USER")
    assert config["Entrypoint"] == json.loads(argument_of("ENTRYPOINT"))
    assert config["Cmd"] == json.loads(argument_of("CMD"))


def test_the_user_of_the_image_can_write_to_its_folder_and_nowhere_else(builder: Builder) -> None:
    with builder.container(IMAGE) as name:
        script = "id -u; pwd; touch x && echo written; touch /opt/x || echo refused"
        printed = builder.done("run", "--isolation=chroot", name, "--", "sh", "-c", script)
    assert printed.splitlines() == ["10001", "/work", "written", "refused"]


async def test_the_container_serves_and_knows_that_it_is_healthy(
    builder: Builder, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    run = ("run", "--isolation=chroot")
    with builder.container(IMAGE) as name:
        started = (*json.loads(argument_of("ENTRYPOINT")), "--listen", address)
        command = builder.command(*run, name, "--", *started, "--insecure-anywhere")
        server = ListeningProcess(command, tmp_path, env=dict(os.environ))
        await server.start()
        try:
            async with Client(server.address) as client:
                handle = await client.run_accepted("s", "hello", allow_missing=True)
                complete = await handle.completed(30)
            assert (complete.state, complete.text.strip()) == (RunState.COMPLETED, "hello")
            healthy = builder.done(*run, name, "--", "runlane-server", "health", address)
            assert healthy == "SERVING"
        finally:
            await server.stop()
