"""
Loss, tables, optimizer and loader of modded-nanogpt's records: each against its formula, written
here once more, and to the bit what it was where it is off.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import sampler
import torch
from helpers import alone, build, now, parts, randn, random_tokens, tg, tiny, write_shard

from logs import score


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
        model = tg.GPT(cfg, torch.float32)
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


def test_prefixes_of_a_sentencepiece_model_are_those_of_brute_force(text):
    tokenizer = tg.Tokenizer(str(text / "tokenizer.model"), 512, 0)
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


def test_no_token_beyond_the_vocabulary_is_a_prefix(text):
    pieces = [(b"", False), (b"a", True), (b"a", False), (b"ab", False), (b"abcd", False)]
    assert tg.longest_prefixes(pieces).tolist() == [-1, -1, -1, 2, 3]
    assert len(tg.Tokenizer(str(text / "tokenizer.model"), 300, 0).pieces()) == 300


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
    torch.testing.assert_close(found["prefix_token_loss"], want)
    grads = [
        torch.autograd.grad(t, model.head, retain_graph=True)[0]
        for t in (want, found["prefix_token_loss"])
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
    assert found["prefix_token_loss"] == 0
    assert all(torch.equal(g, grads[1][name]) for name, g in grads[0].items())
    assert "prefix_loss" not in tg.later_targets(plain)


def test_prefix_loss_without_bytes_is_refused(tmp_path):
    with pytest.raises(tg.UserError, match="prefix_loss = '0.25'.*it needs a tokenizer"):
        tg.refuse_idle(tiny(prefix_loss="0.25"))
    cfg = tiny(prefix_loss="0.25", tokenizer="x")
    with pytest.raises(tg.UserError, match="prefix_loss = '0.25' needs the bytes"):
        tg.assemble(cfg, alone(), tg.Plan(cfg), None, None, None)


# --- rows that begin with documents

LENGTHS = (5, 3, 9, 2, 4, 7, 6, 2, 3, 11, 1, 8)


def documents(folder, *shards) -> str:
    """Shards of documents of these lengths: 0, then tokens that tell document and position."""
    for i, lengths in enumerate(shards):
        parts = [[0, *(20 + (7 * d + t) % 70 for t in range(1, n))] for d, n in enumerate(lengths)]
        write_shard(folder / f"x_train_{i:06d}.bin", np.concatenate(parts))
    write_shard(folder / "x_val_000000.bin", np.arange(100) % 96)
    return str(folder)


def rows_by_rule(shards, sizes) -> list[np.ndarray]:
    """Batches of sizes (rows, length, cap) from lists of documents, by the rule in words."""
    batches, left = [], [list(shard) for shard in shards]
    for rows, length, cap in sizes:
        while True:
            todo, batch = list(left[0]), []
            while len(batch) < rows and todo:
                row = []
                while len(row) <= length and todo:
                    row += todo.pop(0)[: cap or None]
                if len(row) > length:
                    batch.append(row[: length + 1])
            if len(batch) == rows:
                left[0] = todo
                break
            left.pop(0)
        batches.append(np.array(batch))
    return batches


def lists(folder) -> list[list[list[int]]]:
    shards = [tg.read_shard(path).tolist() for path in tg.shard_files(str(folder), "train")]
    found = []
    for tokens in shards:
        starts = [i for i, t in enumerate(tokens) if t == 0] + [len(tokens)]
        found.append([tokens[a:b] for a, b in zip(starts, starts[1:])])
    return found


def loader_of(cfg: tg.Config, rank: int = 0, world: int = 1) -> tg.Loader:
    tg.validate(cfg)
    return tg.Loader(cfg, tg.Plan(cfg), alone(rank, world))


def in_rows(folder, **changes) -> tg.Config:
    flags = {"seq_len": "7", "batch_tokens": "14", "micro_tokens": 14, "bos_rows": 1, "steps": 1}
    return tiny(data=str(folder), **flags | changes)


def test_pieces_of_rows_are_those_by_hand(tmp_path):
    """Lengths 5 3 9 2 4 7 6 ...: 4 + 3 + 1 of the third, whose rest is dropped; 2 + 4 + 2."""
    documents(tmp_path, LENGTHS)
    (found,) = [loader_of(in_rows(tmp_path, doc_cap="4")).batch(0, 14, 7, 4)]
    docs = lists(tmp_path)[0]
    assert found[0].tolist() == docs[0][:4] + docs[1] + docs[2][:1]
    assert found[1].tolist() == docs[3] + docs[4] + docs[5][:2]
    loader = loader_of(in_rows(tmp_path))
    first = loader.batch(0, 14, 7, 0)
    assert first[0].tolist() == docs[0] + docs[1]  # ends with a document, none of the next
    assert first[1].tolist() == docs[2][:8] and loader.pos == 3
    x, y = loader.tensors(first, torch.device("cpu"))
    assert (y[0, -1] == docs[1][2]) and (x[:, 0] == 0).all()


def test_data_without_a_document_are_told_so_and_not_that_more_are_needed(tmp_path):
    for name in ("x_train_000000.bin", "x_val_000000.bin"):
        write_shard(tmp_path / name, np.full(900, 7))
    cfg = in_rows(tmp_path, epochs=1)
    with pytest.raises(tg.UserError, match=r"has documents \(doc_token = 0\)"):
        loader_of(cfg).check_documents(tg.Plan(cfg))


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_any_number_of_ranks_has_the_tokens_of_the_rule(tmp_path, world):
    """Over three shards, one without room for a batch, while batch, row and cap change."""
    rng = np.random.default_rng(0)
    shards = [rng.integers(1, 30, n) for n in (90, 7, 200)]
    documents(tmp_path, *shards)
    texts = {"batch_tokens": "0:64 3s:128", "seq_len": "0:8 3s:16", "doc_cap": "0:5 2s:12 5s:0"}
    cfg = in_rows(tmp_path, steps=9, micro_tokens=16, **texts)
    plan, ranks = tg.Plan(cfg), [loader_of(cfg, r, world) for r in range(world)]
    nows = [plan.at(step, step / 9) for step in range(9)]
    sizes = [(8, now.seq_len, now.doc_cap) for now in nows]
    assert sizes[1:6] == [(8, 8, 5), (8, 8, 12), (8, 16, 12), (8, 16, 12), (8, 16, 0)]
    for step, want in enumerate(rows_by_rule(lists(tmp_path), sizes)):
        now = nows[step]
        parts = [r.batch(step, now.batch_tokens, now.seq_len, now.doc_cap) for r in ranks]
        assert np.array_equal(np.concatenate(parts), want), step
    assert ranks[0].shard == 2  # the second has no whole batch


def test_rows_go_on_inside_a_shard_from_any_step(tmp_path):
    rng = np.random.default_rng(1)
    documents(tmp_path, rng.integers(1, 30, 20), rng.integers(1, 30, 60))
    cfg = in_rows(tmp_path, steps=12, doc_cap="0:9 6s:20", epochs=0)
    whole, positions = loader_of(cfg), []
    caps = [9 if step < 6 else 20 for step in range(12)]
    batches = []
    for step, cap in enumerate(caps):
        positions.append(whole.state_dict())
        batches.append(whole.batch(step, 14, 7, cap))
    assert any(0 < at["pos"] and at["shard"] == 1 for at in positions)
    for begun in (1, 5, 6, 7, 11):
        again = loader_of(cfg)
        again.load_state_dict(positions[begun])
        for step in range(begun, 12):
            assert np.array_equal(again.batch(step, 14, 7, caps[step]), batches[step])


def test_a_run_is_refused_exactly_where_its_documents_end(tmp_path):
    """As many steps as the rule gives are accepted, and one more is not; epochs give more."""
    rng = np.random.default_rng(2)
    documents(tmp_path, rng.integers(1, 30, 60), rng.integers(1, 30, 40))
    docs, most = lists(tmp_path), 0
    with pytest.raises(IndexError):
        while True:
            rows_by_rule(docs, [(2, 7, 6)] * (most + 1))
            most += 1
    assert 10 < most < sum(min(len(d), 6) for shard in docs for d in shard) / 14
    loader = loader_of(in_rows(tmp_path, steps=most, doc_cap="6"))
    assert loader.state_dict() == {"epoch": 0, "shard": 0, "pos": 0}
    with pytest.raises(
        tg.UserError, match=f"too little data for {most + 1} steps.*give {14 * most}"
    ):
        loader_of(in_rows(tmp_path, steps=most + 1, doc_cap="6"))
    loader_of(in_rows(tmp_path, steps=2 * most, doc_cap="6", epochs=2))
    loader_of(in_rows(tmp_path, steps=9 * most, doc_cap="6", epochs=0))


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"shuffle": 1}, "bos_rows = 1 takes documents as they stand"),
        ({"max_seconds": 9.0}, "max_seconds = 9"),
        ({"eval_every": -1}, "bos_rows = 1 and eval_every"),
        ({"doc_cap": "0:4 0.5>8"}, "doc_cap"),
        ({"batch_tokens": "700", "micro_tokens": 7, "epochs": 0}, "no train shard in"),
    ],
    ids=str,
)
def test_rows_of_documents_are_refused_beside(tmp_path, changes, words):
    documents(tmp_path, LENGTHS)
    with pytest.raises(tg.UserError, match=words):
        loader_of(in_rows(tmp_path, **changes))


def test_rows_of_documents_train_and_go_on_to_the_bit(tmp_path):
    """Behind step 2, with a cap that grows there; and they are not the rows without."""
    flags = {"bos_rows": 1, "doc_cap": "0:6 2s:0", "doc_mask": 1, "seq_len": "0:8 1s:16"}
    assert sampler.check(0, tmp_path, flags)[1] == []
    with pytest.raises(tg.UserError, match="doc_cap = '4' does nothing here: it needs bos_rows"):
        tg.refuse_idle(tiny(doc_cap="4"))


# --- a table of pairs

PAIRS = {"bigram_rows": 377, "bigram_signs": 16, "head_init": "0.2", "proj_init": 1.0}


def pair_by_hand(tokens: list[int], t: int, rows: int, signs: int) -> tuple[int, int]:
    """Row and row of signs of the token at position t, in numpy's int32."""
    if t == 0:
        return rows - 1, 0
    before = rows - 1 if t == 1 else tokens[t - 1]
    with np.errstate(over="ignore"):
        products = np.int32(36313) * np.int32(tokens[t]), np.int32(27191) * np.int32(before)
    return int(products[0] ^ products[1]) % (rows - 1), (tokens[t] ^ tokens[t - 1]) % signs


