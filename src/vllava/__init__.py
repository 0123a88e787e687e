"""Video-LLaVA: one LLM that understands images and videos through two frozen, language-aligned encoders."""

__version__ = "0.1.0"
