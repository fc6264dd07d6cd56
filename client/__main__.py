"""``python -m client``: talk to a mesh from the terminal."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from client.sync import MeshClient, SyncStream

DEFAULT_API = "http://127.0.0.1:9000"


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m client", description="Talk to a mesh through any of its nodes.")
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")
    chat = verbs.add_parser("chat", help="ask the model; without MESSAGE a conversation, line by line")
    chat.add_argument("message", nargs="?", metavar="MESSAGE", help="what to say; - reads it from standard input")
    chat.add_argument("--system", metavar="TEXT", help="instructions that come before the conversation")
    complete = verbs.add_parser("complete", help="continue a text; without TEXT one from standard input")
    complete.add_argument("message", nargs="?", metavar="TEXT", default="-", help="the text; - reads standard input")
    models = verbs.add_parser("models", help="list the models that the mesh serves")
    for verb in (chat, complete, models):
        _common(verb)
    for verb in (chat, complete):
        _sampling(verb)
    return top


def _common(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--api",
        action="append",
        metavar="URL",
        help=f"a node's API; may be repeated (default: $MESH_API, commas between several, or {DEFAULT_API})",
    )
    verb.add_argument("--api-key", metavar="KEY", default=os.environ.get("MESH_API_KEY"), help="default: $MESH_API_KEY")
    verb.add_argument("--ca", metavar="FILE", help="PEM file of the mesh's authority, for https")
    verb.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def _sampling(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--model", metavar="NAME", help="default: the mesh's only model")
    verb.add_argument("--max-tokens", type=int, metavar="N", help="at most so many new tokens")
    verb.add_argument("--temperature", type=float, metavar="T", help="0 is greedy (default: 1)")
    verb.add_argument("--top-p", type=float, metavar="P", help="keep the most likely tokens of this share (default: 1)")
    verb.add_argument("--seed", type=int, metavar="N", help="the same seed draws the same tokens")


def main(arguments: Sequence[str] | None = None) -> int:
    """0: done; 1: the mesh could not answer; 2: a bad argument; 130: interrupted."""
    options = parser().parse_args(arguments)
    from client.errors import ClientError
    from client.sync import MeshClient

    urls = options.api or os.environ.get("MESH_API", DEFAULT_API).split(",")
    try:
        with MeshClient(urls, options.api_key, ca=options.ca) as mesh:
            return _run(mesh, options)
    except ClientError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130


def _run(mesh: MeshClient, options: argparse.Namespace) -> int:
    if options.verb == "models":
        names = mesh.models()
        print(json.dumps({"models": names}) if options.json else "\n".join(names))
        return 0
    if options.verb == "complete":
        return _once(mesh, options, {"prompt": _said(options.message)})
    first = [{"role": "system", "content": options.system}] if options.system else []
    if options.message is None:
        return _converse(mesh, options, first)
    return _once(mesh, options, {"messages": [*first, {"role": "user", "content": _said(options.message)}]})


def _said(message: str) -> str:
    return sys.stdin.read() if message == "-" else message


def _params(options: argparse.Namespace) -> dict[str, Any]:
    names = ("model", "max_tokens", "temperature", "top_p", "seed")
    return {name: value for name in names if (value := getattr(options, name)) is not None}


def _once(mesh: MeshClient, options: argparse.Namespace, body: dict[str, Any]) -> int:
    ask = mesh.chat if "messages" in body else mesh.complete
    if options.json:
        answer = ask(*body.values(), **_params(options))
        told = {"text": answer.text, "finish_reason": answer.finish_reason, "model": answer.model}
        print(json.dumps({**told, "usage": asdict(answer.usage), "session": answer.session, "route": answer.route}))
        return 0
    with ask(*body.values(), stream=True, **_params(options)) as stream:
        _show(stream)
    return 0


def _show(stream: SyncStream) -> str:
    """Print pieces as they come; the whole text."""
    said = []
    for piece in stream:
        said.append(piece.text)
        print(piece.text, end="", flush=True)
    print()
    return "".join(said)


def _converse(mesh: MeshClient, options: argparse.Namespace, messages: list[dict[str, str]]) -> int:
    """Line by line until the end of input; Ctrl-C ends an answer, not the conversation."""
    from client.errors import ClientError

    tty = sys.stdin.isatty()
    if tty:
        print("Ctrl-D ends the conversation, Ctrl-C an answer.", file=sys.stderr)
    while True:
        try:
            line = input("> " if tty else "")
        except EOFError:
            return 0
        if not line.strip():
            continue
        turn = [*messages, {"role": "user", "content": line}]
        try:
            with mesh.chat(turn, stream=True, **_params(options)) as stream:
                messages = [*turn, {"role": "assistant", "content": _show(stream)}]
        except ClientError as error:
            print(f"\nerror: {error}", file=sys.stderr)
        except KeyboardInterrupt:
            print(file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
