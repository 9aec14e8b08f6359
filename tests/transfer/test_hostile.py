"""Peers that send what no peer of this release sends: nothing is allocated for it, nothing breaks, it is counted."""

from __future__ import annotations

import contextlib
import random
import socket
import subprocess
import threading
import time
from dataclasses import replace

import msgspec
import pytest

from dynamo_kvtc.codec.record import parse_record
from dynamo_kvtc.errors import (
    ConfigError,
    PeerGoneError,
    TransferError,
    TransferProtocolError,
    TransferRefusedError,
    TransferTimeoutError,
)
from dynamo_kvtc.transfer import idle, tcp, wire
from dynamo_kvtc.transfer.arriving import Arriving
from dynamo_kvtc.transfer.options import PullOptions, ServeOptions
from dynamo_kvtc.transfer.plane import MAX_FRAME_BYTES
from dynamo_kvtc.transfer.pull import Puller, Wanted
from dynamo_kvtc.transfer.serve import Server
from dynamo_kvtc.transfer.tcp import TcpOptions, TcpPlane
from tests.transfer.holders import PATIENT
from tests.transfer.records import EXPECTED, PEERS, make_record, make_records, store_of, wanted_of
from tests.waiting import until


@pytest.fixture
def planes():
    made = []

    def one(**options):
        made.append(TcpPlane(TcpOptions(**options)))
        return made[-1]

    yield one
    for plane in made:
        plane.close()


def soon(seconds=5.0):
    return time.monotonic() + seconds


def ask_of(records, number=1, **over):
    items = [wire.Item(key, len(record), 0, 7) for key, record in records.items()]
    fields = {"version": wire.VERSION, "ask": number, "namespace": "dynamo", "model": "model-key", "items": items}
    return wire.Ask(**(fields | over))


def lying(planes, answer, records, options=PATIENT, timeout=10):
    """A pull from a holder that answers so, its plane and its asker."""
    address = planes().serve(answer)
    puller = Puller([planes()], lambda _: {"tcp": address}, PEERS, EXPECTED, options)
    return puller.pull(wanted_of(records, "a"), timeout), puller


def pieces(ask, segments, payload):
    return [wire.pack(wire.Pieces(ask.ask, segments)), payload]


@pytest.mark.parametrize(
    "lie",
    ["unasked", "beyond", "garbage", "short", "asks", "flood", "oversized", "missing-unasked", "negative", "refuses"],
)
def test_a_holder_that_lies_is_left_and_nothing_of_it_is_used(planes, rng, lie):
    records = make_records(rng, 3)
    size = len(next(iter(records.values())))

    def answer(frame, sender):
        ask, end = wire.unpack(frame)[0], soon()
        if lie == "unasked":
            sender.send(pieces(ask, [(3, 0, 10)], bytes(10)), end)
        elif lie == "beyond":
            sender.send(pieces(ask, [(0, size - 5, 10)], bytes(10)), end)
        elif lie == "garbage":
            sender.send([rng.randbytes(1000)], end)
        elif lie == "short":
            sender.send(pieces(ask, [(0, 0, 500)], bytes(499)), end)
        elif lie == "asks":
            sender.send([frame], end)
        elif lie == "flood":
            for _ in range(1000):
                sender.send(pieces(ask, [(0, 0, 300)] * 100, bytes(30_000)), end)
        elif lie == "oversized":
            sender.socket.sendall((MAX_FRAME_BYTES + 1).to_bytes(4, "little"))
            time.sleep(0.2)
        elif lie == "missing-unasked":
            sender.send([wire.pack(wire.Missing(ask.ask, [(77, 1)]))], end)
        elif lie == "negative":
            told = msgspec.msgpack.encode(["pieces", ask.ask, [[0, -1, 10]]])
            sender.send([len(told).to_bytes(4, "little"), told, bytes(10)], end)
        elif lie == "refuses":
            sender.send([wire.pack(wire.Refused(ask.ask, "out of spite", False))], end)
        raise TransferProtocolError("and hangs up")

    pull, puller = lying(planes, answer, records, PullOptions(attempts=2))
    assert all(pull.result())
    assert all(pull.record(i) is None and pull.parsed(i) is None for i in range(3))
    assert sum(puller.stats().errors.values()) >= 1
    assert puller.stats().pieces == 0
    until(lambda: puller.stats().in_flight_bytes == 0)


