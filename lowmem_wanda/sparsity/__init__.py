"""This room is the mathematics of pruning, from tensors to tensors; it knows neither files nor models."""

# names, for code that must not import torch: of `methods.known.METHODS`, REFINEMENTS and UPDATES
METHODS = ("wanda", "wanda-variant", "magnitude", "ria", "sparsegpt", "alps")
REFINEMENTS = ("none", "swaps")
UPDATES = ("none", "lsq")
GROUPS = ("row", "matrix")  # what is compared for a share; SparseGPT has its own, "columns"
EXPERT_SCORES = ("ean", "frequency", "aimer", "random")  # of `experts`; the first is the default where data is given
MEASURED = ("reap", "weighted", "squares", "ean", "man", "msan", "frequency")  # scores of what experts put out
CHECKPOINT_SCORES = (*MEASURED, "aimer", "random")
