"""Loads a part of any causal LM: some layers, with or without the embedding and the head.  No per-model code.

The Hugging Face class is built whole on the meta device (no memory), pruned to the part, and filled by the ordinary
``from_pretrained``, so that every renaming and fusing of checkpoints that transformers knows applies here too.  What
was pruned is never read from disk: files may be sparse, with only the part's tensors filled in.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import nn

from mesh.errors import ConfigError
from node.lazy import transformers

ONE_AT_A_TIME = threading.RLock()
"""transformers builds and loads models through process-wide settings (default dtype and device, patched initialisers,
tied names): a model that is checked before it is offered and a span that is loaded meanwhile spoil each other."""


class Part(msgspec.Struct, frozen=True):
    """What of a model is (to be) in memory."""

    layers: tuple[int, ...]
    embed: bool = False
    head: bool = False

    @staticmethod
    def of_span(start: int, end: int, n_layers: int) -> Part:
        return Part(tuple(range(start, end)), embed=start == 0, head=end == n_layers)

    def minus(self, other: Part) -> Part:
        """What of this is not in ``other``."""
        layers = tuple(i for i in self.layers if i not in other.layers)
        return Part(layers, self.embed and not other.embed, self.head and not other.head)

    def union(self, other: Part) -> Part:
        layers = tuple(sorted({*self.layers, *other.layers}))
        return Part(layers, self.embed or other.embed, self.head or other.head)

    def __bool__(self) -> bool:
        return bool(self.layers or self.embed or self.head)


class Layout(msgspec.Struct, frozen=True):
    """Where a model keeps its layers, embedding and head: names of modules."""

    layers: str
    n_layers: int
    embed: str
    head: str
    """Empty: the model has none (then it cannot be served)."""
    tied: bool
    """The head's weight is the embedding's."""

    @property
    def owner(self) -> str:
        """The module whose forward runs the layers."""
        return self.layers.rpartition(".")[0]


class Absent(nn.Module):
    """Stands where an embedding or a head is not held."""

    def forward(self, *_args: Any, **_kwargs: Any) -> torch.Tensor:
        raise AssertionError("this embedding or head is not in memory")


class Skipped(nn.Module):
    """Stands where a layer is not held; keeps the plain attributes that models read off their layers."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        copy_scalars(layer, self)


def copy_scalars(source: nn.Module, target: nn.Module) -> None:
    """Attributes such as ``attention_type`` and ``layer_idx``."""
    for name, value in vars(source).items():
        if isinstance(value, int | str | float) and name != "training":
            setattr(target, name, value)


def read_config(folder: Path) -> Any:
    """The model's configuration.  Raises ``ConfigError`` naming what is wrong with it."""
    _quiet()
    try:
        config = transformers().AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{Path(folder).name}: config.json: {str(error).splitlines()[0]}") from error
    for each in (config, config.get_text_config(decoder=True)):
        stored = getattr(each, "quantization_config", None)
        if isinstance(stored, dict):  # weights are widened when they are loaded: the products here know plain ones
            each.quantization_config = {**stored, "dequantize": True}
    return config


