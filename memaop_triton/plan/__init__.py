"""Which layers get faster by conversion, measured."""
