"""``kvtc demo``: one conversation over a long document, its KV cache kept three ways.

``conversation.py`` is the demonstration, READ FIRST; ``setting.py`` makes what it needs (document, chat, artifact);
``report.py`` shows it. ``engine.py``: the same with a real vLLM and its tiers, many conversations that are come back
to; ``engine_report.py`` shows that.
"""
