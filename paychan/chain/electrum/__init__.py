"""A chain backend over an Electrum server: for operators without a node."""
