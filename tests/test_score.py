"""A score is a code length, what is none is refused, and figures are taken once and kept."""

# ruff: noqa: F401, F811 (fixtures of another file are arguments here)

import dataclasses
import functools
import hashlib
import json
import math
import shutil
import signal
import time
import typing
from pathlib import Path

import numpy as np
import pytest
import torch
from forks import run_ranks
from helpers import build, parts, tg, tiny, write_shard
from hypothesis import given, settings
from hypothesis import strategies as st
from test_export import LOOPED, model_of, small, weights
from test_runs import assert_refused, data, flags, folder_hash, newest, server, spoken, succeed

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
        scorer.run.sum_of, scorer.run.poll = lambda x: x, lambda: None
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
            t: 0.88 * p + 0.12 * math.exp((p * np.log(p)).sum())
            for t, p in every.distributions.items()
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
    s = score.Subject(cfg, tg.Run(cfg), plan, model, model, shape, here, here, False, False)
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


# --- figures: what phase 3 keeps in the folder of a run


@pytest.fixture(scope="session")
def runs(server, flags, spoken, tmp_path_factory):
    """
    A folder with the finished runs `tiny` and `other`, which differ in the seed: text, an artifact,
    ends of epochs, and a [score] table that asks for two scores.
    """
    folder = tmp_path_factory.mktemp("runs")
    (folder / "scored.toml").write_text('[score]\nmodes = "sliding mixture"\nstride = 8\n')
    for name, seed in (("tiny", 1), ("other", 2)):
        argv = flags(
            config="scored.toml",
            run=name,
            seed=seed,
            data=spoken[0],
            tokenizer=spoken[0] / "tokenizer.model",
            vocab=96,
            doc_token=1,
            val_tokens=320,
            dim=64,
            steps=8,
            epochs=2,
            average_epochs=2,
            train_tokens=1100,
            eval_every=-1,
        )
        succeed(server.run(*argv, cwd=folder))
    return folder / "logs"


@pytest.fixture(scope="session")
def whole(server, runs, tmp_path_factory):
    """A copy of the run `tiny` that was scored as its table asks, and the calls that it took."""
    folder = shutil.copytree(runs / "tiny", tmp_path_factory.mktemp("whole") / "tiny")
    counts = folder.parent / "counts.json"
    when = {"calls": "files", "count": str(counts)}
    succeed(server.run(folder, program="logs.score", when=when))
    return folder, json.loads(counts.read_text())


def copied(source: Path, tmp_path: Path) -> Path:
    return shutil.copytree(source, tmp_path / "logs" / source.name)


def result_of(folder: Path) -> dict:
    return json.loads((folder / "result.json").read_text())


def untimed(result: dict) -> dict:
    """All that is not read from a clock, figures in the order of their names."""
    scores = {
        name: {k: v for k, v in figure.items() if k != "eval_time_s"}
        for name, figure in sorted(result["scores"].items())
    }
    return {k: v for k, v in result.items() if k != "eval_time_s"} | {"scores": scores}


NAMES = ["sliding stride=8", "mixture stride=8", "epochs 2", "compressors"]


def test_the_table_of_the_run_says_what_is_scored_and_where_it_stands(runs, whole):
    before, result = result_of(runs / "tiny"), result_of(whole[0])
    assert list(result["scores"]) == NAMES and "scores" not in before
    untouched = before.keys() - {"eval_time_s"}
    assert {k: result[k] for k in untouched} == {k: before[k] for k in untouched}
    top = {}
    for figure in result["scores"].values():
        top |= figure["top"]
    assert {k: v for k, v in result.items() if k not in before} == top | {
        "scores": result["scores"],
        "first_eval_time_s": before["eval_time_s"],
    }
    assert top.keys() > {"sliding_val_loss", "sliding_val_bpb", "mixed_val_bpb", "xz_bpb"}
    assert top.keys() > {"zstd_bpb", "slowrun_val_loss", "val_loss_prob_equal", "averaged_steps"}
    seconds = sum(f.get("eval_time_s", 0) for f in result["scores"].values())
    assert result["eval_time_s"] == pytest.approx(before["eval_time_s"] + seconds)
    digest = hashlib.sha256((whole[0] / "model.nrx").read_bytes()).hexdigest()
    assert {figure["of"] for figure in result["scores"].values()} == {digest}
    # the figure itself, from the artifact and the scorer alone
    s = score.opened(score.Source(str(whole[0]), device="cpu"))
    how = score.OneScore(mode="sliding", stride=8)
    found = score.score_all(score.make_scorer(s.model, how, s.shape), s.val)
    assert result["sliding_val_loss"] == pytest.approx(found["val_loss"], rel=1e-6)
    assert result["sliding_val_bpb"] == pytest.approx(found["val_bpb"], rel=1e-6)
    log = (whole[0] / "log.txt").read_text()
    assert log.startswith((runs / "tiny" / "log.txt").read_text())
    assert f"final_sliding val_loss:{result['sliding_val_loss']:.8f}" in log


