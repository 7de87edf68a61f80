"""Ways of pruning one matrix: scores, solvers, refinements and updates, each a pure function in its own module."""
