"""This room holds what concerns llama.cpp; it is the only room that knows GGUF."""
