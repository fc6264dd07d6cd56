import asyncio
import time
from pathlib import Path
from typing import Any

import pytest

from mesh.errors import ConfigError
from node.folder import DataFolder
from node.net.renewal import keep_renewed, renew_if_due
from node.security.admission import found_membership
from node.security.ca import LEAF_LIFE_S, mesh_name
from node.security.tls import PeerTls


async def test_a_leaf_is_renewed_at_half_its_life_while_it_serves(town: Any, tmp_path: Path) -> None:
    member = await town.member()
    with DataFolder(tmp_path / "data") as folder:
        identity = folder.identity()
        folder.save_membership(found_membership(identity, town.registrar.authority, (), time.time()))
        tls = PeerTls(folder.membership_path, folder.membership())
        wait_s = await renew_if_due(identity, folder, tls, (), ())
        assert wait_s == pytest.approx(LEAF_LIFE_S / 2, rel=0.01)
        old = found_membership(identity, town.registrar.authority, (), time.time() - 0.6 * LEAF_LIFE_S)
        folder.save_membership(old)
        wait_s = await renew_if_due(identity, folder, tls, (), (member.address,))
        assert wait_s == pytest.approx(LEAF_LIFE_S / 2, rel=0.01)
        renewed = folder.membership()
        assert renewed is not None
        assert renewed.key != old.key
        server = await asyncio.start_server(lambda r, w: w.close(), "127.0.0.1", 0, ssl=tls.server)
        at = server.sockets[0].getsockname()
        _, writer = await asyncio.open_connection(*at, ssl=member.tls.client, server_hostname=mesh_name(tls.mesh_id))
        assert writer.get_extra_info("ssl_object").getpeercert(binary_form=True) == renewed.leaf
        writer.transport.abort()
        server.close()


async def test_a_renewal_that_fails_is_told_and_tried_again(town: Any, tmp_path: Path) -> None:
    await town.member()
    with DataFolder(tmp_path / "data") as folder:
        identity = folder.identity()
        folder.save_membership(
            found_membership(identity, town.registrar.authority, (), time.time() - 0.6 * LEAF_LIFE_S)
        )
        tls = PeerTls(folder.membership_path, folder.membership())
        with pytest.raises(ConfigError, match="no seed to ask"):
            await renew_if_due(identity, folder, tls, (), ())
        told: asyncio.Queue[str] = asyncio.Queue()
        task = asyncio.create_task(keep_renewed(identity, folder, tls, (), lambda: (), told.put_nowait))
        assert "could not join" in await told.get()
        assert not task.done()
        task.cancel()
