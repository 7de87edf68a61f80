"""This room measures what a checkpoint is worth on text and on tasks; it knows nothing of pruning."""
