"""The messages as bytes: round trips, and every refusal by its words."""

from __future__ import annotations

import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_kvtc.adapters.kvbm import protocol
from dynamo_kvtc.adapters.kvbm.protocol import Message, Pool, Transfer
from dynamo_kvtc.adapters.kvbm.step import decode_step, encode_ours, kvbm_request_ids
from dynamo_kvtc.errors import EngineProtocolError
from tests.adapters.kvbm.played import encode_message, encode_transfer

IDS = st.integers(0, protocol.MAX_BLOCK_ID)


@given(st.integers(0, 2**64 - 1))
def test_varints_come_back(value):
    data = protocol.encode_varint(value)
    assert protocol.decode_varint(b"x" + data, 1) == (value, 1 + len(data))


@pytest.mark.parametrize(
    ("value", "data"),
    [
        (0, "00"),
        (250, "fa"),
        (251, "fbfb00"),
        (65535, "fbffff"),
        (65536, "fc00000100"),
        (2**32, "fd" + "0000000001000000"),
    ],
)
def test_varints_are_the_leaders(value, data):
    assert protocol.encode_varint(value).hex() == data


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "missing at byte 0 of 0"),
        (b"\xfe" + bytes(8), "mark 254"),
        (b"\xfb\x01", "needs 3 bytes of 2"),
        (b"\xfb\x05\x00", "spends 3 bytes on 5"),
        (b"\xfd" + bytes(8), "spends 9 bytes on 0"),
    ],
)
def test_forged_varints(data, words):
    with pytest.raises(EngineProtocolError, match=words):
        protocol.decode_varint(data)


def test_numbers_end_where_the_payload_ends():
    assert protocol.decode_leader_metadata(b"\x08@") == (8, 64)
    with pytest.raises(EngineProtocolError, match="3 bytes; its 2 numbers end at byte 2"):
        protocol.decode_leader_metadata(b"\x08@\x00")


@pytest.mark.parametrize("value", [-1, 2**64])
def test_numbers_that_do_not_fit(value):
    with pytest.raises(EngineProtocolError, match=r"2\*\*64 - 1"):
        protocol.encode_varint(value)


def transfers():
    def build(route, pairs, request_id, uuid, scheduled):
        if Pool.DEVICE not in route:
            return Transfer(*route, pairs)
        return Transfer(*route, pairs, request_id, uuid, scheduled)

    pairs = st.lists(st.tuples(IDS, IDS), max_size=20, unique_by=lambda pair: pair[1]).map(tuple)
    name = st.text(st.characters(codec="utf-8"), min_size=1, max_size=40)
    return st.builds(build, st.sampled_from(sorted(protocol.ROUTES, key=str)), pairs, name, name, st.booleans())


@given(transfers(), st.integers(0, 2**64 - 1))
def test_transfers_come_back(transfer, message_id):
    message = Message(message_id, "transfer_blocks", encode_transfer(transfer))
    back = protocol.decode_message(encode_message(message))
    assert back == message
    assert protocol.decode_transfer(back.payload) == transfer


GOOD = {
    "from_pool": "Device",
    "to_pool": "Host",
    "blocks": [[1, 2]],
    "connector_req": {"request_id": "r", "uuid": "u", "requirement": None, "request_type": "Scheduled"},
}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"from_pool": "Object"}, "from 'Object'"),
        ({"from_pool": ["Device"]}, "the pools are"),
        ({"to_pool": "Device"}, "from Device to Device"),
        ({"blocks": [[1]]}, "must be"),
        ({"blocks": [[1, 2, 3]]}, "must be"),
        ({"blocks": [[1, -2]]}, "got -2"),
        ({"blocks": [[1, True]]}, "got True"),
        ({"blocks": [[1, 2.0]]}, "got 2.0"),
        ({"blocks": [[1, 2**48]]}, "a target block"),
        ({"blocks": [[1, 2], [3, 2]]}, "twice in one transfer"),
        ({"blocks": {}}, "list of at most"),
        ({"connector_req": None}, "with connector_req None"),
        ({"from_pool": "Host", "to_pool": "Disk"}, "nowhere else"),
        ({"connector_req": []}, "must be an object"),
        ({"connector_req": {**GOOD["connector_req"], "request_type": "Later"}}, "'Later'"),
        ({"connector_req": {**GOOD["connector_req"], "requirement": 1}}, "requirement 1"),
        ({"connector_req": {**GOOD["connector_req"], "request_id": ""}}, "request_id must be"),
        ({"connector_req": {**GOOD["connector_req"], "uuid": "u" * 65}}, "uuid must be"),
        ({"connector_req": {**GOOD["connector_req"], "priority": 1}}, "priority"),
        ({"layers": 3}, "layers"),
    ],
)
def test_forged_transfers(change, words):
    assert protocol.decode_transfer(json.dumps(GOOD).encode()).pairs == ((1, 2),)
    with pytest.raises(EngineProtocolError, match=words):
        protocol.decode_transfer(json.dumps({**GOOD, **change}).encode())


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "not JSON"),
        (b"[1]", "it must be an object"),
        (b'{"from_pool":1,"from_pool":2}', "a key is there twice"),
        (b'{"blocks":NaN}', "not a number of JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b" " * (protocol.MAX_PAYLOAD_BYTES + 1), "at most"),
    ],
)
def test_forged_json(data, words):
    with pytest.raises(EngineProtocolError, match=words):
        protocol.decode_transfer(data)


