"""
Loss, tables, optimizer and loader of modded-nanogpt's records: each against its formula, written
here once more, and to the bit what it was where it is off.
"""

from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT, alone, build, random_tokens, tg, tiny


@pytest.fixture
def doubles(monkeypatch):
    """Where the model computes in fp32 on purpose, fp64 instead."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


def in_double(cfg: tg.Config, seed: int = 0) -> tg.GPT:
    """A model in fp64 whose every weight is noise."""
    model, rng = build(cfg, dtype=torch.float64).double(), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=rng, dtype=torch.float64) * 0.3)
    return model


def terms_of(model: tg.GPT, x: torch.Tensor, y: torch.Tensor, step: int = 0) -> dict:
    """By name, what a training step adds up for a micro-batch."""
    cfg = model.cfg
    now = tg.Plan(cfg).at(step, step / cfg.steps)
    found = tg.loss_terms(SimpleNamespace(cfg=cfg, graph=model), x, y, now)
    return dict(zip(["loss", *tg.extra_terms(cfg)], found, strict=True))


# --- logits between two bounds that are not alike

RESCALED = {"softcap": 11.5, "softcap_in": 15.0, "softcap_shift": 5.0}


def test_rescaled_logits_are_23_sigmoids_less_a_constant(doubles):
    """Both forms of record #54; value and slope at 0."""
    model = in_double(tiny(**RESCALED))
    x = torch.randn(4, 32, dtype=torch.float64) * 20
    want = 23 * torch.sigmoid((x @ model.head.T + 5) / 7.5)
    torch.testing.assert_close(model.logits(x) + 11.5, want)
    x = torch.zeros(32, dtype=torch.float64, requires_grad=True)
    z = model.logits(x)
    assert float(z[0].detach() + 11.5) == pytest.approx(15.197, abs=5e-4)
    (slope,) = torch.autograd.grad(z[0], x)
    torch.testing.assert_close(slope, 0.687416 * model.head[0].detach(), rtol=1e-6, atol=0)


def test_loss_of_the_record_at_step_0_is_the_formulas():
    """ln V + (slope^2 d std^2)/2 = 10.8304, as 24 logs have it, padded columns counted."""
    cfg = tiny(**RESCALED, vocab=50257, head_multiple=128, dim=768, head_init="0.005", depth=1)
    with torch.device("meta"):
        model = tg.GPT(cfg, torch.float32, 8)
    rng = torch.Generator().manual_seed(0)
    head = torch.randn(50304, 768, generator=rng) * 0.005
    model.head = torch.nn.Parameter(head)
    z = model.logits(tg.norm(torch.randn(16, 768, generator=rng), 2**-23)).detach()
    assert z.shape == (16, 50304)  # the mean over all targets
    assert float((z.logsumexp(-1) - z.mean(-1)).mean()) == pytest.approx(10.8304, abs=3e-4)


def test_rescaled_logits_are_the_plain_ones_at_their_neutral_values():
    plain, same = build(tiny(softcap=11.5)), build(tiny(softcap=11.5, softcap_in=11.5))
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    for model in (plain, same):
        model.head.data.copy_(torch.randn(96, 32, generator=torch.Generator().manual_seed(1)))
    assert torch.equal(plain.logits(x), same.logits(x))
    for flags in ({"softcap_in": 15.0}, {"softcap_shift": 5.0}):
        with pytest.raises(tg.UserError, match=f"{next(iter(flags))}.*it needs softcap > 0"):
            tg.refuse_idle(tiny(**flags))
        with pytest.raises(tg.UserError, match="it needs softcap_shape = 'tanh'"):
            tg.refuse_idle(tiny(softcap=9.0, softcap_shape="isru", **flags))
    with pytest.raises(tg.UserError, match="softcap_shift = 0.0 there and 5.0 here"):
        tg.compare_logits(tiny(**RESCALED), tiny(**RESCALED | {"softcap_shift": 0.0}))


# --- the longest proper prefix of the target


def by_brute_force(pieces: list[tuple[bytes, bool]]) -> list[set[int]]:
    """Of each token all that have the longest bytes which it begins with and is not."""
    known: dict[bytes, set[int]] = {}
    for j, (own, _) in enumerate(pieces):
        known.setdefault(own, set()).add(j)
    found = []
    for own, _ in pieces:
        sizes = [n for n in range(len(own) - 1, 0, -1) if own[:n] in known]
        found.append(known[own[: sizes[0]]] if sizes else {-1})
    return found


