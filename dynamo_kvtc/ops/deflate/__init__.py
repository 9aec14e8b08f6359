"""Raw DEFLATE (RFC 1951), without zlib's or gzip's wrapping: records carry lengths and checksums of their own.

Any encoder's stream is any decoder's, so a record made by a GPU encoder is read here and the other way round.
"""

from __future__ import annotations

from dynamo_kvtc.errors import ConfigError
from dynamo_kvtc.ops.deflate import reference

LEVEL = 6
"""zlib's effort. On packed codes level 9 saves less than 0.1% and takes longer."""


def deflate(data: bytes) -> bytes:
    """The DEFLATE stream of ``data``: bytes that depend on the encoder, never on what else is encoded."""
    return reference.deflate(data, LEVEL)


def inflate(payload: bytes | memoryview, expected_bytes: int) -> bytes:
    """Exactly ``expected_bytes`` from one stream that fills ``payload``.

    Allocates at most expected_bytes + 1 for the result, whatever the payload claims. Raises RecordCorruptError if the
    stream is damaged, gives fewer or more bytes, does not end, or is followed by anything; ConfigError if
    expected_bytes is negative.
    """
    if expected_bytes < 0:
        raise ConfigError(f"expected_bytes is {expected_bytes}; it must be at least 0")
    return reference.inflate(payload, expected_bytes)