def test_a_late_duplicate_does_not_change_what_was_proven(planes, rng):
    key, record = rng.randbytes(32), make_record(rng, [500, 500, 500])
    sent = threading.Event()

    def answer(frame, sender):
        ask = wire.unpack(frame)[0]
        sender.send(pieces(ask, [(0, 0, len(record) - 10)], record[:-10]), soon())
        sender.send(pieces(ask, [(0, 0, len(record) - 10)], bytes(len(record) - 10)), soon())
        sent.set()
        sender.send(pieces(ask, [(0, len(record) - 10, 10)], record[-10:]), soon())
        sender.send([wire.pack(wire.End(ask.ask, 1))], soon())

    pull, _ = lying(planes, answer, {key: record})
    assert pull.result() == [""]
    assert sent.is_set()
    assert pull.record(0) == record


def every_other_byte(arriving, start, end):
    for at in range(start, end, 2):
        arriving.write(at, b"x")


def test_a_record_in_thousands_of_stretches_is_refused_at_once(planes, rng):
    """Each stretch would cost every later one time, while the engine waits for the pull's lock."""
    key, record = rng.randbytes(32), make_record(rng, [9000] * 3)
    limit = 4 * EXPECTED.identity.groups + 64

    def answer(frame, sender):
        ask = wire.unpack(frame)[0]
        cuts = [(0, at, 1) for at in range(100, 20_000, 2)]
        with contextlib.suppress(TransferError):
            for at in range(0, len(cuts), 50):
                some = cuts[at : at + 50]
                sender.send(pieces(ask, some, bytes(len(some))), soon())
        time.sleep(0.2)

    def honest(frame, sender):
        ask = wire.unpack(frame)[0]
        for at in range(0, len(record), 4000):
            some = record[at : at + 4000]
            sender.send(pieces(ask, [(0, at, len(some))], some), soon())
        sender.send([wire.pack(wire.End(ask.ask, len(record)))], soon())

    where = {"a": {"tcp": planes().serve(answer)}, "b": {"tcp": planes().serve(honest)}}
    puller = Puller([planes()], lambda who: where[who], PEERS, EXPECTED, replace(PATIENT, attempts=1))
    assert "stretches" in puller.pull([Wanted(key, len(record), ("a",))], 10).result()[0]
    puller._avoid = {"b": soon(60)}  # so that a comes first
    pull = puller.pull([Wanted(key, len(record), ("a", "b"))], 10)
    assert pull.result() == [""]
    assert pull.record(0) == record

    arriving = Arriving(memoryview(bytearray(len(record))), EXPECTED)
    with pytest.raises(TransferProtocolError, match=f"more than {limit} stretches"):
        every_other_byte(arriving, 100, 20_000)
    assert arriving._got == []


def test_a_frame_of_thousands_of_segments_is_refused_at_once(planes, rng):
    """Of the same bytes again and again, too: each is looked at under the pull's lock."""
    key, record = rng.randbytes(32), make_record(rng, [9000] * 3)

    def answer(frame, sender):
        ask = wire.unpack(frame)[0]
        sender.send(pieces(ask, [(0, 100, 1)] * 5000, bytes(5000)), soon())
        time.sleep(0.2)

    pull, _ = lying(planes, answer, {key: record}, replace(PATIENT, attempts=1))
    assert "a frame of 5000 segments" in pull.result()[0]


def test_too_many_stretches_take_nothing_that_is_proven_along(rng):
    record = make_record(rng, [300] * 3)
    arriving = Arriving(memoryview(bytearray(len(record))), EXPECTED)
    start = parse_record(record).offsets[1]
    arriving.write(0, record[:start])
    assert arriving.ready() == [0]
    arriving.proven(0, arriving.prove(0) is None)
    with pytest.raises(TransferProtocolError):
        every_other_byte(arriving, start + 1, len(record))
    arriving.write(0, bytes(start))
    arriving.write(start, record[start:])
    assert arriving.ready() == [1, 2]
    assert arriving.slot == record


