"""A score is a code length, what is none is refused, and figures are taken once and kept."""

import dataclasses
import functools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import build, tg, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from test_export import LOOPED, model_of, small, weights

from logs import score

# --- scorers


@given(st.integers(1, 400), st.integers(1, 60), st.data())
@settings(max_examples=200, deadline=None)
def test_sliding_plan_scores_every_token_once_and_with_context(n, length, data):
    stride = data.draw(st.integers(1, length))
    plan, times = score.window_plan(n, length, stride), np.zeros(n, int)
    for i, (start, first, end) in enumerate(plan):
        assert start == i * stride and start <= first < end <= min(start + length, n)
        assert i == 0 or first - start >= length - stride
        times[first:end] += 1
    assert (times == 1).all()
    # The rule of the original, by hand: windows at 0, s, 2s, ... while w + L - s < N.
    starts = [w for w in range(0, n + 1, stride) if w == 0 or w + length - stride < n]
    assert plan[:, 0].tolist() == starts


def shape(rows: int = 3, seq_len: int = 16, repeats: int = 1, window: int = 0) -> tg.Shape:
    return tg.Shape(rows, seq_len, repeats, window)


def scorer_of(mode: str, changes: dict | None = None, seed: int = 0, **how) -> score.Sliding:
    cfg = small(**(changes or {}))
    repeats = 2 if cfg.loop else 1
    how = score.OneScore(mode=mode, **({"stride": 5, "ttt_chunk": 20, "ttt_lr": 0.05} | how))
    return score.make_scorer(
        model_of(cfg, weights(cfg)), how, shape(repeats=repeats, window=int(cfg.window))
    )


def stream(n: int, seed: int = 0, vocab: int = 96) -> np.ndarray:
    """
    Tokens with structure: mostly a walk in a small circle, so that n-grams and training find
    something.
    """
    rng = np.random.default_rng(seed)
    jumps = np.where(rng.random(n + 1) < 0.8, 1, rng.integers(vocab, size=n + 1))
    return (np.cumsum(jumps) % vocab).astype(np.uint16)


def test_chunked_scores_are_the_models_losses():
    scorer, tokens = scorer_of("chunked"), stream(80)
    x, y = tg.tensors(np.stack([tokens[i * 16 :][:17] for i in range(5)]), torch.device("cpu"))
    with torch.no_grad():
        losses = scorer.model(x, y)
    torch.testing.assert_close(scorer.score(tokens).nats.float(), losses, rtol=1e-4, atol=1e-4)


def test_sliding_scores_are_those_of_a_forward_pass_per_token():
    scorer, tokens = scorer_of("sliding"), stream(53)
    scores = scorer.score(tokens)
    for start, first, end in score.window_plan(53, 16, 5):
        for t in range(first, end):
            with torch.no_grad():
                x = scorer.model.hidden(
                    torch.from_numpy(tokens[start : t + 1].astype(np.int64))[None], 1, 0
                )[0, -1]
            p = scorer.model.logits(x)[:96].detach().double().softmax(-1)
            assert math.isclose(
                -math.log(float(p[tokens[t + 1]])), float(scores.nats[t]), rel_tol=1e-4
            )


def test_ranks_score_the_tokens_of_one_process():
    tokens, whole = stream(101), scorer_of("sliding").score(stream(101))
    parts = []
    for rank in range(3):
        scorer = scorer_of("sliding")
        scorer.run = tg.Ranks(scorer.run.device, rank, 3)
        scorer.run.sum, scorer.run.agree = lambda x: x, lambda: None
        parts.append(scorer.score(tokens))
    assert torch.equal(sum(p.times for p in parts), whole.times)
    torch.testing.assert_close(sum(p.nats for p in parts), whole.nats)


@pytest.mark.parametrize("share", [0.0, 0.02])
def test_mixture_is_worse_than_its_best_expert_by_ln_4_at_most(share):
    for seed in range(3):
        tokens = stream(400, seed)
        scorer = scorer_of("mixture", share=share)
        mixed = float(scorer.score(tokens).nats.sum())
        neural = float(score.Sliding.score(scorer, tokens).nats.sum())
        best = min(
            [
                neural,
                *(
                    -score.ngram_log_probs(torch.from_numpy(tokens.astype(np.int64)), 96).sum(0)
                ).tolist(),
            ]
        )
        assert best < 0.9 * neural, "the n-grams should have found the circle"
        assert mixed <= best + math.log(4) - 400 * math.log1p(-share) + 1e-6


def test_ngrams_at_once_are_ngrams_one_by_one():
    tokens = stream(150)
    walk, at_once = (
        score.NGrams(96, int(tokens[0])),
        score.ngram_log_probs(torch.from_numpy(tokens.astype(np.int64)), 96),
    )
    for t, token in enumerate(tokens[1:].tolist()):
        rows = walk.distributions()
        assert np.abs(rows.sum(1) - 1).max() < 1e-12 and (rows > 0).all()
        np.testing.assert_allclose(np.log(rows[:, token]), at_once[t].numpy(), rtol=1e-10)
        walk.observe(token)


