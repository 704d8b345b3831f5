"""One experiment's life: command line, directory, log, clock, checkpoints, backtracking, interruption, traces.

Each is a small module on its own; a script puts them together in its training loop, in sight of the reader.
"""
