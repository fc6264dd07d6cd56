"""The process around a node: settings checked, sockets bound, membership found, machine measured; then it serves."""

from __future__ import annotations

import asyncio
import socket

import msgspec

from mesh.errors import ConfigError
from node.api.guard import check_bind, is_loopback
from node.boot import boot
from node.config import NodeConfig
from node.folder import DataFolder
from node.machine import measure
from node.net.address import bind_pair, format_address, parse_address
from node.node import Node
from node.security.token import JoinToken
from node.telemetry import setup_logging
from node.weights.offer import check_source


def run(config: NodeConfig) -> int:
    """Run a node until it is told to leave; the exit status of the process."""
    setup_logging(config.log_format)
    return asyncio.run(_main(config))


def first_of(group: BaseExceptionGroup[ConfigError]) -> ConfigError:
    """The wrong setting that brought a node's tasks down."""
    first = group.exceptions[0]
    return first_of(first) if isinstance(first, BaseExceptionGroup) else first


def _check_reachable(config: NodeConfig, address: str) -> None:
    """A node on a loopback address cannot join a mesh on other machines: they would dial themselves."""
    if config.token and is_loopback(parse_address(address)[0]):
        seeds = JoinToken.decode(config.token).seeds
        if not any(is_loopback(parse_address(seed)[0]) for seed in seeds):
            raise ConfigError(
                f"--listen {config.listen}: the mesh is on other machines ({seeds[0]}), which cannot reach a loopback "
                "address: give --listen HOST:PORT of this machine's network"
            )


async def _main(config: NodeConfig) -> int:
    with DataFolder(config.data_dir) as folder:
        for wish in config.model:
            await asyncio.to_thread(check_source, wish.source)
        host, port = parse_address(config.listen, "--listen")
        tcp, udp = bind_pair(host, port)
        address = config.advertise or format_address(host, tcp.getsockname()[1])
        _check_reachable(config, address)
        try:
            booted = await boot(folder, config.token, (parse_address(address)[0],), address)
        except OSError as error:
            raise ConfigError(f"--data-dir {config.data_dir}: {error.strerror or error}") from error
        keys = booted.durable.committed.content.api_keys
        check_bind(parse_address(config.api, "--api")[0], has_keys=bool(keys))
        name = config.name or f"{socket.gethostname()}-{booted.identity.node_id[:4]}"
        config = msgspec.structs.replace(config, name=name)
        node = Node(config, folder, booted, address, await measure(config))
        try:
            await node.serve(tcp, udp)
        except* ConfigError as group:
            raise first_of(group) from None
        return 0