def lively(cfg: tg.Config) -> tg.GPT:
    """Its pairs have values, and each place another share."""
    model, rng = build(cfg), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in (model.bigram, model.bigram_scales):
            p.copy_(torch.randn(p.shape, generator=rng))
    return model


def test_pairs_have_the_rows_and_signs_of_the_record():
    """The golden numbers of 377,280 rows and 8,192 rows of signs."""
    tokens = [50256, 15496, 11, 995, 50256, 464]
    rows = [377279, 126884, 175303, 56405, 326291, 143001]
    signs = [0, 6360, 7299, 1000, 1971, 1408]
    hand = [pair_by_hand(tokens, t, 377280, 8192) for t in range(6)]
    assert hand == list(zip(rows, signs))
    cfg = tiny(bigram_rows=377280, bigram_signs=8192, dim=4, heads=1, vocab=50257, doc_token=50256)
    model = build(cfg)
    with torch.no_grad():  # each row holds its number, times 1 and -1
        model.bigram.copy_(torch.arange(377280.0)[:, None].expand(-1, 4))
    found = model.bigram_values(torch.tensor([tokens]))[0]
    assert found.abs()[:, 0].tolist() == rows
    assert torch.equal(found.sign(), tg.bigram_signs(cfg)[signs].float())
    assert (
        tg.bigram_signs(cfg).abs().eq(1).all() and abs(tg.bigram_signs(cfg).float().mean()) < 0.02
    )
    assert torch.equal(build(tiny(**PAIRS, seed=7)).signs, build(tiny(**PAIRS)).signs)


