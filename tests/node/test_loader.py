"""From wish and state the next act: what is loaded, grown, shrunk, dropped and tried again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from mesh.errors import ConfigError, MeshError
from mesh.placement import Assigned, ModelPlacement, Placement
from mesh.types import LayerSpan, ModelInfo, NodeProfile
from mesh.view import MemberView, MeshView
from node import loader
from node.loader import RETRY_S, Loader
from tests.mesh.exhaustive import model

FOLDER = Path("/weights")


def span(start: int, end: int, name: str = "m") -> LayerSpan:
    return LayerSpan(name, start, end)


class World:
    """A loader between a placement and a mesh that tests set, an engine and weights that do as they are told.

    ``step`` is what ``Loader.run`` does at each look; time passes only by ``now``.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        self.view = MeshView("me")
        self.others: list[LayerSpan] = []
        self.used: list[LayerSpan] = []
        self.acts: list[str] = []
        self.fails: list[Exception] = []
        self.news: list[tuple[Any, ...]] = []
        self.on_bring: Callable[[Callable[[int, int], None]], None] = lambda progress: None
        monkeypatch.setattr(asyncio.get_running_loop(), "time", lambda: self.now)
        self.vacated: list[LayerSpan] = []
        told = {"view": self._view, "in_use": self._in_use, "vacate": self.vacated.append, "changed": self._changed}
        self.loader = Loader(self, self, room=1 << 40, **told)  # type: ignore[arg-type]

    def place(self, *wishes: LayerSpan, others: tuple[LayerSpan, ...] = (), known: tuple[ModelInfo, ...] = ()) -> None:
        """This node shall hold ``wishes``; other members hold ``others`` now."""
        models = {info.id: info for info in known or (model(),)}
        entries = [
            ModelPlacement(
                info,
                tuple(
                    Assigned(node, x)
                    for node, held in (("me", wishes), ("other", others))
                    for x in held
                    if x.model == name
                ),
            )
            for name, info in models.items()
        ]
        other = MemberView("other", "alive", NodeProfile(spans=others, models=tuple(models.values())))
        self.view = MeshView("me", (MemberView("me"), other), Placement(tuple(entries)), (1, 1))

    def _view(self) -> MeshView:
        own = MemberView("me", "alive", NodeProfile(spans=self.loader.spans))
        return msgspec.structs.replace(self.view, members=(own, *self.view.members[1:]))

    def _in_use(self, piece: LayerSpan) -> bool:
        return any(x.model == piece.model and x.start < piece.end and piece.start < x.end for x in self.used)

    def _changed(self) -> None:
        it = self.loader
        self.news.append((it.loading, it.fetched, it.spans, dict(it.refused)))

    async def bring(self, info: ModelInfo, wanted: LayerSpan, sources: Any, progress: Any) -> Path:
        assert self.loader.loading == wanted
        assert tuple(sources) == ("other",)
        self.on_bring(progress)
        if self.fails:
            raise self.fails.pop(0)
        return FOLDER

    async def load(self, info: ModelInfo, folder: Path, wanted: LayerSpan) -> None:
        assert folder == FOLDER
        self.acts.append(f"load {wanted.model} {wanted.start}-{wanted.end} of {info.manifest[-3:]}")

    async def unload(self, held: LayerSpan) -> None:
        self.acts.append(f"unload {held.model} {held.start}-{held.end}")

    async def step(self) -> list[str]:
        """One look; the acts that it did."""
        before = len(self.acts)
        await self.loader._step()
        return self.acts[before:]


