"""The newest slowrun records: what each part is, by formulae written out here."""

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers import OneOf, alone, build, parts, random_tokens, tg, tiny
from test_model import preset
from torch.utils.flop_counter import FlopCounterMode

from logs import score

CPU = torch.device("cpu")


def share(folder, rank: int = 0, world: int = 1, **changes) -> tg.Trainer:
    """One rank's trainer, which hears nothing of the others; a step leaves its gradients."""
    p = parts(folder, head_init="0.2", proj_init=1.0, **changes)
    p.run = OneOf(CPU, rank, world)
    p.loader = tg.Loader(p.cfg, p.plan, alone(rank, world))
    p.opt = tg.MuonAdamW(p.cfg, p.model, p.run)
    p.opt.step = lambda now: torch.zeros(1)
    return p


def gradients(p: tg.Trainer, step: int = 0) -> dict[str, torch.Tensor]:
    tg.train_step(p, step, p.plan.at(step, step / p.cfg.steps))
    return {name: w.grad.clone() for name, w in p.model.named_parameters()}


def doubled(p: tg.Trainer) -> tg.Trainer:
    for q in p.model.parameters():
        q.data = q.data.double()
    p.model.dtype = p.run.dtype = torch.float64
    p.opt = tg.MuonAdamW(p.cfg, p.model, p.run)
    p.opt.step, p.opt.collect = lambda now: torch.zeros(1), lambda last: None
    return p


# --- meta-gradient

META = {"meta_step": "0.5", "meta_groups": 4, "micro_tokens": 32, "batch_tokens": "512"}


def test_meta_step_on_least_squares_is_the_formula(tmp_path, doubles, monkeypatch):
    """Gradient of half 1, then of half 2 at W - length * g1/|g1|, whose Hessian is F2'F2/N."""
    p = doubled(
        share(tmp_path, meta_step="0.5", meta_groups=1, meta_match=r"blocks\.0\.attn\.proj")
    )
    rng = torch.Generator().manual_seed(0)
    table, wanted = torch.randn(2, 96, 32, generator=rng).unbind(0)
    w = p.model.blocks[0].attn.proj

    def squares(p, x, y, *how):
        miss = table[x.flatten()] @ w.T - wanted[y.flatten()]
        return (miss.square().sum() / 2).view(1)

    monkeypatch.setattr(tg, "loss_terms", squares)
    rows = torch.from_numpy(tg.Loader(p.cfg, p.plan).batch(0, 128, 32).astype("int64"))
    before, found = w.detach().clone(), gradients(p)["blocks.0.attn.proj"]
    g, hessians = [], []
    for half in (rows[:2], rows[2:]):
        f, t = table[half[:, :-1].flatten()], wanted[half[:, 1:].flatten()]
        g.append((f @ before.T - t).T @ f / 128)
        hessians.append(f.T @ f / 128)
    want = g[0] + g[1] - 0.5 * g[0] / g[0].norm() @ hessians[1]
    torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-12)
    assert (found - g[0] - g[1]).norm() > 1e-2 * found.norm()
    assert torch.equal(w, before)


def test_meta_step_changes_a_models_gradient_by_the_hessian_of_the_second_half(tmp_path, doubles):
    """(G(length) - G(0)) / length -> -H2 d, d the first half's direction on the chosen matrices."""
    length, match = 1e-5, r"\.mlp\."
    how = META | {"meta_groups": 1, "meta_match": match, "micro_tokens": 128}
    steps = {size: f"0:{size} 1>9" for size in (length, 0.0)}
    moved, plain = (
        gradients(doubled(share(tmp_path, **how | {"meta_step": text}))) for text in steps.values()
    )
    p = doubled(share(tmp_path, **how))
    named = dict(p.model.named_parameters())
    rows = torch.from_numpy(tg.Loader(p.cfg, p.plan).batch(0, 512, 32).astype("int64"))
    first, second = (
        p.model(half[:, :-1].contiguous(), half[:, 1:].contiguous()).sum() / 512
        for half in (rows[:8], rows[8:])
    )
    chosen = [name for name in named if ".mlp." in name]
    g = torch.autograd.grad(first, [named[name] for name in chosen])
    size = math.sqrt(sum(float(t.square().sum()) for t in g))
    slope = torch.autograd.grad(second, list(named.values()), create_graph=True)
    along = sum(
        (s * d / size).sum()
        for s, d in zip([s for n, s in zip(named, slope) if n in chosen], g, strict=True)
    )
    for name, want in zip(named, torch.autograd.grad(along, list(named.values()))):
        found = (moved[name] - plain[name]) / length
        torch.testing.assert_close(found, -want, rtol=1e-3, atol=1e-6)


