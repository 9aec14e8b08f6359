"""What could not be loaded is not matched again, for a while."""

from __future__ import annotations

from dynamo_kvtc.adapters.kvbm import damaged
from dynamo_kvtc.adapters.kvbm.damaged import Damaged

TOKENS = list(range(100))


def test_a_match_ends_before_what_failed():
    marks = Damaged(16)
    assert marks.cut("", TOKENS, 0, 6) == 6
    marks.note("", TOKENS, 3)
    assert marks.cut("", TOKENS, 0, 6) == 3
    assert marks.cut("", TOKENS, 2, 4) == 1
    assert marks.cut("", TOKENS, 3, 3) == 0
    assert marks.cut("", TOKENS, 4, 2) == 2, "the device has it"
    assert marks.cut("", TOKENS, 0, 3) == 3
    assert marks.cut("salt", TOKENS, 0, 6) == 6
    assert marks.cut("", [7, *TOKENS[1:]], 0, 6) == 6, "another prefix is another block"
    assert marks.cut("", TOKENS[:70], 0, 4) == 3
    marks.note("", TOKENS, 1)
    assert marks.cut("", TOKENS, 0, 6) == 1
    marks.lift("", TOKENS, 1, 5)
    assert len(marks) == 0


def test_now_and_then_one_is_let_through():
    marks = Damaged(16)
    marks.note("", TOKENS, 3)
    seen = [marks.cut("", TOKENS, 0, 6) for _ in range(9)]
    assert seen == [3] * 8 + [6]
    marks.note("", TOKENS, 3)
    seen = [marks.cut("", TOKENS, 0, 6) for _ in range(17)]
    assert seen == [3] * 16 + [6]
    marks.lift("", TOKENS, 0, 6)
    assert marks.cut("", TOKENS, 0, 6) == 6
    assert len(marks) == 0


def test_it_is_bounded(monkeypatch):
    monkeypatch.setattr(damaged, "REMEMBERED", 10)
    marks = Damaged(4)
    for i in range(30):
        marks.note(str(i), TOKENS, 2)
    assert len(marks) == 10
    assert marks.cut("29", TOKENS, 0, 6) == 2
    assert marks.cut("0", TOKENS, 0, 6) == 6
    marks.clear()
    assert marks.cut("29", TOKENS, 0, 6) == 6
