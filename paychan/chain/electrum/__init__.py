"""The chain through an Electrum server: for operators without a node."""
