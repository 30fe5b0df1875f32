"""Hangs by matching collectives: generated programs, one fault in each, and the finding names it; clean ones have none.

Programs run on a small machine that blocks as collectives do: a call ends when all members of its group have entered it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from trainrt.diagnostics.hang import Finding, find, sentence, verdict_of
from trainrt.parallel.calls import Call, Calls, Membership

KINDS = ("all_reduce", "all_gather", "broadcast", "reduce_scatter", "all_to_all")
DTYPES = ("float32", "float64", "int64")


@dataclass(frozen=True)
class Step:
    """A line of a program: who calls what."""

    group: str
    kind: str
    shapes: str
    dtypes: str
    line: int


@dataclass(frozen=True)
class Scene:
    """Groups by name, and what each rank runs."""

    groups: dict[str, tuple[int, ...]]
    programs: tuple[tuple[Step, ...], ...]

    def run(self, order: Sequence[int], *, mismatches_pass: bool = True, window: int = 512) -> dict[int, Calls]:
        """Let ranks take turns until nobody can go on (or the turns are used up); what their logs say then."""
        ranks = range(len(self.programs))
        at, entered = dict.fromkeys(ranks, 0), {(rank, name): 0 for rank in ranks for name in self.groups}
        logs: dict[int, list[Call]] = {rank: [] for rank in ranks}
        made: dict[tuple[str, int], dict[int, Step]] = {}
        inside: dict[int, tuple[str, int]] = {}

        def free(name: str, number: int) -> bool:
            steps = made[name, number]
            alike = len({(step.kind, step.shapes, step.dtypes) for step in steps.values()}) == 1
            return set(steps) == set(self.groups[name]) and (alike or mismatches_pass)

        for clock, rank in enumerate(order):
            if rank in inside:
                if not free(*inside[rank]):
                    continue
                logs[rank][-1] = replace(logs[rank][-1], state="left")
                del inside[rank]
            elif at[rank] < len(self.programs[rank]):
                step = self.programs[rank][at[rank]]
                at[rank] += 1
                entered[rank, step.group] += 1
                number = entered[rank, step.group]
                made.setdefault((step.group, number), {})[rank] = step
                inside[rank] = step.group, number
                site = f"/x/mine.py:{step.line} loss"
                logs[rank].append(
                    Call(
                        step.group,
                        number,
                        step.kind,
                        "",
                        step.shapes,
                        step.dtypes,
                        "waiting",
                        1000.0 + clock,
                        site,
                        len(logs[rank]) + 1,
                    )
                )
        return {
            rank: Calls(
                1,
                {name: Membership(name, f"axis-{name}", members, entered[rank, name])
                 for name, members in self.groups.items() if rank in members and entered[rank, name]},
                logs[rank][-window:],
            )
            for rank in ranks
        }  # fmt: skip

    def with_program(self, rank: int, program: Sequence[Step]) -> Scene:
        return Scene(self.groups, (*self.programs[:rank], tuple(program), *self.programs[rank + 1 :]))

    def places_of(self, rank: int) -> list[int]:
        return [index for index, _ in enumerate(self.programs[rank])]


@st.composite
def scenes(draw: st.DrawFn, *, repeats: int = 1) -> Scene:
    """A clean program: every rank runs the steps of its groups in the order of one list."""
    ranks = draw(st.integers(2, 6))
    groups = {"world": tuple(range(ranks))}
    for number in range(draw(st.integers(0, 4))):
        members = draw(st.sets(st.integers(0, ranks - 1), min_size=2, max_size=ranks))
        groups[f"g{number}"] = tuple(sorted(members))
    lines = draw(st.lists(
        st.tuples(st.sampled_from(sorted(groups)), st.sampled_from(KINDS), st.sampled_from(("4", "4x3", "2*8")),
                  st.sampled_from(DTYPES)), min_size=2, max_size=8,
    ))  # fmt: skip
    steps = [Step(*what, line=10 + number) for number, what in enumerate(lines)] * repeats
    return Scene(groups, tuple(tuple(s for s in steps if rank in groups[s.group]) for rank in range(ranks)))


def turns(scene: Scene, data: st.DataObject) -> list[int]:
    """An order of turns in which everybody goes as far as it can."""
    ranks = len(scene.programs)
    some = data.draw(st.lists(st.integers(0, ranks - 1), max_size=60))
    longest = max(map(len, scene.programs))
    return some + list(range(ranks)) * (2 * ranks * (longest + 2))


def faulty(scene: Scene, data: st.DataObject) -> tuple[int, int]:
    """A rank and a place of its program."""
    rank = data.draw(st.sampled_from([rank for rank, steps in enumerate(scene.programs) if steps]))
    return rank, data.draw(st.sampled_from(scene.places_of(rank)))


@given(scenes(repeats=2), st.data())
def test_a_clean_program_stopped_anywhere_has_no_mismatch_and_no_deadlock(scene: Scene, data: st.DataObject) -> None:
    order = data.draw(st.lists(st.integers(0, len(scene.programs) - 1), max_size=120))
    found = find(scene.run(order, window=data.draw(st.sampled_from((3, 512)))))
    assert found is None or found.kind == "missing"


@given(scenes(repeats=2), st.data())
def test_a_clean_program_that_ran_to_its_end_has_nothing(scene: Scene, data: st.DataObject) -> None:
    assert find(scene.run(turns(scene, data))) is None


@given(scenes(repeats=2), st.data())
def test_a_rank_that_stays_away_is_missing_from_the_first_call_it_did_not_make(
    scene: Scene, data: st.DataObject
) -> None:
    rank, place = faulty(scene, data)
    awaited = scene.programs[rank][place]
    broken = scene.with_program(rank, scene.programs[rank][:place])
    found = find(broken.run(turns(scene, data)))
    assert found is not None and (found.kind, found.culprits) == ("missing", (rank,))
    # Of several groups that miss it, the one that waits longest.
    later = set(scene.programs[rank][place:])
    call = found.made[0].call
    assert any((call.kind, call.shapes, call.site) == (s.kind, s.shapes, f"/x/mine.py:{s.line} loss") for s in later)
    assert awaited in later and rank not in found.victims and found.made[0].rank in found.victims


@given(scenes(repeats=2), st.data(), st.sampled_from(("kind", "shapes", "dtypes")), st.booleans())
def test_a_call_that_differs_is_named_with_both_sites(
    scene: Scene, data: st.DataObject, what: str, mismatches_pass: bool
) -> None:
    rank, place = faulty(scene, data)
    right = scene.programs[rank][place]
    other = {"kind": "barrier", "shapes": "5", "dtypes": "uint8"}[what]
    wrong = replace(right, line=99, **{what: other})
    program = (*scene.programs[rank][:place], wrong, *scene.programs[rank][place + 1 :])
    found = find(scene.with_program(rank, program).run(turns(scene, data), mismatches_pass=mismatches_pass))
    assert found is not None and found.kind == "mismatch" and found.left_out is None
    assert rank in found.culprits and (len(scene.groups[right.group]) == 2 or found.culprits == (rank,))
    assert {made.call.place for made in found.made} == {f"loss (mine.py:{right.line})", "loss (mine.py:99)"}


@given(scenes(repeats=1), st.data())
def test_groups_taken_in_opposite_order_are_a_deadlock_traced_to_the_first(scene: Scene, data: st.DataObject) -> None:
    ranks = len(scene.programs)
    assume(ranks > 1)
    groups = {**scene.groups, "a": (0, 1), "b": (0, 1)}
    a, b = Step("a", "all_reduce", "4", "float32", 50), Step("b", "all_gather", "4", "float32", 51)
    history = data.draw(st.booleans())
    before = [(a, b) if history else () for _ in range(ranks)]
    programs = [(*(before[rank] if rank < 2 else ()), *scene.programs[rank]) for rank in range(ranks)]
    programs[0], programs[1] = (*programs[0], a, b), (*programs[1], b, a)
    found = find(Scene(groups, tuple(programs)).run(turns(scene, data) * 2))
    assert found is not None and found.kind == "deadlock"
    assert {made.group for made in found.made} == {"axis-a", "axis-b"} and {made.awaits for made in found.made} == {
        0,
        1,
    }
    first, second = found.made
    assert first.call.entered < second.call.entered
    assert set(found.culprits) <= {0, 1} and found.culprits


@given(scenes(repeats=3), st.data())
def test_a_left_out_call_is_told_from_what_the_rank_did_before(scene: Scene, data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, len(scene.programs) - 1))
    program = scene.programs[rank]
    assume(len(program) >= 6)
    length = len(program) // 3
    place = data.draw(st.integers(length, 2 * length - 1))
    after = next((step for step in program[place + 1 :] if step.group == program[place].group), None)
    assume(after is not None and (after.kind, after.shapes, after.dtypes) !=
           (program[place].kind, program[place].shapes, program[place].dtypes))  # fmt: skip
    broken = scene.with_program(rank, (*program[:place], *program[place + 1 :]))
    logs = broken.run(turns(scene, data) * 2, mismatches_pass=False)
    found = find(logs)
    assert found is not None
    made = {call.site for call in logs[rank].calls[place:]}
    if f"/x/mine.py:{after.line} loss" not in made:
        return
    if found.kind == "mismatch" and found.made[0].group == f"axis-{after.group}":
        assert rank in found.culprits
        if len(scene.groups[after.group]) > 2:
            assert found.culprits == (rank,)
        if found.left_out is not None:
            assert found.culprits == (rank,) and found.left_out.site == f"/x/mine.py:{program[place].line} loss"


# By hand.


def call(group: str, number: int, kind: str = "all_reduce", **fields: Any) -> Call:
    values = {"detail": "", "shapes": "4", "dtypes": "float32", "state": "left", "entered": 1000.0 + number,
              "site": "/x/mine.py:10 loss", "order": number, **fields}  # fmt: skip
    return Call(group, number, kind, **values)


def log(calls: Sequence[Call], **groups: tuple[int, ...]) -> Calls:
    entered = {name: max([c.number for c in calls if c.group == name and c.collective], default=0) for name in groups}
    return Calls(1, {name: Membership(name, name, of, entered[name]) for name, of in groups.items()}, calls)


def must(found: Finding | None) -> Finding:
    assert found is not None
    return found


def test_a_chain_is_followed_to_the_rank_that_waits_for_nobody() -> None:
    one = log([call("a", 1, state="waiting", entered=2.0)], a=(0, 1))
    two = log([call("b", 1, state="waiting", entered=1.5)], a=(0, 1), b=(1, 2))
    three = log([], b=(1, 2))
    found = must(find({0: one, 1: two, 2: three}))
    assert (found.kind, found.culprits, found.victims, found.made[0].group) == ("missing", (2,), (0, 1), "b")
    verdict = verdict_of(found, hosts={2: "n1"}, places={2: "sleep (x.py:1)"})
    assert (verdict.cause, verdict.action, verdict.kind) == ("hang", "evict", "rank")
    assert verdict.sentence == (
        "rank 2 (n1) missing from all_reduce(float32 4), call 1 of group b, where rank 1 waits at loss (mine.py:10); "
        "rank 2 is in sleep (x.py:1)"
    )


def test_a_rank_whose_message_is_on_its_way_is_missing_and_its_wait_is_said() -> None:
    sent = call("a", 1, "send", detail="to 1")
    waiting = log([sent, call("a", 1, state="waiting", order=2)], a=(0, 1))
    receiving = log([call("a", 1, "recv", detail="from 0", state="waiting", site="/x/mine.py:20 wrong")], a=(0, 1))
    found = must(find({0: waiting, 1: receiving}))
    assert (found.kind, found.culprits) == ("missing", (1,))
    assert "rank 1 is in recv(from 0, float32 4) at wrong (mine.py:20)" in sentence(found, hosts={}, places={})
    assert verdict_of(found, hosts={}).action == "none", "another machine would do the same"


def test_a_message_that_nobody_sends_and_a_collective_are_a_deadlock_of_the_one_who_strayed() -> None:
    usual = [call("a", 1, "barrier"), call("a", 2, order=2), call("a", 3, "barrier", order=3)]
    waiting = log([*usual, call("a", 4, state="waiting", order=4)], a=(4, 7))
    receiving = log([*usual, call("a", 1, "recv", detail="from 0", state="waiting", site="/x/mine.py:20 wrong", order=4,
                                  entered=1001.0)], a=(4, 7))  # fmt: skip
    found = must(find({4: waiting, 7: receiving}))
    assert (found.kind, found.culprits) == ("deadlock", (7,))
    assert [(made.rank, made.awaits) for made in found.made] == [(7, 4), (4, 7)]
    assert "rank 7 made another call here before" in sentence(found, hosts={}, places={})


def test_sends_that_wait_for_each_other_are_a_deadlock() -> None:
    logs = {rank: log([call("a", 1, "send", detail=f"to {1 - rank}", state="waiting")], a=(0, 1)) for rank in (0, 1)}
    assert must(find(logs)).kind == "deadlock"


def test_a_call_that_failed_long_ago_is_nothing_that_a_rank_waits_in() -> None:
    refused = call("a", 1, "all_reduce", state="failed")
    logs = {0: log([refused, call("a", 2, order=2)], a=(0, 1)), 1: log([refused], a=(0, 1))}
    assert must(find(logs)).culprits == (1,)
    assert (
        find({0: log([refused, call("a", 2, order=2)], a=(0, 1)), 1: log([refused, call("a", 2, order=2)], a=(0, 1))})
        is None
    )


def test_queued_calls_of_an_accelerator_count_where_nobody_waits_in_one() -> None:
    ahead = log([call("a", n, state="left") for n in range(1, 9)], a=(0, 1, 2))
    behind = log([call("a", n, state="left") for n in range(1, 4)], a=(0, 1, 2))
    found = must(find({0: ahead, 1: behind, 2: ahead}))
    assert (found.kind, found.culprits, found.made[0].call.number) == ("missing", (1,), 4)


def test_an_extra_call_of_the_same_size_is_blamed_on_who_parted_from_the_others() -> None:
    def calls(*lines: int, last: str = "left") -> Calls:
        made = [call("a", n, site=f"/x/mine.py:{line} loss", order=n) for n, line in enumerate(lines, 1)]
        made[-1] = replace(made[-1], state=last)
        return log(made, a=(0, 1, 2))

    found = must(find({0: calls(1, 2, 3), 1: calls(1, 9, 2, 3, last="waiting"), 2: calls(1, 2, 3)}))
    assert found.culprits == (1,) and "rank 1 at loss (mine.py:9), most others at loss (mine.py:2)" in found.notes[0]


def test_sites_that_always_differ_mean_nothing() -> None:
    def calls(line: int, count: int, state: str) -> Calls:
        made = [call("a", n, site=f"/x/mine.py:{line} loss") for n in range(1, count + 1)]
        return log([*made[:-1], replace(made[-1], state=state)], a=(0, 1, 2))

    found = must(find({0: calls(1, 4, "left"), 1: calls(2, 5, "waiting"), 2: calls(2, 5, "waiting")}))
    assert (found.culprits, found.notes) == ((0,), ())


@pytest.mark.parametrize(("shapes", "differs"), [("4x3", False), ("12", False), ("3x4", False), ("13", True)])
def test_only_sizes_are_compared_before_anything_else_is_known(shapes: str, differs: bool) -> None:
    logs = {0: log([call("a", 1, shapes="4x3", state="waiting")], a=(0, 1, 2)),
            1: log([call("a", 1, shapes=shapes, state="waiting")], a=(0, 1, 2)), 2: log([], a=(0, 1, 2))}  # fmt: skip
    assert must(find(logs)).kind == ("mismatch" if differs else "missing")


def test_uneven_exchanges_may_have_any_size() -> None:
    logs = {0: log([call("a", 1, "all_to_all", detail="from 1 2 to 3 4", shapes="7")], a=(0, 1)),
            1: log([call("a", 1, "all_to_all", detail="from 4 0 to 2 0", shapes="2")], a=(0, 1))}  # fmt: skip
    assert find(logs) is None


def test_ranks_whose_log_is_not_there_are_not_accused() -> None:
    assert find({0: log([call("a", 1, state="waiting")], a=(0, 1))}) is None
    assert find({}) is None


def test_a_call_that_all_are_in_says_nothing() -> None:
    logs = {rank: log([call("a", 1, state="waiting")], a=(0, 1, 2)) for rank in range(3)}
    assert find(logs) is None


def test_the_same_name_twice_is_two_groups() -> None:
    logs = {0: log([call("a", 1, "barrier")], a=(0, 1)), 1: log([call("a", 1, "barrier")], a=(0, 1)),
            2: log([call("a", 1)], a=(2, 3)), 3: log([call("a", 1)], a=(2, 3))}  # fmt: skip
    assert find(logs) is None


def test_a_mismatch_is_a_verdict_about_the_code() -> None:
    logs = {rank: log([call("a", 1, "all_gather" if rank == 1 else "all_reduce", site=f"/x/mine.py:{rank} f")], a=(0, 1, 2))
            for rank in range(3)}  # fmt: skip
    verdict = verdict_of(must(find(logs)), hosts={0: "n0", 1: "n1", 2: "n1"}, since_step=7)
    assert (verdict.cause, verdict.kind, verdict.action) == ("mismatched_collective", "code", "none")
    assert [(one.rank, one.host) for one in verdict.culprits] == [(1, "n1")] and verdict.victims == [0, 2]
    assert "rank 0 calls all_reduce(float32 4) at f (mine.py:0)" in verdict.sentence
    assert any("/x/mine.py:1 f" in line for line in verdict.evidence)