def test_each_place_adds_its_share_of_the_pair_and_gradients_are_the_loops():
    """Against an embedding that holds the pairs already; a loop over tokens for the table."""
    cfg = tiny(**PAIRS, depth=1, embed_norm=0)
    model, (x, y) = lively(cfg), random_tokens(cfg, 2, 12)
    plain = build(tiny(head_init="0.2", proj_init=1.0, depth=1, embed_norm=0))
    table = model.bigram.detach().clone().requires_grad_()
    signs, share = tg.bigram_signs(cfg).float(), model.bigram_scales.detach()[0]
    pairs = []
    for row in x.tolist():
        both = [pair_by_hand(row, t, 377, 16) for t in range(12)]
        pairs.append(torch.stack([table[i] * signs[j] for i, j in both]))
    whole = plain.embed[x] + share * torch.stack(pairs)
    plain.embedded = lambda tokens, cache=None: whole
    torch.testing.assert_close(model.hidden(x, 1, 0), plain.hidden(x, 1, 0))
    model(x, y).sum().backward()
    plain(x, y).sum().backward()
    torch.testing.assert_close(model.bigram.grad, table.grad)


def test_pairs_of_share_0_or_of_a_fresh_table_are_the_plain_model_to_the_bit():
    plain, (x, _) = build(tiny(head_init="0.2", proj_init=1.0)), random_tokens(tiny(), 2, 32)
    fresh, off = build(tiny(**PAIRS)), lively(tiny(**PAIRS))
    assert (fresh.bigram_scales == 0.05).all() and not fresh.bigram.any()
    with torch.no_grad():
        off.bigram_scales.zero_()
    for model in (fresh, off):
        assert torch.equal(model.hidden(x, 1, 0), plain.hidden(x, 1, 0))
    assert not any("bigram" in name for name, _ in plain.named_parameters())
    assert not torch.allclose(
        lively(tiny(**PAIRS)).hidden(x, 1, 0), plain.hidden(x, 1, 0), atol=0.1
    )


def test_pairs_see_no_later_token_and_cross_documents():
    cfg = tiny(**PAIRS, doc_mask=1, depth=1)
    model, (x, _) = lively(cfg), random_tokens(cfg, 1, 16)
    x[0, 6] = 0  # a document begins
    other = x.clone()
    other[0, 5] = x[0, 5] % 95 + 1
    a, b = model.hidden(x, 1, 0)[0], model.hidden(other, 1, 0)[0]
    assert torch.equal(a[:5], b[:5]) and not torch.allclose(a[6], b[6], atol=1e-3)


@pytest.mark.parametrize("more", [{}, {"loop": "0:1", "repeats": "2", "value_embeds": 1}], ids=str)
def test_pairs_of_a_row_that_is_fed_in_pieces_are_those_of_the_whole_row(more):
    cfg = tiny(**PAIRS | more)
    model, (x, _) = lively(cfg), random_tokens(cfg, 1, 32)
    repeats = tg.largest(cfg.repeats)
    with torch.no_grad():
        whole = model.hidden(x, repeats, 0)[0]
        for sizes in ((1, 1, 1, 4, 25), (2, 30), (1, 31), (32,)):
            cache = score.Cache(model, tg.Shape(1, 32, repeats, 0))
            parts = [cache.feed(piece) for piece in x[0].split(sizes)]
            torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-4, atol=1e-5)


def test_rows_rule_is_dense_adam_with_the_mean_square_of_each_row():
    """
    Eight events in which rows are left out for some: as a list of rows that owe their decay, and
    as AdamW on the whole table, whose moment is that mean.
    """
    flags = {"own_lr": "bigram=0.3/0/0.9/0.5", "cautious": 1, "embed_wd": 0.1, "adam_eps": 1e-6}
    cfg = tiny(bigram_rows=12, bigram_rule="rows", dim=8, heads=1, **flags)
    model = build(cfg)
    opt, rng = tg.MuonAdamW(cfg, model, alone()), torch.Generator().manual_seed(0)
    (bucket,) = [b for b in opt.buckets if "bigram" in b.params]
    assert {k: tuple(t.shape) for k, t in bucket.state.items()} == {"row_sq": (12, 1)}
    with torch.no_grad():
        model.bigram.copy_(torch.randn(12, 8, generator=rng))
    w = model.bigram.detach().double().clone()
    v, last, often = torch.zeros(12, dtype=torch.float64), [0] * 12, [0] * 12
    for event in range(1, 9):
        touched = (torch.rand(12, generator=rng) < 0.4).nonzero()[:, 0].tolist()
        model.bigram.grad.zero_()
        before = model.bigram.detach().clone()
        for row in touched:
            g = torch.randn(8, generator=rng) * (row + 1)
            model.bigram.grad[row] = g
            g, often[row] = g.double(), often[row] + 1
            v[row] = v[row] * 0.9 ** (event - last[row]) + 0.1 * g.square().mean()
            last[row] = event
            u = (1 - 0.9**event) ** 0.5 * g / (v[row].sqrt() + 1e-6)
            w[row] -= 0.3 * 0.5 * w[row] * (u * w[row] > 0) + 0.3 * u
        opt.step(now())
        rest = [row for row in range(12) if row not in touched]
        assert touched and rest and torch.equal(model.bigram[rest], before[rest])
        torch.testing.assert_close(model.bigram.detach().double(), w, rtol=1e-5, atol=1e-5)
    assert max(often) > 3


