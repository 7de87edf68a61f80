"""This room makes a checkpoint smaller by removing experts: their scores, the walk, the files, the report."""
