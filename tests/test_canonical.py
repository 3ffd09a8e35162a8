"""Tokens that a tokenizer never puts behind another: found without its help, and worth nothing."""

import collections
import math
import random

import numpy as np
import pytest
import sentencepiece
import torch
from helpers import SENTENCES, TEXTS, parts, tg, tiny, write_shard

from logs import score


def trained_pairs(text: str, merges: int) -> list[str]:
    """Byte pair encoding as Sennrich et al. (2016) train it: the most frequent pair, again."""
    parts, pieces = list(text), sorted(set(text))
    for _ in range(merges):
        (a, b), _ = collections.Counter(zip(parts, parts[1:])).most_common(1)[0]
        pieces.append(a + b)
        parts = joined(parts, a + b)
    return list(dict.fromkeys(pieces))


def joined(parts: list[str], piece: str) -> list[str]:
    out = []
    for part in parts:
        if out and out[-1] + part == piece:
            out[-1] = piece
        else:
            out.append(part)
    return out


def encoded(text: str, pieces: list[str]) -> list[str]:
    """Merges the pair that makes the lowest piece of the list, leftmost first, again and again."""
    parts, rank = list(text), {piece: i for i, piece in enumerate(pieces)}
    while True:
        found = [
            (rank.get(a + b, len(pieces)), i) for i, (a, b) in enumerate(zip(parts, parts[1:]))
        ]
        if not found or min(found)[0] == len(pieces):
            return parts
        at = min(found)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


@pytest.mark.parametrize("seed", range(6))
def test_a_pair_is_impossible_where_encoding_its_text_gives_another(seed):
    text = "".join(random.Random(seed).choices("aaabbc", k=400))
    pieces = trained_pairs(text, 24)
    merges = tg.Merges({piece: i for i, piece in enumerate(pieces)})
    own = [i for i, piece in enumerate(pieces) if encoded(piece, pieces) == [piece]]
    count = 0
    for i in own:
        for j in own:
            alone = encoded(pieces[i] + pieces[j], pieces) == [pieces[i], pieces[j]]
            assert alone == (j not in merges.impossible(i)), (pieces[i], pieces[j])
            count += not alone
    assert count > len(own)


def test_no_text_has_an_impossible_pair_whatever_stands_around_it():
    pieces = trained_pairs("".join(random.Random(9).choices("aabc", k=600)), 40)
    merges, ids = (
        tg.Merges({p: i for i, p in enumerate(pieces)}),
        {p: i for i, p in enumerate(pieces)},
    )
    seen = set()
    for seed in range(300):
        parts = encoded("".join(random.Random(seed).choices("abc", k=60)), pieces)
        seen |= {(ids[a], ids[b]) for a, b in zip(parts, parts[1:])}
    assert len(seen) > 300
    assert not [(i, j) for i, j in seen if j in merges.impossible(i)]


def test_a_token_whose_merges_are_not_in_order_is_left_alone():
    # bc is merged before ab, so that abc is a and bc; behind ab, c would make abc at once
    ids = {p: i for i, p in enumerate(["a", "b", "c", "abc", "bc", "ab", "abd", "d"])}
    assert tg.merge_history("abc", ids) is None  # bc (4), then abc (3)
    assert tg.Merges(ids).impossible(ids["abc"]).size == 0


def dropped(mask: np.ndarray, tokens: np.ndarray) -> int:
    rows = np.unpackbits(mask, axis=1, bitorder="little").astype(bool)
    return int(rows[tokens[:-1], tokens[1:]].sum())


def test_sentencepiece_never_writes_what_is_masked_and_documents_begin_anywhere(text):
    tokenizer = tg.Tokenizer(str(text / "tokenizer.model"), 512, 1)
    mask = tg.canonical_mask(tokenizer)
    rows = np.unpackbits(mask, axis=1, bitorder="little")
    assert rows.sum() > 200 and not rows[1].any() and not rows[:, 1].any()
    for name in ("train_000001", "val_000000"):
        assert dropped(mask, tg.read_shard(text / f"x_{name}.bin", 512).astype(np.int64)) == 0
    one = sentencepiece.SentencePieceProcessor(str(text / "tokenizer.model"))
    pairs = np.argwhere(rows)
    for i, j in pairs[np.random.default_rng(0).permutation(len(pairs))[:300]]:
        both = one.id_to_piece(int(i)) + one.id_to_piece(int(j))
        assert one.encode(both.replace("\u2581", " "))[-2:] != [i, j]


def test_a_unigram_model_is_refused(tmp_path):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES),
        model_prefix=str(tmp_path / "uni"),
        vocab_size=150,
        model_type="unigram",
        minloglevel=2,
    )
    with pytest.raises(tg.UserError, match="byte pair encoding"):
        tg.canonical_mask(tg.Tokenizer(str(tmp_path / "uni.model"), 150, 1))


