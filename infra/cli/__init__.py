"""The command `marketstream`: words from a terminal or script in, calls of the platform out. Nothing here computes."""
