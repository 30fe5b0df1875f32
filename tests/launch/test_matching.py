"""Calls beside stacks and symptoms: when they are asked for, and what they change of a hang and of a fault."""

from __future__ import annotations

import signal
from collections.abc import Sequence

from tests.launch.test_stacks import COMPUTE, GATHER, Scene
from trainrt.launch.hangs import Ask, Verdict
from trainrt.launch.matching import calls_of, diagnosis, may_be_mismatched, mismatch, signature
from trainrt.launch.stacks import Stack
from trainrt.launch.symptoms import Error, Exit, Hang, Mismatch, Symptoms
from trainrt.parallel.calls import Call, Calls, Membership

SEATS = {0: "n0", 1: "n0", 2: "n1"}


def log(kind: str, number: int, state: str, *, line: int, incarnation: int = 3) -> Calls:
    call = Call("0", number, kind, "", "4", "float32", state, 1000.0, f"/x/mine.py:{line} loss", number)
    return Calls(incarnation, {"0": Membership("0", "world", (0, 1, 2), number)}, [call])


def hang(scene: Scene, stacks: Sequence[Stack], calls: dict[int, Calls]) -> Verdict:
    scene.come_up()
    scene.steps(20, 0.1)
    asked = scene.go(3.0)
    assert isinstance(asked, Ask)
    scene.watch.stacks(asked.number, dict(enumerate(stacks)), calls)
    found = scene.go(3.0)
    assert isinstance(found, Verdict)
    return found


def test_where_all_stacks_are_alike_the_calls_tell_who_differs() -> None:
    calls = {rank: log("all_reduce" if rank else "all_gather", 7, "waiting", line=rank + 1) for rank in range(3)}
    found = hang(Scene(3), [GATHER, GATHER, GATHER], calls)
    assert found.hang.ranks == (0,) and found.matched is not None
    assert "call 7 of group world differs: rank 1 calls all_reduce(float32 4) at loss (mine.py:2)" in found.hang.message
    verdict = found.verdict({0: "n0"}, step=9)
    assert (verdict.cause, verdict.since_step) == ("mismatched_collective", 9)
    document = diagnosis(verdict).to_json()
    assert document["state"] == "hung" and document["verdicts"][0]["culprits"][0]["host"] == "n0"


def test_without_calls_and_where_they_say_nothing_the_stacks_decide() -> None:
    for calls in ({}, {rank: log("all_reduce", 7, "waiting", line=1) for rank in range(3)}):
        found = hang(Scene(3), [GATHER, COMPUTE, GATHER], calls)
        assert (found.hang.ranks, found.matched) == ((1,), None)
        verdict = found.verdict(SEATS, step=9)
        assert (verdict.cause, verdict.action, list(verdict.victims)) == ("hang", "none", [0, 2])
        assert verdict.sentence == found.hang.message


def test_a_stopped_process_is_the_culprit_whatever_the_calls_say() -> None:
    calls = {rank: log("all_reduce", 7 if rank else 6, "waiting" if rank else "left", line=1) for rank in range(3)}
    found = hang(Scene(3), [Stack("T", COMPUTE.frames), GATHER, GATHER], calls)
    assert found.hang.ranks == (0,) and found.matched is not None and found.hang.signature is None
    assert found.verdict(SEATS, step=1).action == "evict"
    found = hang(Scene(3), [GATHER, Stack("T", GATHER.frames), GATHER], calls)
    assert (found.hang.ranks, found.matched) == ((1,), None)


def test_calls_of_other_incarnations_are_left_out() -> None:
    sent = {
        0: log("all_reduce", 1, "left", line=1).to_json(),
        1: log("barrier", 1, "left", line=1, incarnation=2).to_json(),
    }
    assert set(calls_of(sent, incarnation=3)) == {0}


def test_calls_are_compared_where_a_mismatch_may_have_led_to_the_fault() -> None:
    parked = {0: "Connection closed", 2: "Connection closed"}
    crash = Symptoms(SEATS, exits={1: Exit(-signal.SIGABRT, 0.0)}, parked=parked)
    raised = Symptoms(SEATS, errors={1: Error("user_error", "ValueError: no")}, parked=parked)
    lost = Symptoms(SEATS, parked={**parked, 1: "reset"})
    assert all(map(may_be_mismatched, (crash, raised, lost)))


def test_kills_hangs_and_lost_nodes_are_recovered_from_without_a_look() -> None:
    killed = Symptoms(SEATS, exits={1: Exit(-signal.SIGKILL, 0.0)})
    node = Symptoms(SEATS, exits={2: Exit(-signal.SIGABRT, 0.0)}, nodes={"n1": ("gone", 0.1)})
    hung = Symptoms(SEATS, hang=Hang((1,), "", 3.0, None))
    ended = Symptoms(SEATS, exits={1: Exit(-signal.SIGABRT, 0.0)}, ended_by_us={1})
    diverged = Symptoms(SEATS, errors={1: Error("non_finite", "loss is NaN")})
    assert not any(map(may_be_mismatched, (killed, node, hung, ended, diverged)))


def test_a_mismatch_names_its_ranks_in_the_fault_and_has_a_signature_of_its_own() -> None:
    found = mismatch({rank: log("all_reduce" if rank else "barrier", 7, "failed", line=rank) for rank in range(3)})
    assert found is not None
    said = Mismatch(found.culprits, "calls differ", signature(found))
    exits = {1: Exit(-signal.SIGABRT, 0.0)}
    fault = Symptoms(SEATS, exits=exits, parked={0: "", 2: ""}, mismatch=said).fault()
    assert (fault.kind, fault.ranks, fault.nodes) == ("worker_exit", (0,), ("n0",))
    assert fault.message == "rank 1 (n0) was killed by SIGABRT; calls differ" and fault.signature == signature(found)
    lost = Symptoms(SEATS, parked=dict.fromkeys(SEATS, "reset"), mismatch=said).fault()
    assert (lost.kind, lost.ranks) == ("user_error", (0,))


def test_ranks_that_only_miss_calls_are_no_mismatch() -> None:
    assert mismatch({0: log("all_reduce", 7, "failed", line=1), 1: log("all_reduce", 6, "left", line=1)}) is None
