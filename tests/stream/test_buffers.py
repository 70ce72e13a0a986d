"""Memory that is lent: never to two at once, and to the next when it is free."""

import threading

import numpy as np
import torch

from pretrain.stream.buffers import Buffers, Ranges


def test_memory_comes_back_once_nothing_shares_it_any_more():
    buffers = Buffers(4, 3, 8, torch.uint8, pin=False)
    first = buffers.take()
    place, view = first.data_ptr(), first[2:]
    del first
    second = buffers.take()
    assert second.data_ptr() != place, "a view still holds the first"
    view.fill_(7)
    del view
    assert buffers.take().data_ptr() == place


def test_what_is_held_is_never_lent_again():
    buffers = Buffers(2, 1, 2, torch.uint8, pin=False)
    held = [buffers.take().fill_(number) for number in range(50)]
    assert len({tensor.data_ptr() for tensor in held}) == 50
    assert [int(tensor[0, 0, 0, 0]) for tensor in held] == list(range(50))


def test_holders_may_let_go_in_any_thread_and_after_the_pool_is_gone():
    buffers = Buffers(16, 1, 1, torch.uint8, pin=False)

    def hold(buffers=buffers):
        for number in range(500):
            tensor = buffers.take().fill_(number % 256)
            assert (tensor == number % 256).all()

    threads = [threading.Thread(target=hold) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(buffers._free) <= 8  # a thread takes the next while it holds the last
    last = buffers.take().fill_(9)
    del buffers, hold, threads, thread
    assert (last == 9).all()


# Byte ranges of shards


def place_of(view):
    return np.frombuffer(view, np.uint8).__array_interface__["data"][0]


def test_a_ranges_memory_is_lent_again_once_no_part_of_it_is_held():
    ranges = Ranges()
    first = ranges.take(1000)
    place, part = place_of(first), first[990:]
    assert len(first) == 1000
    assert not first.readonly
    del first
    second = ranges.take(1000)
    second[:] = bytes(1000)
    assert place_of(second) != place, "a part still holds the first"
    part[:] = b"x" * 10
    assert not any(second)
    del part
    assert place_of(ranges.take(900)) == place


def test_a_short_range_is_not_lent_what_a_long_one_needed():
    ranges = Ranges()
    long = place_of(ranges.take(1_000_000))
    assert place_of(ranges.take(1000)) != long
    assert place_of(ranges.take(1_000_000)) == long
    assert len(ranges.take(0)) == 0
