"""Packing: plans, weights and positions, and that a packed row scores what its sequences score alone."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from clawrl.algorithms.losses import Targets, total_loss
from clawrl.config import LearningSection
from clawrl.training.model import TokenScorer, packed_attention
from clawrl.training.pack import PackedRow, balance, pack, trainable
from clawrl.types import Distillation, Sample, TeacherTop

VOCABULARY = 97


def sample(number: int, prompt: int, reply: int, *, k: int | None = None, **changes) -> Sample:
    rng = np.random.default_rng(number)
    length = prompt + reply
    mask = np.arange(length) >= prompt
    target = None
    if k is not None:
        target = Distillation(
            support=rng.integers(0, VOCABULARY, (length, k)).astype(np.int32),
            behaviour_logprobs=rng.normal(-2, 0.3, (length, k)).astype(np.float32),
            advantages=rng.normal(0, 0.3, (length, k)).astype(np.float32),
            valid=(rng.random((length, k)) < 0.8) & mask[:, None],
        )
    made = Sample(
        id=f"turn-{number}",
        user="ada",
        source="chat",
        token_ids=rng.integers(0, VOCABULARY, length).astype(np.int32),
        loss_mask=mask,
        logprobs=np.where(mask, rng.normal(-2, 0.3, length), 0).astype(np.float32),
        advantages=np.where(mask, 1.0 + number, 0).astype(np.float32),
        distillation=target,
        reference_logprobs=None,
        oldest_version=3,
        newest_version=3,
        weight=1.0,
        at=0.0,
    )
    return replace(made, **changes)


def rows_of(ranks: list[list[PackedRow]]) -> list[PackedRow]:
    return [row for rank in ranks for row in rank]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_sequence_is_packed_once_and_rows_hold_their_budget(world):
    rng = np.random.default_rng(0)
    lengths = rng.integers(10, 300, 40).tolist()
    bins = balance(lengths, world=world, capacity=512)
    assert sorted(i for chosen in bins for i in chosen) == list(range(40))
    assert len(bins) % world == 0
    assert all(sum(lengths[i] for i in chosen) <= 512 for chosen in bins)


def test_a_small_batch_is_spread_over_ranks():
    ranks = pack([sample(i, 20, 10 + i) for i in range(16)], world=2, pack_tokens=4096)
    assert [len(rank) for rank in ranks] == [1, 1]
    loads = [len(rank[0].token_ids) for rank in ranks]
    assert max(loads) - min(loads) <= 16


def test_ranks_are_balanced_over_many_rows():
    samples = [sample(i, 20 + 7 * (i % 13), 30) for i in range(60)]
    ranks = pack(samples, world=4, pack_tokens=256)
    assert len({len(rank) for rank in ranks}) == 1
    loads = [sum(len(row.token_ids) for row in rank) for rank in ranks]
    assert max(loads) / min(loads) < 1.1


def test_a_sequence_longer_than_the_budget_goes_alone():
    ranks = pack([sample(0, 100, 20), sample(1, 5, 5), sample(2, 6, 6)], world=1, pack_tokens=64)
    alone = [row for row in ranks[0] if len(row.token_ids) == 120]
    assert len(alone) == 1
    assert alone[0].bounds == (0, 120)


def test_ranks_without_samples_get_rows_of_no_weight():
    ranks = pack([sample(0, 5, 3, k=2)], world=3, pack_tokens=64)
    assert [len(rank) for rank in ranks] == [1, 1, 1]
    weights = sorted(float(row.weights.sum()) for row in rows_of(ranks))
    assert weights == pytest.approx([0, 0, 1])
    assert all(row.support.shape[1] == 2 for row in rows_of(ranks))


def test_positions_predict_their_targets():
    samples = [sample(0, 5, 3), sample(1, 4, 2)]
    ((row,),) = pack(samples, world=1, pack_tokens=64)
    assert row.bounds == (0, 8, 14)
    assert row.position_ids.tolist() == [*range(8), *range(6)]
    assert row.positions.tolist() == [4, 5, 6, 11, 12]
    np.testing.assert_array_equal(row.targets, [*samples[0].token_ids[5:], *samples[1].token_ids[4:]])
    np.testing.assert_array_equal(row.behaviour_logprobs, [*samples[0].logprobs[5:], *samples[1].logprobs[4:]])
    assert row.advantages.tolist() == [1, 1, 1, 2, 2]


def test_holes_in_the_mask_are_not_scored_and_the_first_token_never_is():
    made = sample(0, 0, 6)
    made.loss_mask[[2, 3]] = False
    ((row,),) = pack([made], world=1, pack_tokens=64)
    assert row.positions.tolist() == [0, 3, 4]
    np.testing.assert_array_equal(row.targets, made.token_ids[[1, 4, 5]])


@pytest.mark.parametrize(
    ("normalise", "expected"), [("sample", [1 / 6] * 2 + [2 / 3 / 4] * 4), ("token", [1 / 10] * 2 + [2 / 10] * 4)]
)
def test_token_weights_divide_by_the_whole_batch(normalise, expected):
    samples = [sample(0, 5, 2, weight=1.0), sample(1, 5, 4, weight=2.0)]
    for world in (1, 2):
        rows = rows_of(pack(samples, world=world, pack_tokens=64, normalise=normalise))
        weights = np.concatenate([row.weights for row in rows])
        assert sorted(weights) == pytest.approx(sorted(expected))
        assert weights.sum() == pytest.approx(1)


def test_a_constant_length_weighs_every_token_of_every_reply_alike():
    """Dr. GRPO: a reply's sum over 10, then the mean of replies of weight 1 and 2."""
    samples = [sample(0, 5, 2, weight=1.0), sample(1, 5, 4, weight=2.0)]
    for world in (1, 2):
        rows = rows_of(pack(samples, world=world, pack_tokens=64, normalise="constant", normalise_length=10))
        weights = np.concatenate([row.weights for row in rows])
        assert sorted(weights[weights > 0]) == pytest.approx([1 / 30] * 2 + [2 / 30] * 4)