def model_class(config: Any) -> type:
    """The causal LM class of ``config``.  Raises ``ConfigError`` naming the kind that has none."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ConfigError(f"{config.model_type}: not a causal language model that transformers knows")
    return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]


def layout_of(model: Any) -> Layout:
    """Find layers, embedding and head of a model built in full.  Raises ``ConfigError`` where there are none."""
    kind, n_layers = model.config.model_type, model.config.get_text_config(decoder=True).num_hidden_layers
    names = {module: name for name, module in model.named_modules(remove_duplicate=False)}
    lists = [name for name, module in model.named_modules() if _is_layer_list(module, n_layers)]
    head = model.get_output_embeddings()
    if not lists or head is None:
        raise ConfigError(f"{kind}: no list of {n_layers} layers with a head behind it")
    tied = any(target.startswith(f"{names[head]}.") for target in _tied(model))
    return Layout(lists[0], n_layers, names[model.get_input_embeddings()], names[head], tied)


def _is_layer_list(module: nn.Module, n_layers: int) -> bool:
    if not isinstance(module, nn.ModuleList) or len(module) != n_layers or not n_layers:
        return False
    return not isinstance(module[0], nn.ModuleList) and sum(1 for _ in module[0].parameters()) >= 3


def _tied(model: Any) -> dict[str, str]:
    """Parameters that are other parameters: {target: source}."""
    return dict(getattr(model, "all_tied_weights_keys", None) or {})


def _prune(model: Any, part: Part) -> None:
    """Reduce a model built in full to ``part``.  Norms, rotary tables and the like are small and stay."""
    layout = layout_of(model)
    layers = model.get_submodule(layout.layers)
    for index in range(layout.n_layers):
        if index not in part.layers:
            layers[index] = Skipped(layers[index])
    keeps_tie = part.head and layout.tied
    if not part.embed and not keeps_tie:
        replace_module(model, layout.embed, Absent())
    if not part.head:
        replace_module(model, layout.head, Absent())
        model.all_tied_weights_keys = {
            target: source for target, source in _tied(model).items() if not target.startswith(f"{layout.head}.")
        }
    model._layout = layout


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put ``module`` where ``name`` is."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def _pruned_class(cls: type, part: Part) -> type:
    """``cls`` whose instances hold only ``part``.

    It keeps name and module: transformers looks up weight conversions (fused experts and the like) by them.
    """

    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        cls.__init__(self, config, *args, **kwargs)  # type: ignore[misc]
        _prune(self, part)

    body = {"__init__": __init__, "__module__": cls.__module__, "_keys_to_ignore_on_load_unexpected": [".*"]}
    return type(cls.__name__, (cls,), body)


def load_part(folder: Path, config: Any, part: Part, dtype: torch.dtype) -> Any:
    """A model that holds ``part`` of the checkpoint in ``folder``, with ``_layout``; in eval mode, on the CPU.

    Raises ``ConfigError`` when the files lack a tensor of it or transformers cannot build it.
    """
    _quiet()
    cls = _pruned_class(model_class(config), part)
    try:
        model, info = cls.from_pretrained(  # type: ignore[attr-defined]
            folder,
            config=config,
            dtype=dtype,
            attn_implementation="eager",
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, ImportError, NotImplementedError) as error:
        raise ConfigError(f"{config.model_type}: {_first_line(error)}") from error
    missing = sorted(info["missing_keys"]) + [f"{name} (another shape)" for name, *_ in info["mismatched_keys"]]
    if missing:
        raise ConfigError(f"{config.model_type}: the checkpoint has no {', '.join(missing[:3])}")
    return model.eval().requires_grad_(False)


def needed_tensors(folder: Path, names: Iterable[str], start: int, end: int) -> list[str]:
    """Which of the checkpoint's tensor ``names`` layers [start, end) need; only config.json is read.

    By transformers' own renaming rules.  Raises ``ConfigError`` for a model that cannot be cut into spans.
    """
    with ONE_AT_A_TIME:
        config = read_config(folder)
        try:
            known, rename = _known_names(config, start, end)
        except ConfigError:
            raise
        except Exception as error:  # a model's code is its authors': whatever it raises, it cannot be built in part
            raise ConfigError(f"{config.model_type}: cannot be cut into spans: {_first_line(error)}") from error
    return [name for name in names if rename(name) in known]


def _known_names(config: Any, start: int, end: int) -> tuple[dict[str, Any], Callable[[str], str]]:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
    from transformers.quantizers.auto import get_hf_quantizer

    n_layers = config.get_text_config(decoder=True).num_hidden_layers
    cls = _pruned_class(model_class(config), Part.of_span(start, end, n_layers))
    with torch.device("meta"):
        model = cls(config)
    state = model.state_dict()
    quantizer, *_ = get_hf_quantizer(config, None, None, True, {})
    rules: Sequence[Any] = get_model_conversion_mapping(model, hf_quantizer=quantizer)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]

    def rename(name: str) -> str:
        return rename_source_key(name, renamings, converters, model.base_model_prefix, state)[0]

    return state, rename


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__


def _quiet() -> None:
    """transformers talks on stderr; what matters is raised."""
    transformers().utils.logging.disable_progress_bar()
    transformers().logging.set_verbosity(logging.CRITICAL)
