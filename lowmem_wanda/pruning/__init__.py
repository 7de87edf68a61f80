"""This room makes a checkpoint sparse: the job, the walk, the report; it knows no parser, no terminal and no HTML."""

ORDERS = ("block", "dense", "sequential")  # the orders of `passes`, which needs torch