def test_scoring_twice_takes_nothing_again(whole, tmp_path, monkeypatch, capsys):
    folder = copied(whole[0], tmp_path)

    def forbidden(*given):
        raise AssertionError("was taken again")

    for name in ("one_score", "averaged", "compressors_bpb"):
        monkeypatch.setattr(score, name, forbidden)
    assert score.main([str(folder)]) == 0
    assert result_of(folder) == result_of(whole[0])
    said = capsys.readouterr().out
    for name in NAMES:
        assert f"{name}: taken before: " in said


def test_other_settings_add_figures_and_the_last_asked_for_stand_at_the_top(whole, tmp_path):
    folder, first = copied(whole[0], tmp_path), result_of(whole[0])
    assert score.main([str(folder), "--modes", "ttt sliding", "--stride", "4"]) == 0
    second = result_of(folder)
    assert list(second["scores"])[:2] == NAMES[:2]
    assert {name: second["scores"][name] for name in NAMES} == first["scores"]
    assert set(second["scores"]) == {*NAMES, "ttt stride=4", "sliding stride=4"}
    assert (
        second["sliding_val_bpb"] == second["scores"]["sliding stride=4"]["top"]["sliding_val_bpb"]
    )
    assert second["sliding_val_bpb"] != first["sliding_val_bpb"]
    assert second["mixed_val_bpb"] == first["mixed_val_bpb"] and "ttt_val_bpb" in second
    # a setting that the mode does not look at is no other figure; one that it looks at is
    assert score.main([str(folder), "--modes", "sliding", "--share", "0.1"]) == 0
    third = result_of(folder)
    assert third["scores"].keys() == second["scores"].keys()
    assert third["sliding_val_bpb"] == first["sliding_val_bpb"]
    assert score.main([str(folder), "--modes", "mixture", "--share", "0.1"]) == 0
    assert result_of(folder)["scores"].keys() - third["scores"] == {"mixture stride=8 share=0.1"}


def test_figures_of_other_weights_are_taken_anew(runs, whole, tmp_path):
    folder, other = copied(whole[0], tmp_path), copied(runs / "other", tmp_path)
    shutil.copyfile(other / "model.nrx", folder / "model.nrx")
    for name in (folder, other):
        assert score.main([str(name), "--modes", "sliding mixture"]) == 0
    mine, its, old = result_of(folder), result_of(other), result_of(whole[0])
    for name in NAMES[:2]:
        assert mine["scores"][name]["of"] == its["scores"][name]["of"]
        assert mine["scores"][name]["top"] == its["scores"][name]["top"]
        assert mine["scores"][name]["of"] != old["scores"][name]["of"]
    # the n-grams outweigh both runs in the mixture
    assert mine["sliding_val_bpb"] == its["sliding_val_bpb"] != old["sliding_val_bpb"]


def test_scoring_killed_at_any_change_of_a_file_ends_as_if_it_never_was(
    server, runs, whole, tmp_path
):
    """Every figure is written by a few calls; SIGKILL comes in turn before each third of them."""
    calls = whole[1]["take"]
    assert calls >= 4 * len(NAMES)
    done = []
    for at in range(3, calls + 1, 3):
        folder = copied(runs / "tiny", tmp_path / str(at))
        when = {"phase": "take", "calls": "files", "send": [[at, signal.SIGKILL]]}
        assert server.run(folder, program="logs.score", when=when).code == -signal.SIGKILL
        done.append(list(result_of(folder).get("scores", {})))
        ended = server.run(folder, program="logs.score")
        succeed(ended)
        assert ended.out.count("taken before") == len(done[-1])
        assert untimed(result_of(folder)) == untimed(result_of(whole[0]))
        assert not list(folder.rglob("*.part"))
    assert [] in done and NAMES[:1] in done and NAMES[:3] in done  # kills came before and behind


