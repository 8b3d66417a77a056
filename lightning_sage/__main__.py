"""`python -m lightning_sage` is `lightning-sage`."""

from lightning_sage.commands import main

if __name__ == "__main__":
    main()
