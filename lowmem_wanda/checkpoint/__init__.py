"""This room reads folders of safetensors, writes them whole or not at all, resumes and proves them, without torch."""