@pytest.mark.parametrize("world, at", [(1, 15), (2, 9)])
def test_a_signal_leaves_with_143_and_keeps_what_was_taken(
    server, runs, whole, tmp_path, world, at
):
    """To one rank, in the second score: each adds up five batches over all ranks, by two calls."""
    folder = copied(runs / "tiny", tmp_path)
    when = {"phase": "one_score", "calls": "index_add_", "send": [[at, signal.SIGTERM]]}
    ended = run_ranks(server, world, [folder], tmp_path, when=when, program="logs.score")
    for e in ended:
        assert e.code == 143 and "Traceback" not in e.text, e.text
    assert "interrupted by SIGTERM: what was taken is kept" in ended[0].out
    assert "interrupted by SIGTERM" in (folder / "log.txt").read_text()
    assert list(result_of(folder)["scores"]) == NAMES[:1]
    succeed(server.run(folder, program="logs.score"))
    result = untimed(result_of(folder))
    result["scores"][NAMES[0]]["world_size"] = 1
    if world == 1:
        assert result == untimed(result_of(whole[0]))
    else:
        assert result["sliding_val_loss"] == pytest.approx(result_of(whole[0])["sliding_val_loss"])


def test_any_number_of_ranks_takes_the_same_figures(server, runs, whole, tmp_path):
    argv = ["--modes", "chunked sliding mixture ttt lora", "--prove_bytes", "60"]
    found = []
    for world in (1, 2):
        folder = copied(runs / "tiny", tmp_path / str(world))
        succeed(run_ranks(server, world, [folder, *argv], tmp_path, program="logs.score"))
        found.append(result_of(folder))
    one, two = found
    assert one["scores"].keys() == two["scores"].keys() and len(one["scores"]) == 8
    assert two["scores"]["ttt stride=8"]["world_size"] == 2
    for name in one["scores"]:
        mine, its = one["scores"][name]["top"], two["scores"][name]["top"]
        assert mine.keys() == its.keys()
        for key, value in mine.items():
            assert its[key] == pytest.approx(value, rel=1e-5) if type(value) is float else value
    assert one["proven_bytes"] == 60
    for result in found:
        assert result["decoded_bpb"] == pytest.approx(result["lora_val_bpb"], rel=1)
        assert "lora" in next(name for name in result["scores"] if name.startswith("proof"))


def test_two_scorings_of_one_folder_at_once_are_refused_by_the_lock(server, runs, tmp_path):
    folder = copied(runs / "tiny", tmp_path)
    when = {"phase": "one_score", "send": [[9, signal.SIGSTOP]]}
    first = server.start(folder, program="logs.score", when=when)
    end = time.monotonic() + 60
    while f"signal {signal.SIGSTOP} " not in first.read(1):
        assert time.monotonic() < end and first.poll() is None, first.read(0) + first.read(1)
        time.sleep(0.01)
    before = folder_hash(folder)
    second = server.run(folder, program="logs.score")
    assert_refused(second, [str(folder), f"in use by process {first.pid}", "wait until"])
    assert folder_hash(folder) == before
    first.signal(signal.SIGCONT)
    assert first.wait().code == 0
    assert list(result_of(folder)["scores"]) == NAMES


def test_an_artifact_a_checkpoint_and_another_text_change_no_figures(whole, tmp_path, capsys):
    """Of the first two nothing is written at all, of the third the log is."""
    folder = copied(whole[0], tmp_path)
    before = folder_hash(folder)
    for source in (folder / "model.nrx", newest(folder)):
        assert score.main([str(source), "--modes", "chunked"]) == 0
        said = capsys.readouterr().out
        assert "final_chunked val_loss:" in said and "average over" not in said
        assert folder_hash(folder) == before
    result = (folder / "result.json").read_bytes()
    for more in (["--val_tokens", "64"], ["--data", tg.open_source(str(folder))[0].data]):
        assert score.main([str(folder), "--modes", "chunked", *more]) == 0
        assert "figures are not kept" in capsys.readouterr().out
        assert (folder / "result.json").read_bytes() == result


def test_test_time_training_that_trains_on_nothing_says_so(runs, capsys):
    argv = [str(runs / "tiny" / "model.nrx"), "--modes", "ttt", "--stride", "8", "--ttt_chunk"]
    words = "notice: ttt trained on nothing: the windows of these 320 tokens begin within the first"
    for chunk, said in (("320", True), ("64", False)):
        assert score.main([*argv, chunk]) == 0
        out = capsys.readouterr().out
        assert "final_ttt val_loss:" in out and (words in out) == said, out


