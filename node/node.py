"""The composition root: builds every part of a node, owns its one TaskGroup, and stops the parts in reverse order.

sockets ─► Peers (gossip, election) ─► events ─► MeshView ─► routing, Coordinator, Loader, status
              ▲   │ pipeline frames                            │
              │   ▼                                            ▼
Mail ◄── StageService ◄──► Engine                  RecordKeeper (edits of the committed record)
  ▲
  └────── Entry ◄── NodeService ◄── ApiServer
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import random
import signal
import socket
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec

from gossip import config as gossip_config
from gossip import events as gossip_events
from mesh.core import Rejected
from mesh.election import config as election_config
from mesh.election import events as election_events
from mesh.election.record import epoch_counter
from mesh.election.voters import MemberInfo
from mesh.errors import ConfigError, MeshError
from mesh.pipeline import events as session_events
from mesh.pipeline import messages as m
from mesh.pipeline import stage as stage_core
from mesh.pipeline.journal import Adopt
from mesh.pipeline.work import FetchPlacement
from mesh.types import ModelId, ModelInfo, NodeId
from node.advice import TAKEN_OVER, log_election, nobody_answers
from node.api.app import ApiServer
from node.api.context import ApiSettings
from node.api.guard import is_loopback
from node.ask import RUNTIME_FILE
from node.boot import Boot
from node.bugs import watch_loop
from node.claims import Claims
from node.config import NodeConfig
from node.coordinator import LOCAL, Coordinator, Pace, decode_placement
from node.durable import Durable
from node.endings import Endings
from node.entry import Entry
from node.folder import DataFolder
from node.generation import LiveGeneration
from node.identity import SealKey
from node.lag import LagMeter
from node.loader import Loader
from node.machine import Machine
from node.mail import Mail
from node.net.address import format_address, parse_address
from node.net.inbound import Received
from node.outlook import Outlook
from node.peers import PeerEvents, Peers
from node.presence import Presence
from node.record import AddModel, RecordKeeper
from node.relay import Relay
from node.security.keyring import KeyRing
from node.security.tls import PeerTls
from node.service import NodeService
from node.session_log import SessionLogs
from node.spill import SpillFiles
from node.stage import StageService
from node.telemetry import Telemetry, get_logger
from node.text.grammar import Vocabularies
from node.text.tokenizer import load_tokenizer
from node.weights.keeper import Weights
from node.weights.serve import FILE_PATH, HAVE_PATH, DoorFiles, FileServer

VERSION = "0.1.0"
LEAVE_S = 30.0
"""How long a leaving node waits for others to take over what only it holds ..."""
DRAIN_S = 10.0
"""... for sessions to be moved away, and for the clients that read them here to have the last of them ..."""
MOVE_EVERY_S = 0.25
"""How often it asks for that."""
SILENCE_S = 10.0
"""A node that comes in says after so long what it waits for."""
GOODBYE_S = 3.0
"""... and for the election and gossip to let it go."""


class Node:
    """One running machine of the mesh."""

    def __init__(self, config: NodeConfig, folder: DataFolder, booted: Boot, address: str, machine: Machine) -> None:
        self.config, self.folder, self.address, self.machine = config, folder, address, machine
        self.me, self.admin_key = booted.identity.node_id, folder.admin_key()
        self.draining = self.settled = self._hurried = False
        self._booted, self.identity = booted, booted.identity
        self.api_url = ""
        self._log = get_logger("node")
        self._stop, self._released, self._departed = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._tasks: asyncio.TaskGroup | None = None
        self._epoch = booted.durable.epoch
        self.offered: dict[str, ModelInfo] = {}
        self.lag = LagMeter()
        self._tokenizers_asked: set[ModelId] = set()
        self.telemetry = Telemetry()
        self._build(booted)

    # -- building ------------------------------------------------------------------------------------------------------

    def _build(self, booted: Boot) -> None:
        self.folder.save_membership(booted.membership)
        self.tls = PeerTls(self.folder.membership_path, booted.membership)
        self._ring = KeyRing(booted.membership.mesh_id, booted.durable.committed.content.gossip_keys)
        local = self._is_local()
        self.peers = Peers(
            identity=booted.identity,
            tls=self.tls,
            ring=self._ring,
            folder=self.folder,
            durable=booted.durable,
            address=self.address,
            gossip=getattr(gossip_config, local)(),
            election=getattr(election_config, local)(),
            events=PeerEvents(
                on_gossip=self._on_gossip,
                on_election=self._on_election,
                on_pipeline=self._on_pipeline,
                on_lost=self._on_lost,
                allowed=lambda node: node not in self.keeper.content.tombstones,
                admit=lambda request: self.keeper.admit(request),
            ),
            spawn=self._spawn,
        )
        self.keeper = RecordKeeper(booted.identity, self.peers)
        self.presence = Presence(self)
        self.outlook = Outlook(self.me, self.peers, self.presence.profile)
        self.mail = Mail(self.me, self.peers.send_pipeline, self._deliver)
        self.vocabularies = Vocabularies()
        self.engine = self.machine.make_engine(self.config, self.vocabularies)
        self.spilled = SpillFiles(self.folder.subfolder("spill"))
        self.stage = StageService(
            self.me,
            self.engine,
            self.mail.post,
            self._on_stage,
            stage_core.StageConfig(
                checkpoint_bytes=self.config.checkpoint_memory, checkpoint_disk=self.config.checkpoint_disk
            ),
            disk=self.spilled,
        )
        self.entry = Entry(
            self.me,
            view=lambda: self.view,
            post=self.mail.post,
            on_event=self._on_stage,
            balance=self.config.balance,
            rng=random.Random(),
            on_recovered=self._on_recovered,
        )
        self.claims = Claims(self.me, self.peers, lambda: self.view)
        journals = self.stage.core.journals
        self.relay = Relay(
            self.me, self.entry, self.peers, lambda: self.view, lambda name: journals.get(name) is not None
        )
        self.endings = Endings(self.me, self.entry, journals, self.peers, lambda: self.view)
        logs = SessionLogs(self.folder.subfolder("sessions"), self.folder.path / "sessions.key")
        self.durable = Durable(self.me, logs, self.entry, journals, self.relay, self.claims)
        self.weights = Weights(
            self.folder.subfolder("models"), DoorFiles(self.peers.get), self.machine.needed_tensors, self.peers.reject
        )
        served = FileServer(self.weights.store)
        self.peers.door.add_get(HAVE_PATH, served.have)
        self.peers.door.add_get(FILE_PATH, served.file)
        self.loader = Loader(
            self.engine,
            self.weights,
            room=self.machine.weight_bytes,
            view=lambda: self.view,
            in_use=self.stage.core.in_use,
            vacate=self.stage.vacate,
            changed=self._on_loaded,
        )
        pace = LOCAL if local == "loopback" else Pace()
        self.coordinator = Coordinator(self.keeper, lambda: self.view, self._seal_key_of, pace)

    def _is_local(self) -> str:
        if self.config.preset != "auto":
            return self.config.preset
        return "loopback" if is_loopback(parse_address(self.address)[0]) else "lan"

    # -- life ----------------------------------------------------------------------------------------------------------

    async def serve(self, tcp: socket.socket, udp: socket.socket) -> None:
        """Until told to leave; a bug in any part stops all of them."""
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self.begin_leave)
        api = self._make_api()
        async with asyncio.TaskGroup() as self._tasks:
            self._on_committed()
            seeds = self._booted.seeds
            # Before the door opens: peers that remember this node write to it at once, and joining comes first.
            self.peers.gossip.cast(lambda core, now: core.join(seeds, now))
            try:
                await self.peers.start(tcp, udp)
                await api.start(self._api_tls())
                self._write_runtime(api.port)
                await self.durable.load()
            except BaseException:
                await self.peers.stop()
                raise
            running = [self._spawn(part) for part in self._parts()]
            try:
                await self._stop.wait()
                await self._leave()
            finally:
                for task in running:
                    task.cancel()
                await self._close(api)

    def _parts(self) -> list[Coroutine[Any, Any, None]]:
        return [
            self.peers.gossip.run(),
            self.peers.election.run(),
            self.coordinator.run(),
            self.entry.renew_leases(),
            self.durable.run(lambda: self.settled),
            watch_loop(self._log),
            self.presence.publish(),
            self.lag.run(),
            self.presence.remember(),
            self.presence.renew(),
            self._come_in(),
            *(self._working_parts() if self.machine.holds_layers else []),
        ]

    def _working_parts(self) -> list[Coroutine[Any, Any, None]]:
        return [self.loader.run(), self._watch_engine(), self.presence.measure_again()]

    async def _come_in(self) -> None:
        """Offer what is to be offered, say how others join."""
        for wish in self.config.model:
            await self.offer(wish.source, wish.name)
        await self._until(self._known, SILENCE_S)
        if not self._known():
            self._log.warning("not in the mesh yet", why=self._why_unknown())
            await self._until(self._known, math.inf)
        self._log.info("joined", mesh=self.peers.core.durable.mesh_id[:8], name=self.config.name, peer=self.address)
        if self._booted.founded:
            made = await self.service.token_create(86_400.0, None)
            mesh = self.peers.core.durable.mesh_id[:8]
            print(f"founded mesh {mesh}; others join with:\n  {made['command']}", flush=True)
        self.settled = True

    def _known(self) -> bool:
        """A coordinator is known, and what this node offers is in the record: before that nothing is ready."""
        return bool(self.peers.core.leader) and all(self.keeper.serves(info) for info in self.offered.values())

    def _why_unknown(self) -> str:
        if len(self.view.live()) > 1 or not self._booted.seeds:
            return self.view.degraded or "the models offered here are not in the record yet"
        return nobody_answers(tuple(address for _, address in self._booted.seeds))

    async def _watch_engine(self) -> None:
        """A bug on the device thread stops the node: the mesh carries on without it."""
        while True:
            await asyncio.sleep(1.0)
            if self.engine.failed is not None:
                await self.engine.failed

    def begin_leave(self) -> None:
        """Drain and leave; a second call leaves at once."""
        if self._stop.is_set():
            self._hurried = True
        else:
            self.draining = True
            self._stop.set()

    async def _leave(self) -> None:
        """Let others take over layers and sessions, let own clients read on, hand over the vote, say goodbye."""
        self._log.info("leaving")
        self.presence.announce()
        moving = self._spawn(self._move_away())
        await self._until(lambda: not self._needed(), LEAVE_S)
        await self._until(self._unattended, DRAIN_S)
        self.relay.leave(now=True)
        await self._until(lambda: not self.relay.readers, MOVE_EVERY_S)
        moving.cancel()
        self.peers.election.cast(lambda core, now: core.leave(now))
        await self._until(self._released.is_set, GOODBYE_S)
        self.peers.gossip.cast(lambda core, now: core.leave(now))
        await self._until(self._departed.is_set, GOODBYE_S)

    async def _move_away(self) -> None:
        """Until cancelled: give sessions away and have hops moved, as soon as there is somebody for them."""
        self.relay.leave()
        while True:
            self.entry.give_away()
            self.stage.vacate()
            await asyncio.sleep(MOVE_EVERY_S)

    def _unattended(self) -> bool:
        """No session is here, and nobody reads one here."""
        return not (self.entry.sessions() or self.stage.core.sessions() or self.relay.readers)

    def _needed(self) -> bool:
        """Some layers are only here, and somebody stays who could take them."""
        stays = any(m.state == "alive" and m.id != self.me and not m.profile.draining for m in self.view.members)
        return stays and not all(self.view.may_drop(span) for span in self.loader.spans)

    async def _until(self, condition: Callable[[], bool], seconds: float) -> None:
        """Until it holds, the time is over, or a second signal asks to leave at once."""
        end = time.monotonic() + seconds
        while not (condition() or self._hurried) and time.monotonic() < end:  # noqa: ASYNC110  no event in common
            await asyncio.sleep(0.05)

    async def _close(self, api: ApiServer) -> None:
        await self.durable.write()
        self.relay.leave(now=True)
        self.entry.stop()
        try:
            await api.stop()
        except TimeoutError:
            self._log.warning("open responses were cut off")
        self.stage.stop()
        await self.peers.stop()
        await self.engine.stop()
        await asyncio.to_thread(self.spilled.close)
        (self.folder.path / RUNTIME_FILE).unlink(missing_ok=True)

    def _spawn(self, part: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        assert self._tasks is not None
        return self._tasks.create_task(part)

    # -- the public door -----------------------------------------------------------------------------------------------

    def _make_api(self) -> ApiServer:
        host, port = parse_address(self.config.api, "--api")
        settings = ApiSettings(
            host=host,
            port=port,
            max_sessions=self.config.max_sessions,
            max_queue=self.config.max_queue,
            class_queues=dict(self.config.class_queue),
            names=tuple(filter(None, (urlsplit(self.config.api_advertise).hostname,))),
        )
        self.service = NodeService(self, VERSION)
        server = ApiServer(self.service, settings, self.telemetry)
        self.gate = server.api.gate
        return server

    def _api_tls(self) -> Any:
        import ssl

        if self.config.api_tls == "off":
            return None
        certificate, _, key = self.config.api_tls.partition(",")
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        try:
            if self.config.api_tls == "auto":
                context.load_cert_chain(self.folder.membership_path)
            else:
                context.load_cert_chain(certificate, key)
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(f"--api-tls {self.config.api_tls}: {error}") from error
        return context

    def _write_runtime(self, api_port: int) -> None:
        scheme = "http" if self.config.api_tls == "off" else "https"
        host = parse_address(self.config.api)[0]
        self.api_url = self.config.api_advertise or f"{scheme}://{format_address(host, api_port)}"
        runtime = {"pid": os.getpid(), "name": self.config.name, "api": self.api_url, "peer": self.address}
        Path(self.folder.path / RUNTIME_FILE).write_text(json.dumps(runtime))

    # -- models --------------------------------------------------------------------------------------------------------

    async def offer(self, source: str, name: str) -> ModelInfo:
        """Offer the model at ``source`` to the mesh as ``name``.  Raises ``ConfigError`` when it cannot be served."""
        found = await self.weights.offer(
            source, name, self.machine.dtype(self.config), self.machine.quantize(self.config)
        )
        await asyncio.to_thread(load_tokenizer, found.folder)
        await self.machine.check_servable(found.info, found.folder)
        self.offered[name] = found.info
        self.presence.announce()
        self._spawn(self._register(found.info))
        return found.info

    async def _register(self, info: ModelInfo) -> None:
        """Into the record, as soon as there is a coordinator to put it there."""
        while True:
            try:
                await self.keeper.edit(AddModel(info))
                return
            except MeshError as error:
                if error.status == 409:
                    self._log.error("model refused", model=info.id, why=str(error))
                    self.offered.pop(info.id, None)
                    return
                await asyncio.sleep(0.5)

    def _seal_key_of(self, node: NodeId) -> SealKey | None:
        member = self.view.member(node)
        raw = member.profile.seal_key if member else b""
        try:
            return msgspec.msgpack.decode(raw, type=SealKey) if raw else None
        except msgspec.DecodeError:
            return None

    # -- events --------------------------------------------------------------------------------------------------------

    @property
    def view(self) -> Any:
        return self.outlook.view

    def _on_gossip(self, event: Any) -> None:
        self.outlook.touch()
        if isinstance(event, gossip_events.MemberChanged):
            self._on_member(event)
            self._tell_electorate()
        elif isinstance(event, gossip_events.ProfileChanged) and not event.load_only:
            self._tell_electorate()  # it may drain, or have returned and drain no more
        elif isinstance(event, gossip_events.Confirmed):
            self._on_confirmed(event.node, event.confirmations)
        elif isinstance(event, gossip_events.Departed):
            self._departed.set()
        elif isinstance(event, Rejected):
            self.peers.reject(event.sender, event.why)

    def _on_member(self, event: gossip_events.MemberChanged) -> None:
        if event.old != event.new:
            self._log.info("member", node=event.node[:8], was=event.old, now=event.new)
            if event.new == "suspect":
                self.telemetry.suspicions.inc()
        if event.new in ("dead", "left") and event.node != self.me:
            self._on_lost(event.node, event.new)
            # Who has left said so itself; a death is believed with enough accusers (R8).
            self._on_confirmed(event.node, event.confirmations + 2 * (event.new == "left"))

    def _tell_electorate(self) -> None:
        infos: tuple[MemberInfo, ...] = self.outlook.electorate(time.monotonic())
        self.peers.election.cast(lambda core, now: core.note_members(infos, now))

    def _on_confirmed(self, node: NodeId, confirmations: int) -> None:
        """Enough observers hold ``node`` dead: the election need not wait for its silence."""
        member = self.peers.swim.member(node)
        if member is not None and member.state in ("dead", "left") and confirmations >= min(2, len(self.view.live())):
            self.peers.election.cast(lambda core, now: core.note_lost(node, now))

    def _on_election(self, event: Any) -> None:
        self.keeper.noticed()
        self.outlook.touch()
        log_election(self._log, event, lambda node: self.view.name_of(node))
        if isinstance(event, election_events.Committed):
            self._on_committed()
        elif isinstance(event, election_events.BecameLeader):
            self.coordinator.note_leading()
            self.telemetry.elections.inc()
        elif isinstance(event, election_events.Released):
            self._released.set()
        elif isinstance(event, Rejected):
            self.peers.reject(event.sender, event.why)

    def _on_committed(self) -> None:
        """Act on the newest committed record: keys, fences, tombstones, placement."""
        record = self.peers.core.committed
        if record.epoch > self._epoch and self.peers.core.leader != self.me:
            self._log.warning("taken over", epoch=epoch_counter(record.epoch), advice=TAKEN_OVER)
        self._epoch = record.epoch
        if record.content.gossip_keys:
            self._ring.set_keys(record.content.gossip_keys)
        self.outlook.placement(decode_placement(record.content.placement), record.placement_id)
        self.stage.activate(record.placement_id)
        for node in record.content.tombstones:
            self.peers.gossip.cast(lambda core, now, node=node: core.expel(node, now))
            self.peers.links.drop(node)
            self.peers.door.drop(node)
        self.loader.wake()

    def _on_pipeline(self, frame: Received) -> None:
        self.mail.arrived(frame.sender, frame.body if len(frame.body) else frame.message)
        self.stage.credit(frame)

    def _deliver(self, message: Any, sender: NodeId) -> None:
        if isinstance(message, m.TO_SESSION):
            self.entry.receive(message, sender)
        else:
            self.stage.receive(message, sender)
            if isinstance(message, m.Open) and message.request is not None:
                self._fetch_tokenizer(message.request.model)

    def _fetch_tokenizer(self, model: ModelId) -> None:
        """Who holds a journal may have to turn it into text when the node that has the model's files is gone."""
        if model not in self._tokenizers_asked:
            self._tokenizers_asked.add(model)
            self._spawn(self._try_tokenizer(model))

    async def _try_tokenizer(self, model: ModelId) -> None:
        try:
            await self.service.tokenizer(model)
        except (MeshError, OSError) as error:
            self._tokenizers_asked.discard(model)
            self._log.warning("no tokenizer", model=model, why=str(error))

    def _on_lost(self, node: NodeId, cause: str = "reset") -> None:
        self.entry.lost(node, cause)
        self.stage.lost(node, cause)

    def _on_stage(self, event: Any) -> None:
        if isinstance(event, Adopt):
            self._log.info("adopting", session=event.session, detected_by=event.detected_by)
            self.entry.adopt(event)
        elif isinstance(event, session_events.Paused):
            self._log.info("paused", session=event.session, why=event.why)
        elif isinstance(event, FetchPlacement):
            self.peers.election.cast(lambda core, now: core.may_open(event.placement_id, event.peer)[1])
        elif isinstance(event, Rejected):
            self.peers.reject(event.sender, event.why)

    def _on_loaded(self) -> None:
        self.stage.set_spans(self.loader.spans)
        self.presence.announce()

    def _on_recovered(self, generation: LiveGeneration, trace: session_events.Recovery) -> None:
        self.telemetry.recoveries.labels(trace.cause).inc()
        self.telemetry.recovery_pause.observe(trace.pause_ms / 1e3)
        self.telemetry.positions_replayed.inc(trace.positions_replayed)
        self._log.info("recovered", session=generation.session.id, cause=trace.cause, pause_ms=round(trace.pause_ms))
