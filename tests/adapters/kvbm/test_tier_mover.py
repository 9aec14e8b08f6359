"""The coding mover over a tier on the CPU: ids that are reused, writes that come late, faults. No engine, no leader."""

from __future__ import annotations

import threading

import pytest
import torch

from dynamo_kvtc.adapters.kvbm.budget import Pool as BudgetPool
from dynamo_kvtc.adapters.kvbm.protocol import Pool
from dynamo_kvtc.errors import ConfigError
from tests.adapters.kvbm.parts import ask, load, open_coding, request, store
from tests.builders import case_seed, same_bits
from tests.tier.parts import BLOCK_TOKENS, POISON, Answer, Engine

DISK = BudgetPool(0.02, 0)


@pytest.fixture
def engine():
    return Engine(case_seed())


@pytest.fixture
def coding(engine, folder, monkeypatch):
    monkeypatch.setenv("DYN_KVBM_DISK_CACHE_DIR", str(folder))
    made = []

    def make(**options):
        made.append(open_coding(engine, **{"exact": "all", **options}))
        return made[-1]

    yield make
    for mover in made:
        mover.shutdown(5)


def right(engine: Engine, blocks: list[int]) -> list[bool]:
    """Whether these blocks of the sequence are in their pages, bit for bit."""
    out = []
    for b in blocks:
        k, v = engine.pages.read([engine.order[b]])
        at = slice(b * BLOCK_TOKENS, (b + 1) * BLOCK_TOKENS)
        out.append(same_bits(k, engine.k[:, :, at]) and same_bits(v, engine.v[:, :, at]))
    return out


def records(mover) -> tuple[int, int]:
    tier = mover.tier
    return tuple(0 if s is None else s.stats().entries for s in (tier._store.host, tier._store.disk))


def hold(mover, side: str):
    """Keeps the tier's thread from working until the event is set."""
    real, gate = getattr(mover.tier.transcoder, side), threading.Event()

    def wait(*what):
        assert gate.wait(60)
        return real(*what)

    setattr(mover.tier.transcoder, side, wait)
    return gate


def test_out_and_back_through_host_and_disk(engine, coding):
    mover = coding(disk=DISK)
    blocks = list(range(6))
    assert store(mover, engine, blocks, [5, 4, 3, 2, 1, 0]) == []
    assert ask(mover.demote, ((5, 17), (3, 18))) == []
    assert records(mover) == (6, 2)
    engine.wipe([engine.order[b] for b in blocks])
    assert load(mover, engine, [5, 4, 3], [0, 1, 2]) == []
    assert load(mover, engine, [17, 18], [0, 2], Pool.DISK) == []
    assert right(engine, blocks) == [True] * 3 + [False] * 3
    assert records(mover) == (6, 2), "what was read stays where it was"
    # A host id is no disk id.
    assert load(mover, engine, [17], [0]) == [0]
    assert load(mover, engine, [5], [0], Pool.DISK) == [0]


def test_coded_blocks_come_back_close(engine, coding):
    mover = coding(exact="sinks")
    assert store(mover, engine, [1, 2, 3], [0, 1, 2]) == []
    engine.wipe(engine.order)
    assert load(mover, engine, [0, 1, 2], [1, 2, 3]) == []
    k, _ = engine.pages.read([engine.order[2]])
    wanted = engine.k[:, :, 2 * BLOCK_TOKENS : 3 * BLOCK_TOKENS].float()
    assert not same_bits(k, wanted.to(k.dtype))
    assert float((k.float() - wanted).square().mean()) < 0.2 * float(wanted.square().mean())


def test_an_overwrite_is_the_notice_of_an_eviction(engine, coding):
    mover = coding(disk=DISK)
    assert store(mover, engine, [0, 1], [0, 1]) == []
    assert ask(mover.demote, ((0, 0),)) == []
    assert store(mover, engine, [2], [0]) == []
    assert records(mover)[0] == 2, "the older generation is forgotten"
    assert load(mover, engine, [0], [2]) == []
    assert load(mover, engine, [0], [0]) == [0], "another position"
    # On disk it is still the old one, until the disk's id is written again.
    assert load(mover, engine, [0], [0], Pool.DISK) == []
    assert ask(mover.demote, ((1, 0),)) == []
    assert load(mover, engine, [0], [1], Pool.DISK) == []
    assert load(mover, engine, [0], [0], Pool.DISK) == [0]
    assert records(mover) == (1, 0), "what does not fit its place is not tried again"


