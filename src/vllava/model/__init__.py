"""Encoders, projector, splice and LLM: plain modules, usable without Lightning and Hydra."""
