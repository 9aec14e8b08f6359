"""The codec: engine K and V in, records out, and back. Start with ``pipeline.py``."""
