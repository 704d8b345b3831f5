"""The zoo's scripts: how a network is trained and measured, and command lines that compare pairs of networks."""
