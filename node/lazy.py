"""transformers, imported when it is first needed: it takes seconds."""

from __future__ import annotations

import threading
from typing import Any

_IMPORTING = threading.Lock()


def transformers() -> Any:
    """The package.  While it is imported it replaces its own module, and a second thread that imports it meanwhile is
    handed the unfinished one ("cannot import name 'AutoConfig'"): so one thread at a time."""
    with _IMPORTING:
        import transformers

        return transformers
