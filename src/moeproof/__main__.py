"""`python -m moeproof`: the command, where the script is not on the path."""

from moeproof.harness.cli import main

if __name__ == "__main__":
    main()
