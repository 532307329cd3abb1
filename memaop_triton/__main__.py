"""`python -m memaop_triton`, the same as the command `memaop-triton`."""

from memaop_triton.cli import main

if __name__ == "__main__":
    main()
