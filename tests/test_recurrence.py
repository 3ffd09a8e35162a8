"""
Golf's model family: counts to the last digit, and the forward pass against its formulae written
down once more.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import build, parts, random_tokens, tg, tiny

CPU = torch.device("cpu")
SMALL = {
    "depth": 2,
    "dim": 32,
    "heads": 4,
    "kv_heads": 2,
    "loop": "0:2",
    "repeats": "0:1 0.5:3",
    "tie_embed": 1,
    "head_init": "0.1",
    "block_scales": 1,
    "q_gain": 1.5,
    "xsa": 2,
    "loop_embed": 1,
    "cross_repeat": 1,
    "value_embeds": 2,
    "rope": "standard",
    "rope_dims": 4,
    "activation": "leaky_relu2",
    "softcap": 30.0,
    "mlp_ratio": 2.0,
    "layer_scale": 1,
}


def awake(model: tg.GPT) -> tg.GPT:
    """
    Every parameter at random: at the start the recurrence's own are zero and would hide mistakes.
    """
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=rng))
    return model


@pytest.mark.parametrize(
    "name, count",
    [
        ("golf_baseline", 17_059_912),
        ("golf_progressive", 17_140_056),
        ("golf_progressive_4h", 17_150_040),
    ],
)
def test_preset_has_the_parameters_of_the_original(name, count):
    cfg = tg.parse_args(["--config", name])
    model = tg.build_model(cfg, torch.device("meta"), torch.bfloat16, 1024)
    assert sum(p.numel() for p in model.parameters()) == count


def plain_forward(model: tg.GPT, tokens: torch.Tensor, repeats: int) -> torch.Tensor:
    """
    Logits [B, T, V] after specs 3.2 to 3.5, head by head, without any of the trainer's functions.
    """
    w, cfg = dict(model.named_parameters()), model.cfg

    def rms(x):
        return x / (x.square().mean(-1, keepdim=True) + cfg.norm_eps).sqrt()

    def turn(x):  # [B, T, K]: the first 4 dims turn in pairs (k, k+2), the others stand still
        t = torch.arange(x.size(1))[:, None]
        angle = t * torch.tensor([1.0, cfg.rope_base ** (-2 / 4)])
        a, b = x[..., :2], x[..., 2:4]
        return torch.cat(
            [a * angle.cos() + b * angle.sin(), b * angle.cos() - a * angle.sin(), x[..., 4:]], -1
        )

    x0 = x = rms(w["head"][tokens])
    tables, previous, position = w["value_embeds"], {}, 0
    positions = cfg.depth * repeats
    future = torch.ones(tokens.size(1), tokens.size(1)).triu(1).bool()
    for r in range(repeats):
        for b in range(cfg.depth):
            block = f"blocks.{b}."
            x = x + w["loop_embed"][position]
            for e in range(2):
                x = x + w["value_scales"][position, e] * tables[e][tokens]
            if r > 0:
                x = x + w["cross_scales"][b, r - 1] * previous[b]
            x = w[block + "mix"][0] * x + w[block + "mix"][1] * x0
            h = rms(x) / math.sqrt(b + 1)
            width, heads = cfg.dim // cfg.heads, []
            for i in range(cfg.heads):
                j = i // (cfg.heads // cfg.kv_heads)
                q = (
                    turn(rms(h @ w[block + "attn.q"][i * width : (i + 1) * width].T))
                    * w[block + "attn.q_gain"][i]
                )
                k, v = (h @ m[j * width : (j + 1) * width].T for m in w[block + "attn.kv"])
                scores = (q @ turn(rms(k)).mT / math.sqrt(width)).masked_fill(future, -math.inf)
                y = scores.softmax(-1) @ v
                if position >= positions - cfg.xsa:
                    unit = v / v.norm(dim=-1, keepdim=True)
                    y = y - (y * unit).sum(-1, keepdim=True) * unit
                    assert (y * v).sum(-1).abs().max() < 1e-4
                heads.append(y)
            x = x + w[block + "scales"][0] * (torch.cat(heads, -1) @ w[block + "attn.proj"].T)
            z = rms(x) / math.sqrt(b + 1) @ w[block + "mlp.fc"].T
            z = torch.where(z > 0, z, 0.5 * z) ** 2
            x = x + w[block + "scales"][1] * (z @ w[block + "mlp.proj"].T)
            previous[b], position = x, position + 1
    return 30 * torch.tanh(rms(x) @ w["head"].T / 30)


@pytest.mark.parametrize("repeats", [1, 2, 3])
def test_forward_is_that_of_the_formulae(repeats):
    cfg = tiny(**SMALL)
    model, (x, y) = awake(build(cfg)), random_tokens(cfg, 2, 12)
    want = plain_forward(model, x, repeats)
    assert torch.allclose(model.logits(model.hidden(x, repeats, 0)), want, atol=2e-4)
    model(x, y, repeats).mean().backward()
    got = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    F.cross_entropy(want.flatten(0, 1), y.flatten()).backward()
    for name, p in model.named_parameters():  # through the cross-repeat skip as well
        if p.grad is not None:
            assert torch.allclose(got[name], p.grad, atol=2e-4), name


def test_shallow_phase_leaves_alone_what_belongs_to_deeper_ones():
    """
    Rows of positions that are not there have no gradient; a row keeps its meaning when depth grows.
    """
    cfg = tiny(**SMALL)
    model, (x, y) = awake(build(cfg)), random_tokens(cfg, 2, 12)
    model(x, y, 2).mean().backward()
    for rows, used in (
        (model.loop_embed, 4),
        (model.value_scales, 4),
        (model.cross_scales.transpose(0, 1), 1),
    ):
        grad = (
            model.cross_scales.grad.transpose(0, 1)
            if rows.shape[1] == 2 and used == 1
            else rows.grad
        )
        assert (grad[:used].abs().flatten(1).amax(1) > 0).all() and not grad[used:].any()
    alone = build(tiny(**SMALL | {"repeats": "2"}))
    with torch.no_grad():
        for name, p in alone.named_parameters():
            whole = dict(model.named_parameters())[name]
            p.copy_(whole[tuple(slice(n) for n in p.shape)])
    assert torch.equal(alone.hidden(x, 2, 0), model.hidden(x, 2, 0))


@pytest.mark.parametrize("repeats", [1, 2, 3])
def test_what_is_learned_for_a_position_keeps_its_owner_when_depth_grows(repeats):
    """
    Two blocks before the loop, two in it, two behind: layer scale follows the block; vectors, value
    scales and cross-repeat scales follow the pass within the loop and the block outside of it, in
    front and behind alike.
    """
    cfg = tiny(
        depth=6,
        loop="2:4",
        repeats="0:1 0.4:2 0.7:3",
        layer_scale=1,
        loop_embed=1,
        value_embeds=1,
        cross_repeat=1,
        block_scales=1,
    )
    model, (x, _) = awake(build(cfg)), random_tokens(cfg, 2, 12)
    assert model.loop_embed.shape == (10, 32) and model.value_scales.shape == (10, 1, 32)
    rows = {
        (0, 0): 0,
        (1, 0): 1,
        (2, 0): 2,
        (3, 0): 3,
        (2, 1): 4,
        (3, 1): 5,
        (2, 2): 6,
        (3, 2): 7,
        (4, 0): 8,
        (5, 0): 9,
    }
    h = x0 = F.rms_norm(model.embed[x], (32,), eps=cfg.norm_eps)
    passes, before = dict.fromkeys(range(6), 0), {}
    for b in [0, 1, *[2, 3] * repeats, 4, 5]:
        row = rows[b, passes[b]]
        h = h + model.loop_embed[row] + model.value_scales[row, 0] * model.value_embeds[0][x]
        if b in before:
            h = h + model.cross_scales[b - 2, passes[b] - 1] * before[b]
        seen = tg.AttentionMask(None, 0, h)
        h = model.blocks[b](
            h, x0, [], (model.cos, model.sin), seen, False, torch.tensor((b + 1) ** -0.5)
        )
        before[b], passes[b] = h, passes[b] + 1
    assert torch.allclose(
        model.hidden(x, repeats, 0), F.rms_norm(h, (32,), eps=cfg.norm_eps), atol=1e-5
    )


def test_step_0_loss_is_that_of_a_uniform_guess():
    """
    Outputs of all branches start at zero, and the tied table is small: ln V, as the originals' logs
    begin.
    """
    for name in ("golf_progressive", "golf_loop"):
        flags = [
            "--dim",
            "64",
            "--heads",
            "4",
            "--kv_heads",
            "2",
            "--dtype",
            "float32",
            "--micro_tokens",
            "64",
            "--batch_tokens",
            "64",
            "--seq_len",
            "64",
            "--head_dim",
            "16",
        ]
        cfg = tg.parse_args(["--config", name, *flags])
        model, (x, y) = build(cfg, 64), random_tokens(cfg, 1, 64)
        assert float(model(x, y, 3).mean().detach()) == pytest.approx(math.log(1024), abs=0.05)


def test_depth_changes_at_the_schedules_borders_alone():
    plan = tg.Plan(tg.parse_args(["--config", "golf_progressive"]))
    for fraction, repeats in (
        (0, 2),
        (0.3999, 2),
        (0.4, 3),
        (0.6499, 3),
        (0.65, 4),
        (0.9999, 4),
        (1, 4),
    ):
        assert plan.at(0, plan.fraction(0, 600 * fraction)).repeats == repeats
    # on steps alone this one would never advance to 4
    with pytest.raises(tg.UserError, match="its last value"):
        tg.validate(tiny(loop="0:2", steps=10, repeats="0:2 50s:4"))


@pytest.mark.parametrize("seconds", [0.0, 100.0])
@pytest.mark.parametrize("first", [0, 4])
def test_an_evaluation_belongs_to_the_step_behind_it_for_every_graph_schedule(
    tmp_path, monkeypatch, first, seconds
):
    """
    All that shape a graph change at step 4, from steps and on a clock whose cap ten steps just
    meet; also resumed.
    """
    p = parts(
        tmp_path,
        loop="0:2",
        repeats="0:1 0.4:2",
        window="0:4 0.4:8",
        seq_len="0:16 0.4:32",
        eval_every=2,
        batch_tokens="0:64 0.4:128",
        micro_tokens=64,
        steps=10,
        max_seconds=seconds,
        save_last=0,
    )
    clock = p.run.clock
    monkeypatch.setattr(clock, "seconds", lambda: 0.09 * seconds * p.run.step)
    trained, evaluated = {}, {}
    if first:
        p.run.step, p.run.trained = 3, p.plan.at(3, 0.3)
        p.run.folder = tmp_path / "run"
        saved = tg.save_checkpoint(p, first)
        p.run.trained = None
        assert tg.load_checkpoint(saved, p) == first
    monkeypatch.setattr(
        tg,
        "train_step",
        lambda p, step, now: trained.setdefault(step, now) and (torch.zeros(1),) * 2,
    )
    monkeypatch.setattr(
        tg, "validate_all", lambda p, step, now: evaluated.setdefault(step, now) and {}
    )
    monkeypatch.setattr(tg, "log_step", lambda *told: None)
    step, now, _ = tg.train_loop(p, first)
    assert (
        list(trained) == list(range(first, 10))
        and list(evaluated) == list(range(first, 11, 2))
        and step == 10
    )
    graph = lambda now: (now.repeats, now.window, now.seq_len, now.batch_tokens)
    for i in range(first, 10):
        assert graph(trained[i]) == ((1, 4, 16, 64) if i < 4 else (2, 8, 32, 128))
    for i in range(first, 11, 2):
        assert graph(evaluated[i]) == ((1, 4, 16, 64) if i <= 4 else (2, 8, 32, 128)), i
    assert now == trained[9]


def test_a_clock_that_ends_before_the_last_depth_is_told(tmp_path, monkeypatch):
    """
    The artifact's readers know the schedules alone: it is scored as they apply it, whatever the
    last step was.
    """
    p, said, applied = parts(tmp_path, loop="0:2", repeats="0:1 0.9:2", max_seconds=10.0), [], []
    monkeypatch.setattr(p.run, "log", said.append)
    loss = tg.evaluate(p.run, p.graph, p.val, p.plan.eval_shape(p.plan.at(20, 1.0)))
    evaluate = lambda run, graph, val, shape, mask: applied.append(shape.repeats) or loss
    monkeypatch.setattr(tg, "evaluate", evaluate)
    p.cfg.export = "int8"
    p.run.folder = tmp_path
    for fraction in (0.8, 0.95):
        tg.finish(p, 5, p.plan.at(5, fraction), {"val_loss": 1.0})
    assert applied == [2, 2]
    told = [line for line in said if "ended training at" in line]
    assert (
        len(told) == 1
        and "ended training at repeats 1" in told[0]
        and "schedules' end, repeats 2" in told[0]
    )


def test_bits_per_byte_of_a_uniform_guess_are_ten_bits_a_token():
    """On parameter-golf's validation set, 62,021,632 tokens and 151.08 MB."""
    bpb = tg.bits_per_byte(math.log(1024), 62_021_632, 151_080_000)
    assert bpb == pytest.approx(10 / 2.4359, rel=1e-4)
