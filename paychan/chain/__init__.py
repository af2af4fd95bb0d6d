"""Access to the blockchain: the contract (`base`) and its backends."""
