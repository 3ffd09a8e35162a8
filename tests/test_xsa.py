"""Learned exclusive self-attention: what it is at both ends of its range, and its gradient."""

import math

import pytest
import torch
from helpers import build, random_tokens, tg, tiny


def noisy(**changes) -> tg.GPT:
    """A model whose every weight but alpha is noise, so that attention shows in its output."""
    model, rng = build(tiny(heads=4, kv_heads=2, **changes)), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "xsa_alpha" not in name:
                p.copy_(torch.randn(p.shape, generator=rng) * 0.2)
    return model


@torch.no_grad()
def test_alpha_0_is_plain_attention_to_the_bit_and_infinity_is_the_fixed_xsa():
    plain, fixed = noisy(), noisy(xsa=-1)
    learned, (x, _) = noisy(xsa=-1, xsa_learned=1), random_tokens(tiny(), 2, 32)
    assert torch.equal(learned.hidden(x, 1, 0), plain.hidden(x, 1, 0))
    for block in learned.blocks:
        block.attn.xsa_alpha.fill_(math.inf)
    assert torch.equal(learned.hidden(x, 1, 0), fixed.hidden(x, 1, 0))
    assert not torch.allclose(fixed.hidden(x, 1, 0), plain.hidden(x, 1, 0), atol=0.1)


def test_gradient_of_alpha_is_that_of_the_formula():
    """At 0: -(y.v)(dy.v) / v^2 of each head, summed over tokens."""
    attn = noisy(xsa=-1, xsa_learned=1).blocks[0].attn
    with torch.no_grad():
        attn.proj.copy_(torch.eye(32))
    x, dy = torch.randn(2, 1, 8, 32, generator=torch.Generator().manual_seed(0)).unbind(0)
    y = attn(x, tg.rope_table(tiny(heads=4), 8), tg.AttentionMask(None, 0, x), True)
    y.backward(dy)
    v = (x @ attn.kv[1].T).detach().view(1, 8, 2, 8).repeat_interleave(2, 2)
    y, dy = y.detach().view_as(v), dy.view_as(v)
    want = -((y * v).sum(-1) * (dy * v).sum(-1) / v.square().sum(-1)).sum((0, 1))
    torch.testing.assert_close(attn.xsa_alpha.grad, want, rtol=1e-4, atol=1e-6)


def test_the_block_of_mtp_has_no_xsa_and_learns_no_share_of_it():
    model = build(tiny(mtp=0.3, xsa=-1, xsa_learned=1, heads=4))
    assert [n for n, _ in model.named_parameters() if "xsa_alpha" in n] == [
        "blocks.0.attn.xsa_alpha",
        "blocks.1.attn.xsa_alpha",
    ]


def test_learned_xsa_is_refused_where_xsa_is_off():
    with pytest.raises(tg.UserError, match="xsa_learned = 1 does nothing here: it needs xsa"):
        tg.refuse_idle(tiny(xsa_learned=1))
