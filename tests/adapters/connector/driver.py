"""A real vLLM on the CPU with a KvtcConnector, told what to do line by line:

    python -m tests.adapters.connector.driver MODEL_DIR OPTIONS

OPTIONS: a JSON file with the connector's own ("extra") and the engine's ("engine"). Each line of the input is a JSON
list, an operation's name and its arguments; each is answered with a line."""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

from tests.adapters import engine_driver

COUNTS = {
    "stored": ("kvtc_stored_blocks", "stored"),
    "loaded": ("kvtc_loaded_blocks", "loaded"),
    "failed": ("kvtc_loaded_blocks", "failed"),
    "hits_host": ("kvtc_lookup_blocks", "hit", "host"),
    "hits_disk": ("kvtc_lookup_blocks", "hit", "disk"),
    "evicted": ("kvtc_evictions", "host"),
    "pulled": ("kvtc_pulled_blocks", "pulled"),
    "not_pulled": ("kvtc_pulled_blocks", "failed"),
    "pulled_bytes": ("kvtc_pulled_bytes",),
    "ratio": ("kvtc_ratio",),
}


class Driver:
    _send: Any = None
    wire_bytes = 0

    def __init__(self, model: str, options: dict[str, Any]) -> None:
        config = {
            "kv_connector": "KvtcConnector", "kv_role": "kv_both",
            "kv_connector_module_path": "dynamo_kvtc.adapters.connector", "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": options["extra"], **options.get("transfer", {}),
        }  # fmt: skip
        more = dict(options.get("engine", {}))
        self.llm = engine_driver.engine(model, config, more.pop("device_blocks", 96), **more)
        from dynamo_kvtc.adapters.connector import node

        self.node = node.engines.all()[0]

    def run(self, prompts: list[list[int]], tokens: int = 16, params: Any = None) -> list[Any]:
        return engine_driver.run(self.llm, prompts, tokens, params)

    def prefill(self, prompt: list[int]) -> Any:
        """What a prefill worker answers for the decode worker."""
        from vllm import SamplingParams

        sampling = SamplingParams(
            temperature=0, max_tokens=1, ignore_eos=True,
            extra_args={"kv_transfer_params": {"do_remote_decode": True, "do_remote_prefill": False}},
        )  # fmt: skip
        return self.llm.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)[0].kv_transfer_params

    def first_token(self, prompt: list[int], params: Any = None) -> list[float]:
        """Seconds, and how many tokens were cached."""
        began = time.monotonic()
        got = self.run([prompt], 1, [params])[0]
        return [time.monotonic() - began, got[2]]

    def fill(self, start: int) -> None:
        """The device forgets all else."""
        prompts = [engine_driver.prompt_of(start + i, 12 * engine_driver.BLOCK) for i in range(8)]
        self.run(prompts, 1, [{"kvtc": "off"}] * len(prompts))

    def reset(self) -> bool:
        """The device alone."""
        return self.llm.reset_prefix_cache()

    def forget(self) -> None:
        """The device, after which wrong numbers are where its cache was."""
        engine_driver.forget(self.llm, self.settle)

    def clear(self) -> None:
        self.node.tier.clear()

    def settle(self) -> bool:
        return self.node.tier.flush(60)

    def counts(self) -> dict[str, float]:
        self.node.tier.refresh()
        return {label: self.node.metrics.value(*name) for label, name in COUNTS.items()}

    def errors(self) -> dict[str, float]:
        families = self.node.metrics.registry.collect()
        out = {
            s.labels["kind"]: s.value
            for f in families if f.name == "kvtc_errors" for s in f.samples if s.name.endswith("_total")
        }  # fmt: skip
        if self.node.cluster is not None:
            out |= {f"pull_{k}": v for k, v in self.node.cluster.puller.stats().errors.items()}
        return out

    def worker(self) -> str:
        return self.node.cluster.worker

    def knows(self, worker: str, entries: int, timeout: float = 20.0) -> bool:
        """Until the index has so many records of that worker."""
        follower = self.node.cluster.follower
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if worker in follower.workers() and follower.index.entries_of(worker) >= entries:
                return True
            time.sleep(0.01)
        return False

    def groups(self) -> list[Any]:
        """Of each cache group its layers, and the smallest window."""
        groups = self.node.groups
        return [[len(names) for names in groups.names], groups.window]

    def spoil(self, one_in: int) -> int:
        """A bit of each so many-th record in host memory is flipped; how many."""
        host = self.node.tier.records.host
        keys = sorted(key for key, *_ in self.node.tier.records.held())[::one_in]
        for key in keys:
            with host.get(key) as lease:
                host._view[lease.offset + len(lease) - 9] ^= 4
        return len(keys)

    def held(self) -> int:
        return len(self.node.tier.records.held())

    def served(self) -> int:
        return self.node.cluster.server.stats().sent_bytes

    def slow(self, seconds: float) -> None:
        """Each frame that this worker sends waits."""
        self._on_send(lambda frame: time.sleep(seconds) or frame)

    def damage(self, one_in: int) -> None:
        """One in so many frames of some length that this worker sends has a bit flipped."""
        sent = [0]

        def flip(frame: Any) -> Any:
            sent[0] += 1
            if sent[0] % one_in or sum(map(len, frame)) < 4096:
                return frame
            whole = bytearray(b"".join(frame))
            whole[len(whole) // 2] ^= 16
            return [bytes(whole)]

        self._on_send(flip)

    def _on_send(self, change: Any) -> None:
        """Instead of what was done to frames before."""
        from dynamo_kvtc.transfer import tcp

        send = self._send = self._send or tcp._Line.send
        tcp._Line.send = lambda line, frame, deadline: send(line, change(frame), deadline)

    def count_wire(self) -> None:
        """From now on all that this worker sends over TCP is counted, frames' heads included."""
        self.wire_bytes = 0

        def counted(frame: Any) -> Any:
            self.wire_bytes += 4 + sum(map(len, frame))
            return frame

        self._on_send(counted)

    def wire(self) -> int:
        return self.wire_bytes

    def pinned(self) -> int:
        """Records of the host on lease, or being written."""
        host = self.node.tier.records.host
        with host._lock:
            host._sweep()
            return sum(host._shelf.pins)

    def listen(self) -> None:
        """From now on what vLLM's router would hear is kept, too."""
        from dynamo_kvtc.adapters.connector import vllm_events

        made, self.news = vllm_events.events_of, []

        def both(*what: Any) -> Any:
            events = list(made(*what))
            self.news += events
            return events

        vllm_events.events_of = both
        self.node.router.on = True

    def heard(self) -> list[Any]:
        """Kind, medium, whether it is the first block of a sequence, and its tokens."""
        return [
            [type(e).__name__, e.medium, getattr(e, "parent_block_hash", 0) is None, len(getattr(e, "token_ids", ()))]
            for e in self.news
        ]  # fmt: skip

    def threads(self) -> int:
        return threading.active_count()

    def close(self) -> bool:
        self.llm.llm_engine.engine_core.shutdown()
        return self.node.tier.closed


def main() -> None:
    out = sys.stdout
    sys.stdout = sys.stderr
    engine_driver.set_environment()
    driver = Driver(sys.argv[1], json.loads(Path(sys.argv[2]).read_text()))
    print("ready", file=out, flush=True)
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        print(json.dumps(getattr(driver, name)(*arguments)), file=out, flush=True)
        if name == "close":
            return


if __name__ == "__main__":
    main()