def test_a_list_of_rows_with_gradients_is_the_whole_table_to_the_bit():
    """
    Of a batch in which tokens return: the gradients of those rows alone added to those of before,
    three steps by lists of rows, and the same by the update that a GPU has, of all rows.
    """
    flags = {"cautious": 1, "embed_wd": 0.1, "beta2": 0.9}
    models = [build(tiny(bigram_rows=400, bigram_rule="rows", **flags)) for _ in range(2)]
    opts = [tg.MuonAdamW(model.cfg, model, alone()) for model in models]
    few, whole = ([b for b in opt.buckets if "bigram" in b.params][0] for opt in opts)
    assert few.of_rows
    whole.of_rows, found = False, []
    with torch.no_grad():
        for model in models:
            model.bigram.copy_(torch.randn(400, model.cfg.dim, generator=torch.manual_seed(1)))
    for seed in range(3):
        ids = torch.randint(64, (5, 9), generator=torch.manual_seed(seed))
        for model in models:
            rows = tg.rows_of(model.bigram, ids, few=model is models[0])
            (rows * torch.randn(rows.shape, generator=torch.manual_seed(seed))).sum().backward()
        assert few.grads.layout == torch.strided and torch.equal(few.grads, whole.grads)
        before = few.weights.clone()
        for opt in opts:
            opt.step(now())
        assert torch.equal(few.few, ids.unique()) and not few.grads.any()
        found.append((few.weights != before).any(-1).nonzero().flatten())
        assert torch.equal(found[-1], ids.unique())
        assert torch.equal(few.weights, whole.weights)
        assert torch.equal(few.state["row_sq"], whole.state["row_sq"])
    assert not torch.equal(found[0], found[1])


def test_a_table_of_pairs_trains_goes_on_and_is_read_back(tmp_path):
    """Rounded, scored over a sliding window, and resumed behind step 2 with the same bits."""
    flags = {"bigram_rows": 100, "bigram_signs": 16, "bigram_rule": "rows", "doc_mask": 1}
    flags |= {"export": "int6", "score": {"modes": "sliding"}, "tie_embed": 1}
    assert sampler.check(0, tmp_path, dict(flags))[1] == []


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"bigram_signs": 8}, "bigram_signs = 8 does nothing here: it needs bigram_rows"),
        ({"bigram_rule": "rows"}, "bigram_rule = 'rows' does nothing here: it needs bigram_rows"),
        ({"bigram_rows": 1}, "bigram_rows = 1: one row"),
    ],
    ids=str,
)
def test_tables_of_pairs_that_do_nothing_are_refused(changes, words):
    with pytest.raises(tg.UserError, match=words):
        tg.validate(tiny(**changes))
        tg.refuse_idle(tiny(**changes))


# --- factors of Muon's rate, groups of heads


def stepped(cfg: tg.Config, grads: list[dict], steps: list[tg.Now] | None = None) -> tg.GPT:
    """A model with noise for weights behind one step for each of the gradients by name."""
    model, rng = build(cfg), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=rng) * 0.2)
    opt = tg.MuonAdamW(cfg, model, alone())
    for i, named in enumerate(grads):
        for name, p in model.named_parameters():
            p.grad.copy_(named[name])
        opt.step(steps[i] if steps else now())
    return model


def some_gradients(cfg: tg.Config, count: int) -> list[dict]:
    rng, model = torch.Generator().manual_seed(6), build(cfg)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    return [{k: torch.randn(s, generator=rng) for k, s in shapes.items()} for _ in range(count)]


def test_a_factor_of_a_matrix_is_another_rate_of_it_alone():
    flags = {"matrix_wd": 0.5, "matrix_lr": 0.02}
    grads = some_gradients(tiny(), 2)
    plain, all_4 = (
        stepped(tiny(**flags), grads),
        stepped(tiny(**flags | {"matrix_lr": 0.08}), grads),
    )
    mine = stepped(tiny(**flags, matrix_lr_mul="mlp.proj=4 mlp=1"), grads)
    for (name, p), q, r in zip(mine.named_parameters(), plain.parameters(), all_4.parameters()):
        assert torch.equal(p, r if "mlp.proj" in name else q), name
    assert not torch.equal(plain.blocks[0].mlp.proj, all_4.blocks[0].mlp.proj)
    for text in ("mlp.proj", "=4", "x=-1", "x=nan", "(=1", "x=2000"):
        with pytest.raises(tg.UserError, match="matrix_lr_mul"):
            tg.validate(tiny(matrix_lr_mul=text))
    with pytest.raises(tg.UserError, match="matrix_lr_mul = 'head' matches nothing"):
        tg.pattern_notices(tiny(matrix_lr_mul="mlp=2 head=4"), build(tiny()))


