"""``python -m lnsdeploy`` is the command line."""

from lnsdeploy.cli import main

if __name__ == "__main__":
    main()
