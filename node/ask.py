"""How the command line speaks to a running node: its HTTP API, with the admin key of the data folder."""

from __future__ import annotations

import argparse
import http.client
import json
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

from mesh.errors import ConfigError
from node.config import default_data_dir

RUNTIME_FILE = "node.json"
"""In the data folder while a node runs: ``{"pid", "name", "api", "peer"}``."""

TIMEOUT_S = 30.0


class NodeRefused(Exception):
    """The node answered with an error, or not at all."""


class Asker:
    """One running node, as the command line sees it."""

    def __init__(self, api: str, folder: Path, key_file: Path | None) -> None:
        self.api = api.rstrip("/")
        self._folder, self._key_file = folder, key_file

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> Asker:
        """From ``--api``, ``--data-dir`` and ``--admin-key-file``; the URL is in the data folder of a running node."""
        folder = arguments.data_dir or default_data_dir()
        api = arguments.api
        if not api:
            try:
                api = json.loads((folder / RUNTIME_FILE).read_text())["api"]
            except (OSError, ValueError, KeyError, TypeError):
                raise ConfigError(f"no node runs from {folder}: name one with --api URL or --data-dir DIR") from None
        if urllib.parse.urlsplit(api).scheme not in ("http", "https"):
            raise ConfigError(f"--api: {api!r} must be a URL such as http://127.0.0.1:9000")
        return cls(api, folder, arguments.admin_key_file)

    def get(self, path: str) -> Any:
        return self._call("GET", path, None, "")

    def admin(self, method: str, verb: str, body: Any = None) -> Any:
        return self._call(method, f"/mesh/admin/{urllib.parse.quote(verb)}", body, self._key())

    def wait_gone(self, seconds: float = 120.0) -> None:
        """Until the node no longer answers."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                self.get("/health")
            except NodeRefused:
                return
            time.sleep(0.2)
        raise NodeRefused(f"the node at {self.api} still runs after {seconds:.0f} s")

    def _key(self) -> str:
        path = self._key_file or self._folder / "admin.key"
        try:
            return path.read_text().strip()
        except OSError as error:
            raise ConfigError(
                f"no admin key at {path} ({error.strerror}): name the node's --data-dir or --admin-key-file"
            ) from None

    def _tls(self) -> ssl.SSLContext | None:
        """For https: the system's authorities, and the mesh's own where the node runs from this data folder."""
        if not self.api.startswith("https:"):
            return None
        context, own = ssl.create_default_context(), self._folder / "mesh.pem"
        if own.exists():
            context.load_verify_locations(own)
        return context

    def _call(self, method: str, path: str, body: Any, key: str) -> Any:
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        data = json.dumps(body).encode() if body is not None else None
        request = urllib.request.Request(self.api + path, data=data, headers=headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_S, context=self._tls()) as answer:
                return json.loads(answer.read())
        except urllib.error.HTTPError as error:
            raise NodeRefused(_message(error)) from None
        except (OSError, ValueError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            raise NodeRefused(f"no node answers at {self.api}: {reason}") from None


def _message(error: urllib.error.HTTPError) -> str:
    try:
        return str(json.loads(error.read())["error"]["message"])
    except (OSError, ValueError, KeyError, TypeError):
        return f"HTTP {error.code}"
