"""Broken handshakes cost nobody else's file its descriptor (decision 0043)."""

from __future__ import annotations

import asyncio
import random
import socket
import ssl
import struct
import threading
from pathlib import Path

from mesh.errors import PeerUnreachable
from node.journal import write_durably
from node.net.calls import new_session, post

DIALS = 300


def strange_peer(listener: socket.socket) -> None:
    """Resets, garbage and silence, in turn."""
    reset = struct.pack("ii", 1, 0)
    silent = []
    for turn in range(DIALS):
        connection, _ = listener.accept()
        if turn % 3 == 0:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
        elif turn % 3 == 1:
            connection.sendall(b"garbage" * 10)
        else:
            silent.append(connection)
            continue
        connection.close()
    for connection in silent:
        connection.close()


def test_broken_handshakes_close_no_file_of_another_thread(tmp_path: Path) -> None:
    done, written, failed = threading.Event(), [0], []

    def write(path: Path) -> None:
        while not done.is_set():
            try:
                write_durably(path, b"a vote")
                assert path.read_bytes() == b"a vote"
                written[0] += 1
            except (OSError, AssertionError) as error:
                failed.append(error)

    async def dial() -> None:
        context, rng = ssl.create_default_context(), random.Random(1)
        async with new_session() as session:

            async def one(_: int) -> None:
                try:
                    await post(
                        session, address, "/", b"", context=context, server_name="nobody",
                        timeout_s=rng.uniform(0.01, 0.1),
                    )  # fmt: skip
                except PeerUnreachable:
                    return
                raise AssertionError("an answer")

            for first in range(0, DIALS, 10):
                await asyncio.gather(*map(one, range(first, first + 10)))

    with socket.create_server(("127.0.0.1", 0), backlog=DIALS) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        threads = [threading.Thread(target=write, args=(tmp_path / name,)) for name in "ab"]
        threads.append(threading.Thread(target=strange_peer, args=(listener,), daemon=True))
        for thread in threads:
            thread.start()
        asyncio.run(dial())
        done.set()
        for thread in threads[:2]:
            thread.join()
    assert failed == []
    assert written[0] > 0
