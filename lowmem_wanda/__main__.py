"""`python -m lowmem_wanda`, the same as `python cli.py`."""

from lowmem_wanda.cli.main import run

run()