@pytest.mark.parametrize("world", [1, 2])
def test_figures_of_shards_that_were_exchanged_are_neither_kept_nor_believed(
    server, runs, spoken, tmp_path, world
):
    """They have the same names in the same folder: result.json's data_sha256 tells."""
    where = shutil.copytree(spoken[0], tmp_path / "text")
    config = tg.config_toml(tg.checkpoint_config(runs / "tiny"))
    (tmp_path / "again.toml").write_text(config.replace(str(spoken[0]), str(where)))
    succeed(server.run("--config", "again.toml", "--run", "mine", cwd=tmp_path))
    folder, (val,) = tmp_path / "logs" / "mine", where.glob("*_val_*.bin")
    argv = [folder, "--modes", "chunked"]

    def scored() -> tuple[str, dict]:
        ended = run_ranks(server, world, argv, tmp_path, program="logs.score")
        succeed(ended)
        return ended[0].out, result_of(folder)

    said, kept = scored()
    assert "chunked" in kept["scores"] and "notice" not in said
    shard, result = val.read_bytes(), (folder / "result.json").read_bytes()
    write_shard(val, np.fromfile(val, "<u2")[512:][::-1] % 96)
    said, _ = scored()
    assert "notice: figures are not kept" in said and "has not the run's shards" in said
    assert "final_chunked val_loss:" in said and "taken before" not in said
    assert (folder / "result.json").read_bytes() == result
    (train,) = where.glob("*_train_*.bin")
    train.rename(tmp_path / train.name)
    said, _ = scored()
    assert "cannot be compared with the run's (no train shards" in said
    assert (folder / "result.json").read_bytes() == result
    (tmp_path / train.name).rename(train)
    val.write_bytes(shard)
    said, again = scored()
    assert "chunked: taken before" in said and "notice" not in said and again == kept


