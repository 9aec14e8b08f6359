"""The gradient of the model's own log-likelihood with respect to its cache: what an error in each entry would cost."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dynamo_kvtc.errors import ConfigError
from dynamo_kvtc.ops.rope import remove_rope
from dynamo_kvtc.types import RopeSpec

if TYPE_CHECKING:
    from dynamo_kvtc.hf.model import Model


def sample_labels(logits: Tensor, generator: torch.Generator) -> Tensor:
    """One token drawn from the model's distribution at every position.

    logits: float32 [T, vocab]. Returns int64 [T] on logits' device. The randomness comes from ``generator`` on its own
    device, so a CPU generator draws the same uniform numbers whatever the model's device.
    """
    # In float64: a float32 running sum over 100,000 words would lose the rare ones.
    cumulative = torch.softmax(logits.detach().double(), dim=-1).cumsum(dim=-1)
    uniform = torch.rand(logits.shape[0], 1, generator=generator, device=generator.device, dtype=torch.float64)
    drawn = torch.searchsorted(cumulative, uniform.to(logits.device) * cumulative[:, -1:], right=True)
    return drawn.squeeze(-1).clamp_(max=logits.shape[-1] - 1)


def gradient_before_rope(gradient: Tensor, positions: Tensor, rope: RopeSpec) -> Tensor:
    """The gradient with respect to keys before RoPE, from the one with respect to keys after it.

    gradient: float32 [..., T, D]; positions: int64 [T]. Returns float32 of gradient's shape.

    The model computes k' = s R k on the rotated dims (s the attention scaling, R a rotation), so dL/dk = s R^T dL/dk'.
    ``remove_rope`` computes R^T / s: its result times s^2.
    """
    out = remove_rope(gradient, positions, rope)
    out[..., : rope.rotary_dim] *= rope.attention_scaling**2
    return out


def fisher_gradients(
    model: Model, ids_context: Tensor, ids_continuation: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Gradient of the model's own log-likelihood with respect to the cached K (before RoPE) and V of a context.

    ids_context: int64 [Tc]; ids_continuation: int64 [Tn], the tokens right after it, which attend to the context.
    At every continuation position a label is sampled from the model's own prediction there (not taken from the text),
    and the labels' log-probabilities, in nats, are summed: the squares of this gradient estimate the diagonal of the
    Fisher information. Sampling and log-softmax are in float32 or better whatever the model's dtype.

    Returns (gk, gv), float32 [L, H, Tc, D] on the model's device.
    Raises ConfigError if either is empty, not int64 [T], or both together exceed the model's positions.
    """
    if ids_context.numel() == 0 or ids_continuation.numel() == 0:
        raise ConfigError(
            f"fisher_gradients needs at least one token of each; got {ids_context.numel()} of context and "
            f"{ids_continuation.numel()} of continuation"
        )
    tokens = int(ids_context.shape[0])
    model.check_ids(ids_continuation, tokens)
    k, v = model.prefill(ids_context)
    with torch.enable_grad():
        k.requires_grad_(True)
        v.requires_grad_(True)
        output = model.forward_after(model.cache_of(k, v), ids_continuation, tokens)
        logits = output.logits[0].float()
        labels = sample_labels(logits, generator)
        log_likelihood = torch.log_softmax(logits, dim=-1).gather(-1, labels[:, None]).sum()
        gk, gv = torch.autograd.grad(log_likelihood, (k, v))
    positions = torch.arange(tokens, device=gk.device)
    return gradient_before_rope(gk.float(), positions, model.rope), gv.float()
