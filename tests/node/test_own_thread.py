"""Threads that end with their call."""

import threading

import pytest

from node.own_thread import in_own_thread


async def test_a_call_has_a_thread_of_its_own_that_ends() -> None:
    ran_in = await in_own_thread(threading.current_thread)
    assert ran_in is not threading.current_thread()
    ran_in.join(10)
    assert not ran_in.is_alive()


async def test_what_it_raises_reaches_the_caller() -> None:
    with pytest.raises(ValueError, match="no number"):
        await in_own_thread(lambda: (_ for _ in ()).throw(ValueError("no number")))