def test_segments_name_the_reply_of_every_scored_position():
    ((row,),) = pack([sample(0, 5, 3), sample(1, 4, 2), sample(2, 9, 1)], world=1, pack_tokens=64)
    assert row.segments.tolist() == [0, 0, 0, 1, 1, 2]
    for segment, at in zip(row.segments, row.positions, strict=True):
        assert row.bounds[segment] <= at < row.bounds[segment + 1]


def test_freshness_and_absent_terms():
    samples = [
        sample(0, 5, 2),
        sample(1, 5, 2, oldest_version=2),
        sample(2, 5, 2, advantages=None, reference_logprobs=np.full(7, -1.5, np.float32)),
    ]
    ((row,),) = pack(samples, world=1, pack_tokens=64, version=3)
    order = {0: 0, 1: 2, 2: 4}
    assert row.fresh.tolist() == [True, True, False, False, True, True]
    assert row.has_reference.tolist() == [False] * 4 + [True] * 2
    assert row.advantages[order[2] :].tolist() == [0, 0]
    assert row.reference_logprobs.tolist() == [0] * 4 + [-1.5] * 2
    assert row.support.shape == (6, 0)


def test_supports_of_different_widths_are_joined():
    samples = [sample(0, 5, 2, k=1), sample(1, 5, 2, k=4), sample(2, 5, 2)]
    ((row,),) = pack(samples, world=1, pack_tokens=64)
    assert row.support.shape == (6, 4)
    assert not row.support_valid[:2, 1:].any()
    assert not row.support_valid[4:].any()
    assert samples[1].distillation is not None
    np.testing.assert_array_equal(row.support[2:4], samples[1].distillation.support[5:])
    np.testing.assert_array_equal(row.support_valid[2:4], samples[1].distillation.valid[5:])
    assert (row.support_advantages[~row.support_valid] == 0).all()


def taught(number: int, named: int) -> Sample:
    """A sample whose teacher named so many tokens at every position."""
    made, rng = sample(number, 5, 3, advantages=None), np.random.default_rng(number)
    shares = rng.dirichlet(np.ones(named + 1), 8)[:, :named]
    ids = np.stack([rng.permutation(VOCABULARY)[:named] for _ in range(8)])
    top = TeacherTop(ids.astype(np.int32), np.log(shares).astype(np.float32), np.full(8, 0.5, np.float32))
    return replace(made, teacher_top=top)


