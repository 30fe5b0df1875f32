"""From a model on the meta device to the placement of each of its parameters."""
