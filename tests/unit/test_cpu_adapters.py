"""What adapters add to a linear layer on a CPU, against the sum written out token by token."""

import pytest
import torch

from clawrl.serving.cpu_adapters import GroupedAdapters, groups

SLOTS, RANK, WIDTH, SLICES = 3, 4, 6, (5, 2)


@pytest.mark.parametrize(
    "slots",
    [[0, 0, 0], [-1, -1], [2, -1, 0, 2, 1, -1], [1, 0], [-1, 1, 1]],
    ids=["one for all", "none", "mixed", "each another", "some without"],
)
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_each_token_gets_what_its_adapter_adds(slots, scale):
    torch.manual_seed(0)
    chosen = torch.tensor(slots)
    x, y = torch.randn(len(slots), WIDTH), torch.randn(len(slots), sum(SLICES))
    a = tuple(torch.randn(SLOTS, 1, RANK, WIDTH) for _ in SLICES)
    b = tuple(torch.randn(SLOTS, 1, size, RANK) for size in SLICES)
    expected = y.clone()
    for row, slot in enumerate(slots):
        if slot >= 0:
            parts = [scale * b_i[slot, 0] @ (a_i[slot, 0] @ x[row]) for a_i, b_i in zip(a, b, strict=True)]
            expected[row] += torch.cat(parts)
    wrapper = GroupedAdapters.__new__(GroupedAdapters)
    wrapper._groups = groups(chosen)
    wrapper.add_lora_linear(y, x, a, b, scale, SLICES)
    torch.testing.assert_close(y, expected)


def test_tokens_are_gathered_by_adapter():
    assert groups(torch.tensor([1, 1])) == [(1, None)]
    assert groups(torch.tensor([-1])) == []
    found = [(slot, rows.tolist()) for slot, rows in groups(torch.tensor([2, -1, 0, 2])) if rows is not None]
    assert found == [(0, [2]), (2, [0, 3])]
