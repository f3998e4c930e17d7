"""Each of several processes of one server has addresses of its own."""

from __future__ import annotations

import pytest

from runlane_server.config import Config
from runlane_server.core.errors import StartError
from runlane_server.net.addresses import Address
from runlane_server.process.processes import config_of_process


@pytest.mark.parametrize("name", ["node_address", "metrics_listen"])
@pytest.mark.parametrize(
    ("configured", "number", "own"),
    [
        (None, 2, None),
        (Address("h", 0), 2, Address("h", 0)),
        (Address("h", 7000), 1, Address("h", 7000)),
        (Address("h", 7000), 3, Address("h", 7002)),
        (Address("h", 65535), 1, Address("h", 65535)),
    ],
)
def test_the_first_process_has_the_configured_port_and_each_further_one_the_next(
    name: str, configured: Address | None, number: int, own: Address | None
) -> None:
    found = config_of_process(Config(**{name: configured}), number)  # type: ignore[arg-type]
    assert getattr(found, name) == own


@pytest.mark.parametrize("name", ["node_address", "metrics_listen"])
def test_a_process_without_a_port_is_refused_with_flag_and_number(name: str) -> None:
    config = Config(**{name: Address("h", 65535)})  # type: ignore[arg-type]
    flag = f"--{name.replace('_', '-')}"
    with pytest.raises(StartError, match=f"{flag} h:65535: has no port for process 2"):
        config_of_process(config, 2)
