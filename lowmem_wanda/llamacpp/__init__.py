"""This room leads on to llama.cpp; it is the only one that knows GGUF."""
