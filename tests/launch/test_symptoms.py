"""Many symptoms, one fault."""

from __future__ import annotations

from trainrt.launch.symptoms import Error, Exit, Hang, Symptoms

SEATS = {0: "n0", 1: "n0", 2: "n1", 3: "n1"}


def test_every_rank_must_be_accounted_for() -> None:
    symptoms = Symptoms(SEATS)
    symptoms.exits[0] = Exit(-9, 0.0)
    symptoms.parked[1] = "Connection reset by peer"
    assert symptoms.unaccounted() == [2, 3]
    symptoms.nodes["n1"] = ("gone", 1.0)
    assert symptoms.unaccounted() == []


def test_a_rank_whose_end_was_ordered_is_waited_for_though_it_has_parked() -> None:
    symptoms = Symptoms(SEATS, parked=dict.fromkeys(SEATS, "Connection reset by peer"))
    assert symptoms.unaccounted() == []
    symptoms.ended_by_us.add(2)
    assert symptoms.unaccounted() == [2]
    symptoms.exits[2] = Exit(-9, 0.0)
    assert symptoms.unaccounted() == []


def test_a_killed_worker_is_the_cause_and_parked_ones_are_not() -> None:
    symptoms = Symptoms(SEATS, exits={3: Exit(-9, 0.01)}, parked={0: "closed", 1: "closed", 2: "reset"})
    fault = symptoms.fault()
    assert (fault.kind, fault.ranks, fault.nodes) == ("worker_exit", (3,), ("n1",))
    assert "SIGKILL" in fault.message
    assert fault.signature is None, "a SIGKILL comes from outside: it may come again"


def test_a_crash_has_a_signature() -> None:
    crash = Symptoms(SEATS, exits={2: Exit(-11, 0.0)}, parked={0: "", 1: "", 3: ""}).fault()
    again = Symptoms(SEATS, exits={2: Exit(-11, 0.5)}, parked={0: "", 1: "", 3: ""}).fault()
    other = Symptoms(SEATS, exits={1: Exit(-11, 0.0)}, parked={0: "", 2: "", 3: ""}).fault()
    assert crash.signature == again.signature != other.signature


def test_the_loss_of_a_node_is_one_fault_of_all_its_ranks() -> None:
    symptoms = Symptoms(SEATS, exits={2: Exit(-9, 0.0)}, parked={0: "", 1: ""}, nodes={"n1": ("its agent died", 0.2)})
    fault = symptoms.fault()
    assert (fault.kind, fault.ranks, fault.nodes, fault.detected_seconds) == ("node_loss", (2, 3), ("n1",), 0.2)


def test_an_error_names_every_rank_that_has_it_and_its_place() -> None:
    text = 'Traceback\n  File "/x/torch.py", line 3, in forward\n  File "/x/mine.py", line 12, in loss\nValueError: no'
    errors = {rank: Error("user_error", "ValueError: no", text) for rank in (1, 3)}
    fault = Symptoms(SEATS, errors=errors, parked={0: "", 2: ""}).fault()
    assert (fault.kind, fault.ranks) == ("user_error", (1, 3))
    assert fault.message == "ranks 1 (n0), 3 (n1): ValueError: no (mine.py:12 in loss)"


def test_addresses_in_a_message_make_no_difference() -> None:
    first = Symptoms(SEATS, errors={0: Error("user_error", "<object at 0x7f12ab>")}).fault()
    second = Symptoms(SEATS, errors={0: Error("user_error", "<object at 0x7f9900>")}).fault()
    assert first.signature == second.signature


def test_a_rank_that_had_to_be_ended_hung_unless_something_else_explains_it() -> None:
    hung = Symptoms(SEATS, exits={2: Exit(-9, 0.0)}, parked={0: "Timed out", 1: "", 3: ""}, ended_by_us={2})
    assert not hung.explained
    assert (hung.fault().kind, hung.fault().ranks) == ("worker_hang", (2,))
    hung.exits[3] = Exit(-9, 0.0)
    assert hung.explained
    assert (hung.fault().kind, hung.fault().ranks) == ("worker_exit", (3,))


def test_a_hang_that_was_seen_is_the_cause_of_all_that_follows() -> None:
    hang = Hang((2,), "rank 2 (n1) made no progress", 2.8, "worker_hang (2,) loss (mine.py:3)")
    symptoms = Symptoms(SEATS, exits={2: Exit(-9, 0.0)}, errors={0: Error("storage", "gone")}, hang=hang)
    assert symptoms.explained
    fault = symptoms.fault()
    assert (fault.kind, fault.ranks, fault.nodes, fault.detected_seconds) == ("worker_hang", (2,), ("n1",), 2.8)
    assert fault.signature == hang.signature and fault.survivable
    symptoms.nodes["n1"] = ("gone", 1.0)
    assert symptoms.fault().kind == "node_loss", "its node is gone: that is why"


def test_who_is_to_blame_need_not_be_who_says_so() -> None:
    error = Error("silent_corruption", "step 4: rank 2 differs", rollback=True, ranks=(2,))
    fault = Symptoms(SEATS, errors=dict.fromkeys(SEATS, error)).fault()
    assert (fault.ranks, fault.nodes, fault.action, fault.survivable) == ((2,), ("n1",), "rollback", True)
    assert not Symptoms(SEATS, errors={0: Error("non_finite", "loss = nan")}).fault().survivable


def test_when_all_only_lost_each_other_it_was_the_network() -> None:
    assert Symptoms(SEATS, parked=dict.fromkeys(SEATS, "reset")).fault().kind == "network"
