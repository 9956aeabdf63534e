"""`python -m medpfl`."""

from medpfl.cli import main

if __name__ == "__main__":
    main()
