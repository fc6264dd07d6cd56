"""Weights: what a model's files are, which of them are here, and how the rest is brought from peers.

offer.py     a Hugging Face folder or hub id -> manifest and figures       sizes.py  the figures
manifest.py  names, sizes and SHA-256 of every file and tensor             store.py  whole folders, sparse replicas
fetch.py     missing tensors from several peers at once                    serve.py  ``GET /peer/files``, both ends
keeper.py    ``Weights``: all of it behind three verbs
"""