def test_meta_step_puts_every_bit_of_the_weights_back(tmp_path):
    p, plain = share(tmp_path, **META), share(tmp_path, **META | {"meta_step": "0"})
    before = {name: w.detach().clone() for name, w in p.model.named_parameters()}
    seen = []
    p.model.register_forward_pre_hook(lambda *_: seen.append(p.model.blocks[0].mlp.fc.sum().item()))
    moved, still = gradients(p), gradients(plain)
    assert all(torch.equal(w, before[name]) for name, w in p.model.named_parameters())
    assert len(seen) == 16 and len(set(seen)) == 5  # at the weights, and at four points beside
    assert all(not torch.allclose(moved[n], still[n], rtol=1e-2) for n in moved)


def test_meta_step_of_length_0_changes_no_bit(tmp_path):
    """With the same micro-batches."""
    how = META | {"meta_groups": 1, "mtp": 0.3, "attn_dropout": 0.2}
    found = []
    for text in ("0", "0 0.5:1"):
        p = share(tmp_path, **how | {"meta_step": text})
        found.append(gradients(p))
    assert all(torch.equal(t, found[1][name]) for name, t in found[0].items())


@pytest.mark.parametrize("world", [2, 4])
def test_meta_step_has_the_same_groups_for_any_number_of_ranks(tmp_path, world):
    """The points that each group moves to are equal to the bit, the sums up to their order."""

    def points(p: tg.Trainer) -> list[float]:
        seen = []
        p.model.register_forward_pre_hook(
            lambda *_: seen.append(p.model.blocks[1].attn.proj.double().sum().item())
        )
        return seen

    one = share(tmp_path, **META)
    alone, whole = points(one), gradients(one)
    ranks = [share(tmp_path, rank, world, **META) for rank in range(world)]
    seen, found = zip(*[(points(p), gradients(p)) for p in ranks])
    assert sum(seen, []) == alone
    for name, g in whole.items():
        torch.testing.assert_close(sum(f[name] for f in found), g, rtol=1e-5, atol=1e-7)


def test_meta_step_meets_its_vectors():
    """slowrun_1h: half of the rate's multiplier before its cycles and their floor; tiny: half."""
    plan = tg.Plan(preset("slowrun_1h"))
    for step, length in ((0, 0.5), (1678, 0.5), (1888, 0.35313), (2000, 0.24057), (2096, 0.02443)):
        assert plan.at(step, step / 2097).meta_step == pytest.approx(length, abs=5e-6), step
    assert plan.at(2096, 2096 / 2097).lr == pytest.approx(0.05)  # in the last cycle, at its floor
    assert tg.Plan(preset("slowrun_tiny")).at(2849, 2849 / 2850).meta_step == 0.5


def test_what_moves_is_what_the_presets_records_move():
    """slowrun_1h: 279 matrices that Muon updates; tiny: gates and projections of 16 MLPs."""
    for name, tensors, numbers in (
        ("slowrun_1h", 279, 1_263_414_936),
        ("slowrun_tiny", 48, 138_412_032),
    ):
        cfg = preset(name)
        model = tg.build_model(cfg, torch.device("meta"), torch.float32, 8)
        moved = tg.moved_matrices(cfg, model)
        count = sum(math.prod(p.shape[:-2]) for p in moved.values())
        assert (count, sum(p.numel() for p in moved.values())) == (tensors, numbers)
        muon = [b for b in tg.param_buckets(cfg, model, alone()) if b.rule.kind == "muon"]
        by_muon = {name for b in muon for name in b.params}
        assert moved.keys() <= by_muon and (name == "slowrun_tiny" or moved.keys() == by_muon)


def test_one_micro_batch_a_group_is_split_in_two(tmp_path):
    """slowrun_tiny: 8 groups of 32 rows of 2,048 tokens, 65,536 tokens at once."""
    plan = tg.Plan(preset("slowrun_tiny"))
    now = plan.at(0, 0.0)
    assert [plan.micro_rows(now, w) for w in (1, 2, 4, 8)] == [16] * 4
    assert [plan.micro_batches(now, w) for w in (1, 2, 4, 8)] == [16, 8, 4, 2]


