"""The configuration of a launch: chosen, tuned, kept."""