@pytest.fixture
async def world(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    yield World(monkeypatch)
    monkeypatch.undo()


async def test_nothing_is_wanted(world: World) -> None:
    world.place()
    assert await world.step() == []
    assert world.news == []


async def test_what_is_placed_here_is_loaded_once(world: World) -> None:
    world.place(span(0, 4))
    assert await world.step() == ["load m 0-4 of f m"]
    assert world.loader.spans == (span(0, 4),)
    assert await world.step() == []
    assert world.news == [(span(0, 4), 0, (), {}), (None, 0, (span(0, 4),), {})]


async def test_one_act_at_a_look(world: World) -> None:
    world.place(span(0, 4), span(2, 3, "n"), known=(model(), model(name="n")))
    assert await world.step() == ["load m 0-4 of f m"]
    assert await world.step() == ["load n 2-3 of f n"]
    assert await world.step() == []


@pytest.mark.parametrize(
    ("held", "wish", "loads"),
    [
        (span(0, 4), span(2, 6), "0-6"),  # with what is held, so that nothing is missing in between
        (span(2, 6), span(0, 4), "0-6"),
        (span(0, 4), span(4, 6), "0-6"),
        (span(2, 4), span(0, 8), "0-8"),
        (span(0, 2), span(4, 6), "4-6"),  # they do not touch: one contiguous span is all there is
        (span(4, 6), span(0, 2), "0-2"),
    ],
)
async def test_growing(held: LayerSpan, wish: LayerSpan, loads: str, world: World) -> None:
    world.place(held)
    await world.step()
    world.place(wish)
    assert await world.step() == [f"load m {loads} of f m"]


@pytest.mark.parametrize(
    ("held", "wish", "others"),
    [
        (span(0, 6), span(2, 4), (span(0, 2), span(4, 6))),
        (span(0, 6), span(0, 4), (span(4, 6),)),
        (span(0, 6), span(2, 6), (span(0, 3),)),
    ],
)
async def test_shrinking_waits_until_others_serve_and_nobody_runs_there(
    held: LayerSpan, wish: LayerSpan, others: tuple[LayerSpan, ...], world: World
) -> None:
    world.place(held)
    await world.step()
    world.place(wish)
    assert await world.step() == []
    world.place(wish, others=others)
    world.used = [others[-1]]
    assert await world.step() == []
    world.used = [wish]
    assert await world.step() == [f"load m {wish.start}-{wish.end} of f m"]
    assert world.loader.spans == (wish,)
    assert await world.step() == []


async def test_what_moved_away_is_dropped_when_others_serve_it(world: World) -> None:
    world.place(span(0, 4))
    await world.step()
    world.place()
    assert await world.step() == []
    world.place(others=(span(0, 4),))
    world.used = [span(3, 5)]
    assert await world.step() == []
    assert world.vacated == [span(0, 4)], "its sessions are to move to the others"
    world.used = []
    assert await world.step() == ["unload m 0-4"]
    assert world.loader.spans == ()
    assert world.news[-1] == (None, 0, (), {})


async def test_a_model_that_was_removed_is_dropped_though_nobody_else_holds_it(world: World) -> None:
    world.place(span(0, 8))
    await world.step()
    world.place(known=(model(name="n"),))
    world.used = [span(0, 8)]
    assert await world.step() == []
    world.used = []
    assert await world.step() == ["unload m 0-8"]


async def test_a_name_that_stands_for_other_weights_is_loaded_anew(world: World) -> None:
    """As the mesh advises: remove the model, then offer other weights under its name."""
    other = msgspec.structs.replace(model(), manifest="manifest NEW")
    world.place(span(0, 4))
    await world.step()
    world.place(span(0, 4), known=(other,))
    world.used = [span(0, 4)]
    assert await world.step() == ["unload m 0-4"], "nobody may open on the old weights any more"
    assert await world.step() == [], "old sessions still run over them"
    world.used = []
    assert await world.step() == ["load m 0-4 of NEW"]
    assert await world.step() == []


# -- failures ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "again_s"),
    [(MeshError("no peer has it"), RETRY_S), (OSError("disk full"), RETRY_S), (ConfigError("no such kind"), 60.0)],
)
async def test_what_fails_is_said_and_tried_again(error: Exception, again_s: float, world: World) -> None:
    world.place(span(0, 4))
    world.fails = [error]
    assert await world.step() == []
    assert world.news[-1] == (None, 0, (), {span(0, 4): str(error)})
    world.now += again_s - 0.01
    assert await world.step() == []
    world.now += 0.02
    assert await world.step() == ["load m 0-4 of f m"]
    assert world.news[-1] == (None, 0, (span(0, 4),), {}), "what is loaded is not refused any more"


async def test_another_wish_does_not_wait_for_the_one_that_failed(world: World) -> None:
    world.place(span(0, 4))
    world.fails = [ConfigError("no such kind")]
    await world.step()
    world.place(span(0, 2))
    assert await world.step() == ["load m 0-2 of f m"]
    assert world.loader.refused == {}


async def test_growth_that_failed_keeps_what_is_held(world: World) -> None:
    world.place(span(0, 4))
    await world.step()
    world.place(span(2, 6))
    world.fails = [MeshError("no peer has it")]
    assert await world.step() == []
    assert world.loader.spans == (span(0, 4),)
    world.now += RETRY_S
    assert await world.step() == ["load m 0-6 of f m"]


async def test_shrinking_that_failed_is_not_tried_at_every_look(world: World) -> None:
    world.place(span(0, 4))
    await world.step()
    world.place(span(0, 2), others=(span(0, 8),))
    world.fails = [MeshError("disk full"), MeshError("disk full")]
    tries = 0
    for _ in range(20):
        await world.step()
        tries, world.now = 2 - len(world.fails), world.now + RETRY_S / 20
    assert tries == 1
    assert world.loader.spans == (span(0, 4),)


async def test_a_bug_is_not_swallowed(world: World) -> None:
    world.place(span(0, 4))
    world.fails = [AssertionError("a bug")]
    with pytest.raises(AssertionError):
        await world.step()
    assert world.loader.loading is None


async def test_progress_is_news_in_steps_of_five_per_cent(world: World) -> None:
    def fetch(progress: Callable[[int, int], None]) -> None:
        for done in range(0, 1001):
            progress(done, 1000)

    world.place(span(0, 4))
    world.on_bring = fetch
    await world.step()
    said = [fetched for loading, fetched, _, _ in world.news if loading is not None]
    assert said == list(range(0, 101, 5))


async def test_nothing_to_fetch_is_all_of_it(world: World) -> None:
    world.place(span(0, 4))
    world.on_bring = lambda progress: progress(0, 0)
    await world.step()
    assert world.loader.fetched == 100


async def test_it_looks_at_once_when_it_is_woken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "LOOK_S", 3600.0)
    looks: asyncio.Queue[None] = asyncio.Queue()

    def view() -> MeshView:
        looks.put_nowait(None)
        return MeshView("me")

    nothing: Any = None
    made = Loader(nothing, nothing, room=0, view=view, in_use=lambda piece: False, vacate=print, changed=lambda: None)
    task = asyncio.create_task(made.run())
    await asyncio.wait_for(looks.get(), 5.0)
    for _ in range(3):
        assert looks.empty()
        made.wake()
        await asyncio.wait_for(looks.get(), 5.0)
    monkeypatch.setattr(loader, "LOOK_S", 0.0)
    made.wake()
    for _ in range(3):
        await asyncio.wait_for(looks.get(), 5.0)
    task.cancel()
