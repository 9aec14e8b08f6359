"""Tables of an operating point: what they promise is what the codec spends."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from dynamo_kvtc.calibrate.importance import LEADING, ImportanceModel
from dynamo_kvtc.calibrate.narrow import quantise_narrow
from dynamo_kvtc.calibrate.tables import LAMBDA, PointTables, fit_tables
from dynamo_kvtc.codec.artifact import FORMAT_VERSION, Artifact, Manifest, Point, seal
from dynamo_kvtc.codec.channels import split_rows
from dynamo_kvtc.codec.kvtc import KvtcProfile
from dynamo_kvtc.codec.kvtc_point import level_bias
from dynamo_kvtc.ops import quantize, rans
from dynamo_kvtc.ops.project import quantise_basis
from dynamo_kvtc.types import KVShape, ModelIdentity
from tests.builders import case_seed, default_rope

COMPONENTS = 64
CHANNELS = 1536
NONE = ImportanceModel.none()


def draw(generator: np.random.Generator, tokens: int, components: int = COMPONENTS, decay: float = 0.1) -> torch.Tensor:
    """Laplacian coefficients of falling deviation; a token's overall size varies, so table choices differ."""
    sigma = 8.0 * np.exp(-decay * np.arange(components))
    size = np.exp(generator.normal(0, 0.4, (tokens, 1)))
    return torch.from_numpy((generator.laplace(0, 0.7, (tokens, components)) * sigma * size).astype(np.float32))


def random_model(generator: np.random.Generator) -> ImportanceModel:
    scale = 8.0 * np.exp(-0.1 * np.arange(LEADING))
    return ImportanceModel(torch.from_numpy(generator.normal(0, 0.6, (2, LEADING)) / scale), 4.0)


def fit(
    coefficients: list[torch.Tensor], step: float, models: list[ImportanceModel], slope: float = LAMBDA
) -> PointTables:
    """With a narrow basis of 5 levels a step, and no energy outside."""
    scales = [torch.full((y.shape[1],), 5, dtype=torch.uint8) for y in coefficients]
    return fit_tables(coefficients, step, models, scales, [torch.zeros(len(y)) for y in coefficients], slope)