def test_what_came_before_a_lie_in_the_same_frame_counts(planes, rng):
    """It was waiting to be proven for ever: neither here nor asked of another."""
    key, record = rng.randbytes(32), make_record(rng, [500] * 3)

    def answer(frame, sender):
        ask = wire.unpack(frame)[0]
        sender.send(pieces(ask, [(0, 0, len(record)), (9, 0, 1)], record + b"x"), soon())

    pull, _ = lying(planes, answer, {key: record}, replace(PATIENT, attempts=1))
    assert pull.result() == [""]
    assert pull.record(0) == record


def test_bytes_in_any_order_and_of_any_length_make_the_record(planes, rng):
    records = make_records(rng, 8)

    def answer(frame, sender):
        ask, cuts = wire.unpack(frame)[0], []
        for i, record in enumerate(records.values()):
            at = 0
            while at < len(record):
                length = min(rng.randrange(1, 900), len(record) - at)
                cuts += [(i, at, length)] * rng.choice([1, 1, 2])
                at += length
        rng.shuffle(cuts)
        told = list(records.values())
        for n in range(0, len(cuts), 7):
            some = cuts[n : n + 7]
            sender.send(pieces(ask, some, b"".join(told[i][at : at + size] for i, at, size in some)), soon())
        sender.send([wire.pack(wire.End(ask.ask, 1))], soon())

    pull, puller = lying(planes, answer, records)
    assert pull.result() == [""] * 8
    assert [pull.record(i) for i in range(8)] == list(records.values())
    assert puller.stats().retried == 0


def test_a_holder_survives_what_askers_send(planes, rng):
    records = make_records(rng, 4)
    plane = planes()
    server = Server(store_of(records), PEERS, [plane], ServeOptions(stall_seconds=0.5))
    good = wire.pack(ask_of(records))
    key = next(iter(records))
    bad = [
        b"", b"\0\0\0\0", b"\xff\xff\xff\xff", rng.randbytes(500), good[:-1], good + b"x",
        wire.pack(wire.End(1, 0)), wire.pack(ask_of(records, version=99)),
        wire.pack(ask_of(records, items=[wire.Item(key, 500, 0, 0)])),
        wire.pack(ask_of(records, items=[wire.Item(b"short", 500, 0, 1)])),
        wire.pack(ask_of(records, items=[wire.Item(key, 1 << 30, 0, 1)])),
        wire.pack(ask_of(records, items=[wire.Item(key, 500, 0, 1 << 64 - 1)] * 5000)),
        wire.pack(ask_of(records, namespace="x" * 300)),
        b"\x20\0\0\0" + b"\x91" * 32, b"\x08\0\0\0" + b"\xdd\xff\xff\xff\xff    ",
        *(_flipped(rng, good) for _ in range(60)),
    ]  # fmt: skip
    for frame in bad:
        stream = planes().connect(server.addresses["tcp"], soon())
        try:
            stream.ask(frame, soon())
            for _ in range(20):
                message = wire.unpack(stream.receive(soon(2.0)))[0]
                if isinstance(message, wire.End | wire.Refused):
                    break
        except (PeerGoneError, TransferTimeoutError):
            pass
        finally:
            stream.close()
    until(lambda: server.stats().leased_bytes == 0)
    assert server.stats().errors["protocol"] >= 13
    puller = Puller([planes()], lambda _: server.addresses, PEERS, EXPECTED, PATIENT)
    assert puller.pull(wanted_of(records, "a"), 10).result() == [""] * 4


def _flipped(rng, frame):
    out = bytearray(frame)
    out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
    return bytes(out)


class Proxy:
    """Between an asker and a holder: flips a bit in some of what the holder sends, or sends it slowly."""

    def __init__(self, address, rng, rate):
        self.host, port = address.split(":")
        self.port, self.rng, self.rate = int(port), rng, rate
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        while True:
            try:
                asker, _ = self.listener.accept()
            except OSError:
                return
            holder = socket.create_connection((self.host, self.port))
            for source, target, spoil in ((asker, holder, False), (holder, asker, True)):
                threading.Thread(target=self._copy, args=(source, target, spoil), daemon=True).start()

    def _copy(self, source, target, spoil):
        try:
            while data := bytearray(source.recv(4096)):
                if spoil and self.rng.random() < self.rate:
                    data[self.rng.randrange(len(data))] ^= 1 << self.rng.randrange(8)
                target.sendall(data)
        except OSError:
            pass
        for one in (source, target):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def close(self):
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()


