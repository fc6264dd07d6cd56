"""Every script's first line: run under the checkout's own ``.venv``, made and filled on first use.

Only the standard library, and no syntax newer than Python 3.8, so that an old interpreter gets a clear line.
"""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"


def ensure(extra: str = "") -> None:
    """Re-execute the running script under ``.venv`` with the project (and ``extra``) installed from pinned versions.

    The stamp in ``.venv`` is a hash of what the installation depends on, so that a changed lock re-installs.
    """
    if sys.version_info < (3, 11):  # noqa: UP036
        sys.exit("Murmur needs Python 3.11 or newer; this is %d.%d" % sys.version_info[:2])  # noqa: UP031
    sys.path.insert(0, str(ROOT))
    python = VENV / "bin" / "python"
    wanted = _digest(extra)
    stamp = VENV / "murmur-installed"
    installed = stamp.read_text().split() if stamp.exists() else []
    if wanted not in installed:
        _install(python, extra)
        base = [_digest("")] if extra else []
        stamp.write_text("\n".join([wanted, *base]))
    if Path(sys.prefix).resolve() != VENV.resolve():
        os.execv(python, [str(python), *sys.argv])


def _digest(extra: str) -> str:
    parts = [(ROOT / name).read_bytes() for name in ("pyproject.toml", "constraints.txt")]
    return hashlib.sha256(b"\0".join([*parts, extra.encode()])).hexdigest()


def _install(python: Path, extra: str) -> None:
    print("making .venv and installing pinned versions (once) ...", file=sys.stderr, flush=True)
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(VENV)], check=True)
    target = ".[%s]" % extra if extra else "."  # noqa: UP031
    command = [str(python), "-m", "pip", "install", "-q", "-c", "constraints.txt", "-e", target]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit("installation failed:\n" + done.stdout[-2000:] + done.stderr[-4000:])
