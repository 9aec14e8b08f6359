"""Stateless tensor functions, one folder each.

``reference.py`` is the truth (torch, numba or zlib on a CPU); ``__init__.py`` holds the checks, the docstring and the
dispatch. An op never imports another op, a codec or an engine.
"""
