"""`python -m memaop_triton`, the same as the command `memaop-triton`."""

from memaop_triton.commands.cli import main

if __name__ == "__main__":
    main()
