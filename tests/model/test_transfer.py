"""Rows by their numbers, on the device they are on."""

import torch

from model.transfer import ToHost, put, take, to_device


def test_rows_that_follow_one_another_are_a_view() -> None:
    tensor = torch.arange(12).view(6, 2)
    view = take(tensor, [2, 3, 4])
    assert torch.equal(view, tensor[2:5])
    assert view.data_ptr() == tensor[2].data_ptr()
    assert torch.equal(take(tensor, [4, 3]), tensor[[4, 3]])
    assert torch.equal(take(tensor, [1, 1]), tensor[[1, 1]])
    assert take(tensor, []).shape == (0, 2)


def test_values_go_to_their_rows() -> None:
    for rows in ([1, 2, 3], [3, 0, 2]):
        tensor = torch.zeros(5, dtype=torch.int64)
        put(tensor, rows, torch.tensor([7, 8, 9]))
        assert tensor[rows].tolist() == [7, 8, 9]
        assert tensor.sum() == 24


def test_there_and_back() -> None:
    device = torch.device("cpu")
    assert to_device([1, 2], torch.float64, device).tolist() == [1.0, 2.0]
    assert ToHost(to_device([1, 2], torch.int64, device)).wait().tolist() == [1, 2]
