"""What the HTTP API asks of this node (``node.api.service.Service``), answered from the running parts."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from mesh.election.record import epoch_counter
from mesh.errors import ConfigError, Leaving, NoRoute, RequestError
from mesh.types import ModelId, ModelInfo
from mesh.view import MeshView
from node.api.service import Caller, GenerationRequest, Scope
from node.durable import NotKept
from node.record import AddKey, AddToken, RemoveModel, RevokeKey, RevokeNode, RevokeToken, models_of
from node.relay import Reading
from node.security import token as tokens
from node.security.ca import fingerprint
from node.security.keys import find_api_key, is_admin_key, new_api_key
from node.status import status_document
from node.text.tokenizer import Tokenizer, Tokenizers, off_loop

if TYPE_CHECKING:
    from node.node import Node

ADMIN = Caller("admin", frozenset({"infer", "rag", "admin"}))


class NodeService:
    """The API's view of one ``Node``."""

    def __init__(self, node: Node, version: str) -> None:
        self.name, self.version = node.config.name, version
        self._node = node
        self._tokenizers = Tokenizers()

    # -- models --------------------------------------------------------------------------------------------------------

    def models(self) -> list[ModelInfo]:
        return list(models_of(self._node.keeper.content))

    async def tokenizer(self, model: ModelId) -> Tokenizer:
        return await self._tokenizers.get(model, await self._folder(model))

    async def _folder(self, model: ModelId) -> Path:
        info = next((info for info in self.models() if info.id == model), None)
        if info is None:
            raise NoRoute(f"the mesh does not serve model {model!r}")
        return await self._node.weights.outline(info, self.view.sources(info.manifest))

    async def check_grammar(self, model: ModelId, grammar: str, drawn: tuple[int, ...] = ()) -> None:
        tokenizer, folder = await self.tokenizer(model), await self._folder(model)
        vocabularies = self._node.vocabularies
        await off_loop(True, lambda: vocabularies.get(folder, tokenizer).check(grammar, drawn))

    # -- generations ---------------------------------------------------------------------------------------------------

    async def open(self, request: GenerationRequest) -> Reading:
        if self._node.draining:
            raise Leaving("this node is leaving: ask another")
        self._check_nodes(request.allowed_nodes)
        durable = self._node.durable
        durable.check(request)
        generation = await self._node.entry.open(request)
        try:
            await durable.keep(request)
        except NotKept:
            generation.refuse()
            raise
        except BaseException:
            await generation.cancel("disconnected")
            raise
        return Reading(self._node.relay, request, generation)

    async def attach(self, session: str, caller: Caller, patience_s: float) -> Reading | None:
        if not re.fullmatch(r"[0-9a-f]{32}(-\d{1,4})?", session, re.ASCII):
            return None
        reading = await self._node.relay.attach(session, patience_s)
        if reading is None or caller.id == reading.request.caller or "admin" in caller.scopes:
            return reading
        await reading.cancel("disconnected")
        return None

    async def claim(self, request: GenerationRequest) -> str:
        return await self._node.claims.claim(request)

    def _check_nodes(self, wanted: tuple[str, ...]) -> None:
        """A name that no member bears is a mistake, which waiting would not mend; a member that is away may return."""
        known = {word for member in self.view.members for word in (member.id, member.profile.name)}
        unknown = [name for name in wanted if name not in known]
        if unknown:
            names = ", ".join(repr(name[:80]) for name in unknown[:5])
            raise RequestError(
                f"mesh.allowed_nodes: no member of this mesh is called {names}",
                param="mesh.allowed_nodes",
                code="node_not_found",
            )

    async def cancel(self, session: str, caller: Caller) -> bool:
        return await self._node.endings.cancel(session, caller)

    def draw_seed(self, idempotency_key: str) -> int:
        if not idempotency_key:
            return secrets.randbits(63)
        key = hashlib.sha256(b"murmur seed" + self._node.keeper.content.ca_certificate).digest()
        return int.from_bytes(hmac.digest(key, idempotency_key.encode(), "sha256")[:8], "big") >> 1

    # -- state ---------------------------------------------------------------------------------------------------------

    @property
    def view(self) -> MeshView:
        return self._node.view

    @property
    def degraded(self) -> str:
        return self.view.degraded

    def status(self) -> dict[str, Any]:
        core = self._node.peers.core
        return status_document(
            self.view,
            mesh_id=core.durable.mesh_id,
            name=self.name,
            voters=core.committed.voters,
            epoch=core.epoch,
            version=core.committed.id.version,
            term=core.committed.id.term,
            sessions=self._node.entry.sessions(),
            waiting=self._node.gate.waiting_by_class(),
            limits=self._node.gate.limits(),
            addresses={member.node: member.address for member in self._node.peers.swim.members()},
            checkpoints=self._node.stage.kept(),
        )

    def ready(self) -> tuple[bool, str]:
        """Whether this node knows a route for every model that the mesh serves."""
        if not self._node.settled:
            return False, "the node is still coming in"
        if self._node.draining:
            return False, "the node is leaving"
        for model in self.models():
            entry = self.view.placement.of(model.id)
            if entry is None:
                return False, f"model {model.id!r} is not placed yet"
            if entry.missing:
                return False, entry.missing
            uncovered = self.view.uncovered(model)
            if uncovered:
                layers = ", ".join(f"[{start}, {end})" for start, end in uncovered)
                return False, f"layers {layers} of model {model.id!r} are not loaded at any live node yet"
        return True, ""

    def check_key(self, key: str) -> Caller | None:
        if is_admin_key(key, self._node.admin_key):
            return ADMIN
        records = self._node.keeper.content.api_keys
        found = find_api_key(records, key, time.time())
        if found is None:
            return None
        scopes: frozenset[Scope] = frozenset(record.scope for record in records if record.id == found.id)
        return Caller(found.id, scopes)

    # -- administration ------------------------------------------------------------------------------------------------

    async def token_create(self, ttl_s: float, uses: int | None) -> dict[str, Any]:
        core, me = self._node.peers.core, self._node.me
        alive = [member.address for member in self._node.peers.swim.members() if member.state == "alive"]
        seeds = tuple(dict.fromkeys((self._node.address, *alive)))
        ca = fingerprint(self._node.keeper.content.ca_certificate)
        limit = tokens.UNLIMITED if uses is None else uses
        made, kept = tokens.mint(core.durable.mesh_id, seeds, ca, time.time(), ttl_s=ttl_s, uses=limit, created_by=me)
        await self._node.keeper.edit(AddToken(kept))
        text = made.encode()
        return {
            "token": text,
            "id": kept.id,
            "expires_at": int(kept.expires_unix_s),
            "uses": uses,
            "command": f"python -m node join {text}",
        }

    async def token_list(self) -> list[dict[str, Any]]:
        now = time.time()
        return [
            {
                "id": token.id,
                "state": tokens.why_closed(token, now) or "valid",
                "expires_at": int(token.expires_unix_s),
                "uses_left": None if token.uses_left == tokens.UNLIMITED else token.uses_left,
                "created_by": self.view.name_of(token.created_by),
            }
            for token in self._node.keeper.content.tokens
        ]

    async def token_revoke(self, token_id: str) -> bool:
        return await self._edited(RevokeToken(token_id))

    async def key_create(self, scopes: frozenset[Scope], ttl_s: float | None, name: str) -> dict[str, Any]:
        expires = time.time() + ttl_s if ttl_s else None
        ordered = sorted(scopes)
        key, first = new_api_key(ordered[0], name, expires)
        records = tuple(msgspec.structs.replace(first, scope=scope) for scope in ordered)
        await self._node.keeper.edit(AddKey(records))
        return {"key": key, "id": first.id, "scopes": ordered, "expires_at": expires and int(expires), "name": name}

    async def key_list(self) -> list[dict[str, Any]]:
        listed: dict[str, dict[str, Any]] = {}
        for key in self._node.keeper.content.api_keys:
            row = listed.setdefault(
                key.id, {"id": key.id, "name": key.name, "scopes": [], "expires_at": key.expires_unix_s}
            )
            row["scopes"].append(key.scope)
        return list(listed.values())

    async def key_revoke(self, key_id: str) -> bool:
        return await self._edited(RevokeKey(key_id))

    async def model_list(self) -> list[dict[str, Any]]:
        return [
            {
                "id": model.id,
                "manifest": model.manifest,
                "layers": model.n_layers,
                "dtype": model.dtype,
                "quantize": model.quantize or None,
                "offered_by": [m.profile.name for m in self.view.members if _offers(m.profile.models, model)],
                "missing": (entry.missing or None) if (entry := self.view.placement.of(model.id)) else "not placed yet",
            }
            for model in self.models()
        ]

    async def model_add(self, path: str, name: str) -> dict[str, Any]:
        try:
            info = await self._node.offer(path, name)
        except ConfigError as error:
            raise RequestError(str(error), param="path", code="bad_model") from error
        return {"id": info.id, "layers": info.n_layers, "manifest": info.manifest}

    async def model_remove(self, model: ModelId) -> bool:
        return await self._edited(RemoveModel(model))

    async def leave(self) -> dict[str, Any]:
        self._node.begin_leave()
        return {"leaving": True}

    async def revoke(self, node: str) -> dict[str, Any]:
        found = [m for m in self.view.members if node in (m.id, m.profile.name)]
        if len(found) != 1:
            why = "is borne by several members: give the id" if found else "is no member of this mesh"
            raise RequestError(f"{node!r} {why}", param="node", code="node_not_found", status=404)
        if found[0].id == self._node.me:
            raise RequestError("a node cannot revoke itself: use leave", param="node", code="self_revoked")
        await self._node.keeper.edit(RevokeNode(found[0].id, self._node.keeper.new_gossip_key()))
        return {"revoked": found[0].id}

    async def takeover(self) -> dict[str, Any]:
        core = self._node.peers.core
        await self._node.peers.election.call(lambda core, now: core.takeover(now))
        return {"epoch": epoch_counter(core.epoch), "term": core.term}

    async def _edited(self, edit: RevokeToken | RevokeKey | RemoveModel) -> bool:
        try:
            await self._node.keeper.edit(edit)
        except RequestError as error:
            if error.status == 404:
                return False
            raise
        return True


def _offers(models: tuple[ModelInfo, ...], model: ModelInfo) -> bool:
    return any(offered.manifest == model.manifest for offered in models)
