"""This room makes a checkpoint sparse: the job, the walk, the report; it knows no parser, no terminal and no HTML."""

RECOVERIES = ("none", "block", "norms")  # what is trained of a pruned block
ALLOCATIONS = ("uniform", "owl", "atp")  # how a share is divided among blocks
STEPS = 200  # of a block's recovery
QUALITIES = {"fast": "wanda", "good": "alps", "best": "alps+recover"}  # methods by the table in docs/measured.md
ORDERS = ("block", "dense", "sequential")  # the orders of `passes`, which needs torch
