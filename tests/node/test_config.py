"""Where a setting comes from, and the one line that says what is wrong with it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest

from mesh.errors import ConfigError
from node import config
from node.config import SETTINGS, ModelOffer, NodeConfig, load


def parsed(*words: str) -> dict[str, Any]:
    parser = argparse.ArgumentParser()
    config.add_flags(parser)
    return vars(parser.parse_args(words))


def toml(folder: Path, text: str) -> Path:
    path = folder / "node.toml"
    path.write_text(text)
    return path


def refused(flags: dict[str, Any], environment: dict[str, str] | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load(flags, environment or {})
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_defaults() -> None:
    given = load({}, {"XDG_DATA_HOME": "/data"})
    assert given == NodeConfig(data_dir=Path("/data/murmur"))
    assert load({}, {}).data_dir == Path.home() / ".local" / "share" / "murmur"


GIVEN: dict[str, tuple[str, Any]] = {
    "model": ("/models/a=b", (ModelOffer("/models/a", "b"),)),
    "listen": ("10.0.0.1:1", "10.0.0.1:1"),
    "api": ("[::1]:2", "[::1]:2"),
    "data_dir": ("/d", Path("/d")),
    "name": ("ann", "ann"),
    "device": ("cuda:1", "cuda:1"),
    "memory": ("2GiB", 2 << 30),
    "weight_memory": ("1GiB", 1 << 30),
    "threads": ("3", 3),
    "dtype": ("bfloat16", "bfloat16"),
    "quantize": ("int8", "int8"),
    "role": ("witness", "witness"),
    "log_format": ("json", "json"),
    "advertise": ("h:3", "h:3"),
    "api_advertise": ("http://h:4", "http://h:4"),
    "api_tls": ("cert.pem,key.pem", "cert.pem,key.pem"),
    "exact": ("off", "off"),
    "checkpoint_memory": ("1MiB", 1 << 20),
    "checkpoint_disk": ("0", 0),
    "balance": ("memory", "memory"),
    "max_sessions": ("5", 5),
    "max_queue": ("0", 0),
    "class_queue": ("batch=7", (("batch", 7),)),
    "preset": ("wan", "wan"),
}


def test_every_field_is_a_setting() -> None:
    assert {row.field for row in SETTINGS} == set(NodeConfig.__struct_fields__) - {"token"} == set(GIVEN)


@pytest.mark.parametrize("field", GIVEN)
def test_each_setting_by_flag_environment_and_file(field: str, tmp_path: Path) -> None:
    text, value = GIVEN[field]
    extra = {"memory": str(8 << 30)} if field == "weight_memory" else {}
    by_flag = load({**parsed("--" + field.replace("_", "-"), text), **extra}, {})
    by_environment = load(extra, {f"MESH_{field.upper()}": text})
    by_file = load({"config": str(toml(tmp_path, f'{field} = "{text}"')), **extra}, {})
    assert getattr(by_flag, field) == getattr(by_environment, field) == getattr(by_file, field) == value
    assert value != getattr(NodeConfig(), field)


@pytest.mark.parametrize(
    ("flag", "environment", "file", "threads"),
    [
        ("1", "2", "3", 1),
        (None, "2", "3", 2),
        (None, None, "3", 3),
        (None, "", "3", 3),
        ("", "2", "3", 2),
        (None, None, None, 0),
    ],
)
def test_precedence(flag: str | None, environment: str | None, file: str | None, threads: int, tmp_path: Path) -> None:
    flags: dict[str, Any] = {"threads": flag}
    if file is not None:
        flags["config"] = str(toml(tmp_path, f"threads = {file}"))
    given = {"MESH_THREADS": environment} if environment is not None else {}
    assert load(flags, given).threads == threads


def test_the_file_may_be_named_in_the_environment_and_a_flag_wins(tmp_path: Path) -> None:
    one = toml(tmp_path, "threads = 1")
    two = tmp_path / "two.toml"
    two.write_text("threads = 2")
    assert load({}, {"MESH_CONFIG": str(one)}).threads == 1
    assert load({"config": str(two)}, {"MESH_CONFIG": str(one)}).threads == 2


def test_a_source_that_is_overruled_is_not_even_read_for_errors(tmp_path: Path) -> None:
    assert load({"threads": "2"}, {"MESH_THREADS": "many"}).threads == 2


def test_models_add_up_within_a_source_only(tmp_path: Path) -> None:
    file = toml(tmp_path, 'model = ["/a", "/b=c"]')
    assert [offer.name for offer in load({"config": str(file)}, {}).model] == ["a", "c"]
    assert [offer.name for offer in load({"config": str(file)}, {"MESH_MODEL": "/x,/y"}).model] == ["x", "y"]
    assert [offer.name for offer in load(parsed("--model", "/m", "--model", "/n,/o"), {}).model] == ["m", "o"]


def test_the_token_is_no_setting() -> None:
    assert load({"token": "mesh1.x"}, {"MESH_TOKEN": "mesh1.y"}).token == "mesh1.x"


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("512", 512), ("1.5 KiB", 1536), ("12GiB", 12 << 30), ("12gib", 12 << 30), ("2TB", 2 * 10**12),
     ("3MB", 3_000_000), ("7b", 7), (" 1MiB ", 1 << 20)],
)  # fmt: skip
def test_sizes(text: str, size: int) -> None:
    assert config.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1", "12Gx", "1,5GiB", "1.GiB", "1e3", "12 GiB more"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(ValueError, match="512MiB"):
        config.parse_size(text)


@pytest.mark.parametrize(
    ("text", "address"),
    [("h:1", "h:1"), (":9", "0.0.0.0:9"), ("[::1]:0", "[::1]:0"), ("127.0.0.1:065", "127.0.0.1:65")],
)
def test_addresses(text: str, address: str) -> None:
    assert config.parse_address(text) == address


@pytest.mark.parametrize("text", ["h", "h:", "h:x", "h:-1", "h:65536", "9400"])
def test_no_addresses(text: str) -> None:
    with pytest.raises(ValueError, match="HOST:PORT"):
        config.parse_address(text)


@pytest.mark.parametrize(
    ("text", "source", "name"),
    [
        ("/models/llama", "/models/llama", "llama"),
        ("/models/llama/", "/models/llama/", "llama"),
        ("org/name", "org/name", "name"),
        ("org/name=my/model", "org/name", "my/model"),
        ("/odd=folder=x", "/odd=folder", "x"),
        (".", ".", Path.cwd().name),
        ("./", "./", Path.cwd().name),
        ("..", "..", ".."),
    ],
)
def test_offers(text: str, source: str, name: str) -> None:
    assert config.parse_offer(text) == ModelOffer(source, name)


@pytest.mark.parametrize("text", ["", "=x", "/a=", "=", "/"])
def test_no_offers(text: str) -> None:
    with pytest.raises(ValueError, match="=NAME"):
        config.parse_offer(text)


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ({"threads": "0"}, "--threads: '0' must be a whole number of at least 1"),
        ({"threads": "-1"}, "--threads: '-1' must be a whole number of at least 1"),
        ({"max_queue": "1.5"}, "--max-queue: '1.5' must be a whole number of at least 0"),
        (
            {"class_queue": ["bulk=7"]},
            "--class-queue: ['bulk=7'] must be CLASS=N, with CLASS one of interactive, normal, batch",
        ),
        ({"role": "boss"}, "--role: 'boss' must be one of any, stage, entry, witness"),
        ({"device": "gpu"}, "--device: 'gpu' must be auto, cpu, cuda or cuda:N, one device a node"),
        ({"device": "cuda:0,cuda:1"}, "--device: 'cuda:0,cuda:1' must be auto, cpu, cuda or cuda:N, one device a node"),
        ({"name": "a b"}, "--name: 'a b' must be 1 to 63 letters, digits, dots, dashes or underscores"),
        ({"name": "-a"}, "--name: '-a' must be 1 to 63 letters, digits, dots, dashes or underscores"),
        ({"memory": "12Gx"}, "--memory: '12Gx' must be a size such as 512MiB or 12GiB"),
        ({"listen": "h"}, "--listen: 'h' must be HOST:PORT, with a port of 0 to 65535"),
        ({"memory": "1", "weight_memory": "2"}, "--weight-memory (2) is more than --memory (1)"),
        ({"api_tls": "cert.pem"}, "--api-tls: 'cert.pem' must be off, auto or CERT,KEY"),
        ({"api_tls": "a,b,c"}, "--api-tls: 'a,b,c' must be off, auto or CERT,KEY"),
        (
            {"model": ["/a/x", "/b/x"]},
            "--model: two models are named 'x'; give one of them another name with =NAME",
        ),
        (
            {"listen": ":9400"},
            "--listen 0.0.0.0:9400 is every address: say with --advertise which one peers shall dial",
        ),
        (
            {"listen": "[::]:9400"},
            "--listen [::]:9400 is every address: say with --advertise which one peers shall dial",
        ),
        ({"config": "/no/such.toml"}, "--config /no/such.toml: No such file or directory"),
    ],
)
def test_errors_name_the_flag(flags: dict[str, Any], line: str) -> None:
    assert refused(flags) == line


def test_every_address_may_be_listened_on_where_one_is_advertised() -> None:
    assert load({"listen": ":9400", "advertise": "h:9400"}, {}).listen == "0.0.0.0:9400"


def test_errors_name_the_environment() -> None:
    assert refused({}, {"MESH_ROLE": "boss"}).startswith("MESH_ROLE: 'boss' must be one of")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("role = 'boss'", "role in {file}: 'boss' must be one of"),
        ("threads = true", "threads in {file}: True must be a whole number"),
        ("threads = 0", "threads in {file}: 0 must be a whole number of at least 1"),
        ("model = ['/a=']", "model in {file}: ['/a='] must be PATH or HUB_ID"),
        ("colour = 'red'\nbreadth = 1", "--config {file}: unknown setting 'breadth'"),
        ("token = 'mesh1.x'", "--config {file}: unknown setting 'token'"),
        ("[join]\nname = 'x'", "--config {file}: unknown setting 'join'"),
        ("name = ", "--config {file} is not TOML: "),
    ],
)
def test_errors_name_the_file(text: str, says: str, tmp_path: Path) -> None:
    file = toml(tmp_path, text)
    assert refused({"config": str(file)}).startswith(says.format(file=file))


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "node.toml"
    path.write_bytes(b"\xff\xfe")
    assert "is not TOML" in refused({"config": str(path)})
    assert "Is a directory" in refused({"config": str(tmp_path)})


def test_help_says_every_default_that_is_one(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parsed("--help")
    text = " ".join(capsys.readouterr().out.split())
    for field, value in {
        "listen": "127.0.0.1:9400",
        "api": "127.0.0.1:9000",
        "max_sessions": "64",
        "max_queue": "256",
    }.items():
        assert str(getattr(NodeConfig(), field)) == value
        assert f"[{value}]" in text


@pytest.mark.parametrize("text", ["int4", "nf4", "int7"])
def test_forms_of_weights_that_no_kernel_here_reads_are_refused(text: str) -> None:
    assert "int8" in refused({"quantize": text})