@pytest.mark.parametrize(
    "changes, words",
    [
        (
            {"meta_groups": 3},
            ("batch_tokens = 512 in meta_step's halves of meta_groups = 3", "2 * meta_groups"),
        ),
        ({"meta_match": "nothing"}, ("meta_match = 'nothing'", "no matrix")),
        ({"meta_match": "("}, ("meta_match = '('",)),
        ({"param_dtype": "bfloat16"}, ("meta_step = '0.5'", "--param_dtype float32")),
        ({"meta_step": "-1"}, ("meta_step = '-1'",)),
    ],
    ids=str,
)
def test_meta_step_that_cannot_work_is_refused(tmp_path, changes, words):
    with pytest.raises(tg.UserError) as caught:
        parts(tmp_path, **META | changes)
    assert all(w in str(caught.value) for w in words), caught.value


def test_groups_that_ranks_cannot_share_are_refused():
    plan = tg.Plan(tiny(**META))
    with pytest.raises(tg.UserError, match="meta_groups = 4 cannot be shared by 3 ranks"):
        plan.micro_rows(plan.at(0, 0.0), 3)


# --- one-head multi-token prediction

LATER = {"mtp_next": "0.5", "mtp_third": "0.25"}


def losses_by_hand(model: tg.GPT, x: torch.Tensor, y: torch.Tensor) -> list[torch.Tensor]:
    """Cross-entropies of the target and of the two behind it in the row, each [B, T - k]."""
    z = model.logits(model.hidden(x, 1, 0))
    log_p, T = z - z.logsumexp(-1, keepdim=True), y.size(1)
    return [
        torch.stack([-log_p[:, t].gather(-1, y[:, t + k, None])[:, 0] for t in range(T - k)], 1)
        for k in range(3)
    ]


@pytest.mark.parametrize("chunk", [1000, 20])
@pytest.mark.parametrize("more", [{}, {"z_loss": 0.01, "mtp": 0.3}, {"mtp_next": "0"}], ids=str)
def test_later_tokens_are_separate_cross_entropies_within_the_row(doubles, chunk, more):
    """Of one logit row; terms behind a row's end are left out. The gradient too."""
    cfg = tiny(**LATER | {"head_init": "0.2", "loss_chunk": chunk} | more)
    model, (x, y) = build(cfg, dtype=torch.float64).double(), random_tokens(cfg, 3, 16)
    now = tg.Plan(cfg).at(0, 0.0)
    found = tg.loss_terms(SimpleNamespace(cfg=cfg, graph=model), x, y, now)
    names = ["loss", *tg.extra_terms(cfg)]
    terms = dict(zip(names, found, strict=True))
    first, second, third = losses_by_hand(model, x, y)
    wanted = {"loss": first.sum(), "mtp_third_loss": 0.25 * third.sum()}
    if "mtp_next" not in more:
        wanted["mtp_next_loss"] = 0.5 * second.sum()
    for name, want in wanted.items():
        torch.testing.assert_close(terms[name], want)
    total = sum(terms[name] for name in wanted)
    for a, b in zip(*(torch.autograd.grad(t, model.head) for t in (total, sum(wanted.values())))):
        torch.testing.assert_close(a, b)
    assert torch.equal(model(x, y), model(x, y).detach()) and len(model(x, y)) == 48
    torch.testing.assert_close(model(x, y).view(3, 16), first)  # as it is evaluated


def test_gradient_at_the_end_of_a_row_has_the_sum_of_the_weights_that_are_there():
    """d/dz = W softmax(z) - sum of w_k at their targets; W: 1.75, 1.5 before the last, 1."""
    cfg = tiny(**LATER)
    model, (x, y) = build(cfg), random_tokens(cfg, 1, 4)
    logits = torch.randn(4, 96, generator=torch.Generator().manual_seed(0)).requires_grad_()
    model.logits = lambda *_: logits
    rows = model.losses_with_later(x, model.with_later(y).flatten(1))
    (rows * torch.tensor([[1], [0.5], [0.25]])).sum().backward()
    for t, weights in enumerate([(1, 0.5, 0.25), (1, 0.5, 0.25), (1, 0.5), (1,)]):
        want = sum(weights) * logits[t].detach().softmax(-1)
        for k, w in enumerate(weights):
            want[y[0, t + k]] -= w
        torch.testing.assert_close(logits.grad[t], want)


def test_weights_of_0_change_no_bit_of_the_gradient(tmp_path):
    plain = gradients(share(tmp_path))
    zero = gradients(share(tmp_path, mtp_next="0 0.5:1", mtp_third="0 0.5:1"))
    assert all(torch.equal(g, zero[name]) for name, g in plain.items())
    some = gradients(share(tmp_path, mtp_third="0.25"))
    assert not torch.allclose(some["head"], plain["head"], rtol=1e-2)


