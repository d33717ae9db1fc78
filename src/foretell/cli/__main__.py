"""`python -m foretell.cli`, for when the console script is not on the path."""

from foretell.cli import main

if __name__ == "__main__":
    main()
