"""`python -m foretell`, for when the program is not on the path."""

from foretell.cli import main

if __name__ == "__main__":
    main()
