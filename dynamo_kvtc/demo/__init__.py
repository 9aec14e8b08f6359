"""``kvtc demo``: one conversation over a long document, its KV cache kept three ways.

``conversation.py`` is the demonstration, READ FIRST; ``setting.py`` makes what it needs (document, chat, artifact);
``report.py`` shows it.
"""
