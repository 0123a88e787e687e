"""Video-LLaVA: one LLM that understands images and videos through two frozen, language-aligned encoders."""

import os

__version__ = "0.1.0"

# On CPUs torch keeps a prepared kernel for each shape of a matrix product, a thousand by default. Packed rows have a
# new length at every step, so that cache only grows, by over 10 MB a step with the toy model; a small one is no slower.
for _cache in ("LRU_CACHE_CAPACITY", "DNNL_PRIMITIVE_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
    os.environ.setdefault(_cache, "8")
