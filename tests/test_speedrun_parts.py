"""The speedrun's blocks and residual stream: each part against its formula, and off to the bit."""

import math

import pytest
import torch
from helpers import build, random_tokens, tg, tiny

from logs import score

# Nothing that starts at zero hides a part.
LIVELY = {"depth": 6, "heads": 4, "head_init": "0.2", "proj_init": 1.0}


def noisy(seed: int = 0, **changes) -> tg.GPT:
    """A model whose every weight is noise, in the default type."""
    kind = torch.get_default_dtype()
    model, rng = build(tiny(**LIVELY | changes), dtype=kind), torch.Generator().manual_seed(seed)
    model.to(kind)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=rng) * 0.3)
    return model


def weights(model: tg.GPT) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters())


def rms(x: torch.Tensor) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def same_weights(model: tg.GPT, other: tg.GPT) -> tg.GPT:
    """The other with the model's weights, as far as it has them; its own stay."""
    named = weights(model)
    with torch.no_grad():
        for name, p in other.named_parameters():
            if name in named:
                p.copy_(named[name])
    return other


def plain_like(model: tg.GPT, **changes) -> tg.GPT:
    return same_weights(model, build(tiny(**LIVELY | changes)))


# --- off to the bit, at the value where each does nothing

# What is on, and what its parameters are where it does nothing
NEUTRAL = [
    ({"smear": 12}, {"smear_lambda": 0.0}),
    ({"second_embed": 1}, {"second_": 0.0}),
    ({"backout": "3:0.5"}, {"backout": 0.0}),
    ({"value_layers": "1,4-5"}, {"value_tables": 0.0}),
    ({"value_layers": "0-1 4-5=0-1", "value_gate": "6+2"}, {"value_tables": 0.0}),
    ({"skip_gate": "1>3"}, {"skip_lambdas": -math.inf}),
    ({"skip_gate": "2>4 1>5", "skip_dims": 8}, {"skip_lambdas": -math.inf}),
    ({"post_lambda": 1.0}, {"post_lambda": 1.0}),
    ({"post_lambda": 1.0, "resid_lambda": 1.0}, {"_lambda": 1.0}),
    ({"x0_layers": "0,2-4"}, {"x0_lambda": 0.0}),
    ({"post_lambda": 1.0, "x0_layers": "0,2-4"}, {"post_lambda": 1.0, "x0_lambda": 0.0}),
    ({"sa_lambdas": "1 1"}, {"sa_lambdas": 1.0}),
    ({"xsa_layers": "1,3", "xsa_learned": 1}, {"xsa_alpha": 0.0}),
]


@torch.no_grad()
@pytest.mark.parametrize("on,still", NEUTRAL, ids=lambda x: " ".join(map(str, x)))
def test_a_part_at_its_neutral_values_changes_no_bit_and_at_others_does(on, still):
    model = noisy(**on)
    x, _ = random_tokens(model.cfg, 2, 32)
    plain = plain_like(model)
    assert not set(weights(plain)) & {n for n in weights(model) if any(k in n for k in still)}
    assert not torch.allclose(model.hidden(x, 1, 0), plain.hidden(x, 1, 0), atol=1e-3)
    for name, p in model.named_parameters():
        for key, value in still.items():
            if key in name:
                p.fill_(value)
    assert torch.equal(model.hidden(x, 1, 0), plain.hidden(x, 1, 0))


@torch.no_grad()
def test_lists_that_name_every_block_are_what_there_was_without_them():
    x, _ = random_tokens(tiny(), 2, 32)
    for a, b in (
        ({"attn_gate": 8, "attn_gate_layers": "0-5"}, {"attn_gate": 8}),
        ({"xsa_layers": "0-5"}, {"xsa": -1}),
        ({"xsa_layers": "4,5"}, {"xsa": 2}),
        ({"x0_lambda": 0.1, "x0_layers": "0-5"}, {"x0_lambda": 0.1}),
    ):
        one, two = noisy(**a), noisy(**b)
        assert list(weights(one)) == list(weights(two))
        assert torch.equal(one.hidden(x, 1, 0), two.hidden(x, 1, 0))


# --- each against its formula


@torch.no_grad()
def test_smear_is_its_formula_and_knows_no_documents(doubles):
    model = noisy(smear=12, doc_mask=1, embed_norm=0)
    x, _ = random_tokens(model.cfg, 2, 32)
    p, e = weights(model), weights(model)["embed"][x]
    gate = torch.sigmoid(e[..., :12] @ p["smear_gate"][0])
    want = e.clone()
    want[:, 1:] += p["smear_lambda"] * gate[:, 1:, None] * e[:, :-1]
    torch.testing.assert_close(model.embedded(x), want)
    p["smear_gate"].zero_()
    p["smear_lambda"].fill_(1.0)
    torch.testing.assert_close(model.embedded(x)[:, 1:], e[:, 1:] + 0.5 * e[:, :-1])
    assert torch.equal(model.embedded(x)[:, 0], e[:, 0])


