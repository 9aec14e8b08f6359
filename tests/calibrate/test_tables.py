"""Tables of an operating point: what they promise is what the codec spends."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from dynamo_kvtc.calibrate.importance import LEADING, ImportanceModel
from dynamo_kvtc.calibrate.tables import LAMBDA, fit_tables
from dynamo_kvtc.codec.artifact import FORMAT_VERSION, Artifact, Manifest, Point, seal
from dynamo_kvtc.codec.channels import split_rows
from dynamo_kvtc.codec.kvtc import KvtcProfile
from dynamo_kvtc.ops import rans
from dynamo_kvtc.types import KVShape, ModelIdentity
from tests.builders import default_rope, fresh_seed

CHANNELS = 64
NONE = ImportanceModel.none()


def draw(generator: np.random.Generator, tokens: int, components: int = CHANNELS, decay: float = 0.1) -> torch.Tensor:
    """Laplacian coefficients of falling deviation; a token's overall size varies, so table choices differ."""
    sigma = 8.0 * np.exp(-decay * np.arange(components))
    size = np.exp(generator.normal(0, 0.4, (tokens, 1)))
    return torch.from_numpy((generator.laplace(0, 0.7, (tokens, components)) * sigma * size).astype(np.float32))


def random_model(generator: np.random.Generator) -> ImportanceModel:
    scale = 8.0 * np.exp(-0.1 * np.arange(LEADING))
    return ImportanceModel(torch.from_numpy(generator.normal(0, 0.6, (2, LEADING)) / scale), 4.0)


