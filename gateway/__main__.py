"""`python -m gateway` is `cwg`."""

from gateway.cli import main

if __name__ == "__main__":
    main()
