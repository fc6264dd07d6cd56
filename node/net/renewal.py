"""A member's certificate, renewed at half of its life with a new key, on the live TLS contexts."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from mesh.errors import MeshError
from node.folder import DataFolder
from node.identity import Identity
from node.net.join import rejoin
from node.security.membership import Membership
from node.security.tls import PeerTls

LONGEST_SLEEP_S = 3600.0
"""Wall clocks jump and laptops sleep: look at the clock at least this often."""
AGAIN_S = 300.0
"""After a renewal that failed; half a life of 7 days holds a thousand of them."""


async def keep_renewed(
    identity: Identity,
    folder: DataFolder,
    tls: PeerTls,
    hosts: tuple[str, ...],
    ask: Callable[[], tuple[str, ...]],
    failed: Callable[[str], None],
) -> None:
    """Run for as long as the node does.  ``ask`` gives the doors to ask, this node's own among them; ``failed`` hears
    why a renewal must be tried again."""
    while True:
        try:
            wait_s = await renew_if_due(identity, folder, tls, hosts, ask())
        except (MeshError, OSError) as error:
            failed(str(error))
            wait_s = AGAIN_S
        await asyncio.sleep(min(wait_s, LONGEST_SLEEP_S))


async def renew_if_due(
    identity: Identity, folder: DataFolder, tls: PeerTls, hosts: tuple[str, ...], doors: tuple[str, ...]
) -> float:
    """Renew when half of the leaf's life is over; the seconds until that is so.  Raises what ``rejoin`` does."""
    membership = folder.membership()
    assert membership is not None, "only a member renews"
    if time.time() >= membership.renew_at:
        membership = await _renew(identity, folder, tls, membership, hosts, doors)
    return max(0.0, membership.renew_at - time.time())


async def _renew(
    identity: Identity,
    folder: DataFolder,
    tls: PeerTls,
    membership: Membership,
    hosts: tuple[str, ...],
    doors: tuple[str, ...],
) -> Membership:
    joined = await rejoin(identity, membership, hosts, doors)
    await asyncio.to_thread(folder.save_membership, joined.membership)
    tls.reload(joined.membership)
    return joined.membership