def profile_of(
    coefficients: torch.Tensor, step: float, model: ImportanceModel, generator: np.random.Generator
) -> tuple[KvtcProfile, PointTables, torch.Tensor]:
    """The codec of a cache (one layer, one head of 768 dims) whose components are the coefficients, and its rows,
    float32 [n, 1536]."""
    basis = torch.from_numpy(np.linalg.qr(generator.standard_normal((CHANNELS, COMPONENTS)))[0]).float()
    deviation = torch.cat([coefficients.square().mean(dim=0).sqrt(), torch.zeros(CHANNELS - COMPONENTS)])
    narrow, scale, exponent = quantise_narrow(basis, deviation)
    fitted = fit_tables([coefficients], step, [model], [scale], [torch.zeros(len(coefficients))])
    (group,) = fitted.groups
    rank, shape = len(group.classes), KVShape(1, 1, CHANNELS // 2, "float32")
    rows = coefficients @ basis.T
    tensors = {
        "group0.mean": torch.zeros(CHANNELS),
        "group0.weight": torch.ones(CHANNELS),
        "group0.reach": rows.abs().amax(dim=0),
        "group0.wide": quantise_basis(basis)[:, : max(group.wide, 1)].contiguous(),
        "group0.narrow": narrow[:, : max(rank, 1)].contiguous(),
        "group0.scale": scale[: max(rank, 1)].contiguous(),
        "group0.exponent": torch.tensor([exponent], dtype=torch.int32),
        "group0.point0.classes": torch.from_numpy(group.classes),
        "group0.point0.wide": torch.tensor([group.wide], dtype=torch.int32),
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
    return KvtcProfile(Artifact(*sealed), 0), fitted, rows


@pytest.mark.parametrize("step", [0.05, 0.4, 3.0])
@pytest.mark.parametrize("important", [False, True])
def test_expected_bits_are_the_measured_cross_entropy(step, important):
    generator = np.random.default_rng(case_seed())
    y = draw(generator, 3000)
    model = random_model(generator) if important else NONE
    profile, fitted, rows = profile_of(y, step, model, generator)
    symbols, error = profile.quantise(0, *split_rows(rows, 1, 1, CHANNELS // 2))
    bits = profile.cross_entropy_bits(0, symbols) / len(y)
    assert fitted.bits == pytest.approx(bits, rel=0.01)
    assert fitted.groups[0].bits == fitted.bits
    if important:
        assert len((symbols[:, 0] % 16).unique()) >= 5
    else:
        assert (symbols[:, 0] % 16 == 4).all()
    if step > 0.1:
        # At a finer step what the basis lacks to be orthonormal, 1e-5 of a token's energy, is more than it loses.
        rounded = CHANNELS / 12 / 4**quantize.INPUT_BITS * quantize.gains(symbols[:, 0] % 16, torch.float64) ** 2
        lost = float((error * fitted.groups[0].error - rounded).mean())
        assert lost == pytest.approx(fitted.groups[0].error, rel=0.05)
    # At the coarsest step hardly a symbol after the leading ones is not zero, and activity may say nothing.
    if step < 1:
        assert len((symbols[:, 0] // 16).unique()) >= 3, "tokens of different size are meant to choose different tables"
    again, _ = profile.quantise(0, *profile.dequantise(0, symbols))
    same = again == symbols
    assert ((again[:, 0] ^ symbols[:, 0]) % 16 == 0).all(), "importance must not break what coding again gives"
    # What is large leaks through the narrow basis, 8 bits an entry: a fifth of a step, for a token of thousands of own
    # steps, as there are at the finest; else one in ten million symbols.
    if step > 0.1:
        assert (~same).sum() <= 1
    else:
        assert same.all(dim=1).double().mean() > 0.98
    assert (again - symbols).abs()[:, 1:].max() <= 1


def test_table_choice_pays():
    """Against the neutral tables for every token."""
    generator = np.random.default_rng(case_seed())
    y = draw(generator, 2000)
    profile, _, rows = profile_of(y, 0.3, NONE, generator)
    symbols, _ = profile.quantise(0, *split_rows(rows, 1, 1, CHANNELS // 2))
    chosen = profile.cross_entropy_bits(0, symbols)
    symbols[:, 0] = symbols[:, 0] % 16 + 16 * 8
    assert chosen < 0.99 * profile.cross_entropy_bits(0, symbols)


def test_bits_fall_and_error_stays_as_the_step_grows():
    generator = np.random.default_rng(case_seed())
    y = draw(generator, 1500)
    model = random_model(generator)
    fits = [fit([y], step, [model]) for step in np.geomspace(0.02, 10.0, 9)]
    bits, ranks = [f.bits for f in fits], [len(f.groups[0].classes) for f in fits]
    assert all(a > 1.02 * b for a, b in itertools.pairwise(bits)), bits
    assert ranks == sorted(ranks, reverse=True)
    # In squared steps: near 1/12 a component where all are coded, never more.
    plain = [fit([y], step, [NONE]) for step in np.geomspace(0.02, 10.0, 5)]
    assert all(f.groups[0].error < COMPONENTS / 12 * 1.5 for f in plain)


def test_live_components_end_where_they_cost_more_than_they_mend():
    """Twenty large components and forty-four next to nothing."""
    generator = np.random.default_rng(case_seed())
    y = draw(generator, 1500)
    y[:, 20:] = 0.01 * torch.from_numpy(generator.standard_normal((1500, COMPONENTS - 20))).float()
    y[:, :20] = torch.from_numpy(generator.laplace(0, 5, (1500, 20))).float()
    assert len(fit([y], 0.5, [NONE]).groups[0].classes) == 20
    fine = fit([y], 0.01, [NONE]).groups[0]
    assert len(fine.classes) == COMPONENTS
    # The leading components live whatever they hold.
    assert len(fit([y], 0.5, [random_model(generator)]).groups[0].classes) == LEADING


def test_a_group_of_nothing_has_no_live_component():
    generator = np.random.default_rng(case_seed())
    nothing = fit([draw(generator, 50), torch.zeros(50, 8)], 1.0, [NONE, NONE]).groups[1]
    assert (len(nothing.classes), nothing.bits, nothing.error) == (0, 0.0, 0.0)


def test_a_step_beyond_every_component_leaves_none():
    none = fit([torch.full((50, 8), 1e-3)], 1.0, [NONE])
    assert (len(none.groups[0].classes), none.bits) == (0, 0.0)


def test_groups_share_tables_and_keep_their_own_lanes():
    generator = np.random.default_rng(case_seed())
    large, small = draw(generator, 1200), 0.1 * draw(generator, 1200, 40)
    fitted = fit([large, small], 0.2, [random_model(generator), NONE])
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
    generator = np.random.default_rng(case_seed())
    for step in (0.03, 0.5, 4.0):
        fitted = fit([draw(generator, 800)], step, [NONE])
        rounding = fitted.rounding / 2**20
        assert (fitted.centroid <= rounding - 0.19).all()
        assert (1 - fitted.centroid + rounding < 2).all()
        assert (rounding <= 0.5).all()
        assert (fitted.activity >= 0).all()


def test_quantising_minds_the_bits():
    """At a free rate the thresholds are those of plain rounding; at a price the zero bin is wider."""
    generator = np.random.default_rng(case_seed())
    y = draw(generator, 1500)
    free, dear = (fit([y], 1.0, [NONE], slope) for slope in (0.0, 2 * LAMBDA))
    assert dear.bits < free.bits
    assert dear.rounding.mean() < free.rounding.mean()


def test_components_that_narrow_levels_cannot_hold_are_wide():
    """Levels reach 127 / 5 = 25 steps: what is often beyond is wide, with all before it."""
    generator = np.random.default_rng(case_seed())
    y = draw(generator, 2000)
    widths = [fit([y], step, [NONE]).groups[0].wide for step in (0.05, 0.2, 0.8, 3.0)]
    assert widths == sorted(widths, reverse=True)
    assert widths[0] > 30
    assert widths[-1] <= 16, "they come in sixteens"
    # Leading components are wide whatever they hold.
    assert fit([y], 3.0, [random_model(generator)]).groups[0].wide == LEADING
    # The first component past the wide ones is hardly ever clipped.
    group = fit([y], 0.2, [NONE]).groups[0]
    clipped = ((y[:, group.wide :].abs() / 0.2) - 25.5).clamp(min=0).square().mean(dim=0)
    assert (clipped <= 0.005).all()


@pytest.mark.parametrize("important", [False, True])
def test_the_error_is_what_the_quantiser_says_of_a_token(important):
    """Leading components in the token's own steps too, levels clipped and rounded as the decoder has them, and the
    energy outside the components."""
    generator = np.random.default_rng(case_seed())
    n, step = 1500, 0.7
    y = draw(generator, n)
    model = random_model(generator) if important else NONE
    outside = torch.from_numpy(generator.exponential(3.0, n)).float()
    scale = torch.full((COMPONENTS,), 5, dtype=torch.uint8)
    fitted = fit_tables([y], step, [model], [scale], [outside])
    (group,) = fitted.groups
    live, wide, leading = len(group.classes), group.wide, group.importance.shape[1]
    index = torch.from_numpy(group.classes).long()
    rounding, centroid = (torch.from_numpy(x)[index] for x in (fitted.rounding, fitted.centroid))
    # A basis of the identity, exactly, whatever the component.
    units = torch.full((live,), 2**10, dtype=torch.int32)
    bias = level_bias(scale[wide:live].int(), rounding[wide:], centroid[wide:])
    limits = torch.full((live,), 32767, dtype=torch.int32)
    limits[wide:] = quantize.narrow_limits(scale[wide:live].int(), bias)
    c = (y[:, :live].double() / step * 2 ** (quantize.UNIT_BITS + quantize.INPUT_BITS - 10)).round().long()
    front, _ = quantize.quantise(c[:, :leading], units[:leading], rounding[:leading], limits[:leading])
    fineness = quantize.fineness_of(front, group.importance, group.bias)
    rest, _ = quantize.quantise(c[:, leading:], units[leading:], rounding[leading:], limits[leading:], fineness)
    q = torch.cat([front, rest], dim=1)
    narrow = quantize.narrow_levels(q[:, wide:], scale[wide:live].int(), bias)
    levels = torch.cat(
        [
            quantize.wide_error_levels(q[:, :wide], centroid[:wide]),
            quantize.narrow_error_levels(narrow, scale[wide:live].int()),
        ],
        dim=1,
    )
    energy = ((y.double().square().sum(dim=1) + outside) / step**2 * 4**quantize.INPUT_BITS).round().long()
    error = quantize.error_of(c, units, levels, energy, fineness, leading)
    assert group.error == pytest.approx(float(error.mean()), rel=0.01)
    if important:
        assert len(fineness.unique()) >= 5
