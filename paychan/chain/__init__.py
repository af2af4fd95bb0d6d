"""What the server knows of the blockchain: the contract (`base`) and its backends."""
