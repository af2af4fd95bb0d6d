"""How the server reaches the signer: the contract (`base`) and the client of its socket (`unix`)."""
