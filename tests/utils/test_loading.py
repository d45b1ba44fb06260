"""Batches are loaded one ahead of the caller, and no further."""

import threading

import pytest

from transformers_minigpt4.utils.loading import load_ahead


def test_batches_keep_their_order_and_their_items():
    batches = [[1, 2, 3], [4], [], [5, 6]]
    assert list(load_ahead(batches, lambda item: item * 10)) == [[(i, i * 10) for i in batch] for batch in batches]
    assert list(load_ahead([], str)) == []


def test_the_next_batch_loads_while_the_caller_works():
    second = threading.Event()
    loading = load_ahead([[1], [2]], lambda item: second.set() if item == 2 else None)
    next(loading)
    assert second.wait(10)


def test_an_endless_source_is_drawn_on_demand():
    drawn = []

    def endless():
        while True:
            drawn.append(len(drawn))
            yield [drawn[-1]]

    loading = load_ahead(endless(), lambda item: item)
    assert [next(loading) for _ in range(3)] == [[(0, 0)], [(1, 1)], [(2, 2)]]
    assert len(drawn) <= 4
    loading.close()


def test_an_error_is_raised_where_its_item_is_due():
    loading = load_ahead([[1], [0], [2]], lambda item: 1 / item)
    assert next(loading) == [(1, 1.0)]
    with pytest.raises(ZeroDivisionError):
        next(loading)