@torch.no_grad()
def test_a_second_embedding_joins_every_blocks_input_normed(doubles):
    """Its share stands before the factor of the block."""
    model, reads = noisy(second_embed=1, resid_lambda=1.1, value_embeds=1, bigram_rows=50), []
    model.bigram_scales.zero_()
    model.value_scales.zero_()
    for block in model.blocks:
        block.register_forward_pre_hook(lambda module, args: reads.append(args))
    x, _ = random_tokens(model.cfg, 2, 32)
    model.hidden(x, 1, 0)
    for i, (_, _, added, *_) in enumerate(reads):
        joined = sum(scale * term for scale, term in added)
        torch.testing.assert_close(joined, model.second_scales[i] * rms(model.second_embed[x]))
    fresh = build(tiny(second_embed=1, depth=2))
    assert not fresh.second_scales.any() and fresh.second_embed.std().item() > 0.9


def test_track_2_is_counted_to_the_last():
    """The page's 613,420,440 of records of track 2, less the three scalars that nothing reads."""
    cfg = tg.parse_args(["--config", "speedrun_medium"])
    with torch.device("meta"):
        model = tg.GPT(cfg, torch.float32)
    size = {name: p.numel() for name, p in model.named_parameters()}
    of = lambda *words: sum(n for name, n in size.items() if any(w in name for w in words))
    assert of("attn.qkv", "attn.proj") == 67_108_864 and of(".mlp.") == 134_217_728
    assert size["head"] == size["embed"] == size["second_embed"] == 51_511_296
    assert size["value_tables"] == 257_556_480 and of("_gate") - of("skip_gates") == 3_392 - 48
    assert sum(size.values()) == 613_420_440 - 3


@torch.no_grad()
def test_backout_of_all_leaves_what_came_behind_the_block(doubles):
    """A share of 1: the final norm sees the increments after block 3 alone."""
    model = noisy(backout="3:0.5")
    x, _ = random_tokens(model.cfg, 2, 32)
    outputs = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, out: outputs.append(out))
    model.backout.fill_(1.0)
    found = model.hidden(x, 1, 0)
    torch.testing.assert_close(found, rms(outputs[5] - outputs[3]))
    assert build(tiny(**LIVELY, backout="3:0.5")).backout.item() == 0.5


def joined_values(model: tg.GPT, block: int, x: torch.Tensor) -> torch.Tensor:
    """What attention of the block adds to its values, by calling it with and without them."""
    seen = []

    class Watching(tg.AttentionMask):
        def attend(self, q, k, v, scale, bound):
            seen.append(v.transpose(1, 2))
            return super().attend(q, k, v, scale, bound)

    u = torch.randn(*x.shape, 32, generator=torch.Generator().manual_seed(1))
    rows = model.value_rows(x)[tg.value_tables(model.cfg)[block]]
    for values in (rows, torch.zeros_like(rows)):
        model.blocks[block].attn(u, model.rope(0), Watching(None, 0, u), False, values)
    return u, seen[0] - seen[1]


@torch.no_grad()
def test_value_tables_join_the_values_by_a_gate_of_input_and_row(doubles):
    model = noisy(value_layers="1,2,4 5=1", value_gate="6+3", kv_heads=2)
    x, _ = random_tokens(model.cfg, 2, 16)
    p, numbers = weights(model), {1: 0, 2: 1, 4: 2, 5: 0}
    assert p["value_tables"].shape == (3, 96, 16)
    for block, number in numbers.items():
        u, found = joined_values(model, block, x)
        e, G = p["value_tables"][number][x], p[f"blocks.{block}.attn.value_gate"]
        gate = 2 * torch.sigmoid(torch.cat([u[..., :6], e[..., :3]], -1) @ G.T)
        torch.testing.assert_close(found, gate[..., None] * e.view(2, 16, 2, 8))
        G.zero_()
        torch.testing.assert_close(joined_values(model, block, x)[1], e.view(2, 16, 2, 8))
    assert model.blocks[0].attn.value_gate is None and not model.blocks[3].attn.has_values


@torch.no_grad()
def test_attention_is_linear_in_what_joins_the_values(doubles):
    model = noisy(value_layers="0-5", depth=6)
    attn, rope = model.blocks[0].attn, model.rope(0)
    u, a, b = torch.randn(3, 2, 16, 32, generator=torch.Generator().manual_seed(1))
    y = [attn(u, rope, tg.AttentionMask(None, 0, u), False, v) for v in (a, b, a + b, 0 * a)]
    torch.testing.assert_close(y[0] + y[1] - y[3], y[2])


def test_the_tables_of_medium_are_shared_by_its_last_blocks():
    cfg = tiny(depth=16, value_layers="0-4 11-15=0-4")
    assert tg.value_tables(cfg) == {b: b % 11 for b in (0, 1, 2, 3, 4, 11, 12, 13, 14, 15)}
    model = build(cfg)
    assert model.value_tables.shape[0] == 5
    assert model.value_tables.std().item() == pytest.approx(0.01, rel=0.05)
    assert not build(tiny(value_layers="0", value_init=0.0)).value_tables.any()


