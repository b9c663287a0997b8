"""``python -m lightning_normreg``."""

from lightning_normreg.cli import main

if __name__ == "__main__":
    main()
