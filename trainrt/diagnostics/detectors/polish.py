"""Median polish (Tukey, Exploratory Data Analysis, 1977, chapter 11): a table as the sum of effects of its dimensions."""

from __future__ import annotations

import numpy as np

from trainrt.diagnostics.table import Numbers, Roles

ROUNDS = 4


def polish(values: Numbers, roles: Roles) -> dict[str, Numbers]:
    """The effect of each index along each axis of the mesh, the overall level added to each.

    values: (R,), logarithms of seconds. So the effect of a stage is that of the stage alone, whatever replicas or members are
    slow in it: up to half of them.
    """
    left = values - np.median(values)
    effects = {axis: np.zeros(int(index.max()) + 1) for axis, index in roles.coordinates.items()}
    for _ in range(ROUNDS):
        for axis, index in roles.coordinates.items():
            found = np.array([np.median(left[index == number]) for number in range(len(effects[axis]))])
            effects[axis] += found
            left = left - found[index]
    level = float(np.median(values))
    return {axis: level + effect for axis, effect in effects.items()}
