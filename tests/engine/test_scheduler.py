"""Who is admitted, who must leave: lengths and counts only."""

from collections.abc import Sequence

import pytest

from byrote.engine.request import Choice, SamplingParams
from byrote.engine.scheduler import Scheduler, footprint


def choice(length: int, arrival: int, index: int = 0) -> Choice:
    return Choice(
        request=f"r{arrival}",
        index=index,
        ids=[0] * length,
        params=SamplingParams(),
        end_ids=(),
        max_tokens=99,
        stream=None,
        mask=None,
        pack=None,
        arrival=arrival,
    )


def arrivals(choices: Sequence[Choice] | None) -> list[int]:
    return [one.arrival for one in choices or []]


@pytest.mark.parametrize(
    ("lengths", "growth", "pages"), [((), 1, 0), ((127,), 1, 1), ((128,), 1, 2), ((128, 1), 0, 2), ((1, 1, 300), 1, 9)]
)
def test_a_batch_takes_rows_times_the_pages_of_the_longest(lengths, growth, pages):
    assert footprint([choice(length, 0) for length in lengths], growth) == pages


def test_first_come_first_served_even_where_a_later_one_would_fit():
    scheduler = Scheduler(max_batch=4, pages=4)
    running = [choice(100, 0)]
    scheduler.waiting.extend([[choice(300, 1)], [choice(10, 2)]])
    assert scheduler.admit(running) is None
    assert arrivals(scheduler.admit([])) == [1]
    assert arrivals(scheduler.admit(running)) == [2]
    assert scheduler.admit(running) is None


def test_no_more_choices_than_the_batch_may_hold():
    scheduler = Scheduler(max_batch=2, pages=99)
    scheduler.waiting.append([choice(1, 1, 0), choice(1, 1, 1)])
    assert scheduler.admit([choice(1, 0)]) is None
    assert len(scheduler.admit([]) or []) == 2


def test_the_newest_leave_first_and_one_always_stays():
    running = [choice(120, 3), choice(120, 1), choice(120, 2)]
    assert arrivals(Scheduler(max_batch=4, pages=2).to_preempt(running, growth=1)) == [3]
    assert arrivals(Scheduler(max_batch=4, pages=1).to_preempt(running, growth=1)) == [3, 2]
    assert arrivals(Scheduler(max_batch=4, pages=1).to_preempt(running, growth=20)) == [3, 2]
    assert arrivals(Scheduler(max_batch=4, pages=3).to_preempt(running, growth=8)) == []


def test_the_preempted_come_back_in_order_before_all_others():
    scheduler = Scheduler(max_batch=4, pages=9)
    scheduler.waiting.append([choice(1, 9)])
    scheduler.put_back([choice(1, 5), choice(1, 4)])
    assert [arrivals(group) for group in scheduler.waiting] == [[4], [5], [9]]


def test_those_that_ended_while_waiting_are_forgotten():
    scheduler = Scheduler(max_batch=4, pages=9)
    gone, stays = choice(1, 1), choice(1, 1, 1)
    gone.finish = "abort"
    scheduler.waiting.extend([[gone, stays], [gone]])
    scheduler.sweep()
    assert list(scheduler.waiting) == [[stays]]
