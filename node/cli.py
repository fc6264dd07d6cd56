"""The command line.  Light on purpose: only ``join`` imports what a node needs, when it starts.

Exit status: 0 done, 1 the node or the mesh refused or failed, 2 a setting or argument is wrong.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mesh.errors import ConfigError
from node import config as settings
from node.ask import Asker, NodeRefused

TAKEN_OVER_HERE = (
    "this node coordinates, alone until others may vote; nodes of the old epoch follow it when they meet it, and what "
    "they decided without it is dropped"
)


def main(argv: Sequence[str]) -> int:
    """Parse, run, and turn every expected failure into one line."""
    parser = make_parser()
    arguments = parser.parse_args(argv)
    try:
        return int(arguments.act(arguments))
    except ConfigError as error:
        print(f"node: {error}", file=sys.stderr)
        return 2
    except NodeRefused as error:
        print(f"node: {error}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, BrokenPipeError):
        return 130


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m node", description="One node of a Murmur mesh.")
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    join = verbs.add_parser("join", help="run a node: found a mesh, or join one with a TOKEN")
    join.add_argument(
        "token", nargs="?", metavar="TOKEN", help="from another node, or in MESH_TOKEN; without it a mesh is founded"
    )
    settings.add_flags(join)
    join.set_defaults(act=act_join)

    status = _asking(verbs, "status", "members, coordinator, placement, survivability, load, sessions", act_status)
    status.add_argument("--json", action="store_true", help="the whole document")
    status.add_argument("--watch", action="store_true", help="again every 2 s")

    _asking(verbs, "leave", "drain, hand over, leave", act_leave)
    _asking(verbs, "takeover", "start a new epoch: the missing voters are gone for good", act_takeover)
    revoke = _asking(verbs, "revoke", "shut a node out for good", act_revoke)
    revoke.add_argument("node", metavar="NODE", help="its name or id")

    tokens = verbs.add_parser("token", help="join tokens").add_subparsers(required=True, metavar="create|list|revoke")
    create = _asking(tokens, "create", "make a token and print the join command", act_token_create)
    create.add_argument("--ttl", type=float, default=24.0, metavar="HOURS", help="valid for [24]")
    create.add_argument("--uses", type=int, default=1, metavar="N", help="times it may be used; 0: no limit [1]")
    _asking(tokens, "list", "tokens and how often they may still be used", act_list("tokens"))
    _asking(tokens, "revoke", "make a token invalid", act_remove("tokens")).add_argument("id")

    keys = verbs.add_parser("key", help="API keys").add_subparsers(required=True, metavar="create|list|revoke")
    create = _asking(keys, "create", "make a key, shown this once", act_key_create)
    create.add_argument("--scope", action="append", choices=["infer", "rag", "admin"], help="may be repeated [infer]")
    create.add_argument("--name", default="", help="for the list")
    create.add_argument("--ttl", type=float, metavar="HOURS", help="valid for [for ever]")
    _asking(keys, "list", "keys, without their secrets", act_list("keys"))
    _asking(keys, "revoke", "make a key invalid", act_remove("keys")).add_argument("id")

    models = verbs.add_parser("models", help="models of the mesh")
    models = models.add_subparsers(required=True, metavar="list|add|remove")
    _asking(models, "list", "models, who offers them, whether they are placed", act_list("models"))
    add = _asking(models, "add", "offer a model from this node", act_model_add)
    add.add_argument("source", metavar="PATH|HUB_ID[=NAME]")
    _asking(models, "remove", "stop serving a model", act_remove("models")).add_argument("id", metavar="NAME")
    return parser


def _asking(verbs: Any, name: str, help_text: str, act: Any) -> argparse.ArgumentParser:
    """A verb that asks a running node."""
    parser: argparse.ArgumentParser = verbs.add_parser(name, help=help_text, description=help_text)
    parser.add_argument("--api", metavar="URL", help="of the node [the one that runs from --data-dir]")
    parser.add_argument("--data-dir", type=Path, metavar="DIR", help="where its admin key is [~/.local/share/murmur]")
    parser.add_argument("--admin-key-file", type=Path, metavar="FILE", help="instead of the data folder's")
    parser.set_defaults(act=act)
    return parser


def act_join(arguments: argparse.Namespace) -> int:
    config = settings.load(vars(arguments))
    from node.run import run  # a node's imports are paid for only here

    return run(config)


def act_status(arguments: argparse.Namespace) -> int:
    asker = Asker.of(arguments)
    while True:
        document = asker.get("/mesh/status")
        if arguments.json:
            print(json.dumps(document))
        else:
            from node.table import print_status

            print_status(document, clear=arguments.watch)
        if not arguments.watch:
            return 0
        time.sleep(2.0)


def act_leave(arguments: argparse.Namespace) -> int:
    asker = Asker.of(arguments)
    asker.admin("POST", "leave", {})
    print("leaving: sessions are drained and layers handed over")
    asker.wait_gone()
    print("left")
    return 0


def act_takeover(arguments: argparse.Namespace) -> int:
    _show(Asker.of(arguments).admin("POST", "takeover", {}))
    print(TAKEN_OVER_HERE)
    return 0


def act_revoke(arguments: argparse.Namespace) -> int:
    return _show(Asker.of(arguments).admin("POST", "revoke", {"node": arguments.node}))


def act_token_create(arguments: argparse.Namespace) -> int:
    body = {"ttl_s": arguments.ttl * 3600, "uses": arguments.uses or None}
    made = Asker.of(arguments).admin("POST", "tokens", body)
    print(made["command"])
    return 0


def act_key_create(arguments: argparse.Namespace) -> int:
    ttl_s = arguments.ttl * 3600 if arguments.ttl is not None else None
    body = {"scopes": arguments.scope or ["infer"], "ttl_s": ttl_s, "name": arguments.name}
    print(Asker.of(arguments).admin("POST", "keys", body)["key"])
    return 0


def act_model_add(arguments: argparse.Namespace) -> int:
    try:
        offer = settings.parse_offer(arguments.source)
    except ValueError as error:
        raise ConfigError(f"{arguments.source!r} {error}") from None
    path = str(Path(offer.source).resolve()) if Path(offer.source).exists() else offer.source
    return _show(Asker.of(arguments).admin("POST", "models", {"path": path, "name": offer.name}))


def act_list(what: str) -> Any:
    def act(arguments: argparse.Namespace) -> int:
        for item in Asker.of(arguments).admin("GET", what)["data"]:
            print("  ".join(f"{name}={value}" for name, value in item.items()))
        return 0

    return act


def act_remove(what: str) -> Any:
    def act(arguments: argparse.Namespace) -> int:
        return _show(Asker.of(arguments).admin("DELETE", f"{what}/{arguments.id}"))

    return act


def _show(answer: dict[str, Any]) -> int:
    print("  ".join(f"{name}={value}" for name, value in answer.items()))
    return 0