def test_a_late_write_is_not_taken_for_the_newer_one(engine, coding):
    mover = coding()
    gate = hold(mover, "encode")
    first, second = Answer(), Answer()
    mover.store(request(mover, Pool.HOST, [(engine.order[0], 7, 0)]), first)
    mover.store(request(mover, Pool.HOST, [(engine.order[0], 7, 0), (engine.order[1], 8, BLOCK_TOKENS)]), second)
    assert load(mover, engine, [7], [0]) == [0], "nothing is there yet"
    gate.set()
    assert list(first.get()) == [7], "overtaken"
    assert list(second.get()) == []
    assert load(mover, engine, [7, 8], [0, 1]) == []
    assert records(mover) == (2, 0), "what came late is forgotten"


def test_the_last_write_counts_even_if_it_fails(engine, coding):
    mover = coding()
    assert store(mover, engine, [0], [7]) == []
    real = mover.tier.transcoder.encode

    def failing(*what):
        raise RuntimeError("on purpose")

    mover.tier.transcoder.encode = failing
    assert store(mover, engine, [1], [7]) == [7]
    mover.tier.transcoder.encode = real
    assert load(mover, engine, [7], [0]) == [0]
    assert records(mover) == (0, 0)
    assert store(mover, engine, [1], [7]) == []
    assert load(mover, engine, [7], [1]) == []


def test_what_is_overwritten_while_it_is_read_is_still_read(engine, coding):
    mover = coding()
    assert store(mover, engine, [0], [7]) == []
    engine.wipe(engine.order[:1])
    gate = hold(mover, "promise")
    loaded = Answer()
    mover.load(request(mover, Pool.HOST, [(7, engine.order[0], 0)]), loaded)
    assert store(mover, engine, [1], [7]) == []
    gate.set()
    assert list(loaded.get()) == []
    assert right(engine, [0]) == [True]
    assert records(mover) == (1, 0), "and forgotten afterwards"


def test_another_position_fails_and_writes_nothing(engine, coding):
    mover = coding()
    assert store(mover, engine, [0, 1], [0, 1]) == []
    engine.wipe(engine.order)
    assert load(mover, engine, [0, 1], [0, 1], shift=BLOCK_TOKENS) == [0, 1]
    k, _ = engine.pages.read(engine.order[:2])
    assert bool((k == POISON).all())


def test_a_full_host_evicts_the_oldest_and_says_so(engine, coding):
    raw = BLOCK_TOKENS * engine.shape.bytes_per_token
    mover = coding(host=BudgetPool(0.0, 8), disk=DISK)
    assert raw <= mover.bytes_per_block < 1.2 * raw + 4096
    for n in range(0, 24, 4):
        assert store(mover, engine, list(range(n, n + 4)), list(range(n, n + 4))) == []
    host = mover.tier._store.host.stats()
    assert 8 <= host.entries < 24
    assert host.used_bytes <= host.budget_bytes
    gone = 24 - host.entries
    engine.wipe(engine.order)
    assert load(mover, engine, list(range(24)), list(range(24))) == list(range(gone))
    assert right(engine, list(range(24))) == [False] * gone + [True] * (24 - gone)
    assert records(mover)[1] == 0, "the leader demotes, nobody else"
    assert ask(mover.demote, ((0, 0), (gone, 1))) == [0]
    # Stored and evicted in one go: not stored.
    assert len(store(mover, engine, list(range(24)), list(range(24)))) == gone


def test_damage_costs_the_block_and_no_more(engine, coding):
    mover = coding(disk=DISK)
    assert store(mover, engine, [0, 1, 2], [0, 1, 2]) == []
    assert ask(mover.demote, ((0, 0), (1, 1), (2, 2))) == []
    assert mover.tier.flush()
    host = mover.tier._store.host
    with host.get(mover._latest[Pool.HOST, 1]) as lease:
        host._view[lease.offset + len(lease) - 5] ^= 1
    engine.wipe(engine.order)
    assert load(mover, engine, [0, 1, 2], [0, 1, 2]) == [1]
    assert right(engine, [0, 1, 2]) == [True, False, True]
    assert load(mover, engine, [1], [1]) == [1], "and again: it is gone"
    # On disk it was sound when it went there.
    path = mover.tier._store.disk.path / "records"
    with open(path, "r+b") as file:
        data = bytearray(file.read())
        data[100::4096] = bytes(byte ^ 1 for byte in data[100::4096])
        file.seek(0)
        file.write(data)
    assert load(mover, engine, [0, 1, 2], [0, 1, 2], Pool.DISK) == [0, 1, 2]
    assert mover.tier.metrics.value("kvtc_loaded_blocks", "failed") == 5


