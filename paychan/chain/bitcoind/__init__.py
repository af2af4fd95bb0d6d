"""The chain backend over the operator's bitcoind."""