def test_weights_of_later_tokens_meet_their_vectors():
    """slowrun_tiny: 2,850 steps; the third's falls over .33 of them, then the next one's."""
    plan = tg.Plan(preset("slowrun_tiny"))
    at = lambda step: plan.at(step, step / 2850)
    assert at(470).mtp_third == pytest.approx(0.12507, abs=1e-5) and at(470).mtp_next == 0.5
    assert at(1410).mtp_next == pytest.approx(0.25040, abs=1e-5) and at(1410).mtp_third == 0
    assert at(1881).mtp_next == at(2849).mtp_third == 0


def test_later_tokens_that_no_row_holds_are_refused():
    for name, length in (("mtp_next", 1), ("mtp_third", 2)):
        with pytest.raises(tg.UserError, match=f"{name} = '0.5' does nothing here"):
            tg.refuse_idle(tiny(**{name: "0.5"}, seq_len=str(length)))


# --- second pass


def lively(**changes) -> tuple[tg.Config, tg.GPT]:
    """Six blocks with skips, lambdas and value projections, nothing of which is at rest."""
    plain = {"depth": 6, "unet": 2, "x0_lambda": 0.1, "resid_lambda": 1.1, "value_proj": 20}
    cfg = tiny(**plain | {"head_init": "0.2", "proj_init": 1.0, "passes": "0:1 0.5:2"} | changes)
    return cfg, build(cfg)


def net(model: tg.GPT, x: torch.Tensor, x0: torch.Tensor) -> torch.Tensor:
    """One pass by hand: skips from the first three blocks to the last three, x0 into each block."""
    mask, kept = tg.AttentionMask(None, 0, x), []
    for i, block in enumerate(model.blocks):
        added = [(model.skips[i - 3], kept[5 - i])] if i >= 3 else []
        x = block(x, x0, added, (model.cos, model.sin), mask, False)
        kept.append(x)
    return F.rms_norm(x, (32,), eps=1e-6)


@pytest.mark.parametrize("passes", [1, 2, 3])
def test_passes_are_the_net_on_its_own_normed_output(passes):
    """As by hand, also as it is evaluated; all but the last are constants for the gradient."""
    cfg, model = lively()
    x, y = random_tokens(cfg, 2, 32)
    x0 = F.rms_norm(model.embed[x], (32,), eps=1e-6)
    h = x0
    for i in range(passes):
        h = net(model, h.detach() if i else h, x0)
    torch.testing.assert_close(model.hidden(x, 1, 0, passes), h)
    with torch.no_grad():
        found = model(x, y, 1, 0, passes=passes)
    torch.testing.assert_close(found, model.losses(h.flatten(0, 1), y.flatten()))
    names, weights = zip(*model.named_parameters())
    want = torch.autograd.grad(model.losses(h.flatten(0, 1), y.flatten()).sum(), weights)
    got = torch.autograd.grad(model(x, y, 1, 0, passes=passes).sum(), weights)
    for name, a, b in zip(names, got, want):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4, msg=name)
    if passes > 1:
        one = torch.autograd.grad(model(x, y).sum(), weights)
        assert not torch.allclose(one[0], got[0], rtol=1e-2)


def test_embedding_gets_its_gradient_of_two_passes_through_x0_alone():
    cfg, model = lively(x0_lambda=0.0, value_proj=0)
    x, y = random_tokens(cfg, 2, 32)
    model(x, y, 1, 0, passes=2).sum().backward()
    assert model.embed.grad is None and model.blocks[0].attn.qkv.grad.any()


def test_a_pass_without_gradient_has_its_dropout_in_training_and_none_in_evaluation():
    cfg, model = lively(attn_dropout=0.5, stoch_depth=0.5)
    x, _ = random_tokens(cfg, 2, 32)
    seen = []
    model.blocks[5].register_forward_pre_hook(lambda module, args: seen.append(args[7]))
    model.hidden(x, 1, 0, 2)
    assert len(seen) == 2 and all(keep is not None for keep in seen)
    with torch.no_grad():
        a, b = model.hidden(x, 1, 0, 2), model.hidden(x, 1, 0, 2)
    assert torch.equal(a, b) and seen[2:] == [None] * 4