def stream(model: tg.GPT, x: torch.Tensor) -> torch.Tensor:
    """hidden() of the residual stream alone, branches by their modules: modded-nanogpt's order."""
    cfg, p = model.cfg, weights(model)
    x0 = h = rms(p["embed"][x])
    mask, outputs, skips = tg.AttentionMask(None, 0, h), [], cfg.skip_gate.split()
    for i, block in enumerate(model.blocks):
        for row, pair in enumerate(skips):
            source, target = map(int, pair.split(">"))
            if target == i:
                factor = torch.sigmoid(p["skip_lambdas"][row])
                if cfg.skip_dims:
                    w = p["skip_gates"][row]
                    factor = factor * 2 * torch.sigmoid(x0[..., : cfg.skip_dims] @ w)[..., None]
                h = h + factor * outputs[source]
        r, q = (list(p.get(f"blocks.{i}.{k}_lambda", ())) for k in ("resid", "post"))
        share = p.get(f"blocks.{i}.x0_lambda")
        if block.attn is not None:
            h = r.pop(0) * h + q.pop(0) * block.attn(rms(h), model.rope(0), mask, False)
        elif share is not None:
            h = r.pop(0) * h
        if share is not None:
            h = h + share * x0
        if block.mlp is not None:
            h = r.pop(0) * h + q.pop(0) * block.mlp(rms(h))
        assert not r and not q
        outputs.append(h)
    return rms(h)


@torch.no_grad()
def test_factors_by_branch_missing_branches_and_skips_are_the_formula(doubles):
    """Blocks without attention, without an MLP, without both; the embedding joins some of them."""
    on = {"post_lambda": 1.0, "resid_lambda": 1.1, "x0_layers": "0,2,3,5"}
    on |= {"no_attn_layers": "2,4,5", "no_mlp_layers": "1,5"}
    for skips in ({}, {"skip_gate": "1>3"}, {"skip_gate": "2>4 0>5 2>3", "skip_dims": 7}):
        model = noisy(**on | skips)
        x, _ = random_tokens(model.cfg, 2, 32)
        torch.testing.assert_close(model.hidden(x, 1, 0), stream(model, x))


def test_starts_and_rates_of_the_records():
    cfg = tiny(
        depth=7, heads=4, smear=12, post_lambda=1.0, resid_lambda=1.1**0.5, sa_lambdas="0.5 1",
        value_layers="1", value_gate="6+6", skip_gate="3>6", no_attn_layers="6", x0_layers="0",
        adamw_matrices="value_gate",
        own_lr="value_tables=0.6/0.75/0.95 value_gate=0.008/0.9/0.99 smear_gate=8e-5",
    )  # fmt: skip
    tg.validate(cfg)
    tg.refuse_idle(cfg)
    model = build(cfg)
    p, said = weights(model), tg.declarations(model)
    assert p["blocks.0.attn.sa_lambdas"].tolist() == [0.5, 1.0]
    assert torch.sigmoid(p["skip_lambdas"]).item() * 0.5 == pytest.approx(0.0912, abs=5e-5)
    assert p["blocks.6.post_lambda"].tolist() == [1.0] and len(p["blocks.5.post_lambda"]) == 2
    assert p["blocks.6.resid_lambda"].tolist() == [pytest.approx(1.1**0.5)]
    assert not p["smear_gate"].any() and not p["smear_lambda"].any()
    assert not p["blocks.0.x0_lambda"].any() and "blocks.1.x0_lambda" not in p
    rules = {name: tg.rule_of(cfg, name, p[name], said[name]) for name in p}
    for name, want in (
        ("value_tables", (0.6, 0.75, 0.95)),
        ("blocks.1.attn.value_gate", (0.008, 0.9, 0.99)),
        ("smear_gate", (8e-5, 0.9, 0.99)),
        ("smear_lambda", (0.04, 0.9, 0.99)),
        ("skip_lambdas", (0.04, 0.9, 0.99)),
        ("blocks.0.attn.sa_lambdas", (0.04, 0.9, 0.99)),
        ("blocks.0.post_lambda", (0.008, 0.9, 0.95)),
    ):
        rule = rules[name]
        assert rule.kind == "adamw" and (rule.lr, rule.beta1, rule.beta2) == pytest.approx(want)


@torch.no_grad()
def test_sa_lambdas_scale_values_and_the_output(doubles):
    """Behind the norm of queries and keys, the first one is seen in the values alone."""
    model = noisy(sa_lambdas="0.5 1", norm_eps=0.0)
    attn, u = model.blocks[0].attn, torch.randn(1, 16, 32)
    mask = tg.AttentionMask(None, 0, u)
    attn.sa_lambdas.copy_(torch.tensor([1.0, 1.0]))
    plain = attn(u, model.rope(0), mask, False)
    attn.sa_lambdas.copy_(torch.tensor([0.5, 3.0]))
    torch.testing.assert_close(attn(u, model.rope(0), mask, False), 1.5 * plain)


def test_gates_and_alphas_are_in_the_listed_blocks_alone():
    model = build(
        tiny(depth=6, attn_gate=8, attn_gate_layers="1,5", xsa_layers="2-3", xsa_learned=1, mtp=0.3)
    )
    have = lambda name: [i for i, b in enumerate(model.blocks) if getattr(b.attn, name) is not None]
    assert have("attn_gate") == [1, 5] and have("xsa_alpha") == [2, 3]
    assert model.mtp_block.attn.attn_gate is None and model.mtp_block.attn.xsa_alpha is None
    assert [place.xsa for place in tg.wiring(model.cfg, 1)] == [i in (2, 3) for i in range(6)]


# --- pairs of heads


def turned(x: torch.Tensor, at: torch.Tensor, rope: tuple) -> torch.Tensor:
    """Head vectors [..., T, K], pairs (k, k + K/2) turned by the angles of positions [T]."""
    c, s = (table[at] for table in rope)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * c + b * s, b * c - a * s], -1)


