"""What a node is told: defaults < TOML file < environment (``MESH_*``) < flags; read once, frozen.

One table, ``SETTINGS``, makes the flags, the environment names, the file's keys and the errors.
"""

from __future__ import annotations

import argparse
import os
import re
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import msgspec

from mesh.errors import ConfigError
from mesh.types import PRIORITIES, Priority, Role

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Exact = Literal["auto", "on", "off"]
Quantize = Literal["none", "int8"]
BALANCE = ("latency", "round_robin", "least_connections", "weighted", "memory", "prefix_affinity")


class ModelOffer(msgspec.Struct, frozen=True):
    """``PATH|HUB_ID[=NAME]``: where the files are, and the name that the model is served under."""

    source: str
    name: str


class NodeConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Everything a node is told; the help texts in ``SETTINGS`` say units."""

    token: str = ""
    model: tuple[ModelOffer, ...] = ()
    listen: str = "127.0.0.1:9400"
    api: str = "127.0.0.1:9000"
    data_dir: Path = Path()
    name: str = ""
    device: str = "auto"
    memory: int = 0
    weight_memory: int = 0
    threads: int = 0
    dtype: Dtype = "auto"
    quantize: Quantize = "none"
    role: Role = "any"
    log_format: Literal["text", "json"] = "text"
    advertise: str = ""
    api_advertise: str = ""
    api_tls: str = "off"
    exact: Exact = "auto"
    checkpoint_memory: int = 1 << 30
    checkpoint_disk: int = 4 << 30
    balance: str = "latency"
    max_sessions: int = 64
    max_queue: int = 256
    class_queue: tuple[tuple[Priority, int], ...] = ()
    preset: Literal["auto", "loopback", "lan", "wan"] = "auto"


# -- one value each: text -> value, or ValueError saying what it must be -----------------------------------------------

_UNITS = {"": 1, "B": 1, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}
_UNITS |= {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def parse_size(text: str) -> int:
    """``12GiB`` -> bytes."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].upper() not in _UNITS:
        raise ValueError("must be a size such as 512MiB or 12GiB")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def parse_address(text: str) -> str:
    """``HOST:PORT``, ``[V6]:PORT`` or ``:PORT``."""
    host, colon, port = text.rpartition(":")
    if not colon or not port.isdigit() or int(port) > 65535:
        raise ValueError("must be HOST:PORT, with a port of 0 to 65535")
    return f"{host or '0.0.0.0'}:{int(port)}"


def parse_offer(text: str) -> ModelOffer:
    source, equals, name = text.rpartition("=") if "=" in text else (text, "", "")
    name = name or ("" if equals else Path(source).name or Path(source).resolve().name)
    if not source or not name:
        raise ValueError("must be PATH or HUB_ID, with =NAME after it if the name is to differ")
    return ModelOffer(source, name)