@pytest.mark.parametrize("share", [0.0, 0.1])
@pytest.mark.parametrize("n", [1, 2, 10, 77])
def test_weights_of_blocks_are_those_of_the_recursion(n, share):
    experts = -5 * torch.rand(n, 4, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    found, w = (
        score.mixing_weights(experts, share).exp(),
        torch.full((4,), 0.25, dtype=torch.float64),
    )
    for t in range(n):
        torch.testing.assert_close(found[t], w)
        w = w * experts[t].exp()
        w = (1 - share) * w / w.sum() + share / 4


def test_training_on_what_was_scored_helps_and_leaves_nothing():
    tokens, scorer = stream(600), scorer_of("ttt", ttt_chunk=64)
    before = {n: p.clone() for n, p in scorer.model.named_parameters()}
    trained, plain = (
        scorer.score(tokens).nats,
        score.Sliding(scorer.model, scorer.how, scorer.shape).score(tokens).nats,
    )
    assert trained.mean() < plain.mean() - 0.05
    # nothing was trained on before the first chunk was scored
    torch.testing.assert_close(trained[:64], plain[:64])
    assert all(torch.equal(p, before[n]) for n, p in scorer.model.named_parameters())


def test_setting_that_cannot_work_is_refused():
    for how in (
        {"mode": "x"},
        {"stride": 0},
        {"stride": 17},
        {"logit_temperature": 0.0},
        {"share": -0.1},
        {"ttt_chunk": 0},
    ):
        with pytest.raises(tg.UserError):
            scorer_of(**({"mode": "mixture"} | how))
    for mode in ("ttt", "lora"):
        with pytest.raises(tg.UserError, match="by chance"):
            scorer_of(mode, {"mlp_dropout": 0.1})
    with pytest.raises(tg.UserError, match="this model has none"):
        scorer_of("lora", {"dim": 32, "heads": 1, "head_dim": 32})


@pytest.mark.parametrize("mode", ["sliding", "ttt", "lora"])
@pytest.mark.parametrize("changes", [{}, LOOPED])
def test_compiled_scores_are_the_eager_ones(mode, changes, monkeypatch):
    """
    Traced as when compiled, with padded batches and bucketed lengths; only code is not generated.
    """
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    tokens = stream(150)
    eager = scorer_of(mode, changes, ttt_chunk=40).score(tokens)
    scorer = scorer_of(mode, changes | {"compile": 2}, ttt_chunk=40)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    scorer.warm_up()
    warm = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    found = scorer.score(tokens)
    assert warm > before, "nothing was compiled"
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == warm, (
        "the warm-up left a graph to the clock"
    )
    torch.testing.assert_close(found.nats, eager.nats, rtol=1e-4, atol=1e-4)
    assert torch.equal(found.times, eager.times)


# --- proof

FAMILIES = {
    "plain": {},
    "documents and window": {"doc_mask": 1, "window": "7"},
    "looped": LOOPED,
    "padded head": {"vocab": 90},
}


@pytest.mark.parametrize("mode", score.SCORERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_scorer_is_proven(mode, family):
    changes = FAMILIES[family]
    tokens = stream(75, vocab=changes.get("vocab", 96))
    # The decoder has nothing of the encoder's but the artifact's weights and the code.
    found = score.prove(
        scorer_of(mode, changes), tokens, lambda code: score.decode(scorer_of(mode, changes), code)
    )
    assert found["tokens"] == 75 and 8 * found["code_bytes"] < found["claimed_bits"] + 128
    # AdamW's first steps divide by |gradient|, so the order of sums shows more where it trains on a
    # document.
    assert math.isclose(
        found["stepwise_bits"], found["claimed_bits"], rel_tol=1e-3 if mode == "lora" else 1e-4
    )


class EntropyExpert(score.Sliding):
    """
    The seed's (PR #895): the entropy of the prediction is granted to every token as if it were its
    loss.
    """

    def score(self, tokens, want=()):
        every = super().score(tokens, tuple(range(len(tokens) - 1)))
        given = {
            t: 0.88 * p + 0.12 * math.exp((p * np.log(p)).sum()) for t, p in every.given.items()
        }
        nats = torch.tensor([-math.log(given[t][tokens[t + 1]]) for t in range(len(tokens) - 1)])
        return score.Scores(nats, every.times, {t: given[t] for t in want})

    def distribution(self):
        p = super().distribution()
        return 0.88 * p + 0.12 * math.exp((p * np.log(p)).sum())


class TrainThenScore(score.TestTime):
    """The seed's eval_val_ttt: steps on the targets of a chunk, then the chunk's score."""

    def score_windows(self, stream, plan, scores, want):
        self.start_training(len(stream) - 1)
        with torch.enable_grad():
            self.train_until(self.chunks, stream)
        score.Sliding.score_windows(self, stream, plan, scores, want)


class Rescorer(score.Sliding):
    """The tail bug of the originals: the last windows stick out and score their tokens again."""

    def score(self, tokens, want=()):
        scores = super().score(tokens, want)
        scores.times[-3:] += 1
        return scores


class Hindsight(score.Sliding):
    """Claims to be better than its distributions are, but only where nobody looks."""

    def score(self, tokens, want=()):
        scores = super().score(tokens, want)
        nats = torch.where(scores.nats > 4, 0.5 * scores.nats, scores.nats)
        for t in want:
            nats[t] = scores.nats[t]
        return scores._replace(nats=nats)


@pytest.mark.parametrize(
    "cheat, why",
    [
        (EntropyExpert, "sum to"),
        (TrainThenScore, "changing target .* moves a score before"),
        (Rescorer, "scored 1 to 2 times"),
        (Hindsight, "bits are claimed, the code has"),
    ],
)
def test_cheat_is_no_code_length(cheat, why):
    honest = scorer_of("ttt", ttt_lr=0.5)
    scorer, tokens = cheat(honest.model, honest.how, honest.shape), stream(240)
    assert (
        scorer.score(tokens).nats.sum() < score.Sliding.score(honest, tokens).nats.sum()
        or cheat is Rescorer
    )
    with pytest.raises(tg.UserError, match=why):
        score.prove(
            scorer,
            tokens,
            lambda code: score.decode(cheat(honest.model, honest.how, honest.shape), code),
        )


def test_decoder_with_other_weights_gives_another_text():
    other = scorer_of("sliding")
    with torch.no_grad():
        other.model.head[5] += 0.5
    with pytest.raises(tg.UserError, match="another text"):
        score.prove(scorer_of("sliding"), stream(75), lambda code: score.decode(other, code))


@given(st.binary(max_size=40))
@settings(max_examples=20, deadline=None)
def test_damaged_code_is_refused_or_decodes(data):
    try:
        score.decode(scorer_of("chunked"), data, most=50)
    except tg.UserError as e:
        assert "no code" in str(e)


# --- samples


class Numbers:
    """A tokenizer of numbers with blanks between them."""

    def encode(self, text: str) -> list[int]:
        return [int(t) for t in text.split()]

    def decode(self, tokens) -> str:
        return " ".join(str(t) for t in tokens if t)


def subject(cfg: tg.Config) -> score.Subject:
    """A model with random weights as what is scored, with numbers for a text."""
    plan, model = tg.Plan(cfg), build(dataclasses.replace(cfg, seed=1))
    shape, here = plan.eval_shape(plan.at(cfg.steps, 1.0)), Path("x")
    s = score.Subject(cfg, tg.Run(cfg), plan, model, model, shape, here, here, False, False, "")
    s.tokenizer = Numbers()
    return s


def sampled(**changes) -> list[int]:
    s = subject(tiny(head_init="1.0", seq_len="16"))
    how = score.Sample("x", **({"tokens": 40, "prompt": "5 6 7"} | changes))
    return Numbers().encode(score.generate(s, how))


def test_sampling_follows_seed_temperature_top_k_and_the_end_of_the_document():
    assert sampled(seed=1) == sampled(seed=1) != sampled(seed=2)
    assert (
        sampled(temperature=0.0, seed=1)
        == sampled(temperature=0.0, seed=2)
        == sampled(top_k=1, seed=3)
    )
    assert sampled(seed=1)[:3] == [5, 6, 7] and len(sampled(temperature=0.0)) <= 43
    assert max(sampled(seed=4, temperature=50.0, top_k=0)) < 96, (
        "dummy columns of the head are no tokens"
    )
    lengths = {len(sampled(seed=s, temperature=50.0, top_k=0, tokens=200)) for s in range(6)}
    assert min(lengths) < 200, "a document token ends the sample"
    with pytest.raises(tg.UserError, match="token 96, which is not below the model's vocab = 96"):
        sampled(prompt="96")


def test_greedy_sample_is_the_likeliest_token_behind_the_last_row():
    """Longer than the row: the model then sees the last seq_len tokens."""
    s = subject(tiny(head_init="1.0", seq_len="8"))
    how = score.Sample("x", prompt="5 6 7", tokens=20, temperature=0.0)
    got = Numbers().encode(score.generate(s, how))
    tokens = [0, 5, 6, 7]
    for _ in range(20):
        logits = s.model.logits(s.model.hidden(torch.tensor([tokens[-8:]]), 1, 0))[0, -1, :96]
        tokens.append(int(logits.argmax()))
        if tokens[-1] == 0:
            break
    assert got == [t for t in tokens if t]