# of six heads: position, head there, and the position by whose angle it turns, less 2t
TABLE = [(0, 0, 0), (0, 1, 1), (0, 2, 0), (1, 0, 1), (1, 1, 0), (1, 2, 1)]


def paired_reference(
    attn: tg.Attention, u: torch.Tensor, docs: torch.Tensor, window: int, rope: tuple
):
    """Attention of pairs of heads by the sets of keys that a query sees, one softmax over both."""
    H, T, W = attn.heads, u.size(1), window - 1
    q, k, v = (u @ w.T for w in attn.qkv)
    q, k, v = (x.unflatten(-1, (H, -1)).transpose(1, 2) for x in (q, k, v))  # B H T K
    angle = lambda h: 2 * torch.arange(T) + h % 2
    q, k = ([turned(rms(x[:, h]), angle(h), rope) for h in range(H)] for x in (q, k))
    y = [torch.zeros_like(q[0])] * H
    apart = torch.arange(T)[:, None] - torch.arange(T)  # t - s
    own = (docs[:, :, None] == docs[:, None]) & (apart >= 0)
    for a in range(H // 2):
        b = a + H // 2
        for h, sees_a, sees_b in (
            (a, apart <= W // 2, (apart > 0) & (2 * apart - 1 <= W)),
            (b, 2 * apart + 1 <= W, apart <= W // 2),
        ):
            keys = torch.cat([k[a], k[b]], dim=1)
            ok = torch.cat([sees_a & own, sees_b & own], dim=-1)
            z = (q[h] @ keys.mT * attn.scale).masked_fill(~ok, -math.inf)
            y[h] = z.softmax(-1) @ torch.cat([v[:, a], v[:, b]], dim=1)
    return torch.cat(y, dim=-1) @ attn.proj.T


def test_each_head_has_the_position_the_slot_and_the_angle_of_the_record():
    model = build(tiny(dim=48, heads=6, paired_layers="0"))
    cos, sin = model.rope(0)
    assert torch.allclose(torch.atan2(sin, cos)[1, :3], torch.tensor([1.0, 1 / 64, 0.0]))
    x = torch.randn(1, 8, 6, 8, generator=torch.Generator().manual_seed(0))
    found, placed = tg.rotate_pairs(x, cos, sin), tg.as_pairs(x)
    for h, (position, slot, angle) in enumerate(TABLE):
        assert (angle - h) % 2 == 0
        assert torch.equal(placed[:, position::2, slot], x[:, :, h])
        want = turned(x[:, :, h], 2 * torch.arange(8) + angle, (cos, sin))
        torch.testing.assert_close(found[:, :, h], want, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("window", [9, 10, 64])
@pytest.mark.parametrize("heads", [2, 6])
def test_pairs_of_heads_are_dense_attention_over_their_sets_of_keys(doubles, heads, window):
    model = noisy(heads=heads, dim=24 * heads, paired_layers="0", doc_mask=1)
    attn = model.blocks[0].attn
    x, _ = random_tokens(model.cfg, 2, 32)
    x[0, 9], x[1, 20] = 0, 0
    docs = model.documents(x)
    u = torch.randn(2, 32, model.cfg.dim, generator=torch.Generator().manual_seed(1))
    seen = model.pairs(docs, u, window, 0, None)
    found = attn(u, seen.rope, seen.near, False)
    torch.testing.assert_close(found, paired_reference(attn, u, docs, window, seen.rope))
    assert seen.near.window == (0 if window == 64 else window)
    if window == 10:  # 10 keys, itself included: 5 of each head
        sees = tg.visible(torch.tensor(40), torch.arange(64), None, None, 10).view(32, 2)
        assert sees.sum(0).tolist() == [5, 5]


@torch.no_grad()
def test_a_pair_that_sees_its_own_heads_keys_alone_is_a_head_of_half_the_window(doubles):
    """By documents of their own for the second positions."""
    q, k, v = torch.randn(3, 1, 1, 32, 8, generator=torch.Generator().manual_seed(1))
    docs = torch.arange(32)[None] % 2
    both = tg.attend_blocks(q, k, v, docs, 9, 0.3)
    one = [
        tg.attend_blocks(q[:, :, i::2], k[:, :, i::2], v[:, :, i::2], None, 5, 0.3) for i in (0, 1)
    ]
    torch.testing.assert_close(both[:, :, 0::2], one[0])
    torch.testing.assert_close(both[:, :, 1::2], one[1])


@torch.no_grad()
def test_flex_attention_of_pairs_is_attention_by_blocks():
    """As on a GPU: the mask of two positions a token, through flex_attention's forward pass."""
    docs = (torch.arange(64)[None] >= torch.tensor([[20], [33]])).int().repeat_interleave(2, dim=1)
    q, k, v = torch.randn(3, 2, 2, 128, 16, generator=torch.Generator().manual_seed(1))
    want = tg.attend_blocks(q, k, v, docs, 9, 0.3)
    torch.testing.assert_close(tg.attend_flex(q, k, v, docs, 9, 0.3), want, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_paired_blocks_see_their_windows_among_plain_ones():
    """S and L blocks, plain and paired, in one net."""
    model = noisy(paired_layers="0,3", window_pattern="SSSL", depth=5, doc_mask=1)
    seen = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda module, args: seen.append(args[3:5]))
    x, _ = random_tokens(model.cfg, 2, 32)
    model.hidden(x, 1, 5, 1, 13)
    assert [mask.window for _, mask in seen] == [5, 5, 5, 13, 13]
    assert [mask.docs.size(1) for _, mask in seen] == [64, 32, 32, 64, 32]
    assert all(len(rope[0]) == 64 for rope, _ in seen)
    plain = plain_like(model, window_pattern="SSSL", depth=5, doc_mask=1)
    assert not torch.allclose(model.hidden(x, 1, 5, 1, 13), plain.hidden(x, 1, 5, 1, 13), atol=0.1)


# --- the record's whole net

# record #89's topology (without DC attention), small
HEAD = {
    "depth": 11, "dim": 48, "heads": 6, "rope": "truncated", "key_offset": "still",
    "window_pattern": "SSSLSSSSSSL", "doc_mask": 1, "attn_scale": 0.1, "norm_eps": 2**-23,
    "smear": 12, "backout": "7:0.5", "value_layers": "1,2,8,9,10", "value_gate": "6+6",
    "no_attn_layers": "6", "paired_layers": "0,2,5,9", "xsa_layers": "1,3,4,7", "xsa_learned": 1,
    "attn_gate_layers": "3,10", "skip_gate": "3>6", "x0_layers": "0-5,7-9", "post_lambda": 1.0,
    "resid_lambda": 1.1**0.5, "sa_lambdas": "0.5 1", "late_input": "7", "gate_nets": "0,4",
    "mudd": "x0,7", "mudd_final": "x0,7,9,v1,3", "net_hidden": 16,
    "bigram_rows": 377, "bigram_signs": 16,
}  # fmt: skip
LANES = [
    "x0 0, bigram 0, xsa 1, x0 1, bigram 1, x0 2, bigram 2, xsa 3, gate 3, x0 3, bigram 3",
    "xsa 4, x0 4, bigram 4, x0 5, bigram 5, skip 6, xsa 7, x0 7, bigram 7, x0 8, bigram 8, "
    "x0 9, bigram 9, gate 10",
]


def head_attention(model, i, u, docs, window, aux, lane):
    """Attention of layer i as section 3 of the page has it: masks in full, pairs by their sets."""
    attn, H, T = model.blocks[i].attn, 6, u.size(1)
    l0, l1 = attn.sa_lambdas
    q, k, v = ((l0 * (u @ w.T)).unflatten(-1, (H, -1)).transpose(1, 2) for w in attn.qkv)
    v = v + aux.unflatten(-1, (H, -1)).transpose(1, 2)
    q, k = head_norm(q), head_norm(k)
    rope, at = model.rope(0), torch.arange(T)
    apart, own = at[:, None] - at, docs[:, :, None] == docs[:, None]
    y = torch.zeros_like(q)
    if i in (0, 2, 5, 9):
        W = window - 1
        q, k = (
            torch.stack([turned(x[:, h], 2 * at + h % 2, rope) for h in range(H)], 1)
            for x in (q, k)
        )
        for h in range(H):
            first, second = h % 3, h % 3 + 3
            late = h // 3
            for_a = (apart >= 0) & (2 * apart + late <= W)
            for_b = (2 * apart - 1 + late >= 0) & (2 * apart - 1 + late <= W)
            ok = torch.cat([for_a & own, for_b & own], -1)
            z = q[:, h] @ torch.cat([k[:, first], k[:, second]], 1).mT * attn.scale
            p_h = z.masked_fill(~ok, -math.inf).softmax(-1)
            y[:, h] = p_h @ torch.cat([v[:, first], v[:, second]], 1)
    else:
        q, k = turned(q, at, rope), turned(k, at, rope)
        if i in (3, 10):
            still = [2, 3, 6, 7]  # of 8 dims, those of the pairs (2, 6) and (3, 7)
            for t in range(T - 1, 0, -1):
                k[:, :, t, still] = k[:, :, t - 1, still]
        ok = (apart >= 0) & (apart < window) & own
        y = (q @ k.mT * attn.scale).masked_fill(~ok[:, None], -math.inf).softmax(-1) @ v
    if ("xsa", i) in lane:
        share = torch.tanh(lane["xsa", i]).transpose(1, 2)[..., None]
        y = y - share * (y * v).sum(-1, keepdim=True) / v.square().sum(-1, keepdim=True) * v
    if ("gate", i) in lane:
        y = y * lane["gate", i].transpose(1, 2)[..., None]
    return l1 * (y.transpose(1, 2).flatten(2) @ attn.proj.T)


def head_norm(x):
    return x / (x.square().mean(-1, keepdim=True) + 2**-23).sqrt()


def net(p, name, x, scale):
    h = torch.nn.functional.gelu(x @ p[f"{name}.fc"].T)
    return (h @ p[f"{name}.proj"].T + p[f"{name}.proj_bias"]) * scale


def pairs_by_hand(model: tg.GPT, tokens: torch.Tensor) -> torch.Tensor:
    """Bigram vectors of section 4.12: a row of the table times a row of signs."""
    table, signs, rows = weights(model)["bigram"], tg.bigram_signs(model.cfg), []
    for row in tokens.tolist():
        for t, token in enumerate(row):
            before = 376 if t == 1 else row[t - 1]
            at = 376 if t == 0 else (36313 * token ^ 27191 * before) % 376
            sign = (row[t - 1] ^ token) % 16 if t else 0
            rows.append(table[at] * signs[sign])
    return torch.stack(rows).view(*tokens.shape, -1)


def head_forward(model: tg.GPT, tokens: torch.Tensor, short: int, long: int) -> torch.Tensor:
    """The forward pass of record #89, in the page's order and letters."""
    p, N, sg = weights(model), head_norm, torch.sigmoid
    docs = (tokens == 0).cumsum(1)
    e = p["embed"][tokens]
    e = torch.cat(
        [
            e[:, :1],
            e[:, 1:] + p["smear_lambda"] * (sg(e[:, 1:, :12] @ p["smear_gate"].T)) * e[:, :-1],
        ],
        1,
    )
    ve = {i: p["value_tables"][row][tokens] for row, i in enumerate((1, 2, 8, 9, 10))}
    x0 = x = N(e)
    B = pairs_by_hand(model, tokens)
    lane, c = {}, {}
    for i in range(11):
        if i in (0, 4):
            out, at = net(p, f"gate_nets.{i // 4}", x, p["gate_scale"]), 0
            for kind, block in (word.split() for word in LANES[i // 4].split(", ")):
                n = 6 if kind in ("xsa", "gate") else 1
                lane[kind, int(block)] = out[..., at : at + n]
                at += n
            assert at == out.size(-1) == (26, 29)[i // 4]
        if i == 0:
            x = c0 = x0 + lane["bigram", 0] * B
        mlp = model.blocks[i].mlp
        window, aux = long if i in (3, 10) else short, torch.zeros_like(x)
        r, q = p.get(f"blocks.{i}.resid_lambda"), p.get(f"blocks.{i}.post_lambda")
        if i == 6:
            x = x + sg(p["skip_lambdas"][0]) * lane["skip", 6] * c[3]
            x = r[0] * x + q[0] * mlp(N(x))
        elif i == 10:
            m = net(p, "mudd", x, 0.1).split(1, -1)
            w = m[0] * c0 + m[1] * c[7] + m[2] * x
            x = (1 + m[5]) * x + m[3] * c0 + m[4] * c[7]
            aux = torch.cat([m[6] * ve[10][..., :24], m[7] * ve[10][..., 24:]], -1) + w
            a = head_attention(model, i, N(c[7]), docs, window, aux, lane)
            x = m[8] * x + m[9] * a + m[10] * c0 + m[11] * B
            x = m[12] * x + m[13] * mlp(N(x))
        else:
            u = N(x if i <= 7 else c[7])
            if i in ve:
                G = p[f"blocks.{i}.attn.value_gate"]
                gate = 2 * sg(torch.cat([u[..., :6], ve[i][..., :6]], -1) @ G.T)
                aux = (gate[..., None] * ve[i].unflatten(-1, (6, 8))).flatten(-2)
            a = head_attention(model, i, u, docs, window, aux, lane)
            x = r[0] * x + q[0] * a + lane["x0", i] * x0
            if i:
                x = x + lane["bigram", i] * B
            x = r[1] * x + q[1] * mlp(N(x))
        c[i] = x
    n = net(p, "mudd_final", x, 0.1).split(1, -1)
    return N(x + n[0] * c0 + n[1] * c[7] + n[2] * c[9] + n[3] * ve[1] + n[4] * c[3])


@torch.no_grad()
def test_the_whole_net_is_the_record_as_the_page_writes_it(doubles):
    model = noisy(**HEAD)
    tg.validate(model.cfg)
    tg.refuse_idle(model.cfg)
    with torch.no_grad():
        for name in ("mudd.proj_bias", "mudd_final.proj_bias"):  # times 0.1
            weights(model)[name].mul_(10)
    x, _ = random_tokens(model.cfg, 2, 32)
    x[0, 9], x[1, 20] = 0, 0
    torch.testing.assert_close(model.hidden(x, 1, 5, 1, 11), head_forward(model, x, 5, 11))


@torch.no_grad()
def test_the_nets_start_as_the_static_factors_of_the_record(doubles):
    """proj = 0: alpha 0, head gate .25, share 0, skip .5; the values' factors 2; backout -.5."""
    cfg = tiny(**HEAD)
    model = build(cfg, dtype=torch.float64)
    p = weights(model)
    assert not any(p[f"{name}.proj"].any() for name in ("gate_nets.0", "mudd", "mudd_final"))
    starts = [0.1 * b for b in p["gate_nets.1.proj_bias"].tolist()]
    pair = [0, 0.05]
    assert starts == pytest.approx([0] * 6 + pair * 2 + [0.5] + [0] * 6 + pair * 3 + [0.25] * 6)
    root = 1.1**0.5
    want = [0.0] * 6 + [2.0, 2.0, root, 1.0, 0.0, 0.05, root, 1.0]
    assert (0.1 * p["mudd.proj_bias"]).tolist() == pytest.approx(want)
    assert (0.1 * p["mudd_final.proj_bias"]).tolist() == pytest.approx([0, -0.5, 0, 0, 0])
    assert "backout" not in p and p["gate_scale"].tolist() == [pytest.approx(0.1)]
    assert p["gate_nets.0.fc"].abs().max().item() == pytest.approx(48**-0.5, rel=0.02)


def test_the_records_parameters_are_counted_to_the_last():
    """Section 2.3 of the page: live ones, without DC attention and dead slots."""
    full = {"dim": 768, "heads": 6, "net_hidden": 64, "mlp_ratio": 4.0, "vocab": 50257}
    full |= {"head_multiple": 128, "pad_vocab": 1, "bigram_rows": 377_280, "bigram_signs": 8192}
    with torch.device("meta"):
        model = tg.GPT(tg.Config(**vars(tiny(**HEAD | full))), torch.float32)
    size = {name: p.numel() for name, p in model.named_parameters()}
    of = lambda *words: sum(n for name, n in size.items() if any(w in name for w in words))
    assert of("attn.qkv") == 11_796_480 + 5_898_240 and of("attn.proj") == 5_898_240
    assert of(".mlp.") == 22 * 2_359_296 + 0 and of("value_tables") == 193_167_360
    assert size["head"] == size["embed"] == 38_633_472
    tables = 2 * 38_633_472 + 193_167_360 + 289_751_040
    assert sum(size.values()) == 11_796_480 * 2 + 51_904_512 + tables + 201_779 == 635_884_595


@torch.no_grad()
def test_late_blocks_read_the_listed_block_alone(doubles):
    """Attention of blocks 3 to 5 sees nothing of what blocks 3 and 4 did to the stream."""
    model, seen = noisy(late_input="2"), []
    for block in model.blocks:
        block.attn.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        block.register_forward_hook(lambda module, args, out: outputs.append(out))
    outputs = []
    x, _ = random_tokens(model.cfg, 2, 16)
    model.hidden(x, 1, 0)
    assert all(torch.equal(u, seen[3]) for u in seen[4:])
    torch.testing.assert_close(seen[5], rms(outputs[2]))
    torch.testing.assert_close(seen[2], rms(outputs[1]))


# What nets make of static factors: on, and the static net with the same numbers
STATIC = [
    (
        {"gate_nets": "0,3", "x0_layers": "0-4", "x0_lambda": 0.3},
        {"x0_layers": "0-4", "x0_lambda": 0.3},
    ),
    (
        {"gate_nets": "2", "x0_layers": "0-4", "x0_lambda": 0.3},
        {"x0_layers": "0-4", "x0_lambda": 0.3},
    ),
    ({"gate_nets": "1", "xsa_layers": "1,4", "xsa_learned": 1}, {}),
    ({"mudd_final": "x0,2,4", "backout": "2:0.5"}, {"backout": "2:0.5"}),
    (
        {"mudd": "x0,2", "post_lambda": 1.0, "resid_lambda": 1.25, "x0_lambda": 0.25},
        {"post_lambda": 1.0, "resid_lambda": 1.25, "x0_lambda": 0.25},
    ),
]


@torch.no_grad()
@pytest.mark.parametrize("on,static", STATIC, ids=str)
def test_nets_that_read_nothing_are_the_static_factors(on, static):
    """proj = 0, as they start; and another proj is something else."""
    model = build(tiny(**LIVELY | on))
    plain = plain_like(model, **static)
    x, _ = random_tokens(model.cfg, 2, 32)
    want = plain.hidden(x, 1, 0)
    torch.testing.assert_close(model.hidden(x, 1, 0), want, rtol=1e-5, atol=1e-6)
    for name, p in model.named_parameters():
        if "proj" in name and ("mudd" in name or "gate_nets" in name) and p.ndim == 2:
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    assert not torch.allclose(model.hidden(x, 1, 0), want, atol=1e-2)


# --- together with the rest

STREAM = {
    "smear": 12, "backout": "3:0.5", "value_layers": "0,2 4-5=0,2", "value_gate": "6+2",
    "no_attn_layers": "3", "no_mlp_layers": "1", "attn_gate": 8, "attn_gate_layers": "2,5",
    "xsa_layers": "1,2", "xsa_learned": 1, "skip_gate": "1>3 0>5", "skip_dims": 5,
    "post_lambda": 1.0, "resid_lambda": 1.05, "sa_lambdas": "0.5 1", "x0_layers": "0-4",
}  # fmt: skip
COMBINED = [
    {},
    {"key_offset": "still", "window_pattern": "SL", "doc_mask": 1},
    {"loop": "2:5", "repeats": "2", "passes": "2"},
    {"unet": 2, "loop_embed": 1, "value_embeds": 1, "layer_scale": 1, "block_scales": 1},
    {"kv_heads": 2, "layer_norm": 1, "biases": 1, "bias_init": 1.0, "q_gain": 1.5},
    {"paired_layers": "0,2"},
    {"paired_layers": "0-2,4-5", "kv_heads": 2, "doc_mask": 1, "rope": "interleaved"},
    {
        "paired_layers": "0,5",
        "key_offset": "second",
        "window_pattern": "SL",
        "yarn": 1,
        "window_long": "5 0.5:17",
        "doc_mask": 1,
        "passes": "2",
    },
]


@torch.no_grad()
@pytest.mark.parametrize("changes", COMBINED, ids=str)
def test_fed_in_pieces_is_fed_at_once_and_no_token_sees_a_later_one(changes):
    model = noisy(**STREAM | changes)
    tg.validate(model.cfg)
    repeats, passes = int(model.cfg.repeats), int(model.cfg.passes)
    x, _ = random_tokens(model.cfg, 1, 32)
    x[0, 9] = 0  # a document begins
    long = 17 if model.cfg.yarn else 0
    whole = model.hidden(x, repeats, 8, passes, long)[0]
    cache = score.Cache(model, tg.Shape(1, 32, repeats, 8, passes, long))
    pieces = torch.cat([cache.feed(part) for part in x[0].split([1, 3, 10, 1, 17])])
    torch.testing.assert_close(pieces, whole, rtol=1e-3, atol=2e-5)
    other = x.clone()
    other[0, 20] = x[0, 20] % 95 + 1
    moved = (model.hidden(other, repeats, 8, passes, long)[0] != whole).any(-1)
    assert not moved[:20].any() and moved[20] and moved[21]


REFUSED = [
    ({"no_attn_layers": "0,7"}, "no_attn_layers = '0,7': blocks below depth = 6"),
    ({"no_attn_layers": "0-5"}, "no_attn_layers: a block or more must have attention"),
    ({"xsa_layers": "a"}, "xsa_layers = 'a': blocks below depth"),
    ({"xsa_layers": "1,0-2"}, "xsa_layers = '1,0-2': blocks below depth = 6, each once"),
    ({"xsa_layers": "3-2"}, "xsa_layers = '3-2': blocks below depth"),
    ({"gate_nets": "0-4", "x0_layers": "0-5"}, "gate_nets = '0-4': blocks below"),
    ({"no_attn_layers": "2", "value_layers": "1,2"}, "value_layers has blocks without attention"),
    ({"no_attn_layers": "2", "xsa_layers": "2"}, "xsa_layers has blocks without attention"),
    ({"xsa": -1, "xsa_layers": "2"}, "set one of them"),
    ({"value_layers": "1 3=2"}, "value_layers = '1 3=2': blocks below"),
    ({"value_layers": "0-1 3-5=0-1"}, "value_layers = '0-1 3-5=0-1': blocks below"),
    ({"value_layers": "6"}, "value_layers = '6': blocks below"),
    ({"value_layers": "1,1"}, "value_layers = '1,1': blocks below"),
    ({"value_layers": "1-2 1"}, "value_layers = '1-2 1': blocks below"),
    ({"value_layers": "1", "value_proj": 8}, "from tables or from maps"),
    ({"value_layers": "1", "value_gate": "40+1"}, "value_gate = '40\\+1': numbers of dims"),
    ({"value_layers": "1", "value_gate": "0"}, "value_gate = '0': numbers of dims"),
    ({"backout": "5:0.5"}, "backout = '5:0.5': a block that has others"),
    ({"backout": "2"}, "backout = '2': a block that"),
    ({"skip_gate": "3>3"}, "skip_gate = '3>3': from a block to a later one"),
    ({"skip_gate": "1>3 2>3"}, "that has no other skip"),
    ({"sa_lambdas": "1"}, "sa_lambdas = '1': two numbers"),
    ({"paired_layers": "1", "heads": 4, "kv_heads": 1}, "heads = 4, kv_heads = 1: both must be"),
    ({"paired_layers": "1", "no_attn_layers": "1"}, "paired_layers has blocks without attention"),
    ({"late_input": "5"}, "late_input = '5': a block that has others behind it"),
    ({"gate_nets": "4,0", "x0_layers": "1"}, "gate_nets = '4,0': blocks below"),
    ({"gate_nets": "0,4", "x0_layers": "1"}, "the net at block 4 has nothing to give"),
    ({"gate_nets": "2", "attn_gate_layers": "1,3"}, "stands before blocks \\[1\\]"),
    ({"mudd": "x0,5"}, "mudd = 'x0,5': x0, blocks before the last"),
    ({"mudd": "x0,v1"}, "mudd = 'x0,v1': x0, blocks before the last"),
    ({"mudd_final": "3,3"}, "mudd_final = '3,3': x0, blocks"),
    ({"mudd": "x0", "heads": 2, "kv_heads": 1}, "heads \\* head_dim = 16 must be dim = 32"),
    ({"mudd": "x0", "no_mlp_layers": "5"}, "the last block must have attention, an MLP"),
    ({"smear": 33}, "smear = 33: a number of input dims"),
]  # fmt: skip


@pytest.mark.parametrize("changes,said", REFUSED, ids=str)
def test_what_cannot_be_is_refused_in_one_line(changes, said):
    with pytest.raises(tg.UserError, match=said):
        tg.validate(tiny(depth=6, **changes))


def test_a_list_of_a_forged_file_costs_no_memory():
    for key, text in (("xsa_layers", "0-9999,"), ("value_layers", "0-5 ")):
        with pytest.raises(tg.UserError, match=f"{key} = '{text}"):
            tg.validate(tiny(depth=6, **{key: text * 2000 + "1"}))
        with pytest.raises(tg.UserError, match=f"{key} has [0-9]+ characters: 20000 at most"):
            tg.validate(tiny(depth=6, **{key: text * 10**5 + "1"}))


@pytest.mark.parametrize(
    "changes",
    [
        {"value_gate": "6"},
        {"attn_gate_layers": "1"},
        {"skip_dims": 4},
        {"smear": 4, "seq_len": "1"},
        {"mudd": "x0"},
        {"net_hidden": 8},
        {"mudd": "x0"},
        {"net_hidden": 8},
    ],
    ids=str,
)
def test_what_would_do_nothing_is_refused(changes):
    with pytest.raises(tg.UserError, match=f"{next(iter(changes))} = .* does nothing here"):
        tg.refuse_idle(tiny(**changes))
