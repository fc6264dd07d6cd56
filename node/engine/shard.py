"""A span of one model in memory, and its forward over any range of layers within it.

The model's own forward runs.  Every layer sits in a ``Slot``: slots outside the range that a forward is for let hidden
states pass, the first one of the range takes in what was received, the last one keeps what goes out.  So one loaded
span serves sessions over different parts of it, and layers can come and go between steps.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from node.engine import attention, experts, products
from node.engine.batch import Batch, Packed
from node.engine.cells import Rows, packed_order
from node.engine.direct import Direct
from node.engine.kv_cache import KvCache, Windows
from node.engine.lean import LeanLayer, lean_form
from node.engine.page_pool import PagedCache
from node.engine.paged import PagedBatch
from node.engine.pages import STEP_ROWS, LayerRoom, rounded
from node.engine.span import Absent, Layout, Part, Skipped, copy_scalars, replace_module
from node.engine.windows import window_of

CPU = torch.device("cpu")


class _Flow:
    """What the slots of one model share during a forward."""

    def __init__(self) -> None:
        self.start = self.end = 0
        self.given: torch.Tensor | None = None
        self.out: torch.Tensor | None = None
        self.tuples = False
        """Layers return tuples; learned at load."""
        self.beside: torch.Tensor | None = None
        """What the last layer returned beside its hidden states."""
        self.lean = False
        """In this forward layers with a lean form use it."""
        self.passed: list[dict[str, Any]] | None = None
        """What layers that are skipped were given by keyword, the hidden states as ``hidden_states``; if wanted."""


class Slot(nn.Module):
    """The place of layer ``index``."""

    def __init__(self, index: int, layer: nn.Module, flow: _Flow) -> None:
        super().__init__()
        copy_scalars(layer, self)
        self.index, self.layer = index, layer
        self.lean: LeanLayer | None = None
        self.flow = flow

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        flow = self.flow
        if flow.beside is not None and any(given is flow.beside for given in (*args, *kwargs.values())):
            raise LayersHandOnMore("its layers hand each other more than hidden states")
        if not flow.start <= self.index < flow.end:
            hidden = args[0] if args else kwargs["hidden_states"]
            if flow.passed is not None:
                flow.passed.append({**kwargs, "hidden_states": hidden})
            return (hidden, None) if flow.tuples else hidden
        if self.index == flow.start and flow.given is not None:
            if args:
                args = (flow.given, *args[1:])
            else:
                kwargs["hidden_states"] = flow.given
        if self.lean is not None and flow.lean:
            out = self.lean(*args, **kwargs)
            out = (out, None) if flow.tuples else out
        else:
            out = self.layer(*args, **kwargs)
        if isinstance(out, tuple) != flow.tuples:
            raise LayersReturnTuples(isinstance(out, tuple))
        more = out[1] if isinstance(out, tuple) and len(out) > 1 else None
        flow.beside = more if isinstance(more, torch.Tensor) else None
        if self.index == flow.end - 1:
            flow.out = out[0] if flow.tuples else out
        return out


def _text(config: Any) -> Any:
    return config.get_text_config(decoder=True)


def _fits(name: str, takes: set[str]) -> bool:
    """Whether a forward with these parameters is given this one; state space models alone know ``cache_params``."""
    return name in takes or ("kwargs" in takes and name != "cache_params")


def _leave_files(model: nn.Module) -> None:
    """Copy what still lies in the checkpoint's mapped files; the last copy unmaps them.

    What was packed is a copy already, and one small weight would keep a whole file mapped, and resident.
    """
    for weight in model.parameters():
        if weight.device.type != "meta":
            weight.data = weight.data.clone()


class LayersReturnTuples(Exception):
    """The layers' form of return is not the one assumed; raised at most once, in the first forward."""


class LayersHandOnMore(Exception):
    """A layer is given what the one before returned beside its hidden states: a cut between them would lose it."""


