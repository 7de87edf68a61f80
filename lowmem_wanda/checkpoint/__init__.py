"""This room reads, writes, resumes and verifies folders of safetensors; it never imports torch."""