def test_gpt2_never_writes_what_is_masked(gpt2_files):
    tokenizer = tg.Tokenizer("gpt2", 50257, 50256)
    mask, gpt2 = tg.canonical_mask(tokenizer), tokenizer.gpt2
    assert int(np.unpackbits(mask).sum()) > 10**7
    hard = [
        "don't we'll 'tis she'd've  I'm\n\n x=1;;  y = 'sa' 12345",
        "naïve — 日本語 \u00a0 é́ 🙂",
    ]
    tokens = np.array([t for one in [*TEXTS, *hard] for t in (50256, *tokenizer.encode(one))])
    assert dropped(mask, tokens) == 0
    rng, around = (
        np.random.default_rng(0),
        [("", ""), ("a", "b"), ("'", "s"), (" ", " "), ("1", "'t")],
    )
    for i in rng.choice(50256, 400, replace=False):
        behind = np.flatnonzero(np.unpackbits(mask[i], bitorder="little"))
        for j in rng.choice(behind, min(2, len(behind)), replace=False):
            both = gpt2.decode_bytes([int(i), int(j)])
            for before, after in around:
                whole = before.encode() + both + after.encode()
                try:
                    found = tokenizer.encode(whole.decode())
                except UnicodeDecodeError:
                    continue
                starts = np.cumsum([0, *(len(gpt2.decode_single_token_bytes(t)) for t in found)])
                here = [t for t, at in zip(found, starts) if at >= len(before)][:2]
                assert here != [i, j] or len(before) not in starts


def test_the_last_evaluation_takes_the_impossible_tokens_share_and_says_what_it_was(text):
    flags = {"vocab": 512, "doc_token": 1, "tokenizer": str(text / "tokenizer.model")}
    trainer = parts(text, canonical_mask=1, head_init="0.2", ema=0.9, **flags)
    log = []
    trainer.run.log, trainer.run.metric = log.append, lambda *values, **more: None
    first = tg.validate_all(trainer, 0, trainer.plan.at(0, 0.0))
    trainer.run.over = True
    trainer.avg.close()
    last = tg.validate_all(trainer, 20, trainer.plan.at(20, 1.0))
    assert not [key for key in first if "unmasked" in key]
    assert last["val_loss_unmasked"] == first["val_loss"]
    assert last["val_loss"] < first["val_loss"] - 1e-3
    assert last["val_bpb"] < first["val_bpb"] and "val_loss_ema_unmasked" in last
    # Bayes' rule, by hand and in float64: probabilities over what is left
    rows = np.unpackbits(tg.canonical_mask(trainer.tokenizer), axis=1, bitorder="little")
    x, y = trainer.val.batch(range(2), torch.device("cpu"), 2)
    with torch.no_grad():
        p = trainer.model.logits(trainer.model.hidden(x, 1, 0)).double().softmax(-1)
        found = trainer.model(x, y, impossible=trainer.impossible).double()
    left = p[..., :512] * (1 - torch.from_numpy(rows[:, :512].astype(float))[x])
    mass = left.sum(-1) + p[..., 512:].sum(-1)
    want = -(left.gather(-1, y[..., None])[..., 0] / mass).log().flatten()
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)
    plain = -p.gather(-1, y[..., None])[..., 0].log().flatten()
    assert bool((found <= plain + 1e-5).all())
    assert any(line.startswith("  at:20 ") and "val_loss_unmasked:" in line for line in log)


def test_text_of_another_tokenizer_is_refused(text, tmp_path):
    rng = np.random.default_rng(0)
    for name in ("train", "val"):
        write_shard(tmp_path / f"x_{name}_000000.bin", rng.integers(0, 512, 4000))
    flags = {"vocab": 512, "doc_token": 1, "tokenizer": str(text / "tokenizer.model")}
    with pytest.raises(tg.UserError, match="of the validation text stand where"):
        parts(tmp_path, canonical_mask=1, **flags)


@pytest.mark.parametrize(
    "flags", [{"average_epochs": 1, "epochs": 2, "tokenizer": "x"}, {"cycles": 2, "tokenizer": "x"}]
)
def test_averages_of_epochs_and_cycles_are_refused_beside_it(flags):
    with pytest.raises(tg.UserError, match="canonical_mask"):
        tg.refuse_idle(tiny(canonical_mask=1, **flags))


def test_it_needs_a_tokenizer():
    with pytest.raises(tg.UserError, match="it needs a tokenizer"):
        tg.refuse_idle(tiny(canonical_mask=1))


@pytest.mark.parametrize("mode", list(score.SCORERS))
def test_scorers_prove_and_decode_what_the_mask_gains(mode, text):
    cfg = tiny(
        vocab=512,
        doc_token=1,
        tokenizer=str(text / "tokenizer.model"),
        dim=64,
        heads=2,
        seq_len="16",
        head_init="0.2",
    )
    tokens = tg.read_shard(text / "x_val_000000.bin", 512)[:61]

    def scorer(canonical: int) -> score.Sliding:
        how = score.OneScore(mode=mode, stride=8, ttt_chunk=20, ttt_lr=0.01, lora_rank=2)
        how.canonical = canonical
        model = tg.build_model(cfg, torch.device("cpu"), torch.float32, 16)
        return score.make_scorer(model, how, tg.Shape(2, 16, 1, 0))

    plain, masked = (float(scorer(n).score(tokens).nats.sum()) for n in (0, 1))
    assert math.isfinite(masked) and masked < plain + (1e-9 if mode == "mixture" else -0.1)
    proof = score.prove(scorer(1), tokens, lambda code: score.decode(scorer(1), code))
    assert proof["worst_sum"] < 1e-6
    assert proof["claimed_bits"] == pytest.approx(masked / math.log(2), rel=1e-6)


def test_a_score_without_a_tokenizer_is_refused():
    model = tg.build_model(tiny(), torch.device("cpu"), torch.float32, 32)
    with pytest.raises(tg.UserError, match="needs a tokenizer"):
        score.make_scorer(model, score.OneScore(stride=8, canonical=1), tg.Shape(2, 16, 1, 0))
