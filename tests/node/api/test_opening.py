"""Requests that have not begun: what the mesh cannot take in yet is asked for again, within bounds."""

from __future__ import annotations

import asyncio

import pytest

from mesh.errors import CapacityError, NoRoute
from tests.fakes import FakeService
from tests.node.api.conftest import Http, serve

LONG_S = 60.0
"""A patience that no test waits for."""


async def test_layers_on_the_move_are_waited_for(service: FakeService) -> None:
    service.refuse = [NoRoute("layers [0, 4) are on the move"), NoRoute("still")]
    async for http in serve(service, patience_s=LONG_S):
        assert (await http.chat())[0] == 200


async def test_room_that_others_took_is_waited_for(service: FakeService) -> None:
    service.refuse = [CapacityError("no pages", 0.1)] * 3
    async for http in serve(service, patience_s=LONG_S):
        assert (await http.chat())[0] == 200


@pytest.mark.parametrize(("error", "status"), [(NoRoute("gone"), 503), (CapacityError("full"), 429)])
async def test_patience_has_an_end(http: Http, error: Exception, status: int) -> None:
    http.service.refuse = [error, error]
    assert (await http.chat())[0] == status
    assert len(http.service.refuse) == 1, "it was asked once"


async def test_batch_waits_as_long_as_it_may_take(http: Http) -> None:
    http.service.refuse = [NoRoute("gone"), CapacityError("full", 0.1)]
    assert (await http.chat(mesh={"class": "batch"}))[0] == 200


async def test_batch_waits_no_longer_than_its_deadline(http: Http) -> None:
    http.service.refuse = [NoRoute("gone")] * 1000
    status, body = await http.chat(mesh={"class": "batch", "timeout": 0.5})
    assert (status, body["error"]["type"]) == (503, "server_error")


async def test_who_waits_for_room_holds_no_place(service: FakeService) -> None:
    service.refuse = [CapacityError("full", 0.4)]
    async for http in serve(service, patience_s=LONG_S, max_sessions=1):
        waiting = asyncio.create_task(http.chat())
        while service.refuse:  # noqa: ASYNC110 - the fake has no event for a refusal
            await asyncio.sleep(0)
        assert (await http.chat())[0] == 200
        assert (await waiting)[0] == 200
