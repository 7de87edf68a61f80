"""This room walks a model one block at a time; it alone knows transformers and accelerate, and it knows no method."""
