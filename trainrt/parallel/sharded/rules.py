"""The rules of all operators and functions, put where sharded tensors look for them."""

from __future__ import annotations

from trainrt.parallel.sharded import functions, lookup, movement, pointwise, products, reductions
from trainrt.parallel.sharded.tensor import FUNCTIONS, RULES

RULES.update({**movement.RULES, **products.RULES, **reductions.RULES, **lookup.RULES, **pointwise.RULES})
FUNCTIONS.update(functions.FUNCTIONS)
