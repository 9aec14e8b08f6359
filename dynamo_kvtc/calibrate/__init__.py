"""From a model and text to an artifact. Start with ``run.py``."""