def test_a_new_leader_voids_all_ids(engine, coding):
    mover = coding(disk=DISK)
    assert store(mover, engine, [0, 1], [0, 1]) == []
    assert ask(mover.demote, ((0, 0),)) == []
    gate = hold(mover, "encode")
    late = Answer()
    mover.store(request(mover, Pool.HOST, [(engine.order[2], 2, 2 * BLOCK_TOKENS)]), late)
    mover.set_capacity(10, 10)
    gate.set()
    assert list(late.get()) == [2]
    assert records(mover) == (0, 0)
    assert load(mover, engine, [0, 1, 2], [0, 1, 2]) == [0, 1, 2]
    assert load(mover, engine, [0], [0], Pool.DISK) == [0]
    assert store(mover, engine, [0], [0]) == []
    assert load(mover, engine, [0], [0]) == []


def test_a_leader_with_a_pool_that_is_not_here(engine, coding):
    mover = coding()
    with pytest.raises(ConfigError, match="10 disk blocks, this worker no disk budget: set DYN_KVBM_DISK_CACHE_GB"):
        mover.set_capacity(10, 10)


def test_a_folder_without_a_disk_is_refused(coding):
    with pytest.raises(ConfigError, match="disk_path is '/x' and KVBM has no disk"):
        coding(disk_path="/x")


def test_numbers_wait_for_the_engine(engine, coding):
    mover = coding()
    assert store(mover, engine, [0, 1], [0, 1]) == []
    noted = mover.take_stats()
    assert ("counter", "kvtc_stored_blocks", 2, ("stored",)) in noted
    assert any(kind == "gauge" and name == "kvtc_used_bytes" for kind, name, _, _ in noted)
    assert mover.take_stats() == []
    assert mover.tier.metrics.totals()["kvtc_stored_blocks_total['stored']"] == 2


def test_deadlines(engine, coding):
    mover = coding()
    assert store(mover, engine, [0], [0]) == []
    gates = [hold(mover, "encode"), hold(mover, "promise")]
    busy, answers = [Answer(), Answer()], [Answer(), Answer()]
    mover.store(request(mover, Pool.HOST, [(engine.order[1], 1, BLOCK_TOKENS)]), busy[0])
    mover.load(request(mover, Pool.HOST, [(0, engine.order[0], 0)]), busy[1])
    mover.store(request(mover, Pool.HOST, [(engine.order[2], 2, 2 * BLOCK_TOKENS)], seconds=-1), answers[0])
    mover.load(request(mover, Pool.HOST, [(0, engine.order[0], 0)], seconds=-1), answers[1])
    for gate in gates:
        gate.set()
    assert [list(a.get()) for a in busy] == [[], []]
    assert list(answers[0].get()) == [2]
    assert list(answers[1].get()) == [engine.order[0]]


def test_a_full_queue_fails_what_it_cannot_take(engine, coding):
    mover = coding(queue_mib=1)
    raw = mover.tier.transcoder.raw_block_bytes
    gate = hold(mover, "encode")
    waiting, answers = [], [Answer() for _ in range((1 << 20) // (raw * 24) + 2)]
    for n, answer in enumerate(answers):
        moves = [(engine.order[b], 100 * n + b, b * BLOCK_TOKENS) for b in range(24)]
        mover.store(request(mover, Pool.HOST, moves), answer)
        waiting.append(answer)
    assert len(answers[-1].get()) == 24
    gate.set()
    assert list(answers[0].get()) == []


def test_shutdown_in_flight(engine, coding):
    mover = coding(disk=DISK)
    assert store(mover, engine, [0], [0]) == []
    gates = [hold(mover, "encode"), hold(mover, "promise")]
    answers = [Answer() for _ in range(4)]
    for n in (0, 1):
        mover.store(request(mover, Pool.HOST, [(engine.order[1], 1 + n, BLOCK_TOKENS)]), answers[n])
        mover.load(request(mover, Pool.HOST, [(0, engine.order[0], 0)]), answers[2 + n])
    ended = threading.Thread(target=mover.shutdown, args=(8,))
    ended.start()
    # What is running ends, what waits fails; nobody waits for ever.
    for gate in gates:
        gate.set()
    ended.join(30)
    assert not ended.is_alive()
    assert [len(a.calls) for a in answers] == [1] * 4
    before = engine.pages.read(engine.order)
    assert store(mover, engine, [3], [3]) == [3]
    assert load(mover, engine, [0], [0]) == [0]
    assert all(torch.equal(a, b) for a, b in zip(before, engine.pages.read(engine.order), strict=True))


def test_the_scratch_folder_begins_empty(engine, coding):
    for _ in range(2):
        mover = coding(disk=DISK)
        assert records(mover) == (0, 0)
        assert store(mover, engine, [0, 1], [0, 1], Pool.DISK) == []
        assert mover.tier.flush()
        assert records(mover) == (0, 2)
        mover.shutdown(5)