def test_teachers_that_named_more_or_fewer_tokens_are_joined():
    samples = [taught(0, 2), sample(1, 5, 3, k=3), taught(2, 5)]
    ((row,),) = pack(samples, world=1, pack_tokens=64)
    assert row.support.shape == (9, 3 + 5)
    assert row.support_valid.shape == (9, 3)
    first, last = samples[0].teacher_top, samples[2].teacher_top
    assert first is not None
    assert last is not None
    np.testing.assert_array_equal(row.support[:3, 3:5], first.ids[5:])
    np.testing.assert_array_equal(row.support[6:, 3:], last.ids[5:])
    np.testing.assert_array_equal(row.teacher_logprobs[6:], last.logprobs[5:])
    np.testing.assert_array_equal(np.isneginf(row.teacher_logprobs).sum(1), [3] * 3 + [5] * 3 + [0] * 3)
    assert row.teacher_weights.tolist() == [0.5] * 3 + [0] * 3 + [0.5] * 3
    idle = [row for row in rows_of(pack(samples[:1], world=2, pack_tokens=64)) if row.weights.sum() == 0]
    assert [(row.support.shape, row.teacher_logprobs.shape) for row in idle] == [((1, 2), (1, 2))]


def test_untrainable_samples_are_recognised():
    good = sample(0, 5, 2, k=2)
    assert trainable(good)
    bad = replace(good, logprobs=np.where(good.loss_mask, np.nan, 0).astype(np.float32))
    assert not trainable(bad)
    assert not trainable(replace(good, weight=0.0))
    assert not trainable(replace(good, weight=float("inf")))
    assert not trainable(replace(good, loss_mask=np.arange(7) == 0))  # its only trained token has no predecessor
    assert good.advantages is not None
    outside = np.where(good.loss_mask, good.advantages, np.nan).astype(np.float32)
    assert trainable(replace(good, advantages=outside))  # prompt positions are never read
    assert good.distillation is not None
    spoiled = np.where(good.distillation.valid, good.distillation.advantages, np.nan).astype(np.float32)
    assert trainable(replace(good, distillation=replace(good.distillation, advantages=spoiled)))
    top = taught(0, 2).teacher_top
    assert top is not None
    for value, usable in ((-np.inf, True), (np.nan, False), (np.inf, False)):
        logprobs = np.where(np.arange(8)[:, None] == 6, value, top.logprobs)
        assert trainable(replace(taught(0, 2), teacher_top=replace(top, logprobs=logprobs))) is usable
    spoiled = np.full_like(spoiled, np.inf)
    assert not trainable(replace(good, distillation=replace(good.distillation, advantages=spoiled)))


