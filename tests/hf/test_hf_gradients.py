"""The Fisher gradient against finite differences of the log-likelihood, taken in float64."""

from __future__ import annotations

import copy

import pytest
import torch

from dynamo_kvtc.errors import ConfigError
from dynamo_kvtc.hf.gradients import gradient_before_rope, sample_labels
from dynamo_kvtc.hf.model import wrap_model
from dynamo_kvtc.ops.rope import apply_rope
from dynamo_kvtc.types import RopeSpec

transformers = pytest.importorskip("transformers")
CONTEXT, CONTINUATION = torch.arange(3, 14), torch.arange(40, 46)


class Likelihood:
    """Log-likelihood in float64 of the labels that ``seed`` samples, as a function of changes to k (before RoPE), v."""

    def __init__(self, model, seed: int) -> None:
        self.rope = model.rope
        self.k, self.v = model.prefill(CONTEXT)
        logits = model.logits(self.k, self.v, CONTINUATION, len(CONTEXT))
        self.labels = sample_labels(logits, torch.Generator().manual_seed(seed))
        self.module = copy.deepcopy(model.module).double()

    def __call__(self, dk: torch.Tensor, dv: torch.Tensor) -> float:
        k = self.k.double() + apply_rope(dk, torch.arange(len(CONTEXT)), self.rope).double()
        v = self.v.double() + dv.double()
        cache = transformers.DynamicCache()
        for layer in range(len(k)):
            cache.update(k[layer][None], v[layer][None], layer)
        positions = len(CONTEXT) + torch.arange(len(CONTINUATION))
        with torch.no_grad():
            logits = self.module(
                input_ids=CONTINUATION[None], position_ids=positions[None], past_key_values=cache
            ).logits[0]
        return float(torch.log_softmax(logits, -1).gather(-1, self.labels[:, None]).sum())


# yarn has an attention scaling other than 1; cohere turns neighbouring dims; glm leaves half of the dims unturned.
@pytest.mark.parametrize("kind", ["llama", "yarn", "qwen3", "gemma2", "cohere", "glm"])
def test_equals_finite_differences(tiny_module, kind):
    model = wrap_model(tiny_module(kind), None, kind)
    gk, gv = model.fisher_gradients(CONTEXT, CONTINUATION, torch.Generator().manual_seed(5))
    assert gk.dtype == gv.dtype == torch.float32
    assert gk.shape == gv.shape == (3, model.shape.kv_heads, len(CONTEXT), model.shape.head_dim)
    likelihood = Likelihood(model, seed=5)
    zero = torch.zeros_like(gk)
    epsilon = 1e-3
    generator = torch.Generator().manual_seed(1)
    for gradient, place in ((gk, 0), (gv, 1)):
        # The largest entries one by one, then random directions over all of them.
        for index in gradient.abs().flatten().topk(4).indices:
            step = zero.clone()
            step.view(-1)[index] = epsilon
            args = [(step, zero), (zero, step)][place], [(-step, zero), (zero, -step)][place]
            slope = (likelihood(*args[0]) - likelihood(*args[1])) / (2 * epsilon)
            assert slope == pytest.approx(float(gradient.flatten()[index]), rel=5e-3)
        for _ in range(2):
            direction = torch.randn(gradient.shape, generator=generator)
            step = direction * epsilon
            args = [(step, zero), (zero, step)][place], [(-step, zero), (zero, -step)][place]
            slope = (likelihood(*args[0]) - likelihood(*args[1])) / (2 * epsilon)
            expected = float((gradient * direction).sum())
            assert slope == pytest.approx(expected, rel=5e-3, abs=2e-3 * float(gradient.norm()))


def test_works_in_bfloat16_and_leaves_no_gradients_behind(tiny_module):
    exact = wrap_model(tiny_module("llama"), None, "exact")
    half = wrap_model(tiny_module("llama", torch.bfloat16), None, "half")
    # The same labels in both: their logits differ by rounding, so sample often enough to compare the mean square.
    squares = []
    for model in (exact, half):
        total = 0.0
        for seed in range(12):
            gk, gv = model.fisher_gradients(CONTEXT, CONTINUATION, torch.Generator().manual_seed(seed))
            assert gk.dtype == gv.dtype == torch.float32
            total += float(gk.square().mean() + gv.square().mean())
        squares.append(total)
        assert all(parameter.grad is None for parameter in model.module.parameters())
    assert squares[1] == pytest.approx(squares[0], rel=0.25)


def test_the_same_generator_gives_the_same_gradient(tiny_llama):
    first = tiny_llama.fisher_gradients(CONTEXT, CONTINUATION, torch.Generator().manual_seed(1))
    again = tiny_llama.fisher_gradients(CONTEXT, CONTINUATION, torch.Generator().manual_seed(1))
    other = tiny_llama.fisher_gradients(CONTEXT, CONTINUATION, torch.Generator().manual_seed(2))
    assert torch.equal(first[0], again[0])
    assert not torch.equal(first[0], other[0])


def test_works_inside_no_grad(tiny_llama):
    with torch.no_grad():
        gk, _ = tiny_llama.fisher_gradients(CONTEXT, CONTINUATION, torch.Generator())
    assert gk.abs().max() > 0


def test_labels_follow_the_models_distribution():
    logits = torch.log(torch.tensor([0.5, 0.0, 0.3, 0.2])).expand(20000, 4)
    labels = sample_labels(logits, torch.Generator().manual_seed(0))
    shares = torch.bincount(labels, minlength=4) / 20000
    torch.testing.assert_close(shares, torch.tensor([0.5, 0.0, 0.3, 0.2]), atol=0.015, rtol=0)
    assert shares[1] == 0


@pytest.mark.parametrize("style", ["half", "interleaved"])
def test_rotated_gradient_is_the_adjoint(style):
    """<g, rope(x)> = <rotated g, x> for every x, attention scaling and untouched dims included."""
    rope = RopeSpec((1.0, 0.3, 0.01), attention_scaling=1.3, style=style)
    generator = torch.Generator().manual_seed(0)
    gradient, x = torch.randn(2, 2, 7, 10, generator=generator)
    positions = torch.arange(5, 12)
    left = (gradient * apply_rope(x, positions, rope)).sum()
    right = (gradient_before_rope(gradient, positions, rope) * x).sum()
    torch.testing.assert_close(left, right)


def test_empty_or_too_long_input_is_named(tiny_llama):
    generator = torch.Generator()
    with pytest.raises(ConfigError, match="at least one token"):
        tiny_llama.fisher_gradients(CONTEXT[:0], CONTINUATION, generator)
    with pytest.raises(ConfigError, match="at least one token"):
        tiny_llama.fisher_gradients(CONTEXT, CONTINUATION[:0], generator)
    with pytest.raises(ConfigError, match="positions 0 to 512"):
        tiny_llama.fisher_gradients(CONTEXT.repeat(40), CONTINUATION.repeat(20), generator)
