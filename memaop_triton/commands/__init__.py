"""The subcommands of `memaop-triton`: options in, tables and files out."""