def test_a_wire_that_flips_bits_gives_right_records_or_none(planes, rng):
    """1% of stretches of 4 KB, lengths and messages among them."""
    records = make_records(rng, 120)
    servers = [Server(store_of(records), PEERS, [planes()]) for _ in range(2)]
    proxies = [Proxy(server.addresses["tcp"], random.Random(rng.random()), 0.01) for server in servers]
    where = {name: {"tcp": proxy.address} for name, proxy in zip("ab", proxies, strict=True)}
    puller = Puller([planes()], lambda who: where[who], PEERS, EXPECTED, PullOptions(attempts=10, silence_seconds=0.5))
    failed = 0
    for _ in range(6):
        pull = puller.pull(wanted_of(records, "a", "b"), 20)
        for i, (why, record) in enumerate(zip(pull.result(), records.values(), strict=True)):
            failed += bool(why)
            assert pull.record(i) == (None if why else record)
    assert sum(puller.stats().errors.values()) > 0
    # A flipped bit in an ask's sizes or a refusal may take a holder out for a record; both of them rarely.
    assert failed <= 12
    puller.close()
    for proxy in proxies:
        proxy.close()


def test_only_who_has_the_token_is_served(planes, rng, tmp_path):
    files = []
    for name in ("a", "b"):
        path = tmp_path / name
        path.write_text(rng.randbytes(32).hex())
        files.append(str(path))
    records = make_records(rng, 3)
    server = Server(store_of(records), PEERS, [planes(token_file=files[0])])
    for token, told in ((files[1], "another token|closed|reset"), (None, "token_file|closed")):
        with pytest.raises((TransferRefusedError, PeerGoneError), match=told):
            planes(token_file=token).connect(server.addresses["tcp"], soon())
    puller = Puller([planes(token_file=files[0])], lambda _: server.addresses, PEERS, EXPECTED, PATIENT)
    assert puller.pull(wanted_of(records, "a"), 10).result() == [""] * 3
    strangers = Puller([planes(token_file=files[1])], lambda _: server.addresses, PEERS, EXPECTED, PATIENT)
    start = time.monotonic()
    assert all(strangers.pull(wanted_of(records, "a"), 10).result())
    assert time.monotonic() - start < 8
    # An asker learns that a holder without the token is none of its own, too.
    fake = planes(token_file=files[1]).serve(lambda *_: None)
    with pytest.raises((TransferRefusedError, PeerGoneError)):
        planes(token_file=files[0]).connect(fake, soon())
    short = tmp_path / "short"
    short.write_text("short")
    with pytest.raises(ConfigError, match="16 to 4096"):
        planes(token_file=str(short))
    with pytest.raises(ConfigError, match="cannot be read"):
        planes(token_file=str(tmp_path / "none"))


def test_tls_wants_a_certificate_of_the_same_authority(planes, rng, tmp_path):
    def certificate(name):
        made = [str(tmp_path / f"{name}.{end}") for end in ("crt", "key")]
        subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days",
             "2", "-subj", f"/CN={name}", "-out", made[0], "-keyout", made[1]],
            check=True, capture_output=True, timeout=30,
        )  # fmt: skip
        return {"tls_cert": made[0], "tls_key": made[1], "tls_ca": made[0]}

    try:
        ours, theirs = certificate("ours"), certificate("theirs")
    except FileNotFoundError:
        pytest.skip("no openssl")
    records = make_records(rng, 40, 5000, 30_000)
    server = Server(store_of(records), PEERS, [planes(**ours)])
    puller = Puller([planes(**ours)], lambda _: server.addresses, PEERS, EXPECTED, PATIENT)
    pull = puller.pull(wanted_of(records, "a"), 10)
    assert pull.result() == [""] * 40
    assert [pull.record(i) for i in range(40)] == list(records.values())
    for other in (theirs, {}):
        strangers = Puller([planes(**other)], lambda _: server.addresses, PEERS, EXPECTED, PullOptions(attempts=1))
        assert all(strangers.pull(wanted_of(records, "a"), 5).result())
    assert server.stats().asks == 1
    with pytest.raises(ConfigError, match="go together"):
        planes(tls_cert=ours["tls_cert"])
    with pytest.raises(ConfigError, match="cannot be used"):
        planes(**{**ours, "tls_key": theirs["tls_key"]})