def profile_of(coefficients: torch.Tensor, step: float, model: ImportanceModel) -> tuple[KvtcProfile, object]:
    """The codec of a cache whose channels are the coefficients themselves: one head, 32 dims, one layer."""
    fitted = fit_tables([coefficients], step, [model])
    (group,) = fitted.groups
    shape = KVShape(1, 1, CHANNELS // 2, "float32")
    rank = len(group.classes)
    # The largest int16: a gain of 1 - 2**-15.
    basis = torch.zeros(CHANNELS, rank, dtype=torch.int16).fill_diagonal_(2**15 - 1)
    tensors = {
        "group0.mean": torch.zeros(CHANNELS),
        "group0.weight": torch.ones(CHANNELS),
        "group0.basis": basis,
        "group0.point0.classes": torch.from_numpy(group.classes),
        "group0.point0.error": torch.tensor([group.error], dtype=torch.float32),
        "group0.point0.importance": group.importance,
        "group0.point0.bias": torch.tensor([group.bias], dtype=torch.int32),
        "group0.point0.thresholds": group.thresholds,
        "point0.frequencies": torch.from_numpy(fitted.tables.frequencies),
        "point0.shift": torch.from_numpy(fitted.tables.shift),
        "point0.rounding": torch.from_numpy(fitted.rounding),
        "point0.centroid": torch.from_numpy(fitted.centroid),
        "point0.activity": torch.from_numpy(fitted.activity),
    }
    manifest = Manifest(
        FORMAT_VERSION, "kvtc", ModelIdentity("m", "r", "00", "X"), shape, default_rope(shape), 1, 16, ((0, 1),),
        (Point("p", step, 1.0),), {},
    )  # fmt: skip
    sealed = seal(manifest, {f"rank0.{name}": tensor for name, tensor in tensors.items()})
    return KvtcProfile(Artifact(*sealed), 0), fitted


@pytest.mark.parametrize("step", [0.05, 0.4, 3.0])
@pytest.mark.parametrize("important", [False, True])
def test_expected_bits_are_the_measured_cross_entropy(step, important):
    generator = np.random.default_rng(fresh_seed())
    y = draw(generator, 3000)
    model = random_model(generator) if important else NONE
    profile, fitted = profile_of(y, step, model)
    k, v = split_rows(y, 1, 1, CHANNELS // 2)
    symbols, error = profile.quantise(0, k, v)
    bits = profile.cross_entropy_bits(0, symbols) / len(y)
    assert fitted.bits == pytest.approx(bits, rel=0.01)
    assert fitted.groups[0].bits == fitted.bits
    if important:
        assert len((symbols[:, 0] % 16).unique()) >= 5
    else:
        assert (symbols[:, 0] % 16 == 4).all()
        if step > 1:
            # At finer steps what the basis lacks to 1, 2**-15, is more of a token's energy than it loses.
            assert float(error.mean()) == pytest.approx(1, rel=0.05)
    # At the coarsest step hardly a symbol after the leading ones is not zero, and activity may say nothing.
    if step < 1:
        assert len((symbols[:, 0] // 16).unique()) >= 3, "tokens of different size are meant to choose different tables"
    again, _ = profile.quantise(0, *profile.dequantise(0, symbols))
    assert torch.equal(again, symbols), "importance, fitted or not, must not break what coding again gives"


def test_table_choice_pays():
    """Against the neutral tables for every token."""
    generator = np.random.default_rng(fresh_seed())
    y = draw(generator, 2000)
    profile, _ = profile_of(y, 0.3, NONE)
    symbols, _ = profile.quantise(0, *split_rows(y, 1, 1, CHANNELS // 2))
    chosen = profile.cross_entropy_bits(0, symbols)
    symbols[:, 0] = symbols[:, 0] % 16 + 16 * 8
    assert chosen < 0.99 * profile.cross_entropy_bits(0, symbols)


def test_bits_fall_and_error_stays_as_the_step_grows():
    generator = np.random.default_rng(fresh_seed())
    y = draw(generator, 1500)
    model = random_model(generator)
    fits = [fit_tables([y], step, [model]) for step in np.geomspace(0.02, 10.0, 9)]
    bits, ranks = [fit.bits for fit in fits], [len(fit.groups[0].classes) for fit in fits]
    assert all(a > 1.02 * b for a, b in itertools.pairwise(bits)), bits
    assert ranks == sorted(ranks, reverse=True)
    # In squared steps: near 1/12 a component where all are coded, never more.
    assert all(fit.groups[0].error < CHANNELS / 12 * 1.5 for fit in fits)


def test_live_components_end_where_they_cost_more_than_they_mend():
    """Twenty large components and forty-four next to nothing."""
    generator = np.random.default_rng(fresh_seed())
    y = draw(generator, 1500)
    y[:, 20:] = 0.01 * torch.from_numpy(generator.standard_normal((1500, CHANNELS - 20))).float()
    y[:, :20] = torch.from_numpy(generator.laplace(0, 5, (1500, 20))).float()
    assert len(fit_tables([y], 0.5, [NONE]).groups[0].classes) == 20
    fine = fit_tables([y], 0.01, [NONE]).groups[0]
    assert len(fine.classes) == CHANNELS
    # The leading components live whatever they hold.
    assert len(fit_tables([y], 0.5, [random_model(generator)]).groups[0].classes) == LEADING


def test_a_group_of_nothing_has_no_live_component():
    generator = np.random.default_rng(fresh_seed())
    nothing = fit_tables([draw(generator, 50), torch.zeros(50, 8)], 1.0, [NONE, NONE]).groups[1]
    assert (len(nothing.classes), nothing.bits, nothing.error) == (0, 0.0, 0.0)


def test_a_step_beyond_every_component_leaves_none():
    fit = fit_tables([torch.full((50, 8), 1e-3)], 1.0, [NONE])
    assert (len(fit.groups[0].classes), fit.bits) == (0, 0.0)


def test_groups_share_tables_and_keep_their_own_lanes():
    generator = np.random.default_rng(fresh_seed())
    large, small = draw(generator, 1200), 0.1 * draw(generator, 1200, 40)
    fitted = fit_tables([large, small], 0.2, [random_model(generator), NONE])
    assert [group.importance.shape[1] for group in fitted.groups] == [LEADING, 0]
    assert fitted.groups[0].bits > fitted.groups[1].bits > 0
    assert fitted.bits == fitted.groups[0].bits + fitted.groups[1].bits
    for group in fitted.groups:
        assert group.thresholds.shape == (15,)
        assert group.thresholds.dtype == torch.int64
        assert (group.thresholds[1:] >= group.thresholds[:-1]).all()
        assert group.classes.max() < len(fitted.tables.shift) <= rans.MAX_CLASSES


def test_levels_stay_inside_their_bins():
    """The centroid never leaves a symbol's bin, or coding a decoded block again would change symbols."""
    generator = np.random.default_rng(fresh_seed())
    for step in (0.03, 0.5, 4.0):
        fitted = fit_tables([draw(generator, 800)], step, [NONE])
        rounding = fitted.rounding / 2**20
        assert (fitted.centroid <= rounding - 0.09).all()
        assert (1 - fitted.centroid + rounding < 2).all()
        assert (rounding <= 0.5).all()
        assert (fitted.activity >= 0).all()


def test_quantising_minds_the_bits():
    """At a free rate the thresholds are those of plain rounding; at a price the zero bin is wider."""
    generator = np.random.default_rng(fresh_seed())
    y = draw(generator, 1500)
    free, dear = (fit_tables([y], 1.0, [NONE], slope) for slope in (0.0, 2 * LAMBDA))
    assert dear.bits < free.bits
    assert dear.rounding.mean() < free.rounding.mean()
