"""The engine: any Hugging Face causal LM, a span of its layers, all sessions packed into one batch.

``engine.py`` is the facade that the event loop talks to; ``runner.py`` is the thread that computes.  Decisions are
values made without torch (``scheduler.py``, ``pages.py``); torch enters with ``runner.py`` and what it imports.
"""
