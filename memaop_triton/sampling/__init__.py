"""Which rows are drawn, and the variance that this adds."""
