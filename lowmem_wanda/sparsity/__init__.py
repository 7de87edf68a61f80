"""This room is the mathematics of pruning, from tensors to tensors; it knows neither files nor models."""

METHODS = ("wanda", "magnitude")  # the names in `methods.METHODS`, for code that must not import torch
GROUPS = ("row", "matrix")  # what is compared for a share
EXPERT_SCORES = ("ean", "frequency", "aimer", "random")  # of `experts`; the first is the default where data is given