def test_decay_of_a_step_is_the_records_for_attention_and_both_matrices_of_the_mlp():
    """6.35e-4, 1.27e-3 and 2.54e-3 where lr's multiplier is 1; half of it has a quarter."""
    flags = {"matrix_lr": 0.023, "matrix_wd": 0.0276, "decay_by_shape": 1}
    cfg = tiny(**flags, matrix_lr_mul="mlp.proj=4")
    still = [{name: torch.zeros_like(p) for name, p in build(cfg).named_parameters()}]
    for lr, share in ((1.0, 1), (0.5, 4)):
        model = stepped(cfg, still, [now(lr=lr, weight_decay=lr)])
        before = stepped(cfg, [])
        for part, decay in (("attn.qkv", 6.35e-4), ("mlp.fc", 1.27e-3), ("mlp.proj", 2.54e-3)):
            w, old = (
                m.get_parameter(f"blocks.0.{part}").detach().double() for m in (model, before)
            )
            shrunk = 1 - float((w * old).sum() / old.square().sum())
            assert shrunk == pytest.approx(decay / share, rel=1e-3), part


def test_groups_of_heads_have_the_forward_pass_of_whole_matrices():
    whole, grouped = build(tiny(heads=4)), build(tiny(heads=4, qk_groups=2))
    with torch.no_grad():
        for a, b in zip(whole.blocks, grouped.blocks):
            assert b.attn.qk.shape == (4, 16, 32) and b.attn.v.shape == (32, 32)
            b.attn.qk.copy_(a.attn.qkv[:2].reshape(4, 16, 32))
            b.attn.v.copy_(a.attn.qkv[2])
    x, _ = random_tokens(tiny(), 2, 16)
    torch.testing.assert_close(grouped.hidden(x, 1, 0), whole.hidden(x, 1, 0))
    names = {name for name, _ in whole.named_parameters()}
    assert "blocks.0.attn.qk" not in names and "blocks.0.attn.v" not in names


def test_each_group_of_heads_is_orthogonalised_by_itself():
    """Another gradient of one pair moves that pair alone; a pair of 256 x 768 by a norm of 16."""
    flags = {"heads": 6, "dim": 768, "depth": 1, "vocab": 32, "mlp_ratio": 0.1, "matrix_lr": 1.0}
    cfg = tiny(**flags, qk_groups=2, polar="ns12", polar_steps=12)
    grads = some_gradients(cfg, 1)
    other = [{k: g.clone() for k, g in grads[0].items()}]
    other[0]["blocks.0.attn.qk"][4] += 1.0
    begun, first, second = stepped(cfg, []), stepped(cfg, grads), stepped(cfg, other)
    a, b, c = (model.blocks[0].attn.qk.detach() for model in (begun, first, second))
    assert a.shape == (6, 256, 768)
    assert (b - a).norm(dim=(1, 2)).tolist() == pytest.approx([16.0] * 6, rel=1e-3)
    moved = [i for i in range(6) if not torch.allclose(b[i], c[i], atol=1e-5)]
    assert moved == [4]
    v = first.blocks[0].attn.v.detach() - begun.blocks[0].attn.v.detach()
    assert float(v.norm()) == pytest.approx(768**0.5, rel=1e-2)  # as a whole
    state = tg.states_in_fp32(
        tg.Rule("muon", "matrix", (256, 768), 1, 0, 0, 0, False), tiny(normuon=0.9)
    )
    assert state == {"second": (1, 768)}


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"qk_groups": 3}, "heads = 2 do not divide"),
        ({"qk_groups": 1, "iha": 1}, "qk_groups = 1 knows no iha"),
        ({"qk_groups": 1, "kv_heads": 1}, "qk_groups = 1 knows no kv_heads"),
        ({"qk_groups": 2}, "qk_groups = 2 does nothing here"),
        ({"qk_groups": 1, "optimizer": "adamw"}, "qk_groups = 1 does nothing here"),
        ({"adam_every": 21}, "adam_every = 21 does nothing here: it needs steps to sum"),
        ({"untie_at": "3s"}, "untie_at = '3s' does nothing here: it needs tie_embed = 1"),
        ({"untie_at": "19s", "tie_embed": 1}, "'19s' needs a step of two tables behind it"),
        ({"untie_at": "3", "tie_embed": 1}, "3 is no fraction of training"),
        ({"untie_at": "early", "tie_embed": 1}, "untie_at = 'early': a step such as 847s"),
        ({"untie_at": "2s", "tie_embed": 1, "adam_every": 2}, "adam_every = 2 does not divide"),
        ({"untie_at": "2s", "tie_embed": 1, "mu_centering": 1}, "mu_centering do not"),
        ({"untie_at": "2s", "tie_embed": 1, "max_seconds": 9.0}, "max_seconds do not"),
    ],
    ids=str,
)
def test_what_the_optimizer_could_not_do_is_refused(changes, words):
    with pytest.raises(tg.UserError, match=words):
        tg.validate(tiny(**changes))
        tg.refuse_idle(tiny(**changes))


# --- AdamW every k-th step

SMALL = {"bigram_rows": 40, "scalar_wd": 0.1, "embed_wd": 0.2, "q_gain": 1.0}


@pytest.mark.parametrize("rule", ["adam", "rows"])
def test_every_2nd_step_of_adam_is_adam_on_sums_of_two_gradients(rule):
    """With the rates of the step it is made in; nobody has the fifth. Muon has a step for each."""
    cfg, each = (tiny(**SMALL, bigram_rule=rule, adam_every=k) for k in (2, 1))
    grads = some_gradients(cfg, 5)
    nows = [now(lr=lr, momentum=m) for lr, m in ((1, 0.9), (2, 0.8), (3, 0.7), (4, 0.6), (5, 0.5))]
    sums = [{k: a[k] + b[k] for k in a} for a, b in (grads[0:2], grads[2:4])]
    mine = stepped(cfg, grads, nows)
    by_sums = stepped(each, sums, [nows[1], nows[3]])
    by_each = stepped(each, grads, nows)
    kinds = {"muon": 0, "other": 0}
    for (name, p), q, r in zip(mine.named_parameters(), by_sums.parameters(), by_each.parameters()):
        matrix = tg.declarations(mine)[name].group == "matrix"
        assert torch.equal(p, r if matrix else q), name
        kinds["muon" if matrix else "other"] += 1
    assert min(kinds.values()) > 3
    assert torch.equal(stepped(cfg, grads[:4], nows).head, mine.head)
    assert not torch.equal(by_each.head, mine.head)


