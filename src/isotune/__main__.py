"""Entry point of `python -m isotune`, which launchers of several processes also use."""

from isotune_cli import main

if __name__ == "__main__":
    main()
