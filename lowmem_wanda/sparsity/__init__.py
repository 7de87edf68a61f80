"""This room is the mathematics of pruning: tensors in, tensors out; it knows no file, no model and no device."""

METHODS = ("wanda", "magnitude")  # the names of `methods.METHODS`, for those who do not need torch
