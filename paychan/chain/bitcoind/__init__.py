"""The chain through the operator's bitcoind."""