def test_no_pass_but_the_last_has_a_backward():
    """The first pass adds as many products as it applies matrices, the backward pass none."""
    cfg, model = lively()
    x, y = random_tokens(cfg, 2, 32)
    flops = []
    for passes in (1, 2):
        loss = model(x, y, 1, 0, passes=passes).sum()
        with FlopCounterMode(display=False) as counter:
            loss.backward()
        flops.append(counter.get_total_flops())
    width = 12 * 32 * 32 * 6 + 3 * 32 * 32  # of six blocks, and of their value projections
    # block 0's input is the embedding in a first pass, and a constant in a later one
    assert 0 <= flops[0] - flops[1] <= 0.05 * flops[0] and flops[1] > 4 * 64 * width


def test_schedule_of_passes_shapes_graphs_and_evaluation():
    """slowrun_tiny: two from step 1,995 of 2,850 on."""
    plan = tg.Plan(preset("slowrun_tiny"))
    assert [plan.at(s, s / 2850).passes for s in (0, 1994, 1995, 2849)] == [1, 1, 2, 2]
    assert [s.passes for s in plan.train_shapes(8)] == [1, 2]
    assert [s.passes for s in plan.eval_shapes()] == [1, 2]
    with pytest.raises(tg.UserError, match="passes = '0:1 1:2': its last value"):
        tg.validate(tiny(passes="0:1 1:2"))
    with pytest.raises(tg.UserError, match="passes = '0'"):
        tg.validate(tiny(passes="0"))


# --- key offset

LAYOUTS = {
    "truncated": {"rope": "truncated"},
    "half": {"rope": "standard", "rope_dims": -1},
    "neighbours": {"rope": "interleaved", "rope_dims": 8},
    "all": {"rope": "standard"},
}


def turning(cfg: tg.Config) -> tuple[set[int], set[int]]:
    """
    By trial, of 16 dims of a head in rotate()'s order: those that turn, and those of them that a
    pair's first dim turns into (its second ones).
    """
    cos, sin = tg.rope_table(cfg, 2)
    moved, second = set(), set()
    for i in range(16):
        one = torch.zeros(1, 2, 1, 16)
        one[..., i] = 1
        turned = tg.rotate(one, cos, sin)[0, 1, 0]
        if turned[i] != 1:
            moved.add(i)
            partner = next(j for j in range(16) if j != i and turned[j])
            second.add(max(i, partner))
    return moved, second


@pytest.mark.parametrize("layout", LAYOUTS)
def test_offset_dims_are_still_ones_or_the_second_of_each_pair(layout):
    cfg = tiny(heads=2, **LAYOUTS[layout])
    moved, second = turning(cfg)
    dims = {}
    for which in ("still", "second"):
        spans = tg.offset_dims(dataclasses.replace(cfg, key_offset=which))
        dims[which] = {i for low, high in spans for i in range(low, high)}
    still = set(range(16)) - moved
    assert dims["still"] == still and len(moved) == (16 if layout == "all" else 8)
    assert dims["second"] & moved == second and len(dims["second"] & still) == len(still) // 2
    assert tg.offset_dims(cfg) == []


def test_slowruns_dims_are_those_of_its_page():
    """Head of 128: of its own layout 64..127; in the first-half layout 32..63 and half the rest."""
    own = tiny(dim=256, key_offset="second")
    assert tg.offset_dims(own) == [(64, 128)]
    ours = tiny(dim=256, key_offset="second", rope="standard", rope_dims=-1)
    assert tg.offset_dims(ours) == [(32, 64), (96, 128)]


