"""`python -m workerd`: the same as the command `workerd`."""

from workerd.cli.main import main

if __name__ == "__main__":
    main()
