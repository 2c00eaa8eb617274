"""Admission and staleness: the bound holds, nothing is lost, trained twice or deadlocked, whatever happens."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medtvt_rl.rollout.buffer import AdmissionBuffer, StalenessError


def fill(buffer: AdmissionBuffer) -> list[int]:
    ids = []
    while buffer.can_admit():
        ids.append(buffer.admit())
    return ids


def test_slots_come_back_with_the_weights_and_not_before():
    buffer: AdmissionBuffer[str] = AdmissionBuffer(2, 1)
    assert fill(buffer) == [0, 1, 2, 3]
    for group_id in range(4):
        buffer.finish(group_id, f"item {group_id}", 0)
    assert not buffer.can_admit()
    assert buffer.take() == [(0, "item 0"), (1, "item 1")]
    assert not buffer.can_admit()
    buffer.published(1)
    assert fill(buffer) == [4, 5]
    assert buffer.counts.trained == 2


def test_on_policy_takes_strictly_in_order():
    buffer: AdmissionBuffer[int] = AdmissionBuffer(3, 0)
    assert fill(buffer) == [0, 1, 2]
    buffer.finish(2, 2, 0)
    buffer.finish(1, 1, 0)
    assert not buffer.ready()
    assert buffer.blocking() == (0,)
    buffer.finish(0, 0, 0)
    assert buffer.take() == [(0, 0), (1, 1), (2, 2)]
    assert buffer.staleness_histogram == {0: 3}


def test_a_slow_group_is_passed_over_and_still_trained_in_time():
    buffer: AdmissionBuffer[int] = AdmissionBuffer(4, 1, look_ahead=1)
    assert fill(buffer) == list(range(7))
    for group_id in range(1, 7):
        buffer.finish(group_id, group_id, 0)
    assert [group_id for group_id, _ in buffer.take()] == [1, 2, 3, 4]
    buffer.published(1)
    assert fill(buffer) == list(range(7, 11))
    for group_id in range(7, 11):
        buffer.finish(group_id, group_id, 1)
    assert not buffer.ready(), "group 0 may not be passed over again: it would be too old"
    assert buffer.blocking() == (0,)
    buffer.finish(0, 0, 0)
    assert [group_id for group_id, _ in buffer.take()] == [0, 5, 6, 7]
    assert buffer.staleness_histogram == {0: 5, 1: 3}


def test_the_window_is_small():
    buffer: AdmissionBuffer[int] = AdmissionBuffer(2, 2, look_ahead=1)
    assert fill(buffer) == list(range(5))
    for group_id in (2, 3, 4):
        buffer.finish(group_id, group_id, 0)
    assert not buffer.ready(), "two slow groups, one may be passed over"
    buffer.finish(1, 1, 0)
    assert [group_id for group_id, _ in buffer.take()] == [1, 2]


def test_discarded_groups_are_replaced_and_counted_by_reason():
    buffer: AdmissionBuffer[int] = AdmissionBuffer(2, 0)
    fill(buffer)
    buffer.finish(0, 0, 0)
    buffer.discard(0, "reward failed")
    buffer.discard(1, "engine died")
    assert fill(buffer) == [2, 3]
    assert buffer.discard_reasons == {"reward failed": 1, "engine died": 1}
    assert (buffer.counts.admitted, buffer.counts.discarded, buffer.counts.finished) == (4, 2, 1)


def test_a_group_beyond_the_bound_is_an_error_and_nothing_is_taken():
    buffer: AdmissionBuffer[int] = AdmissionBuffer(1, 0)
    buffer.finish(buffer.admit(), 0, 0)
    buffer.take()
    buffer.published(1)
    buffer.finish(buffer.admit(), 1, 0)
    with pytest.raises(StalenessError, match=r"group 1: oldest token of version 0, learner at 1"):
        buffer.take()
    buffer.discard(1, "stale engine")
    buffer.finish(buffer.admit(), 2, 1)
    assert buffer.take() == [(2, 2)]


def test_misuse_is_caught():
    buffer: AdmissionBuffer[int] = AdmissionBuffer(1, 0)
    group_id = buffer.admit()
    with pytest.raises(AssertionError, match="no slot"):
        buffer.admit()
    with pytest.raises(AssertionError, match=r"waiting for groups \(0,\)"):
        buffer.take()
    buffer.finish(group_id, 0, 0)
    with pytest.raises(AssertionError, match="twice"):
        buffer.finish(group_id, 0, 0)
    with pytest.raises(AssertionError, match="not waiting"):
        buffer.discard(7, "never there")
    with pytest.raises(AssertionError, match="published"):
        buffer.published(1)


@pytest.mark.parametrize(
    ("arguments", "name"), [((0, 1), "groups_per_step"), ((1, -1), "max_staleness"), ((2, 1, 3), "look_ahead")]
)
def test_rejects_nonsense(arguments, name):
    with pytest.raises(ValueError, match=name):
        AdmissionBuffer(*arguments)


def test_state_between_take_and_published_needs_the_completed_steps():
    buffer: AdmissionBuffer[int] = AdmissionBuffer(1, 1)
    for group_id in fill(buffer):
        buffer.finish(group_id, group_id, 0)
    buffer.take()
    with pytest.raises(AssertionError, match="completed_steps"):
        buffer.state_dict()
    before, after = buffer.state_dict(0), buffer.state_dict(1)
    assert (before["pending"], before["trained"], before["staleness_histogram"]) == ([0, 1], 0, {})
    assert (after["pending"], after["trained"], after["staleness_histogram"]) == ([1], 1, {"0": 1})


def test_resume_repeats_nothing_and_loses_nothing():
    buffer: AdmissionBuffer[int] = AdmissionBuffer(2, 1)
    for group_id in fill(buffer):
        buffer.finish(group_id, group_id, 0)
    buffer.take()
    buffer.published(1)
    fill(buffer)
    buffer.discard(5, "engine died")
    state = json.loads(json.dumps(buffer.state_dict()))
    resumed: AdmissionBuffer[int] = AdmissionBuffer(2, 1)
    assert resumed.load_state_dict(state) == (2, 3, 4)
    assert resumed.version == resumed.steps_taken == 1
    assert resumed.admit() == 6, "ids go on"
    assert not resumed.can_admit()
    for group_id in (2, 3, 4, 6):
        resumed.finish(group_id, group_id, 1)
    assert [group_id for group_id, _ in resumed.take()] == [2, 3]
    assert resumed.counts.finished == 6
    assert resumed.staleness_histogram == {0: 4}


class Simulation:
    """A run whose events come in an order drawn by hypothesis; checks every invariant as it goes."""

    def __init__(self, data: st.DataObject) -> None:
        self.data = data
        self.num_groups = data.draw(st.integers(1, 5), "groups_per_step")
        self.widest = 0
        self.buffer = self.new()
        self.oldest: dict[int, int] = {}
        self.held_back: list[int] = []
        self.running: dict[int, int] = {}
        self.trained: list[int] = []
        self.waiting: set[int] = set()
        self.discarded: set[int] = set()
        self.discarded_finished = 0
        self.steps: dict[int, list[int]] = {}
        self.resumes = 0

    def new(self) -> AdmissionBuffer[str]:
        """With a bound of its own: a run may go on under another."""
        self.bound = self.data.draw(st.integers(0, 3), "max_staleness")
        self.widest = max(self.widest, self.bound)
        self.look_ahead = self.data.draw(st.integers(0, self.bound * self.num_groups), "look_ahead")
        return AdmissionBuffer(self.num_groups, self.bound, self.look_ahead)

    def admit(self) -> None:
        self.running[self.buffer.admit()] = self.buffer.version

    def end_one(self) -> None:
        """Any running group, not the oldest, finishes or fails; its oldest token may be newer than its admission."""
        group_id = self.data.draw(st.sampled_from(sorted(self.running)), "which")
        admitted_at = self.running.pop(group_id)
        if self.data.draw(st.integers(0, 5), "fails") == 0:
            self.buffer.discard(group_id, "drawn")
            self.discarded.add(group_id)
        else:
            self.oldest[group_id] = self.data.draw(st.integers(admitted_at, self.buffer.version), "oldest")
            self.buffer.finish(group_id, f"item {group_id}", self.oldest[group_id])
            self.waiting.add(group_id)

    def discard_finished(self) -> None:
        """A finished group is found to be of no use."""
        group_id = self.data.draw(st.sampled_from(sorted(self.waiting)), "which")
        self.waiting.remove(group_id)
        self.buffer.discard(group_id, "drawn")
        self.discarded.add(group_id)
        self.discarded_finished += 1

    def take(self) -> None:
        taken = self.buffer.take()
        assert len(taken) == self.num_groups
        assert all(item == f"item {group_id}" for group_id, item in taken)
        ids = [group_id for group_id, _ in taken]
        assert ids == sorted(ids)
        self.steps[self.buffer.steps_taken - 1] = ids
        self.trained.extend(ids)
        self.waiting.difference_update(ids)

    def publish(self) -> None:
        self.buffer.published(self.data.draw(st.integers(self.buffer.version + 1, self.buffer.steps_taken), "version"))

    def resume(self) -> None:
        self.resumes += 1
        completed = self.data.draw(st.integers(self.buffer.version, self.buffer.steps_taken), "completed")
        state = json.loads(json.dumps(self.buffer.state_dict(completed)))
        for step in [s for s in self.steps if s >= completed]:
            undone = self.steps.pop(step)
            self.trained = [group_id for group_id in self.trained if group_id not in undone]
        self.buffer, waiting = self.new(), self.waiting
        self.running, self.waiting, self.held_back = {}, set(), []
        for group_id in self.buffer.load_state_dict(state):
            if group_id in waiting and self.buffer.can_restore(group_id, self.oldest[group_id]):
                self.buffer.finish(group_id, f"item {group_id}", self.oldest[group_id])
                self.waiting.add(group_id)
            else:
                self.held_back.append(group_id)

    def begin_again(self) -> None:
        group_id = self.held_back.pop(0)
        self.buffer.begin(group_id)
        self.running[group_id] = self.buffer.version

    def events(self) -> list:
        """What can happen now; without the resume, one of these is always possible."""
        possible = []
        if self.buffer.can_admit():
            possible.append(self.admit)
        if self.held_back and self.buffer.can_begin(self.held_back[0]):
            possible.append(self.begin_again)
        if self.running:
            possible.append(self.end_one)
        if self.buffer.ready():
            possible.append(self.take)
        if self.buffer.steps_taken > self.buffer.version:
            possible.append(self.publish)
        assert possible, f"deadlock: {self.buffer.counts}, blocked by {self.buffer.blocking()}"
        if self.waiting and self.discarded_finished < 3:
            possible.append(self.discard_finished)
        return possible if self.resumes >= 2 else [*possible, self.resume]

    def check(self) -> None:
        buffer = self.buffer
        live = buffer.counts.admitted - buffer.counts.discarded - len(self.held_back)
        assert live <= (buffer.version + self.bound + 1) * self.num_groups
        assert len(self.trained) == len(set(self.trained)) == buffer.steps_taken * self.num_groups
        assert not self.discarded & set(self.trained)
        assert max(buffer.staleness_histogram, default=0) <= self.widest
        assert sum(buffer.staleness_histogram.values()) == len(self.trained)
        assert buffer.counts.trained == buffer.version * self.num_groups
        assert buffer.counts.discarded == len(self.discarded)
        assert buffer.counts.finished == len(self.trained) + len(self.waiting) + self.discarded_finished
        waiting = {*buffer.state_dict(buffer.steps_taken)["pending"]}
        assert waiting == self.running.keys() | self.waiting | {*self.held_back}
        everything = waiting | set(self.trained) | self.discarded
        assert everything == set(range(len(everything))), "a group was lost"
        assert len(everything) == buffer.counts.admitted


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_any_order_of_events(data):
    run = Simulation(data)
    for _ in range(data.draw(st.integers(10, 70), "events")):
        data.draw(st.sampled_from(run.events()), "event")()
        run.check()


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 6),
    st.integers(0, 3),
    st.floats(0, 1),
    st.lists(st.integers(1, 20), min_size=8, max_size=8),
    st.data(),
)
def test_slow_groups_and_prompt_publishing_never_stall_for_ever(num_groups, bound, share, delays, data):
    """Time passes; groups take drawn delays; the learner takes as soon as it can. Twelve steps must come to pass."""
    buffer: AdmissionBuffer[int] = AdmissionBuffer(num_groups, bound, int(share * bound * num_groups))
    training = data.draw(st.integers(1, 10), "training")
    ends: dict[int, tuple[int, int]] = {}
    done_at = None
    for now in range(12 * (20 + training) + 40):
        while buffer.can_admit():
            group_id = buffer.admit()
            ends[group_id] = (now + delays[group_id % len(delays)], buffer.version)
        for group_id in [g for g, (end, _) in ends.items() if end <= now]:
            buffer.finish(group_id, group_id, ends.pop(group_id)[1])
        if done_at is not None and now >= done_at:
            buffer.published(buffer.steps_taken)
            done_at = None
        if done_at is None and buffer.ready():
            buffer.take()
            done_at = now + training
    assert buffer.steps_taken >= 12
    assert max(buffer.staleness_histogram) <= bound
