"""The counter of memory and operations."""

import torch

from lit_distill.planning.counter import Counter


def test_storages_are_counted_once_and_until_they_are_freed():
    with Counter() as counter:
        a = torch.zeros(100)  # 400 bytes
        view = a[:50].reshape(5, 10)
        a += 1
        b = a @ a
        assert counter.now == 404
        del a
        assert counter.now == 404  # the view still holds it
        del view, b
    assert (counter.now, counter.peak, counter.flops) == (0, 404, 0)


def test_sizes_are_rounded_as_the_allocator_does():
    with Counter(512) as counter:
        tensors = [torch.zeros(1), torch.zeros(129)]
    assert counter.peak == 512 + 1024 and len(tensors) == 2


def test_segments_have_peaks_of_their_own():
    with Counter() as counter:
        counter.enter(["first"])
        x = torch.zeros(1000)
        counter.enter(["second"])
        x = x[:1].clone()
        counter.enter(["third", "again"])
        y = torch.zeros(10)
    assert counter.peaks == {"first": 4000, "second": 4004, "third": 44, "again": 44}
    assert len(x) + len(y) == 11


def test_products_are_counted():
    with Counter() as counter:
        torch.zeros(2, 3) @ torch.zeros(3, 5)
        torch.nn.functional.scaled_dot_product_attention(*[torch.zeros(1, 2, 4, 8)] * 3)
    assert counter.flops == 2 * 2 * 3 * 5 + 2 * (2 * 2 * 4 * 4 * 8)