def test_an_empty_batch_is_refused():
    with pytest.raises(ValueError, match="no sample"):
        pack([], world=1, pack_tokens=64)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> str:
    """A random little Qwen3 with grouped queries and tied embeddings."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, intermediate_size=48, tie_word_embeddings=True, max_position_embeddings=256, initializer_range=0.2,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("model")
    Qwen3ForCausalLM(config).save_pretrained(folder)
    return str(folder)


def score(scorer: TokenScorer, row: PackedRow):
    as_tensor = torch.from_numpy
    return scorer(
        as_tensor(row.token_ids), as_tensor(row.position_ids), row.bounds, as_tensor(row.positions),
        as_tensor(row.targets), as_tensor(row.support),
    )  # fmt: skip


@pytest.mark.parametrize("logit_chunk", [1000, 7])
def test_packed_scores_equal_those_of_padded_sequences(model_folder, logit_chunk):
    from transformers import Qwen3ForCausalLM

    samples = [sample(i, 3 + 5 * i, 4 + 3 * i, k=3) for i in range(6)]
    ((row,),) = pack(samples, world=1, pack_tokens=4096)
    scored = score(TokenScorer.load(model_folder, logit_chunk=logit_chunk), row)

    plain = Qwen3ForCausalLM.from_pretrained(model_folder, attn_implementation="eager")
    longest = max(len(each.token_ids) for each in samples)
    ids, attention = np.zeros((2, len(samples), longest), np.int64)
    for i, each in enumerate(samples):
        ids[i, : len(each.token_ids)], attention[i, : len(each.token_ids)] = each.token_ids, 1
    logits = plain(torch.from_numpy(ids), attention_mask=torch.from_numpy(attention)).logits
    table = logits.log_softmax(-1)
    expected, support, entropy = [], [], []
    for i, each in enumerate(samples):
        at = torch.from_numpy(np.flatnonzero(each.loss_mask))
        rows = table[i, at - 1]
        expected.append(rows.gather(-1, torch.from_numpy(each.token_ids).long()[at][:, None])[:, 0])
        assert each.distillation is not None
        support.append(rows.gather(-1, torch.from_numpy(each.distillation.support).long()[at]))
        entropy.append(-(rows.exp() * rows).sum(-1))
    torch.testing.assert_close(scored.logprobs, torch.cat(expected), atol=2e-5, rtol=0)
    mask = torch.from_numpy(
        row.support_valid
    )  # entries outside were set to token 0, or are none of the loss's business
    torch.testing.assert_close(scored.support[mask], torch.cat(support)[mask], atol=2e-5, rtol=0)
    torch.testing.assert_close(scored.entropy, torch.cat(entropy), atol=2e-5, rtol=0)


def test_samples_of_several_methods_train_together_as_each_would_alone(model_folder):
    """A journal holds what an earlier run's method made of it: the loss and gradient of a batch are the mean of all."""
    samples = [sample(0, 5, 3), sample(1, 5, 3, k=3), taught(2, 5), taught(3, 2)]
    scorer = TokenScorer.load(model_folder, logit_chunk=1000)
    found = []
    for batch in (samples, *([each] for each in samples)):
        scorer.zero_grad()
        ((row,),) = pack(batch, world=1, pack_tokens=4096)
        targets = Targets(**{name: torch.from_numpy(getattr(row, name)) for name in Targets.__slots__})
        scored = score(scorer, row)
        loss = total_loss(scored.logprobs, scored.support, targets, LearningSection(kl_weight=0))
        loss.value.backward()
        gradient = torch.cat(
            [parameter.grad.flatten() for parameter in scorer.parameters() if parameter.grad is not None]
        )
        found.append((loss.value.detach(), gradient))
    values, gradients = (torch.stack(each) for each in zip(*found, strict=True))
    assert (gradients.abs().amax(1) > 0).all()
    torch.testing.assert_close(values[0], values[1:].mean(0), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(gradients[0], gradients[1:].mean(0), atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("recompute", [False, True])
def test_chunked_gradients_equal_unchunked_ones(model_folder, recompute):
    ((row,),) = pack([sample(i, 4, 9 + i, k=2) for i in range(4)], world=1, pack_tokens=4096)
    gradients = []
    for chunk, checkpointing in ((1000, False), (5, recompute)):
        scorer = TokenScorer.load(model_folder, logit_chunk=chunk, activation_checkpointing=checkpointing)
        scored = score(scorer, row)
        (scored.logprobs.mean() + scored.support.exp().sum(-1).mean()).backward()
        gradients.append({name: parameter.grad for name, parameter in scorer.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-5, rtol=1e-4, msg=name)


def test_logits_of_a_long_row_never_stand_together(model_folder, monkeypatch):
    """The head sees at most logit_chunk positions at a time, forward and backward, and none of the prompt's."""
    scorer = TokenScorer.load(model_folder, logit_chunk=8)
    head: Any = scorer.model.get_output_embeddings()
    seen: list[int] = []
    head.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    ((row,),) = pack([sample(i, 50, 10) for i in range(3)], world=1, pack_tokens=4096)
    score(scorer, row).logprobs.sum().backward()
    assert seen[:4] == [8, 8, 8, 6]
    assert max(seen) <= 8
    assert len(seen) == 8  # each chunk once more in the backward pass


@pytest.mark.parametrize("window", [None, 4])
def test_attention_stays_inside_its_sequence(window):
    torch.manual_seed(0)
    bounds = (0, 3, 12, 13)
    query, key, value = torch.randn(1, 4, 13, 8), torch.randn(1, 2, 13, 8), torch.randn(1, 2, 13, 8)
    module = torch.nn.Module()
    output, _ = packed_attention(
        module, query, key, value, None, scaling=0.3, sliding_window=window, packed_bounds=bounds
    )
    sequence = np.repeat([0, 1, 2], np.diff(bounds))
    keys, values = (tensor[0].repeat_interleave(2, 0) for tensor in (key, value))
    for t in range(13):
        seen = [s for s in range(t + 1) if sequence[s] == sequence[t] and (window is None or t - s < window)]
        weights = (torch.einsum("hd,hsd->hs", query[0, :, t], keys[:, seen]) * 0.3).softmax(-1)
        torch.testing.assert_close(output[0, t], torch.einsum("hs,hsd->hd", weights, values[:, seen]))