def test_a_sum_of_gradients_goes_on_from_a_checkpoint(tmp_path):
    """Behind two of three gradients; and the one step of AdamW is not three."""
    assert sampler.check(0, tmp_path, {"adam_every": 3, "param_dtype": "bfloat16"})[1] == []


# --- one table, then two

TIED = {"tie_embed": 1, "tied_lr": 0.01, "embed_wd": 0.1, "head_init": "0.1", "proj_init": 1.0}


def run_of(folder, steps: int, **changes) -> tg.Trainer:
    p = parts(folder, **TIED | changes)
    for step in range(steps):
        tg.train_step(p, step, p.plan.at(step, step / p.cfg.steps))
    return p


@pytest.mark.parametrize("more", [{}, {"adam_every": 2, "grad_clip": 1.0}], ids=str)
def test_tables_untied_behind_the_end_are_one_table_all_along(tmp_path, more):
    one, two = run_of(tmp_path, 5, **more), run_of(tmp_path, 5, untie_at="17s", **more)
    two_named = dict(two.model.named_parameters())
    assert torch.equal(two_named.pop("embed"), two.model.head)
    assert one.model.embed is None and two.model.embed is not two.model.head
    for name, p in one.model.named_parameters():
        assert torch.equal(p, two_named.pop(name)), name
    assert not two_named


def test_two_tables_go_on_from_the_weights_and_moments_of_one(tmp_path):
    """Behind step 2 as an untied model that is given both; until then the forward pass is one's."""
    one, two = run_of(tmp_path, 3), run_of(tmp_path, 3, untie_at="2s")
    assert torch.equal(two.model.embed, two.model.head)
    x, y = random_tokens(one.cfg, 2, 32)
    assert torch.equal(one.model(x, y), two.model(x, y))
    apart = parts(tmp_path, **TIED | {"tie_embed": 0, "head_lr": 0.01, "embed_lr": 0.01})
    weights, state = tg.weights_on_cpu(one.model), one.opt.state_dict()
    weights["embed"] = weights["head"]
    for key in ("exp_avg", "exp_avg_sq"):
        state[f"embed:{key}"] = state[f"head:{key}"]
    tg.load_weights(apart.model, weights, "")
    apart.opt.load_state_dict(state)
    for trainer in (apart, two):
        trainer.loader.load_state_dict(one.loader.state_dict())
        for step in (3, 4):
            tg.train_step(trainer, step, trainer.plan.at(step, step / 20))
    for name, p in apart.model.named_parameters():
        assert torch.equal(p, two.model.get_parameter(name)), name
    assert not torch.allclose(two.model.embed, two.model.head, atol=1e-3)
    assert [two.plan.at(step, 0.0).tied for step in (0, 2, 3)] == [1, 1, 0]


def test_gradient_of_one_table_is_the_sum_of_those_of_two():
    (x, y), one, two = (
        random_tokens(tiny(), 2, 16),
        build(tiny(**TIED)),
        build(tiny(**TIED, untie_at="2s")),
    )
    assert torch.equal(two.embed, one.head)
    for model in (one, two):
        model(x, y).sum().backward()
    torch.testing.assert_close(two.head.grad + two.embed.grad, one.head.grad)
    assert {name: p.shape for name, p in two.named_parameters()}["embed"] == two.head.shape
    padded = build(tiny(**TIED, untie_at="2s", vocab=90))
    assert padded.embed.shape == padded.head.shape == (96, 32)


@pytest.mark.parametrize("untie_at", ["1s", "1/3"])
def test_untied_tables_go_on_from_a_checkpoint_and_are_exported(tmp_path, untie_at):
    flags = {"tie_embed": 1, "untie_at": untie_at, "export": "int8", "ema": 0.9}
    assert sampler.check(0, tmp_path, flags)[1] == []


# --- a softmax over some classes


def test_candidates_are_the_targets_and_the_next_of_the_sweep():
    """The record's sweep over 50,304 classes begins 0, 20011, 40022, 9729, 29740."""
    targets = np.array([7, 40022, 7, 50303])
    assert tg.candidates(targets, 6, 50304, 0).tolist() == [0, 7, 9729, 20011, 40022, 50303]
    assert tg.candidates(targets, 3, 50304, 0).tolist() == [7, 40022, 50303]
    rng = np.random.default_rng(0)
    for _ in range(20):
        targets, start = rng.integers(0, 97, 30), int(rng.integers(10**6))
        found = set(targets.tolist())
        for k in range(start, start + 97):
            if len(found) < 50:
                found.add(k * 20011 % 97)
        assert tg.candidates(targets, 50, 97, start).tolist() == sorted(found)
    whole = tg.candidates(targets, 97, 97, 5)
    assert whole.tolist() == list(range(97))