def test_greetings_of_strangers_take_no_memory_and_end(planes):
    plane = planes(connections=4)
    address = plane.serve(lambda *_: None)
    host, port = address.split(":")
    open_ = []
    for said in (b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 64, b"", b"\x05\0\0\0hello"):
        one = socket.create_connection((host, int(port)), 5)
        one.sendall(said)
        open_.append(one)
    for one in open_:
        one.settimeout(5)
        with contextlib.suppress(ConnectionResetError):
            while one.recv(4096):
                pass
        one.close()
    planes().connect(address, soon()).close()


def test_connections_that_rest_give_way_to_new_ones_and_end(planes, rng, monkeypatch):
    """An asker whose connection was ended connects again, and nobody notices."""
    monkeypatch.setattr(tcp, "_YIELD_SECONDS", 0.0)
    records = make_records(rng, 3)
    plane = planes(connections=4)
    server = Server(store_of(records), PEERS, [plane])
    puller = Puller([planes()], lambda _: server.addresses, PEERS, EXPECTED, PATIENT)
    assert puller.pull(wanted_of(records, "a"), 10).result() == [""] * 3
    strangers = planes()
    for n in range(12):
        strangers.connect(server.addresses["tcp"], soon())
        until(lambda n=n: len(plane._resting) == min(n + 2, 4))
    assert puller.pull(wanted_of(records, "a"), 10).result() == [""] * 3
    assert not puller.stats().errors
    assert len(plane._inward) <= 4
    monkeypatch.setattr(tcp, "_REST_SECONDS", 0.05)
    other = planes()
    resting = other.connect(other.serve(lambda *_: None), soon())
    with pytest.raises(PeerGoneError, match="closed"):
        resting.receive(soon())


def test_while_none_rests_no_more_connect_than_may(planes, monkeypatch):
    monkeypatch.setattr(tcp, "_YIELD_SECONDS", 600.0)
    plane = planes(connections=2)
    address = plane.serve(lambda *_: None)
    for _ in range(2):
        planes().connect(address, soon())
    with pytest.raises(PeerGoneError):
        planes().connect(address, soon())


def test_connections_to_holders_that_have_gone_are_closed(planes, rng, monkeypatch):
    monkeypatch.setattr(idle, "_IDLE_SECONDS", 0.0)
    records, where, asker = make_records(rng, 2), {}, planes()
    puller = Puller([asker], lambda who: where[who], PEERS, EXPECTED, PATIENT)
    for name in ("a", "b", "c"):
        where[name] = Server(store_of(records), PEERS, [planes()]).addresses
        assert puller.pull(wanted_of(records, name), 10).result() == [""] * 2
        until(lambda name=name: list(puller._idle._streams) == [("tcp", where[name]["tcp"])])
    assert all(puller.pull([Wanted(rng.randbytes(32), 500, ())], 10).result())
    assert not asker._outward
    puller.close()


def test_addresses_are_numbers(planes):
    for wrong in ("localhost:80", "10.0.0.1", "10.0.0.1:x", "", "a" * 5000):
        with pytest.raises(TransferError):
            planes().connect(wrong, soon())
    for wrong in ({"host": "localhost"}, {"host": "0.0.0.0"}, {"port": 65536}, {"advertise": "x"}, {"connections": 0}):
        with pytest.raises(ConfigError):
            planes(**wrong)
    assert planes(host="0.0.0.0", advertise="127.0.0.1").serve(lambda *_: None).startswith("127.0.0.1:")


def test_nobody_there(planes, rng):
    puller = Puller([planes()], lambda who: {"tcp": "127.0.0.1:9"} if who == "a" else {}, PEERS, EXPECTED)
    told = puller.pull([Wanted(rng.randbytes(32), 500, ("a", "b"))], 10).result()
    assert "refused" in told[0] or "no plane" in told[0]
