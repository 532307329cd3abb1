"""Training loops of other libraries, each with a conversion, checkpoints and logs in one line.

Each module imports its library, so import the one that is needed.
"""