def test_prefixes_of_gpt2_are_those_of_brute_force(gpt2_files):
    tokenizer = tg.Tokenizer("gpt2", 50257, 50256)
    pieces = tokenizer.pieces()
    found = tg.longest_prefixes(pieces)
    assert [{i} for i in found] == by_brute_force(pieces)
    assert found[50256] == -1 and (found[:256] == -1).all() and len(pieces[50256][0]) == 0
    assert (found >= 0).sum() == 50000  # a merged token begins with its first half's bytes
    (there,) = tokenizer.encode(" there")
    assert tokenizer.decode([found[there]]) == " ther"


def test_prefixes_of_a_sentencepiece_model_are_those_of_brute_force():
    tokenizer = tg.Tokenizer(str(ROOT / "data/sample/tokenizer.model"), 1024, 0)
    pieces = tokenizer.pieces()
    found = tg.longest_prefixes(pieces)
    for i, wanted in enumerate(by_brute_force(pieces)):
        # of a character and a byte with the same bytes, the character
        letters = {j for j in wanted if j >= 0 and not pieces[j][1]}
        assert {found[i]} <= (letters or wanted), pieces[i]
    assert (found >= 0).any() and found[0] == -1
    # such as the first byte of a letter with two, but never a letter's only byte
    split = {pieces[j][0] for j in found if j >= 0 and pieces[j][1]}
    assert split and all(byte >= b"\x80" for byte in split)


def test_no_token_beyond_the_vocabulary_is_a_prefix():
    pieces = [(b"", False), (b"a", True), (b"a", False), (b"ab", False), (b"abcd", False)]
    assert tg.longest_prefixes(pieces).tolist() == [-1, -1, -1, 2, 3]
    assert len(tg.Tokenizer(str(ROOT / "data/sample/tokenizer.model"), 300, 0).pieces()) == 300


@pytest.mark.parametrize("more", [{}, {"mtp_next": "0.5", "z_loss": 0.01}], ids=str)
@pytest.mark.parametrize("chunk", [1000, 20])
def test_prefix_loss_is_the_cross_entropy_of_the_prefix(doubles, chunk, more):
    cfg = tiny(tokenizer="x", prefix_loss="0.25", loss_chunk=chunk, **more)
    model, (x, y) = in_double(cfg), random_tokens(cfg, 2, 16)
    model.prefixes = torch.randint(-1, 60, (96,), generator=torch.Generator().manual_seed(1))
    y[0, 3] = -1
    found = terms_of(model, x, y)
    log_p = model.logits(model.hidden(x, 1, 0)).log_softmax(-1)
    want = 0.0
    for b in range(2):
        for t in range(16):
            prefix = -1 if y[b, t] < 0 else int(model.prefixes[y[b, t]])
            want = want - 0.25 * log_p[b, t, prefix] * (prefix >= 0)
    assert float(want.detach()) > 1
    torch.testing.assert_close(found["prefix_loss"], want)
    grads = [
        torch.autograd.grad(t, model.head, retain_graph=True)[0]
        for t in (want, found["prefix_loss"])
    ]
    torch.testing.assert_close(*grads)


def test_prefix_loss_of_weight_0_is_the_plain_loss_to_the_bit():
    """Beside another later token; off, the graph has no row for it."""
    plain, zero = tiny(mtp_next="0.5"), tiny(mtp_next="0.5", prefix_loss="0 0.5:1", tokenizer="x")
    x, y = random_tokens(plain, 2, 16)
    grads = []
    for cfg in (plain, zero):
        model = build(cfg)
        model.prefixes = torch.arange(96) - 1
        found = terms_of(model, x, y)
        sum(found.values()).backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    assert found["prefix_loss"] == 0
    assert all(torch.equal(g, grads[1][name]) for name, g in grads[0].items())
    assert "prefix_loss" not in tg.later_targets(plain)


def test_prefix_loss_without_bytes_is_refused(tmp_path):
    with pytest.raises(tg.UserError, match="prefix_loss = '0.25'.*it needs a tokenizer"):
        tg.refuse_idle(tiny(prefix_loss="0.25"))
    cfg = tiny(prefix_loss="0.25", tokenizer="x")
    with pytest.raises(tg.UserError, match="prefix_loss = '0.25' needs the bytes"):
        tg.assemble(cfg, alone(), tg.Plan(cfg), None, None, None)
