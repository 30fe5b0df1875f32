"""Causes of slowness in the network, found from the time that transfers take after both ends are there.

Legend: O operations of a lane, S steps, D replicas (dp), P stages. A link is (stage, stage, replica), the lesser stage first.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from trainrt.diagnostics.replay.causes import LASTING, Numbers, Suspicion, listed
from trainrt.diagnostics.replay.replay import Replay
from trainrt.diagnostics.replay.trace import BACKWARD_RECV, BACKWARD_SEND, GATHER, SCATTER, SEPARATE

SLOW_LINK = 2.0
"""From what ratio to the usual time of a transfer a link is suspected."""

Link = tuple[int, int, int]
Worker = tuple[int, int]


def causes_in_network(replay: Replay) -> list[Suspicion]:
    """What the trace gives reason to suspect of links."""
    collectives = slow_collectives(replay)
    return [*slow_transfers(replay), *([collectives] if collectives else [])]


def slow_transfers(replay: Replay) -> list[Suspicion]:
    """Links between stages that take longer than others: all those of one worker (its NIC), or single ones."""
    links, every, usual, lasting = _slow_links(replay)
    nics = _nics(links, every)
    taken = {link for own in nics.values() for link in own}
    single = [link for link in links if link not in taken]
    found = []
    if nics:
        named = ", ".join(str(replay.lanes.ranks[worker]) for worker in [*nics][:4])
        found.append(
            _of_links(replay, "slow_nic", "rank", [*nics], {link: links[link] for link in taken}, usual, lasting, named)
        )
    if single:
        ends = list(dict.fromkeys((stage, replica) for low, high, replica in single for stage in (low, high)))
        named = ", ".join(
            f"{replay.lanes.ranks[low, replica]} and {replay.lanes.ranks[high, replica]}"
            for low, high, replica in single[:4]
        )
        found.append(
            _of_links(replay, "slow_link", "link", ends, {link: links[link] for link in single}, usual, lasting, named)
        )
    return found


def _slow_links(replay: Replay) -> tuple[dict[Link, float], set[tuple[int, int]], float, float]:
    """(seconds of a transfer on each slow link, all pairs of stages with links, usual seconds, share of steps it shows in)."""
    lanes, joins = replay.lanes, replay.dependencies.joins
    moving = np.flatnonzero(joins[:, 0] >= 0)
    backward = lanes.is_type(BACKWARD_SEND, BACKWARD_RECV)[moving]
    places, which = np.unique(np.column_stack([joins[moving], backward]), axis=0, return_inverse=True)
    if len(places) * lanes.replicas < 3:
        return {}, set(), 0.0, 0.0
    by_step = np.stack(
        [np.median(replay.traced[moving[which.reshape(-1) == one]], axis=0) for one in range(len(places))]
    )
    spent = np.median(by_step, axis=1)
    usual = max(float(np.median(spent)), 1e-12)
    lasting = (by_step > (1 + SLOW_LINK) / 2 * usual).mean(axis=1)
    slow = (spent >= SLOW_LINK * usual) & (lasting >= LASTING)
    links: dict[Link, float] = {}
    for place, replica in np.argwhere(slow).tolist():
        link = int(places[place, 0]), int(places[place, 1]), replica
        links[link] = max(links.get(link, 0.0), float(spent[place, replica]))
    every = {(int(low), int(high)) for low, high, _ in places.tolist()}
    return links, every, usual, float(lasting[slow].min()) if links else 0.0


def _nics(links: dict[Link, float], every: set[tuple[int, int]]) -> dict[Worker, list[Link]]:
    """Workers with two links or more, all of them slow, whose neighbours have others that are not."""
    found = {}
    for stage, replica in sorted({(end, replica) for low, high, replica in links for end in (low, high)}):
        own = [(low, high, replica) for low, high in every if stage in (low, high)]
        near = {low + high - stage for low, high, _ in own}
        rest = [(low, high, replica) for low, high in every if stage not in (low, high) and near & {low, high}]
        if len(own) > 1 and all(link in links for link in own) and rest and not any(link in links for link in rest):
            found[stage, replica] = own
    return found


def _of_links(
    replay: Replay, cause: str, kind: str, workers: list[Worker], links: dict[Link, float], usual: float, lasting: float,
    named: str,
) -> Suspicion:  # fmt: skip
    lanes, joins = replay.lanes, replay.dependencies.joins
    chosen = np.zeros((len(lanes.stage), lanes.replicas), dtype=bool)
    for low, high, replica in links:
        chosen[:, replica] |= (joins[:, 0] == low) & (joins[:, 1] == high)
    worst = sorted(links, key=lambda link: -links[link])
    evidence = [
        f"between rank {lanes.ranks[low, replica]} (stage {low}) and rank {lanes.ranks[high, replica]} (stage {high}) a transfer "
        f"takes {links[low, high, replica]:.4g} s after both are there, usual is {usual:.4g} s"
        for low, high, replica in worst[:8]
    ]
    whose = f"of rank {named}" if kind == "rank" else f"between ranks {named}"
    what = f"transfers {whose} take up to {links[worst[0]] / usual:.1f}x as long as usual"
    return Suspicion(cause, kind, "check_network", workers, _to_ideal(replay, chosen), lasting, what, evidence)


def slow_collectives(replay: Replay) -> Suspicion | None:
    """Stages whose replicas take longer to exchange, after the last has come, than those of other stages."""
    lanes = replay.lanes
    moves = lanes.is_type(GATHER, SCATTER, SEPARATE)
    number = np.bincount(lanes.stage[moves], minlength=lanes.stages)
    if lanes.stages < 2 or lanes.replicas < 2 or not number[0] or (number != number[0]).any():
        return None
    by_step = np.zeros((lanes.stages, len(lanes.steps)))
    np.add.at(by_step, lanes.stage[moves], np.median(replay.traced[moves], axis=2))
    others = by_step[::-1] if lanes.stages == 2 else np.median(by_step, axis=0, keepdims=True)
    ratio = np.median(by_step / np.maximum(others, 1e-12), axis=1)
    worst = int(np.argmax(ratio))
    lasting = float((by_step >= (1 + SLOW_LINK) / 2 * others)[worst].mean())
    if ratio[worst] < SLOW_LINK or lasting < LASTING:
        return None
    chosen = np.repeat((moves & (lanes.stage == worst))[:, None], lanes.replicas, axis=1)
    return Suspicion(
        "slow_link", "link", "check_network", [(worst, replica) for replica in range(lanes.replicas)], _to_ideal(replay, chosen),
        lasting, f"the replicas of stage {worst} exchange parameters and gradients {ratio[worst]:.1f}x as long as other stages'",
        [f"seconds of exchange in a step after the last arrival, by stage: {listed(np.median(by_step, axis=1))}"],
    )  # fmt: skip


def _to_ideal(replay: Replay, chosen: NDArray[np.bool_]) -> Numbers:
    """Factors that make what is chosen, (O, D), ideal where it takes longer."""
    ideal = np.minimum(replay.ideal[:, None, None] / np.maximum(replay.traced, 1e-12), 1.0)
    return np.where(chosen[:, None, :], ideal, 1.0)