def _count(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isdigit() or int(text) < least:
            raise ValueError(f"must be a whole number of at least {least}")
        return int(text)

    return parse


def parse_class_queue(text: str) -> tuple[Priority, int]:
    name, _, count = text.partition("=")
    for priority in PRIORITIES:
        if name == priority and count.isdigit():
            return priority, int(count)
    raise ValueError(f"must be CLASS=N, with CLASS one of {', '.join(PRIORITIES)}")


def _one_of(*values: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in values:
            raise ValueError(f"must be one of {', '.join(values)}")
        return text

    return parse


def _quantize(text: str) -> str:
    if text in ("int4", "nf4", "fp4", "4bit"):
        raise ValueError("is not served by this version; int8 works on every CPU")
    return _one_of(*get_args(Quantize))(text)


def _device(text: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", text):
        raise ValueError("must be auto, cpu, cuda or cuda:N, one device a node")
    return text


def _folder(text: str) -> Path:
    return Path(text).expanduser()


def _name(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", text):
        raise ValueError("must be 1 to 63 letters, digits, dots, dashes or underscores")
    return text


class Setting(msgspec.Struct, frozen=True):
    """One row: the field, how a text becomes its value, and what --help says."""

    field: str
    parse: Callable[[str], Any]
    help: str
    metavar: str = ""
    many: bool = False

    @property
    def flag(self) -> str:
        return "--" + self.field.replace("_", "-")


SETTINGS = (
    Setting("model", parse_offer, "offer this model (may be repeated)", "PATH|HUB_ID[=NAME]", many=True),
    Setting("listen", parse_address, "peer door: TCP and UDP [127.0.0.1:9400]", "HOST:PORT"),
    Setting("api", parse_address, "public HTTP API [127.0.0.1:9000]", "HOST:PORT"),
    Setting("data_dir", _folder, "identity, state and cached weights [~/.local/share/murmur]", "DIR"),
    Setting("name", _name, "shown in status [host name]", "NAME"),
    Setting("device", _device, "where layers are computed [auto]", "auto|cpu|cuda|cuda:N"),
    Setting("memory", parse_size, "for weights, keys and values [60 % of what is free]", "SIZE"),
    Setting("weight_memory", parse_size, "how much of it weights may take [70 % of --memory]", "SIZE"),
    Setting("threads", _count(1), "compute threads [this node's share of the cores]", "N"),
    Setting("dtype", _one_of(*get_args(Dtype)), "of weights and activations [auto]", "auto|float32|bfloat16|float16"),
    Setting("quantize", _quantize, "hold the weights of models offered here in 8 bits [none]", "none|int8"),
    Setting("role", _one_of(*get_args(Role)), "what this node does [any]", "any|stage|entry|witness"),
    Setting("log_format", _one_of("text", "json"), "[text]", "text|json"),
    Setting("advertise", parse_address, "peer door as others reach it [--listen]", "HOST:PORT"),
    Setting("api_advertise", str, "API as clients reach it [--api]", "URL"),
    Setting("api_tls", str, "off, auto (the mesh's CA), or a certificate and key [off]", "auto|off|CERT,KEY"),
    Setting("exact", _one_of(*get_args(Exact)), "kernels that replay to the same bits [auto]", "auto|on|off"),
    Setting("checkpoint_memory", parse_size, "for checkpointed activations; 0: keep none [1GiB]", "SIZE"),
    Setting("checkpoint_disk", parse_size, "for those that memory has no room for; 0: none [4GiB]", "SIZE"),
    Setting("balance", _one_of(*BALANCE), "how routes are chosen [latency]", "POLICY"),
    Setting("max_sessions", _count(1), "streams at once through this entry [64]", "N"),
    Setting("max_queue", _count(0), "requests that may wait; beyond: 429 [256]", "N"),
    Setting(
        "class_queue", parse_class_queue, "of them of one class (may be repeated) [--max-queue]", "CLASS=N", many=True
    ),
    Setting("preset", _one_of("auto", "loopback", "lan", "wan"), "timing of gossip and election [auto]", "PRESET"),
)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """One flag for each setting, and ``--config``."""
    for row in SETTINGS:
        action = {"action": "append"} if row.many else {}
        parser.add_argument(row.flag, metavar=row.metavar, help=row.help.replace("%", "%%"), **action)  # type: ignore[arg-type]
    parser.add_argument("--config", metavar="FILE.toml", help="settings by the flags' names, with underscores")


def load(flags: Mapping[str, Any], environment: Mapping[str, str] = os.environ) -> NodeConfig:
    """Merge the sources.  Raises ``ConfigError``, one line, naming the setting and where it was given."""
    values: dict[str, Any] = {}
    file = flags.get("config") or environment.get("MESH_CONFIG")
    texts = _read_file(Path(file)) if file else {}
    for row in SETTINGS:
        name = f"MESH_{row.field.upper()}"
        for text, where in (
            (flags.get(row.field), row.flag),
            (environment.get(name), name),
            (texts.get(row.field), f"{row.field} in {file}"),
        ):
            if text is not None and text != "":
                values[row.field] = _value(row, text, where)
                break
    config = NodeConfig(token=flags.get("token") or environment.get("MESH_TOKEN") or "", **values)
    if not values.get("data_dir"):
        config = msgspec.structs.replace(config, data_dir=default_data_dir(environment))
    _check_together(config)
    return config


def default_data_dir(environment: Mapping[str, str] = os.environ) -> Path:
    if environment.get("MESH_DATA_DIR"):
        return _folder(environment["MESH_DATA_DIR"])
    base = environment.get("XDG_DATA_HOME") or str(Path.home() / ".local" / "share")
    return Path(base) / "murmur"


def _value(row: Setting, text: Any, where: str) -> Any:
    try:
        if row.many:
            texts = text if isinstance(text, list) else str(text).split(",")
            return tuple(row.parse(str(item)) for item in texts)
        return row.parse(str(text))
    except ValueError as error:
        raise ConfigError(f"{where}: {text!r} {error}") from None


def _read_file(path: Path) -> dict[str, Any]:
    try:
        values = tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path} is not TOML: {error}") from None
    unknown = sorted(set(values) - {row.field for row in SETTINGS})
    if unknown:
        raise ConfigError(f"--config {path}: unknown setting {unknown[0]!r}")
    return values


_EVERYWHERE = ("0.0.0.0", "[::]", "::", "")


def _check_together(config: NodeConfig) -> None:
    if config.memory and config.weight_memory > config.memory:
        raise ConfigError(f"--weight-memory ({config.weight_memory}) is more than --memory ({config.memory})")
    if config.api_tls not in ("off", "auto") and config.api_tls.count(",") != 1:
        raise ConfigError(f"--api-tls: {config.api_tls!r} must be off, auto or CERT,KEY")
    names = [offer.name for offer in config.model]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise ConfigError(f"--model: two models are named {twice!r}; give one of them another name with =NAME")
    if config.api.rpartition(":")[0] in _EVERYWHERE and not config.api_advertise:
        raise ConfigError(f"--api {config.api} is every address: say with --api-advertise URL how clients reach it")
    host = config.listen.rpartition(":")[0]
    if host in _EVERYWHERE and not config.advertise:
        raise ConfigError(f"--listen {config.listen} is every address: say with --advertise which one peers shall dial")
