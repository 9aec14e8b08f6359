"""Doors to engines: translation only, a folder each."""
