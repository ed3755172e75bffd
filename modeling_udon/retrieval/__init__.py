"""Embeddings become neighbours (`index`), neighbours become numbers (`metrics`, `protocol`).

Import the modules themselves: `metrics` needs no search library, `index` loads FAISS.
"""