def test_the_sweep_takes_every_class_equally_often():
    """Over V/gcd(V, P) steps, where nothing is a target."""
    counts = np.zeros(96, int)
    none = np.zeros(0, int)
    for step in range(96 // 12):
        counts[tg.candidates(none, 36, 96, step * 36)] += 1
    assert (counts == 3).all()


class Hearing(tg.Ranks):
    """A rank whose rows have no more targets than the others'."""

    def most(self, n: int) -> int:
        return n


def chosen(folder, steps: range, world: int = 1, **changes) -> list[tuple[np.ndarray, np.ndarray]]:
    """Of each step the rows and candidates of all ranks."""
    p = parts(folder, sampled_classes="40 5s:64", bos_rows=0, **changes)
    found = []
    for step in steps:
        now, both = p.plan.at(step, step / 20), []
        for rank in range(world):
            p.run = Hearing(torch.device("cpu"), rank, world)
            p.loader = tg.Loader(p.cfg, p.plan, alone(rank, world))
            p.loader.pos = 128 * step
            both.append(tg.next_batch(p, step, now))
        found.append(tuple(np.concatenate(each) for each in zip(*both)))
    return found


def test_candidates_depend_on_step_and_row_alone(tmp_path):
    """Not on ranks, nor on where a run goes on; and no two steps or rows have the same."""
    whole = chosen(tmp_path, range(7))
    assert [classes.shape for _, classes in whole] == [(4, 40)] * 5 + [(4, 64)] * 2
    for world in (2, 4):
        for (rows, classes), (others, theirs) in zip(whole, chosen(tmp_path, range(7), world)):
            assert np.array_equal(rows, others) and np.array_equal(classes, theirs)
    assert np.array_equal(chosen(tmp_path, range(6, 7))[0][1], whole[6][1])
    assert len({row.tobytes() for _, classes in whole for row in classes}) == 7 * 4
    for rows, classes in whole:
        for row, ids in zip(rows, classes):
            assert set(row[1:]) <= set(ids) and (np.diff(ids) > 0).all()


def sampled(**changes) -> tuple:
    """A model in fp64 with tokens, and candidates for two rows of 16."""
    cfg = tiny(**{"sampled_classes": "40", "softcap": 15.0, "vocab": 90} | changes)
    model, (x, y) = in_double(cfg), random_tokens(cfg, 2, 16)
    count = tg.largest(cfg.sampled_classes)
    ids = [tg.candidates(row.numpy(), count, 96, 30 * i) for i, row in enumerate(y)]
    return model, x, y, torch.from_numpy(np.stack(ids))


LATER = {"mtp_next": "0.5", "prefix_loss": "0.25", "tokenizer": "x"}


@pytest.mark.parametrize("chunk", [1000, 5])
@pytest.mark.parametrize("more", [{}, LATER], ids=str)
def test_loss_over_all_classes_is_the_full_one(doubles, chunk, more):
    """P = V: value and every gradient, padded columns included."""
    model, x, y, ids = sampled(sampled_classes="96", loss_chunk=chunk, **more)
    model.prefixes = torch.randint(-1, 90, (90,), generator=torch.Generator().manual_seed(1))
    now = tg.Plan(model.cfg).at(0, 0.0)
    trainer, grads = SimpleNamespace(cfg=model.cfg, graph=model), []
    losses = [tg.loss_terms(trainer, x, y, now, *some) for some in ((), (ids,))]
    torch.testing.assert_close(*losses)
    assert len(losses[0]) == 1 + len(more) - ("tokenizer" in more)
    for terms in losses:
        grads.append(torch.autograd.grad(terms.sum(), list(model.parameters()), allow_unused=True))
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("chunk", [1000, 5])
def test_loss_over_some_classes_is_the_formula(doubles, chunk):
    """Below the full loss; rows of the head outside have a gradient of exactly 0."""
    model, x, y, ids = sampled(loss_chunk=chunk, **LATER)
    model.prefixes = torch.randint(-1, 90, (90,), generator=torch.Generator().manual_seed(1))
    now = tg.Plan(model.cfg).at(0, 0.0)
    found = tg.loss_terms(SimpleNamespace(cfg=model.cfg, graph=model), x, y, now, ids)
    z = 15 * torch.tanh(model.hidden(x, 1, 0) @ model.head.T / 15)
    want, left_out = [0.0, 0.0, 0.0], 0
    for b in range(2):
        for t in range(16):
            log_p = z[b, t] - z[b, t, ids[b]].logsumexp(-1)
            want[0] = want[0] - log_p[y[b, t]]
            if t < 15:
                want[1] = want[1] - 0.5 * log_p[y[b, t + 1]]
            prefix = int(model.prefixes[y[b, t]])
            if prefix in ids[b].tolist():
                want[2] = want[2] - 0.25 * log_p[prefix]
            left_out += prefix >= 0 and prefix not in ids[b].tolist()
    torch.testing.assert_close(found, torch.stack(want))
    assert left_out and (model(x, y).view(2, 16).sum() > found[0]) and len(model(x, y)) == 32
    (grad,) = torch.autograd.grad(found.sum(), model.head, retain_graph=True)
    outside = [c for c in range(96) if c not in ids]
    assert len(outside) > 10 and not grad[outside].any() and grad[ids.unique()].any(1).all()
    (wanted,) = torch.autograd.grad(sum(want), model.head)
    torch.testing.assert_close(grad, wanted)


def test_training_on_some_classes_goes_on_to_the_bit_and_is_scored_on_all(tmp_path):
    flags = {"sampled_classes": "0:30 2s:0", "mtp_next": "0.5", "loss_chunk": 16}
    assert sampler.check(0, tmp_path, flags)[1] == []


def test_more_targets_than_classes_stop_a_run_before_the_step(tmp_path):
    """The loader stays where it was, so that a checkpoint of then goes on with that batch."""
    p = parts(tmp_path, sampled_classes="20")
    with pytest.raises(tg.UserError, match="step 0: a row has 2[0-9] different targets, more than"):
        tg.train_step(p, 0, p.plan.at(0, 0.0))
    assert p.loader.state_dict() == {"epoch": 0, "shard": 0, "pos": 0}


@pytest.mark.parametrize(
    "key, value", [("z_loss", 0.1), ("mtp", 0.3), ("distill", 0.5), ("biases", 1)]
)
def test_classes_beside_what_knows_all_of_them_are_refused(key, value):
    with pytest.raises(tg.UserError, match=f"sampled_classes = '40' knows no {key}"):
        tg.validate(tiny(sampled_classes="40", cycles=2, **{key: value}))


@pytest.mark.parametrize("teacher", [{"teacher": "x"}, {"cycles": 2}], ids=str)
@pytest.mark.parametrize("key", ["mtp_next", "mtp_third", "prefix_loss"])
def test_teachers_beside_losses_of_other_tokens_are_refused(key, teacher):
    """Also one that is there all along, without cycles."""
    with pytest.raises(tg.UserError, match="distill = 0.5 knows neither .* nor losses of other"):
        tg.validate(tiny(distill=0.5, tokenizer="x", **teacher, **{key: "0.5"}))


def test_classes_that_there_are_not_are_refused():
    tg.validate(tiny(sampled_classes="96", vocab=90))
    for flags in (
        {"sampled_classes": "97"},
        {"sampled_classes": "96", "vocab": 90, "pad_vocab": 1},
    ):
        with pytest.raises(tg.UserError, match="at most 9[06], the rows"):
            tg.validate(tiny(**flags))
    with pytest.raises(tg.UserError, match="no multiple of 20011"):
        tg.validate(tiny(sampled_classes="64", vocab=20011, head_multiple=20011))


# --- products in 8 bits


def rounded_to(x: torch.Tensor, bits: int, least: int, most: float) -> torch.Tensor:
    """x over amax/most, in a float of that many bits of mantissa and that least exponent."""
    scale = (x.abs().max() / most).clamp_min(1e-12)  # of x in fp32, as it is here
    y = (x / scale).double()
    step = 2.0 ** (torch.frexp(y)[1] - 1).clamp_min(least).double() / 2**bits
    return (y / step).round() * step * scale.double()


def test_products_in_8_bits_are_those_of_rounded_factors():
    """e4m3 has 3 bits of mantissa, exponents from -6 and at most 448; e5m2 2 bits, -14, 57,344."""
    x, w, slope = randn(48, 64, seed=1), randn(32, 64, seed=2) / 8, randn(48, 32, seed=3) * 1e-4
    x.requires_grad_(), w.requires_grad_()
    y = tg.fp8_linear(x.view(3, 16, 64), w, torch.full((32,), 0.5))
    (y * slope.view(3, 16, 32)).sum().backward()
    x8, w8 = (rounded_to(t.detach(), 3, -6, 448.0) for t in (x, w))
    g8 = rounded_to(slope, 2, -14, 57344.0)
    found = y.detach().flatten(0, 1).double() - 0.5
    torch.testing.assert_close(found, x8 @ w8.mT, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(x.grad.double(), g8 @ w8, atol=1e-8, rtol=1e-4)
    torch.testing.assert_close(w.grad, slope.mT @ x.detach())
    assert 0.005 < (y.detach().flatten(0, 1) - 0.5 - x @ w.mT).norm() / (x @ w.mT).norm() < 0.06


def test_factors_in_8_bits_are_not_all_a_little_too_large():
    """Divided by a scale in bfloat16 they are multiplied by that one, not by what it rounds."""
    for most in (1.0, 3.0, 1.3, 0.7):
        x = (torch.rand(1 << 16, generator=torch.Generator().manual_seed(0)) * most).bfloat16()
        x[0] = most
        x8, scale = tg.in_fp8(x, torch.float8_e4m3fn)
        error = (x8.double() * scale.double()).sum() / x.double().sum() - 1
        assert scale.dtype == torch.float32 and abs(error) < 1.2e-3, (most, error)


def test_8_bits_are_for_named_maps_in_training_where_the_device_has_them(monkeypatch):
    cfg = tiny(fp8="^head$|mlp", dim=64, vocab=96, head_init="0.2", proj_init=1.0, attn_gate=12)
    x, y = random_tokens(cfg, 2, 32)
    plain = build(cfg)
    assert torch.equal(plain(x, y, 1, 0), build(tiny(**vars(cfg) | {"fp8": ""}))(x, y, 1, 0))
    monkeypatch.setattr(tg, "has_fp8", lambda device: True)
    model = build(cfg)
    named = {m.prefix + n for m in model.modules() if isinstance(m, tg.Declaring) for n in m.in_fp8}
    assert named == {"head", *(f"blocks.{i}.mlp.{w}" for i in (0, 1) for w in ("fc", "proj"))}
    loss, want = model(x, y, 1, 0).mean(), plain(x, y, 1, 0).mean()
    assert loss.item() != want.item() and loss.item() == pytest.approx(want.item(), rel=0.01)
    loss.backward(), want.backward()
    for p, q in zip(model.parameters(), plain.parameters()):
        assert (p.grad - q.grad).norm() <= 0.15 * q.grad.norm()
    with torch.no_grad():
        assert torch.equal(model(x, y, 1, 0), plain(x, y, 1, 0))
    # 12 dims of a gate are not what the products take
    assert not build(tiny(fp8="attn_gate", attn_gate=12)).blocks[0].attn.in_fp8
    with pytest.raises(tg.UserError, match="fp8 = 'q_gain' matches nothing"):
        tg.pattern_notices(tiny(fp8="q_gain", q_gain=1.5), build(tiny(q_gain=1.5)))
    with pytest.raises(tg.UserError, match=r"fp8 = '\(' is no regular expression"):
        tg.validate(tiny(fp8="("))
