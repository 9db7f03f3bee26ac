"""`python -m isotune`, which is also what launchers of several processes are given."""

from isotune_cli import main

if __name__ == "__main__":
    main()
