"""The short form of ``python -m tests.fuzz_records``."""

from __future__ import annotations

from collections import Counter

import pytest

from tests import fuzz_records
from tests.builders import case_seed


def test_damaged_records_are_refused_or_decode_to_something_sound():
    seed = case_seed()
    counts: Counter[str] = Counter()
    fuzz_records.warm_up(seed)
    with fuzz_records.bounded_memory():
        fuzz_records.fuzz_records(1500, seed, counts)
    for profile in fuzz_records.PROFILES:
        reached = {name.rpartition(" ")[2] for name in counts if name.startswith(profile)}
        assert {"RecordCorruptError", "RecordFormatError", "RecordTruncatedError", "decoded"} <= reached, counts


def test_damaged_artifacts_are_refused():
    counts: Counter[str] = Counter()
    with fuzz_records.bounded_memory():
        fuzz_records.fuzz_artifacts(60, case_seed(), counts)
    assert counts["artifacts re-signed: ArtifactFormatError"] >= 20, counts
    assert counts["artifacts odd: decoded"] == 5, counts


@pytest.mark.parametrize("lie", fuzz_records.LIES, ids=lambda lie: lie.__name__)
def test_each_lie_in_a_signed_artifact_is_refused(lie, signed_artifact):
    outcome = fuzz_records.judge(
        lie.__name__,
        lambda: fuzz_records.BlockCodec(
            fuzz_records.parse_artifact(fuzz_records.forge_artifact(signed_artifact, lie)), "coarse"
        ),
        fuzz_records.ArtifactError,
    )
    assert outcome in ("ArtifactFormatError", "ArtifactVersionError")


@pytest.mark.parametrize("oddity", fuzz_records.ODDITIES, ids=lambda lie: lie.__name__)
def test_an_artifact_of_extreme_numbers_still_codes(oddity, large_artifact):
    fuzz_records.use_artifact(fuzz_records.forge_artifact(large_artifact, oddity), case_seed())


@pytest.fixture(scope="module")
def large_artifact() -> bytes:
    return fuzz_records.large_artifact(0)


@pytest.fixture(scope="module")
def signed_artifact() -> bytes:
    manifest, tensors, _ = fuzz_records.make_artifact(
        fuzz_records.KVShape(3, 1, 8, "float16"), groups=((0, 1), (1, 3)), components=12
    )
    text = fuzz_records.msgspec.json.encode(manifest).decode()
    return fuzz_records.save_tensors(tensors, metadata={fuzz_records.METADATA_KEY: text})


def test_a_signed_artifact_without_a_lie_is_taken(signed_artifact):
    def no_lie(manifest, tensors):
        pass

    data = fuzz_records.forge_artifact(signed_artifact, no_lie)
    assert fuzz_records.parse_artifact(data).digest == fuzz_records.parse_artifact(signed_artifact).digest
