"""`python -m videodistill`: the same as the command `videodistill`."""

from videodistill.cli import main

if __name__ == "__main__":
    main()