class Shard:
    """The loaded part of one model.  Not for two threads at once."""

    def __init__(self, model: Any, part: Part, form: products.Form, device: torch.device = CPU) -> None:
        """Take ``model`` as ``load_part`` gave it, to ``device``; ``form``: how its weights are laid out."""
        self.model, self.part, self.form = model, part, form
        self.layout: Layout = model._layout
        self.config = model.config
        self.device = device
        self.dtype: torch.dtype = model.dtype
        self.hidden_size: int = self.config.get_text_config(decoder=True).hidden_size
        self.masked = True
        """The compat mode passes a mask of ones; found by the self-check."""
        self.lean = True
        """Packed forwards use the lean forms that there are."""
        self.multiple = 1
        """Rows of a forward are filled up to a multiple of this: the exact mode's rule for this model."""
        self.bucketed = False
        """Or, on pages, to one of a few sizes: the exact mode's rule there."""
        self.direct: Direct | None = None
        """The packed forward of ranges that it is ready for; found by the self-check."""
        self.windows: Windows = {}
        """What all its caches know of this model's masks."""
        self._flow = _Flow()
        self._owner = model.get_submodule(self.layout.owner) if self.layout.owner else model
        self._takes = {
            target: set(inspect.signature(target.forward).parameters) for target in (self.model, self._owner)
        }
        self._embed_size: int = int(getattr(model.get_input_embeddings(), "embedding_dim", self.hidden_size))
        layers = self._layers
        for index in range(len(layers)):
            layers[index] = Slot(index, layers[index], self._flow)
        if device.type != "cpu":
            model.to(device)
        self._pack(part)
        self.least = products.least_below(model)
        """Rows of a forward at least, for each to have the same bits in any company; 0: no number would do."""
        if device.type == "cpu":  # what was moved is a copy already
            _leave_files(model)
        for index in part.layers:
            layers[index].lean = lean_form(layers[index].layer)
        self.weight_bytes = self._weigh()
        """Kept, for it is asked for four times a second and a walk over all modules takes milliseconds."""

    @property
    def _layers(self) -> nn.ModuleList:
        return self.model.get_submodule(self.layout.layers)

    @property
    def tables_by_length(self) -> list[Any]:
        """Modules of rotary embeddings that remember how long a sequence they have seen."""
        return [m for m in self.model.modules() if hasattr(m, "max_seq_len_cached") and hasattr(m, "original_inv_freq")]

    @property
    def precision(self) -> torch.dtype:
        """What rounding of activations is to be expected inside."""
        return torch.bfloat16 if self.form == "int8" else self.dtype

    def _weigh(self) -> int:
        held = {id(p): p.nbytes for p in self.model.parameters() if p.device.type != "meta"}
        packed = {id(p): p.nbytes for p in products.products_below(self.model)}
        return sum(held.values()) + sum(packed.values()) + experts.packed_bytes(self.model)

    @property
    def least_multiple(self) -> int:
        """Of how many rows forwards must be for the sake of the packed products; 0: no number would do."""
        alike = self.least and all(product.least for product in experts.products_of(self.model))
        return products.rows_below(self.model) if alike else 0

    def _pack(self, part: Part) -> None:
        for index in part.layers:
            if self.form != "plain":
                experts.pack_experts(self._layers[index], self.form)
            products.pack_module(self._layers[index], self.form)
        if self.form != "plain":
            self._pack_ends(part)

    def _pack_ends(self, part: Part) -> None:
        head = self.model.get_submodule(self.layout.head)
        packed = products.pack_linear(head, self.form) if part.head else None
        if part.embed and self.form == "int8":
            embedding = self.model.get_submodule(self.layout.embed)
            shared = packed if self.layout.tied else None
            if (small := products.pack_embedding(embedding, shared)) is not None:
                replace_module(self.model, self.layout.embed, small)
        if packed is not None:
            replace_module(self.model, self.layout.head, packed)
            if not part.embed:  # a tied embedding was loaded for the head's sake only
                replace_module(self.model, self.layout.embed, Absent())

    # -- coming and going ----------------------------------------------------------------------------------------------

    def adopt(self, other: Shard) -> None:
        """Take over what ``other``, a shard of the same model, holds.  ``other`` is of no use afterwards."""
        ours = {id(other.config): self.config, id(_text(other.config)): _text(self.config)}
        for module in other.model.modules():  # layers read off their configuration how they are run
            if id(getattr(module, "config", None)) in ours:
                module.config = ours[id(module.config)]
        for index in other.part.layers:
            self._layers[index].layer, self._layers[index].lean = other._layers[index].layer, other._layers[index].lean
        for held, name in ((other.part.embed, self.layout.embed), (other.part.head, self.layout.head)):
            if held:
                replace_module(self.model, name, other.model.get_submodule(name))
        self.part = self.part.union(other.part)
        self.direct = self.direct.joined(other.direct) if self.direct and other.direct else None
        self.multiple = math.lcm(self.multiple, other.multiple)
        self.least = max(self.least, other.least) if self.least and other.least else 0
        self.bucketed = self.bucketed or other.bucketed
        self.windows.update(other.windows)
        self.weight_bytes = self._weigh()

    def keep(self, part: Part) -> None:
        """Give up what is not in ``part``."""
        gone = self.part.minus(part)
        if not gone:
            return
        for index in gone.layers:
            slot = self._layers[index]
            slot.layer, slot.lean = Skipped(slot.layer), None
        if gone.embed:
            replace_module(self.model, self.layout.embed, Absent())
        if gone.head:
            replace_module(self.model, self.layout.head, Absent())
        self.part = self.part.minus(gone)
        if self.direct is not None:
            self.direct.forget()
        self.weight_bytes = self._weigh()

    def give_up_lean(self) -> None:
        """Run every layer as the model wrote it."""
        self.direct = None
        for slot in self._layers:
            slot.lean = None

    def lean_layers(self, start: int, end: int) -> list[LeanLayer | None]:
        return [self._layers[index].lean for index in range(start, end)]

    # -- how keys and values are held: extents on the CPU, pages elsewhere ---------------------------------------------

    @property
    def paged(self) -> bool:
        return self.device.type != "cpu"

    def cache(self, budget: int = 0, step_rows: int = STEP_ROWS) -> KvCache | PagedCache:
        """Room for keys and values; ``budget``: bytes past which pages are taken one by one; ``step_rows``: of one
        sequence in a step at most."""
        return PagedCache(budget, self.windows) if self.paged else KvCache(self.windows, step_rows)

    def learn_windows(self, batch: Packed) -> None:
        """From the masks that ``batch`` was given; batches over pages learn by themselves."""
        if isinstance(batch, Batch):
            known = {id(rule): window_of(rule, self.device) for rule in batch.rules.values()}
            self.windows.update({layer: known[id(rule)] for layer, rule in batch.rules.items()})

    def room_of(self, layer: int, size: int) -> LayerRoom:
        """What ``layer`` takes of a sequence, at ``size`` bytes a position; pages are held of all positions."""
        before = None if self.paged else self.windows.get(layer)
        return LayerRoom(size, 0 if before is None else before + 1)

    def order(self, rows: Sequence[Rows]) -> list[int]:
        """The order in which ``batch`` wants its rows: indices into ``rows``."""
        return list(range(len(rows))) if self.paged else packed_order(rows)

    def batch(self, rows: Sequence[Rows]) -> Packed:
        """One forward over ``rows``, which are in ``order``."""
        padded = self.filled(sum(r.n for r in rows))
        if not self.paged:
            return Batch(rows, self.device, padded)
        return PagedBatch.of(rows[0].place.pool, rows, self.device, padded)

    def filled(self, count: int) -> int:
        """Rows of a forward of ``count``."""
        return self._whole(rounded(count) if self.bucketed else count)

    def _whole(self, count: int) -> int:
        return -(-max(count, self.least) // self.multiple) * self.multiple

    # -- forward -------------------------------------------------------------------------------------------------------

    def use(self, attention_name: str) -> None:
        """Which attention the layers call: the packed one or one of transformers' own."""
        self.config._attn_implementation = attention_name
        self.config._experts_implementation = experts.EXPERTS

    @torch.inference_mode()
    def packed(
        self, start: int, end: int, given: torch.Tensor, batch: Packed, rows: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Layers [start, end) over the rows of ``batch``.

        ``given``: token ids [T] for start 0, else hidden states [T, H].  ``rows``: of which rows logits are wanted (end
        is the last layer).  Returns hidden states [T, H] and logits [len(rows), V].
        """
        extra = batch.padded_count - batch.count
        if extra:
            given = torch.cat([given, given[-1:].expand(extra, *given.shape[1:])])
        wanted = 0 if rows is None else len(rows)
        if rows is not None and wanted:
            rows = torch.cat([rows, rows[-1:].expand(self._whole(wanted) - wanted)])
        with attention.running(batch):
            if isinstance(batch, Batch) and self.direct is not None and self.direct.ready(start, end, rows is not None):
                hidden, logits = self.direct(start, end, given, batch, rows)
            else:
                hidden, logits = self._ordinary(start, end, given, batch.positions, rows)
        return hidden[: batch.count], None if logits is None else logits[:wanted]

    def _ordinary(
        self, start: int, end: int, given: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """A packed forward that is the model's own around the layers."""
        self._flow.lean = self.lean
        try:
            hidden, logits = self.run(start, end, given[None], self._packed_options(positions), rows)
        finally:
            self._flow.lean = False
        return hidden[0], logits

    def _packed_options(self, positions: torch.Tensor) -> dict[str, Any]:
        ones = torch.ones(1, len(positions), dtype=torch.bool, device=self.device)
        return {"position_ids": positions[None], "attention_mask": ones, "use_cache": False}

    @torch.inference_mode()
    def around(self, positions: torch.Tensor, given: torch.Tensor) -> list[dict[str, Any]]:
        """What the model gives each of its layers by keyword, and as ``hidden_states`` [1, T, H], if all are skipped.

        ``given``: at ``positions`` [T], token ids [T] or hidden states [T, H].
        """
        at = 0 if given.ndim == 1 else 1
        self._flow.passed = passed = []
        try:
            self._call(at, at, given[None], self._packed_options(positions), None)
        finally:
            self._flow.passed = None
        return passed

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """The embeddings [T, H] of ``ids`` [T], as they are stored."""
        return self.model.get_submodule(self.layout.embed)(ids)  # type: ignore[no-any-return]

    def logits(self, hidden: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Norm and head over ``rows`` of ``hidden`` [T, H]: [len(rows), V]."""
        return self.model.get_submodule(self.layout.head)(self._owner.norm(hidden[rows][None]))[0]  # type: ignore[no-any-return]

    def run(
        self, start: int, end: int, given: torch.Tensor, options: dict[str, Any], rows: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The model's own forward.  ``given`` [1, T] ids or [1, T, H] -> hidden [1, T, H], logits of ``rows``.

        The one door to the device: what is given may lie on the CPU, what is returned lies on the device.
        """
        rows = self._moved(rows)
        answer = self._call(start, end, given, options, rows)
        out, self._flow.out = self._flow.out, None
        assert out is not None, "no layer ran"
        if rows is None:
            return out, None
        logits = answer.logits[0]
        return out, logits if "logits_to_keep" in self._takes[self.model] else logits[rows]

    def _call(
        self, start: int, end: int, given: torch.Tensor, options: dict[str, Any], rows: torch.Tensor | None
    ) -> Any:
        flow, given = self._flow, self._moved(given)
        flow.start, flow.end, flow.out, flow.beside = start, end, None, None
        target = self.model if rows is not None else self._owner
        takes = self._takes[target]
        options = {name: self._moved(value) for name, value in options.items() if _fits(name, takes)}
        if rows is not None and "logits_to_keep" in takes:
            options["logits_to_keep"] = rows
        if start == 0:
            flow.given = None
            options["input_ids"] = given
        else:
            flow.given = given
            fits = given.shape[-1] == self._embed_size
            options["inputs_embeds"] = given if fits else given.new_zeros(*given.shape[:2], self._embed_size)
        try:
            return target(**options)
        finally:
            flow.given = flow.beside = None

    def _moved(self, value: Any) -> Any:
        """A tensor on the device; anything else as it is.  Pinned memory is left without waiting for the copy."""
        return value.to(self.device, non_blocking=True) if isinstance(value, torch.Tensor) else value

    def learn_form(self, start: int) -> None:
        """One forward of two rows through layer ``start``, to learn whether layers return tuples."""
        given = (
            torch.zeros(1, 2, dtype=torch.long) if start == 0 else torch.zeros(1, 2, self.hidden_size, dtype=self.dtype)
        )
        options = {"position_ids": torch.arange(2)[None], "attention_mask": torch.ones(1, 2), "use_cache": False}
        for tuples in (False, True):
            self._flow.tuples = tuples
            try:
                with torch.inference_mode():
                    self.run(start, start + 1, given, options, None)
                return
            except Exception as error:
                # A model whose layers return tuples may fail in many ways before the first layer is even reached.
                if tuples:
                    raise error