@pytest.mark.parametrize("which", ["still", "second"])
@pytest.mark.parametrize("kv_heads", [0, 1])
def test_key_offset_is_a_loop_over_positions(doubles, which, kv_heads):
    """k_t of these dims is k_{t-1}, after norm and rotation; k_0 gets two terms of gradient."""
    cfg = tiny(rope="standard", rope_dims=-1, key_offset=which, kv_heads=kv_heads, proj_init=1.0)
    attn, T = build(cfg).double().blocks[0].attn, 9
    x = torch.randn(1, T, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
    rope = tuple(t.double() for t in tg.rope_table(cfg, T))
    found = attn(x, rope, tg.AttentionMask(None, 0, x), False)
    groups, K = attn.kv_heads, 16
    weights = attn.qkv if kv_heads == 0 else torch.cat([attn.q[None], attn.kv.repeat(1, 2, 1)])
    q, k, v = ((x @ w.T).view(1, T, 2, K) for w in weights)
    q, k = (tg.rotate(F.rms_norm(t, (K,), eps=1e-6), *rope) for t in (q, k))
    dims = list(range(8, 16)) if which == "still" else [4, 5, 6, 7, 12, 13, 14, 15]
    heads = []
    for h in range(2):
        rows = []
        for t in range(T):
            keys = []
            for s in range(t + 1):
                key = [k[0, max(0, s - 1), h, d] if d in dims else k[0, s, h, d] for d in range(K)]
                keys.append(torch.stack(key))
            p = (torch.stack(keys) @ q[0, t, h] / 4).softmax(0)
            rows.append(p @ v[0, : t + 1, h])
        heads.append(torch.stack(rows))
    want = torch.cat(heads, -1) @ attn.proj.T
    torch.testing.assert_close(found[0], want)
    for a, b in zip(*(torch.autograd.grad(y.sin().sum(), [x, attn.proj]) for y in (found, want))):
        torch.testing.assert_close(a, b)
    assert groups == (kv_heads or 2)


def test_a_query_that_matches_a_token_lands_on_the_one_behind_it():
    """Induction: the score at t of the still dims is that of t - 1 without the offset."""
    cfg = tiny(rope="standard", rope_dims=-1, key_offset="still")
    plain, attn = (build(c).blocks[0].attn for c in (tiny(rope="standard", rope_dims=-1), cfg))
    seen = []

    class Watching(tg.AttentionMask):
        def attend(self, q, k, v, *how):
            seen.append(torch.einsum("bhqd,bhkd->bhqk", q[..., 8:], k[..., 8:]))
            return super().attend(q, k, v, *how)

    x = torch.randn(1, 8, 32, generator=torch.Generator().manual_seed(1))
    for a in (plain, attn):
        a(x, tg.rope_table(cfg, 8), Watching(None, 0, x), False)
    assert torch.equal(seen[1][..., 1:], seen[0][..., :-1])
    assert torch.equal(seen[1][..., 0], seen[0][..., 0])


def test_key_offset_is_in_l_blocks_alone_where_there_is_a_pattern():
    """SSSL of 16 blocks: 3, 7, 11, 15; the block of MTP has none."""
    cfg = tiny(depth=16, window_pattern="SSSL", window="9", key_offset="second", mtp=0.3)
    model = build(cfg)
    assert [i for i, b in enumerate(model.blocks) if b.attn.offset] == [3, 7, 11, 15]
    every = build(tiny(depth=3, key_offset="second", mtp=0.3))
    assert all(b.attn.offset for b in every.blocks) and not every.mtp_block.attn.offset


@pytest.mark.parametrize("changes", [{}, {"window_pattern": "SL"}, {"doc_mask": 1}], ids=str)
def test_a_row_that_is_fed_in_pieces_gives_what_one_pass_gives(changes):
    """logs/score.py's cache, with key offset and two passes."""
    how = {"key_offset": "second", "passes": "2", "head_init": "0.2", "proj_init": 1.0}
    model = build(tiny(depth=4, **how | changes))
    x, _ = random_tokens(model.cfg, 1, 32)
    shape = tg.Shape(1, 32, 1, 8, 2)
    cache = score.Cache(model, shape)
    with torch.no_grad():
        whole = model.hidden(x, 1, 8, 2)[0]
        pieces = torch.cat([cache.feed(part) for part in x[0].split([1, 3, 10, 1, 17])])
        off = build(tiny(depth=4, **how | changes | {"key_offset": ""})).hidden(x, 1, 8, 2)[0]
    torch.testing.assert_close(pieces, whole, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(off, whole, atol=1e-2)


# --- windows and YaRN


def frequencies(cfg: tg.Config, window: int) -> torch.Tensor:
    """Angles of position 1."""
    cos, sin = tg.rope_table(cfg, 2, window)
    return torch.atan2(sin[1], cos[1]).double()


def test_yarn_meets_the_vectors_of_two_hour():
    """64 frequencies 10000^(-i/64); 10 stay at the first growth, 24 are mixed, 30 slow down."""
    cfg = preset("slowrun_two_hour")
    w = [frequencies(cfg, window) for window in (769, 1793, 2049)]
    torch.testing.assert_close(w[0], 10000 ** (-torch.arange(64).double() / 64), rtol=1e-6, atol=0)
    ratio = w[1] / w[0]
    slowed = (ratio - 768 / 1792).abs() < 1e-6
    assert (int((ratio == 1).sum()), int(slowed.sum())) == (10, 30) and slowed[34:].all()
    for stage, i, want in ((1, 20, 0.0301887), (1, 63, 4.949066e-5)):
        assert w[stage][i].item() == pytest.approx(want, rel=3e-6)
    for i, want in ((20, 0.0273415), (63, 4.330432e-5)):
        assert w[2][i].item() == pytest.approx(want, rel=3e-6)
    scales = [128**-0.5 * tg.sharpness(cfg, window) for window in (769, 1793, 2049)]
    assert scales == pytest.approx([0.0883883, 0.1033666, 0.1061271], rel=2e-6)


def test_yarn_meets_the_vectors_of_the_speedrun():
    """Truncated rotary of base 1024, windows of 3, 7, 11 and 13 times 128."""
    cfg = tiny(
        dim=256,
        rope_base=1024.0,
        window_pattern="SL",
        window_long="385 423s:897 847s:1409 1270s:1665",
        steps=1285,
        yarn=1,
    )
    w = [frequencies(cfg, window) for window in tg.yarn_stages(cfg)]
    for i, wants in (
        (5, [0.32693977, 0.25450731, 0.25450731, 0.25450731]),
        (31, [0.00097656, 0.00041853, 0.00026634, 0.00022536]),
    ):
        assert [x[i].item() for x in w] == pytest.approx(wants, abs=1e-8, rel=1e-6)
    assert all(not x[32:].any() for x in w)  # what stands still does so
    scales = [0.1 * tg.sharpness(cfg, window) for window in tg.yarn_stages(cfg)]
    assert scales == pytest.approx([0.1, 0.116946, 0.127518, 0.131778], abs=5e-7)


def test_yarn_ends_where_it_is_told():
    """As track 2 has it: rotations and sharpness stay from the window of that value on."""
    how = {"window_pattern": "SL", "depth": 2, "window_long": "129 0.3:257 0.6:513"}
    cut, whole = tiny(yarn=257, **how), tiny(yarn=1, **how)
    tg.validate(cut)
    for window, same in ((129, 129), (257, 257), (513, 257)):
        assert torch.equal(frequencies(cut, window), frequencies(whole, same))
        assert tg.sharpness(cut, window) == tg.sharpness(whole, same)
    assert tg.rope_tables(cut, 8)[0].size(0) == 2
    for yarn in (128, 256):  # nothing would grow
        with pytest.raises(tg.UserError, match=f"yarn = {yarn} .*second value of window_long"):
            tg.refuse_idle(tiny(yarn=yarn, **how))


def test_yarn_is_a_function_of_the_schedule_and_switches_with_it():
    plan = tg.Plan(preset("slowrun_two_hour"))
    at = {s: plan.at(s, s / 4194) for s in (0, 1143, 1144, 2478, 2479, 4193)}
    assert [now.window_long for now in at.values()] == [769, 769, 1793, 1793, 2049, 2049]
    assert [now.window for now in at.values()] == [257, 257, 769, 769, 1281, 1281]
    assert plan.eval_shape(at[1143]).window_long == 769  # behind the last step of a stage
    assert [s.window_long for s in plan.train_shapes(8)] == [769, 1793, 2049]


@torch.no_grad()
def test_equal_windows_change_no_bit_and_growth_does():
    how = {"window_pattern": "SL", "depth": 3, "proj_init": 1.0, "head_init": "0.2", "mtp": 0.3}
    x, y = random_tokens(tiny(), 2, 32)
    plain = build(tiny(window_long="9", **how))(x, y, 1, 5, 1, 9, mtp=True)
    same = build(tiny(window_long="9 0.5:9", yarn=1, **how))(x, y, 1, 5, 1, 9, mtp=True)
    assert torch.equal(plain, same)
    for window, equal in ((9, True), (17, False)):
        grown = build(tiny(window_long="9 0.5:17", yarn=1, **how))(x, y, 1, 5, 1, window, mtp=True)
        wide = build(tiny(window_long="9 0.5:17", **how))(x, y, 1, 5, 1, window, mtp=True)
        assert torch.equal(grown, wide) == equal and torch.equal(grown, plain) == equal


@torch.no_grad()
def test_the_evaluations_window_waits_for_the_last_stage_and_keeps_its_rotations():
    how = {"window_pattern": "SSL", "depth": 3, "proj_init": 1.0, "head_init": "0.2", "yarn": 1}
    cfg = tiny(window="5", window_long="9 0.5:17", eval_window_long=25, **how)
    plan = tg.Plan(cfg)
    seen = [plan.eval_shape(plan.at(step, step / 20)).window_long for step in (0, 9, 10, 20)]
    assert seen == [9, 9, 25, 25]
    assert [s.window_long for s in plan.train_shapes(1)] == [9, 17]
    assert {s.window_long for s in plan.eval_shapes()} == {9, 25}
    assert tg.sharpness(cfg, 25) == tg.sharpness(cfg, 17) > tg.sharpness(cfg, 9) == 1
    x, y = random_tokens(cfg, 2, 32)
    wide, last = (build(cfg)(x, y, 1, 5, 1, window).view(2, 32) for window in (25, 17))
    assert torch.equal(wide[:, :17], last[:, :17]) and not torch.equal(wide[:, 17:], last[:, 17:])


def test_a_shorter_window_in_evaluation_or_one_without_long_blocks_is_refused():
    with pytest.raises(tg.UserError, match="eval_window_long = 9 is less than the last value"):
        tg.validate(tiny(window_pattern="SL", window_long="5 0.5:17", eval_window_long=9))
    with pytest.raises(tg.UserError, match="eval_window_long = 9 does nothing here"):
        tg.refuse_idle(tiny(eval_window_long=9))


def test_every_block_has_the_tables_and_the_factor_of_the_stage():
    """S blocks and the block of MTP too, which sees the row in full."""
    cfg = tiny(depth=4, window_pattern="SL", window_long="5 0.5:17", yarn=1, mtp=0.3)
    model, (x, y) = build(cfg), random_tokens(cfg, 1, 32)
    seen = []
    for block in (*model.blocks, model.mtp_block):
        block.register_forward_pre_hook(lambda module, args: seen.append(args[3:5]))
    model(x, y, 1, 3, 1, 17, mtp=True)
    cos, sin = tg.rope_table(cfg, 32, 17)
    assert [mask.window for _, mask in seen] == [3, 17, 3, 17, 0]
    for rope, mask in seen:
        assert torch.equal(rope[0], cos) and torch.equal(rope[1], sin)
        assert mask.sharp == pytest.approx(1 + 0.2 * math.log(16 / 4))


@pytest.mark.parametrize("stage, window", [(1, 5), (1 + 0.2 * math.log(16 / 4), 17)])
def test_attention_in_a_window_is_dense_attention_under_its_mask(stage, window):
    cfg = tiny(depth=1, window_pattern="L", window_long="5 0.5:17", yarn=1, proj_init=1.0)
    model, (x, _) = build(cfg), random_tokens(cfg, 2, 32)
    seen = []

    class Watching(tg.AttentionMask):
        def attend(self, q, k, v, scale, bound):
            got = super().attend(q, k, v, scale, bound)
            seen.append((q, k, v, scale * stage, got, bound * self.sharp))
            return got

    mask = Watching(None, window, model.embedded(x), tg.sharpness(cfg, window))
    model.blocks[0].attn(model.embedded(x), model.rope(window), mask, False)
    ((q, k, v, scale, got, bound),) = seen
    i = torch.arange(32)
    ok = (i[:, None] >= i) & (i[:, None] - i < window)
    scores = (q @ k.mT) * scale
    want = scores.masked_fill(~ok, -math.inf).softmax(-1) @ v
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert scores.abs().max() <= bound  # what exp must hold


def test_a_row_fed_in_pieces_has_the_windows_and_tables_of_its_stage():
    how = {"window_pattern": "SL", "window_long": "5 0.5:17", "yarn": 1, "proj_init": 1.0}
    model = build(tiny(depth=4, **how))
    x, _ = random_tokens(model.cfg, 1, 32)
    cache = score.Cache(model, tg.Shape(1, 32, 1, 3, 1, 17))
    with torch.no_grad():
        pieces = torch.cat([cache.feed(part) for part in x[0].split([1, 3, 10, 18])])
        torch.testing.assert_close(pieces, model.hidden(x, 1, 3, 1, 17)[0], rtol=1e-4, atol=1e-5)
        assert not torch.allclose(pieces, model.hidden(x, 1, 3, 1, 5)[0], atol=1e-2)


@pytest.mark.parametrize("window", ["17 0.5:5", "0 0.5:5", "1 0.5:5"])
def test_yarn_without_growth_is_refused(window):
    with pytest.raises(tg.UserError, match=f"follows the growth of window_long = '{window}'"):
        tg.validate(tiny(window_pattern="SL", window_long=window, yarn=1))


def test_long_window_that_is_never_reached_is_refused():
    with pytest.raises(tg.UserError, match="window_long = '5 1:9': its last value"):
        tg.validate(tiny(window_pattern="SL", window_long="5 1:9"))
