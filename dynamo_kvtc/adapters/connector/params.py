"""What a request says of its cache (``kv_transfer_params``), and what is answered: who prefilled it.

They come from outside, through an API that anybody may use: nothing in them names an address or a key. A decode worker
asks the worker that is named, which it knows from NATS, for the keys that it reckons itself.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dynamo_kvtc.adapters.engine_model import opted_out
from dynamo_kvtc.events.options import TOKEN

MAX_BLOCKS = 1 << 20

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Wish:
    """off: neither stored nor loaded; handed_on: another worker will decode it; worker: who prefilled it, if somebody
    did, and blocks: how many of its blocks that one has or will have."""

    off: bool = False
    handed_on: bool = False
    worker: str | None = None
    blocks: int = 0


def wish_of(params: Mapping[str, Any] | None, request: str) -> Wish:
    """What is not understood is passed over and logged: it must not crash a server."""
    if opted_out(params, request):
        return Wish(off=True)
    given = params or {}
    if given.get("do_remote_prefill") is True:
        worker, blocks = given.get("kvtc_worker"), given.get("kvtc_blocks")
        if isinstance(worker, str) and TOKEN.fullmatch(worker) and type(blocks) is int and 0 <= blocks <= MAX_BLOCKS:
            return Wish(worker=worker, blocks=blocks)
        log.warning("request %s: kv_transfer_params names no worker of this connector's: it is prefilled here", request)
    return Wish(handed_on=given.get("do_remote_decode") is True)


def params_of(worker: str, blocks: int, engine_id: str) -> dict[str, Any]:
    """For the worker that decodes. The first three are what every connector of vLLM says."""
    return {
        "do_remote_prefill": True, "do_remote_decode": False, "remote_engine_id": engine_id,
        "kvtc_worker": worker, "kvtc_blocks": blocks,
    }  # fmt: skip