@pytest.mark.parametrize(
    ("frames", "words"),
    [
        ([], "2 or 3 frames; got 0"),
        ([bytes(8)], "got 1"),
        ([bytes(8), b"ping", b"", b""], "got 4"),
        ([bytes(7), b"ping"], "8 bytes; got 7"),
        ([bytes(8), b""], "1 to 64 ASCII"),
        ([bytes(8), b"p" * 65], "1 to 64 ASCII"),
        ([bytes(8), b"\xff"], "1 to 64 ASCII"),
        ([bytes(8), b"ping", bytes(protocol.MAX_PAYLOAD_BYTES + 1)], "are read"),
    ],
)
def test_forged_frames(frames, words):
    with pytest.raises(EngineProtocolError, match=words):
        protocol.decode_message(frames)


@given(st.lists(st.binary(max_size=40), max_size=4))
def test_hostile_frames_raise_nothing_else(frames):
    with contextlib.suppress(EngineProtocolError):
        message = protocol.decode_message(frames)
        protocol.decode_transfer(message.payload)


@given(st.recursive(st.none() | st.booleans() | IDS | st.text(max_size=5), lambda s: st.lists(s, max_size=3)
                    | st.dictionaries(st.sampled_from([*GOOD, *GOOD["connector_req"]]), s), max_leaves=12))  # fmt: skip
def test_hostile_json_raises_nothing_else(value):
    data = json.dumps(value).encode()
    for decode in (protocol.decode_transfer, kvbm_request_ids):
        with contextlib.suppress(EngineProtocolError):
            decode(data)


KVBM = {
    "iteration": 3,
    "new_slots": [{"request_id": "r", "expected_immediate_ops": 1}],
    "operations": [{"request_id": "r", "uuid": "u", "transfer_type": "Load", "request_type": "Immediate"}],
}


def test_a_step_knows_the_position_of_every_block():
    ours = encode_ours({"r": [7, 9, 8, 9]}, 16, ["f"], ["p"], {"r": [9, 8]})
    step = decode_step(json.dumps(KVBM).encode(), ours)
    (operation,) = step.operations
    assert (operation.request_id, operation.uuid, operation.load) == ("r", "u", True)
    assert operation.positions == {7: 0, 9: 16, 8: 32}
    assert (step.finished, step.preempted, step.loading) == (("f",), ("p",), {"r": (9, 8)})
    assert kvbm_request_ids(json.dumps(KVBM).encode()) == {"r"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"operations": [{**KVBM["operations"][0], "request_type": "Scheduled"}]}, "no known leader"),
        ({"operations": [{**KVBM["operations"][0], "layer": 1}]}, "an operation of KVBM's metadata"),
        ({"operations": None}, "list of operations"),
        ({"version": 2}, "version"),
        ({"operations": [{**KVBM["operations"][0], "request_id": "other"}]}, "the connector no blocks"),
    ],
)
def test_forged_steps(change, words):
    with pytest.raises(EngineProtocolError, match=words):
        decode_step(json.dumps({**KVBM, **change}).encode(), encode_ours({"r": [7]}, 16))