REFUSED = {
    "an unknown mode": (["--modes", "sliding guess"], ["modes", "'guess'", "lora"]),
    "a mode twice": (["--modes", "sliding sliding"], ["names one twice"]),
    "a stride over the row": (["--modes", "chunked sliding", "--stride", "33"], ["stride = 33"]),
    "a sample of -1 tokens": (["--sample_tokens", "-1"], ["sample_tokens = -1"]),
    "a proof of -1 bytes": (["--prove_bytes", "-1"], ["prove_bytes = -1"]),
    "-5 tokens to score": (["--val_tokens", "-5"], ["val_tokens = -5", "-1 are the run's own"]),
    "batches of -1 rows": (["--rows", "-1"], ["rows = -1"]),
    "a negative top_k": (["--top_k", "-1"], ["top_k = -1"]),
    "a temperature near 0": (["--temperature", "1e-45"], ["temperature = 1e-45", "0.001"]),
    "a temperature that is none": (["--temperature", "nan"], ["temperature = nan"]),
    "an infinite temperature": (["--temperature", "inf"], ["temperature = inf"]),
    "a share that is none": (["--modes", "mixture", "--share", "nan"], ["share = nan"]),
    "an infinite rate": (["--modes", "chunked ttt", "--ttt_lr", "inf"], ["ttt_lr = inf"]),
    "more text than there is": (["--prove_bytes", "999999"], ["999999 bytes of text"]),
    "more epochs than there are": (["--last_epochs", "3"], ["holds 2 of 3 epochs"]),
    "an unknown flag": (["--modess", "x"], ["modess", "modes"]),
    "a word for a number": (["--stride", "many"], ["stride", "many"]),
    "a prompt that is no text": (
        ["--sample_tokens", "3", "--prompt", "caf\udce9"],
        ["prompt = 'caf\\udce9'", "UTF-8"],
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_scored_is_refused_in_one_line(server, whole, tmp_path, name):
    """Before a figure is taken: those that the run had stay, and none is added."""
    argv, words = REFUSED[name]
    folder = copied(whole[0], tmp_path)
    ended = server.run(folder, *argv, program="logs.score")
    assert_refused(ended, words)
    assert "final_" not in ended.out
    assert untimed(result_of(folder)) == untimed(result_of(whole[0]))


@pytest.mark.parametrize(
    "changes, argv, words",
    [
        ({}, ["--modes", "chunked lora"], ["lora", "64 rows and columns", "has none"]),
        ({"mlp_dropout": 0.1}, ["--modes", "sliding ttt"], ["ttt", "by chance"]),
        ({}, ["--modes", "chunked", "--prove_bytes", "9"], ["prove_bytes = 9", "tokenizer"]),
        ({}, ["--modes", "chunked", "--sample_tokens", "9"], ["without a tokenizer"]),
    ],
    ids=str,
)
def test_what_these_weights_cannot_do_is_refused_before_a_figure_is_taken(
    tmp_path, capsys, changes, argv, words
):
    """A model of small matrices, with dropout, without a tokenizer."""
    p = parts(tmp_path, log_dir=str(tmp_path), **changes)
    tg.save_checkpoint(p, 1)
    (p.run.folder / "result.json").write_text('{"val_loss": 1.0}')
    assert score.main([str(p.run.folder), "--stride", "8", *argv]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ") and said.err.count("\n") == 1 and "final_" not in said.out
    assert all(word in said.err for word in words), said.err
    assert json.loads((p.run.folder / "result.json").read_text()) == {"val_loss": 1.0}


def test_a_prompt_beyond_the_vocabulary_is_refused_before_a_figure_is_taken():
    s = subject(tiny())
    for prompt, words in (("5 96", "token 96, which is not below"), ("caf\udce9", "UTF-8")):
        with pytest.raises(tg.UserError, match=words):
            score.check_possible(s, score.Phase("x", sample_tokens=3, prompt=prompt))
    score.check_possible(s, score.Phase("x", sample_tokens=3, prompt="5 95"))


def test_the_flags_of_the_program_are_the_table_of_a_preset():
    """With the same defaults; beside them it asks what is scored, on which text and machine."""
    fields = {f.name: f.default for f in dataclasses.fields(score.Phase)}
    beside = {"source", "data", "device", "rows", "val_tokens", "last_epochs", "with_runs"}
    assert fields.keys() - tg.TABLES["score"] == beside
    assert {k: v for k, v in fields.items() if k not in beside} == tg.TABLES["score"]
    kinds = typing.get_type_hints(score.Phase)
    assert all(kinds[key] is type(value) for key, value in tg.TABLES["score"].items())


# --- the other verbs


def test_an_export_by_hand_is_the_artifact_of_the_run(runs, tmp_path, capsys):
    """
    From the newest checkpoint, in the bits and the codec of the run: the same weights, and the same
    configuration but for the machine that it was made on.
    """
    out = tmp_path / "a.nrx"
    argv = ["export", str(runs / "tiny"), "--out", str(out), "--calibration_rows", "0"]
    assert score.main([*argv, "--bits", "int8", "--codec", "zstd"]) == 0
    mine, its = tg.load_artifact(out), tg.load_artifact(runs / "tiny" / "model.nrx")
    assert all(torch.equal(w, its[1][name]) for name, w in mine[1].items())
    here = {key: getattr(its[0], key) for key in ("device", "data", "tokenizer")}
    assert mine[1].keys() == its[1].keys() and dataclasses.replace(mine[0], **here) == its[0]
    assert f"artifact: {out} {out.stat().st_size} bytes" in capsys.readouterr().out
    small = tmp_path / "b.nrx"
    argv[3] = str(small)
    limit = int(0.8 * out.stat().st_size)
    assert score.main([*argv, "--bits", "fit", "--codec", "best", "--limit", str(limit)]) == 0
    assert small.stat().st_size <= limit < out.stat().st_size
    assert tg.load_artifact(small)[1].keys() == tg.load_artifact(out)[1].keys()


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"out": "/nowhere/a.nrx"}, ["out = '/nowhere/a.nrx'", "no folder"]),
        ({"out": __file__}, ["exists", "another name"]),
        ({"bits": "fit"}, ["limit", "not set"]),
        ({"bits": "int3"}, ["int3", "int4"]),
        ({"bits": "int6 nothing:5"}, ["nothing", "matches no matrix"]),
        ({"codec": "zip"}, ["codec = 'zip'", "zstd"]),
        ({"calibration_rows": -5}, ["calibration_rows = -5", "at least 0"]),
        ({"limit": 1000}, ["limit = 1000", "smaller model", "--bits fit"]),
        ({"bits": "fit", "limit": 1000}, ["limit = 1000", "smaller model"]),
        ({"source": "model.nrx"}, ["is an artifact", "exact weights"]),
    ],
    ids=str,
)
def test_an_export_that_cannot_be_is_refused(runs, tmp_path, capsys, changes, words):
    flags = {"out": str(tmp_path / "a.nrx"), "calibration_rows": 0} | changes
    source = runs / "tiny" / flags.pop("source", "")
    argv = [word for key, value in flags.items() for word in (f"--{key}", str(value))]
    assert score.main(["export", str(source), *argv]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    assert all(word in said for word in words), said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "argv, words",
    [
        (["table", "--calibration_rows", "0"], "calibration_rows = 0: must be at least 1"),
        (["table", "--calibration_rows", "-5"], "calibration_rows = -5: must be at least 1"),
        (["sample", "--tokens", "5", "--seed", "9" * 23], "seed = 99999999999999999999999"),
        (["sample", "--tokens", "5", "--seed", "-1"], "seed = -1"),
    ],
    ids=str,
)
def test_numbers_that_no_program_can_use_are_refused_in_one_line(runs, capsys, argv, words):
    assert score.main([argv[0], str(runs / "tiny"), *argv[1:]]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and words in said


def test_a_batch_has_no_more_rows_than_there_are_windows(runs):
    source, windows = str(runs / "tiny"), score.opened(score.Source(str(runs / "tiny"))).val.scored
    how = {"mode": "sliding", "stride": 8}
    assert score.opened(score.Table(source, **how, rows=3)).shape.rows == 3
    usual = score.opened(score.Table(source, **how)).shape.rows
    most = max(usual, -(-windows // 8))
    assert score.opened(score.Table(source, **how, rows=10**6)).shape.rows == most


@pytest.mark.parametrize("text", ["[1, 2]", '{"scores": [1]}', '{"scores": {"a": 1}}'])
def test_result_of_other_content_is_refused_in_one_line(tmp_path, capsys, text):
    p = parts(tmp_path, log_dir=str(tmp_path))
    tg.save_checkpoint(p, 1)
    (p.run.folder / "result.json").write_text(text)
    assert score.main([str(p.run.folder), "--modes", "chunked"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and "result.json cannot" in said


@pytest.mark.parametrize("text", ["[]", "{}", '{"step": 1, "repeats": "1", "window": 0}', "[" * 9])
def test_state_of_other_content_is_refused_by_file_name(tmp_path, text):
    (tmp_path / "state.json").write_text(text)
    with pytest.raises(tg.UserError, match="state.json cannot be read"):
        score.read_applied(tmp_path)


def test_the_table_tells_bytes_and_bits_lost_of_every_choice(runs, capsys):
    choices = ["int8", "int6", "int4", "int4 gptq"]
    argv = ["table", str(runs / "tiny"), "--calibration_rows", "4", "--choices", *choices]
    assert score.main(argv) == 0
    head, columns, _, *rows = capsys.readouterr().out.strip().splitlines()
    assert "exact weights: " in head and "GPTQ on" in head
    names = [word.strip() for word in columns.strip("|").split("|")]
    assert names[1:-2] == [*tg.CODECS, tg.ENTROPY]
    found = [[word.strip() for word in row.strip("|").split("|")] for row in rows]
    assert [row[0] for row in found] == choices
    sizes = [list(map(int, row[1:-2])) for row in found]
    for row, size in zip(found, sizes):
        assert float(row[-2]) == pytest.approx(min(size) / sizes[0][0], abs=1e-3)
    assert min(sizes[0]) > min(sizes[1]) > min(sizes[2])
    lost = [float(row[-1]) for row in found]
    assert abs(lost[0]) < 1e-3 and max(map(abs, lost)) == max(map(abs, lost[2:]))


def test_a_proof_by_hand_decodes_what_is_claimed(runs, capsys):
    argv = ["prove", str(runs / "tiny"), "--bytes", "60", "--mode", "mixture", "--stride", "8"]
    assert score.main(argv) == 0
    said = capsys.readouterr().out
    assert "prove:mixture text_bytes:" in said and "the text came back: proven" in said
    for count in ("0", "-5"):
        assert score.main(["prove", str(runs / "tiny"), "--bytes", count]) == 2
        said = capsys.readouterr()
        assert f"bytes = {count}: there is no text to prove" in said.err and not said.out
    for verb, count in (("export", -1), ("table", 0), ("table", -1)):
        assert score.main([verb, str(runs / "tiny"), "--calibration_rows", str(count)]) == 2
        assert f"calibration_rows = {count}: " in capsys.readouterr().err
    for words in (["--code", "x"], ["--out", "x"]):
        assert score.main(["decode", str(runs / "tiny"), *words]) == 2
        assert "--code FILE --out FILE" in capsys.readouterr().err
