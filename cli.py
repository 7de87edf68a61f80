"""The door: `python cli.py --help`."""

from lowmem_wanda.cli.main import run

if __name__ == "__main__":
    run()
